"""Checkpoints on disk, without torch: what a folder must hold to exist, listing, verifying and retention.

    outputs/<run>/checkpoint/step-00001000/    __0_0.distcp ...   torch.distributed.checkpoint's files
                                               .metadata          its index, written when every rank has written
                                               manifest.json      the commit marker, written last

A checkpoint is a folder that holds a manifest, whatever it is called and wherever it was copied; a run is a folder that holds
config.toml. Without a manifest it was cut off: never loaded, never counted by retention, never a reason to delete another.
Readers of a run take its newest healthy checkpoint and name what is newer.
The manifest holds sizes and checksums of all files and of itself, the step, the health bit, the resolved configuration, the
git commit, the data's fingerprint and the position in the data. A checkpoint whose checksums differ is damaged: a run that
would resume from it sets it aside, as step-00001000.damaged, and takes the one before. `checkpointer.py` writes and reads
the tensors; `changed_settings.py` says whether a run may go on from one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shlex
import sys
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import tomli
import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from titan_dp.config.describe import all_keys
from titan_dp.errors import UserError
from titan_dp.files import (
    STRICT,
    JsonObject,
    checksum,
    file_sha256,
    first_mistake,
    inside,
    shorten,
    shown,
    stays_inside,
    to_json,
    write_json,
)
from titan_dp.output import print_table

MANIFEST = "manifest.json"
FORMAT_VERSION = 2
"""Version 1 had sha256 where 2 has xxh3_128, and no checksum of itself; it is still read."""


_SAVED = re.compile(r"__\d+_\d+\.distcp|\.metadata(\.tmp)?|(\.manifest\.json\.tmp|manifest\.json)")
"""Names of the files that a save writes."""
_ASIDE = re.compile(r"step-\d+\.(damaged|abandoned|unhealthy)(-\d+)?")
"""Names that `set_aside` gives."""


class DamagedError(UserError):
    """A checkpoint that is not as it was saved."""


class NewerError(UserError):
    """A checkpoint that a newer version of this program saved, with more in it than this one understands."""


class _File(BaseModel):
    """A file as the manifest lists it."""

    model_config = ConfigDict(**STRICT, extra="forbid")

    name: str
    bytes: Annotated[int, Field(ge=0)]
    xxh3_128: str | None = None
    sha256: str | None = None


class _Manifest(JsonObject):
    """What every manifest says; others of its entries are for people."""

    files: list[_File]
    step: Annotated[int, Field(ge=0)]
    healthy: bool
    """Whether weights, moments and losses are finite; readers of a run take the newest checkpoint that is."""
    unhealthy: list[str] = Field(default_factory=list)
    """Why not: clauses."""
    finite: bool = True
    """Whether weights and moments are, whatever the losses."""
    world_size: Annotated[int, Field(gt=0)]
    tokens: Annotated[int, Field(ge=0)]
    saved: str
    config: str
    fingerprint: str
    tokenizer: str
    global_batch_size: int
    loader: dict[str, Any]
    weights_only: bool = False


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08}"


def all_steps(folder: Path) -> list[int]:
    """Steps with a folder, committed or cut off, rising."""
    found = (re.fullmatch(r"step-(\d{8,})", path.name) for path in folder.glob("step-*"))
    return sorted(int(match[1]) for match in found if match)


def committed_steps(folder: Path) -> list[int]:
    """Steps with a committed checkpoint, rising."""
    return [step for step in all_steps(folder) if (step_folder(folder, step) / MANIFEST).exists()]


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a committed checkpoint. Raises UserError for a folder that is none."""
    path = checkpoint / MANIFEST
    if not path.exists():
        others = ", ".join(map(str, committed_steps(checkpoint.parent))) or "none"
        state = "was cut off while it was saved (no manifest.json)" if checkpoint.exists() else "does not exist"
        raise UserError(f"checkpoint {checkpoint} {state}; committed steps there: {others}")
    try:
        manifest = json.loads(path.read_text())
        version = manifest.pop("format_version")
        if version not in (1, FORMAT_VERSION):
            raise NewerError(f"{path} has format version {shown(version)}, this program reads 1 and {FORMAT_VERSION}")
        if version > 1 and manifest.pop("checksum") != _own_checksum(manifest):
            raise ValueError("its checksum differs")
        if "shards" in manifest:
            raise UserError(f"{checkpoint} is a folder of token shards; give a run folder or a checkpoint")
        _Manifest.model_validate(manifest)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = first_mistake(error) if isinstance(error, ValidationError) else error
        raise DamagedError(f"{path} is damaged ({reason}); take another step") from error
    _refuse_newer(manifest["config"], path)
    return manifest


