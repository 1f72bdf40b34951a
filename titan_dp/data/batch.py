"""What a batch is, and which samples are whose: shared by shards, streams and synthetic problems.

A source brings rows of tokens with the places where documents begin, and `make_batch` turns them into the model's
arguments. Which samples a rank reads for a step is `Place`'s arithmetic. `titan_dp/data/__init__.py` tells the whole path.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

IGNORE = -100
"""The label of a position that predicts nothing."""
Batch = dict[str, Tensor | None]
"""A micro-batch of L rows of T tokens: input_ids and labels [L, T] int64, cu_seqlens [N + 1] int32 or None (see
`pack_boundaries`). Under context parallelism the first two are [L, T / parts], cu_seqlens is still that of the whole rows,
and `priced` [L, T / parts] bool is what `before_last_label` says of the whole rows."""


class Loader(Protocol):
    """The training batches of one rank, without end: each item holds the micro-batches of one optimizer step."""

    fingerprint: str
    tokenizer_name: str
    tokenizer_hash: str
    """Of what gives tokens their meaning: equal if a token means the same."""
    adds_bos: bool
    """Whether documents begin with BOS."""

    def __iter__(self) -> Iterator[list[Batch]]: ...

    def state_dict(self) -> dict[str, int]:
        """The position after the steps handed out so far, the same on every rank."""
        ...

    def load_state_dict(self, state: dict[str, int]) -> None: ...

    def epochs(self, run_tokens: int) -> float:
        """How often a run of `run_tokens` reads its data; 0 if that has no end or is not known."""
        ...

    def describe(self, run_tokens: int) -> str:
        """One line for the banner; `run_tokens` is the length of the run."""
        ...


@dataclass(frozen=True)
class Place:
    """Which samples of a step, and which part of their rows, this rank reads.

    Micro-batch m of step s on rank r of W holds samples s G + (m W + r) L + [0, L) of the run's order, for global batch G and
    micro-batch L. So a step has the same samples on any number of ranks and with any accumulation.

    Under context parallelism, ranks that share rows have one r and read the same samples. Each keeps one of `parts` equal
    segments of every row, in order.
    """

    seq_len: int
    """Tokens per row, T."""
    local: int
    """Samples per micro-batch, L."""
    total: int
    """Samples per optimizer step, G: a multiple of L W."""
    rank: int
    world_size: int
    part: int = 0
    parts: int = 1

    def __post_init__(self) -> None:
        assert self.total % (self.local * self.world_size) == 0

    @property
    def accumulation(self) -> int:
        """Micro-batches per step on each rank."""
        return self.total // (self.local * self.world_size)

    def first_sample(self, step_start: int, micro: int) -> int:
        """First sample of micro-batch `micro` of the step that begins with sample `step_start`."""
        return step_start + (micro * self.world_size + self.rank) * self.local


def make_batch(rows: np.ndarray, starts: list[np.ndarray], place: Place, reset: bool) -> Batch:
    """The model's arguments for the rows of a micro-batch.

    Args:
        rows: [L, T + 1] int64 tokens, of which the last is only a label; IGNORE after a row's end.
        starts: for each row the positions at which documents begin, rising, each in [0, T].
        reset: whether the model keeps documents apart (`data.document_boundaries`).
    """
    labels_of_rows = rows[:, 1:].copy()
    for row, begins in zip(labels_of_rows, starts, strict=True):
        row[begins[begins > 0] - 1] = IGNORE  # it would be the first token of another, unrelated document
    labels = torch.from_numpy(labels_of_rows)
    batch: Batch = {"input_ids": torch.from_numpy(np.maximum(rows[:, :-1], 0)), "labels": labels}
    if place.parts > 1:
        # Labels are made before the cut: the label at a segment's end is the first token of the next segment.
        whole = (*batch.items(), ("priced", before_last_label(labels)))
        batch = {name: x.chunk(place.parts, 1)[place.part].contiguous() for name, x in whole if x is not None}
    batch["cu_seqlens"] = pack_boundaries(starts, place.seq_len) if reset else None
    return batch


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


def before_last_label(labels: Tensor) -> Tensor:
    """Which positions of labels [B, T] have a label at or after them in their row: all except padding."""
    return (labels != IGNORE).flip(1).cumsum(1).flip(1) > 0


def to_device(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """The batch on the device. To a GPU it goes through page-locked memory: a copy from any other waits for the GPU's queue."""
    on_gpu = device.type == "cuda"
    return {
        k: v if v is None else (v.pin_memory() if on_gpu else v).to(device, non_blocking=True)  # type: ignore[misc]
        for k, v in batch.items()
    }
