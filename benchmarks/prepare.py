"""titan-dp prepare beside `datasets.map` with the same tokenizer and as many processes: tokens a second and memory.

    python benchmarks/prepare.py                           writes benchmarks/results/prepare.{md,json}
    python benchmarks/prepare.py --megabytes 2 --pairs 1

Made-up text as JSON lines, and three tokenizers made on the spot: bytes, a byte-level BPE of 16,000 tokens as a Hugging Face
folder, and the same as a tiktoken file of ranks. The two sides take turns; a ratio is that of the two runs of one turn.

Of prepare the whole command counts, from the start of Python to shards with checksums on the disk. Of `datasets` counts what
lies between the same JSON lines and input_ids on the disk: `load_dataset`, which reads them into its cache, and `map` in
batches of its default size; its imports do not count. `map` alone stands beside it. CPU seconds are those of all processes, and
what others do on the machine hardly changes them. Memory is the largest sum over all processes of what each holds, shared
pages divided (PSS), seen every 0.2 s.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from common import Report, proportional_set_size

TOKENIZERS = {"bytes": "bytes", "bpe": "Hugging Face BPE of 16,000", "ranks": "the same as tiktoken ranks"}
WORKERS = os.cpu_count() or 1
DOCUMENT = 14_500
"""Bytes, on the average."""


def write_text(path: Path, megabytes: float) -> None:
    """Documents of words by Zipf's law, with some punctuation, capitals and numbers."""
    rng = np.random.default_rng(0)
    letters, share = np.array(list("etaoinshrdlcumwfgypbvkjxqz")), 0.9 ** np.arange(26)
    words = ["".join(rng.choice(letters, n, p=share / share.sum())) for n in rng.integers(1, 11, 100_000)]
    words = [word.capitalize() if i % 17 == 3 else str(i) if i % 41 == 5 else word for i, word in enumerate(words)]
    chosen, bounds = np.array(words, dtype=object), np.cumsum(1 / np.arange(1, len(words) + 1))
    written = 0
    with path.open("w") as file:
        while written < megabytes * 1e6:
            count = max(1, int(rng.lognormal(np.log(DOCUMENT / 7) - 0.9**2 / 2, 0.9)))
            found = chosen[np.searchsorted(bounds, rng.random(count) * bounds[-1])].tolist()
            found[6::13] = [word + "," for word in found[6::13]]
            found[11::23] = [word + "." for word in found[11::23]]
            found[60::61] = [word + "\n\n" for word in found[60::61]]
            text = " ".join(found)
            file.write(json.dumps({"text": text}) + "\n")
            written += len(text)


def make_tokenizers(text: Path, folder: Path) -> dict[str, str]:
    """The name of each for `titan-dp prepare`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    with text.open() as file:
        some = [json.loads(line)["text"] for line, _ in zip(file, range(500), strict=False)]
    trainer = trainers.BpeTrainer(vocab_size=16_000, show_progress=False, initial_alphabet=alphabet)
    backend.train_from_iterator(some, trainer)
    (folder / "bpe").mkdir()
    backend.save(str(folder / "bpe" / "tokenizer.json"))
    (folder / "bpe" / "tokenizer_config.json").write_text("{}")
    byte_of = _bytes_of_characters()
    vocabulary = sorted(backend.get_vocab().items(), key=lambda item: item[1])
    tokens = [base64.b64encode(bytes(byte_of[sign] for sign in token)).decode() for token, _ in vocabulary]
    (folder / "ranks.tiktoken").write_text("".join(f"{token} {i}\n" for i, token in enumerate(tokens)))
    return {"bytes": "bytes", "bpe": str(folder / "bpe"), "ranks": str(folder / "ranks.tiktoken")}


def _bytes_of_characters() -> dict[str, int]:
    """GPT-2's: printable bytes stand for themselves, the others for characters from 256 on."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + i): byte for i, byte in enumerate(others)}


