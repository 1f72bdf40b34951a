"""The tokens an evaluation reads: token shards, text files, or a Hugging Face dataset, as documents in a fixed order.

The convention for BOS and EOS is kept with the results. Shards hold what `titan-dp prepare` put into them. Text and datasets
get a BOS before every document if the model's training documents had one (`--bos`, `--no-bos`), and never an EOS.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from titan_dp.config.arguments import positive
from titan_dp.errors import UserError, say_once

if TYPE_CHECKING:
    from titan_dp.data.tokenizer import Tokenizer


class Document(NamedTuple):
    ids: np.ndarray
    """[tokens] int64, BOS and EOS included."""
    text_bytes: int | None
    """UTF-8 bytes of its text; None in shards, which only know the sum over all documents."""


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """--shards, --text or --hf-dataset, exactly one of them."""
    parser.add_argument("--shards", type=Path, help="folder of token shards written by `titan-dp prepare`")
    parser.add_argument("--text", nargs="+", metavar="FILE", help="files or folders: .txt, .jsonl, .jsonl.gz, .parquet, ...")
    parser.add_argument("--hf-dataset", default="", help="a Hugging Face dataset's name or folder")
    parser.add_argument("--hf-name", default="", help="configuration of the dataset")
    parser.add_argument("--hf-split", default="validation", help="split of the dataset (default: validation)")
    parser.add_argument("--column", default="text", help="key or column that holds the text (default: text)")
    bos = "BOS before each document of --text or --hf-dataset (default: if there was one at the training)"
    parser.add_argument("--bos", action=argparse.BooleanOptionalAction, help=bos)
    parser.add_argument("--max-documents", type=positive, metavar="N", help="read the first N documents only")


@dataclass(frozen=True)
class Texts:
    """Documents to evaluate on; each iteration reads them again."""

    identity: dict[str, Any]
    """What tells these texts from others: hashes, and the conventions "bos" and "eos". JSON, for the results."""
    read: Callable[[], Iterator[Document]]
    text_bytes: int | None = None
    """UTF-8 bytes of all documents' text, if known before reading: in shards."""
    documents: int | None = None
    """How many there are, if known before reading: in shards."""

    def __iter__(self) -> Iterator[Document]:
        return self.read()


def open_texts(args: argparse.Namespace, tokenizer: Tokenizer) -> Texts:
    """The documents that the command line names, as ids of `tokenizer`.

    Raises UserError, on all ranks alike, if not exactly one source is named, it cannot be read, or shards were made with
    another tokenizer.
    """
    from titan_dp.faults.agreement import together

    def check_and_open() -> Texts:
        if sum(map(bool, (args.shards, args.text, args.hf_dataset))) != 1:
            raise UserError("give exactly one of --shards FOLDER, --text FILE... and --hf-dataset NAME")
        if not args.shards:
            return _from_text(args, tokenizer)
        if args.bos is not None:
            option = "--bos" if args.bos else "--no-bos"
            raise UserError(f"{option} does not go with --shards, which hold what `titan-dp prepare` put in; use --text")
        return _from_shards(args.shards, tokenizer, args.max_documents)

    return together(check_and_open)


def _from_shards(folder: Path, tokenizer: Tokenizer, limit: int | None) -> Texts:
    from titan_dp.data.shards import TokenShards

    shards = TokenShards(folder)
    made_with = shards.tokenizer
    if made_with.is_known(folder) and not tokenizer.has_hash(made_with.hash):
        raise UserError(
            f"--shards {str(folder)!r} was made with tokenizer {made_with.name!r}, the model's is {tokenizer.name!r}; "
            f"prepare the text again with the model's (their hashes: {made_with.hash[:16]}..., {tokenizer.hash[:16]}...)"
        )

    def read() -> Iterator[Document]:
        return itertools.islice(_documents_of(shards), limit)

    bos, eos = shards.manifest["adds_bos"], shards.manifest["adds_eos"]
    identity = {"shards": str(folder), "fingerprint": shards.fingerprint, "bos": bos, "eos": eos, "max_documents": limit}
    text_bytes = shards.manifest["text_bytes"] if limit is None else None
    return Texts(identity, read, text_bytes, min(shards.manifest["documents"], limit or sys.maxsize))


def _documents_of(shards: Any) -> Iterator[Document]:
    for _, bounds, tokens in shards.documents():
        for first, end in itertools.pairwise((bounds - bounds[0]).tolist()):
            yield Document(tokens[first:end].astype(np.int64), None)


def _from_text(args: argparse.Namespace, tokenizer: Tokenizer) -> Texts:
    from titan_dp.data import sources
    from titan_dp.data.formats import Reading
    from titan_dp.files import Replaced, file_sha256

    prefix = tokenizer.beginning(args.bos)
    if args.hf_dataset:
        dataset = (args.hf_dataset, args.hf_name, args.hf_split, args.column)
        sources.load_hugging_face(*dataset, True)  # fail now, not later
        texts = partial(sources.hugging_face_documents, *dataset, True)
        identity: dict[str, Any] = {"hf_dataset": dataset}
    else:
        files = sources.find_files(args.text, account := sources.Account())
        if account.skipped:
            say_once(sources.named(account.skipped))
        texts = partial(sources.documents, files, Reading(args.column))
        identity = {"files": [{"file": str(path), "sha256": file_sha256(path)} for path in files], "column": args.column}

    said: list[str] = []

    def read() -> Iterator[Document]:
        replaced = Replaced("document")
        try:
            for text in itertools.islice(texts(replaced), args.max_documents):
                yield Document(np.array(prefix + tokenizer.encode(text), dtype=np.int64), len(text.encode()))
        finally:
            if not said:  # some evaluations read the texts more than once
                replaced.say()
            said.extend([replaced.first][: replaced.texts])

    identity |= {"tokenizer": tokenizer.hash, "bos": bool(prefix), "eos": False, "max_documents": args.max_documents}
    return Texts(identity, read)
