"""What every source of training batches shares: their form, whose samples are whose, and document boundaries.

`shards` and `hf_stream` are such sources; `loader.py` chooses between them.
"""

from __future__ import annotations

import atexit
import signal
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from titan_dp import config
from titan_dp.errors import RunError, UserError, explained, lost_worker
from titan_dp.faults.interrupt import SIGNALS

IGNORE = -100
"""The label of a position that predicts nothing."""
Batch = dict[str, Tensor | None]
"""input_ids [L, T] int64, labels [L, T] int64, cu_seqlens [N + 1] int32 or None."""


class Loader(Protocol):
    """Endless micro-batches of one rank."""

    fingerprint: str
    tokenizer_name: str
    tokenizer_hash: str
    """Of what gives tokens their meaning: equal where a token means the same."""

    def __iter__(self) -> Iterator[Batch]: ...

    def state_dict(self) -> dict[str, int]:
        """Where the run is, the same on every rank; call it between steps only."""
        ...

    def load_state_dict(self, state: dict[str, int]) -> None: ...

    def describe(self, run_tokens: int) -> str:
        """One line for the banner; `run_tokens` is the length of the run."""
        ...


class Place:
    """Which samples are whose."""

    def __init__(self, seq_len: int, local_batch_size: int, global_batch_size: int, rank: int, world_size: int) -> None:
        self.seq_len, self.local, self.total = seq_len, local_batch_size, global_batch_size
        self.rank, self.world_size = rank, world_size
        assert global_batch_size % (local_batch_size * world_size) == 0
        self.accumulation = global_batch_size // (local_batch_size * world_size)

    def first_sample(self, step_start: int, micro: int) -> int:
        """First sample of micro-batch `micro` of the step that begins with sample `step_start`."""
        return step_start + (micro * self.world_size + self.rank) * self.local


def pack_boundaries(starts: list[np.ndarray], T: int) -> Tensor:
    """Document boundaries of rows of T tokens, flattened: int32 offsets from 0 to rows * T.

    The list is filled up with rows * T to a multiple of 64 entries: empty documents, so that its length rarely changes
    and compiled blocks keep their shapes.
    """
    end = len(starts) * T
    offsets = [np.append(begins[begins < T], 0) + i * T for i, begins in enumerate(starts)]
    unique = np.unique(np.concatenate(offsets))
    padded = np.full(-(-(len(unique) + 1) // 64) * 64, end, dtype=np.int32)
    padded[: len(unique)] = unique
    return torch.from_numpy(padded)


def _leave_signals_to_the_rank(worker: int) -> None:
    """A signal to the whole process group must not take the data away from the step that is to be finished."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class _Reading(Dataset[Any]):
    """`dataset` in a worker: an error that one message explains travels as an item.

    Raised there, torch would put the worker's traceback into its message, and lose what it was raised from.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except Exception as error:
            return _explained_or_raise(error)


class _ReadingStream(IterableDataset[Any]):
    """The same for a stream."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self.dataset
        except Exception as error:
            yield _explained_or_raise(error)


def _explained_or_raise(error: Exception) -> UserError | RunError:
    if (known := explained(error)) is None:
        raise error
    return known


def _end_workers(items: Any) -> None:
    """End the processes that read `items`, if there are any.

    They ignore SIGTERM, by which Python would end them at its own end, and would wait for them without end.
    """
    if hasattr(items, "_shutdown_workers"):
        items._shutdown_workers()
        for worker in items._workers:
            if worker.is_alive():  # in a read that does not return
                worker.kill()


def stateful_loader(dataset: Any, workers: config.Dataloader, **options: Any) -> Iterator[Any]:
    """The items of `dataset`, read by `workers`. Raises UserError and RunError as it does."""
    if workers.num_workers:
        options["prefetch_factor"] = workers.prefetch_factor
        options["worker_init_fn"] = _leave_signals_to_the_rank
        dataset = _ReadingStream(dataset) if isinstance(dataset, IterableDataset) else _Reading(dataset)
    # Items are whole micro-batches, so there is nothing to collate; our own integer is the state, not torchdata's.
    warnings.filterwarnings("ignore", message="'set_vital' is deprecated")  # torchdata 0.11 on torch 2.13
    # A generator of its own: an iterator draws a seed for its workers, and a resumed run would draw it once more from the
    # global generator that its checkpoint has just restored.
    options["generator"] = torch.Generator().manual_seed(0)
    loader = StatefulDataLoader(
        dataset,
        batch_size=None,
        num_workers=workers.num_workers,
        pin_memory=workers.pin_memory,
        snapshot_every_n_steps=2**31,
        **options,
    )
    handler = signal.getsignal(signal.SIGCHLD)
    items = iter(loader)
    if workers.num_workers:
        # torch's handler would raise wherever the main thread is when a worker dies, in a collective too, or while another
        # error is told; that the worker is gone is seen when its next item is waited for.
        signal.signal(signal.SIGCHLD, handler)
    end = partial(_end_workers, items)
    atexit.register(end)
    try:
        for item in items:
            if isinstance(item, UserError | RunError):
                raise item
            yield item
    except (OSError, EOFError) as error:
        # What a worker raised itself begins so; the rest is its pipe, which breaks when it is killed.
        if workers.num_workers and not str(error).startswith("Caught "):
            raise RunError(lost_worker(f"{type(error).__name__}: {error}")) from error
        raise
    finally:
        end()
        atexit.unregister(end)


@dataclass(frozen=True)
class Segment:
    """This rank's part of every row where ranks share rows (`parallelism.context_parallel_degree`).

    All ranks of a context group read the same rows; each keeps one of as many equal segments, in order. Labels are cut from
    whole rows, so the label at a segment's end is the first token of the next one and none is lost.
    """

    part: int
    parts: int

    @staticmethod
    def of(parallelism: config.Parallelism, rank: int) -> Segment:
        """Neighbouring ranks share a row."""
        return Segment(rank % parallelism.context_parallel_degree, parallelism.context_parallel_degree)

    def __call__(self, batch: Batch) -> Batch:
        """input_ids and labels [L, T / parts], cu_seqlens of the whole rows, and `before_last_label` of them as `priced`."""
        ids, labels = batch["input_ids"], batch["labels"]
        if self.parts == 1 or ids is None or labels is None:
            return batch
        ids, labels, priced = (x.chunk(self.parts, 1)[self.part].contiguous() for x in (ids, labels, before_last_label(labels)))
        return {"input_ids": ids, "labels": labels, "cu_seqlens": batch["cu_seqlens"], "priced": priced}


def before_last_label(labels: Tensor) -> Tensor:
    """Which positions of labels [B, T] have a label at or after them in their row: all but padding."""
    return (labels != IGNORE).flip(1).cumsum(1).flip(1) > 0


def to_device(batch: dict[str, torch.Tensor | None], device: torch.device) -> dict[str, torch.Tensor]:
    """The batch on the device. To a GPU it goes through page-locked memory: a copy from any other waits for the GPU's queue."""
    on_gpu = device.type == "cuda"
    return {
        k: v if v is None else (v.pin_memory() if on_gpu else v).to(device, non_blocking=True)  # type: ignore[misc]
        for k, v in batch.items()
    }
