"""The figures of a report. In all of them a colour is a family and a marker a size; error bars are the spread over seeds.

What is drawn is what results.py computed. A figure for which there is nothing is not made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from titan_dp import output as plots
from titan_dp.studies.report.comparisons import Comparison
from titan_dp.studies.report.configurations import CONFIDENCE_TEXT, SAME_SIZE, SAME_TOKENS, Configuration, clusters
from titan_dp.studies.report.families import Cost, FamilyFits, IsoFlop
from titan_dp.studies.report.results import Results
from titan_dp.studies.report.runs import Run
from titan_dp.studies.report.style import MARKERS, Style, log_axis, panels
from titan_dp.studies.report.text import count

_LINES = 5  # of a fitted surface in one figure
_COMPARISONS = 12  # in a row

_COSTS = ("parameters", "tokens", "flops", "time")
FIGURES = ("differences.png", *(f"loss_by_{name}.png" for name in _COSTS), "isoflop.png", "loss_curves.png")
"""Every file name that `figures` may give."""


def figures(results: Results) -> Iterator[tuple[str, str, Any]]:
    """(file name, caption, figure) one after the other; the caller saves each before the next is drawn."""
    style, measured = Style(results.configurations), [c for c in results.configurations if c.losses]
    if any(row.difference is not None for comparison in results.comparisons for row in comparison.rows):
        caption = (
            f"Difference in validation loss to the smallest n_h; bars: {CONFIDENCE_TEXT} intervals where seeds allow them."
        )
        yield "differences.png", caption, _differences(results, style)
    for by in _axes(measured):
        costs = [by.cost(c) for c in measured if by.cost(c)]
        if costs and max(costs) > min(costs) * (1 + SAME_TOKENS):
            yield f"loss_by_{by.name}.png", by.caption(results), _loss_by(by, results, style, measured)
    if results.isoflops:
        caption = "IsoFLOP profiles: a parabola in log N for each family; stars: minima among the sizes, with 90 % intervals."
        yield "isoflop.png", caption, _isoflop(results, style)
    if len(results.tokenizers) == 1:  # nats a token of several tokenizers in one panel would mislead
        caption = "Training loss in nats a token, smoothed over 2 % of each run; dashed: unfinished or diverged."
        yield "loss_curves.png", caption, _curves(results, style)


# -- loss against what it costs ----------------------------------------------------------------------------------------


class _Axis:
    """One quantity that a loss is drawn against."""

    def __init__(self, name: str, label: str, cost: Cost) -> None:
        self.name, self.label, self.cost = name, label, cost

    def caption(self, results: Results) -> str:
        text = f"Validation loss against {self.label}; bars: standard deviation over seeds."
        if self.name in ("flops", "parameters"):
            text += " Rings and the grey line: the Pareto front."
        if self.name in ("parameters", "tokens") and any(f.surface for f in results.fits):
            text += f" Dashed: the fitted L(N, D), at most {_LINES} of its lines."
        if self.name == "flops" and any(f.compute for f in results.fits):
            text += " Dashed: the fitted L(C)."
        return text


def _axes(measured: list[Configuration]) -> list[_Axis]:
    longest = max((c.seconds or 0 for c in measured), default=0)
    unit, size = next((u, s) for u, s in (("hours", 3600), ("minutes", 60), ("seconds", 1)) if longest >= 2 * s or s == 1)
    return [
        _Axis("parameters", "parameters (all, with the embedding)", lambda c: c.parameters),
        _Axis("tokens", "training tokens", lambda c: c.tokens),
        _Axis("flops", "training FLOPs", lambda c: c.flops),
        _Axis("time", f"training time in {unit}", lambda c: (c.seconds or 0) / size),
    ]


def _loss_by(by: _Axis, results: Results, style: Style, measured: list[Configuration]) -> Any:
    figure, axes = plots.subplots(figsize=(8, 6))
    shown = [c for c in measured if by.cost(c)]
    fits = {f.family: f for f in results.fits}
    for family, colour in style.colour.items():
        members = [c for c in shown if c.family == family]
        if by.name in ("parameters", "tokens"):
            _lines(axes, by.name, members, fits.get(family), colour)
        elif by.name == "flops" and family in fits and fits[family].compute is not None:
            x = _between([c.flops for c in fits[family].compute_points])
            axes.plot(x, fits[family].compute.predict(x), color=colour, ls="--", lw=1.2)  # type: ignore[union-attr]
        _points(axes, members, by.cost, style, colour)
    more = _front(axes, results, by)
    log_axis(axes, by.label)
    axes.set_ylabel(f"validation loss ({results.unit})")
    style.legend(figure, shown, more=more)
    return figure


def _points(axes: Any, members: list[Configuration], cost: Cost, style: Style, colour: Any) -> None:
    for marker, same in zip(MARKERS, style.groups, strict=False):
        shown = [c for c in members if c in same]
        if shown:
            x, y = [cost(c) for c in shown], [c.mean for c in shown]
            spread = [math.nan if c.spread is None else c.spread for c in shown]
            axes.errorbar(x, y, yerr=spread, color=colour, marker=marker, ls="", ms=6, capsize=3, elinewidth=1, alpha=0.9)


def _lines(axes: Any, name: str, members: list[Configuration], fits: FamilyFits | None, colour: Any) -> None:
    """The fitted surface at each number of tokens (or size); without one, points of equal tokens (or size) connected."""
    by_size = name == "parameters"
    along, across = (lambda c: c.parameters, lambda c: c.tokens)[:: 1 if by_size else -1]
    if fits is None or fits.surface is None:
        for same in clusters(members, across, SAME_TOKENS if by_size else SAME_SIZE):
            best = [min(equal, key=lambda c: c.mean) for equal in clusters(same, along, SAME_SIZE if by_size else SAME_TOKENS)]
            axes.plot([along(c) for c in best], [c.mean for c in best], color=colour, lw=0.8, alpha=0.5)
        return
    levels = clusters(fits.fitted, across, SAME_TOKENS if by_size else SAME_SIZE)
    for same in (
        [levels[round(i * (len(levels) - 1) / (_LINES - 1))] for i in range(_LINES)] if len(levels) > _LINES else levels
    ):
        if len(same) > 1:
            x, level = _between([along(c) for c in same]), across(same[0])
            y = fits.surface.predict(*((x, level) if by_size else (level, x)))
            axes.plot(x, y, color=colour, ls="--", lw=1.2)


def _between(values: list[float]) -> Any:
    import numpy as np

    return np.geomspace(min(values), max(values), 100)


def _front(axes: Any, results: Results, by: _Axis) -> list[Any]:
    """Draw the Pareto front of this quantity, if it has one; returns its entry of the legend."""
    from matplotlib.lines import Line2D

    on = {"flops": results.front_by_flops, "parameters": results.front_by_parameters}.get(by.name)
    if not on:
        return []
    x, y = [by.cost(c) for c in on], [c.mean for c in on]
    axes.step(x, y, where="post", color="0.6", lw=1, zorder=0)
    axes.plot(x, y, ls="", marker="o", ms=12, mfc="none", mec="0.3", mew=0.9)
    return [Line2D([], [], color="0.6", lw=1, marker="o", ms=10, mfc="none", mec="0.3", label="Pareto front")]


# -- differences, isoFLOP profiles, curves -----------------------------------------------------------------------------


def _differences(results: Results, style: Style) -> Any:
    shown = [c for c in results.comparisons if any(row.difference is not None for row in c.rows)]
    rows = [shown[i : i + _COMPARISONS] for i in range(0, len(shown), _COMPARISONS)]
    width, height = max(8, 0.9 * len(rows[0])), 5.5 if len(rows) == 1 else 0.8 + 3 * len(rows)
    figure, grid = plots.subplots(len(rows), figsize=(width, height), sharey=True, squeeze=False)
    for axes, row in zip(grid[:, 0], rows, strict=True):
        _difference_row(axes, row, style)
        axes.set_xlim(-0.6, len(rows[0]) - 0.4)
    grid[-1, 0].set_xlabel("parameters, training tokens")
    figure.supylabel(f"validation loss minus that of the smallest n_h\n({results.unit}; below 0 is better)", fontsize="medium")
    style.legend(figure, [row.configuration for c in shown for row in c.rows if row.difference is not None])
    return figure


def _difference_row(axes: Any, comparisons: list[Comparison], style: Style) -> None:
    drawn: dict[tuple[Any, str], list[tuple[float, float, float, float]]] = {}
    for i, comparison in enumerate(comparisons):
        rows = [(row, row.difference) for row in comparison.rows if row.difference is not None]
        for j, (row, y) in enumerate(rows):
            x = i + (j - (len(rows) - 1) / 2) * min(0.12, 0.7 / len(rows))
            low, high = row.interval or (math.nan, math.nan)
            key = style.colour[row.configuration.family], style.marker(row.configuration)
            drawn.setdefault(key, []).append((x, y, y - low, high - y))
    for (colour, marker), points in drawn.items():
        at, differences, *bars = zip(*points, strict=True)
        axes.errorbar(at, differences, yerr=bars, color=colour, marker=marker, ls="", ms=6, capsize=3, elinewidth=1)
    axes.axhline(0, color="0.3", lw=1)
    axes.set_xticks(range(len(comparisons)), [_label(c) for c in comparisons], fontsize="small")
    axes.grid(axis="x", visible=False)


def _label(comparison: Comparison) -> str:
    return f"{count(comparison.parameters)}\n{count(comparison.tokens)}"


def _isoflop(results: Results, style: Style) -> Any:
    budgets = list(dict.fromkeys(profile.budget for profile in results.isoflops))
    figure, grid = panels(len(budgets))
    for axes, budget in zip(grid, budgets, strict=False):
        for profile in (p for p in results.isoflops if p.budget == budget):
            _profile(axes, profile, style)
        axes.set_title(f"{count(budget)} FLOPs", fontsize="medium")
        log_axis(axes, "parameters")
        axes.set_ylabel(f"validation loss ({results.unit})")
    style.legend(figure, [c for profile in results.isoflops for c in profile.configurations])
    return figure


def _profile(axes: Any, profile: IsoFlop, style: Style) -> None:
    colour, parabola = style.colour[profile.family], profile.parabola
    _points(axes, profile.configurations, lambda c: c.parameters, style, colour)
    x = _between([c.parameters for c in profile.configurations])
    axes.plot(x, parabola.predict(x), color=colour, lw=1)
    if not parabola.inside:
        return
    axes.plot([parabola.minimum], [parabola.loss], marker="*", ms=13, color=colour, mec="black", mew=0.6, ls="")
    if parabola.interval is not None and math.isfinite(parabola.interval[1]):
        low, high = (min(max(end, x[0]), x[-1]) for end in parabola.interval)
        axes.plot([low, high], [parabola.loss] * 2, color=colour, lw=3, alpha=0.4, solid_capstyle="butt")


def _curves(results: Results, style: Style) -> Any:
    figure, grid = panels(len(style.groups))
    for axes, group, label in zip(grid, style.groups, style.labels, strict=False):
        drawn = [_curve(axes, run, style.colour[c.family]) for c in group for run in c.runs]
        if ends := [end for end in drawn if end is not None]:
            low, high = min(end[0] for end in ends), max(end[1] for end in ends)
            axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
        axes.set_title(f"{label} parameters", fontsize="medium")
        log_axis(axes, "tokens")
        axes.set_ylabel("training loss (nats a token)")
    style.legend(figure, results.configurations, markers=False)
    return figure


def _curve(axes: Any, run: Run, colour: Any) -> tuple[float, float] | None:
    """Draw a run's curve; returns its lowest value and its value at 3 % of the run, above which nothing is compared."""
    import numpy as np

    x = np.array(run.totals.curve_tokens)
    y = np.array(run.totals.curve_loss)
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    if len(y) < 2:
        return None
    window = max(1, len(y) // 50)
    kernel = np.ones(window) / window
    x, y = np.convolve(x, kernel, "valid"), np.convolve(y, kernel, "valid")
    shown = slice(None, None, max(1, window // 4))
    axes.plot(x[shown], y[shown], color=colour, lw=0.9, alpha=0.8, ls="-" if run.state == "finished" else "--")
    return float(y.min()), float(y[min(len(y) - 1, int(0.03 * len(y)))])
