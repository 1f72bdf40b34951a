"""Products of RWKV-7 transitions against a float64 recurrence in numpy, in RWKV-7's own layout.

What every mixer must do (causality, packing in loss and gradients, decoding, initialisation) is asked in test_model.py.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.unit.test_model import settings
from titan_dp.model.layers import Initializer
from titan_dp.model.rwkv7 import RWKV7, TransitionInputs, rwkv7_product

H, DK, DV = 2, 4, 3


def some_inputs(tokens: int, n: int, B: int = 2, dk: int = DK, dv: int = DV) -> TransitionInputs:
    k = torch.randn(B, tokens, n, H, dk, dtype=torch.float64)
    return TransitionInputs(
        q=torch.randn(B, tokens, H, dk, dtype=torch.float64),
        k=k / k.norm(dim=-1, keepdim=True),
        v=torch.randn(B, tokens, n, H, dv, dtype=torch.float64),
        a=torch.rand_like(k),
        w=0.545 + 0.455 * torch.rand_like(k),
        k_a=torch.rand(n, H, dk, dtype=torch.float64),
    )


def in_rwkv7s_layout(x: TransitionInputs, c: float, state: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Outputs [B, T, H, dv] and final state [B, H, dv, dk]: row vectors, states multiplied from the right."""
    q, k, v, a, w, k_a = (y.detach().numpy() for y in x)
    S = state.detach().numpy().transpose(0, 1, 3, 2).copy()
    o = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, t, h in np.ndindex(*q.shape[:3]):
        for j in range(k.shape[2]):
            key, rate = k[b, t, j, h], a[b, t, j, h]
            transition = np.diag(w[b, t, j, h]) - c * np.outer(key, rate * key)
            S[b, h] = S[b, h] @ transition + np.outer(v[b, t, j, h], key * (1 + (rate - 1) * k_a[j, h]))
        o[b, t, h] = S[b, h] @ q[b, t, h] * q.shape[-1] ** -0.5
    return o, S


@pytest.mark.parametrize(("n", "c"), [(1, 2.0), (2, 1.0), (3, 2.0)])
def test_outputs_and_state_are_those_of_the_recurrence_in_rwkv7s_own_layout(n: int, c: float) -> None:
    x, state = some_inputs(9, n), torch.randn(2, H, DK, DV, dtype=torch.float64)
    expected_o, expected_state = in_rwkv7s_layout(x, c, state)
    o, final = rwkv7_product(x, c, state)
    np.testing.assert_allclose(o.numpy(), expected_o, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(final.numpy().transpose(0, 1, 3, 2), expected_state, rtol=1e-10, atol=1e-10)


def test_low_precision_inputs_are_computed_with_in_float32() -> None:
    x = some_inputs(50, 2)
    half = TransitionInputs(*(y.bfloat16() for y in x))
    o, state = rwkv7_product(half, 1.0)
    expected, _ = in_rwkv7s_layout(TransitionInputs(*(y.double() for y in half)), 1.0, torch.zeros(2, H, DK, DV))
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    np.testing.assert_allclose(o.float().numpy(), expected, rtol=2**-8, atol=1e-5)


# -- the layer ---------------------------------------------------------------------------------------------------------


def layer(std: float = 0.3, **changes: object) -> RWKV7:
    mixer = RWKV7(settings(mixer="rwkv7", use_short_conv=False, **changes)).double()
    mixer.init_weights(Initializer(0, torch.device("cpu"), std))
    return mixer


@pytest.mark.parametrize("c", [1.0, 2.0])
def test_the_layer_is_the_recurrence_of_its_projections(c: float) -> None:
    mixer, x = layer(num_householder=2, allow_neg_eigval=c == 2), torch.randn(2, 8, 24, dtype=torch.float64)
    torch.nn.init.normal_(mixer.transition_bias.k_a)

    def activated(projection: torch.nn.Linear, *shape: int) -> Tensor:
        return torch.nn.functional.silu(projection(x)).view(2, 8, *shape)

    def unit(y: Tensor) -> Tensor:
        return y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt()

    bias = mixer.transition_bias
    inputs = TransitionInputs(
        q=unit(activated(mixer.q_proj, 2, 8)),
        k=unit(activated(mixer.k_proj, 2, 2, 8)),
        v=activated(mixer.v_proj, 2, 2, 8),
        a=mixer.a_proj(x).sigmoid().view(2, 8, 2, 2, 8),
        w=torch.exp(-math.exp(-0.5) * (mixer.w_proj(x) + bias.w0).sigmoid()).view(2, 8, 2, 2, 8),
        k_a=bias.k_a.view(2, 2, 8),
    )
    o, _ = in_rwkv7s_layout(inputs, c, torch.zeros(2, 2, 8, 8, dtype=torch.float64))
    o = o / np.sqrt(np.square(o).mean(-1, keepdims=True) + 1e-6)
    expected = mixer.o_proj(torch.from_numpy(o).flatten(2))
    torch.testing.assert_close(mixer(x), expected)


def test_a_new_layer_forgets_little_and_learns_at_half_rate() -> None:
    mixer = layer(std=0.006)
    inputs, _, _ = mixer._project(torch.randn(1, 100, 24, dtype=torch.float64), None, None)
    assert bool(((inputs.w > 0.989) & (inputs.w < 0.99991)).all())
    assert bool(((inputs.a - 0.5).abs() < 0.1).all())
    assert bool((inputs.k_a == 1).all())


def test_the_layer_says_what_it_is() -> None:
    assert layer(num_householder=1).describe() == "RWKV-7, 2 heads, dk 8, dv 8, transitions diag(w) - 2 k (a k)^T"
