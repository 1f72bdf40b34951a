"""What all kernels share: which chunk a program works on, its tiles in memory, and its decays.

A chunk is CHUNK = 64 // N tokens of one sequence, so at most 64 rows (row r = t N + j is step j of token t); tiles have
ROWS = 64 rows, and those past the chunk's end read as zero. Zero keys, values and step sizes change no state, so only stores
are masked again. One program finds its chunk from `cu_seqlens` itself: spans of S tokens of sequence s occupy the slots from
cu_seqlens[s] // S + s on, because ceil(length / S) never exceeds cu_seqlens[s + 1] // S - cu_seqlens[s] // S + 1. No table is
built, nothing is read on the host, and the number of slots, T // S + sequences, needs no look at the data.
"""

import triton
import triton.language as tl


@triton.jit
def first_slot(start, sequence, T, span, PACKED: tl.constexpr):
    """The slot of the first span of a sequence that begins at token `start`."""
    return start // span + sequence if PACKED else sequence * tl.maximum(tl.cdiv(T, span), 1).to(tl.int64)


@triton.jit
def locate(slot, cu_seqlens, T, sequences, span, PACKED: tl.constexpr):
    """(sequence, number of the span in it, the sequence's first token in all B T tokens, its length), as int64."""
    slot = slot.to(tl.int64)
    if PACKED:
        low = slot * 0
        high = low + sequences
        while high - low > 1:
            middle = (low + high) // 2
            before = first_slot(tl.load(cu_seqlens + middle).to(tl.int64), middle, T, span, PACKED) <= slot
            low = tl.where(before, middle, low)
            high = tl.where(before, high, middle)
        start = tl.load(cu_seqlens + low).to(tl.int64)
        length = tl.load(cu_seqlens + low + 1).to(tl.int64) - start
        sequence = low
    else:
        spans = tl.maximum(tl.cdiv(T, span), 1)
        sequence = slot // spans
        start = sequence * T
        length = T + slot * 0
    return sequence, slot - first_slot(start, sequence, T, span, PACKED), start, length


@triton.jit
def head_of_keys(head, H: tl.constexpr, GROUPS: tl.constexpr):
    """The head of q and k that a head of v reads."""
    return head if H == GROUPS else head // (H // GROUPS)


@triton.jit
def load_rows(base, rows, stride, column, WIDTH: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """Tile [R, C] of `rows` rows from `base`, columns from `column`; zero outside `rows` and WIDTH."""
    r = tl.arange(0, R)
    c = column + tl.arange(0, C)
    mask = (r < rows)[:, None]
    if WIDTH % C != 0:
        mask = mask & (c < WIDTH)[None, :]
    return tl.load(base + r[:, None] * stride + c[None, :], mask=mask, other=0.0)


@triton.jit
def load_columns(base, rows, stride, column, WIDTH: tl.constexpr, C: tl.constexpr, R: tl.constexpr):
    """The transpose of `load_rows`, [C, R], read as such: the result of a matrix instruction is never transposed."""
    r = tl.arange(0, R)
    c = column + tl.arange(0, C)
    mask = (r < rows)[None, :]
    if WIDTH % C != 0:
        mask = mask & (c < WIDTH)[:, None]
    return tl.load(base + r[None, :] * stride + c[:, None], mask=mask, other=0.0)


@triton.jit
def store_rows(base, tile, rows, stride, column, WIDTH: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    r = tl.arange(0, R)
    c = column + tl.arange(0, C)
    mask = (r < rows)[:, None]
    if WIDTH % C != 0:
        mask = mask & (c < WIDTH)[None, :]
    tl.store(base + r[:, None] * stride + c[None, :], tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def store_columns(base, tile, rows, stride, column, WIDTH: tl.constexpr, C: tl.constexpr, R: tl.constexpr):
    """Store `tile` [C, R] as `rows` rows of C columns."""
    r = tl.arange(0, R)
    c = column + tl.arange(0, C)
    mask = (r < rows)[None, :]
    if WIDTH % C != 0:
        mask = mask & (c < WIDTH)[:, None]
    tl.store(base + r[None, :] * stride + c[:, None], tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_tile(base, row, column, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """Tile [R, C] of a matrix [HEIGHT, WIDTH] from (row, column) on; zero outside."""
    r = row + tl.arange(0, R)
    c = column + tl.arange(0, C)
    pointers = base + r[:, None] * WIDTH + c[None, :]
    if HEIGHT % R == 0 and WIDTH % C == 0:
        return tl.load(pointers)
    return tl.load(pointers, mask=(r < HEIGHT)[:, None] & (c < WIDTH)[None, :], other=0.0)


@triton.jit
def store_tile(base, tile, row, column, rows, WIDTH: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """The inverse of `load_tile` for a matrix of `rows` rows, in the memory's dtype."""
    r = row + tl.arange(0, R)
    c = column + tl.arange(0, C)
    mask = (r < rows)[:, None]
    if WIDTH % C != 0:
        mask = mask & (c < WIDTH)[None, :]
    tl.store(base + r[:, None] * WIDTH + c[None, :], tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_state(base, value, stride_v, stride_k, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """S^T [BV, BK] in float32, values from `value` on, from a state whose element (v, k) is at v stride_v + k stride_k."""
    v = value + tl.arange(0, BV)
    k = tl.arange(0, BK)
    pointers = base + v[:, None] * stride_v + k[None, :] * stride_k
    if DV % BV == 0 and DK == BK:
        state = tl.load(pointers)
    else:
        state = tl.load(pointers, mask=(v < DV)[:, None] & (k < DK)[None, :], other=0.0)
    return state.to(tl.float32)


@triton.jit
def store_state(base, state, value, stride_v, stride_k, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """The inverse of `load_state`, in the memory's dtype."""
    v = value + tl.arange(0, BV)
    k = tl.arange(0, BK)
    pointers = base + v[:, None] * stride_v + k[None, :] * stride_k
    state = state.to(base.dtype.element_ty)
    if DV % BV == 0 and DK == BK:
        tl.store(pointers, state)
    else:
        tl.store(pointers, state, mask=(v < DV)[:, None] & (k < DK)[None, :])


@triton.jit
def row_gates(gates, ROWS: tl.constexpr):
    """G [ROWS] of one chunk: the sum of g up to and including each row's token, in units of log 2; past the end, of all."""
    return tl.load(gates + tl.arange(0, ROWS))


@triton.jit
def token_gates(gates, N: tl.constexpr, CHUNK: tl.constexpr, C: tl.constexpr):
    """The same by tokens [C]."""
    t = tl.minimum(tl.arange(0, C), CHUNK - 1)
    return tl.load(gates + t * N)


@triton.jit
def load_beta(beta, row, rows, H, ROWS: tl.constexpr):
    """Step sizes [ROWS] in float32 from row `row` on."""
    r = tl.arange(0, ROWS)
    return tl.load(beta + row * H + r * H, mask=r < rows, other=0.0).to(tl.float32)


@triton.jit
def read_mask(tokens, N: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """[R, C]: does token t (column) read row r? Rows of its own token and of earlier ones."""
    r = tl.arange(0, R)
    t = tl.arange(0, C)
    return ((r // N)[:, None] <= t[None, :]) & (t < tokens)[None, :]
