"""The cells of a sweep as one SLURM array (launch/slurm_array.sbatch): submitted here, run and requeued by SLURM.

`slurm.json` in the sweep's folder keeps which cells are in which array, and squeue says which of these are still pending or
running; those are not submitted again. Everything else is read from the run folders, as for any launcher.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from pydantic import BaseModel, TypeAdapter, ValidationError

from titan_dp.errors import RunError, UserError, counted
from titan_dp.files import first_mistake, write_json
from titan_dp.launch import FOLDER
from titan_dp.studies.sweep_file import Cell, Sweep
from titan_dp.train.run_folder import is_finished, is_locked

ARRAY_SCRIPT = FOLDER / "slurm_array.sbatch"


class _Job(BaseModel):
    """An array that was submitted: element i runs the i-th of `cells`."""

    id: str
    cells: list[str]


def check_slurm() -> None:
    """Raise UserError if SLURM is not installed."""
    if shutil.which("sbatch") is None:
        raise UserError("--launch slurm: there is no sbatch on this machine; use --launch local, or --launch print")


def launch_slurm(
    sweep: Sweep, chosen: list[Cell], *, at_once: int, nproc: int | None, retries: int, options: list[str]
) -> None:
    """Submit every chosen cell that is neither finished nor already with SLURM, at most `at_once` to run at a time.

    Args:
        nproc: processes per cell; None for one per GPU of the node.
        options: for sbatch.

    Raises:
        UserError: if SLURM refuses the options.
        RunError: if SLURM does not answer.
    """
    path = sweep.folder / "slurm.json"
    jobs = _read_jobs(path)
    queued = _queued(jobs)
    cells = [c for c in chosen if c.name not in queued and not is_finished(c.folder) and not is_locked(c.folder)]
    # A branch runs once its trunk is over, in an array of its own.
    first = [cell for cell in cells if not cell.awaits_trunk]
    trunks = {cell.name for cell in first} | queued.keys()
    later = [cell for cell in cells if cell.awaits_trunk and cell.trunk in trunks]
    if left := len(cells) - len(first) - len(later):
        print(f"{counted(left, 'cell')} not submitted: what they branch from is not there, and no job of SLURM trains it")
    if not first and not later:
        print(f"nothing to submit: {counted(len(queued), 'cell')} with SLURM already, the rest is finished")
        return
    if not str(sweep.folder).isprintable():  # the listing has one cell per line
        raise UserError(
            f"--launch slurm: the name of {str(sweep.folder)!r} has control characters; choose another job.dump_folder"
        )
    environment = {"VENV": sys.prefix} | os.environ | {"RETRIES": str(retries)} | ({"NPROC": str(nproc)} if nproc else {})
    for these in filter(None, (first, later)):
        awaited = sorted({queued[cell.trunk] for cell in these} if these is later else ())
        listing = sweep.folder / f"cells-{time.time_ns()}.txt"  # a new one each time: an earlier array may still read its own
        listing.write_text("".join(f"{cell.folder / 'config.toml'}\n" for cell in these))
        array = [f"--array=0-{len(these) - 1}%{at_once}", *([f"--dependency=afterany:{':'.join(awaited)}"] if awaited else [])]
        command = ["sbatch", "--parsable", *array, *options, str(ARRAY_SCRIPT), str(listing)]
        result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if result.returncode:
            raise UserError(f"sbatch refuses the array: {result.stderr.strip()}; see --sbatch for options your site needs")
        job = result.stdout.strip().partition(";")[0]
        jobs.append(_Job(id=job, cells=[cell.name for cell in these]))
        write_json(path, [each.model_dump() for each in jobs])
        queued |= dict.fromkeys(jobs[-1].cells, job)
        after = f" after {', '.join(awaited)}" if awaited else ""
        many = f"{counted(len(these), 'cell')}, {at_once} at once{after}"
        print(f"array {job}: {many}; the command without --launch shows how far they are")


def _read_jobs(path: Path) -> list[_Job]:
    try:
        return TypeAdapter(list[_Job]).validate_json(path.read_bytes(), strict=True)
    except FileNotFoundError:
        return []
    except ValidationError as error:
        raise UserError(
            f"{path} is no list of arrays ({first_mistake(error)}); see with squeue what still runs, then move the file away"
        ) from error


def _queued(jobs: list[_Job]) -> dict[str, str]:
    """The array of each cell whose element is pending or running, by the cell's name."""
    squeue = ["squeue", "--noheader", "--array", "--me", "--format=%F %K"]
    result = subprocess.run(squeue, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RunError(f"squeue fails: {result.stderr.strip()}; nothing was submitted")
    active = {tuple(line.split()) for line in result.stdout.splitlines()}
    return {name: job.id for job in jobs for i, name in enumerate(job.cells) if (job.id, str(i)) in active}
