"""Files of text: which formats and compressions are read, and how each gives its documents one at a time.

A reader yields (where, text) for every document of a file, or (where, UserError) for one that cannot be used; it raises
UserError for a file that cannot be read on. Nothing is held in memory except the document at hand (some rows of parquet and
arrow), and of a long document in a text file only a piece: that comes as an iterator, to be used up before the next document.
To read another format, write its reader and add a line to `READERS`; another compression is a line in `_DECOMPRESSORS`.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import IO, Any

from titan_dp.errors import UserError
from titan_dp.files import shorten

Documents = Iterator[tuple[str, str | UserError | Iterator[str]]]
_BOM = b"\xef\xbb\xbf"
_PIECE = 2**20  # bytes or characters read at a time
_LONG = 2**22  # bytes from which on a document of a text file comes in pieces
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # arrow's, format versions from 0.15 on


class Meter:
    """How far into a file its reader is; whoever reads the documents asks now and then."""

    def __init__(self) -> None:
        self.stop()

    def follow(self, share: Callable[[], float]) -> None:
        """`share` tells how far the reader is, 0 to 1."""
        self.share = share

    def stop(self) -> None:
        self.share = lambda: 0.0


@dataclass(frozen=True)
class Reading:
    """How texts are found in files."""

    column: str = "text"
    """Key or column that holds the text."""
    separator: str = ""
    """Ends a document in a text file; empty: a text file is one document."""
    meter: Meter = field(default_factory=Meter, compare=False)


def format_of(path: Path) -> str | None:
    """The end of the file's name without its compression, such as ".jsonl" for "A.JSONL.GZ"; None if it has no reader."""
    name, compression = path.name.lower(), compression_of(path)
    ending = Path(name.removesuffix(compression)).suffix
    return ending if ending in READERS else None


def compression_of(path: Path) -> str:
    """ ".gz", ".zst", ... or "" """
    ending = path.suffix.lower()
    return ending if ending in _DECOMPRESSORS else ""


def packages_for(path: Path) -> list[str]:
    """The packages that reading `path` needs."""
    needed = ["zstandard"] if compression_of(path) == ".zst" else []
    return needed + ["pyarrow"] * (format_of(path) in (".parquet", ".arrow"))


def read_documents(path: Path, how: Reading) -> Documents:
    """The documents of one file. Raises UserError naming the file if it ends early or is damaged."""
    ending = format_of(path)
    assert ending is not None
    try:
        with _undamaged(path):
            yield from READERS[ending](path, how)
    finally:
        how.meter.stop()


@contextmanager
def _undamaged(path: Path) -> Iterator[None]:
    """What a decompressor says of a file that ends early or is damaged, as one UserError. A failing disk is left alone."""
    try:
        yield
    except EOFError as error:
        raise UserError(f"{path} ends early ({error}); get the whole file and give the same command") from error
    except (OSError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"{path} cannot be decompressed: {error}; get an undamaged copy and give the same command") from error


# -- readers ---------------------------------------------------------------------------------------------------------------


def _text(path: Path, how: Reading) -> Documents:
    with _open(path, how) as file:
        if wide := _wide(file, path):
            yield str(path), wide
            return
        divided, number = _Divided(file, how.separator.encode()), 0
        while not divided.ended:
            where = f"text {number + 1} of {path}" if how.separator else str(path)
            pieces, held, size = divided.pieces(), list[bytes](), 0
            for piece in pieces:
                held.append(piece)
                size += len(piece)
                if size >= _LONG:
                    break
            if not size and how.separator:  # nothing between two separators is no document
                continue
            number += 1
            if size < _LONG:
                yield where, _decoded(b"".join(held), where)
            else:
                yield where, _characters(chain(held, pieces), where)


class _Divided:
    """The documents of a file, divided by a separator, or by none."""

    def __init__(self, file: IO[bytes], separator: bytes) -> None:
        self._file, self._separator = file, separator
        self._block, self._at, self._last = file.read(_PIECE).removeprefix(_BOM), 0, False
        self.ended = False
        """Whether there is no further document."""

    def pieces(self) -> Iterator[bytes]:
        """The bytes of the next document, to be used up."""
        separator = self._separator
        while True:
            end = self._block.find(separator, self._at) if separator else -1
            if end >= 0:
                yield self._block[self._at : end]
                self._at = end + len(separator)
                return
            if self._last:
                self.ended = True
                yield self._block[self._at :]
                return
            ready = max(self._at, len(self._block) - max(len(separator) - 1, 0))  # behind it may begin a separator
            yield self._block[self._at : ready]
            more = self._file.read(_PIECE)
            self._block, self._at, self._last = self._block[ready:] + more, 0, not more


