"""Which checkpoint a run goes on from, its own or another's, and what becomes of newer ones. All ranks go by what rank 0 finds.

Newer checkpoints that are not taken are set aside, loudly: left in place they would be the newest, by which retention and the
next start go.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from titan_dp import config
from titan_dp.checkpoint.folder import delete_checkpoint, resolve_checkpoint, set_aside
from titan_dp.checkpoint.manifest import (
    DamagedError,
    committed_steps,
    read_manifest,
    saved_sections,
    saved_value,
    step_folder,
    unhealthy,
)
from titan_dp.checkpoint.seen import verify_together
from titan_dp.errors import UserError, say_once
from titan_dp.faults.agreement import on_main

Found = tuple[Path, dict[str, Any]]
"""A checkpoint and its manifest."""


def checkpoint_to_resume(c: config.Checkpoint, folder: Path, group: dist.ProcessGroup) -> Found | None:
    """The checkpoint of step `load_step` (-1: the newest healthy) in `folder`, else the one at `branch_from`; None if there is
    none. Every rank calls it.

    Raises UserError if none can be taken, or if `resume` is off and there is one in `folder`.
    """
    return _own(c, folder, group) or (_branch(Path(c.branch_from), group) if c.branch_from else None)


def _branch(path: Path, group: dist.ProcessGroup) -> Found:
    """The checkpoint of another run that this one branches from. Raises UserError if it is not there, or is damaged."""
    try:
        # Rank 0 says which one is the newest, for all.
        checkpoint = path / on_main(lambda: os.path.relpath(resolve_checkpoint(path), path), group)
        manifest = on_main(lambda: read_manifest(checkpoint), group)
    except UserError as error:
        raise UserError(
            f"checkpoint.branch_from: {error}; the run to branch from saves a step that its checkpoint.keep_steps names"
        ) from error
    if problems := verify_together(checkpoint, manifest, group):
        raise UserError(f"checkpoint.branch_from: {checkpoint} is damaged: {problems[0]}; train that run again")
    return checkpoint, manifest


def _own(c: config.Checkpoint, folder: Path, group: dist.ProcessGroup) -> Found | None:
    """The checkpoint in `folder` to resume from."""
    # Rank 0's list for all: a network file system may show a new folder to some ranks later.
    steps = on_main(lambda: committed_steps(folder), group)
    if not c.resume and steps:
        raise UserError(
            f"checkpoint.resume = false, but {folder} holds step {steps[-1]}; choose another job.run_name, or resume"
        )
    if c.load_step == -1:
        return _newest_healthy(folder, steps, group)
    return _good(step_folder(folder, _step_to_load(c.load_step, folder, steps, group)), group)


def _step_to_load(load_step: int, folder: Path, steps: list[int], group: dist.ProcessGroup) -> int:
    """`load_step`, or the newest healthy checkpoint saved by a run that resumed from it.

    Newer checkpoints of the abandoned branch are set aside.
    """
    newer = {step: step_folder(folder, step) for step in steps if step > load_step}

    def resumed_from_it(checkpoint: Path) -> bool:
        try:
            manifest = read_manifest(checkpoint)
            began = saved_value(saved_sections(manifest["config"]), "checkpoint.load_step")
        except UserError:
            return False
        return began == load_step and manifest["healthy"]

    own = on_main(lambda: [step for step, path in newer.items() if resumed_from_it(path)], group)
    if load_step in steps or own:
        for step in sorted(newer.keys() - set(own)):
            aside = on_main(partial(set_aside, newer[step], "abandoned"), group)
            said = f"checkpoint {newer[step]} is set aside as {aside.name}: the run goes on from an earlier step"
            say_once(f"{said} (checkpoint.load_step = {load_step})")
    return max([load_step, *own])


def _good(checkpoint: Path, group: dist.ProcessGroup) -> Found:
    """The checkpoint that checkpoint.load_step names. Raises UserError if it is damaged."""
    manifest = on_main(lambda: read_manifest(checkpoint), group)
    if problems := verify_together(checkpoint, manifest, group):
        raise UserError(f"checkpoint {checkpoint} is damaged: {problems[0]}; resume from another with checkpoint.load_step")
    if why := unhealthy(manifest):
        say_once(f"WARNING: checkpoint {checkpoint} is not healthy ({why}); it is read because checkpoint.load_step names it")
    return checkpoint, manifest


def _newest_healthy(folder: Path, steps: list[int], group: dist.ProcessGroup) -> Found | None:
    """The newest healthy checkpoint that is as it was saved.

    If none is healthy, the newest is taken whose weights and moments are finite: the step it was saved after was skipped, and
    changed nothing.
    """
    passed: list[Found] = []
    for step in reversed(steps):
        checkpoint = step_folder(folder, step)
        try:
            manifest = on_main(partial(read_manifest, checkpoint), group)
            if not manifest["healthy"]:
                passed.append((checkpoint, manifest))
                continue
            problems = verify_together(checkpoint, manifest, group)
        except DamagedError as error:  # anything else in a manifest stops the run
            problems = [str(error)]
        if not problems:
            _pass_over(passed, f"the run goes on from step {step}", group)
            return checkpoint, manifest
        aside = on_main(partial(set_aside, checkpoint), group)
        instead = f"it is set aside as {aside.name}, and the one before is taken"
        say_once(f"WARNING: checkpoint {checkpoint} is damaged: {'; '.join(problems)}; {instead}")
    for i, (checkpoint, manifest) in enumerate(passed):
        if manifest["finite"] and not verify_together(checkpoint, manifest, group):
            _pass_over(passed[:i], f"the run goes on from {checkpoint.name}", group)
            taken = f"{checkpoint.name}, whose weights are finite, is taken ({unhealthy(manifest)})"
            say_once(f"WARNING: no checkpoint in {folder} is healthy; {taken}")
            return checkpoint, manifest
    if passed:
        newest, manifest = passed[0]
        raise UserError(
            f"no checkpoint in {folder} is healthy (the newest, {newest.name}: {unhealthy(manifest)}); start again with "
            "another job.run_name and a lower optimizer.lr or other data"
        )
    if on_main(lambda: list(folder.glob("step-*.damaged")), group):
        raise UserError(
            f"every checkpoint in {folder} is damaged and set aside (*.damaged); restore one, or start again with another "
            "job.run_name"
        )
    return None


def _pass_over(passed: list[Found], instead: str, group: dist.ProcessGroup) -> None:
    def aside_only_once(checkpoint: Path) -> None:
        """A run that goes NaN at every start would fill the disk with the same step."""
        if (before := checkpoint.with_name(f"{checkpoint.name}.unhealthy")).exists():
            delete_checkpoint(before)
        set_aside(checkpoint, "unhealthy")

    for checkpoint, manifest in passed:
        on_main(partial(aside_only_once, checkpoint), group)
        aside = f"it is set aside as {checkpoint.name}.unhealthy, and {instead}"
        say_once(f"WARNING: checkpoint {checkpoint} is not healthy ({unhealthy(manifest)}); {aside}")
