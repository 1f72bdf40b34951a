"""The front end as torch.library custom operators; see ops.py, whose rules these follow."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from deltaproduct_kernels.transforms import refuse_vmap
from deltaproduct_kernels.triton_backend.ops import computable


def _kernels() -> ModuleType:
    from deltaproduct_kernels.triton_backend import front_end

    return front_end


@torch.library.custom_op("deltaproduct::front_end", mutates_args=())
def front_end(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    b: Tensor,
    a: Tensor | None,
    wq: Tensor | None,
    wk: Tensor | None,
    wv: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    position: Tensor | None,
    heads: int,
    groups: int,
    max_beta: float,
    beta_stretch: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, beta and g (empty without `a`), as `deltaproduct_kernels.front_end` returns them."""
    tensors = [computable(x) for x in (q, k, v, b, a, wq, wk, wv, A_log, dt_bias, position)]
    *out, beta, g = _kernels().forward(*tensors, heads, groups, max_beta, beta_stretch)
    q_out, k_out, v_out = (y.to(x.dtype) for y, x in zip(out, (q, k, v), strict=True))
    return q_out, k_out, v_out, beta, beta.new_empty(0) if g is None else g


refuse_vmap(front_end, "front_end")


@front_end.register_fake
def _(q, k, v, b, a, wq, wk, wv, A_log, dt_bias, position, heads, groups, max_beta, beta_stretch):  # type: ignore[no-untyped-def]
    B, T, channels = q.shape
    n, dk = k.shape[-1] // channels, channels // groups
    dv = v.shape[-1] // (n * heads)
    beta = q.new_empty(B, T, n, heads, dtype=torch.float32)
    g = beta.new_empty(0) if a is None else beta.new_empty(B, T, heads)
    return q.new_empty(B, T, groups, dk), k.new_empty(B, T, n, groups, dk), v.new_empty(B, T, n, heads, dv), beta, g


@torch.library.custom_op("deltaproduct::front_end_backward", mutates_args=())
def front_end_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dbeta: Tensor,
    dg: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    b: Tensor,
    a: Tensor | None,
    wq: Tensor | None,
    wk: Tensor | None,
    wv: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    position: Tensor | None,
    heads: int,
    groups: int,
    max_beta: float,
    beta_stretch: float,
) -> list[Tensor]:
    """Gradients of q, k, v, b and of those of a, the weights, A_log and dt_bias that are given."""
    inputs = (q, k, v, b, a, wq, wk, wv, A_log, dt_bias)
    tensors = [computable(x) for x in (*inputs, position)]
    grads = tuple(computable(x) for x in (dq, dk, dv, dbeta, dg))
    out = _kernels().backward(grads, *tensors, heads, groups, max_beta, beta_stretch)
    return [d.to(x.dtype) for d, x in zip(out, inputs, strict=True) if x is not None]


@front_end_backward.register_fake
def _(dq, dk, dv, dbeta, dg, q, k, v, b, a, wq, wk, wv, A_log, dt_bias, position, heads, groups, max_beta, beta_stretch):  # type: ignore[no-untyped-def]
    return [x.new_empty(x.shape) for x in (q, k, v, b, a, wq, wk, wv, A_log, dt_bias) if x is not None]


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.heads, ctx.groups, ctx.max_beta, ctx.beta_stretch = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor, dbeta: Tensor, dg: Tensor) -> tuple:
    *inputs, position = ctx.saved_tensors
    dg_given = None if inputs[4] is None else dg
    settings = (ctx.heads, ctx.groups, ctx.max_beta, ctx.beta_stretch)
    given = iter(front_end_backward(dq, dk, dv, dbeta, dg_given, *inputs, position, *settings))
    return *(None if x is None else next(given) for x in inputs), None, None, None, None, None


front_end.register_autograd(_backward, setup_context=_setup_context)
