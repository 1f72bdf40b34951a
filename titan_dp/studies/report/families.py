"""Which fits a report makes of which configurations, and what it says where there is too little for one.

A family (mixer, n_h, gate, eigenvalue range) is fitted as one. Of configurations of a family with equal size and tokens
(learning rates tried, other shapes) only the one with the lowest mean loss is fitted: the law is about the best that a
size can do. L(C) is fitted to the family's own front, the lowest losses for their FLOPs, since a law through models of any
size would say what the study happened to train. N is the number of all parameters, the embedding included.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from titan_dp.studies.report.comparisons import front
from titan_dp.studies.report.configurations import SAME_BUDGET, SAME_SIZE, SAME_TOKENS, Configuration, clusters
from titan_dp.studies.report.fits import Parabola, PowerLaw, fit_parabola, fit_power_law

_DISTINCT = 3
_BUDGETS = 4
_COLLINEAR = 0.99

Cost = Callable[[Configuration], float]


@dataclass
class FamilyFits:
    """The laws of one family; where one is missing, `surface_lacks` or `compute_lacks` says why."""

    family: str
    fitted: list[Configuration]
    left_out: int
    """Configurations left out because another of the family has the same size and tokens and a lower loss."""
    surface: PowerLaw | None = None
    surface_lacks: str = ""
    compute: PowerLaw | None = None
    compute_lacks: str = ""
    compute_points: list[Configuration] = field(default_factory=list)


@dataclass(frozen=True)
class IsoFlop:
    """One family's profile at one budget of FLOPs."""

    family: str
    budget: float
    configurations: list[Configuration]
    parabola: Parabola


def families(configurations: list[Configuration]) -> dict[str, list[Configuration]]:
    """Configurations with a loss by family, in the order they are shown."""
    found: dict[str, list[Configuration]] = {}
    for configuration in configurations:
        if configuration.losses:
            found.setdefault(configuration.family, []).append(configuration)
    return found


def best_of_each_size(configurations: list[Configuration]) -> list[Configuration]:
    """Of configurations of one family within 1 % in size and tokens, the one with the lowest mean loss."""
    return [
        min(equal, key=lambda c: c.mean)
        for sized in clusters(configurations, lambda c: c.parameters, SAME_SIZE)
        for equal in clusters(sized, lambda c: c.tokens, SAME_TOKENS)
    ]


def fit_families(configurations: list[Configuration]) -> list[FamilyFits]:
    """Fit every family for which there is enough, several laws at once in processes of their own."""
    found = [_plan(family, members) for family, members in families(configurations).items()]
    surfaces = [fits for fits in found if not fits.surface_lacks]
    computes = [fits for fits in found if not fits.compute_lacks]
    problems = [_problem([lambda c: c.parameters, lambda c: c.tokens], fits.fitted) for fits in surfaces]
    problems += [_problem([lambda c: c.flops], fits.compute_points) for fits in computes]
    if len(problems) > 2:
        with ProcessPoolExecutor() as pool:
            laws = list(pool.map(fit_power_law, *zip(*problems, strict=True)))
    else:
        laws = [fit_power_law(*problem) for problem in problems]
    for fits, law in zip(surfaces, laws, strict=False):
        fits.surface = law
    for fits, law in zip(computes, laws[len(surfaces) :], strict=True):
        fits.compute = law
    return found


def _plan(family: str, members: list[Configuration]) -> FamilyFits:
    """Which configurations each law of a family is fitted to, or what is missing."""
    fitted = best_of_each_size(members)
    points = front(fitted, lambda c: c.flops, SAME_BUDGET)
    lacks = ""
    if len(points) < _BUDGETS:
        lacks = (
            f"the fit needs {_BUDGETS} budgets of FLOPs, each with a lower loss than the one before; there are {len(points)}"
        )
    return FamilyFits(
        family,
        fitted,
        len(members) - len(fitted),
        surface_lacks=_surface_lacks(fitted),
        compute_lacks=lacks,
        compute_points=points,
    )


def _surface_lacks(fitted: list[Configuration]) -> str:
    """What is missing for L(N, D), or nothing."""
    import numpy as np

    sizes = len(clusters(fitted, lambda c: c.parameters, SAME_SIZE))
    tokens = len(clusters(fitted, lambda c: c.tokens, SAME_TOKENS))
    lacks = []
    if sizes < _DISTINCT:
        lacks.append(f"{_DISTINCT} sizes (there are {sizes})")
    if tokens < _DISTINCT:
        lacks.append(f"{_DISTINCT} numbers of tokens (there are {tokens})")
    if len(fitted) < 6:
        lacks.append(f"6 configurations, one more than its parameters (there are {len(fitted)})")
    if lacks:
        return f"the fit needs {', '.join(lacks)}"
    logs = np.log([[c.parameters, c.tokens] for c in fitted])
    if abs(np.corrcoef(logs.T)[0, 1]) > _COLLINEAR:
        return "size and tokens change together in all runs, so what each does cannot be told apart"
    return ""


def _problem(sizes: list[Cost], configurations: list[Configuration]) -> tuple[list[Any], Any, Any]:
    """Arguments of `fit_power_law` for every run of `configurations`."""
    import numpy as np

    runs = [(c, loss, i) for i, c in enumerate(configurations) for loss in c.losses]
    x = [np.array([size(c) for c, _, _ in runs], float) for size in sizes]
    return x, np.array([loss for _, loss, _ in runs]), np.array([i for _, _, i in runs])


def isoflops(configurations: list[Configuration]) -> list[IsoFlop]:
    """A parabola for every family and budget (within 3 %) with at least three sizes, by budget."""
    import numpy as np

    found = []
    order = list(families(configurations))
    for budget in clusters([c for c in configurations if c.losses], lambda c: c.flops, SAME_BUDGET):
        mean = sum(c.flops for c in budget) / len(budget)
        for family, members in sorted(families(budget).items(), key=lambda item: order.index(item[0])):
            best = [min(sized, key=lambda c: c.mean) for sized in clusters(members, lambda c: c.parameters, SAME_SIZE)]
            if len(best) >= _DISTINCT:
                N = np.array([c.parameters for c in best for _ in c.losses], float)
                parabola = fit_parabola(N, np.array([loss for c in best for loss in c.losses]))
                found.append(IsoFlop(family, mean, best, parabola))
    return found
