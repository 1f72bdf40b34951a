"""Documents from files or a Hugging Face dataset, in a fixed order and one at a time.

A text file is one document; `.jsonl` (also `.gz`, `.zst`) has one per line and `.parquet` one per row, both by `column`.
Folders are walked in sorted order. Nothing is held in memory except the document at hand (a row group for parquet).
To read another format, write its reader and add a line to `READERS`; another compression is a line in `_DECOMPRESSORS`.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from titan_dp.errors import RunError, UserError, passing_fault, require
from titan_dp.files import Replaced, shorten


def find_files(inputs: list[str]) -> list[Path]:
    """Input files in the order they are read: as named, folders walked in sorted order.

    Raises UserError for a path that does not exist or a folder with nothing readable.
    """
    files: list[Path] = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.is_file() and _reader(p) is not None)
            if not found:
                raise UserError(f"{name!r} holds no {', '.join(READERS)} file")
            files += found
        elif path.is_file():
            if _reader(path) is None:
                raise UserError(f"{name!r} is not one of {', '.join(READERS)}; rename or convert it")
            files.append(path)
        else:
            raise UserError(f"input {name!r} does not exist")
    return files


def text_bytes(files: list[Path]) -> int | None:
    """About how many bytes of text `files` hold; None if a size does not say, because one is compressed."""
    compressed = any(path.suffix in (*_DECOMPRESSORS, ".parquet") for path in files)
    return None if compressed else sum(path.stat().st_size for path in files) or None


def documents(files: list[Path], column: str, replaced: Replaced) -> Iterator[str]:
    """The texts of all files, lone surrogates `replaced`. Raises UserError naming file and line for what cannot be read."""
    for path in files:
        read = _reader(path)
        assert read is not None
        for where, text in read(path, column):
            yield replaced(text, where)


def hugging_face_documents(
    name: str, config: str, split: str, column: str, streaming: bool, replaced: Replaced
) -> Iterator[str]:
    """The texts of a dataset on the Hub or in a local folder, lone surrogates `replaced`."""
    rows = load_hugging_face(name, config, split, column, streaming)
    for number, row in enumerate(rows_of(rows, name)):
        yield replaced(row[column], f"row {number} of {name}")


def rows_of(rows: Iterable[dict[str, Any]], name: str) -> Iterator[dict[str, Any]]:
    """The rows of dataset `name`.

    Raises UserError if one is not UTF-8 or cannot be parsed, RunError if the connection to it breaks.
    """
    try:
        yield from rows
    except UnicodeDecodeError as error:
        raise UserError(f"Hugging Face dataset {name!r} holds bytes that are not UTF-8 ({error}); convert it") from error
    except Exception as error:
        if (fault := passing_fault(error)) is None:
            if type(error).__name__ == "ArrowInvalid":  # what a file of the dataset holds, such as a lone surrogate in JSON
                raise UserError(
                    f"Hugging Face dataset {name!r} holds what its reader refuses: {_reason(error)}; mend it, or give its "
                    "files to `titan-dp prepare` as INPUT"
                ) from error
            raise
        raise RunError(
            f"Hugging Face dataset {name!r} cannot be read on ({type(fault).__name__}: {shorten(str(fault))}); the same "
            "command goes on once it can"
        ) from error


def load_hugging_face(name: str, config: str, split: str, column: str, streaming: bool):  # type: ignore[no-untyped-def]
    """The `datasets` object, its column checked.

    Raises UserError if the package, the dataset, the split or the column is missing.
    """
    require("reading Hugging Face datasets", "datasets")
    import datasets

    try:
        dataset = datasets.load_dataset(name, config or None, split=split, streaming=streaming)
    except Exception as error:
        message = _reason(error)
        hint = (
            "; code of a dataset is never run: load it elsewhere and save it as .jsonl or .parquet"
            if "script" in message
            else ""
        )
        raise UserError(
            f"Hugging Face dataset {name!r} (name {config!r}, split {split!r}) cannot be loaded: {message}{hint}"
        ) from error
    if dataset.column_names is not None and column not in dataset.column_names:
        raise UserError(f"Hugging Face dataset {name!r} has no column {column!r}; it has {', '.join(dataset.column_names)}")
    return dataset


def _reason(error: BaseException) -> str:
    """The first line of what is wrong, which `datasets` keeps behind a sentence that says nothing."""
    if type(error).__name__ == "DatasetGenerationError" and error.__cause__ is not None:
        error = error.__cause__
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


# -- formats: a reader yields (where, text) for every document of a file ---------------------------------------------------


def _text(path: Path, column: str) -> Iterator[tuple[str, str]]:
    yield str(path), _decode(path.read_bytes(), str(path))


def _json_lines(path: Path, column: str) -> Iterator[tuple[str, str]]:
    with _open(path) as file:
        lines = enumerate(file, 1)
        while True:
            try:
                number, raw = next(lines)
            except StopIteration:
                return
            except (OSError, EOFError) as error:  # a cut-off gzip or zstd stream
                raise UserError(f"{path} cannot be decompressed: {error}") from error
            if not raw.strip():
                continue
            where = f"{path}:{number}"
            try:
                record = json.loads(_decode(raw, where))
            except json.JSONDecodeError as error:
                raise UserError(f"{where} is not JSON: {error.msg}") from error
            if not isinstance(record, dict) or not isinstance(record.get(column), str):
                keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
                raise UserError(f"{where} has no text under {column!r} (it has {keys}); name the right one with --column")
            yield where, record[column]


def _parquet(path: Path, column: str) -> Iterator[tuple[str, str]]:
    require(str(path), "pyarrow")
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow's errors derive from them
        raise UserError(f"{path} is not a parquet file: {str(error)[:120]}") from error
    if column not in file.schema_arrow.names:
        raise UserError(f"{path} has no column {column!r}; it has {', '.join(file.schema_arrow.names)}")
    number = 0
    for batch in file.iter_batches(batch_size=256, columns=[column]):
        try:
            texts, unchecked = batch.column(0).to_pylist(), False
        except UnicodeDecodeError:  # parquet does not check what calls itself a string
            texts, unchecked = batch.column(0).cast(pyarrow.large_binary()).to_pylist(), True
        for text in texts:
            where = f"row {number} of {path}"
            if unchecked and text is not None:
                text = _decode(text, where)
            if not isinstance(text, str):
                raise UserError(f"{where} holds {type(text).__name__} under {column!r}, not text")
            number += 1
            yield where, text


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8", "surrogatepass")  # some programs write surrogates as if they were characters
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 (byte {error.start}); convert it with iconv") from error


# -- compressions --------------------------------------------------------------------------------------------------------


def _zstandard(path: Path) -> IO[bytes]:
    require(str(path), "zstandard")
    import zstandard

    return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(path.open("rb"), read_across_frames=True))  # type: ignore[arg-type]


def _open(path: Path) -> IO[bytes]:
    decompressor = _DECOMPRESSORS.get(path.suffix)
    return path.open("rb") if decompressor is None else decompressor(path)


_DECOMPRESSORS: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".zst": _zstandard}
READERS: dict[str, Callable[[Path, str], Iterator[tuple[str, str]]]] = {
    **dict.fromkeys((".txt", ".md", ".text"), _text),
    **dict.fromkeys((".jsonl", *(f".jsonl{ending}" for ending in _DECOMPRESSORS)), _json_lines),
    ".parquet": _parquet,
}
"""By the end of a file's name; called with the file and `column`, which text files ignore."""


def _reader(path: Path) -> Callable[[Path, str], Iterator[tuple[str, str]]] | None:
    return next((read for ending, read in READERS.items() if path.name.endswith(ending)), None)
