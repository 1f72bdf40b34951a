"""Short convolution, SiLU, unit length, step sizes and log decays: one kernel forward, one backward.

A program takes a block of tokens of one head of q, k or v, or of the scalars. The backward pass computes everything again
from the projections, so nothing is kept; what it needs of later tokens it finds among its own rows, of which the last W - 1
are shared with the next program. Gradients of weights leave as one partial sum a block, summed outside in a fixed order.
All arithmetic is float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltaproduct_kernels.triton_backend.configs import Config
from deltaproduct_kernels.triton_backend.launch import Runner, runner


def config(width: int) -> Config:
    """Eight elements a thread, one vector of bfloat16. The backward pass needs some 110 registers a thread for them, and 173
    for sixteen, which leaves half as many warps to wait for memory, and spills at a width of 256."""
    return Config(block_k=0, block_v=0, warps=16 if width > 64 else 8, stages=1)


def tile_rows(width: int) -> int:
    """Rows of a program's tile for heads of `width`: as many as fit the registers, so that few are computed twice."""
    return 32 if width <= 128 else 16


@triton.jit
def _head(
    slot,
    q,
    k,
    v,
    wq,
    wk,
    wv,
    H: tl.constexpr,
    GROUPS: tl.constexpr,
    N: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
):
    """Of a head's slot: its tensor and weights, channels a token, first channel and width."""
    x, w = q, wq
    channels, first, width = GROUPS * DK, slot * DK, DK
    if slot >= GROUPS:
        x, w = k, wk
        channels, first = N * GROUPS * DK, (slot - GROUPS) * DK
    if slot >= GROUPS * (N + 1):
        x, w = v, wv
        channels, first, width = N * H * DV, (slot - GROUPS * (N + 1)) * DV, DV
    return x, w, channels, first, width


@triton.jit
def _back(x, row, t, back, T, position, channels, c, inside, PACKED: tl.constexpr):
    """x at t - back for each token t of the row's, zero before its document."""
    seen = (t >= back) & (t - back < T)
    if PACKED:
        seen = seen & (tl.load(position + t, mask=t < T, other=0) >= back)
    pointers = x + (row * T + t - back)[:, None] * channels + c[None, :]
    return tl.load(pointers, mask=seen[:, None] & inside[None, :], other=0.0).to(tl.float32)


@triton.jit
def _convolved(x, w, row, t, T, position, channels, c, inside, W: tl.constexpr, CONV: tl.constexpr, PACKED: tl.constexpr):
    if CONV:
        total = tl.zeros([t.shape[0], c.shape[0]], tl.float32)
        for back in tl.static_range(W):
            tap = tl.load(w + c * W + (W - 1 - back), mask=inside, other=0.0).to(tl.float32)
            total += _back(x, row, t, back, T, position, channels, c, inside, PACKED) * tap[None, :]
    else:
        total = _back(x, row, t, 0, T, position, channels, c, inside, False)
    return total


