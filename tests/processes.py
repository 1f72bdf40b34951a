"""Processes that start in milliseconds: forked from one server that has imported torch and the trainer.

Importing them costs three seconds of a core, more than most tests need for what they are about. A forked process has a memory
of its own, takes signals and leaves with an exit code as any other; what it lacks is a command line (/proc shows the server's)
and Python's own start. So what is about those, or about a launcher's processes, starts Python itself.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch.distributed as dist

SERVER = mp.get_context("forkserver")
SERVER.set_forkserver_preload(["titan_dp.train.trainer", "titan_dp.inference.generate"])

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
    ranks: int, script: Path | str, *arguments: str | Path, log: Path, env: Mapping[str, str] | None = None
) -> list[int]:
    """The same in as many processes as torchrun would start, which find each other as under torchrun; returns exit codes.

    Nobody ends the other ranks where one fails. What all of them print is appended to `log`.
    """
    argv = [str(script), *map(str, arguments)]
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    common |= {"TORCHELASTIC_USE_AGENT_STORE": "True", **(env or {})}
    each = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    return _finish([_start(argv, str(log), str(log), Path.cwd(), own) for own in each])


def _start(argv: list[str], out: str, err: str, cwd: Path, env: Mapping[str, str]) -> BaseProcess:
    process = SERVER.Process(target=_run, args=(argv, out, err, str(cwd), {**os.environ, **env}))
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


def _run(argv: list[str], out: str, err: str, cwd: str, env: dict[str, str]) -> None:
    for number, file in enumerate((out, err), start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = argv
    if argv[0].endswith(".py"):
        sys.path.insert(0, str(Path(argv[0]).parent))
        runpy.run_path(argv[0], run_name="__main__")
    else:
        runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
