"""`titan-dp report RUNS...`: many runs as tables, figures, scaling-law fits and one HTML page.

Everything is read and computed before the first file is written, and each file is there whole or not at all. report.json is
written first and marks the folder as a report's; only such a folder is ever written over. Reading runs is read.py's, what
comes out of them results.py's.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from titan_dp.errors import UserError, require
from titan_dp.files import make_folder, write_atomically, write_json
from titan_dp.output import FORMATS, add_format_option, print_text, print_written, progress
from titan_dp.studies.report.target import target

if TYPE_CHECKING:
    from titan_dp.studies.report.results import Results

_MADE_BY = "titan-dp report"
_TABLES = ("runs.csv", "configurations.csv")
_PAGE = "report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUNS", help="run folders, or folders that hold run folders, such as a sweep's"
    )
    parser.add_argument(
        "--out", type=Path, help="folder of the report (default: report/ in the one sweep's folder given, else report/)"
    )
    parser.add_argument(
        "--loss",
        choices=("nats", "bits-per-byte"),
        default="nats",
        help="compare validation losses in nats per token, or in bits per byte across tokenizers (default: nats)",
    )
    parser.add_argument(
        "--hold-out", type=target, metavar="size=N", help="forecast the runs of this size (or tokens=D) from the others"
    )
    add_format_option(parser)


def run(args: argparse.Namespace) -> int:
    """Read, compute, print and write.

    Raises UserError for unfit runs or an unfit folder, before anything is written; and after that for a tuned axis whose best
    value is at the edge of its grid: the report shows it, and compares nothing that is not tuned.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # fits are small and have a process each: more threads are in the way
    require("titan-dp report", "pandas", "pyarrow", "scipy", "matplotlib", "jinja2")
    from titan_dp.studies.report.compare import UNITS
    from titan_dp.studies.report.forecast import read_written
    from titan_dp.studies.report.read import find_runs, read_runs, read_sweep, tuned_axes
    from titan_dp.studies.report.results import results_of
    from titan_dp.studies.report.tune import refusal

    is_sweep = len(args.runs) == 1 and (args.runs[0] / "sweep.json").exists()
    out = args.out or (args.runs[0] / "report" if is_sweep else Path("report"))
    earlier = _check_out(out)
    found = find_runs(args.runs)
    with progress(f"reading {len(found):,} runs"):
        runs = read_runs(found)
    names = [path.resolve().name for path in args.runs]
    title = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    sweep = read_sweep(args.runs[0]) if is_sweep else None
    texts = runs["validation_fingerprint"].dropna()
    forecasts, warnings = read_written(args.runs, UNITS[args.loss], texts)
    named, about = (sweep and sweep.name) or title, sweep.description if sweep else ""
    with progress("comparing and fitting"):
        results = results_of(runs, args.loss, named, about, tuned_axes(found), forecasts, args.hold_out)
    results.warnings.extend(warnings)
    _print(results)
    with progress("drawing"):
        written = _write(results, out, earlier, args.format, _typed(args))
    print_written(*written)
    print_text(f"{out / _PAGE} shows it all on one page")
    if edge := refusal(results.tunings):
        raise UserError(edge)
    return 0


def _typed(args: argparse.Namespace) -> str:
    """The command line, with those options that are not the defaults."""
    options = [("--out", args.out), ("--loss", args.loss if args.loss != "nats" else None)]
    options.append(("--hold-out", args.hold_out))
    options.append(("--format", args.format if args.format != "png" else None))
    given = [word for name, value in options if value is not None for word in (name, value)]
    return shlex.join(map(str, ["titan-dp", "report", *args.runs, *given]))


def _names() -> set[str]:
    """Every file name that a report may have, beside report.json."""
    from titan_dp.studies.report.figures import FIGURES

    return {*_TABLES, *(f"{name}.{ending}" for name in FIGURES for ending in FORMATS), _PAGE}


def _check_out(out: Path) -> set[str]:
    """Names of the files of the earlier report in `out`.

    Raises UserError if `out` is neither a report nor empty, or if a file there has a report file's name but is not listed.
    """
    names = _names()
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    if not out.exists() or not any(out.iterdir()):
        return set()
    try:
        found = json.loads((out / "report.json").read_text())
        own = names & set(map(str, found.get("files", names))) if found["made_by"] == _MADE_BY else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        own = None
    if own is None:
        raise UserError(f"--out {out} holds files and is not a report of this program; name another folder")
    if other := next((name for name in sorted(names - own) if (out / name).exists()), None):
        raise UserError(f"--out: {out / other} is not a file of the report there; move it away, or name another folder")
    return own


def _print(results: Results) -> None:
    from titan_dp.studies.report.tables import NOT_FITTED, show, summary, tables

    print_text(*summary(results), *(f"warning: {line}" for line in results.warnings), "")
    without = []
    for section in tables(results).values():
        for title, table in section:
            if "note" in table and len(table) and table["note"].str.startswith(NOT_FITTED).all():
                without.append(title.partition(" = ")[0])
            else:
                show(title, table, last=table is section[-1][1])
    if without:
        print_text(f"not fitted: {', '.join(without)}; report.html says what each of them lacks")


def _write(results: Results, out: Path, earlier: set[str], ending: str, typed: str) -> list[Path]:
    """Write the report, and delete those files of the `earlier` one that this one does not have; returns its files.

    Args:
        ending: of the figures' files; the page has PNGs in it whatever they are.
        typed: the command line.
    """
    from titan_dp.output import figure_bytes, save_figure
    from titan_dp.studies.report.figures import figures
    from titan_dp.studies.report.tables import as_json, configurations_csv, page, runs_csv

    make_folder(out)
    record = {"made_by": _MADE_BY, "files": sorted(_names()), **as_json(results)}
    write_json(out / "report.json", record)  # lists every name there may be: a kill leaves no file that is not listed
    for name, content in zip(_TABLES, (runs_csv(results), configurations_csv(results)), strict=True):
        write_atomically(out / name, lambda file, content=content: file.write(content))  # type: ignore[misc]
    drawn: list[Path] = []
    shown: dict[str, tuple[bytes, str]] = {}
    for name, caption, figure in figures(results):
        shown[name] = figure_bytes(figure, "png"), caption
        drawn.append(out / f"{name}.{ending}")
        save_figure(figure, drawn[-1])
    written = {*_TABLES, _PAGE, *(path.name for path in drawn)}
    for name in earlier - written:  # it had more to draw
        (out / name).unlink(missing_ok=True)
    html = page(results, shown, typed)
    write_atomically(out / _PAGE, lambda file: file.write(html))
    write_json(out / "report.json", record | {"files": sorted(written)})
    return [out / "report.json", *(out / name for name in _TABLES), *drawn, out / _PAGE]
