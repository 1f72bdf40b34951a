"""Batches whose loss is not a number on one rank: one of them, and all of them from some step on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.runs import STEPS, Chain, Life
from titan_dp.checkpoint.manifest import committed_steps, read_manifest, step_folder

BAD = 14


def fault(*steps: int) -> dict[str, object]:
    return {"place": "step", "step": list(steps), "ranks": [1], "deed": "not a number"}


@pytest.fixture(scope="module")
def chain(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return Chain(shards, tmp_path_factory.mktemp("nan"), "nan")


@pytest.fixture(scope="module")
def stopped(chain: Chain) -> Life:
    return chain.live_without_launcher(fault(*range(BAD, STEPS + 1)))


def test_one_bad_batch_is_skipped_and_the_loss_goes_on(shards: Path, tmp_path: Path, undisturbed: dict[int, float]) -> None:
    chain = Chain(shards, tmp_path, "once")
    options = ("--training.steps", "25", "--lr_scheduler.total_steps", str(STEPS))
    life = chain.live_without_launcher(fault(BAD), options=options)
    assert life.code == 0, life.text
    losses = chain.losses()
    assert losses.pop(BAD) is None, "JSON has no NaN"
    assert {step: losses[step] for step in range(1, BAD)} == {step: undisturbed[step] for step in range(1, BAD)}
    assert all(losses[step] == pytest.approx(undisturbed[step], abs=0.3) for step in range(BAD + 1, 26))
    assert [record["skipped_steps"] for record in chain.records()] == [0] * (BAD - 1) + [1] * (26 - BAD)


def test_bad_batches_from_some_step_on_stop_the_run(chain: Chain, stopped: Life) -> None:
    assert stopped.code == 1, stopped.text
    assert stopped.last == BAD + 1, "max_nonfinite_steps = 3: the third is not logged"
    assert "the gradient was not finite for 3 steps in a row" in stopped.text
    assert "Traceback" not in stopped.text


def test_the_newest_healthy_checkpoint_is_there_and_resumes_to_the_same_end(
    chain: Chain, stopped: Life, undisturbed: dict[int, float]
) -> None:
    healthy = {
        step: read_manifest(step_folder(chain.checkpoints, step))["healthy"] for step in committed_steps(chain.checkpoints)
    }
    assert healthy == {5: True, 10: True, 15: False}
    assert "the training loss of step 15 is nan" in read_manifest(step_folder(chain.checkpoints, 15))["unhealthy"]
    life = chain.live_without_launcher()
    assert life.code == 0, life.text
    assert life.resumed == 10
    assert chain.losses() == undisturbed
