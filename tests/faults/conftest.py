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


class Still(Chain):
    """One command whose rank 1 stands still in step 8, by `deed`; the launcher starts the ranks once more."""

    def __init__(self, shards: Path, folder: Path, deed: str) -> None:
        super().__init__(shards, folder, deed)
        fault = {"place": "step", "step": 8, "ranks": [1], "after": 5, "deed": deed}
        self.started = self.start([fault], "--comm.train_timeout_seconds", str(TRAIN_TIMEOUT), torchrun=("--max-restarts=1",))


class Pair(Chain):
    """A run that waits in step 3 for a file, and another that was started in its folder meanwhile."""

    def __init__(self, shards: Path, folder: Path) -> None:
        super().__init__(shards, folder, "pair")
        self.go = folder / "go"
        fault = {"place": "step", "step": 3, "ranks": [0], "deed": "wait", "file": str(self.go)}
        patient = ("--comm.train_timeout_seconds", "3600", "--comm.init_timeout_seconds", "3600")  # gloo's is the second
        self.first = self.start([fault], *patient)
        self.first.wait_for('"what": "fault"')
        self.second: Started = self.start([])


@pytest.fixture(scope="session")
def still(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Still]]:
    """By what made a rank stand still."""
    still = {deed: Still(shards, tmp_path_factory.mktemp(deed), deed) for deed in ("sleep", "SIGSTOP")}
    yield still
    for chain in still.values():
        chain.started.process.kill()  # nothing where it has ended; its ranks follow


@pytest.fixture(scope="session")
def pair(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = Pair(shards, tmp_path_factory.mktemp("pair"))
    yield pair
    pair.go.touch()
