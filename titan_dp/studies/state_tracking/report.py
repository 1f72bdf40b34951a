"""`titan-dp state-tracking report FOLDERS`: the table and the curves of trained models, from their run folders.

Training is bistable: most runs stay on a plateau or leave it abruptly. So the table says how many seeds solved the task, with
a confidence interval, and never shows a mean of accuracies. The run that stands for a model is the one that validates best on
words of the training lengths; the test on longer words chooses nothing. Unfinished runs are counted, not hidden.

Prints a table per task, and one of models by tasks if there are several, and writes them as summary.json and summary.md, with
curves.png: the accuracy at every length of the run that stands for each model, all seeds in thin lines, and how accuracy came
over the steps. Runs are found and their settings read as `titan-dp report` does it.
"""

from __future__ import annotations

import argparse
import math
import shlex
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from titan_dp import config
from titan_dp.config.mixers import MIXERS
from titan_dp.data.synthetic.groups import parse_group
from titan_dp.errors import UserError, counted, require
from titan_dp.files import check_own, make_folder, write_atomically, write_json
from titan_dp.output import add_format_option, print_next, print_text, print_written, save_figure, subplots, thousands
from titan_dp.studies.state_tracking.models import label
from titan_dp.studies.state_tracking.theory import expected
from titan_dp.train.length_test import FILE, LengthTest, read_length_test
from titan_dp.train.run_folder import identity, is_finished, read_records, read_run

_FILES = ("summary.json", "summary.md")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
_MARKERS = "os^DvP*"
_MARKED = 4
"""Markers on a line."""
_IN_JSON = ("parameters", "steps", "data_wait", "solved_step", "solved", "householder_steps")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", type=Path, help="run folders, or folders of them")
    parser.add_argument("--out", type=Path, help="where to write (default: the folder of the first runs)")
    add_format_option(parser)


def run(args: argparse.Namespace) -> int:
    first = args.folders[0]
    report(args.folders, args.out or (first.parent if (first / "config.toml").exists() else first), args.format)
    return 0


def check_possible(out: Path, ending: str) -> None:
    """Raises UserError if a package that reports need is missing, or a report would write over a file of somebody else.

    To be called before hours are spent.
    """
    require("titan-dp state-tracking", "pandas", "pyarrow", "scipy", "matplotlib")
    check_own(out, _FILES[0], {"tasks"}, (*_FILES[1:], f"curves.{ending}"))


def report(folders: list[Path], out: Path, ending: str) -> None:
    """Read, print and write, the figure in the format of `ending`.

    Raises UserError if there is no finished run, or a file of somebody else in the way.
    """
    check_possible(out, ending)
    from titan_dp.studies.report.read import find_runs
    from titan_dp.studies.report.tables import show

    runs = [read_row(folder) for folder in find_runs(folders)]
    tasks = by_task(runs)
    if not tasks:
        raise UserError(f"{folders[0]} holds no finished state-tracking run; train some with `titan-dp state-tracking train`")
    titled = {task.title: table(task) for task in tasks}
    if len(tasks) > 1:
        titled["All tasks: seeds that solved it, or the scaled accuracy"] = overview(tasks)
    for title, rows in titled.items():
        show(title, rows, details=("parameters", "median of seeds", "validation", "left", "steps to solve", "95 % interval"))
    if more := len(runs) - sum(model["seeds"] for task in tasks for model in task.models):
        print_text(f"{counted(more, 'more run')} of models without a finished one, not in the table")
    make_folder(out)
    write_json(out / _FILES[0], {"tasks": [_as_json(task) for task in tasks]})
    text = "\n".join(_markdown(title if len(tasks) > 1 else "", rows) for title, rows in titled.items())
    write_atomically(out / _FILES[1], lambda file: file.write(text.encode()))
    figure = out / f"curves.{ending}"
    _draw(tasks, figure)
    print_written(*(out / name for name in _FILES), figure)
    if groups := [task for task in tasks if task.test.answers_everywhere]:  # words of a group can be looked into
        best = max(groups[0].models, key=lambda model: model["solved"] / model["seeds"])["chosen"]["folder"]
        print_next("see what the best run does", f"titan-dp state-tracking inspect {shlex.quote(str(best))}")


