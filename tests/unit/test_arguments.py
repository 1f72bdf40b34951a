"""`--section.key VALUE` means the same for every command that takes it as for train.py, and numbers are bounded."""

from __future__ import annotations

import argparse

import pytest

from titan_dp.cli import dispatch
from titan_dp.config import arguments
from titan_dp.config.arguments import parse, take_commands, take_settings
from titan_dp.config.load import load_config
from titan_dp.errors import UserError

COMMANDS = {
    "estimate": ["estimate", "--config", "debug.toml", "--nproc", "1"],
    "match": ["match", "--params", "2M", "--config", "debug.toml"],
    "state-tracking train": ["state-tracking", "train", "--task", "S3"],
}


def test_what_a_parser_does_not_know_is_handed_on_as_it_was_written() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--nproc")
    take_settings(parser, "as for train.py")
    before, after = ["--model.use_short_conv", "--model.head_dim=16"], ["--model.attention_layers", "[0]", "--debug.seed", "-1"]
    args = parse(parser, [*before, "--nproc", "3", *after])
    assert (args.nproc, args.settings) == ("3", [*before, *after])
    assert load_config(["--config", "debug.toml", *args.settings]).config.model.attention_layers == [0]


def test_a_value_may_look_like_options() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sbatch")
    for value in ("--mem=8G --time=1:00", "--exclusive --mem 8G"):
        assert parse(parser, ["--sbatch", value]).sbatch == value


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_every_command_that_takes_settings_refuses_a_wrong_one_as_train_py_does(command: list[str]) -> None:
    with pytest.raises(UserError) as error:
        dispatch([*command, "--model.head_dimm", "16", "--model.head_dim"])
    assert "unknown key model.head_dimm; did you mean model.head_dim?" in str(error.value)
    assert "command line: --model.head_dim needs a value; expected integer > 0" in str(error.value)


@pytest.mark.parametrize("command", [COMMANDS["estimate"], ["report", "runs"]])
def test_an_option_that_is_no_setting_is_refused_by_the_command(command: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        dispatch([*command, "--nprocs", "3"])
    assert end.value.code == 2
    assert "there is no option --nprocs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("positive", "1.5", "integer > 0"),
        ("positive", "9" * 5000, "integer > 0"),
        ("natural", "-1", "integer >= 0"),
        ("fraction", "nan", "number > 0 and <= 1"),
        ("above_zero", "inf", "number > 0"),
        ("count", "19X", "count from 1 to 1e14"),
        ("householder_list", "1,1", "list of different n_h"),
        ("percent", "6", "percentage up to 5"),
    ],
)
def test_a_wrong_number_is_told_what_is_expected(kind: str, text: str, expected: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f": expected {expected}"):
        getattr(arguments, kind)(text)


def test_numbers_are_read_as_people_write_them() -> None:
    written = {"positive": "1_000", "natural": "0", "fraction": ".5", "count": "5G", "percent": "0.25%"}
    assert [getattr(arguments, kind)(text) for kind, text in written.items()] == [1000, 0, 0.5, 5_000_000_000, 0.0025]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("sweeep", "did you mean sweep?"),
        ("evaluate perplexty", "did you mean perplexity?"),
        ("prepare --tokeniser x", "there is no option --tokeniser; did you mean --tokenizer?"),
        ("prepare --zzz", "there is no option --zzz; `titan-dp prepare --help` lists them"),
    ],
)
def test_a_mistyped_command_or_option_is_told_the_nearest(command: str, said: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        dispatch(command.split())
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("--confg debug.toml", "there is no option --confg; did you mean --config?"),
        ("--config debg.toml", "there is no config 'debg.toml'; did you mean debug.toml?"),
        (
            "--config cpu_study.toml",
            "describes a sweep and not one run; `titan-dp sweep cpu_study` lists its runs",
        ),
    ],
)
def test_a_mistyped_training_command_is_told_the_nearest(command: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(command.split())
    assert said in str(error.value)


def test_a_file_of_one_run_is_told_from_a_sweep_file() -> None:
    with pytest.raises(UserError, match="describes one run and no sweep; `titan-dp train --config debug.toml` starts it"):
        dispatch(["sweep", "debug.toml"])


def test_the_help_of_train_fits_80_columns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        load_config(["--help"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_commands_behind_dashes_go_to_the_command_that_takes_them_and_to_no_other() -> None:
    parser = argparse.ArgumentParser()
    subparsers = parser.add_subparsers()
    taking, other = subparsers.add_parser("taking"), subparsers.add_parser("other")
    taking.add_argument("run")
    taking.add_argument("--every")
    other.add_argument("files", nargs="*")
    take_commands(taking)
    args = parse(parser, ["taking", "here", "--every", "5", "--", "a", "--shards", "x", "--", "b=c"])
    assert (args.run, args.every, args.commands) == ("here", "5", [["a", "--shards", "x"], ["b=c"]])
    assert parse(parser, ["taking", "here"]).commands == []
    assert parse(parser, ["other", "--", "--file"]).files == ["--file"]
