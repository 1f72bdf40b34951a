"""`titan-dp prepare`: text in, token shards out; parallel, resumable, verifiable.

The result is a function of the input and the arguments alone. Documents keep the order of the input, whatever the number
of workers. Whether a document is held out is decided by the hash of its text, so duplicates never end up on both sides.
One thread reads and writes, workers encode (tokenise.py). After every shard, and at least every half minute, everything is
brought to the disk and `progress.json` says how far into the input that is. A run that was killed begins there: it opens no
file that it had read, tokenises only what is missing, and ends with the same bytes as one that was not.
OUT may hold other people's files: `--overwrite` deletes the shards that OUT's own records list, and nothing else.
"""

from __future__ import annotations

import argparse
import os
import shlex
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import IO, Annotated, Any

import numpy as np
from pydantic import Field

from titan_dp import output
from titan_dp.config.arguments import count, number, positive
from titan_dp.config.schema import from_home
from titan_dp.data import sources
from titan_dp.data.formats import COMPRESSIONS, READERS, TEXT, Reading, format_of
from titan_dp.data.shards import (
    MANIFEST,
    PROGRESS,
    SPLITS,
    Begun,
    Shard,
    ShardWriter,
    Split,
    TokenShards,
    begun_shard,
    listed_shards,
    shard_name,
)
from titan_dp.data.sources import Account
from titan_dp.data.tokenise import Encoded, Encoder, Mark, cut
from titan_dp.data.tokenizer import Tokenizer, load_tokenizer
from titan_dp.errors import UserError, counted, say_once
from titan_dp.files import JsonObject, Natural, Replaced, make_folder, parse_json, short, write_json

_SAVE_SECONDS = 30.0
"""How much work a kill costs at most."""


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
    add("--workers", type=positive, default=os.cpu_count() or 1, help="tokenising threads (default: all cores)")
    add(
        "--batch-characters",
        type=count,
        default=1_000_000,
        help="text that a worker takes at a time, which bounds the memory; longer documents come in pieces (default: 1M)",
    )
    add("--overwrite", action="store_true", help="delete the shards of an earlier prepare in OUT first")
    add("--verify", action="store_true", help="check every byte of what is in OUT instead of writing")


def run(args: argparse.Namespace) -> int:
    if args.verify:
        return _verify(args.out)
    if args.files_from:
        args.inputs += _names_in(args.files_from)
    args.inputs, args.tokenizer = [from_home(name) for name in args.inputs], from_home(args.tokenizer)
    args.hf_dataset = from_home(args.hf_dataset)
    if bool(args.inputs) == bool(args.hf_dataset):
        raise UserError("prepare reads either INPUT files or --hf-dataset NAME: give one of them")
    account = Account()
    files = sources.find_files(args.inputs, account, args.out)
    if args.separator and not any(format_of(path) in TEXT for path in files):
        raise UserError(f"--separator divides {', '.join(TEXT)} files, and the input has none; leave it out")
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
    output.print_next("train on it", f"titan-dp train --config ... --job.run_name ... {settings}")
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
        say_once(tokenizer.joined("if that is meant, say so with --no-bos --no-eos; if not"))
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
        "batch_characters": args.batch_characters,  # decides where long documents are cut
    }


def _input(path: Path) -> dict[str, Any]:
    found = path.stat()
    return {"file": str(path), "bytes": found.st_size, "modified": found.st_mtime_ns}


# -- the record of what is on disk ---------------------------------------------------------------------------------------


