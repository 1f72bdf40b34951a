"""What stands still: a rank that hangs, a rank that is stopped from outside, and a second run that wants the same folder.

All were started with the first of the fault tests; see conftest.py. torch gives a rank that does not answer SIGTERM 30 s.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.faults.conftest import TRAIN_TIMEOUT, Hung, Pair
from tests.faults.runs import STEPS, Life


@pytest.fixture(scope="module")
def lives(hung: Hung) -> list[Life]:
    return hung.started.finish()


def test_a_rank_that_hangs_ends_all_and_the_next_start_resumes(lives: list[Life]) -> None:
    assert len(lives) == 3, lives[-1].text
    assert lives[0].said("fault"), lives[0].text
    assert "train_timeout_seconds" in lives[0].text
    assert lives[1].resumed == 5, lives[1].text
    assert lives[1].clock("first step") - lives[0].clock("fault") >= TRAIN_TIMEOUT


def test_it_leaves_the_stacks_of_every_rank_that_could_still_run(hung: Hung, lives: list[Life]) -> None:
    for rank in (0, 1):
        assert f"error (rank {rank}): no forward pass began for" in lives[0].text
    first, second = hung.run / "hang/from-step-00000000", hung.run / "hang/from-step-00000005"
    assert "in _train_step" in (second / "rank-0.txt").read_text()
    assert json.loads((second / "rank-0.json").read_text())["entries"]
    assert {path.name for path in first.iterdir()} == {"rank-0.txt", "rank-0.json", "rank-1.txt", "rank-1.json"}
    assert not (second / "rank-1.txt").exists(), "the rank without a file is the one that was stopped"


def test_a_rank_that_is_stopped_from_outside_ends_all_as_well(lives: list[Life]) -> None:
    assert lives[1].said("fault")
    assert "error (rank 0): no forward pass began for" in lives[1].text
    assert "error (rank 1)" not in lives[1].text
    assert lives[2].resumed == 10, lives[2].text
    (pid,) = [fact["pid"] for fact in lives[1].said("fault")]
    assert not Path(f"/proc/{pid}").exists(), "the stopped rank is ended too"


def test_two_hangs_change_no_loss(hung: Hung, lives: list[Life], undisturbed: dict[int, float]) -> None:
    assert lives[-1].code == 0, lives[-1].text
    assert hung.losses() == undisturbed


def test_a_second_run_in_one_folder_refuses_and_the_first_is_unharmed(pair: Pair, undisturbed: dict[int, float]) -> None:
    (second,) = pair.second.finish()
    assert second.code == 1, second.text
    assert f"error: another process is at work in {pair.run}" in second.text
    assert "Traceback" not in second.text
    assert pair.first.process.poll() is None
    pair.go.touch()
    (first,) = pair.first.finish()
    assert first.code == 0, first.text
    assert first.last == STEPS
    assert pair.losses() == undisturbed
