"""Mean loss over held-out tokens, exact for any number of ranks.

Sums of token losses and counts of valid tokens are reduced, never means of means; every rank runs the same number of
batches (the loader pads with ignored labels), because FSDP's collectives need everybody.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from titan_dp.data.batches import IGNORE
from titan_dp.distributed import all_reduce_sum
from titan_dp.model.transformer import Transformer


@dataclass(frozen=True)
class Evaluation:
    loss: float
    """Mean loss in nats a token."""
    tokens: int
    """Valid tokens it was taken over."""


@torch.no_grad()
def evaluate_loss(model: Transformer, batches: Iterable[dict[str, torch.Tensor | None]], device: torch.device) -> Evaluation:
    """Loss of `model` over `batches` of all ranks; leaves the model in training mode."""
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in batches:
        tensors = to_device(batch, device)
        labels = tensors["labels"]
        total[0] += model(tensors["input_ids"], labels, tensors["cu_seqlens"])
        total[1] += (labels != IGNORE).sum()
    model.train()
    loss, tokens = all_reduce_sum(total).tolist()
    return Evaluation(loss / max(tokens, 1), int(tokens))


def to_device(batch: dict[str, torch.Tensor | None], device: torch.device) -> dict[str, torch.Tensor]:
    return {k: v if v is None else v.to(device, non_blocking=True) for k, v in batch.items()}  # type: ignore[misc]