class _Progress(JsonObject):
    """progress.json: what is safely on disk."""

    plan: dict[str, Any]
    finished: bool
    shards: dict[Split, list[Shard]]
    begun: dict[Split, Begun] = Field(default_factory=dict)
    """Of the shard that each split is at."""
    place: tuple[Natural, Natural] = (0, 0)
    """How far into the input all this is: files before the one at hand, documents of that one."""
    account: dict[str, Any] = Field(default_factory=dict)
    """The `Account` up to there, and under "replaced" what `Replaced` has counted."""

    @staticmethod
    def nothing(plan: dict[str, Any]) -> _Progress:
        return _Progress(plan=plan, finished=False, shards={"train": [], "validation": []})

    @property
    def empty(self) -> bool:
        return self.place == (0, 0) and not any(self.shards.values())

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
    make_folder(out)
    if (saved := _Progress.read(out)) is None:
        if any(out.iterdir()):
            raise UserError(f"--out {out} is not empty and holds no earlier prepare; choose another folder")
        return _Progress.nothing(plan)
    if not saved.finished and any((saved.model_extra or {}).get("done", {}).values()):
        raise UserError(
            f"--out {out} was begun by an earlier version, whose work cannot be gone on with; --overwrite prepares everything "
            "anew, or choose another folder"
        )
    # What an earlier version did, and did not write down.
    usual = {"separator": "", "on_bad_document": "stop", "batch_characters": plan["batch_characters"]}
    differing = [key for key in plan if key != "inputs" and saved.plan.get(key, usual.get(key)) != plan[key]]
    differing += ["inputs"] * ([i["file"] for i in saved.plan.get("inputs", [])] != [i["file"] for i in plan["inputs"]])
    begun = len(plan["inputs"]) if saved.finished else saved.place[0] + 1
    changed = _changed_inputs(saved.plan["inputs"][:begun] if "inputs" in saved.plan else [], plan)
    if (differing or changed) and not saved.finished and saved.empty and saved.plan:
        return _Progress.nothing(plan)  # the earlier one has kept nothing
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
    saved.plan = saved.plan if saved.finished else plan  # files that were not yet begun may have changed
    return saved


def _changed_inputs(before: list[dict[str, Any]], now: dict[str, Any]) -> str | None:
    """The first of the files `before` that has another size or time of change now."""
    known = {each["file"]: each for each in before}
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
    make_folder(out)
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
    _Progress(plan={}, finished=finished, shards=shards).save(out)
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
        names |= {path.name for path in folder.glob(".shard-*.tmp") if begun_shard(path.name)}
    return names | {f".{name}.tmp" for name in names}


# -- reading, tokenising, writing ----------------------------------------------------------------------------------------


def _write(args: argparse.Namespace, files: list[Path], tokenizer: Tokenizer, progress: _Progress, account: Account) -> None:
    plan, replaced = progress.plan, Replaced("document")
    _restore(progress, account, replaced)
    documents = _open_input(args, files, account, progress.place)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    before, after = ([] if plan[role] is None else [plan[role]] for role in ("bos", "eos"))
    encoder = Encoder(tokenizer, before, after, plan["validation_fraction"], dtype, args.batch_characters)
    work = _Work(args.out, progress, encoder, args.shard_tokens, documents)
    progress.save(args.out)
    unit = "rows read" if args.hf_dataset else "bytes read"
    try:
        with output.progress(unit, documents.total, documents.read_so_far()) as state:
            state.note = lambda seconds: f"{short(work.tokens / seconds)} tokens/s"
            for encoded in encoder.run(documents, replaced, args.workers):
                work.take(encoded)
                state.done = max(state.done, encoded.batch.read_so_far)
        if changed := _changed_inputs(plan["inputs"], {"inputs": [_input(path) for path in files if path.exists()]}):
            raise UserError(
                f"{changed} has changed while it was read; when it is left alone, --overwrite prepares everything anew"
            )
        work.save(closing=True)
    finally:
        work.abandon()
    replaced.say()
    account = Account(**{key: value for key, value in progress.account.items() if key not in ("replaced", "skipped")})
    account.skipped = documents.account.skipped
    print(account.describe())
    if args.separator and all(format_of(path) in TEXT for path in files) and account.documents + account.refused <= len(files):
        print(
            f"WARNING: --separator {args.separator!r} divides no file: it is in none, or at their ends only (where lines end "
            r"in \r\n, '\r\n' has to stand in it)"
        )
    if account.documents + account.refused == 0:
        raise UserError("the input holds no documents")
    for split, writer in work.writers.items():
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
    if not any(writer.shards for writer in work.writers.values()):
        raise UserError("the input holds no text: all its documents are empty")
    if plan["validation_fraction"] and not work.writers["validation"].shards:
        print(
            f"WARNING: none of {counted(account.documents, 'document')} was held out at --validation-fraction "
            f"{plan['validation_fraction']:g}; give a larger one with --overwrite, or train with --validation.enable=false"
        )
    progress.finished = True
    progress.save(args.out)


def _open_input(
    args: argparse.Namespace, files: list[Path], account: Account, place: tuple[int, int] = (0, 0)
) -> sources.Documents:
    skip_bad = args.on_bad_document == "skip"
    if not args.hf_dataset:
        how = Reading(args.column, _unescaped(args.separator))
        return sources.FileDocuments(files, how, account, skip_bad, place)
    dataset = sources.load_hugging_face(args.hf_dataset, args.hf_name, args.hf_split, args.column, args.streaming)
    return sources.DatasetDocuments(dataset, args.hf_dataset, args.column, account, skip_bad, place)