def run(command: list[str]) -> dict[str, float]:
    """Wall-clock and CPU seconds and peak memory of a command, and what it printed as its last line, if that is JSON."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    peak, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.2):
            peak[0] = max(peak[0], proportional_set_size(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    out, err = process.communicate()
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    over.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}:\n{out}{err}")
    used = sum(after[:2]) - sum(before[:2])
    said = json.loads(out.splitlines()[-1]) if out.strip().endswith("}") else {}
    return {"seconds": seconds, "cpu": used, "megabytes": peak[0] / 1e6, **said}


def prepare(text: Path, tokenizer: str, folder: Path) -> dict[str, float]:
    out = folder / "out"
    arguments = ["--tokenizer", tokenizer, "--workers", str(WORKERS), "--no-bos", "--no-eos", "--validation-fraction", "0"]
    found = run([sys.executable, "-m", "titan_dp.cli", "prepare", str(text), "--out", str(out), *arguments])
    found["tokens"] = json.loads((out / "train" / "manifest.json").read_text())["tokens"]
    shutil.rmtree(out)
    return found


def map_beside(text: Path, tokenizer: str, folder: Path) -> dict[str, float]:
    found = run([sys.executable, __file__, "--map", str(text), tokenizer, str(folder / "cache")])
    shutil.rmtree(folder / "cache")
    return found


def datasets_map(text: str, tokenizer: str, cache: str) -> None:
    """What people write without titan-dp; prints its seconds and tokens."""
    import datasets

    datasets.disable_progress_bars()
    began, used = time.perf_counter(), _cpu_seconds()
    rows = datasets.load_dataset("json", data_files=text, split="train", cache_dir=cache)
    if tokenizer == "bytes":
        encode = _bytes_of_texts
    elif tokenizer.endswith(".tiktoken"):
        from titan_dp.data.tokenizer import tiktoken_encoding

        encoding = tiktoken_encoding(tokenizer)
        assert encoding is not None
        encode = lambda texts: [encoding.encode_ordinary(text) for text in texts]  # noqa: E731
    else:
        from transformers import PreTrainedTokenizerFast

        fast = PreTrainedTokenizerFast(tokenizer_file=str(Path(tokenizer) / "tokenizer.json"))
        encode = lambda texts: fast(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]  # noqa: E731
    start = time.perf_counter()
    mapped = rows.map(
        lambda batch: {"input_ids": encode(batch["text"])}, batched=True, num_proc=WORKERS, remove_columns=rows.column_names
    )
    end = time.perf_counter()
    spent = {"seconds": end - began, "map alone": end - start, "cpu": _cpu_seconds() - used}
    tokens = sum(len(batch.column("input_ids").combine_chunks().flatten()) for batch in mapped.with_format("arrow").iter(1000))
    print(json.dumps({**spent, "tokens": tokens}))


def _cpu_seconds() -> float:
    """Of this process and of those of its children that have ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def _bytes_of_texts(texts: list[str]) -> list[list[int]]:
    return [list(text.encode()) for text in texts]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--megabytes", type=float, default=250, help="of text (default: 250)")
    parser.add_argument("--pairs", type=int, default=3, help="turns of both sides (default: 3)")
    parser.add_argument("--tokenizers", nargs="+", choices=TOKENIZERS, default=list(TOKENIZERS))
    parser.add_argument("--map", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.map:
        datasets_map(*args.map)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = folder / "text.jsonl"
        write_text(text, args.megabytes)
        names = make_tokenizers(text, folder)
        with text.open() as file:
            documents = sum(1 for _ in file)
        title = (
            f"titan-dp prepare beside datasets.map, {args.megabytes:g} MB in {documents:,} documents, {WORKERS} workers each"
        )
        options = "".join(
            f" --{key} {getattr(args, key):g}"
            for key in ("megabytes", "pairs")
            if getattr(args, key) != parser.get_default(key)
        )
        report = Report("prepare", title, live=True, command=f"python benchmarks/prepare.py{options}")
        for tokenizer in args.tokenizers:
            sides: dict[str, list[dict[str, float]]] = {"prepare": [], "datasets.map": []}
            loads = [os.getloadavg()[0]]
            for turn in range(args.pairs):
                both = [("prepare", prepare), ("datasets.map", map_beside)]
                for side, measure in both if turn % 2 == 0 else both[::-1]:
                    sides[side].append(measure(text, names[tokenizer], folder))
                    loads.append(os.getloadavg()[0])
            add_rows(report, TOKENIZERS[tokenizer], sides, loads)
        report.write()


def add_rows(report: Report, tokenizer: str, sides: dict[str, list[dict[str, float]]], loads: list[float]) -> None:
    turns = list(zip(sides["prepare"], sides["datasets.map"], strict=True))
    assert all(ours["tokens"] == theirs["tokens"] for ours, theirs in turns), "not the same tokens"
    for side, found in sides.items():
        middle = {key: statistics.median(each[key] for each in found) for key in ("seconds", "cpu", "megabytes", "tokens")}
        row = {
            "tokenizer": tokenizer,
            "side": side,
            "M tokens": middle["tokens"] / 1e6,
            "seconds": middle["seconds"],
            "M tokens/s": middle["tokens"] / middle["seconds"] / 1e6,
            "CPU s": middle["cpu"],
            "peak MB": round(middle["megabytes"]),
        }
        if side == "prepare":
            row |= {
                "times as fast": _spread(theirs["seconds"] / ours["seconds"] for ours, theirs in turns),
                "as map alone": _spread(theirs["map alone"] / ours["seconds"] for ours, theirs in turns),
                "tokens per CPU second": _spread(theirs["cpu"] / ours["cpu"] for ours, theirs in turns),
                "memory": _spread(ours["megabytes"] / theirs["megabytes"] for ours, theirs in turns),
            }
        report.add({**row, "load": f"{min(loads):.1f} to {max(loads):.1f}"})


def _spread(ratios: Iterable[float]) -> str:
    """The median, and from where to where."""
    found = sorted(ratios)
    return f"{statistics.median(found):.2f} ({found[0]:.2f} to {found[-1]:.2f})"


if __name__ == "__main__":
    main()
