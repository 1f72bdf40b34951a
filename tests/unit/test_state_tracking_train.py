"""`titan-dp state-tracking train`: which runs its flags mean, models of equal size, what is refused before it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from titan_dp.cli import dispatch
from titan_dp.config.load import load_config
from titan_dp.config.mixers import MIXERS
from titan_dp.data.synthetic.groups import parse_group
from titan_dp.data.synthetic.loader import build_problem, fingerprint
from titan_dp.errors import RunError, UserError
from titan_dp.studies.state_tracking import train
from titan_dp.studies.state_tracking.models import KNOWN, MODEL_KEYS, label, model_settings
from titan_dp.studies.sweep_file import Cell
from titan_dp.train.run_folder import RunLock, write_run

TRAIN = ["state-tracking", "train"]
PRINT = ["--launch", "print"]


def cells(monkeypatch: pytest.MonkeyPatch, *words: str, out: Path | None = None) -> list[Cell]:
    """The runs that the command would write."""
    found: list[list[Cell]] = []
    monkeypatch.setattr(train, "run", lambda args: found.append(train.plan(args)[0]) or 0)
    dispatch([*TRAIN, *words, *(["--out", str(out)] if out else [])])
    monkeypatch.undo()
    return found[0]


def write(monkeypatch: pytest.MonkeyPatch, *words: str, out: Path) -> list[Cell]:
    """The same, written."""
    planned = cells(monkeypatch, *words, out=out)
    train.write_folders(planned)
    return planned


def begin(cell: Cell, state: str) -> None:
    """What the trainer leaves in a run's folder."""
    c = cell.config.state_tracking
    write_run(cell.folder, {"state": state, "steps": cell.steps, "fingerprint": fingerprint(build_problem(c), c)})


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


# -- settings ----------------------------------------------------------------------------------------------------------

# words of the command line, and the settings they mean
MEANT: dict[str, dict[str, Any]] = {
    "--group S3xZ2 --max-moved 2 --length 25 --tokens-per-element 4 --test-length 200": {
        "state_tracking.task": "S3xZ2",
        "state_tracking.max_moved": 2,
        "state_tracking.tokens_per_element": 4,
        "state_tracking.test_length": 200,
        "training.seq_len": 101,
        "model.vocab_size": 14,
    },
    "--task parity --model.vocab_size 64 --min-length 3 --curriculum 100 --solved-accuracy 0.95 --stop-when-solved": {
        "state_tracking.task": "parity",
        "state_tracking.min_length": 3,
        "state_tracking.curriculum_steps": 100,
        "state_tracking.solved_accuracy": 0.95,
        "state_tracking.stop_when_solved": True,
        "model.vocab_size": 64,
    },
    "--num-householder 3 --range [0,1] --gated --training.tokens 1M": {
        "model.num_householder": 3,
        "model.allow_neg_eigval": False,
        "model.use_forget_gate": True,
        "training.steps": None,
        "training.tokens": 1_000_000,
    },
    "--model.adaptive_householder --householder-cost 0.01 --validation.freq=5 --steps 7": {
        "model.adaptive_householder": True,
        "training.householder_cost": 0.01,
        "validation.freq": 5,
        "training.steps": 7,
    },
}


