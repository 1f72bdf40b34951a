"""launch/slurm.sbatch and slurm_array.sbatch under a real SLURM: preempted, near the time limit, killed, mistaken, finished.

Each job is submitted as a user submits it, from a project root of its own (links to the sources), so that nothing is written
into this one. Left out: GPUs, and nodes on different machines.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.test_user_journey import losses
from tests.processes import run_script_in_ranks
from tests.slurm.cluster import Cluster, missing_programs, wait_for

pytestmark = pytest.mark.skipif(
    bool(missing_programs()), reason="SLURM is not installed: apt-get install slurm-wlm munge (needed by tests/slurm)"
)

ONE_CPU = ("--gpus-per-node=0", "--cpus-per-task=1")  # what a user adds on a cluster without GPUs
ENV = {"VENV": sys.prefix, "NPROC": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster() as running:
        yield running


@pytest.fixture
def project(root: Path, tmp_path: Path) -> Path:
    """A folder that jobs may write into."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "launch").symlink_to(root / "launch")
    return folder


def wait_for_checkpoint(run: Path, after: int, report: Path) -> int:
    """The step of the first checkpoint past step `after`, as soon as it is committed."""

    def newest() -> int:
        return max((int(p.parent.name[5:]) for p in run.glob("checkpoint/step-*/manifest.json")), default=0)

    wait_for(lambda: newest() > after, f"checkpoint after step {after}", 600, report=report.read_text)
    return newest()


def test_a_run_on_two_nodes_survives_preemption_and_the_time_limit(
    cluster: Cluster, project: Path, tiny_config: Path, tmp_path: Path
) -> None:
    run, settings = tmp_path / "outputs/tiny", ("--training.steps", "100", "--validation.freq", "1000")
    job = cluster.sbatch("--nodes=2", *ONE_CPU, "launch/slurm.sbatch", tiny_config, *settings, cwd=project, **ENV, RETRIES="0")
    log = project / f"slurm-{job}.log"
    wait_for(log.exists, f"log of job {job}", 600, cluster.logs)

    step = wait_for_checkpoint(run, 10, log)
    cluster.sbatch("--partition=urgent", "--nodes=2", "--exclusive", "--wrap=true", cwd=tmp_path)
    cluster.wait_until_requeued(job, 600)
    step = wait_for_checkpoint(run, step + 20, log)
    cluster.run("scancel", "--signal=USR1", "--batch", job)  # what --signal=B:USR1@120 does near the time limit
    (end,) = cluster.wait_until_over(job, seconds=600)

    text = log.read_text()
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("COMPLETED", "0:0", "2"), text
    assert re.findall(f"job {job}: (.*): requeueing", text) == [
        "preempted",
        "the time limit is near",
    ]  # RETRIES = 0 is for failures
    assert "2 ranks" in text
    resumed = [int(found) for found in re.findall(r"\[rank 0\] resumed at step (\d+)", text)]
    assert len(resumed) == 2
    saved = re.findall(r"stopped by SIGUSR1 after step (\d+); saved", text)
    assert 10 < resumed[0] < step <= resumed[1] < 100
    assert saved == [str(resumed[1])], "no step is done twice after a signal"
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert steps == list(range(1, 101))
    for node in (0, 1):
        assert list((project / f"outputs/slurm/{job}/start-2/node-{node}").glob("**/0/stdout.log")), node

    command = ("titan_dp.train", "--config", tiny_config, "--job.run_name", "undisturbed", *settings)
    assert run_script_in_ranks(2, *command, log=tmp_path / "undisturbed.log") == [0, 0]
    assert losses(run) == losses(tmp_path / "outputs/undisturbed")


def test_a_mistake_on_two_nodes_ends_the_job_with_exit_code_2_and_is_not_tried_again(
    cluster: Cluster, project: Path, tiny_config: Path
) -> None:
    wrong = ("--data.path", "nowhere")
    job = cluster.sbatch("--nodes=2", *ONE_CPU, "launch/slurm.sbatch", tiny_config, *wrong, cwd=project, **ENV)
    (end,) = cluster.wait_until_over(job, seconds=600)
    log = (project / f"slurm-{job}.log").read_text()
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", "2:0", "0"), log
    assert "there are no token shards in 'nowhere'" in log


def test_a_sweep_is_an_array_that_retries_failed_cells_and_leaves_mistakes_and_finished_ones(
    cluster: Cluster, project: Path, tiny_config: Path
) -> None:
    (project / "tiny.toml").write_text(re.sub(r'(dump_folder|run_name) = ".*"', "", tiny_config.read_text()))
    (project / "four.toml").write_text(
        """
        extends = "tiny.toml"
        [sweep]
        cells = [
            { name = "finished", "training.steps" = 20 },
            { name = "killed", "training.steps" = 80 },
            { name = "mistaken", "data.path" = "/nowhere" },
            { name = "diverging", lr = 1e30 },
        ]
        [training]
        max_nonfinite_steps = 3
        [validation]
        freq = 1000
        """
    )
    sweep = project / "outputs/four"
    assert titan_dp_sweep(cluster, project).returncode == 0  # writes the folders
    (sweep / "finished/run.json").write_text('{"state": "finished", "step": 20}')

    launch = (
        "--launch",
        "slurm",
        "--at-once",
        "4",
        "--retries",
        "1",
        "--nproc",
        "1",
        "--sbatch",
        " ".join([*ONE_CPU, "--hold"]),
    )
    submitted = titan_dp_sweep(cluster, project, *launch)
    assert submitted.returncode == 0, submitted.stderr
    found = re.search(r"array (\d+): 3 cells, 4 at once", submitted.stdout)
    assert found is not None, submitted.stdout
    array = found[1]
    assert "nothing to submit: 3 cells with SLURM already" in titan_dp_sweep(cluster, project, *launch).stdout
    assert cluster.run("scontrol", "release", array).returncode == 0

    journal = project / f"slurm-{array}.log"
    wait_for(journal.exists, f"log of array {array}", 600, cluster.logs)
    wait_for_checkpoint(sweep / "killed", 5, journal)
    kill_training(cluster, "outputs/four/killed/config.toml")
    records = cluster.wait_until_over(*(f"{array}_{i}" for i in range(3)), seconds=600)
    ends = [(r["JobState"], r["ExitCode"], r["Restarts"]) for r in records]
    assert ends == [("COMPLETED", "0:0", "1"), ("FAILED", "2:0", "0"), ("FAILED", "1:0", "1")], journal.read_text()

    text = journal.read_text()
    assert f"job {array}_0: failed with exit code 137, retry 1 of 1: requeueing" in text
    assert re.search(r"resumed at step \d+", (sweep / "killed/slurm.log").read_text())
    assert list(losses(sweep / "killed")) == list(range(1, 81))
    assert f"job {array}_2: failed with exit code 1, no retry left of 1: given up" in text
    assert "there are no token shards in '/nowhere" in (sweep / "mistaken/slurm.log").read_text()
    assert not (sweep / "finished/metrics.jsonl").exists()
    assert "2 finished" in titan_dp_sweep(cluster, project).stdout


def titan_dp_sweep(cluster: Cluster, project: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return cluster.run(sys.executable, "-m", "titan_dp.cli", "sweep", "four.toml", *options, cwd=project)


def kill_training(cluster: Cluster, config: str) -> None:
    """SIGKILL the training process, not the launcher above it."""
    for process in cluster.processes():
        command = Path(f"/proc/{process}/cmdline").read_text().split("\0")
        if config in command and "titan_dp.launch.torchrun" not in command:
            os.kill(process, signal.SIGKILL)
