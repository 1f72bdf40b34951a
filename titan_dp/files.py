"""Files that exist whole or not at all, their checksums, and names from elsewhere that must stay in their folder.

Manifests, indexes and configurations name files and folders. Such a name is data: it is joined to a folder by `inside` only.
Symbolic links are followed, as the Hub's cache and shards spread over disks need them: who can make a link in a folder is who
made the folder, and a manifest cannot. Paths that a user gives as such (job.dump_folder, data.path) are free.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

import xxhash

from titan_dp.errors import UserError


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> str:
    """Write a file so that it exists whole or not at all; returns its sha256."""
    temporary = path.with_name(f".{path.name}.tmp")  # always the same, so that what a kill leaves behind is overwritten
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return file_sha256(path)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum(path: Path) -> str:
    """xxh3_128 of a file: against damage, not against forgery, and eight times as fast as sha256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()  # type: ignore[arg-type]  # it has the same methods


def to_json(value: object, **options: Any) -> str:
    """`value` as JSON that every parser reads: NaN and infinities, for which JSON has no word, are null.

    The only writer of JSON in this project. `options` are those of json.dumps.
    """
    if (default := options.pop("default", None)) is not None:
        options["default"] = lambda other: finite(default(other))
    return json.dumps(finite(value), allow_nan=False, **options)


def finite(value: Any) -> Any:
    """`value` with None for every number in it that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    return [finite(each) for each in value] if isinstance(value, list | tuple) else value


def write_json(path: Path, value: object) -> str:
    return write_atomically(path, lambda file: file.write((to_json(value, indent=1) + "\n").encode()))


def check_own(folder: Path, record: str, keys: set[str], others: Iterable[str] = ()) -> None:
    """Raises UserError where a command would write over a file that it did not write, or `folder` is none.

    Its own are `record`, JSON with at least `keys`, which it writes before all else, and where that is there, the `others`.
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
    """The path of `name` in `folder`. Raises UserError, with the file `named_by` that says so, where it could lie elsewhere."""
    if not isinstance(name, str) or not stays_inside(name):
        raise UserError(f"{named_by} names {shown(name)}, which is not a file of its folder; take both from one source again")
    return folder / name


def shown(value: object) -> str:
    """repr of a value from a file or command line, for a message."""
    try:
        return shorten(repr(value))
    except (ValueError, RecursionError):  # an integer of thousands of digits, lists as deep
        return f"a {type(value).__name__} that is too long to be shown"


def shorten(text: str, most: int = 200) -> str:
    """`text` cut to what one sentence can bear."""
    return text if len(text) <= most else f"{text[: most - 30]}... ({len(text):,} characters)"