@pytest.mark.parametrize("words", MEANT)
def test_flags_set_their_keys_and_nothing_else(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (cell,) = cells(monkeypatch, *words.split())
    small = str(train.SHIPPED / "state_tracking/small.toml")
    expected = load_config(["--config", small, "--debug.seed=1", "--data.seed=1"]).config.model_dump(exclude={"job"})
    for key, value in MEANT[words].items():
        section, name = key.split(".")
        expected[section][name] = value
    assert cell.config.model_dump(exclude={"job"}) == expected


def test_without_flags_s3_is_learnt_by_deltaproduct_2_on_words_of_32(monkeypatch: pytest.MonkeyPatch) -> None:
    (cell,) = cells(monkeypatch)
    assert (cell.config.state_tracking.task, cell.config.model.num_householder, cell.config.training.seq_len) == ("S3", 2, 33)
    assert cell.folder == Path("outputs/state_tracking/S3/deltaproduct_2_-1_1-seed1")
    assert cell.config.job.description == "DeltaProduct_2 [-1, 1], seed 1"


def test_the_identities_of_runs_are_those_of_older_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished runs are found by them."""
    plain, pair = cells(monkeypatch)[0], cells(monkeypatch, "--models", "deltanet", "rwkv7_2[c=2]", "--length", "32")
    assert [cell.identity[:16] for cell in (plain, *pair)] == ["6b8f403ec258911b", "ebc6d9a7fd93169f", "d52cd977017ebca6"]


def test_a_table_in_a_file_is_a_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "klein.csv").write_text("0,1,2,3\n1,0,3,2\n2,3,0,1\n3,2,1,0\n")
    (cell,) = cells(monkeypatch, "--task", str(tmp_path / "klein.csv"))
    assert (cell.config.model.vocab_size, cell.folder.parent) == (6, Path("outputs/state_tracking/klein"))


def test_a_config_of_the_users_own_is_the_base_and_gates_are_those_of_the_models_named(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = root / "train_configs/state_tracking/small.toml"
    text = f'extends = "{small}"\n[model]\nuse_forget_gate = true\nallow_neg_eigval = false\nnum_householder = 3\n'
    (tmp_path / "mine.toml").write_text(f"{text}[training]\nsteps = 11\n[optimizer]\nlr = 0.5\n")
    base = ("--config", str(tmp_path / "mine.toml"), "--steps", "12")
    c = cells(monkeypatch, *base)[0].config
    assert (c.training.steps, c.optimizer.lr, c.model.use_forget_gate) == (12, 0.5, True)
    plain, gla = (cell.config.model for cell in cells(monkeypatch, *base, "--models", "deltanet", "gla"))
    assert (plain.use_forget_gate, plain.allow_neg_eigval, plain.num_householder) == (False, True, 1)
    assert (gla.mixer, gla.num_householder) == ("gla", 1)


def test_every_config_that_ships_is_a_run(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (root / "train_configs/state_tracking").glob("*.toml"):
        assert cells(monkeypatch, "--config", path.stem)[0].config.data.source == "state_tracking"


# -- seeds and models --------------------------------------------------------------------------------------------------


def test_seeds_differ_in_weights_and_words_and_in_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    three = cells(monkeypatch, "--seeds", "3", out=tmp_path)
    assert [c.name for c in three] == [f"deltaproduct_2_-1_1-seed{seed}" for seed in (1, 2, 3)]
    assert [(c.config.debug.seed, c.config.data.seed) for c in three] == [(1, 1), (2, 2), (3, 3)]
    rest = [c.config.model_dump(exclude={"job": True, "debug": {"seed"}, "data": {"seed"}}) for c in three]
    assert rest[0] == rest[1] == rest[2]
    assert all(c.folder == tmp_path / c.name == Path(c.config.job.dump_folder) / c.config.job.run_name for c in three)


MODELS = {
    "deltanet": "DeltaNet [-1, 1]",
    "gated-deltanet[0,1]": "Gated DeltaNet [0, 1]",
    "deltaproduct_3[0,1]": "DeltaProduct_3 [0, 1]",
    "gated-deltaproduct_2[-1,1]": "Gated DeltaProduct_2 [-1, 1]",
    "gla": "gated linear attention",
    "attention": "softmax attention",
    "rwkv7": "RWKV-7 (c = 1)",
    "rwkv7_2[c=2]": "RWKV-7 product_2 (c = 2)",
    "adaptive-deltaproduct_3": "adaptive DeltaProduct_3 [-1, 1]",
}
COST = ("--householder-cost", "0.01")


def test_models_by_seeds_are_runs_with_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = cells(monkeypatch, "--models", *MODELS, *COST, "--seeds", "2", out=tmp_path)
    assert len(runs) == len({c.folder for c in runs}) == 2 * len(MODELS)
    assert [label(c.config.model) for c in runs[::2]] == list(MODELS.values())
    assert all(character.isalnum() or character in "_-" for cell in runs for character in cell.name)
    names = {c.name for c in runs}
    assert {"deltanet_-1_1-seed1", "softmax_attention-seed1", "gated_deltaproduct_2_-1_1-seed2"} <= names


def test_every_name_of_every_mixer_is_known_and_is_one_of_the_help() -> None:
    for mixer, record in MIXERS.items():
        for name, keys in record.names.items():
            settings = model_settings(name if "num_householder" in keys else f"{name}_2")
            assert settings["mixer"] == mixer
            assert settings.keys() <= set(MODEL_KEYS)
            assert name in KNOWN


@pytest.mark.parametrize(
    "base",
    [
        ("--task", "S5", "--model.num_heads=8", "--model.head_dim=32", "--model.hidden_size=128"),
        ("--task", "parity", "--model.num_hidden_layers", "3", "--model.hidden_size", "96"),
    ],
)
def test_models_are_of_one_size_within_a_percent_and_differ_in_nothing_but_the_mixer(
    base: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = cells(monkeypatch, *base, "--models", *MODELS, *COST)
    sizes = [c.parameters for c in runs]
    assert max(sizes) / min(sizes) < 1.01, dict(zip(MODELS, sizes, strict=True))
    keep = {"num_hidden_layers", "hidden_size", "num_heads", "head_dim", "vocab_size", "use_short_conv", "use_output_gate"}
    assert len({tuple(c.config.model.model_dump(include=keep).items()) for c in runs}) == 1


def test_the_largest_model_keeps_the_mlp_that_was_given_and_a_size_may_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = ("--models", "deltanet", "deltaproduct_3")
    less, more = (c.config.model.mlp_size for c in cells(monkeypatch, *pair, "--model.intermediate_size", "100"))
    assert less > more == 100
    for cell in cells(monkeypatch, *pair, "--parameters", "100_000"):
        assert cell.parameters == pytest.approx(100_000, rel=0.01)


def test_only_settings_that_matter_to_no_model_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[list[str]] = []
    monkeypatch.setattr(train, "run", lambda args: warnings.append(train.plan(args)[1]) or 0)
    dispatch([*TRAIN, "--models", "attention", "deltanet", "--model.num_heads", "2", *COST])
    (found,) = warnings
    assert [warning for warning in found if "num_heads" in warning] == []
    assert len([warning for warning in found if "householder_cost" in warning]) == 1


# -- folders -----------------------------------------------------------------------------------------------------------


def test_a_folder_trained_with_other_settings_is_refused_and_untouched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = write(monkeypatch, "--steps", "9", "--seeds", "1", out=tmp_path)
    begin(before[0], "finished")
    found = files(tmp_path)
    said = (
        r"seed1 was trained with other settings \(training.steps was 9, is now 10\); choose another --out, or move that folder"
    )
    with pytest.raises(UserError, match=said):
        write(monkeypatch, "--steps", "10", "--seeds", "2", out=tmp_path)
    assert files(tmp_path) == found
    write(monkeypatch, "--steps", "9", "--seeds", "2", out=tmp_path)
    assert files(before[0].folder) == found


def test_a_run_on_another_table_or_that_does_not_say_on_which_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    four = tmp_path / "four.csv"
    four.write_text("0,1,2,3\n1,2,3,0\n2,3,0,1\n3,0,1,2\n")
    words, out = ("--task", str(four)), tmp_path / "out"
    (cell,) = write(monkeypatch, *words, out=out)
    begin(cell, "finished")
    write(monkeypatch, *words, out=out)
    four.write_text("0,1,2,3\n1,0,3,2\n2,3,0,1\n3,2,1,0\n")
    parse_group.cache_clear()  # as in another process
    with pytest.raises(UserError, match=r"was trained on another table of .*four\.csv; choose another --out"):
        write(monkeypatch, *words, out=out)
    write_run(cell.folder, {"state": "finished", "steps": cell.steps})
    with pytest.raises(UserError, match="was trained on another table"):
        write(monkeypatch, *words, out=out)


def test_print_writes_the_folders_and_the_commands_of_what_is_left_and_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = cells(monkeypatch, "--seeds", "4", out=tmp_path)
    new, done, running, begun = runs
    command = [*TRAIN, "--seeds", "4", *PRINT, "--out", str(tmp_path)]
    assert dispatch(command) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"titan-dp train --nproc 1 --config {cell.folder}/config.toml" for cell in runs
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", *(cell.name for cell in runs)]
    begin(done, "finished")
    begin(running, "training")
    begin(begun, "training")
    lock = RunLock(running.folder)
    assert dispatch(command) == 0
    lock.close()
    left = [f"titan-dp train --nproc 1 --config {cell.folder}/config.toml" for cell in (new, begun)]
    assert capsys.readouterr().out.splitlines() == left


def test_a_second_study_in_a_folder_somebody_trains_in_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(monkeypatch, "--seeds", "2", "--steps", "9", out=tmp_path)  # none has begun: they might be written anew
    before = files(tmp_path)
    lock = RunLock(tmp_path)
    with pytest.raises(RunError, match="another process is at work in"):
        dispatch([*TRAIN, "--seeds", "3", "--steps", "7", "--out", str(tmp_path)])
    lock.close()
    assert files(tmp_path) == before


# -- bad input ---------------------------------------------------------------------------------------------------------

# words of the command line, and what the refusal names; what does not fit the problem is test_synthetic_loader.py's
MISTAKES: list[tuple[str, str]] = [
    ("--task Q8", "'Q8'"),
    ("--task=", "state_tracking.task"),
    ("--task S4 --model.vocab_size 8", "model.vocab_size = 8 is too small for S4, which needs 26"),
    ("--tokens-per-element 3", "training.seq_len = 33"),
    ("--num-householder two", 'num_householder = "two"'),
    ("--models adaptive-deltaproduct_2", "householder_cost"),
    ("--models mamba", "'mamba'"),
    ("--models deltaproduct_0", "n_h = 0"),
    ("--models deltanet_2", "n_h = 2"),
    ("--models deltaproduct", "deltaproduct_2"),
    ("--models deltanet deltanet[-1,1]", "twice"),
    ("--models attention[0,1]", "'attention[0,1]'"),
    ("--models rwkv7[-1,1]", "choose [c=1] or [c=2]"),
    ("--models deltanet --num-householder 2", "--num-householder and --models both choose a model"),
    ("--models deltanet --range [0,1]", "--range"),
    ("--models deltanet --model.mixer attention", "--model.mixer and --models"),
    ("--models deltanet rwkv7_4 --parameters 9000", "9,000"),
    ("--parameters 10_000", "--parameters"),
    ("--data.seed 3", "--data.seed: a study numbers its seeds"),
    ("--job.run_name mine", "--job.run_name: a study numbers its seeds and names its runs"),
    ("--length 64 --training.seq_len 65", "--length and --training.seq_len"),
    ("--config enormous", "'enormous'"),
    ("--config debug.toml", "data.source"),
    ("--validation.enable false", "validation.enable"),
    ("--solved-accuracy 99", "solved_accuracy = 99"),
    ("--model.head_dimm 16", "did you mean model.head_dim?"),
]


@pytest.mark.parametrize(("words", "named"), MISTAKES, ids=[words for words, _ in MISTAKES])
def test_a_mistake_is_one_sentence_before_anything_is_written(
    words: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError) as caught:
        dispatch([*TRAIN, *words.split(), *PRINT, "--out", str(tmp_path / "out")])
    message = str(caught.value)
    assert named in message
    assert "\n" not in message
    assert len(message) < 350
    assert not (tmp_path / "out").exists()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("words", ["--length 0", "--seeds two", "--at-once 0", "--parameters 0"])
def test_a_number_that_is_none_is_refused_by_the_command_line(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        dispatch([*TRAIN, *words.split(), *PRINT])
    assert caught.value.code == 2
    option, value = words.split()
    assert f"argument {option}: {value!r}: expected " in capsys.readouterr().err
