"""`titan-dp state-tracking report` over run folders written by hand: what counts as solved, what stands for a model."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import beta as beta_distribution

from titan_dp.cli import dispatch
from titan_dp.data.synthetic.groups import parse_group
from titan_dp.data.synthetic.words import WordProblem
from titan_dp.errors import UserError
from titan_dp.studies.state_tracking.report import report, table
from titan_dp.studies.state_tracking.results import Summary, read_outcome, summarise

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


def summary_of(*folders: Path) -> Summary:
    (summary,) = summarise([outcome for folder in folders if (outcome := read_outcome(folder))])
    return summary


def column(header: str, summaries: list[Summary]) -> list[str]:
    headers, rows = table(summaries)
    assert all(len(row) == len(headers) for row in rows)
    return [row[headers.index(header)] for row in rows]


# -- one run -----------------------------------------------------------------------------------------------------------


def test_an_outcome_holds_what_the_folder_says(tmp_path: Path) -> None:
    outcome = read_outcome(write_run(tmp_path / "a", [0.0, 0.5, 0.95, 1.0], parameters=1234))
    assert outcome is not None
    assert (outcome.parameters, outcome.steps, outcome.solved_step, outcome.is_solved) == (1234, 40, 30, True)
    assert outcome.last == {
        "step": 40,
        "validation_loss": 0.1,
        "validation_tokens": 99,
        "validation_token_accuracy": 1.0,
        "validation_sequence_accuracy": 1.0,
    }
    assert outcome.seconds[40] == pytest.approx(3.0 + 39 * 0.5)
    assert outcome.solved_seconds == pytest.approx(3.0 + 29 * 0.5)
    assert outcome.data_wait == 0.04  # not the first record's 0.9, which is the start of everything
    assert outcome.householder_steps is None
    assert outcome.test.sequence_accuracy(L) == 1


def test_a_run_that_solved_the_task_and_fell_back_has_not_solved_it(tmp_path: Path) -> None:
    outcome = read_outcome(write_run(tmp_path / "a", [0.2, 1.0, 0.3]))
    assert outcome is not None
    assert (outcome.solved_step, outcome.is_solved) == (None, False)


def test_solved_is_what_the_run_itself_was_told(tmp_path: Path) -> None:
    outcome = read_outcome(write_run(tmp_path / "a", [0.9]))
    short = read_outcome(write_run(tmp_path / "b", [0.8999]))
    assert outcome is not None
    assert short is not None
    assert (outcome.is_solved, short.is_solved, short.solved_step) == (True, False, None)


@pytest.mark.parametrize("state", ["training", "starting"])
def test_a_run_that_is_not_finished_has_no_outcome(state: str, tmp_path: Path) -> None:
    assert read_outcome(write_run(tmp_path / "a", [1.0], state=state)) is None


def test_a_run_without_validation_is_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", [1.0])
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0, "data_wait": 0, "step_seconds": 1}\n')
    with pytest.raises(UserError, match=r"a was never validated; train it with validation.enable"):
        read_outcome(folder)


def test_a_router_is_known_by_the_steps_it_took_last(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", [0.0, 1.0], householder_steps=1.25)
    outcome = read_outcome(folder)
    assert outcome is not None
    assert outcome.householder_steps == 1.25
    assert column("steps a token", [summary_of(folder)]) == ["1.25"]


def test_beside_a_router_others_take_all_their_steps_and_models_without_steps_none(tmp_path: Path) -> None:
    router = summary_of(write_run(tmp_path / "a", [1.0], householder_steps=1.25))
    others = [summary_of(write_run(tmp_path / name, [1.0], model=name)) for name in list(MODELS)[1:]]
    assert column("steps a token", [router, *others]) == ["1.25", "1", "", ""]


# -- the seeds of a model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("solved", "seeds", "low", "high"),
    [(0, 3, 0, 0.7076), (3, 3, 0.2924, 1), (5, 5, 0.4782, 1), (1, 10, 0.0025, 0.4450), (0, 1, 0, 0.975)],
)
def test_the_interval_is_the_known_one(solved: int, seeds: int, low: float, high: float, tmp_path: Path) -> None:
    runs = [write_run(tmp_path / str(i), [float(i < solved)]) for i in range(seeds)]
    summary = summary_of(*runs)
    assert (summary.solved, len(summary.outcomes)) == (solved, seeds)
    assert summary.escape_interval() == pytest.approx((low, high), abs=6e-5)


def test_the_interval_is_that_of_clopper_and_pearson(tmp_path: Path) -> None:
    n = 4 + secrets.randbelow(8)
    k = 1 + secrets.randbelow(n - 1)
    summary = summary_of(*[write_run(tmp_path / str(i), [float(i < k)]) for i in range(n)])
    low, high = beta_distribution.ppf(0.025, k, n - k + 1), beta_distribution.ppf(0.975, k + 1, n - k)
    assert summary.escape_interval() == pytest.approx((low, high))


def test_a_seed_that_diverged_counts_as_one_that_did_not_solve_the_task(tmp_path: Path) -> None:
    for name in "ab":
        write_run(tmp_path / name, [1.0])
    diverged = write_run(tmp_path / "c", [1.0, 0.2], state="training")  # seemed solved on the way
    (diverged / "config.toml").write_text((diverged / "config.toml").read_text() + "[debug]\nseed = 3\n")
    (summary,) = report([tmp_path], tmp_path)
    assert (summary.solved, summary.unfinished, summary.seeds) == (2, 1, 3)
    low, high = beta_distribution.ppf(0.025, 2, 2), beta_distribution.ppf(0.975, 3, 1)
    assert summary.escape_interval() == pytest.approx((low, high))
    assert column("seeds solved", [summary]) == ["2 of 3 (1 unfinished)"]
    (model,) = json.loads((tmp_path / "summary.json").read_text())["models"]
    assert (model["solved"], model["seeds"], model["unfinished"], len(model["runs"])) == (2, 3, 1, 2)
    assert model["interval"] == pytest.approx([low, high])


def test_a_model_is_shown_by_the_run_that_validates_best_whatever_the_test_says(tmp_path: Path) -> None:
    summary = summary_of(
        write_run(tmp_path / "lucky", [0.95], right=1.0, loss=0.01),
        write_run(tmp_path / "best", [0.97], right=0.25, loss=0.5),
        write_run(tmp_path / "fell back", [1.0, 0.2], right=0.9),
    )
    assert summary.chosen.folder.name == "best"
    assert column("right at 32", [summary]) == ["25.0%"]
    assert column("validation", [summary]) == ["97.0%"]


def test_between_equal_accuracies_the_loss_decides(tmp_path: Path) -> None:
    summary = summary_of(
        write_run(tmp_path / "a", [1.0], right=1.0, loss=0.2), write_run(tmp_path / "b", [1.0], right=0.0, loss=0.1)
    )
    assert summary.chosen.folder.name == "b"


def test_models_come_in_the_order_of_their_runs_and_layers_make_a_model(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "1", [1.0], model="softmax attention"),
        write_run(tmp_path / "2", [1.0]),
        write_run(tmp_path / "3", [1.0], model="softmax attention"),
    ]
    found = summarise([outcome for run in runs if (outcome := read_outcome(run))])
    layers = ", 24 layers"
    assert [(s.label, len(s.outcomes)) for s in found] == [
        (f"softmax attention{layers}", 2),
        (f"DeltaProduct_2 [-1, 1]{layers}", 1),
    ]


def test_several_tasks_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "a", [1.0])
    write_run(tmp_path / "b", [1.0], task="A5")
    with pytest.raises(UserError, match=r"several tasks \(.* A5, .*; .* S3, .*\); report one at a time"):
        report([tmp_path], tmp_path)
    assert not (tmp_path / "summary.json").exists()


def test_swaps_only_are_another_task_than_all_elements(tmp_path: Path) -> None:
    """A group's variants are easier or harder: their seeds cannot make one escape fraction."""
    all_elements, swaps = (WordProblem(parse_group("S5"), most).describe() for most in (None, 2))
    write_run(tmp_path / "a", [1.0], task="S5", test={"problem": all_elements})
    write_run(tmp_path / "b", [0.0], task="S5", more="max_moved = 2\n", test={"problem": swaps})
    with pytest.raises(UserError, match="several tasks"):
        report([tmp_path], tmp_path / "out")


