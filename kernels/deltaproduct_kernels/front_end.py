"""From projections to the recurrence's inputs: short convolution, SiLU, unit length, step sizes and log decays.

`front_end` is the one entry point. Its torch code is the definition and runs anywhere; on a GPU one Triton kernel forward
and one backward do the same, reading the projections once and keeping nothing but them (triton_backend/front_end.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaproduct_kernels.interface import resolve_backend
from deltaproduct_kernels.triton_backend import front_end_ops

L2_EPS = 1e-6
MAX_TAPS = 8


def front_end(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    b: Tensor,
    a: Tensor | None,
    conv_weights: Sequence[Tensor],
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    *,
    heads: int,
    max_beta: float,
    position: Tensor | None = None,
    tails: Sequence[Tensor] = (),
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Queries and keys of unit length, values, step sizes and log decays, from a layer's projections.

        y_t = silu(sum_back weight[:, 0, W - 1 - back] x_(t - back)), over the tokens of t's own document
        q, k = y / sqrt(|y|^2 + 1e-6);  v = y;  beta = max_beta sigmoid(b);  g = -exp(A_log) softplus(a + dt_bias)

    Args:
        q: [B, T, H dk].
        k: [B, T, n H dk], laid out (n, heads, dim).
        v: [B, T, n H dv], likewise.
        b: [B, T, n H].
        a: [B, T, H]; None: no decay.
        conv_weights: of q, k and v, [channels, 1, W] each, as in nn.Conv1d; empty: no convolution.
        A_log, dt_bias: [H] in float32 (Gated DeltaNet, arXiv 2412.06464); None exactly if `a` is.
        heads: H.
        max_beta: 1, or 2 for transitions with negative eigenvalues.
        position: [T], index of each token in its document, for packed rows (B must be 1); None: one document a row.
        tails: the W - 1 tokens before q, k and v [B, W - 1, channels]; empty: there are none. With tails, as when
            decoding, plain torch runs whatever the backend.
        backend: as in `gated_delta_product`; 'recurrent' and 'torch' are the same here.

    Returns:
        q [B, T, H, dk], k [B, T, n, H, dk], v [B, T, n, H, dv] in their projections' dtypes; beta [B, T, n, H] and
        g [B, T, H] or None in float32 (float64 for float64 inputs).

    Raises:
        ValueError: for shapes or a backend that do not fit; names the argument.
    """
    n = _check(q, k, v, b, a, conv_weights, A_log, dt_bias, heads, position)
    chosen = resolve_backend(backend, q.device, q.dtype, q.shape[-1] // heads, v.shape[-1] // (n * heads))
    weights: Sequence[Tensor | None] = conv_weights or (None, None, None)
    if chosen == "triton" and not tails:
        *out, g = front_end_ops.front_end(q, k, v, b, a, *weights, A_log, dt_bias, position, heads, max_beta)
        q, k, v, beta = out
        return q, k, v, beta, None if a is None else g
    B, T, _ = q.shape
    before: Sequence[Tensor | None] = tails or (None, None, None)
    q, k, v = (_conv_silu(x, w, position, tail) for x, w, tail in zip((q, k, v), weights, before, strict=True))
    beta = max_beta * _upcast(b).sigmoid()
    g = None
    if a is not None and A_log is not None and dt_bias is not None:
        g = -_upcast(A_log).exp() * F.softplus(_upcast(a) + dt_bias)
    return (
        _unit(q.view(B, T, heads, -1)),
        _unit(k.view(B, T, n, heads, -1)),
        v.view(B, T, n, heads, -1),
        beta.view(B, T, n, heads),
        g,
    )


def _conv_silu(x: Tensor, weight: Tensor | None, position: Tensor | None, tail: Tensor | None) -> Tensor:
    if weight is None:
        return F.silu(x)
    T, W = x.shape[1], weight.shape[-1]
    padded = F.pad(x, (0, 0, W - 1, 0)) if tail is None else torch.cat([tail, x], 1)
    taps = weight[:, 0].unbind(-1)
    out = x * taps[-1]
    for back in range(1, W):
        earlier = padded[:, W - 1 - back : W - 1 - back + T] * taps[W - 1 - back]
        if position is not None:
            earlier = torch.where((position >= back)[:, None], earlier, 0)
        out = out + earlier
    return F.silu(out)


def _unit(x: Tensor) -> Tensor:
    """x over its length in the last dimension; in float32 before it is rounded to x's dtype."""
    wide = _upcast(x)
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + L2_EPS)).to(x.dtype)


def _upcast(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    b: Tensor,
    a: Tensor | None,
    conv_weights: Sequence[Tensor],
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    heads: int,
    position: Tensor | None,
) -> int:
    """The number of steps a token."""
    if q.dim() != 3 or q.shape[-1] % heads:
        raise ValueError(f"q has shape {tuple(q.shape)}; expected [B, T, channels], channels a multiple of heads = {heads}")
    B, T, channels = q.shape
    if k.shape[:2] != (B, T) or k.shape[-1] % channels or not 1 <= k.shape[-1] // channels <= 8:
        raise ValueError(f"k has shape {tuple(k.shape)}; expected [{B}, {T}, n * {channels}] with n from 1 to 8 to fit q")
    n = k.shape[-1] // channels
    if v.shape[:2] != (B, T) or v.shape[-1] % (n * heads):
        raise ValueError(f"v has shape {tuple(v.shape)}; expected [{B}, {T}, channels], a multiple of n * heads = {n * heads}")
    expected = {
        "b": (b, (B, T, n * heads)),
        "a": (a, (B, T, heads)),
        "A_log": (A_log, (heads,)),
        "dt_bias": (dt_bias, (heads,)),
    }
    for name, (x, shape) in expected.items():
        if x is not None and tuple(x.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; expected {shape}")
        if name != "b" and (x is None) != (a is None):
            raise ValueError(f"{name} is {'missing' if x is None else 'given'}, but a is not: a, A_log and dt_bias go together")
    if conv_weights:
        W = conv_weights[0].shape[-1]
        for name, w, x in zip("qkv", conv_weights, (q, k, v), strict=True):
            if tuple(w.shape) != (x.shape[-1], 1, W) or not 1 <= W <= MAX_TAPS:
                wanted = f"[{x.shape[-1]}, 1, W] with W from 1 to {MAX_TAPS}"
                raise ValueError(f"conv_weights of {name} have shape {tuple(w.shape)}; expected {wanted}")
    if position is not None and (B != 1 or tuple(position.shape) != (T,)):
        raise ValueError(f"position has shape {tuple(position.shape)} for B = {B} rows; expected [{T}] and one row")
    return n
