"""The recurrence in chunks of tokens: matrix products within a chunk, the state carried from one chunk to the next.

A chunk has C tokens and R = C n rows; row r = t n + j is step j of token t, with key k_r, value v_r and step size beta_r. The
state is read by queries, and by keys, which erase what they read: Y = [scale Q; K] are the chunk's reads. With a_t = exp(g_t),
a read at token t decays the state before the chunk by e_t = a_0 ... a_t, and row r of a token up to t by D_tr, the product of a
over the tokens after r's up to t. A query sees the rows of its own token and of those before it, a key the rows before it:

    F_ir = D_tr (y_i . k_r)  for rows r that read i, at token t, sees; else 0                       (1)
    Z    = Y S                                            S: the state before the chunk             (2)
    x_r  = v_r - e z_r - sum_s F_rs u_s,   u_r = beta_r x_r     by substitution, row after row      (3)
    o_t  = e z_t + sum_r F_tr u_r                                                                   (4)
    S'   = e_last S + K^T (D_last o u)                                                              (5)

and from the gradients dO of outputs and dS' of the state after the chunk, chunk after chunk from the last:

    W    = D_last o (K dS') + F_queries^T dO              what is written of u is read again        (6)
    w_r  = W_r - sum_s F_sr (beta_s w_s)                  the gradient of u, from the last row      (7)
    dv   = beta w,   dbeta = w . x,   G = [dO; -dv]       G: the gradient of what the reads read    (8)
    dF   = D o (G u^T)                                    for rows that a read sees                 (9)
    dY   = e (G S^T) + dF K                               scale dQ and the reads' part of dK       (10)
    dK   = dY_keys + dF^T Y + (D_last o u) dS'^T                                                    (11)
    dS   = e_last dS' + (e o Y)^T G                                                                 (12)
    dg_t = sum of all terms of (1), (2), (5) times their gradients that decay over t                (13)

Entries of the inverse that (3) applies are at most 2 in size for unit keys and beta <= 2, while powers of F can reach 1e27: so
substitution, never a Neumann series. Nothing divides by beta, so beta = 0 (a step switched off) is exact. Decays are running
products of numbers up to 1, so that nothing overflows and a decay of zero is one like others. In (13) pairs of rows and reads
of one token do not occur: they do not depend on g and would cancel with the loss of all digits under strong gates.

On a CPU `chunked.c` does this (`native.py`), head by head in the cache. The torch operations below are for other devices, for
machines without a C compiler and for checking others; they take a chunk of all rows and heads at a time. Arithmetic is float32,
or float64 for float64 inputs. `cu_seqlens` is read on the host, which synchronises on a GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltaproduct_kernels import native
from deltaproduct_kernels.recurrent import by_group, by_head, compute_dtype, read_offsets


def chunk_tokens(n: int, dk: int) -> int:
    """Tokens a chunk for n steps a token: 64 rows, or 32 for small heads.

    Work within a chunk grows with its rows; work on states, and the memory of those that are kept, falls.
    """
    return max(1, (64 if dk >= 64 else 32) // n)


class Inputs(NamedTuple):
    """Contiguous and in the compute dtype. Without q no outputs are wanted, without v gradients of states alone."""

    q: Tensor | None
    k: Tensor
    v: Tensor | None
    beta: Tensor
    g: Tensor | None
    scale: float
    erase: bool

    @staticmethod
    def of(q: Tensor | None, k: Tensor, v: Tensor | None, beta: Tensor, g: Tensor | None, scale: float, erase: bool) -> Inputs:
        dtype = compute_dtype((k if q is None else q).dtype)
        q, v, g = (None if x is None else x.to(dtype).contiguous() for x in (q, v, g))
        return Inputs(q, k.to(dtype).contiguous(), v, beta.to(dtype).contiguous(), g, scale, erase)

    def state(self, state: Tensor | None, sequences: int, dv: int) -> Tensor:
        """A working copy of [N, H, dk, dv]."""
        if state is None:
            return self.k.new_zeros(sequences, self.beta.shape[3], self.k.shape[4], dv)
        return state.to(self.k.dtype, memory_format=torch.contiguous_format, copy=True)


class Layout(NamedTuple):
    """Sequence i has tokens offsets[i] to offsets[i + 1] of all B T, and from chunks[i] on a chunk for every C of them."""

    C: int
    packed: bool
    offsets: list[int]
    chunks: list[int]

    @staticmethod
    def of(k: Tensor, cu_seqlens: Tensor | None) -> Layout:
        (B, T, n, _, dk) = k.shape
        C = chunk_tokens(n, dk)
        offsets = [b * T for b in range(B + 1)] if cu_seqlens is None else read_offsets(cu_seqlens, T)
        counts = (-(-(end - start) // C) for start, end in itertools.pairwise(offsets))
        return Layout(C, cu_seqlens is not None, offsets, [0, *itertools.accumulate(counts)])

    def groups(self) -> Iterator[tuple[slice, list[tuple[slice, slice]]]]:
        """Sequences that torch operations take at once, and for each of their chunks its tokens and where its states are."""
        N, ends = len(self.offsets) - 1, self.offsets[1:]
        starts = self.offsets[:-1]
        if not self.packed:  # rows of one length
            starts, ends = starts[:1], ends[:1]
        for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
            first, count = self.chunks[i], self.chunks[i + 1] - self.chunks[i]
            kept = [slice(first + c, first + c + 1) if self.packed else slice(c, N * count, count) for c in range(count)]
            tokens = [slice(t, min(t + self.C, end)) for t in range(start, end, self.C)]
            yield slice(i, i + 1) if self.packed else slice(0, N), list(zip(tokens, kept, strict=True))


def max_chunks(B: int, T: int, n: int, dk: int, sequences: int | None) -> int:
    """Chunks that B rows of T tokens need; for packed sequences a bound that needs no look at their lengths."""
    C = chunk_tokens(n, dk)
    return B * -(-T // C) if sequences is None else T // C + sequences


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
    """Returns o [B,T,H,dv] in q's dtype, the final state [N,H,dk,dv], and the state before every chunk [max_chunks,H,dk,dv].

    The last is what the backward pass needs besides the inputs: 4 dk dv / C bytes a token and head in float32.
    """
    (B, T, n, H, dv), dk = v.shape, k.shape[-1]
    x, lay = Inputs.of(q, k, v, beta, g, scale, erase), Layout.of(k, cu_seqlens)
    S = x.state(initial_state, len(lay.offsets) - 1, dv)
    o = S.new_empty(B, T, H, dv)
    states = S.new_empty(max_chunks(B, T, n, dk, None if cu_seqlens is None else len(cu_seqlens) - 1), H, dk, dv)
    states[lay.chunks[-1] :] = 0
    _forward(x, lay, S, o, states)
    return o.to(q.dtype), S, states


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
    x, lay = Inputs.of(q, k, v, beta, g, scale, erase), Layout.of(k, cu_seqlens)
    dS = x.state(dfinal, len(lay.offsets) - 1, v.shape[-1])
    G, H = k.shape[3], v.shape[3]
    each = [y.new_empty(*y.shape[:-2], H, y.shape[-1]) for y in (x.q, x.k) if y is not None]
    rest = [None if y is None else torch.empty_like(y) for y in (x.v, x.beta, x.g)]
    _backward(x, lay, do.to(dS.dtype).contiguous(), dS, states, [*each, *rest])
    grads = [*(by_group(d, G) for d in each), *rest]
    dq, dk, dv, dbeta, dg = (
        None if d is None or y is None else d.to(y.dtype) for d, y in zip(grads, (q, k, v, beta, g), strict=True)
    )
    return dq, dk, dv, dbeta, dg, dS  # type: ignore[return-value]


def chunked_summary(k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, erase: bool) -> tuple[Tensor | None, Tensor]:
    """M [B,H,dk,dk] (None without erasing) and N [B,H,dk,dv] of S' = M S + N: a forward pass from [I | 0], without outputs."""
    B, dk = k.shape[0], k.shape[-1]
    x = Inputs.of(None, k, torch.nn.functional.pad(v, (dk, 0)) if erase else v, beta, g, 1.0, erase)
    assert x.v is not None
    S = x.state(None, B, x.v.shape[-1])
    if erase:
        S.diagonal(dim1=-2, dim2=-1).fill_(1)
    _forward(x, Layout.of(k, None), S, None, None)
    return (S[..., :dk], S[..., dk:]) if erase else (None, S)


