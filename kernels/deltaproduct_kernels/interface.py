"""`gated_delta_product`: the contract, the checks, and the choice of an implementation."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from deltaproduct_kernels import fla_backend, ops
from deltaproduct_kernels.recurrent import by_head, read_offsets, recurrent_forward
from deltaproduct_kernels.transforms import refuse_forward_mode
from deltaproduct_kernels.triton_backend import assembler
from deltaproduct_kernels.triton_backend import ops as triton_ops
from deltaproduct_kernels.triton_backend.ops import why_not

BACKENDS = ("recurrent", "torch", "triton", "fla")
DECODE_TOKENS = 4
"""Up to so many tokens without gradients are decoded step by step: chunks would be nearly empty."""
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def resolve_backend(
    name: str, device: torch.device, dtype: torch.dtype | None = None, dk: int | None = None, dv: int | None = None
) -> str:
    """The implementation that `name` ('auto' or a backend's name) means for such tensors; unknown sizes are taken to fit.

    'auto' is 'triton' on a GPU that it supports, and 'torch' elsewhere.

    Raises:
        ValueError: for a name that is unknown, or 'triton' or 'fla' where it cannot run; on a Hopper without an assembler that
            is right for 'auto' too, because 'torch' would be many times slower and a package is all that is missing.
    """
    if name in ("auto", "triton"):
        reason = why_not(device, dtype, dk, dv)
        if reason and reason.startswith(assembler.MISSING):
            raise ValueError(f"backend = {name!r} cannot run: {reason}; or choose 'torch'")
        if name == "auto":
            return "triton" if device.type == "cuda" and reason is None else "torch"
        if reason:
            raise ValueError(f"backend = 'triton' cannot run: {reason}; choose 'torch' or 'auto'")
    elif name == "fla":
        if reason := fla_backend.why_not(device, dtype):
            raise ValueError(f"backend = 'fla' cannot run: {reason}; choose 'auto'")
    elif name not in BACKENDS:
        raise ValueError(f"backend = {name!r} is not available; choose 'auto' or one of {', '.join(map(repr, BACKENDS))}")
    return name


def beside(backend: str) -> str:
    """The backend of what fla has no operator for, in a model whose recurrence has `backend`."""
    return "auto" if backend == "fla" else backend


def gated_delta_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    erase: bool = True,
    backend: str = "auto",
    validate: bool | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The DeltaProduct recurrence (Siems et al. 2025, arXiv 2502.10297, section 4). For each head, in order of t and j:

        S <- exp(g_t) S                                        once a token
        S <- S + k_tj (beta_tj (v_tj - S^T k_tj))^T            for j = 1..n
        o_t = scale S^T q_t

    n = 1 is the (gated) delta rule. Keys are expected to have unit length, and beta to lie in [0, 2]; then no step
    lengthens a state.

    Args:
        q: queries [B, T, G, dk]; any float dtype. Arithmetic is float32, or float64 for float64 queries. H is a multiple of G
            (mostly G = H), and head h reads the queries and keys of group h // (H // G).
        k: keys [B, T, n, G, dk].
        v: values [B, T, n, H, dv].
        beta: step sizes [B, T, n, H].
        g: log decay <= 0, [B, T, H]; None: no decay.
        scale: of the read-out; default dk ** -0.5.
        initial_state: [N, H, dk, dv] with N = B, or the number of packed sequences; default zero.
        output_final_state: return the state after the last token as well.
        cu_seqlens: [N + 1] int32 or int64 offsets of packed sequences, from 0 to T; B must be 1. Sequences of no tokens
            are legal: their final state is their initial one.
        erase: False drops S^T k, which makes it gated linear attention.
        backend: 'recurrent' (the definition), 'torch' (chunks: a kernel in C on a CPU, matrix products elsewhere), 'triton'
            (kernels for NVIDIA GPUs from Ampere on; q, k and v of one dtype, dk and dv from 16 to 256), 'fla' (the operator
            of flash-linear-attention 0.6, which must be installed; bfloat16 or float16 on a GPU), or 'auto'. Without
            gradients, 'auto' and 'triton' decode up to 4 tokens step by step.
        validate: look at the values of cu_seqlens, k, beta and g too, which waits for a GPU; default: whether the environment
            variable DELTAPRODUCT_VALIDATE is 1.

    Returns:
        o [B, T, H, dv] in q's dtype, and the final state [N, H, dk, dv] in float32 (float64 for float64 queries) or None.

    Raises:
        ValueError: for shapes, dtypes, devices or a backend that do not fit; names the argument.
        NotImplementedError: in forward mode and under torch.vmap, but for backend 'recurrent'.
    """
    check_shapes(q, k, v, beta, g, initial_state, cu_seqlens)
    if validate or (validate is None and os.environ.get("DELTAPRODUCT_VALIDATE") == "1"):
        _check_values(q, k, beta, g, cu_seqlens)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    chosen = resolve_backend(backend, q.device, q.dtype, q.shape[-1], v.shape[-1])
    trained = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, beta, g, initial_state))
    if chosen != "recurrent":
        refuse_forward_mode(f"gated_delta_product's backend {chosen!r}", q, k, v, beta, g, initial_state)
    decode = not trained and cu_seqlens is None and q.shape[1] <= DECODE_TOKENS
    if chosen == "triton":
        triton_ops.check_one_dtype(q, k, v)
        if decode:
            o, state = triton_ops.triton_decode(q, k, v, beta, g, initial_state, scale, erase)
        else:
            o, state, *_ = triton_ops.triton_chunk(q, k, v, beta, g, initial_state, cu_seqlens, scale, erase, trained)
    elif chosen == "fla":
        if not erase:
            raise ValueError("erase = False is not in flash-linear-attention's gated delta product; choose backend 'auto'")
        q, k = by_head(q, v.shape[-2]), by_head(k, v.shape[-2])  # it has as many of both
        o, state, *_ = fla_backend.fla_chunk(q, k, v, beta, g, initial_state, cu_seqlens, scale)
    elif chosen == "recurrent" or (decode and backend == "auto"):
        o, state = recurrent_forward(q, k, v, beta, g, initial_state, cu_seqlens, scale, erase)
        o = o.to(q.dtype)
    else:
        o, state, _ = ops.chunk(q, k, v, beta, g, initial_state, cu_seqlens, scale, erase)
    return o, state if output_final_state else None


