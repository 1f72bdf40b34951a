"""What stands still: a rank that hangs, a rank that is stopped from outside, and a second run that wants the same folder.

All were started with the first of the fault tests; see conftest.py. torch gives a rank that does not answer SIGTERM 30 s.
"""

from __future__ import annotations

import json
from pathlib import Path

from tests.faults.conftest import TRAIN_TIMEOUT, Pair, Still
from tests.faults.runs import STEPS, Life


def lives_of(chain: Still, undisturbed: dict[int, float]) -> list[Life]:
    """The life that stood still and the next, which ended as if there had been none before."""
    lives = chain.started.finish()
    assert len(lives) == 2, lives[-1].text
    assert lives[0].said("fault"), lives[0].text
    assert "error (rank 0): no forward pass began for" in lives[0].text
    assert lives[1].resumed == 5, lives[1].text
    assert lives[1].code == 0, lives[1].text
    assert chain.losses() == undisturbed
    return lives


def files(chain: Still) -> dict[str, str]:
    return {path.name: path.read_text() for path in (chain.run / "hang/from-step-00000000").iterdir()}


def test_a_rank_that_hangs_ends_all_and_the_next_start_resumes(still: dict[str, Still], undisturbed: dict[int, float]) -> None:
    first, second = lives_of(still["sleep"], undisturbed)
    assert "train_timeout_seconds" in first.text
    assert "error (rank 1): no forward pass began for" in first.text
    assert second.clock("first step") - first.clock("fault") >= TRAIN_TIMEOUT
    left = files(still["sleep"])
    assert left.keys() == {"rank-0.txt", "rank-0.json", "rank-1.txt", "rank-1.json"}
    assert "in _train_step" in left["rank-0.txt"]
    assert json.loads(left["rank-0.json"])["entries"]


def test_a_rank_that_is_stopped_from_outside_ends_all_as_well(still: dict[str, Still], undisturbed: dict[int, float]) -> None:
    first, _ = lives_of(still["SIGSTOP"], undisturbed)
    assert "error (rank 1)" not in first.text
    assert files(still["SIGSTOP"]).keys() == {"rank-0.txt", "rank-0.json"}, (
        "the rank without a file is the one that was stopped"
    )
    (pid,) = [fact["pid"] for fact in first.said("fault")]
    assert not Path(f"/proc/{pid}").exists(), "the stopped rank is ended too"


def test_a_second_run_in_one_folder_refuses_and_the_first_is_unharmed(pair: Pair, undisturbed: dict[int, float]) -> None:
    (second,) = pair.second.finish()
    assert second.code == 1, second.text
    assert f"error: another process is at work in {pair.run}" in second.text
    assert "Traceback" not in second.text
    assert pair.first.process.is_alive()
    pair.go.touch()
    (first,) = pair.first.finish()
    assert first.code == 0, first.text
    assert first.last == STEPS
    assert pair.losses() == undisturbed
