"""`titan-dp forecast RUNS --target size=...,tokens=...`: what a run will come out as, written down before it is run.

    titan-dp forecast outputs/study --target size=7M,tokens=140M

Laws are fitted without the target, as in `titan-dp report`. The forecast is written to a dated file that is never written
over; `titan-dp report` puts the outcome beside it when there is one.
"""

from __future__ import annotations

import argparse
import os
import shlex
from datetime import date
from pathlib import Path

from titan_dp.errors import UserError, counted, require
from titan_dp.files import make_folder, write_json
from titan_dp.output import print_next, print_text, progress
from titan_dp.studies.report.target import target


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUNS", help="run folders, or folders that hold run folders")
    parser.add_argument(
        "--target", type=target, required=True, metavar="size=N,tokens=D", help="parameters and tokens of what is forecast"
    )
    parser.add_argument(
        "--out", type=Path, help="the file (default: forecast.json in the one sweep's folder given, else forecast.json)"
    )
    parser.add_argument(
        "--loss", choices=("nats", "bits-per-byte"), default="nats", help="unit of the losses, as for titan-dp report"
    )


def run(args: argparse.Namespace) -> int:
    """Read, fit, write and print.

    Raises UserError, before anything is written, for unfit runs, an optimum at an edge, too few runs, a target inside the
    fitted range, and a file that is there already.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    require("titan-dp forecast", "pandas", "pyarrow", "scipy")
    from titan_dp.studies.report.compare import UNITS, check_comparable, group
    from titan_dp.studies.report.fits import LEVEL
    from titan_dp.studies.report.forecast import MADE_BY, Written, forecast
    from titan_dp.studies.report.read import find_runs, read_runs, tuned_axes
    from titan_dp.studies.report.tables import forecast_table, show
    from titan_dp.studies.report.tune import refusal, tune

    if args.target.size is None or args.target.tokens is None:
        raise UserError(f"--target {args.target} lacks a size or a number of tokens; name both, as size=1.75M,tokens=800K")
    one_sweep = len(args.runs) == 1 and (args.runs[0] / "sweep.json").exists()
    out = args.out or (args.runs[0] / "forecast.json" if one_sweep else Path("forecast.json"))
    if out.exists():
        raise UserError(f"{out} is there already, and a forecast is kept as it was written; name another file with --out")
    found = find_runs(args.runs)
    runs = read_runs(found)
    started = runs[runs["state"] != "not started"]
    if started.empty:
        raise UserError(f"none of {counted(len(runs), 'run')} has started; launch them first, for example {runs['folder'][0]}")
    check_comparable(started, args.loss)
    runs, configurations = group(runs, args.loss)
    tunings, best = tune(runs, configurations, tuned_axes(found))
    if edge := refusal(tunings):
        raise UserError(edge)
    with progress("fitting"):
        forecasts, lacks = forecast(best, configurations, args.target)
    written = Written(
        made_by=MADE_BY,
        written=date.today().isoformat(),
        command=shlex.join(["titan-dp", "forecast", *map(str, args.runs), "--target", str(args.target)]),
        loss=UNITS[args.loss],
        validation_texts=sorted(set(started["validation_fingerprint"].dropna())),
        target=str(args.target),
        started=int(args.target.among(configurations)["names"].map(len).sum()),
        interval=LEVEL,
        forecasts=[each.model_copy(update={"written": date.today().isoformat()}) for each in forecasts],
        not_forecast=lacks,
    )
    make_folder(out.parent)
    write_json(out, written.model_dump())
    show(f"forecasts, {UNITS[args.loss]}", forecast_table(written.forecasts))
    print_text(*(f"not forecast: {family}: {reason}" for family, reason in lacks.items()))
    if written.started:
        print_text(f"warning: {written.started} runs at the target have started already, so this is not a forecast of them")
    print_text(f"written to {out}")
    report = shlex.join(["titan-dp", "report", *map(str, args.runs)])
    print_next("when the target has been run, put the outcome beside it with", report)
    return 0