def _markdown(title: str, rows: Any) -> str:
    lines = [list(rows), ["---"] * len(rows.columns), *rows.values.tolist()]
    heading = f"## {title}\n\n" if title else ""
    return heading + "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


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
    row = {"folder": folder, "model": c.model, "task": c.state_tracking, "settings": _without_seeds(c), "finished": False}
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


# -- tasks, and the seeds of a model -----------------------------------------------------------------------------------


class Task(NamedTuple):
    """Runs that were asked the same."""

    name: str
    """As in the configuration: S3, parity."""
    title: str
    """What was asked, in words, with the lengths."""
    test: LengthTest
    """That of one run: its lengths and what guessing gets are those of all."""
    models: list[dict[str, Any]]


def by_task(runs: list[dict[str, Any]]) -> list[Task]:
    """Tasks in the order in which they come, each with its models; those without a finished run are left out."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        if run["finished"]:
            t = run["test"]
            title = f"{t.problem}, trained on words of up to {t.train_length} symbols, tested to {t.lengths[-1]}"
            found.setdefault(title, []).append(run)
    settings = {run["settings"]: title for title, members in found.items() for run in members}
    tasks = []
    for title, members in found.items():
        models = by_model([run for run in runs if settings.get(run["settings"]) == title])
        tasks.append(Task(Path(members[0]["task"].task).stem, title, members[0]["test"], models))
    return tasks


def by_model(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Models of one task in the order in which they come: runs that differ only in their seeds.

    A model without a finished run is left out. "runs" are those that are finished, "chosen" the one that stands for them,
    "unfinished" the number of those that were cut off, diverged, or are on their way. "interval" is the 95 % Clopper-Pearson
    interval (exact, for few seeds) of the chance that a seed solves the task. There a run that is not finished counts as one
    that did not: to leave out those that diverged would flatter a model.
    """
    from scipy.stats import binomtest

    finished = [run for run in runs if run["finished"]]
    models = []
    for settings in dict.fromkeys(run["settings"] for run in finished):
        members = [run for run in finished if run["settings"] == settings]
        seeds, solved = sum(run["settings"] == settings for run in runs), sum(run["solved"] for run in members)
        interval = binomtest(solved, seeds).proportion_ci(0.95, method="exact")
        found = {"model": _name(members[0]["model"]), "solved": solved, "seeds": seeds, "unfinished": seeds - len(members)}
        found |= {"interval": (float(interval.low), float(interval.high)), "chosen": min(members, key=_rank)}
        models.append(found | {"runs": members})
    names = [model["model"] for model in models]
    first = [model["runs"][0]["folder"] for model in models]
    short = len({folder.name for folder in first}) == len(first)
    for model, folder in zip(models, first, strict=True):
        if names.count(model["model"]) > 1:
            model["model"] += f" ({folder.name if short else folder})"
    return models


def _name(c: config.Model) -> str:
    stretched = f", beta_stretch {c.beta_stretch:g}" if c.beta_stretch else ""
    return label(c) + stretched + (f", {c.num_hidden_layers} layers" if c.num_hidden_layers > 1 else "")


