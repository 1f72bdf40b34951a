"""The local launcher on cells that are shell scripts: what is started, tried again, waited for, and ended by signals.

That real runs resume is tested in tests/integration/test_sweep_local.py.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from titan_dp.errors import RunError, UserError
from titan_dp.studies import launch_local as module
from titan_dp.train.run_folder import RunLock

FINISH = """echo '{"state": "finished"}' > run.json; echo done"""
UNTIL_THIRD = f"""[ -e attempt-3.log ] && {{ {FINISH}; exit 0; }}; """
Launch = Callable[..., None]


@dataclass
class _Cell:
    folder: Path
    trunk: str = ""
    branch_step: int = 0
    steps = 9

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def awaits_trunk(self) -> bool:
        return bool(self.trunk) and not (self.folder.parent / self.trunk / f"saved-{self.branch_step}").exists()


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launch:
    """launch(name=script, ...): run a cell per script, each in the folder of its name; `branches` have a trunk and a step."""
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.02)
    monkeypatch.setattr(module, "_PAUSE_SECONDS", (0,))
    monkeypatch.setattr(module, "visible_gpus", list)

    def run(
        at_once: int = 1, nproc: int = 1, retries: int = 2, branches: dict[str, tuple[str, int]] | None = None, **scripts: str
    ) -> None:
        branches = branches or {}
        for name in scripts:
            (tmp_path / name).mkdir(exist_ok=True)
        cells: Any = [_Cell(tmp_path / name, *branches.get(name, ())) for name in scripts]
        start = lambda cell, nproc: ["sh", "-c", f"cd {cell.folder}; {scripts[cell.name]}"]  # noqa: E731
        monkeypatch.setattr(module, "command", start)
        module.launch_local(cells, at_once=at_once, nproc=nproc, retries=retries)

    return run


def attempts(folder: Path) -> int:
    return len(list(folder.glob("attempt-*.log")))


def when(happened: Callable[[], bool], then: Callable[[], object]) -> threading.Thread:
    """Do `then` once `happened`, while the test's own thread launches."""

    def wait() -> None:
        deadline = time.monotonic() + 600
        while not happened() and time.monotonic() < deadline:
            time.sleep(0.01)
        then()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


BUSY = "echo 'error: another process is at work in x'; exit 1"
# script, retries, attempts made, what is said of the failure (None: the cell finishes)
ENDS: dict[str, tuple[str, int, int, str | None]] = {
    "done": (FINISH, 0, 1, None),
    "a failure is tried again": (UNTIL_THIRD + "exit 1", 2, 3, None),
    "but no more often than asked": (
        "echo 'error: broken'; echo on; exit 1",
        1,
        2,
        "exit code 1, error: broken (FOLDER/attempt-2.log)",
    ),
    "a kill is a failure": ("kill -9 $$", 0, 1, "exit code -9, no output"),
    "a user's mistake is not tried again": ("echo 'error: no such key'; exit 2", 5, 1, "exit code 2, error: no such key"),
    "to be stopped by a signal is no failure": (UNTIL_THIRD + "exit 75", 0, 3, None),
    "to find another process at work is no attempt": (UNTIL_THIRD + BUSY, 0, 3, None),
    "to leave without having finished is a failure": ("echo bye", 0, 1, "exit code 0, bye"),
}


@pytest.mark.parametrize("case", ENDS)
def test_how_a_cell_ends_decides_whether_it_is_started_again(case: str, launch: Launch, tmp_path: Path) -> None:
    script, retries, made, said = ENDS[case]
    if said is None:
        launch(retries=retries, a=script)
    else:
        with pytest.raises(RunError) as caught:
            launch(retries=retries, a=script)
        expected = f"1 cell failed; start again to retry them:\n  a: {said.replace('FOLDER', str(tmp_path / 'a'))}"
        assert str(caught.value).startswith(expected)
    assert attempts(tmp_path / "a") == made


def test_a_failed_cell_waits_before_it_is_started_again_and_ctrl_c_does_not_wait_for_it(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "_PAUSE_SECONDS", (0, 3600))
    thread = when((tmp_path / "a/attempt-2.log").exists, lambda: (time.sleep(0.2), os.kill(os.getpid(), signal.SIGINT)))
    with pytest.raises(KeyboardInterrupt):
        launch(retries=9, a="echo 'error: the port is taken'; exit 1")
    thread.join()
    assert attempts(tmp_path / "a") == 2
    assert "a: waiting to be started again after exit code 1, error: the port is taken" in capsys.readouterr().out


