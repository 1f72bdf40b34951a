"""The checkpoints of a run on disk: which one a path means, which are set aside, which are deleted. Without torch.

A run is a folder that holds config.toml; its checkpoints are in `checkpoint.folder` there (outputs/<run>/checkpoint).
Readers of a run take its newest healthy checkpoint and name what is newer. A damaged checkpoint that a run would resume from
is set aside, as step-00001000.damaged, and the one before is taken.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import tomli

from titan_dp.checkpoint.manifest import (
    MANIFEST,
    DamagedError,
    all_steps,
    committed_steps,
    read_manifest,
    saved_value,
    step_folder,
    unhealthy,
)
from titan_dp.config.describe import all_keys
from titan_dp.errors import UserError, say_once
from titan_dp.files import make_folder, shorten, stays_inside

SAVED = re.compile(r"__\d+_\d+\.distcp|\.metadata(\.tmp)?|(\.manifest\.json\.tmp|manifest\.json)")
"""Names of the files that a save writes."""
_ASIDE = re.compile(r"step-\d+\.(damaged|abandoned|unhealthy)(-\d+)?")
"""Names that `set_aside` gives."""


# -- which checkpoint a path means ---------------------------------------------------------------------------------------


def resolve_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest healthy one of a checkpoint folder or run folder.

    Newer ones that are not taken are named on stderr. If `path` is a checkpoint itself it is taken even if it is not healthy,
    with a warning.

    Raises UserError if there is none.
    """
    if is_checkpoint(path):
        if why := unhealthy(read_manifest(path)):
            say_once(f"WARNING: checkpoint {path} is not healthy ({why}); it is read because it was named itself")
        return path
    folder, passed = checkpoint_folder(path), list[str]()
    candidates = [step_folder(folder, step) for step in reversed(all_steps(folder))] or copies(folder)
    for checkpoint in candidates:
        name = f"step {step}" if (step := step_of(checkpoint)) else checkpoint.name
        if not (why := _why_not(checkpoint)):
            if passed:
                say_once(f"{folder}: {shorten('; '.join(passed), 600)}; taking {name}, the newest healthy checkpoint")
            return checkpoint
        passed.append(f"{name} {why}")
    if not (committed := [checkpoint for checkpoint in candidates if (checkpoint / MANIFEST).exists()]):
        raise UserError(f"{path} holds no committed checkpoint: every save was cut off")
    raise UserError(
        f"{path} holds no healthy checkpoint: {shorten('; '.join(passed), 600)}; take another run, or name one itself to have "
        f"it read all the same: {committed[0]}"
    )


def _why_not(checkpoint: Path) -> str:
    """Why a reader of the newest passes it over; empty if it does not."""
    if not (checkpoint / MANIFEST).exists():
        return "was cut off while it was saved"
    try:
        why = unhealthy(read_manifest(checkpoint))
    except DamagedError:
        return "is damaged"
    return f"is not healthy ({why})" if why else ""


def is_checkpoint(path: Path) -> bool:
    """Whether `path` means one checkpoint: it holds a manifest, or has the name or the index of one that was cut off."""
    held = any((path / name).exists() for name in (MANIFEST, ".metadata"))
    return held or bool(re.fullmatch(r"step-\d{8,}(\..*)?", path.name))


