"""The serial pass: carry S over the chunks of a span, and write what the caller needs of it.

One kernel serves the forward pass (read-out and sparse states) and the summary of a span as an affine map S' = M S + N. Per
chunk,

    E = Y (V - e^G o K S)        U = beta o E
    o = scale (e^G o Q S + (D o Q K^T) U)
    S' = e^{G_last} S + (e^{G_last - G} o K)^T U

The kernel holds S^T [BV, dk] in accumulators and computes every line transposed: each product then has its left operand in
registers, straight from the product before, and its right operand in shared memory, and the matrix instruction's tall side
is the head's dimension instead of the chunk's few tokens. No result of a matrix product is ever transposed. Order of products:
Q S, K S, Y (V - ..), K Q^T, P U, U^T K, each waiting for the one before, so a second program on the multiprocessor is what
fills the time: on sm_90, for dk = dv = 128 and n = 2, two of 4 warps, 255 registers a thread and 75 KB each.
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
    read_mask,
    row_gates,
    store_columns,
    store_state,
    token_gates,
)


@triton.jit(do_not_specialize=["T", "sequences", "span", "first_block"])
def states_kernel(
    q,
    k,
    v,
    beta,
    gates,
    y,
    initial,  # INITIAL 1: [sequences, H, DK, DV]; 2: [slots of spans, H, DV, DK]
    o,
    states,  # S^T before every EVERY-th chunk [slots, H, DV, DK]
    final,  # [sequences, H, DK, DV]; with SUMMARY N^T and M^T [slots of spans, H, DV + DK, DK]
    cu_seqlens,
    scale,
    T,
    sequences,
    span,  # tokens a program; a multiple of CHUNK * EVERY
    first_block,  # with SUMMARY: DV blocks of BV first, for N, then those of M
    H: tl.constexpr,
    GROUPS: tl.constexpr,
    N: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    CHUNK: tl.constexpr,
    EVERY: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BLOCKS: tl.constexpr,
    GATED: tl.constexpr,
    ERASE: tl.constexpr,
    PACKED: tl.constexpr,
    INITIAL: tl.constexpr,
    READ: tl.constexpr,
    SAVE_STATES: tl.constexpr,
    SAVE_FINAL: tl.constexpr,
    SUMMARY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program a span, head and block of BV values."""
    pid = tl.program_id(0)
    block = pid % BLOCKS + first_block
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
    value = block * BV
    dtype = k.dtype.element_ty
    NV: tl.constexpr = (DV + BV - 1) // BV
    S = tl.zeros([BV, BK], tl.float32)
    if INITIAL == 1:
        S = load_state(initial + (sequence * H + head) * DK * DV, value, 1, DV, DK, DV, BK, BV)
    if INITIAL == 2:
        S = load_state(initial + (slot.to(tl.int64) * H + head) * DV * DK, value, DK, 1, DK, DV, BK, BV)
    if SUMMARY:
        if block >= NV:  # columns of the identity: what becomes of them is M
            value = (block - NV) * BV
            S = (value + tl.arange(0, BV)[:, None] == tl.arange(0, BK)[None, :]).to(tl.float32)

    chunk_slot = first_slot(start, sequence, T, CHUNK, PACKED)
    state_slot = first_slot(start, sequence, T, CHUNK * EVERY, PACKED)
    stop = tl.cdiv(tl.minimum(begin + span, length), CHUNK).to(tl.int32)
    for chunk in range((begin // CHUNK).to(tl.int32), stop):
        token = start + chunk * CHUNK
        tokens = tl.minimum(length - chunk * CHUNK, CHUNK).to(tl.int32)
        rows = tokens * N
        here = (chunk_slot + chunk) * H + head
        keys = load_rows(k + (token * N * GROUPS + key_head) * DK, rows, GROUPS * DK, 0, DK, ROWS, BK)
        # Both products with S come first, so that its rounded copy need not live on; gates are read where they are used.
        Sd = S.to(dtype)
        if READ:
            queries = load_rows(q + (token * GROUPS + key_head) * DK, tokens, GROUPS * DK, 0, DK, TOKENS, BK)
            out = tl.dot(Sd, tl.trans(queries), input_precision=PRECISION) * scale
        if ERASE:
            X = tl.dot(Sd, tl.trans(keys), input_precision=PRECISION)
            if GATED:
                X *= tl.exp2(row_gates(gates + here * ROWS, ROWS))[None, :]
        if SAVE_STATES:
            if chunk % EVERY == 0:
                saved = ((state_slot + chunk // EVERY) * H + head) * DV * DK
                store_state(states + saved, Sd, value, DK, 1, DK, DV, BK, BV)
        if SUMMARY:
            E = tl.zeros([BV, ROWS], tl.float32)
            if block < NV:
                E += tl.trans(load_rows(v + (token * N * H + head) * DV, rows, H * DV, value, DV, ROWS, BV))
        else:
            E = tl.trans(load_rows(v + (token * N * H + head) * DV, rows, H * DV, value, DV, ROWS, BV)).to(tl.float32)
        if ERASE:
            solved = tl.load(y + here * ROWS * ROWS + tl.arange(0, ROWS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :])
            E = tl.dot((E - X).to(dtype), tl.trans(solved), input_precision=PRECISION)
        U = E * load_beta(beta + head, token * N, rows, H, ROWS)[None, :]
        if READ:
            P = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * scale
            reads = read_mask(tokens, N, ROWS, TOKENS)
            if GATED:
                G = row_gates(gates + here * ROWS, ROWS)
                Gt = token_gates(gates + here * ROWS, N, CHUNK, TOKENS)
                P *= tl.exp2(tl.where(reads, Gt[None, :] - G[:, None], 0.0))
                out *= tl.exp2(Gt)[None, :]
            P = tl.where(reads, P, 0.0)
            out = tl.dot(U.to(dtype), P.to(dtype), out, input_precision=PRECISION)
            store_columns(o + (token * H + head) * DV, out, tokens, H * DV, value, DV, BV, TOKENS)
        if GATED:
            last = tl.load(gates + here * ROWS + ROWS - 1)
            U *= tl.exp2(last - row_gates(gates + here * ROWS, ROWS))[None, :]
            S *= tl.exp2(last)
        S = tl.dot(U.to(dtype), keys, S, input_precision=PRECISION)

    if SUMMARY:
        to = final + (slot.to(tl.int64) * H + head) * (DV + DK) * DK
        if block < NV:
            store_state(to, S, value, DK, 1, DK, DV, BK, BV)
        else:
            store_state(to + DV * DK, S, value, DK, 1, DK, DK, BK, BV)
    elif SAVE_FINAL:
        if begin + span >= length:
            store_state(final + (sequence * H + head) * DK * DV, S, value, 1, DV, DK, DV, BK, BV)
