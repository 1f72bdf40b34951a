"""All that a report says, computed once from the runs: tables, figures and the page only show it.

A family (mixer, n_h, gate, range of eigenvalues) is fitted as one. Of a family's configurations with equal size and tokens
(several learning rates, other shapes) only the one with the lowest mean loss is fitted: the law is about the best that a size
can do. Where a sweep tunes an axis, families are compared and fitted at their best values (tune.py). L(C) is fitted to the
family's own Pareto front, the lowest losses for their FLOPs: a law through models of any size would describe what the study
happened to train. N counts all parameters, the embedding included.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from pandas import DataFrame

from titan_dp.errors import UserError
from titan_dp.studies.report.compare import (
    SAME_BUDGET,
    SAME_SIZE,
    SAME_TOKENS,
    UNITS,
    best,
    check_comparable,
    clusters,
    compare,
    differing_settings,
    front,
    group,
)
from titan_dp.studies.report.fits import Parabola, PowerLaw, fit_parabola, fit_power_law
from titan_dp.studies.report.tune import Tuning, tune

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
class Results:
    """What a report is about and what came out of it. Frames have one row per run (read.py) or configuration (compare.py)."""

    title: str
    description: str
    loss: str
    """A key of UNITS."""
    runs: DataFrame
    configurations: DataFrame
    differing: list[str]
    """Columns in which configurations differ beside family, shape and tokens."""
    tuned: dict[str, str]
    """The column of each tuned axis."""
    tunings: list[Tuning]
    best: DataFrame
    """The configurations, with one row per tuned arm in place of all its own; these are compared and fitted."""
    comparisons: list[DataFrame]
    surfaces: list[Fit]
    """L(N, D) of each family."""
    computes: list[Fit]
    """L(C) of each family."""
    isoflops: list[IsoFlop]
    warnings: list[str]

    @property
    def unit(self) -> str:
        return UNITS[self.loss]

    @property
    def started(self) -> DataFrame:
        return self.runs[self.runs["state"] != "not started"]

    @property
    def compared(self) -> DataFrame:
        """Those rows of all comparisons that are compared with another."""
        none = DataFrame(columns=["against", "family", "against_family"])
        return pd.concat(self.comparisons or [none]).dropna(subset="against")

    @property
    def differing_untuned(self) -> list[str]:
        return [key for key in self.differing if key not in self.tuned.values()]

    @property
    def tokenizers(self) -> list[str]:
        return sorted(self.started["tokenizer"].unique())


def results_of(runs: DataFrame, loss: str, title: str, description: str = "", tuned: dict[str, str] | None = None) -> Results:
    """Compute everything; `tuned` has the column of each tuned axis.

    Raises UserError if no run has started, or if losses are not comparable.
    """
    started = runs[runs["state"] != "not started"]
    if started.empty:
        raise UserError(f"none of the {len(runs)} runs has started; launch them first, for example {runs['folder'][0]}")
    warnings = check_comparable(started, loss)
    runs, configurations = group(runs, loss)
    for repeats in configurations["repeats"]:
        warnings += [f"{one} repeats {same} (same configuration and seeds) and is not counted" for one, same in repeats[:1]]
    for cost, within in (("flops", SAME_BUDGET), ("parameters", SAME_SIZE)):
        configurations[f"on_front_by_{cost}"] = configurations.index.isin(front(configurations, cost, within).index)
    differing = differing_settings(configurations)
    tunings, at_best = tune(runs, configurations, tuned or {})
    surfaces, computes = fit_families(at_best)
    found = compare(at_best, (tuned or {}).values()), surfaces, computes, isoflops(at_best)
    return Results(title, description, loss, runs, configurations, differing, tuned or {}, tunings, at_best, *found, warnings)


def fit_families(configurations: DataFrame) -> tuple[list[Fit], list[Fit]]:
    """L(N, D) and L(C) of every family, fitted if there is enough; several laws at once in processes of their own."""
    surfaces, computes = [], []
    for family, members in _families(configurations):
        fitted = _best_of_each_size(members)
        points, left_out = front(fitted, "flops", SAME_BUDGET), len(members) - len(fitted)
        surfaces.append(Fit(family, ["parameters", "tokens"], fitted, left_out, _surface_lacks(fitted)))
        lacks = (
            f"the fit needs {_BUDGETS} budgets of FLOPs, each with a lower loss than the one before; there are {len(points)}"
        )
        computes.append(Fit(family, ["flops"], points, left_out, lacks if len(points) < _BUDGETS else ""))
    possible = [fit for fit in (*surfaces, *computes) if not fit.lacks]
    problems = list(zip(*(_problem(fit.points, fit.sizes) for fit in possible), strict=True)) or [()]
    with ProcessPoolExecutor() if len(possible) > 2 else nullcontext() as pool:
        laws = (pool.map if pool else map)(fit_power_law, *problems)
        for fit, law in zip(possible, laws, strict=True):
            fit.law = law
    return surfaces, computes


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
