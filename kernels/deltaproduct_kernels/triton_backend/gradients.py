"""The rest of the backward pass: walk a group of EVERY chunks forward, and write the gradients of q, k, beta and g.

With U = beta o E, D_tr = e^{G_t - G_r} for rows r that token t reads, and Gamma_ij = e^{G_i - G_j} for i >= j,

    E = Y (V - e^G o K S)                          S' = e^{G_last} S + (e^{G_last - G} o K)^T U
    dP = scale D o (dO U^T)                        dA = -Gamma o tril(dV U^T, -1)
    dQ = scale e^G o (dO S^T) + dP K
    dK = dP^T Q + (dA + dA^T) K + e^{G_last - G} o (U dS'^T) - e^G o (dV S^T)
    dbeta_r = E_r . dU_r - sum_{i > r} Gamma_ir (K_i . K_r)(E_r . dV_i)

A group starts from the state that the forward pass kept, so all groups run side by side. Nothing divides by beta: a step
switched off by beta = 0 is exact. The gradient of G is summed over pairs of *different* tokens only: pairs within a token do
not depend on g and would cancel with the loss of all digits under strong gates; dg is its suffix sum within the chunk.

Order of products in a chunk: for each block of BV values K S, Y (V - ..) and U^T K, the next state; then E dO^T, E dV^T,
K Q^T and K K^T; then for each block of BK keys, over all values, E dS', dO S, dV S, and with them dA K, dA^T K, dP^T Q, dP K.
E is kept transposed, [BV, ROWS] a block, in shared memory. Queries, dO and dQ have token rows, never N rows a token; dQ is
computed transposed, so that dP^T serves all products.

The state between two chunks goes through memory that the second-level cache is to hold: two tiles in turn, as the old one is
needed while the new one is written. In registers, 64 KB for dk = dv = 128, it leaves too few for the rest
(benchmarks/results/model.md). On sm_90, for dk = dv = 128 and n = 2, two programs of 4 warps a multiprocessor, 255 registers a
thread and 45 KB each. The loop is a `while`, because tensor memory of a `for` is not used twice on Blackwell.
"""

import triton
import triton.language as tl

from deltaproduct_kernels.triton_backend.tiles import (
    first_slot,
    head_of_keys,
    load_beta,
    load_rows,
    load_tile,
    locate,
    read_mask,
    row_gates,
    store_columns,
    store_rows,
    store_tile,
    token_gates,
)