def _characters(pieces: Iterator[bytes], where: str) -> Iterator[str]:
    """The text of `pieces`. Raises UserError if it is not UTF-8."""
    rest, before = b"", 0
    for piece in chain(pieces, [None]):
        raw = rest + (piece or b"")
        whole = len(raw) if piece is None else _whole_characters(raw)
        text = _decoded(raw[:whole], where, before)
        if isinstance(text, UserError):
            raise text
        before, rest = before + whole, raw[whole:]
        if text:
            yield text


def _whole_characters(raw: bytes) -> int:
    """Up to where `raw` can be decoded although more comes: before its last character, if that is of several bytes."""
    for back in range(1, min(4, len(raw)) + 1):
        if raw[-back] < 0x80:
            return len(raw) - back + 1
        if raw[-back] >= 0xC0:
            return len(raw) - back
    return len(raw)


def _json_lines(path: Path, how: Reading) -> Documents:
    with _open(path, how) as file:
        if wide := _wide(file, path):
            yield str(path), wide
            return
        for number, raw in enumerate(file, 1):
            line = raw.removeprefix(_BOM) if number == 1 else raw
            if line.strip():
                where = f"{path}:{number}"
                yield where, _json_text(line, where, how.column)


def _json_text(raw: bytes, where: str, column: str) -> str | UserError:
    if isinstance(text := _decoded(raw, where), UserError):
        return text
    try:
        return text_of(json.loads(text), where, column)
    except (ValueError, RecursionError) as error:  # also an integer of thousands of digits
        return UserError(f"{where} is not JSON: {shorten(str(error))}")


def text_of(record: Any, where: str, column: str) -> str | UserError:
    """The text under `column` of a record, a dictionary; the mistake if there is none."""
    if isinstance(record, dict) and isinstance(record.get(column), str):
        return record[column]  # type: ignore[no-any-return]
    if isinstance(record, dict) and column in record:
        return UserError(f"{where} holds {type(record[column]).__name__} under {column!r}, not text")
    keys = shorten(", ".join(record)) or "nothing" if isinstance(record, dict) else type(record).__name__
    return UserError(f"{where} has no text under {column!r} (it has {keys}); name the right one with --column")


def _json(path: Path, how: Reading) -> Documents:
    """An array of objects, or objects one after another."""
    decoder, number, position, size, ended = json.JSONDecoder(), 0, 0, _PIECE, False
    opened = closed = due = False  # an array, and its end; a comma or the end is due after a value of it
    with _open(path, how) as binary:
        if wide := _wide(binary, path):
            raise wide
        file, buffer = io.TextIOWrapper(binary, "utf-8-sig", errors="surrogateescape"), ""
        while True:
            while position < len(buffer) and buffer[position].isspace():
                position += 1
            if position < len(buffer):
                sign = buffer[position]
                if sign == "[" and number == 0 and not opened:
                    opened, position = True, position + 1
                    continue
                if opened and not closed and ((sign == "," and due) or (sign == "]" and (due or number == 0))):
                    closed, due, position = sign == "]", False, position + 1
                    continue
                if due or closed:
                    raise UserError(f"{path} is not JSON: {sign!r} after item {number}")
                try:
                    record, end = decoder.raw_decode(buffer, position)
                    if not ended and end == len(buffer):
                        raise ValueError("a number may go on in what comes")
                    number, source, position, size, due = number + 1, buffer[position:end], end, _PIECE, opened
                    where = f"item {number} of {path}"
                    if isinstance(meant := _unescaped(source, where), UserError):
                        yield where, meant
                    else:
                        record = record if meant is source else decoder.decode(meant)
                        yield where, text_of(record, where, how.column)
                    continue
                except (ValueError, RecursionError) as error:
                    if ended:
                        raise UserError(f"item {number + 1} of {path} is not JSON: {shorten(str(error))}") from error
            elif ended:
                if opened and not closed:
                    raise EOFError("its array has no end")
                return
            more = file.read(size)
            # A value longer than what was read is tried again with twice as much.
            buffer, position, size, ended = buffer[position:] + more, 0, 2 * size, not more


