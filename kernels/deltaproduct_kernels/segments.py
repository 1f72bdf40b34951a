"""A segment of a sequence as an affine map of the state, for sequences that several processes share.

The recurrence is affine in its state: over a segment S_out = M S_in + N for every head. The adjoint of the state moves back
by dS_in = M^T dS_out + D, with D the gradient that the segment's own outputs give to its initial state. So M, N and D are all
that a segment needs to tell the others: their size does not depend on its length, and none of them has to be differentiated.
Both functions run the serial pass over chunk states without outputs; who exchanges what with whom is the caller's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deltaproduct_kernels.chunked import chunk_tokens, chunked_adjoint, chunked_summary
from deltaproduct_kernels.interface import beside, check_shapes, resolve_backend
from deltaproduct_kernels.recurrent import by_head, compute_dtype, recurrent_forward
from deltaproduct_kernels.triton_backend import ops as triton_ops


@torch.no_grad()
def segment_summary(
    k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None = None, *, erase: bool = True, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """M and N of S_out = M S_in + N, where a row takes the state S_in [dk, dv] of a head to S_out.

    A token with beta = 0 and g = 0 leaves the state as it is: masked so, the tokens before a document leave no trace. Nothing
    here is differentiable; see `segment_adjoint`.

    Args:
        k, v, beta, g, erase, backend: as in `gated_delta_product`.

    Returns:
        M [B, H, dk, dk], or without erasing its one eigenvalue exp(sum g) as [B, H, 1, 1]; and N [B, H, dk, dv]; in float32,
        or float64 for float64 keys.

    Raises:
        ValueError: for shapes, dtypes, devices or a backend that do not fit; names the argument.
    """
    if k.dim() != 5:
        raise ValueError(f"k has shape {tuple(k.shape)}; expected [B, T, n, G, dk]")
    check_shapes(k[:, :, 0], k, v, beta, g, None, None)
    chosen = resolve_backend(beside(backend), k.device, k.dtype, k.shape[-1], v.shape[-1])
    M: Tensor | None
    if chosen == "triton":
        triton_ops.check_one_dtype(k, k, v)
        M, N = triton_ops.segment_summary(k, v, beta, g, erase)
    elif chosen == "torch":
        M, N = chunked_summary(k, v, beta, g, erase)
    else:
        M, N = _recurrent_summary(k, v, beta, g, erase)
    if not erase or M is None:
        decay = N.new_zeros(N.shape[:2]) if g is None else g.to(N.dtype).sum(1)
        M = decay.exp()[..., None, None]
    return M, N


@torch.no_grad()
def segment_adjoint(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    erase: bool = True,
    backend: str = "auto",
) -> Tensor:
    """D [B, H, dk, dv]: the gradient of a row's initial state, where outputs have the gradient `do` and the final state none.

    A token whose `do` is zero and that comes after all others with another has no effect, whatever its k, beta and g.

    Args:
        do: [B, T, H, dv].
        q, k, beta, g, scale, erase, backend: as in `gated_delta_product`.

    Returns:
        D in float32, or float64 for float64 queries.

    Raises:
        ValueError: for shapes, dtypes, devices or a backend that do not fit; names the argument.
    """
    if do.dim() != 4 or do.shape[:2] != q.shape[:2]:
        raise ValueError(f"do has shape {tuple(do.shape)}; expected {(*q.shape[:2], 'H', 'dv')} to fit q {tuple(q.shape)}")
    check_shapes(q, k, k.new_empty(1).expand(*k.shape[:3], *do.shape[2:]), beta, g, None, None)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    chosen = resolve_backend(beside(backend), q.device, q.dtype, q.shape[-1], do.shape[-1])
    if chosen == "triton":
        triton_ops.check_one_dtype(q, k, do)
        return triton_ops.segment_adjoint(do, q, k, beta, g, scale, erase)
    if chosen == "torch":
        return chunked_adjoint(do, q, k, beta, g, scale, erase)
    return _recurrent_adjoint(do, q, k, beta, g, scale, erase)


def segment_flops(k: torch.Size, v: torch.Size, *, erase: bool) -> tuple[int, int]:
    """FLOPs of the matrix products of `segment_summary` and of `segment_adjoint`, backend 'torch' (2 a multiply-add).

    Args:
        k, v: shapes [B,T,n,G,dk] and [B,T,n,H,dv].
        erase: False for gated linear attention.
    """
    (B, T, n, H, dv), dk = v, k[-1]
    C = chunk_tokens(n, dk)
    R, chunks = C * n, B * H * -(-T // C)
    reads = C + R if erase else C
    summary = R * R * dk + 2 * R * dk * (dk + dv) if erase else R * dk * dv
    adjoint = reads * R * dk + R * dk * dv + C * R * dv + reads * dk * dv
    return 2 * chunks * summary, 2 * chunks * adjoint


def _recurrent_summary(k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, erase: bool) -> tuple[Tensor, Tensor]:
    """By the definition: from [I | 0], values [0 | v]."""
    (B, _, _, H, _), dk = v.shape, k.shape[-1]
    identity = torch.eye(dk, dtype=compute_dtype(k.dtype), device=k.device).expand(B, H, dk, dk)
    state = torch.nn.functional.pad(identity, (0, v.shape[-1]))
    values = torch.nn.functional.pad(v, (dk, 0))
    _, S = recurrent_forward(k[:, :, 0], k, values, beta, g, state, None, 1.0, erase)
    return S[..., :dk], S[..., dk:]


def _recurrent_adjoint(do: Tensor, q: Tensor, k: Tensor, beta: Tensor, g: Tensor | None, scale: float, erase: bool) -> Tensor:
    """By the definition, the last token first; the transition I - beta k k^T is its own transpose."""
    dtype = compute_dtype(q.dtype)
    H, beta, do = beta.shape[-1], beta.to(dtype), do.to(dtype)
    q, k = by_head(q.to(dtype) * scale, H), by_head(k.to(dtype), H)
    dS = q.new_zeros(*k.shape[:1], *k.shape[3:], do.shape[-1])
    for t in reversed(range(q.shape[1])):
        dS = dS + q[:, t, :, :, None] * do[:, t, :, None]
        for j in reversed(range(k.shape[2] if erase else 0)):
            k_j = k[:, t, j]
            dS = dS - k_j[..., None] * (beta[:, t, j, :, None] * torch.einsum("bhkv,bhk->bhv", dS, k_j))[..., None, :]
        if g is not None:
            dS = dS * g[:, t].to(dtype).exp()[..., None, None]
    return dS
