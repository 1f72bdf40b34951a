"""Laws of each family: which configurations are fitted, whether they are enough, and the fits.

A family (mixer, n_h, gate, range of eigenvalues) is fitted as one. Of a family's configurations with equal size and tokens
(several learning rates, other shapes) only the one with the lowest mean loss is fitted: the law is about the best that a size
can do. L(C) is fitted to the family's own Pareto front, the lowest losses for their FLOPs: a law through models of any size
would describe what the study happened to train. N counts all parameters, the embedding included. Time per token is fitted to
all configurations of one machine: no setting but the shape changes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from pandas import DataFrame

from titan_dp.studies.report.compare import SAME_BUDGET, SAME_SIZE, SAME_TOKENS, best, clusters, front
from titan_dp.studies.report.fits import Parabola, PowerLaw, TimeLaw, fit_parabola, fit_power_law, fit_time

_DISTINCT = 3
_BUDGETS = 4
_COLLINEAR = 0.99


@dataclass
class Fit:
    """One law of one family; if there is too little for it, `lacks` says what is missing and `law` is None."""

    family: str
    sizes: list[str]
    """Columns of the quantities that the loss is a law of."""
    points: DataFrame
    """The configurations it is fitted to."""
    left_out: int
    """Configurations of the family that have the same size and tokens as a fitted one, and a higher loss."""
    lacks: str
    law: PowerLaw | None = None


@dataclass(frozen=True)
class IsoFlop:
    """One family's profile at one budget of FLOPs."""

    family: str
    budget: float
    points: DataFrame
    parabola: Parabola


@dataclass(frozen=True)
class Speed:
    """Time per token of one family on one machine; `law` is None if `lacks` says what is missing for it."""

    family: str
    points: DataFrame
    """The configurations it is fitted to."""
    tokens_per_step: int
    lacks: str = ""
    law: TimeLaw | None = None


def fit_families(configurations: DataFrame) -> tuple[list[Fit], list[Fit]]:
    """L(N, D) and L(C) of every family, fitted if there is enough; several laws at once in processes of their own."""
    surfaces, computes = [], []
    for family, members in _families(configurations):
        surfaces.append(surface := _surface(family, members))
        points = front(surface.points, "flops", SAME_BUDGET)
        lacks = (
            f"the fit needs {_BUDGETS} budgets of FLOPs, each with a lower loss than the one before; there are {len(points)}"
        )
        computes.append(Fit(family, ["flops"], points, surface.left_out, lacks if len(points) < _BUDGETS else ""))
    _fit([*surfaces, *computes])
    return surfaces, computes


def fit_surfaces(configurations: DataFrame) -> list[Fit]:
    """L(N, D) of every family, fitted if there is enough."""
    surfaces = [_surface(family, members) for family, members in _families(configurations)]
    _fit(surfaces)
    return surfaces


def _surface(family: str, members: DataFrame) -> Fit:
    fitted = _best_of_each_size(members)
    return Fit(family, ["parameters", "tokens"], fitted, len(members) - len(fitted), _surface_lacks(fitted))


def _fit(fits: list[Fit]) -> None:
    """Give a law to those of `fits` that lack nothing."""
    possible = [fit for fit in fits if not fit.lacks]
    problems = list(zip(*(_problem(fit.points, fit.sizes) for fit in possible), strict=True)) or [()]
    with ProcessPoolExecutor() if len(possible) > 2 else nullcontext() as pool:
        laws = (pool.map if pool else map)(fit_power_law, *problems)
        for fit, law in zip(possible, laws, strict=True):
            fit.law = law


def fit_speeds(configurations: DataFrame) -> list[Speed]:
    """Time per token of every family whose configurations ran on one machine, with one number of tokens a step."""
    found = []
    for family, members in configurations.dropna(subset="tokens_per_second").groupby("family", sort=False):
        machines = members.drop_duplicates(["device", "world_size", "tokens_per_step"])
        sizes = len(clusters(members, "parameters", SAME_SIZE))
        speed = Speed(str(family), members, int(members["tokens_per_step"].iloc[0]))
        if len(machines) > 1:
            lacks = "its runs are of different machines, or have different numbers of tokens a step"
        elif sizes < 2:
            lacks = "the fit needs 2 sizes (there is 1)"
        else:
            law = fit_time(*(members[key].to_numpy(float) for key in ("parameters", "tokens_per_second")))
            found.append(replace(speed, law=law))
            continue
        found.append(replace(speed, lacks=lacks))
    return found


def _families(configurations: DataFrame) -> Iterator[tuple[str, DataFrame]]:
    """Configurations with a loss by family, in the order in which they are shown."""
    yield from configurations.dropna(subset="mean").groupby("family", sort=False)


def _best_of_each_size(configurations: DataFrame) -> DataFrame:
    """Of configurations of one family within 1 % in size and tokens, the one with the lowest mean loss."""
    sized = clusters(configurations, "parameters", SAME_SIZE)
    return configurations.loc[[best(equal) for same in sized for equal in clusters(same, "tokens", SAME_TOKENS)]]


def _surface_lacks(fitted: DataFrame) -> str:
    """What is missing for L(N, D), or nothing."""
    sizes, tokens = len(clusters(fitted, "parameters", SAME_SIZE)), len(clusters(fitted, "tokens", SAME_TOKENS))
    lacks = []
    if sizes < _DISTINCT:
        lacks.append(f"{_DISTINCT} sizes (there are {sizes})")
    if tokens < _DISTINCT:
        lacks.append(f"{_DISTINCT} numbers of tokens (there are {tokens})")
    if len(fitted) < 6:
        lacks.append(f"6 configurations, one more than its parameters (there are {len(fitted)})")
    if lacks:
        return f"the fit needs {', '.join(lacks)}"
    logs = np.log(fitted[["parameters", "tokens"]].astype(float))
    if abs(np.corrcoef(logs.T)[0, 1]) > _COLLINEAR:
        return "size and tokens change together in all runs, so what each does cannot be told apart"
    return ""


def _problem(points: DataFrame, sizes: list[str]) -> tuple[list[Any], Any, Any]:
    """Arguments of `fit_power_law` for every run of `points`."""
    runs = points.explode("losses")  # one row per run
    return [runs[size].to_numpy(float) for size in sizes], runs["losses"].to_numpy(float), pd.factorize(runs.index)[0]


def isoflops(configurations: DataFrame) -> list[IsoFlop]:
    """A parabola for every family and budget (within 3 %) with at least three sizes, by budget."""
    found = []
    for budget in clusters(configurations.dropna(subset="mean"), "flops", SAME_BUDGET):
        for family, members in _families(budget.sort_index()):
            sized = clusters(members, "parameters", SAME_SIZE)
            if len(sized) >= _DISTINCT:
                points = members.loc[[best(same) for same in sized]]
                (sizes,), losses, _ = _problem(points, ["parameters"])
                parabola = fit_parabola(sizes, losses)
                found.append(IsoFlop(family, float(budget["flops"].mean()), points, parabola))
    return found
