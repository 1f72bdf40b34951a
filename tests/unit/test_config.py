"""Reading a configuration: who wins, what is refused and with which words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.unit.conftest import MINIMAL, Folder
from titan_dp.config import Model, Training, advice, load
from titan_dp.config import describe as config_docs
from titan_dp.config.load import SHIPPED, config_from_toml, load_config, resolve_config_path
from titan_dp.errors import UserError
from titan_dp.studies.state_tracking.train import _config_path as state_tracking_config
from titan_dp.studies.sweep_file import load_sweep

# -- precedence and inheritance ----------------------------------------------------------------------------------------


def test_the_command_line_beats_the_file_beats_its_base_beats_the_defaults(folder: Folder) -> None:
    folder.write("[training]\nsteps = 1\nseq_len = 1\nlocal_batch_size = 1\n", "base.toml")
    loaded = folder.load('extends = "base.toml"\n[training]\nsteps = 2\nseq_len = 2\n', "--training.steps", "3")
    training = loaded.config.training
    assert (training.steps, training.seq_len, training.local_batch_size, training.gc_freq) == (3, 2, 1, 50)
    origins = {key: loaded.provenance[f"training.{key}"] for key in ("steps", "seq_len", "local_batch_size", "gc_freq")}
    assert origins == {
        "steps": "command line",
        "seq_len": f"{folder.path}/run.toml:4",
        "local_batch_size": f"{folder.path}/base.toml:4",
        "gc_freq": "default",
    }


def test_a_wrong_value_is_refused_although_a_later_source_replaces_it(folder: Folder) -> None:
    folder.write(MINIMAL.replace("[training]", '[optimizer]\nlr = "x"\n[training]'), "base.toml")
    for text in ('extends = "base.toml"\n[optimizer]\nlr = 0.1\n', 'extends = "base.toml"\n'):
        (problem,) = folder.problems(text, "--optimizer.lr", "0.1")
        assert problem.endswith('optimizer.lr = "x": expected number > 0')
    assert folder.problems(MINIMAL, "--optimizer.lr", "-1", "--optimizer.lr", "1") == [
        "command line: optimizer.lr = -1: expected number > 0"
    ]


def test_steps_of_a_higher_source_replace_the_tokens_of_a_lower_one_and_the_reverse(
    folder: Folder,
) -> None:
    training = folder.load('[training]\ntokens = "1B"\n', "--training.steps", "4").config.training
    assert (training.steps, training.tokens) == (4, None)
    folder.write(MINIMAL, "base.toml")
    training = folder.load('extends = "base.toml"\n[training]\ntokens = "1B"\n').config.training
    assert (training.steps, training.tokens) == (None, 10**9)


def test_a_batch_of_which_both_sizes_follow_from_the_other_names_the_places_of_both(folder: Folder) -> None:
    assert folder.problems("[training]\nsteps = 1\nlocal_batch_size = -1\n", "--training.global_batch_size", "-1") == [
        "[training] local_batch_size = -1 is a share of global_batch_size, which is -1 too; set one (local_batch_size from "
        "run.toml:3, global_batch_size from command line)"
    ]


def test_extends_chains_and_is_relative_to_the_file_that_says_it(folder: Folder) -> None:
    folder.write("[optimizer]\nlr = 0.5\n" + MINIMAL, "shared/root.toml")
    folder.write('extends = "root.toml"\n[optimizer]\nbeta1 = 0.5\n', "shared/middle.toml")
    optimizer = folder.load('extends = "shared/middle.toml"\n[optimizer]\nbeta2 = 0.5\n').config.optimizer
    assert (optimizer.lr, optimizer.beta1, optimizer.beta2) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("base", "problem"),
    [
        ('"base.toml"', "run.toml: `extends` goes round in a circle: run.toml -> base.toml -> run.toml"),
        ('"gone.toml"', 'run.toml:2: extends = "gone.toml": there is no gone.toml; the shipped ones are 213m, '),
        ("3", "run.toml:2: extends = 3: expected the name of one file"),
    ],
)
def test_a_base_that_cannot_be_read_is_named(folder: Folder, base: str, problem: str) -> None:
    folder.write('extends = "run.toml"\n', "base.toml")
    (said,) = folder.problems(f"\nextends = {base}\n{MINIMAL}")
    assert said.startswith(problem)


def test_a_base_is_looked_for_beside_the_file_and_then_among_the_shipped_ones(folder: Folder) -> None:
    text = 'extends = "debug.toml"\n[training]\nsteps = 7\n'
    shipped = folder.load(text).config
    assert (shipped.training.steps, shipped.model.mixer, shipped.model.num_householder) == (7, "deltaproduct", 2)
    folder.write(MINIMAL, "debug.toml")
    assert folder.load(text).config.model == config_from_toml(MINIMAL).model


# -- finding the file --------------------------------------------------------------------------------------------------


def test_a_name_means_a_file_here_and_then_one_that_ships(monkeypatch: pytest.MonkeyPatch, folder: Folder) -> None:
    monkeypatch.chdir(folder.path)
    shipped = load_config(["--config", "debug"])
    assert shipped == load_config(["--config=debug.toml"]) == load_config(["--job.config_file", "debug"])
    folder.write("[training]\nsteps = 999\n", "debug.toml")
    folder.write("[training]\nsteps = 999\n", "paper/800m.toml")
    for name in ("debug", "debug.toml", "./debug.toml", "paper/800m"):
        assert load_config(["--config", name]).config.training.steps == 999
    assert load_config(["--config", "paper/213m"]).config.training.steps != 999


def test_every_command_finds_files_by_the_same_rule(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, name in ((SHIPPED, "debug"), (SHIPPED / "sweeps", "cpu_study"), (SHIPPED / "state_tracking", "small")):
        assert {resolve_config_path(given, folder) for given in (name, f"{name}.toml")} == {folder / f"{name}.toml"}
    assert load_sweep(Path("cpu_study")).file == SHIPPED / "sweeps/cpu_study.toml"
    assert state_tracking_config("small") == str(SHIPPED / "state_tracking/small.toml")
    for name in ("cpu_study", "small"):
        Path(f"{name}.toml").write_text(MINIMAL + "global_batch_size = 8\n[sweep.axes]\nseed = [1]\n")
    assert load_sweep(Path("cpu_study")).file == load_sweep(Path("cpu_study.toml")).file == Path("cpu_study.toml")
    assert state_tracking_config("small") == str(tmp_path / "small.toml")


@pytest.mark.parametrize("arguments", [["--config", "no_such_run"], []])
def test_a_missing_config_lists_those_there_are(arguments: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        load_config(arguments)
    listed = re.search(r"the shipped ones are (.*), debug, gdp-1b; paper/ has", str(refused.value))
    assert listed is not None
    sizes, endings = listed[1].removesuffix(")").split(" (also ")
    names = {size + ending for size in sizes.split(", ") for ending in ("", *endings.split(", "))} | {"debug", "gdp-1b"}
    assert names == {path.stem for path in SHIPPED.glob("*.toml")}


def test_no_name_is_listed_that_does_not_ship(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("1b", "1b_gated", "2b_gated", "2b_gated_nh3"):
        (tmp_path / f"{name}.toml").touch()
    monkeypatch.setattr(load, "SHIPPED", tmp_path)
    with pytest.raises(UserError, match=r"the shipped ones are 1b \(also _gated\), 2b_gated, 2b_gated_nh3; paper/"):
        load_config([])


def test_the_run_is_named_after_its_file_unless_it_has_a_name(folder: Folder) -> None:
    assert folder.load(MINIMAL).run_name == folder.load(MINIMAL + '[job]\nrun_name = ""\n').run_name == "run"
    assert folder.load(MINIMAL, "--job.run_name", "other").config.job.run_name == "other"


# -- the command line --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "key", "value"),
    [
        (["--optimizer.lr", "1e-3"], "optimizer.lr", 1e-3),
        (["--optimizer.lr", "1"], "optimizer.lr", 1.0),
        (["--validation.steps", "-1"], "validation.steps", -1),
        (["--compile.enable"], "compile.enable", True),
        (["--checkpoint.enable", "false"], "checkpoint.enable", False),
        (["--model.attention_layers", "[1, 3]"], "model.attention_layers", [1, 3]),
        (["--model.attention_layers=[]"], "model.attention_layers", []),
        (["--data.path", '["a", "b"]'], "data.path", ["a", "b"]),
        (["--job.run_name", "123"], "job.run_name", "123"),
        (["--job.run_name", '"quoted"'], "job.run_name", "quoted"),
        (["--job.description=a = b"], "job.description", "a = b"),
        (["--generate.prompt="], "generate.prompt", ""),
        (["--activation_checkpoint.selective_ac_option", "op"], "activation_checkpoint.selective_ac_option", "op"),
    ],
)
def test_values_on_the_command_line_are_toml_or_else_plain_text(
    folder: Folder, arguments: list[str], key: str, value: object
) -> None:
    loaded = folder.load(MINIMAL, *arguments)
    assert config_docs.all_keys()[key].of(loaded.config) == value
    assert loaded.provenance[key] == "command line"


def test_flags_of_the_program_itself_take_no_value(folder: Folder) -> None:
    loaded = folder.load(MINIMAL, "--print-config", "--dry-run")
    assert loaded.print_config
    assert loaded.dry_run
    assert not folder.load(MINIMAL).dry_run


def test_arguments_that_are_no_settings_are_refused(folder: Folder) -> None:
    assert folder.problems(MINIMAL, "--step", "8") == [
        "command line: there is no option --step; did you mean --training.steps or --validation.steps?"
    ]
    assert folder.problems(MINIMAL, "--global-batch-size", "8") == [
        "command line: there is no option --global-batch-size; did you mean --training.global_batch_size?"
    ]
    assert folder.problems(MINIMAL, "800m.toml") == ["command line: unexpected '800m.toml'; write --config 800m.toml"]
    assert folder.problems(MINIMAL, "--training.seq_len") == [
        "command line: --training.seq_len needs a value; expected integer > 0"
    ]
    (twice,) = folder.problems(MINIMAL, "--config", folder.write(MINIMAL))
    assert "--config is given twice" in twice


def test_tokens_are_counted_in_thousands_to_trillions() -> None:
    for written, count in {"19B": 19 * 10**9, "1.5T": 1.5e12, "500_000": 500_000, "2 K": 2000, 19e9: 19 * 10**9}.items():
        assert Training(steps=1, tokens=written).tokens == count  # type: ignore[arg-type]


# -- mistakes ----------------------------------------------------------------------------------------------------------

# What a file says beside `training.steps = 10`, and the one problem, without the file's name.
REFUSALS = [
    # unknown keys, with the nearest valid one
    ("[optimizer]\nlrr = 1", "unknown key optimizer.lrr; did you mean optimizer.lr?"),
    ("[modell]\nhidden_size = 1", "unknown key modell.hidden_size; did you mean model.hidden_size?"),
    ("[checkpont]\nwhen = 1", "unknown key checkpont.when; did you mean the section [checkpoint]?"),
    ("[model]\nseq_len = 1", "unknown key model.seq_len; did you mean training.seq_len?"),
    ("[optimizer]\nsteps = 1", "unknown key optimizer.steps; did you mean training.steps or validation.steps?"),
    ("compile = true", "unknown key compile; it is a section; its keys are enable"),
    ("[comm]\nmode = 1", "unknown key comm.mode; did you mean activation_checkpoint.mode?"),
    ("[debug]\nxyzzy = 1", "unknown key debug.xyzzy; the keys of [debug] are seed, deterministic"),
    ("[float8]\nx = 1", "unknown key float8.x; set quantize.linear"),
    # values
    ('training.seq_len = "8"', 'training.seq_len = "8": expected integer > 0'),
    ("training.seq_len = true", "training.seq_len = true: expected integer > 0"),
    ("training.seq_len = 8.5", "training.seq_len = 8.5: expected integer > 0"),
    ("training.seq_len = 9223372036854775808", "training.seq_len = 9223372036854775808: expected integer > 0"),
    ("[compile]\nenable = 1", "compile.enable = 1: expected true or false"),
    ("[optimizer]\nbeta1 = 1.0", "optimizer.beta1 = 1.0: expected number >= 0 and < 1"),
    ('[optimizer]\nname = "Adam"', 'optimizer.name = "Adam": expected "AdamW" or "Muon"'),
    ("[checkpoint]\nkeep_latest_k = 1", "checkpoint.keep_latest_k = 1: expected 0 or integer >= 2"),
    ("[model]\nattention_layers = [-1]", "model.attention_layers = [-1]: expected list of integers >= 0"),
    ("[data]\nseed = 2026-01-01", "data.seed = 2026-01-01: expected integer"),
    ('training.tokens = "19X"', 'training.tokens = "19X": expected whole number such as 500_000 or "19B"'),
    ("[data]\npath = []", "data.path = []: expected non-empty string or non-empty list of strings"),
    ('[data]\npath = [""]', "data.path = ['']: expected non-empty string or non-empty list of strings"),
    # rules between values
    (
        "[model]\nbackend = 'fla'\nmixer = 'gla'\nnum_householder = 1",
        "model.backend = 'fla' with model.mixer = 'gla', which it does not compute; set backend = 'auto'",
    ),
    (
        "model.backend = 'fla'\ntraining.mixed_precision_param = 'float32'",
        "model.backend = 'fla' with training.mixed_precision_param = 'float32', which it does not take; set 'bfloat16'",
    ),
    ("training.tokens = 9", "training: give exactly one of steps and tokens (steps = 10 and tokens = 9)"),
    ('[data]\npath = ["a", "b"]\n[validation]\npath = "b"', "data.path and validation.path both name 'b': validation must"),
    ('[model]\nmixer = "rwkv7"\n[compile]\nenable = true', "compile.enable = true with model.mixer = 'rwkv7'"),
    ("[model]\nnum_householder = 1\nadaptive_householder = true", "no steps to choose from with num_householder = 1"),
    (
        "[model]\nadaptive_householder = true",
        "model.adaptive_householder = true without training.householder_cost: a router without a cost never learns to "
        "switch a step off; set the cost, such as --training.householder_cost 0.001 (nats per",
    ),
]


@pytest.mark.parametrize(("text", "problem"), REFUSALS, ids=[text for text, _ in REFUSALS])
def test_a_mistake_is_named_with_its_line_and_the_way_out(folder: Folder, text: str, problem: str) -> None:
    (found,) = folder.problems(f"training.steps = 10\n{text}\n")
    assert problem in found
    if problem.startswith(("unknown key", "training.", "compile.enable = 1", "optimizer.")):
        assert found.startswith(f"run.toml:{3 if text.startswith('[') else 2}: {problem}")


def test_the_words_of_torchtitan_and_flame_are_translated(folder: Folder) -> None:
    means = {
        "training.batch_size": "training.local_batch_size",
        "training.compile": "compile.enable",
        "checkpoint.enable_checkpoint": "checkpoint.enable",
        "model.use_gate": "model.use_output_gate",
        "model.flavor": "model.hidden_size",
        "optimizer.betas": "optimizer.beta1 and optimizer.beta2",
        "job.config_file": "--config",
    }
    problems = folder.problems("".join(f"{key} = 1\n" for key in means))
    for line, (key, meant) in zip(problems, means.items(), strict=True):
        assert f"unknown key {key}; " in line
        assert meant in line


def test_every_key_a_hint_names_exists() -> None:
    for key, hint in advice.HINTS.items():
        for dotted in re.findall(r"\b[a-z_]+\.[a-z_.0-9]*[a-z0-9]\b", hint):
            assert dotted in config_docs.all_keys(), hint
        assert key not in config_docs.all_keys(), f"{key} is a valid key: its hint can never be shown"


def test_a_syntax_error_is_named_with_its_line(folder: Folder) -> None:
    for text in ("[training]\nsteps = 10\nseq_len =\n", '[job]\ndescription = """never closed\n'):
        (problem,) = folder.problems(text)
        assert problem.startswith("run.toml:3: not valid TOML: ")


