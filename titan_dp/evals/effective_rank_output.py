"""What `titan-dp evaluate effective-rank` leaves behind: summary, table, CSV and three figures.

Means are over the positions on the --every grid, whatever else was looked at, and over the states after a token's last
step. The CSV has every number; a figure by position shows of many neighbouring tokens their mean as a line and the lowest
and highest as a band, so that a state wiped at one token is still seen.
"""

from __future__ import annotations

import csv
import gzip
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from titan_dp.evals.session import Report
from titan_dp.files import write_atomically
from titan_dp.output import print_table, save_figure, subplots

if TYPE_CHECKING:
    import numpy as np

    from titan_dp.evals.effective_rank import Arrays

BESIDE = (".csv.gz", ".png", "-norm.png", "-steps.png")
"""Endings of the names of what is written beside the JSON file."""
_STRETCHES = 250  # points a line in a figure has at most
_PALETTE = ("#0072B2", "#E69F00", "#56B4E9", "#CC79A7", "#000000", "#8C6D31")  # no red, no green: those mark positions


@dataclass(frozen=True)
class Facts:
    """What was looked at, and where it goes."""

    tokens: int
    starts: list[int]
    """Positions of the documents' first tokens."""
    positions: np.ndarray
    """[P] int64, looked at."""
    every: int
    seq_len: int
    """Tokens a sequence in training."""
    layers: list[int]
    bos: bool
    """Whether documents start with BOS."""
    report: Report

    def file(self, ending: str) -> Path:
        return self.report.path.with_name(self.report.path.stem + ending)


def summary(facts: Facts, arrays: Arrays) -> dict[str, Any]:
    """The JSON of the results: a mean a head, inside and beyond the training length, and how true the replay is."""
    import numpy as np

    grid = facts.positions % facts.every == 0
    inside = facts.positions < facts.seq_len

    def mean(values: np.ndarray, where: np.ndarray) -> Any:
        return values[where].mean(0, dtype=np.float64).tolist() if where.any() else None

    def halves(values: np.ndarray) -> dict[str, Any]:
        return {"inside": mean(values, grid & inside), "beyond": mean(values, grid & ~inside)}

    def head(i: int, h: int) -> dict[str, Any]:
        return {
            "head": h,
            "effective_rank": halves(arrays["effective_rank"][i, h, :, -1]),
            "state_norm": halves(arrays["norm"][i, h, :, -1]),
            "beta": mean(arrays["beta"][i, h], grid),
            "decay": mean(arrays["decay"][i, h], grid),
            "decay_at_document_starts": mean(arrays["decay"][i, h], np.isin(facts.positions, facts.starts)),
            "largest_replay_difference": float(arrays["difference"][i, h]),
            "largest_state_entry": float(arrays["largest"][i, h]),
        }

    heads = range(arrays["decay"].shape[1])
    return {
        "tokens": facts.tokens,
        "documents": len(facts.starts),
        "document_starts": facts.starts,
        "training_length": facts.seq_len,
        "largest_replay_difference": float(arrays["difference"].max()),
        "layers": [{"layer": layer, "heads": [head(i, h) for h in heads]} for i, layer in enumerate(facts.layers)],
    }


def write_csv(facts: Facts, arrays: Arrays) -> None:
    """<report>.csv.gz: a row a layer, head, position and step looked at; the same bytes for the same numbers."""
    looks, n = arrays["norm"].shape[-1], arrays["beta"].shape[-1]
    steps = range(n - looks + 1, n + 1)
    starts = set(facts.starts)
    marks = [(position, int(position in starts)) for position in facts.positions.tolist()]

    def write(file: Any) -> None:
        with (
            gzip.GzipFile("", "wb", fileobj=file, mtime=0, compresslevel=6) as packed,
            io.TextIOWrapper(packed, "utf-8", newline="") as text,
        ):
            writer = csv.writer(text, lineterminator="\n")
            betas = [f"beta_{j + 1}" for j in range(n)]
            writer.writerow(["layer", "head", "position", "document_start", "step", "effective_rank", "norm", *betas, "decay"])
            for i, layer in enumerate(facts.layers):
                for h in range(arrays["decay"].shape[1]):
                    numbers = [arrays[name][i, h].tolist() for name in ("effective_rank", "norm", "beta", "decay")]
                    for mark, rank, norm, beta, decay in zip(marks, *numbers, strict=True):
                        end = [f"{x:.6g}" for x in (*beta, decay)]
                        for step, *state in zip(steps, rank, norm, strict=True):
                            writer.writerow([layer, h, *mark, step, *(f"{x:.6g}" for x in state), *end])

    facts.file(".csv.gz").parent.mkdir(parents=True, exist_ok=True)
    write_atomically(facts.file(".csv.gz"), write)


