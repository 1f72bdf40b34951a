"""All that a report says, computed once from the runs: tables, figures and the page only show it.

Where a sweep tunes an axis, families are compared and fitted at their best values (tune.py). What is fitted to what is
families.py's, and what a run was expected to come out as forecast.py's.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import pandas as pd
from pandas import DataFrame

from titan_dp.errors import UserError, counted
from titan_dp.studies.report.compare import (
    SAME_BUDGET,
    SAME_SIZE,
    UNITS,
    check_comparable,
    compare,
    differing_settings,
    front,
    group,
)
from titan_dp.studies.report.families import Fit, IsoFlop, Speed, fit_families, fit_speeds, isoflops
from titan_dp.studies.report.forecast import Forecast, hold_out, with_outcomes
from titan_dp.studies.report.target import Target
from titan_dp.studies.report.tune import Tuning, tune


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
    speeds: list[Speed]
    """Time per token of each family."""
    forecasts: list[Forecast]
    """Those that were written earlier, and those of what is held out."""
    warnings: list[str]

    @property
    def unit(self) -> str:
        return UNITS[self.loss]

    @property
    def started(self) -> DataFrame:
        return self.runs[self.runs["state"] != "not started"]

    @property
    def evaluations(self) -> DataFrame:
        """One row per number that was measured of a checkpoint beside the training."""
        rows = [
            (run["run"], run["configuration"], f"{each.name}/{name}", each.step, each.tokens, value)
            for _, run in self.started.iterrows()
            for each in sorted(run["evaluations"], key=lambda each: each.step)
            for name, value in each.values.items()
        ]
        return DataFrame(rows, columns=["run", "configuration", "evaluation", "step", "tokens", "value"])

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


def results_of(
    runs: DataFrame,
    loss: str,
    title: str,
    description: str = "",
    tuned: dict[str, str] | None = None,
    forecasts: Sequence[Forecast] = (),
    held_out: Target | None = None,
) -> Results:
    """Compute everything.

    Args:
        tuned: the column of each tuned axis.
        forecasts: written earlier, in the unit `loss`.
        held_out: what is forecast from the other runs.

    Raises UserError if no run has started, if losses are not comparable, or if what is held out cannot be forecast.
    """
    started = runs[runs["state"] != "not started"]
    if started.empty:
        raise UserError(f"none of {counted(len(runs), 'run')} has started; launch them first, for example {runs['folder'][0]}")
    warnings = check_comparable(started, loss)
    runs, configurations = group(runs, loss)
    for repeats in configurations["repeats"]:
        warnings += [f"{one} repeats {same} (same configuration and seeds) and is not counted" for one, same in repeats[:1]]
    for cost, within in (("flops", SAME_BUDGET), ("parameters", SAME_SIZE)):
        configurations[f"on_front_by_{cost}"] = configurations.index.isin(front(configurations, cost, within).index)
    warnings += _evaluated_differently(started)
    tuned = tuned or {}
    tunings, at_best = tune(runs, configurations, tuned)
    known = with_outcomes(forecasts, at_best)
    if held_out is not None:
        known += hold_out(at_best, configurations, held_out)
    surfaces, computes = fit_families(at_best)
    return Results(
        title=title,
        description=description,
        loss=loss,
        runs=runs,
        configurations=configurations,
        differing=differing_settings(configurations),
        tuned=tuned,
        tunings=tunings,
        best=at_best,
        comparisons=compare(at_best, tuned.values()),
        surfaces=surfaces,
        computes=computes,
        isoflops=isoflops(at_best),
        speeds=fit_speeds(configurations),
        forecasts=known,
        warnings=warnings,
    )


def _evaluated_differently(started: DataFrame) -> list[str]:
    """A warning for each name under which runs were evaluated by several commands."""
    commands: dict[str, set[str]] = {}
    for each in chain.from_iterable(started["evaluations"]):
        commands.setdefault(each.name, set()).add(shlex.join(each.command))
    several = {name: sorted(found) for name, found in commands.items() if len(found) > 1}
    return [f"evaluations called {name!r} are of several commands: {'; '.join(found)}" for name, found in several.items()]
