"""One optimizer step, which the trainer, the estimator and the benchmarks all take.

The loss is the sum over all tokens of the step divided by the global number of valid ones, whatever rank or micro-batch they
are in; a mean of means would weigh a token by how full its micro-batch is. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from titan_dp.data.batch import IGNORE, Batch, before_last_label, to_device
from titan_dp.distributed import World, all_reduce_sum
from titan_dp.model.transformer import Transformer
from titan_dp.train.optim import NonFiniteGuard, Optimizers, clip_grad_norm

PhaseName = Literal["forward", "loss", "backward", "clip", "update"]
Phase = Callable[[PhaseName, int], AbstractContextManager[None]]
"""What to enter around a phase of micro-batch i (-1: of the whole step). The loss is part of the forward pass."""


class StepResult(NamedTuple):
    """Of all ranks together, on the device."""

    loss: Tensor
    """Mean loss of a valid token in nats."""
    householder_steps: Tensor | None
    """Mean steps of a token, summed over layers; None without routers."""
    grad_norm: Tensor
    """Before clipping."""
    signals: Tensor
    """How many ranks have received each stop signal: the sum of `flags`."""


def train_step(
    model: Transformer,
    optimizers: Optimizers,
    guard: NonFiniteGuard,
    micro_batches: Sequence[Batch],
    *,
    world: World,
    max_norm: float,
    lr_factor: float,
    householder_cost: float | None,
    flags: Tensor,
    phase: Phase = lambda name, micro: nullcontext(),
) -> StepResult:
    """Forward and backward of all micro-batches, one update of the parameters. Every rank calls it with as many.

    The collectives of a step, in their order:

    1. one all-reduce of counts: the stop signals, valid labels, and with routers the tokens whose steps cost something;
    2. for each micro-batch, all-gathers of parameters: the float32 group and the root at first, then block by block, in the
       backward pass once more for blocks that were resharded; and the exchanges of context parallelism within the mixers;
    3. in the backward pass of the last micro-batch, a reduce-scatter of gradients per block, one for the root and one for the
       float32 group, each followed by an all-reduce over replicas if there are any;
    4. one all-reduce of the squared gradient norm per group of ranks that share parameters;
    5. Muon only: two all-to-alls for each round of matrices of equal size, none if every rank holds its own whole;
    6. one all-reduce of the loss, and with routers one of the steps they took.

    Args:
        micro_batches: on any device; see `data.batch.Batch`.
        max_norm: global norm that gradients are scaled down to.
        lr_factor: multiplies every parameter group's peak learning rate.
        householder_cost: nats per Householder step and token that a router takes; None without routers.
        flags: [signals] int64 on the device, this rank's part of a sum that rides along (`Interrupt.flags`).
        phase: entered around each phase; see `Phase`.
    """
    batches = [to_device(batch, world.device) for batch in micro_batches]
    own: list[Any] = [sum((batch["labels"] != IGNORE).sum() for batch in batches)]
    priced: list[Tensor] = []
    if householder_cost is not None:
        priced = [batch["priced"] if "priced" in batch else before_last_label(batch["labels"]) for batch in batches]
        own.append(sum(mask.sum() for mask in priced))
    counts = all_reduce_sum(torch.cat([flags, torch.stack(own)]))
    signals, valid, priced_tokens = counts[: len(flags)], counts[len(flags)], counts[-1]

    loss_sum, steps_sum = torch.zeros((), device=world.device), torch.zeros((), device=world.device)
    for i, batch in enumerate(batches):
        model.set_requires_gradient_sync(i == len(batches) - 1)  # type: ignore[operator]  # FSDP added it
        with phase("forward", i):
            loss, steps = model(batch["input_ids"], batch["labels"], batch["cu_seqlens"], phase("loss", i))
            objective = loss / valid
            if householder_cost is not None:
                mean_steps = (steps * priced[i]).sum() / priced_tokens
                objective = objective + householder_cost * mean_steps
                steps_sum += mean_steps.detach()
        with phase("backward", i):
            # FSDP averages gradients over ranks; times the number of ranks, that is the sum which the global counts divide.
            (objective * world.size).backward()
        loss_sum += loss.detach()
    with phase("clip", -1):
        grad_norm = clip_grad_norm(model.parameters(), max_norm)
    optimizers.set_lr(lr_factor)
    found_inf = guard.update(grad_norm)
    with phase("update", -1):
        optimizers.step(found_inf)
    optimizers.zero_grad()
    taken = None if householder_cost is None else all_reduce_sum(steps_sum)
    return StepResult(all_reduce_sum(loss_sum) / valid, taken, grad_norm, signals)
