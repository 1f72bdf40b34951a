"""`--section.key VALUE` means the same for every command that takes it as it does for train.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from titan_dp import config
from titan_dp.cli import dispatch
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


def test_a_flag_alone_is_true(read: Read) -> None:
    assert read("--model.tie_word_embeddings").model.tie_word_embeddings is True
    assert read("--model.use_short_conv").model.use_short_conv is True


def test_a_flag_takes_a_value_as_well(read: Read) -> None:
    for arguments in (["--model.use_short_conv", "false"], ["--model.use_short_conv=false"]):
        assert read(*arguments).model.use_short_conv is False


def test_the_option_after_a_flag_is_read(read: Read) -> None:
    c = read("--model.use_short_conv", "--model.head_dim", "16")
    assert (c.model.use_short_conv, c.model.head_dim) == (True, 16)


def test_the_last_of_two_values_counts(read: Read) -> None:
    assert read("--model.head_dim", "16", "--model.head_dim=32").model.head_dim == 32


def test_a_list_is_read(read: Read) -> None:
    assert read("--model.attention_layers", "[0]").model.attention_layers == [0]


def refused(read: Read, *arguments: str) -> str:
    with pytest.raises(UserError) as error:
        read(*arguments)
    return str(error.value)


def test_a_setting_that_needs_a_value_says_so(read: Read) -> None:
    assert refused(read, "--model.head_dim") == "command line: --model.head_dim needs a value; expected integer > 0"


def test_an_unknown_setting_is_told_the_nearest_one(read: Read) -> None:
    assert "unknown key model.head_dimm; did you mean model.head_dim?" in refused(read, "--model.head_dimm", "16")
