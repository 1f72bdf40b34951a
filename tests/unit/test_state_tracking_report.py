"""`titan-dp state-tracking report` over run folders written by hand: what counts as solved, what stands for a model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from titan_dp.cli import dispatch
from titan_dp.data.synthetic.groups import parse_group
from titan_dp.data.synthetic.words import WordProblem
from titan_dp.errors import UserError
from titan_dp.studies.state_tracking.report import Task, by_task, left_plateau, overview, read_row, table
from titan_dp.train.length_test import read_length_test

L = 8
"""Symbols of the words trained on."""
PLANNED = 100
"""Steps; runs that solve their task may end before."""
MODELS = {
    "DeltaProduct_2 [-1, 1]": "num_householder = 2",
    "DeltaNet [0, 1]": "num_householder = 1\nallow_neg_eigval = false",
    "softmax attention": 'mixer = "attention"',
    "RWKV-7 (c = 1)": 'mixer = "rwkv7"\nallow_neg_eigval = false\nnum_householder = 1',
}
OURS = "DeltaProduct_2 [-1, 1], 24 layers"


def problem(task: str) -> str:
    return f"word problem of {task}, 6 elements"


def write_run(
    folder: Path,
    accuracies: list[float],
    *,
    model: str = "DeltaProduct_2 [-1, 1]",
    right: float = 1.0,
    loss: float = 0.1,
    task: str = "S3",
    state: str = "finished",
    length: int = L,
    more: str = "",
    test: dict[str, Any] | None = None,
    parameters: int = 1000,
    **step_values: float,
) -> Path:
    """A run validated every 10 steps with `accuracies` of whole words; the test finds a fraction `right` beyond `length`."""
    folder.mkdir(parents=True)
    step = 10 * len(accuracies)
    (folder / "config.toml").write_text(
        f'[model]\n{MODELS[model]}\n[data]\nsource = "state_tracking"\n[training]\nsteps = {PLANNED}\nseq_len = {length + 1}\n'
        f'[state_tracking]\ntask = "{task}"\nsolved_accuracy = 0.9\n{more}'
    )
    (folder / "run.json").write_text(json.dumps({"state": state, "step": step, "steps": PLANNED, "parameters": parameters}))
    records: list[dict[str, Any]] = [{"step": 1, "loss": 2.0, "data_wait": 0.9, "step_seconds": 3.0, **step_values}]
    for i, accuracy in enumerate(accuracies, 1):
        records.append({"step": 10 * i, "loss": 1.0, "data_wait": 0.01 * i, "step_seconds": 0.5, **step_values})
        valid = {"validation_loss": loss, "validation_tokens": 99, "validation_token_accuracy": (1 + accuracy) / 2}
        records.append({"step": 10 * i, **valid, "validation_sequence_accuracy": accuracy})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if state == "finished":
        lengths, n = list(range(1, 4 * length + 1)), 1000
        so_far = [n if i <= length else round(n * right) for i in lengths]
        prefixes = {"lengths": lengths, "asked": [n] * len(lengths), "right": so_far, "right_so_far": so_far}
        facts = {"problem": problem(task), "chance": 1 / 6, "train_length": length, "answers_everywhere": True}
        (folder / "test.json").write_text(json.dumps(facts | prefixes | (test or {})))
    return folder


def language_test(right: dict[int, int], asked: int = 100) -> dict[str, Any]:
    counts = list(right.values())
    numbers = [asked + i % 2 for i in range(len(counts))]
    lists = {"lengths": list(right), "asked": numbers, "right": counts, "right_so_far": counts}
    return {"problem": "formal language parity, 2 answers", "chance": 0.5, "answers_everywhere": False, **lists}


def task_of(*folders: Path) -> Task:
    (task,) = by_task([read_row(folder) for folder in folders])
    return task


def rows_of(*folders: Path) -> list[dict[str, str]]:
    """The table's."""
    return table(task_of(*folders)).to_dict("records")


def report(*words: Path | str) -> int:
    return dispatch(["state-tracking", "report", *map(str, words)])


