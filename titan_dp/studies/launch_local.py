"""Many runs on this machine: at most K at once, unfinished ones resumed, failed ones tried again, trunks before branches.

K threads take the cells in order, and each does the same for every cell: wait while another process trains it, skip it if it
is finished, else start `titan-dp train` and, if that may help, start it again after a pause. What a cell prints goes to
`attempt-N.log` in its run folder. Ctrl-C and SIGTERM end the cells, which save; a second Ctrl-C kills them. The same command
then goes on: the state of a sweep is its run folders.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titan_dp.errors import EXIT_STOPPED, RUNS_AT_ONCE, RunError, UserError, counted
from titan_dp.files import short
from titan_dp.hardware import visible_gpus
from titan_dp.output import NEXT_SIGN
from titan_dp.train.run_folder import is_finished, is_locked, last_record

if TYPE_CHECKING:
    from rich.table import Table

    from titan_dp.studies.sweep_file import Cell

_POLL_SECONDS = 0.2
_PAUSE_SECONDS = (5, 20, 60)
"""Before the next attempts of a cell, the last before any later one too: what was in its way may go away."""
_GRACE_SECONDS = 75  # between SIGTERM and SIGKILL; launch/torchrun.py gives its own processes 60
_STATES = ("running", "elsewhere", "failed", "waiting", "finished")  # as the live table sorts them


def command(cell: Cell, nproc: int, program: Sequence[str] = (sys.executable, "-m", "titan_dp")) -> list[str]:
    """What trains `cell` on one machine."""
    return [*program, "train", "--nproc", str(nproc), "--config", str(cell.folder / "config.toml")]


def launch_local(cells: Sequence[Cell], *, at_once: int, nproc: int, retries: int) -> None:
    """Run all unfinished cells.

    Args:
        at_once: cells that run at the same time, those that another process trains included.
        nproc: processes per cell.
        retries: new attempts of a cell that failed.

    Raises:
        UserError: if the machine has GPUs, but fewer than asked for.
        RunError: if cells failed more than `retries` times.
        KeyboardInterrupt: after Ctrl-C, SIGTERM or a closed terminal, when all cells have ended.
    """
    from rich.console import Console
    from rich.live import Live

    launcher = _Launcher(cells, at_once, nproc, retries, console := Console(highlight=False, soft_wrap=True))
    live = Live(get_renderable=launcher.table, console=console, refresh_per_second=2) if console.is_terminal else nullcontext()
    # Cells that another process trains come first and get their shares of the machine before anything new is started. Those
    # that wait for their trunk come last: when a thread takes one, another has its trunk, or has had it.
    runs = sorted(launcher.runs, key=lambda run: (run.cell.awaits_trunk, not is_locked(run.cell.folder)))
    for run in runs[:at_once]:
        run.share = launcher.take_share(run.cell.folder)
    with _told_to_end() as ended, live, ThreadPoolExecutor(at_once) as pool:
        futures = [pool.submit(launcher.see_through, run, ended) for run in runs]
        while not ended.told and not all(future.done() for future in futures):
            time.sleep(_POLL_SECONDS)
            launcher.tell()
        if ended.told:
            with suppress(OSError):  # the terminal may be gone
                lost = "what they did since their last save is lost"
                print(f"the cells save and end; a second Ctrl-C kills them, and {lost}", flush=True)
        for future in futures:
            future.result()
    if ended.told:
        done = f"{launcher.count('finished')} of {counted(len(cells), 'cell')} finished"
        raise KeyboardInterrupt(f"{done}; what the others saved is kept, and the same command goes on from there")
    if failed := [f"{run.cell.name}: {run.reason}" for run in launcher.runs if run.state == "failed"]:
        raise RunError("\n  ".join([f"{counted(len(failed), 'cell')} failed; start again to retry them:", *failed]))


@dataclass
class _Run:
    """A cell on its way: waiting, running here, elsewhere (another process trains it), finished or failed."""

    cell: Cell
    state: str = "waiting"
    attempts: int = 0
    """Those that count: not one that a signal stopped, nor one that found another process at work."""
    share: int | None = None
    """Its share of the machine, while it has one."""
    code: int | None = None
    reason: str = ""
    """What is known of the last attempt that failed."""
    not_before: float = 0
    """When the next attempt may begin, by time.monotonic."""

    def describe(self) -> str:
        if self.state == "running" and self.attempts > 1:
            return f"attempt {self.attempts} after {self.reason}"
        if self.state == "waiting" and self.reason:
            return f"waiting to be started again after {self.reason}"
        return {"failed": f"failed: {self.reason}", "elsewhere": "running in another process"}.get(self.state, self.state)


class _Ended:
    """Whether somebody has asked for the end. No threading.Event: a signal may come while its lock is held."""

    told = False
    interrupts = 0
    """Ctrl-Cs so far."""


class _Launcher:
    """What the threads share."""

    def __init__(self, cells: Sequence[Cell], at_once: int, nproc: int, retries: int, console: Any) -> None:
        self.devices = visible_gpus()
        if self.devices and at_once * nproc > len(self.devices):
            asked = f"--at-once times --nproc asks for {at_once * nproc} GPUs"
            raise UserError(f"{asked}, and there are {len(self.devices)}; lower one of them")
        self.runs = [_Run(cell) for cell in cells]
        self.by_name = {run.cell.name: run for run in self.runs}
        self.nproc, self.retries, self.console = nproc, retries, console
        self.free = list(range(at_once))
        """Shares of the machine that no thread has: share i is GPUs i * nproc to (i + 1) * nproc - 1."""
        self.told = time.monotonic()
        """When a log was last told how far the cells are."""
        self.at_once = at_once

    def count(self, state: str) -> int:
        return sum(run.state == state for run in self.runs)

    def take_share(self, folder: Path) -> int:
        """A free share: if possible the one that an earlier launch gave the cell in `folder`, which may still run there."""
        with suppress(OSError, ValueError):
            share = int((folder / ".slot").read_text())
            self.free.remove(share)
            return share
        return self.free.pop(0)

    def see_through(self, run: _Run, ended: _Ended) -> None:
        """Bring one cell to its end, whatever its folder says now. A folder that cannot be used fails its own cell only."""
        if run.share is None:
            run.share = self.free.pop(0)  # there is one for every thread
        try:
            while not ended.told and not is_finished(run.cell.folder):
                if is_locked(run.cell.folder):
                    self._show(run, "elsewhere")
                    time.sleep(_POLL_SECONDS)
                elif run.cell.awaits_trunk and (trunk := self.by_name[run.cell.trunk]).state != "finished":
                    if trunk.state == "failed":
                        run.reason = f"not started: its trunk {run.cell.trunk} failed before step {run.cell.branch_step:,}"
                        self._show(run, "failed")
                        break
                    time.sleep(_POLL_SECONDS)
                elif run.code == 2 or run.attempts > self.retries:  # 2 is a user's mistake: trying again cannot help
                    self._show(run, "failed")
                    break
                elif time.monotonic() < run.not_before:
                    self._show(run, "waiting")
                    time.sleep(_POLL_SECONDS)
                else:
                    self._attempt(run, run.share, ended)
            if is_finished(run.cell.folder):
                self._show(run, "finished")
        except (UserError, OSError) as error:
            run.reason = str(error)
            self._show(run, "failed")
        finally:
            self.free.append(run.share)

    def _attempt(self, run: _Run, share: int, ended: _Ended) -> None:
        """Start the cell once and wait for its end."""
        run.attempts += 1
        self._show(run, "running")
        folder = run.cell.folder
        (folder / ".slot").write_text(str(share))  # for a launch that finds the cell running after this one was killed
        logs = (re.fullmatch(r"attempt-(\d+)\.log", path.name) for path in folder.iterdir())
        log = folder / f"attempt-{max((int(log[1]) for log in logs if log), default=0) + 1}.log"
        environment = {"PYTHONUNBUFFERED": "1", **os.environ, RUNS_AT_ONCE: str(self.at_once)}
        if self.devices:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self.devices[share * self.nproc : (share + 1) * self.nproc])
        with log.open("wb") as file:
            process = subprocess.Popen(
                command(run.cell, self.nproc),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # a Ctrl-C is ours to pass on
            )
        while process.poll() is None and not ended.told:
            time.sleep(_POLL_SECONDS)
        _end(process, ended)
        run.code, said = process.returncode, _last_line(log)
        run.reason = f"exit code {run.code}, {said} ({log})"
        if run.code == EXIT_STOPPED or "another process is at work" in said:
            run.attempts -= 1
        else:
            pause = _PAUSE_SECONDS[min(run.attempts, len(_PAUSE_SECONDS)) - 1]
            run.not_before = time.monotonic() + pause

    def _show(self, run: _Run, state: str) -> None:
        """Enter a state; on a terminal the live table shows it, elsewhere a line says so."""
        if run.state == state and state != "running":  # it runs again after every attempt, and is elsewhere at every look
            return
        run.state = state
        if not self.console.is_terminal:
            self._say(run, run.describe())

    def _say(self, run: _Run, what: str) -> None:
        done = f"[{self.count('finished')}/{len(self.runs)}]"
        with suppress(OSError, SystemExit):  # nobody reads any more, and rich would leave: the cells go on
            self.console.print(f"{done} {run.cell.name}: {what}", markup=False)

    def tell(self) -> None:
        """Where there is no terminal: every half minute how far the cells are that run."""
        if self.console.is_terminal or time.monotonic() - self.told < NEXT_SIGN:
            return
        self.told = time.monotonic()
        for run in self.runs:
            if run.state in ("running", "elsewhere"):
                step, *values = _how_far(run.cell)
                names = ("loss", "validation", "tokens/s")
                known = [f"{name} {value}" for name, value in zip(names, values, strict=True) if value]
                self._say(run, ", ".join([f"step {step}", *known]))

    def table(self) -> Table:
        """What runs and what failed first, then what else the terminal has room for."""
        from rich import box
        from rich.table import Column, Table

        counts = ", ".join(f"{n} {state}" for state in _STATES if (n := self.count(state)))
        columns = [Column(name, overflow="fold") for name in ("cell", "state")]  # it cannot be wider than the terminal
        columns += [Column(name, justify="right", no_wrap=True) for name in ("step", "loss", "validation", "tokens/s")]
        look: dict[str, Any] = {"box": box.SIMPLE, "show_edge": False, "pad_edge": False, "padding": (0, 1, 0, 0)}
        table = Table(*columns, title=f"{counted(len(self.runs), 'cell')}: {counts}", title_justify="left", **look)
        room = max(3, shutil.get_terminal_size().lines - 7)
        for run in sorted(self.runs, key=lambda run: _STATES.index(run.state))[:room]:
            table.add_row(run.cell.name, run.describe(), *_how_far(run.cell))
        if len(self.runs) > room:
            table.caption = f"and {len(self.runs) - room} more"
        return table


def _end(process: subprocess.Popen[bytes], ended: _Ended) -> None:
    """End a process and its children: SIGTERM, and SIGKILL for what does not listen, or after a second Ctrl-C."""
    deadline = time.monotonic() + _GRACE_SECONDS
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
    while process.poll() is None and ended.interrupts < 2 and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS / 2)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def _told_to_end() -> Iterator[_Ended]:
    """Told by Ctrl-C, SIGTERM and a closed terminal, as often as they come: a second one leaves no cell behind.

    A signal that is ignored stays so: `nohup` means it.
    """
    ended = _Ended()

    def told(number: int, frame: object) -> None:
        ended.interrupts += number == signal.SIGINT
        ended.told = True

    numbers = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, told) for number in numbers}
    try:
        yield ended
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _last_line(log: Path) -> str:
    """The last error in a log, else its last line."""
    lines = [line.strip() for line in log.read_bytes()[-4096:].decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error")]
    return (errors or lines or ["no output"])[-1][:300]


def _how_far(cell: Cell) -> tuple[str, str, str, str]:
    """Step of steps, loss, validation and speed; empty where nothing is known yet."""
    record = last_record(cell.folder)
    speed = record.get("tokens_per_second")
    return (
        f"{record.get('step', 0):,}/{cell.steps:,}",
        _value(record.get("loss"), ".4f"),
        _validation(record),
        short(speed) if isinstance(speed, int | float) else "",
    )


def _validation(record: dict[str, Any]) -> str:
    """The loss, or for a problem with right answers the words that are right at every symbol, which says more."""
    right = record.get("validation_sequence_accuracy")
    return _value(record.get("validation_loss"), ".4f") if right is None else f"{right:.1%} right"


def _value(value: object, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else ""
