"""Many runs on this machine: at most k at once, unfinished ones resumed, failed ones tried again.

Every cell is a process of its own (train.py, under torchrun for several ranks) in a process group of its own, with
its output in `attempt-N.log` of its run folder. A cell another process trains already, such as one that outlived a
killed launch, is waited for. Ctrl-C and SIGTERM end the cells, which save, a second one kills them; starting again resumes them
from their checkpoints.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from titan_dp.config.load import PROJECT
from titan_dp.errors import EXIT_STOPPED, RunError, UserError
from titan_dp.hardware import visible_gpus
from titan_dp.train.run_folder import is_finished, is_locked, last_record

if TYPE_CHECKING:
    from rich.table import Table

_POLL_SECONDS = 0.5
_GRACE_SECONDS = 75  # between SIGTERM and SIGKILL; launch/torchrun.py gives its own processes 60


class Cell(Protocol):
    """A run to be: its folder holds config.toml."""

    @property
    def name(self) -> str: ...

    @property
    def folder(self) -> Path: ...

    @property
    def steps(self) -> int: ...


def command(cell: Cell, nproc: int, python: str = sys.executable, project: Path = PROJECT) -> list[str]:
    """What trains `cell` on one machine."""
    # launch/torchrun.py is torchrun, but for the exit code: that of train.py
    launcher = [str(project / "launch/torchrun.py"), "--standalone", f"--nproc-per-node={nproc}"] if nproc > 1 else []
    return [python, *launcher, str(project / "train.py"), "--config", str(cell.folder / "config.toml")]


@dataclass
class _Attempt:
    """A cell on its way: waiting, running here (`process`), running elsewhere, finished or failed."""

    cell: Cell
    state: str = "waiting"
    attempts: int = 0
    slot: int = -1
    process: subprocess.Popen[bytes] | None = None
    code: int | None = None
    reason: str = ""
    log: Path | None = None


def launch_local(cells: Sequence[Cell], *, at_once: int, nproc: int, retries: int) -> None:
    """Run all unfinished cells.

    Raises:
        UserError: where the machine has fewer GPUs than asked for.
        RunError: where cells failed more than `retries` times.
    """
    devices = _devices(at_once * nproc)
    attempts = [_Attempt(cell) for cell in cells]
    launcher = _Launcher(attempts, at_once, nproc, retries, devices)
    with _told_to_end() as ended, _live(launcher) as show:
        try:
            while not ended.is_set() and launcher.advance():
                show()
                time.sleep(_POLL_SECONDS)
            show()
            if ended.is_set():
                print("the cells save and end; a second Ctrl-C kills them", flush=True)
        finally:
            launcher.stop(ended)
    if ended.is_set():
        finished = sum(attempt.state == "finished" for attempt in attempts)
        print(f"{finished} of {len(attempts)} cells are finished; the same command goes on from here")
        raise KeyboardInterrupt
    if failed := [f"{a.cell.name}: {a.reason}" for a in attempts if a.state == "failed"]:
        raise RunError("\n  ".join([f"{len(failed)} cells failed; start again to retry them:", *failed]))


def _devices(processes: int) -> list[str]:
    """The GPUs to share out, none on a machine without. Raises UserError where there are some but too few."""
    devices = visible_gpus()
    if devices and processes > len(devices):
        raise UserError(f"--at-once times --nproc asks for {processes} GPUs, and there are {len(devices)}; lower one of them")
    return devices


class _Launcher:
    def __init__(self, attempts: list[_Attempt], at_once: int, nproc: int, retries: int, devices: list[str]) -> None:
        self.attempts, self.nproc, self.retries, self.devices = attempts, nproc, retries, devices
        self.queue = deque(attempts)
        self.free = list(range(at_once))
        self.threads = max(1, len(os.sched_getaffinity(0)) // (at_once * nproc))
        for attempt in attempts:
            if is_locked(attempt.cell.folder) and not is_finished(attempt.cell.folder):
                self._leave_elsewhere(attempt)

    def advance(self) -> bool:
        """Look after what runs and start what can start; False when nothing is left to do."""
        for attempt in self.attempts:
            with self._alone(attempt):
                if attempt.process is not None and attempt.process.poll() is not None:
                    self._ended(attempt)
                elif attempt.state == "elsewhere" and not is_locked(attempt.cell.folder):
                    self._settle(attempt)
        while self.free and self.queue:
            attempt = self.queue.popleft()
            with self._alone(attempt):
                if is_finished(attempt.cell.folder):
                    attempt.state = "finished"
                elif is_locked(attempt.cell.folder):
                    self._leave_elsewhere(attempt)
                else:
                    self._start(attempt)
        return any(attempt.state in ("waiting", "running", "elsewhere") for attempt in self.attempts)

    @contextmanager
    def _alone(self, attempt: _Attempt) -> Iterator[None]:
        """A folder that cannot be read or written fails its own cell and no other."""
        try:
            yield
        except (UserError, OSError) as error:
            attempt.state, attempt.reason = "failed", str(error)
            self._free_slot(attempt)

    def _leave_elsewhere(self, attempt: _Attempt) -> None:
        """Wait for a cell another process trains; it counts as one of those at once, on the devices it was given."""
        attempt.state = "elsewhere"
        with suppress(ValueError):
            self.queue.remove(attempt)
        try:
            slot = int((attempt.cell.folder / ".slot").read_text())
        except (OSError, ValueError):
            slot = -1
        if self.free:
            attempt.slot = slot if slot in self.free else self.free[0]
            self.free.remove(attempt.slot)

    def _free_slot(self, attempt: _Attempt) -> None:
        if attempt.slot >= 0:
            self.free.append(attempt.slot)
            attempt.slot = -1

    def _start(self, attempt: _Attempt) -> None:
        attempt.slot = self.free.pop(0)
        (attempt.cell.folder / ".slot").write_text(str(attempt.slot))  # for a launch after this one was killed
        attempt.attempts += 1
        logs = (re.fullmatch(r"attempt-(\d+)\.log", path.name) for path in attempt.cell.folder.iterdir())
        attempt.log = attempt.cell.folder / f"attempt-{max((int(log[1]) for log in logs if log), default=0) + 1}.log"
        environment = {"OMP_NUM_THREADS": str(self.threads), "PYTHONUNBUFFERED": "1", **os.environ}
        if self.devices:
            first = attempt.slot * self.nproc
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self.devices[first : first + self.nproc])
        log: IO[bytes]
        with attempt.log.open("wb") as log:
            attempt.process = subprocess.Popen(
                command(attempt.cell, self.nproc),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # a Ctrl-C is ours to pass on
            )
        attempt.state = "running"

    def _ended(self, attempt: _Attempt) -> None:
        assert attempt.process is not None
        attempt.code, attempt.process = attempt.process.returncode, None
        if attempt.code != 0 and is_locked(attempt.cell.folder):
            attempt.state = "elsewhere"  # what refused this attempt, or what is left of it, is at work on the cell
            if "another process is at work" in _last_line(attempt):
                attempt.attempts -= 1  # it never began
        else:
            self._settle(attempt)

    def _settle(self, attempt: _Attempt) -> None:
        """Decide on a cell nobody runs any more: finished, to be tried again, or failed."""
        self._free_slot(attempt)
        if is_finished(attempt.cell.folder):
            attempt.state = "finished"
            return
        attempt.reason = (
            f"exit code {attempt.code}, {_last_line(attempt)} ({attempt.log})" if attempt.log else "an earlier launch"
        )
        if attempt.code == EXIT_STOPPED:  # by a signal, and saved: no failure
            attempt.attempts -= 1
        if attempt.code == 2 or attempt.attempts > self.retries:  # 2 is a user's mistake: trying again cannot help
            attempt.state = "failed"
        else:
            attempt.state = "waiting"
            self.queue.append(attempt)

    def stop(self, ended: _Ended) -> None:
        """End what still runs: SIGTERM, and SIGKILL for what does not listen, or after a second Ctrl-C."""
        running = [attempt.process for attempt in self.attempts if attempt.process is not None]
        for process in running:
            _signal_group(process, signal.SIGTERM)
        deadline = time.monotonic() + _GRACE_SECONDS
        while any(process.poll() is None for process in running) and ended.interrupts < 2 and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS / 5)
        for process in running:
            if process.poll() is None:
                _signal_group(process, signal.SIGKILL)
                process.wait()


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


class _Ended(threading.Event):
    """Set once somebody asks for the end."""

    interrupts = 0
    """Ctrl-Cs so far."""


@contextmanager
def _told_to_end() -> Iterator[_Ended]:
    """Set by Ctrl-C, SIGTERM and a closed terminal, as often as they come: no cell is left behind by a second one.

    A signal that is ignored stays so: `nohup` means it.
    """
    ended = _Ended()

    def told(number: int, frame: object) -> None:
        ended.interrupts += number == signal.SIGINT
        ended.set()

    numbers = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, told) for number in numbers}
    try:
        yield ended
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _last_line(attempt: _Attempt) -> str:
    """The last words of an attempt's log."""
    assert attempt.log is not None
    text = attempt.log.read_bytes()[-4096:].decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error")]
    return (errors or lines or ["no output"])[-1][:300]


