"""The recurrence as it is defined, one token and one Householder step at a time.

This is the truth every other implementation is compared with: no chunks, no inverse, gradients by autograd. It computes
in float64 for float64 inputs and in float32 otherwise. It is slow by design; only decoding a few tokens needs no more.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype a reference computation accumulates in: float64 stays, everything else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def read_offsets(cu_seqlens: Tensor, T: int) -> list[int]:
    """The offsets of packed sequences on the host, which waits for a GPU.

    Raises:
        ValueError: unless they rise from 0 to T.
    """
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] != T:
        raise ValueError(f"cu_seqlens runs from {offsets[0]} to {offsets[-1]}; it must run from 0 to T = {T}")
    for before, after in itertools.pairwise(offsets):
        if after < before:
            raise ValueError(f"cu_seqlens decreases from {before} to {after}; offsets must not decrease")
    return offsets


def by_head(x: Tensor, H: int) -> Tensor:
    """Queries or keys [..., G, dk] of G groups as [..., H, dk]: head h reads those of group h // (H // G)."""
    return x if x.shape[-2] == H else x.repeat_interleave(H // x.shape[-2], -2)


def by_group(d: Tensor, G: int) -> Tensor:
    """The gradient of `by_head`: [..., H, dk] summed over the heads of each group, in one order, in float32 at least."""
    return d if d.shape[-2] == G else d.unflatten(-2, (G, -1)).sum(-2)


def recurrent_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    erase: bool,
) -> tuple[Tensor, Tensor]:
    """Shapes as in `gated_delta_product`; returns o [B,T,H,dv] in q's dtype and the final state [N,H,dk,dv]."""
    if cu_seqlens is None:
        return _one_length(q, k, v, beta, g, initial_state, scale, erase)
    offsets = read_offsets(cu_seqlens, q.shape[1])
    outputs, states = [], []
    for i, (start, end) in enumerate(itertools.pairwise(offsets)):
        token = slice(start, end)
        o, state = _one_length(
            q[:, token],
            k[:, token],
            v[:, token],
            beta[:, token],
            None if g is None else g[:, token],
            None if initial_state is None else initial_state[i : i + 1],
            scale,
            erase,
        )
        outputs.append(o)
        states.append(state)
    return torch.cat(outputs, 1), torch.cat(states)


def _one_length(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    erase: bool,
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(q.dtype)
    (B, T, n, H, dv), dk = v.shape, k.shape[-1]
    q, k = by_head(q.to(dtype) * scale, H), by_head(k.to(dtype), H)
    v, beta = v.to(dtype), beta.to(dtype)
    S = q.new_zeros(B, H, dk, dv) if initial_state is None else initial_state.to(dtype)
    outputs = []
    for t in range(T):
        if g is not None:
            S = S * g[:, t].to(dtype).exp()[..., None, None]
        for j in range(n):
            k_j, target = k[:, t, j], v[:, t, j]  # [B, H, dk], [B, H, dv]
            if erase:
                target = target - torch.einsum("bhkv,bhk->bhv", S, k_j)
            S = S + k_j[..., :, None] * (beta[:, t, j, :, None] * target)[..., None, :]
        outputs.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t]))
    o = torch.stack(outputs, 1) if outputs else v.new_zeros(B, 0, H, dv)
    return o, S
