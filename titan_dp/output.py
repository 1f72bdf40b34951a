"""What a command shows: tables on the console, and figures as PNG files that are there whole or not at all.

A table is as wide as a person's terminal, or as wide as it needs when it goes to a file or pipe. Cells wrap between words
only: no word, and so no number, is ever cut ("804..."). Where a terminal is narrower than the longest words of all columns
side by side, the lines run on. Figures have one style; matplotlib is imported when the first one is asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titan_dp.errors import UserError
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
    """Raises UserError where matplotlib is not installed; to be called before hours are spent."""
    if find_spec("matplotlib") is None:
        raise UserError("plots need matplotlib: pip install 'titan_dp[eval]'")


def subplots(*args: Any, **kw: Any) -> tuple[Figure, Any]:
    """`matplotlib.pyplot.subplots` in one style, drawn without a display.

    Raises UserError where matplotlib is not installed.
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


_WIDER_THAN_ANY = 100_000


def print_table(table: Table, details: Collection[str] = ()) -> None:
    """Print `table` to stdout. Brackets in it are text, not markup.

    Args:
        table: its columns get the width of their longest word at least.
        details: headers of columns that are left out where the terminal has no room for all of them.
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
