"""Token shards on disk: the format, its writer, its reader, its verification.

A folder holds `manifest.json`, `shard-00000.npy` (1-D uint16 or uint32 token ids) and `shard-00000.starts.npy` (1-D int64
offsets at which documents begin in that shard; a document never spans shards), and so on. Every file is written under
another name, synced and renamed; the manifest comes last, so a folder with a manifest is complete. The sha256 of the
manifest, which holds those of the shards, is the data's fingerprint: the same tokens have the same fingerprint.
A folder may come from anywhere: reading it runs no code, opens no file outside it, and ends in a UserError if it is damaged.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import re
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from titan_dp.config import Config
from titan_dp.data.tokenizer import Tokenizer
from titan_dp.errors import UserError, say_once
from titan_dp.files import (
    STRICT,
    JsonObject,
    Natural,
    file_sha256,
    inside,
    make_folder,
    parse_json,
    shorten,
    shown,
    temporary_of,
    write_json,
)

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
PROGRESS = "progress.json"
"""The record that `titan-dp prepare` keeps in OUT, beside the folders of the splits."""
Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")
AGAIN = "prepare the data again, into a new folder or with --overwrite"

_AT_ONCE = 2**18
"""Documents whose offsets are looked at together."""
_Id = Annotated[int, Field(ge=0, lt=2**32)]


@dataclass(frozen=True, config=STRICT)
class Shard:
    """One entry of the manifest."""

    file: str
    tokens: Natural
    sha256: str
    text_bytes: Natural
    """UTF-8 bytes of the documents' text: turns nats per token into bits per byte."""
    starts_file: str
    documents: Natural
    starts_sha256: str


class _MadeWith(JsonObject):
    """The tokenizer, as the manifest has it."""

    name: str
    hash: str = ""
    """Of its vocabulary and its rules; empty: not known."""
    vocab_size: Annotated[int, Field(gt=0, le=2**32)]
    bos_id: _Id | None
    eos_id: _Id | None

    def is_known(self, folder: Path) -> bool:
        """Whether there is a hash to compare. If there is none, that is said."""
        if not self.hash:
            say_once(
                f"note: {str(folder)!r} was prepared without the hash of its tokenizer: whether {self.name!r} is still what it "
                "was then is not known"
            )
        return bool(self.hash)


class _Version(JsonObject):
    format_version: int


class _Manifest(_Version):
    """manifest.json; `TokenShards.manifest` is its dictionary, further entries kept."""

    dtype: Literal["uint16", "uint32"]
    tokenizer: _MadeWith
    tokens: Natural
    documents: Natural
    text_bytes: Natural
    adds_bos: bool
    adds_eos: bool
    split: str | None = None
    validation_fraction: float = 0
    """Of all documents, held out in the folder of split "validation"."""
    shards: list[Shard]


@dataclass(frozen=True, config=STRICT)
class Begun:
    """How much of the shard that is being written is safely in its temporary files."""

    tokens: Natural = 0
    documents: Natural = 0
    text_bytes: Natural = 0


