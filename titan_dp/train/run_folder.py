"""What a run folder says about its run beside metrics and checkpoints: config.toml, run.json and a lock.

`run.json` is written before the first step and again when everything is done; "state" is "finished" only then. The lock
(flock on `.lock`) is held by rank 0 while it lives and freed by the system however it dies, so two runs never write
one folder and anybody can ask whether somebody trains in it. Without torch: sweeps and reports read hundreds of folders.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import tomli

from titan_dp.config import Config
from titan_dp.config.load import config_from_toml
from titan_dp.errors import RunError, UserError
from titan_dp.files import make_folder, shown, to_json, write_json

_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # file systems without locks


def identity(config: Config) -> str:
    """sha256 of everything a run computes with: all that is not default in the configuration, [job] left out.

    Keys that later versions add do not change it. Nor does who has trained the first steps (a branch computes what the run
    would alone), and which checkpoints are kept.
    """
    checkpoint = config.checkpoint.model_copy(update={"branch_from": "", "keep_steps": []})
    values = config.model_copy(update={"checkpoint": checkpoint}).model_dump(exclude={"job"}, exclude_defaults=True)
    return hashlib.sha256(to_json(values, sort_keys=True).encode()).hexdigest()


def write_config(folder: Path, text: str) -> None:
    """Write a future run's config.toml, and its folder. No fsync: it can be written again until the run is trained."""
    make_folder(folder)
    temporary = folder / ".config.toml.tmp"
    temporary.write_text(text)
    os.replace(temporary, folder / "config.toml")


def check_config_is_ours(folder: Path, remedy: str) -> None:
    """Raises UserError, ending with `remedy`, if a run would write its config.toml over one that somebody wrote by hand, or its
    other files over those of another program.

    Runs and sweeps write every section there is, and a run that has begun has a run.json, which is written after config.toml
    and before metrics.jsonl.
    """
    path = folder / "config.toml"
    try:
        ours = Config.model_fields.keys() <= tomli.loads(path.read_text(encoding="utf-8", errors="replace")).keys()
    except FileNotFoundError:
        names = [name for name in ("run.json", "metrics.jsonl") if (folder / name).exists()]
        if names and "state" not in (read_run(folder) or {}):
            raise UserError(f"{folder / names[0]} was not written by a run, which would overwrite it; {remedy}") from None
        return
    except (ValueError, RecursionError):
        ours = False
    if not ours and not (folder / "run.json").exists():
        raise UserError(f"{path} was not written by a run, which would overwrite it; {remedy}")


def holds_config(folder: Path, wanted: Config, text: str, remedy: str) -> bool:
    """Whether config.toml in `folder` is `text`, or says the same.

    Raises UserError, ending with `remedy`, if config.toml was written by hand, or if the folder's run was trained, or is being
    trained, with other settings or with none that can be read.
    """
    path = folder / "config.toml"
    whole = text.encode()
    if path.exists() and whole.startswith(raw := path.read_bytes()):  # or cut off by a kill, as it is not forced to the disk
        return raw == whole
    check_config_is_ours(folder, remedy)
    try:
        found = config_from_toml(path.read_text(encoding="utf-8"), str(path))
        if identity(found) == identity(wanted):  # a folder that was moved has another [job], a branch that grew another trunk
            return found == wanted
        changed = _first_difference(found.model_dump(exclude={"job"}), wanted.model_dump(exclude={"job"}))
    except FileNotFoundError:
        changed = "it has no config.toml"
    except (UserError, UnicodeDecodeError):
        changed = "its config.toml cannot be read"
    if read_run(folder) is not None or is_locked(folder):
        raise UserError(f"{folder} was trained with other settings ({changed}); {remedy}")
    return False


def _first_difference(found: dict, wanted: dict, prefix: str = "") -> str:
    for key, value in wanted.items():
        if isinstance(value, dict):
            if inner := _first_difference(found[key], value, f"{prefix}{key}."):
                return inner
        elif found[key] != value:
            return f"{prefix}{key} was {found[key]!r}, is now {value!r}"
    return ""


def write_run(folder: Path, facts: dict[str, Any]) -> None:
    """Write run.json, whole or not at all."""
    write_json(folder / "run.json", facts)


def read_run(folder: Path) -> dict[str, Any] | None:
    """The run's facts, or None if no run has reached its first step. Raises UserError if they cannot be read."""
    path = folder / "run.json"
    try:
        facts = json.loads(path.read_text())
        if not isinstance(facts, dict):
            raise ValueError(f"it holds {shown(facts)}")
        return facts
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}); move it away: resuming the run writes it again") from error


def run_of(path: Path) -> Path | None:
    """The run that `path` is or lies in: the nearest folder that holds config.toml."""
    path = path.resolve()
    return next((folder for folder in (path, *path.parents) if (folder / "config.toml").is_file()), None)


