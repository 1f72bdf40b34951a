"""Summed cross-entropy of hidden states against labels without the [tokens, vocabulary] float32 logits.

torch 2.13's linear_cross_entropy does it in pieces too, but returns the sum in the input's dtype: for bfloat16 that is wrong
by a percent (measured: 50688 for 51422.05). In float32 it took twice as long for 32,000 ids on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titan_dp.errors import RunError

IGNORE = -100


def check_finite(values: Tensor, what: str) -> None:
    """Raise RunError if `values` hold a NaN or an infinity; waits for the device.

    To be called before an argmax, a rank or a comparison, which would make a token or an accuracy of them.
    """
    if not bool(values.isfinite().all()):
        raise RunError(
            f"{what} are not finite, so whatever is computed from them means nothing; take an earlier, healthy checkpoint "
            "(`titan-dp checkpoint list RUN` shows which are)"
        )


_CHUNK = 2**24  # logits at once: 64 MiB in float32


def summed_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sum of -log softmax(hidden weight^T)[label] over labels other than -100, a float32 scalar.

    Args:
        hidden: [N, D]; any float dtype.
        weight: [V, D] in hidden's dtype.
        labels: [N] int64, -100 for none.
    """
    if not torch.is_grad_enabled():  # parameters require gradients even then, and they would be computed
        hidden, weight = hidden.detach(), weight.detach()
    return _ChunkedLoss.apply(hidden, weight, labels)  # type: ignore[no-any-return]


@torch.no_grad()
def token_scores(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """-log softmax(hidden weight^T)[label] of every position, in float32, and whether the label is the likeliest id.

    Args:
        hidden: [..., D]; any float dtype.
        weight: [V, D] in hidden's dtype.
        labels: [...] int64, -100 for none: loss 0, False.
    """
    flat, wanted = hidden.flatten(0, -2), labels.flatten()
    loss = torch.empty(len(flat), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
    likeliest = torch.empty(len(flat), dtype=torch.bool, device=hidden.device)
    size = max(1, _CHUNK // len(weight))
    for part in (slice(i, i + size) for i in range(0, len(flat), size)):
        logits = (flat[part] @ weight.T).to(loss.dtype)
        loss[part] = F.cross_entropy(logits, wanted[part], ignore_index=IGNORE, reduction="none")
        likeliest[part] = logits.argmax(-1) == wanted[part]
    return loss.view(labels.shape), likeliest.view(labels.shape)


class _ChunkedLoss(torch.autograd.Function):
    """Gradients are taken chunk by chunk in the forward pass, so that a chunk's logits are computed once and freed at once."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        needs_grad = any(ctx.needs_input_grad[:2])
        loss = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        d_hidden = torch.empty_like(hidden) if needs_grad else None
        d_weight = torch.zeros(weight.shape, dtype=loss.dtype, device=weight.device) if needs_grad else None
        size = max(1, _CHUNK // len(weight))
        for part in (slice(i, i + size) for i in range(0, len(hidden), size)):
            log_p = (hidden[part] @ weight.T).to(loss.dtype).log_softmax(-1)
            loss += F.nll_loss(log_p, labels[part], ignore_index=IGNORE, reduction="sum")
            if d_hidden is not None and d_weight is not None:
                valid = labels[part] != IGNORE
                d_logits = log_p.exp_()
                d_logits[torch.arange(len(d_logits), device=labels.device), labels[part].where(valid, 0)] -= 1
                d_logits = (d_logits * valid[:, None]).to(hidden.dtype)
                d_hidden[part] = d_logits @ weight
                d_weight += d_logits.T @ hidden[part]
        if d_hidden is not None and d_weight is not None:
            ctx.save_for_backward(d_hidden, d_weight.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        d_hidden, d_weight = ctx.saved_tensors
        return (d_hidden * d_loss).to(d_hidden.dtype), (d_weight * d_loss).to(d_weight.dtype), None
