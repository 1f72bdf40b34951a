"""Tuned axes: the best value for each arm, by a parabola in its logarithm, or what is missing for one.

An arm is what is compared with others: configurations that agree in everything except the tuned axes (and seeds). Its best
value of an axis is where the parabola through the lowest mean loss and its two neighbours is lowest; means are over the seeds
that all values have, so that seeds added at some values favour none. An optimum at the edge
of the grid is none: the loss may go on falling beyond it. With several tuned axes each has its own parabola, along the line
through the lowest loss, as if they did not interact.

The loss of an arm at its best values is that of the runs with the lowest mean, seed by seed, minus what the parabolas say
lies between grid points; that is taken over seeds that all three points have, since seeds shift them together. So grids of
unlike spacing, or placed unlike, do not favour a family, and its spread is one of real runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from pandas import DataFrame

from titan_dp.files import short
from titan_dp.studies.report.compare import alike, configured_alike
from titan_dp.studies.report.fits import Parabola, fit_parabola

AROUND = 1.5
"""How flat an optimum is: what the loss rises by when the value is wrong by this factor."""


@dataclass(frozen=True)
class Tuning:
    """One tuned axis of one arm. It is settled if neither `add` nor `lacks` says otherwise."""

    axis: str
    key: str
    """The axis's column."""
    points: DataFrame
    """Configurations with a loss along the axis, through the one with the lowest; by value."""
    best: Any
    """Label of that one."""
    parabola: Parabola | None = None
    """In the logarithm of the value; None also where the optimum lies between two values and one beyond has diverged."""
    gain: float = 0.0
    """Loss at the parabola's minimum minus the mean at `best`, over the same seeds; at most 0."""
    add: float | None = None
    """The value to try next, if `best` is at the edge."""
    lacks: str = ""
    """What else keeps this from being settled."""
    note: str = ""

    @property
    def settled(self) -> bool:
        return self.add is None and not self.lacks

    @property
    def value(self) -> float:
        """The best value: the parabola's, or the best one tried if there is none."""
        found = self.parabola and self.parabola.minimum
        return float(found or self.points[self.key][self.best])

    @property
    def rise(self) -> float:
        """What the loss rises by if the value is wrong by the factor AROUND, either way; NaN without a parabola."""
        return float(self.parabola.coefficients[0] * np.log(AROUND) ** 2) if self.parabola else float("nan")

    def __str__(self) -> str:
        """What is wrong with it, in words."""
        row = self.points.iloc[0]
        where = f"{row['family']} at {short(row['parameters'])} parameters and {short(row['tokens'])} tokens"
        if self.lacks:
            return f"{self.axis} of {where}: {self.lacks}"
        end = "smallest" if self.best == self.points.index[0] else "largest"
        return f"{where} has its lowest loss at {self.axis} = {self.value:g}, the {end} value tried; add {self.add:g}"


def tune(runs: DataFrame, configurations: DataFrame, axes: dict[str, str]) -> tuple[list[Tuning], DataFrame]:
    """Find the best value of every tuned axis, for every arm.

    Args:
        runs, configurations: as `group` returns them.
        axes: the column of each tuned axis; none leaves everything as it is.

    Returns:
        A tuning per arm and axis; and `configurations` with one row per settled arm in place of its configurations. It is the
        row of the lowest loss with the best values, "losses", "mean" and "spread" at them.
    """
    if not axes:
        return [], configurations
    keys = list(axes.values())
    waiting = Counter(configured_alike(runs[runs["state"].isin(["unfinished", "not started"])], keys))
    diverged = set(runs.loc[runs["state"] == "diverged", "configuration"])
    tunings: list[Tuning] = []
    settled: dict[Any, dict[str, Any]] = {}
    for _, arm in configurations.groupby(alike(configurations, keys), sort=False):
        measured = arm[arm["mean"].notna() & ~arm.index.isin(diverged)]
        if measured.empty:
            continue
        lowest, left = _lowest(measured), waiting[configured_alike(arm.iloc[:1], keys).iloc[0]]
        tried = arm[arm.index.isin(measured.index) | arm.index.isin(diverged)]
        found = [_along(axis, key, _line(tried, lowest, keys, key), lowest, diverged, left) for axis, key in axes.items()]
        tunings += found
        if all(each.settled for each in found):
            gain = sum(each.gain for each in found)
            row = measured.loc[lowest].to_dict()
            at_best = {"losses": [loss + gain for loss in row["losses"]], "mean": row["mean"] + gain}
            settled[lowest] = row | at_best | {each.key: float(f"{each.value:.3g}") for each in found}
    at_best_values = DataFrame(list(settled.values()), list(settled), configurations.columns, dtype=object)
    return tunings, at_best_values.astype(dict(configurations.dtypes))


def _lowest(measured: DataFrame) -> Any:
    """Label of the lowest mean loss, the first of equals."""
    return _comparable(measured)["losses"].astype(float).groupby(level=0, sort=False).mean().idxmin()


def _comparable(configurations: DataFrame) -> DataFrame:
    """A row for each run of a seed that all the configurations have; for every run if they share none."""
    common = set.intersection(*map(set, configurations["seeds"]))
    runs = configurations.explode(["losses", "seeds"])
    return runs[[seed in common for seed in runs["seeds"]]] if common else runs


def _line(arm: DataFrame, lowest: Any, keys: Iterable[str], along: str) -> DataFrame:
    """The configurations that differ from `lowest` in `along` only, by its value."""
    others = [key for key in keys if key != along]
    return arm[(arm[others] == arm.loc[lowest, others]).all(axis=1)].sort_values(along)


def _along(axis: str, key: str, line: DataFrame, lowest: Any, diverged: set[Any], waiting: int) -> Tuning:
    """The tuning of one axis, along `line`; `waiting` runs of the arm are not finished."""
    values, at = line[key].astype(float).tolist(), line.index.get_loc(lowest)
    found = Tuning(axis, key, line[~line.index.isin(diverged)], lowest)
    if 0 < at < len(line) - 1:
        near = line.iloc[at - 1 : at + 2]
        if broken := [value for label, value in zip(near.index, near[key], strict=True) if label in diverged]:
            return replace(found, note=f"no parabola: {broken[0]:g} diverged")
        return replace(found, **_parabola(near, key))
    if waiting:
        return replace(found, lacks=f"the lowest loss so far is at the edge of the finished runs; {waiting} are not finished")
    if len(line) == 1:
        return replace(found, lacks=f"only the value {values[0]:g} has been tried")
    beside = values[1 if at == 0 else -2]
    return replace(found, add=float(f"{values[at] ** 2 / beside:.3g}"))


def _parabola(near: DataFrame, key: str) -> dict[str, Any]:
    """The parabola through three configurations' means, and the gain, over the seeds that all of them have."""
    runs = _comparable(near)
    parabola = fit_parabola(runs[key].to_numpy(float), runs["losses"].to_numpy(float))
    if parabola.loss is None:
        return {"note": "no parabola: the losses are equal"}
    return {"parabola": parabola, "gain": min(0.0, parabola.loss - float(runs.loc[[near.index[1]], "losses"].mean()))}


def refusal(tunings: list[Tuning]) -> str:
    """What is at an edge and which values to add, in one sentence; empty if nothing is."""
    edges = [each for each in tunings if each.add is not None]
    if not edges:
        return ""
    more = f" (and {len(edges) - 1} more, in the table)" if len(edges) > 1 else ""
    return f"no optimum, but an edge: {edges[0]}{more}, or let titan-dp sweep FILE --extend-edges do it"
