"""The recurrence in chunks of tokens: matrix products within a chunk, a short serial pass over chunk states.

Within a chunk of C tokens, R = C n rows (row r = t n + j is step j of token t), G the inclusive cumulative sum of g and
T = (I + tril(diag(beta) (Gamma o K K^T), -1))^-1 with Gamma_ij = exp(G_i - G_j), the updates of all rows are

    u = T (beta o V) - T (beta e^G o K) S = U - W S             S: the state before the chunk
    S' = e^{G_last} S + (e^{G_last - G} o K)^T u                serial over chunks: two products each
    o  = e^G o (Q S) + (D o Q K^T) u                            D_tr = e^{G_t - G_r} for rows of no later token

Everything but the second line is computed for all chunks at once. Entries of T are at most beta <= 2 in size for unit
keys, while powers of the triangular matrix can reach 1e27; so T comes from substitution, never from a Neumann series.
Only differences of G that are <= 0 are exponentiated: the mask is applied to the exponent.

The backward pass differentiates the solve, not the inverse: with u = T rhs, w = T^T du is the gradient of rhs and
-tril(w u^T, -1) that of the triangular matrix. Nothing divides by beta, so beta = 0 (a step switched off) is exact, and the
gradient of g is summed from pairs of *different* tokens only, because pairs within a token do not depend on g and would
cancel with the loss of all digits under strong gates.

All arithmetic is float32 (float64 for float64 inputs). Sequences of different lengths are packed into one list of chunks
sorted by chunk number, then by falling sequence length, so each serial step works on one contiguous slice and a
zero-length sequence costs nothing. `cu_seqlens` is read on the host, which synchronises on a GPU: this backend is for
CPUs and for checking others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from deltaproduct_kernels.recurrent import compute_dtype, read_offsets


def chunk_tokens(n: int, dk: int) -> int:
    """Tokens a chunk for n steps a token: 64 rows, or 16 for small heads.

    Of 16, 32, 64 and 128 rows the fastest forward and backward on a CPU (dk = 32: 17 ms with 16 rows, 35 with 64; dk = 128:
    234 with 16, 139 with 64), because work within a chunk grows with rows and work on states with dk.
    """
    return max(1, (64 if dk >= 64 else 16) // n)


@dataclass(frozen=True)
class Layout:
    """Which token goes where: `index` [M, C] into the flattened B*T tokens, or None when chunks are a reshape."""

    C: int
    chunks: int
    sequences: int
    active: list[int]  # active[c]: number of sequences that have a chunk c
    index: Tensor | None
    padding: Tensor | None  # [M, C] bool, True where there is no token
    order: Tensor | None  # sequences by falling length; None: as they are

    @staticmethod
    def build(B: int, T: int, n: int, dk: int, cu_seqlens: Tensor | None, device: torch.device) -> Layout:
        C = chunk_tokens(n, dk)
        if cu_seqlens is None:
            count = -(-T // C)
            return Layout(C, B * count, B, [B] * count, None, None, None)
        offsets = torch.tensor(read_offsets(cu_seqlens, T))
        lengths = offsets.diff()
        order = torch.argsort(lengths, descending=True, stable=True)
        counts = -(-lengths[order] // C)  # chunks of each sequence, falling
        active = [int((counts > c).sum()) for c in range(int(counts[0]) if len(counts) else 0)]
        rows = [offsets[:-1][order[:m]] + c * C for c, m in enumerate(active)]
        starts = torch.cat(rows) if rows else offsets[:0]
        ends = torch.cat([offsets[1:][order[:m]] for m in active]) if rows else offsets[:0]
        index = starts[:, None] + torch.arange(C)
        padding = index >= ends[:, None]
        index = index.masked_fill(padding, 0).to(device)
        return Layout(C, len(index), len(lengths), active, index, padding.to(device), order.to(device))

    def gather(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, T, ...] -> [M, C, ...]; places without a token are 0."""
        B, T = x.shape[:2]
        if self.index is None:
            count = len(self.active)
            x = torch.nn.functional.pad(x, [0, 0] * (x.dim() - 2) + [0, count * self.C - T])
            return x.view(B, count, self.C, *x.shape[2:]).transpose(0, 1).reshape(self.chunks, self.C, *x.shape[2:]).to(dtype)
        assert self.padding is not None
        out = x.reshape(B * T, *x.shape[2:])[self.index].to(dtype)
        return out.masked_fill_(self.padding.view(*self.padding.shape, *[1] * (x.dim() - 2)), 0)

    def scatter(self, x: Tensor, B: int, T: int, dtype: torch.dtype) -> Tensor:
        """[M, C, ...] -> [B, T, ...]: the inverse of gather."""
        if self.index is None:
            x = x.view(len(self.active), B, self.C, *x.shape[2:]).transpose(0, 1)
            return x.reshape(B, len(self.active) * self.C, *x.shape[3:])[:, :T].to(
                dtype, memory_format=torch.contiguous_format, copy=True
            )
        assert self.padding is not None
        out = x.new_zeros(B * T, *x.shape[2:], dtype=dtype)
        valid = ~self.padding
        out[self.index[valid]] = x[valid].to(dtype)
        return out.view(B, T, *x.shape[2:])

    def slices(self) -> list[slice]:
        """The chunks of each serial step."""
        ends = torch.tensor(self.active).cumsum(0).tolist()
        return [slice(end - m, end) for end, m in zip(ends, self.active, strict=True)]