def checkpoint_folder(path: Path) -> Path:
    """The folder of a run's checkpoints: `path`, or what config.toml in it says (`checkpoint.folder`), or what it holds.

    Raises UserError if there is none, or it cannot be told which.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; give a run folder, its checkpoint folder, or one checkpoint")
    folders = (path, configured_folder(path))
    for folder in folders:
        if all_steps(folder):
            return folder
    inner = sorted(child for child in path.iterdir() if child.is_dir()) if path.is_dir() else []
    holding = [child for child in inner if all_steps(child)]
    if len(holding) == 1:
        return holding[0]
    several = holding or [copy for folder in folders for copy in copies(folder)]
    if len(several) == 1:  # such as best/ alone, all that was kept of a run
        return several[0].parent
    if several:
        raise UserError(f"{path} holds several folders of checkpoints or checkpoints; name one: {', '.join(map(str, several))}")
    if (path / "config.json").exists():
        raise UserError(f"{path} is a Hugging Face folder; make a checkpoint of it first: titan-dp import {path} OUT")
    raise UserError(f"{path} holds no committed checkpoint; give a run folder, its checkpoint folder, or one step-... of it")


def configured_folder(run_folder: Path) -> Path:
    """`checkpoint.folder` in the run; its default if config.toml is not there or cannot be read."""
    try:
        folder = saved_value(tomli.loads((run_folder / "config.toml").read_text()), "checkpoint.folder")
    except (OSError, ValueError, RecursionError, AttributeError):
        folder = None
    return run_folder / str(folder if stays_inside(folder, nested=True) else all_keys()["checkpoint.folder"].default)


def copies(folder: Path) -> list[Path]:
    """Checkpoints in `folder` under names of their own, such as best/ or step-00001000.keep."""
    found = (path.parent for path in folder.glob(f"*/{MANIFEST}"))
    return sorted(path for path in found if not re.fullmatch(r"step-\d+", path.name) and not _ASIDE.fullmatch(path.name))


def step_of(checkpoint: Path) -> str:
    """The step in its name, '1000' of step-00001000 and step-00001000.damaged; empty for a name of its own."""
    name = checkpoint.name.partition(".")[0] if _ASIDE.fullmatch(checkpoint.name) else checkpoint.name
    match = re.fullmatch(r"step-0*(\d+)", name)
    return match[1] if match else ""


# -- setting aside and deleting ------------------------------------------------------------------------------------------


def set_aside_folders(folder: Path) -> list[Path]:
    """What `set_aside` has left in a checkpoint folder."""
    return sorted(path for path in folder.glob("step-*.*") if path.is_dir() and _ASIDE.fullmatch(path.name))


def set_aside(checkpoint: Path, why: str = "damaged") -> Path:
    """Rename a bad checkpoint: it no longer counts, but can be inspected. Returns the new path.

    It is called step-00001000.damaged, or .damaged-2 if that name is taken: what was set aside before stays. From then on no
    run reads, counts or deletes it.
    """
    names = (f"{checkpoint.name}.{why}" + (f"-{number}" if number > 1 else "") for number in itertools.count(1))
    return checkpoint.rename(next(aside for name in names if not (aside := checkpoint.with_name(name)).exists()))


def delete_checkpoint(checkpoint: Path) -> None:
    """Delete the files that a save writes into `checkpoint`, and the folder unless it holds others as well.

    The manifest goes first, so that a kill in between leaves a folder that was cut off, not a committed one with missing files.
    Raises OSError if a file cannot be deleted.
    """
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    for path in checkpoint.iterdir():
        if SAVED.fullmatch(path.name):
            path.unlink()
    with suppress(OSError):  # it holds what no save wrote
        checkpoint.rmdir()


def make_empty(folder: Path) -> None:
    """A folder for a new checkpoint; one of the same step that was cut off, or is saved again, goes."""
    if folder.exists():
        delete_checkpoint(folder)
    make_folder(folder)  # it stays if it holds what no save wrote


def apply_retention(folder: Path, keep_latest_k: int, keep_steps: Iterable[int] = ()) -> None:
    """Keep the newest `keep_latest_k` committed checkpoints (0: all), the newest healthy one, `keep_steps`; delete older ones.

    Older folders that were cut off go as well.
    """
    committed = committed_steps(folder)
    if keep_latest_k == 0 or not committed:
        return
    healthy = [step for step in committed if is_healthy(step_folder(folder, step))]
    kept = {*committed[-keep_latest_k:], *healthy[-1:], *keep_steps} & {*committed}
    for step in all_steps(folder):
        if step not in kept and step < committed[-1]:
            delete_checkpoint(step_folder(folder, step))


def is_healthy(checkpoint: Path) -> bool:
    """Whether it is committed and healthy; not if it is damaged."""
    try:
        return read_manifest(checkpoint)["healthy"]
    except UserError:  # damaged, which is for the next resume to say, not a reason to fail this save
        return False