class ShardWriter:
    """Appends documents to temporary files, which become a shard whenever `shard_tokens` are reached.

    Whoever wants to go on after a kill calls `sync`, keeps `shards` and `begun` somewhere safe, calls `publish`, and gives both
    to the next writer. Everybody else only calls `add` and `finish`.

    Args:
        folder: of the shards; created.
        dtype: of the ids, uint16 or uint32.
        shard_tokens: a shard is closed by the document that reaches this many.
        shards: those already written, when continuing.
        begun: what is left of the shard after those.
    """

    def __init__(
        self, folder: Path, dtype: np.dtype, shard_tokens: int, shards: list[Shard], begun: Begun | None = None
    ) -> None:
        make_folder(folder)
        self.folder, self.dtype, self.shard_tokens, self.shards = folder, dtype, shard_tokens, shards
        self.begun = begun or Begun()
        self._files: tuple[_Appended, _Appended] | None = None
        self._closed = list(shards)
        if begun is not None:
            self.publish()
            self._forget_what_came_after()
        if self.begun.documents:
            self._open()

    def _forget_what_came_after(self) -> None:
        """Delete what an earlier writer had begun and not saved: it is made anew, and perhaps has another length then."""
        kept = {temporary_of(self.folder / name) for name in _names(len(self.shards)) if self.begun.documents}
        for path in self.folder.glob(".shard-*.tmp"):
            if begun_shard(path.name) and path not in kept:
                path.unlink()

    def add(self, ids: np.ndarray, text_bytes: int) -> None:
        """Append one document of `text_bytes` bytes of text."""
        self.add_many(ids, np.array([len(ids)]), np.array([text_bytes]))

    def add_many(self, ids: np.ndarray, lengths: np.ndarray, text_bytes: np.ndarray) -> None:
        """Append documents, whose ids come one after another; none of them is empty."""
        ends, first, token = np.cumsum(lengths), 0, 0
        while first < len(lengths):
            room = self.shard_tokens - self.begun.tokens
            last = min(int(np.searchsorted(ends, token + max(room, 1))) + 1, len(lengths))
            end = int(ends[last - 1])
            self._append([ids[token:end]], lengths[first:last], int(text_bytes[first:last].sum()))
            first, token = last, end

    def add_pieces(self, pieces: Iterable[np.ndarray], tokens: int, text_bytes: int) -> None:
        """Append one document of `tokens` ids that come in pieces."""
        self._append(pieces, np.array([tokens]), text_bytes)

    def _append(self, pieces: Iterable[np.ndarray], lengths: np.ndarray, text_bytes: int) -> None:
        tokens_file, starts_file = self._files or self._open()
        for ids in pieces:
            tokens_file.append(ids)
        starts_file.append(self.begun.tokens + np.cumsum(lengths) - lengths)
        tokens = self.begun.tokens + int(lengths.sum())
        self.begun = Begun(tokens, self.begun.documents + len(lengths), self.begun.text_bytes + text_bytes)
        if tokens >= self.shard_tokens:
            self.flush()

    def _open(self) -> tuple[_Appended, _Appended]:
        tokens_file, starts_file = (self.folder / name for name in _names(len(self.shards)))
        self._files = (
            _Appended(tokens_file, self.dtype, self.begun.tokens),
            _Appended(starts_file, np.dtype(np.int64), self.begun.documents),
        )
        return self._files

    def flush(self) -> None:
        """Close the shard at hand, if there is anything in it. `publish` gives it its name."""
        if self._files is None:
            return
        tokens, starts = self._files
        hashes = [file.close() for file in self._files]
        self.shards.append(
            Shard(
                tokens.path.name,
                self.begun.tokens,
                hashes[0],
                self.begun.text_bytes,
                starts.path.name,
                self.begun.documents,
                hashes[1],
            )
        )
        self._closed.append(self.shards[-1])
        self._files, self.begun = None, Begun()

    def sync(self) -> None:
        """Bring what was added to the disk."""
        for file in self._files or ():
            file.sync()

    def publish(self) -> None:
        """Give closed shards their names, those of an earlier writer that was killed before it could, too."""
        for shard in self._closed:
            for path in (self.folder / shard.file, self.folder / shard.starts_file):
                if (temporary := temporary_of(path)).exists():
                    os.replace(temporary, path)
        self._closed = []

    def abandon(self) -> None:
        """Close the files as they are."""
        for file in self._files or ():
            file.abandon()

    def finish(self, tokenizer: Tokenizer, facts: dict[str, Any]) -> None:
        """Close the last shard and write the manifest; `facts` are further entries."""
        self.flush()
        self.publish()
        manifest = {
            "format_version": FORMAT_VERSION,
            "dtype": self.dtype.name,
            "tokenizer": {key: getattr(tokenizer, key) for key in _MadeWith.model_fields},
            **_sums(self.shards),
            **facts,
            "shards": [asdict(shard) for shard in self.shards],
        }
        write_json(self.folder / MANIFEST, manifest)


