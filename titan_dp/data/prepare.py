"""`titan-dp prepare`: text in, token shards out; parallel, resumable, verifiable.

The result is a function of the input and the arguments alone. Documents keep the order of the input, whatever the number
of workers. Whether a document is held out is decided by the hash of its text, so duplicates never end up on both sides.
One process reads, workers tokenise batches, results are written in order, at most a few batches ahead. After every shard
`progress.json` says how many documents each split has on disk. A run that was killed reads the input again up to there,
tokenises only what is missing, and ends with the same bytes as one that was not.
OUT may hold other people's files: `--overwrite` deletes the shards that OUT's own records list, and nothing else.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shlex
import signal
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from titan_dp import output
from titan_dp.config.arguments import count, number
from titan_dp.data import sources
from titan_dp.data.formats import COMPRESSIONS, READERS, Reading
from titan_dp.data.shards import MANIFEST, PROGRESS, SPLITS, Shard, ShardWriter, Split, TokenShards, listed_shards, shard_name
from titan_dp.data.sources import Account
from titan_dp.data.tokenizer import Tokenizer, load_tokenizer
from titan_dp.errors import UserError, counted, say_once
from titan_dp.files import JsonObject, Natural, Replaced, parse_json, shorten, write_json

# A worker's batch ends with whichever comes first: many short documents share one message to a worker, and a few long ones do
# not fill the memory (4 batches per worker are in flight).
_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 256, 1_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, either = parser.add_argument, argparse.BooleanOptionalAction
    share = number(Annotated[float, Field(ge=0, lt=1)])
    add("inputs", nargs="*", metavar="INPUT", help=f"files or folders: {', '.join(READERS)}; also {', '.join(COMPRESSIONS)}")
    add("--files-from", type=Path, metavar="LIST", help="read the inputs named in this file, one per line")
    add("--out", type=Path, required=True, help="folder to write train/ and validation/ into")
    add(
        "--tokenizer",
        default="bytes",
        help="bytes, a tiktoken encoding, a file of one (.tiktoken, .model, .json), or a Hugging Face one",
    )
    add("--column", default="text", help="key or column that holds the text (default: text)")
    add("--separator", default="", help=r"what ends a document in text files, such as '\n\n\n' (default: the file does)")
    add("--on-bad-document", choices=("stop", "skip"), default="stop", help="what cannot be read ends it, or is counted")
    add("--hf-dataset", default="", help="read this Hugging Face dataset instead of files")
    add("--hf-name", default="", help="configuration of the dataset")
    add("--hf-split", default="train", help="split of the dataset (default: train)")
    add("--streaming", action="store_true", help="stream the dataset instead of downloading it first")
    add("--bos", action=either, help="put BOS before every document (default: if there is one)")
    add("--eos", action=either, help="put EOS after every document (default: if there is one)")
    add("--validation-fraction", type=share, default=0.01, help="share of documents held out (default: 0.01)")
    add("--shard-tokens", type=count, default=100_000_000, help="tokens per shard, such as 100M (default)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="tokenising processes (default: all cores)")
    add("--overwrite", action="store_true", help="delete the shards of an earlier prepare in OUT first")
    add("--verify", action="store_true", help="check every byte of what is in OUT instead of writing")


def run(args: argparse.Namespace) -> int:
    if args.verify:
        return _verify(args.out)
    if args.files_from:
        args.inputs += _names_in(args.files_from)
    if bool(args.inputs) == bool(args.hf_dataset):
        raise UserError("prepare reads either INPUT files or --hf-dataset NAME: give one of them")
    account = Account()
    files = sources.find_files(args.inputs, account, args.out)
    tokenizer = load_tokenizer(args.tokenizer)
    plan = _plan(args, files, tokenizer)
    progress = _begin_again(args.out, plan) if args.overwrite else _go_on(args.out, plan)
    if progress.finished:
        print(f"{args.out} is complete already: nothing to do (--overwrite starts again)")
        return 0
    _write(args, files, tokenizer, progress, account)
    found = [split for split in SPLITS if (args.out / split / MANIFEST).exists()]
    for split in found:
        shards = TokenShards(args.out / split)
        documents = shards.manifest["documents"]
        size = f"{shards.tokens:,} tokens in {counted(documents, 'document')}, {counted(len(shards.shards), 'shard')}"
        print(f"{args.out / split}: {size}")
    paths = {"train": "data.path", "validation": "validation.path"}
    settings = " ".join(f"--{paths[split]} {shlex.quote(str(args.out / split))}" for split in found)
    output.print_next("train on it", f"titan-dp train --config ... {settings}")
    return 0


def _unescaped(separator: str) -> str:
    for written, meant in ((r"\n", "\n"), (r"\r", "\r"), (r"\t", "\t")):
        separator = separator.replace(written, meant)
    return separator


def _names_in(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--files-from {path} cannot be read: {error}") from error


def _plan(args: argparse.Namespace, files: list[Path], tokenizer: Tokenizer) -> dict[str, Any]:
    """Everything the result depends on; a second run must agree to continue the first one's work."""
    before, after = tokenizer.separators(args.bos, args.eos)
    if not before and not after and (args.bos, args.eos) != (False, False):
        lacking = [role for role, token in (("BOS", tokenizer.bos_id), ("EOS", tokenizer.eos_id)) if token is None]
        special = f" (its special tokens: {shorten(', '.join(tokenizer.special_tokens))})" if tokenizer.special_tokens else ""
        say_once(
            f"WARNING: documents are joined without a separator, because tokenizer {tokenizer.name!r} has no "
            f"{' and no '.join(lacking)}{special}; if that is meant, say so with --no-bos --no-eos; if not, name a token as "
            "eos_token in its tokenizer_config.json"
        )
    return {
        "inputs": [_input(path) for path in files],
        "hf": [args.hf_dataset, args.hf_name, args.hf_split] if args.hf_dataset else None,
        "column": args.column,
        "tokenizer": tokenizer.hash,
        "bos": next(iter(before), None),
        "eos": next(iter(after), None),
        "validation_fraction": args.validation_fraction,
        "shard_tokens": args.shard_tokens,
        "separator": args.separator,
        "on_bad_document": args.on_bad_document,
    }


