"""The serial pass backwards: carry dS, the adjoint of the state, from a span's end to its start.

    dU = (D o Q K^T)^T dO scale + e^{G_last - G} o K dS'
    dV = Y^T (beta o dU)
    dS = e^{G_last} dS' + scale (e^G o Q)^T dO - (e^G o K)^T dV

This differentiates the triangular solve, not an inverse. dV is the gradient of the values, and with dS' all that the
rest of the backward pass needs, whose chunks run side by side. As in states.py every line is computed transposed, dS^T in
accumulators. Order of products: K dS', Q K^T, P^T dO, Q^T dO, Y^T dU, K^T dV; on sm_90, for dk = dv = 128 and n = 2, two
programs of 4 warps a multiprocessor, 255 registers a thread and 92 KB each.
"""

import triton
import triton.language as tl

from deltaproduct_kernels.triton_backend.tiles import (
    first_slot,
    head_of_keys,
    load_beta,
    load_rows,
    load_state,
    locate,
    row_gates,
    store_columns,
    store_state,
    token_gates,
)


@triton.jit(do_not_specialize=["T", "sequences", "span"])
def adjoint_kernel(
    do,
    q,
    k,
    beta,
    gates,
    y,
    final,  # FINAL 1: gradient of the final state [sequences, H, DK, DV]; 2: of the one after every span [slots, H, DV, DK]
    dv,
    adjoints,  # dS'^T after every chunk [slots of chunks, H, DV, DK]
    initial,  # SUMMARY: dS^T before every span [slots of spans, H, DV, DK]; else dS before every sequence [.., H, DK, DV]
    cu_seqlens,
    scale,
    T,
    sequences,
    span,
    H: tl.constexpr,
    GROUPS: tl.constexpr,
    N: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BLOCKS: tl.constexpr,
    GATED: tl.constexpr,
    ERASE: tl.constexpr,
    PACKED: tl.constexpr,
    FINAL: tl.constexpr,
    SUMMARY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program a span, head and block of BV values."""
    pid = tl.program_id(0)
    value = (pid % BLOCKS) * BV
    head = (pid // BLOCKS) % H
    key_head = head_of_keys(head, H, GROUPS)
    slot = pid // (BLOCKS * H)
    sequence, part, start, length = locate(slot, cu_seqlens, T, sequences, span, PACKED)
    begin = part * span
    if (part > 0) & (begin >= length):
        return
    if SUMMARY:
        if length <= span:
            return
    dtype = k.dtype.element_ty
    dS = tl.zeros([BV, BK], tl.float32)
    if FINAL == 1:
        dS = load_state(final + (sequence * H + head) * DK * DV, value, 1, DV, DK, DV, BK, BV)
    if FINAL == 2:
        dS = load_state(final + (slot.to(tl.int64) * H + head) * DV * DK, value, DK, 1, DK, DV, BK, BV)

    chunk_slot = first_slot(start, sequence, T, CHUNK, PACKED)
    first = (begin // CHUNK).to(tl.int32)
    end = tl.cdiv(tl.minimum(begin + span, length), CHUNK).to(tl.int32)
    for i in range(first, end):
        chunk = first + end - 1 - i
        token = start + chunk * CHUNK
        tokens = tl.minimum(length - chunk * CHUNK, CHUNK).to(tl.int32)
        rows = tokens * N
        here = (chunk_slot + chunk) * H + head
        keys = load_rows(k + (token * N * GROUPS + key_head) * DK, rows, GROUPS * DK, 0, DK, ROWS, BK)
        queries = load_rows(q + (token * GROUPS + key_head) * DK, tokens, GROUPS * DK, 0, DK, TOKENS, BK)
        dO = tl.trans(load_rows(do + (token * H + head) * DV, tokens, H * DV, value, DV, TOKENS, BV))
        if not SUMMARY:
            store_state(adjoints + here * DV * DK, dS, value, DK, 1, DK, DV, BK, BV)
        dU = tl.dot(dS.to(dtype), tl.trans(keys), input_precision=PRECISION)
        t = tl.arange(0, TOKENS)
        reads = ((tl.arange(0, ROWS) // N)[None, :] <= t[:, None]) & (t < tokens)[:, None]
        P = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
        if GATED:
            last = tl.load(gates + here * ROWS + ROWS - 1)
            dS *= tl.exp2(last)
            G = row_gates(gates + here * ROWS, ROWS)
            Gt = token_gates(gates + here * ROWS, N, CHUNK, TOKENS)
            P *= tl.exp2(tl.where(reads, Gt[:, None] - G[None, :], 0.0))
            dU *= tl.exp2(last - row_gates(gates + here * ROWS, ROWS))[None, :]
        P = tl.where(reads, P, 0.0)
        dU = tl.dot(dO, P.to(dtype), dU, input_precision=PRECISION)
        dR = dO.to(tl.float32) * scale
        if GATED:
            dR *= tl.exp2(token_gates(gates + here * ROWS, N, CHUNK, TOKENS))[None, :]
        dS = tl.dot(dR.to(dtype), queries, dS, input_precision=PRECISION)
        dV = dU * load_beta(beta + head, token * N, rows, H, ROWS)[None, :]
        if ERASE:
            solved = tl.load(y + here * ROWS * ROWS + tl.arange(0, ROWS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :])
            dV = tl.dot(dV.to(dtype), solved, input_precision=PRECISION)
        if not SUMMARY:
            store_columns(dv + (token * N * H + head) * DV, dV, rows, H * DV, value, DV, BV, ROWS)
        if ERASE:
            erased = -dV
            if GATED:
                erased *= tl.exp2(row_gates(gates + here * ROWS, ROWS))[None, :]
            dS = tl.dot(erased.to(dtype), keys, dS, input_precision=PRECISION)

    if SUMMARY:
        store_state(initial + (slot.to(tl.int64) * H + head) * DV * DK, dS, value, DK, 1, DK, DV, BK, BV)
    elif part == 0:
        store_state(initial + (sequence * H + head) * DK * DV, dS, value, 1, DV, DK, DV, BK, BV)