def test_runs_of_other_training_lengths_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "a", [1.0])
    write_run(tmp_path / "b", [0.0], length=2, model="DeltaNet [0, 1]")  # tested up to 8 only
    with pytest.raises(UserError, match=r"several tasks \(.* words of 2, tested to 8; .* words of 8, tested to 32\)"):
        report([tmp_path], tmp_path / "out")


def test_seeds_and_names_make_no_other_model_and_any_other_setting_does(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, [1.0]) for name in ("a", "b", "slow")]
    text = (runs[0] / "config.toml").read_text()
    seeded = text.replace("[data]", "[data]\nseed = 7") + '[debug]\nseed = 7\n[job]\nrun_name = "b"\ndescription = "another"\n'
    (runs[1] / "config.toml").write_text(seeded)
    (runs[2] / "config.toml").write_text(text + "[optimizer]\nlr = 1e-5\n")
    found = summarise([outcome for folder in runs if (outcome := read_outcome(folder))])
    assert [[o.folder.name for o in s.outcomes] for s in found] == [["a", "b"], ["slow"]]
    name = "DeltaProduct_2 [-1, 1], 24 layers"
    assert [s.label for s in found] == [f"{name} ({runs[0]})", f"{name} ({runs[2]})"]


# -- the table ---------------------------------------------------------------------------------------------------------


