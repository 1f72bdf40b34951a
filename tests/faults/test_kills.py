"""kill -9 at named moments of training, saving, committing and retention: `--max-restarts` of the launcher goes on by itself.

One command lives through all of them, each life ended by the fault of its row; what its successor resumed from is asserted for
each, and that the run as a whole, which ends with exit code 0, has the losses of one that nothing disturbed.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from tests.faults.runs import INTERVAL, STEPS, Chain, Fault, Life
from titan_dp.checkpoint.manifest import all_steps, committed_steps, step_folder, verify

pytestmark = pytest.mark.usefixtures("still", "pair")  # they wait meanwhile

KILL = {"deed": "SIGKILL"}
# What dies and when, and the step the next life resumes at. keep_latest_k = 4: the commit of 30 retires 10.
ROWS: list[tuple[str, Fault, int]] = [
    ("one rank before anything was saved", {"place": "step", "step": 3, "ranks": [1]}, 0),
    ("one rank during a step", {"place": "step", "step": 8, "ranks": [1], "after": 5}, 5),
    ("all ranks during a step", {"place": "step", "step": 13, "ranks": [0, 1], "after": 10}, 10),
    ("one rank during an async save", {"place": "writing", "step": 15, "ranks": [1]}, 10),
    ("before the manifest is written", {"place": "before manifest", "step": 15, "ranks": [0]}, 10),
    ("before the manifest is renamed", {"place": "before rename", "step": 15, "ranks": [0]}, 10),
    ("in retention, a manifest removed", {"place": "manifest removed", "step": 25, "ranks": [0]}, 25),
    ("in retention, files half removed", {"place": "half removed", "step": 30, "ranks": [0]}, 30),
]


@pytest.fixture(scope="module")
def chain(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return Chain(shards, tmp_path_factory.mktemp("kills"), "killed")


@pytest.fixture(scope="module")
def lives(chain: Chain) -> list[Life]:
    plan = [fault | KILL for _, fault, _ in ROWS]
    return chain.start(plan, torchrun=(f"--max-restarts={len(ROWS)}",)).finish()


@pytest.mark.parametrize("number", range(len(ROWS)), ids=[name for name, _, _ in ROWS])
def test_a_kill_loses_no_more_than_the_steps_since_the_last_save(lives: list[Life], number: int) -> None:
    _, fault, resumed = ROWS[number]
    assert number + 1 < len(lives), lives[-1].text
    killed, successor = lives[number], lives[number + 1]
    assert {fact["rank"] for fact in killed.said("fault")} == set(fault["ranks"]), killed.text
    assert successor.resumed == resumed, successor.text
    assert killed.last - successor.resumed <= 2 * INTERVAL  # a save in flight is none yet


def test_the_launcher_restarts_the_ranks_until_the_run_is_done(lives: list[Life]) -> None:
    assert len(lives) == len(ROWS) + 1
    assert lives[-1].code == 0, lives[-1].text
    assert lives[-1].last == STEPS


def test_all_the_kills_change_no_loss(chain: Chain, lives: list[Life], undisturbed: dict[int, float]) -> None:
    assert chain.losses() == undisturbed
    assert len(chain.records()) == STEPS, "each step stands there once"


def test_what_is_left_is_whole_and_nothing_is_left_over(chain: Chain, lives: list[Life]) -> None:
    folder = chain.checkpoints
    assert committed_steps(folder) == all_steps(folder) == [45, 50, 55, 60]
    assert all(verify(step_folder(folder, step)) == [] for step in committed_steps(folder))
    assert not list(chain.run.rglob("*.tmp"))


def test_after_every_kill_training_goes_on(lives: list[Life]) -> None:
    for before, after in pairwise(lives):  # how soon is measured by benchmarks/soak.py
        assert after.clock("first step") > before.clock("fault")
