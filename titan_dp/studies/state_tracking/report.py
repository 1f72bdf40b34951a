"""`titan-dp state-tracking report FOLDERS`: the table and the curves of trained models, from their run folders.

Prints the table and writes it as summary.json and summary.md, with curves.png: the accuracy at every length of the run
that validates best, all seeds in thin lines, and how accuracy came over the steps. Unfinished runs are counted, not hidden.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from titan_dp.errors import UserError
from titan_dp.files import check_own, write_atomically, write_json
from titan_dp.output import print_table, save_figure, subplots
from titan_dp.studies.state_tracking.results import Outcome, Summary, read_config, read_outcome, summarise


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", type=Path, help="run folders, or folders of them, of one task")
    parser.add_argument("--out", type=Path, help="where to write (default: the folder of the first runs)")


def run(args: argparse.Namespace) -> int:
    first = args.folders[0]
    report(args.folders, args.out or (first.parent if (first / "config.toml").exists() else first))
    return 0


def check_packages() -> None:
    """Raises UserError where a package that reports need is missing; to be called before hours are spent."""
    if missing := [name for name in ("scipy", "matplotlib") if find_spec(name) is None]:
        raise UserError(f"titan-dp state-tracking needs {' and '.join(missing)}: pip install 'titan_dp[scaling]'")


def check_out(out: Path) -> None:
    """Raises UserError where a report would write over a file of somebody else; to be called before hours are spent."""
    check_own(out, "summary.json", {"task", "train_length", "models"}, ("summary.md", "curves.png"))


def report(folders: list[Path], out: Path) -> list[Summary]:
    """Read, print and write. Raises UserError where there is no finished run, or a file of somebody else in the way."""
    from rich.table import Table

    check_packages()
    check_out(out)
    runs = [run for folder in folders for run in ([folder] if (folder / "config.toml").exists() else _runs_in(folder))]
    outcomes = {run: read_outcome(run) for run in runs}
    finished = [outcome for outcome in outcomes.values() if outcome is not None]
    if not finished:
        raise UserError(f"{folders[0]} holds no finished state-tracking run; train some with `titan-dp state-tracking train`")
    summaries = summarise(finished, [read_config(run) for run, outcome in outcomes.items() if outcome is None])
    headers, rows = table(summaries)
    shown = Table(*headers, title=title(summaries))
    for row in rows:
        shown.add_row(*row)
    print_table(shown)
    if unfinished := len(outcomes) - sum(summary.seeds for summary in summaries):
        print(f"{unfinished} more run(s), of models without a finished one, are not in the table")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "summary.json", as_json(summaries))
    text = "\n".join(["| " + " | ".join(cells) + " |" for cells in (headers, ["---"] * len(headers), *rows)]) + "\n"
    write_atomically(out / "summary.md", lambda file: file.write(text.encode()))
    draw(summaries, out / "curves.png")
    print(f"written: {out / 'summary.json'}, summary.md, curves.png")
    return summaries


def _runs_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist; give run folders, or a folder of them")
    return sorted(path.parent for path in folder.glob("*/config.toml"))


def title(summaries: list[Summary]) -> str:
    test = summaries[0].outcomes[0].test
    return f"{test.problem}, trained on words of up to {test.train_length} symbols"


def table(summaries: list[Summary]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows, one a model."""
    first = summaries[0].outcomes[0]
    lengths = _lengths(first)
    ahead = ["model", "parameters", "seeds solved", "95 % interval", "steps to solve", "validation"]
    headers = [*ahead, *([f"right at {n}" for n in lengths] if lengths else ["scaled accuracy", "median of seeds"])]
    if any(outcome.householder_steps is not None for s in summaries for outcome in s.outcomes):
        headers.append("steps a token")
    rows = []
    for summary in summaries:
        low, high = summary.escape_interval()
        steps = [outcome.solved_step for outcome in summary.outcomes if outcome.solved_step is not None]
        row = [
            summary.label,
            f"{summary.chosen.parameters:,}",
            f"{summary.solved} of {summary.seeds}" + (f" ({summary.unfinished} unfinished)" if summary.unfinished else ""),
            f"{low:.0%} to {high:.0%}",
            f"{median(steps):,.0f}" if steps else "never",
            f"{summary.chosen.last['validation_sequence_accuracy']:.1%}",
        ]
        if lengths:
            row += [f"{summary.chosen.test.sequence_accuracy(n):.1%}" for n in lengths]
        else:
            scaled = [outcome.test.scaled_accuracy() for outcome in summary.outcomes]
            row += [f"{summary.chosen.test.scaled_accuracy():.3f}", f"{median(scaled):.3f}"]
        if "steps a token" in headers:
            used = summary.chosen.householder_steps
            model = summary.chosen.config.model
            always = f"{model.num_householder}" if model.mixer == "deltaproduct" else ""
            row.append(always if used is None else f"{used:.2f}")
        rows.append(row)
    return headers, rows