class _Work:
    """Appends what arrives to the shards of both splits, and saves now and then how far that is."""

    def __init__(
        self, out: Path, progress: _Progress, encoder: Encoder, shard_tokens: int, documents: sources.Documents
    ) -> None:
        self.out, self.progress, self.encoder, self.documents = out, progress, encoder, documents
        self.writers = {
            split: ShardWriter(
                out / split, encoder.dtype, shard_tokens, progress.shards[split], progress.begun.get(split, Begun())
            )
            for split in SPLITS
        }
        self.tokens = 0
        """Of this run."""
        self.written = Account(**{key: progress.account.get(key, 0) for key in ("documents", "text_bytes", "without_tokens")})
        self._long: _LongDocument | None = None
        self._mark: Mark | None = None
        self._saved = time.monotonic()
        self._shards = self._count()

    def take(self, encoded: Encoded) -> None:
        batch = encoded.batch
        for error in encoded.refused:
            if not self.documents.skip_bad:
                raise error
            self.written.refused += 1
            self.written.first_refused = self.written.first_refused or str(error)
        if batch.context is not None:
            self._take_piece(encoded)
        else:
            for split, run in zip(SPLITS, encoded.runs, strict=True):
                self._count_documents(run.lengths, run.text_bytes)
                self.tokens += len(run.ids)
                kept = run.lengths > 0  # empty without BOS and EOS
                self.writers[split].add_many(run.ids, run.lengths[kept], run.text_bytes[kept])
        if (mark := batch.mark) is None:
            return
        self._mark = mark
        if self._count() > self._shards or time.monotonic() - self._saved > _SAVE_SECONDS:
            self.save()

    def _take_piece(self, encoded: Encoded) -> None:
        batch = encoded.batch
        self._long = self._long or _LongDocument(self.out)
        self._long.good &= not (batch.dropped or encoded.refused)
        if not self._long.good:
            if batch.last:
                self._long = None
            return
        (run,) = encoded.runs
        self._long.append(run.ids)
        self._long.text_bytes += int(run.text_bytes[0])
        self.tokens += len(run.ids)
        if batch.last:
            whole, self._long = self._long, None
            before, after = (np.array(ids, dtype=self.encoder.dtype) for ids in (self.encoder.before, self.encoder.after))
            tokens = 0 if self.encoder.drops_empty and not whole.tokens else len(before) + whole.tokens + len(after)
            self._count_documents(np.array([tokens]), np.array([whole.text_bytes]))
            if tokens:
                pieces = chain([before], whole.pieces(self.encoder.dtype), [after])
                split = SPLITS[self.encoder.is_held_out(batch.sha256)]
                self.writers[split].add_pieces(pieces, tokens, whole.text_bytes)

    def _count_documents(self, lengths: np.ndarray, text_bytes: np.ndarray) -> None:
        self.written.documents += len(lengths)
        self.written.text_bytes += int(text_bytes.sum())
        self.written.without_tokens += int((lengths == 0).sum())

    def _count(self) -> int:
        return sum(len(writer.shards) for writer in self.writers.values())

    def save(self, closing: bool = False) -> None:
        """Everything up to the last mark is on the disk, and the record says so; `closing` closes the last shards before."""
        for writer in self.writers.values():
            if closing:
                writer.flush()
            writer.sync()
        progress, mark = self.progress, self._mark
        if mark is not None:
            progress.place = mark.place
            progress.account = _account_until(mark, self.written)
        progress.begun = {split: writer.begun for split, writer in self.writers.items()}
        progress.save(self.out)
        for writer in self.writers.values():
            writer.publish()
        self._saved, self._shards = time.monotonic(), self._count()

    def abandon(self) -> None:
        for writer in self.writers.values():
            writer.abandon()


class _LongDocument:
    """The ids of a document whose text is not yet known to the end, in a file without a name."""

    def __init__(self, folder: Path) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self.good, self.tokens, self.text_bytes = True, 0, 0

    def append(self, ids: np.ndarray) -> None:
        self._file.write(ids.tobytes())
        self.tokens += len(ids)

    def pieces(self, dtype: np.dtype) -> Iterator[np.ndarray]:
        self._file.seek(0)
        while raw := self._file.read(2**20):
            yield np.frombuffer(raw, dtype=dtype)


