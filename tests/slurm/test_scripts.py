"""What launch/ does without a scheduler: usage, mistakes, torchrun's exit codes and network interface, the Kubernetes file."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.processes import TIMEOUT_SECONDS, run_script, start_launcher
from titan_dp.errors import EXIT_STOPPED
from titan_dp.launch.torchrun import interface_towards

ENV = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")} | {"OMP_NUM_THREADS": "1", "VENV": sys.prefix}


def run(root: Path, *command: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)), cwd=root, env=ENV | env, capture_output=True, text=True, timeout=600, check=False
    )


@pytest.mark.parametrize("script", ["slurm.sbatch", "slurm_array.sbatch"])
@pytest.mark.parametrize("arguments", [[], ["--training.steps", "3"]])
def test_a_script_without_a_config_prints_its_usage(root: Path, script: str, arguments: list[str]) -> None:
    result = run(root, f"launch/{script}", *arguments)
    assert result.returncode == 2
    assert f"launch/{script} C" in result.stderr
    assert result.stderr.startswith("usage: ")


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({}, "this is a job script: usage: sbatch"),
        ({"SLURM_JOB_ID": "1", "VENV": "nowhere"}, "nowhere/bin/python is no Python that has titan_dp: set VENV"),
    ],
)
@pytest.mark.parametrize("script", ["slurm.sbatch", "slurm_array.sbatch"])
def test_a_job_script_says_what_it_lacks(root: Path, script: str, env: dict[str, str], message: str) -> None:
    result = run(root, f"launch/{script}", "debug.toml", **env)
    assert result.returncode == 2
    assert message in result.stderr


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (None, "the job is no array"),
        (1, "there is no config nowhere/config.toml"),
        (2, "has no line 3: the array must be 0-1"),
    ],
)
def test_an_array_that_does_not_fit_its_cells_is_a_mistake(root: Path, tmp_path: Path, index: int | None, message: str) -> None:
    cells = tmp_path / "cells.txt"
    cells.write_text("train_configs/debug.toml\nnowhere/config.toml\n")
    array = {} if index is None else {"SLURM_ARRAY_JOB_ID": "1", "SLURM_ARRAY_TASK_ID": str(index)}
    result = run(root, "launch/slurm_array.sbatch", cells, **{"SLURM_JOB_ID": "1"} | array)
    assert result.returncode == 2
    assert message in result.stderr


def test_an_array_skips_a_cell_that_is_finished(root: Path, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("not even valid")
    (tmp_path / "run.json").write_text('{"state": "finished"}')
    (tmp_path / "cells.txt").write_text(f"{tmp_path / 'config.toml'}\n")
    array = {"SLURM_JOB_ID": "1", "SLURM_ARRAY_JOB_ID": "1", "SLURM_ARRAY_TASK_ID": "0"}
    result = run(root, "launch/slurm_array.sbatch", tmp_path / "cells.txt", **array)
    assert result.returncode == 0, result.stderr
    assert f"{tmp_path} is finished: skipped" in result.stdout


@pytest.mark.parametrize(("statement", "code"), [("pass", 0), ("sys.exit(2)", 2), ("os.kill(os.getpid(), 9)", 137)])
def test_the_launcher_leaves_with_the_exit_code_of_what_it_launched(tmp_path: Path, statement: str, code: int) -> None:
    result, logs = launched(tmp_path, f"import os, sys\n{statement}\n")
    assert result.returncode == code, result.stderr
    assert [int(file.read_text()) for file in logs.glob("exit_code")] == [code] * (code > 0)
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("print('error: no answer', file=sys.stderr); sys.exit(1)", r"error: no answer\n"),
        (
            "os.kill(os.getpid(), 9)",
            r"error: rank 0 \(process \d+ on \S+\) was killed by SIGKILL, often for want of memory; "
            r"the same command goes on from the last save\n",
        ),
        ("sys.exit(3)", r"error: rank 0 \(process \d+ on \S+\) ended with exit code 3\n"),
    ],
)
def test_a_rank_that_fails_is_one_sentence(tmp_path: Path, statement: str, said: str) -> None:
    result, _ = launched(tmp_path, f"import os, sys\n{statement}\n")
    assert re.fullmatch(said, result.stderr), result.stderr


def test_a_signal_after_which_ranks_save_is_said_by_them_alone(tmp_path: Path) -> None:
    script, log = tmp_path / "script.py", tmp_path / "log"
    script.write_text(
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGINT, lambda *_: (open(os.environ['TITAN_DP_STOPPED_FILE'], 'w'), sys.exit(75)))\n"
        "print('ready', file=sys.stderr, flush=True)\n"
        "time.sleep(600)\n"
    )
    log.touch()
    launcher = start_launcher("--standalone", "--nproc-per-node=1", script, log=log)
    while "ready" not in log.read_text():
        time.sleep(0.05)
    assert launcher.pid is not None
    os.kill(launcher.pid, signal.SIGINT)
    launcher.join(TIMEOUT_SECONDS)
    assert launcher.exitcode == EXIT_STOPPED
    assert log.read_text() == "ready\n"


def test_logs_that_cannot_be_written_do_not_take_the_exit_code_away(tmp_path: Path) -> None:
    logs = str(tmp_path / "logs")
    result, _ = launched(tmp_path, f"import shutil, sys\nshutil.rmtree({logs!r})\nopen({logs!r}, 'w')\nsys.exit(2)\n")
    assert result.returncode == 2


def launched(tmp_path: Path, script: str) -> tuple[subprocess.CompletedProcess[str], Path]:
    """How the launcher ends one process of `script`, and the folder of its logs."""
    path, logs = tmp_path / "script.py", tmp_path / "logs"
    path.write_text(script)
    launcher = ("titan_dp.launch.torchrun", "--standalone", "--nproc-per-node=1", f"--log-dir={logs}")
    return run_script(*launcher, path), logs


def signalled(root: Path, tmp_path: Path, site: str, script: str, when: str) -> int:
    """Exit code of the launcher if SIGTERM reaches it when it has printed `when`; `site` runs before everything in it."""
    (tmp_path / "sitecustomize.py").write_text(site)
    (tmp_path / "script.py").write_text(script)
    command = [sys.executable, "launch/torchrun.py", "--standalone", "--nproc-per-node=1", tmp_path / "script.py"]
    env = ENV | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"}
    with subprocess.Popen(command, cwd=root, env=env, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert any(when in line for line in process.stderr)
        process.send_signal(signal.SIGTERM)
        process.stderr.read()
        return process.wait(600)


def test_a_signal_after_the_failure_does_not_change_the_exit_code(root: Path, tmp_path: Path) -> None:
    """As srun sends it to every other node when one has failed; the interpreter's end takes a while."""
    slow_end = "import atexit, sys, time\nif 'torchrun' in ''.join(sys.orig_argv): atexit.register(time.sleep, 2)\n"
    assert signalled(root, tmp_path, slow_end, "import sys\nsys.exit(3)\n", "ended with exit code 3") == 3