# -- one run -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accuracies", "solved_step"),
    [([0.9], 10), ([0.8999], None), ([0.2, 1.0, 0.95], 20), ([0.2, 1.0, 0.3], None)],
    ids=["as told", "not quite", "from then on", "fell back"],
)
def test_a_run_is_solved_if_its_last_validation_is(accuracies: list[float], solved_step: int | None, tmp_path: Path) -> None:
    row = read_row(write_run(tmp_path / "a", accuracies))
    assert (row["solved_step"], row["solved"]) == (solved_step, solved_step is not None)


def test_seconds_are_those_of_training_and_waiting_leaves_out_the_start(tmp_path: Path) -> None:
    row = read_row(write_run(tmp_path / "a", [0.0, 0.5, 0.95, 1.0], parameters=1234))
    assert (row["parameters"], row["steps"], row["solved_step"]) == (1234, 40, 30)
    assert row["seconds"] == pytest.approx(3.0 + 39 * 0.5)
    assert row["solved_seconds"] == pytest.approx(3.0 + 29 * 0.5)
    assert row["data_wait"] == 0.04  # not the first record's 0.9, which is the start of everything


def test_a_router_is_known_by_the_steps_it_took_last_others_take_all_their_steps_or_none(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a", [0.0, 1.0], householder_steps=1.25)]
    runs += [write_run(tmp_path / name, [1.0], model=name) for name in list(MODELS)[1:]]
    assert [row["steps per token"] for row in rows_of(*runs)] == ["1.25", "1", "", ""]


# -- the seeds of a model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("solved", "unfinished", "seeds", "low", "high"), [(0, 0, 3, 0, 0.7076), (2, 2, 4, 0.0676, 0.9324)])
def test_a_seed_that_diverged_or_never_started_counts_as_not_solved_in_the_exact_interval(
    solved: int, unfinished: int, seeds: int, low: float, high: float, tmp_path: Path
) -> None:
    for i in range(seeds - unfinished):
        write_run(tmp_path / f"{i}", [float(i < solved)])
    if unfinished:
        diverged = write_run(tmp_path / "diverged", [1.0, 0.2], state="training")  # seemed solved on the way
        (diverged / "config.toml").write_text((diverged / "config.toml").read_text() + "[debug]\nseed = 3\n")
        (write_run(tmp_path / "new", [1.0], state="training") / "run.json").unlink()
    report(tmp_path)
    (model,) = json.loads((tmp_path / "summary.json").read_text())["tasks"][0]["models"]
    assert (model["solved"], model["seeds"], model["unfinished"], len(model["runs"])) == (
        solved, seeds, unfinished, seeds - unfinished
    )  # fmt: skip
    assert model["interval"] == pytest.approx([low, high], abs=6e-5)
    said = f"{solved} of {seeds}" + f" ({unfinished} unfinished)" * bool(unfinished)
    assert f"| {said} |" in (tmp_path / "summary.md").read_text()


@pytest.mark.parametrize(
    ("runs", "best"),
    [
        ([([0.95], 1.0, 0.01), ([0.97], 0.25, 0.5), ([1.0, 0.2], 0.9, 0.1)], 1),  # not the luckiest in the test, nor once best
        ([([1.0], 1.0, 0.2), ([1.0], 0.0, 0.1)], 1),  # between equal accuracies the loss decides
        ([([0.5], 1.0, math.nan), ([0.5], 1.0, 2.0)], 1),  # and one that is not finite comes last
    ],
)
def test_a_model_is_shown_by_the_run_that_validates_best_whatever_the_test_says(
    runs: list[tuple[list[float], float, float]], best: int, tmp_path: Path
) -> None:
    (row,) = rows_of(*(write_run(tmp_path / str(i), a, right=r, loss=v) for i, (a, r, v) in enumerate(runs)))
    assert (row["validation"], row["right at 32"]) == (f"{runs[best][0][-1]:.1%}", f"{runs[best][1]:.1%}")


def test_models_come_in_the_order_of_their_runs_and_differ_by_every_setting_except_seeds_and_names(tmp_path: Path) -> None:
    ours, net, attention, _ = MODELS
    runs = [write_run(tmp_path / str(i), [1.0], model=m) for i, m in enumerate((attention, ours, net, attention), 1)]
    text = (runs[1] / "config.toml").read_text()
    seeded = text.replace("[data]", "[data]\nseed = 7") + '[debug]\nseed = 7\n[job]\nrun_name = "b"\ndescription = "another"\n'
    (write_run(tmp_path / "5", [1.0]) / "config.toml").write_text(seeded)
    (write_run(tmp_path / "6", [1.0]) / "config.toml").write_text(text + "[optimizer]\nlr = 1e-5\n")
    found = task_of(*(tmp_path / name for name in "124563")).models
    assert [[run["folder"].name for run in m["runs"]] for m in found] == [["1", "4"], ["2", "5"], ["6"], ["3"]]
    labels = ["softmax attention, 24 layers", f"{OURS} (2)", f"{OURS} (6)"]
    assert [m["model"] for m in found] == [*labels, "DeltaNet [0, 1], 24 layers"]
    (tmp_path / "more").mkdir()
    twin = (tmp_path / "6").rename(tmp_path / "more/2")
    names = [m["model"] for m in task_of(tmp_path / "2", twin).models]
    assert names == [f"{OURS} ({tmp_path / '2'})", f"{OURS} ({twin})"]


S5 = {most: {"problem": WordProblem(parse_group("S5"), most).describe()} for most in (None, 2)}
OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "swaps only": ({"task": "S5", "test": S5[None]}, {"task": "S5", "more": "max_moved = 2\n", "test": S5[2]}),
    "another length": ({}, {"length": 2}),
}


