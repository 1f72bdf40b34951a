"""The chunk-parallel rest of the backward pass: gradients of q, k, beta and g from S, dS', E and dV of each chunk.

With U = beta o E, D_tr = e^{G_t - G_r} for rows r that token t reads, and Gamma_ij = e^{G_i - G_j} for i >= j,

    dP = scale D o (dO U^T)                        dA = -Gamma o tril(dV U^T, -1)
    dQ = scale e^G o (dO S^T) + dP K
    dK = dP^T Q + (dA + dA^T) K + e^{G_last - G} o (U dS'^T) - e^G o (dV S^T)
    dbeta_r = E_r . dU_r - sum_{i > r} Gamma_ir (K_i . K_r)(E_r . dV_i)

E, not U, is what the recomputation keeps, so nothing divides by beta and a step switched off by beta = 0 is exact.
The gradient of G is summed over pairs of *different* tokens only: pairs within a token do not depend on g and would
cancel with the loss of all digits under strong gates; dg is its suffix sum within the chunk.

Queries, dO and dQ have token rows, never N rows a token; dQ is computed transposed, so that dP^T serves all products.
Transposed operands are read transposed from memory: no result of a matrix product is transposed.
"""

import triton
import triton.language as tl

from deltaproduct_kernels.triton_backend.tiles import (
    load_beta,
    load_columns,
    load_rows,
    locate,
    read_mask,
    row_gates,
    store_columns,
    store_rows,
    token_gates,
)


