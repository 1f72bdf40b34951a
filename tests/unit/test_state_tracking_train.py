"""`titan-dp state-tracking train`: which runs its flags mean, models of equal size, what is refused before it is written."""

from __future__ import annotations

import argparse
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import tomli
import torch

from titan_dp import config
from titan_dp.cli import dispatch
from titan_dp.config.arguments import parse
from titan_dp.config.load import config_from_toml
from titan_dp.data.synthetic.groups import parse_group
from titan_dp.data.synthetic.loader import build_problem, fingerprint
from titan_dp.errors import RunError, UserError
from titan_dp.model.transformer import build_model
from titan_dp.studies.state_tracking import train
from titan_dp.studies.state_tracking.models import label, model_settings
from titan_dp.studies.state_tracking.train import Cell, plan, write_folders
from titan_dp.train.run_folder import RunLock, holds_config, write_run

TRAIN = ["-m", "titan_dp.cli", "state-tracking", "train"]
PRINT = ["--launch", "print"]


def cells(*words: str, out: Path | None = None) -> list[Cell]:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    train.add_arguments(parser)
    return plan(parse(parser, [*words, *(["--out", str(out)] if out else [])]))


def planned(*words: str) -> config.Config:
    (cell,) = cells(*words)
    return cell.loaded.config


def parameters(c: config.Model) -> int:
    """Counted on the tensors of the model."""
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(c).parameters())


def begin(cell: Cell, state: str) -> None:
    """What the trainer leaves in a run's folder."""
    c = cell.loaded.config.state_tracking
    write_run(cell.folder, {"state": state, "steps": cell.steps, "fingerprint": fingerprint(build_problem(c), c)})


# -- flags -------------------------------------------------------------------------------------------------------------

FLAGS: list[tuple[str, str, str, Any]] = [
    ("--task", "A5", "state_tracking.task", "A5"),
    ("--group", "Z60", "state_tracking.task", "Z60"),
    ("--task", "parity", "state_tracking.task", "parity"),
    ("--num-householder", "3", "model.num_householder", 3),
    ("--layers", "2", "model.num_hidden_layers", 2),
    ("--heads", "12", "model.num_heads", 12),
    ("--head-dim", "32", "model.head_dim", 32),
    ("--hidden-size", "128", "model.hidden_size", 128),
    ("--mlp", "512", "model.intermediate_size", 512),
    ("--steps", "7", "training.steps", 7),
    ("--batch-size", "256", "training.local_batch_size", 256),
    ("--learning-rate", "5e-4", "optimizer.lr", 5e-4),
    ("--learning-rate", "1", "optimizer.lr", 1.0),
    ("--weight-decay", "0.1", "optimizer.weight_decay", 0.1),
    ("--warmup", "0", "lr_scheduler.warmup_steps", 0),
    ("--min-length", "3", "state_tracking.min_length", 3),
    ("--curriculum", "100", "state_tracking.curriculum_steps", 100),
    ("--max-moved", "2", "state_tracking.max_moved", 2),
    ("--test-length", "200", "state_tracking.test_length", 200),
    ("--test-samples", "32", "state_tracking.test_samples", 32),
    ("--validate-every", "5", "validation.freq", 5),
    ("--solved-accuracy", "0.95", "state_tracking.solved_accuracy", 0.95),
    ("--gated", "", "model.use_forget_gate", True),
    ("--stop-when-solved", "", "state_tracking.stop_when_solved", True),
    ("--range", "[0,1]", "model.allow_neg_eigval", False),
    ("--range", "[-1,1]", "model.allow_neg_eigval", True),
    ("--length", "64", "training.seq_len", 65),
    ("--model.expand_v", "2.0", "model.expand_v", 2.0),
    ("--debug.deterministic", "true", "debug.deterministic", True),
    ("--checkpoint.interval", "5", "checkpoint.interval", 5),
]


def value(c: config.Config, dotted: str) -> Any:
    section, key = dotted.split(".")
    return getattr(getattr(c, section), key)


def test_without_flags_s3_is_learnt_by_deltaproduct_2_on_words_of_128() -> None:
    (cell,) = cells()
    c = cell.loaded.config
    assert (c.data.source, c.state_tracking.task, c.model.num_householder) == ("state_tracking", "S3", 2)
    assert (c.training.seq_len, c.model.allow_neg_eigval, c.model.num_hidden_layers) == (129, True, 1)
    assert cell.folder == Path("outputs/state_tracking/S3/deltaproduct_2_-1_1-seed1")
    assert (cell.name, cell.steps) == ("deltaproduct_2_-1_1-seed1", c.training.steps)


