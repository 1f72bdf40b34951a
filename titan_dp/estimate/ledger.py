"""A record of one training step on fake tensors: every storage's life, every collective, every operator's work.

`Ledger` sees each operator below autograd. A storage's bytes are counted from the operator that made it until the last
reference is gone, as an allocator would see them. Which part of the memory it belongs to may be learnt later (a gradient is
known as one once the optimizer holds it), because the peak is found by replaying the record when the step is over. Our own
operators are one node each to it, so what they allocate within is counted once per shape, by running their code on tensors
without data. What no operator shows is left out: scratch space inside ATen's and the vendors' kernels, allocators, libraries.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from titan_dp.estimate.collectives import Collective, collective_of

PARAMETERS, GRADIENTS, OPTIMIZER, GATHERED = "parameters (sharded)", "gradients", "optimizer state", "gathered parameters"
ACTIVATIONS, RECURRENCE, LOSS, OTHER = "activations", "recurrence", "loss head", "temporary and other"
PARTS = (PARAMETERS, GRADIENTS, OPTIMIZER, GATHERED, ACTIVATIONS, RECURRENCE, LOSS, OTHER)

_SILENT = frozenset({"prim", "profiler"})
_OURS = frozenset({"deltaproduct", "titan_dp"})
_NO_TRAFFIC = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"})

# Operators that a softmax layer runs as: which argument the queries are, and how many products of pairs there are.
_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default: (0, 2),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default: (1, 5),  # one of them computed again
}


@dataclass(frozen=True)
class Work:
    """What one operator asks of the chip."""

    phase: str
    kind: str  # matmul, recurrence, front end, other
    flops: int
    bytes: int
    micro: int


@dataclass(frozen=True)
class Peak:
    """The moment of a step with the most bytes."""

    bytes: int
    phase: str
    parts: dict[str, int]


class Ledger(TorchDispatchMode):
    """Records while it is entered.

    Attributes:
        phase: what the step is doing: forward, backward or optimizer.
        part: of the memory, where new storages belong unless something else is known of them.
        micro: index of the micro-batch.
    """

    def __init__(self, ignored: list[Tensor] | None = None) -> None:
        super().__init__()
        self.enter("")
        self.work: list[Work] = []
        self.collectives: list[Collective] = []
        self._events: list[tuple[int, int, str]] = []  # storage, change in bytes, phase
        self._parts: list[str] = []  # of each storage
        self._live: dict[int, tuple[int, int, Any]] = {}  # address -> storage, bytes, weak reference
        self._inside: dict[Any, tuple[int, list[Collective]]] = {}  # call of one of our operators -> peak bytes, exchanges
        for tensor in ignored or ():
            self._live[tensor.untyped_storage()._cdata] = (-1, 0, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # its own dispatch comes first; what it does to local tensors is seen here
        if func.namespace in _SILENT:
            return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:  # a fake tensor has no value; none decides what is allocated
            return 1.0 if args[0].is_floating_point() else 1
        if func.namespace in _OURS:
            self._look_inside(func, args, kwargs)
        out = func(*args, **kwargs)
        inputs, outputs = list(_tensors((*args, *kwargs.values()))), list(_tensors(out))
        part = self._part_of(func)
        for tensor in outputs:
            self._born(tensor, part)
        self._learn(func, args, kwargs)
        if (found := collective_of(func, args, out, self.phase, self.micro)) is not None:
            self.collectives.append(found)
        elif not func.is_view and func._opname not in _NO_TRAFFIC:
            self._add_work(func, args, kwargs, out, inputs + outputs)
        return out

    def enter(self, phase: str, part: str = OTHER, micro: int = -1) -> None:
        """From now on the step is at `phase`, and new storages belong to `part`; micro -1 stands for the whole step."""
        self.phase, self.part, self.micro = phase, part, micro

    # -- storages ----------------------------------------------------------------------------------------------------

    def _born(self, tensor: Tensor, part: str) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._live:
            return
        number = len(self._parts)
        self._parts.append(part)
        self._live[address] = (number, storage.nbytes(), weakref.ref(storage, lambda _: self._died(address)))
        self._events.append((number, storage.nbytes(), self.phase))

    def _died(self, address: int) -> None:
        number, size, _ = self._live.pop(address)
        self._events.append((number, -size, self.phase))

    def _resized(self, storage: Any) -> None:
        """FSDP2 frees and allocates gathered parameters by resizing their storages; nobody else resizes any."""
        if (known := self._live.get(storage._cdata)) is None or known[0] < 0:
            return
        number, size, reference = known
        self._live[storage._cdata] = (number, storage.nbytes(), reference)
        self._events.append((number, storage.nbytes() - size, self.phase))
        self._parts[number] = GATHERED

    @contextmanager
    def watching_resizes(self) -> Iterator[None]:
        """Within it, `UntypedStorage.resize_` is recorded, which is not an operator."""
        original: Callable[..., Any] = torch.UntypedStorage.resize_

        def resize(storage: Any, size: int) -> Any:
            result = original(storage, size)
            self._resized(storage)
            return result

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = original  # type: ignore[method-assign]

    # -- parts -------------------------------------------------------------------------------------------------------

    def belongs(self, tensor: Tensor, part: str) -> None:
        """`tensor`, or this rank's shard of it, is of `part`, whatever it was taken for."""
        local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        known = self._live.get(local.untyped_storage()._cdata)
        if known is not None and known[0] >= 0:
            self._parts[known[0]] = part

    def _part_of(self, func: Any) -> str:
        if _is_recurrence(func):
            return RECURRENCE
        if self.phase == "backward":  # gradients are computed without grad mode, recomputed activations with it
            return ACTIVATIONS if torch.is_grad_enabled() else OTHER
        return self.part

    def _learn(self, func: Any, args: Any, kwargs: Any) -> None:
        """Arguments of FSDP2's operators tell what they are."""
        name = func._opname
        if name == "_allgather_base_" and self.phase in ("forward", "backward"):
            self.belongs(args[0], GATHERED)
        elif name == "chunk_cat":
            for tensor in (*args[0], *_tensors(kwargs.get("out"))):
                self.belongs(tensor, GRADIENTS)
        elif name == "_reduce_scatter_base_":
            self.belongs(args[0], GRADIENTS)

    # -- our own operators ----------------------------------------------------------------------------------------------

    def _look_inside(self, func: Any, args: Any, kwargs: Any) -> None:
        """Record the most that the operator holds at once, its results included, as if allocated and freed at once."""
        key = (func, *(_signature(x) for x in (*args, *kwargs.values())))
        if key not in self._inside:
            with unset_fake_temporarily():  # on the meta device, which lets the code compute with numbers of its own
                shapes = [_on_meta(x) for x in args]
                with (inner := Ledger(ignored=list(_tensors(shapes)))):
                    results = _implementation(func)(*shapes, **kwargs)
                self._inside[key] = inner.peak().bytes, inner.collectives
                del results
        most, collectives = self._inside[key]
        number = len(self._parts)
        self._parts.append(self._part_of(func))
        self._events += [(number, most, self.phase), (number, -most, self.phase)]
        self.collectives += [replace(c, phase=self.phase, micro=self.micro, inside=True) for c in collectives]

    # -- work ----------------------------------------------------------------------------------------------------------

    def _add_work(self, func: Any, args: Any, kwargs: Any, out: Any, touched: list[Tensor]) -> None:
        formula = flop_registry.get(func._overloadpacket)
        if func in _ATTENTION:
            flops = _attention_flops(func, args)
        else:
            flops = int(formula(*args, **kwargs, out_val=out)) if formula is not None else 0
        kernel = "recurrence" if _is_recurrence(func) else "front end" if "front_end" in func._opname else None
        kind = kernel or ("matmul" if flops else "other")
        moved = sum(t.numel() * t.element_size() for t in touched)
        self.work.append(Work(self.phase, kind, flops, moved, self.micro))

    # -- results -------------------------------------------------------------------------------------------------------

    def mark(self) -> int:
        """A place in the record, for `peak`."""
        return len(self._events)

    def peak(self, since: int = 0) -> Peak:
        """The most bytes at once after `since`."""
        total = most = at = 0
        for i, (_, change, _) in enumerate(self._events):
            total += change
            if i >= since and total > most:
                most, at = total, i
        parts = dict.fromkeys(PARTS, 0)
        for number, change, _ in self._events[: at + 1]:
            parts[self._parts[number]] += change
        return Peak(most, self._events[at][2] if self._events else "", parts)


