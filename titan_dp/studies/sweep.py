"""`titan-dp sweep FILE`: expand a sweep file into run folders, show what they cost and how far they are, launch them.

    titan-dp sweep cpu_study
    titan-dp sweep cpu_study --launch local --at-once 2

A sweep's state is its run folders and nothing else: what is finished, cut off or running is read from them each time. So
a sweep can be killed at any moment and started again, and cells may be run by any launcher, by several in turn, or by
hand. A folder that has been trained with other settings is never touched. `titan-dp state-tracking train` writes and runs
its cells with `cells_to_write` and `launch`, as this does.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import shlex
from collections.abc import Sequence
from contextlib import closing, nullcontext, suppress
from pathlib import Path
from typing import Any

from titan_dp.config.arguments import above_zero, fraction, natural, positive
from titan_dp.config.load import config_from_toml
from titan_dp.errors import RunError, UserError, counted, did_you_mean, require
from titan_dp.files import make_folder, short, shown, stays_inside, write_json
from titan_dp.output import number_table, print_next, print_table, print_text
from titan_dp.studies.sweep_file import Cell, Sweep, load_sweep
from titan_dp.train.run_folder import RunLock, holds_config, identity, is_finished, is_locked, last_step, read_run, write_config

_LEAST_HOURS = 0.01
"""Of the whole sweep: below it GPU-hours say nothing."""
_ROUNDS = 6
"""Of --extend-edges in one launch: a loss that falls for ever is no reason to train for ever."""
_OURS = (".lock", ".slot", ".config.toml.tmp", "config.toml")
"""What a cell's folder may hold before its first attempt."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="a sweep file, or else a shipped one of that name, such as cpu_study")
    parser.add_argument(
        "--launch", choices=["local", "slurm", "print"], help="run the cells here, as a SLURM array, or print their commands"
    )
    parser.add_argument(
        "--cells",
        nargs="+",
        metavar="NAME",
        help="launch these alone; 'S3-*' stands for all whose names begin so (default: all)",
    )
    parser.add_argument("--at-once", type=positive, default=1, metavar="K", help="cells that run at the same time (default: 1)")
    parser.add_argument("--nproc", type=positive, metavar="N", help="processes of a cell (default: 1; slurm: the node's GPUs)")
    parser.add_argument("--retries", type=natural, default=2, metavar="N", help="new attempts of a failed cell (default: 2)")
    parser.add_argument(
        "--extend-edges",
        action="store_true",
        help="add the next value of a tuned axis wherever the best one is the last; with --launch local until it is not",
    )
    parser.add_argument(
        "--sbatch", default="", metavar="OPTIONS", help="more options of sbatch: '--partition=h100 --time=8:00:00'"
    )
    parser.add_argument("--mfu", type=fraction, default=0.4, help="MFU the GPU-hours are computed at (default: 0.4)")
    parser.add_argument(
        "--peak-tflops", type=above_zero, default=989.4, help="peak of one GPU in TFLOP/s (default: 989.4, H100 in bfloat16)"
    )


