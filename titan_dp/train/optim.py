"""Optimizers: parameter groups by role, AdamW or Muon, gradient clipping, and the guard against non-finite gradients.

A step with a non-finite gradient leaves parameters and moments untouched to the last bit, decided on the device: multiplying
an update by 0 would not do (0 * NaN is NaN), and reading the norm on the host would stall every step. Fused AdamW skips
by itself when `found_inf` is 1, and so does our Muon.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titan_dp import config
from titan_dp.distributed import local_tensor
from titan_dp.errors import RunError, UserError, counted
from titan_dp.model.parametrization import Scale
from titan_dp.model.transformer import Transformer
from titan_dp.train.muon import Muon, shard_group


class NonFiniteError(RunError):
    """Training went non-finite and stayed so."""


def build_optimizer(model: Transformer, c: config.Optimizer, scales: Mapping[str, Scale] | None = None) -> Optimizers:
    """AdamW for all parameters, or Muon for what `Transformer.muon_rows` lists and AdamW for the rest.

    Matrices decay; norms, A_log, dt_bias and convolutions do not; embeddings (and the output matrix) if
    `decay_embeddings`. Every parameter is in exactly one group, that of its role and scale. `scales`, by name, multiply
    learning rates and epsilons; a weight loses the same part of itself per step whatever its learning rate's factor is.
    """
    block_rows = model.muon_rows(c.muon_split) if c.name == "Muon" else {}
    members: dict[tuple[str, Scale, int | None], list[nn.Parameter]] = {}
    for name, parameter in model.named_weights():
        scale = scales[name]._replace(init=1.0) if scales else Scale()
        members.setdefault((_role(name, parameter), scale, block_rows.get(name)), []).append(parameter)
    decay = {"matrices": c.weight_decay, "embeddings": c.weight_decay if c.decay_embeddings else 0.0}
    adam: list[dict[str, Any]] = []
    muon: list[dict[str, Any]] = []
    for (role, scale, rows), parameters in sorted(members.items(), key=lambda item: ROLES.index(item[0][0])):
        lr, factor = (c.lr, scale.lr) if rows is None else (c.muon_lr, scale.muon)
        group = {"params": parameters, "role": role, "peak_lr": lr * factor, "weight_decay": decay.get(role, 0.0) / factor}
        if rows is None:
            adam.append(group | {"eps": c.eps * scale.eps})
        else:
            muon.append(group | {"block_rows": rows})
    optimizers: list[torch.optim.Optimizer] = []
    if muon:
        optimizers.append(Muon(muon, lr=c.muon_lr, momentum=c.muon_momentum, adjust_lr_fn="match_rms_adamw"))
    optimizers.append(torch.optim.AdamW(adam, lr=c.lr, betas=(c.beta1, c.beta2), fused=True))
    return Optimizers(optimizers)


_SINGULAR = {"matrices": "matrix", "embeddings": "embedding", "convolutions": "convolution", "norms and gates": "norm or gate"}
ROLES = tuple(_SINGULAR)


def _role(name: str, parameter: nn.Parameter) -> str:
    if name.startswith(("embeddings.", "lm_head.")):
        return "embeddings"
    if "conv1d" in name:
        return "convolutions"
    return "matrices" if parameter.dim() == 2 else "norms and gates"


class Optimizers:
    """One or two torch optimizers stepped as one."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers

    def __iter__(self) -> Iterator[torch.optim.Optimizer]:
        return iter(self.optimizers)

    def set_lr(self, factor: float) -> None:
        """Set every group's learning rate to `factor` times its peak."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor

    def step(self, found_inf: Tensor) -> None:
        """Update the parameters, or nothing at all if `found_inf` (a float32 scalar on the device) is 1."""
        for optimizer in self.optimizers:
            optimizer.grad_scale, optimizer.found_inf = None, found_inf  # type: ignore[attr-defined]
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def describe(self) -> str:
        """'AdamW lr 0.0003: 12 matrices (1.2 M, decay 0.01), ...' for the banner; of different numbers, a range."""
        parts = []
        for optimizer in self.optimizers:
            roles = []
            for role in dict.fromkeys(group["role"] for group in optimizer.param_groups):
                groups = [group for group in optimizer.param_groups if group["role"] == role]
                parameters = [p for group in groups for p in group["params"]]
                decay = _range(group["weight_decay"] for group in groups)
                size = f"{sum(p.numel() for p in parameters):,}"
                many = counted(len(parameters), _SINGULAR[role], role)
                roles.append(f"{many} ({size}, {'no decay' if decay == '0' else f'decay {decay}'})")
            rates = _range(group["peak_lr"] for group in optimizer.param_groups)
            parts.append(f"{type(optimizer).__name__} lr {rates}: {', '.join(roles)}")
        return "; ".join(parts)


def _range(numbers: Iterable[float]) -> str:
    low, *_, high = sorted([*numbers] * 2)
    return f"{low:g}" if low == high else f"{low:.3g} to {high:.3g}"


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients down to the global L2 norm `max_norm`; returns the norm before, a plain device tensor.

    Norms of local shards are squared and summed over the ranks that share a gradient, replicas left out: one small
    reduction per mesh, whatever the number of parameters. A non-finite norm makes every gradient non-finite, which the
    guard then refuses.
    """
    shards: dict[dist.ProcessGroup | None, list[Tensor]] = {}
    for parameter in parameters:
        if (gradient := parameter.grad) is not None:
            shards.setdefault(shard_group(gradient), []).append(local_tensor(gradient))
    if not shards:
        raise UserError("no parameter has a gradient: every label of the batch is ignored or the model is frozen")
    squares = []
    for group, gradients in shards.items():
        square = torch.nn.utils.get_total_norm(gradients).float().square()
        if group is not None:
            dist.all_reduce(square, group=group)
        squares.append(square)
    norm = torch.stack(squares).sum().sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradients in shards.values():
        torch._foreach_mul_(gradients, scale)
    return norm


class NonFiniteGuard:
    """Counts skipped steps on the device; the host looks only at log steps."""

    def __init__(self, device: torch.device) -> None:
        self._run = torch.zeros((), device=device)  # consecutive skips up to now
        self._longest = torch.zeros((), device=device)  # longest run since the last check
        self._total = torch.zeros((), device=device)
        self.total = 0
        """Steps skipped so far, as of the last check."""

    def update(self, grad_norm: Tensor) -> Tensor:
        """found_inf for this step: a float32 scalar, 1 if the norm is not finite."""
        found = (~torch.isfinite(grad_norm)).float()
        self._run = (self._run + 1) * found
        self._longest = torch.maximum(self._longest, self._run)
        self._total = self._total + found
        return found

    def check(self, limit: int) -> None:
        """Read the counters. Raises NonFiniteError if `limit` steps in a row were skipped since the last check."""
        longest, total = (int(x) for x in torch.stack([self._longest, self._total]).tolist())
        self.total = total
        self._longest = self._run.clone()
        if longest >= limit:
            raise NonFiniteError(
                f"the gradient was not finite for {longest} steps in a row (training.max_nonfinite_steps = {limit}; {total} "
                "skipped in all); checkpoints saved meanwhile are marked as not healthy. The same command resumes from the "
                "newest healthy one: give it a lower optimizer.lr, or look at the data of these steps"
            )

    def healthy(self) -> bool:
        """Whether the last step was taken; a host synchronisation, for checkpoints only."""
        return not bool(self._run)
