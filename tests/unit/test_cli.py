"""The commands as a shell sees them: what they print, what they import, and their exit codes."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from titan_dp.cli import COMMANDS, dispatch
from titan_dp.errors import UserError, run_main


def python(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=root, capture_output=True, text=True, timeout=600)


NESTED = [[name, kind] for name, (where, _) in COMMANDS.items() if isinstance(where, dict) for kind in where]
HELPS = [[], *([name] for name in COMMANDS), *NESTED]
# Each command in a child of its own: it prints its help, then what it has imported on the way.
ASK_EACH = """
import json, os, sys
from titan_dp import cli
for argv in json.loads(sys.argv[1]):
    if os.fork() == 0:
        try:
            cli.dispatch([*argv, "--help"])
        except SystemExit as end:
            print("\\nEND", json.dumps([argv, end.code, sorted(sys.modules)]), flush=True)
        os._exit(0)
    os.wait()
"""


def test_every_help_imports_little_and_so_answers_at_once(root: Path) -> None:
    answer = python(root, "-c", ASK_EACH, json.dumps(HELPS))
    ends = [json.loads(line[4:]) for line in answer.stdout.splitlines() if line.startswith("END ")]
    assert [argv for argv, *_ in ends] == HELPS, answer.stderr
    assert answer.stdout.count("usage: titan-dp") == len(HELPS)
    first = answer.stdout.partition("END ")[0]
    for name, (_, summary) in COMMANDS.items():
        assert f"    {name}" in first
        assert " ".join(summary.split()[:3]) in first
    for argv, code, imported in ends:
        assert code == 0, argv
        assert not set(imported) & {"torch", "scipy", "matplotlib", "transformers"}, argv
        assert len(imported) < 600, f"{argv}: a module takes about a millisecond"


def test_the_help_of_train_py_imports_no_torch(root: Path) -> None:
    answer = python(root, "-X", "importtime", "train.py", "--help")
    imported = {line.rpartition("|")[2].strip() for line in answer.stderr.splitlines()}
    assert (answer.returncode, answer.stdout.startswith("usage: titan-dp train")) == (0, True)
    assert ("titan_dp.errors" in imported, "torch" in imported) == (True, False)
    assert len(imported) < 500


@pytest.mark.parametrize("front", [["-m", "titan_dp", "train"], ["train.py"]], ids=["titan-dp train", "train.py"])
@pytest.mark.parametrize("key", ["data.path", "validation.path"])
def test_data_that_is_not_there_is_told_before_torch_is_imported(root: Path, shards: Path, front: list[str], key: str) -> None:
    paths = {"data.path": shards / "train", "validation.path": shards / "validation"} | {key: Path("nowhere/train")}
    settings = [f"--{name}={path}" for name, path in paths.items()]
    answer = python(root, "-X", "importtime", *front, "--config", "debug.toml", *settings)
    imports = re.compile(r"^import time:.*\|(?: imported package|\s*(\S+))$", re.MULTILINE)
    assert answer.returncode == 2
    assert imports.sub("", answer.stderr).strip().startswith("error: there are no token shards in 'nowhere/train' ")
    assert {"titan_dp.data.shards", "torch"} & set(imports.findall(answer.stderr)) == {"titan_dp.data.shards"}


def test_a_command_that_does_not_exist_is_the_users_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        dispatch(["prepair"])
    assert end.value.code == 2
    assert "invalid choice: 'prepair'" in capsys.readouterr().err


def failing(error: BaseException) -> int:
    def command() -> int:
        raise error

    return run_main(command)


FULL = OSError(errno.ENOSPC, "No space left on device", "outputs/x")
FULL_SAID = "error: No space left on device: 'outputs/x'; free some space or choose another folder; "
WRAPPED = RuntimeError("could not save")
WRAPPED.__cause__ = FULL


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("training.steps = 0: give a positive number"), 2, "error: training.steps = 0: give a positive number\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (FULL, 1, FULL_SAID),
        (WRAPPED, 1, FULL_SAID),
        (FileNotFoundError("lost"), 1, "Traceback"),
    ],
    ids=["the user's mistake", "Ctrl-C", "a full disk", "a full disk inside", "ours"],
)
def test_an_error_is_one_message_and_an_exit_code(
    error: BaseException, code: int, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert failing(error) == code
    shown = capfd.readouterr().err
    assert shown.startswith(said)
    assert ("Traceback" in shown) == (said == "Traceback")


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
        "error: token shard shard-00000.npy cannot be read; prepare it again; OSError: Input/output error: "
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
    assert run_main(lambda: print("caf\u00e9 \ufffd \udce9") or 3) == 3  # type: ignore[func-returns-value]
    assert shown.getvalue() == b"caf\\xe9 \\ufffd \\udce9\n"


def test_other_ranks_name_themselves(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert failing(UserError("shard 7 is missing")) == 2
    assert capfd.readouterr().err == "error (rank 3): shard 7 is missing\n"


def test_a_reader_that_stops_reading_ends_the_command_quietly(root: Path) -> None:
    script = f"unset PYTHONUNBUFFERED; {sys.executable} -m titan_dp.cli --help | true; echo ${{PIPESTATUS[0]}}"
    answer = subprocess.run(["bash", "-c", script], cwd=root, capture_output=True, text=True, timeout=600)
    assert (answer.stdout, answer.stderr) == ("1\n", "")
