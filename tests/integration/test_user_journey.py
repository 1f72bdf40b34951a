"""Train, validate, list, verify, generate: from the shell, as a user would; and what other tests of processes share."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

from tests.processes import run_script, run_script_in_ranks

ENV = os.environ | {"OMP_NUM_THREADS": "1"}


def losses(run: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r["loss"] for r in records if "loss" in r}


def kill_all(argument: str, number: signal.Signals = signal.SIGKILL) -> None:
    """Signal every process whose command line has `argument`: torchrun gives its workers sessions of their own."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if argument in (folder / "cmdline").read_text().split("\0"):
                os.kill(int(folder.name), number)
        except (FileNotFoundError, ProcessLookupError):
            continue


def test_a_run_of_two_ranks_is_listed_verified_and_generates(tiny_config: Path, tmp_path: Path, root: Path) -> None:
    """Resuming after every kind of kill is tests/faults."""
    settings = ["--config", str(tiny_config), "--training.steps", "10", "--checkpoint.interval", "5"]
    log = tmp_path / "log"
    assert run_script_in_ranks(2, root / "train.py", *settings, log=log) == [0, 0], log.read_text()
    final = re.search(r"final validation loss +([0-9.]+) nats per token", log.read_text())
    assert final is not None
    assert 0 < float(final[1]) < 6
    run = tmp_path / "outputs/tiny"
    assert "10" in titan_dp("checkpoint", "list", run)
    titan_dp("checkpoint", "verify", run)
    assert titan_dp("generate", run, "--prompt", "Story", "--max-new-tokens", "5").startswith("Story")


def titan_dp(*arguments: str | Path) -> str:
    """What the command prints; it must succeed."""
    done = run_script("titan_dp.cli", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout
