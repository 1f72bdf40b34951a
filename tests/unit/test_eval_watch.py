"""`titan-dp evaluate watch`: which checkpoints it evaluates, how often, when it ends, what it leaves, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.pretrained import evaluate, save_checkpoint, write_documents
from tests.runs import write_run
from titan_dp.checkpoint.folder import delete_checkpoint
from titan_dp.checkpoint.manifest import MANIFEST, read_manifest, step_folder, write_manifest
from titan_dp.cli import dispatch
from titan_dp.errors import RunError, UserError
from titan_dp.evals import lm_eval, perplexity
from titan_dp.train.evaluations import Evaluated, read_evaluations, write_evaluations
from titan_dp.train.run_folder import RunLock
from titan_dp.train.run_folder import write_run as write_facts

Watch = Callable[..., int]
SMALLEST = {"hidden_size": 16, "num_hidden_layers": 1, "num_heads": 1, "intermediate_size": 16, "attention_num_heads": 1}


@pytest.fixture(autouse=True)
def priority_of_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.setpriority", lambda *which: None)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("text") / "documents.jsonl", ["The fox sees the dog.", "Größe"])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a finished run of 40 steps without checkpoints."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.toml").write_text("")
    write_facts(folder, {"state": "finished"})
    return folder


@pytest.fixture
def watch(run: Path, text: Path) -> Watch:
    """Watches the run's perplexity, or what the words behind `--` say; without patience."""

    def watch(*words: object) -> int:
        command = [] if "--" in words else ["--", "perplexity", "--text", text]
        return dispatch(["evaluate", "watch", str(run), "--poll", "0.01", "--patience", "0", *map(str, [*words, *command])])

    return watch


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the checkpoints whose perplexity is computed from here on, in their order."""
    names: list[str] = []
    whole = perplexity.run

    def run(args: Any) -> int:
        names.append(args.checkpoint.name)
        return whole(args)

    monkeypatch.setattr(perplexity, "run", run)
    return names


def save(run: Path, *steps: int) -> None:
    for step in steps:
        save_checkpoint(run, step=step, seed=step, seq_len=16, **SMALLEST)


def steps(run: Path) -> list[int]:
    return [each.step for each in read_evaluations(run)]


def checkpoint(run: Path, step: int) -> Path:
    return step_folder(run / "checkpoint", step)


# -- which checkpoints -------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_evaluated_as_by_its_own_command_and_written_with_its_tokens(
    run: Path, watch: Watch, text: Path, tmp_path: Path
) -> None:
    save(run, 10)
    assert watch() == 0
    alone = evaluate("perplexity", checkpoint(run, 10), tmp_path / "alone", "--text", text)
    (found,) = read_evaluations(run)
    assert (found.step, found.tokens, found.name) == (10, 8 * 10 * 16, "perplexity")
    assert found.command == ["perplexity", "--text", str(text)]
    assert found.values == {name: alone["results"][name] for name in ("loss", "perplexity", "bits_per_byte", "accuracy")}
    (kept,) = (run / "evaluations/perplexity/step-00000010").glob("*.json")
    assert json.loads(kept.read_text())["results"] == alone["results"]


def test_a_checkpoint_is_evaluated_once_and_not_again_after_a_restart(
    run: Path, watch: Watch, evaluated: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    save(run, 10, 20)
    assert watch() == 0
    save(run, 30)
    assert watch() == 0
    assert evaluated == ["step-00000010", "step-00000020", "step-00000030"]
    assert watch() == 0
    assert (
        capsys.readouterr()
        .out.splitlines()[-1]
        .endswith(f"run is finished; nothing new to evaluate, 3 in {run}/evaluations.jsonl")
    )
    assert len(evaluated) == 3


def test_unhealthy_and_uncommitted_checkpoints_and_steps_that_n_does_not_divide_are_not_evaluated(
    run: Path, watch: Watch
) -> None:
    save(run, 10, 15, 20, 30, 40)
    (checkpoint(run, 20) / MANIFEST).unlink()
    manifest = read_manifest(checkpoint(run, 30))
    files = manifest.pop("files")
    write_manifest(checkpoint(run, 30), manifest | {"healthy": False, "unhealthy": ["its loss rose"]}, files)
    assert watch("--every", 10) == 0
    assert steps(run) == [10, 40]


def test_a_ctrl_c_leaves_nothing_half_done_and_the_same_command_goes_on(
    run: Path, watch: Watch, evaluated: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save(run, 10, 20)
    with monkeypatch.context() as patch:
        finish = perplexity._measure

        def interrupted(*args: Any) -> Any:
            if len(evaluated) == 2:
                raise KeyboardInterrupt
            return finish(*args)

        patch.setattr(perplexity, "_measure", interrupted)
        with pytest.raises(KeyboardInterrupt):
            watch()
    assert steps(run) == [10]
    assert not (run / "evaluations/perplexity/step-00000020").exists()
    assert watch() == 0
    assert steps(run) == [10, 20]
    assert evaluated == ["step-00000010", "step-00000020", "step-00000020"]


@pytest.mark.parametrize("deleted", [10, 20])
def test_a_checkpoint_that_is_deleted_while_it_is_read_or_before_its_turn_is_skipped_with_a_sentence(
    run: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], deleted: int
) -> None:
    save(run, 10, 20, 30)
    whole = perplexity.run

    def while_retention_works(args: Any) -> int:
        if args.checkpoint == checkpoint(run, 10):
            delete_checkpoint(checkpoint(run, deleted))
        return whole(args)

    monkeypatch.setattr(perplexity, "run", while_retention_works)
    assert watch() == 0
    assert steps(run) == sorted({10, 20, 30} - {deleted})
    assert f"step {deleted} is skipped: the run has deleted it before perplexity was done\n" in capsys.readouterr().out


def test_what_fails_for_one_checkpoint_is_named_at_the_end_and_stops_no_other(
    run: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(run, 10, 20, 30)
    whole = perplexity.run

    def fail_at_20(args: Any) -> int:
        if args.checkpoint == checkpoint(run, 20):
            raise UserError("it is damaged")
        return whole(args)

    monkeypatch.setattr(perplexity, "run", fail_at_20)
    with pytest.raises(RunError, match=r"is finished; not evaluated: step 20 \(perplexity\); the same command tries again"):
        watch()
    assert steps(run) == [10, 30]


def test_a_mistake_in_the_command_is_said_at_the_first_checkpoint(run: Path, watch: Watch, text: Path) -> None:
    save(run, 10, 20)
    with pytest.raises(UserError, match="--stride 9 is more than --context 8"):
        watch("--", "perplexity", "--text", text, "--context", 8, "--stride", 9)
    assert steps(run) == []


# -- its end -----------------------------------------------------------------------------------------------------------


def test_it_waits_beside_training_and_ends_with_the_run_after_its_last_checkpoint(
    run: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / "run.json").unlink()
    lock = RunLock(run)
    waited: list[list[int]] = []

    def train(seconds: float) -> None:
        """What happens while the watch sleeps: a start, two checkpoints, the end."""
        waited.append(steps(run))
        match len(waited):
            case 1:
                write_facts(run, {"state": "training"})
            case 2 | 3:
                save(run, 10 * (len(waited) - 1))
            case 4:
                save(run, 30)
                write_facts(run, {"state": "finished"})
                lock.close()

    monkeypatch.setattr("time.sleep", train)
    assert watch() == 0
    assert waited == [[], [], [10], [10, 20]]
    assert steps(run) == [10, 20, 30]


def test_a_run_that_nobody_trains_is_given_up_after_the_patience_and_can_be_taken_up_again(
    run: Path, watch: Watch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_facts(run, {"state": "training"})
    save(run, 10)
    assert watch() == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert "is not finished, but nobody has trained it for 0 s; 1 new evaluation, 1 in" in said
    assert said.endswith("; if it is trained again, the same command goes on")


def test_new_records_and_a_lock_that_is_held_begin_the_patience_anew(
    run: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where another machine's lock is not seen, the log still grows."""
    write_facts(run, {"state": "training"})
    save(run, 10)
    clock, sizes = [0.0], iter([1, 2])

    def sleep(seconds: float) -> None:
        clock[0] += 50
        if (size := next(sizes, None)) is not None:
            (run / "metrics.jsonl").write_text("x" * size)

    monkeypatch.setattr("time.sleep", sleep)
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    assert watch("--patience", "100") == 0
    assert clock[0] == 200  # the log grew at 50 and 100


# -- what it leaves ----------------------------------------------------------------------------------------------------


def test_several_evaluations_have_names_of_their_own(run: Path, watch: Watch, text: Path) -> None:
    save(run, 10)
    longer = ["--", "length-extrapolation", "--text", text, "--max-length", 16]
    asked = ["--", "recall", "--pairs", 2, "--sequences", 4]
    assert (
        watch("--", "perplexity", "--text", text, "--", "short=perplexity", "--context", 4, "--text", text, *longer, *asked)
        == 0
    )
    found = {each.name: each for each in read_evaluations(run)}
    assert list(found) == ["perplexity", "short", "length-extrapolation", "recall"]
    assert found["short"].values["loss"] != found["perplexity"].values["loss"]
    assert list(found["length-extrapolation"].values) == [f"loss, {at}" for at in ("1-1", "2-2", "3-4", "5-8", "9-15")]
    assert list(found["recall"].values) == ["accuracy, 2 pairs"]


def test_lm_evals_curves_are_a_presets_columns_or_every_metric_that_has_a_value() -> None:
    metrics = {"acc": {"value": 0.5, "stderr": 0.1}, "acc_norm": {"value": None, "stderr": None}}
    results: dict[str, Any] = {"tasks": {"piqa": {"metrics": metrics}}}
    assert lm_eval.curves(results) == {"piqa/acc": 0.5}
    assert lm_eval.curves(results | {"columns": {"PIQA acc": 0.5, "Avg": None}}) == {"PIQA acc": 0.5}


def test_curves_go_into_the_tensorboard_of_a_run_that_has_one(run: Path, watch: Watch) -> None:
    save(run, 10)
    assert watch() == 0
    assert not (run / "tb").exists()
    (run / "tb").mkdir()
    save(run, 20, 30)
    assert watch() == 0
    events = EventAccumulator(str(run / "tb/evaluations"))
    events.Reload()
    losses = {event.step: event.value for event in events.Scalars("evaluation/perplexity/loss")}
    assert losses == {each.step: pytest.approx(each.values["loss"]) for each in read_evaluations(run)[1:]}


def test_a_report_shows_the_curves_over_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = (write_run(tmp_path / "runs" / name, {"model.num_householder": n}) for name, n in (("one", 1), ("other", 2)))
    values = {40: 3.25, 80: 2.5}
    for folder, command in ((one, ["perplexity"]), (other, ["perplexity", "--bos"])):
        points = [
            Evaluated(step=s, tokens=1000 * s, name="wiki", command=command, values={"loss": v}) for s, v in values.items()
        ]
        write_evaluations(folder, points)
    out = tmp_path / "out"
    assert dispatch(["report", str(tmp_path / "runs"), "--out", str(out)]) == 0
    points = json.loads((out / "report.json").read_text())["evaluations"]
    assert points[:2] == [
        {"run": "one", "evaluation": "wiki/loss", "step": step, "tokens": 1000 * step, "value": value}
        for step, value in values.items()
    ]
    assert (out / "evaluations.png").read_bytes().startswith(b"\x89PNG")
    assert '<h2 id="evaluations">Evaluations over tokens</h2>' in (out / "report.html").read_text()
    shown = capsys.readouterr().out
    row = next(line.split() for line in shown.splitlines() if line.startswith("one ") and "wiki/loss" in line)
    assert row == ["one", "wiki/loss", "2", "40k", "3.25", "80k", "2.5", "2.5", "3.25"]
    assert "warning: evaluations called 'wiki' are of several commands: perplexity; perplexity --bos\n" in shown
    (one / "evaluations.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(UserError, match=r"evaluations.jsonl is no list of evaluations \(tokens: .*; move it away"):
        dispatch(["report", str(tmp_path / "runs"), "--out", str(out)])


# -- what it refuses ---------------------------------------------------------------------------------------------------


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere is not a run folder: it has no config.toml; give"):
        dispatch(["evaluate", "watch", str(tmp_path / "nowhere"), "--", "recall"])
    assert not (tmp_path / "nowhere").exists()


def test_a_finished_run_without_a_checkpoint_to_evaluate_is_refused(run: Path, watch: Watch) -> None:
    save(run, 15)
    with pytest.raises(
        UserError, match="is finished, and has no committed, healthy checkpoint whose step is a multiple of --every 10"
    ):
        watch("--every", 10)
    assert not (run / "evaluations").exists()


def test_a_second_watch_is_refused(run: Path, watch: Watch) -> None:
    save(run, 10)
    with (
        closing(RunLock(run / "evaluations")),
        pytest.raises(RunError, match="another watch is at work in .*: stop the other$"),
    ):
        watch()
    assert steps(run) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing to evaluate: name it behind --, such as"),
        (["--", "perplexty"], "'perplexty' behind -- is no evaluation that can be watched; did you mean perplexity?"),
        (["--", "effective-rank"], "it takes perplexity, lm-eval, length-extrapolation, recall"),
        (["--", "recall", "--", "recall"], "two evaluations are called 'recall'; name one of them, such as -- other=recall"),
        (["--", "a/b=recall"], "'a/b' cannot name an evaluation"),
        (["--", "recall", "--out", "here"], "--out behind -- recall: results of a watch go to evaluations/"),
        (["--", "recall", "outputs/other"], "-- recall outputs/other names checkpoints; leave them out"),
        (["--", "perplexity", "--shards", "nowhere"], "-- perplexity --shards nowhere: nowhere does not exist"),
    ],
)
def test_what_cannot_be_watched_is_refused_before_there_is_a_checkpoint(run: Path, words: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        dispatch(["evaluate", "watch", str(run), *words])
    assert said in str(caught.value)
    assert not (run / "evaluations").exists()


def test_an_evaluations_own_options_are_checked_before_there_is_a_checkpoint(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        dispatch(["evaluate", "watch", str(run), "--", "recall", "--pairz", "4"])
    assert caught.value.code == 2
    assert "titan-dp evaluate watch RUN -- recall: error: there is no option --pairz" in capsys.readouterr().err


def test_a_curve_has_one_command(run: Path, watch: Watch, text: Path) -> None:
    save(run, 10)
    assert watch() == 0
    with pytest.raises(
        UserError, match="'perplexity' was measured by `perplexity --text .*or another name, such as -- other=perp"
    ):
        watch("--", "perplexity", "--text", text, "--context", 4)
    assert steps(run) == [10]
