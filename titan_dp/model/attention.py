"""Causal softmax attention with rotary positions: the Transformer baseline and the attention layers of hybrids.

Grouped keys and values, an optional sliding window, norms of q and k in OLMo's blocks (OLMo 2, arXiv 2501.00656), and document
boundaries; positions restart with each document. A plain
causal sequence takes torch's fused causal path, everything else an explicit mask [T, T]. Where ranks share rows, a rank's
queries meet the keys of all segments up to their own, so later ranks have more to do: the recurrence wants segments whole.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_dp import config
from titan_dp.model.layers import Packing, RMSNorm, TokenMixer


class AttentionCache(NamedTuple):
    """Keys and values seen, at most `window - 1` of them when there is a window; shorter rows are padded in front."""

    k: Tensor  # [B, kv heads, T, d]
    v: Tensor
    seen: Tensor  # [B] int64: tokens of each row

    @staticmethod
    def join(caches: list[AttentionCache]) -> AttentionCache:
        """Caches of rows of any lengths as one of all rows."""
        longest = max(cache.k.shape[2] for cache in caches)
        k, v = (
            torch.cat([F.pad(x, (0, 0, longest - x.shape[2], 0)) for x in parts])
            for parts in ([cache.k for cache in caches], [cache.v for cache in caches])
        )
        return AttentionCache(k, v, torch.cat([cache.seen for cache in caches]))


class Attention(TokenMixer):
    """The mixer "attention"; heads of dimension D / heads."""

    def __init__(self, c: config.Model) -> None:
        super().__init__()
        D = c.hidden_size
        self.heads = c.softmax_heads
        self.kv_heads = c.attention_num_kv_heads or self.heads
        self.grouped = self.kv_heads != self.heads  # here: compared in `forward`, the compiler may take it for a symbol
        self.d, self.window, self.theta = D // self.heads, c.attention_window, c.rope_theta
        self.q_proj = nn.Linear(D, D, bias=False)
        self.k_proj = nn.Linear(D, self.kv_heads * self.d, bias=False)
        self.v_proj = nn.Linear(D, self.kv_heads * self.d, bias=False)
        olmo = c.attention_block == "olmo"
        self.q_norm = RMSNorm(D, c.norm_eps) if olmo else None
        self.k_norm = RMSNorm(self.kv_heads * self.d, c.norm_eps) if olmo else None
        self.o_proj = nn.Linear(D, D, bias=False)

    def stacks(self) -> dict[str, tuple[int, int]]:
        return {"q_proj": (1, self.heads), "k_proj": (1, self.kv_heads), "v_proj": (1, self.kv_heads)}

    def mix(self, x: Tensor, packing: Packing | None = None) -> tuple[Tensor, None]:
        """Where ranks share rows, x is this rank's segment of each; keys and values before it come from other ranks."""
        by_row = x if packing is None else x.view(packing.rows, -1, x.shape[-1])
        T, first = by_row.shape[1], 0
        index = torch.arange(T, device=x.device)
        if self.context is not None:
            index = self.context.rank * T + index
        position = index if packing is None else packing.position.view(packing.rows, T)
        q, k, v = self._project(by_row, position)
        if self.context is not None:
            k, v, first = self.context.earlier(k, v, self.window)
        if packing is None and self.window is None:
            if self.context is None:
                return self._attend(q, k, v, None), None
            if q.is_cuda and q.dtype == torch.bfloat16 and self.d % 8 == 0:
                # Of unequal lengths this kernel aligns the last query with the last key; a mask would take T * keys bytes. It
                # is what torch.nn.attention.bias.causal_lower_right comes down to, which torch.compile does not trace.
                o = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]
                return self.o_proj(o.transpose(1, 2).flatten(2)), None
        keys = first + torch.arange(k.shape[2], device=x.device)
        mask = self._visible(index[:, None], keys) & (keys >= 0)
        if packing is not None:  # a token of position p sees p tokens back
            mask = mask & (index[:, None] - keys <= position[..., None])[:, None]
        return self._attend(q, k, v, mask).view(x.shape), None

    def step(self, x: Tensor, cache: AttentionCache | None) -> tuple[Tensor, AttentionCache]:
        """The tokens x [B, T, D] after those in `cache`."""
        B, T, _ = x.shape
        seen = cache.seen if cache else torch.zeros(B, dtype=torch.int64, device=x.device)
        position = seen[:, None] + torch.arange(T, device=x.device)  # [B, T]
        q, k, v = self._project(x, position)
        if cache is not None:
            k, v = torch.cat([cache.k, k], 2), torch.cat([cache.v, v], 2)
        keys = (seen + T - k.shape[2])[:, None] + torch.arange(k.shape[2], device=x.device)  # [B, K], below 0: padding
        visible = self._visible(position[:, :, None], keys[:, None]) & (keys[:, None] >= 0)
        plain = cache is None and self.window is None
        out = self._attend(q, k, v, None if plain else visible[:, None])
        keep = k.shape[2] if self.window is None else min(k.shape[2], self.window - 1)
        return out, AttentionCache(k[:, :, k.shape[2] - keep :], v[:, :, v.shape[2] - keep :], seen + T)

    def _visible(self, query: Tensor, key: Tensor) -> Tensor:
        mask = key <= query
        return mask if self.window is None else mask & (query - key < self.window)

    def _project(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm.apply_to(q), self.k_norm.apply_to(k)
        q, k, v = (y.unflatten(-1, (-1, self.d)).transpose(1, 2) for y in (q, k, v))
        wide = torch.promote_types(x.dtype, torch.float32)
        frequency = self.theta ** (-torch.arange(0, self.d, 2, device=x.device, dtype=wide) / self.d)
        angle = (position[..., None] * frequency).unsqueeze(-3)  # [1, T, d/2], or [B, 1, T, d/2] for rows at other positions
        cos, sin = (torch.cat([part, part], -1) for part in (angle.cos(), angle.sin()))
        return _rotate(q, cos, sin), _rotate(k, cos, sin), v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if self.grouped and mask is not None:  # no fused kernel takes both; the one without would store all pairs of tokens
            k, v = (x.repeat_interleave(self.heads // self.kv_heads, 1) for x in (k, v))
        grouped = self.grouped and mask is None
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
        return self.o_proj(o.transpose(1, 2).flatten(2))

    def describe(self) -> str:
        window = f", window {self.window}" if self.window else ""
        normed = ", norms of q and k" if self.q_norm is not None else ""
        return f"softmax attention, {self.heads} heads ({self.kv_heads} key/value) of {self.d}{window}{normed}"


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding on pairs (i, i + d/2) of x [B, H, T, d] (Su et al. 2021), in cos's dtype."""
    wide = x.to(cos.dtype)
    first, second = wide.chunk(2, -1)
    return (wide * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)
