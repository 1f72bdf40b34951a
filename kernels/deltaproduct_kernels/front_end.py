"""From projections to the recurrence's inputs: short convolution, SiLU, unit length, step sizes and log decays.

`front_end` is the one entry point. Its torch code is the definition and runs anywhere; on a GPU one Triton kernel forward
and one backward do the same, reading the projections once and keeping nothing but them (triton_backend/front_end.py). Both
compute in float32 (float64 for float64 inputs) and round each result once. The values of `position` are not looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaproduct_kernels import rows
from deltaproduct_kernels.interface import beside, resolve_backend
from deltaproduct_kernels.transforms import refuse_forward_mode
from deltaproduct_kernels.triton_backend import front_end_ops
from deltaproduct_kernels.triton_backend.ops import check_one_dtype

MAX_TAPS = 8
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int32, torch.int64)


def front_end(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    b: Tensor,
    a: Tensor | None,
    conv_weights: Sequence[Tensor] | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    *,
    heads: int,
    groups: int | None = None,
    max_beta: float,
    beta_stretch: float = 0.0,
    position: Tensor | None = None,
    tails: Sequence[Tensor] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Queries and keys of unit length, values, step sizes and log decays, from a layer's projections.

        y_t = silu(sum_back weight[:, 0, W - 1 - back] x_(t - back)), over the tokens of t's own document
        q, k = y / sqrt(|y|^2 + 1e-6);  v = y;  g = -exp(A_log) softplus(a + dt_bias)
        beta = max_beta clamp((1 + 2 s) sigmoid(b) - s, 0, 1), with s = beta_stretch

    Args:
        q: [B, T, G dk]; any float dtype, as all others.
        k: [B, T, n G dk], laid out (n, groups, dim).
        v: [B, T, n H dv], likewise.
        b: [B, T, n H].
        a: [B, T, H]; None: no decay.
        conv_weights: of q, k and v, [channels, 1, W] each with W from 2 to 8, as in nn.Conv1d; None or empty: no convolution.
        A_log, dt_bias: [H] (Gated DeltaNet, arXiv 2412.06464); None exactly if `a` is.
        heads: H.
        groups: G, the heads of q and k, of which H is a multiple; None: H.
        max_beta: 1, or 2 for transitions with negative eigenvalues.
        beta_stretch: from 0 to 1. Above 0 finite b reach both ends (the stretched sigmoid of Louizos et al. 2018, arXiv
            1712.01312, section 2.3); beyond them their gradient is 0.
        position: [T] int32 or int64, index of each token in its document, for packed rows (B must be 1); None: one document
            a row.
        tails: the W - 1 tokens before q, k and v [B, W - 1, channels], as when decoding; None or empty: there are none.
        backend: as in `gated_delta_product`; 'recurrent' and 'torch' are the same here. 'triton' takes no tails and one
            dtype for q, k and v; with tails, 'auto' is 'torch'.

    Returns:
        q [B, T, G, dk], k [B, T, n, G, dk], v [B, T, n, H, dv] in their projections' dtypes; beta [B, T, n, H] and
        g [B, T, H] or None in float32 (float64 for float64 inputs).

    Raises:
        ValueError: for shapes, dtypes, devices or a backend that do not fit; names the argument.
    """
    weights, before = tuple(conv_weights or ()), tuple(tails or ())
    G = heads if groups is None else groups
    B, T, n, H, dk, dv = _check(q, k, v, b, a, weights, A_log, dt_bias, heads, G, max_beta, beta_stretch, position, before)
    if before and backend == "auto":
        backend = "torch"
    chosen = resolve_backend(beside(backend), q.device, q.dtype, dk, dv)
    if chosen == "triton":
        _check_triton(q, k, v, b, a, weights, A_log, dt_bias, before)
        refuse_forward_mode("front_end's backend 'triton'", q, k, v, b, a, *weights, A_log, dt_bias)
        taps = weights or (None, None, None)
        *out, g = front_end_ops.front_end(q, k, v, b, a, *taps, A_log, dt_bias, position, heads, G, max_beta, beta_stretch)
        q, k, v, beta = out
        return q, k, v, beta, None if a is None else g
    convolve = rows.convolution if chosen == "torch" else rows.torch_convolution
    q_out, k_out, v_out = (
        convolve(x, weight, position, tail, unit).to(x.dtype)
        for x, weight, tail, unit in zip((q, k, v), weights or [None] * 3, before or [None] * 3, (dk, dk, 0), strict=True)
    )
    beta = _upcast(b).sigmoid()
    if beta_stretch:
        beta = ((1 + 2 * beta_stretch) * beta - beta_stretch).clamp(0, 1)
    beta = max_beta * beta
    g = None
    if a is not None and A_log is not None and dt_bias is not None:
        g = -_upcast(A_log).exp() * F.softplus(_upcast(a) + dt_bias)
    return (
        q_out.view(B, T, G, dk),
        k_out.view(B, T, n, G, dk),
        v_out.view(B, T, n, H, dv),
        beta.view(B, T, n, H),
        g,
    )


