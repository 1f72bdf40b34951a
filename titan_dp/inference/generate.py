"""`titan-dp generate CHECKPOINT`: continue prompts with a trained model, from a checkpoint or an exported folder.

Several prompts, or several samples of one, run as one batch. Time and memory a token do not grow with the length (but for
softmax layers without a window). Text goes to stdout, speed to stderr. Special tokens in a prompt are recognised; one the
tokenizer does not know is refused, because it would be read as ordinary characters.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from titan_dp.errors import UserError, explained
from titan_dp.files import Replaced, to_json

if TYPE_CHECKING:
    import torch

    from titan_dp import config
    from titan_dp.inference.pretrained import Pretrained
    from titan_dp.inference.sampling import TextStream


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="run folder (newest healthy step), checkpoint, or exported folder",
    )
    add("--prompt", action="append", metavar="TEXT", help="text to continue; may be repeated (default: 'The ')")
    add("--prompt-file", metavar="FILE", help="a text file as the prompt, '-' for stdin, or .jsonl with a key 'prompt' a line")
    add("--samples", type=_positive, default=1, metavar="N", help="continuations of each prompt (default: 1)")
    add("--max-new-tokens", type=_positive, default=200, metavar="N", help="tokens to generate at most (default: 200)")
    add("--temperature", type=_temperature, default=0.8, help="softmax temperature; 0 takes the likeliest (default: 0.8)")
    add("--top-k", type=_positive, default=None, metavar="K", help="choose among the K likeliest tokens only")
    add("--top-p", type=_share, default=1.0, metavar="P", help="choose among the fewest tokens of total probability P")
    add("--stop", type=_stop, action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")
    add("--seed", type=_seed, default=42, help="of the first continuation; the others count up (default: 42)")
    add("--no-bos", action="store_true", help="do not begin with BOS")
    add("--raw-prompt", action="store_true", help="take special tokens in the prompt as ordinary text")
    add("--json", action="store_true", help="print a JSON object a line: prompt, text, tokens, finish")
    add("--tokenizer", default="", help="use this one instead of the checkpoint's own")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the matrices (default: float32)")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive integer")
    return int(text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None


def _temperature(text: str) -> float:
    if (value := _number(text)) != 0 and not 1e-3 <= value <= 1e3:
        raise argparse.ArgumentTypeError(f"{text!r} is neither 0 nor from 0.001 to 1000")
    return value


def _share(text: str) -> float:
    if not 0 < (value := _number(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0 and at most 1")
    return value


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**62:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer from 0 to 2**62")
    return int(text)


def _stop(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("an empty text would end every continuation at once")
    return text


def run(args: argparse.Namespace) -> int:
    import torch

    from titan_dp.inference.pretrained import load_pretrained
    from titan_dp.inference.sampling import encode_prompt

    texts = read_prompts(args)
    replaced = Replaced("stop strings")
    args.stop = [replaced(text) for text in args.stop]
    replaced.say()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_pretrained(args.checkpoint, device, dtype=getattr(torch, args.dtype), tokenizer=args.tokenizer)
    tokenizer = loaded.tokenizer
    prompts = [(text, encode_prompt(tokenizer, text, bos=not args.no_bos, raw=args.raw_prompt)) for text in texts]
    _generate(args, loaded, [prompt for prompt in prompts for _ in range(args.samples)])
    return 0


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts of the command line and of the file, in this order, as Unicode; says on stderr what was none.

    Raises UserError for a file without any.
    """
    replaced = Replaced("prompts")
    prompts = [replaced(text) for text in _read_prompts(args)]
    replaced.say()
    return prompts


