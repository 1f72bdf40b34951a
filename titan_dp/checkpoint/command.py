"""`titan-dp checkpoint list|verify`: the checkpoints of a run and their states, and whether their files are what was saved."""

from __future__ import annotations

import argparse
import shlex
from datetime import datetime
from pathlib import Path

from titan_dp.checkpoint.folder import (
    SAVED,
    checkpoint_folder,
    copies,
    is_checkpoint,
    set_aside_folders,
    step_of,
)
from titan_dp.checkpoint.manifest import (
    MANIFEST,
    DamagedError,
    NewerError,
    all_steps,
    read_manifest,
    step_folder,
    unhealthy,
    verify,
)
from titan_dp.errors import UserError
from titan_dp.output import number_table, print_next, print_table, print_text, progress


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
    found = [step_folder(folder, step) for step in all_steps(folder)] + copies(folder)
    return found + (copies(path) if folder != path else []), set_aside_folders(folder)


def _list(path: Path) -> int:
    from rich.filesize import decimal

    checkpoints, aside = _checkpoints(path)
    columns = ("step", "state", "tokens", "ranks", "size", "saved (UTC)")
    table = number_table(str(path), columns, [], left=("step", "state", "saved (UTC)"))
    last = None
    newer: NewerError | None = None
    remarks: list[str] = []
    for checkpoint in checkpoints:
        name = step_of(checkpoint) or checkpoint.name
        if not (checkpoint / MANIFEST).exists():
            table.add_row(name, "cut off")
            continue
        try:
            manifest = read_manifest(checkpoint)
        except DamagedError:
            table.add_row(name, "DAMAGED")
            continue
        except NewerError as error:
            newer = newer or error
            table.add_row(name, "of a newer version")
            continue
        saved = datetime.fromisoformat(manifest["saved"]).strftime("%Y-%m-%d %H:%M:%S")
        size = decimal(sum(entry["bytes"] for entry in manifest["files"]))
        last = checkpoint
        if why := unhealthy(manifest):
            remarks.append(f"{name} is not healthy: {why}")
        shown_name = name if step_of(checkpoint) else f"{manifest['step']} ({name})"
        state = "NOT healthy" if why else "healthy"
        table.add_row(shown_name, state, f"{manifest['tokens']:,}", str(manifest["world_size"]), size, saved)
    sizes = [sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) for folder in aside]
    for folder, size_aside in zip(aside, sizes, strict=True):
        table.add_row(step_of(folder), f"{folder.name.split('.', 1)[1]}, set aside", "", "", decimal(size_aside))
    print_table(table, details=("ranks", "saved (UTC)"))
    print_text(*remarks)
    if aside:
        print_text(f"{len(aside)} set aside, {decimal(sum(sizes))} in all: no run reads, counts or deletes them.")
        _advise_deletion(aside)
    if newer is not None:
        raise newer
    if last is not None:
        print_next("check its files", f"titan-dp checkpoint verify {shlex.quote(str(path))}")
        print_next("load it", f"titan-dp generate {shlex.quote(str(last))}")
    return 0


def _advise_deletion(aside: list[Path]) -> None:
    """The command that deletes what was set aside, except folders that hold other files than a save's."""
    ours = [path for path in aside if all(SAVED.fullmatch(file.name) for file in path.iterdir())]
    for path in aside:
        if path not in ours:
            print(f"{path} holds files that no save wrote: move them away if you delete it")
    if ours:
        print(f"Delete {'the others' if len(ours) < len(aside) else 'them'} with")
        print(f"  rm -r {shlex.join(map(str, ours))}")


def _verify(path: Path) -> int:
    found, aside = _checkpoints(path)
    checkpoints = [checkpoint for checkpoint in found if (checkpoint / MANIFEST).exists() or checkpoint == path]
    if not checkpoints:
        raise UserError(f"{path} holds no committed checkpoint: every save was cut off")
    problems = []
    for checkpoint in checkpoints:
        try:
            files = read_manifest(checkpoint)["files"]
            with progress(f"checking files of {checkpoint.name}", len(files)) as state:
                wrong = [problem for file in state.each(files) for problem in verify(checkpoint, files=[file])]
        except (DamagedError, NewerError) as error:
            wrong = [str(error)]
        print(f"{checkpoint}: {'BAD' if wrong else 'good'}")
        problems += wrong
    if aside:
        print(f"not looked at, because set aside: {', '.join(folder.name for folder in aside)}")
    if problems:
        raise UserError("; ".join(problems))
    return 0