def is_finished(folder: Path) -> bool:
    return (read_run(folder) or {}).get("state") == "finished"


class RunLock:
    """The lock of a folder, held from construction to `close()` or the end of the process; makes the folder.

    A folder that holds nothing else at `close()` is removed: what was to be written there was refused.

    Args:
        patience: seconds to wait for whoever holds it.

    Raises:
        RunError: if another process still holds it then: the same may succeed later. On a file system without locks
            none is held.
    """

    def __init__(self, folder: Path, patience: float = 1.0) -> None:
        self._path = folder / ".lock"
        deadline, told = time.monotonic() + patience, False
        while not self._taken():
            if time.monotonic() > deadline:
                raise RunError(f"another process is at work in {folder}; wait until it ends, or choose another run folder")
            if not told:
                print(
                    f"another process is at work in {folder}; waiting up to {patience:g} s for its end",
                    file=sys.stderr,
                    flush=True,
                )
                told = True
            time.sleep(0.1)

    def _taken(self) -> bool:
        """Whether the lock could be had, and still is the folder's: whoever held it may have removed both."""
        make_folder(self._path.parent)
        with suppress(FileNotFoundError):
            self._file = self._path.open("w")
            if _try_lock(self._file, fcntl.LOCK_EX) and os.path.samestat(os.fstat(self._file.fileno()), self._path.stat()):
                return True
            self._file.close()
        return False

    def close(self) -> None:
        with suppress(OSError):
            if os.listdir(self._path.parent) == [self._path.name]:
                self._path.unlink()
                self._path.parent.rmdir()
        self._file.close()


def is_locked(folder: Path) -> bool:
    """Whether some process is at work in `folder`."""
    try:
        file = (folder / ".lock").open()
    except FileNotFoundError:
        return False
    with file:  # shared: two that ask do not see each other, and NFS allows it for a file opened to read
        return not _try_lock(file, fcntl.LOCK_SH)


def _try_lock(file: IO[str], kind: int) -> bool:
    """Take the lock if it is free; true as well on file systems without locks."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        if error.errno not in _UNSUPPORTED:
            raise
    return True


def last_record(folder: Path) -> dict[str, Any]:
    """The newest values of metrics.jsonl by name, from its end; empty if there are none yet."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return {}
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 8192))
        lines = file.read().splitlines()
    newest: dict[str, Any] = {}
    for line in lines:
        newest |= parsed_record(line) or {}
    return newest


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl in their order; other lines are left out. Raises OSError if there is no file."""
    return parse_records((folder / "metrics.jsonl").read_bytes())[0]


def parse_records(data: bytes) -> tuple[list[dict[str, Any]], int]:
    """The records of a metrics.jsonl in their order, and how many lines are not records.

    The last line does not count as one of those: a kill may cut it off.
    """
    lines = data.splitlines()
    whole = all(line.startswith(b'{"') and line.endswith(b"}") and b"},{" not in line for line in lines)
    try:  # as one JSON list: 50 ms for 10,000 lines instead of 80; reports read hundreds of files
        values = json.loads(b"[" + b",".join(lines) + b"]") if whole else []
    except (ValueError, RecursionError):
        values = []
    records = [_record(value) for value in values] if len(values) == len(lines) else [parsed_record(line) for line in lines]
    return [record for record in records if record is not None], records[:-1].count(None)


def parsed_record(line: bytes | str) -> dict[str, Any] | None:
    """One line of metrics.jsonl; None if it is not a record: cut off by a kill, read from its middle, or of wrong types."""
    try:
        return _record(json.loads(line))
    except (ValueError, RecursionError):
        return None


def _record(value: Any) -> dict[str, Any] | None:
    """`value` with NaN for null, which stands for a number that is not finite; None if it is not a record.

    A record has a "step", an integer. Its other values are numbers or, under names that no version writes yet, text.
    """
    if not isinstance(value, dict) or type(value.get("step")) is not int or not 0 <= value["step"] < 2**62:
        return None
    for key, entry in value.items():
        if type(entry) is float:  # most are: a report checks millions
            continue
        if entry is None:
            value[key] = math.nan
        elif not is_number(entry) and (key in NUMBERS or not isinstance(entry, str)):
            return None
    return value


_STEP = ["loss", "lr", "grad_norm", "tokens", "tokens_per_second", "data_wait", "step_seconds", "skipped_steps", "mfu"]
_VALIDATION = ["loss", "tokens", "bits_per_byte", "token_accuracy", "sequence_accuracy"]
NUMBERS = (*_STEP, "householder_steps", *(f"validation_{name}" for name in _VALIDATION))
"""What readers of records compute with."""


def is_number(value: object) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)


def last_step(folder: Path) -> int:
    """The last step metrics.jsonl knows of."""
    return last_record(folder).get("step", 0)