def _input(path: Path) -> dict[str, Any]:
    found = path.stat()
    return {"file": str(path), "bytes": found.st_size, "modified": found.st_mtime_ns}


# -- the record of what is on disk ---------------------------------------------------------------------------------------


class _Progress(JsonObject):
    """progress.json: what is safely on disk."""

    plan: dict[str, Any]
    finished: bool
    done: dict[Split, Natural]
    """For each split, the input documents that its shards account for."""
    shards: dict[Split, list[Shard]]

    @staticmethod
    def nothing(plan: dict[str, Any]) -> _Progress:
        return _Progress(plan=plan, finished=False, done=dict.fromkeys(SPLITS, 0), shards={"train": [], "validation": []})

    @staticmethod
    def read(out: Path) -> _Progress | None:
        """The record in `out`, None if there is none.

        Raises UserError if it cannot be read: then nobody knows what prepare wrote, and what somebody else did.
        """
        path, remedy = out / PROGRESS, "choose another folder, or move it away and take --overwrite"
        return parse_json(_Progress, path.read_bytes(), path, "record of an earlier prepare", remedy) if path.exists() else None

    def save(self, out: Path) -> None:
        write_json(out / PROGRESS, self.model_dump())


def _go_on(out: Path, plan: dict[str, Any]) -> _Progress:
    """Where an earlier run stopped, or the beginning. Raises UserError if OUT holds something else."""
    out.mkdir(parents=True, exist_ok=True)
    if (saved := _Progress.read(out)) is None:
        if any(out.iterdir()):
            raise UserError(f"--out {out} is not empty and holds no earlier prepare; choose another folder")
        return _Progress.nothing(plan)
    usual = {"separator": "", "on_bad_document": "stop"}  # what an earlier version did, and did not write down
    differing = [key for key in plan if key != "inputs" and saved.plan.get(key, usual.get(key)) != plan[key]]
    differing += ["inputs"] * ([i["file"] for i in saved.plan.get("inputs", [])] != [i["file"] for i in plan["inputs"]])
    changed = _changed_inputs(saved.plan, plan)
    if (differing or changed) and not saved.finished and not any(out.glob("*/*")):
        return _Progress.nothing(plan)  # the earlier one has written nothing
    if changed:
        raise UserError(
            f"{changed} has changed since it was prepared into {out}; --overwrite prepares everything anew, or choose another "
            "folder"
        )
    if "tokenizer" in differing:
        raise UserError(
            f"--out {out} was prepared with a tokenizer whose hash is {str(saved.plan.get('tokenizer'))[:16]}..., and "
            f"--tokenizer now has {plan['tokenizer'][:16]}...: restore it, choose another folder, or --overwrite"
        )
    if differing:
        raise UserError(
            f"--out {out} was prepared with other arguments ({', '.join(differing)}); repeat those, choose another folder, or "
            "--overwrite"
        )
    return saved