def _table(path: Path, how: Reading) -> Documents:
    """A CSV or TSV file whose first row names the columns (RFC 4180)."""
    delimiter = "\t" if format_of(path) == ".tsv" else ","
    csv.field_size_limit(sys.maxsize)
    with _open(path, how) as binary:
        if wide := _wide(binary, path):
            raise wide
        file = io.TextIOWrapper(binary, "utf-8-sig", errors="surrogateescape", newline="")
        rows = csv.DictReader(file, delimiter=delimiter, strict=True)
        try:
            _check_column(path, how.column, list(rows.fieldnames or []))
            for number, row in enumerate(rows, 1):
                where = f"row {number} of {path}"
                wrong = "longer" if None in row else "shorter" if None in row.values() else ""
                said = f"{where} is {wrong} than the first row; a field with a {delimiter!r} in it must be in quotes"
                yield where, UserError(said) if wrong else _unescaped(row[how.column], where)
        except csv.Error as error:
            raise UserError(f"{path} is not a table after line {rows.line_num}: {error}") from error


def _parquet(path: Path, how: Reading) -> Documents:
    import pyarrow.parquet

    with _seekable(path, how) as file:
        try:
            table = pyarrow.parquet.ParquetFile(file)
        except (OSError, ValueError) as error:  # pyarrow's errors derive from them
            raise UserError(f"{path} is not a parquet file: {_reason(error)}") from error
        _check_column(path, how.column, table.schema_arrow.names)
        batches = table.iter_batches(batch_size=256, columns=[how.column])
        yield from _rows(path, how, batches, table.metadata.num_rows)


def _arrow(path: Path, how: Reading) -> Documents:
    import pyarrow.ipc

    with _seekable(path, how) as file:
        try:
            try:
                table = pyarrow.ipc.open_stream(file)  # as `datasets` writes it
                batches: Iterator[Any] = _whole_stream(table, file)
            except pyarrow.ArrowInvalid:
                file.seek(0)
                table = pyarrow.ipc.open_file(file)
                batches = (table.get_batch(i) for i in range(table.num_record_batches))
            _check_column(path, how.column, table.schema.names)
            yield from _rows(path, how, (batch.select([how.column]) for batch in batches))
        except (OSError, pyarrow.ArrowInvalid) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise UserError(f"{path} is not an arrow file: {_reason(error)}") from error


def _whole_stream(table: Any, file: IO[bytes]) -> Iterator[Any]:
    """The batches of an arrow stream. Raises EOFError if it was cut between two of them, where only its end is missing."""
    yield from table
    file.seek(-len(_END_OF_STREAM), io.SEEK_END)
    if file.read() != _END_OF_STREAM:
        raise EOFError("its stream of batches has no end")


def _check_column(path: Path, column: str, names: list[str]) -> None:
    if names.count(column) != 1:
        has = "two columns" if column in names else "no column"
        raise UserError(f"{path} has {has} {column!r}; it has {shorten(', '.join(names)) or 'none'}")


def _rows(path: Path, how: Reading, batches: Iterator[Any], rows: int = 0) -> Documents:
    """The column of `batches`, which have `rows` rows, if that is known."""
    import pyarrow

    number = 0
    if rows:
        how.meter.follow(lambda: number / rows)
    try:
        for batch in batches:
            try:
                texts, unchecked = batch.column(0).to_pylist(), False
            except UnicodeDecodeError:  # neither format checks what calls itself a string
                texts, unchecked = batch.column(0).cast(pyarrow.large_binary()).to_pylist(), True
            for text in texts:
                where = f"row {number} of {path}"
                if unchecked and text is not None:
                    text = _decoded(text, where)
                elif not isinstance(text, str):
                    text = UserError(f"{where} holds {type(text).__name__} under {how.column!r}, not text")
                number += 1
                yield where, text
    except (OSError, pyarrow.ArrowException) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"{path} is damaged behind row {number}: {_reason(error)}; get an undamaged copy") from error


def _reason(error: Exception) -> str:
    """What pyarrow says, on one line."""
    return shorten(" ".join(str(error).split()))


