"""The figures of a report. In all of them a colour is a family and a marker a size; error bars are the spread over seeds.

What is drawn is what results.py computed. A figure for which there is nothing is not made. Names of figures
have no ending: the file's format gives it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
import pandas as pd
from pandas import DataFrame

from titan_dp import output as plots
from titan_dp.files import short
from titan_dp.studies.report.compare import CONFIDENCE_TEXT, SAME_SIZE, SAME_TOKENS, SEEDS, best, clusters
from titan_dp.studies.report.families import Fit, IsoFlop
from titan_dp.studies.report.results import Results

_MARKERS = "os^DvPX*<>"
_PANELS = 3  # in a row of panels
_LINES = 5  # of a fitted surface in one figure
_COMPARISONS = 12  # in a row
_DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
_COSTS = ("parameters", "tokens", "flops", "time")

FIGURES = ("tuning", "differences", *(f"loss_by_{name}" for name in _COSTS), "isoflop", "loss_curves", "evaluations")
"""Every name that `figures` may give."""


def figures(results: Results) -> Iterator[tuple[str, str, Any]]:
    """(name, caption, figure) one after the other; the caller saves each before the next is drawn."""
    shown = _styled(results.configurations)
    measured = shown.dropna(subset="mean")
    if results.tunings:
        caption = (
            "Validation loss against the tuned value; bars: standard deviation over seeds. Lines: parabolas through the lowest "
            "loss and its neighbours; stars: the best values, which edges of a grid have not."
        )
        yield "tuning", caption, _tuning(results, shown)
    if len(results.compared):
        caption = (
            "Difference in validation loss to the smallest n_h. Thick bars: one standard error; thin bars: "
            f"{CONFIDENCE_TEXT} intervals, which arrows say to go on beyond the axis; neither without two seeds on both sides."
        )
        yield "differences", caption, _differences(results, shown)
    longest = measured["seconds"].max()
    unit, size = next((u, s) for u, s in (("hours", 3600), ("minutes", 60), ("seconds", 1)) if longest >= 2 * s or s == 1)
    measured = measured.assign(time=measured["seconds"] / size)
    labels = ("parameters (all, with the embedding)", "training tokens", "training FLOPs", f"training time in {unit}")
    for cost, label in zip(_COSTS, labels, strict=True):
        costs = measured[measured[cost] > 0]
        if len(costs) and costs[cost].max() > costs[cost].min() * (1 + SAME_TOKENS):
            yield f"loss_by_{cost}", _caption(results, cost, label), _loss_by(results, costs, cost, label)
    if results.isoflops:
        caption = "IsoFLOP profiles: a parabola in log N for each family; stars: minima among the sizes, with 90 % intervals."
        yield "isoflop", caption, _isoflop(results, shown)
    if len(results.tokenizers) == 1:  # nats per token of several tokenizers in one panel would mislead
        caption = (
            "Training loss in nats per token over the second half of each run, smoothed over 5 % of it; axes are logarithmic. "
            "Dashes are seeds, a cross ends a run that is unfinished or diverged."
        )
        yield "loss_curves", caption, _curves(results, shown)
    if len(results.evaluations):
        caption = "What was measured of checkpoints beside the training (`titan-dp evaluate watch`), a line for each run."
        yield "evaluations", caption, _evaluations(results, shown)


# -- style -------------------------------------------------------------------------------------------------------------


def _styled(configurations: DataFrame) -> DataFrame:
    """The configurations with a "colour" by family and a "marker" by size, the same in every figure of a report.

    A marker stands for a "group" of several sizes if there are more sizes than markers; "sizes" is its label.
    """
    import matplotlib

    codes, names = pd.factorize(configurations["family"])
    palette = matplotlib.colormaps["tab10" if len(names) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    colours = [matplotlib.colors.to_hex(palette[code % len(palette)]) for code in codes]
    shown = configurations.assign(colour=colours, group=0, marker="", sizes="")
    sizes = clusters(configurations, "parameters", SAME_SIZE)
    share = math.ceil(len(sizes) / len(_MARKERS))
    for i in range(0, len(sizes), share):
        members = pd.concat(sizes[i : i + share])
        low, high = (short(end) for end in (members["parameters"].min(), members["parameters"].max()))
        label = low if low == high else f"{low} to {high}"
        shown.loc[members.index, ["group", "marker", "sizes"]] = i // share, _MARKERS[i // share], label
    return shown


def _legend(figure: Any, shown: DataFrame, more: tuple[Any, ...] = (), markers: bool = True) -> None:
    """Families and sizes of what is `shown`, below the panels, where the legend can cover nothing."""
    from matplotlib.lines import Line2D

    families = shown.sort_index().drop_duplicates("family")
    handles = [Line2D([], [], color=row["colour"], lw=3, label=row["family"]) for _, row in families.iterrows()]
    for _, row in shown.sort_values("group").drop_duplicates("group").iterrows() if markers else ():
        handles.append(Line2D([], [], color="0.4", marker=row["marker"], ls="", label=row["sizes"]))
    columns = 3 if figure.get_figwidth() < 9 else 5
    figure.legend(handles=[*handles, *more], loc="outside lower center", ncols=columns, fontsize="small", frameon=False)


def _points(axes: Any, shown: DataFrame, x: str, y: str = "mean", errors: tuple[str, ...] = ("spread",)) -> None:
    """Draw rows in their colours and markers, with error bars of the size `errors` (downwards and upwards if two)."""
    for (colour, marker), same in shown.groupby(["colour", "marker"], sort=False):
        bars = same[list(errors)].to_numpy(float).T
        style = {"color": colour, "marker": marker, "ls": "", "ms": 6, "capsize": 3, "elinewidth": 1, "alpha": 0.9}
        axes.errorbar(same[x].tolist(), same[y].tolist(), yerr=bars if len(errors) == 2 else bars[0], **style)


def _panels(n: int) -> tuple[Any, list[Any]]:
    """A figure and its n panels, at most _PANELS in a row."""
    columns = min(n, _PANELS)
    rows = math.ceil(n / columns)
    figure, grid = plots.subplots(rows, columns, figsize=(max(8, 4.3 * columns), 0.8 + 3.6 * rows), squeeze=False)
    for empty in grid.flat[n:]:
        empty.set_visible(False)
    return figure, list(grid.flat[:n])


def _log_axis(axes: Any, label: str) -> None:
    """A logarithmic x-axis with readable ticks, however short it is."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_xscale("log")
    low, high = axes.get_xlim()
    decades = math.log10(high / low)
    digits = [(3, (1.0,)), (1.5, (1.0, 3.0)), (0.7, (1.0, 2.0, 5.0)), (0.0, (1.0, 2.0, 3.0, 4.0, 6.0, 8.0))]
    subs = next(each for least, each in digits if decades > least or least == 0)
    axes.xaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axes.xaxis.set_major_formatter(lambda value, _: short(value))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", labelsize="small")
    axes.set_xlabel(label)


