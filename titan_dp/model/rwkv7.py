"""The RWKV-7 mixer: a transition that is the product of n_h RWKV-7 transitions per token, to compare with DeltaProduct.

Everything but the transition is DeltaProduct's (projections laid out (n, heads, dim), short convolution, SiLU, keys and
queries of unit length, read-out), so that a comparison of the two is one of transitions; RWKV-7's token shift, LoRA
projections, bonus term and scale of the removal key (xi) are left out. The transition is that of Peng et al. 2025 (arXiv
2503.14456); to take several a token is what the authors of DeltaProduct (arXiv 2502.10297) did in the discussion with their
reviewers. A plain loop over tokens and steps with autograd: for state tracking, not for language models. Unlike a Householder
factor, a transition may lengthen the state: with c = 1 a product of two may have a spectral radius above 1, with c = 2 one
alone has up to 1.45.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from titan_dp import config
from titan_dp.model.deltaproduct import MatrixStateMixer, MixerCache
from titan_dp.model.layers import Float32, Initializer, Packing, upcast

_FASTEST_DECAY = math.exp(-0.5)  # w is never below exp(-exp(-0.5)) = 0.545


class TransitionInputs(NamedTuple):
    """What the recurrence of a layer reads."""

    q: Tensor  # [B, T, H, dk]
    k: Tensor  # [B, T, n, H, dk], of unit length: the removal keys
    v: Tensor  # [B, T, n, H, dv]
    a: Tensor  # [B, T, n, H, dk] in [0, 1]: in-context learning rates
    w: Tensor  # [B, T, n, H, dk] in [0.545, 1]: decays
    k_a: Tensor  # [n, H, dk]: how far the written keys follow a


class TransitionBias(Float32):
    """w0 and k_a [n H dk]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.w0 = nn.Parameter(torch.empty(channels))
        self.k_a = nn.Parameter(torch.empty(channels))

    def init_weights(self, init: Initializer) -> None:
        """-log w log-uniform in [1e-4, 1e-2], a memory of 100 to 10,000 steps; k_a = 1.

        With w near 1 and a = 1/2 a transition starts as DeltaProduct's does. A decay that is felt within a sequence would
        multiply up over its n_h T steps and hide its beginning from the first gradients. With k_a = 1 a step of a = 0 writes
        nothing, so a step can be switched off, as by beta = 0.
        """

        def logit_of_rate(full: Tensor) -> Tensor:
            rate = init.uniform(full, math.log(1e-4), math.log(1e-2)).exp_()
            return torch.logit(rate / _FASTEST_DECAY)

        init.fill_(self.w0, logit_of_rate)
        init.ones_(self.k_a)


class RWKV7(MatrixStateMixer):
    """The mixer "rwkv7"; `rwkv7_product` says what it computes."""

    a_proj: nn.Linear
    w_proj: nn.Linear
    transition_bias: TransitionBias

    def __init__(self, c: config.Model) -> None:
        D, channels = c.hidden_size, c.num_householder * c.num_heads * c.head_dim
        before: dict[str, nn.Module] = {name: nn.Linear(D, channels, bias=False) for name in ("a_proj", "w_proj")}
        super().__init__(c, before | {"transition_bias": TransitionBias(channels)})

    def _project(
        self, x: Tensor, packing: Packing | None, cache: MixerCache | None
    ) -> tuple[TransitionInputs, tuple[Tensor, ...], None]:
        no_beta = x.new_zeros(*x.shape[:2], self.n * self.heads)  # the front end's step sizes, which RWKV-7 has not
        inputs, projected = self._front_end(x, no_beta, None, None, packing, cache)
        bias, shape = self.transition_bias, (self.n, self.heads, self.dk)
        a = upcast(self.a_proj(x)).sigmoid()
        w = torch.exp(-_FASTEST_DECAY * (upcast(self.w_proj(x)) + bias.w0).sigmoid())
        a, w = a.unflatten(-1, shape), w.unflatten(-1, shape)
        return TransitionInputs(inputs.q, inputs.k, inputs.v, a, w, bias.k_a.view(shape)), projected, None

    def _recur(
        self, inputs: TransitionInputs, state: Tensor | None, packing: Packing | None, keep_state: bool
    ) -> tuple[Tensor, Tensor]:
        return rwkv7_product(inputs, self.max_beta, state, packing.position if packing else None)

    def describe(self) -> str:
        return f"{super().describe()}, transitions diag(w) - {self.max_beta:g} k (a k)^T"


def rwkv7_product(
    inputs: TransitionInputs, c: float, initial_state: Tensor | None = None, position: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence; for each head, in order of t and j, with the state S [dk, dv] the transpose of RWKV-7's own:

        S <- diag(w_tj) S - c (a_tj * k_tj) (k_tj^T S) + kw_tj v_tj^T       kw = k * (1 + (a - 1) * k_a)
        o_t = dk^-1/2 S^T q_t                                               after j = n

    RWKV-7 writes the key before it is normalised; here it is the unit key, as in DeltaProduct, so that the size of a write is
    bounded. Computes in float32, or in float64 for float64.

    Args:
        inputs: see `TransitionInputs`.
        c: 1, or 2 for transitions with negative eigenvalues.
        initial_state: [B, H, dk, dv]; None for zero.
        position: [T] index of each token in its document, which starts from a state of zero; None: one document.

    Returns:
        o [B, T, H, dv] in q's dtype, and the final state [B, H, dk, dv].
    """
    q, k, v, a, w, k_a = (upcast(x) for x in inputs)
    (B, T, n, H, dk), dv = k.shape, v.shape[-1]
    write, erase, read = k * (1 + (a - 1) * k_a), -c * a * k, k
    if position is not None:  # w = 0 and a read of nothing in a document's first step leave nothing of the state before
        keep = torch.ones(T, n, dtype=k.dtype, device=k.device)
        keep[:, 0] = position != 0
        w, read = w * keep[..., None, None], read * keep[..., None, None]

    def rows(x: Tensor) -> tuple[Tensor, ...]:
        """[B, T, ..., H, r, d] as one tensor [B H, r, d] for each token (and step), in order."""
        return x.movedim((0, -3), (-4, -3)).reshape(-1, B * H, *x.shape[-2:]).unbind()

    S = k.new_zeros(B * H, dk, dv) if initial_state is None else upcast(initial_state).flatten(0, 1)
    queries, reads, decays = rows(q.unsqueeze(-2) * dk**-0.5), rows(read.unsqueeze(-2)), rows(w.unsqueeze(-1))
    columns, values = rows(torch.stack([erase, write], -1)), rows(v.unsqueeze(-2))
    outputs = []
    for t in range(T):
        for i in range(t * n, (t + 1) * n):
            S = torch.baddbmm(decays[i] * S, columns[i], torch.cat([reads[i] @ S, values[i]], 1))
        outputs.append(queries[t] @ S)
    o = torch.stack(outputs).view(T, B, H, dv).transpose(0, 1) if outputs else v.new_empty(B, 0, H, dv)
    return o.to(inputs.q.dtype), S.view(B, H, dk, dv)