def left_plateau(run: dict[str, Any]) -> bool:
    """Whether a run of a group's words knows more of the product than a quotient group can tell.

    Judged by the test's answers in the second half of the training length. Who knows the product's image in G / N, such as the
    sign of a permutation, is right once in |N| times; the smallest N gives most. Ten points above that count as more.
    """
    test: LengthTest = run["test"]
    smallest = parse_group(run["task"].task).smallest_normal_subgroup
    return test.token_accuracy(test.train_length // 2 + 1, test.train_length) > 1 / smallest + 0.1


def _rank(run: dict[str, Any]) -> tuple[float, float]:
    """Lowest for the run that validates best: by words all right, then by loss, one that is not finite last."""
    last = run["validations"][-1]
    loss = last["validation_loss"]
    return -last["validation_sequence_accuracy"], loss if loss is not None and math.isfinite(loss) else math.inf


# -- what is shown -----------------------------------------------------------------------------------------------------


def table(task: Task) -> Any:
    """A frame of text with one row per model."""
    from pandas import DataFrame

    rows, models = [], task.models
    # A report needs run folders alone: not the file of a group's table, which may be gone.
    named = task.test.answers_everywhere and not models[0]["chosen"]["task"].task.endswith(".csv")
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
            "left": f"{sum(map(left_plateau, model['runs']))} of {model['seeds']}" if named else "",
            "steps to solve": f"{median(steps):,.0f}" if steps else "never",
            "validation": f"{chosen['validations'][-1]['validation_sequence_accuracy']:.1%}",
        }
        if lengths := _lengths(test):
            row |= {f"right at {n}": f"{test.sequence_accuracy(n):.1%}" for n in lengths}
            row |= {"theory": expected(chosen["task"], chosen["model"])}
        else:
            row["scaled accuracy"] = f"{test.scaled_accuracy():.3f}"
            row["median of seeds"] = f"{median(run['test'].scaled_accuracy() for run in model['runs']):.3f}"
        if has_router:
            used, c = chosen["householder_steps"], chosen["model"]
            always = f"{c.num_householder}" if "adaptive_householder" in MIXERS[c.mixer].uses.split() else ""
            row["steps per token"] = always if used is None else f"{used:.2f}"
        rows.append(row)
    frame = DataFrame(rows)
    return frame.drop(columns=[name for name in ("left", "theory") if name in frame and not any(frame[name])])


def overview(tasks: list[Task]) -> Any:
    """A frame of text: models by tasks, how many seeds solved a group and what theory says, or a language's accuracy."""
    from pandas import DataFrame

    cells: dict[str, dict[str, str]] = {}
    for task in tasks:
        twice = sum(other.name == task.name for other in tasks) > 1
        for model in task.models:
            run = model["chosen"]
            if task.test.answers_everywhere:
                said = expected(run["task"], run["model"])
                text = f"{model['solved']} of {model['seeds']}" + (f" ({said})" if said else "")
            else:
                text = f"{run['test'].scaled_accuracy():.2f}"
            cells.setdefault(model["model"], {})[f"{task.name} to {task.test.train_length}" if twice else task.name] = text
    frame = DataFrame(cells).T.fillna("")
    return frame.rename_axis("model").reset_index()


def _lengths(test: LengthTest) -> list[int]:
    """Once, twice and four times the training length, if words are tested at every symbol."""
    lengths = (test.train_length, 2 * test.train_length, 4 * test.train_length) if test.answers_everywhere else ()
    return [n for n in lengths if n <= test.lengths[-1]]


def _as_json(task: Task) -> dict[str, Any]:
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

    def of_model(model: dict[str, Any]) -> dict[str, Any]:
        return model | {"chosen": model["chosen"]["folder"].name, "runs": [of_run(run) for run in model["runs"]]}

    models = [of_model(model) for model in task.models]
    return {"name": task.name, "task": task.test.problem, "train_length": task.test.train_length, "models": models}


