"""`--section.key VALUE` means the same for every command that takes it as it does for train.py."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable

import pytest

from titan_dp import config
from titan_dp.cli import dispatch
from titan_dp.config.arguments import above_zero, count, fraction, householder_list, natural, percent, positive
from titan_dp.config.load import load_config
from titan_dp.errors import UserError
from titan_dp.estimate import command as estimate
from titan_dp.studies import match
from titan_dp.studies.state_tracking import train as state_tracking

Read = Callable[..., config.Config]


class _ReadError(Exception):
    """What the command has made of its settings; it goes no further."""

    def __init__(self, read: config.Config) -> None:
        self.read = read


@pytest.fixture(params=["train.py", "estimate", "match", "state-tracking train"])
def read(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Read:
    """read(*arguments): the configuration a command makes of debug.toml, or of its own default, and `arguments`."""

    def stop(argv: list[str]) -> None:
        raise _ReadError(load_config(argv).config)

    def run(*arguments: str) -> config.Config:
        commands = {
            "estimate": ["estimate", "--config", "debug.toml", "--nproc", "1"],
            "match": ["match", "--params", "2M", "--config", "debug.toml"],
            "state-tracking train": ["state-tracking", "train", "--task", "S3"],
        }
        if request.param == "train.py":
            return load_config(["--config", "debug.toml", *arguments]).config
        for module in (estimate, match):
            monkeypatch.setattr(module, "load_config", stop)
        monkeypatch.setattr(state_tracking, "write_folders", lambda cells: stop_with(cells[0].config))
        monkeypatch.setattr(state_tracking, "RunLock", lambda folder: stop_with)
        with pytest.raises(_ReadError) as stopped:
            dispatch([*commands[request.param], *arguments])
        return stopped.value.read

    def stop_with(c: config.Config) -> None:
        raise _ReadError(c)

    stop_with.close = lambda: None  # type: ignore[attr-defined]  # it stands for the lock as well
    return run


CASES = {
    "a flag alone": (["--model.use_short_conv"], {"use_short_conv": True}),
    "a flag and a value": (["--model.use_short_conv", "false"], {"use_short_conv": False}),
    "a flag = a value": (["--model.use_short_conv=false"], {"use_short_conv": False}),
    "an option after a flag": (["--model.use_short_conv", "--model.head_dim", "16"], {"use_short_conv": True, "head_dim": 16}),
    "two values": (["--model.head_dim", "16", "--model.head_dim=32"], {"head_dim": 32}),
    "a list": (["--model.attention_layers", "[0]"], {"attention_layers": [0]}),
}


@pytest.mark.parametrize(("arguments", "expected"), CASES.values(), ids=CASES)
def test_settings_are_read(read: Read, arguments: list[str], expected: dict[str, object]) -> None:
    model = read(*arguments).model
    assert {key: getattr(model, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model.head_dim"], "command line: --model.head_dim needs a value; expected integer > 0"),
        (["--model.head_dimm", "16"], "unknown key model.head_dimm; did you mean model.head_dim?"),
    ],
)
def test_a_wrong_setting_is_told_the_way_out(read: Read, arguments: list[str], said: str) -> None:
    with pytest.raises(UserError) as error:
        read(*arguments)
    assert said in str(error.value)


@pytest.mark.parametrize("command", [["estimate", "--config", "debug.toml", "--nproc", "1"], ["report", "runs"]])
def test_an_option_that_is_no_setting_is_refused_by_the_command(command: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        dispatch([*command, "--nprocs", "3"])
    assert end.value.code == 2
    assert "unrecognized arguments: --nprocs 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        (positive, "0", "integer > 0"),
        (positive, "1.5", "integer > 0"),
        (positive, "9" * 5000, "integer > 0"),
        (natural, "-1", "integer >= 0"),
        (fraction, "1.1", "number > 0 and <= 1"),
        (fraction, "nan", "number > 0 and <= 1"),
        (above_zero, "inf", "number > 0"),
        (count, "19X", "count from 1 to 1e14"),
        (householder_list, "1,1", "list of different n_h"),
        (percent, "6", "percentage up to 5"),
    ],
)
def test_a_wrong_number_is_told_what_is_expected(kind: Callable[[str], object], text: str, expected: str) -> None:
    with pytest.raises(ArgumentTypeError, match=f": expected {expected}"):
        kind(text)


def test_numbers_are_read_as_people_write_them() -> None:
    assert (positive("1_000"), natural("0"), fraction(".5"), count("805M"), count("5G"), percent("0.25%")) == (
        *(1000, 0, 0.5, 805_000_000, 5_000_000_000, 0.0025),
    )
