"""The DeltaProduct mixer: DeltaNet, Gated DeltaNet, DeltaProduct and Gated DeltaProduct in one class.

n_h = 1 is DeltaNet, gated or not; erase = False leaves gated linear attention, the diagonal model that cannot track
state. A token has one query, and n_h keys, values and step sizes, which come from one projection each, laid out
(n_h, heads, dim), which is flash-linear-attention's layout: a converted checkpoint is a rename. Source: Siems et al.
2025 (arXiv 2502.10297), section 4; the gate is that of Gated DeltaNet (Yang et al. 2024). What does not depend on the
transition is in `MatrixStateMixer`, which rwkv7.py shares. An adaptive model has a router that decides for each token which
of the n_h steps are taken; a step that is not taken is still computed, so it saves model FLOPs in principle, not time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from deltaproduct_kernels import front_end, gated_delta_product
from deltaproduct_kernels.recurrent import by_head
from torch import Tensor, nn

from titan_dp import config
from titan_dp.model.layers import Float32, Initializer, Packing, RMSNorm, ShortConv, TokenMixer, upcast


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

    q: Tensor  # [B, T, G, dk], G key heads; mostly G = H
    k: Tensor  # [B, T, n, G, dk]
    v: Tensor  # [B, T, n, H, dv]
    beta: Tensor  # [B, T, n, H]
    g: Tensor | None  # [B, T, H]


class ForgetGate(Float32):
    """A_log and dt_bias [H] of the log decay; `front_end` computes with them."""

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


class StepRouter(nn.Linear):
    """Which of the n steps of each token are taken: x [B, T, D] -> gates [B, T, n], 1 or 0, in float32 at least.

    A step is taken if its logit is above 0. The gradient is that of the logit's sigmoid, the straight-through estimator of
    Bengio et al. 2013 (arXiv 1308.3432). One decision per token and step, shared by all heads.
    """

    def __init__(self, size: int, n: int) -> None:
        super().__init__(size, n, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        logits = upcast(super().forward(x))
        soft = logits.sigmoid()
        return (logits > 0).to(soft.dtype) + (soft - soft.detach())  # the bracket is exactly 0, so gates are exactly 0 or 1

    def init_weights(self, init: Initializer) -> None:
        """All steps on: a bias of 6 standard deviations of the first logits (the input's length is sqrt(D)), at least 1."""
        init.normal_(self.weight)
        init.fill_(self.bias, lambda full: full.fill_(max(1.0, 6 * init.std * math.sqrt(self.in_features))))


class MatrixStateMixer(TokenMixer):
    """A mixer with a state [dk, dv] per head: all but the recurrence and its inputs.

    A subclass says what its recurrence reads (`_project`) and what it computes (`_recur`).

    Args:
        before: the subclass's own children by name, which come between the projections and the convolutions; and
        after: those which come behind the convolutions. Children's first values are drawn in their order, and optimizers hold
            parameters in it, so a checkpoint depends on it.
    """

    def __init__(
        self, c: config.Model, before: dict[str, nn.Module], after: Mapping[str, nn.Module | None] = MappingProxyType({})
    ) -> None:
        super().__init__()
        self.heads, self.key_heads, self.n = c.num_heads, c.key_heads, c.num_householder
        self.dk, self.dv = c.head_dim, c.head_v_dim
        self.max_beta, self.beta_stretch = 2.0 if c.allow_neg_eigval else 1.0, c.beta_stretch
        self.backend, self.family = c.backend, c.family
        D, keys, values = c.hidden_size, self.key_heads * self.dk, self.heads * self.dv
        self.q_proj = nn.Linear(D, keys, bias=False)
        self.k_proj = nn.Linear(D, self.n * keys, bias=False)
        self.v_proj = nn.Linear(D, self.n * values, bias=False)
        for name, module in before.items():
            self.add_module(name, module)
        self.q_conv1d = ShortConv(keys, c.conv_size) if c.use_short_conv else None
        self.k_conv1d = ShortConv(self.n * keys, c.conv_size) if c.use_short_conv else None
        self.v_conv1d = ShortConv(self.n * values, c.conv_size) if c.use_short_conv else None
        for name, child in after.items():
            self.add_module(name, child)
        self.g_proj = nn.Linear(D, values, bias=False) if c.use_output_gate else None
        self.norm_by_head, self.gate_before_norm = c.output_norm == "head", c.gate_before_norm
        self.o_norm = RMSNorm(self.dv, c.norm_eps) if self.norm_by_head else RMSNorm(values, c.norm_eps, self.key_heads)
        self.o_proj = nn.Linear(values, D, bias=False)

    def stacks(self) -> dict[str, tuple[int, int]]:
        return {"q_proj": (1, self.key_heads), "k_proj": (self.n, self.key_heads), "v_proj": (self.n, self.heads)}

    def mix(self, x: Tensor, packing: Packing | None = None) -> tuple[Tensor, Tensor | None]:
        inputs, _, taken = self._project(x, packing, None) if self.context is None else self._project_segment(x, packing)
        o, _ = self._recur(inputs, None, packing, keep_state=False)
        return self._read_out(o, x), None if taken is None else taken.sum(-1)

    def step(self, x: Tensor, cache: MixerCache | None) -> tuple[Tensor, MixerCache]:
        inputs, projected, _ = self._project(x, None, cache)
        o, state = self._recur(inputs, cache.state if cache else None, None, keep_state=True)
        tails = cache.tails if cache else (None, None, None)
        convs = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
        assert state is not None
        return self._read_out(o, x), MixerCache(
            state, tuple(c.next_tail(p, t) for c, p, t in zip(convs, projected, tails, strict=False) if c is not None)
        )

    def _project(
        self, x: Tensor, packing: Packing | None, cache: MixerCache | None
    ) -> tuple[Any, tuple[Tensor, ...], Tensor | None]:
        """What the recurrence reads; the projections of q, k and v before the convolution; a router's gates [B, T, n]."""
        raise NotImplementedError

    def _project_segment(self, x: Tensor, packing: Packing | None) -> tuple[Any, tuple[Tensor, ...], Tensor | None]:
        """`_project` of a segment: the convolutions see the tokens before it, which are projected as well and then dropped."""
        assert self.context is not None
        if self.q_conv1d is None:
            return self._project(x, packing, None)
        context, halo = self.context, self.q_conv1d.weight.shape[-1] - 1
        x, longer = context.prepend_halo(x, packing, halo)
        inputs, _, taken = self._project(x, longer, None)
        own = [None if y is None else context.drop_halo(y, packing, halo) for y in (*inputs, taken)]
        return type(inputs)(*own[:-1]), (), own[-1]

    def _recur(
        self, inputs: Any, state: Tensor | None, packing: Packing | None, keep_state: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Reads o [B, T, H, dv] and, if asked for, the final state [B, H, dk, dv], from `state` or zero on."""
        raise NotImplementedError

    def _front_end(
        self,
        x: Tensor,
        b: Tensor,
        a: Tensor | None,
        gate: ForgetGate | None,
        packing: Packing | None,
        cache: MixerCache | None,
    ) -> tuple[RecurrenceInputs, tuple[Tensor, ...]]:
        """`front_end` of this layer, and the projections of q, k and v before the convolution."""
        q, k, v = projected = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        inputs = front_end(
            q,
            k,
            v,
            b,
            a,
            tuple(c.weight for c in (self.q_conv1d, self.k_conv1d, self.v_conv1d) if c),
            gate.A_log if gate else None,
            gate.dt_bias if gate else None,
            heads=self.heads,
            groups=self.key_heads,
            max_beta=self.max_beta,
            beta_stretch=self.beta_stretch,
            position=packing.position if packing else None,
            tails=cache.tails if cache else (),
            backend="torch" if cache and cache.tails else self.backend,  # no kernel takes tails
        )
        return RecurrenceInputs(*inputs), projected

    def _read_out(self, o: Tensor, x: Tensor) -> Tensor:
        gate = None if self.g_proj is None else self.g_proj(x)
        if gate is not None and self.gate_before_norm:
            o = upcast(o) * F.silu(upcast(gate)).view_as(o)  # rounded once, behind the norm
        o = self.o_norm.apply_to(o if self.norm_by_head else o.flatten(-2)).view(*o.shape[:2], -1).to(x.dtype)
        if gate is not None and not self.gate_before_norm:
            o = o * F.silu(gate)
        return self.o_proj(o)

    def describe(self) -> str:
        shared = f" on {self.key_heads} of q and k" if self.key_heads != self.heads else ""
        return f"{self.family}, {self.heads} heads{shared}, dk {self.dk}, dv {self.dv}"


class DeltaProduct(MatrixStateMixer):
    """The mixers "deltaproduct", and "gla" for no erasing."""

    b_proj: nn.Linear
    a_proj: nn.Linear | None
    forget_gate: ForgetGate | None
    r_proj: StepRouter | None

    def __init__(self, c: config.Model) -> None:
        D, H, n = c.hidden_size, c.num_heads, c.num_householder
        after = {
            "a_proj": nn.Linear(D, H, bias=False) if c.use_forget_gate else None,
            "forget_gate": ForgetGate(H) if c.use_forget_gate else None,
            "r_proj": StepRouter(D, n) if c.adaptive_householder else None,
        }
        super().__init__(c, {"b_proj": nn.Linear(D, n * H, bias=False)}, after)
        self.erase = c.mixer != "gla"

    def recurrence_inputs(self, x: Tensor, cache: MixerCache | None) -> RecurrenceInputs:
        """What each head reads for the tokens x [B, T, D] after those in `cache`, G = H; to look inside, not to train."""
        inputs = self._project(x, None, cache)[0]
        return inputs._replace(q=by_head(inputs.q, self.heads), k=by_head(inputs.k, self.heads))

    def _project(
        self, x: Tensor, packing: Packing | None, cache: MixerCache | None
    ) -> tuple[RecurrenceInputs, tuple[Tensor, ...], Tensor | None]:
        a = self.a_proj(x) if self.a_proj else None
        inputs, projected = self._front_end(x, self.b_proj(x), a, self.forget_gate, packing, cache)
        if self.r_proj is None:
            return inputs, projected, None
        taken = self.r_proj(x)
        return inputs._replace(beta=inputs.beta * taken[..., None]), projected, taken

    def _recur(
        self, inputs: RecurrenceInputs, state: Tensor | None, packing: Packing | None, keep_state: bool
    ) -> tuple[Tensor, Tensor | None]:
        if self.context is not None:
            return self.context.recurrence(*inputs, packing, erase=self.erase, backend=self.backend), None
        return gated_delta_product(
            *inputs,
            initial_state=state,
            output_final_state=keep_state,
            cu_seqlens=packing.cu_seqlens if packing else None,
            erase=self.erase,
            backend=self.backend,
        )

    def describe(self) -> str:
        low = 1 - int(self.max_beta)
        return super().describe() + (f", eigenvalues in [{low}, 1]" if self.erase else "")
