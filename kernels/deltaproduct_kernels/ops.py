"""The chunked recurrence as torch.library custom operators: one node for the compiler and for checkpointing policies.

Each operator has a fake kernel (shapes without data), the forward has autograd whose backward is an operator itself, and
both have FLOP formulas that count what the algorithm executes, so that torch's FlopCounterMode sees them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from deltaproduct_kernels.chunked import chunk_tokens, chunked_backward, chunked_forward, max_chunks
from deltaproduct_kernels.recurrent import compute_dtype
from deltaproduct_kernels.transforms import refuse_vmap


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
    return chunked_forward(q, k, v, beta, g, initial_state, cu_seqlens, scale, erase)


@chunk.register_fake
def _(q, k, v, beta, g, initial_state, cu_seqlens, scale, erase):  # type: ignore[no-untyped-def]
    (B, T, n, H, dv), dk = v.shape, k.shape[-1]
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


class Product(NamedTuple):
    """A matrix product [M, K] [K, N] for a chunk and head. `share` of it is needed: the rest are pairs out of sight."""

    equation: str
    M: int
    N: int
    K: int
    share: float = 1.0

    @property
    def flops(self) -> int:
        return 2 * self.M * self.N * self.K


def products(C: int, n: int, dk: int, dv: int, *, erase: bool, backward: bool) -> list[Product]:
    """The products of a chunk of C tokens by the equations in `chunked.py`; substitution (3, 7) is none."""
    R = C * n
    reads = C + R if erase else C
    queries, keys = n * C * (C + 1) / 2, R * (R - 1) / 2 if erase else 0
    seen, by_queries = (queries + keys) / (reads * R), queries / (C * R)
    F = Product("(1) F = D o (Y K^T)", reads, R, dk, seen)
    if not backward:
        return [
            F,
            Product("(2) Z = Y S", reads, dv, dk),
            Product("(4) o = e z + F u", C, dv, R, by_queries),
            Product("(5) S' = e S + K^T u", dk, dv, R),
        ]
    return [
        F,
        *([Product("(2) Z of keys again", R, dv, dk)] if erase else []),
        Product("(6) W = K dS'", R, dv, dk),
        Product("(6) W += F^T dO", R, dv, C, by_queries),
        Product("(9) dF = D o (G u^T)", reads, R, dv, seen),
        Product("(10) dY = e (G S^T)", reads, dk, dv),
        Product("(10) dY += dF K", reads, dk, R, seen),
        Product("(11) dK += dF^T Y", R, dk, reads, seen),
        Product("(11) dK += u dS'^T", R, dk, dv),
        Product("(12) dS = e dS' + Y^T G", dk, dv, reads),
    ]


def executed_flops(k: torch.Size, v: torch.Size, chunks: int, *, erase: bool, backward: bool) -> int:
    """FLOPs of the matrix products of the chunked algorithm (2 a multiply-add), each counted whole.

    Substitution and elementwise work are left out, as FlopCounterMode leaves them out. The kernel in C does only the blocks of
    a product that hold pairs that see each other.

    Args:
        k, v: shapes [B,T,n,G,dk] and [B,T,n,H,dv].
        chunks: how many chunks there are (`max_chunks`); one that is not full counts whole.
        erase: False for gated linear attention.
        backward: the backward operator, which computes the updates again, instead of the forward.
    """
    (n, H, dv), dk = v[2:], k[-1]
    parts = products(chunk_tokens(n, dk), n, dk, dv, erase=erase, backward=backward)
    return sum(product.flops for product in parts) * H * chunks


def _shape(x: Any) -> torch.Size:
    return x.shape if isinstance(x, Tensor) else x


@register_flop_formula(torch.ops.deltaproduct.chunk)
def _chunk_flops(q, k, v, beta, g, initial_state, cu_seqlens, scale, erase, *args, out_shape=None, **kwargs):  # type: ignore[no-untyped-def]
    sequences = None if cu_seqlens is None else _shape(cu_seqlens)[0] - 1
    return executed_flops(k, v, max_chunks(k[0], k[1], k[2], k[4], sequences), erase=erase, backward=False)


@register_flop_formula(torch.ops.deltaproduct.chunk_backward)
def _chunk_backward_flops(do, dfinal, q, k, v, beta, g, states, cu_seqlens, scale, erase, *args, out_shape=None, **kwargs):  # type: ignore[no-untyped-def]
    return executed_flops(k, v, states[0], erase=erase, backward=True)