class _Chunks(NamedTuple):
    """What both passes need, for all M chunks at once; decays are None without a gate, Q and P empty without q."""

    Q: Tensor  # [M, H, C, dk], scaled
    K: Tensor  # [M, H, R, dk]
    V: Tensor  # [M, H, R, dv]
    b: Tensor  # [M, H, R, 1]
    T: Tensor | None  # [M, H, R, R]; None without erasing
    A: Tensor | None  # [M, H, R, R] tril(Gamma o K K^T, -1)
    gamma: Tensor | None  # [M, H, R, R] lower part of exp(G_i - G_j)
    D: Tensor  # [M, H, C, R] exp(G_t - G_r), 0 for rows of later tokens
    P: Tensor  # [M, H, C, R] D o Q K^T
    eG: Tensor | None  # [M, H, C, 1] exp(G_t)
    eGr: Tensor | None  # [M, H, R, 1] the same by rows
    rev: Tensor | None  # [M, H, R, 1] exp(G_last - G_r)
    last: Tensor | None  # [M, H, 1, 1] exp(G_last)


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


def _prepare(
    q: Tensor | None, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, scale: float, erase: bool, lay: Layout
) -> _Chunks:
    dtype = compute_dtype((k if q is None else q).dtype)
    n, C = k.shape[2], lay.C
    R = C * n
    K, V = (lay.gather(x, dtype).flatten(1, 2).transpose(1, 2).contiguous() for x in (k, v))
    b = lay.gather(beta, dtype).flatten(1, 2).transpose(1, 2).contiguous()[..., None]
    token = torch.arange(R, device=k.device) // n
    sees = torch.arange(C, device=k.device)[:, None] >= token  # [C, R]
    gamma = eG = eGr = rev = last = None
    D = sees.to(dtype)
    if g is not None:
        # No decay is below the dtype's smallest number: -inf - -inf would be NaN, and a large sum loses small ones.
        least = math.log(torch.finfo(dtype).tiny)
        G = lay.gather(g, dtype).clamp_min(least).transpose(1, 2).cumsum(-1)  # [M, H, C]
        Gr = G.repeat_interleave(n, -1)
        lower = torch.ones(R, R, dtype=torch.bool, device=k.device).tril()
        if erase:
            gamma = (Gr[..., :, None] - Gr[..., None, :]).masked_fill_(~lower, -torch.inf).exp_()
        D = (G[..., :, None] - Gr[..., None, :]).masked_fill_(~sees, -torch.inf).exp_()
        eG, eGr, rev = G.exp()[..., None], Gr.exp()[..., None], (G[..., -1:] - Gr).exp()[..., None]
        last = eG[..., -1:, :]
    A = T = None
    if erase:
        A = _times(K @ K.mT, gamma).tril_(-1)
        identity = torch.eye(R, dtype=dtype, device=k.device)
        T = torch.linalg.solve_triangular(b * A, identity.expand_as(A), upper=False, unitriangular=True)
    Q = P = K.new_empty(0)
    if q is not None:
        Q = lay.gather(q, dtype).transpose(1, 2).contiguous() * scale
        P = D * (Q @ K.mT)
    return _Chunks(Q, K, V, b, T, A, gamma, D, P, eG, eGr, rev, last)


def _updates(c: _Chunks) -> tuple[Tensor, Tensor | None]:
    """U and W of u = U - W S; W is None without erasing."""
    if c.T is None:
        return c.b * c.V, None
    return c.T @ (c.b * c.V), c.T @ (_times(c.b, c.eGr) * c.K)


