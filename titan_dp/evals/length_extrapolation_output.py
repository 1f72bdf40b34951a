"""What `titan-dp evaluate length-extrapolation` shows: a table, a CSV file and a plot of finished results.

Everything here is computed from the JSON results alone, so that it can be made again at any time.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from titan_dp import output as plots
from titan_dp.evals.length_extrapolation import moving_average
from titan_dp.files import write_atomically
from titan_dp.output import print_table

if TYPE_CHECKING:
    from titan_dp.evals.session import Report


def write(reports: list[Report], stem: Path, x_axis: str) -> None:
    """Print the table of `reports`; write stem.csv and stem.png."""
    print_table(_table(reports))
    _write_csv(reports, stem.with_suffix(".csv"))
    plots.save_figure(_plot(reports, x_axis), stem.with_suffix(".png"))
    written = [report.path for report in reports] + [stem.with_suffix(".csv"), stem.with_suffix(".png")]
    print(*(f"written to {path}" for path in written), sep="\n")


def _found(report: Report) -> dict[str, Any]:
    assert report.finished is not None
    return report.finished


def _table(reports: list[Report]) -> Table:
    table = Table(title="loss in nats a token (± standard error over sequences), then perplexity; by position")
    table.add_column("positions", justify="right")
    for report in reports:
        trained, found = report.head["settings"]["trained_length"], _found(report)
        table.add_column(f"{report.source.label}\ntrained on {trained}, {found['sequences']} sequences", justify="right")
    ranges = [_found(report)["ranges"] for report in reports]
    for i, (first, last) in enumerate(zip(ranges[0]["first_position"], ranges[0]["last_position"], strict=True)):
        table.add_row(f"{first:,} - {last:,}", *(_cell(r, i) for r in ranges))
    return table


def _cell(ranges: dict[str, Any], i: int) -> str:
    error = "" if ranges["standard_error"] is None else f" ± {ranges['standard_error'][i]:.4f}"
    return f"{ranges['loss'][i]:.4f}{error}  {ranges['perplexity'][i]:.3f}"


def _write_csv(reports: list[Report], path: Path) -> None:
    names, columns = ["position"], []
    for report in reports:
        loss = np.array(_found(report)["loss_by_position"])
        running = loss.cumsum() / np.arange(1, len(loss) + 1)
        names += [f"{report.source.label} {what}" for what in ("loss", "smoothed loss", "running mean loss")]
        columns += [loss, moving_average(loss, report.head["settings"]["smooth"]), running]
    rows = zip(*columns, strict=True)
    lines = [",".join(names), *(",".join([str(p), *(f"{x:.6f}" for x in row)]) for p, row in enumerate(rows, 1))]
    write_atomically(path, lambda file: file.write(("\n".join(lines) + "\n").encode()))


def _plot(reports: list[Report], x_axis: str) -> Any:
    figure, (above, below) = plots.subplots(2, 1, figsize=(8, 7.5), sharex=True)
    # On a linear axis the steep first positions would take most of the height and be one line.
    start = 0 if x_axis == "log" else min(16, reports[0].head["settings"]["max_length"] // 64)
    for i, report in enumerate(reports):
        settings, found = report.head["settings"], _found(report)
        color, label = f"C{i}", f"{report.source.label} ({found['sequences']} sequences)"
        loss = np.array(found["loss_by_position"])
        position = np.arange(1, len(loss) + 1)
        smoothed, running = moving_average(loss, settings["smooth"]), np.exp(loss.cumsum() / position)
        above.plot(position[start:], smoothed[start:], color=color, label=label, linewidth=1.2)
        below.plot(position[start:], running[start:], color=color, label=label, linewidth=1.5)
        curve = {key: np.array(values) for key, values in found["curve"].items()}
        if found["curve"]["standard_error"] is not None:
            shown = curve["position"] > start
            mean, error = curve["smoothed_loss"][shown], curve["standard_error"][shown]
            above.fill_between(curve["position"][shown], mean - error, mean + error, color=color, alpha=0.2, linewidth=0)
    settings = reports[0].head["settings"]
    _mark_trained_lengths(above, below, [report.head["settings"]["trained_length"] for report in reports])
    above.set_ylabel("loss (nats a token)")
    above.set_title(
        f"Loss by position, mean over {settings['smooth']} positions; band: standard error over sequences", fontsize="medium"
    )
    below.set_ylabel("perplexity of positions so far")
    below.set_xlabel("position (tokens before the predicted one)")
    if x_axis == "log":
        below.set_xscale("log", base=2)
    below.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    below.legend(edgecolor="none", framealpha=0.9)
    return figure


def _mark_trained_lengths(above: Any, below: Any, lengths: list[int]) -> None:
    """A vertical line at each; in the checkpoint's colour where they differ."""
    differ = len(set(lengths)) > 1
    for i, length in enumerate(lengths if differ else lengths[:1]):
        for axes in (above, below):
            axes.axvline(length, color=f"C{i}" if differ else "0.3", linestyle="--", linewidth=1)
        below.plot([], [], color=f"C{i}" if differ else "0.3", linestyle="--", label=f"training length {length:,}")
