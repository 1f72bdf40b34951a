"""Does vLLM write what titan_dp writes? Greedy tokens and log-probabilities for prompts of several lengths, read in chunks.

python serving/vllm/check.py FOLDER        # what `titan-dp export --format remote-code` wrote; float32, exit code 1 if not
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

PROMPTS = ("The", "It was the best of times, it was the worst of times, it was", "Call me Ishmael. " * 5)
TOKENS, TOLERANCE = 16, 1e-3


def main(folder: Path) -> int:
    try:
        from vllm import LLM, SamplingParams
    except ImportError:
        print("vLLM is not installed here; see serving/vllm/README.md", file=sys.stderr)
        return 2
    from titan_dp.inference.pretrained import load_pretrained

    ours = load_pretrained(folder, torch.device("cpu"))
    prompts = [ours.tokenizer.encode(text) for text in PROMPTS]
    llm = LLM(
        model=str(folder),
        trust_remote_code=True,  # for its config.json
        dtype="float32",
        enforce_eager=True,
        enable_prefix_caching=False,
        max_num_batched_tokens=32,  # a longer prompt takes several steps
        max_num_seqs=4,
        gpu_memory_utilization=0.2,
    )
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=1, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling)
    worst = 0.0
    for ids, output in zip(prompts, outputs, strict=True):
        written = list(output.outputs[0].token_ids)
        with torch.no_grad():
            scores = ours.model(torch.tensor([ids + written]))[0].log_softmax(-1)[len(ids) - 1 : -1]
        theirs = torch.tensor([step[token].logprob for token, step in zip(written, output.outputs[0].logprobs, strict=True)])
        same = scores.argmax(-1).tolist() == written
        off = float((scores.gather(1, torch.tensor(written)[:, None])[:, 0] - theirs).abs().max())
        print(f"{len(ids):4} tokens: {'the same' if same else 'OTHER'} {TOKENS} tokens, log-probabilities within {off:.1e}")
        worst = max(worst, off if same else float("inf"))
    return 0 if worst < TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