# -- progress ----------------------------------------------------------------------------------------------------------


@contextmanager
def _live(launcher: _Launcher) -> Iterator[Any]:
    """A function to call often: on a terminal it keeps a table up to date, else it prints a line when a state changes."""
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False, soft_wrap=True)
    if console.is_terminal:
        with Live(_progress(launcher), console=console, auto_refresh=False) as live:
            yield lambda: live.update(_progress(launcher), refresh=True)
        return
    told: dict[str, tuple[str, int]] = {}

    def tell() -> None:
        for attempt in launcher.attempts:
            now = (attempt.state, attempt.attempts)
            if told.get(attempt.cell.name, ("waiting", 0)) != now:
                told[attempt.cell.name] = now
                done = sum(a.state == "finished" for a in launcher.attempts)
                console.print(f"[{done}/{len(launcher.attempts)}] {attempt.cell.name}: {_describe(attempt)}", markup=False)

    yield tell


def _describe(attempt: _Attempt) -> str:
    if attempt.state == "running":
        return f"attempt {attempt.attempts} after {attempt.reason}" if attempt.attempts > 1 else "running"
    if attempt.state == "failed":
        return f"failed: {attempt.reason}"
    return {"elsewhere": "running in another process"}.get(attempt.state, attempt.state)


def _progress(launcher: _Launcher) -> Table:
    """The live table: what runs and what failed first, then what else the terminal has room for."""
    from rich.table import Column, Table

    states = [attempt.state for attempt in launcher.attempts]
    counts = ", ".join(
        f"{states.count(s)} {s}" for s in ("finished", "running", "elsewhere", "waiting", "failed") if s in states
    )
    columns = [Column(name, overflow="fold") for name in ("cell", "state", "step", "loss", "validation", "tokens/s")]
    table = Table(*columns, title=f"{len(states)} cells: {counts}")  # a live table cannot be wider than the terminal
    rank = {"running": 0, "elsewhere": 0, "failed": 1, "waiting": 2, "finished": 3}
    room = max(3, shutil.get_terminal_size().lines - 7)
    for attempt in sorted(launcher.attempts, key=lambda attempt: rank[attempt.state])[:room]:
        record = last_record(attempt.cell.folder)
        table.add_row(
            attempt.cell.name,
            _describe(attempt),
            f"{record.get('step', 0):,}/{attempt.cell.steps:,}",
            _value(record.get("loss"), ".4f"),
            _validation(record),
            _value(record.get("tokens_per_second"), ",.0f"),
        )
    if len(launcher.attempts) > room:
        table.caption = f"and {len(launcher.attempts) - room} more"
    return table


def _validation(record: dict[str, Any]) -> str:
    """The loss, or what says more where there are right answers: words right at every symbol."""
    right = record.get("validation_sequence_accuracy")
    return _value(record.get("validation_loss"), ".4f") if right is None else f"{right:.1%} right"


def _value(value: object, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else ""