def _upcast(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _Sizes(NamedTuple):
    B: int
    T: int
    n: int
    H: int
    dk: int
    dv: int


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    b: Tensor,
    a: Tensor | None,
    weights: tuple[Tensor, ...],
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    heads: int,
    groups: int,
    max_beta: float,
    beta_stretch: float,
    position: Tensor | None,
    tails: tuple[Tensor, ...],
) -> _Sizes:
    """What every backend asks for. Raises ValueError naming the argument."""
    if heads < 1:
        raise ValueError(f"heads = {heads}; at least 1 is needed")
    if groups < 1 or heads % groups:
        raise ValueError(f"groups = {groups}; expected a divisor of heads = {heads}")
    if not 0 < max_beta <= 2:
        raise ValueError(f"max_beta = {max_beta}; above 0 and up to 2 is allowed")
    if not 0 <= beta_stretch <= 1:
        raise ValueError(f"beta_stretch = {beta_stretch}; from 0 to 1 is allowed")
    if q.dim() != 3 or not q.shape[-1] or q.shape[-1] % groups:
        name = "heads" if groups == heads else "groups"
        raise ValueError(f"q has shape {tuple(q.shape)}; expected [B, T, channels], channels a multiple of {name} = {groups}")
    B, T, channels = q.shape
    if k.dim() != 3 or k.shape[:2] != (B, T) or k.shape[-1] % channels or not 1 <= k.shape[-1] // channels <= 8:
        raise ValueError(f"k has shape {tuple(k.shape)}; expected [{B}, {T}, n * {channels}] with n from 1 to 8 to fit q")
    n = k.shape[-1] // channels
    if v.dim() != 3 or v.shape[:2] != (B, T) or not v.shape[-1] or v.shape[-1] % (n * heads):
        raise ValueError(f"v has shape {tuple(v.shape)}; expected [{B}, {T}, channels], a multiple of n * heads = {n * heads}")
    for name, x in (("A_log", A_log), ("dt_bias", dt_bias)):
        if (x is None) != (a is None):
            raise ValueError(f"{name} is {'missing' if x is None else 'given'}, but a is not: a, A_log and dt_bias go together")
    if position is not None and B != 1:
        raise ValueError(f"position packs documents into one row, but q has B = {B} rows: B must be 1")
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "b": (b, (B, T, n * heads)),
        "a": (a, (B, T, heads)),
        "A_log": (A_log, (heads,)),
        "dt_bias": (dt_bias, (heads,)),
        "position": (position, (T,)),
    }
    W = weights[0].shape[-1] if weights else 1
    if weights and not 2 <= W <= MAX_TAPS:
        raise ValueError(f"conv_weights have W = {W} taps; from 2 to {MAX_TAPS} are allowed")
    if tails and not weights:
        raise ValueError("tails are given, but conv_weights is not: only a convolution looks at earlier tokens")
    for name, tensors, shapes in (
        ("conv_weights", weights, [(x.shape[-1], 1, W) for x in (q, k, v)]),
        ("tails", tails, [(B, W - 1, x.shape[-1]) for x in (q, k, v)]),
    ):
        if tensors and len(tensors) != 3:
            raise ValueError(f"{name} has {len(tensors)} tensors; expected 3, for q, k and v")
        expected |= {f"{name}[{i}]": (x, shape) for i, (x, shape) in enumerate(zip(tensors, shapes, strict=False))}
    for name, (x, shape) in expected.items():
        if x is not None and tuple(x.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; expected {shape} to fit q {tuple(q.shape)}")
    for name, x in {"q": q, "k": k, "v": v, **{name: x for name, (x, _) in expected.items()}}.items():
        allowed = _INTEGERS if name == "position" else _FLOATS
        if x is not None and x.dtype not in allowed:
            raise ValueError(f"{name} has dtype {x.dtype}; expected one of {', '.join(map(str, allowed))}")
        if x is not None and x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, but q is on {q.device}")
    return _Sizes(B, T, n, heads, channels // groups, v.shape[-1] // (n * heads))


def _check_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    b: Tensor,
    a: Tensor | None,
    weights: tuple[Tensor, ...],
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    tails: tuple[Tensor, ...],
) -> None:
    """What its kernels ask for besides: one of them reads q, k and v through the same pointer, and the weights likewise."""
    if tails:
        raise ValueError(
            f"tails are given ({len(tails)} tensors), which backend 'triton' cannot take; choose 'torch' or 'auto'"
        )
    check_one_dtype(q, k, v)
    for i, w in enumerate(weights):
        if w.dtype != weights[0].dtype:
            raise ValueError(
                f"conv_weights[{i}] has dtype {w.dtype}, but conv_weights[0] {weights[0].dtype}; backend 'triton' takes one"
            )
    rest = {"b": b, "a": a, "A_log": A_log, "dt_bias": dt_bias, **{f"conv_weights[{i}]": w for i, w in enumerate(weights)}}
    for name, y in rest.items():
        if y is not None and y.dtype == torch.float64:
            raise ValueError(f"{name} has dtype {y.dtype}; backend 'triton' takes float32, bfloat16 and float16")
