"""One sequence over several ranks: what the token mixers exchange when each rank holds a segment of every row.

Rank r of the C of a context group holds tokens [r T/C, (r + 1) T/C) of each row of T; everything but the mixers works on a
token alone and does not notice. The invariant is that a segment's result is that of the whole row:

* **Recurrence.** It is affine in its state, so a segment is a map S_out = M S_in + N. Every rank sums its segment up, a prefix
  scan of the maps over the ranks (`_scan`: log2 C rounds, one map to one rank in each) tells every rank its true initial
  state, and the ordinary operator runs from there. Backwards dS_in = M^T dS_out + D, with D from the segment's own outputs:
  one pass for D, the same scan from the last rank, and the ordinary backward with the true adjoint of the final state.
  Nothing is differentiated through M, and what is exchanged does not depend on the length. (The same algebra cuts sequences
  among programs on one GPU, deltaproduct_kernels/triton_backend/launch.py.)
* **Convolutions** get the last tokens of the rank before; the first rank gets zeros, which is their padding.
* **Softmax layers** get the keys and values of all earlier segments, or only the window's if the rank before holds it.

Documents: a rank's offsets are the row's, clamped to its segment, so the first document may go on from the rank before and
a map ends where a document begins. Every exchange is a torch.library operator with a fake kernel and autograd. The group is
passed by name, as torch's own functional collectives do it. Which rank reads what is `titan_dp.distributed`'s.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deltaproduct_kernels import gated_delta_product, segment_adjoint, segment_summary
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from titan_dp.model.layers import Packing

# torch 2.13 renamed them; the old names warn there.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class ContextParallel:
    """This rank's place in its context group, and the exchanges of one layer."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.size = group.group_name, dist.get_rank(group), dist.get_world_size(group)

    def packing(self, cu_seqlens: Tensor, rows: int, tokens: int) -> Packing:
        """The documents of this rank's segments of `rows` rows, `tokens` of each, flattened.

        `cu_seqlens` are offsets into the whole rows, flattened; none may reach from one row into the next. Positions count
        from the beginning of a document, wherever that is; documents of other ranks are empty here.
        """
        whole = Packing.build(cu_seqlens, rows * tokens * self.size)
        row, offset = cu_seqlens // (tokens * self.size), cu_seqlens % (tokens * self.size)
        own = row * tokens + (offset - self.rank * tokens).clamp(0, tokens)
        document, position = (x.view(rows, self.size, tokens)[:, self.rank].flatten() for x in whole[1:3])
        return Packing(own, document, position, rows)

    def prepend_halo(self, x: Tensor, packing: Packing | None, halo: int) -> tuple[Tensor, Packing | None]:
        """x [B, T, D] (or packed rows) with the `halo` tokens before each row's segment; the packing that goes with it."""
        rows = x.shape[0] if packing is None else packing.rows
        by_row = x.reshape(rows, -1, x.shape[-1])
        before = shift(by_row[:, by_row.shape[1] - halo :], 1, self.group)
        extended = torch.cat([before, by_row], 1)
        if packing is None:
            return extended, None
        # Positions of the halo do not matter, what is computed there is dropped. Nobody asks for its documents.
        position = torch.nn.functional.pad(packing.position.view(rows, -1), (halo, 0)).flatten()
        return extended.view(1, -1, x.shape[-1]), packing._replace(position=position)

    def drop_halo(self, y: Tensor, packing: Packing | None, halo: int) -> Tensor:
        """The inverse for what was computed from it, token by token: y [B, halo + T, ...]."""
        rows = y.shape[0] if packing is None else packing.rows
        return y.reshape(rows, -1, *y.shape[2:])[:, halo:].reshape(y.shape[0], -1, *y.shape[2:])

    def recurrence(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        g: Tensor | None,
        packing: Packing | None,
        *,
        erase: bool,
        backend: str,
    ) -> Tensor:
        """Reads o [B, T, H, dv] of this rank's segments; arguments as in `gated_delta_product`, packed or by rows."""
        cu_seqlens, document, position, rows = (None, None, None, q.shape[0]) if packing is None else packing
        sequences = rows if cu_seqlens is None else cu_seqlens.shape[0] - 1
        where: Any = (document, position, rows, sequences, erase, backend, self.group)
        state, M = state_before(k.detach(), v.detach(), beta.detach(), None if g is None else g.detach(), *where)
        o, final = gated_delta_product(
            q, k, v, beta, g, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens, erase=erase, backend=backend
        )
        return continued(o, final, q, k, beta, g, M, *where)

    def earlier(self, k: Tensor, v: Tensor, window: int | None) -> tuple[Tensor, Tensor, int]:
        """Keys and values [B, h, T, d] with those before them that a window of tokens sees, and the index of the first.

        Indices below 0 are padding. Without a window, or if it is longer than a segment, all earlier ones are gathered.
        """
        both, T = torch.stack([k, v]), k.shape[2]
        start, back = self.rank * T, (T * self.size if window is None else window) - 1
        if window is not None and back <= T:
            k, v = torch.cat([shift(both[..., T - back :, :], 1, self.group), both], -2) if back else both
            return k, v, start - back
        seen = gather(both, self.group)[: self.rank + 1].movedim(0, -3).flatten(-3, -2)
        first = max(0, start - back)
        k, v = seen[..., first:, :]
        return k, v, first


