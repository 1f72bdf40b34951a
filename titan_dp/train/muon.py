"""Muon on sharded matrices: every rank keeps the momentum of its shards; Newton-Schulz runs on whole matrices.

Muon orthogonalises whole matrices, and every rank holds some rows of each. So the ranks that share parameters work on as many
matrices at a time as there are ranks: one all-to-all brings each rank all rows of one matrix, in the bfloat16 that the
iteration computes in, and another takes the results back. Each matrix travels once each way and is orthogonalised once; shards
may be unequal or empty. The step never waits for the device: whether it counts is a tensor, the learning rate a number.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from titan_dp.distributed import local_tensor


class Muon(torch.optim.Muon):
    """torch.optim.Muon, its options and its state, for matrices that FSDP2 shards by rows.

    Attributes:
        found_inf: a float32 scalar on the device, or None. If it is 1, `step` leaves parameters and momentum as they are to
            the last bit, as it does for fused AdamW.
    """

    found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shared: dict[dist.ProcessGroup | None, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shared.setdefault(shard_group(parameter), []).append(parameter)
            for ranks, parameters in shared.items():
                at_once = 1 if ranks is None else ranks.size()
                parameters.sort(key=lambda p: p.numel(), reverse=True)  # ranks that work together work equally long
                for i in range(0, len(parameters), at_once):
                    self._step_together(parameters[i : i + at_once], ranks, group)

    def _step_together(self, parameters: list[nn.Parameter], ranks: dist.ProcessGroup | None, group: dict[str, Any]) -> None:
        """A step of at most as many matrices as there are ranks."""
        updates = [self._move_momentum(p, group["momentum"], group["nesterov"]).bfloat16() for p in parameters]
        options = group["ns_coefficients"], group["ns_steps"], group["eps"]
        shapes = [p.shape for p in parameters]
        if ranks is None or ranks.size() == 1:
            updates = [orthogonalise(update, *options) for update in updates]
        else:
            whole = _to_owners(updates, shapes, ranks)
            updates = _from_owners(None if whole is None else orthogonalise(whole, *options), updates, shapes, ranks)
        for parameter, update in zip(parameters, updates, strict=True):
            weights, rate = local_tensor(parameter), group["lr"]
            moved = weights * (1 - rate * group["weight_decay"])
            # As large as AdamW's updates are: 0.2 root mean square (torch's match_rms_adamw).
            moved.add_(update, alpha=-rate * 0.2 * math.sqrt(max(parameter.shape)))
            self._write(weights, moved)

    def _move_momentum(self, parameter: nn.Parameter, momentum: float, nesterov: bool) -> Tensor:
        """This rank's rows of the matrix that is to be orthogonalised."""
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        assert parameter.grad is not None
        gradient, buffer = local_tensor(parameter.grad), local_tensor(state["momentum_buffer"])
        moved = buffer.lerp(gradient, 1 - momentum)
        self._write(buffer, moved)
        return gradient.lerp(moved, momentum) if nesterov else moved

    def _write(self, target: Tensor, value: Tensor) -> None:
        target.copy_(value if self.found_inf is None else torch.where(self.found_inf.bool(), target, value))


def shard_group(tensor: Tensor) -> dist.ProcessGroup | None:
    """The ranks over which `tensor` is split; None if this rank has all of it. FSDP2 shards over one mesh dimension."""
    if not isinstance(tensor, DTensor):
        return None
    dims = [dim for dim, placement in enumerate(tensor.placements) if placement.is_shard()]
    assert len(dims) <= 1, tensor.placements
    return tensor.device_mesh.get_group(dims[0]) if dims else None


def orthogonalise(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """About U V^T of matrix [R, C] = U S V^T: `steps` quintic Newton-Schulz iterations in its dtype (Jordan et al. 2024)."""
    a, b, c = coefficients
    X = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T  # the Gram matrix is then the small one
    X = X / X.norm().clamp(min=eps)
    for _ in range(steps):
        gram = X @ X.T
        X = torch.addmm(X, torch.addmm(gram, gram, gram, beta=b, alpha=c), X, beta=a)
    return X if matrix.shape[0] <= matrix.shape[1] else X.T


def _to_owners(shards: list[Tensor], shapes: list[torch.Size], ranks: dist.ProcessGroup) -> Tensor | None:
    """On rank i, matrix i of `shapes`, of which every rank has some rows in `shards`; None if there is no such matrix."""
    sends, receives = _lengths(shards, shapes, ranks)
    whole = shards[0].new_empty(sum(receives))
    dist.all_to_all_single(whole, torch.cat([shard.flatten() for shard in shards]), receives, sends, group=ranks)
    return whole.view(shapes[ranks.rank()]) if ranks.rank() < len(shapes) else None


def _from_owners(own: Tensor | None, shards: list[Tensor], shapes: list[torch.Size], ranks: dist.ProcessGroup) -> list[Tensor]:
    """The inverse of `_to_owners`."""
    sends, receives = _lengths(shards, shapes, ranks)
    parts = shards[0].new_empty(sum(sends))
    dist.all_to_all_single(parts, parts.new_empty(0) if own is None else own.flatten(), sends, receives, group=ranks)
    return [part.view_as(shard) for part, shard in zip(parts.split(sends), shards, strict=False)]


def _lengths(shards: list[Tensor], shapes: list[torch.Size], ranks: dist.ProcessGroup) -> tuple[list[int], list[int]]:
    """How many numbers this rank has of each rank's matrix, and each rank of this one's."""
    size, rank = ranks.size(), ranks.rank()
    sends = [shard.numel() for shard in shards] + [0] * (size - len(shards))
    if rank >= len(shapes):
        return sends, [0] * size
    rows, columns = shapes[rank]
    most = -(-rows // size)  # as torch.chunk: the last ranks have fewer rows, or none
    return sends, [max(0, min(most, rows - r * most)) * columns for r in range(size)]
