"""What a command shows and leaves behind: tables, signs of life and advice on the console, CSV files, and figures as PNG files.

The rule for tables: in a file or pipe a table is as wide as it needs and has all its columns. A terminal is never overrun:
what does not fit is shown without its details, the least important first; then with words wrapped; and if even that is too
wide, as a block of lines per row. No number and no word is ever cut ("804...") or broken. CSV and JSON have all digits.

Files exist whole or not at all. Figures have one style; matplotlib is imported for the first one.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import re
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from titan_dp.errors import fitted, is_main_rank, require, room
from titan_dp.files import make_folder, write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Column, Table

T = TypeVar("T")

_STYLE: dict[Any, Any] = {
    "figure.constrained_layout.use": True,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_TEXT_AS_TEXT: dict[Any, Any] = {"pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "titan_dp"}
_WITHOUT_DATES: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    "svg": {"Date": None, "Creator": None},
}
FORMATS = tuple(_WITHOUT_DATES)
"""Endings of the files that a figure can be saved as."""


def add_format_option(parser: argparse.ArgumentParser) -> None:
    """--format, for every command that draws; `args.format` is the ending of its figures, by which they are saved."""
    parser.add_argument(
        "--format", choices=FORMATS, default="png", help="of figures; pdf and svg are for papers (default: png)"
    )


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
    """Write `figure` to `path` in the format of its ending, whole or not at all, and forget it; makes the folder."""
    import matplotlib.pyplot as plt

    content = figure_bytes(figure, path.suffix[1:])
    make_folder(path.parent)
    write_atomically(path, lambda file: file.write(content))
    plt.close(figure)


def figure_bytes(figure: Figure, ending: str) -> bytes:
    """`figure` in one of FORMATS, the same bytes each time: no date is in them. Text stays text, and a PNG has 150 dpi."""
    import matplotlib.pyplot as plt

    file = io.BytesIO()
    with plt.rc_context(_TEXT_AS_TEXT):
        figure.savefig(file, format=ending, dpi=150, metadata=_WITHOUT_DATES[ending])
    return file.getvalue()


def thousands(axis: Any) -> None:
    """Numbers along `axis` as tables have them: 16,384."""
    axis.set_major_formatter(lambda x, _: f"{x:,.0f}")


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

    make_folder(path.parent)
    write_atomically(path, write)


def print_written(*paths: Path) -> None:
    """One sentence that says where files of one folder are."""
    print_text(f"written to {paths[0].parent}: {', '.join(path.name for path in paths)}")


def number_table(
    title: str, columns: Sequence[str], rows: Iterable[Iterable[object]], left: Collection[str] = (), **style: Any
) -> Table:
    """A table of numbers, aligned to the right, except in columns named in `left`; `style` is handed to `rich.table.Table`."""
    from rich import box
    from rich.table import Table

    table = Table(title=title or None, box=box.SIMPLE, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), **style)
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right")
    for row in rows:
        table.add_row(*map(str, row))
    return table


_TEXT = 20
"""A column of words is not made narrower than this for the sake of others."""


def print_table(table: Table, details: Sequence[str] = (), last: bool = True) -> None:
    """Print `table` to stdout by the rule at the head of this file, between its title and an empty line.

    Brackets in it are text, not markup.

    Args:
        table: of `number_table`.
        details: headers of columns that a terminal may leave out, the first of them first.
        last: of tables with the same columns, after which is said which are left out.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console(width=room(), highlight=False, markup=False)
    if table.title is not None:
        console.print(Text(str(table.title), style="bold"))
        table.title = None
    left_out = []
    for name in details:
        if _needed(table, wrapped=False) <= console.width:
            break
        left_out += [column.header for column in table.columns if column.header == name]
        table.columns = [column for column in table.columns if column.header != name]
        for index, column in enumerate(table.columns):
            column._index = index  # rich takes the last one's padding away
    if _needed(table, wrapped=True) <= console.width:
        _share(table, console.width)
    else:
        table = _blocks(table)
    with console.capture() as capture:
        console.print(table)
    for line in capture.get().splitlines():
        print(line.rstrip())
    if left_out and last:
        names = ", ".join(" ".join(str(name).split()) for name in reversed(left_out))
        console.print(Text(f"a wider terminal also shows: {names}", style="dim"))
    console.print()


