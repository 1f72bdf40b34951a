"""Muon on sharded matrices: every rank keeps the momentum of its shards; Newton-Schulz runs on whole matrices at their owners.

A matrix here is a block of rows: those of one head and Householder step, or all of a parameter. Blocks of equal size are
orthogonalised together, in rounds: each rank owns as many of a round's blocks as any other, but for one, and those whose rows
it holds are its own first. One all-to-all brings owners the rows that they lack, in the bfloat16 that the iteration computes
in, and another takes the results back; where heads do not straddle shards there is nothing to exchange. Shards may be unequal
or empty. The step never waits for the device: whether it counts is a tensor, the learning rate a number.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import cache
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from titan_dp.distributed import local_tensor

_AT_ONCE = 2**24
"""Numbers that a rank has of a round, about: 32 MiB in bfloat16, and enough work to fill a GPU."""

Member = tuple[nn.Parameter, dict[str, Any]]
"""A parameter and the options of its group."""


class Muon(torch.optim.Muon):
    """torch.optim.Muon, its options and its state, for matrices that FSDP2 shards by rows.

    A group may have one option more, `block_rows`: every so many rows of its parameters are a matrix of their own, with the
    update's scale of that shape. Without it, parameters are whole matrices.

    Attributes:
        found_inf: a float32 scalar on the device, or None. If it is 1, `step` leaves parameters and momentum as they are to
            the last bit, as it does for fused AdamW.
    """

    found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        alike: dict[Any, list[Member]] = {}
        for group in self.param_groups:
            options = tuple(group["ns_coefficients"]), group["ns_steps"], group["eps"]
            for parameter in group["params"]:
                if parameter.grad is not None:
                    key = shard_group(parameter), _block_shape(parameter, group), options
                    alike.setdefault(key, []).append((parameter, group))
        for (ranks, shape, options), members in alike.items():
            for some in _rounds(members, shape[0], 1 if ranks is None else ranks.size()):
                self._step_together(some, ranks, shape, options)

    def _step_together(
        self, members: list[Member], ranks: dist.ProcessGroup | None, shape: tuple[int, int], options: tuple[Any, ...]
    ) -> None:
        """A step of parameters whose blocks are of one shape."""
        size, rank = (1, 0) if ranks is None else (ranks.size(), ranks.rank())
        pieces = _plan(tuple(len(parameter) for parameter, _ in members), *shape, size)
        held = [Part(piece.owner, piece.numel) for piece in pieces if piece.holder == rank]
        owned = [Part(piece.holder, piece.numel) for piece in pieces if piece.owner == rank]
        values = torch.cat([self._move_momentum(*member).bfloat16().flatten() for member in members])
        apart = any(piece.holder != piece.owner for piece in pieces)
        if apart:
            values = _exchange(values, held, owned, ranks)
        values = orthogonalise(values.view(-1, *shape), *options).flatten()
        if apart:
            values = _exchange(values, owned, held, ranks)
        shards = [local_tensor(parameter) for parameter, _ in members]
        for weights, update, (_, group) in zip(shards, values.split([s.numel() for s in shards]), members, strict=True):
            moved = weights * (1 - group["lr"] * group["weight_decay"])
            # As large as AdamW's updates are: 0.2 root mean square (torch's match_rms_adamw).
            moved.add_(update.view_as(weights), alpha=-group["lr"] * 0.2 * math.sqrt(max(shape)))
            self._write(weights, moved)

    def _move_momentum(self, parameter: nn.Parameter, group: dict[str, Any]) -> Tensor:
        """This rank's rows of what is to be orthogonalised."""
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        assert parameter.grad is not None
        gradient, buffer = local_tensor(parameter.grad), local_tensor(state["momentum_buffer"])
        moved = buffer.lerp(gradient, 1 - group["momentum"])
        self._write(buffer, moved)
        return gradient.lerp(moved, group["momentum"]) if group["nesterov"] else moved

    def _write(self, target: Tensor, value: Tensor) -> None:
        target.copy_(value if self.found_inf is None else torch.where(self.found_inf.bool(), target, value))


