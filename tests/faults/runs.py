"""Runs that come to grief: two ranks under titan_dp.launch.torchrun, as users start them, read from what they leave.

A `Chain` is one run folder started again and again; each start is a `Life`, or several where torchrun restarts the ranks. A
test of one kind of fault looks at the life that suffered it and at the next, which resumed; losses are compared at the end.
Nothing here asserts, so that a kind that fails hides no other.
"""

from __future__ import annotations

import json
import re
import sys
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.conftest import ROOT, write_tiny_config
from tests.processes import LAUNCHER, run_script_in_ranks, start_command, start_launcher

Fault = dict[str, Any]

STEPS, INTERVAL = 60, 5
OPTIONS = [
    *("--training.steps", str(STEPS), "--training.global_batch_size", "4", "--training.max_nonfinite_steps", "3"),
    *("--checkpoint.interval", str(INTERVAL), "--checkpoint.keep_latest_k", "4"),
    *("--validation.enable=false", "--generate.enable=false"),
]


@dataclass
class Life:
    """One start of the ranks, and how it ended. Read when asked for: ranks may outlive their launcher, and still write."""

    log: Path
    number: int = 0
    """Restarts by torchrun before it."""
    code: int | None = None
    """Exit code of the command; None where torchrun went on with the next life, or the command had to be killed."""

    @property
    def text(self) -> str:
        """stdout and stderr of all ranks and of the launcher during this life."""
        return re.split(r'^\{"what": "life", .*"rank": 0,.*$', self.log.read_text(), flags=re.MULTILINE)[self.number + 1]

    def said(self, what: str) -> list[Fault]:
        """What the ranks of train_with_fault.py said: "life", "first step" or "fault"."""
        lines = (line for line in self.log.read_text().splitlines() if line.startswith('{"what": '))
        return [fact for fact in map(json.loads, lines) if fact["life"] == self.number and fact["what"] == what]

    def clock(self, what: str) -> float:
        """Seconds of the monotonic clock when it was first said."""
        return min((fact["clock"] for fact in self.said(what)), default=float("nan"))

    @property
    def resumed(self) -> int:
        """The step it took up; 0 for a fresh start, -1 where it did not get so far."""
        match = re.search(r"^resumed at step (\d+)", self.text, re.MULTILINE)
        return int(match[1]) if match else (0 if self.last else -1)

    @property
    def last(self) -> int:
        """The last step it logged; 0 where there was none."""
        return max((int(step) for step in re.findall(r"^step +(\d+)/", self.text, re.MULTILINE)), default=0)


class Chain:
    """A run folder and its lives so far; `name` is the run's."""

    def __init__(self, shards: Path, folder: Path, name: str) -> None:
        self.folder, self.run, self.starts = folder, folder / "outputs" / name, 0
        self.run.parent.mkdir(parents=True, exist_ok=True)
        self.settings = ["--config", str(write_tiny_config(folder / "tiny.toml", shards)), "--job.run_name", name, *OPTIONS]

    def start(
        self, plan: list[Fault], *options: str, torchrun: tuple[str, ...] = (), prefix: tuple[str, ...] | None = None
    ) -> Started:
        """Start two ranks under the launcher; `plan` has a fault for each life.

        All are forked; with a `prefix`, which may be (), launcher and ranks are started by this command, as users start them.
        """
        arguments = ["--standalone", "--nproc-per-node=2", *torchrun]
        arguments += [str(ROOT / "tests/faults/train_with_fault.py"), *self.settings, *options]
        log, env = self._new_log(), {"FAULTS": json.dumps(plan)}
        if prefix is None:
            return Started(start_launcher(*arguments, log=log, env=env), log)
        return Started(start_command(*prefix, sys.executable, "-m", LAUNCHER, *arguments, log=log, env=env), log)

    def live_without_launcher(self, *plan: Fault, options: tuple[str, ...] = ()) -> Life:
        """One life of two forked ranks, for what launcher and starting have no part in; its code is the highest."""
        log = self._new_log()
        script, env = ROOT / "tests/faults/train_with_fault.py", {"FAULTS": json.dumps(plan)}
        codes = run_script_in_ranks(2, script, *self.settings, *options, log=log, env=env)
        return Life(log, code=max(codes))

    def _new_log(self) -> Path:
        self.starts += 1
        log = self.folder / f"{self.run.name}-{self.starts}.log"
        log.touch()
        return log

    @property
    def checkpoints(self) -> Path:
        return self.run / "checkpoint"

    def records(self) -> list[dict[str, Any]]:
        """metrics.jsonl, one record per step."""
        return [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]

    def losses(self) -> dict[int, float]:
        return {record["step"]: record["loss"] for record in self.records()}


@dataclass
class Started:
    """A command that runs."""

    process: BaseProcess
    log: Path

    def finish(self, timeout: float = 1200) -> list[Life]:
        """Wait for the command, not for ranks that it may leave behind; past `timeout` seconds it is killed."""
        self.process.join(timeout)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
            self.process.join()
        lives = [Life(self.log, i) for i in range(self.log.read_text().count('{"what": "life", "rank": 0,') or 1)]
        lives[-1].code = code
        return lives

    def wait_for(self, text: str, timeout: float = 600) -> None:
        """Return when the log holds `text`, the command has ended, or `timeout` seconds are over."""
        deadline = time.monotonic() + timeout
        while text not in self.log.read_text() and self.process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.02)