def _wide(file: IO[bytes], path: Path) -> UserError | None:
    """What is wrong if a file of text begins as UTF-16 or UTF-32 do: ASCII in it would be taken for UTF-8 with NULs between."""
    head = file.peek(4)[:4]  # type: ignore[attr-defined]
    zeros = tuple(byte == 0 for byte in head)
    alternating = {(True, False, True, False), (False, True, False, True), (True, True, True, False), (False, True, True, True)}
    if head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or head == codecs.BOM_UTF32_BE or zeros in alternating:
        return UserError(f"{path} is UTF-16 or UTF-32, not UTF-8; convert it with iconv")
    return None


def _decoded(raw: bytes, where: str, before: int = 0) -> str | UserError:
    """`raw` as text; the mistake if it is none, `before` bytes of whose document were text."""
    try:
        return raw.decode("utf-8", "surrogatepass")  # some programs write surrogates as if they were characters
    except UnicodeDecodeError as error:
        return UserError(f"{where} is not UTF-8 (byte {before + error.start}); convert it with iconv")


def _unescaped(text: str, where: str) -> str | UserError:
    """`text`, which was decoded with "surrogateescape" so that one bad document does not end its file, as `_decoded` has it."""
    if text.isascii():
        return text
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return _decoded(text.encode("utf-8", "surrogateescape"), where)


# -- compressions ----------------------------------------------------------------------------------------------------------


class _Frames(io.RawIOBase):
    """The bytes of a file of compressed frames, one after another.

    The readers that come with the formats take a file that ends early (zstandard) or has a damaged frame behind a good one
    (bz2, lzma) as whole.

    Args:
        new: makes what decompresses one frame: it has `decompress`, `eof` and `unused_data`.
        padding: bytes that may stand between frames.
    """

    def __init__(self, file: IO[bytes], new: Callable[[], Any], padding: bytes = b"") -> None:
        self._file, self._new, self._padding = file, new, padding
        self._frame: Any = None
        self._begun = False
        self._rest, self._held = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._held:
            raw = self._rest or self._file.read(2**14)
            if not raw:
                if self._frame is not None or not self._begun:
                    raise EOFError("in the middle of a frame" if self._begun else "it is empty")
                return 0
            self._rest = b""
            if self._frame is None:
                raw = raw.lstrip(self._padding) if self._padding else raw
                if not raw:
                    continue
                self._frame, self._begun = self._new(), True
            try:
                self._held = memoryview(self._frame.decompress(raw))
            except Exception as error:  # each package has its own
                raise OSError(str(error)) from error
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._held))
        buffer[:count], self._held = self._held[:count], self._held[count:]
        return count


def _zstandard() -> Any:
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()


def _gzip(file: IO[bytes]) -> Any:
    if not file.read(1):
        raise EOFError("it is empty")
    file.seek(0)
    return gzip.GzipFile(fileobj=file)


@contextmanager
def _open(path: Path, how: Reading) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed."""
    with path.open("rb") as raw:
        size = max(os.fstat(raw.fileno()).st_size, 1)
        how.meter.follow(lambda: raw.tell() / size)
        decompressor = _DECOMPRESSORS.get(compression_of(path))
        if decompressor is None:
            yield raw
            return
        with decompressor(raw) as file:
            yield file


@contextmanager
def _seekable(path: Path, how: Reading) -> Iterator[IO[bytes]]:
    """The same for formats that are not read from front to back: what is compressed goes into a temporary file first."""
    with _open(path, how) as file:
        if not compression_of(path):
            yield file
            return
        with tempfile.TemporaryFile() as copy:
            shutil.copyfileobj(file, copy)
            copy.seek(0)
            yield copy


_DECOMPRESSORS: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": _gzip,
    ".bz2": lambda file: io.BufferedReader(_Frames(file, bz2.BZ2Decompressor), _PIECE),
    ".xz": lambda file: io.BufferedReader(_Frames(file, lzma.LZMADecompressor, padding=b"\0"), _PIECE),
    ".zst": lambda file: io.BufferedReader(_Frames(file, _zstandard), _PIECE),
}
TEXT = (".txt", ".md", ".text")
READERS: dict[str, Callable[[Path, Reading], Documents]] = {
    **dict.fromkeys(TEXT, _text),
    **dict.fromkeys((".jsonl", ".ndjson"), _json_lines),
    ".json": _json,
    **dict.fromkeys((".csv", ".tsv"), _table),
    ".parquet": _parquet,
    ".arrow": _arrow,
}
"""By the end of a file's name, in any case of letters, before that of a compression."""
COMPRESSIONS = tuple(_DECOMPRESSORS)
