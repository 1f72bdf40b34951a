"""`titan-dp prepare`: text in, token shards out; parallel, resumable, verifiable.

The result is a function of the input and the arguments alone: documents keep the order of the input, whatever the
number of workers, and whether a document is held out is decided by the hash of its text, so that duplicates never end up
on both sides. One process reads, workers tokenise batches, results are written in order, at most a few batches ahead.
After every shard `progress.json` says how many documents each split has on disk; a run that was killed reads the input
again up to there, tokenises only what is missing, and ends with the same bytes as one that was not.
OUT may hold other people's files: `--overwrite` deletes the shards that OUT's own records list, and nothing else.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from titan_dp.data import sources
from titan_dp.data.shards import MANIFEST, PROGRESS, SPLITS, Shard, ShardWriter, Split, TokenShards, listed_shards, shard_name
from titan_dp.data.tokenizer import Tokenizer, load_tokenizer
from titan_dp.errors import UserError
from titan_dp.files import JsonObject, Natural, Replaced, parse_json, write_json

_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 256, 1_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from titan_dp.config.schema import parse_count

    def count(text: str) -> int:
        value = parse_count(text)
        if not isinstance(value, int) or value < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is no positive count such as 100M")
        return value

    def fraction(text: str) -> float:
        value = float(text)
        if not 0 <= value < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is not in [0, 1)")
        return value

    parser.add_argument(
        "inputs", nargs="*", metavar="INPUT", help="files or folders: .txt, .jsonl, .jsonl.gz, .jsonl.zst, .parquet"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write train/ and validation/ into")
    parser.add_argument(
        "--tokenizer", default="bytes", help="bytes, a tiktoken encoding, a .tiktoken file, or a Hugging Face tokenizer"
    )
    parser.add_argument("--column", default="text", help="key or column that holds the text (default: text)")
    parser.add_argument("--hf-dataset", default="", help="read this Hugging Face dataset instead of files")
    parser.add_argument("--hf-name", default="", help="configuration of the dataset")
    parser.add_argument("--hf-split", default="train", help="split of the dataset (default: train)")
    parser.add_argument("--streaming", action="store_true", help="stream the dataset instead of downloading it first")
    parser.add_argument(
        "--bos", action=argparse.BooleanOptionalAction, help="put BOS before every document (default: if there is one)"
    )
    parser.add_argument(
        "--eos", action=argparse.BooleanOptionalAction, help="put EOS after every document (default: if there is one)"
    )
    parser.add_argument(
        "--validation-fraction", type=fraction, default=0.01, help="share of documents held out (default: 0.01)"
    )
    parser.add_argument("--shard-tokens", type=count, default=100_000_000, help="tokens a shard, such as 100M (default)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="tokenising processes (default: all cores)")
    parser.add_argument("--overwrite", action="store_true", help="delete the shards of an earlier prepare in OUT first")
    parser.add_argument("--verify", action="store_true", help="check every byte of what is in OUT instead of writing")


def run(args: argparse.Namespace) -> int:
    if args.verify:
        return _verify(args.out)
    if bool(args.inputs) == bool(args.hf_dataset):
        raise UserError("prepare reads either INPUT files or --hf-dataset NAME: give one of them")
    files = sources.find_files(args.inputs)
    tokenizer = load_tokenizer(args.tokenizer)
    plan = _plan(args, files, tokenizer)
    progress = _Progress.begin_again(args.out, plan) if args.overwrite else _Progress.open(args.out, plan)
    if progress is None:
        print(f"{args.out} is complete already: nothing to do (--overwrite starts again)")
        return 0
    _write(args, files, tokenizer, plan, progress)
    for split in SPLITS:
        if (args.out / split / MANIFEST).exists():
            shards = TokenShards(args.out / split)
            documents = shards.manifest["documents"]
            print(f"{args.out / split}: {shards.tokens:,} tokens in {documents:,} documents, {len(shards.shards)} shard(s)")
    return 0


def _plan(args: argparse.Namespace, files: list[Path], tokenizer: Tokenizer) -> dict[str, Any]:
    """Everything the result depends on; a second run must agree to continue the first one's work."""
    return {
        "inputs": [{"file": str(path), "bytes": path.stat().st_size} for path in files],
        "hf": [args.hf_dataset, args.hf_name, args.hf_split] if args.hf_dataset else None,
        "column": args.column,
        "tokenizer": tokenizer.hash,
        "bos": _boundary("bos", args.bos, tokenizer.bos_id, tokenizer),
        "eos": _boundary("eos", args.eos, tokenizer.eos_id, tokenizer),
        "validation_fraction": args.validation_fraction,
        "shard_tokens": args.shard_tokens,
    }