@pytest.mark.parametrize(("flag", "text", "key", "wanted"), FLAGS)
def test_a_flag_sets_its_key_and_nothing_else(flag: str, text: str, key: str, wanted: Any) -> None:
    c, before = planned(flag, *([text] if text else [])), planned()
    assert value(c, key) == wanted
    assert type(value(c, key)) is type(wanted)
    section, name = key.split(".")
    exclude = {section: {name}, "job": {"run_name", "dump_folder", "description"}}
    if name == "task":
        exclude["model"] = {"vocab_size"}
    assert c.model_dump(exclude=exclude) == before.model_dump(exclude=exclude)


def test_adaptive_models_need_and_take_their_cost() -> None:
    c = planned("--adaptive", "--householder-cost", "0.01")
    assert (c.model.adaptive_householder, c.training.householder_cost) == (True, 0.01)


def test_a_long_option_of_a_key_comes_on_top_of_the_config_and_counts_as_the_flag() -> None:
    assert planned("--optimizer.lr", "0.25").optimizer.lr == planned("--learning-rate", "0.25").optimizer.lr == 0.25


@pytest.mark.parametrize(("tokens", "length"), [(1, 1), (1, 100), (4, 25), (3, 1)])
def test_length_counts_elements_whatever_their_tokens(tokens: int, length: int) -> None:
    c = planned("--length", str(length), "--tokens-per-element", str(tokens))
    assert c.training.seq_len == 1 + length * tokens
    assert c.state_tracking.tokens_per_element == tokens


@pytest.mark.parametrize(
    ("task", "size"),
    [("S3", 8), ("S5", 122), ("Z2", 4), ("S3xZ2", 14), ("parity", 4), ("modular-arithmetic", 11), ("cycle-navigation", 5)],
)
def test_the_vocabulary_is_the_tasks(task: str, size: int) -> None:
    assert planned("--task", task).model.vocab_size == size


def test_a_vocabulary_that_was_asked_for_is_kept() -> None:
    assert planned("--task", "S3", "--model.vocab_size", "64").model.vocab_size == 64
    with pytest.raises(UserError, match="model.vocab_size = 8 is too small for S4, which needs 26"):
        planned("--task", "S4", "--model.vocab_size", "8")


def test_a_table_in_a_file_is_a_task(tmp_path: Path) -> None:
    (tmp_path / "klein.csv").write_text("0,1,2,3\n1,0,3,2\n2,3,0,1\n3,2,1,0\n")
    (cell,) = cells("--task", str(tmp_path / "klein.csv"))
    assert cell.loaded.config.model.vocab_size == 6
    assert cell.folder.parent == Path("outputs/state_tracking/klein")


def test_a_config_of_the_users_own_is_the_base(tmp_path: Path, root: Path) -> None:
    small = root / "train_configs/state_tracking/small.toml"
    (tmp_path / "mine.toml").write_text(f'extends = "{small}"\n[training]\nsteps = 11\n[optimizer]\nlr = 0.5\n')
    c = planned("--config", str(tmp_path / "mine.toml"), "--steps", "12")
    assert (c.training.steps, c.optimizer.lr, c.model.hidden_size) == (12, 0.5, 64)


def test_tokens_and_steps_undo_each_other() -> None:
    assert planned("--training.tokens", "1M").training.steps is None


def test_every_config_that_ships_is_a_run(root: Path) -> None:
    for path in (root / "train_configs/state_tracking").glob("*.toml"):
        assert planned("--config", path.stem).data.source == "state_tracking"


# -- seeds and models --------------------------------------------------------------------------------------------------


def test_seeds_differ_in_weights_and_words_and_in_nothing_else(tmp_path: Path) -> None:
    three = cells("--seeds", "3", out=tmp_path)
    assert [c.name for c in three] == [f"deltaproduct_2_-1_1-seed{seed}" for seed in (1, 2, 3)]
    assert [(c.loaded.config.debug.seed, c.loaded.config.data.seed) for c in three] == [(1, 1), (2, 2), (3, 3)]
    rest = [c.loaded.config.model_dump(exclude={"job": True, "debug": {"seed"}, "data": {"seed"}}) for c in three]
    assert rest[0] == rest[1] == rest[2]
    assert all(c.folder == tmp_path / c.name for c in three)
    assert all(c.loaded.config.job.run_name == c.name for c in three)
    assert all(c.loaded.config.job.dump_folder == str(tmp_path) for c in three)