def chunked_adjoint(do: Tensor, q: Tensor, k: Tensor, beta: Tensor, g: Tensor | None, scale: float, erase: bool) -> Tensor:
    """Gradient [B,H,dk,dv] of the initial state where the final state has none: a backward pass without other gradients."""
    x = Inputs.of(q, k, None, beta, g, scale, erase)
    dS = x.state(None, k.shape[0], do.shape[-1])
    _backward(x, Layout.of(k, None), do.to(dS.dtype).contiguous(), dS, None, None)
    return dS


# -- by the kernel in C, or by torch ---------------------------------------------------------------------------------------


def _forward(x: Inputs, lay: Layout, S: Tensor, o: Tensor | None, states: Tensor | None) -> None:
    """S becomes the final state; fills in o and states unless they are None, o without q."""
    if native.available(S.device, S.dtype):
        _run(x, lay, S.shape[-1], S=S, o=o, states=states)
        return
    for sequences, chunks in lay.groups():
        end = S[sequences]
        for tokens, kept in chunks:
            c = _Chunk.of(x, tokens)
            if states is not None:
                states[kept] = end
            _, U, Z = c.update(x, tokens, end, queries=True)
            if o is not None:
                o[:, tokens] = (Z[:, :, : c.queries] + c.F[:, :, : c.queries] @ U).transpose(1, 2)
            end = c.last * end + c.K.mT @ (c.rev * U)
        S[sequences] = end