def _log_losses(axes: Any) -> None:
    """A logarithmic y-axis with readable ticks, however little of it is shown."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())


def _between(values: pd.Series) -> Any:
    return np.geomspace(float(values.min()), float(values.max()), 100)


# -- loss against what it costs ----------------------------------------------------------------------------------------


def _caption(results: Results, cost: str, label: str) -> str:
    text = f"Validation loss against {label}; bars: standard deviation over seeds."
    if cost in ("flops", "parameters"):
        text += " Rings and the grey line: the Pareto front."
    if law := _fitted(results, cost):
        text += f" Dashed: the fitted {law}" + (f", at most {_LINES} of its lines." if cost != "flops" else ".")
    return text


def _fitted(results: Results, cost: str) -> str:
    """The law whose lines are drawn against `cost`; empty if there is none."""
    if cost in ("parameters", "tokens") and any(fit.law for fit in results.surfaces):
        return "L(N, D)"
    return "L(C)" if cost == "flops" and any(fit.law for fit in results.computes) else ""


def _loss_by(results: Results, shown: DataFrame, cost: str, label: str) -> Any:
    from matplotlib.lines import Line2D

    figure, axes = plots.subplots(figsize=(8, 6))
    for surface, compute in zip(results.surfaces, results.computes, strict=True):
        members = shown[shown["family"] == surface.family]
        if cost in ("parameters", "tokens") and len(members):
            _lines(axes, cost, members, surface)
        elif cost == "flops" and compute.law is not None:
            x = _between(compute.points["flops"])
            axes.plot(x, compute.law.predict(x), color=members["colour"].iloc[0], ls="--", lw=1.2)
    _points(axes, shown, cost)
    more: tuple[Any, ...] = ()
    if law := _fitted(results, cost):
        more = (Line2D([], [], color="0.4", ls="--", lw=1.2, label=f"fitted {law}"),)
    if cost in ("flops", "parameters"):
        on = results.configurations[results.configurations[f"on_front_by_{cost}"]].sort_values(cost)
        axes.step(on[cost].tolist(), on["mean"], where="post", color="0.6", lw=1, zorder=0)
        axes.plot(on[cost].tolist(), on["mean"], ls="", marker="o", ms=12, mfc="none", mec="0.3", mew=0.9)
        more += (Line2D([], [], color="0.6", lw=1, marker="o", ms=10, mfc="none", mec="0.3", label="Pareto front"),)
    _log_axis(axes, label)
    axes.set_ylabel(f"validation loss ({results.unit})")
    _legend(figure, shown, more)
    return figure


def _lines(axes: Any, along: str, members: DataFrame, surface: Fit) -> None:
    """The fitted surface at each number of tokens (or size); without one, points of equal tokens (or size) connected."""
    within = {"parameters": SAME_SIZE, "tokens": SAME_TOKENS}
    across = "tokens" if along == "parameters" else "parameters"
    colour = members["colour"].iloc[0]
    if surface.law is None:
        for same in clusters(members, across, within[across]):
            line = members.loc[[best(equal) for equal in clusters(same, along, within[along])]]
            axes.plot(line[along].tolist(), line["mean"], color=colour, lw=0.8, alpha=0.5)
        return
    levels = clusters(surface.points, across, within[across])
    if len(levels) > _LINES:
        levels = [levels[round(i * (len(levels) - 1) / (_LINES - 1))] for i in range(_LINES)]
    for same in levels:
        if len(same) > 1:
            x, level = _between(same[along]), float(same[across].iloc[0])
            y = surface.law.predict(x, level) if along == "parameters" else surface.law.predict(level, x)
            axes.plot(x, y, color=colour, ls="--", lw=1.2)


# -- tuned axes --------------------------------------------------------------------------------------------------------


def _tuning(results: Results, shown: DataFrame) -> Any:
    """A panel per tuned axis, size and number of tokens."""
    at = [(t.axis, shown["group"][t.best], short(t.points["tokens"].iloc[0])) for t in results.tunings]
    places = dict.fromkeys(sorted(at, key=lambda place: (place[0], place[1])))
    figure, grid = _panels(len(places))
    for axes, place in zip(grid, places, strict=True):
        here = [t for t, where in zip(results.tunings, at, strict=True) if where == place]
        for tuning in here:
            colour = shown["colour"][tuning.best]
            _points(axes, shown.loc[tuning.points.index], tuning.key)
            if tuning.parabola and tuning.parabola.minimum:
                order = tuning.points.index.get_loc(tuning.best)
                x = _between(tuning.points[tuning.key].iloc[order - 1 : order + 2])
                axes.plot(x, tuning.parabola.predict(x), color=colour, lw=1)
                axes.plot([tuning.value], [tuning.parabola.loss], marker="*", ms=13, color=colour, mec="black", mew=0.6, ls="")
        axes.set_title(f"{shown['sizes'][here[0].best]} parameters, {place[2]} tokens", fontsize="medium")
        _log_axis(axes, place[0])
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_ylabel(f"validation loss ({results.unit})")
    _legend(figure, shown.loc[[t.best for t in results.tunings]])
    return figure


# -- differences, isoFLOP profiles, curves -----------------------------------------------------------------------------


def _differences(results: Results, shown: DataFrame) -> Any:
    """One place per comparison, side by side, with the rows that are compared with another.

    The differences and their standard errors set the scale: an interval of two seeds may be ten times as wide.
    """
    from matplotlib.lines import Line2D

    sets = [rows for rows in results.comparisons if rows["against"].notna().any()]
    width = min(len(sets), _COMPARISONS)
    chunks = [sets[i : i + width] for i in range(0, len(sets), width)]
    size = (max(8, 0.9 * width), 5 if len(chunks) == 1 else 0.8 + 3 * len(chunks))
    figure, grid = plots.subplots(len(chunks), figsize=size, sharey=True, squeeze=False)
    errors = results.compared["error"].fillna(0).astype(float)
    ends = pd.concat([results.compared["difference"] - errors, results.compared["difference"] + errors, pd.Series([0.0])])
    margin = 0.15 * (ends.max() - ends.min()) or 1.0
    low, high = ends.min() - margin, ends.max() + margin
    for axes, chunk in zip(grid[:, 0], chunks, strict=True):
        axes.set_ylim(low, high)
        for i, rows in enumerate(chunk):
            rows = rows.dropna(subset="against")
            offsets = (np.arange(len(rows)) - (len(rows) - 1) / 2) * min(0.22, 0.7 / len(rows))
            for x, (label, row) in zip(i + offsets, rows.iterrows(), strict=True):
                look = shown.loc[label]
                _bars(axes, x, row, look["colour"])
                axes.plot([x], [row["difference"]], look["marker"], color=look["colour"], ms=7, mec="white", mew=0.8, zorder=4)
        labels = [f"{short(rows['parameters'].min())}\n{short(rows['tokens'].min())}" for rows in chunk]
        axes.axhline(0, color="0.3", lw=1)
        axes.set_xticks(range(len(chunk)), labels, fontsize="small")
        axes.grid(axis="x", visible=False)
        axes.set_xlim(-0.6, width - 0.4)
    grid[-1, 0].set_xlabel("parameters, training tokens")
    figure.supylabel(f"validation loss minus that of the smallest n_h\n({results.unit}; below 0 is better)", fontsize="medium")
    compared = set(chain(*(rows.dropna(subset="against").index for rows in sets)))
    bars = (
        Line2D([], [], color="0.4", lw=5, alpha=0.6, label="one standard error"),
        Line2D([], [], color="0.4", lw=1, marker="^", ms=5, label=f"{CONFIDENCE_TEXT} interval, arrow: goes on"),
    )
    _legend(figure, shown[shown.index.isin(compared)], bars if errors.any() else ())
    return figure


def _bars(axes: Any, x: float, row: pd.Series, colour: str) -> None:
    """A thick bar of one standard error, a thin one over the interval; an arrow where that leaves the axis."""
    middle, (bottom, top) = row["difference"], axes.get_ylim()
    if row["error"] > 0:
        axes.plot([x, x], [middle - row["error"], middle + row["error"]], color=colour, lw=6, alpha=0.55, solid_capstyle="butt")
    if row["low"] <= row["high"]:
        axes.plot([x, x], np.clip([row["low"], row["high"]], bottom, top), color=colour, lw=0.9, alpha=0.7)
        for end, edge, outside, arrow in (
            (row["low"], bottom, row["low"] < bottom, "v"),
            (row["high"], top, row["high"] > top, "^"),
        ):
            marker = {"marker": arrow, "ms": 6} if outside else {"marker": "_", "ms": 8}
            axes.plot([x], [edge if outside else end], color=colour, clip_on=False, zorder=3, **marker)


def _isoflop(results: Results, shown: DataFrame) -> Any:
    budgets = list(dict.fromkeys(profile.budget for profile in results.isoflops))
    figure, grid = _panels(len(budgets))
    for axes, budget in zip(grid, budgets, strict=True):
        for profile in (p for p in results.isoflops if p.budget == budget):
            looks = shown.loc[profile.points.index].assign(mean=profile.points["mean"])
            _profile(axes, profile, looks)
        axes.set_title(f"{short(budget)} FLOPs", fontsize="medium")
        _log_axis(axes, "parameters")
        axes.set_ylabel(f"validation loss ({results.unit})")
    _legend(figure, shown.loc[sorted(set(chain(*(profile.points.index for profile in results.isoflops))))])
    return figure


def _profile(axes: Any, profile: IsoFlop, points: DataFrame) -> None:
    colour, parabola = points["colour"].iloc[0], profile.parabola
    _points(axes, points, "parameters")
    x = _between(points["parameters"])
    axes.plot(x, parabola.predict(x), color=colour, lw=1)
    if parabola.inside:
        axes.plot([parabola.minimum], [parabola.loss], marker="*", ms=13, color=colour, mec="black", mew=0.6, ls="")
    if parabola.inside and parabola.interval is not None and math.isfinite(parabola.interval[1]):
        low, high = np.clip(parabola.interval, x[0], x[-1])
        axes.plot([low, high], [parabola.loss] * 2, color=colour, lw=3, alpha=0.4, solid_capstyle="butt")


def _curves(results: Results, shown: DataFrame) -> Any:
    from matplotlib.lines import Line2D

    started = results.started
    seeds = list(dict.fromkeys(started[SEEDS].sort_values(SEEDS).itertuples(index=False, name=None)))
    dashes = {seed: _DASHES[i % len(_DASHES)] for i, seed in enumerate(seeds)}
    groups = started.join(shown[["colour", "group", "sizes"]], on="configuration").groupby("group")
    figure, grid = _panels(len(groups))
    for axes, (_, runs) in zip(grid, groups, strict=True):
        for _, run in runs.iterrows():
            _curve(axes, run, dashes[tuple(run[SEEDS])])
        axes.set_title(f"{runs['sizes'].iloc[0]} parameters", fontsize="medium")
        _log_axis(axes, "tokens")
        _log_losses(axes)
        axes.set_ylabel("training loss (nats per token)")
    names = [f"seed {one}" if one == other else f"seeds {one}, {other}" for one, other in seeds[: len(_DASHES)]]
    if len(seeds) > len(_DASHES):
        names = [f"{name} and others" for name in names]
    more = [Line2D([], [], color="0.4", ls=_DASHES[i], lw=1.2, label=name) for i, name in enumerate(names)]
    if (started["state"] != "finished").any():
        more.append(Line2D([], [], color="0.4", ls="", marker="x", label="unfinished or diverged"))
    _legend(figure, shown, tuple(more), markers=False)
    return figure


def _curve(axes: Any, run: pd.Series, dashes: Any) -> None:
    """Draw the second half of a run's curve."""
    finite = np.isfinite(run["curve_loss"])
    x, y = run["curve_tokens"][finite], run["curve_loss"][finite]
    if len(y) < 2:
        return
    window = max(1, len(y) // 20)
    kernel = np.ones(window) / window
    x, y = np.convolve(x, kernel, "valid"), np.convolve(y, kernel, "valid")
    late = x >= x[-1] / 2
    x, y = x[late][:: max(1, window // 4)], y[late][:: max(1, window // 4)]
    axes.plot(x, y, color=run["colour"], lw=1.1, alpha=0.9, ls=dashes)
    if run["state"] != "finished":
        axes.plot(x[-1:], y[-1:], "x", color=run["colour"], ms=7)


def _evaluations(results: Results, shown: DataFrame) -> Any:
    """A panel per curve, in which each run's checkpoints are the points of its line."""
    found = results.evaluations.join(shown["colour"], on="configuration")
    curves = found.groupby("evaluation", sort=False)
    figure, grid = _panels(len(curves))
    for axes, (name, points) in zip(grid, curves, strict=True):
        for _, run in points.groupby("run", sort=False):
            axes.plot(run["tokens"], run["value"], "o-", color=run["colour"].iloc[0], ms=3.5, lw=1.1, alpha=0.9)
        axes.set_title(name, fontsize="medium")
        axes.xaxis.set_major_formatter(lambda value, _: short(value))
        axes.tick_params(axis="x", labelsize="small")
        axes.set_xlabel("training tokens")
    _legend(figure, shown.loc[sorted(set(found["configuration"]))], markers=False)
    return figure
