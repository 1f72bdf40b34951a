"""Which bytes a rank exchanges with which others: every collective, as the operators of torch.distributed show it.

The same function reads the operators of a step on fake tensors and of a real one, so that a test can compare the two. The
number counted is what one rank sends in the ring algorithm: (n - 1)/n of the whole for an all-gather or a reduce-scatter,
twice that for an all-reduce (Patarasuk and Yuan 2009); of a shift, in which every rank has at most one message and one rank
to send it to, the message. How long it takes is speed.py's business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

# Operators of c10d and of its functional form, and what they are. Each is (kind, index of the argument with all the data;
# None: the result).
_OPERATORS: dict[str, tuple[str, int | None]] = {
    "_allgather_base_": ("all-gather", 0),
    "allgather_": ("all-gather", 0),
    "all_gather_into_tensor": ("all-gather", None),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "reduce_scatter_": ("reduce-scatter", 1),
    "reduce_scatter_tensor": ("reduce-scatter", 0),
    "allreduce_": ("all-reduce", 0),
    "all_reduce": ("all-reduce", 0),
    "all_reduce_": ("all-reduce", 0),
    "alltoall_base_": ("all-to-all", 1),
    "all_to_all_single": ("all-to-all", 0),
    "send": ("send", 0),
    "broadcast_": ("broadcast", 0),
}
_NAMESPACES = frozenset({"c10d", "_c10d_functional", "c10d_functional"})
SMALL = 4096
"""Bytes up to which a collective is of numbers, not of tensors."""


@dataclass(frozen=True)
class Collective:
    """One call, as one rank sees it."""

    kind: str
    size: int
    """Bytes of the whole: gathered, to be scattered, reduced, exchanged or sent; of a shift, of one message."""
    ranks: tuple[int, ...]
    phase: str
    micro: int
    """Index of the micro-batch."""
    inside: bool = False
    """Whether one of our operators makes it within: the exchanges of context parallelism."""

    @property
    def purpose(self) -> str:
        """What for, in the words of FSDP."""
        if self.inside:
            return "context parallelism"
        if self.kind == "all-reduce" and self.size <= SMALL:
            return "counts, norm and loss"
        if self.phase == "optimizer":
            return "optimizer"
        return {
            "all-gather": "all-gather of parameters",
            "reduce-scatter": "reduce-scatter of gradients",
            "all-reduce": "all-reduce of gradients between replicas",
        }.get(self.kind, self.kind)

    @property
    def sent(self) -> float:
        """Bytes this rank sends in a ring."""
        n = len(self.ranks)
        if n == 1:
            return 0.0
        share = {"all-reduce": 2 * (n - 1) / n, "send": 1.0, "broadcast": 1.0, "shift": 1.0}.get(self.kind, (n - 1) / n)
        return self.size * share


def collective_of(func: Any, args: Any, out: Any, phase: str = "", micro: int = 0) -> Collective | None:
    """What `func`, called with `args`, exchanges; None for an operator that exchanges nothing."""
    if func.namespace not in _NAMESPACES or (found := _OPERATORS.get(func._opname)) is None:
        return None
    (kind, index), ranks = found, _ranks(args)
    if func._opname == "alltoall_base_" and all(_to_one_other(sizes, ranks) for sizes in args[3:5]):
        # The first rank only sends, the last only receives: all wait for a message of either's size.
        return Collective("shift", max(_bytes(args[0]), _bytes(args[1])), ranks, phase, micro)
    return Collective(kind, _bytes(out if index is None else args[index]), ranks, phase, micro)


def _to_one_other(sizes: list[int], ranks: tuple[int, ...]) -> bool:
    """Whether of these, one for each rank, at most one is not 0, and that is not this rank's own."""
    return len(sizes) > 0 and max(sizes) == sum(sizes) and sizes[ranks.index(dist.get_rank())] == 0


def _bytes(tree: Any) -> int:
    if isinstance(tree, (list, tuple)):
        return sum(_bytes(branch) for branch in tree)
    return tree.numel() * tree.element_size()


def _ranks(args: Any) -> tuple[int, ...]:
    """Of the process group among `args`, an object for c10d and a name for its functional form."""
    for argument in args:
        if isinstance(argument, str) and argument not in ("sum", "avg", "max", "min"):
            return tuple(dist.get_process_group_ranks(dist.distributed_c10d._resolve_process_group(argument)))  # type: ignore[arg-type]
        if type(argument).__name__ == "ScriptObject" and "ProcessGroup" in str(argument._type()):
            return tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(argument)))
    return (0,)
