"""How a model computes on a CPU: in how many threads, and whether with the kernels in C."""

from __future__ import annotations

import os

import torch
from deltaproduct_kernels import native

from titan_dp.errors import RUNS_AT_ONCE

NARROW = 512
"""Models of a smaller hidden size compute in one thread: their operations end before a second thread is awake."""
_OWN_THREADS = torch.get_num_threads()
"""What torch would use by itself: the machine's cores, or OMP_NUM_THREADS."""


def use_threads(hidden_size: int) -> None:
    """Compute in as many threads as a model of this width gains from: its share of the cores, or one if it is narrow.

    OMP_NUM_THREADS is respected. Threads that wait for work spin: several processes with several threads each, on cores that
    others use too, are many times slower than with one.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        cores = min(_OWN_THREADS, len(os.sched_getaffinity(0)))
        sharers = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) * int(os.environ.get(RUNS_AT_ONCE, "1"))
        torch.set_num_threads(max(1, cores // sharers) if hidden_size >= NARROW else 1)


def kernels_in_words(backend: str, device: torch.device) -> str:
    """What the head of a run says of the kernels in C, after the name of the recurrence's backend; "" where none could serve.

    Asking compiles them if nobody has yet.
    """
    if device.type != "cpu" or backend != "torch":
        return ""
    if native.available(device, torch.float32):
        return ", kernels in C"
    return ", without its kernels in C, which need gcc or clang: several times slower"