MODELS = {
    "deltanet": "DeltaNet [-1, 1]",
    "deltanet[0,1]": "DeltaNet [0, 1]",
    "gated-deltanet": "Gated DeltaNet [-1, 1]",
    "gated-deltanet[0,1]": "Gated DeltaNet [0, 1]",
    "deltaproduct_2": "DeltaProduct_2 [-1, 1]",
    "deltaproduct_3[0,1]": "DeltaProduct_3 [0, 1]",
    "gated-deltaproduct_2[-1,1]": "Gated DeltaProduct_2 [-1, 1]",
    "gla": "gated linear attention",
    "attention": "softmax attention",
    "rwkv7": "RWKV-7 (c = 1)",
    "rwkv7_2[c=2]": "RWKV-7 product_2 (c = 2)",
    "adaptive-deltaproduct_3": "adaptive DeltaProduct_3 [-1, 1]",
}
COST = ("--householder-cost", "0.01")


def test_models_by_seeds_are_runs_with_folders_of_their_own(tmp_path: Path) -> None:
    runs = cells("--models", *MODELS, *COST, "--seeds", "2", out=tmp_path)
    assert len(runs) == len({c.folder for c in runs}) == 2 * len(MODELS)
    assert [label(c.loaded.config.model) for c in runs[::2]] == list(MODELS.values())
    for cell in runs:
        assert all(character.isalnum() or character in "_-" for character in cell.name)
    names = {c.name for c in runs}
    assert {"deltanet_-1_1-seed1", "deltanet_0_1-seed2", "softmax_attention-seed1", "gated_deltaproduct_2_-1_1-seed2"} <= names


@pytest.mark.parametrize("name", [n for n in MODELS if n not in ("gla", "attention")])
def test_a_range_is_of_each_factor(name: str) -> None:
    settings = model_settings(name)
    assert settings["allow_neg_eigval"] == (name.endswith("[c=2]") if "rwkv7" in name else not name.endswith("[0,1]"))


def test_rwkv7_says_how_much_it_erases_and_1_if_nothing_is_said() -> None:
    assert model_settings("rwkv7_2[c=1]") == model_settings("rwkv7_2") != model_settings("rwkv7_2[c=2]")


def test_a_model_does_not_inherit_the_gates_of_a_config(tmp_path: Path, root: Path) -> None:
    small = root / "train_configs/state_tracking/small.toml"
    text = f'extends = "{small}"\n[model]\nuse_forget_gate = true\nallow_neg_eigval = false\nnum_householder = 3\n'
    (tmp_path / "gated.toml").write_text(text)
    plain, gla = (c.loaded.config.model for c in cells("--config", str(tmp_path / "gated.toml"), "--models", "deltanet", "gla"))
    assert (plain.use_forget_gate, plain.allow_neg_eigval, plain.num_householder) == (False, True, 1)
    assert (gla.mixer, gla.num_householder) == ("gla", 1)


@pytest.mark.parametrize(
    "base",
    [
        (),
        ("--task", "S5", "--heads", "8", "--head-dim", "32", "--hidden-size", "128", "--mlp", "512"),
        ("--task", "parity", "--layers", "3", "--hidden-size", "96"),
    ],
)
def test_models_are_of_one_size_within_a_percent_and_differ_in_nothing_but_the_mixer(base: tuple[str, ...]) -> None:
    runs = cells(*base, "--models", *MODELS, *COST)
    sizes = [parameters(c.loaded.config.model) for c in runs]
    assert max(sizes) / min(sizes) < 1.01, dict(zip(MODELS, sizes, strict=True))
    keep = {"num_hidden_layers", "hidden_size", "num_heads", "head_dim", "vocab_size", "use_short_conv", "use_output_gate"}
    assert len({tuple(c.loaded.config.model.model_dump(include=keep).items()) for c in runs}) == 1


def test_the_largest_model_keeps_the_mlp_that_was_given_and_a_size_may_be_asked_for() -> None:
    runs = {c.name: c.loaded.config.model for c in cells("--models", "deltanet", "deltaproduct_3", "--mlp", "100")}
    assert runs["deltaproduct_3_-1_1-seed1"].mlp_size == 100
    assert runs["deltanet_-1_1-seed1"].mlp_size > 100
    for cell in cells("--models", "deltanet", "deltaproduct_3", "--parameters", "100_000"):
        assert parameters(cell.loaded.config.model) == pytest.approx(100_000, rel=0.01)