@pytest.mark.parametrize("case", OTHERS)
def test_runs_that_were_not_asked_the_same_are_in_tables_of_their_own(case: str, tmp_path: Path) -> None:
    one, other = OTHERS[case]
    runs = [write_run(tmp_path / "a", [1.0], **one), write_run(tmp_path / "b", [0.0], **other)]
    first, second = by_task([read_row(run) for run in runs])
    assert [model["chosen"]["folder"] for task in (first, second) for model in task.models] == runs
    assert first.title != second.title


def test_models_by_tasks_tell_seeds_that_solved_it_with_the_theory_or_scaled_accuracy(tmp_path: Path) -> None:
    one_layer = "[model]\nnum_hidden_layers = 1\n"
    for task, model, solved in (
        ("S3", "DeltaProduct_2 [-1, 1]", 1.0),
        ("S3", "DeltaNet [0, 1]", 0.0),
        ("S5", "DeltaProduct_2 [-1, 1]", 0.0),
    ):
        run = write_run(
            tmp_path / f"runs/{task}-{len(model)}", [solved], model=model, task=task, test={"problem": problem(task)}
        )
        text = (run / "config.toml").read_text()
        (run / "config.toml").write_text(text.replace("[model]\n", one_layer))
    write_run(tmp_path / "runs/parity", [1.0], task="parity", test=language_test({8: 80, 9: 70, 10: 60}))
    assert report(tmp_path / "runs") == 0
    tasks = by_task([read_row(run) for run in sorted((tmp_path / "runs").iterdir()) if run.is_dir()])
    assert overview(tasks).to_dict("records") == [
        {"model": "DeltaNet [0, 1]", "S3": "0 of 1 (no)", "S5": "", "parity": ""},
        {"model": "DeltaProduct_2 [-1, 1]", "S3": "1 of 1 (yes)", "S5": "0 of 1 (no)", "parity": ""},
        {"model": OURS, "S3": "", "S5": "", "parity": f"{(210 / 301 - 0.5) / 0.5:.2f}"},
    ]
    summary = json.loads((tmp_path / "runs/summary.json").read_text())
    assert [task["name"] for task in summary["tasks"]] == ["S3", "S5", "parity"]
    text = (tmp_path / "runs/summary.md").read_text()
    assert text.count("## ") == 4
    assert "## All tasks" in text
    assert (tmp_path / "runs/curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("right", "left"), [(333, False), (434, True)])
def test_a_run_has_left_the_plateau_if_it_knows_more_than_a_quotient_of_the_group(
    right: int, left: bool, tmp_path: Path
) -> None:
    """The sign of a permutation of three points makes every third answer right; the first answers are always known."""
    counts = {"lengths": list(range(1, 9)), "asked": [1000] * 8, "right": [1000] * 4 + [right] * 4, "right_so_far": [0] * 8}
    assert left_plateau(read_row(write_run(tmp_path / "a", [0.0], test=counts))) is left


def test_a_group_whose_table_was_in_a_file_is_reported_without_the_file(tmp_path: Path) -> None:
    (row,) = rows_of(write_run(tmp_path / "a", [1.0], task="gone.csv"))
    assert row["seeds solved"] == "1 of 1"
    assert "left" not in row


# -- the table ---------------------------------------------------------------------------------------------------------


def test_the_columns_for_a_group_are_once_twice_and_four_times_the_length(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a", [0.1, 1.0], right=0.5), write_run(tmp_path / "b", [0.0, 0.1, 0.2])]
    assert rows_of(*runs) == [
        {
            "model": OURS,
            "parameters": "1,000",
            "seeds solved": "1 of 2",
            "95 % interval": "1% to 99%",
            "left": "2 of 2",
            "steps to solve": "20",
            "validation": "100.0%",
            "right at 8": "100.0%",
            "right at 16": "50.0%",
            "right at 32": "50.0%",
            "theory": "yes",
        }
    ]
    n = 20  # a shorter test has fewer columns
    test = {"lengths": list(range(1, n + 1)), "asked": [9] * n, "right": [9] * n, "right_so_far": [9] * n}
    (row,) = rows_of(write_run(tmp_path / "c", [0.1], test=test))
    assert [header for header in row if "right at" in header] == ["right at 8", "right at 16"]
    assert row["steps to solve"] == "never"


def test_a_language_has_scaled_accuracies_of_all_strings_tested(tmp_path: Path) -> None:
    perfect = write_run(tmp_path / "a", [1.0], task="parity", test=language_test({8: 100, 9: 101, 10: 100}), loss=0.1)
    guess = write_run(tmp_path / "b", [1.0], task="parity", test=language_test({8: 50, 9: 50, 10: 50}), loss=0.2)
    third = write_run(tmp_path / "c", [1.0], task="parity", test=language_test({8: 80, 9: 70, 10: 60}), loss=0.3)
    expected = [1.0, (150 / 301 - 0.5) / 0.5, (210 / 301 - 0.5) / 0.5]
    assert [read_length_test(run).scaled_accuracy() for run in (perfect, guess, third)] == pytest.approx(expected)
    (row,) = rows_of(perfect, guess, third)
    assert (row["scaled accuracy"], row["median of seeds"]) == ("1.000", f"{expected[2]:.3f}")
    assert not [header for header in row if "right at" in header]
    report(perfect, "--out", tmp_path / "out")
    assert (tmp_path / "out/curves.png").read_bytes().startswith(b"\x89PNG")
    run = json.loads((tmp_path / "out/summary.json").read_text())["tasks"][0]["models"][0]["runs"][0]
    assert run["test"] == {"scaled_accuracy": 1.0}


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_report_prints_the_table_and_writes_it_with_the_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "runs/a", [0.2, 1.0], right=0.75)
    write_run(tmp_path / "runs/b", [0.2, 0.0])
    write_run(tmp_path / "runs/d", [0.1, 0.4], model="DeltaNet [0, 1]", state="training")
    (tmp_path / "runs/notes").mkdir()
    assert report(tmp_path / "runs") == 0
    printed = capsys.readouterr().out
    assert "1 more run of models without a finished one, not in the table" in printed
    assert f"{problem('S3')}, trained on words of up to 8 symbols" in " ".join(printed.split())
    assert (tmp_path / "runs/curves.png").read_bytes().startswith(b"\x89PNG")

    summary = json.loads((tmp_path / "runs/summary.json").read_text())
    (task,) = summary["tasks"]
    assert (task["name"], task["task"], task["train_length"]) == ("S3", problem("S3"), L)
    (ours,) = task["models"]
    assert (ours["model"], ours["chosen"]) == (OURS, "a")
    assert ours["runs"][0] == {
        "run": "a",
        "parameters": 1000,
        "steps": 20,
        "seconds": 12.5,
        "data_wait": 0.02,
        "solved_step": 20,
        "solved_seconds": 12.5,
        "solved": True,
        "householder_steps": None,
        "validation": read_row(tmp_path / "runs/a")["validations"][-1],
        "test": {"8": 1.0, "16": 0.75, "32": 0.75},
    }
    assert (ours["runs"][1]["solved_step"], ours["runs"][1]["solved_seconds"]) == (None, None)
    lines = (tmp_path / "runs/summary.md").read_text().splitlines()
    assert len(lines) == 3
    assert len({line.count("|") for line in lines}) == 1
    assert f"| {OURS} | 1,000 | 1 of 2 |" in lines[2]


def test_curves_come_in_another_format_beside_the_first(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs/a", [0.2, 1.0])
    for ending in ("png", "svg"):
        assert report(run, "--format", ending) == 0
    drawing = (tmp_path / "runs/curves.svg").read_text()
    assert all(f"{text}</text>" in drawing for text in (OURS, "vertical: longest training words, 8", "horizontal: guessing"))
    assert "thin: the other seeds" not in drawing, "there are none"
    assert (tmp_path / "runs/curves.png").exists()


@pytest.mark.parametrize("out", [None, "new/place"])
def test_single_runs_may_be_named_and_nothing_is_written_into_them(out: str | None, tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "runs" / name, [1.0]) for name in "ab"]
    assert report(*runs, *(["--out", tmp_path / out] if out else [])) == 0
    found = {path.name for path in (tmp_path / (out or "runs")).iterdir()}
    assert found - {"a", "b"} == {"curves.png", "summary.json", "summary.md"}
    assert sorted(path.name for path in runs[0].iterdir()) == ["config.toml", "metrics.jsonl", "run.json", "test.json"]


NO_STEP = '{"step": 1, "validation_loss": 1.0, "validation_sequence_accuracy": 1.0}\n'
NO_VALIDATION = '{"step": 1, "loss": 1.0, "data_wait": 0, "step_seconds": 1}\n'
# what happens to the runs' folder or to a file of its finished run, and what is said
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "test.json is cut off": (lambda runs: (runs / "a/test.json").write_text('{"a'), r"test\.json"),
    "no step": (lambda runs: (runs / "a/metrics.jsonl").write_text(NO_STEP), r"metrics\.jsonl holds no record of a step"),
    "no validation": (
        lambda runs: (runs / "a/metrics.jsonl").write_text(NO_VALIDATION),
        "a was never validated; train it with",
    ),
    "no metrics": (lambda runs: (runs / "a/metrics.jsonl").unlink(), r"metrics\.jsonl cannot be read .* train the run again"),
    "text": (
        lambda runs: (runs / "a/config.toml").write_text("[training]\nsteps = 10\n"),
        "was trained on text; name folders of `titan-dp state-tracking train`",
    ),
    "nothing is finished": (lambda runs: (runs / "a/run.json").unlink(), "holds no finished state-tracking run; train some"),
    "it is gone": (lambda runs: runs.rename(runs.with_name("there")), "runs is not a folder; name run folders"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_what_cannot_be_reported_is_named_and_nothing_is_written(case: str, tmp_path: Path) -> None:
    happens, said = DAMAGES[case]
    write_run(tmp_path / "runs/a", [1.0])
    happens(tmp_path / "runs")
    with pytest.raises(UserError, match=said):
        report(tmp_path / "runs", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
