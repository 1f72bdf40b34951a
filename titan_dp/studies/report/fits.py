"""Fits of losses: L(N, D) = E + A/N^a + B/D^b, L(C) = E + A/C^a, and isoFLOP parabolas, each with bootstrap intervals; time.

The power laws are approach 3 of Hoffmann et al. (2022, arXiv:2203.15556, section 3.3): Huber's loss with delta = 1e-3
on the log of the loss, the sum written as a log-sum-exp, many starts, L-BFGS. Two things differ: sizes are taken relative to
their geometric mean, which makes amplitudes and exponents nearly independent, and the starts are least-squares solutions
for a grid of exponents instead of a grid over everything. Parabolas are their approach 2 (section 3.2).

Intervals are percentiles of a bootstrap. For power laws it draws configurations with replacement, then runs (seeds) of each;
drawing residuals instead proved too narrow, because a fit this robust passes through some points exactly. A parabola often
has three sizes, none of which can be missing: there the bootstrap draws residuals of a least-squares fit (Davison and Hinkley
1997, section 6.2.3), times sqrt(n / chi2) with chi2 drawn for the n - 3 degrees of freedom of n runs. That widens the
intervals of few runs as Student's t does. Which runs go into a fit, and how many are enough, is results.py's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize, nnls

Array = np.ndarray

DELTA = 1e-3
LEVEL = 0.90
RESAMPLES = 200
_TAILS = (50 * (1 - LEVEL), 100 - 50 * (1 - LEVEL))
_EXPONENTS = (0.02, 3.0)
_START_EXPONENTS = (0.05, 0.1, 0.2, 0.3, 0.45, 0.7, 1.0, 1.5)
_POLISHED_STARTS = 10
_SMALLEST_SHARE = 1e-3
"""A term below this share of the smallest loss is as good as nothing: its amplitude is at its bound."""
_SCATTER = 1000
_SEED = 0
_SAME = 0.01
"""Sizes whose logarithms differ by less are one size."""


@dataclass(frozen=True)
class Estimate:
    """A fitted value and its LEVEL bootstrap interval."""

    value: float
    low: float
    high: float
    bound: str = ""
    """'value' if the fit itself is at a bound of its search, 'interval' if an end of the interval is."""


@dataclass(frozen=True)
class PowerLaw:
    """L(x_1, ...) = E + sum of A_k / x_k^a_k over the size-like quantities x_k.

    Args:
        estimates: by name: E, then the amplitude and the exponent of each term (A, a; B, b).
        theta: the parameters as they were fitted; `predict` needs them and `centre`.
        centre: logarithms of the geometric means of the x_k.
        points: number of runs fitted.
        error: root mean square of the residuals of log L.
        draws: the parameters fitted to each resample [resamples, parameters].
        residuals: of log L, one for each run.
    """

    estimates: dict[str, Estimate]
    theta: Array
    centre: Array
    points: int
    error: float
    draws: Array
    residuals: Array

    @property
    def undetermined(self) -> list[str]:
        """Names of the parameters that are at a bound, or whose interval ends at one."""
        return [name for name, estimate in self.estimates.items() if estimate.bound]

    def predict(self, *x: Array | float) -> Array:
        """The loss at sizes `x`, one array for each term."""
        logs = np.stack(np.broadcast_arrays(*(np.log(values) for values in x)), axis=-1) - self.centre
        return np.exp(_design(logs.reshape(-1, logs.shape[-1])) @ self.theta).sum(axis=0).reshape(logs.shape[:-1])

    def forecast(self, *x: float) -> Estimate:
        """The loss at sizes `x`, with the interval of a run there: the resamples' laws times residuals drawn anew.

        Residuals are widened by sqrt(n / (n - parameters)). That the law is another one beyond the fitted sizes is in no
        interval.
        """
        design = _design(np.log(np.array([x], float)) - self.centre)[:, 0]
        laws = np.exp(self.draws @ design.T).sum(axis=1)
        free = max(1, self.points - len(self.theta))
        scatter = np.random.default_rng(_SEED).choice(self.residuals, (_SCATTER, 1)) * math.sqrt(self.points / free)
        low, high = np.percentile(laws * np.exp(scatter), _TAILS)
        return Estimate(float(self.predict(*x)), float(low), float(high))


def fit_power_law(x: list[Array], loss: Array, group: Array, resamples: int = RESAMPLES) -> PowerLaw:
    """Fit E plus one power law in each of `x`: with x = [N, D] this is L(N, D), with x = [C] it is L(C).

    Args:
        x: sizes, an array [runs] of positive numbers each.
        loss: [runs], positive.
        group: [runs], the index of each run's configuration.
        resamples: of the bootstrap.

    Every x needs at least two different values; the callers ask for more.
    """
    logs = np.log(np.stack(x, axis=1).astype(float))
    centre = logs.mean(axis=0)
    logs, y = logs - centre, np.log(np.asarray(loss, float))
    assert (np.ptp(logs, axis=0) > _SAME).all(), "one size only"
    low, high = _bounds(y, len(x))
    theta = _best_of(_starts(logs, y, low, high), logs, y, low, high)
    draws = np.stack(
        [_descend(theta, _design(logs[runs]), y[runs], low, high)[0] for runs in _resampled(logs, np.asarray(group), resamples)]
    )
    estimates = {"E": _estimate(np.exp(theta[0]), np.exp(draws[:, 0]), theta[0], draws[:, 0], low[0], high[0])}
    for k, name in zip(range(len(x)), "AB", strict=False):
        c, a = 1 + 2 * k, 2 + 2 * k
        amplitude, amplitudes = (np.exp(t[..., c] + t[..., a] * centre[k]) for t in (theta, draws))
        estimates[name] = _estimate(amplitude, amplitudes, theta[c], draws[:, c], low[c], high[c])
        estimates[name.lower()] = _estimate(theta[a], draws[:, a], theta[a], draws[:, a], low[a], high[a])
    residuals = y - np.log(np.exp(_design(logs) @ theta).sum(axis=0))
    return PowerLaw(estimates, theta, centre, len(y), float(np.sqrt(np.mean(residuals**2))), draws, residuals)


def _resampled(logs: Array, group: Array, resamples: int) -> Iterator[Array]:
    """Indices of runs for each resample: configurations drawn with replacement, then as many runs as each has.

    A draw in which a quantity has a single value says nothing about its exponent and is repeated.
    """
    rng = np.random.default_rng(_SEED)
    members = [np.flatnonzero(group == g) for g in np.unique(group)]
    while resamples:
        drawn = (members[i] for i in rng.integers(len(members), size=len(members)))
        runs = np.concatenate([rng.choice(m, len(m)) for m in drawn])
        if np.ptp(logs[runs], axis=0).min() > _SAME:
            resamples -= 1
            yield runs


def _design(logs: Array) -> Array:
    """[1 + terms, n, parameters] at `logs` [n, terms]: times theta = (log E, log A_1, a_1, ...), the log of each term."""
    n, terms = logs.shape
    design = np.zeros((1 + terms, n, 1 + 2 * terms))
    design[0, :, 0] = 1
    for k in range(terms):
        design[1 + k, :, 1 + 2 * k] = 1
        design[1 + k, :, 2 + 2 * k] = -logs[:, k]
    return design


def _bounds(y: Array, terms: int) -> tuple[Array, Array]:
    """Of theta: E and amplitudes from next to nothing to the smallest and the largest loss."""
    nothing, top = y.min() + math.log(_SMALLEST_SHARE), y.max()
    low, high = ([nothing] + [nothing, _EXPONENTS[0]] * terms), ([y.min()] + [top, _EXPONENTS[1]] * terms)
    return np.array(low), np.array(high)


def _starts(logs: Array, y: Array, low: Array, high: Array) -> list[Array]:
    """For each combination of exponents, the E and amplitudes of least squares in the relative error of the loss."""
    starts = []
    for exponents in itertools.product(_START_EXPONENTS, repeat=logs.shape[1]):
        columns = np.concatenate([np.ones((len(y), 1)), np.exp(-np.array(exponents) * logs)], axis=1)
        solution = np.log(np.maximum(nnls(columns / np.exp(y)[:, None], np.ones(len(y)))[0], 1e-30))
        theta = np.empty(len(low))
        theta[0], theta[1::2], theta[2::2] = solution[0], solution[1:], exponents
        starts.append(np.clip(theta, low, high))
    return starts


def _best_of(starts: list[Array], logs: Array, y: Array, low: Array, high: Array) -> Array:
    design = _design(logs)
    ranked = sorted(starts, key=lambda theta: _objective(theta, design, y)[0])[:_POLISHED_STARTS]
    return min((_descend(theta, design, y, low, high) for theta in ranked), key=lambda found: found[1])[0]


def _descend(start: Array, design: Array, y: Array, low: Array, high: Array) -> tuple[Array, float]:
    options = {"maxiter": 500, "ftol": 1e-10}
    arguments = {"method": "L-BFGS-B", "jac": True, "bounds": np.stack([low, high], axis=1), "options": options}
    result = minimize(_objective, start, args=(design, y), **arguments)
    return result.x, float(result.fun)


def _objective(theta: Array, design: Array, y: Array) -> tuple[float, Array]:
    """Huber's loss of the residuals of log L, in units of DELTA^2 and summed over runs, and its gradient.

    In plain units it would be near 1e-5 and meet L-BFGS's absolute tolerances at once. The bounds of the search keep every
    power far from overflow, so the log-sum-exp needs no shift.
    """
    powers = np.exp(design @ theta)
    total = powers.sum(axis=0)
    residual = (np.log(total) - y) / DELTA
    clipped = np.minimum(np.maximum(residual, -1), 1)
    weights = powers * (clipped / (DELTA * total))
    return float(clipped @ (residual - clipped / 2)), weights.ravel() @ design.reshape(-1, len(theta))


def _estimate(value: float, draws: Array, theta: float, thetas: Array, low: float, high: float) -> Estimate:
    """The interval of `draws`; whether `theta`, or the ends of the interval of `thetas`, lie at their bounds."""
    ends, bounds_at = np.percentile(draws, _TAILS), np.percentile(thetas, _TAILS)
    near = 1e-3 * (high - low)
    at = ["value"] if not low + near < theta < high - near else []
    at += ["interval"] if bounds_at[0] <= low + near or bounds_at[1] >= high - near else []
    return Estimate(float(value), float(ends[0]), float(ends[1]), (at or [""])[0])


# -- time --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TimeLaw:
    """Seconds per token = fixed + per_parameter x N: what a step costs whatever the size, and what it costs for its size."""

    fixed: float
    per_parameter: float
    error: float
    """Root mean square of the relative residuals."""

    def predict(self, N: float) -> float:
        """Seconds per token of a model of `N` parameters."""
        return self.fixed + self.per_parameter * N


def fit_time(N: Array, tokens_per_second: Array) -> TimeLaw:
    """Fit both terms, neither below 0, by least squares of the relative error; `N` and speeds [configurations]."""
    columns = np.stack([np.ones(len(N)), N], axis=1) * tokens_per_second[:, None]
    scale = columns.max(axis=0)
    solution = nnls(columns / scale, np.ones(len(N)))[0] / scale
    error = float(np.sqrt(np.mean((columns @ solution - 1) ** 2)))
    return TimeLaw(float(solution[0]), float(solution[1]), error)


# -- isoFLOP parabolas -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parabola:
    """loss = coefficients . (u^2, u, 1) with u = log N - centre, fitted by least squares.

    `minimum` is the N of its lowest point, None if it opens downwards. Its interval is None if there are as many runs as
    coefficients, which leaves nothing to estimate the runs' scatter from, and reaches to 0 or infinity if more resamples than
    an interval leaves out have no minimum. `inside`: the minimum lies among the sampled sizes.
    """

    coefficients: Array
    centre: float
    minimum: float | None
    interval: tuple[float, float] | None
    inside: bool
    loss: float | None
    """At the minimum."""

    def predict(self, N: Array | float) -> Array:
        return np.polyval(self.coefficients, np.log(N) - self.centre)


def fit_parabola(N: Array, loss: Array, resamples: int = 2000) -> Parabola:
    """Fit a parabola in log N to runs of one budget: `N` and `loss` [runs], at least three different N."""
    u, y = np.log(np.asarray(N, float)), np.asarray(loss, float)
    centre = float(u.mean())
    u = u - centre
    coefficients = np.polyfit(u, y, 2)
    minimum = _vertices(coefficients[:, None])[0]
    interval = None
    if len(y) > 3:
        fitted = np.polyval(coefficients, u)
        rng, free = np.random.default_rng(_SEED), len(y) - 3
        scale = np.sqrt(len(y) / rng.chisquare(free, resamples))  # the scatter itself is known from `free` residuals only
        draws = rng.choice(y - fitted, (len(y), resamples)) * scale
        interval = _interval_of_vertices(_vertices(np.polyfit(u, fitted[:, None] + draws, 2)), centre)
    there = bool(np.isfinite(minimum))
    return Parabola(
        coefficients,
        centre,
        float(np.exp(minimum + centre)) if there else None,
        interval,
        there and bool(u.min() < minimum < u.max()),
        float(np.polyval(coefficients, minimum)) if there else None,
    )


def _vertices(coefficients: Array) -> Array:
    """Where parabolas [3, n] are lowest; infinite for those that open downwards."""
    upwards = coefficients[0] > 0
    return np.where(upwards, -coefficients[1] / (2 * np.where(upwards, coefficients[0], 1)), np.inf)


def _interval_of_vertices(vertices: Array, centre: float) -> tuple[float, float]:
    finite = vertices[np.isfinite(vertices)]
    if 1 - len(finite) / len(vertices) > (1 - LEVEL) / 2:
        return 0.0, math.inf
    with np.errstate(over="ignore"):
        low, high = np.exp(np.percentile(finite, _TAILS) + centre)
    return float(low), float(high)