def _resolve(group: str) -> dist.ProcessGroup:
    return _resolve_process_group(group)  # type: ignore[arg-type]  # some versions have a type of its own for names


def _place(group: str) -> tuple[int, int]:
    """This rank in the group, and the group's size."""
    resolved = _resolve(group)
    return dist.get_rank(resolved), resolved.size()


def _shift(x: Tensor, by: int, group: str) -> Tensor:
    """x of the rank that is `by` before this one; zeros if there is none."""
    rank, size = _place(group)
    out, source = torch.zeros_like(x, memory_format=torch.contiguous_format), x.contiguous()
    sends, receives = [0] * size, [0] * size
    if 0 <= rank + by < size:
        sends[rank + by] = x.numel()
    if 0 <= rank - by < size:
        receives[rank - by] = x.numel()
    to, what = out.flatten()[: sum(receives)], source.flatten()[: sum(sends)]
    dist.all_to_all_single(to, what, receives, sends, group=_resolve(group))
    return out


# -- the recurrence ------------------------------------------------------------------------------------------------------


class _Map(NamedTuple):
    """S -> M S + N for every head: M [B, H, dk, dk], or one factor as [B, H, 1, 1]; N [B, H, dk, dv]."""

    M: Tensor
    N: Tensor

    def after(self, first: _Map) -> _Map:
        return _Map(_product(self.M, first.M), self.of(first.N))

    def of(self, S: Tensor) -> Tensor:
        return _product(self.M, S) + self.N


def _product(M: Tensor, S: Tensor) -> Tensor:
    return M * S if M.shape[-1] == 1 else M @ S


def _scan(own: _Map, by: int, group: str) -> Tensor:
    """What the maps of all ranks before this one (by = 1), or after it (by = -1), make of zero, [B, H, dk, dv].

    A parallel prefix (Hillis and Steele 1986): after the round of distance d a rank knows the d maps that end just before
    it as one, so C ranks take ceil(log2 C) rounds. It sends its own map after those, and the last round needs N alone. Where
    no rank is, `_shift` gives the map to zero, from which the first rank starts. Each product is of the same two windows of
    ranks in every run, so results are the same to the bit.
    """
    distance, size = 1, _place(group)[1]
    before: _Map | None = None
    while 2 * distance < size:
        sent = own if before is None else own.after(before)
        message = torch.cat([sent.M.flatten(), sent.N.flatten()])
        del sent
        M, N = _shift(message, by * distance, group).split([own.M.numel(), own.N.numel()])
        del message
        got = _Map(M.view_as(own.M), N.view_as(own.N))
        before = got if before is None else before.after(got)
        distance *= 2
    if distance == size:  # alone
        return torch.zeros_like(own.N)
    N = _shift(own.N if before is None else own.of(before.N), by * distance, group)
    return N if before is None else before.of(N)


@torch.library.custom_op("titan_dp::state_before", mutates_args=())
def state_before(
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    document: Tensor | None,
    position: Tensor | None,
    rows: int,
    sequences: int,
    erase: bool,
    backend: str,
    group: str,
) -> tuple[Tensor, Tensor]:
    """The state before each of this rank's sequences [N, H, dk, dv], and M of its segments [B, H, dk, dk].

    Not differentiable: what the states owe to earlier ranks' inputs, `continued` tells those ranks.
    """
    k, v, beta = (x.reshape(rows, -1, *x.shape[2:]) for x in (k, v, beta))
    g = None if g is None else g.reshape(rows, -1, g.shape[-1])
    continues = through = None
    if document is not None and position is not None:
        by_row = document.view(rows, -1)
        last = by_row == by_row[:, -1:]  # only the last document reaches the next rank
        beta, g = beta * last[..., None, None], None if g is None else g * last[..., None]
        continues = position.view(rows, -1)[:, 0] > 0
        through = continues & (by_row[:, 0] == by_row[:, -1])
    M, N = segment_summary(k, v, beta, g, erase=erase, backend=backend)
    if through is not None:
        M = M * through[:, None, None, None]
    S = _scan(_Map(M, N), 1, group)
    if document is not None and continues is not None:
        first = document.view(rows, -1)[:, 0].long()
        S = S.new_zeros(sequences, *S.shape[1:]).index_copy(0, first, S * continues[:, None, None, None])
    return S, M.contiguous()


@state_before.register_fake
def _(k, v, beta, g, document, position, rows, sequences, erase, backend, group):  # type: ignore[no-untyped-def]
    (H, dv), dk = v.shape[-2:], k.shape[-1]
    dtype = torch.promote_types(k.dtype, torch.float32)
    square = (dk, dk) if erase else (1, 1)
    return k.new_empty(sequences, H, dk, dv, dtype=dtype), k.new_empty(rows, H, *square, dtype=dtype)


