"""`titan-dp state-tracking report FOLDERS`: the table and the curves of trained models, from their run folders.

Training is bistable: most runs stay on a plateau or leave it abruptly. So the table says how many seeds solved the task, with
a confidence interval, and never shows a mean of accuracies. The run that stands for a model is the one that validates best on
words of the training lengths; the test on longer words chooses nothing. Unfinished runs are counted, not hidden.

Prints the table and writes it as summary.json and summary.md, with curves.png: the accuracy at every length of the run that
stands for each model, all seeds in thin lines, and how accuracy came over the steps.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

from titan_dp import config
from titan_dp.config.load import config_from_toml
from titan_dp.errors import UserError
from titan_dp.files import check_own, write_atomically, write_json
from titan_dp.output import print_table, save_figure, subplots
from titan_dp.studies.state_tracking.models import label
from titan_dp.train.length_test import FILE, LengthTest, read_length_test
from titan_dp.train.run_folder import identity, is_finished, read_records, read_run

# -- one run -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """A finished run."""

    folder: Path
    config: config.Config
    parameters: int
    steps: int
    """Done; fewer than planned if the run stopped when it was solved."""
    seconds: float
    """Of training, without validation and checkpoints."""
    data_wait: float
    """Largest fraction of the time between two log lines that training waited for data, the first line left out."""
    householder_steps: float | None
    """Last mean number of steps per token that a router took."""
    solved_step: int | None
    """The first validation that reached `state_tracking.solved_accuracy`; None if the last one did not: a run may fall back."""
    solved_seconds: float | None
    """Of training up to the last log line before `solved_step`."""
    validations: list[dict[str, Any]]
    """Records of metrics.jsonl, in order: step, validation_loss, validation_token_accuracy, validation_sequence_accuracy."""
    test: LengthTest

    @property
    def last(self) -> dict[str, Any]:
        return self.validations[-1]

    @property
    def solved(self) -> bool:
        return self.solved_step is not None


def read_config(folder: Path) -> config.Config:
    """Of a run. Raises UserError if it is not one of a state-tracking task."""
    loaded = config_from_toml((folder / "config.toml").read_text(), str(folder / "config.toml"))
    if loaded.data.source != "state_tracking":
        raise UserError(f"{folder} was trained on text; name folders of `titan-dp state-tracking train`")
    return loaded


def read_outcome(folder: Path) -> Outcome | None:
    """The run in `folder`; None if it is not finished. Raises UserError if it is not one of a state-tracking task."""
    loaded, facts = read_config(folder), read_run(folder)
    if facts is None or not is_finished(folder) or not (folder / FILE).exists():
        return None
    try:
        records = read_records(folder)
    except OSError as error:
        raise UserError(f"{folder / 'metrics.jsonl'} cannot be read ({error}); train the run again") from error
    steps = [r for r in records if {"loss", "step_seconds", "data_wait"} <= r.keys()]
    validations = [r for r in records if "validation_sequence_accuracy" in r]
    if not steps:
        raise UserError(f"{folder / 'metrics.jsonl'} holds no record of a step; train the run again")
    if not validations:
        raise UserError(f"{folder} was never validated; train it with validation.enable = true")
    ends = [record["step"] for record in steps]
    befores = [0, *ends[:-1]]
    seconds = list(accumulate((end - before) * r["step_seconds"] for before, end, r in zip(befores, ends, steps, strict=True)))
    wanted = loaded.state_tracking.solved_accuracy
    reached = [r["step"] for r in validations if r["validation_sequence_accuracy"] >= wanted]
    solved_step = reached[0] if reached[-1:] == [validations[-1]["step"]] else None
    up_to = [s for end, s in zip(ends, seconds, strict=True) if solved_step is not None and end <= solved_step]
    return Outcome(
        folder=folder,
        config=loaded,
        parameters=facts["parameters"],
        steps=facts["step"],
        seconds=seconds[-1],
        data_wait=max([r["data_wait"] for r in steps[1:]], default=0.0),
        householder_steps=steps[-1].get("householder_steps"),
        solved_step=solved_step,
        solved_seconds=None if solved_step is None else max(up_to, default=0.0),
        validations=validations,
        test=read_length_test(folder),
    )


# -- the seeds of a model ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """The seeds of one model on one task."""

    label: str
    outcomes: list[Outcome]
    unfinished: int = 0
    """Runs that were cut off, diverged, or are on their way: not solved, as far as is known."""

    @property
    def seeds(self) -> int:
        return len(self.outcomes) + self.unfinished

    @property
    def solved(self) -> int:
        return sum(outcome.solved for outcome in self.outcomes)

    def escape_interval(self) -> tuple[float, float]:
        """95 % Clopper-Pearson interval of the probability that a seed solves the task (exact, for few seeds).

        A run that is not finished counts as one that did not: to leave out those that diverged would flatter a model.
        """
        from scipy.stats import binomtest

        interval = binomtest(self.solved, self.seeds).proportion_ci(0.95, method="exact")
        return float(interval.low), float(interval.high)

    @property
    def chosen(self) -> Outcome:
        """The run that validates best: by words all right, then by loss, one that is not finite last."""

        def key(outcome: Outcome) -> tuple[float, float]:
            loss = outcome.last["validation_loss"]
            known = loss is not None and math.isfinite(loss)
            return -outcome.last["validation_sequence_accuracy"], loss if known else math.inf

        return min(self.outcomes, key=key)


def summarise(outcomes: Sequence[Outcome], unfinished: Sequence[config.Config] = ()) -> list[Summary]:
    """By model, in the order in which they come: runs that differ only in their seeds.

    `unfinished` are the settings of runs without an outcome; those of a model without any are left out.

    Raises UserError if the runs are of several tasks or training lengths.
    """
    tasks = {f"{o.test.problem}, words of {o.test.train_length}, tested to {o.test.lengths[-1]}" for o in outcomes}
    if len(tasks) > 1:
        raise UserError(f"the runs are of several tasks ({'; '.join(sorted(tasks))}); report one at a time")
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(_without_seeds(outcome.config), []).append(outcome)
    without = [_without_seeds(c) for c in unfinished]
    names = [_name(runs[0].config.model) for runs in groups.values()]
    return [
        Summary(name if names.count(name) == 1 else f"{name} ({runs[0].folder})", runs, without.count(key))
        for name, (key, runs) in zip(names, groups.items(), strict=True)
    ]


def _without_seeds(c: config.Config) -> str:
    seedless = {"debug": c.debug.model_copy(update={"seed": 0}), "data": c.data.model_copy(update={"seed": 0})}
    return identity(c.model_copy(update=seedless))


def _name(c: config.Model) -> str:
    return label(c) + (f", {c.num_hidden_layers} layers" if c.num_hidden_layers > 1 else "")


# -- the command -------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", type=Path, help="run folders, or folders of them, of one task")
    parser.add_argument("--out", type=Path, help="where to write (default: the folder of the first runs)")


def run(args: argparse.Namespace) -> int:
    first = args.folders[0]
    report(args.folders, args.out or (first.parent if (first / "config.toml").exists() else first))
    return 0


def check_packages() -> None:
    """Raises UserError if a package that reports need is missing; to be called before hours are spent."""
    if missing := [name for name in ("scipy", "matplotlib") if find_spec(name) is None]:
        raise UserError(f"titan-dp state-tracking needs {' and '.join(missing)}: pip install 'titan_dp[scaling]'")


def check_out(out: Path) -> None:
    """Raises UserError if a report would write over a file of somebody else; to be called before hours are spent."""
    check_own(out, "summary.json", {"task", "train_length", "models"}, ("summary.md", "curves.png"))


def report(folders: list[Path], out: Path) -> list[Summary]:
    """Read, print and write. Raises UserError if there is no finished run, or a file of somebody else in the way."""
    from rich.table import Table

    check_packages()
    check_out(out)
    runs = [run for folder in folders for run in ([folder] if (folder / "config.toml").exists() else _runs_in(folder))]
    outcomes = {run: read_outcome(run) for run in runs}
    finished = [outcome for outcome in outcomes.values() if outcome is not None]
    if not finished:
        raise UserError(f"{folders[0]} holds no finished state-tracking run; train some with `titan-dp state-tracking train`")
    summaries = summarise(finished, [read_config(run) for run, outcome in outcomes.items() if outcome is None])
    rows = table(summaries)
    shown = Table(*rows[0], title=_title(summaries))
    for row in rows:
        shown.add_row(*row.values())
    print_table(shown)
    if unfinished := len(outcomes) - sum(summary.seeds for summary in summaries):
        print(f"{unfinished} more run(s), of models without a finished one, are not in the table")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "summary.json", _as_json(summaries))
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    text = "".join("| " + " | ".join(cells) + " |\n" for cells in lines)
    write_atomically(out / "summary.md", lambda file: file.write(text.encode()))
    _draw(summaries, out / "curves.png")
    print(f"written: {out / 'summary.json'}, summary.md, curves.png")
    return summaries


def _runs_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist; give run folders, or a folder of them")
    return sorted(path.parent for path in folder.glob("*/config.toml"))


def _title(summaries: list[Summary]) -> str:
    test = summaries[0].outcomes[0].test
    return f"{test.problem}, trained on words of up to {test.train_length} symbols"


def table(summaries: list[Summary]) -> list[dict[str, str]]:
    """One row per model, by header."""
    rows = []
    has_router = any(outcome.householder_steps is not None for s in summaries for outcome in s.outcomes)
    for summary in summaries:
        chosen, (low, high) = summary.chosen, summary.escape_interval()
        steps = [outcome.solved_step for outcome in summary.outcomes if outcome.solved_step is not None]
        row = {
            "model": summary.label,
            "parameters": f"{chosen.parameters:,}",
            "seeds solved": f"{summary.solved} of {summary.seeds}"
            + (f" ({summary.unfinished} unfinished)" if summary.unfinished else ""),
            "95 % interval": f"{low:.0%} to {high:.0%}",
            "steps to solve": f"{median(steps):,.0f}" if steps else "never",
            "validation": f"{chosen.last['validation_sequence_accuracy']:.1%}",
        }
        if lengths := _lengths(chosen):
            row |= {f"right at {n}": f"{chosen.test.sequence_accuracy(n):.1%}" for n in lengths}
        else:
            row["scaled accuracy"] = f"{chosen.test.scaled_accuracy():.3f}"
            row["median of seeds"] = f"{median(outcome.test.scaled_accuracy() for outcome in summary.outcomes):.3f}"
        if has_router:
            model, used = chosen.config.model, chosen.householder_steps
            always = f"{model.num_householder}" if model.mixer == "deltaproduct" else ""
            row["steps per token"] = always if used is None else f"{used:.2f}"
        rows.append(row)
    return rows


def _lengths(outcome: Outcome) -> list[int]:
    """Once, twice and four times the training length, if words are tested at every symbol."""
    test = outcome.test
    if not test.answers_everywhere:
        return []
    return [n for n in (test.train_length, 2 * test.train_length, 4 * test.train_length) if n <= test.lengths[-1]]


def _as_json(summaries: list[Summary]) -> dict[str, Any]:
    models = [
        {
            "model": summary.label,
            "solved": summary.solved,
            "seeds": summary.seeds,
            "unfinished": summary.unfinished,
            "interval": summary.escape_interval(),
            "chosen": summary.chosen.folder.name,
            "runs": [_run_json(outcome) for outcome in summary.outcomes],
        }
        for summary in summaries
    ]
    test = summaries[0].outcomes[0].test
    return {"task": test.problem, "train_length": test.train_length, "models": models}


def _run_json(outcome: Outcome) -> dict[str, Any]:
    names = ("parameters", "steps", "data_wait", "solved_step", "solved", "householder_steps")
    test = outcome.test
    return {
        "run": outcome.folder.name,
        **{name: getattr(outcome, name) for name in names},
        "seconds": round(outcome.seconds, 1),
        "solved_seconds": outcome.solved_seconds and round(outcome.solved_seconds, 1),
        "validation": outcome.last,
        "test": {str(n): test.sequence_accuracy(n) for n in _lengths(outcome)} or {"scaled_accuracy": test.scaled_accuracy()},
    }


def _draw(summaries: list[Summary], path: Path) -> None:
    """Accuracy by length at the left, by step at the right."""
    figure, (by_length, by_step) = subplots(1, 2, figsize=(12, 4.2))
    for number, summary in enumerate(summaries):
        for outcome in summary.outcomes:
            chosen = outcome is summary.chosen
            look: dict[str, Any] = {"color": f"C{number}", "lw": 2 if chosen else 0.8, "alpha": 1 if chosen else 0.5}
            by_length.plot(*_curve(outcome.test), **look, label=summary.label if chosen else None)
            steps = [r["step"] for r in outcome.validations]
            by_step.plot(steps, [r["validation_token_accuracy"] for r in outcome.validations], **look)
    test = summaries[0].outcomes[0].test
    by_length.axvline(test.train_length, color="grey", ls=":", lw=1)
    by_length.annotate("trained up to here", (test.train_length, 0.5), rotation=90, ha="right", va="center", color="grey")
    what = "words right so far" if test.answers_everywhere else "strings right"
    by_length.set(xlabel="symbols", ylabel=what, title=_title(summaries), ylim=(-0.03, 1.03))
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