def _boundary(role: str, wanted: bool | None, token: int | None, tokenizer: Tokenizer) -> int | None:
    if wanted and token is None:
        raise UserError(f"--{role}: tokenizer {tokenizer.name!r} has no {role.upper()} token; leave the option out")
    return None if wanted is False else token


class _Saved(JsonObject):
    """progress.json."""

    plan: dict[str, Any]
    finished: bool
    done: dict[Split, Natural]
    shards: dict[Split, list[Shard]]


@dataclass
class _Progress:
    """What is safely on disk: for each split its shards and the number of input documents they account for."""

    path: Path
    plan: dict[str, Any]
    shards: dict[Any, list[Shard]]
    done: dict[Any, int]

    @staticmethod
    def open(out: Path, plan: dict[str, Any]) -> _Progress | None:
        """Where an earlier run stopped, or the beginning; None if it finished.

        Raises UserError where OUT holds something else.
        """
        out.mkdir(parents=True, exist_ok=True)
        path = out / PROGRESS
        if not path.exists():
            if any(out.iterdir()):
                raise UserError(f"--out {out} is not empty and holds no earlier prepare; choose another folder")
            return _Progress.nothing(path, plan)
        saved, remedy = _read_record(path), "choose another folder, or --overwrite"
        if differing := [key for key in plan if saved.plan.get(key) != plan[key]]:
            raise UserError(f"--out {out} was prepared with another {', '.join(differing)}; repeat those arguments, {remedy}")
        return None if saved.finished else _Progress(path, plan, saved.shards, saved.done)

    @staticmethod
    def nothing(path: Path, plan: dict[str, Any]) -> _Progress:
        return _Progress(path, plan, {split: [] for split in SPLITS}, dict.fromkeys(SPLITS, 0))

    @staticmethod
    def begin_again(out: Path, plan: dict[str, Any]) -> _Progress:
        """The beginning, the shards of an earlier prepare in `out` deleted; whatever else lies there stays.

        Raises UserError, before anything is deleted, where `out` holds files and was not made by prepare, or where a file
        that prepare would write is one that no record of it lists.
        """
        if out.exists() and not out.is_dir():
            raise UserError(f"--out {out} is a file; choose a folder")
        out.mkdir(parents=True, exist_ok=True)
        record = out / PROGRESS
        saved = _read_record(record) if record.exists() else None
        own: list[Path] = []
        foreign: list[Path] = []
        for split in SPLITS:
            if (folder := out / split).is_dir():
                names = _own_names(folder, saved, split)
                for path in sorted(folder.iterdir()):
                    if path.name in names:
                        own.append(path)
                    elif shard_name(path.name):
                        foreign.append(path)
        if saved is None and not own and any(out.iterdir()):
            raise UserError(
                f"--overwrite: {out} holds files and was not made by prepare, so nothing is deleted; choose another folder"
            )
        if foreign:
            raise UserError(
                f"--overwrite: no earlier prepare lists {foreign[0]}, which would be overwritten; move it away, or choose "
                "another folder"
            )
        # A kill from here on leaves a record that lists what there may still be and that no command but this one goes on from.
        shards = {split: [asdict(shard) for shard in entries] for split, entries in saved.shards.items()} if saved else {}
        finished = saved is not None and saved.finished
        write_json(record, {"plan": {}, "finished": finished, "done": {}, "shards": shards})
        for path in own:
            path.unlink()
        return _Progress.nothing(record, plan)

    def save(self, finished: bool = False) -> None:
        shards = {split: [asdict(shard) for shard in entries] for split, entries in self.shards.items()}
        write_json(self.path, {"plan": self.plan, "finished": finished, "done": self.done, "shards": shards})


def _read_record(path: Path) -> _Saved:
    """Raises UserError where it is none: then nobody knows what prepare wrote, and what somebody else did."""
    remedy = "choose another folder, or move it away and take --overwrite"
    return parse_json(_Saved, path.read_bytes(), path, "record of an earlier prepare", remedy)


def _own_names(folder: Path, saved: _Saved | None, split: Split) -> set[str]:
    """Names of the files that prepare wrote into a split's folder: what its manifest and its record list and, where it was cut
    off, the shard it was at, which nothing lists yet.
    """
    listed = listed_shards(folder)
    recorded = [] if saved is None else saved.shards.get(split, [])
    names = {name for shard in [*(listed or []), *recorded] for name in (shard.file, shard.starts_file) if shard_name(name)}
    if listed is not None or (saved is not None and saved.finished):
        names.add(MANIFEST)
    if saved is not None and not saved.finished:
        names |= {f"shard-{len(recorded):05}.npy", f"shard-{len(recorded):05}.starts.npy", f".{MANIFEST}.tmp"}
    return names | {f".{name}.tmp" for name in names}


