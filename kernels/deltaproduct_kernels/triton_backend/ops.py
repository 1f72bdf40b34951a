"""The kernels as torch.library custom operators: one node for the compiler and for checkpointing policies.

As in `deltaproduct_kernels.ops`: fake kernels give shapes without data, autograd's backward is an operator itself, and FLOP
formulas count the matrix products that are executed. Triton is imported by the first call. Under TRITON_INTERPRET=1 the same
operators run on the CPU; Triton's interpreter multiplies bfloat16 as raw bits, so here, and only there, such tensors are
computed with as float32.
"""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from deltaproduct_kernels.recurrent import read_offsets
from deltaproduct_kernels.transforms import refuse_vmap
from deltaproduct_kernels.triton_backend import assembler, configs, cost
from deltaproduct_kernels.triton_backend.layout import EVERY, Size


def _launch() -> ModuleType:
    from deltaproduct_kernels.triton_backend import launch

    return launch


def _segments() -> ModuleType:
    from deltaproduct_kernels.triton_backend import segments

    return segments


@torch.library.custom_op("deltaproduct::triton_chunk", mutates_args=())
def triton_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    erase: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o, the final state, and what the backward pass needs: Y, gates and sparse states, empty unless `save`."""
    if cu_seqlens is not None and cu_seqlens.device.type == "cpu":
        read_offsets(cu_seqlens, q.shape[1])  # costs nothing there; on a GPU only on request
    c = computable
    o, final, saved = _launch().forward(
        c(q), c(k), c(v), c(beta), c(g), c(initial_state), cu_seqlens, scale, erase, save, bits(k)
    )
    y, gates, states = saved if save else (x.new_empty(0) for x in saved)
    return o.to(q.dtype), final, y.to(k.dtype), gates, states.to(k.dtype)


@triton_chunk.register_fake
def _(q, k, v, beta, g, initial_state, cu_seqlens, scale, erase, save):  # type: ignore[no-untyped-def]
    size = _size(k, v, g, cu_seqlens, erase)
    H, dk, dv, single = size.H, size.dk, size.dv, torch.float32
    o = q.new_empty(*q.shape[:2], H, dv)
    final = q.new_empty(size.states, H, dk, dv, dtype=single)
    if not save:
        return o, final, k.new_empty(0), k.new_empty(0, dtype=single), k.new_empty(0)
    chunks, saved = size.slots(size.chunk), size.slots(size.chunk * EVERY)
    y = k.new_empty(chunks if erase else 0, H, size.rows, size.rows)
    gates = k.new_empty(0 if g is None else chunks, H, size.rows, dtype=single)
    return o, final, y, gates, k.new_empty(saved, H, dv, dk)


@torch.library.custom_op("deltaproduct::triton_chunk_backward", mutates_args=())
def triton_chunk_backward(
    do: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    y: Tensor,
    gates: Tensor,
    states: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    erase: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, beta, g (empty without a gate) and the initial state."""
    c = computable
    saved = _launch().Saved(c(y), c(gates), c(states))
    *grads, dg, dinitial = _launch().backward(
        c(do), c(dfinal), c(q), c(k), c(v), c(beta), c(g), saved, cu_seqlens, scale, erase, bits(k)
    )
    dq, dk, dv, dbeta = (d.to(x.dtype) for d, x in zip(grads, (q, k, v, beta), strict=True))
    return dq, dk, dv, dbeta, q.new_empty(0) if dg is None or g is None else dg.to(g.dtype), dinitial


@triton_chunk_backward.register_fake
def _(do, dfinal, q, k, v, beta, g, y, gates, states, cu_seqlens, scale, erase):  # type: ignore[no-untyped-def]
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dinitial = q.new_empty(sequences, v.shape[3], q.shape[3], v.shape[4], dtype=torch.float32)
    return (*(x.new_empty(x.shape) for x in (q, k, v, beta)), q.new_empty(0) if g is None else g.new_empty(g.shape), dinitial)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, beta, g, initial_state, cu_seqlens, ctx.scale, ctx.erase, save = inputs
    assert save, "called for a gradient without keeping what it needs"
    ctx.save_for_backward(q, k, v, beta, g, *output[2:], cu_seqlens)
    ctx.state_dtype = None if initial_state is None else initial_state.dtype
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, do: Tensor | None, dfinal: Tensor | None, *_: Tensor | None) -> tuple:
    q, k, v, beta, g, y, gates, states, cu_seqlens = ctx.saved_tensors
    if do is None:
        do = q.new_zeros(*q.shape[:2], *v.shape[3:])
    *grads, dg, dstate = triton_chunk_backward(do, dfinal, q, k, v, beta, g, y, gates, states, cu_seqlens, ctx.scale, ctx.erase)
    dstate = None if ctx.state_dtype is None else dstate.to(ctx.state_dtype)
    return *grads, None if g is None else dg, dstate, None, None, None, None


triton_chunk.register_autograd(_backward, setup_context=_setup_context)
refuse_vmap(triton_chunk, "gated_delta_product")
refuse_vmap(triton_chunk_backward, "gated_delta_product")