@triton.jit
def _softplus(x):
    """log(1 + e^x) to full relative precision; log1p by Kahan's quotient, since Triton has none for every target."""
    y = tl.exp(-tl.abs(x))
    u = 1 + y
    log1p = tl.where(u == 1, y, tl.log(u) * (y / tl.where(u == 1, 1.0, u - 1)))
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def _scalars(
    b, a, A_log, dt_bias, beta, g, max_beta, stretch, row, t, T,
    H: tl.constexpr, N: tl.constexpr, STEPS: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Step sizes and log decays of the tokens t."""
    c = tl.arange(0, STEPS)
    mask = (t < T)[:, None] & (c < N * H)[None, :]
    at = (row * T + t)[:, None] * (N * H) + c[None, :]
    x = tl.load(b + at, mask=mask, other=0.0).to(tl.float32)
    p = (1 + 2 * stretch) / (1 + tl.exp(-x)) - stretch
    tl.store(beta + at, max_beta * tl.clamp(p, 0.0, 1.0, propagate_nan=tl.PropagateNan.ALL), mask=mask)
    if GATED:
        mask = (t < T)[:, None] & (c < H)[None, :]
        at = (row * T + t)[:, None] * H + c[None, :]
        x = tl.load(a + at, mask=mask, other=0.0).to(tl.float32)
        x += tl.load(dt_bias + c, mask=c < H, other=0.0).to(tl.float32)[None, :]
        rate = tl.exp(tl.load(A_log + c, mask=c < H, other=0.0).to(tl.float32))[None, :]
        softplus = _softplus(x)
        tl.store(g + at, -rate * softplus, mask=mask)


@triton.jit
def _scalars_backward(
    b, a, A_log, dt_bias, dbeta, dg, db, da, drate, dbias, max_beta, stretch, row, t, own, T, partial,
    H: tl.constexpr, N: tl.constexpr, STEPS: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Their gradients; sums over the block's own tokens go to place `partial`."""
    c = tl.arange(0, STEPS)
    mask = own[:, None] & (c < N * H)[None, :]
    at = (row * T + t)[:, None] * (N * H) + c[None, :]
    s = 1 / (1 + tl.exp(-tl.load(b + at, mask=mask, other=0.0).to(tl.float32)))
    d = tl.load(dbeta + at, mask=mask, other=0.0).to(tl.float32)
    p = (1 + 2 * stretch) * s - stretch
    d = tl.where((p < 0) | (p > 1), 0.0, d)
    tl.store(db + at, (d * max_beta * (1 + 2 * stretch) * s * (1 - s)).to(db.dtype.element_ty), mask=mask)
    if GATED:
        mask = own[:, None] & (c < H)[None, :]
        at = (row * T + t)[:, None] * H + c[None, :]
        x = tl.load(a + at, mask=mask, other=0.0).to(tl.float32)
        x += tl.load(dt_bias + c, mask=c < H, other=0.0).to(tl.float32)[None, :]
        rate = tl.exp(tl.load(A_log + c, mask=c < H, other=0.0).to(tl.float32))[None, :]
        d = tl.load(dg + at, mask=mask, other=0.0).to(tl.float32)
        dx = -rate * d / (1 + tl.exp(-x))
        tl.store(da + at, dx.to(da.dtype.element_ty), mask=mask)
        softplus = _softplus(x)
        at = partial * H + c
        tl.store(drate + at, tl.sum(-rate * softplus * d, axis=0), mask=c < H)
        tl.store(dbias + at, tl.sum(dx, axis=0), mask=c < H)


@triton.jit(do_not_specialize=["T", "blocks"])
def front_end_kernel(
    q,
    k,
    v,
    b,
    a,
    wq,
    wk,
    wv,
    A_log,
    dt_bias,
    position,
    q_out,
    k_out,
    v_out,
    beta,
    g,
    max_beta,
    stretch,
    T,
    blocks,
    H: tl.constexpr,
    GROUPS: tl.constexpr,
    N: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    D: tl.constexpr,
    STEPS: tl.constexpr,  # N H rounded up to a power of two
    W: tl.constexpr,
    ROWS: tl.constexpr,
    CONV: tl.constexpr,
    GATED: tl.constexpr,
    PACKED: tl.constexpr,
):
    SLOTS: tl.constexpr = GROUPS * (1 + N) + N * H + 1
    pid = tl.program_id(0)
    slot = pid % SLOTS
    row = (pid // SLOTS // blocks).to(tl.int64)
    t = (pid // SLOTS % blocks) * ROWS + tl.arange(0, ROWS)
    if slot == SLOTS - 1:
        _scalars(b, a, A_log, dt_bias, beta, g, max_beta, stretch, row, t, T, H, N, STEPS, GATED)
    else:
        x, w, channels, first, width = _head(slot, q, k, v, wq, wk, wv, H, GROUPS, N, DK, DV)
        y, _, channels, first, width = _head(slot, q_out, k_out, v_out, wq, wk, wv, H, GROUPS, N, DK, DV)
        d = tl.arange(0, D)
        inside = d < width
        z = _convolved(x, w, row, t, T, position, channels, first + d, inside, W, CONV, PACKED)
        z = z / (1 + tl.exp(-z))
        if slot < GROUPS * (N + 1):
            z *= tl.rsqrt(tl.sum(z * z, axis=1) + 1e-6)[:, None]
        pointers = y + (row * T + t)[:, None] * channels + (first + d)[None, :]
        tl.store(pointers, z.to(y.dtype.element_ty), mask=(t < T)[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["T", "blocks"])
def front_end_backward_kernel(
    q,
    k,
    v,
    b,
    a,
    wq,
    wk,
    wv,
    A_log,
    dt_bias,
    position,
    dq_out,
    dk_out,
    dv_out,
    dbeta,
    dg,
    dq,
    dk,
    dv,
    db,
    da,
    dwq,  # partial sums [B, blocks, channels, W] in float32
    dwk,
    dwv,
    drate,  # partial sums of dA_log [B, blocks, H]
    dbias,  # of ddt_bias
    max_beta,
    stretch,
    T,
    blocks,
    H: tl.constexpr,
    GROUPS: tl.constexpr,
    N: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    D: tl.constexpr,
    STEPS: tl.constexpr,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    CONV: tl.constexpr,
    GATED: tl.constexpr,
    PACKED: tl.constexpr,
):
    SLOTS: tl.constexpr = GROUPS * (1 + N) + N * H + 1
    OWN: tl.constexpr = ROWS - W + 1
    pid = tl.program_id(0)
    slot = pid % SLOTS
    block = pid // SLOTS % blocks
    row = (pid // SLOTS // blocks).to(tl.int64)
    r = tl.arange(0, ROWS)
    t = block * OWN + r
    own = (r < OWN) & (t < T)
    if slot == SLOTS - 1:
        _scalars_backward(
            b, a, A_log, dt_bias, dbeta, dg, db, da, drate, dbias, max_beta, stretch, row, t, own, T,
            row * blocks + block,
            H, N, STEPS, GATED,
        )  # fmt: skip
    else:
        x, w, channels, first, width = _head(slot, q, k, v, wq, wk, wv, H, GROUPS, N, DK, DV)
        dy, dw, channels, first, width = _head(slot, dq_out, dk_out, dv_out, dwq, dwk, dwv, H, GROUPS, N, DK, DV)
        dx, dw, channels, first, width = _head(slot, dq, dk, dv, dwq, dwk, dwv, H, GROUPS, N, DK, DV)
        i = tl.arange(0, D)
        inside = i < width
        c = first + i
        # The gradient of the convolution's sum, for these tokens and the W - 1 after them.
        u = _convolved(x, w, row, t, T, position, channels, c, inside, W, CONV, PACKED)
        s = 1 / (1 + tl.exp(-u))
        pointers = (row * T + t)[:, None] * channels + c[None, :]
        d = tl.load(dy + pointers, mask=(t < T)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        if slot < GROUPS * (N + 1):
            z = u * s
            scale = tl.rsqrt(tl.sum(z * z, axis=1) + 1e-6)[:, None]
            d = scale * (d - z * (scale * scale * tl.sum(d * z, axis=1)[:, None]))
        d *= s * (1 + u * (1 - s))
        if CONV:
            dxs = tl.zeros([ROWS, D], tl.float32)
            for back in tl.static_range(W):
                later = tl.minimum(r + back, ROWS - 1)
                reached = own & (t + back < T)
                if PACKED:
                    reached = reached & (tl.load(position + t + back, mask=t + back < T, other=0) >= back)
                tap = tl.load(w + c * W + (W - 1 - back), mask=inside, other=0.0).to(tl.float32)
                moved = d
                if back > 0:
                    moved = tl.gather(d, tl.broadcast_to(later[:, None], [ROWS, D]), axis=0)
                dxs += tl.where(reached[:, None], moved, 0.0) * tap[None, :]
                products = d * _back(x, row, t, back, T, position, channels, c, inside, PACKED)
                partial = ((row * blocks + block) * channels + c) * W + (W - 1 - back)
                tl.store(dw + partial, tl.sum(tl.where(own[:, None], products, 0.0), axis=0), mask=inside)
            d = dxs
        tl.store(dx + pointers, d.to(dx.dtype.element_ty), mask=own[:, None] & inside[None, :])


def forward(
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
    *,
    run: Runner | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Contiguous inputs as in `deltaproduct_kernels.front_end`; returns what it does, g None without `a`."""
    run = run or runner(q.device)
    sizes = _sizes(q, k, v, wq, heads, groups)
    B, T, n, dk, dv = q.shape[0], q.shape[1], sizes["N"], sizes["DK"], sizes["DV"]
    q_out, k_out, v_out = q.new_empty(B, T, groups, dk), k.new_empty(B, T, n, groups, dk), v.new_empty(B, T, n, heads, dv)
    beta = q.new_empty(B, T, n, heads, dtype=torch.float32)
    g = None if a is None else q.new_empty(B, T, heads, dtype=torch.float32)
    blocks = triton.cdiv(T, sizes["ROWS"])
    conv = wq is not None
    wq, wk, wv = _or_unread(q, wq, wk, wv)
    run(
        front_end_kernel, B * blocks * (groups * (1 + n) + n * heads + 1), config(sizes["D"]),
        q=q, k=k, v=v, b=b, a=a, wq=wq, wk=wk, wv=wv, A_log=A_log, dt_bias=dt_bias, position=position, q_out=q_out,
        k_out=k_out, v_out=v_out, beta=beta, g=g, max_beta=max_beta, stretch=beta_stretch, T=T, blocks=blocks, CONV=conv,
        GATED=a is not None, PACKED=position is not None, **sizes,
    )  # fmt: skip
    return q_out, k_out, v_out, beta, g


def backward(
    grads: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None],
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
    *,
    run: Runner | None = None,
) -> list[Tensor | None]:
    """Gradients of q, k, v, b, a, the three weights, A_log and dt_bias, from those of `forward`'s results."""
    run = run or runner(q.device)
    sizes = _sizes(q, k, v, wq, heads, groups)
    (B, T, _), n, W = q.shape, sizes["N"], sizes["W"]
    blocks = triton.cdiv(T, sizes["ROWS"] - W + 1)
    dx = [torch.empty_like(x) for x in (q, k, v, b)]
    da = None if a is None else torch.empty_like(a)
    partials: list[Tensor | None] = [
        None if w is None else q.new_empty(B, blocks, *w.shape, dtype=torch.float32) for w in (wq, wk, wv)
    ] + [None if x is None else q.new_empty(B, blocks, heads, dtype=torch.float32) for x in (A_log, dt_bias)]
    outputs = dict(zip(("dq_out", "dk_out", "dv_out", "dbeta", "dg"), grads, strict=True))
    sums: dict[str, Tensor | None] = dict(zip(("dwq", "dwk", "dwv"), _or_unread(q, *partials[:3]), strict=True))
    sums |= dict(zip(("drate", "dbias"), partials[3:], strict=True))
    taps = dict(zip(("wq", "wk", "wv"), _or_unread(q, wq, wk, wv), strict=True))
    run(
        front_end_backward_kernel, B * blocks * (groups * (1 + n) + n * heads + 1), config(sizes["D"]),
        q=q, k=k, v=v, b=b, a=a, A_log=A_log, dt_bias=dt_bias, position=position,
        dq=dx[0], dk=dx[1], dv=dx[2], db=dx[3], da=da, max_beta=max_beta, stretch=beta_stretch, T=T, blocks=blocks,
        CONV=wq is not None, GATED=a is not None, PACKED=position is not None, **outputs, **sums, **taps, **sizes,
    )  # fmt: skip
    weights = [
        None if p is None or w is None else p.sum((0, 1)).to(w.dtype)
        for p, w in zip(partials, (wq, wk, wv, A_log, dt_bias), strict=True)
    ]
    return [*dx, da, *weights]


def _or_unread(instead: Tensor, *weights: Tensor | None) -> list[Tensor]:
    """Weights for the kernels: without a convolution nobody reads them, but a kernel's function cannot return None."""
    return [instead if w is None else w for w in weights]


def _sizes(q: Tensor, k: Tensor, v: Tensor, w: Tensor | None, heads: int, groups: int) -> dict[str, int]:
    n = k.shape[-1] // q.shape[-1]
    dk, dv = q.shape[-1] // groups, v.shape[-1] // (n * heads)
    width = triton.next_power_of_2(max(dk, dv))
    return {
        "H": heads,
        "GROUPS": groups,
        "N": n,
        "DK": dk,
        "DV": dv,
        "D": width,
        "STEPS": triton.next_power_of_2(n * heads),
        "W": 1 if w is None else w.shape[-1],
        "ROWS": tile_rows(width),
    }