# -- folders -----------------------------------------------------------------------------------------------------------


def test_a_folder_says_what_will_be_trained_there(tmp_path: Path) -> None:
    runs = cells("--task", "Z5", "--seeds", "2", "--steps", "9", out=tmp_path)
    write_folders(runs)
    for cell in runs:
        assert config_from_toml((cell.folder / "config.toml").read_text()) == cell.loaded.config
    assert sorted(path.name for path in tmp_path.iterdir()) == [cell.name for cell in runs]


OTHER_STEPS = (
    r"deltaproduct_2_-1_1-seed1 was trained with other settings \(training.steps was 9, is now 10\); "
    r"choose another --out, or move that folder away$"
)


def test_a_folder_trained_with_other_settings_is_refused_and_untouched(tmp_path: Path) -> None:
    before = cells("--steps", "9", "--seeds", "1", out=tmp_path)
    write_folders(before)
    begin(before[0], "finished")
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=OTHER_STEPS):
        write_folders(cells("--steps", "10", "--seeds", "2", out=tmp_path))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files
    assert [path.name for path in tmp_path.iterdir()] == [before[0].name]
    write_folders(cells("--steps", "9", "--seeds", "2", out=tmp_path))
    assert {path: path.read_bytes() for path in files} == files


def test_a_run_that_is_described_otherwise_is_the_same_run_under_its_new_description(tmp_path: Path) -> None:
    first = cells(out=tmp_path)
    write_folders(first)
    begin(first[0], "training")
    path = first[0].folder / "config.toml"
    text = path.read_text()
    path.write_text(text.replace('description = "', 'description = "another '))
    assert text != path.read_text()
    write_folders(cells(out=tmp_path))
    assert path.read_text() == text


def test_a_study_whose_folder_was_moved_goes_on_in_the_new_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done, begun = cells("--seeds", "2", out=tmp_path / "old")
    write_folders([done, begun])
    begin(done, "finished")
    begin(begun, "training")
    (tmp_path / "old").rename(tmp_path / "new")
    (tmp_path / "new" / begun.name / "checkpoint").mkdir()
    moved = cells("--seeds", "2", out=tmp_path / "new")
    for cell in moved:
        assert not holds_config(cell.folder, cell.loaded.config, cell.loaded.resolved_toml(), "")
    assert dispatch(["state-tracking", "train", *PRINT, "--seeds", "2", "--out", str(tmp_path / "new")]) == 0
    assert capsys.readouterr().out == f"python train.py --config {tmp_path}/new/{begun.name}/config.toml\n"
    for cell in moved:
        written = config_from_toml((cell.folder / "config.toml").read_text())
        assert Path(written.job.dump_folder) / written.job.run_name == cell.folder
        assert holds_config(cell.folder, cell.loaded.config, cell.loaded.resolved_toml(), "")
    assert (moved[1].folder / "checkpoint").exists()
    assert not (tmp_path / "old").exists()


def test_a_table_that_changed_since_is_another_setting(tmp_path: Path) -> None:
    four = tmp_path / "four.csv"
    four.write_text("0,1,2,3\n1,2,3,0\n2,3,0,1\n3,0,1,2\n")
    first = cells("--task", str(four), out=tmp_path / "out")
    write_folders(first)
    begin(first[0], "finished")
    write_folders(cells("--task", str(four), out=tmp_path / "out"))
    four.write_text("0,1,2,3\n1,0,3,2\n2,3,0,1\n3,2,1,0\n")
    parse_group.cache_clear()  # as in another process
    with pytest.raises(UserError, match=r"was trained on another table of .*four\.csv; choose another --out"):
        write_folders(cells("--task", str(four), out=tmp_path / "out"))


def test_a_run_that_does_not_say_what_it_drew_from_is_another_one(tmp_path: Path) -> None:
    first = cells(out=tmp_path)
    write_folders(first)
    write_run(first[0].folder, {"state": "finished", "steps": first[0].steps})
    with pytest.raises(UserError, match="was trained on another table of S3"):
        write_folders(first)


def test_a_folder_that_never_began_is_written_anew(tmp_path: Path) -> None:
    write_folders(cells("--steps", "9", out=tmp_path))
    again = cells("--steps", "10", out=tmp_path)
    write_folders(again)
    assert tomli.loads((again[0].folder / "config.toml").read_text())["training"]["steps"] == 10


