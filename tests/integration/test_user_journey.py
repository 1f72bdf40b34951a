"""Train, kill -9, resume, validate, list, generate: from the shell, as a user would."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.processes import run_script, run_script_in_ranks

ENV = os.environ | {"OMP_NUM_THREADS": "1"}


def torchrun(root: Path, nproc: int, *arguments: str) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    return [*command, str(root / "train.py"), *arguments]


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


def test_a_run_killed_with_sigkill_resumes_and_ends_as_if_never_killed(tiny_config: Path, tmp_path: Path, root: Path) -> None:
    arguments = ["--config", str(tiny_config), "--training.steps", "60", "--checkpoint.interval", "5"]
    undisturbed = [*arguments, "--job.run_name", "undisturbed"]
    assert run_script_in_ranks(2, root / "train.py", *undisturbed, log=tmp_path / "undisturbed.log") == [0, 0]

    with (tmp_path / "killed.log").open("w") as log:
        process = subprocess.Popen(torchrun(root, 2, *arguments), env=ENV, stdout=log, stderr=subprocess.STDOUT)
        marker = tmp_path / "outputs/tiny/checkpoint/step-00000010/manifest.json"
        deadline = time.monotonic() + 600
        while not marker.exists():
            assert process.poll() is None, (tmp_path / "killed.log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "killed.log").read_text()
            time.sleep(0.02)
        kill_all(str(tiny_config))
        process.wait()
    assert max(losses(tmp_path / "outputs/tiny")) < 60

    resumed = subprocess.run(torchrun(root, 2, *arguments), env=ENV, capture_output=True, text=True, timeout=600)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    step = re.search(r"resumed at step (\d+)", resumed.stdout)
    assert step is not None
    assert 10 <= int(step[1]) < 60
    assert losses(tmp_path / "outputs/tiny") == losses(tmp_path / "outputs/undisturbed")

    final = re.search(r"final validation loss +([0-9.]+)", resumed.stdout)
    assert final is not None
    assert 0 < float(final[1]) < 6

    run = tmp_path / "outputs/tiny"
    assert "60" in titan_dp("checkpoint", "list", run)
    titan_dp("checkpoint", "verify", run)
    assert titan_dp("generate", run, "--prompt", "Story", "--max-new-tokens", "5").startswith("Story")


def titan_dp(*arguments: str | Path) -> str:
    """What the command prints; it must succeed."""
    done = run_script("titan_dp.cli", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout
