"""Y = (I + tril(Gamma o K K^T, -1) diag(beta))^-1 of every chunk: the recurrence within a chunk, solved.

With it the errors of all rows are E = Y (V - e^G o K S), S the state before the chunk. Because Gamma_ij = e^{G_i - G_j} is a
similarity, Y = Gamma o (I + tril(K K^T, -1) diag(beta))^-1: the solve itself sees neither gates nor exponentials. Entries
of Y are at most beta <= 2 in size for unit keys, while powers of the triangular matrix reach 1e27: inverses of diagonal blocks
are merged from 2 x 2 up to all rows, never summed up as a Neumann series. Merges to 16 x 16 are products of all diagonal
blocks side by side, those to 32 and 64 products of whole tiles; operands are float16 (as fine as tf32 at half the cost; their
entries are of the order of 1), sums float32.

Y and the gates summed within chunks are the only things the forward pass keeps for the backward besides sparse states.
Order of products: K K^T, 6 of [16, 16] blocks, 4 of [64, 64] tiles, each waiting for the one before; so many programs share a
multiprocessor (by their registers 3 of 4 warps).
"""

import triton
import triton.language as tl

from deltaproduct_kernels.triton_backend.tiles import head_of_keys, load_beta, load_rows, locate


@triton.jit
def _merge(X, A, SIZE: tl.constexpr, dtype: tl.constexpr):
    """From inverses of diagonal blocks of SIZE to those of twice the size:

    [[P, 0], [L, Q]]^-1 = [[P^-1, 0], [-Q^-1 L P^-1, Q^-1]].
    """
    block = tl.arange(0, X.shape[-1]) // SIZE
    beside = (block[:, None] == block[None, :] + 1) & (block[None, :] % 2 == 0)
    L = tl.where(beside, A, 0.0).to(dtype)
    x = X.to(dtype)
    return X - tl.dot(x, tl.dot(L, x, input_precision="ieee").to(dtype), input_precision="ieee")


@triton.jit
def unit_lower_inverse(A, ROWS: tl.constexpr, dtype: tl.constexpr):
    """(I + A)^-1 for a strictly lower triangular A [ROWS, ROWS] in float32; ROWS = 16 or 64. Products are of `dtype`."""
    B: tl.constexpr = 16
    M: tl.constexpr = ROWS // B
    m = tl.arange(0, M)
    diagonal = (m[:, None, None, None] == m[None, None, :, None]).to(tl.float32)
    blocks = tl.sum(tl.reshape(A, [M, B, M, B]) * diagonal, axis=2)  # [M, B, B]
    b = tl.arange(0, B)
    pairs = (b[:, None] == b[None, :] + 1) & (b[None, :] % 2 == 0)
    X = (b[:, None] == b[None, :]).to(tl.float32) - tl.where(pairs, blocks, 0.0)
    X = _merge(X, blocks, 2, dtype)
    X = _merge(X, blocks, 4, dtype)
    X = _merge(X, blocks, 8, dtype)
    X = tl.reshape(X[:, :, None, :] * diagonal, [ROWS, ROWS])
    if ROWS == 64:
        X = _merge(X, A, 16, dtype)
        X = _merge(X, A, 32, dtype)
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
    GROUPS: tl.constexpr,
    N: tl.constexpr,
    DK: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    BK: tl.constexpr,
    GATED: tl.constexpr,
    ERASE: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program a chunk and head: keys in, Y [slots, H, ROWS, ROWS] and gates [slots, H, ROWS] out."""
    pid = tl.program_id(0)
    slot = pid // H
    head = pid % H
    key_head = head_of_keys(head, H, GROUPS)
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
        keys = k + (token * N * GROUPS + key_head) * DK
        products = tl.zeros([ROWS, ROWS], tl.float32)
        for column in tl.static_range(0, DK, BK):
            tile = load_rows(keys, rows, GROUPS * DK, column, DK, ROWS, BK)
            products = tl.dot(tile, tl.trans(tile), products, input_precision=PRECISION)
        b = load_beta(beta + head, token * N, rows, H, ROWS)
        below = r[:, None] > r[None, :]
        half: tl.constexpr = tl.float32 if k.dtype.element_ty == tl.float32 else tl.float16
        X = unit_lower_inverse(tl.where(below, products * b[None, :], 0.0), ROWS, half)
        if GATED:
            X *= tl.exp2(tl.where(below, G[:, None] - G[None, :], 0.0))
        target = y + out * ROWS * ROWS + r[:, None] * ROWS + r[None, :]
        tl.store(target, X.to(y.dtype.element_ty))