def write_manifest(checkpoint: Path, meta: dict[str, Any], files: list[dict[str, Any]]) -> None:
    """Commit: from now on the checkpoint exists."""
    manifest = {**meta, "files": sorted(files, key=lambda f: f["name"])}
    whole = {"format_version": FORMAT_VERSION, **manifest, "checksum": _own_checksum(manifest)}
    write_json(checkpoint / MANIFEST, whole)


def _own_checksum(manifest: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(to_json(manifest, sort_keys=True).encode())


def unhealthy(manifest: dict[str, Any]) -> str:
    """Why its checkpoint is not healthy: a clause; empty where it is."""
    if manifest["healthy"]:
        return ""
    return "; ".join(manifest.get("unhealthy", [])) or "its last step was skipped for a gradient that was not finite"


def resolve_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest healthy one of a checkpoint folder or run folder.

    What is newer and not taken is named on stderr. One that is not healthy is taken where `path` is itself, with a warning.

    Raises UserError where there is none.
    """
    if is_checkpoint(path):
        if why := unhealthy(read_manifest(path)):
            say(f"WARNING: checkpoint {path} is not healthy ({why}); it is read because it was named itself")
        return path
    folder, passed = checkpoint_folder(path), list[str]()
    candidates = [step_folder(folder, step) for step in reversed(all_steps(folder))] or _copies(folder)
    for checkpoint in candidates:
        name = f"step {step}" if (step := _step_of(checkpoint)) else checkpoint.name
        if not (why := _why_not(checkpoint)):
            if passed:
                say(f"{folder}: {shorten('; '.join(passed), 600)}; taking {name}, the newest healthy checkpoint")
            return checkpoint
        passed.append(f"{name} {why}")
    if not (committed := [checkpoint for checkpoint in candidates if (checkpoint / MANIFEST).exists()]):
        raise UserError(f"{path} holds no committed checkpoint: every save was cut off")
    raise UserError(
        f"{path} holds no healthy checkpoint: {shorten('; '.join(passed), 600)}; take another run, or name one itself to have "
        f"it read all the same: {committed[0]}"
    )


def _why_not(checkpoint: Path) -> str:
    """Why a reader of the newest passes it over; empty where it does not."""
    if not (checkpoint / MANIFEST).exists():
        return "was cut off while it was saved"
    try:
        why = unhealthy(read_manifest(checkpoint))
    except DamagedError:
        return "is damaged"
    return f"is not healthy ({why})" if why else ""


def say(sentence: str) -> None:
    """To stderr, once for all ranks."""
    if os.environ.get("RANK", "0") == "0":
        print(sentence, file=sys.stderr, flush=True)


def is_checkpoint(path: Path) -> bool:
    """Whether `path` means one checkpoint: it holds a manifest, or has the name or the index of one that was cut off."""
    held = any((path / name).exists() for name in (MANIFEST, ".metadata"))
    return held or bool(re.fullmatch(r"step-\d{8,}(\..*)?", path.name))


def checkpoint_folder(path: Path) -> Path:
    """The folder of a run's checkpoints: `path`, or what config.toml in it says (`checkpoint.folder`), or what it holds.

    Raises UserError where there is none, or it cannot be told which.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; give a run folder, its checkpoint folder, or one checkpoint")
    folders = (path, path / _configured_folder(path))
    for folder in folders:
        if all_steps(folder):
            return folder
    inner = sorted(child for child in path.iterdir() if child.is_dir()) if path.is_dir() else []
    holding = [child for child in inner if all_steps(child)]
    if len(holding) == 1:
        return holding[0]
    several = holding or [copy for folder in folders for copy in _copies(folder)]
    if len(several) == 1:  # such as best/ alone, all that was kept of a run
        return several[0].parent
    if several:
        raise UserError(f"{path} holds several folders of checkpoints or checkpoints; name one: {', '.join(map(str, several))}")
    raise UserError(f"{path} holds no committed checkpoint; give a run folder, its checkpoint folder, or one step-... of it")


def _configured_folder(run_folder: Path) -> str:
    """`checkpoint.folder` of the run; its default where config.toml is not there or cannot be read."""
    try:
        folder = saved_value(tomli.loads((run_folder / "config.toml").read_text()), "checkpoint.folder")
    except (OSError, ValueError, RecursionError, AttributeError):
        folder = None
    return str(folder) if stays_inside(folder, nested=True) else str(all_keys()["checkpoint.folder"].default)


def _copies(folder: Path) -> list[Path]:
    """Checkpoints in `folder` under names of their own, such as best/ or step-00001000.keep."""
    found = (path.parent for path in folder.glob(f"*/{MANIFEST}"))
    return sorted(path for path in found if not re.fullmatch(r"step-\d+", path.name) and not _ASIDE.fullmatch(path.name))


def set_aside_folders(folder: Path) -> list[Path]:
    """What `set_aside` has left in a checkpoint folder."""
    return sorted(path for path in folder.glob("step-*.*") if path.is_dir() and _ASIDE.fullmatch(path.name))


def size_problems(checkpoint: Path) -> list[str]:
    """A sentence for each file that is missing or not as long as the manifest says; reads no contents."""
    return [problem for entry in read_manifest(checkpoint)["files"] if (problem := size_problem(checkpoint, entry))]


def size_problem(checkpoint: Path, entry: dict[str, Any]) -> str | None:
    """A sentence where a file of the manifest is missing or of another length."""
    try:
        path = inside(checkpoint, entry["name"], checkpoint / MANIFEST)
    except UserError as error:
        return str(error)
    try:
        size = path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return f"{path} is missing"
    if size != entry["bytes"]:
        return f"{path} has {size} bytes, the manifest says {entry['bytes']}"
    return None


def verify(checkpoint: Path, part: int = 0, parts: int = 1, files: list[dict[str, Any]] | None = None) -> list[str]:
    """A sentence for each file that is not what was saved; reads everything.

    Args:
        part, parts: look at this one of so many equal parts of the files only.
        files: those of the manifest, where that has been read already.
    """
    problems = []
    for entry in (read_manifest(checkpoint)["files"] if files is None else files)[part::parts]:
        problem = size_problem(checkpoint, entry)
        if problem is None:
            path = checkpoint / entry["name"]
            same = file_sha256(path) == entry["sha256"] if "sha256" in entry else checksum(path) == entry.get("xxh3_128")
            problem = None if same else f"{path} is not what was saved (its checksum differs)"
        if problem is not None:
            problems.append(problem)
    return problems


def set_aside(checkpoint: Path, why: str = "damaged") -> Path:
    """Rename a checkpoint so that it is none any more, but can be looked at. Returns the new path.

    It is called step-00001000.damaged, or .damaged-2 where that is taken: what was set aside before stays. No run
    reads, counts or deletes it from then on.
    """
    names = (f"{checkpoint.name}.{why}" + (f"-{number}" if number > 1 else "") for number in itertools.count(1))
    return checkpoint.rename(next(aside for name in names if not (aside := checkpoint.with_name(name)).exists()))


def delete_checkpoint(checkpoint: Path) -> None:
    """Delete the files that a save writes into `checkpoint`, and the folder unless it holds others as well.

    The manifest goes first, so that a kill in between leaves a folder that was cut off, not a committed one with missing files.
    Raises OSError where a file cannot be deleted.
    """
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    for path in checkpoint.iterdir():
        if _SAVED.fullmatch(path.name):
            path.unlink()
    with suppress(OSError):  # it holds what no save wrote
        checkpoint.rmdir()


def apply_retention(folder: Path, keep_latest_k: int) -> None:
    """Keep the newest `keep_latest_k` committed checkpoints (0: all) and the newest healthy one; delete older ones.

    Older folders that were cut off go as well.
    """
    committed = committed_steps(folder)
    if keep_latest_k == 0 or not committed:
        return
    healthy = [step for step in committed if _is_healthy(step_folder(folder, step))]
    kept = {*committed[-keep_latest_k:], *healthy[-1:]}
    for step in all_steps(folder):
        if step not in kept and step < committed[-1]:
            delete_checkpoint(step_folder(folder, step))


def _is_healthy(checkpoint: Path) -> bool:
    try:
        return read_manifest(checkpoint)["healthy"]
    except UserError:  # damaged, which is for the next resume to say, not a reason to fail this save
        return False


def saved_sections(config: str) -> dict[str, Any]:
    """The resolved TOML of a manifest, by section. Raises DamagedError where it is none."""
    try:
        sections = tomli.loads(config)
    except (ValueError, RecursionError):
        sections = {}
    if "model" not in sections or not all(isinstance(section, dict) for section in sections.values()):
        raise DamagedError("the checkpoint's configuration is damaged; resume from another step with checkpoint.load_step")
    return sections


def _refuse_newer(config: str, where: Path) -> None:
    """Raise NewerError where [model] has a key, or a word for a value, that this version does not know.

    The one rule for what a newer version added, whoever reads the manifest: in [model] it may change what the weights compute,
    anywhere else it does not, and is passed over (a resume names it as it names every changed setting).
    """
    try:
        model = saved_sections(config)["model"]
    except DamagedError:  # for who needs the configuration to say
        return
    if unknown := sorted(key for key in model if f"model.{key}" not in all_keys()):
        listed = ", ".join(f"model.{shorten(key)} = {shown(model[key])}" for key in unknown[:4])
        raise NewerError(
            f"{where} has {listed}, which this version of titan_dp does not know: a newer one saved it; read it with that"
        )
    for name, value in model.items():
        if isinstance(value, str) and not (key := all_keys()[f"model.{name}"]).accepts(value):
            raise NewerError(
                f"{where} has model.{name} = {shown(value)}, and this version of titan_dp knows {key.expected}: a newer one "
                "saved it; read it with that"
            )


def loaded_step(checkpoint: Path) -> object:
    """`checkpoint.load_step` of the run that saved it; None where that cannot be read."""
    try:
        return saved_value(saved_sections(read_manifest(checkpoint)["config"]), "checkpoint.load_step")
    except UserError:
        return None


def saved_value(config: dict[str, Any], dotted: str) -> object:
    """Of a key in resolved TOML; one that was unset, or that the writing version did not know, has its default."""
    default = all_keys()[dotted].default if dotted in all_keys() else None
    *path, name = dotted.split(".")
    for part in path:
        config = config.get(part, {})
    return config.get(name, default) if isinstance(config, dict) else default


# -- titan-dp checkpoint ------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="action", metavar="list|verify", required=True)
    listing = commands.add_parser("list", help="the checkpoints of a run")
    listing.add_argument("path", type=Path, help="run folder, checkpoint folder, or a checkpoint")
    check = commands.add_parser("verify", help="compare every file with its checksum")
    check.add_argument("path", type=Path, help="a checkpoint, or a run or checkpoint folder (all committed ones)")


def run(args: argparse.Namespace) -> int:
    return _list(args.path) if args.action == "list" else _verify(args.path)


def _checkpoints(path: Path) -> tuple[list[Path], list[Path]]:
    """The checkpoints that `path` means, by step, then copies of other names; and those that were set aside."""
    if is_checkpoint(path):
        return [path], []
    folder = checkpoint_folder(path)
    found = [step_folder(folder, step) for step in all_steps(folder)] + _copies(folder)
    return found + (_copies(path) if folder != path else []), set_aside_folders(folder)


def _list(path: Path) -> int:
    from rich.filesize import decimal
    from rich.table import Table

    checkpoints, aside = _checkpoints(path)
    table = Table("step", "state", "tokens", "ranks", "size", "saved", title=str(path))
    newer: NewerError | None = None
    remarks: list[str] = []
    for checkpoint in checkpoints:
        name = _step_of(checkpoint) or checkpoint.name
        if not (checkpoint / MANIFEST).exists():
            table.add_row(name, "cut off", "", "", "", "")
            continue
        try:
            manifest = read_manifest(checkpoint)
        except (DamagedError, NewerError) as error:
            newer = newer or (error if isinstance(error, NewerError) else None)
            table.add_row(name, "DAMAGED" if isinstance(error, DamagedError) else "of a newer version", "", "", "", "")
            continue
        saved = datetime.fromisoformat(manifest["saved"]).strftime("%Y-%m-%d %H:%M:%S")
        size = decimal(sum(entry["bytes"] for entry in manifest["files"]))
        if why := unhealthy(manifest):
            remarks.append(f"{name} is not healthy: {why}")
        shown_name = name if _step_of(checkpoint) else f"{manifest['step']} ({name})"
        state = "NOT healthy" if why else "healthy"
        table.add_row(shown_name, state, f"{manifest['tokens']:,}", str(manifest["world_size"]), size, saved)
    for folder in aside:
        why = folder.name.split(".", 1)[1]
        table.add_row(_step_of(folder), f"{why}, set aside", "", "", decimal(_bytes_in(folder)), "")
    print_table(table)
    print(*remarks, sep="\n", end="\n" if remarks else "")
    if aside:
        size = decimal(sum(map(_bytes_in, aside)))
        print(f"{len(aside)} set aside, {size} in all: no run reads, counts or deletes them.")
        ours = [path for path in aside if all(_SAVED.fullmatch(file.name) for file in path.iterdir())]
        for path in aside:
            if path not in ours:
                print(f"{path} holds files that no save wrote: move them away if you delete it")
        if ours:
            print(f"Delete {'the others' if len(ours) < len(aside) else 'them'} with")
            print(f"  rm -r {shlex.join(map(str, ours))}")
    if newer is not None:
        raise newer
    return 0


def _step_of(checkpoint: Path) -> str:
    """The step in its name, '1000' of step-00001000 and step-00001000.damaged; empty for a name of its own."""
    name = checkpoint.name.partition(".")[0] if _ASIDE.fullmatch(checkpoint.name) else checkpoint.name
    match = re.fullmatch(r"step-0*(\d+)", name)
    return match[1] if match else ""


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _verify(path: Path) -> int:
    found, aside = _checkpoints(path)
    checkpoints = [checkpoint for checkpoint in found if (checkpoint / MANIFEST).exists() or checkpoint == path]
    if not checkpoints:
        raise UserError(f"{path} holds no committed checkpoint: every save was cut off")
    problems = []
    for checkpoint in checkpoints:
        try:
            wrong = verify(checkpoint)
        except (DamagedError, NewerError) as error:
            wrong = [str(error)]
        print(f"{checkpoint}: {'BAD' if wrong else 'good'}")
        problems += wrong
    if aside:
        print(f"not looked at, because set aside: {', '.join(folder.name for folder in aside)}")
    if problems:
        raise UserError("; ".join(problems))
    return 0