def print_pairs(title: str, pairs: Mapping[str, str], **style: Any) -> None:
    """Print names and what they stand for as a table without headers."""
    names = ("", " ")
    print_table(number_table(title, names, pairs.items(), left=names, show_header=False, **style))


def _widths(column: Column, wrapped: bool) -> tuple[int, int]:
    """The least and the most columns that `column` can do with. Numbers stay whole; words wrap if `wrapped`, headers always."""
    from rich.text import Text

    texts = [Text(str(cell)) for cell in (*column.cells, column.footer)]
    whole, header = max(_longest(text.plain.split("\n")) for text in texts), str(column.header)
    least = whole
    if wrapped and column.justify == "left":
        least = max(min(whole, _TEXT), *(_longest(text.plain.split()) for text in texts))
    return max(least, _longest(header.split())), max(whole, _longest(header.split("\n")))


def _longest(texts: Iterable[str]) -> int:
    from rich.cells import cell_len

    return max(map(cell_len, texts), default=0)


def _needed(table: Table, wrapped: bool) -> int:
    return sum(_widths(column, wrapped)[0] + 2 for column in table.columns) - 2


def _share(table: Table, width: int) -> None:
    """Set the widths of the columns: what is left over goes to words first, then to headers."""
    spare = width - _needed(table, wrapped=True)
    for column in sorted(table.columns, key=lambda column: column.justify != "left"):
        least, most = _widths(column, wrapped=True)
        column.width = min(most, least + spare)
        spare -= column.width - least


def _blocks(table: Table) -> Table:
    """The rows of `table` below each other, a line per cell that is not empty."""
    from rich.table import Table
    from rich.text import Text

    blocks = Table.grid(padding=(0, 2))
    blocks.add_column(no_wrap=True)
    blocks.add_column()
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    if table.show_footer:
        rows.append(tuple(column.footer for column in table.columns))
    for number, row in enumerate(rows):
        if number:
            blocks.add_row()
        for place, (column, cell) in enumerate(zip(table.columns, row, strict=True)):
            if str(cell):
                header = " ".join(str(column.header).split())
                blocks.add_row(Text(header, style="dim"), Text(str(cell), style="" if place else "bold"))
    return blocks


def print_text(*paragraphs: str) -> None:
    """Print sentences to stdout; a terminal wraps them between words, with the indentation that each begins with."""
    for text in paragraphs:
        print(fitted(text))


_LAYOUT = "\n\t\u00a0\u3000\u200c\u200d"
"""Spaces and joiners that texts are written with, though Python does not count them as printable."""


def harmless(text: str, one_line: bool = False) -> str:
    """`text` from a model or from data for people to read: what a terminal obeys or does not show is escaped.

    With `one_line` it has a sign for each line feed, and other layout is escaped as well.
    """
    text, keep = (text.replace("\n", "↵"), "") if one_line else (text, _LAYOUT)
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def print_next(what: str, *commands: str) -> None:
    """Say what to do next: `what` it is, and the commands to type; a terminal continues long ones with backslashes."""
    print_text(f"{what}:")
    for command in commands:
        print_command(command)


def print_command(command: str, indent: int = 2) -> None:
    """Print a command to stdout, as it can be typed; a terminal that is too narrow for it gets several lines."""
    first, other = " " * indent, " " * (indent + 2)
    lines = [first + command]
    if len(lines[0]) > room():  # options stay beside their values
        words = re.split(r" (?=--)", command)
        lines = [first + words[0]]
        for word in words[1:]:
            if len(lines[-1]) + len(word) + 3 > room():
                lines[-1] += " \\"
                lines.append(other + word)
            else:
                lines[-1] += f" {word}"
    print(*lines, sep="\n")