@triton.jit(do_not_specialize=["T", "sequences"])
def gradients_kernel(
    do,
    q,
    k,
    beta,
    gates,
    errors,
    dv,
    states,  # S^T before every chunk [slots, H, DV, DK]
    adjoints,  # dS'^T after every chunk [slots, H, DV, DK]
    dq,
    dk,
    dbeta,
    dg,
    cu_seqlens,
    scale,
    T,
    sequences,
    H: tl.constexpr,
    N: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    GATED: tl.constexpr,
    ERASE: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program a chunk and head."""
    pid = tl.program_id(0)
    slot = pid // H
    head = pid % H
    _, part, start, length = locate(slot, cu_seqlens, T, sequences, CHUNK, PACKED)
    if part * CHUNK >= length:
        return
    token = start + part * CHUNK
    tokens = tl.minimum(length - part * CHUNK, CHUNK).to(tl.int32)
    rows = tokens * N
    here = slot.to(tl.int64) * H + head
    dtype = k.dtype.element_ty
    q += (token * H + head) * DK
    dq += (token * H + head) * DK
    k += (token * N * H + head) * DK
    dk += (token * N * H + head) * DK
    do += (token * H + head) * DV
    errors += (token * N * H + head) * DV
    dv += (token * N * H + head) * DV
    states += here * DV * DK
    adjoints += here * DV * DK

    r = tl.arange(0, ROWS)
    t = tl.arange(0, TOKENS)
    b = load_beta(beta + head, token * N, rows, H, ROWS)
    db = tl.zeros([ROWS], tl.float32)
    if GATED:
        G = row_gates(gates + here * ROWS, ROWS)
        dG = tl.zeros([ROWS], tl.float32)

    # Rows with rows. Products over dk are needed unweighted again: by dbeta, and by the pairs of dg.
    if ERASE:
        EdV = tl.zeros([ROWS, ROWS], tl.float32)
        dVE = tl.zeros([ROWS, ROWS], tl.float32)
        KK = tl.zeros([ROWS, ROWS], tl.float32)
        for value in tl.range(0, DV, BV):
            E = load_rows(errors, rows, H * DV, value, DV, ROWS, BV)
            dV = load_rows(dv, rows, H * DV, value, DV, ROWS, BV)
            EdV = tl.dot(E, tl.trans(dV), EdV, input_precision=PRECISION)
            dVE = tl.dot(dV, tl.trans(E), dVE, input_precision=PRECISION)
        for column in tl.range(0, DK, BK):
            keys = load_rows(k, rows, H * DK, column, DK, ROWS, BK)
            again = load_columns(k, rows, H * DK, column, DK, BK, ROWS)  # see solve.py
            KK = tl.dot(keys, again, KK, input_precision=PRECISION)
        above = r[:, None] < r[None, :]  # row r before row i
        below = r[:, None] > r[None, :]
        EdV = tl.where(above, EdV, 0.0)
        dVE = tl.where(below, dVE, 0.0)
        if GATED:
            EdV *= tl.exp2(tl.where(above, G[None, :] - G[:, None], 0.0))
            dVE *= tl.exp2(tl.where(below, G[:, None] - G[None, :], 0.0))
        db -= tl.sum(EdV * KK, axis=1)
        EdV *= b[:, None]
        dVE *= b[None, :]
        if GATED:
            other = (r // N)[:, None] != (r // N)[None, :]
            dG += tl.sum(tl.where(other, (EdV - dVE) * KK, 0.0), axis=1)
        dA = -(EdV + dVE).to(dtype)

    # Rows with tokens.
    EdO = tl.zeros([ROWS, TOKENS], tl.float32)
    KQ = tl.zeros([ROWS, TOKENS], tl.float32)
    for value in tl.range(0, DV, BV):
        E = load_rows(errors, rows, H * DV, value, DV, ROWS, BV)
        dO = load_rows(do, tokens, H * DV, value, DV, TOKENS, BV)
        EdO = tl.dot(E, tl.trans(dO), EdO, input_precision=PRECISION)
    for column in tl.range(0, DK, BK):
        keys = load_rows(k, rows, H * DK, column, DK, ROWS, BK)
        queries = load_rows(q, tokens, H * DK, column, DK, TOKENS, BK)
        KQ = tl.dot(keys, tl.trans(queries), KQ, input_precision=PRECISION)
    reads = read_mask(tokens, N, ROWS, TOKENS)
    D = tl.where(reads, scale, 0.0)
    if GATED:
        Gt = token_gates(gates + here * ROWS, N, CHUNK, TOKENS)
        last = tl.load(gates + here * ROWS + ROWS - 1)
        D *= tl.exp2(tl.where(reads, Gt[None, :] - G[:, None], 0.0))
    EdO *= D
    db += tl.sum(EdO * KQ, axis=1)
    dP = EdO * b[:, None]
    if GATED:
        pairs = tl.where((r // N)[:, None] == t[None, :], 0.0, dP * KQ)
        dGt = tl.sum(pairs, axis=0)
        dG -= tl.sum(pairs, axis=1)
    dP = dP.to(dtype)

    written = tl.zeros([ROWS], tl.float32)
    carried = 0.0
    for column in tl.range(0, DK, BK):
        EdS = tl.zeros([ROWS, BK], tl.float32)
        dVS = tl.zeros([ROWS, BK], tl.float32)
        dQ = tl.zeros([BK, TOKENS], tl.float32)
        for value in tl.range(0, DV, BV):
            E = load_rows(errors, rows, H * DV, value, DV, ROWS, BV)
            dO = load_rows(do, tokens, H * DV, value, DV, TOKENS, BV)
            left = tl.minimum(DV - value, BV)
            S = load_rows(states + value * DK, left, DK, column, DK, BV, BK)
            dS = load_rows(adjoints + value * DK, left, DK, column, DK, BV, BK)
            EdS = tl.dot(E, dS, EdS, input_precision=PRECISION)
            dQ = tl.dot(tl.trans(S), tl.trans(dO), dQ, input_precision=PRECISION)
            if ERASE:
                dV = load_rows(dv, rows, H * DV, value, DV, ROWS, BV)
                dVS = tl.dot(dV, S, dVS, input_precision=PRECISION)
            if GATED:
                carried += tl.sum(S.to(tl.float32) * dS.to(tl.float32))
        keys = load_rows(k, rows, H * DK, column, DK, ROWS, BK)
        queries = load_rows(q, tokens, H * DK, column, DK, TOKENS, BK)
        dQ *= scale
        if GATED:
            dQ *= tl.exp2(Gt)[None, :]
            dGt += tl.sum(dQ * load_columns(q, tokens, H * DK, column, DK, BK, TOKENS), axis=0)
            EdS *= tl.exp2(last - G)[:, None]
        along = tl.sum(EdS * keys, axis=1)
        db += along
        written += along * b
        dK = EdS * b[:, None]
        if ERASE:
            if GATED:
                dVS *= tl.exp2(G)[:, None]
                dG -= tl.sum(dVS * keys, axis=1)
            dK -= dVS
            dK = tl.dot(dA, keys, dK, input_precision=PRECISION)
        dK = tl.dot(dP, queries, dK, input_precision=PRECISION)
        dQ = tl.dot(tl.trans(keys), dP, dQ, input_precision=PRECISION)
        store_rows(dk, dK, rows, H * DK, column, DK, ROWS, BK)
        store_columns(dq, dQ, tokens, H * DK, column, DK, BK, TOKENS)

    tl.store(dbeta + (token * N + r) * H + head, db.to(dbeta.dtype.element_ty), mask=r < rows)
    if GATED:
        dG -= written
        dGt += tl.sum(tl.where((r // N)[:, None] == t[None, :], dG[:, None], 0.0), axis=0)
        dGt += tl.where(t == tokens - 1, tl.sum(written) + tl.exp2(last) * carried, 0.0)
        dGt = tl.where(t < tokens, dGt, 0.0)
        tl.store(dg + (token + t) * H + head, tl.cumsum(dGt, 0, reverse=True).to(dg.dtype.element_ty), mask=t < tokens)