def chunked_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    erase: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns o [B,T,H,dv] in q's dtype, the final state [N,H,dk,dv], and the state before every chunk [M,H,dk,dv].

    The last is what the backward pass needs besides the inputs: 4 dk dv / C bytes a token and head in float32.
    """
    (B, T, n, H, dk), dv = k.shape, v.shape[-1]
    lay = Layout.build(B, T, n, dk, cu_seqlens, q.device)
    c = _prepare(q, k, v, beta, g, scale, erase, lay)
    U, W = _updates(c)
    KR = _times(c.K, c.rev).mT
    S = _sorted_state(initial_state, lay, c.Q, H, dk, dv)
    states = c.Q.new_empty(lay.chunks, H, dk, dv)
    u = U if W is None else torch.empty_like(U)
    for part in lay.slices():
        m = part.stop - part.start
        states[part] = S[:m]
        if W is not None:
            torch.sub(U[part], W[part] @ S[:m], out=u[part])
        S[:m] = _times(S[:m], None if c.last is None else c.last[part]) + KR[part] @ u[part]
    o = _times(c.Q @ states, c.eG) + c.P @ u
    return lay.scatter(o.transpose(1, 2), B, T, q.dtype), _unsorted_state(S, lay), states


class _Adjoint(NamedTuple):
    """The serial pass backwards: dS = e^{G_last} dS' + (e^G o Q)^T dO - Z^T w, w = T^T (P^T dO + rev o K dS')."""

    last: Tensor | None
    read: Tensor  # [M, H, dk, dv] (e^G o Q)^T dO
    local: Tensor  # [M, H, R, dv] T^T P^T dO
    Y: Tensor  # [M, H, R, dk] T^T (rev o K)
    Z: Tensor | None  # [M, H, R, dk] beta e^G o K; None without erasing

    @staticmethod
    def of(c: _Chunks, dO: Tensor) -> _Adjoint:
        read, local, Y = _times(c.Q, c.eG).mT @ dO, c.P.mT @ dO, _times(c.K, c.rev)
        if c.T is None:
            return _Adjoint(c.last, read, local, Y, None)
        return _Adjoint(c.last, read, c.T.mT @ local, c.T.mT @ Y, _times(c.b, c.eGr) * c.K)

    def before(self, dS: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        """dS before the chunks `part` from that after them, and their w."""
        w = torch.add(self.local[part], self.Y[part] @ dS)
        dS = _times(dS, None if self.last is None else self.last[part]) + self.read[part]
        return (dS if self.Z is None else dS - self.Z[part].mT @ w), w


def chunked_backward(
    do: Tensor,
    dfinal: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    states: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    erase: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of q, k, v, beta, g (None without a gate) and the initial state [N,H,dk,dv], in their inputs' dtypes."""
    (B, T, n, H, dk), dv = k.shape, v.shape[-1]
    lay = Layout.build(B, T, n, dk, cu_seqlens, q.device)
    c = _prepare(q, k, v, beta, g, scale, erase, lay)
    dO = lay.gather(do, c.Q.dtype).transpose(1, 2).contiguous()
    S = states[: lay.chunks]

    adjoint = _Adjoint.of(c, dO)
    w = torch.empty_like(adjoint.local)
    dS = _sorted_state(dfinal, lay, c.Q, H, dk, dv)
    dS_after = torch.empty_like(S)
    for part in reversed(lay.slices()):
        m = part.stop - part.start
        dS_after[part] = dS[:m]
        dS[:m], w[part] = adjoint.before(dS[:m], part)

    # Parallel over chunks from here on.
    U, W = _updates(c)
    u = U if W is None else U - W @ S
    KS = _times(c.K @ S, c.eGr)
    dV = c.b * w
    dP = c.D * (dO @ u.mT)
    readout = _times(dO @ S.mT, c.eG)
    write = _times(u @ dS_after.mT, c.rev)
    dQ = readout + dP @ c.K
    dK = dP.mT @ c.Q + write
    db = (w * c.V).sum(-1)
    erased = dA = None
    if c.A is not None:
        erased = _times(c.b, c.eGr) * (w @ S.mT)
        db -= (w * KS).sum(-1)
        dL = (w @ u.mT).tril_(-1).neg_()
        db += (dL * c.A).sum(-1)
        dA = c.b * dL
        dKK = _times(dA, c.gamma)
        dK += (dKK + dKK.mT) @ c.K - erased
    dg = None if g is None else _gate_gradient(c, lay, n, dP, dA, readout, write, erased, S, dS_after)

    def rows(x: Tensor, like: Tensor) -> Tensor:
        """[M, H, R, ...] -> [B, T, n, H, ...]"""
        return lay.scatter(x.transpose(1, 2).unflatten(1, (lay.C, n)), B, T, like.dtype)

    dq = lay.scatter(dQ.transpose(1, 2) * scale, B, T, q.dtype)
    dg = None if dg is None or g is None else lay.scatter(dg.transpose(1, 2), B, T, g.dtype)
    return dq, rows(dK, k), rows(dV, v), rows(db, beta), dg, _unsorted_state(dS, lay)


