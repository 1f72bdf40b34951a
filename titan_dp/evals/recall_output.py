"""What `titan-dp evaluate recall` leaves behind: summary, tables, CSV and the figure that compares checkpoints.

Two levels say what an accuracy is worth: a random id (among all of the vocabulary, or among the sequence's values), and the
best guess of a model that knows which values there are and which have been an answer, but not which key has which.
"""

from __future__ import annotations

import csv
import io
import math
from typing import TYPE_CHECKING, Any

from titan_dp.evals.session import Report
from titan_dp.files import write_atomically
from titan_dp.output import print_table, save_figure, subplots

if TYPE_CHECKING:
    import numpy as np

_Z = 1.959964  # of a 95 % interval
_KINDS = (("", "all ids"), ("_among_values", "the sequence's values"))  # suffix of the names in the results, in words


def unpaired_guess(pairs: int, queries: int | None) -> float:
    """Mean over a sequence's queries of one in the values that have not been an answer yet."""
    asked = min(pairs, queries or pairs)
    return sum(1 / (pairs - i) for i in range(asked)) / asked


def wilson(right: int, asked: int) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson 1927), which takes the queries as independent."""
    p, z = right / asked, _Z**2 / asked
    middle, half = p + z / 2, _Z * math.sqrt(p * (1 - p) / asked + z / asked / 4)
    return max(0.0, (middle - half) / (1 + z)), min(1.0, (middle + half) / (1 + z))


def summary(pairs: list[int], counts: np.ndarray, vocab_size: int, queries: int | None) -> dict[str, Any]:
    """The JSON of the results, of `measure`'s counts [len(pairs), distances, 3]."""

    def entry(asked: int, *right: int) -> dict[str, Any]:
        found: dict[str, Any] = {"queries": asked}
        for hits, (suffix, _) in zip(right, _KINDS, strict=True):
            found |= {f"accuracy{suffix}": hits / asked, f"interval{suffix}": wilson(hits, asked)}
        return found

    def row(i: int, count: int) -> dict[str, Any]:
        bins = [(b, *counts[i, b].tolist()) for b in range(counts.shape[1]) if counts[i, b, 0]]
        levels = {"chance": 1 / vocab_size, "chance_among_values": 1 / count, "unpaired_guess": unpaired_guess(count, queries)}
        near = [{"distance": [2**b, 2 ** (b + 1) - 1], **entry(*numbers)} for b, *numbers in bins]
        return {"pairs": count, **entry(*counts[i].sum(0).tolist()), **levels, "by_distance": near}

    return {"by_pairs": [row(i, count) for i, count in enumerate(pairs)]}


def write_csv(report: Report, results: dict[str, Any]) -> None:
    """recall-<label>.csv: a row a number of pairs and range of distances."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    measured = [f"{name}{suffix}" for suffix, _ in _KINDS for name in ("accuracy", "low", "high")]
    levels = ["chance", "chance_among_values", "unpaired_guess"]
    writer.writerow(["pairs", "distance_from", "distance_to", "queries", *measured, *levels])
    for row in results["by_pairs"]:
        for near in row["by_distance"]:
            numbers = [x for suffix, _ in _KINDS for x in (near[f"accuracy{suffix}"], *near[f"interval{suffix}"])]
            numbers += [row[level] for level in levels]
            writer.writerow([row["pairs"], *near["distance"], near["queries"], *(f"{x:.6g}" for x in numbers)])
    report.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(report.path.with_suffix(".csv"), lambda file: file.write(text.getvalue().encode()))


def draw(reports: list[Report]) -> None:
    """recall.png: accuracy by number of pairs of all checkpoints, a panel each for all ids and for the sequence's values."""
    figure, panels = subplots(1, 2, figsize=(10, 4.5), sharey=True)
    rows = _rows(reports[0])
    ticks = [row["pairs"] for row in rows]
    for panel, (suffix, words) in zip(panels, _KINDS, strict=True):
        handles = [_curve(panel, report, suffix, i - (len(reports) - 1) / 2) for i, report in enumerate(reports)]
        handles += panel.plot(ticks, [row[f"chance{suffix}"] for row in rows], "k:", lw=1.2, label="chance")
        guess = "best guess without knowing which key has which value"
        handles += panel.plot(ticks, [row["unpaired_guess"] for row in rows], "--", color="0.5", lw=1.2, label=guess)
        panel.set_xscale("log", base=2)
        panel.set_xticks(ticks, map(str, ticks))
        panel.minorticks_off()
        panel.set_ylim(-0.02, 1.02)
        panel.set_xlabel("pairs")
        panel.set_title(f"among {words}", fontsize=10)
    panels[0].set_ylabel("queries answered right, 95 % interval")
    figure.suptitle("multi-query associative recall")
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    save_figure(figure, reports[0].folder / "recall.png")


def _curve(panel: Any, report: Report, suffix: str, shift: float) -> Any:
    """One checkpoint's accuracies, moved a little aside so that equal ones do not hide one another."""
    rows = _rows(report)
    x = [row["pairs"] * 1.04**shift for row in rows]
    y = [row[f"accuracy{suffix}"] for row in rows]
    bars = [[abs(row[f"interval{suffix}"][side] - row[f"accuracy{suffix}"]) for row in rows] for side in (0, 1)]
    return panel.errorbar(x, y, bars, marker="o", ms=4, lw=1.2, capsize=2, label=report.source.label)


def _rows(report: Report) -> list[dict[str, Any]]:
    assert report.finished is not None
    return report.finished["by_pairs"]


def show(reports: list[Report]) -> None:
    """A table a checkpoint, and the files."""
    from rich.table import Table

    for report in reports:
        table = Table(title=f"recall of {report.source.label}: right answers in % (95 % interval)")
        for column in ("pairs", "queries", "all ids", "chance", "values", "chance", "unpaired guess"):
            table.add_column(column, justify="right")
        for row in _rows(report):
            cells = [str(row["pairs"]), f"{row['queries']:,}"]
            for suffix, _ in _KINDS:
                low, high = row[f"interval{suffix}"]
                cells += [
                    f"{100 * row[f'accuracy{suffix}']:.1f} ({100 * low:.1f}-{100 * high:.1f})",
                    f"{100 * row[f'chance{suffix}']:.1f}",
                ]
            table.add_row(*cells, f"{100 * row['unpaired_guess']:.1f}")
        print_table(table)
        print(f"written to {report.path}, {report.path.with_suffix('.csv').name}")
    print(f"written to {reports[0].folder / 'recall.png'}")
