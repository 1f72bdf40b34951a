"""The learning rate at the points where a schedule can be wrong."""

from __future__ import annotations

import itertools

import pytest

from titan_dp import config
from titan_dp.errors import UserError
from titan_dp.train.lr_scheduler import build_lr_scheduler


def factors(steps: int = 100, **settings: object) -> list[float]:
    factor = build_lr_scheduler(config.LRScheduler(**settings), steps)  # type: ignore[arg-type]
    return [factor(step) for step in range(steps)]


def test_warmup_rises_linearly_from_above_zero_to_the_peak() -> None:
    assert factors(warmup_steps=4)[:4] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize(("shape", "middle"), [("cosine", 0.55), ("linear", 0.55), ("sqrt", 0.1 + 0.9 * (1 - 0.5**0.5))])
def test_each_shape_passes_its_middle_and_ends_at_the_floor(shape: str, middle: float) -> None:
    values = factors(warmup_steps=0, decay_type=shape, min_lr_factor=0.1)
    assert values[49] == pytest.approx(middle)
    assert values[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(values))


def test_decay_ratio_holds_the_peak_until_the_last_part() -> None:
    values = factors(warmup_steps=10, decay_ratio=0.2, decay_type="linear", min_lr_factor=0.0)
    assert values[9:80] == [1.0] * 71
    assert values[80] == pytest.approx(0.95)
    assert values[-1] == 0


@pytest.mark.parametrize("settings", [{"warmup_steps": 0}, {"warmup_steps": 100}, {"warmup_steps": 500}, {"decay_ratio": 1.0}])
def test_extremes_stay_within_zero_and_the_peak(settings: dict) -> None:
    assert all(0 < value <= 1 for value in factors(**settings))


def test_a_schedule_longer_than_the_run_is_cut_off_and_a_shorter_one_stays_at_the_floor() -> None:
    longer = factors(50, warmup_steps=0, total_steps=100)
    assert longer == factors(100, warmup_steps=0)[:50]
    assert factors(100, warmup_steps=0, total_steps=50)[49:] == pytest.approx([0.1] * 51)


def test_a_schedule_may_begin_anew_at_a_later_step() -> None:
    """Warmup and decay are then those of a run of what is left."""
    values = factors(100, start_step=60, warmup_steps=5)
    assert values[60:] == factors(40, warmup_steps=5)


def test_a_schedule_that_ends_before_it_begins_is_refused() -> None:
    with pytest.raises(UserError, match=r"lr_scheduler.start_step = 12 is not before the end of the schedule, step 12"):
        factors(12, start_step=12)