def _backward(x: Inputs, lay: Layout, do: Tensor, dS: Tensor, states: Tensor | None, wanted: list[Any] | None) -> None:
    """dS becomes the gradient of the initial state; fills in those of q, k, v, beta and g unless nobody wants them."""
    if native.available(dS.device, dS.dtype):
        names = ("d_q", "d_k", "d_v", "d_beta", "d_g")
        _run(x, lay, dS.shape[-1], d_o=do, dS=dS, states=states, **dict(zip(names, wanted or [None] * 5, strict=True)))
        return
    for sequences, chunks in lay.groups():
        after = dS[sequences]
        for tokens, kept in reversed(chunks):
            c = _Chunk.of(x, tokens)
            dO = do[:, tokens].transpose(1, 2)
            written = c.rev * (c.K @ after)
            W = written + c.F[:, :, : c.queries].mT @ dO
            if x.erase:
                W = torch.linalg.solve_triangular((c.b * c.F[:, :, c.queries :]).mT, W, upper=True, unitriangular=True)
            dV = c.b * W
            G = torch.cat([dO, -dV], 2) if x.erase else dO
            if wanted is not None and states is not None:
                c.gradients(x, tokens, states[kept], written, W, dV, G, after, wanted)
            after = c.last * after + (c.e * c.Y).mT @ G
        dS[sequences] = after


def _run(x: Inputs, lay: Layout, dv: int, **tensors: Tensor | None) -> None:
    _, _, n, G, dk = x.k.shape
    sizes = {"sequences": len(lay.offsets) - 1, "n": n, "heads": x.beta.shape[3], "groups": G, "dk": dk, "dv": dv}
    sizes |= {"tokens": lay.C, "erase": int(x.erase)}
    tensors |= {"q": x.q, "k": x.k, "v": x.v, "beta": x.beta, "g": x.g}
    places = {"offsets": torch.tensor(lay.offsets), "chunks": torch.tensor(lay.chunks)}
    native.run("solve_all", x.k.dtype, scale=x.scale, **sizes, **places, **tensors)