def test_finished_cells_are_not_started_and_later_attempts_get_logs_of_their_own(
    launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launch(a=FINISH)
    launch(a=FINISH, b=FINISH)
    assert (attempts(tmp_path / "a"), attempts(tmp_path / "b")) == (1, 1)
    assert capsys.readouterr().out.splitlines()[2:] == ["[1/2] a: finished", "[1/2] b: running", "[2/2] b: finished"]
    (tmp_path / "b/run.json").unlink()
    launch(b=FINISH)
    assert (tmp_path / "b/attempt-2.log").read_text() == "done\n"


def test_a_folder_that_cannot_be_read_fails_its_own_cell_only(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/run.json").write_text("[1]")
    with pytest.raises(RunError, match=r"1 cell failed; .*\n  a: .*run\.json cannot be read"):
        launch(a=FINISH, b=FINISH)
    assert json.loads((tmp_path / "b/run.json").read_text()) == {"state": "finished"}


def test_a_cell_is_told_how_many_share_the_cores(launch: Launch, tmp_path: Path) -> None:
    launch(at_once=2, a=f"echo $TITAN_DP_RUNS_AT_ONCE; {FINISH}")
    assert (tmp_path / "a/attempt-1.log").read_text().startswith("2\n")


def test_gpus_are_shared_out_and_too_few_are_refused(launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "visible_gpus", lambda: ["0", "1", "2", "GPU-3"])
    script = "echo $CUDA_VISIBLE_DEVICES > gpus; while [ $(ls ../*/gpus | wc -l) -lt 2 ]; do sleep 0.02; done; " + FINISH
    launch(at_once=2, nproc=2, a=script, b=script)
    assert {(tmp_path / name / "gpus").read_text() for name in "ab"} == {"0,1\n", "2,GPU-3\n"}
    with pytest.raises(UserError, match="--at-once times --nproc asks for 6 GPUs, and there are 4"):
        launch(at_once=3, nproc=2, a=FINISH)


def test_a_cell_of_a_killed_launch_is_waited_for_on_the_devices_it_has(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "visible_gpus", lambda: ["0", "1"])
    lock = RunLock(tmp_path / "theirs")
    (tmp_path / "theirs/.slot").write_text("0")

    def end() -> None:
        (tmp_path / "theirs/run.json").write_text('{"state": "finished"}')
        lock.close()

    thread = when((tmp_path / "c/gpus").exists, end)
    script = "echo $CUDA_VISIBLE_DEVICES > gpus; " + FINISH
    launch(at_once=2, a=script, b=script, theirs="exit 2", c=script)
    thread.join()
    assert {(tmp_path / name / "gpus").read_text() for name in "abc"} == {"1\n"}
    assert attempts(tmp_path / "theirs") == 0
    said = capsys.readouterr().out
    assert said.count("theirs: running in another process") == said.count("theirs: finished") == 1


def test_a_cell_whose_other_process_dies_is_started(launch: Launch, tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "a")
    (tmp_path / "a/config.toml").touch()
    thread = when(lambda: True, lock.close)
    launch(retries=0, a=FINISH)
    thread.join()
    assert attempts(tmp_path / "a") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_lets_cells_save_and_starts_no_more(
    number: signal.Signals, launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    thread = when((tmp_path / "a/ready").exists, lambda: os.kill(os.getpid(), number))
    kept = "0 of 2 cells finished; what the others saved is kept, and the same command goes on from there"
    with pytest.raises(KeyboardInterrupt, match=kept):
        launch(a="trap 'echo > saved; exit 75' TERM; echo > ready; while :; do sleep 0.02; done", b=FINISH)
    thread.join()
    assert (tmp_path / "a/saved").exists()
    assert (attempts(tmp_path / "a"), attempts(tmp_path / "b")) == (1, 0)
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_kills_the_cells(launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        while not (tmp_path / "a/told").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = when((tmp_path / "a/ready").exists, twice)
    with pytest.raises(KeyboardInterrupt):
        launch(a="trap 'echo > told' TERM; echo $$ > pid; echo > ready; while :; do sleep 0.02; done")
    thread.join()
    assert not Path(f"/proc/{(tmp_path / 'a/pid').read_text().strip()}").exists()


def test_a_signal_that_is_ignored_stays_ignored(launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        launch(a=f"kill -HUP {os.getpid()}; {FINISH}")
    finally:
        signal.signal(signal.SIGHUP, before)


# -- branches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_branch_begins_once_its_trunk_has_saved_what_it_needs(at_once: int, launch: Launch, tmp_path: Path) -> None:
    branch = f"[ -e ../trunk/saved-4 ] || exit 2; {FINISH}"
    other = {"others": ("other", 7)}
    launch(
        at_once=at_once,
        branches={"branch": ("trunk", 4), **other},
        branch=branch,
        others=FINISH,
        trunk="sleep 0.1; echo > saved-4; " + FINISH,
        other="sleep 0.1; echo > saved-7; " + FINISH,
    )
    assert {attempts(tmp_path / name) for name in ("branch", "trunk", "others", "other")} == {1}


def test_a_branch_does_not_wait_for_the_end_of_its_trunk(launch: Launch, tmp_path: Path) -> None:
    trunk = "echo > saved-4; while [ ! -e ../branch/run.json ]; do sleep 0.02; done; " + FINISH
    launch(at_once=2, branches={"branch": ("trunk", 4)}, branch=FINISH, trunk=trunk)
    assert attempts(tmp_path / "branch") == 1


def test_a_branch_whose_trunk_failed_is_not_started_and_says_why_until_the_trunk_has_come_so_far(
    launch: Launch, tmp_path: Path
) -> None:
    scripts = {"branch": FINISH, "trunk": "echo 'error: broken'; exit 2"}
    with pytest.raises(RunError) as caught:
        launch(branches={"branch": ("trunk", 4)}, **scripts)
    first, *failed = str(caught.value).splitlines()
    assert first.startswith("2 cells failed")
    assert failed[0] == "  branch: not started: its trunk trunk failed before step 4"
    assert attempts(tmp_path / "branch") == 0
    launch(branches={"branch": ("trunk", 4)}, **scripts | {"trunk": "echo > saved-4; " + FINISH})
    assert attempts(tmp_path / "branch") == 1


def test_a_branch_that_another_process_holds_does_not_keep_its_trunk_from_being_started(launch: Launch, tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "branch")
    (tmp_path / "branch/config.toml").touch()
    thread = when((tmp_path / "trunk/attempt-1.log").exists, lock.close)
    launch(branches={"branch": ("trunk", 4)}, branch=FINISH, trunk="echo > saved-4; " + FINISH)
    thread.join()
    assert attempts(tmp_path / "branch") == 1
