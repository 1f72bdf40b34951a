"""What the fault tests share: the losses of a run that nothing disturbed, on the same two ranks, and runs that stand still.

Those that stand still are started by the first module and looked at by the last: most of their time is waiting.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.runs import STEPS, Chain, Started

TRAIN_TIMEOUT = 20
"""Seconds: a step takes a hundredth of one, and a busy machine must not make one look like a hang."""
HANGS = [
    {"place": "step", "step": 8, "ranks": [1], "after": 5, "deed": "sleep"},
    {"place": "step", "step": 13, "ranks": [1], "after": 10, "deed": "SIGSTOP"},
]


@pytest.fixture(scope="session")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses by step."""
    chain = Chain(shards, tmp_path_factory.mktemp("undisturbed"), "undisturbed")
    life = chain.live_without_launcher()
    assert life.code == 0, life.text
    losses = chain.losses()
    assert list(losses) == list(range(1, STEPS + 1))
    assert losses[STEPS] < losses[1] - 0.5, "the run must have learnt something for a comparison to mean it"
    return losses


class Hung(Chain):
    """One command under --max-restarts: a rank sleeps, in the next life one is stopped by a signal, the third is left alone."""

    def __init__(self, shards: Path, folder: Path) -> None:
        super().__init__(shards, folder, "hung")
        timeout = ("--comm.train_timeout_seconds", str(TRAIN_TIMEOUT))
        self.started = self.start(HANGS, *timeout, torchrun=("--max-restarts=2", "--monitor-interval=0.1"))


class Pair(Chain):
    """A run that waits in step 3 for a file, and another that was started in its folder meanwhile."""

    def __init__(self, shards: Path, folder: Path) -> None:
        super().__init__(shards, folder, "pair")
        self.go = folder / "go"
        fault = {"place": "step", "step": 3, "ranks": [0], "deed": "wait", "file": str(self.go)}
        patient = ("--comm.train_timeout_seconds", "3600", "--comm.init_timeout_seconds", "3600")  # gloo's is the second
        self.first = self.start([fault], *patient)
        self.first.wait_for('"what": "fault"')
        self.second: Started = self.start([], ranks=1)


@pytest.fixture(scope="session")
def hung(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hung]:
    hung = Hung(shards, tmp_path_factory.mktemp("hung"))
    yield hung
    hung.started.process.kill()  # nothing where it has ended; its ranks follow


@pytest.fixture(scope="session")
def pair(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = Pair(shards, tmp_path_factory.mktemp("pair"))
    yield pair
    pair.go.touch()
