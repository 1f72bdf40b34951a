"""`titan-dp state-tracking report FOLDERS`: the table and the curves of trained models, from their run folders.

Training is bistable: most runs stay on a plateau or leave it abruptly. So the table says how many seeds solved the task, with
a confidence interval, and never shows a mean of accuracies. The run that stands for a model is the one that validates best on
words of the training lengths; the test on longer words chooses nothing. Unfinished runs are counted, not hidden.

Prints the table and writes it as summary.json and summary.md, with curves.png: the accuracy at every length of the run that
stands for each model, all seeds in thin lines, and how accuracy came over the steps. Runs are found and their settings read as
`titan-dp report` does it.
"""

from __future__ import annotations

import argparse
import math
import shlex
from pathlib import Path
from statistics import median
from typing import Any

from titan_dp import config
from titan_dp.config.mixers import MIXERS
from titan_dp.errors import UserError, require
from titan_dp.files import check_own, write_atomically, write_json
from titan_dp.output import print_next, print_text, print_written, save_figure, subplots
from titan_dp.studies.state_tracking.models import label
from titan_dp.train.length_test import FILE, LengthTest, read_length_test
from titan_dp.train.run_folder import identity, is_finished, read_records, read_run

_FILES = ("summary.json", "summary.md", "curves.png")
_IN_JSON = ("parameters", "steps", "data_wait", "solved_step", "solved", "householder_steps")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", type=Path, help="run folders, or folders of them, of one task")
    parser.add_argument("--out", type=Path, help="where to write (default: the folder of the first runs)")


def run(args: argparse.Namespace) -> int:
    first = args.folders[0]
    report(args.folders, args.out or (first.parent if (first / "config.toml").exists() else first))
    return 0


def check_possible(out: Path) -> None:
    """Raises UserError if a package that reports need is missing, or a report would write over a file of somebody else.

    To be called before hours are spent.
    """
    require("titan-dp state-tracking", "pandas", "pyarrow", "scipy", "matplotlib")
    check_own(out, _FILES[0], {"task", "train_length", "models"}, _FILES[1:])


def report(folders: list[Path], out: Path) -> None:
    """Read, print and write. Raises UserError if there is no finished run, or a file of somebody else in the way."""
    check_possible(out)
    from titan_dp.studies.report.read import find_runs
    from titan_dp.studies.report.tables import show

    runs = [read_row(folder) for folder in find_runs(folders)]
    models = by_model(runs)
    if not models:
        raise UserError(f"{folders[0]} holds no finished state-tracking run; train some with `titan-dp state-tracking train`")
    test = models[0]["chosen"]["test"]
    title = f"{test.problem}, trained on words of up to {test.train_length} symbols"
    rows = table(models)
    show(title, rows, details=("parameters", "median of seeds", "validation", "steps to solve", "95 % interval"))
    if more := len(runs) - sum(model["seeds"] for model in models):
        print_text(f"{more} more run(s), of models without a finished one, are not in the table")
    out.mkdir(parents=True, exist_ok=True)
    found = [_as_json(model) for model in models]
    write_json(out / _FILES[0], {"task": test.problem, "train_length": test.train_length, "models": found})
    lines = [list(rows), ["---"] * len(rows.columns), *rows.values.tolist()]
    text = "".join("| " + " | ".join(cells) + " |\n" for cells in lines)
    write_atomically(out / _FILES[1], lambda file: file.write(text.encode()))
    _draw(models, title, out / _FILES[2])
    print_written(*(out / name for name in _FILES))
    if test.answers_everywhere:  # a group's words, which can be looked into
        best = max(models, key=lambda model: model["solved"] / model["seeds"])["chosen"]["folder"]
        print_next("see what the best run does", f"titan-dp state-tracking inspect {shlex.quote(str(best))}")


# -- reading -----------------------------------------------------------------------------------------------------------


