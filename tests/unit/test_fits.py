"""Fits recover laws that made-up losses were drawn from, and say so where they cannot."""

from __future__ import annotations

import math

import numpy as np
import pytest

from titan_dp.studies.report.fits import fit_parabola, fit_power_law

TRUTH = {"E": 1.7, "A": 400.0, "a": 0.34, "B": 410.0, "b": 0.28}  # near Hoffmann et al.'s


def surface(N: np.ndarray, D: np.ndarray) -> np.ndarray:
    return TRUTH["E"] + TRUTH["A"] / N ** TRUTH["a"] + TRUTH["B"] / D ** TRUTH["b"]


def grid(seeds: int = 2, sizes: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """N, D and the configuration of each run of a full grid."""
    N, D = (axis.ravel() for axis in np.meshgrid(np.geomspace(1e7, 3e8, sizes), np.geomspace(2e8, 6e9, sizes)))
    return np.repeat(N, seeds), np.repeat(D, seeds), np.repeat(np.arange(len(N)), seeds)


def noisy(loss: np.ndarray, scale: float = 0.003, seed: int = 5) -> np.ndarray:
    return loss * np.exp(scale * np.random.default_rng(seed).standard_normal(loss.shape))


def test_losses_without_noise_give_the_law_they_came_from() -> None:
    N, D, group = grid(seeds=1)
    law = fit_power_law([N, D], surface(N, D), group, resamples=2)
    assert {name: estimate.value for name, estimate in law.estimates.items()} == pytest.approx(TRUTH, rel=0.02)
    assert law.error < 1e-4
    assert law.predict(1e9, 2e10) == pytest.approx(surface(np.array(1e9), np.array(2e10)), rel=2e-3)  # not fitted
    assert law.predict(np.array([1e7, 1e8]), 1e9).shape == (2,)


def test_the_intervals_of_noisy_losses_hold_the_truth() -> None:
    N, D, group = grid()
    law = fit_power_law([N, D], noisy(surface(N, D)), group, resamples=40)
    for name, truth in TRUTH.items():
        assert law.estimates[name].low <= truth <= law.estimates[name].high, name
    assert law.undetermined == []


def test_one_run_gone_wrong_hardly_moves_the_fit() -> None:
    N, D, group = grid()
    loss = noisy(surface(N, D), scale=1e-4)
    loss[7] *= 1.5
    law = fit_power_law([N, D], loss, group, resamples=2)
    assert law.estimates["a"].value == pytest.approx(TRUTH["a"], rel=0.03)
    assert law.estimates["b"].value == pytest.approx(TRUTH["b"], rel=0.03)


def test_a_law_of_compute_alone_is_recovered() -> None:
    C = np.repeat(np.geomspace(1e16, 1e19, 8), 2)
    law = fit_power_law([C], noisy(1.7 + 900 / C**0.16, scale=0.001), np.repeat(np.arange(8), 2), resamples=40)
    assert list(law.estimates) == ["E", "A", "a"]
    assert law.estimates["a"].low <= 0.16 <= law.estimates["a"].high
    assert law.estimates["E"].low <= 1.7 <= law.estimates["E"].high


def test_what_the_losses_do_not_tell_is_undetermined() -> None:
    N, D, group = grid()
    law = fit_power_law([N, D], noisy(2 + 400 / N**0.34), group, resamples=20)  # tokens change nothing
    assert "B" in law.undetermined


def test_a_pure_power_law_has_no_irreducible_loss() -> None:
    C = np.geomspace(1e16, 1e19, 8)
    law = fit_power_law([C], 900 / C**0.16, np.arange(8), resamples=20)
    assert law.estimates["E"].bound == "value"


def profile(sizes: int, seeds: int, best: float, noise: float = 0.003) -> tuple[np.ndarray, np.ndarray]:
    N = np.repeat(np.geomspace(1e7, 1e8, sizes), seeds)
    scatter = np.random.default_rng(2).standard_normal(len(N))
    return N, 3 + 0.05 * np.log(N / best) ** 2 + noise * scatter


def test_the_minimum_of_a_parabola_is_that_of_its_data() -> None:
    parabola = fit_parabola(*profile(5, 2, best=4e7))
    assert parabola.minimum == pytest.approx(4e7, rel=0.05)
    assert parabola.inside
    assert parabola.interval is not None
    assert parabola.interval[0] <= 4e7 <= parabola.interval[1]
    assert parabola.loss == pytest.approx(3, abs=0.005)


def test_the_interval_of_a_minimum_holds_it_as_often_as_it_says() -> None:
    rng, held = np.random.default_rng(0), 0
    N = np.repeat(np.geomspace(1e7, 1e8, 3), 2)
    for _ in range(200):
        interval = fit_parabola(N, 3 + 0.05 * np.log(N / 4e7) ** 2 + 0.003 * rng.standard_normal(6), resamples=300).interval
        assert interval is not None
        held += interval[0] <= 4e7 <= interval[1]
    assert 0.82 <= held / 200 <= 0.97


def test_a_minimum_beyond_the_sizes_is_outside_and_three_runs_leave_nothing_to_judge_one_by() -> None:
    assert not fit_parabola(*profile(4, 2, best=5e8)).inside
    assert fit_parabola(*profile(3, 1, best=4e7)).interval is None


def test_a_parabola_that_opens_downwards_has_no_minimum() -> None:
    N, loss = profile(4, 2, best=4e7)
    parabola = fit_parabola(N, 6 - loss)
    assert parabola.minimum is None
    assert not parabola.inside


def test_nearly_flat_losses_leave_a_minimum_unbounded() -> None:
    N = np.repeat(np.geomspace(1e7, 1e8, 4), 2)
    scatter = np.random.default_rng(1).standard_normal(8)
    parabola = fit_parabola(N, 3 + 1e-4 * np.log(N / 4e7) ** 2 + 0.01 * scatter)
    assert parabola.interval == (0.0, math.inf)