def chunked_summary(k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, erase: bool) -> tuple[Tensor | None, Tensor]:
    """M [B,H,dk,dk] (None without erasing) and N [B,H,dk,dv] of S' = M S + N: the serial pass from [I | 0], without outputs."""
    (B, T, n, H, dk), dv = k.shape, v.shape[-1]
    lay = Layout.build(B, T, n, dk, None, k.device)
    c = _prepare(None, k, v, beta, g, 1.0, erase, lay)
    U, W = _updates(c)
    KR = _times(c.K, c.rev).mT
    S = c.K.new_zeros(B, H, dk, dv)
    if W is not None:
        U = torch.nn.functional.pad(U, (dk, 0))
        S = torch.cat([torch.eye(dk, dtype=S.dtype, device=S.device).expand(B, H, dk, dk), S], -1)
    for part in lay.slices():
        u = U[part] if W is None else U[part] - W[part] @ S
        S = _times(S, None if c.last is None else c.last[part]) + KR[part] @ u
    return (None, S) if W is None else (S[..., :dk], S[..., dk:])


def chunked_adjoint(do: Tensor, q: Tensor, k: Tensor, beta: Tensor, g: Tensor | None, scale: float, erase: bool) -> Tensor:
    """Gradient [B,H,dk,dv] of the initial state where the final state has none: the backward's serial pass alone."""
    (B, T, n, H, dk), dv = k.shape, do.shape[-1]
    lay = Layout.build(B, T, n, dk, None, k.device)
    c = _prepare(q, k, k[..., :0], beta, g, scale, erase, lay)
    adjoint = _Adjoint.of(c, lay.gather(do, c.Q.dtype).transpose(1, 2).contiguous())
    dS = c.Q.new_zeros(B, H, dk, dv)
    for part in reversed(lay.slices()):
        dS, _ = adjoint.before(dS, part)
    return dS


def _gate_gradient(
    c: _Chunks,
    lay: Layout,
    n: int,
    dP: Tensor,
    dA: Tensor | None,
    readout: Tensor,
    write: Tensor,
    erased: Tensor | None,
    S: Tensor,
    dS_after: Tensor,
) -> Tensor:
    """dg [M, H, C]: G is differentiated pair by pair, pairs of one token left out, then summed over later tokens."""
    R = lay.C * n
    assert c.last is not None
    token = torch.arange(R, device=dP.device) // n
    other = (torch.arange(lay.C, device=dP.device)[:, None] != token).to(dP.dtype)
    X = dP * (c.Q @ c.K.mT) * other  # pairs (query t, row r)
    by_row = -X.sum(-2)
    if dA is not None and c.A is not None and erased is not None:
        Y = dA * c.A * (token[:, None] != token).to(dP.dtype)  # pairs (row i, row j)
        by_row = by_row + Y.sum(-1) - Y.sum(-2) - (erased * c.K).sum(-1)
    written = (write * c.K).sum(-1)
    dG = (c.Q * readout).sum(-1) + X.sum(-1) + (by_row - written).unflatten(-1, (lay.C, n)).sum(-1)
    dG[..., -1] += written.sum(-1) + (c.last * S * dS_after).sum((-2, -1))
    return dG.flip(-1).cumsum(-1).flip(-1)


def _sorted_state(state: Tensor | None, lay: Layout, like: Tensor, H: int, dk: int, dv: int) -> Tensor:
    """A working copy [N,H,dk,dv] in the compute dtype, sequences by falling length."""
    if state is None:
        return like.new_zeros(lay.sequences, H, dk, dv)
    state = state.to(like.dtype, copy=True)
    return state if lay.order is None else state[lay.order]


def _unsorted_state(state: Tensor, lay: Layout) -> Tensor:
    return state if lay.order is None else state[torch.argsort(lay.order)]
