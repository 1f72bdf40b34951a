"""Where the time of a step goes, on every rank: which ranks are slow, and what a run paused for.

A synchronous step takes as long as its slowest rank, and every rank sees that same time. So each rank measures what it does
without the others: waiting for data, and `work`, the sections of a step without a collective (the loss and the optimizer's
update); on a GPU by events that nothing waits for. Log steps gather two numbers per rank. Pauses (validation, checkpoints,
compilation) are counted by name, so that a gap in a run is explained.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

# A rank is reported if its work takes 1.3 times the median, or if it waits for data 10 % of the time longer than the median,
# in two consecutive intervals: one may be chance.
_SLOW_WORK = 1.3
_SLOW_DATA = 0.1
# A step is reported if it takes 3 times the interval's median and at least 1 s longer.
_LONG_STEP = 3.0


class SectionClock:
    """Seconds spent in a section that is entered many times; on a GPU the device's time, for which only `read` waits."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._start: Any = None
        self._pairs: list[tuple[Any, Any]] = []

    def __enter__(self) -> None:
        self._start = self._now()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pairs.append((self._start, self._now()))

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> float:
        """The sum since the last call; the device must have finished."""
        pairs, self._pairs = self._pairs, []
        if self._cuda:
            return sum(start.elapsed_time(end) for start, end in pairs) / 1e3
        return sum(end - start for start, end in pairs)


@dataclass(frozen=True)
class Interval:
    """The steps between two log lines."""

    seconds: float
    """Of training, without pauses."""
    data_wait: float
    """Seconds this rank waited for data."""
    data_wait_slowest: float
    """Of the rank that waited longest."""
    work_slowest: float
    """Longest work of a rank, divided by the median of all ranks."""
    paused: dict[str, float]
    """Seconds by reason: "validation", "checkpoint", "compile", ..."""
    remarks: list[str]
    """Sentences for people: ranks that hold the others up, steps that took long."""


class StepTimes:
    """The clock of a run. Every rank calls every method in the same order.

    Args:
        device: of this rank.
        compiled: book the compiler's time as a pause.
    """

    def __init__(self, device: torch.device, compiled: bool) -> None:
        self.device, self.compiled = device, compiled
        self.work = SectionClock(device)
        """Entered around what this rank does alone."""
        self._hosts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(self._hosts, socket.gethostname())
        own = self._hosts.count(socket.gethostname())
        self._crowded = device.type == "cpu" and own > (os.cpu_count() or 1)
        """Ranks share cores here: which of them is slow is chance."""
        self._suspects: set[int] = set()
        self._compiled_seconds = 0.0
        self.begin()

    def begin(self) -> None:
        """The first interval begins now."""
        self._begin = self._step_begin = time.perf_counter()
        self._data, self._paused, self._steps = 0.0, {}, []  # type: ignore[var-annotated]
        self._paused_in_step = 0.0

    @contextmanager
    def data_wait(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._data += time.perf_counter() - start

    @contextmanager
    def paused(self, what: str) -> Iterator[None]:
        """Not training: left out of tokens per second."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        yield
        self._book(what, time.perf_counter() - start)
        if self.compiled:
            self._compiled_seconds = _compiler_seconds()  # what was compiled meanwhile is in this pause

    def _book(self, what: str, seconds: float) -> None:
        self._paused[what] = self._paused.get(what, 0.0) + seconds
        self._paused_in_step += seconds

    def end_step(self, step: int) -> None:
        """Step `step` has been queued; on a GPU the host is at most one step ahead of the device."""
        if self.compiled and (new := _compiler_seconds() - self._compiled_seconds) > 0:
            self._compiled_seconds += new
            self._book("compile", new)
        now = time.perf_counter()
        self._steps.append((now - self._step_begin - self._paused_in_step, step))
        self._step_begin, self._paused_in_step = now, 0.0

    def end_interval(self) -> Interval:
        """What happened since the last call; waits for the device. One collective of two numbers per rank."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = max(time.perf_counter() - self._begin - sum(self._paused.values()), 1e-9)
        own = torch.tensor([self._data, self.work.read()], device=self.device)
        ranks = [torch.empty_like(own) for _ in self._hosts]
        dist.all_gather(ranks, own)
        data, work = torch.stack(ranks, 1).tolist()
        remarks = self._slow_ranks(data, work, seconds) + self._long_steps()
        usual_work = max(median(work), 1e-9)
        interval = Interval(seconds, self._data, max(data), max(work) / usual_work, self._paused, remarks)
        self.begin()
        return interval

    def _slow_ranks(self, data: list[float], work: list[float], seconds: float) -> list[str]:
        usual_data, usual_work = median(data), max(median(work), 1e-9)
        slow: dict[int, str] = {}
        for rank, (waited, worked) in enumerate(zip(data, work, strict=True)):
            if waited - usual_data > _SLOW_DATA * seconds:
                slow[rank] = f"waits for data {(waited - usual_data) / seconds:.0%} of the time longer than the median"
            elif worked > _SLOW_WORK * usual_work and not self._crowded:
                slow[rank] = f"computes at {usual_work / worked:.0%} of the median's speed"
        again, self._suspects = self._suspects & slow.keys(), set(slow)
        return [f"rank {rank} on {self._hosts[rank]} {slow[rank]}" for rank in sorted(again)]

    def _long_steps(self) -> list[str]:
        usual = median(seconds for seconds, _ in self._steps) if self._steps else 0.0
        long = [(s, step) for s, step in self._steps if s > _LONG_STEP * usual and s > usual + 1]
        return [f"step {step:,} took {s:.1f} s, usual are {usual:.2f} s" for s, step in long]


def _compiler_seconds() -> float:
    """Wall time torch.compile has taken in this process so far."""
    from torch._dynamo.utils import calculate_time_spent

    return calculate_time_spent().get("total_wall_time", 0.0)