def test_all_problems_of_a_file_its_base_and_the_command_line_are_reported_at_once(folder: Folder) -> None:
    folder.write("[optimizer]\nlr = -1\n[metrics]\nlog = 1\n", "base.toml")
    text = 'extends = "base.toml"\n[training]\ntokens = "1B"\nsteps = 3\n[model]\nhidden_size = 100\nmixer = "attention"\n'
    problems = folder.problems(text, "--comm.train_timeout", "9", "--debug.seed", "x", "stray")
    assert problems == [
        "command line: unexpected 'stray'; a setting is --section.key VALUE",
        "base.toml:2: optimizer.lr = -1: expected number > 0",
        "base.toml:4: unknown key metrics.log; did you mean metrics.log_freq?",
        "command line: unknown key comm.train_timeout; did you mean comm.train_timeout_seconds?",
        'command line: debug.seed = "x": expected integer',
        "training: give exactly one of steps and tokens (steps = 3 and tokens = 1000000000)",
    ]


def test_a_rule_over_a_section_with_a_mistake_is_not_repeated(folder: Folder) -> None:
    for mistake in ("[training]\nstep = 10", '[training]\nsteps = "ten"'):
        assert len(folder.problems(mistake + "\n")) == 1
    assert len(folder.problems("training.steps = 1\n[model]\nn_layers = 9\nattention_layers = [99]\n")) == 1


