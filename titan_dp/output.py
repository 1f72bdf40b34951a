"""What a command shows and leaves behind: tables on the console, CSV files, and figures as PNG files.

Files exist whole or not at all. A table is as wide as a person's terminal, or as wide as it needs when it goes to a file or
pipe. Cells wrap between words only: no word, and so no number, is ever cut ("804..."). If a terminal is narrower than the
longest words of all columns side by side, the lines run on. Figures have one style; matplotlib is imported for the first one.
"""

from __future__ import annotations

import csv
import gzip
import io
import sys
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from titan_dp.errors import require
from titan_dp.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

_STYLE: dict[Any, Any] = {
    "figure.constrained_layout.use": True,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def check_matplotlib() -> None:
    """Raises UserError if matplotlib is not installed; to be called before hours are spent."""
    require("a plot", "matplotlib")


def subplots(*args: Any, **kw: Any) -> tuple[Figure, Any]:
    """`matplotlib.pyplot.subplots` in one style, drawn without a display.

    Raises UserError if matplotlib is not installed.
    """
    check_matplotlib()
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cycle = plt.cycler(color=plt.get_cmap("tab10").colors)  # type: ignore[attr-defined]
    with plt.rc_context({**_STYLE, "axes.prop_cycle": cycle}):
        return plt.subplots(*args, **kw)


def save_figure(figure: Figure, path: Path) -> None:
    """Write `figure` to `path` as a PNG of 150 dpi, whole or not at all, and forget it; makes the folder."""
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150))
    plt.close(figure)


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Iterable[object]]) -> None:
    """Write a CSV file, whole or not at all; makes the folder. The same bytes for the same rows, also if `path` ends in .gz."""

    def write(file: IO[bytes]) -> None:
        packed = gzip.GzipFile("", "wb", 6, file, mtime=0) if path.suffix == ".gz" else file  # no name and no time in it
        text = io.TextIOWrapper(packed, "utf-8", newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
        text.detach()  # `write_atomically` closes the file
        if packed is not file:
            packed.close()

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, write)


def print_written(*paths: Path) -> None:
    """One line that says where files of one folder are."""
    print(f"written to {paths[0].parent}: {', '.join(path.name for path in paths)}")


def number_table(
    title: str, columns: Sequence[str], rows: Iterable[Iterable[object]], left: Collection[str] = (), **style: Any
) -> Table:
    """A table of numbers, aligned to the right, except in columns named in `left`; `style` is handed to `rich.table.Table`."""
    from rich.table import Table

    table = Table(title=title, **style)
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right")
    for row in rows:
        table.add_row(*map(str, row))
    return table


_WIDER_THAN_ANY = 100_000


def print_table(table: Table, details: Collection[str] = ()) -> None:
    """Print `table` to stdout. Brackets in it are text, not markup.

    Args:
        table: its columns get at least the width of their longest word.
        details: headers of columns that are left out if the terminal has no room for all columns.
    """
    from rich.console import Console
    from rich.measure import Measurement

    wide = Console(width=_WIDER_THAN_ANY, highlight=False, markup=False)
    room = Console().width if sys.stdout.isatty() else _WIDER_THAN_ANY
    if Measurement.get(wide, wide.options, table).maximum > room:
        table.columns = [column for column in table.columns if column.header not in details]
    for column in table.columns:
        cells = (column.header, *column.cells, column.footer)
        column.min_width = max(Measurement.get(wide, wide.options, cell).minimum for cell in cells)
    needed = Measurement.get(wide, wide.options, table)
    width = max(needed.minimum, min(needed.maximum, room))
    Console(width=width, highlight=False, markup=False).print(table)
