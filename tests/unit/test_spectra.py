"""Spectral facts: the matrices are the recurrence's, a wrong theorem is found out. That facts hold: test_theory_command.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from deltaproduct_kernels import gated_delta_product

from titan_dp.studies.state_tracking import spectra

RNG = np.random.default_rng()


def unit_keys(*shape: int) -> np.ndarray:
    keys = RNG.standard_normal(shape)
    return keys / np.linalg.norm(keys, axis=-1, keepdims=True)


@pytest.mark.parametrize("n", [1, 3])
def test_a_transition_is_what_a_token_does_to_the_state(n: int) -> None:
    beta, keys = RNG.uniform(0, 2, (1, n)), unit_keys(1, n, 4)
    k, b = torch.from_numpy(keys)[:, None, :, None], torch.from_numpy(beta)[:, None, :, None]
    identity = torch.eye(4, dtype=torch.float64)[None, None]
    _, state = gated_delta_product(
        k[:, :, 0], k, torch.zeros_like(k), b, initial_state=identity, output_final_state=True, backend="torch"
    )
    assert state is not None
    np.testing.assert_allclose(spectra.transitions(beta, keys), state[:, 0].numpy(), atol=1e-12)


def test_two_reflections_rotate_by_twice_the_angle_between_their_keys() -> None:
    angle = RNG.uniform(0.1, 3)
    keys = np.array([[1, 0], [np.cos(angle), np.sin(angle)]])
    rotation = [[np.cos(2 * angle), -np.sin(2 * angle)], [np.sin(2 * angle), np.cos(2 * angle)]]
    np.testing.assert_allclose(spectra.transitions(np.array([2.0, 2.0]), keys), rotation, atol=1e-12)


@pytest.mark.parametrize(
    ("beta", "cosine", "is_complex"),
    [
        ((2.0, 2.0), 0.5, True),
        ((2.0, 2.0), 0.0, False),  # orthogonal keys: a symmetric matrix
        ((2.0, 2.0), 1.0, False),  # one key twice: the identity
        ((0.9, 2.0), 0.5, False),
        ((1.5, 1.5), 0.95, False),  # cosine^2 = 0.9025 above (2 sqrt(0.5))^2 / 2.25 = 0.889
    ],
)
def test_two_factors_turn_by_the_theorem(beta: tuple[float, float], cosine: float, is_complex: bool) -> None:
    assert spectra.complex_by_theorem(np.array(beta), np.array(cosine)) == is_complex


def test_a_condition_that_is_only_necessary_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectra, "complex_by_theorem", lambda beta, _: (beta > 1).all(-1))
    assert not spectra.complex_condition_is_exact(RNG, 20_000).holds


def test_an_rwkv7_transition_is_its_formula() -> None:
    w, a, k = RNG.random(3), RNG.random(3), unit_keys(3)
    expected = [[w[i] * (i == j) - 2 * k[i] * a[j] * k[j] for j in range(3)] for i in range(3)]
    np.testing.assert_allclose(spectra.rwkv7_transitions(w, 2, a, k), expected)