def read_row(folder: Path) -> dict[str, Any]:
    """The row of one run; of one that is not finished without what follows "finished".

    "seconds" are those of training, "solved_seconds" those up to the last log line before "solved_step", which is the first
    validation that reached `state_tracking.solved_accuracy`; None if the last one did not: a run may fall back. "steps" are
    those done. "data_wait" is the largest share of the time between two log lines that training waited for data, the first
    line left out. "householder_steps" is the last mean number of steps per token that a router took. "validations" are
    records of metrics.jsonl.

    Raises UserError if the run is not one of a state-tracking task, or cut off.
    """
    import numpy as np
    from pandas import DataFrame

    from titan_dp.studies.report.read import read_config

    c, facts = read_config(folder), read_run(folder)
    if c.data.source != "state_tracking":
        raise UserError(f"{folder} was trained on text; name folders of `titan-dp state-tracking train`")
    row = {"folder": folder, "model": c.model, "settings": _without_seeds(c), "finished": False}
    if facts is None or not is_finished(folder) or not (folder / FILE).exists():
        return row
    try:
        records = read_records(folder)
    except OSError as error:
        raise UserError(f"{folder / 'metrics.jsonl'} cannot be read ({error}); train the run again") from error
    steps = DataFrame([r for r in records if {"loss", "step_seconds", "data_wait"} <= r.keys()])
    validations = [r for r in records if "validation_sequence_accuracy" in r]
    if steps.empty:
        raise UserError(f"{folder / 'metrics.jsonl'} holds no record of a step; train the run again")
    if not validations:
        raise UserError(f"{folder} was never validated; train it with validation.enable = true")
    seconds = (np.diff(steps["step"], prepend=0) * steps["step_seconds"]).cumsum()
    wanted = c.state_tracking.solved_accuracy
    reached = [r["step"] for r in validations if r["validation_sequence_accuracy"] >= wanted]
    solved_step = reached[0] if reached[-1:] == [validations[-1]["step"]] else None
    router = steps["householder_steps"].iloc[-1] if "householder_steps" in steps else math.nan
    return row | {
        "finished": True,
        "parameters": facts["parameters"],
        "steps": facts["step"],
        "seconds": float(seconds.iloc[-1]),
        "data_wait": float(steps["data_wait"][1:].max()) if len(steps) > 1 else 0.0,
        "householder_steps": None if math.isnan(router) else float(router),
        "solved_step": solved_step,
        "solved": solved_step is not None,
        "solved_seconds": float(seconds[steps["step"] <= solved_step].max()) if solved_step is not None else None,
        "validations": validations,
        "test": read_length_test(folder),
    }


def _without_seeds(c: config.Config) -> str:
    seedless = {"debug": c.debug.model_copy(update={"seed": 0}), "data": c.data.model_copy(update={"seed": 0})}
    return identity(c.model_copy(update=seedless))


# -- the seeds of a model ----------------------------------------------------------------------------------------------