@torch.library.custom_op("deltaproduct::triton_decode", mutates_args=())
def triton_decode(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor | None, scale: float, erase: bool
) -> tuple[Tensor, Tensor]:
    """o of a few tokens, and the state after them; no gradients."""
    c = computable
    o, after = _launch().decode(c(q), c(k), c(v), c(beta), c(g), c(state), scale, erase, bits(k))
    return o.to(q.dtype), after


refuse_vmap(triton_decode, "gated_delta_product")


@triton_decode.register_fake
def _(q, k, v, beta, g, state, scale, erase):  # type: ignore[no-untyped-def]
    (B, T, _, dk), (H, dv) = q.shape, v.shape[3:]
    return q.new_empty(B, T, H, dv), q.new_empty(B, H, dk, dv, dtype=torch.float32)


def segment_summary(k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, erase: bool) -> tuple[Tensor, Tensor]:
    """M [B, H, dk, dk] and N [B, H, dk, dv] of S' = M S + N over a row, in float32; no operator and no gradients."""
    c = computable
    return _segments().summary(c(k), c(v), c(beta), c(g), erase, bits(k))


def segment_adjoint(do: Tensor, q: Tensor, k: Tensor, beta: Tensor, g: Tensor | None, scale: float, erase: bool) -> Tensor:
    """The adjoint of the state before a row, [B, H, dk, dv] in float32, for a zero one after it; no operator."""
    c = computable
    return _segments().adjoint(c(do), c(q), c(k), c(beta), c(g), scale, erase, bits(k))


def bits(x: Tensor) -> int:
    """Width of x's dtype: it decides the size of chunks, whatever dtype the interpreter computes with."""
    return x.element_size() * 8


def computable(x: Any) -> Any:
    """A tensor or None: contiguous, and in a dtype that the kernels compute with here."""
    if x is None:
        return None
    if _launch().INTERPRETED and x.dtype == torch.bfloat16:
        x = x.float()
    return x.contiguous()


def check_one_dtype(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises ValueError for tensors that no kernel reads together."""
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ValueError(f"{name} has dtype {x.dtype}, but q {q.dtype}; backend 'triton' takes one dtype for q, k and v")


def why_not(device: torch.device, dtype: torch.dtype | None = None, dk: int | None = None, dv: int | None = None) -> str | None:
    """Why these kernels cannot run this, as the end of a sentence; None if they can."""
    if (reason := _why_not_on(device)) is not None:
        return reason
    if dtype == torch.float64:
        return "q has dtype torch.float64; allowed are float32, bfloat16 and float16"
    if dtype == torch.float32 and dk is not None and dk > 128:
        return f"dk = {dk}; in float32 heads of at most 128 are allowed"
    for name, size in (("dk", dk), ("dv", dv)):
        if size is not None and not 16 <= size <= configs.SIZES[-1]:
            return f"{name} = {size}; heads of 16 to {configs.SIZES[-1]} are allowed"
    return None


@torch.compiler.assume_constant_result  # asked in every layer: the compiler takes the answer and does not look inside
def _why_not_on(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return f"{torch.cuda.get_device_name(device)} is older than Ampere"
        if capability[0] == 9 and (reason := assembler.choose()):
            return reason
        wanted = configs.SHARED_MEMORY[_launch().runner(device).arch]
        shared = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", wanted)
        if shared < wanted:  # consumer chips of the same generations
            name = torch.cuda.get_device_name(device)
            return f"{name} has {shared:,} bytes of shared memory a program; the kernels are set up for {wanted:,}"
    elif not _launch().INTERPRETED:
        return f"it needs a CUDA device, not {device.type!r}"
    return None


def _size(k: Tensor, v: Tensor, g: Tensor | None, cu_seqlens: Tensor | None, erase: bool) -> Size:
    sequences = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    (B, T, n, H, dv), (G, dk) = v.shape, k.shape[3:]
    return Size(B, T, n, H, dk, dv, bits=bits(k), gated=g is not None, erase=erase, sequences=sequences, groups=G)


# get_raw: the tensors themselves, not their shapes alone, as the dtype decides how long chunks are.
@register_flop_formula(torch.ops.deltaproduct.triton_chunk, get_raw=True)
def _chunk_flops(q, k, v, beta, g, state, cu_seqlens, scale, erase, save, *args, out_val=None, **kwargs):  # type: ignore[no-untyped-def]
    return sum(kernel.flops for kernel in cost.forward(_size(k, v, g, cu_seqlens, erase), save=save))


@register_flop_formula(torch.ops.deltaproduct.triton_chunk_backward, get_raw=True)
def _backward_flops(do, dfinal, q, k, v, beta, g, y, gates, states, cu_seqlens, scale, erase, *args, out_val=None, **kwargs):  # type: ignore[no-untyped-def]
    return sum(kernel.flops for kernel in cost.backward(_size(k, v, g, cu_seqlens, erase)))