def draw(facts: Facts, arrays: Arrays) -> None:
    """Three figures of a panel a layer: effective ranks and norms by position, step sizes and decays by head."""
    label = facts.report.source.label
    _draw_by_position(facts, arrays["effective_rank"], f"effective rank of the states of {label}", "effective rank", ".png")
    _draw_by_position(facts, arrays["norm"], f"Frobenius norm of the states of {label}", "norm", "-norm.png")
    _draw_by_head(facts, arrays)


def _panels(count: int, xlabel: str) -> tuple[Any, list[Any]]:
    """A figure and `count` axes in a grid with common scales, of which the lowest in each column says what x is."""
    columns = min(count, 4 if count > 9 else 3)
    rows = -(-count // columns)
    size = max(7.0, 3.6 * columns), 1.4 + (1.9 if rows > 1 else 3.2) * rows
    figure, axes = subplots(rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False)
    for spare in axes.flat[count:]:
        spare.set_visible(False)
    for panel in axes.flat[max(0, count - columns) : count]:
        panel.set_xlabel(xlabel)
        panel.tick_params(labelbottom=True)
    return figure, list(axes.flat[:count])


def _colour(h: int, heads: int) -> Any:
    import matplotlib

    return _PALETTE[h] if heads <= len(_PALETTE) else matplotlib.colormaps["cividis"](h / (heads - 1))


def _draw_by_position(facts: Facts, values: np.ndarray, title: str, label: str, ending: str) -> None:
    """A line and a band a head; `values` [L, H, P, m]."""
    import numpy as np

    heads, looks = values.shape[1], values.shape[-1]
    x = (facts.positions[:, None] + (np.arange(looks) + 1 - looks) / looks).ravel()
    starts = "BOS" if facts.bos else "documents' first tokens"
    figure, panels = _panels(len(facts.layers), "position, tokens")
    for i, (layer, panel) in enumerate(zip(facts.layers, panels, strict=True)):
        handles = []
        for h in range(heads):
            middle, mean, low, high = stretches(x, values[i, h].ravel())
            colour = _colour(h, heads)
            panel.fill_between(middle, low, high, color=colour, alpha=max(0.05, 0.4 / heads), lw=0)
            handles += panel.plot(middle, mean, lw=1.0, color=colour, label=f"head {h}")
        style = {"transform": panel.get_xaxis_transform(), "color": "red", "zorder": 1, "label": starts}
        handles.append(panel.vlines(facts.starts, 0, 1, lw=0.6, alpha=min(0.5, 20 / len(facts.starts)), **style))
        if facts.tokens > facts.seq_len:
            handles.append(panel.axvline(facts.seq_len, color="green", lw=1.5, label="training length"))
        panel.set_title(f"layer {layer}", fontsize=9)
        panel.margins(x=0.01)
    figure.suptitle(f"{title}, {facts.tokens:,} tokens")
    figure.supylabel(label)
    _legend(figure, handles)
    save_figure(figure, facts.file(ending))


def stretches(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of the points (x, y) in at most `_STRETCHES` stretches of neighbours: mean x, mean y, lowest y and highest y."""
    import numpy as np

    cuts = np.unique(np.linspace(0, len(x), _STRETCHES + 1).astype(int)[:-1])
    counts = np.diff(np.append(cuts, len(x)))
    means = (np.add.reduceat(z, cuts, dtype=np.float64) / counts for z in (x, y))
    return *means, np.minimum.reduceat(y, cuts), np.maximum.reduceat(y, cuts)  # type: ignore[return-value]


def _legend(figure: Any, handles: list[Any]) -> None:
    columns = min(len(handles), 8)
    drawn = figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    for line in drawn.get_lines():
        line.set_linewidth(2)


def _draw_by_head(facts: Facts, arrays: Arrays) -> None:
    """Median and 5 to 95 % range of each step's beta and of the decay; mean decay at documents' first tokens."""
    import numpy as np

    heads, n = arrays["beta"].shape[1], arrays["beta"].shape[-1]
    grid, starts = facts.positions % facts.every == 0, np.isin(facts.positions, facts.starts)
    gated = bool((arrays["decay"] != 1).any())
    series = [(f"beta of step {j + 1}", arrays["beta"][..., j], _PALETTE[j % 6], "o") for j in range(n)]
    series += [("decay exp(g)", arrays["decay"], "black", "s")] * gated
    figure, panels = _panels(len(facts.layers), "head")
    for i, (layer, panel) in enumerate(zip(facts.layers, panels, strict=True)):
        handles = []
        for j, (name, values, colour, marker) in enumerate(series):
            low, middle, high = np.quantile(values[i][:, grid], (0.05, 0.5, 0.95), axis=1)
            x = np.arange(heads) + 0.6 * ((j + 0.5) / len(series) - 0.5)
            bars = [middle - low, high - middle]
            handles.append(panel.errorbar(x, middle, bars, fmt=marker, ms=3, lw=1.2, color=colour, label=name))
        if gated:
            decay = arrays["decay"][i][:, starts].mean(1)
            handles += panel.plot(x, decay, "x", color="red", ms=6, mew=1.5, label="mean decay at documents' first tokens")
        panel.set_title(f"layer {layer}", fontsize=9)
        panel.set_xticks(np.arange(0, heads, max(1, heads // 12)))
    figure.suptitle(f"step sizes{' and decay' * gated} of {facts.report.source.label}: median, 5 to 95 % of tokens")
    figure.supylabel("beta, decay" if gated else "beta")
    _legend(figure, handles)
    save_figure(figure, facts.file("-steps.png"))


def show(report: Report) -> None:
    """The table, averaged over heads, and the files."""
    import numpy as np
    from rich.table import Table

    results, settings = report.finished or {}, cast(dict[str, Any], report.head["settings"])
    length = results["training_length"]
    title = f"effective rank (at most {results['largest_possible']}) of {report.source.label}, means over tokens and heads"
    table = Table(title=title)
    for column in ("layer", f"below {length}", "heads", f"from {length}", "norm", "beta", "decay", "decay, starts"):
        table.add_column(column, justify="right")
    for layer in results["layers"]:
        heads = layer["heads"]
        inside, beyond = ([head["effective_rank"][half] for head in heads] for half in ("inside", "beyond"))
        beta = np.mean([head["beta"] for head in heads], 0)
        table.add_row(
            str(layer["layer"]),
            f"{np.mean(inside):.2f}",
            f"{min(inside):.1f}-{max(inside):.1f}",
            "-" if beyond[0] is None else f"{np.mean(beyond):.2f}",
            f"{np.mean([head['state_norm']['inside'] for head in heads]):.2f}",
            " ".join(f"{x:.2f}" for x in beta),
            f"{np.mean([head['decay'] for head in heads]):.3f}",
            f"{np.mean([head['decay_at_document_starts'] for head in heads]):.3f}",
        )
    print_table(table)
    print(
        f"{results['tokens']:,} tokens of {results['documents']:,} document(s), every {settings['every']}; "
        f"replayed and carried states differ by at most {results['largest_replay_difference']:.1e}"
    )
    if results["skipped_layers"]:
        print(f"skipped, softmax layers have no state: {', '.join(map(str, results['skipped_layers']))}")
    written = ", ".join(report.path.stem + ending for ending in (".json", *BESIDE))
    print(f"written to {report.folder}: {written}")