def test_the_rules_of_a_section_are_a_line_each_and_name_where_their_values_were_set(folder: Folder) -> None:
    text = '[model]\nnum_hidden_layers = 2\nmixer = "gla"\nattention_num_heads = 7\n'
    problems = folder.problems(text, "--model.attention_layers", "[5]")
    assert problems[0] == (
        "[model] attention_layers names [5], but num_hidden_layers = 2 "
        "(num_hidden_layers from run.toml:2, attention_layers from command line)"
    )
    assert [line.split(" ")[1] for line in problems[1:3]] == ["hidden_size", "mixer"]
    assert problems[3] == "training: give exactly one of steps and tokens (neither is given)"


def test_a_family_is_what_the_literature_calls_it() -> None:
    settings = {
        "DeltaNet": {"num_householder": 1},
        "adaptive Gated DeltaProduct_4": {"adaptive_householder": True, "num_householder": 4, "use_forget_gate": True},
        "RWKV-7 product_2": {"mixer": "rwkv7"},
    }
    assert {name: Model(**values).family for name, values in settings.items()} == {name: name for name in settings}  # type: ignore[arg-type]


# -- lines of TOML -----------------------------------------------------------------------------------------------------


def test_lines_are_right_around_comments_multi_line_values_dotted_keys_and_inline_tables(folder: Folder) -> None:
    text = '''# a comment with [a header] and key = value

training.steps = 10           # a dotted key above all headers
comm = { init_timeout_seconds = 9 }
[job]                         # a header with a comment
description = """
[not a header]
nor = "a key"
"""
dump_folder = "x"
[model]
attention_layers = [
    1,  # a comment inside
    3,
]
num_heads = 4
[ optimizer ]
"lr" = 0.1
[validation]
freq = 1
'''
    loaded = folder.load(text)
    lines = {key: int(origin.rpartition(":")[2]) for key, origin in loaded.provenance.items() if "run.toml:" in origin}
    assert lines == {
        "training.steps": 3,
        "comm.init_timeout_seconds": 4,
        "job.description": 6,
        "job.dump_folder": 10,
        "model.attention_layers": 12,
        "model.num_heads": 16,
        "optimizer.lr": 18,
        "validation.freq": 20,
    }


