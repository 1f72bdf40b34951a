"""What the commands show in a terminal of 80 columns: it fits, no number is cut, and it ends with what to do next."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import pytest
from rich.text import Text

from tests.runs import write_run
from titan_dp.cli import dispatch
from titan_dp.studies import launch_local
from titan_dp.studies.launch_local import _Launcher
from titan_dp.studies.sweep_file import load_sweep
from titan_dp.train import command as train_command

SWEEP = "titan-dp sweep paper"
COMMANDS = {
    "match --params 805M --num-householder 1,2,3,4 --gated both": ("Gated DeltaProduct_4", "805M", "--model.num_heads 6"),
    "match --params 805M --num-householder 1,2 --by head_dim": ("DeltaProduct_2", "805M"),
    "match --preset paper": ("DeltaProduct_3", "214M", "train one with titan-dp train --config"),
    "sweep paper": ("213m_nh1", "19B", "2.54e19", "327B", f"{SWEEP} --launch local", "titan-dp report outputs/paper"),
    "report runs": ("DeltaProduct_2", "3.0000", "report.html shows it all"),
    "estimate --config debug.toml --nproc 2 --gpu cpu": ("memory per rank", "MiB", "GFLOPs per step"),
    "train --config debug.toml --dry-run": ("memory per rank", "titan-dp estimate --config ... --nproc 8"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_screen_fits_80_columns(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    if command.startswith("report"):
        for n in (1, 2):
            write_run(tmp_path / "runs" / f"n{n}", {"model.num_householder": n})
    if command.startswith("train"):  # titan-dp train becomes another process, which does this
        from titan_dp.run import main

        monkeypatch.setattr(sys, "argv", ["train.py", *shlex.split(command)[1:]])
        assert main() == 0
    else:
        assert dispatch(shlex.split(command)) == 0
    shown = Text.from_ansi(capsys.readouterr().out).plain
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= 80
    assert "…" not in shown
    assert all(part in shown for part in COMMANDS[command]), shown


@pytest.mark.parametrize(("asked", "ranks"), [([], "2"), (["--nproc", "3"], "3")])
def test_a_dry_run_is_of_as_many_ranks_as_would_start(asked: list[str], ranks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(train_command, "processes", lambda: 2)
    monkeypatch.setattr(train_command.os, "execv", lambda _, words: started.append((words, os.environ["WORLD_SIZE"])))
    train_command.run(["--config", "debug.toml", "--dry-run", *asked])
    ((words, world_size),) = started
    assert words[1:3] == ["-m", "titan_dp.train"], "one process, without a launcher"
    assert world_size == ranks


def test_the_log_of_a_local_sweep_says_now_and_then_how_far_its_cells_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch_local, "visible_gpus", list)
    cell, *_ = load_sweep(Path("paper")).cells
    write_run(cell.folder, until=30)
    launcher = _Launcher([cell], 1, 1, 0, Console(soft_wrap=True))
    launcher.runs[0].state = "running"
    launcher.tell()
    assert capsys.readouterr().out == "", "not at once"
    monkeypatch.setattr(launch_local, "NEXT_SIGN", 0)
    launcher.tell()
    said = capsys.readouterr().out
    assert said.startswith("[0/1] 213m_nh1: step 30/")
    assert ", loss " in said
