"""The most that torch's CPU allocator holds while a step runs over gloo, the same number however the threads are scheduled.

torch's profiler sees what its own thread allocates and frees. gloo works in threads of its own: it copies the input of a
reduce-scatter, in our thread, and where one of its threads is the last to let go of a tensor the profiler never learns that
it is freed, so the sum of all changes comes out too high, by chance. So while we measure, every collective is called from
another thread, which leaves gloo's copies out, and returns only when nobody but us holds its arguments.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeWork

_COLLECTIVES = (
    "allreduce", "_allgather_base", "_reduce_scatter_base", "alltoall_base",
    "all_gather_single", "reduce_scatter_single", "all_to_all_single",  # what torch 2.13 calls the last three
)  # fmt: skip


def most_held(step: Callable[[], object], trace: Path) -> int:
    """Bytes at the peak of `step`, over what was held when it began; `trace` is a file to write."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with collectives_elsewhere(), torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        step()
    profiler.export_chrome_trace(str(trace))
    events = [e["args"] for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    return max(itertools.accumulate(e["Bytes"] for e in sorted(events, key=lambda e: e["Ev Idx"])))


@contextmanager
def collectives_elsewhere() -> Iterator[None]:
    """Within it, collectives are called from another thread, one after another, and are over when they return."""
    originals = {name: vars(dist.ProcessGroup)[name] for name in _COLLECTIVES if hasattr(dist.ProcessGroup, name)}
    with ThreadPoolExecutor(1) as other_thread:
        for name in originals:
            setattr(dist.ProcessGroup, name, _called_from(other_thread, getattr(dist.ProcessGroup, name)))
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(dist.ProcessGroup, name, original)


def _called_from(thread: Executor, collective: Callable[..., Any]) -> Callable[..., Any]:
    def call(group: dist.ProcessGroup, *args: Any) -> Any:
        tensors = [x for arg in args for x in (arg if isinstance(arg, list) else [arg]) if isinstance(x, torch.Tensor)]
        before = [x._use_count() for x in tensors]  # type: ignore[attr-defined]
        thread.submit(lambda: collective(group, *args).wait()).result()
        while any(x._use_count() > n for x, n in zip(tensors, before, strict=True)):  # type: ignore[attr-defined]
            time.sleep(0)
        return FakeWork()

    return call
