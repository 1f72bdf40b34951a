"""The DeltaProduct mixer: DeltaNet, Gated DeltaNet, DeltaProduct and Gated DeltaProduct in one class.

n_h = 1 is DeltaNet, gated or not; erase = False leaves gated linear attention, the diagonal model that cannot track
state. Queries are one a token; keys, values and step sizes are n_h a token and come from one projection each, laid out
(n_h, heads, dim), which is flash-linear-attention's layout: a converted checkpoint is a rename. Source: Siems et al.
2025 (arXiv 2502.10297), section 4; the gate is that of Gated DeltaNet (Yang et al. 2024).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from deltaproduct_kernels import front_end, gated_delta_product
from torch import Tensor, nn

from titan_dp import config
from titan_dp.model.initialise import Initializer
from titan_dp.model.norm import RMSNorm
from titan_dp.model.packing import Packing
from titan_dp.model.short_conv import ShortConv


class MixerCache(NamedTuple):
    """What a step of decoding needs of the past; constant in its length."""

    state: Tensor  # [B, H, dk, dv]
    tails: tuple[Tensor, ...]  # of the q, k and v convolutions; empty without them

    @staticmethod
    def join(caches: list[MixerCache]) -> MixerCache:
        """Caches of rows of any lengths as one of all rows."""
        tails = zip(*(cache.tails for cache in caches), strict=True)
        return MixerCache(torch.cat([cache.state for cache in caches]), tuple(torch.cat(parts) for parts in tails))


class RecurrenceInputs(NamedTuple):
    """What the recurrence of a layer reads; `gated_delta_product`'s first arguments."""

    q: Tensor  # [B, T, H, dk]
    k: Tensor  # [B, T, n, H, dk]
    v: Tensor  # [B, T, n, H, dv]
    beta: Tensor  # [B, T, n, H]
    g: Tensor | None  # [B, T, H]


class ForgetGate(nn.Module):
    """A_log and dt_bias [H] of the log decay; a holder, never called (as RMSNorm): `front_end` computes with them."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))

    def init_weights(self, init: Initializer) -> None:
        """A uniform in (0, 16); the step softplus(dt_bias) log-uniform in [1e-3, 0.1], at least 1e-4."""
        init.fill_(self.A_log, lambda full: init.uniform(full, 1e-4, 16).log_())

        def inverse_softplus(full: Tensor) -> Tensor:
            dt = init.uniform(full, math.log(1e-3), math.log(0.1)).exp_().clamp_(min=1e-4)
            return dt + torch.log(-torch.expm1(-dt))

        init.fill_(self.dt_bias, inverse_softplus)


class DeltaProduct(nn.Module):
    """Token mixer x [B, T, D] -> [B, T, D].

    Args:
        c: the model's configuration; `mixer` is "deltaproduct", or "gla" for no erasing.
    """

    def __init__(self, c: config.Model) -> None:
        super().__init__()
        D, H, n = c.hidden_size, c.num_heads, c.num_householder
        self.heads, self.dk, self.dv, self.n = H, c.head_dim, c.head_v_dim, n
        self.erase, self.backend, self.family = c.mixer != "gla", c.backend, c.family
        self.max_beta = 2.0 if c.allow_neg_eigval else 1.0
        keys, values = H * self.dk, H * self.dv
        self.q_proj = nn.Linear(D, keys, bias=False)
        self.k_proj = nn.Linear(D, n * keys, bias=False)
        self.v_proj = nn.Linear(D, n * values, bias=False)
        self.b_proj = nn.Linear(D, n * H, bias=False)
        self.q_conv1d = ShortConv(keys, c.conv_size) if c.use_short_conv else None
        self.k_conv1d = ShortConv(n * keys, c.conv_size) if c.use_short_conv else None
        self.v_conv1d = ShortConv(n * values, c.conv_size) if c.use_short_conv else None
        self.a_proj = nn.Linear(D, H, bias=False) if c.use_forget_gate else None
        self.forget_gate = ForgetGate(H) if c.use_forget_gate else None
        self.g_proj = nn.Linear(D, values, bias=False) if c.use_output_gate else None
        self.o_norm = RMSNorm(self.dv, c.norm_eps)
        self.o_proj = nn.Linear(values, D, bias=False)

    def forward(self, x: Tensor, packing: Packing | None = None) -> Tensor:
        return self._mix(x, packing, None, keep_state=False)[0]

    def step(self, x: Tensor, cache: MixerCache | None) -> tuple[Tensor, MixerCache]:
        """The tokens x [B, T, D] after those in `cache`; T at once or one by one give the same."""
        out, state, projected = self._mix(x, None, cache, keep_state=True)
        tails = cache.tails if cache else (None, None, None)
        convs = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
        assert state is not None
        return out, MixerCache(
            state, tuple(c.next_tail(p, t) for c, p, t in zip(convs, projected, tails, strict=False) if c is not None)
        )

    def recurrence_inputs(self, x: Tensor, cache: MixerCache | None) -> RecurrenceInputs:
        """What the recurrence reads for the tokens x [B, T, D] after those in `cache`; to look inside, not to train."""
        return self._project(x, None, cache)[0]

    def _project(
        self, x: Tensor, packing: Packing | None, cache: MixerCache | None
    ) -> tuple[RecurrenceInputs, tuple[Tensor, ...]]:
        """The recurrence's inputs, and the projections of q, k and v before the convolution."""
        q, k, v = projected = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        convs = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
        gate = self.forget_gate
        inputs = front_end(
            q,
            k,
            v,
            self.b_proj(x),
            self.a_proj(x) if self.a_proj else None,
            tuple(c.weight for c in convs if c),
            gate.A_log if gate else None,
            gate.dt_bias if gate else None,
            heads=self.heads,
            max_beta=self.max_beta,
            position=packing.position if packing else None,
            tails=cache.tails if cache else (),
            backend="torch" if cache and cache.tails else self.backend,  # no kernel takes tails
        )
        return RecurrenceInputs(*inputs), projected

    def _mix(
        self, x: Tensor, packing: Packing | None, cache: MixerCache | None, keep_state: bool
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        """Output, final state if asked for, and the projections before the convolution."""
        inputs, projected = self._project(x, packing, cache)
        o, state = gated_delta_product(
            *inputs,
            initial_state=cache.state if cache else None,
            output_final_state=keep_state,
            cu_seqlens=packing.cu_seqlens if packing else None,
            erase=self.erase,
            backend=self.backend,
        )
        o = self.o_norm.apply_to(o).flatten(-2)
        if self.g_proj is not None:
            o = o * F.silu(self.g_proj(x))
        return self.o_proj(o), state, projected

    def init_weights(self, init: Initializer) -> None:
        for module in self.children():
            if isinstance(module, nn.Linear):
                init.normal_(module.weight)
            elif isinstance(module, ShortConv | ForgetGate | RMSNorm):
                module.init_weights(init)

    def describe(self) -> str:
        low = 1 - int(self.max_beta)
        spectrum = f", eigenvalues in [{low}, 1]" if self.erase else ""
        return f"{self.family}, {self.heads} heads, dk {self.dk}, dv {self.dv}{spectrum}"
