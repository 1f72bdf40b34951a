"""Accumulation and steps from batch sizes, ranks and tokens."""

from __future__ import annotations

import pytest

from titan_dp import config
from titan_dp.errors import UserError
from titan_dp.train.batch_plan import BatchPlan, plan_batches, plan_rest


def plan(world_size: int, **settings: object) -> BatchPlan:
    return plan_batches(config.Training(**settings), world_size)  # type: ignore[arg-type]


def test_accumulation_fills_the_global_batch_from_what_the_ranks_do_not() -> None:
    batch = plan(4, local_batch_size=2, global_batch_size=32, seq_len=10, steps=7)
    assert (batch.accumulation, batch.tokens_per_step, batch.tokens) == (4, 320, 2240)
    shared = plan(4, local_batch_size=-1, global_batch_size=32, seq_len=10, steps=7)
    assert (shared.local_batch_size, shared.accumulation, shared.tokens_per_step) == (8, 1, 320)
    assert plan(4, local_batch_size=2, steps=1).global_batch_size == 8, "without one there is no accumulation"
    assert plan(1, local_batch_size=1, seq_len=1000, tokens=1001).steps == 2, "tokens become whole steps"


@pytest.mark.parametrize("total", [31, 4])
def test_a_batch_that_does_not_divide_names_both_keys_and_sizes_that_would(total: int) -> None:
    with pytest.raises(UserError, match=r"training.global_batch_size = \d+ .* training.local_batch_size = 2 times 4 rank"):
        plan(4, local_batch_size=2, global_batch_size=total, steps=1)


def test_a_share_of_the_global_batch_must_be_whole() -> None:
    with pytest.raises(UserError, match="training.global_batch_size = 32 is not a multiple of the 3 ranks; 30 or 33 would be$"):
        plan(3, local_batch_size=-1, global_batch_size=32, steps=1)


# -- a run that is resumed ---------------------------------------------------------------------------------------------


def rest(step: int, seen: int, last_step_tokens: int = 40, **settings: object) -> BatchPlan:
    """Of a run of 80 tokens per step."""
    training = config.Training(**{"local_batch_size": 8, "seq_len": 10, **settings})  # type: ignore[arg-type]
    return plan_rest(plan_batches(training, 1), training, step, seen, last_step_tokens)


@pytest.mark.parametrize(("seen", "steps"), [(320, 8 + 6), (319, 8 + 7), (839, 8)])
def test_a_run_over_tokens_ends_when_it_has_seen_them_whatever_size_its_steps_had(seen: int, steps: int) -> None:
    batch = rest(8, seen, tokens=800)
    assert (batch.steps, batch.tokens) == (steps, seen + (steps - 8) * 80)
    assert rest(8, 8 * 40, steps=16).tokens == 8 * 40 + 8 * 80


@pytest.mark.parametrize(("settings", "done"), [({"steps": 7}, "done 8 steps"), ({"tokens": 240}, "seen 320 tokens")])
def test_less_than_is_done_is_refused_with_both_numbers(settings: dict, done: str) -> None:
    ((key, value),) = settings.items()
    with pytest.raises(UserError, match=rf"training.{key} = {value}, but the run to resume has {done}; .*load_step"):
        rest(8, 320, **settings)


def test_a_run_that_is_done_may_be_started_again() -> None:
    assert rest(8, 320, steps=8).steps == rest(8, 320, tokens=290).steps == 8
