"""Documents from files or a Hugging Face dataset, in a fixed order and one at a time.

A text file is one document; `.jsonl` (also `.gz`, `.zst`) one a line and `.parquet` one a row, both by `column`. Folders
are walked in sorted order. Nothing is held in memory but the document at hand (a row group for parquet).
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from titan_dp.errors import RunError, UserError, passing_fault
from titan_dp.files import Replaced, shorten

_JSON = (".jsonl", ".jsonl.gz", ".jsonl.zst")
_TEXT = (".txt", ".md", ".text")


def find_files(inputs: list[str]) -> list[Path]:
    """Input files in the order they are read: as named, folders walked in sorted order.

    Raises UserError for a path that does not exist or a folder with nothing readable.
    """
    files: list[Path] = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.is_file() and _kind(p) is not None)
            if not found:
                raise UserError(f"{name!r} holds no {', '.join((*_TEXT, *_JSON, '.parquet'))} file")
            files += found
        elif path.is_file():
            if _kind(path) is None:
                raise UserError(f"{name!r} is none of {', '.join((*_TEXT, *_JSON, '.parquet'))}; rename or convert it")
            files.append(path)
        else:
            raise UserError(f"input {name!r} does not exist")
    return files


def documents(files: list[Path], column: str, replaced: Replaced) -> Iterator[str]:
    """The texts of all files as Unicode, what is none `replaced`; raises UserError naming file and line for what cannot be
    read.
    """
    for path in files:
        match _kind(path):
            case "text":
                yield replaced(_decode(path.read_bytes(), str(path)), str(path))
            case "json":
                for number, text in _json_lines(path, column):
                    yield replaced(text, f"{path}:{number}")
            case "parquet":
                for number, text in enumerate(_parquet(path, column)):
                    yield replaced(text, f"row {number} of {path}")


def hugging_face_documents(
    name: str, config: str, split: str, column: str, streaming: bool, replaced: Replaced
) -> Iterator[str]:
    """The texts of a dataset on the Hub or in a local folder as Unicode, what is none `replaced`."""
    rows = load_hugging_face(name, config, split, column, streaming)
    for number, row in enumerate(rows_of(rows, name)):
        yield replaced(row[column], f"row {number} of {name}")


def rows_of(rows: Iterable[dict[str, Any]], name: str) -> Iterator[dict[str, Any]]:
    """The rows of dataset `name`.

    Raises UserError where one is not UTF-8 or cannot be parsed, RunError where the connection to it breaks.
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

    Raises UserError where the package, the dataset, the split or the column is missing.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError("reading Hugging Face datasets needs the package `datasets`: pip install 'titan_dp[data]'") from error
    try:
        dataset = datasets.load_dataset(name, config or None, split=split, streaming=streaming)
    except Exception as error:
        message = _reason(error)
        hint = "; code of a dataset is never run: where it loads, save it as .jsonl or .parquet" if "script" in message else ""
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


def _kind(path: Path) -> str | None:
    if path.name.endswith(_JSON):
        return "json"
    return {".parquet": "parquet", **dict.fromkeys(_TEXT, "text")}.get(path.suffix)


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8", "surrogatepass")  # some programs write surrogates as if they were characters
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 (byte {error.start}); convert it with iconv") from error


def _json_lines(path: Path, column: str) -> Iterator[tuple[int, str]]:
    """(line, text) of every line."""
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
            try:
                record = json.loads(_decode(raw, f"{path}:{number}"))
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{number} is no JSON: {error.msg}") from error
            if not isinstance(record, dict) or not isinstance(record.get(column), str):
                keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
                raise UserError(
                    f"{path}:{number} has no text under {column!r} (it has {keys}); name the right one with --column"
                )
            yield number, record[column]


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix == ".zst":
        try:
            import zstandard
        except ImportError as error:
            raise UserError(f"{path} needs the package `zstandard`: pip install 'titan_dp[data]'") from error
        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(path.open("rb"), read_across_frames=True))  # type: ignore[arg-type]
    return path.open("rb")


def _parquet(path: Path, column: str) -> Iterator[str]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path} needs the package `pyarrow`: pip install 'titan_dp[data]'") from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow's errors derive from them
        raise UserError(f"{path} is no parquet file: {str(error)[:120]}") from error
    if column not in file.schema_arrow.names:
        raise UserError(f"{path} has no column {column!r}; it has {', '.join(file.schema_arrow.names)}")
    number = 0
    for batch in file.iter_batches(batch_size=256, columns=[column]):
        texts: list[Any]
        try:
            texts = batch.column(0).to_pylist()
        except UnicodeDecodeError:  # parquet does not check what calls itself a string
            texts = batch.column(0).cast(pyarrow.large_binary()).to_pylist()
            texts = [_decode(raw, f"row {row} of {path}") if raw is not None else None for row, raw in enumerate(texts, number)]
        for text in texts:
            if not isinstance(text, str):
                raise UserError(f"row {number} of {path} holds {type(text).__name__} under {column!r}, not text")
            number += 1
            yield text
