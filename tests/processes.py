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
from pathlib import Path

SERVER = mp.get_context("forkserver")
SERVER.set_forkserver_preload(["titan_dp.trainer", "titan_dp.generate"])

TIMEOUT_SECONDS = 600
"""Only a hang takes that long, however busy the machine is."""


def run_script(
    script: Path, *arguments: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`python SCRIPT ARGUMENTS` to its end, whatever its exit code; `env` is set beside what this process has."""
    argv = [str(script), *map(str, arguments)]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        files = [f"/proc/{os.getpid()}/fd/{file.fileno()}" for file in (out, err)]
        process = SERVER.Process(target=_run, args=(argv, files, str(cwd or os.getcwd()), {**os.environ, **(env or {})}))
        process.start()
        process.join(TIMEOUT_SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(argv, TIMEOUT_SECONDS)
        code = process.exitcode
        assert code is not None
        texts = [os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode() for file in (out, err)]
    return subprocess.CompletedProcess(argv, code, *texts)


def _run(argv: list[str], files: list[str], cwd: str, env: dict[str, str]) -> None:
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = argv
    sys.path.insert(0, str(Path(argv[0]).parent))
    runpy.run_path(argv[0], run_name="__main__")