def _draw(tasks: list[Task], path: Path) -> None:
    """Accuracy by length above, by step below, one column per task; beside each other if there is one task.

    Models differ in dashes and markers, too: equal ones show.
    """
    names = list(dict.fromkeys(model["model"] for task in tasks for model in task.models))
    keys = math.ceil((len(names) + 4) / 3)
    shape, size = ((2, len(tasks)), (3.4 * len(tasks), 6.4)) if len(tasks) > 1 else ((1, 2), (10, 4.2))
    figure, grid = subplots(*shape, figsize=(max(size[0], 10), size[1] + 0.22 * keys), sharey=True, squeeze=False)
    columns = [(grid[0, i], grid[1, i]) for i in range(len(tasks))] if len(tasks) > 1 else [tuple(grid[0])]
    handles: dict[str, Any] = {}
    for task, axes in zip(tasks, columns, strict=True):
        _draw_task(task, names, axes, handles)
    figure.suptitle(tasks[0].title[:1].upper() + tasks[0].title[1:] if len(tasks) == 1 else "")
    figure.legend(
        handles=list(handles.values()), loc="outside lower center", ncols=3, fontsize="small", frameon=False, handlelength=4.5
    )
    save_figure(figure, path)


def _draw_task(task: Task, names: list[str], pair: Any, handles: dict[str, Any]) -> None:
    """Draw one task into a `pair` of axes; `handles` gets the legend's entries by their texts."""
    test, (by_length, by_step) = task.test, pair
    for model in task.models:
        number = names.index(model["model"])
        look: dict[str, Any] = {"color": f"C{number}", "ls": _DASHES[number % len(_DASHES)]}
        chosen: dict[str, Any] = look | {"lw": 1.8, "marker": _MARKERS[number % len(_MARKERS)], "ms": 5}
        for run in sorted(model["runs"], key=lambda run: run is model["chosen"]):
            for axes, (x, y) in ((by_length, _curve(run["test"])), (by_step, _validated(run))):
                if run is model["chosen"]:
                    axes.plot(x, y, **chosen, markevery=_places(len(x), number, len(names)))
                else:
                    axes.plot(x, y, **look, lw=0.8, alpha=0.6)
        handles[model["model"]] = by_length.plot([], [], **chosen, label=model["model"])[0]

    def explain(text: str, line: Any) -> None:
        line.set_label(text)
        handles.setdefault(text, line)

    if any(len(model["runs"]) > 1 for model in task.models):
        explain("thick: the seed that validates best", by_length.plot([], [], color="0.4", lw=1.8)[0])
        explain("thin: the other seeds", by_length.plot([], [], color="0.4", lw=0.8)[0])
    length = f"longest training {'words' if test.answers_everywhere else 'strings'}, {test.train_length}"
    explain(f"vertical: {length}", by_length.axvline(test.train_length, color="0.3", ls=":", lw=1.2))
    explain("horizontal: guessing", by_step.axhline(test.chance, color="0.6", ls="-.", lw=1.2))
    what = "words right so far" if test.answers_everywhere else "strings answered right"
    symbols = "symbols read" if test.answers_everywhere else "symbols in a string"
    by_length.set(xlabel=symbols, ylabel="share right", title=f"{task.name}, test: {what}")
    by_step.set(xlabel="training step", title="validation: answers right", ylim=(-0.03, 1.03))
    thousands(by_step.xaxis)
    for axes in (by_length, by_step):
        axes.title.set_fontsize("medium")
        axes.set_xlim(left=0)


def _places(points: int, number: int, models: int) -> list[int]:
    """Where the markers of a model's line stand: between those of the other models, also where the lines are one."""
    if points <= 4:
        return list(range(points))
    return sorted({round((i + (number + 0.5) / models) * (points - 1) / _MARKED) for i in range(_MARKED)})


def _validated(run: dict[str, Any]) -> tuple[list[int], list[float]]:
    records = run["validations"]
    return [r["step"] for r in records], [r["validation_token_accuracy"] for r in records]


def _curve(test: LengthTest) -> tuple[list[float], list[float]]:
    """Lengths and accuracies; of strings, over windows of 16 lengths."""
    if test.answers_everywhere:
        return [float(n) for n in test.lengths], [r / a for r, a in zip(test.right_so_far, test.asked, strict=True)]
    windows = [(low, low + 15) for low in range(test.lengths[0], test.lengths[-1] + 1, 16)]
    return [sum(w) / 2 for w in windows], [test.token_accuracy(*w) for w in windows]
