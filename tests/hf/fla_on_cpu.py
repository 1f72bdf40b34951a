"""flash-linear-attention without a GPU: its models as they are, and plain torch in place of the Triton kernels they launch.

`fla_on_cpu` replaces only functions that launch a kernel (and flash-attention's, which fla imports); modules, names,
configurations, caches and the shapes between kernels stay fla's. Each replacement is written from the definition the kernel
states, takes every argument that fla's layers pass, and is compared with the kernel itself in test_fla_kernels.py: with
`fla_interpreted` no kernel of fla's is replaced and Triton's interpreter runs them. Only forward passes are covered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

L2_EPS = 1e-6


@contextmanager
def fla_on_cpu() -> Iterator[None]:
    """Inside, fla's models compute on any device, in float32 too, which its chunked kernels refuse."""
    with pytest.MonkeyPatch.context() as patch:
        for target, replacement in REPLACEMENTS.items():
            patch.setattr(target, replacement)
        _replace_flash_attention(patch)
        yield


@contextmanager
def fla_interpreted() -> Iterator[None]:
    """Inside, fla launches its own kernels, on a GPU or in Triton's interpreter.

    The interpreter cannot time configurations, so the first is taken; and its loop counters must have `.to`, as compiled.
    """
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setattr("triton.runtime.autotuner.Autotuner.run", _run_first_configuration)
            for module in ("fla.ops.gated_delta_product.chunk_deltaproduct_h", "fla.ops.common.chunk_delta_h"):
                patch.setattr(f"{module}.range", lambda *bounds: map(_Counter, range(*bounds)), raising=False)
        _replace_flash_attention(patch)
        yield


def _run_first_configuration(self: Any, *args: Any, **kwargs: Any) -> Any:
    return self.fn.run(*args, **kwargs, **self.configs[0].all_kwargs())


class _Counter(int):
    def to(self, dtype: object) -> _Counter:
        return self


