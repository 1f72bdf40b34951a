"""Files that exist whole or not at all, and their checksums."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO


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


def write_json(path: Path, value: object) -> str:
    return write_atomically(path, lambda file: file.write((json.dumps(value, indent=1) + "\n").encode()))