def run(args: argparse.Namespace) -> int:
    options = _sbatch_options(args.sbatch)
    if args.launch == "slurm":
        from titan_dp.studies.launch_slurm import check_slurm

        check_slurm()
    sweep = load_sweep(args.file)
    sweep.add(_added(sweep))
    _chosen(sweep, args.cells)
    if args.extend_edges:
        if not sweep.tune:
            raise UserError(f'--extend-edges extends tuned axes, and {args.file} tunes none; give [sweep] tune = "lr", say')
        require("titan-dp sweep --extend-edges", "pandas", "pyarrow", "scipy")
    try:
        make_folder(sweep.folder)
        lock: RunLock | None = RunLock(sweep.folder)  # whoever writes run folders or starts cells is alone
    except (FileExistsError, NotADirectoryError) as error:
        remedy = "choose another job.dump_folder or [sweep] name"
        raise UserError(f"{sweep.folder} cannot be a folder ({error}); {remedy}") from error
    except RunError as error:
        if args.launch in ("local", "slurm") or args.extend_edges:
            hint = f"titan-dp sweep {args.file} shows how far it is"
            raise RunError(f"another process is at work on this sweep ({sweep.folder}); {hint}") from error
        lock = None  # a launch is at work: show how far it is, and write nothing
    with closing(lock) if lock else nullcontext():
        if lock:
            _write(sweep)
            if args.extend_edges:
                _extend(sweep)
        if args.launch != "print":  # whose output is for another program
            _print_costs(sweep, args.mfu, args.peak_tflops)
        if args.launch == "slurm":
            from titan_dp.studies.launch_slurm import launch_slurm

            launch_slurm(
                sweep, _chosen(sweep, args.cells), at_once=args.at_once, nproc=args.nproc, retries=args.retries, options=options
            )
        elif args.launch:
            options_of_launch = {"at_once": args.at_once, "nproc": args.nproc or 1, "retries": args.retries}
            launch(_chosen(sweep, args.cells), args.launch, **options_of_launch)
            for _ in range(_ROUNDS if args.extend_edges and args.launch == "local" else 0):
                if not _extend(sweep):
                    break
                launch(_chosen(sweep, args.cells), args.launch, **options_of_launch)
        if args.launch != "print":
            _print_next(sweep, args)
    return 0


def _chosen(sweep: Sweep, patterns: list[str] | None) -> list[Cell]:
    """The cells that `patterns` name, all if there are none, with the trunks from which they branch.

    Raises UserError if one names no cell.
    """
    if not patterns:
        return sweep.cells
    names, chosen = [cell.name for cell in sweep.cells], set[str]()
    for pattern in patterns:
        if not (found := fnmatch.filter(names, pattern)):
            raise UserError(f"--cells {shown(pattern)}: {sweep.file} has no such cell{did_you_mean(pattern, names)}")
        chosen.update(found)
    chosen |= {cell.trunk for cell in sweep.cells if cell.name in chosen}
    return [cell for cell in sweep.cells if cell.name in chosen]


def _sbatch_options(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"--sbatch {text!r}: {error}; close the quotation") from error


# -- what every study shares -------------------------------------------------------------------------------------------


def launch(cells: Sequence[Cell], how: str, *, at_once: int, nproc: int, retries: int) -> None:
    """Run the cells that are not finished here (`how` is "local"), or print their commands ("print").

    Raises what `launch_local` raises.
    """
    from titan_dp.studies.launch_local import command, launch_local

    if how == "local":
        launch_local(cells, at_once=at_once, nproc=nproc, retries=retries)
        return
    for cell in sorted(cells, key=lambda cell: bool(cell.trunk)):  # a branch needs what its trunk saves
        if not is_finished(cell.folder) and not is_locked(cell.folder):
            print(shlex.join(command(cell, nproc, program=["titan-dp"])))


def cells_to_write(cells: Sequence[Cell], remedy: str, written: dict[str, str] | None = None) -> list[Cell]:
    """The cells whose config.toml is not there yet, or has changed before any training.

    Args:
        remedy: ends what is said of a folder that is in the way.
        written: identities by name of what an earlier call has led to writing; None if nobody has kept them.

    Raises:
        UserError: if a folder was trained with other settings, or holds a config.toml that somebody wrote by hand; with
            `written` also if somebody has changed one.
    """
    new = []
    for cell in cells:
        if holds_config(cell.folder, cell.config, cell.toml(), remedy):
            continue
        path = cell.folder / "config.toml"
        if written is not None and path.exists():
            cut_off = cell.toml().encode().startswith(path.read_bytes())
            if not cut_off and not _is_as_written(cell.folder, written):
                raise UserError(f"{path} is not what this sweep wrote, and would be overwritten; {remedy}")
        new.append(cell)
    return new


# -- the folder of a sweep ---------------------------------------------------------------------------------------------


