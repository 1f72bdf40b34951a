"""flash-linear-attention's gated delta product as a backend of ours, for comparison and as a refuge where our kernels fail.

What fla computes in its own autograd function is called here as two torch.library operators, as in `deltaproduct_kernels.ops`:
so FSDP, compilers and checkpointing policies treat it as they treat ours. fla is imported by the first call. For n = 1 it is
the same function of fla, although fla has others for it (`chunk_gated_delta_rule`) that may be faster.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from deltaproduct_kernels.chunked import max_chunks
from deltaproduct_kernels.ops import executed_flops
from deltaproduct_kernels.transforms import refuse_vmap
from deltaproduct_kernels.triton_backend import ops as triton_ops

ROWS = 64
"""Steps in fla's chunks, whatever their sizes."""


def _function() -> Any:
    return importlib.import_module("fla.ops.gated_delta_product.chunk").ChunkGatedDeltaProductFunction


@torch.library.custom_op("deltaproduct::fla_chunk", mutates_args=())
def fla_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o, the final state, and what the backward pass needs: gates summed in chunks (empty without) and the inverses A."""
    n = k.shape[2]
    k, v, beta = (x.flatten(1, 2) for x in (k, v, beta))
    o, final, saved = _forward(q, k, v, g, beta, scale, n, initial_state, True, False, cu_seqlens)
    _, _, _, _, _, gates, _, A, *_ = saved
    return o, final, q.new_empty(0, dtype=torch.float32) if gates is None else gates, A


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, tuple]:
    """o and the final state of fla's forward, and what it saved."""
    context = SimpleNamespace()
    context.save_for_backward = lambda *saved: setattr(context, "saved", saved)
    return *_function().forward(context, *arguments), context.saved


@fla_chunk.register_fake
def _(q, k, v, beta, g, initial_state, cu_seqlens, scale):  # type: ignore[no-untyped-def]
    (B, T, n, H, dk), dv = k.shape, v.shape[-1]
    sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    o, final = q.new_empty(B, T, H, dv), q.new_empty(sequences, H, dk, dv, dtype=torch.float32)
    return o, final, q.new_empty((0,) if g is None else (B, T * n, H), dtype=torch.float32), k.new_empty(B, T * n, H, ROWS)


@torch.library.custom_op("deltaproduct::fla_chunk_backward", mutates_args=())
def fla_chunk_backward(
    do: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    gates: Tensor,
    A: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, beta, g and the initial state (the last two empty where there is none)."""
    n, indices = k.shape[2], None
    if cu_seqlens is not None:
        indices = importlib.import_module("fla.ops.utils.index").prepare_chunk_indices(cu_seqlens * n, ROWS)
    shapes = [x.shape for x in (k, v, beta)]
    k, v, beta = (x.flatten(1, 2) for x in (k, v, beta))
    context = SimpleNamespace(
        saved_tensors=(q, None, k, None, v, None if g is None else gates, beta, A, initial_state, cu_seqlens, indices),
        scale=scale,
        use_qk_l2norm_in_kernel=False,
        num_householder=n,
        cp_context=None,
        _fwd_used_autocast=False,  # what torch.amp.custom_fwd notes
        _dtype=None,
    )
    dq, dk, dv, dg, dbeta, _, _, dinitial, *_ = _function().backward(context, do, dfinal)
    dk, dv, dbeta = (d.view(shape) for d, shape in zip((dk, dv, dbeta), shapes, strict=True))
    dg = q.new_empty(0) if g is None else dg.to(g.dtype)
    dinitial = q.new_empty(0) if initial_state is None else dinitial.to(initial_state.dtype)
    return dq, dk, dv, dbeta, dg, dinitial


@fla_chunk_backward.register_fake
def _(do, dfinal, q, k, v, beta, g, initial_state, gates, A, cu_seqlens, scale):  # type: ignore[no-untyped-def]
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (q, k, v, beta, g, initial_state))


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, beta, g, initial_state, cu_seqlens, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, beta, g, initial_state, *output[2:], cu_seqlens)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, do: Tensor | None, dfinal: Tensor | None, *_: Tensor | None) -> tuple:
    q, k, v, beta, g, initial_state, gates, A, cu_seqlens = ctx.saved_tensors
    if do is None:
        do = q.new_zeros(*q.shape[:3], v.shape[-1])
    *grads, dg, dinitial = fla_chunk_backward(do, dfinal, q, k, v, beta, g, initial_state, gates, A, cu_seqlens, ctx.scale)
    return *grads, None if g is None else dg, None if initial_state is None else dinitial, None, None


fla_chunk.register_autograd(_backward, setup_context=_setup_context)
refuse_vmap(fla_chunk, "gated_delta_product")
refuse_vmap(fla_chunk_backward, "gated_delta_product")


def why_not(device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """Why fla cannot run here, as the end of a sentence; None if it can. Triton's interpreter counts as a GPU, for tests."""
    if (reason := _why_not_on(device)) is not None:
        return reason
    if device.type == "cuda" and dtype in (torch.float32, torch.float64):
        return f"q has dtype {dtype}; flash-linear-attention takes bfloat16 and float16"
    return None


@torch.compiler.assume_constant_result  # asked in every layer, as of our own kernels
def _why_not_on(device: torch.device) -> str | None:
    try:
        found = version("fla-core")
    except PackageNotFoundError:
        return "the package flash-linear-attention is not installed"
    if not found.startswith("0.6."):
        return f"it was written for flash-linear-attention 0.6, and fla-core {found} is installed"
    return None if device.type == "cuda" else triton_ops.why_not(device)


@register_flop_formula(torch.ops.deltaproduct.fla_chunk)
def _chunk_flops(q, k, v, beta, g, initial_state, cu_seqlens, scale, *args, out_shape=None, **kwargs):  # type: ignore[no-untyped-def]
    """As of our chunked algorithm; fla's own products differ a little."""
    return _flops(k, v, cu_seqlens, backward=False)


@register_flop_formula(torch.ops.deltaproduct.fla_chunk_backward)
def _backward_flops(do, dfinal, q, k, v, beta, g, initial_state, gates, A, cu_seqlens, scale, *args, out_shape=None, **kwargs):  # type: ignore[no-untyped-def]
    return _flops(k, v, cu_seqlens, backward=True)


def _flops(k: Any, v: Any, cu_seqlens: Any, backward: bool) -> int:
    sequences = None if cu_seqlens is None else cu_seqlens[0] - 1
    return executed_flops(k, v, max_chunks(k[0], k[1], k[2], k[4], sequences), erase=True, backward=backward)
