"""Processes that start in milliseconds: forked from one server that has imported torch and the trainer.

Importing them costs three seconds of a core, more than most tests need for what they are about. A forked process has a memory
of its own, takes signals and leaves with an exit code as any other; what it lacks is a command line (/proc shows the server's)
and Python's own start. So what is about those starts Python itself. A forked launcher forks its ranks in turn: they are its
children, in sessions of their own, as those that it starts.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from pathlib import Path

import torch.distributed as dist

LAUNCHER = "titan_dp.launch.torchrun"
SERVER = mp.get_context("forkserver")
SERVER.set_forkserver_preload(["titan_dp.train.trainer", "titan_dp.inference.generate", "torch.distributed.run"])

TIMEOUT_SECONDS = 600
"""Only a hang takes that long, however busy the machine is."""


def run_script(
    script: Path | str, *arguments: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`python SCRIPT ARGUMENTS` to its end, whatever its exit code; `env` is set beside what this process has.

    A script that is no path is a module, as for `python -m`.
    """
    argv = [str(script), *map(str, arguments)]
    with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as err:
        (code,) = _finish([_start(argv, out.name, err.name, cwd or Path.cwd(), env or {})])
        return subprocess.CompletedProcess(argv, code, out.read().decode(), err.read().decode())


def run_script_in_ranks(
    ranks: int,
    script: Path | str,
    *arguments: str | Path,
    log: Path,
    env: Mapping[str, str] | None = None,
    last: Sequence[str] = (),
) -> list[int]:
    """The same in as many processes as torchrun would start, which find each other as under torchrun; returns exit codes.

    Nobody ends the other ranks where one fails. What all of them print is appended to `log`; the last one gets the arguments
    `last` as well.
    """
    argv = [str(script), *map(str, arguments)]
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    common |= {"TORCHELASTIC_USE_AGENT_STORE": "True", **(env or {})}
    each = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    own = [argv] * (ranks - 1) + [[*argv, *last]]
    return _finish([_start(words, str(log), str(log), Path.cwd(), env) for words, env in zip(own, each, strict=True)])


def start_launcher(*arguments: str | Path, log: Path, env: Mapping[str, str] | None = None) -> BaseProcess:
    """`python -m LAUNCHER ARGUMENTS` in a session of its own; what it and its ranks print is appended to `log`."""
    argv = [LAUNCHER, *map(str, arguments)]
    return _start(argv, str(log), str(log), Path.cwd(), env or {}, _launch)


def start_command(*command: str | Path, log: Path, env: Mapping[str, str] | None = None) -> BaseProcess:
    """Any command, started as a shell starts it, in a session of its own; what it prints is appended to `log`."""
    return _start(list(map(str, command)), str(log), str(log), Path.cwd(), env or {}, _execute)


def _start(
    argv: list[str], out: str, err: str, cwd: Path, env: Mapping[str, str], become: Callable[[list[str]], None] | None = None
) -> BaseProcess:
    process = SERVER.Process(target=_begin, args=(argv, out, err, str(cwd), {**os.environ, **env}, become or _run))
    process.start()
    return process


def _finish(processes: list[BaseProcess]) -> list[int]:
    for process in processes:
        process.join(TIMEOUT_SECONDS)
    late = [process for process in processes if process.is_alive()]
    for process in late:
        process.kill()
        process.join()
    assert not late, f"{len(late)} of {len(processes)} processes were at work for more than {TIMEOUT_SECONDS} s"
    return [process.exitcode for process in processes if process.exitcode is not None]


def _begin(argv: list[str], out: str, err: str, cwd: str, env: dict[str, str], become: Callable[[list[str]], None]) -> None:
    for number, file in enumerate((out, err), start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT), number)
    sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]  # a kill takes away nothing that was printed
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    become(argv)


def _run(argv: list[str]) -> None:
    sys.argv = argv
    if argv[0].endswith(".py"):
        sys.path.insert(0, str(Path(argv[0]).parent))
        runpy.run_path(argv[0], run_name="__main__")
    else:
        runpy.run_module(argv[0], run_name="__main__", alter_sys=True)


def _execute(argv: list[str]) -> None:
    os.setsid()
    os.execvp(argv[0], argv)


def _launch(argv: list[str]) -> None:
    from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

    os.setsid()
    SubprocessHandler._popen = lambda self, command, env: _Rank(command, env)  # type: ignore[assignment, return-value]
    _run(argv)


class _Rank:
    """A rank of a forked launcher: what torchrun uses of subprocess.Popen. The command is `python -u SCRIPT ARGUMENTS`."""

    def __init__(self, command: Sequence[str], env: dict[str, str]) -> None:
        fork = mp.get_context("fork")
        has_a_group = fork.Event()
        self._process = fork.Process(target=self._begin, args=(list(command[2:]), env, has_a_group))
        self._process.start()
        has_a_group.wait()  # torchrun signals that
        self.pid = self._process.pid

    @staticmethod
    def _begin(argv: list[str], env: dict[str, str], has_a_group: Event) -> None:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1):  # which the launcher takes
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        has_a_group.set()
        os.environ.clear()
        os.environ.update(env)
        _run(argv)

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float) -> None:
        self._process.join(timeout)
        if self._process.is_alive():
            raise subprocess.TimeoutExpired("a forked rank", timeout)
