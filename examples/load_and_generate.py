"""Load a trained model and continue a prompt, once in one call and once token by token.

    python examples/load_and_generate.py MODEL "The whale "

MODEL is a run folder, a checkpoint, or a folder that `titan-dp export` wrote.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from titan_dp.errors import UserError, run_main
from titan_dp.inference.pretrained import load_pretrained
from titan_dp.inference.sampling import Sampling, continue_text
from titan_dp.model.transformer import Transformer


@torch.inference_mode()
def likeliest(model: Transformer, ids: list[int], count: int, device: torch.device) -> list[int]:
    """The `count` likeliest ids after `ids`. The cache keeps the state, so a step costs the same after any number of tokens."""
    logits, cache = model.step(torch.tensor([ids], device=device), None)  # logits of the next token, [1, vocabulary]
    chosen: list[int] = []
    while True:
        chosen.append(int(logits[0].argmax()))
        if len(chosen) == count:
            return chosen
        logits, cache = model.step(torch.tensor([chosen[-1:]], device=device), cache)


def main() -> int:
    if len(sys.argv) != 3:
        raise UserError('usage: python examples/load_and_generate.py MODEL "The whale "')
    path, prompt = Path(sys.argv[1]), sys.argv[2]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_pretrained(path, device)
    model, tokenizer = loaded.model, loaded.tokenizer
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, tokenizer {tokenizer.name}")

    sampling = Sampling(temperature=0.8, top_p=0.95)
    print("sampled:  ", continue_text(model, tokenizer, prompt, max_new_tokens=40, sampling=sampling, seed=1))

    ids = tokenizer.encode(prompt)
    if tokenizer.bos_id is not None:
        ids = [tokenizer.bos_id, *ids]  # as every training document begins
    print("likeliest:", tokenizer.decode(likeliest(model, ids, 40, device)))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))  # a wrong path is one sentence and exit code 2
