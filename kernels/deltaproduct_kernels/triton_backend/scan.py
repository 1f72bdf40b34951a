"""Initial states of spans from their summaries: S_(p+1) = M_p S_p + N_p along each sequence, or its adjoint backwards.

Everything is float32 and passes through memory between spans, because a state of 256 x 256 in float32 is no operand; there
are a few spans a sequence, so this costs little.
"""

import triton
import triton.language as tl

from deltaproduct_kernels.triton_backend.tiles import first_slot


@triton.jit(do_not_specialize=["T", "span"])
def scan_kernel(
    maps,  # N^T and M^T [slots of spans, H, DV + DK, DK]
    local,  # REVERSE: the adjoint at a span's start for a zero one at its end [slots of spans, H, DV, DK]
    given,  # GIVEN: the state before, or the adjoint after, each sequence [sequences, H, DK, DV]
    out,  # the state before, or the adjoint after, every span [slots of spans, H, DV, DK], float32
    cu_seqlens,
    T,
    span,
    H: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK: tl.constexpr,
    BV: tl.constexpr,
    BLOCKS: tl.constexpr,
    PACKED: tl.constexpr,
    GIVEN: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program a sequence, head and block of BV values."""
    pid = tl.program_id(0)
    v = (pid % BLOCKS) * BV + tl.arange(0, BV)
    head = (pid // BLOCKS) % H
    sequence = (pid // (BLOCKS * H)).to(tl.int64)
    if PACKED:
        start = tl.load(cu_seqlens + sequence).to(tl.int64)
        length = tl.load(cu_seqlens + sequence + 1).to(tl.int64) - start
    else:
        start = sequence * T
        length = T + start * 0
    slot = first_slot(start, sequence, T, span, PACKED)
    spans = tl.maximum(tl.cdiv(length, span), 1).to(tl.int32)
    inside = (v < DV)[:, None]
    d = tl.arange(0, BLOCK)
    for i in range(spans):
        part = spans - 1 - i if REVERSE else i
        here = (slot + part) * H + head
        before = here + (H if REVERSE else -H)
        for column in tl.range(0, DK, BLOCK):
            c = column + d
            mask = inside & (c < DK)[None, :]
            S = tl.zeros([BV, BLOCK], tl.float32)
            if i == 0:
                if GIVEN:
                    element = (sequence * H + head) * DK * DV + v[:, None] + c[None, :] * DV
                    S = tl.load(given + element, mask=mask, other=0.0).to(tl.float32)
            else:
                if REVERSE:
                    S = tl.load(local + before * DV * DK + v[:, None] * DK + c[None, :], mask=mask, other=0.0)
                else:
                    S = tl.load(maps + before * (DV + DK) * DK + v[:, None] * DK + c[None, :], mask=mask, other=0.0)
                moved = maps + before * (DV + DK) * DK + DV * DK  # element (j, i) of M^T at j DK + i
                for inner in tl.range(0, DK, BLOCK):
                    j = inner + d
                    left = tl.load(
                        out + before * DV * DK + v[:, None] * DK + j[None, :],
                        mask=inside & (j < DK)[None, :],
                        other=0.0,
                    )
                    both = (j < DK)[:, None] & (c < DK)[None, :]
                    if REVERSE:
                        right = tl.load(moved + c[None, :] * DK + j[:, None], mask=both, other=0.0)
                    else:
                        right = tl.load(moved + j[:, None] * DK + c[None, :], mask=both, other=0.0)
                    S = tl.dot(left, right, S, input_precision=PRECISION)
            tl.store(out + here * DV * DK + v[:, None] * DK + c[None, :], S, mask=mask)
        tl.debug_barrier()  # the next span reads what this one's threads wrote