def test_a_signal_before_torch_is_imported_is_no_failure_of_its_own(root: Path, tmp_path: Path) -> None:
    """srun reports the highest exit code of all nodes: 143 here would hide the 2 of the node that failed."""
    (tmp_path / "torch.py").write_text("import sys, time\nprint('importing', file=sys.stderr, flush=True)\ntime.sleep(600)\n")
    assert signalled(root, tmp_path, "", "", "importing") == 1


@pytest.mark.parametrize(("codes", "code"), [(["2", "137"], 2), (["2"], 2), (["137", "1"], 137)])
def test_a_mistake_on_one_node_is_the_jobs_whatever_srun_did_to_the_others(
    root: Path, tmp_path: Path, codes: list[str], code: int
) -> None:
    for node, text in enumerate(codes):
        (tmp_path / f"node-{node}").mkdir()
        (tmp_path / f"node-{node}/exit_code").write_text(f"{text}\n")
    script = f"source {root}/launch/slurm_common.sh; logs={tmp_path}; train bash -c 'exit 137'"
    result = subprocess.run(
        ["bash", "-euc", script], cwd=tmp_path, env=ENV | {"SLURM_JOB_ID": "1"}, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == code, result.stderr


def test_the_interface_towards_a_host_is_the_one_that_has_the_route() -> None:
    assert interface_towards("127.0.0.1") == "lo"
    assert interface_towards("no-such-host.invalid") is None
    outward = interface_towards("192.0.2.1")  # needs no answer from there (RFC 5737)
    assert outward is None or outward in {name for _, name in socket.if_nameindex()} - {"lo"}


def test_the_kubernetes_file_agrees_with_itself(root: Path) -> None:
    yaml = pytest.importorskip("yaml")
    service, job = yaml.safe_load_all((root / "launch/kubernetes.yaml").read_text())
    spec: dict[str, Any] = job["spec"]
    pod = spec["template"]["spec"]
    container = pod["containers"][0]
    options = dict(option.removeprefix("--").split("=", 1) for option in container["command"] if "=" in option)
    assert spec["completions"] == spec["parallelism"] == int(options["nnodes"])
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    assert options["rdzv-endpoint"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}:29500"
    assert {volume["name"] for volume in pod["volumes"]} == {mount["name"] for mount in container["volumeMounts"]}