def _replace_flash_attention(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("fla.layers.attn.flash_attn_func", flash_attn_func, raising=False)
    patch.setattr("fla.layers.attn.flash_attn_varlen_func", flash_attn_varlen_func, raising=False)


# -- norms, SwiGLU, rotary positions -----------------------------------------------------------------------------------


def l2norm_fwd(x: Tensor, eps: float = L2_EPS) -> tuple[Tensor, Tensor]:
    rstd = torch.rsqrt(x.float().square().sum(-1) + eps)
    return (x.float() * rstd[..., None]).to(x.dtype), rstd


def layer_norm_fwd(
    x: Tensor, weight: Tensor, eps: float = 1e-5, residual: Tensor | None = None, is_rms_norm: bool = False, **others: Any
) -> tuple[Tensor, None, Tensor, Tensor]:
    """x [T, D] -> the normalised sum with `residual`, no mean, 1 / rms, and the sum itself."""
    _absent(others, may_be={"residual_dtype", "num_groups"})
    assert is_rms_norm
    total = x.float() if residual is None else x.float() + residual.float()
    rstd = torch.rsqrt(total.square().mean(-1) + eps)
    return (total * rstd[:, None] * weight.float()).to(x.dtype), None, rstd, total.to(x.dtype)


def layer_norm_gated_fwd(
    x: Tensor, g: Tensor, weight: Tensor, activation: str = "swish", eps: float = 1e-5, is_rms_norm: bool = False, **others: Any
) -> tuple[Tensor, None, Tensor, Tensor]:
    """x, g [T, D] -> rms norm of x times silu(g)."""
    _absent(others)
    assert activation in ("swish", "silu")
    y, _, rstd, _ = layer_norm_fwd(x.float(), weight, eps, is_rms_norm=is_rms_norm)
    return (y * g.float() * torch.sigmoid(g.float())).to(x.dtype), None, rstd, x


def swiglu_fwd(x: Tensor, y: Tensor, output_contiguous: bool = False) -> Tensor:
    return (x.float() * torch.sigmoid(x.float()) * y.float()).to(x.dtype)


def rotary_embedding_fwdbwd(x: Tensor, cos: Tensor, sin: Tensor, seqlen_offsets: int | Tensor = 0, **others: Any) -> Tensor:
    """x [B, T, H, D] turned by row offset + t of cos and sin [rows, D / 2]; zero at negative rows (left padding)."""
    _absent(others)
    offsets = torch.as_tensor(seqlen_offsets, device=x.device).expand(len(x))
    row = offsets[:, None] + torch.arange(x.shape[1], device=x.device)  # [B, T]
    c, s = (table[row.clamp(min=0)].float()[:, :, None] for table in (cos, sin))
    first, second = x.float().chunk(2, -1)
    y = torch.cat([first * c - second * s, first * s + second * c], -1)
    return (y * (row >= 0)[..., None, None]).to(x.dtype)


# -- convolution -------------------------------------------------------------------------------------------------------


def causal_conv1d_fwd(
    x: Tensor,
    weight: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """x [B, T, D], weight [D, W], states [N, D, W]: y_t = sum over w of weight_w x_(t - W + 1 + w), then silu."""
    _absent(others, may_be={"chunk_indices", "chunk_size"})
    assert activation in (None, "silu", "swish")
    W = weight.shape[1]

    def one(x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        before = x.new_zeros(len(x), x.shape[2], W) if state is None else state
        seen = torch.cat([before.mT.to(x.dtype), x], 1)  # [B, W + T, D]
        y = sum(weight[:, w].float() * seen[:, 1 + w : 1 + w + x.shape[1]].float() for w in range(W))
        y = y * torch.sigmoid(y) if activation else y
        return y.to(x.dtype), seen[:, -W:].mT.contiguous()

    y, state = _by_sequence(one, cu_seqlens, initial_state, x)
    return y, state if output_final_state else None


def causal_conv1d_update(
    x: Tensor, cache: Tensor, weight: Tensor, activation: str | None = None, **others: Any
) -> tuple[Tensor, Tensor]:
    """One token for each of N sequences, x [N, 1, D] or [1, N, D]; the cache [N, D, W] is updated in place."""
    _absent(others)
    y, state = causal_conv1d_fwd(x.view(len(cache), 1, -1), weight, cache, True, activation)
    assert state is not None
    return y.view(x.shape), cache.copy_(state)


# -- the delta rule ----------------------------------------------------------------------------------------------------


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """S <- exp(g_i) S; S <- S + beta_i k_i (v_i - S^T k_i)^T; o_i = scale S^T q_i, for i = 1..L of each head.

    q, k [B, L, H, K], v [B, L, H, V], beta and g [B, L, H], S [B, H, K, V]. Returns o [B, L, H, V] and the last S.
    """
    q, k, v, beta = (x.float() for x in (q, k, v, beta))
    S = v.new_zeros(*k[:, 0].shape, v.shape[-1]) if state is None else state.float()
    outputs = []
    for i in range(k.shape[1]):
        if g is not None:
            S = S * g[:, i].float().exp()[..., None, None]
        error = v[:, i] - torch.einsum("bhkv,bhk->bhv", S, k[:, i])
        S = S + torch.einsum("bhk,bhv,bh->bhkv", k[:, i], error, beta[:, i])
        outputs.append(scale * torch.einsum("bhkv,bhk->bhv", S, q[:, i]))
    return torch.stack(outputs, 1), S


def chunk_gated_delta_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    num_householder: int = 1,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """q and g for each of T tokens; k, v and beta for each of T n steps; a token decays at its first step and is read after
    its last."""
    n, scale = num_householder, k.shape[-1] ** -0.5 if scale is None else scale
    if use_qk_l2norm_in_kernel:
        q, k = l2norm_fwd(q)[0], l2norm_fwd(k)[0]
    decay = None if g is None else F.pad(g[:, :, None].float(), (0, 0, 0, n - 1)).flatten(1, 2)
    offsets = None if cu_seqlens is None else cu_seqlens * n
    one = partial(delta_rule, scale=scale)
    o, state = _by_sequence(one, offsets, initial_state, q.repeat_interleave(n, 1), k, v, beta, decay)
    return o[:, n - 1 :: n].to(q.dtype), state if output_final_state else None


def fused_recurrent_gated_delta_rule_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    initial_state: Tensor | None = None,
    gk: None = None,
    gv: None = None,
    **how: Any,
) -> tuple[Tensor, Tensor | None]:
    """The delta rule a step at a time; with A_log, g is what the decay is computed from; states may be [N, H, V, K]."""
    if A_log is not None and g is not None and dt_bias is not None:
        g = -A_log.float().exp() * F.softplus(g.float() + dt_bias.float())
    if use_beta_sigmoid_in_kernel:
        beta = fused_beta_sigmoid(beta, 2.0 if allow_neg_eigval else 1.0)
    start = initial_state.mT if state_v_first and initial_state is not None else initial_state
    o, state = chunk_gated_delta_product(q, k, v, g, beta, initial_state=start, **how)
    return o, state.mT.contiguous() if state_v_first and state is not None else state


def chunk_gated_delta_rule_fwd(
    chunk_indices: Tensor | None = None,
    chunk_size: int = 64,
    cp_context: None = None,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    **same: Any,
) -> tuple[Any, ...]:
    """The same with q and k normalised and beta activated before; o is the second of what is returned, the state the fourth."""
    gate = {"A_log": A_log, "dt_bias": dt_bias} if use_gate_in_kernel else {}
    o, state = fused_recurrent_gated_delta_rule_fwd(**same, **gate)
    return None, o, None, state, same["initial_state"], None


def fused_beta_sigmoid(x: Tensor, scale: float = 1.0) -> Tensor:
    return scale * torch.sigmoid(x.float())


def chunk_delta_rule(**same: Any) -> tuple[Tensor, Tensor | None]:
    return chunk_gated_delta_product(g=None, **same)


def fused_recurrent_delta_rule_fwd(**same: Any) -> tuple[Tensor, None, Tensor | None]:
    o, state = chunk_gated_delta_product(g=None, **same)
    return o, None, state


# -- helpers -----------------------------------------------------------------------------------------------------------


def _absent(others: dict[str, Any], may_be: Set[str] = frozenset()) -> None:
    """Arguments that fla passes and no model of ours uses; those that change no result `may_be` there."""
    used = {key for key, value in others.items() if value is not None and value is not False and key not in may_be}
    assert not used, f"not replaced: {used}"


def _by_sequence(
    one: Callable[..., tuple[Tensor, Tensor]], cu_seqlens: Tensor | None, initial_state: Tensor | None, *inputs: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`one(*inputs, state)` of [B, L, ...], or of each sequence in [1, sum of L, ...] that `cu_seqlens` delimits."""
    if cu_seqlens is None:
        return one(*inputs, initial_state)
    parts = []
    for i, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        state = None if initial_state is None else initial_state[i : i + 1]
        parts.append(one(*(None if x is None else x[:, start:end] for x in inputs), state))
    return torch.cat([o for o, _ in parts], 1), torch.cat([state for _, state in parts])


# -- flash-attention, of which fla imports these two -------------------------------------------------------------------


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, window_size: tuple[int, int] = (-1, -1)) -> Tensor:
    """q [B, Tq, H, d], k and v [B, Tk, H / groups, d]; the last query is at the last key; `window_size[0]` keys before it."""
    assert causal
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2).float() for x in (k, v))
    key = torch.arange(k.shape[1], device=q.device)
    query = key[k.shape[1] - q.shape[1] :, None]
    visible = (key <= query) & ((query - key <= window_size[0]) | (window_size[0] < 0))
    scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).to(q.dtype)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    **how: Any,
) -> Tensor:
    """The same for sequences one after another in q, k, v [tokens, H, d]."""
    spans = zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True)
    parts = [flash_attn_func(q[None, a:b], k[None, c:d], v[None, c:d], **how) for (a, b), (c, d) in spans]
    return torch.cat(parts, 1)[0]


REPLACEMENTS: dict[str, Callable[..., Any]] = {
    "fla.modules.norm.layernorm.layer_norm_fwd": layer_norm_fwd,
    "fla.modules.norm.fused_norm_gate.layer_norm_gated_fwd": layer_norm_gated_fwd,
    "fla.modules.activations.ops.swiglu_fwd": swiglu_fwd,
    "fla.modules.rotary.ops.rotary_embedding_fwdbwd": rotary_embedding_fwdbwd,
    "fla.modules.causal_conv1d.ops.causal_conv1d_fwd": causal_conv1d_fwd,
    "fla.modules.causal_conv1d.ops.causal_conv1d_update": causal_conv1d_update,
    "fla.layers.gated_deltaproduct.chunk_gated_delta_product": chunk_gated_delta_product,
    "fla.layers.delta_net.chunk_delta_rule": chunk_delta_rule,
    "fla.ops.gated_delta_rule.fused_recurrent.fused_recurrent_gated_delta_rule_fwd": fused_recurrent_gated_delta_rule_fwd,
    "fla.ops.gated_delta_rule.chunk.chunk_gated_delta_rule_fwd": chunk_gated_delta_rule_fwd,
    "fla.ops.gated_delta_rule.chunk.l2norm_fwd": l2norm_fwd,
    "fla.ops.gated_delta_rule.chunk.fused_beta_sigmoid": fused_beta_sigmoid,
    "fla.ops.delta_rule.fused_recurrent.fused_recurrent_delta_rule_fwd": fused_recurrent_delta_rule_fwd,
    "fla.ops.delta_rule.fused_recurrent.l2norm_fwd": l2norm_fwd,
}
"""Where each kernel launch is looked up, and what stands there instead."""
