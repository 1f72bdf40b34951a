"""`titan-dp report RUNS...`: many runs as tables, figures, scaling-law fits and one HTML page.

Everything is read and computed before the first file is written, and each file is there whole or not at all;
report.json is written first and marks the folder as a report's, which alone is ever overwritten. Finding and reading runs is
runs.py's, what comes out of them results.py's.
"""

from __future__ import annotations

import argparse
import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from titan_dp.errors import UserError
from titan_dp.files import write_atomically, write_json
from titan_dp.studies.report.runs import find_runs, read_runs, read_sweep

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
        help="compare validation losses in nats a token, or in bits a byte across tokenizers (default: nats)",
    )


def run(args: argparse.Namespace) -> int:
    """Read, compute, print and write. Raises UserError for runs or a folder that will not do, before anything is written."""
    os.environ.setdefault(
        "OMP_NUM_THREADS", "1"
    )  # fits are small and run in processes of their own: threads only get in the way
    _check_packages()
    out = args.out or _default_out(args.runs)
    earlier = _check_out(out)
    runs = read_runs(find_runs(args.runs))
    title, description = _title(args.runs)

    from titan_dp.studies.report.results import results_of

    results = results_of(runs, args.loss, title, description)
    _print(results)
    _write(results, out, earlier)
    return 0


def _check_packages() -> None:
    missing = [name for name in ("scipy", "matplotlib", "jinja2") if find_spec(name) is None]
    if missing:
        raise UserError(f"titan-dp report needs {' and '.join(missing)}: pip install 'titan_dp[scaling]'")


def _default_out(paths: list[Path]) -> Path:
    return paths[0] / "report" if len(paths) == 1 and (paths[0] / "sweep.json").exists() else Path("report")


def _check_out(out: Path) -> set[str]:
    """Names of the files of the earlier report in `out`.

    Raises UserError where `out` is something else than a report, or than nothing, or a file of a report's name is not one's.
    """
    from titan_dp.studies.report.plots import FIGURES

    names = {*_TABLES, *FIGURES, _PAGE}
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
        raise UserError(f"--out {out} holds files and is no report of this program; name another folder")
    for name in sorted(names - own):
        if (out / name).exists():
            raise UserError(f"--out: {out / name} is no file of the report there; move it away, or name another folder")
    return own


def _title(paths: list[Path]) -> tuple[str, str]:
    """The sweep's name and description where one is reported, else the folders' names."""
    if len(paths) == 1 and (paths[0] / "sweep.json").exists():
        sweep = read_sweep(paths[0])
        return str(sweep.get("name") or paths[0].resolve().name), str(sweep.get("description") or "")
    names = [path.resolve().name for path in paths]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else ""), ""


def _print(results: Results) -> None:
    from titan_dp.studies.report import tables
    from titan_dp.studies.report.text import summary

    print(*summary(results), *(f"warning: {line}" for line in results.warnings), "", sep="\n")
    for comparison in results.comparisons:
        tables.show(tables.comparison_title(comparison), tables.comparison_table(comparison))
    tables.show(
        f"configurations (training loss: nats a token, last 5 % of steps; validation loss: {results.unit}, ± standard "
        "deviation over seeds; front C: by FLOPs, N: by parameters)",
        tables.configurations_table(results),
    )
    if results.isoflops:
        tables.show("isoFLOP minima", tables.isoflop_table(results))
    tables.show("L(N, D) = E + A/N^a + B/D^b, 90 % bootstrap intervals", tables.surface_table(results))
    tables.show("L(C) = E + A/C^a, 90 % bootstrap intervals", tables.compute_table(results))


def _write(results: Results, out: Path, earlier: set[str]) -> None:
    """Write the report; of the `earlier` one's files those go that this one does not have."""
    from titan_dp import output as plots
    from titan_dp.studies.report import tables
    from titan_dp.studies.report.page import page
    from titan_dp.studies.report.plots import FIGURES, figures

    out.mkdir(parents=True, exist_ok=True)
    record = {"made_by": _MADE_BY, "files": sorted({*_TABLES, *FIGURES, _PAGE}), **tables.as_json(results)}
    write_json(out / "report.json", record)  # with every name there may be, so that a kill leaves none that it does not list
    contents = (tables.runs_csv(results), tables.configurations_csv(results))
    for name, content in zip(_TABLES, contents, strict=True):
        write_atomically(out / name, lambda file, content=content: file.write(content))  # type: ignore[misc]
    drawn: dict[Path, str] = {}
    for name, caption, figure in figures(results):
        plots.save_figure(figure, out / name)
        drawn[out / name] = caption
    for name in earlier - {*_TABLES, _PAGE, *(path.name for path in drawn)}:  # it had more to draw
        (out / name).unlink(missing_ok=True)
    html = page(results, drawn)
    write_atomically(out / _PAGE, lambda file: file.write(html))
    write_json(out / "report.json", record | {"files": sorted({*_TABLES, _PAGE, *(path.name for path in drawn)})})
    for path in (out / "report.json", *(out / name for name in _TABLES), *drawn, out / _PAGE):
        print(f"written to {path}")
