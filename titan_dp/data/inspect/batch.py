"""A batch of a run as the model gets it: the trainer's own loader makes it, and nothing here makes another one."""

from __future__ import annotations

from typing import Any

import numpy as np

from titan_dp import config
from titan_dp.data.batch import IGNORE, Batch, Place
from titan_dp.data.inspect.text import Decoder
from titan_dp.data.loader import ShardLoader, build_dataloader, build_validation_loader
from titan_dp.errors import UserError

_EDGE, _AROUND, _BOUNDARIES = 3, 2, 3
"""Positions shown at either end of a row, on either side of a boundary, and boundaries of a row."""
_LOOKED_AT = 64
"""Micro-batches in which a row is sought that has a boundary."""


def loader_of(c: config.Config) -> ShardLoader:
    """The loader of a run that has one rank and one micro-batch per step: its k-th micro-batch holds samples k L to (k + 1) L.

    Raises UserError as training does, and for data that is made while training.
    """
    if c.data.source != "shards":
        raise UserError(
            f"data.source = {c.data.source!r} makes its tokens while training, so there is nothing to look at before; inspect "
            "reads data.source = 'shards'"
        )
    L = c.training.local_batch_size if c.training.local_batch_size > 0 else c.training.global_batch_size
    loader = build_dataloader(c.data, config.Dataloader(), Place(c.training.seq_len, L, L, 0, 1), c.model.vocab_size)
    assert isinstance(loader, ShardLoader)
    return loader


def refusal(c: config.Config, loader: ShardLoader) -> str:
    """Why a run would refuse its held-out data; '' if it would not."""
    if c.validation.enable:
        try:
            build_validation_loader(c.validation, c.data, loader.place, c.model.vocab_size, loader.sources)
        except UserError as error:
            return str(error)
    return ""


def first_batch(c: config.Config, loader: ShardLoader, step: int, decoder: Decoder) -> dict[str, Any]:
    """The first micro-batch of rank 0 in optimizer step `step` (from 1, in a run of one batch size), and one row in detail.

    Raises UserError if it depends on the number of ranks, which is not known here, which samples these are.
    """
    size, L, T = c.training.global_batch_size, loader.place.local, loader.place.seq_len
    if size == -1 and step > 1:
        raise UserError(
            f"--step {step}: with training.global_batch_size = -1 it depends on the number of ranks what a step reads; add "
            "--training.global_batch_size N, as the run says it at its start"
        )
    first = (step - 1) * max(size, 0)
    loader.load_state_dict({"samples": first})
    micro_batches = (micro_batches[0] for micro_batches in loader)
    batch, starts = next(micro_batches), [_begins(loader, first + i) for i in range(L)]
    labels, offsets = _array(batch, "labels"), _array(batch, "cu_seqlens")
    found = {
        "step": step,
        "first_sample": first,
        "shapes": {name: None if x is None else [list(x.shape), str(x.dtype)[6:]] for name, x in batch.items()},
        "labels": int((labels != IGNORE).sum()),
        "masked_labels": int((labels == IGNORE).sum()),
        "document_boundaries": c.data.document_boundaries,
        "resets": None if batch["cu_seqlens"] is None else len(np.unique(offsets[offsets < L * T])),
        "rows": [_row(loader, first + i) | {"documents_begin": len(begins)} for i, begins in enumerate(starts)],
    }
    number, shown, where = 0, batch, starts
    while not any((begins > 0).any() for begins in where) and number + 1 < _LOOKED_AT:
        number, shown = number + 1, next(micro_batches)
        where = [_begins(loader, first + number * L + i) for i in range(L)]
    row = next((i for i, begins in enumerate(where) if (begins > 0).any()), None)
    if row is None:
        number, row, shown, where = 0, 0, batch, starts
    place = _row(loader, first + number * L + row) | {"documents_begin": len(where[row])}
    found["shown"] = place | {"positions": _positions(shown, row, where[row], decoder)}
    return found


def _array(batch: Batch, name: str) -> np.ndarray:
    """An entry of a batch, empty if it is None."""
    tensor = batch[name]
    return np.empty(0, np.int64) if tensor is None else tensor.numpy()


def _located(loader: ShardLoader, sample: int) -> tuple[int, int]:
    """Source of a sample, and its first token there."""
    source, window = loader.order.locate(np.array([sample], dtype=np.int64))
    return int(source[0]), int(window[0]) * loader.place.seq_len


def _row(loader: ShardLoader, sample: int) -> dict[str, Any]:
    source, begin = _located(loader, sample)
    shards = loader.sources[source]
    documents = [shards.document_at(begin), shards.document_at(begin + loader.place.seq_len - 1)]
    return {"sample": sample, "folder": str(shards.folder), "first_token": begin, "documents": documents}


def _begins(loader: ShardLoader, sample: int) -> np.ndarray:
    """Positions in a sample's row at which documents begin, as the shards say."""
    source, begin = _located(loader, sample)
    return loader.sources[source].document_starts(begin, begin + loader.place.seq_len)


def _positions(batch: Batch, row: int, starts: np.ndarray, decoder: Decoder) -> list[dict[str, Any]]:
    """The ends of a row, and what is around its first boundaries, as the batch has it."""
    inputs, labels, offsets = (_array(batch, name) for name in ("input_ids", "labels", "cu_seqlens"))
    T = inputs.shape[1]
    shown = {*range(_EDGE), *range(T - _EDGE, T)}
    for begin in starts[starts > 0][:_BOUNDARIES].tolist():
        shown |= set(range(begin - _AROUND, begin + _AROUND))
    found = []
    for p in sorted(p for p in shown if 0 <= p < T):
        token, label = int(inputs[row, p]), int(labels[row, p])
        found.append(
            {
                "position": p,
                "input": token,
                "input_text": decoder.token(token),
                "label": label,
                "label_text": "" if label == IGNORE else decoder.token(label),
                "document_begins": bool((starts == p).any()),
                "reset": bool((offsets == row * T + p).any()),
            }
        )
    return found
