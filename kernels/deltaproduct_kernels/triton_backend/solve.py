"""Y = (I + tril(Gamma o K K^T, -1) diag(beta))^-1 of every chunk: the recurrence within a chunk, solved.

With it the errors of all rows are E = Y (V - e^G o K S), S the state before the chunk. Because Gamma_ij = e^{G_i - G_j} is a
similarity, Y = Gamma o (I + tril(K K^T, -1) diag(beta))^-1: the solve itself sees neither gates nor exponentials. Entries
of Y are at most beta <= 2 in size for unit keys, while powers of the triangular matrix reach 1e27: 16 x 16 diagonal blocks
are inverted by substitution in float32, then merged twice, never by a Neumann series.

Y and the gates summed within chunks are the only things the forward pass keeps for the backward besides sparse states.
"""

import triton
import triton.language as tl

from deltaproduct_kernels.triton_backend.tiles import load_beta, load_columns, load_rows, locate


@triton.jit
def _merge(X, A, SIZE: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr):
    """From inverses of diagonal blocks of SIZE to those of twice the size:

    [[P, 0], [L, Q]]^-1 = [[P^-1, 0], [-Q^-1 L P^-1, Q^-1]].
    """
    block = tl.arange(0, ROWS) // SIZE
    beside = (block[:, None] == block[None, :] + 1) & (block[None, :] % 2 == 0)
    L = tl.where(beside, A, 0.0)
    return X - tl.dot(X, tl.dot(L, X, input_precision=PRECISION), input_precision=PRECISION)


@triton.jit
def unit_lower_inverse(A, ROWS: tl.constexpr, PRECISION: tl.constexpr):
    """(I + A)^-1 for a strictly lower triangular A [ROWS, ROWS] in float32; ROWS = 16, 32 or 64."""
    B: tl.constexpr = 16
    M: tl.constexpr = ROWS // B
    # The M diagonal blocks as one [M, B, B] tensor: 15 dependent steps for all of them.
    m = tl.arange(0, M)
    diagonal = (m[:, None, None, None] == m[None, None, :, None]).to(tl.float32)
    blocks = tl.sum(tl.reshape(A, [M, B, M, B]) * diagonal, axis=2)
    b = tl.arange(0, B)
    X = (b[:, None] == b[None, :]).to(tl.float32)[None, :, :] - blocks
    for row in tl.static_range(2, B):
        here = (b == row).to(tl.float32)
        a = tl.sum(blocks * here[None, :, None], axis=1)  # row `row` of each block
        x = here[None, :] - tl.sum(a[:, :, None] * X, axis=1)
        X = tl.where((b == row)[None, :, None], x[:, None, :], X)
    X = tl.reshape(X[:, :, None, :] * diagonal, [ROWS, ROWS])
    if ROWS >= 32:
        X = _merge(X, A, 16, ROWS, PRECISION)
    if ROWS >= 64:
        X = _merge(X, A, 32, ROWS, PRECISION)
    return X


@triton.jit(do_not_specialize=["T", "sequences"])
def solve_kernel(
    k,
    beta,
    g,
    y,
    gates,
    cu_seqlens,
    T,
    sequences,
    H: tl.constexpr,
    N: tl.constexpr,
    DK: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    BK: tl.constexpr,
    GATED: tl.constexpr,
    ERASE: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    MERGE_PRECISION: tl.constexpr,
):
    """One program a chunk and head: keys in, Y [slots, H, ROWS, ROWS] and gates [slots, H, ROWS] out."""
    pid = tl.program_id(0)
    slot = pid // H
    head = pid % H
    _, part, start, length = locate(slot, cu_seqlens, T, sequences, CHUNK, PACKED)
    if part * CHUNK >= length:
        return
    token = start + part * CHUNK
    tokens = tl.minimum(length - part * CHUNK, CHUNK).to(tl.int32)
    rows = tokens * N
    out = slot.to(tl.int64) * H + head
    r = tl.arange(0, ROWS)
    if GATED:
        steps = tl.load(g + (token + r // N) * H + head, mask=(r % N == 0) & (r < rows), other=0.0).to(tl.float32)
        # No decay is below float32's smallest number: -inf - -inf would be NaN, and a large sum loses small ones.
        G = tl.cumsum(tl.maximum(steps * 1.4426950408889634, -126.0), 0)
        tl.store(gates + out * ROWS + r, G)
    if ERASE:
        keys = k + (token * N * H + head) * DK
        products = tl.zeros([ROWS, ROWS], tl.float32)
        for column in tl.static_range(0, DK, BK):
            # The second operand is read anew: a product of a register tile with its own transpose miscompiles on Hopper.
            left = load_rows(keys, rows, H * DK, column, DK, ROWS, BK)
            right = load_columns(keys, rows, H * DK, column, DK, BK, ROWS)
            products = tl.dot(left, right, products, input_precision=PRECISION)
        b = load_beta(beta + head, token * N, rows, H, ROWS)
        below = r[:, None] > r[None, :]
        X = unit_lower_inverse(tl.where(below, products * b[None, :], 0.0), ROWS, MERGE_PRECISION)
        if GATED:
            X *= tl.exp2(tl.where(below, G[:, None] - G[None, :], 0.0))
        target = y + out * ROWS * ROWS + r[:, None] * ROWS + r[None, :]
        tl.store(target, X.to(y.dtype.element_ty))