def _lengths(outcome: Outcome) -> list[int]:
    """Once, twice and four times the training length, where words are tested at every symbol."""
    test = outcome.test
    if not test.answers_everywhere:
        return []
    return [n for n in (test.train_length, 2 * test.train_length, 4 * test.train_length) if n <= test.lengths[-1]]


def as_json(summaries: list[Summary]) -> dict[str, Any]:
    test = summaries[0].outcomes[0].test
    return {
        "task": test.problem,
        "train_length": test.train_length,
        "models": [
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
        ],
    }


def _run_json(outcome: Outcome) -> dict[str, Any]:
    test = outcome.test
    return {
        "run": outcome.folder.name,
        "parameters": outcome.parameters,
        "steps": outcome.steps,
        "seconds": round(max(outcome.seconds.values()), 1),
        "data_wait": outcome.data_wait,
        "solved_step": outcome.solved_step,
        "solved_seconds": outcome.solved_seconds and round(outcome.solved_seconds, 1),
        "solved": outcome.is_solved,
        "householder_steps": outcome.householder_steps,
        "validation": outcome.last,
        "test": {str(n): test.sequence_accuracy(n) for n in _lengths(outcome)}
        or {"scaled_accuracy": outcome.test.scaled_accuracy()},
    }


def draw(summaries: list[Summary], path: Path) -> None:
    """Accuracy by length at the left, by step at the right."""
    figure, (by_length, by_step) = subplots(1, 2, figsize=(12, 4.2))
    for number, summary in enumerate(summaries):
        color = f"C{number}"
        for outcome in summary.outcomes:
            chosen = outcome is summary.chosen
            look: dict[str, Any] = {"color": color, "lw": 2 if chosen else 0.8, "alpha": 1 if chosen else 0.5}
            by_length.plot(*_curve(outcome), **look, label=summary.label if chosen else None)
            steps = [r["step"] for r in outcome.validations]
            by_step.plot(steps, [r["validation_token_accuracy"] for r in outcome.validations], **look)
    test = summaries[0].outcomes[0].test
    by_length.axvline(test.train_length, color="grey", ls=":", lw=1)
    by_length.annotate("trained up to here", (test.train_length, 0.5), rotation=90, ha="right", va="center", color="grey")
    what = "words right so far" if test.answers_everywhere else "strings right"
    by_length.set(xlabel="symbols", ylabel=what, title=title(summaries), ylim=(-0.03, 1.03))
    by_step.axhline(test.chance, color="grey", ls=":", lw=1)
    by_step.set(xlabel="step", ylabel="validation answers right", title="training (dotted: guessing)", ylim=(-0.03, 1.03))
    by_length.legend(loc="best", fontsize="small")
    save_figure(figure, path)


def _curve(outcome: Outcome) -> tuple[list[float], list[float]]:
    """Lengths and accuracies; of strings, over windows of 16 lengths."""
    test = outcome.test
    if test.answers_everywhere:
        return [float(n) for n in test.lengths], [r / a for r, a in zip(test.right_so_far, test.asked, strict=True)]
    windows = [(low, low + 15) for low in range(test.lengths[0], test.lengths[-1] + 1, 16)]
    return [sum(w) / 2 for w in windows], [test.token_accuracy(*w) for w in windows]