def _account_until(mark: Mark, written: Account) -> dict[str, Any]:
    """The account of the input up to `mark`, as progress.json keeps it."""
    read, (characters, texts, first) = mark.account, mark.replaced
    whole = replace(
        read,
        documents=written.documents,
        text_bytes=written.text_bytes,
        without_tokens=written.without_tokens,
        refused=read.refused + written.refused,
        first_refused=read.first_refused or written.first_refused,
    )
    return {**vars(whole), "replaced": [characters, texts, first]}


def _restore(progress: _Progress, account: Account, replaced: Replaced) -> None:
    """What an earlier run counted up to where this one goes on."""
    if saved := progress.account:
        account.files, account.empty = saved["files"], saved["empty"]
        account.refused, account.first_refused = saved["refused"], saved["first_refused"]
        replaced.characters, replaced.texts, replaced.first = saved["replaced"]


# -- verifying ---------------------------------------------------------------------------------------------------------------


def _verify(out: Path) -> int:
    folders = [out / split for split in SPLITS if (out / split / MANIFEST).exists()] or [out]
    problems = []
    for folder in folders:
        shards = TokenShards(folder)
        found = list(shards.verify())
        problems += found
        print(f"{folder}: {'BAD' if found else 'good'}, {shards.tokens:,} tokens, fingerprint {shards.fingerprint[:16]}")
    saved = _Progress.read(out)
    if saved is not None and saved.finished and saved.account:
        problems += _verify_account(saved)
    if problems:
        raise UserError("; ".join(problems))
    return 0


def _verify_account(saved: _Progress) -> list[str]:
    """Read the input again and compare what is in it with the account that was kept of it, and with what the shards hold."""
    plan = saved.plan
    if plan["hf"]:
        print("account: not checked, because the input is a Hugging Face dataset")
        return []
    for each in plan["inputs"]:
        path = Path(each["file"])
        if not path.is_file():
            print(f"account: not checked, because {path} is not there any more")
            return []
        if _input(path) != each:
            return [f"{path} has changed since it was prepared"]
    how, replaced, account = Reading(plan["column"], _unescaped(plan["separator"])), Replaced(), Account()
    files = [Path(each["file"]) for each in plan["inputs"]]
    documents = sources.FileDocuments(files, how, account, skip_bad=plan["on_bad_document"] == "skip")
    with output.progress("bytes of the input read", documents.total) as state:
        for where, text in documents:
            try:
                sizes = [len(replaced(piece, where).encode()) for piece, _ in cut(text, plan["batch_characters"])]
            except UserError as error:
                documents.refuse(error)
                continue
            account.documents += 1
            account.text_bytes += sum(sizes)
            account.empty += not any(sizes)
            state.done = documents.read_so_far()
    then, kept = saved.account, [shard for shards in saved.shards.values() for shard in shards]
    read, refused = (account.documents, account.refused), (then["documents"], then["refused"])
    by_tokenizer = refused[1] - read[1]  # refused then, and read now, because nothing is tokenised
    problems = []
    if (read[0] - by_tokenizer, account.files, replaced.characters) != (refused[0], then["files"], then["replaced"][0]):
        problems.append(
            f"the input has {counted(account.files, 'file')}, {counted(read[0], 'document')} and "
            f"{counted(replaced.characters, 'replaced character')}, its account "
            f"{then['files']:,}, {sum(refused):,} and {then['replaced'][0]:,}"
        )
    elif not by_tokenizer and (account.empty, account.text_bytes) != (then["empty"], then["text_bytes"]):
        problems.append(
            f"the input has {counted(account.empty, 'empty document')} and {account.text_bytes:,} bytes of text, its account "
            f"{then['empty']:,} and {then['text_bytes']:,}"
        )
    if sum(shard.documents for shard in kept) != then["documents"] - then["without_tokens"]:
        problems.append(
            f"the shards hold {sum(shard.documents for shard in kept):,} documents, the account has "
            f"{then['documents'] - then['without_tokens']:,} with tokens"
        )
    facts = f"{counted(account.files, 'file')}, {counted(account.documents, 'document')}, {account.text_bytes:,} bytes of text"
    print(f"account: {'BAD' if problems else 'good'}, the input has {facts}")
    return problems