def _check_values(q: Tensor, k: Tensor, beta: Tensor, g: Tensor | None, cu_seqlens: Tensor | None) -> None:
    """What shapes cannot tell. Raises ValueError naming the argument."""
    if cu_seqlens is not None:
        read_offsets(cu_seqlens, q.shape[1])
    norms = k.detach().float().norm(dim=-1)
    wrong = (norms - 1).abs().gt(0.02) & norms.gt(1e-3)  # a zero key is a step switched off; bfloat16 rounds by 0.004
    if wrong.any():
        raise ValueError(f"k has a key of length {norms[wrong][0].item():.4g}; keys must have length 1 (or 0): normalise them")
    if not ((beta >= 0) & (beta <= 2)).all():
        raise ValueError(f"beta has values from {beta.min().item():.4g} to {beta.max().item():.4g}; expected 0 to 2")
    if g is not None and not (g <= 0).all():
        raise ValueError(f"g has values up to {g.max().item():.4g}; a log decay is at most 0")


def check_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Shapes, dtypes and devices. Raises ValueError naming the argument."""
    if q.dim() != 4:
        raise ValueError(f"q has shape {tuple(q.shape)}; expected [B, T, G, dk]")
    if k.dim() != 5:
        raise ValueError(f"k has shape {tuple(k.shape)}; expected [B, T, n, G, dk]")
    if v.dim() != 5:
        raise ValueError(f"v has shape {tuple(v.shape)}; expected [B, T, n, H, dv]")
    B, T, G, dk = q.shape
    n, (H, dv) = k.shape[2], v.shape[3:]
    if G != H and (not G or not H or H % G):
        raise ValueError(f"v has H = {H} heads, but q has G = {G}: H must be a multiple of G")
    N = B
    if q.shape[-1] == 0:
        raise ValueError("q has dk = 0: a key needs a number at least")
    if not 1 <= n <= 8:
        raise ValueError(f"k has n = {n} steps a token; from 1 to 8 are allowed")
    if cu_seqlens is not None:
        if B != 1:
            raise ValueError(f"q has B = {B} rows, but cu_seqlens packs sequences into one row: B must be 1")
        if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"cu_seqlens has shape {tuple(cu_seqlens.shape)} and dtype {cu_seqlens.dtype}; expected [N + 1] int32 or int64"
            )
        if cu_seqlens.device != q.device:
            raise ValueError(f"cu_seqlens is on {cu_seqlens.device}, but q is on {q.device}")
        N = len(cu_seqlens) - 1
    expected = {
        "k": (k, (B, T, n, G, dk)),
        "v": (v, (B, T, n, H, dv)),
        "beta": (beta, (B, T, n, H)),
        "g": (g, (B, T, H)),
        "initial_state": (initial_state, (N, H, dk, dv)),
    }
    for name, (x, shape) in expected.items():
        if x is not None and tuple(x.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; expected {shape} to fit q {tuple(q.shape)}")
    for name, x in {"q": q, **{name: x for name, (x, _) in expected.items()}}.items():
        if x is not None and x.dtype not in _FLOATS:
            raise ValueError(f"{name} has dtype {x.dtype}; expected one of {', '.join(map(str, _FLOATS))}")
        if x is not None and x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, but q is on {q.device}")