# -- progress ----------------------------------------------------------------------------------------------------------

FIRST_SIGN, NEXT_SIGN = 5.0, 30.0
"""Seconds after which a log has a first line of work that goes on, and then another one."""
_BAR_AFTER = 1.0


class Progress:
    """How far some work is.

    Args:
        done: of the `total`, by an earlier run: tells nothing of the time that the rest takes.
    """

    def __init__(self, what: str, total: int | None, done: int = 0) -> None:
        self.what, self.total, self.done, self.before = what, total, done, done
        self.note: Callable[[float], str] | None = None
        """What else there is to say after so many seconds, such as a rate."""
        self._began = time.monotonic()

    def advance(self, more: int = 1) -> None:
        self.done += more

    def each(self, items: Iterable[T]) -> Iterator[T]:
        """`items`, each counted when the next one is asked for."""
        for item in items:
            yield item
            self.advance()

    def line(self) -> str:
        seconds = time.monotonic() - self._began
        of = f" of {self.total:,}" if self.total else ""
        far = f" {self.done:,}{of}" if self.done or self.total else ""
        left, lately = "", self.done - self.before
        if self.total and lately:
            left = f", about {duration(round(seconds * (self.total - self.done) / lately))} left"
        noted = f", {note}" if (note := self.noted()) else ""
        return f"{self.what}{far}: {duration(round(seconds))} so far{left}{noted}"

    def noted(self) -> str:
        return self.note(max(time.monotonic() - self._began, 1e-3)) if self.note else ""


@contextmanager
def progress(what: str, total: int | None = None, done: int = 0) -> Iterator[Progress]:
    """Show that `what` is being done and how far it is: the one sign of life of all commands, on stderr, from the main rank.

    On a terminal a bar (without `total` a sign that moves) that goes away at the end; elsewhere a line after 5 s and then every
    30 s. It is shown by a thread, so that work of one long call shows it too.
    """
    state, over = Progress(what, total, done), threading.Event()
    watcher = threading.Thread(target=_show, args=(state, over), daemon=True)
    if is_main_rank():
        watcher.start()
    try:
        yield state
    finally:
        over.set()
        if watcher.is_alive():
            watcher.join()


def _show(state: Progress, over: threading.Event) -> None:
    with suppress(OSError, ValueError):  # nobody reads any more
        if not sys.stderr.isatty():
            wait = FIRST_SIGN
            while not over.wait(wait):
                print(state.line(), file=sys.stderr, flush=True)
                wait = NEXT_SIGN
        elif not over.wait(_BAR_AFTER):
            _show_bar(state, over)


def _show_bar(state: Progress, over: threading.Event) -> None:
    from rich import progress
    from rich.console import Console

    columns: list[Any] = [progress.SpinnerColumn(), progress.TextColumn("{task.description}", markup=False)]
    if state.total:
        columns += [progress.BarColumn(), progress.MofNCompleteColumn(), progress.TimeRemainingColumn()]
    columns += [progress.TimeElapsedColumn(), progress.TextColumn("{task.fields[noted]}", markup=False)]
    console, own = Console(stderr=True), sys.stdout.isatty()  # what goes elsewhere must not be printed above the bar
    with progress.Progress(*columns, console=console, transient=True, redirect_stdout=own) as bar:
        task = bar.add_task(state.what, total=state.total, completed=state.done, noted="")
        while True:
            bar.update(task, completed=state.done, noted=state.noted())
            if over.wait(0.1):
                return


def duration(seconds: float) -> str:
    """'45 s', '12 min', '3.4 h', '9.1 d'."""
    for unit, size, least in (("d", 86400, 2), ("h", 3600, 1.5), ("min", 60, 1.5)):
        if seconds >= least * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"