def _write(
    args: argparse.Namespace, files: list[Path], tokenizer: Tokenizer, plan: dict[str, Any], progress: _Progress
) -> None:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    writers = {split: ShardWriter(args.out / split, dtype, args.shard_tokens, progress.shards[split]) for split in SPLITS}
    progress.save()
    replaced = Replaced("documents")
    texts = (
        sources.hugging_face_documents(args.hf_dataset, args.hf_name, args.hf_split, args.column, args.streaming, replaced)
        if args.hf_dataset
        else sources.documents(files, args.column, replaced)
    )
    skip = min(progress.done.values())
    total = sum(path.stat().st_size for path in files if path.suffix not in (".gz", ".zst", ".parquet"))
    exact = total and len(files) == sum(path.suffix not in (".gz", ".zst", ".parquet") for path in files)
    columns = (TextColumn("tokenising"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[count]}"))
    index = skip
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task("", total=total if exact else None, count="")
        for _ in islice(texts, skip):
            pass
        for batch in _tokenise(texts, args, plan):
            for ids, held_out, size in batch:
                split = SPLITS[held_out]
                index += 1
                bar.advance(task, size)
                if index <= progress.done[split] or not len(ids):  # on disk already, or empty without BOS and EOS
                    continue
                if writers[split].add(ids, size):
                    progress.done[split] = index
                    progress.save()
            bar.update(task, count=f"{index:,} documents")
        bar.update(task, total=1, completed=1)
    replaced.say()
    if index == 0:
        raise UserError("the input holds no documents")
    for split, writer in writers.items():
        writer.flush()
        if writer.shards:
            facts = {
                "split": split,
                "validation_fraction": args.validation_fraction,
                "adds_bos": plan["bos"] is not None,
                "adds_eos": plan["eos"] is not None,
            }
            writer.finish(tokenizer, facts)
        else:
            with suppress(OSError):  # somebody else's files are in it
                writer.folder.rmdir()
    progress.done = dict.fromkeys(SPLITS, index)
    progress.save(finished=True)


_Tokenised = list[tuple[np.ndarray, bool, int]]


def _tokenise(texts: Iterator[str], args: argparse.Namespace, plan: dict[str, Any]) -> Iterator[_Tokenised]:
    """Batches of (ids, held out, bytes), in order; at most four batches a worker in flight."""
    batches = _batched(texts)
    if args.workers <= 1:
        _start_worker(args.tokenizer, plan)
        yield from map(_encode, batches)
        return
    with ProcessPoolExecutor(args.workers, initializer=_start_process, initargs=(args.tokenizer, plan)) as pool:
        try:
            flying: deque[Future[_Tokenised]] = deque(pool.submit(_encode, b) for b in islice(batches, 4 * args.workers))
            while flying:
                yield flying.popleft().result()
                flying.extend(pool.submit(_encode, b) for b in islice(batches, 1))
        except BaseException:  # a Ctrl-C, too: nobody reads what is in flight any more
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _batched(texts: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if len(batch) == _BATCH_DOCUMENTS or size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


_worker: tuple[Tokenizer, dict[str, Any]]


def _start_process(tokenizer: str, plan: dict[str, Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal tells all of them; the one that reads ends the others
    _start_worker(tokenizer, plan)


def _start_worker(tokenizer: str, plan: dict[str, Any]) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    _worker = load_tokenizer(tokenizer), plan


def _encode(texts: list[str]) -> _Tokenised:
    tokenizer, plan = _worker
    before = [] if plan["bos"] is None else [plan["bos"]]
    after = [] if plan["eos"] is None else [plan["eos"]]
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    limit = int(plan["validation_fraction"] * 2**64)
    out = []
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        raw = text.encode()
        held_out = int.from_bytes(hashlib.sha256(raw).digest()[:8], "big") < limit
        out.append((np.array(before + ids + after, dtype=dtype), held_out, len(raw)))
    return out


def _verify(out: Path) -> int:
    folders = [out / split for split in SPLITS if (out / split / MANIFEST).exists()] or [out]
    problems = []
    for folder in folders:
        shards = TokenShards(folder)
        found = list(shards.verify())
        problems += found
        print(f"{folder}: {'BAD' if found else 'good'}, {shards.tokens:,} tokens, fingerprint {shards.fingerprint[:16]}")
    if problems:
        raise UserError("; ".join(problems))
    return 0