@triton.jit(do_not_specialize=["T", "sequences"])
def gradients_kernel(
    do,
    q,
    k,
    v,
    beta,
    gates,
    y,
    dv,
    states,  # S^T before every EVERY-th chunk [slots, H, DV, DK]
    scratch,  # for the states between, two a group [2, slots, H, DV, DK]
    adjoints,  # dS'^T after every chunk [slots, H, DV, DK]
    dq,  # of every head, also where heads share q and k
    dk,
    dbeta,
    dg,
    cu_seqlens,
    scale,
    T,
    sequences,
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
    GATED: tl.constexpr,
    ERASE: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program EVERY chunks and head."""
    pid = tl.program_id(0)
    group = pid // H
    head = pid % H
    key_head = head_of_keys(head, H, GROUPS)
    sequence, part, start, length = locate(group, cu_seqlens, T, sequences, CHUNK * EVERY, PACKED)
    first = (part * EVERY).to(tl.int32)
    stop = tl.minimum(first + EVERY, tl.cdiv(length, CHUNK)).to(tl.int32)
    if first >= stop:
        return
    UNROLL: tl.constexpr = 2 if BK < DK and k.dtype.element_ty.primitive_bitwidth == 16 else 1  # a fifth faster in the model
    NV: tl.constexpr = (DV + BV - 1) // BV
    dtype = k.dtype.element_ty
    here = (group.to(tl.int64) * H + head) * DV * DK
    source = states + here
    target = scratch + 2 * here
    other = target + DV * DK
    slot = first_slot(start, sequence, T, CHUNK, PACKED)
    r = tl.arange(0, ROWS)
    t = tl.arange(0, TOKENS)
    chunk = first
    while chunk < stop:
        token = start + chunk * CHUNK
        tokens = tl.minimum(length - chunk * CHUNK, CHUNK).to(tl.int32)
        rows = tokens * N
        here = (slot + chunk) * H + head
        keys_at = k + (token * N * GROUPS + key_head) * DK
        queries_at = q + (token * GROUPS + key_head) * DK
        b = load_beta(beta + head, token * N, rows, H, ROWS)
        after = b
        kept = tl.where(chunk + 1 < stop, DV, 0)  # the state after the last chunk is not: a branch would cost registers
        if GATED:
            G = row_gates(gates + here * ROWS, ROWS)
            last = tl.load(gates + here * ROWS + ROWS - 1)
            after *= tl.exp2(last - G)

        # E^T, by blocks of values.
        E = ()
        for j in tl.static_range(NV):
            V = tl.trans(load_rows(v + (token * N * H + head) * DV, rows, H * DV, j * BV, DV, ROWS, BV))
            if ERASE:
                X = tl.zeros([BV, ROWS], tl.float32)
                for column in tl.range(0, DK, BK, loop_unroll_factor=UNROLL):
                    keys = load_rows(keys_at, rows, GROUPS * DK, column, DK, ROWS, BK)
                    S = load_tile(source, j * BV, column, DV, DK, BV, BK)
                    X = tl.dot(S, tl.trans(keys), X, input_precision=PRECISION)
                if GATED:
                    X *= tl.exp2(G)[None, :]
                solved = tl.load(y + here * ROWS * ROWS + r[:, None] * ROWS + r[None, :])
                V = tl.dot((V - X).to(dtype), tl.trans(solved), input_precision=PRECISION)
            E += (V.to(dtype),)  # type: ignore[assignment]
            U = (V * after[None, :]).to(dtype)
            for column in tl.range(0, DK, BK, loop_unroll_factor=UNROLL):
                keys = load_rows(keys_at, rows, GROUPS * DK, column, DK, ROWS, BK)
                moved = load_tile(source, j * BV, column, DV, DK, BV, BK).to(tl.float32)
                if GATED:
                    moved *= tl.exp2(last)
                moved = tl.dot(U, keys, moved, input_precision=PRECISION)
                store_tile(target, moved, j * BV, column, kept, DK, BV, BK)
        tl.debug_barrier()  # tiles are read anew below, instead of being kept in registers

        # Rows with rows, and with tokens.
        EdO = tl.zeros([ROWS, TOKENS], tl.float32)
        EdV = tl.zeros([ROWS, ROWS], tl.float32)
        for j in tl.static_range(NV):
            dO = load_rows(do + (token * H + head) * DV, tokens, H * DV, j * BV, DV, TOKENS, BV)
            EdO = tl.dot(tl.trans(E[j]), tl.trans(dO), EdO, input_precision=PRECISION)
            if ERASE:
                dV = load_rows(dv + (token * N * H + head) * DV, rows, H * DV, j * BV, DV, ROWS, BV)
                EdV = tl.dot(tl.trans(E[j]), tl.trans(dV), EdV, input_precision=PRECISION)
        KQ = tl.zeros([ROWS, TOKENS], tl.float32)
        KK = tl.zeros([ROWS, ROWS], tl.float32)
        for column in tl.range(0, DK, BK, loop_unroll_factor=UNROLL):
            keys = load_rows(keys_at, rows, GROUPS * DK, column, DK, ROWS, BK)
            queries = load_rows(queries_at, tokens, GROUPS * DK, column, DK, TOKENS, BK)
            KQ = tl.dot(keys, tl.trans(queries), KQ, input_precision=PRECISION)
            if ERASE:
                KK = tl.dot(keys, tl.trans(keys), KK, input_precision=PRECISION)
        reads = read_mask(tokens, N, ROWS, TOKENS)
        D = tl.where(reads, scale, 0.0)
        if GATED:
            Gt = token_gates(gates + here * ROWS, N, CHUNK, TOKENS)
            D *= tl.exp2(tl.where(reads, Gt[None, :] - G[:, None], 0.0))
        EdO *= D
        db = tl.sum(EdO * KQ, axis=1)
        EdO *= b[:, None]
        dP = EdO.to(dtype)
        if GATED:
            EdO = tl.where((r // N)[:, None] == t[None, :], 0.0, EdO * KQ)
            dGt = tl.sum(EdO, axis=0)
            dG = -tl.sum(EdO, axis=1)
        if ERASE:
            above = r[:, None] < r[None, :]  # row r before row i
            EdV = tl.where(above, EdV, 0.0)
            if GATED:
                EdV *= tl.exp2(tl.where(above, G[None, :] - G[:, None], 0.0))
            db -= tl.sum(EdV * KK, axis=1)
            EdV *= -b[:, None]
            dA = EdV.to(dtype)
            if GATED:
                EdV = tl.where((r // N)[:, None] == (r // N)[None, :], 0.0, EdV * KK)
                dG += tl.sum(EdV, axis=0) - tl.sum(EdV, axis=1)
        tl.debug_barrier()

        # What passes through the states.
        written = tl.zeros([ROWS], tl.float32)
        if GATED:
            carried = tl.zeros([BV], tl.float32)
        for column in tl.range(0, DK, BK, loop_unroll_factor=UNROLL):
            EdS = tl.zeros([ROWS, BK], tl.float32)
            dVS = tl.zeros([ROWS, BK], tl.float32)
            dQ = tl.zeros([BK, TOKENS], tl.float32)
            keys = load_rows(keys_at, rows, GROUPS * DK, column, DK, ROWS, BK)
            for j in tl.static_range(NV):
                dS = load_tile(adjoints + here * DV * DK, j * BV, column, DV, DK, BV, BK)
                S = load_tile(source, j * BV, column, DV, DK, BV, BK)
                EdS = tl.dot(tl.trans(E[j]), dS, EdS, input_precision=PRECISION)
                dO = load_rows(do + (token * H + head) * DV, tokens, H * DV, j * BV, DV, TOKENS, BV)
                dQ = tl.dot(tl.trans(S), tl.trans(dO), dQ, input_precision=PRECISION)
                if ERASE:
                    dV = load_rows(dv + (token * N * H + head) * DV, rows, H * DV, j * BV, DV, ROWS, BV)
                    dVS = tl.dot(dV, S, dVS, input_precision=PRECISION)
                if GATED:
                    carried += tl.sum(S.to(tl.float32) * dS.to(tl.float32), axis=1)
            queries = load_rows(queries_at, tokens, GROUPS * DK, column, DK, TOKENS, BK)
            dQ *= scale
            if GATED:
                dQ *= tl.exp2(Gt)[None, :]
                dGt += tl.sum(dQ * tl.trans(queries), axis=0)
                EdS *= tl.exp2(last - G)[:, None]
            along = tl.sum(EdS * keys, axis=1)
            db += along
            written += along * b
            EdS *= b[:, None]
            if ERASE:
                if GATED:
                    dVS *= tl.exp2(G)[:, None]
                    dG -= tl.sum(dVS * keys, axis=1)
                EdS -= dVS
                EdS = tl.dot(dA, keys, EdS, input_precision=PRECISION)
                EdS = tl.dot(tl.trans(dA), keys, EdS, input_precision=PRECISION)
            EdS = tl.dot(dP, queries, EdS, input_precision=PRECISION)
            dQ = tl.dot(tl.trans(keys), dP, dQ, input_precision=PRECISION)
            store_rows(dk + (token * N * H + head) * DK, EdS, rows, H * DK, column, DK, ROWS, BK)
            store_columns(dq + (token * H + head) * DK, dQ, tokens, H * DK, column, DK, BK, TOKENS)
        source = target
        target = other
        other = source

        tl.store(dbeta + (token * N + r) * H + head, db.to(dbeta.dtype.element_ty), mask=r < rows)
        if GATED:
            dG -= written
            dGt += tl.sum(tl.where((r // N)[:, None] == t[None, :], dG[:, None], 0.0), axis=0)
            dGt += tl.where(t == tokens - 1, tl.sum(written) + tl.exp2(last) * tl.sum(carried), 0.0)
            dGt = tl.where(t < tokens, dGt, 0.0)
            tl.store(dg + (token + t) * H + head, tl.cumsum(dGt, 0, reverse=True).to(dg.dtype.element_ty), mask=t < tokens)
        tl.debug_barrier()  # the next chunk reads what this one's threads wrote
        chunk += 1
