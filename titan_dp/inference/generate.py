"""`titan-dp generate CHECKPOINT`: continue prompts with a trained model, from a checkpoint or an exported folder.

Several prompts, or several samples of one, run as one batch. Time and memory per token do not grow with the length (except
in softmax layers without a window). Text goes to stdout, on a terminal with its control characters escaped, speed to stderr.
Special tokens in a prompt are recognised; one that the tokenizer does not know is refused, because it would be read as
ordinary characters.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from titan_dp.config.arguments import fraction, natural, number, positive
from titan_dp.errors import UserError, explained
from titan_dp.files import Replaced, to_json
from titan_dp.output import harmless

if TYPE_CHECKING:
    import torch

    from titan_dp import config
    from titan_dp.inference.pretrained import Pretrained


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="run folder (newest healthy step), checkpoint, or exported folder",
    )
    add("--prompt", action="append", metavar="TEXT", help="text to continue; may be repeated (default: 'The ')")
    add("--prompt-file", metavar="FILE", help="a text file as the prompt, '-' for stdin, or .jsonl with 'prompt' in every line")
    add("--samples", type=positive, default=1, metavar="N", help="continuations of each prompt (default: 1)")
    add("--max-new-tokens", type=positive, default=200, metavar="N", help="tokens to generate at most (default: 200)")
    not_negative = number(Annotated[float, Field(ge=0)])
    add("--temperature", type=not_negative, default=0.8, help="softmax temperature; 0 takes the likeliest (default: 0.8)")
    add("--top-k", type=positive, default=None, metavar="K", help="choose among the K likeliest tokens only")
    add("--top-p", type=fraction, default=1.0, metavar="P", help="choose among the fewest tokens of total probability P")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")
    add("--seed", type=natural, default=42, help="of the first continuation; the others count up (default: 42)")
    bos = "begin with BOS (default: if documents did at the training)"
    add("--bos", action=argparse.BooleanOptionalAction, help=bos)
    add("--raw-prompt", action="store_true", help="take special tokens in the prompt as ordinary text")
    add("--json", action="store_true", help="print one JSON object per line: index, prompt, text, tokens, finish")
    add("--tokenizer", default="", help="use this one instead of the checkpoint's own")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the matrices (default: float32)")


def run(args: argparse.Namespace) -> int:
    import torch

    from titan_dp.inference.pretrained import load_pretrained
    from titan_dp.inference.sampling import encode_prompt

    if "" in args.stop:
        raise UserError("--stop '' would end every continuation at once; name the text to stop before")
    texts = read_prompts(args)
    replaced = Replaced("stop string")
    args.stop = [replaced(text) for text in args.stop]
    replaced.say()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_pretrained(args.checkpoint, device, dtype=getattr(torch, args.dtype), tokenizer=args.tokenizer)
    tokenizer = loaded.tokenizer
    prompts = [(text, encode_prompt(tokenizer, text, bos=args.bos, raw=args.raw_prompt)) for text in texts]
    _generate(args, loaded, [prompt for prompt in prompts for _ in range(args.samples)])
    return 0


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts of the command line, then those of the file, as Unicode; says on stderr how many had to be mended for that.

    Raises UserError for a file without any.
    """
    texts = list(args.prompt or [])
    if args.prompt_file is not None:
        texts += _in_file(args.prompt_file)
    replaced = Replaced("prompt")
    prompts = [replaced(text) for text in texts or ["The "]]
    replaced.say()
    return prompts


def _in_file(name: str) -> list[str]:
    try:
        content = sys.stdin.read() if name == "-" else Path(name).read_text("utf-8", "surrogatepass")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"--prompt-file {name!r} cannot be read: {reason}") from error
    if not name.endswith(".jsonl"):
        return [content]
    texts = []
    for i, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)["prompt"]
            if not isinstance(value, str):
                raise TypeError(f"its prompt is {value!r}")
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(f"{name}:{i} is no JSON object with a text under 'prompt' ({error})") from error
        texts.append(value)
    if not texts:
        raise UserError(f"--prompt-file {name!r} holds no prompt")
    return texts


def _generate(args: argparse.Namespace, loaded: Pretrained, prompts: list[tuple[str, list[int]]]) -> None:
    """Generate and print: a single continuation token by token, several whole, each when it ends."""
    from titan_dp.inference.sampling import Sampling, TextStream, stream_texts

    sampling = Sampling(args.temperature, args.top_k or 0, args.top_p)
    streams = [TextStream(loaded.tokenizer, ids, args.stop, args.max_new_tokens) for _, ids in prompts]
    live = len(prompts) == 1 and not args.json
    as_seen = harmless if sys.stdout.isatty() else str  # in a file or pipe it is the text itself
    if live:
        print(as_seen(prompts[0][0]), end="", flush=True)
    start, first = time.perf_counter(), 0.0
    for row, piece in stream_texts(loaded.model, streams, sampling, range(args.seed, args.seed + len(prompts))):
        first = first or time.perf_counter()
        prompt, stream = prompts[row][0], streams[row]
        if live:
            print(as_seen(piece), end="", flush=True)
        elif stream.finished and args.json:
            shown = {"index": row, "prompt": prompt, "text": stream.text, "tokens": stream.tokens, "finish": stream.finished}
            print(to_json(shown), flush=True)
        elif stream.finished:
            print(f"--- {row + 1}\n{as_seen(prompt + stream.text)}", flush=True)
    if live:
        print()
    tokens, seconds = sum(stream.tokens for stream in streams), time.perf_counter() - first
    after_first = tokens - len(streams)
    speed = f", {after_first / seconds:.0f} tokens/s" if after_first else ""
    batch = f" in a batch of {len(streams)}" if len(streams) > 1 else ""
    read = f"{sum(len(ids) for _, ids in prompts)} prompt tokens in {first - start:.2f} s"
    print(f"[{loaded.source.label}: {read}; {tokens} new tokens{batch}{speed}]", file=sys.stderr)


def sample_text(checkpoint: Path, device: torch.device, c: config.Generate, seed: int) -> tuple[str, str]:
    """What the model of `checkpoint` makes of `c.prompt`, which `train.py` shows when a run ends: a title and a text.

    Returns ("no sample", why) if there is none: the run is done and saved, so nothing is a reason to fail it now.
    """
    try:
        from titan_dp.inference.pretrained import load_pretrained
        from titan_dp.inference.sampling import Sampling, continue_text

        loaded, sampling = load_pretrained(checkpoint, device), Sampling(c.temperature)
        text = continue_text(
            loaded.model, loaded.tokenizer, c.prompt, max_new_tokens=c.max_new_tokens, sampling=sampling, seed=seed
        )
        return "sample", c.prompt + text
    except BaseException as error:  # tokenizers panics with one
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        return "no sample", str(explained(error) or f"{type(error).__name__}: {error}")
