"""Mean loss over held-out tokens, and accuracies of problems with right answers, exact for any number of ranks.

Sums and counts are reduced, never means of means; every rank runs the same number of batches (the loader pads with
ignored labels), because FSDP's collectives need everybody. All functions leave the model in training mode.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from titan_dp.data.batch import IGNORE, Batch, to_device
from titan_dp.distributed import all_reduce_sum
from titan_dp.model.loss import check_finite
from titan_dp.model.transformer import Transformer


@dataclass(frozen=True)
class Evaluation:
    loss: float
    """Mean loss in nats per token."""
    tokens: int
    """Valid tokens that it is the mean of."""
    token_accuracy: float | None = None
    """Fraction of the labels that the likeliest id is; None for text."""
    sequence_accuracy: float | None = None
    """Fraction of the rows with all labels right."""


def bits_per_byte(nats: float, text_bytes: float) -> float:
    """The one formula, of training's validation and of `titan-dp evaluate perplexity`.

    Args:
        nats: summed loss of the predictions. The first token of a document is not predicted.
        text_bytes: UTF-8 bytes of the documents' text, first tokens included. For a part of a text, the number of predictions
            there times the text's bytes per prediction.
    """
    return nats / math.log(2) / text_bytes


def _evaluating(model: Transformer, batches: Iterable[Batch], device: torch.device) -> Iterator[dict[str, Tensor]]:
    """`batches` on the device, with the model in evaluation mode until they end."""
    model.eval()
    for batch in batches:
        yield to_device(batch, device)
    model.train()


@torch.no_grad()
def evaluate_loss(model: Transformer, batches: Iterable[Batch], device: torch.device) -> Evaluation:
    """Loss of `model` over `batches` of all ranks."""
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for tensors in _evaluating(model, batches, device):
        labels = tensors["labels"]
        total[0] += model(tensors["input_ids"], labels, tensors["cu_seqlens"]).loss
        total[1] += (labels != IGNORE).sum()
    loss, tokens = all_reduce_sum(total).tolist()
    return Evaluation(loss / max(tokens, 1), int(tokens))


@torch.no_grad()
def evaluate_answers(model: Transformer, batches: Iterable[Batch], device: torch.device) -> Evaluation:
    """Loss and accuracies of `model` over `batches` of all ranks, for vocabularies whose logits fit in memory.

    An answer whose logits are not finite is not right.
    """
    total = torch.zeros(5, dtype=torch.float64, device=device)
    for tensors in _evaluating(model, batches, device):
        labels = tensors["labels"]
        logits, asked = model(tensors["input_ids"]), labels != IGNORE
        right, rows = (logits.argmax(-1) == labels) & logits.isfinite().all(-1) & asked, asked.any(1)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")
        sums = (loss, asked.sum(), right.sum(), rows.sum(), (rows & (right == asked).all(1)).sum())
        total += torch.stack([x.double() for x in sums])
    loss_sum, tokens, right_sum, row_sum, all_right = all_reduce_sum(total).tolist()
    return Evaluation(loss_sum / max(tokens, 1), int(tokens), right_sum / max(tokens, 1), all_right / max(row_sum, 1))


@torch.no_grad()
def accuracy_by_position(model: Transformer, batches: Iterable[Batch], device: torch.device) -> Tensor:
    """Counts [3, T] int64 over the rows of all ranks: labels at each position, how many are right, and how many are
    right with all labels before them in the row. Raises RunError on all ranks if logits are not finite."""
    counts: Tensor | None = None
    not_finite = torch.zeros((), dtype=torch.int64, device=device)
    for tensors in _evaluating(model, batches, device):
        asked = tensors["labels"] != IGNORE
        logits = model(tensors["input_ids"])
        not_finite += (~logits.isfinite()).sum()
        right = (logits.argmax(-1) == tensors["labels"]) & asked
        prefix = (right | ~asked).cumprod(1).bool() & asked
        here = torch.stack([asked.sum(0), right.sum(0), prefix.sum(0)])
        counts = here if counts is None else counts + here
    assert counts is not None
    check_finite(torch.where(all_reduce_sum(not_finite) > 0, torch.nan, 0.0), "the model's logits")
    return all_reduce_sum(counts)
