"""Files: written whole or not at all, checked, named from elsewhere; JSON checked against a schema; text that is Unicode.

Manifests, indexes and configurations name files and folders. Such a name is data: it is joined to a folder only by `inside`.
Symbolic links are followed, because the Hub's cache and shards spread over disks need them; only the folder's owner can make
one there, a manifest cannot. Paths that a user gives as such (job.dump_folder, data.path) are free.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated, Any, TypeVar

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from titan_dp.errors import UnwritableError, UserError, counted, explained, say_once


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file so that it exists whole or not at all.

    Its bytes are on the disk when this returns. A power cut right after may still bring the old file back.
    """
    temporary = temporary_of(path)
    try:
        with _explaining(path):
            file = temporary.open("wb")
        with file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def make_folder(folder: Path) -> None:
    """Make a folder that a user may have named, and those above it.

    Raises OSError: a full disk, or, with a message of its own, what no other message explains, such as a folder in /proc.
    """
    with _explaining(folder):
        folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def _explaining(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if explained(error) is not None:
            raise
        raise UnwritableError(f"{path} cannot be written ({error.strerror}); choose another folder") from error


def temporary_of(path: Path) -> Path:
    """Where `path` is while it is written: always the same, so that what a kill leaves behind is overwritten."""
    return path.with_name(f".{path.name}.tmp")


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum(path: Path) -> str:
    """xxh3_128 of a file: against damage, not against forgery, and eight times as fast as sha256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()  # type: ignore[arg-type]  # it has the same methods


def to_json(value: object, **options: Any) -> str:
    """`value` as JSON that every parser reads: NaN and infinities, for which JSON has no word, become null.

    The only writer of JSON in this project. `options` are those of json.dumps.
    """
    if (default := options.pop("default", None)) is not None:
        options["default"] = lambda other: finite(default(other))
    return json.dumps(finite(value), allow_nan=False, **options)


def finite(value: Any) -> Any:
    """`value` with None in place of every number in it that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    return [finite(each) for each in value] if isinstance(value, list | tuple) else value


def write_json(path: Path, value: object) -> None:
    write_atomically(path, lambda file: file.write((to_json(value, indent=1) + "\n").encode()))


def check_own(folder: Path, record: str, keys: set[str], others: Iterable[str] = ()) -> None:
    """Raises UserError if a command would write over a file that it did not write, or if `folder` is a file.

    Its own files are `record`, JSON with at least `keys`, which it writes first; and the `others` if that is there.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file; name a folder")
    try:
        own = keys <= json.loads((folder / record).read_bytes()).keys()
    except FileNotFoundError:
        found = next((folder / name for name in others if (folder / name).exists()), None)
    except (OSError, ValueError, AttributeError, RecursionError):
        found = folder / record
    else:
        found = None if own else folder / record
    if found is not None:
        raise UserError(f"{found} is no file of this command, which would overwrite it; move it away, or choose another --out")


def stays_inside(name: object, nested: bool = False) -> bool:
    """Whether `name` names something inside whatever folder it is joined to: one name, or with `nested` several between
    slashes; none of them empty, ".", "..", longer than file systems take (255 bytes), or with control characters.
    """
    if not isinstance(name, str) or not name.isprintable():  # lone surrogates are not printable either
        return False
    parts = name.split("/")
    return (nested or len(parts) == 1) and all(part not in ("", ".", "..") and len(part.encode()) <= 255 for part in parts)


def inside(folder: Path, name: object, named_by: object) -> Path:
    """The path of `name` in `folder`. Raises UserError, naming the file `named_by`, if it could lie elsewhere."""
    if not isinstance(name, str) or not stays_inside(name):
        raise UserError(f"{named_by} names {shown(name)}, which is not a file of its folder; take both from one source again")
    return folder / name


def shown(value: object) -> str:
    """repr of a value from a file or command line, for a message."""
    try:
        return shorten(repr(value))
    except (ValueError, RecursionError):  # an integer of thousands of digits, lists as deep
        return f"a {type(value).__name__} that is too long to be shown"


def short(number: float) -> str:
    """A count in three digits: 804,698,112 as 805M, 49,253.4 as 49.3k; from 1e15 on (FLOPs) and below 0.01 as 2.5e20."""
    if number != 0 and math.isfinite(number) and not 0.01 <= abs(number) < 0.9995e15:
        return re.sub(r"\.?0*e\+?(-?)0*", r"e\1", f"{number:.2e}")
    return "".join(_scaled(number, {1e12: "T", 1e9: "B", 1e6: "M", 1e3: "k"}))


def si(number: float, unit: str) -> str:
    """A quantity in three digits and a prefix: 4.18e16 FLOPs as 41.8 PFLOPs."""
    digits, prefix = _scaled(number, {1e18: "E", 1e15: "P", 1e12: "T", 1e9: "G", 1e6: "M", 1e3: "k"})
    return f"{digits} {prefix}{unit}"


def _scaled(number: float, signs: dict[float, str]) -> tuple[str, str]:
    """Three digits of `number` in the largest of the sizes that fits, and that size's sign."""
    size = next((size for size in signs if abs(number) >= 0.9995 * size), 1.0)
    return f"{float(f'{number / size:.3g}'):g}", signs.get(size, "")


def shorten(text: str, most: int = 200) -> str:
    """`text`, cut if it is too long for one sentence."""
    return text if len(text) <= most else f"{text[: most - 30]}... ({len(text):,} characters)"


# -- JSON from elsewhere -------------------------------------------------------------------------------------------------
#
# Manifests, run.json and sweep.json are checked against a schema before anything uses them: what it accepts has the types it
# says, and everything else ends in one UserError. Nothing is converted ("8" is not a number), infinities and NaN are refused,
# unknown entries are kept.

STRICT = ConfigDict(strict=True, allow_inf_nan=False)
Natural = Annotated[int, Field(ge=0, lt=2**62)]
"""A count: the sum of two fits in 64 bits."""


class JsonObject(BaseModel):
    """A JSON object with some known entries."""

    model_config = ConfigDict(**STRICT, extra="allow")


Schema = TypeVar("Schema", bound=JsonObject)


def parse_json(schema: type[Schema], raw: bytes | str, path: Path, what: str, remedy: str) -> Schema:
    """`raw`, the contents of `path`, as `schema`. Raises UserError: "`path` is no `what` (the first mistake); `remedy`"."""
    try:
        return schema.model_validate_json(raw)
    except ValidationError as error:
        raise UserError(f"{path} is no {what} ({first_mistake(error)}); {remedy}") from error


def first_mistake(error: ValidationError) -> str:
    """The first thing that is wrong: "shards.0.tokens = -1: Input should be greater than or equal to 0"."""
    first = error.errors(include_url=False)[0]
    key, message = shorten(".".join(map(str, first["loc"])), 80), shorten(first["msg"])
    if not key:
        return message
    return f"{key}: {message}" if first["type"] == "missing" else f"{key} = {shown(first['input'])}: {message}"


# -- text that is not Unicode --------------------------------------------------------------------------------------------
#
# JSON ("\\ud800"), command lines and sloppy UTF-8 can hold lone surrogates. A UTF-8 file cannot, and tokenizers differ in what
# they make of them. So each is replaced by U+FFFD where text is read, counted, and said; two that make a pair become the
# character they mean. Bytes that are not UTF-8 at all mean a file of another encoding, and are refused.


def as_unicode(text: str) -> str:
    """`text` with every lone surrogate replaced."""
    return Replaced()(text)


class Replaced:
    """Replaces lone surrogates and counts them.

    Args:
        what: a text is: "document", "prompt".
        of: which of them, for the message.
    """

    def __init__(self, what: str = "text", of: str = "") -> None:
        self.what, self.of = what, of
        self.characters = self.texts = 0
        self.first = ""
        """Where the first one was."""

    def __call__(self, text: str, where: str = "") -> str:
        """`text` without lone surrogates; `where` it was found is for the message."""
        if text.isascii():  # known without looking
            return text
        try:
            text.encode()
            return text
        except UnicodeEncodeError:
            paired = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
            whole, count = re.subn("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", paired)
        if count:
            self.characters += count
            self.texts += 1
            self.first = self.first or where
        return whole

    def say(self) -> None:
        """One sentence on stderr, from the main rank, if anything was replaced."""
        if self.characters:
            first = f", the first in {self.first}" if self.first else ""
            found = f"{counted(self.characters, 'lone surrogate')} in {counted(self.texts, self.what)}{self.of}{first}"
            say_once(f"warning: {found}: not Unicode, replaced by U+FFFD")
