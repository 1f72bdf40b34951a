"""Decoding: the recurrence token by token, the state in registers, read once and written once a call for any n.

Compiles the definition line by line; the n steps of a token are dependent, but nothing leaves the registers between them,
so time is that of reading and writing the state: 8 dk dv bytes a head.
"""

import triton
import triton.language as tl

from deltaproduct_kernels.triton_backend.tiles import head_of_keys


@triton.jit(do_not_specialize=["T"])
def decode_kernel(
    q,
    k,
    v,
    beta,
    g,
    before,  # [B, H, DK, DV]
    o,
    after,  # [B, H, DK, DV]
    scale,
    T,
    H: tl.constexpr,
    GROUPS: tl.constexpr,
    N: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BLOCKS: tl.constexpr,
    GATED: tl.constexpr,
    ERASE: tl.constexpr,
    GIVEN: tl.constexpr,
):
    """One program a row, head and block of BV values."""
    pid = tl.program_id(0)
    c = (pid % BLOCKS) * BV + tl.arange(0, BV)
    head = (pid // BLOCKS) % H
    key_head = head_of_keys(head, H, GROUPS)
    row = (pid // (BLOCKS * H)).to(tl.int64)
    d = tl.arange(0, BK)
    inside = (d < DK)[:, None] & (c < DV)[None, :]
    at = (row * H + head) * DK * DV + d[:, None] * DV + c[None, :]
    S = tl.zeros([BK, BV], tl.float32)
    if GIVEN:
        S = tl.load(before + at, mask=inside, other=0.0).to(tl.float32)
    for t in range(T):
        token = row * T + t
        if GATED:
            S *= tl.exp(tl.load(g + token * H + head).to(tl.float32))
        for step in tl.static_range(N):
            i = (token * N + step) * H + head
            key = tl.load(k + ((token * N + step) * GROUPS + key_head) * DK + d, mask=d < DK, other=0.0).to(tl.float32)
            value = tl.load(v + i * DV + c, mask=c < DV, other=0.0).to(tl.float32)
            if ERASE:
                value -= tl.sum(S * key[:, None], axis=0)
            value *= tl.load(beta + i).to(tl.float32)
            S += key[:, None] * value[None, :]
        query = tl.load(q + (token * GROUPS + key_head) * DK + d, mask=d < DK, other=0.0).to(tl.float32)
        out = tl.sum(S * query[:, None], axis=0) * scale
        tl.store(o + (token * H + head) * DV + c, out.to(o.dtype.element_ty), mask=c < DV)
    tl.store(after + at, S, mask=inside)