class _Appended:
    """A 1-D .npy file that grows under its temporary name.

    Args:
        path: it will have.
        dtype: of its numbers.
        count: of those that are in it already and stay.

    Raises UserError if they are not.
    """

    def __init__(self, path: Path, dtype: np.dtype, count: int) -> None:
        self.path, self.dtype, self.count = path, dtype, count
        temporary = temporary_of(path)
        size = len(self._header()) + count * dtype.itemsize
        if count:
            if not temporary.exists() or temporary.stat().st_size < size:
                raise UserError(f"{temporary}, which an earlier prepare has begun, is cut off or missing; {AGAIN}")
            os.truncate(temporary, size)
        with _named(temporary):
            self._file = temporary.open("r+b" if count else "w+b", buffering=2**20)
            self._file.seek(0)
            self._file.write(self._header())
            self._file.seek(size)

    def _header(self) -> bytes:
        """Of `count` numbers, always of the same length."""
        header = io.BytesIO()
        described = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.count,)}
        np.lib.format.write_array_header_1_0(header, described)
        return header.getvalue()

    def append(self, numbers: np.ndarray) -> None:
        if not len(numbers):
            return
        with _named(temporary_of(self.path)):
            self._file.write(np.ascontiguousarray(numbers, dtype=self.dtype).data.cast("B"))
        self.count += len(numbers)

    def sync(self) -> None:
        with _named(temporary_of(self.path)):
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> str:
        """Bring all of it to the disk; returns its sha256."""
        with _named(temporary_of(self.path)):
            self._file.seek(0)
            self._file.write(self._header())
            self.sync()
            self._file.seek(0)
            found = hashlib.file_digest(self._file, "sha256").hexdigest()  # type: ignore[arg-type]
            self._file.close()
        return found

    def abandon(self) -> None:
        with suppress(OSError):  # the disk is full still
            self._file.close()


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """The operating system does not say which file could not be written."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _names(number: int) -> tuple[str, str]:
    """Of the files of a shard."""
    return f"shard-{number:05}.npy", f"shard-{number:05}.starts.npy"


class TokenShards:
    """Read-only view of a folder of shards as one long row of tokens, by memory map.

    Raises UserError if the folder is not a complete, readable set of shards. The check costs a few system calls per shard:
    it looks at sizes; `verify` reads contents.
    """

    def __init__(self, folder: Path) -> None:
        require_shards(folder)
        self.folder, path = folder, folder / MANIFEST
        raw = path.read_bytes()
        self.fingerprint = hashlib.sha256(raw).hexdigest()
        checked = _parse(path, raw)
        self.manifest: dict[str, Any] = checked.model_dump()
        self.dtype, self.shards = np.dtype(checked.dtype), checked.shards
        self.tokens, self.tokenizer, self.vocab_size = checked.tokens, checked.tokenizer, checked.tokenizer.vocab_size
        self.split, self.validation_fraction = checked.split, checked.validation_fraction
        self._tokens = [self._map(s.file, self.dtype, s.tokens) for s in self.shards]
        self._starts = [self._map(s.starts_file, np.dtype(np.int64), s.documents) for s in self.shards]
        self._offsets = np.concatenate([[0], np.cumsum([s.tokens for s in self.shards], dtype=np.int64)]).astype(np.int64)
        self._numbers = np.concatenate([[0], np.cumsum([s.documents for s in self.shards], dtype=np.int64)]).astype(np.int64)

    def __len__(self) -> int:
        return self.tokens

    def _map(self, name: str, dtype: np.dtype, count: int) -> np.ndarray:
        path = inside(self.folder, name, self.folder / MANIFEST)
        remedy = f"restore it, or {AGAIN}"
        if not path.is_file():  # a pipe of that name would be waited for
            raise UserError(f"token shard {path} is missing; {remedy}")
        try:
            # Not np.load, which takes archives and pickles for arrays as well.
            array = np.lib.format.open_memmap(path, mode="r", max_header_size=1000)
        except Exception as error:  # a header with flipped bits is Python source: parsing it raises anything
            reason = str(error).partition("\n")[0][:200] or type(error).__name__
            raise UserError(f"token shard {path} is cut off or no .npy file ({reason}); {remedy}") from error
        if array.shape != (count,) or array.dtype != dtype:
            held = f"{shown(array.shape)} {shorten(str(array.dtype))}"
            raise UserError(f"token shard {path} holds {held}, the manifest says ({count},) {dtype}; {remedy}")
        return array.view(np.ndarray)  # still mapped; np.memmap's own class costs microseconds at every slice

    def read(self, start: int, out: np.ndarray) -> None:
        """Copy tokens [start, start + len(out)) into `out`, across shards."""
        shard = int(np.searchsorted(self._offsets, start, side="right")) - 1
        done = 0
        while done < len(out):
            part = self._tokens[shard][start + done - self._offsets[shard] :][: len(out) - done]
            out[done : done + len(part)] = part
            done += len(part)
            shard += 1

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Positions in [start, stop) at which documents begin, relative to `start`."""
        first = int(np.searchsorted(self._offsets, start, side="right")) - 1
        last = int(np.searchsorted(self._offsets, stop, side="left"))
        found = []
        for shard in range(first, last):
            starts, offset = self._starts[shard], int(self._offsets[shard])
            low, high = np.searchsorted(starts, [start - offset, stop - offset])
            here = starts[low:high]
            if len(here) and (here[0] < start - offset or here[-1] >= stop - offset or (here[1:] <= here[:-1]).any()):
                raise self._damaged(shard)
            found.append(here + (offset - start))
        return found[0] if len(found) == 1 else np.concatenate([np.empty(0, np.int64), *found])

    def _damaged(self, shard: int) -> UserError:
        file = self.folder / self.shards[shard].starts_file
        return UserError(f"token shard {file} is damaged: its offsets do not rise; restore it, or {AGAIN}")

    def documents(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """The documents that begin at positions [start, stop), in order, many at a time but none copied.

        Yields (number of the first one, positions [n + 1] int64 at which they begin and the last one ends, their tokens).
        """
        end = len(self) if stop is None else stop
        for shard, (tokens, starts) in enumerate(zip(self._tokens, self._starts, strict=True)):
            offset = int(self._offsets[shard])
            low, high = np.searchsorted(starts, [start - offset, end - offset]).tolist()
            if start <= offset and offset + len(tokens) <= end:  # also if they are not in order
                low, high = 0, len(starts)
                if len(tokens) and (not high or starts[0] != 0):
                    raise self._damaged(shard)
            for first in range(low, high, _AT_ONCE):
                last = min(first + _AT_ONCE, high)
                bounds = np.append(starts[first:last], starts[last] if last < len(starts) else len(tokens))
                if bounds[0] < 0 or bounds[-1] > len(tokens) or (bounds[1:] <= bounds[:-1]).any():
                    raise self._damaged(shard)
                yield int(self._numbers[shard]) + first, bounds + offset, tokens[bounds[0] : bounds[-1]]

    def document(self, number: int) -> tuple[int, np.ndarray]:
        """The position at which document `number` begins, and its tokens, which are not copied."""
        shard = int(np.searchsorted(self._numbers, number, side="right")) - 1
        tokens, starts, place = self._tokens[shard], self._starts[shard], number - int(self._numbers[shard])
        begin, end = int(starts[place]), int(starts[place + 1]) if place + 1 < len(starts) else len(tokens)
        if not 0 <= begin < end <= len(tokens):
            raise self._damaged(shard)
        return int(self._offsets[shard]) + begin, tokens[begin:end]

    def document_at(self, position: int) -> int:
        """The number of the document that holds the token at `position`."""
        shard = int(np.searchsorted(self._offsets, position, side="right")) - 1
        place = np.searchsorted(self._starts[shard], position - self._offsets[shard], side="right")
        return int(self._numbers[shard] + place) - 1

    def verify(self) -> Iterator[str]:
        """Read everything; yield one sentence for each thing that is wrong."""
        for shard, tokens, starts in zip(self.shards, self._tokens, self._starts, strict=True):
            for name, expected in ((shard.file, shard.sha256), (shard.starts_file, shard.starts_sha256)):
                if (actual := file_sha256(self.folder / name)) != expected:
                    yield f"{self.folder / name} has sha256 {actual[:16]}..., the manifest says {expected[:16]}..."
            if len(tokens) and int(tokens.max()) >= self.vocab_size:
                yield f"{self.folder / shard.file} holds id {int(tokens.max())}, the vocabulary has {self.vocab_size}"
            in_order = len(starts) and starts[0] == 0 and bool((np.diff(starts) > 0).all()) and starts[-1] < len(tokens)
            if not in_order:
                yield f"{self.folder / shard.starts_file} is not a rising list of offsets from 0 below {len(tokens)}"


def shard_name(name: str) -> bool:
    """Whether `ShardWriter` gives files such a name."""
    return name == MANIFEST or re.fullmatch(r"shard-\d{5,}(\.starts)?\.npy", name) is not None


def begun_shard(name: str) -> bool:
    """Whether `ShardWriter` gives such a name to what it is writing."""
    return name.startswith(".") and name.endswith(".tmp") and name[1:-4] != MANIFEST and shard_name(name[1:-4])


def listed_shards(folder: Path) -> list[Shard] | None:
    """What the manifest in `folder` lists; None if there is none."""
    path = folder / MANIFEST
    try:
        return _parse(path, path.read_bytes()).shards
    except (OSError, UserError):
        return None


def require_shards(folder: Path, tokenizer: str = "") -> None:
    """Raises UserError if there are none in `folder`; it advises to make some with `tokenizer`, or the one that is built in."""
    if not (folder / MANIFEST).exists():
        raise UserError(f"there are no token shards in {str(folder)!r} (no {MANIFEST}){_where_else(folder, tokenizer)}")


def require_data(c: Config) -> None:
    """Raises UserError if shards that a run of `c` reads are not there; imports nothing slow, and so can be asked first."""
    folders = c.data.paths if c.data.source == "shards" else []
    held_out = c.validation.paths if c.validation.enable and c.data.source != "state_tracking" else []
    for folder in (*folders, *held_out):
        require_shards(Path(folder), c.data.tokenizer)


def _where_else(folder: Path, tokenizer: str) -> str:
    """What to do about a folder that holds no shards. No advice writes into a folder that holds something else."""
    near = [folder / split for split in SPLITS] + [folder.parent] * folder.is_file()
    if held := [repr(str(path)) for path in near if (path / MANIFEST).exists()]:
        return f"; there are some in {' and in '.join(held)}: name that folder"
    for out in (folder, folder.parent):
        if (out / PROGRESS).exists():
            return f"; `titan-dp prepare` into {str(out)!r} was cut off or held nothing out: give its command again, or {AGAIN}"
    # A folder for prepare to write into so that `folder`, or one beside it, comes to hold the shards.
    out = folder.parent if folder.name in SPLITS else folder
    stem = out.name if out.name not in ("", "..") else "data"
    others = (out.parent / f"{stem}-tokens{'' if number == 1 else f'-{number}'}" for number in itertools.count(1))
    out = next(path for path in itertools.chain([out], others) if _is_free(path))
    name = folder.name if folder.name in SPLITS else SPLITS[0]
    command = f"titan-dp prepare INPUT --out {shlex.quote(str(out))} --tokenizer {shlex.quote(tokenizer or 'bytes')}"
    return f"; write them with `{command}`{'' if tokenizer else ', or another tokenizer,'} and name {str(out / name)!r}"


def _is_free(path: Path) -> bool:
    """Whether nothing is there but, at most, an empty folder."""
    try:
        return not any(path.iterdir())
    except FileNotFoundError:
        return True
    except OSError:
        return False


def _parse(path: Path, raw: bytes) -> _Manifest:
    """The manifest, its entries of the right types and its sums right. Raises UserError if it is not one."""
    remedy = AGAIN
    if (version := parse_json(_Version, raw, path, "manifest of token shards", remedy).format_version) != FORMAT_VERSION:
        raise UserError(f"{path} has format version {version}, this program reads {FORMAT_VERSION}; {remedy}")
    manifest = parse_json(_Manifest, raw, path, "manifest of token shards", remedy)
    for name, summed in _sums(manifest.shards).items():
        if (said := getattr(manifest, name)) != summed:
            raise UserError(f"{path} is damaged: {name} = {said}, but its shards have {summed}; {remedy}")
    return manifest


def _sums(shards: list[Shard]) -> dict[str, int]:
    return {name: sum(getattr(shard, name) for shard in shards) for name in ("tokens", "documents", "text_bytes")}