def test_print_writes_the_folders_and_the_commands_and_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["state-tracking", "train", "--seeds", "2", *PRINT, "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = ["deltaproduct_2_-1_1-seed1", "deltaproduct_2_-1_1-seed2"]
    assert lines == [f"python train.py --config {tmp_path}/{name}/config.toml" for name in names]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", *names]
    assert all([p.name for p in (tmp_path / name).iterdir()] == ["config.toml"] for name in names)


def test_print_leaves_out_what_is_finished_and_what_another_process_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done, running, waiting = runs = cells("--seeds", "3", out=tmp_path)
    write_folders(runs)
    begin(done, "finished")
    begin(running, "training")
    begin(waiting, "training")
    lock = RunLock(running.folder)
    assert dispatch(["state-tracking", "train", "--seeds", "3", *PRINT, "--out", str(tmp_path)]) == 0
    lock.close()
    assert capsys.readouterr().out == f"python train.py --config {waiting.folder}/config.toml\n"


@pytest.mark.parametrize("launch", ["local", "print"])
def test_a_second_study_in_a_folder_somebody_trains_in_changes_nothing(launch: str, tmp_path: Path) -> None:
    runs = cells("--seeds", "2", "--steps", "9", out=tmp_path)
    write_folders(runs)  # none has begun: they might be written anew
    before = {cell.folder: (cell.folder / "config.toml").read_bytes() for cell in runs}
    lock = RunLock(tmp_path)
    with pytest.raises(RunError, match="another process is at work in"):
        dispatch(["state-tracking", "train", "--seeds", "3", "--steps", "7", "--launch", launch, "--out", str(tmp_path)])
    lock.close()
    assert {path.parent: path.read_bytes() for path in tmp_path.glob("*/config.toml")} == before


# -- bad input ---------------------------------------------------------------------------------------------------------

MISTAKES = {
    "a group that is not one": (["--task", "Q8"], "'Q8'"),
    "a factor that is no group": (["--group", "S3xQ8"], "'Q8'"),
    "a language that is not one": (["--task", "dyck"], "'dyck'"),
    "no task": (["--task", ""], "state_tracking.task"),
    "an order above the vocabulary's limit": (["--task", "S8"], "'S8' has more elements than a vocabulary may have"),
    "an order above the vocabulary asked for": (["--task", "S5", "--model.vocab_size", "64"], "model.vocab_size = 64"),
    "positions that hold no element": (["--training.seq_len", "1"], "training.seq_len = 1"),
    "positions that hold no whole element": (["--tokens-per-element", "3"], "training.seq_len = 129"),
    "words longer than the positions": (["--min-length", "200"], "state_tracking.min_length = 200"),
    "a test shorter than training": (["--test-length", "10"], "state_tracking.test_length = 10"),
    "strings that do not exist": (
        ["--task", "modular-arithmetic", "--length", "5", "--min-length", "5"],
        "modular-arithmetic has no string of 5 to 5 symbols",
    ),
    "n_h = 0": (["--num-householder", "0"], "num_householder = 0"),
    "n_h = 9": (["--num-householder", "9"], "num_householder = 9"),
    "n_h = two": (["--num-householder", "two"], 'num_householder = "two"'),
    "a model of n_h = 0": (["--models", "deltaproduct_0"], "n_h = 0"),
    "an adaptive router without a cost": (["--adaptive"], "householder_cost"),
    "an adaptive model without a cost": (["--models", "adaptive-deltaproduct_2"], "householder_cost"),
    "a cost of nothing": (["--adaptive", "--householder-cost", "0"], "householder_cost = 0"),
    "a router without a choice": (["--adaptive", "--householder-cost", "1", "--num-householder", "1"], "adaptive_householder"),
    "a model that does not exist": (["--models", "mamba"], "'mamba'"),
    "a model twice": (["--models", "deltanet", "deltanet[-1,1]"], "twice"),
    "a range attention has not": (["--models", "attention[0,1]"], "'attention[0,1]'"),
    "a range RWKV-7 has not": (["--models", "rwkv7[-1,1]"], "choose [c=1] or [c=2]"),
    "a c DeltaNet has not": (["--models", "deltanet[c=2]"], "choose [0,1] or [-1,1]"),
    "a range nothing has": (["--models", "deltanet[0,2]"], "'deltanet[0,2]'"),
    "DeltaProduct without its n_h": (["--models", "deltaproduct"], "deltaproduct_2"),
    "an n_h DeltaNet has not": (["--models", "deltanet_2"], "n_h = 2"),
    "models and a model": (["--models", "deltanet", "--num-householder", "2"], "--num-householder"),
    "models and a model by its key": (["--models", "deltanet", "--model.num_householder", "2"], "--models"),
    "models and gates": (["--models", "deltanet", "--gated"], "--gated"),
    "models and gates by their key": (["--models", "deltanet", "--model.use_forget_gate", "false"], "--models"),
    "models and a router": (["--models", "deltanet", "--adaptive"], "--adaptive"),
    "models and a range": (["--models", "deltanet", "--range", "[0,1]"], "--range"),
    "models and a range by its key": (["--models", "deltanet", "--model.allow_neg_eigval", "false"], "--models"),
    "models and a mixer": (["--models", "deltanet", "--model.mixer", "attention"], "--models"),
    "models that cannot be so small": (["--models", "deltanet", "rwkv7_4", "--parameters", "9000"], "9,000"),
    "parameters of one model": (["--parameters", "10_000"], "--parameters"),
    "a seed of its own": (["--debug.seed", "3"], "--debug.seed: a study numbers its seeds"),
    "a seed of its words": (["--data.seed", "3"], "--data.seed"),
    "a name of its own": (["--job.run_name", "mine"], "--job.run_name: a study numbers its seeds and names its runs"),
    "a folder of its own": (["--job.dump_folder", "mine"], "--job.dump_folder"),
    "a description of its own": (["--job.description", "mine"], "--job.description"),
    "two lengths": (["--length", "64", "--training.seq_len", "65"], "--length and --training.seq_len"),
    "only the identity": (["--task", "A5", "--max-moved", "2"], "max_moved = 2"),
    "a config that does not exist": (["--config", "enormous"], "'enormous'"),
    "a config of text": (["--config", "debug.toml"], "data.source"),
    "text as data": (["--data.source", "shards"], "data.source = 'shards'"),
    "an accuracy above one": (["--solved-accuracy", "99"], "solved_accuracy = 99"),
    "no steps": (["--steps", "0"], "training.steps = 0"),
    "validation off": (["--validation.enable", "false"], "validation.enable"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_before_anything_is_written(
    mistake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, named = MISTAKES[mistake]
    with pytest.raises(UserError) as caught:
        dispatch(["state-tracking", "train", *words, *PRINT, "--out", str(tmp_path / "out")])
    message = str(caught.value)
    assert named in message
    assert "\n" not in message
    assert len(message) < 350
    assert not (tmp_path / "out").exists()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "words",
    [["--length", "0"], ["--seeds", "0"], ["--at-once", "0"], ["--parameters", "0"], ["--seeds", "two"], ["--length", "1.5"]],
)
def test_a_number_that_is_none_is_refused_by_the_command_line(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        dispatch(["state-tracking", "train", *words, *PRINT, "--out", str(tmp_path / "out")])
    assert caught.value.code == 2
    assert f"argument {words[0]}: {words[1]!r}: expected " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_languages_length_counts_its_symbols_whatever_the_tokens_of_an_element() -> None:
    """Languages have one token a symbol: 4 tokens an element must not make words of 40 symbols four times as long."""
    with suppress(UserError):  # to refuse it is as good
        assert planned("--task", "parity", "--length", "40", "--tokens-per-element", "4").training.seq_len == 41


@pytest.mark.parametrize("words", [("--task", "Q8"), ("--num-householder", "0"), ("--adaptive",)])
def test_from_the_shell_a_mistake_is_one_message_and_exit_code_2(words: tuple[str, ...], tmp_path: Path, root: Path) -> None:
    command = [sys.executable, *TRAIN, *words, "--out", str(tmp_path / "out")]
    answer = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600)
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr.startswith("error: ")
    assert answer.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [[], ["train"], ["report"], ["inspect"], ["theory"]])
def test_help_imports_little_and_so_answers_at_once(kind: list[str], root: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "titan_dp.cli", "state-tracking", *kind, "--help"]
    answer = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600)
    assert answer.returncode == 0, answer.stderr
    assert "usage:" in answer.stdout
    imported = {line.rpartition("|")[2].strip() for line in answer.stderr.splitlines()}
    assert not imported & {"torch", "scipy", "matplotlib"}
    assert len(imported) < 500, "a module takes about a millisecond"
