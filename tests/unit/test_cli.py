"""The commands as a shell sees them: what they print, what they import, and their exit codes."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from titan_dp.cli import COMMANDS
from titan_dp.errors import UserError, machine_fault, run_main


def python(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=root, capture_output=True, text=True, timeout=600)


KINDS = [(name, kind) for name, (where, _) in COMMANDS.items() if isinstance(where, dict) for kind in where]
HELPS = {
    "train.py": ["train.py", "--help"],
    "titan-dp": ["-m", "titan_dp.cli", "--help"],
    **{f"titan-dp {name}": ["-m", "titan_dp.cli", name, "--help"] for name in COMMANDS},
    **{f"titan-dp {name} {kind}": ["-m", "titan_dp.cli", name, kind, "--help"] for name, kind in KINDS},
}


@pytest.mark.parametrize("command", HELPS)
def test_help_imports_little_and_so_answers_at_once(command: str, root: Path) -> None:
    answer = python(root, "-X", "importtime", *HELPS[command])
    assert answer.returncode == 0, answer.stderr
    assert "usage:" in answer.stdout
    imported = {line.rpartition("|")[2].strip() for line in answer.stderr.splitlines()}
    assert "titan_dp.errors" in imported
    assert not imported & {"torch", "scipy", "matplotlib", "transformers"}
    assert len(imported) < 500, "a module takes about a millisecond"


def test_the_list_of_commands_says_what_each_is_for(root: Path) -> None:
    answer = python(root, "-m", "titan_dp.cli", "--help").stdout
    for name, (_, summary) in COMMANDS.items():
        assert f"    {name}" in answer
        assert " ".join(summary.split()[:3]) in answer


def test_a_command_that_does_not_exist_is_the_users_mistake(root: Path) -> None:
    answer = python(root, "-m", "titan_dp.cli", "prepair")
    assert answer.returncode == 2
    assert "prepair" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_a_mistake_in_a_config_is_one_message_and_exit_code_2(root: Path) -> None:
    answer = python(root, "train.py", "--config", "debug.toml", "--optimizer.lrr", "1", "--print-config")
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr == "error: command line: unknown key optimizer.lrr; did you mean optimizer.lr?\n"


def failing(error: BaseException) -> int:
    def command() -> int:
        raise error

    return run_main(command)


def test_a_commands_own_exit_code_passes_through() -> None:
    assert run_main(lambda: 0) == 0
    assert run_main(lambda: 1) == 1


def test_the_users_mistakes_exit_with_2_and_interrupts_with_130_without_a_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    assert failing(UserError("training.steps = 0: give a positive number")) == 2
    assert failing(KeyboardInterrupt()) == 130
    assert capfd.readouterr().err == "error: training.steps = 0: give a positive number\nerror: interrupted\n"


def test_a_full_disk_is_one_sentence_and_exit_code_1_even_when_wrapped(capfd: pytest.CaptureFixture[str]) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "outputs/x")
    wrapped = RuntimeError("could not save")
    wrapped.__cause__ = full
    assert failing(full) == failing(wrapped) == 1
    error = capfd.readouterr().err
    assert error.count("No space left on device: 'outputs/x'; free some space") == 2
    assert "Traceback" not in error


def test_our_own_mistakes_show_a_traceback_and_exit_with_1(capfd: pytest.CaptureFixture[str]) -> None:
    assert failing(AssertionError("impossible")) == failing(FileNotFoundError("lost")) == 1
    assert capfd.readouterr().err.count("Traceback") == 2
    assert machine_fault(ValueError("no fault of the machine")) is None


def test_a_lost_rank_is_told_from_any_other_lost_connection(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    gloo = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1421")
    assert failing(gloo) == 1
    assert failing(RuntimeError("wandb: Connection reset by peer")) == 1
    said = capfd.readouterr().err
    assert said.startswith(
        "error: the connection to another rank is lost; that one says why, or was killed (RuntimeError: [/py"
    )
    assert said.count("another rank") == 1
    assert "Traceback" in said


def test_a_file_that_a_failing_disk_keeps_from_being_read_is_worth_another_try(capfd: pytest.CaptureFixture[str]) -> None:
    def read(number: int) -> int:
        try:
            raise OSError(number, os.strerror(number), "shard-00000.npy")
        except OSError as error:
            raise UserError("token shard shard-00000.npy cannot be read; prepare it again") from error

    assert run_main(lambda: read(errno.EIO)) == 1
    assert capfd.readouterr().err == (
        "error: token shard shard-00000.npy cannot be read; prepare it again; OSError: [Errno 5] Input/output error: "
        "'shard-00000.npy'; this may pass: try the same command again\n"
    )
    assert run_main(lambda: read(errno.ENOENT)) == 2


def test_a_path_that_is_something_else_is_the_users_mistake(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.touch()
    link.symlink_to(link)
    wrong = {
        "a file lies where a folder is needed": lambda: (file / "config.toml").read_text(),
        "something else lies there": lambda: file.mkdir(exist_ok=True),
        "a folder lies where a file is needed": lambda: tmp_path.open("a"),
        "choose a shorter name": lambda: (tmp_path / ("x" * 300)).mkdir(),
        "symbolic links lead in a circle": lambda: link.read_text(),
    }
    for reason, use in wrong.items():
        assert run_main(use) == 2  # type: ignore[arg-type]
        said = capfd.readouterr().err
        assert str(tmp_path) in said
        assert f"; {reason}" in said
        assert "Traceback" not in said


def test_a_terminal_without_a_sign_for_a_letter_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    assert run_main(lambda: print("caf\u00e9 \ufffd") or 0) == 0  # type: ignore[func-returns-value]
    assert shown.getvalue() == b"caf\\xe9 \\ufffd\n"


def test_other_ranks_name_themselves(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert failing(UserError("shard 7 is missing")) == 2
    assert capfd.readouterr().err == "error (rank 3): shard 7 is missing\n"


@pytest.mark.parametrize("arguments", ["train.py --config debug.toml --print-config", "-m titan_dp.cli --help"])
def test_a_reader_that_stops_reading_ends_the_command_quietly(arguments: str, root: Path) -> None:
    script = f"unset PYTHONUNBUFFERED; {sys.executable} {arguments} | true; echo ${{PIPESTATUS[0]}}"
    answer = subprocess.run(["bash", "-c", script], cwd=root, capture_output=True, text=True, timeout=600)
    assert (answer.stdout, answer.stderr) == ("1\n", "")