def test_the_columns_for_a_group_are_once_twice_and_four_times_the_length(tmp_path: Path) -> None:
    summary = summary_of(write_run(tmp_path / "a", [0.1, 1.0], right=0.5), write_run(tmp_path / "b", [0.0, 0.1, 0.2]))
    headers, (row,) = table([summary])
    assert dict(zip(headers, row, strict=True)) == {
        "model": "DeltaProduct_2 [-1, 1], 24 layers",
        "parameters": "1,000",
        "seeds solved": "1 of 2",
        "95 % interval": "1% to 99%",
        "steps to solve": "20",
        "validation": "100.0%",
        "right at 8": "100.0%",
        "right at 16": "50.0%",
        "right at 32": "50.0%",
    }


def test_a_model_that_no_seed_solved_says_never(tmp_path: Path) -> None:
    assert column("steps to solve", [summary_of(write_run(tmp_path / "a", [0.0, 0.5]))]) == ["never"]


def test_a_test_that_is_shorter_has_fewer_columns(tmp_path: Path) -> None:
    n = 20
    test = {"lengths": list(range(1, n + 1)), "asked": [9] * n, "right": [9] * n, "right_so_far": [9] * n}
    headers, _ = table([summary_of(write_run(tmp_path / "a", [1.0], test=test))])
    assert [h for h in headers if "right at" in h] == ["right at 8", "right at 16"]


def test_a_language_has_scaled_accuracies_of_all_strings_tested(tmp_path: Path) -> None:
    perfect = write_run(tmp_path / "a", [1.0], task="parity", test=language_test({8: 100, 9: 101, 10: 100}), loss=0.1)
    guess = write_run(tmp_path / "b", [1.0], task="parity", test=language_test({8: 50, 9: 50, 10: 50}), loss=0.2)
    third = write_run(tmp_path / "c", [1.0], task="parity", test=language_test({8: 80, 9: 70, 10: 60}), loss=0.3)
    outcomes = [outcome for run in (perfect, guess, third) if (outcome := read_outcome(run))]
    expected = [1.0, (150 / 301 - 0.5) / 0.5, (210 / 301 - 0.5) / 0.5]
    assert [o.test.scaled_accuracy() for o in outcomes] == pytest.approx(expected)
    summary = summary_of(perfect, guess, third)
    assert column("scaled accuracy", [summary]) == ["1.000"]
    assert column("median of seeds", [summary]) == [f"{expected[2]:.3f}"]
    assert not [h for h in table([summary])[0] if "right at" in h]


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_report_prints_the_table_and_writes_it_with_the_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "runs/a", [0.2, 1.0], right=0.75)
    write_run(tmp_path / "runs/b", [0.2, 0.0])
    write_run(tmp_path / "runs/c", [0.1], model="softmax attention", right=0.0)
    write_run(tmp_path / "runs/d", [0.1, 0.4], model="DeltaNet [0, 1]", state="training")
    (tmp_path / "runs/notes").mkdir()
    assert dispatch(["state-tracking", "report", str(tmp_path / "runs")]) == 0
    printed = capsys.readouterr().out
    assert "1 more run(s), of models without a finished one, are not in the table" in printed
    assert f"{problem('S3')}, trained on words of up to 8 symbols" in " ".join(printed.split())
    assert (tmp_path / "runs/curves.png").read_bytes().startswith(b"\x89PNG")

    summary = json.loads((tmp_path / "runs/summary.json").read_text())
    assert (summary["task"], summary["train_length"]) == (problem("S3"), L)
    ours, attention = summary["models"]
    assert (ours["model"], ours["solved"], ours["seeds"], ours["chosen"]) == ("DeltaProduct_2 [-1, 1], 24 layers", 1, 2, "a")
    assert ours["interval"] == pytest.approx([0.0126, 0.9874], abs=1e-4)
    assert [run["run"] for run in ours["runs"]] == ["a", "b"]
    assert ours["runs"][0]["test"] == {"8": 1.0, "16": 0.75, "32": 0.75}
    assert (ours["runs"][0]["solved"], ours["runs"][0]["solved_step"], ours["runs"][1]["solved_step"]) == (True, 20, None)
    assert (attention["solved"], attention["interval"][0]) == (0, 0)

    lines = (tmp_path / "runs/summary.md").read_text().splitlines()
    assert len(lines) == 4
    assert len({line.count("|") for line in lines}) == 1
    assert "| DeltaProduct_2 [-1, 1], 24 layers | 1,000 | 1 of 2 |" in lines[2]


