"""What a configuration tells people: its resolved form with origins, warnings of settings without effect, its documentation."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import tomli

from tests.unit.conftest import MINIMAL, Folder
from titan_dp.cli import dispatch
from titan_dp.config import Config, advice
from titan_dp.config import describe as config_docs
from titan_dp.config.load import PROJECT, config_from_toml, load_config

# -- the resolved configuration ----------------------------------------------------------------------------------------


def some_settings(seed: int) -> str:
    """Random valid settings of every kind of value as TOML."""
    rng = random.Random(seed)
    text = "".join(rng.choice("aB3 \"\\'\n\t#=[]é\u2028\x7f\x1b😀") for _ in range(20))
    return f"""
[job]
description = {config_docs.to_toml(text)}
[data]
path = {config_docs.to_toml([f"p{i}" for i in range(rng.randint(1, 3))])}
[training]
tokens = {rng.randint(1, 10**13)}
[training.dataloader]
num_workers = {rng.randint(0, 9)}
[optimizer]
lr = {rng.uniform(1e-9, 1)!r}
eps = {10.0 ** -rng.randint(1, 20)!r}
[activation_checkpoint]
mode = "selective"
selective_ac_option = {rng.randint(1, 5)}
[debug]
deterministic = {rng.choice(["true", "false"])}
seed = {rng.randint(-5, 2**62)}
"""


@pytest.mark.parametrize("seed", range(3))
def test_the_resolved_configuration_loads_as_the_same_configuration(folder: Folder, seed: int) -> None:
    loaded = folder.load(some_settings(seed))
    assert loaded.config != Config.model_validate({"training": {"steps": 1}})
    assert config_from_toml(loaded.resolved_toml()) == loaded.config
    assert config_from_toml(loaded.annotated_toml()) == loaded.config
    again = load_config(["--config", folder.write(loaded.resolved_toml(), "again.toml")])
    assert again.config == loaded.config
    assert again.resolved_toml() == loaded.resolved_toml()
    assert again.warnings() == []


def test_the_annotated_configuration_shows_every_key_with_its_origin_in_schema_order(folder: Folder) -> None:
    folder.write("[optimizer]\nlr = 0.5\n", "base.toml")
    text = folder.load('extends = "base.toml"\n[training]\nsteps = 7\n', "--compile.enable").annotated_toml()
    assert re.search(rf"^lr = 0.5 +# {folder.path}/base.toml:2$", text, re.M)
    assert re.search(rf"^steps = 7 +# {folder.path}/run.toml:3$", text, re.M)
    assert re.search(r"^enable = true +# command line$", text, re.M)
    assert re.search(r"^beta1 = 0.9 +# default$", text, re.M)
    assert re.search(r"^# tokens = +# unset$", text, re.M)
    assert re.search(r'^run_name = "run" +# the file\'s name$', text, re.M)
    shown = []
    for line in text.splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line:
            shown.append(f"{section}.{line.removeprefix('# ').split(' ')[0]}")
    assert shown == list(config_docs.all_keys())
    assert set(tomli.loads(text)) == set(Config.model_fields)


def test_the_commit_of_the_project_is_known_in_a_git_checkout(folder: Folder) -> None:
    commit = folder.load(MINIMAL).git_commit
    assert re.fullmatch(r"[0-9a-f]{40}(\+changes)?" if (PROJECT / ".git").exists() else "unknown", commit)


# -- settings without effect -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "warned"),
    [
        ("[optimizer]\nmuon_lr = 1.0", ["optimizer.muon_lr"]),
        ('[model]\nmixer = "attention"\n[checkpoint]\nenable = false', []),  # a setting nobody made
        ('[model]\nmixer = "attention"\nuse_forget_gate = true', ["model.use_forget_gate"]),
        ("training.householder_cost = 0.1\n[model]\nadaptive_householder = true", []),
        ("[model]\nattention_window = 64", ["model.attention_window"]),
        ("[model]\nattention_window = 64\nattention_layers = [1]", []),
        ('[data]\nhf_name = "x"\nweights = [1.0]', ["data.hf_name", "data.weights"]),
        ("[checkpoint]\nenable = false\ninterval = 3\n[generate]\nprompt = 'x'", ["checkpoint.interval", "generate.prompt"]),
    ],
)
def test_settings_without_effect_are_warned_of_and_others_are_not(folder: Folder, text: str, warned: list[str]) -> None:
    loaded = folder.load(f"training.steps = 1000\n{text}\n")
    assert [warning.split(" ")[0] for warning in loaded.warnings()] == warned
    assert all(f"{folder.path}/run.toml:" in warning for warning in loaded.warnings())


def test_shipped_settings_without_effect_are_not_warned_of_but_own_ones_beside_them_are(folder: Folder) -> None:
    loaded = folder.load('extends = "debug.toml"\ncheckpoint.enable = false\ngenerate.temperature = 0.5\n')
    assert [warning.split(" ")[0] for warning in loaded.warnings()] == ["generate.temperature"]


def test_a_sweep_is_no_run_and_the_command_for_it_is_named(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.path)
    file = folder.path / "run.toml"
    (problem,) = folder.problems('extends = "debug.toml"\n[sweep.axes]\nseed = [1, 2]\n')
    assert problem == "run.toml describes a sweep and not one run; `titan-dp sweep run.toml` lists its runs"
    assert dispatch(["sweep", str(file)]) == 0


def test_a_warmup_longer_than_the_run_is_warned_of(folder: Folder) -> None:
    (warning,) = folder.load(MINIMAL).warnings()
    assert warning.startswith("lr_scheduler.warmup_steps = 512 is not over when the run ends")


def test_every_rule_of_the_warnings_names_keys_that_exist(folder: Folder) -> None:
    for _, section, names, _ in advice.rules(folder.load(MINIMAL).config):
        for name in names.split():
            assert f"{section}.{name}" in config_docs.all_keys()


# -- documentation -----------------------------------------------------------------------------------------------------


def test_every_key_is_documented_and_the_help_shows_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        load_config(["--config", "whatever", "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    for key in config_docs.all_keys().values():
        assert key.doc.endswith("."), key.dotted
        assert f"--{key.dotted}  ({key.expected}" in shown


def test_the_committed_page_of_the_settings_is_current(root: Path) -> None:
    assert (root / "docs/config.md").read_text() == config_docs.page(), (
        "run: python -m titan_dp.config.describe > docs/config.md"
    )
