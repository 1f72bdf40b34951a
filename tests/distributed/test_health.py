"""Step-time health: the slow rank is named, pauses are booked, long steps are pointed out; on real processes."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

from tests.distributed.harness import run_ranks
from titan_dp.health import Interval, StepTimes


def _intervals(slow_data: int | None, slow_work: int | None) -> list[Interval]:
    """Three intervals of two steps on this rank; the ranks named wait for data, or work, ten times as long."""
    times, rank = StepTimes(torch.device("cpu"), compiled=False), dist.get_rank()
    intervals = []
    for number in range(3):
        for step in range(2):
            with times.data_wait():
                time.sleep(0.05 if rank == slow_data else 0.005)
            with times.work:
                time.sleep(0.05 if rank == slow_work else 0.005)
            dist.barrier()  # as a step's collectives would
            times.end_step(2 * number + step + 1)
        intervals.append(times.end_interval())
    return intervals


def test_a_rank_that_waits_for_data_is_named_once_it_is_no_chance() -> None:
    for first, second, third in run_ranks(4, _intervals, 2, None):
        assert first.remarks == []
        for later in (second, third):
            (remark,) = later.remarks
            assert remark.startswith("rank 2 on ")
            assert "waits for data" in remark
            assert later.data_wait_slowest > 0.09


def test_a_rank_that_computes_slowly_is_named() -> None:
    for *_, last in run_ranks(4, _intervals, None, 1):
        (remark,) = last.remarks
        assert remark.startswith("rank 1 on ")
        assert "of the median's speed" in remark
        assert last.work_slowest > 3


def test_equal_ranks_are_not_blamed() -> None:
    for intervals in run_ranks(4, _intervals, None, None):
        assert [remark for interval in intervals for remark in interval.remarks if "data" in remark] == []


def _paused() -> Any:
    times = StepTimes(torch.device("cpu"), compiled=False)
    for step in range(1, 6):
        time.sleep(1.3 if step == 4 else 0.01)
        times.end_step(step)
        if step == 2:
            with times.paused("checkpoint"):
                time.sleep(1.5)
    return times.end_interval()


def test_a_pause_is_booked_by_its_name_and_a_long_step_is_pointed_out() -> None:
    (interval,) = run_ranks(1, _paused)
    assert 1.4 < interval.paused["checkpoint"] < 3
    (remark,) = interval.remarks
    assert remark.startswith("step 4 took 1.")
