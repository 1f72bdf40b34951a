"""Step-time health: the slow rank is named, pauses are booked, long steps are pointed out; on real processes, by a clock that
only the test moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed.harness import run_ranks
from titan_dp.faults import step_times as health
from titan_dp.faults.step_times import Interval, StepTimes


class Clock:
    """Stands for the module `time` in titan_dp.faults.step_times."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def barrier(self) -> None:
        """All ranks go on at the time of the last one, as after a step's collectives."""
        times: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(times, self.now)
        self.now = max(times)


def _intervals(slow_data: int | None, slow_work: int | None, cores: int = 4) -> list[Interval]:
    """Three intervals of two steps on this rank; the ranks named wait for data, or work, ten times as long."""
    rank = dist.get_rank()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(health, "time", clock := Clock())
        patch.setattr(health.os, "cpu_count", lambda: cores)
        times, intervals = StepTimes(torch.device("cpu"), compiled=False), []
        for number in range(3):
            for step in range(2):
                with times.data_wait():
                    clock.sleep(0.05 if rank == slow_data else 0.005)
                with times.work:
                    clock.sleep(0.05 if rank == slow_work else 0.005)
                clock.barrier()
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
            assert later.data_wait_slowest == pytest.approx(0.1)


def test_a_rank_that_computes_slowly_is_named() -> None:
    for *_, last in run_ranks(4, _intervals, None, 1):
        (remark,) = last.remarks
        assert remark.startswith("rank 1 on ")
        assert "computes at 10% of the median's speed" in remark
        assert last.work_slowest == pytest.approx(10)


def test_ranks_that_share_cores_are_not_blamed_for_it() -> None:
    for intervals in run_ranks(4, _intervals, None, 1, 3):
        assert [remark for interval in intervals for remark in interval.remarks] == []


def test_equal_ranks_are_not_blamed() -> None:
    for intervals in run_ranks(4, _intervals, None, None):
        assert [remark for interval in intervals for remark in interval.remarks] == []


def _paused() -> Interval:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(health, "time", clock := Clock())
        times = StepTimes(torch.device("cpu"), compiled=False)
        for step in range(1, 6):
            clock.sleep(1.3 if step == 4 else 0.01)
            times.end_step(step)
            if step == 2:
                with times.paused("checkpoint"):
                    clock.sleep(1.5)
        return times.end_interval()


def test_a_pause_is_booked_by_its_name_and_a_long_step_is_pointed_out() -> None:
    (interval,) = run_ranks(1, _paused)
    assert interval.paused == {"checkpoint": pytest.approx(1.5)}
    assert interval.seconds == pytest.approx(1.34)
    assert interval.remarks == ["step 4 took 1.3 s, usual are 0.01 s"]