def test_single_runs_and_another_place_may_be_named(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, [1.0]) for name in "ab"]
    assert dispatch(["state-tracking", "report", *map(str, runs), "--out", str(tmp_path / "new/place")]) == 0
    assert sorted(path.name for path in (tmp_path / "new/place").iterdir()) == ["curves.png", "summary.json", "summary.md"]
    assert sorted(path.name for path in runs[0].iterdir()) == ["config.toml", "metrics.jsonl", "run.json", "test.json"]


def test_beside_a_run_that_was_named_and_not_into_it_is_written(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "runs" / name, [1.0]) for name in "ab"]
    before = sorted(runs[0].iterdir())
    assert dispatch(["state-tracking", "report", *map(str, runs)]) == 0
    assert sorted(runs[0].iterdir()) == before
    assert {path.name for path in runs[0].parent.iterdir()} == {"a", "b", "curves.png", "summary.json", "summary.md"}


def test_a_language_is_drawn_too(tmp_path: Path) -> None:
    test = language_test({length: 60 + length for length in range(8, 32)})
    write_run(tmp_path / "runs/a", [0.5], task="parity", test=test)
    report([tmp_path / "runs"], tmp_path / "out")
    assert (tmp_path / "out/curves.png").stat().st_size > 1000
    run = json.loads((tmp_path / "out/summary.json").read_text())["models"][0]["runs"][0]
    assert set(run["test"]) == {"scaled_accuracy"}


def test_nothing_finished_is_refused_and_writes_nothing(tmp_path: Path) -> None:
    write_run(tmp_path / "runs/a", [1.0], state="training")
    for folder in (tmp_path / "runs", tmp_path / "runs/a"):
        with pytest.raises(UserError, match="holds no finished state-tracking run; train some"):
            report([folder], tmp_path / "out")
    with pytest.raises(UserError, match="nowhere does not exist"):
        report([tmp_path / "nowhere"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_of_text_is_no_run_of_state_tracking(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "runs/a", [1.0])
    (folder / "test.json").unlink()
    (folder / "config.toml").write_text("[training]\nsteps = 10\n")
    with pytest.raises(UserError, match="was trained on text; name folders of `titan-dp state-tracking train`"):
        report([tmp_path / "runs"], tmp_path / "out")


@pytest.mark.parametrize("damage", ["run.json", "test.json", "metrics.jsonl", "config.toml"])
def test_a_damaged_run_is_named(damage: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "runs/a", [1.0])
    (folder / damage).write_text('{"a')
    with pytest.raises(UserError, match=damage.replace(".", r"\.")):
        report([tmp_path / "runs"], tmp_path / "out")


def test_runs_that_were_never_started_are_counted_as_not_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "runs/a", [1.0])
    (write_run(tmp_path / "runs/b", [1.0], state="training") / "run.json").unlink()
    (summary,) = report([tmp_path / "runs"], tmp_path / "out")
    assert (summary.solved, summary.seeds, summary.unfinished) == (1, 2, 1)
    assert "more run(s)" not in capsys.readouterr().out
