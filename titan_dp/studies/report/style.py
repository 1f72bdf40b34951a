"""What all figures of a report have in common: colours of families, markers of sizes, a legend that covers nothing, axes."""

from __future__ import annotations

import math
from itertools import chain
from typing import Any

from titan_dp import output as plots
from titan_dp.studies.report.configurations import SAME_SIZE, Configuration, clusters
from titan_dp.studies.report.text import count

MARKERS = "os^DvPX*<>"
_COLUMNS = 3  # of panels


class Style:
    """Colours of families and markers of sizes, the same in every figure of a report."""

    def __init__(self, configurations: list[Configuration]) -> None:
        names = list(dict.fromkeys(c.family for c in configurations))
        palette = 10 if len(names) <= 10 else 20
        self.colour = {name: _colour(i % palette, palette) for i, name in enumerate(names)}
        sizes = clusters(configurations, lambda c: c.parameters, SAME_SIZE)
        share = math.ceil(len(sizes) / len(MARKERS))
        self.groups = [list(chain(*sizes[i : i + share])) for i in range(0, len(sizes), share)]
        """Configurations by size; a group spans several sizes where there are more of them than markers."""
        self.labels = [_range(min(c.parameters for c in g), max(c.parameters for c in g)) for g in self.groups]

    def marker(self, configuration: Configuration) -> str:
        return next(m for m, same in zip(MARKERS, self.groups, strict=False) if configuration in same)

    def legend(self, figure: Any, shown: list[Configuration], *, more: list[Any] | None = None, markers: bool = True) -> None:
        """Families and sizes of what is `shown`, below the panels, where it can cover nothing."""
        from matplotlib.lines import Line2D

        families = {c.family for c in shown}
        handles = [Line2D([], [], color=c, lw=3, label=name) for name, c in self.colour.items() if name in families]
        for marker, same, label in zip(MARKERS if markers else "", self.groups, self.labels, strict=False):
            if any(c in same for c in shown):
                handles.append(Line2D([], [], color="0.4", marker=marker, ls="", label=label))
        columns = 3 if figure.get_figwidth() < 9 else 5
        handles += more or []
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize="small", frameon=False)


def panels(n: int) -> tuple[Any, list[Any]]:
    """A figure and its n panels, at most _COLUMNS in a row."""
    columns = min(n, _COLUMNS)
    rows = math.ceil(n / columns)
    figure, grid = plots.subplots(rows, columns, figsize=(max(8, 4.3 * columns), 0.8 + 3.6 * rows), squeeze=False)
    for empty in grid.flat[n:]:
        empty.set_visible(False)
    return figure, list(grid.flat[:n])


def log_axis(axes: Any, label: str) -> None:
    """A logarithmic x-axis with readable ticks, however short it is."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_xscale("log")
    low, high = axes.get_xlim()
    decades = math.log10(high / low)
    subs = (1.0,) if decades > 3 else (1.0, 3.0) if decades > 1.5 else (1.0, 2.0, 5.0) if decades > 0.7 else tuple(range(1, 10))
    axes.xaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axes.xaxis.set_major_formatter(lambda value, _: count(value))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", labelsize="small")
    axes.set_xlabel(label)


def _range(low: float, high: float) -> str:
    return count(low) if count(low) == count(high) else f"{count(low)} to {count(high)}"


def _colour(i: int, palette: int) -> Any:
    import matplotlib

    return matplotlib.colormaps[f"tab{palette}"](i)