def by_model(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Models in the order in which they come: runs that differ only in their seeds. A model without a finished run is left out.

    "runs" are those that are finished, "chosen" the one that stands for them, "unfinished" the number of those that were cut
    off, diverged, or are on their way. "interval" is the 95 % Clopper-Pearson interval (exact, for few seeds) of the chance
    that a seed solves the task. There a run that is not finished counts as one that did not: to leave out those that diverged
    would flatter a model.

    Raises UserError if the runs are of several tasks or training lengths.
    """
    from scipy.stats import binomtest

    finished = [run for run in runs if run["finished"]]
    tests = [run["test"] for run in finished]
    tasks = {f"{t.problem}, words of {t.train_length}, tested to {t.lengths[-1]}" for t in tests}
    if len(tasks) > 1:
        raise UserError(f"the runs are of several tasks ({'; '.join(sorted(tasks))}); report one at a time")
    models = []
    for settings in dict.fromkeys(run["settings"] for run in finished):
        members = [run for run in finished if run["settings"] == settings]
        seeds, solved = sum(run["settings"] == settings for run in runs), sum(run["solved"] for run in members)
        interval = binomtest(solved, seeds).proportion_ci(0.95, method="exact")
        found = {"model": _name(members[0]["model"]), "solved": solved, "seeds": seeds, "unfinished": seeds - len(members)}
        found |= {"interval": (float(interval.low), float(interval.high)), "chosen": min(members, key=_rank)}
        models.append(found | {"runs": members})
    names = [model["model"] for model in models]
    for model in models:
        if names.count(model["model"]) > 1:
            model["model"] += f" ({model['runs'][0]['folder']})"
    return models


def _name(c: config.Model) -> str:
    return label(c) + (f", {c.num_hidden_layers} layers" if c.num_hidden_layers > 1 else "")


def _rank(run: dict[str, Any]) -> tuple[float, float]:
    """Lowest for the run that validates best: by words all right, then by loss, one that is not finite last."""
    last = run["validations"][-1]
    loss = last["validation_loss"]
    return -last["validation_sequence_accuracy"], loss if loss is not None and math.isfinite(loss) else math.inf


# -- what is shown -----------------------------------------------------------------------------------------------------


def table(models: list[dict[str, Any]]) -> Any:
    """A frame of text with one row per model."""
    from pandas import DataFrame

    rows = []
    has_router = any(run["householder_steps"] is not None for model in models for run in model["runs"])
    for model in models:
        chosen, (low, high) = model["chosen"], model["interval"]
        test, steps = chosen["test"], [run["solved_step"] for run in model["runs"] if run["solved"]]
        unfinished = f" ({model['unfinished']} unfinished)" if model["unfinished"] else ""
        row = {
            "model": model["model"],
            "parameters": f"{chosen['parameters']:,}",
            "seeds solved": f"{model['solved']} of {model['seeds']}{unfinished}",
            "95 % interval": f"{low:.0%} to {high:.0%}",
            "steps to solve": f"{median(steps):,.0f}" if steps else "never",
            "validation": f"{chosen['validations'][-1]['validation_sequence_accuracy']:.1%}",
        }
        if lengths := _lengths(test):
            row |= {f"right at {n}": f"{test.sequence_accuracy(n):.1%}" for n in lengths}
        else:
            row["scaled accuracy"] = f"{test.scaled_accuracy():.3f}"
            row["median of seeds"] = f"{median(run['test'].scaled_accuracy() for run in model['runs']):.3f}"
        if has_router:
            used, c = chosen["householder_steps"], chosen["model"]
            always = f"{c.num_householder}" if "adaptive_householder" in MIXERS[c.mixer].uses.split() else ""
            row["steps per token"] = always if used is None else f"{used:.2f}"
        rows.append(row)
    return DataFrame(rows)


def _lengths(test: LengthTest) -> list[int]:
    """Once, twice and four times the training length, if words are tested at every symbol."""
    lengths = (test.train_length, 2 * test.train_length, 4 * test.train_length) if test.answers_everywhere else ()
    return [n for n in lengths if n <= test.lengths[-1]]


def _as_json(model: dict[str, Any]) -> dict[str, Any]:
    def of_run(run: dict[str, Any]) -> dict[str, Any]:
        test = run["test"]
        return {
            "run": run["folder"].name,
            **{name: run[name] for name in _IN_JSON},
            "seconds": round(run["seconds"], 1),
            "solved_seconds": run["solved_seconds"] and round(run["solved_seconds"], 1),
            "validation": run["validations"][-1],
            "test": {str(n): test.sequence_accuracy(n) for n in _lengths(test)} or {"scaled_accuracy": test.scaled_accuracy()},
        }

    return model | {"chosen": model["chosen"]["folder"].name, "runs": [of_run(run) for run in model["runs"]]}


def _draw(models: list[dict[str, Any]], title: str, path: Path) -> None:
    """Accuracy by length at the left, by step at the right."""
    figure, (by_length, by_step) = subplots(1, 2, figsize=(12, 4.2))
    for number, model in enumerate(models):
        for run in model["runs"]:
            chosen = run is model["chosen"]
            look: dict[str, Any] = {"color": f"C{number}", "lw": 2 if chosen else 0.8, "alpha": 1 if chosen else 0.5}
            by_length.plot(*_curve(run["test"]), **look, label=model["model"] if chosen else None)
            steps = [r["step"] for r in run["validations"]]
            by_step.plot(steps, [r["validation_token_accuracy"] for r in run["validations"]], **look)
    test = models[0]["chosen"]["test"]
    by_length.axvline(test.train_length, color="grey", ls=":", lw=1)
    by_length.annotate("trained up to here", (test.train_length, 0.5), rotation=90, ha="right", va="center", color="grey")
    what = "words right so far" if test.answers_everywhere else "strings right"
    by_length.set(xlabel="symbols", ylabel=what, title=title, ylim=(-0.03, 1.03))
    by_step.axhline(test.chance, color="grey", ls=":", lw=1)
    by_step.set(xlabel="step", ylabel="validation answers right", title="training (dotted: guessing)", ylim=(-0.03, 1.03))
    by_length.legend(loc="best", fontsize="small")
    save_figure(figure, path)


def _curve(test: LengthTest) -> tuple[list[float], list[float]]:
    """Lengths and accuracies; of strings, over windows of 16 lengths."""
    if test.answers_everywhere:
        return [float(n) for n in test.lengths], [r / a for r, a in zip(test.right_so_far, test.asked, strict=True)]
    windows = [(low, low + 15) for low in range(test.lengths[0], test.lengths[-1] + 1, 16)]
    return [sum(w) / 2 for w in windows], [test.token_accuracy(*w) for w in windows]
