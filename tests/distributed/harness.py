"""Multi-process tests that read like unit tests: `run_ranks(4, function, *arguments)`.

`function` runs in as many processes with gloo as there are ranks, as under torchrun, and its results come back in rank
order; the first exception of any rank is raised here, with that rank's traceback. Starting Python and importing torch costs
seconds, so ranks are forked from one process that has imported them (tests/processes.py), kept in a pool for the whole session,
and only the process group is made anew for each call. What a function sets in modules of titan_dp is set back after it.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from tests.processes import SERVER

TIMEOUT_SECONDS = 600
"""Only a hang takes that long, however busy the machine is."""

_workers: list[tuple[BaseProcess, Connection]] = []


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Results of `function(*arguments)` on every rank. Function and arguments must be picklable."""
    while len(_workers) < world_size:
        _workers.append(_start_worker())
    with tempfile.NamedTemporaryFile() as rendezvous:
        os.unlink(rendezvous.name)
        for rank, (_, pipe) in enumerate(_workers[:world_size]):
            pipe.send((rank, world_size, rendezvous.name, function, arguments))
        outcomes = _collect(world_size)
        open(rendezvous.name, "a").close()  # for the context manager to delete
    failures = [f"rank {rank}:\n{text}" for rank, (ok, text) in enumerate(outcomes) if not ok]
    if failures:
        # The rank that failed first says why; the others only lost their connection to it.
        causes = [text for text in failures if "Connection closed by peer" not in text]
        raise AssertionError((causes or failures)[0])
    return [result for _, result in outcomes]


def _collect(world_size: int) -> list[tuple[bool, Any]]:
    outcomes: list[tuple[bool, Any]] = []
    deadline = time.monotonic() + TIMEOUT_SECONDS
    failed = False
    for process, pipe in _workers[:world_size]:
        # Once a rank has failed, the others may wait for it in a collective: give them a moment only.
        if pipe.poll(3 if failed else max(0.0, deadline - time.monotonic())) and process.is_alive():
            outcomes.append(pipe.recv())
        else:
            outcomes.append((False, f"no answer within {TIMEOUT_SECONDS} s (Connection closed by peer elsewhere)"))
        failed |= not outcomes[-1][0]
    if failed:
        _stop_workers()
    return outcomes


def _start_worker() -> tuple[BaseProcess, Connection]:
    ours, theirs = SERVER.Pipe()
    process = SERVER.Process(target=_work, args=(theirs,), daemon=True)
    process.start()
    return process, ours


@atexit.register
def _stop_workers() -> None:
    for process, _ in _workers:
        process.kill()
        process.join()
    _workers.clear()


def _release_groups() -> None:
    """Let go of what holds process groups that were destroyed: every one has three threads that wake a hundred times a second.

    Models are in cycles. torch's caches for DTensors keep the meshes of all models there ever were, and those their groups.
    """
    from torch.distributed.device_mesh import DeviceMesh

    gc.collect()
    for mesh in (each for each in gc.get_objects() if isinstance(each, DeviceMesh)):
        getattr(mesh, "_pg_registry", {}).clear()  # torch 2.13


def _work(pipe: Connection) -> None:
    """A worker's life: a process group and a call for every message."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    gc.freeze()  # what was imported: a collection then takes milliseconds
    while True:
        rank, world_size, rendezvous, function, arguments = pipe.recv()
        settings = [(module, dict(vars(module))) for name, module in sys.modules.items() if name.startswith("titan_dp.")]
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
        try:
            dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
            outcome = True, function(*arguments)
            dist.barrier()
        except BaseException:
            outcome = False, traceback.format_exc()
        for module, names in settings:
            vars(module).update(names)
        if dist.is_initialized():
            dist.destroy_process_group()
        _release_groups()
        pipe.send(outcome)
