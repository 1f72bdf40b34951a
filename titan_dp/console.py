"""Where tables are printed: as wide as a person's terminal, or as wide as the table needs when it goes to a file or pipe.

Cells wrap between words only: no word, and so no number, is ever cut ("804..."). Where a terminal is narrower than the
longest words of all columns side by side, the lines run on.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

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
