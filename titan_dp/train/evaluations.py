"""What is measured of a run's checkpoints beside its training: evaluations.jsonl in the run folder. Without torch.

`titan-dp evaluate watch` writes it, one at a time and the file whole each time; `titan-dp report` reads it. A line is one
evaluation of one checkpoint.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from titan_dp.checkpoint.folder import configured_folder, is_healthy
from titan_dp.checkpoint.manifest import MANIFEST, committed_steps, step_folder
from titan_dp.files import JsonObject, Natural, parse_json, to_json, write_atomically

FILE = "evaluations.jsonl"


class Evaluated(JsonObject):
    """A line of the file."""

    step: Natural
    tokens: Natural
    """That the checkpoint was trained on."""
    name: str
    """Of the evaluation, one for each command."""
    command: list[str]
    """Of `titan-dp evaluate`, without its checkpoint."""
    values: dict[str, float]
    """Its curves at this checkpoint."""


def read_evaluations(run_folder: Path) -> list[Evaluated]:
    """In their order; none if there is no file. Raises UserError if a line is not one of them."""
    path = run_folder / FILE
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    remedy = "move it away: `titan-dp evaluate watch` writes it again from what it has kept"
    return [parse_json(Evaluated, line, path, "list of evaluations", remedy) for line in lines]


def write_evaluations(run_folder: Path, evaluated: list[Evaluated]) -> None:
    text = "".join(to_json(each.model_dump()) + "\n" for each in evaluated)
    write_atomically(run_folder / FILE, lambda file: file.write(text.encode()))


def healthy_checkpoints(run_folder: Path, every: int) -> dict[int, Path]:
    """The committed, healthy checkpoints of a run whose steps are multiples of `every`, by step, rising."""
    folder = configured_folder(run_folder)
    found = {step: step_folder(folder, step) for step in committed_steps(folder) if step % every == 0}
    return {step: checkpoint for step, checkpoint in found.items() if is_healthy(checkpoint)}


def committed(checkpoint: Path) -> bytes:
    """Its manifest; empty if it is not committed. Retention deletes this file first, and two saves of a step differ in it."""
    with suppress(FileNotFoundError):
        return (checkpoint / MANIFEST).read_bytes()
    return b""