def shard_group(tensor: Tensor) -> dist.ProcessGroup | None:
    """The ranks over which `tensor` is split; None if this rank has all of it. FSDP2 shards over one mesh dimension."""
    if not isinstance(tensor, DTensor):
        return None
    dims = [dim for dim, placement in enumerate(tensor.placements) if placement.is_shard()]
    assert len(dims) <= 1, tensor.placements
    return tensor.device_mesh.get_group(dims[0]) if dims else None


def orthogonalise(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """About U V^T of each of `matrices` [B, R, C] = U S V^T: `steps` quintic Newton-Schulz iterations in their dtype.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/.
    """
    a, b, c = coefficients
    tall = matrices.shape[1] > matrices.shape[2]
    X = matrices.mT if tall else matrices  # the Gram matrices are then the small ones
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), X, beta=a)
    return X.mT if tall else X


# -- who owns what -------------------------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """Rows that one rank holds, of blocks that one rank owns; `numel` numbers."""

    holder: int
    owner: int
    numel: int


def _block_shape(parameter: nn.Parameter, group: dict[str, Any]) -> tuple[int, int]:
    rows = group.get("block_rows", len(parameter))
    assert len(parameter) % rows == 0, (parameter.shape, rows)
    return rows, parameter.shape[1]


def _rounds(members: list[Member], block_rows: int, ranks: int) -> Iterator[list[Member]]:
    """Parameters that take their step together: enough to keep all ranks busy, and an equal number of blocks for each."""
    some, rows, numbers = list[Member](), 0, 0
    for member in members:
        some.append(member)
        rows, numbers = rows + len(member[0]), numbers + member[0].numel()
        if numbers >= _AT_ONCE * ranks and rows // block_rows % ranks == 0:
            yield some
            some, rows, numbers = [], 0, 0
    if some:
        yield some


@cache
def _plan(lengths: tuple[int, ...], block_rows: int, columns: int, ranks: int) -> list[Piece]:
    """All blocks of parameters of so many rows, block after block, cut where shards end.

    Rows are sharded as torch.chunk does it: the last ranks have fewer, or none.
    """
    quota = -(-sum(lengths) // block_rows // ranks)
    owned = [0] * ranks
    pieces = []
    for length in lengths:
        most = -(-length // ranks)
        for first in range(0, length, block_rows):
            end = first + block_rows
            owner = first // most
            if owned[owner] == quota:
                owner = owned.index(min(owned))
            owned[owner] += 1
            for holder in range(first // most, (end - 1) // most + 1):
                held = min(end, (holder + 1) * most) - max(first, holder * most)
                pieces.append(Piece(holder, owner, held * columns))
    runs = itertools.groupby(pieces, attrgetter("holder", "owner"))  # what lies together travels together
    return [Piece(*ends, sum(piece.numel for piece in run)) for ends, run in runs]


class Part(NamedTuple):
    """Numbers that lie together here, and the rank that they go to or come from."""

    rank: int
    numel: int


def _exchange(values: Tensor, here: Sequence[Part], there: Sequence[Part], ranks: dist.ProcessGroup | None) -> Tensor:
    """Sends the parts `here`, which `values` consists of, and returns the parts `there` one after another, both flat."""
    assert ranks is not None
    nothing = values.new_empty(0)
    parts = values.split([part.numel for part in here])
    sent = torch.cat([nothing, *(parts[i] for i in _by_rank(here))])
    received = values.new_empty(sum(part.numel for part in there))
    sizes = [[sum(part.numel for part in side if part.rank == rank) for rank in range(ranks.size())] for side in (there, here)]
    dist.all_to_all_single(received, sent, sizes[0], sizes[1], group=ranks)
    order = _by_rank(there)
    arrived = dict(zip(order, received.split([there[i].numel for i in order]), strict=True))
    return torch.cat([nothing, *(arrived[i] for i in range(len(there)))])


def _by_rank(parts: Sequence[Part]) -> list[int]:
    return sorted(range(len(parts)), key=lambda i: parts[i].rank)
