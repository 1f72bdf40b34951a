"""The tokens an evaluation reads: token shards, text files, or a Hugging Face dataset, as documents in a fixed order.

The convention for BOS and EOS is stated and kept with the results: shards hold what `titan-dp prepare` put into them; text
and datasets get a BOS before every document where the tokenizer has one, unless `--no-bos`, and never an EOS.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from titan_dp.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from titan_dp.data.tokenizer import Tokenizer


class Document(NamedTuple):
    ids: np.ndarray
    """[tokens] int64, BOS and EOS included."""
    text_bytes: int | None
    """UTF-8 bytes of its text; None in shards, which know their sum only."""


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """--shards, --text or --hf-dataset, exactly one of them."""
    parser.add_argument("--shards", type=Path, help="folder of token shards written by `titan-dp prepare`")
    parser.add_argument("--text", nargs="+", metavar="FILE", help="files or folders: .txt, .jsonl, .jsonl.gz, .parquet, ...")
    parser.add_argument("--hf-dataset", default="", help="a Hugging Face dataset's name or folder")
    parser.add_argument("--hf-name", default="", help="configuration of the dataset")
    parser.add_argument("--hf-split", default="validation", help="split of the dataset (default: validation)")
    parser.add_argument("--column", default="text", help="key or column that holds the text (default: text)")
    parser.add_argument("--no-bos", action="store_true", help="no BOS before each document of --text or --hf-dataset")
    parser.add_argument("--max-documents", type=int, help="read the first so many documents only")


@dataclass(frozen=True)
class Texts:
    """Documents to evaluate on; iterating reads them anew."""

    identity: dict[str, Any]
    """What tells these texts from others, conventions included. JSON, for the results."""
    bos_id: int | None
    """The id that begins each document; None if they begin without."""
    text_bytes: int | None
    """UTF-8 bytes of all documents' text, where that is known beforehand: in shards."""
    documents: int | None
    """How many there are, where that is known beforehand: in shards."""
    _read: Any

    def __iter__(self) -> Iterator[Document]:
        yield from self._read()


def open_texts(args: argparse.Namespace, tokenizer: Tokenizer) -> Texts:
    """The documents that the command line names, as ids of `tokenizer`.

    Raises UserError where not exactly one source is named, it cannot be read, or shards were made with another tokenizer; on
    all ranks alike.
    """
    from titan_dp.faults.agreement import together

    return together(lambda: _open(args, tokenizer))


def _open(args: argparse.Namespace, tokenizer: Tokenizer) -> Texts:
    if sum(map(bool, (args.shards, args.text, args.hf_dataset))) != 1:
        raise UserError("give exactly one of --shards FOLDER, --text FILE... and --hf-dataset NAME")
    limit = args.max_documents
    if limit is not None and limit < 1:
        raise UserError(f"--max-documents is {limit}; give at least 1")
    if args.shards:
        if args.no_bos:
            raise UserError("--no-bos does not go with --shards, which hold what `titan-dp prepare` put in; use --text")
        return _from_shards(args.shards, tokenizer, limit)
    bos = None if args.no_bos else tokenizer.bos_id
    return _from_text(args, tokenizer, bos, limit)


def _from_shards(folder: Path, tokenizer: Tokenizer, limit: int | None) -> Texts:
    import numpy as np

    from titan_dp.data.shards import TokenShards

    shards = TokenShards(folder)
    made_with = shards.manifest["tokenizer"]
    if made_with["hash"] != tokenizer.hash:
        raise UserError(
            f"--shards {str(folder)!r} was made with tokenizer {made_with['name']!r}, the model's is {tokenizer.name!r}; "
            "prepare the text again with the model's"
        )

    def read() -> Iterator[Document]:
        for first, end in itertools.islice(itertools.pairwise(_boundaries(shards)), limit):
            ids = np.empty(end - first, dtype=np.int64)
            shards.read(first, ids)
            yield Document(ids, None)

    bos, eos = shards.manifest["adds_bos"], shards.manifest["adds_eos"]
    identity = {"shards": str(folder), "fingerprint": shards.fingerprint, "bos": bos, "eos": eos, "max_documents": limit}
    whole = shards.manifest["text_bytes"] if limit is None else None
    count = min(shards.manifest["documents"], limit or sys.maxsize)
    return Texts(identity, made_with["bos_id"] if bos else None, whole, count, read)


def _boundaries(shards: Any) -> Iterator[int]:
    """Where documents begin, then where the last one ends."""
    step = 2**24
    for start in range(0, len(shards), step):
        yield from (shards.document_starts(start, min(start + step, len(shards))) + start).tolist()
    yield len(shards)


def _from_text(args: argparse.Namespace, tokenizer: Tokenizer, bos: int | None, limit: int | None) -> Texts:
    import numpy as np

    from titan_dp.data import sources
    from titan_dp.files import Replaced, file_sha256

    prefix = [] if bos is None else [bos]
    if args.hf_dataset:
        dataset = (args.hf_dataset, args.hf_name, args.hf_split, args.column)
        sources.load_hugging_face(*dataset, True)  # fail now, not later
        texts = partial(sources.hugging_face_documents, *dataset, True)
        identity: dict[str, Any] = {"hf_dataset": dataset}
    else:
        files = sources.find_files(args.text)
        texts = partial(sources.documents, files, args.column)
        identity = {"files": [{"file": str(path), "sha256": file_sha256(path)} for path in files], "column": args.column}

    said: list[str] = []

    def read() -> Iterator[Document]:
        replaced = Replaced("documents")
        try:
            for text in itertools.islice(texts(replaced), limit):
                yield Document(np.array(prefix + tokenizer.encode(text), dtype=np.int64), len(text.encode()))
        finally:
            if not said:  # some evaluations read the texts more than once
                replaced.say()
            said.extend([replaced.first][: replaced.texts])

    identity |= {"tokenizer": tokenizer.hash, "bos": bos is not None, "eos": False, "max_documents": limit}
    return Texts(identity, bos, None, None, read)
