"""The chunked recurrence as torch.library custom operators: one node for the compiler and for checkpointing policies.

Each operator has a fake kernel (shapes without data), the forward has autograd whose backward is an operator itself, and
both have FLOP formulas that count what the algorithm executes, so that torch's FlopCounterMode sees them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from deltaproduct_kernels.chunked import chunk_tokens, chunked_backward, chunked_forward
from deltaproduct_kernels.recurrent import compute_dtype
from deltaproduct_kernels.transforms import refuse_vmap


def max_chunks(B: int, T: int, n: int, dk: int, sequences: int | None) -> int:
    """Chunks that B rows of T tokens need; for packed sequences a bound that needs no look at their lengths."""
    C = chunk_tokens(n, dk)
    return B * -(-T // C) if sequences is None else T // C + sequences


@torch.library.custom_op("deltaproduct::chunk", mutates_args=())
def chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    erase: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, final state and the states before every chunk (padded to `max_chunks`: a shape known without the data)."""
    o, final, states = chunked_forward(q, k, v, beta, g, initial_state, cu_seqlens, scale, erase)
    bound = max_chunks(k.shape[0], k.shape[1], k.shape[2], k.shape[-1], None if cu_seqlens is None else len(cu_seqlens) - 1)
    if len(states) < bound:
        states = torch.cat([states, states.new_zeros(bound - len(states), *states.shape[1:])])
    return o, final, states


@chunk.register_fake
def _(q, k, v, beta, g, initial_state, cu_seqlens, scale, erase):  # type: ignore[no-untyped-def]
    (B, T, n, H, dk), dv = k.shape, v.shape[-1]
    sequences = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = compute_dtype(q.dtype)
    o = q.new_empty(B, T, H, dv)
    final = q.new_empty(B if sequences is None else sequences, H, dk, dv, dtype=dtype)
    return o, final, q.new_empty(max_chunks(B, T, n, dk, sequences), H, dk, dv, dtype=dtype)


@torch.library.custom_op("deltaproduct::chunk_backward", mutates_args=())
def chunk_backward(
    do: Tensor,
    dfinal: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    states: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    erase: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, beta, g (empty without a gate) and the initial state."""
    dq, dk, dv, dbeta, dg, dstate = chunked_backward(do, dfinal, q, k, v, beta, g, states, cu_seqlens, scale, erase)
    return dq, dk, dv, dbeta, q.new_empty(0) if dg is None else dg, dstate


@chunk_backward.register_fake
def _(do, dfinal, q, k, v, beta, g, states, cu_seqlens, scale, erase):  # type: ignore[no-untyped-def]
    like = torch.empty_like
    contiguous = torch.contiguous_format
    return (
        *(like(x, memory_format=contiguous) for x in (q, k, v, beta)),
        q.new_empty(0) if g is None else like(g, memory_format=contiguous),
        like(dfinal, memory_format=contiguous, dtype=states.dtype),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, beta, g, initial_state, cu_seqlens, ctx.scale, ctx.erase = inputs
    ctx.save_for_backward(q, k, v, beta, g, output[2], cu_seqlens)
    ctx.state_dtype = None if initial_state is None else initial_state.dtype


def _backward(ctx: Any, do: Tensor, dfinal: Tensor, dstates: Tensor) -> tuple:
    q, k, v, beta, g, states, cu_seqlens = ctx.saved_tensors
    *grads, dg, dstate = chunk_backward(do, dfinal, q, k, v, beta, g, states, cu_seqlens, ctx.scale, ctx.erase)
    dstate = None if ctx.state_dtype is None else dstate.to(ctx.state_dtype)
    return *grads, None if g is None else dg, dstate, None, None, None


chunk.register_autograd(_backward, setup_context=_setup_context)
refuse_vmap(chunk, "gated_delta_product")
refuse_vmap(chunk_backward, "gated_delta_product")


def executed_flops(k: torch.Size, v: torch.Size, chunks: int, *, erase: bool, backward: bool) -> int:
    """FLOPs of the matrix products that the chunked algorithm executes (2 a multiply-add).

    The triangular solve and elementwise work are left out, as FlopCounterMode leaves them out.

    Args:
        k, v: shapes [B,T,n,H,dk] and [B,T,n,H,dv].
        chunks: how many chunks there are (`max_chunks`).
        erase: False for gated linear attention.
        backward: the backward operator, which recomputes the chunk-parallel part of the forward, instead of the forward.
    """
    n, H, dk = k[2:]
    dv = v[-1]
    C = chunk_tokens(n, dk)
    R = C * n
    prepare = C * R * dk + (R * R * dk if erase else 0)
    updates = R * R * (dk + dv) if erase else 0
    if not backward:
        serial = R * dk * dv * (2 if erase else 1)
        macs = prepare + updates + serial + C * dk * dv + C * R * dv
    else:
        serial = R * dk * dv * (2 if erase else 1)
        before = C * dk * dv + C * R * dv + (R * R * (dk + dv) if erase else 0)
        after = R * dk * dv * 2 + C * R * dv + C * dk * dv + 2 * C * R * dk  # KS, write; dP; readout; dQ, dK
        after += (R * dk * dv * 2 + R * R * (dv + dk)) if erase else 0  # W S, erased; dL, dK
        macs = prepare + updates + serial + before + after
    return 2 * macs * H * chunks


def _shape(x: Any) -> torch.Size:
    return x.shape if isinstance(x, Tensor) else x


@register_flop_formula(torch.ops.deltaproduct.chunk)
def _chunk_flops(q, k, v, beta, g, initial_state, cu_seqlens, scale, erase, *args, out_shape=None, **kwargs):  # type: ignore[no-untyped-def]
    sequences = None if cu_seqlens is None else _shape(cu_seqlens)[0] - 1
    return executed_flops(k, v, max_chunks(k[0], k[1], k[2], k[4], sequences), erase=erase, backward=False)


@register_flop_formula(torch.ops.deltaproduct.chunk_backward)
def _chunk_backward_flops(do, dfinal, q, k, v, beta, g, states, cu_seqlens, scale, erase, *args, out_shape=None, **kwargs):  # type: ignore[no-untyped-def]
    gate = 0 if g is None else 2 * states[0] * k[3] * chunk_tokens(k[2], k[4]) ** 2 * k[2] * k[4]  # Q K^T again for dg
    return executed_flops(k, v, states[0], erase=erase, backward=True) + gate
