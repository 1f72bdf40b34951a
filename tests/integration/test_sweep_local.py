"""A sweep on this machine as a user runs it: interrupted, or killed, and always finished by starting it again.

What the launcher does with cells that fail is tested in tests/unit/test_launch_local.py.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.test_user_journey import ENV, kill_all, losses

STEPS = 100  # many enough that a signal sent at step 20 comes before the end


@pytest.fixture
def sweep_file(tiny_config: Path) -> Iterator[Path]:
    """Two cells of 100 steps with a checkpoint every 20, from the smallest config there is."""
    path = tiny_config.parent / "pair.toml"
    path.write_text(
        f"""
extends = "tiny.toml"
[sweep.axes]
num_householder = [1, 2]
[training]
steps = {STEPS}
[checkpoint]
interval = 20
[validation]
enable = false
[generate]
enable = false
"""
    )
    yield path
    for cell in ("nh1", "nh2"):
        kill_all(str(folder(path) / cell / "config.toml"))


def folder(sweep_file: Path) -> Path:
    return sweep_file.parent / "outputs/pair"


def command(sweep_file: Path, *options: str) -> list[str]:
    program = "import sys; from titan_dp.cli import main; sys.exit(main())"
    return [sys.executable, "-c", program, "sweep", str(sweep_file), "--launch", "local", *options]


def start(sweep_file: Path, root: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(sweep_file, *options), env=ENV, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_until(happened: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + 600
    while not happened():
        assert process is None or process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def committed(sweep_file: Path, cell: str) -> bool:
    return (folder(sweep_file) / cell / "checkpoint/step-00000020/manifest.json").exists()


def check_finished(sweep_file: Path, *cells: str) -> None:
    for cell in cells:
        assert json.loads((folder(sweep_file) / cell / "run.json").read_text())["state"] == "finished"
        records = (folder(sweep_file) / cell / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(record)["step"] for record in records] == list(range(1, STEPS + 1))


def test_a_sweep_interrupted_and_started_again_ends_as_if_never_interrupted(sweep_file: Path, root: Path) -> None:
    process = start(sweep_file, root)
    wait_until(lambda: committed(sweep_file, "nh1"), process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 130, output
    assert "interrupted" in output
    interrupted = losses(folder(sweep_file) / "nh1")
    assert max(interrupted) < STEPS

    again = start(sweep_file, root)
    output = again.communicate(timeout=600)[0]
    assert again.returncode == 0, output
    check_finished(sweep_file, "nh1", "nh2")
    assert "resumed at step" in (folder(sweep_file) / "nh1/attempt-2.log").read_text()
    resumed = losses(folder(sweep_file) / "nh1")
    assert {step: resumed[step] for step in interrupted} == interrupted


def test_cells_that_outlive_a_sweep_killed_with_sigkill_are_waited_for_not_started_twice(sweep_file: Path, root: Path) -> None:
    process = start(sweep_file, root, "--at-once", "2")
    configs = [str(folder(sweep_file) / cell / "config.toml") for cell in ("nh1", "nh2")]
    wait_until(lambda: committed(sweep_file, "nh1"), process)
    kill_all(configs[0], signal.SIGSTOP)  # until the second sweep has seen it
    wait_until(lambda: committed(sweep_file, "nh2"), process)
    kill_all(configs[1], signal.SIGSTOP)
    process.kill()
    process.wait()
    with (sweep_file.parent / "again.log").open("w+") as log:
        again = subprocess.Popen(command(sweep_file, "--at-once", "2"), env=ENV, cwd=root, stdout=log, stderr=log)
        said = Path(log.name).read_text
        wait_until(lambda: said().count("running in another process") == 2 or again.poll() is not None)
        for config in configs:
            kill_all(config, signal.SIGCONT)
        assert again.wait(timeout=600) == 0, said()
        assert said().count("running in another process") == 2
    check_finished(sweep_file, "nh1", "nh2")
    for cell in ("nh1", "nh2"):
        assert "resumed" not in (folder(sweep_file) / cell / "attempt-1.log").read_text()