def _read_prompts(args: argparse.Namespace) -> list[str]:
    texts: list[str] = list(args.prompt or [])
    name = args.prompt_file
    if name is None:
        return texts or ["The "]
    try:
        content = sys.stdin.read() if name == "-" else Path(name).read_text("utf-8", "surrogatepass")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"--prompt-file {name!r} cannot be read: {reason}") from error
    if not name.endswith(".jsonl"):
        return [*texts, content]
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)["prompt"]
            if not isinstance(value, str):
                raise TypeError(f"its prompt is {value!r}")
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(f"{name}:{number} is no JSON object with a text under 'prompt' ({error})") from error
        texts.append(value)
    if not texts:
        raise UserError(f"--prompt-file {name!r} holds no prompt")
    return texts


def _generate(args: argparse.Namespace, loaded: Pretrained, prompts: list[tuple[str, list[int]]]) -> None:
    """Generate and print; one continuation streams, several are printed as each ends."""
    from titan_dp.inference.sampling import Sampling, TextStream, generate_ids

    sampling = Sampling(args.temperature, args.top_k or 0, args.top_p)
    streams = [TextStream(loaded.tokenizer, ids, args.stop) for _, ids in prompts]
    texts = [""] * len(prompts)
    live = len(prompts) == 1 and not args.json
    if live:
        print(prompts[0][0], end="", flush=True)
    steps = generate_ids(
        loaded.model,
        [ids for _, ids in prompts],
        sampling=sampling,
        seeds=range(args.seed, args.seed + len(prompts)),
        vocab_size=loaded.tokenizer.vocab_size,
    )
    start = first = time.perf_counter()
    for step, tokens in zip(range(args.max_new_tokens), steps, strict=False):
        first = time.perf_counter() if step == 0 else first
        for i, (stream, token) in enumerate(zip(streams, tokens, strict=True)):
            if stream.finished:
                continue
            piece = stream.push(token)
            piece += "" if stream.finished or step + 1 < args.max_new_tokens else stream.close()
            texts[i] += piece
            if live:
                print(piece, end="", flush=True)
            elif stream.finished or step + 1 == args.max_new_tokens:
                _show(args, i, prompts[i][0], texts[i], stream)
        if all(stream.finished for stream in streams):
            break
    if live:
        print()
    read = sum(len(ids) for _, ids in prompts), first - start
    _show_speed(loaded.source.label, *read, streams, time.perf_counter() - first)


def _show(args: argparse.Namespace, index: int, prompt: str, text: str, stream: TextStream) -> None:
    if args.json:
        finish = stream.finished or "length"
        print(to_json({"index": index, "prompt": prompt, "text": text, "tokens": stream.tokens, "finish": finish}), flush=True)
    else:
        print(f"--- {index + 1}\n{prompt}{text}", flush=True)


def _show_speed(label: str, prompt_tokens: int, prompt_seconds: float, streams: list[TextStream], seconds: float) -> None:
    tokens = sum(stream.tokens for stream in streams)
    after_first = tokens - len(streams)
    speed = f", {after_first / seconds:.0f} tokens/s" if after_first else ""
    batch = f" in a batch of {len(streams)}" if len(streams) > 1 else ""
    read = f"{prompt_tokens} prompt tokens in {prompt_seconds:.2f} s"
    print(f"[{label}: {read}; {tokens} new tokens{batch}{speed}]", file=sys.stderr)


def sample_text(checkpoint: Path, device: torch.device, c: config.Generate, seed: int) -> tuple[str, str]:
    """What the model of `checkpoint` makes of `c.prompt`, which `train.py` shows when a run ends: a title and a text.

    Returns ("no sample", why) if there is none: the run is done and saved, so nothing is a reason to fail it now.
    """
    from titan_dp.inference.pretrained import load_pretrained
    from titan_dp.inference.sampling import Sampling, continue_text

    try:
        loaded, sampling = load_pretrained(checkpoint, device), Sampling(c.temperature)
        text = continue_text(
            loaded.model, loaded.tokenizer, c.prompt, max_new_tokens=c.max_new_tokens, sampling=sampling, seed=seed
        )
        return "sample", c.prompt + text
    except BaseException as error:  # tokenizers panics with one
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        return "no sample", str(explained(error) or f"{type(error).__name__}: {error}")