class _Chunk(NamedTuple):
    """A chunk of all rows and heads by torch operations."""

    queries: int  # C, or 0 without q; the keys follow if they erase
    Y: Tensor  # [B, H, reads, dk]
    K: Tensor  # [B, H, R, dk]
    b: Tensor  # [B, H, R, 1]
    D: Tensor  # [B, H, reads, R] decay of what a read sees, else 0
    F: Tensor  # [B, H, reads, R] (1)
    e: Tensor  # [B, H, reads, 1]
    last: Tensor  # [B, H, 1, 1] e_last
    rev: Tensor  # [B, H, R, 1] D_last

    @staticmethod
    def of(x: Inputs, tokens: slice) -> _Chunk:
        (n, H), C = x.beta.shape[2:], tokens.stop - tokens.start
        K, b = by_head(x.k[:, tokens], H).flatten(1, 2).transpose(1, 2), _rows(x.beta, tokens)[..., None]
        a = x.k.new_ones(1, 1, C) if x.g is None else x.g[:, tokens].transpose(1, 2).exp()
        later = torch.ones(C, C, dtype=torch.bool, device=a.device).tril(-1)
        D = torch.where(later, a[..., None], 1).cumprod(-2).tril().repeat_interleave(n, -1)  # [B, H, C, R]
        e, rev = a.cumprod(-1)[..., None], D[..., -1, :, None]
        reads, decays, es = [], [], []
        if x.q is not None:
            reads, decays, es = [by_head(x.q[:, tokens], H).transpose(1, 2) * x.scale], [D], [e]
        if x.erase:
            reads.append(K)
            decays.append(D.repeat_interleave(n, -2).tril(-1))
            es.append(e.repeat_interleave(n, -2))
        if not reads:
            return _Chunk(0, K[:, :, :0], K, b, D[..., :0, :], D[..., :0, :], e[..., :0, :], e[..., -1:, :], rev)
        Y, D_reads = torch.cat(reads, 2), torch.cat(decays, 2)
        queries = 0 if x.q is None else C
        return _Chunk(queries, Y, K, b, D_reads, D_reads * (Y @ K.mT), torch.cat(es, 2), e[..., -1:, :], rev)

    def update(self, x: Inputs, tokens: slice, S: Tensor, queries: bool) -> tuple[Tensor, Tensor, Tensor]:
        """X, U and e Z of all reads, or of keys alone (2, 3)."""
        assert x.v is not None
        first = 0 if queries else self.queries
        Z = self.e[:, :, first:] * (self.Y[:, :, first:] @ S)
        X = _rows(x.v, tokens)
        if x.erase:
            A = self.F[:, :, self.queries :] * self.b.mT
            X = torch.linalg.solve_triangular(A, X - Z[:, :, self.queries - first :], upper=False, unitriangular=True)
        return X, self.b * X, Z

    def gradients(
        self,
        x: Inputs,
        tokens: slice,
        S: Tensor,
        written: Tensor,
        W: Tensor,
        dV: Tensor,
        G: Tensor,
        dS: Tensor,
        wanted: list[Any],
    ) -> None:
        """Fills in the gradients of a chunk's inputs (8-11, 13); `written` is D_last o (K dS')."""
        dq, dk, dv, dbeta, dg = wanted
        n, C = x.k.shape[2], self.queries
        X, U, _ = self.update(x, tokens, S, queries=False)
        from_state = self.e * (G @ S.mT)
        seen = G @ U.mT
        if dg is not None:
            until = (self.last * S * dS).sum((-2, -1))[..., None] + _before(_by_token((written * U).sum(-1), n))
            read = _reads_by_token((self.Y * from_state).sum(-1, keepdim=True), C, n)[..., 0].flip(-1).cumsum(-1).flip(-1)
            pairs = _by_token(_reads_by_token(self.F * seen, C, n), n)  # [B, H, C, C]
            crossing = pairs.flip(-2).cumsum(-2).flip(-2).tril(-1).sum(-1)
            dg[:, tokens] = (until + read + crossing).transpose(1, 2)
        dF = self.D * seen
        dY = from_state + dF @ self.K
        dK = dF.mT @ self.Y + (self.rev * U) @ dS.mT
        if x.erase:
            dK = dK + dY[:, :, C:]
        dq[:, tokens] = dY[:, :, :C].transpose(1, 2) * x.scale
        for d, value in ((dk, dK), (dv, dV), (dbeta, (W * X).sum(-1))):
            d[:, tokens] = value.transpose(1, 2).unflatten(1, (C, n))


def _rows(x: Tensor, tokens: slice) -> Tensor:
    """[B, T, n, H, ...] to a chunk's [B, H, R, ...]."""
    return x[:, tokens].flatten(1, 2).transpose(1, 2)


def _by_token(x: Tensor, n: int) -> Tensor:
    """The sum of each token's rows in the last dimension."""
    return x.unflatten(-1, (-1, n)).sum(-1)


def _before(x: Tensor) -> Tensor:
    """Sums of all earlier tokens."""
    return torch.nn.functional.pad(x, (1, -1)).cumsum(-1)


def _reads_by_token(x: Tensor, C: int, n: int) -> Tensor:
    """[B, H, reads, ...] to [B, H, C, ...]: queries and keys of one token added up."""
    queries, keys = x[:, :, :C], x[:, :, C:]
    return queries + keys.unflatten(2, (C, n)).sum(3) if keys.shape[2] else queries