@torch.library.custom_op("titan_dp::adjoint_after", mutates_args=())
def adjoint_after(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    beta: Tensor,
    g: Tensor | None,
    M: Tensor,
    document: Tensor | None,
    position: Tensor | None,
    rows: int,
    sequences: int,
    erase: bool,
    backend: str,
    group: str,
) -> Tensor:
    """What the later ranks' outputs give to the final state of each of this rank's sequences, [N, H, dk, dv]."""
    do, q, k, beta = (x.reshape(rows, -1, *x.shape[2:]) for x in (do, q, k, beta))
    g = None if g is None else g.reshape(rows, -1, g.shape[-1])
    if document is not None and position is not None:
        by_row = document.view(rows, -1)  # only a first document that began on an earlier rank owes it anything
        owes = (by_row == by_row[:, :1]) & (position.view(rows, -1)[:, :1] > 0)
        do = do * owes[..., None, None]
    dS = _scan(_Map(M.mT, segment_adjoint(do, q, k, beta, g, erase=erase, backend=backend)), -1, group)
    if document is None:
        return dS
    return dS.new_zeros(sequences, *dS.shape[1:]).index_copy(0, document.view(rows, -1)[:, -1].long(), dS)


@adjoint_after.register_fake
def _(do, q, k, beta, g, M, document, position, rows, sequences, erase, backend, group):  # type: ignore[no-untyped-def]
    return do.new_empty(sequences, do.shape[-2], k.shape[-1], do.shape[-1], dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("titan_dp::continued", mutates_args=())
def continued(
    o: Tensor,
    final: Tensor,
    q: Tensor,
    k: Tensor,
    beta: Tensor,
    g: Tensor | None,
    M: Tensor,
    document: Tensor | None,
    position: Tensor | None,
    rows: int,
    sequences: int,
    erase: bool,
    backend: str,
    group: str,
) -> Tensor:
    """`o` unchanged. Its backward pass also gives the gradient of `final`, which other ranks know.

    Autograd sees no path from this rank's final state to other ranks' outputs, so on its own it would call the gradient of
    `final` zero. This identity is where we hand it the true one: its backward runs on every rank of the group, exchanges
    (`adjoint_after`), and only then does the recurrence's own backward begin, as `o` must have its gradient first.
    """
    return o.clone()


@continued.register_fake
def _(o, *args):  # type: ignore[no-untyped-def]
    return torch.empty_like(o)


def _save_inputs(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[2:9])
    ctx.where = inputs[9:]


def _ask_later_ranks(ctx: Any, do: Tensor) -> tuple:
    return do, adjoint_after(do, *ctx.saved_tensors, *ctx.where), *[None] * 12


continued.register_autograd(_ask_later_ranks, setup_context=_save_inputs)


# -- tokens, keys and values ---------------------------------------------------------------------------------------------


@torch.library.custom_op("titan_dp::shift", mutates_args=())
def shift(x: Tensor, by: int, group: str) -> Tensor:
    """x of the rank that is `by` before this one; zeros if there is none. Its gradient goes back the same way."""
    return _shift(x, by, group)


@shift.register_fake
def _(x, by, group):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save_shift(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, ctx.by, ctx.group = inputs


shift.register_autograd(lambda ctx, d: (shift(d, -ctx.by, ctx.group), None, None), setup_context=_save_shift)


@torch.library.custom_op("titan_dp::gather", mutates_args=())
def gather(x: Tensor, group: str) -> Tensor:
    """x [...] of every rank, [C, ...]. Backwards each rank gets the sum of its part's gradients, added up in float32."""
    resolved = _resolve(group)
    out = x.new_empty(resolved.size(), *x.shape)
    _all_gather(out.flatten(), x.flatten(), group=resolved)
    return out


@gather.register_fake
def _(x, group):  # type: ignore[no-untyped-def]
    return x.new_empty(_place(group)[1], *x.shape)


@torch.library.custom_op("titan_dp::gather_backward", mutates_args=())
def gather_backward(d: Tensor, group: str) -> Tensor:
    wide = d.to(torch.promote_types(d.dtype, torch.float32)).contiguous()
    out = wide.new_empty(d.shape[1:])
    _reduce_scatter(out.flatten(), wide.flatten(), group=_resolve(group))
    return out.to(d.dtype)


@gather_backward.register_fake
def _(d, group):  # type: ignore[no-untyped-def]
    return d.new_empty(d.shape[1:])


def _save_group(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, ctx.group = inputs


gather.register_autograd(lambda ctx, d: (gather_backward(d, ctx.group), None), setup_context=_save_group)

KEPT_OPS = frozenset({torch.ops.titan_dp.state_before.default, torch.ops.titan_dp.shift.default})
"""Operators whose outputs a checkpointing policy keeps: small, and an exchange to compute again."""