def _write(sweep: Sweep) -> None:
    """Write every cell's run folder with its config.toml, and sweep.json, the list of them.

    Raises UserError, before anything is written, if a folder was trained with other settings, or the sweep's folder holds
    trained cells that the file does not name.
    """
    written = _listed(sweep)
    new = cells_to_write(sweep.cells, "give this sweep another [sweep] name, or move that folder away", written)
    for folder in _dropped(sweep, written):
        for name in _OURS:
            (folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # somebody has put a file there meanwhile
            folder.rmdir()
    for cell in new:
        write_config(cell.folder, cell.toml())
    keys = ("name", "axes", "identity", "parameters", "flops_per_token", "tokens", "own_tokens", "flops", "added")
    cells = [{key: getattr(cell, key) for key in keys} for cell in sweep.cells]
    facts = {"name": sweep.name, "description": sweep.description, "file": str(sweep.file), "tune": sweep.tune, "cells": cells}
    write_json(sweep.folder / "sweep.json", facts)


def _entries(sweep: Sweep) -> list[dict[str, Any]]:
    """The cells that an earlier expansion wrote into the sweep's folder, as sweep.json lists them."""
    try:
        cells = json.loads((sweep.folder / "sweep.json").read_text())["cells"]
        return [cell for cell in cells if stays_inside(cell["name"])]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []


def _listed(sweep: Sweep) -> dict[str, str]:
    """The identity of each configuration that an earlier expansion wrote, by name."""
    return {str(cell["name"]): str(cell.get("identity")) for cell in _entries(sweep)}


def _added(sweep: Sweep) -> list[Cell]:
    """The cells that --extend-edges has added earlier and the file does not name by now."""
    taken, found = {cell.identity for cell in sweep.cells}, []
    for entry in _entries(sweep):
        axes = entry.get("axes")
        if entry.get("added") is not True or not isinstance(axes, dict) or not sweep.tune.keys() <= axes.keys():
            continue
        values = {axis: axes[axis] for axis in sweep.tune}
        like = next((cell for cell in sweep.cells if cell.axes | values == axes), None)
        if like is None:
            continue
        cell = like.beyond({axis: value for axis, value in values.items() if value != like.axes[axis]})
        if cell.identity not in taken:
            taken.add(cell.identity)
            found.append(cell)
    return found


def _extend(sweep: Sweep) -> list[Cell]:
    """Add and write the cells that are missing beyond the edges at which finished runs have their lowest loss; returns them."""
    from titan_dp.studies.report.compare import group
    from titan_dp.studies.report.read import read_runs
    from titan_dp.studies.report.tune import tune

    runs = read_runs({cell.folder: cell.identity for cell in sweep.cells})
    if (runs["state"] == "not started").all():
        print_text("no edge to extend: no run has finished")
        return []
    runs, configurations = group(runs, "nats")
    tunings, _ = tune(runs, configurations, sweep.tune)
    cells, new = {cell.name: cell for cell in sweep.cells}, {}
    for found in tunings:
        for folder in runs.loc[runs["configuration"] == found.best, "folder"] if found.add is not None else ():
            cell = cells[folder.name].beyond({found.axis: found.add})
            new[cell.name] = cell
        if found.lacks or found.add is not None:
            print_text(str(found))
    if not new:
        print_text("no value is added" if any(found.lacks for found in tunings) else "no best value is at an edge")
        return []
    sweep.add(list(new.values()))
    _write(sweep)
    print_text(f"added: {', '.join(new)}")
    return list(new.values())


def _is_as_written(folder: Path, written: dict[str, str]) -> bool:
    """Whether config.toml in `folder` says what the earlier expansion wrote into it."""
    path = folder / "config.toml"
    try:
        return identity(config_from_toml(path.read_text(), str(path))) == written.get(folder.name)
    except (OSError, ValueError):  # UserError is one
        return False


def _dropped(sweep: Sweep, written: dict[str, str]) -> list[Path]:
    """Folders of cells that the file no longer names and that hold nothing but the config.toml an earlier expansion wrote.

    Raises UserError if such a cell was trained: it is another sweep's, or the file has lost it.
    """
    gone = [sweep.folder / name for name in sorted(written.keys() - {cell.name for cell in sweep.cells})]
    gone = [folder for folder in gone if folder.is_dir() and not folder.is_symlink()]
    for folder in gone:
        if read_run(folder) is not None or is_locked(folder):
            raise UserError(
                f"{folder} was trained and {sweep.file} does not name it: give this sweep another [sweep] name, put the cell "
                "back, or move that folder away"
            )
    return [f for f in gone if {entry.name for entry in f.iterdir()} <= set(_OURS) and _is_as_written(f, written)]


def _state_of(cell: Cell) -> str:
    """'finished', 'running', 'step 120' of a run cut off there, or 'new'."""
    facts = read_run(cell.folder)
    if facts is not None and facts.get("state") == "finished":
        return "finished"
    if is_locked(cell.folder):
        return "running"
    return f"step {last_step(cell.folder):,}" if facts is not None else "new"


# -- output ------------------------------------------------------------------------------------------------------------


def _print_costs(sweep: Sweep, mfu: float, peak_tflops: float) -> None:
    """The table of what the cells are, how far they are and what they cost, and what its last column is."""
    states, flops_per_hour = [_state_of(cell) for cell in sweep.cells], mfu * peak_tflops * 1e12 * 3600
    total = sum(cell.own_flops for cell in sweep.cells)
    left = sum(cell.own_flops for cell, state in zip(sweep.cells, states, strict=True) if state != "finished")

    def hours(flops: int) -> str:
        found = flops / flops_per_hour
        return f"{found:,.0f}" if found >= 100 else f"{found:.1f}" if found >= 10 else f"{found:.3g}"

    columns = ["cell", "state", "model", "shape", "params", "tokens", "FLOPs", "GPU-hours"]
    rows = []
    for cell, state in zip(sweep.cells, states, strict=True):
        m = cell.config.model
        shape = f"{m.num_hidden_layers} x {m.hidden_size}, {m.heads}, {m.mlp_size}"
        sizes = map(short, (cell.parameters, cell.tokens, cell.own_flops))
        rows.append([cell.name, state, m.family, shape, *sizes, hours(cell.own_flops)])
    tokens, finished = sum(cell.own_tokens for cell in sweep.cells), f"{states.count('finished')} finished"
    sums = ["all", finished, "", "layers x width, heads x dim, MLP", "", short(tokens), short(total), hours(total)]
    shown = len(columns) if total >= _LEAST_HOURS * flops_per_hour else len(columns) - 1
    title = f"{sweep.name}: {counted(len(sweep.cells), 'cell')}. {sweep.description}".rstrip()
    table = number_table(title, columns[:shown], [row[:shown] for row in rows], left=columns[:4], show_footer=True)
    for column, footer in zip(table.columns, sums, strict=False):
        column.footer = footer
    print_table(table, details=["shape", "FLOPs", "model"])
    if branches := [cell for cell in sweep.cells if cell.trunk]:
        whole, trunks = sum(cell.flops for cell in sweep.cells), {cell.trunk for cell in branches}
        print_text(
            f"branches: {counted(len(branches), 'cell')} from {counted(len(trunks), 'trunk')}; FLOPs and sums are what each "
            f"trains itself, {short(total)} FLOPs instead of {short(whole)}: {1 - total / whole:.0%} saved"
        )
    if shown == len(columns):
        speed = f"{mfu * peak_tflops:.4g} TFLOP/s, an MFU of {mfu:.0%} of {peak_tflops:g} (--mfu, --peak-tflops)"
        print_text(f"GPU-hours at {speed}; {hours(left)} are left")


def _print_next(sweep: Sweep, args: argparse.Namespace) -> None:
    words = any(cell.config.data.source == "state_tracking" for cell in sweep.cells)
    report = f"titan-dp {'state-tracking ' if words else ''}report {shlex.quote(str(sweep.folder))}"
    file = shlex.quote(str(args.file))
    if args.launch == "local":
        print_next("compare the runs with", report)
    elif args.launch == "slurm":
        print_next("when they are finished, compare the runs with", report)
    elif all(is_finished(cell.folder) for cell in sweep.cells):
        print_next(f"all runs are finished, in {sweep.folder}; compare them with", report)
    else:
        print_text(f"nothing is started; the run folders are in {sweep.folder}")
        print_next("launch the cells, then compare the runs, with", f"titan-dp sweep {file} --launch local", report)
