"""Reading in worker processes: items arrive in order, an error arrives as itself, and no worker outlives the rank."""

from __future__ import annotations

import atexit
import signal
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from titan_dp import config
from titan_dp.errors import SIGNALS, RunError, UserError, explained, lost_worker

Read = Callable[[int, int], Iterator[Any]]
"""`read(worker, workers)`: items worker, worker + workers, worker + 2 workers, ... of a sequence; `read(0, 1)` is all of it."""


def read_in_workers(read: Read, settings: config.Dataloader) -> Iterator[Any]:
    """The items of `read` in their order, read by `settings.num_workers` processes, or by this one if that is 0.

    Raises what `read` raises, and RunError if a worker is killed.
    """
    workers = settings.num_workers
    loader = DataLoader(
        _Items(read),
        batch_size=None,  # items are whole micro-batches: there is nothing to collate
        num_workers=workers,
        prefetch_factor=settings.prefetch_factor if workers else None,
        worker_init_fn=_leave_signals_to_the_rank if workers else None,
        pin_memory=settings.pin_memory,
        # An iterator draws a seed for its workers. From the global generator, a resumed run would draw it once more than one
        # that never stopped, after its checkpoint has restored that generator.
        generator=torch.Generator().manual_seed(0),
    )
    handler = signal.getsignal(signal.SIGCHLD)
    items = iter(loader)
    if workers:
        # torch's handler would raise wherever the main thread is when a worker dies, even in a collective or while another
        # error is told. That a worker is gone is seen anyway when its next item is waited for.
        signal.signal(signal.SIGCHLD, handler)
    end = partial(_end_workers, items)
    atexit.register(end)
    try:
        for item in items:
            if isinstance(item, UserError | RunError):
                raise item
            yield item
    except (OSError, EOFError) as error:
        # What a worker itself raises begins with "Caught". Anything else is its pipe, which breaks when it is killed.
        if workers and not str(error).startswith("Caught "):
            raise RunError(lost_worker(f"{type(error).__name__}: {error}")) from error
        raise
    finally:
        end()
        atexit.unregister(end)


class _Items(IterableDataset[Any]):
    """The items of this process. In a worker, an error that one message explains travels as an item.

    If it were raised there, torch would put the worker's traceback into its message and lose what it was raised from.
    """

    def __init__(self, read: Read) -> None:
        self.read = read

    def __iter__(self) -> Iterator[Any]:
        if (info := get_worker_info()) is None:
            yield from self.read(0, 1)
            return
        try:
            yield from self.read(info.id, info.num_workers)
        except Exception as error:
            if (known := explained(error)) is None:
                raise
            yield known


def _leave_signals_to_the_rank(worker: int) -> None:
    """A signal to the whole process group must not take the data away from the step that is to be finished."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _end_workers(items: Any) -> None:
    """End the processes that read `items`, if there are any.

    They ignore SIGTERM, by which Python would end them at its own end, and would wait for them without end.
    """
    if hasattr(items, "_shutdown_workers"):
        items._shutdown_workers()
        for worker in items._workers:
            if worker.is_alive():  # in a read that does not return
                worker.kill()