def test_a_bad_checkpoint_configuration_names_itself() -> None:
    with pytest.raises(UserError, match=r"^step-7:2: unknown key model\.colour"):
        config_from_toml("[model]\ncolour = 1\n" + MINIMAL, name="step-7")


def test_one_reader_of_toml_whatever_the_version_of_python(root: Path) -> None:
    sources = [path for folder in ("titan_dp", "benchmarks", "tests") for path in (root / folder).rglob("*.py")]
    assert len(sources) > 100
    assert [str(path) for path in sources if re.search(r"^\s*(import|from) toml(lib|kit)?\b", path.read_text(), re.M)] == []


DEBUG = ["--config", "debug.toml"]


@pytest.mark.parametrize(
    ("written", "meant"), [("19B", 19_000_000_000), (".5B", 500_000_000), ("1.5K", 1500), ("1.", 1), ("0.1K", 100)]
)
def test_counts_may_have_a_unit(written: str, meant: int) -> None:
    assert load_config([*DEBUG, f"--training.tokens={written}"]).config.training.tokens == meant


@pytest.mark.parametrize("written", [".001", "1.0005K"])
def test_a_count_that_is_not_whole_is_refused_and_not_rounded(written: str) -> None:
    with pytest.raises(UserError, match=re.escape(f'training.tokens = "{written}": expected whole number such as')):
        load_config([*DEBUG, f"--training.tokens={written}"])


@pytest.mark.parametrize("key", ["compile.no_enable", "compile.no-enable", "no-compile.enable", "compile.disable_enable"])
def test_a_negated_key_is_answered_by_what_switches_it_off(key: str) -> None:
    with pytest.raises(
        UserError, match=f"unknown key {key}; to switch it off, write compile.enable = false .* --compile.enable=false"
    ):
        load_config([*DEBUG, f"--{key}"])


def test_the_sign_of_the_home_folder_is_the_home_folder_in_every_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    found = load_config(
        [*DEBUG, "--job.dump_folder=~/runs", "--data.path", '["~/a", "b~/c"]', "--checkpoint.initial_load_path=~"]
    )
    assert found.config.job.dump_folder == f"{tmp_path}/runs"
    assert found.config.data.paths == [f"{tmp_path}/a", "b~/c"]
    assert found.config.checkpoint.initial_load_path == str(tmp_path)