def _changed_inputs(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """The first file of both plans that has another size or time of change now."""
    known = {each["file"]: each for each in before.get("inputs", [])}
    for each in now["inputs"]:
        old = known.get(each["file"], each)
        if old["bytes"] != each["bytes"] or old.get("modified", each["modified"]) != each["modified"]:
            return str(each["file"])
    return None


def _begin_again(out: Path, plan: dict[str, Any]) -> _Progress:
    """The beginning: the shards of an earlier prepare in `out` are deleted, and whatever else lies there stays.

    Raises UserError, before anything is deleted, if `out` holds files and was not made by prepare, or if a file that prepare
    would write is there and no record lists it.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; choose a folder")
    out.mkdir(parents=True, exist_ok=True)
    saved = _Progress.read(out)
    there = [(path, split) for split in SPLITS if (out / split).is_dir() for path in sorted((out / split).iterdir())]
    names = {split: _own_names(out / split, saved, split) for split in SPLITS}
    own = [path for path, split in there if path.name in names[split]]
    foreign = [path for path, split in there if path.name not in names[split] and shard_name(path.name)]
    if saved is None and not own and any(out.iterdir()):
        raise UserError(
            f"--overwrite: {out} holds files and was not made by prepare, so nothing is deleted; choose another folder"
        )
    if foreign:
        raise UserError(
            f"--overwrite: no earlier prepare lists {foreign[0]}, which would be overwritten; move it away, or choose "
            "another folder"
        )
    # A kill from here on leaves a record that lists what may still be there, with a plan that only --overwrite goes on from.
    shards, finished = (saved.shards, saved.finished) if saved else ({}, False)
    _Progress(plan={}, finished=finished, done={}, shards=shards).save(out)
    for path in own:
        path.unlink()
    return _Progress.nothing(plan)


def _own_names(folder: Path, saved: _Progress | None, split: Split) -> set[str]:
    """Names of the files that prepare wrote into a split's folder: what its manifest and its record list and, if it was cut
    off, the shard it was at, which nothing lists yet.
    """
    listed = listed_shards(folder)
    recorded = saved.shards.get(split, []) if saved else []
    names = {name for shard in [*(listed or []), *recorded] for name in (shard.file, shard.starts_file) if shard_name(name)}
    if listed is not None or (saved and saved.finished):
        names.add(MANIFEST)
    if saved and not saved.finished:
        names |= {f"shard-{len(recorded):05}.npy", f"shard-{len(recorded):05}.starts.npy", f".{MANIFEST}.tmp"}
    return names | {f".{name}.tmp" for name in names}


# -- reading, tokenising, writing ----------------------------------------------------------------------------------------


def _write(args: argparse.Namespace, files: list[Path], tokenizer: Tokenizer, progress: _Progress, account: Account) -> None:
    plan, done = progress.plan, progress.done
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    writers = {split: ShardWriter(args.out / split, dtype, args.shard_tokens, progress.shards[split]) for split in SPLITS}
    progress.save(args.out)
    replaced, skip_bad = Replaced("documents"), args.on_bad_document == "skip"
    how = Reading(args.column, _unescaped(args.separator))
    texts = (
        sources.hugging_face_documents(
            args.hf_dataset, args.hf_name, args.hf_split, args.column, args.streaming, replaced, account, skip_bad
        )
        if args.hf_dataset
        else sources.documents(files, how, replaced, account, skip_bad)
    )
    index = min(done.values())
    with output.progress("bytes tokenised", sources.text_bytes(files)) as state:
        for _ in islice(texts, index):
            pass
        for batch in _tokenise(texts, args, plan):
            for ids, held_out, size in batch:
                split = SPLITS[held_out]
                index += 1
                state.advance(size)
                if index <= done[split] or not len(ids):  # on disk already, or empty
                    continue
                if writers[split].add(ids, size):
                    done[split] = index
                    progress.save(args.out)
    replaced.say()
    print(account.describe())
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
                "account": account.counts(replaced),
            }
            writer.finish(tokenizer, facts)
        else:
            with suppress(OSError):  # somebody else's files are in it
                writer.folder.rmdir()
    if not any(writer.shards for writer in writers.values()):
        raise UserError("the input holds no text: all its documents are empty")
    if plan["validation_fraction"] and not writers["validation"].shards:
        print(
            f"WARNING: none of {index:,} documents was held out at --validation-fraction {plan['validation_fraction']:g}; give "
            "a larger one with --overwrite, or train with --validation.enable=false"
        )
    progress.done, progress.finished = dict.fromkeys(SPLITS, index), True
    progress.save(args.out)


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
        whole = before + ids + after if ids or (before and after) else []  # alone, one would follow another
        out.append((np.array(whole, dtype=dtype), held_out, len(raw)))
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
