"""What a layer computes row by row, on a CPU in one pass over memory: `front_end`'s convolution, and the norm.

Each is a torch.library custom operator over a kernel in C (front_end.c, norm.c); other devices, and machines without a
compiler, have torch operations. Nothing is kept for the backward pass but the inputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaproduct_kernels import native
from deltaproduct_kernels.recurrent import compute_dtype
from deltaproduct_kernels.transforms import refuse_forward_mode, refuse_vmap

L2_EPS = 1e-6
MOST_UNIT = 512
"""Channels of a head that front_end.c holds."""
_SPAN = 128
"""Tokens that one thread takes at a time. Gradients of weights are added up in this order whatever the number of threads is."""


# -- convolution, SiLU, unit length ------------------------------------------------------------------------------------------


def torch_convolution(x: Tensor, weight: Tensor | None, position: Tensor | None, tail: Tensor | None, unit: int) -> Tensor:
    """`convolution` by torch operations, in float32 at least; `tail` [B, W - 1, channels] are the tokens before x."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if weight is not None:
        T, W = x.shape[1], weight.shape[-1]
        padded = F.pad(x, (0, 0, W - 1, 0)) if tail is None else torch.cat([tail.to(x.dtype), x], 1)
        taps = weight.to(torch.promote_types(weight.dtype, torch.float32))[:, 0].unbind(-1)
        x = x * taps[-1]
        for back in range(1, W):
            earlier = padded[:, W - 1 - back : W - 1 - back + T] * taps[W - 1 - back]
            if position is not None:
                earlier = torch.where((position >= back)[:, None], earlier, 0)
            x = x + earlier
    y = F.silu(x)
    if unit:
        heads = y.unflatten(-1, (-1, unit))
        y = (heads * torch.rsqrt(heads.square().sum(-1, keepdim=True) + L2_EPS)).flatten(-2)
    return y


def convolution(x: Tensor, weight: Tensor | None, position: Tensor | None, tail: Tensor | None, unit: int) -> Tensor:
    """silu of a causal depthwise convolution; each `unit` channels then divided by their length sqrt(|y|^2 + 1e-6).

    Args:
        x: [B, T, channels]; any float dtype, as the result.
        weight: [channels, 1, W] as in nn.Conv1d; None: no convolution.
        position: [T] of each token in its document; None: a row is one document.
        tail: [B, W - 1, channels], the tokens before x; None: there are none.
        unit: 0: lengths stay as they are.
    """
    if tail is None and unit <= MOST_UNIT and in_c(x):
        refuse_forward_mode("front_end's backend 'torch'", x, weight)
        return _convolution(x, weight, position, unit)
    return torch_convolution(x, weight, position, tail, unit).to(x.dtype)


def in_c(x: Tensor) -> bool:
    return x.device.type == "cpu" and _has_library(compute_dtype(x.dtype))


@torch.compiler.assume_constant_result
def _has_library(dtype: torch.dtype) -> bool:
    return native.available(torch.device("cpu"), dtype)


@torch.library.custom_op("deltaproduct::convolution", mutates_args=())
def _convolution(x: Tensor, weight: Tensor | None, position: Tensor | None, unit: int) -> Tensor:
    dtype = compute_dtype(x.dtype)
    y = x.new_empty(x.shape, dtype=dtype)
    _convolve(x, weight, position, unit, y=y)
    return y.to(x.dtype)


@_convolution.register_fake
def _(x, weight, position, unit):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


@torch.library.custom_op("deltaproduct::convolution_backward", mutates_args=())
def _convolution_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, position: Tensor | None, unit: int
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight (empty without one)."""
    dtype = compute_dtype(x.dtype)
    dx = x.new_empty(x.shape, dtype=dtype)
    taps = 1 if weight is None else weight.shape[-1]
    parts = None if weight is None else x.new_zeros(_tasks(x), taps, x.shape[-1], dtype=dtype)
    _convolve(x, weight, position, unit, d_y=dy.to(dtype).contiguous(), d_x=dx, d_weight=parts)
    if parts is None or weight is None:
        return dx.to(x.dtype), x.new_empty(0)
    return dx.to(x.dtype), parts.sum(0).flip(0).T[:, None].to(weight.dtype).contiguous()


@_convolution_backward.register_fake
def _(dy, x, weight, position, unit):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), x.new_empty(0) if weight is None else weight.new_empty(weight.shape)


def _tasks(x: Tensor) -> int:
    return x.shape[0] * -(-x.shape[1] // _SPAN)


def _convolve(x: Tensor, weight: Tensor | None, position: Tensor | None, unit: int, **tensors: Tensor | None) -> None:
    dtype, (_, T, C) = compute_dtype(x.dtype), x.shape
    taps = x.new_ones(1, C, dtype=dtype) if weight is None else weight.to(dtype)[:, 0].flip(-1).T.contiguous()
    native.run(
        "convolve_all",
        dtype,
        tasks=_tasks(x),
        tokens=T,
        span=_SPAN,
        channels=C,
        taps=len(taps),
        unit=unit,
        eps=L2_EPS,
        position=None if position is None else position.to(torch.int64).contiguous(),
        x=x.to(dtype).contiguous(),
        weight=taps,
        **tensors,
    )


def _save_convolution(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, position, ctx.unit = inputs
    ctx.save_for_backward(x, weight, position)


def _convolution_gradients(ctx: Any, dy: Tensor) -> tuple:
    x, weight, position = ctx.saved_tensors
    dx, dw = _convolution_backward(dy, x, weight, position, ctx.unit)
    return dx, None if weight is None else dw, None, None


_convolution.register_autograd(_convolution_gradients, setup_context=_save_convolution)
refuse_vmap(_convolution, "front_end")


# -- the norm ------------------------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """torch.nn.functional.rms_norm over the last dimension: x / sqrt(mean x^2 + eps) * weight, for x [..., size]."""
    if x.dtype == weight.dtype and x.dtype in native.DTYPES and in_c(x):
        return _norm(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


@torch.library.custom_op("deltaproduct::rms_norm", mutates_args=())
def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = x.new_empty(x.shape)
    _normalise(x, weight, eps, y=y)
    return y


@_norm.register_fake
def _(x, weight, eps):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


@torch.library.custom_op("deltaproduct::rms_norm_backward", mutates_args=())
def _norm_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    dx = x.new_empty(x.shape)
    parts = x.new_zeros(_row_tasks(x), len(weight))
    _normalise(x, weight, eps, d_y=dy.contiguous(), d_x=dx, d_weight=parts)
    return dx, parts.sum(0)


@_norm_backward.register_fake
def _(dy, x, weight, eps):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _row_tasks(x: Tensor) -> int:
    return -(-(x.numel() // x.shape[-1]) // _SPAN)


def _normalise(x: Tensor, weight: Tensor, eps: float, **tensors: Tensor) -> None:
    sizes = {"tasks": _row_tasks(x), "rows": x.numel() // x.shape[-1], "span": _SPAN, "size": x.shape[-1]}
    native.run("normalise_all", x.dtype, **sizes, eps=eps, x=x.contiguous(), weight=weight.contiguous(), **tensors)


def _save_norm(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _norm_gradients(ctx: Any, dy: Tensor) -> tuple:
    x, weight = ctx.saved_tensors
    return *_norm_backward(dy, x, weight, ctx.eps), None


_norm.register_autograd(_norm_gradients, setup_context=_save_norm)
refuse_vmap(_norm, "rms_norm")