def _attention_flops(func: Any, args: Any) -> int:
    """Of softmax attention on fake CPU tensors, which torch's registry leaves out; under a causal mask half of the pairs.

    Args:
        args: begin with query [B, H, T, d], key and value; in the backward pass after the gradient of the output.
    """
    first, products = _ATTENTION[func]
    query, key = args[first : first + 2]
    named = dict(zip((a.name for a in func._schema.arguments), args, strict=False))
    pairs = query.shape[-2] * key.shape[-2] // (2 if named.get("is_causal") else 1)
    return products * 2 * query.shape[0] * query.shape[1] * pairs * query.shape[-1]  # type: ignore[no-any-return]


def _is_recurrence(func: Any) -> bool:
    """Or what ranks exchange for it; not the norm and the convolution, which are operators of their own on a CPU."""
    return func.namespace == "titan_dp" or (func.namespace == "deltaproduct" and "chunk" in func._opname)


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for branch in tree:
            yield from _tensors(branch)


def _signature(argument: Any) -> Any:
    """What of an argument decides which tensors an operator allocates."""
    if isinstance(argument, Tensor):
        return tuple(argument.shape), argument.stride(), argument.dtype
    return tuple(argument) if isinstance(argument, list) else argument


def _on_meta(argument: Any) -> Any:
    if not isinstance(argument, Tensor):
        return argument
    return torch.empty_strided(argument.shape, argument.stride(), dtype=argument.dtype, device="meta")


def _implementation(func: Any) -> Callable[..., Any]:
    """The Python code of one of our operators.

    Document boundaries are values, which tensors without data lack: torch's backend, which reads them, is shown one document.
    """
    code = OPDEFS[func._overloadpacket._qualified_op_name]._init_fn
    if func not in (torch.ops.deltaproduct.chunk.default, torch.ops.deltaproduct.chunk_backward.default):
        return code
    position = [argument.name for argument in func._schema.arguments].index("cu_seqlens")
    return lambda *args: code(*args[:position], None, *args[position + 1 :])
