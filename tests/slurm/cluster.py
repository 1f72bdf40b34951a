"""A real SLURM on this one machine: munged, slurmctld and two slurmd in a temporary folder, for as long as a `with` lasts.

The invariant: nothing of the system is read or written (own key, socket, ports, spool folders), and no process outlives the
cluster: every one of them, jobs included, carries the cluster's SLURM_CONF in its environment and is found by it.
Two nodes are two slurmd with the same address and different ports, which Debian's build allows. Left out: accounting, cgroups,
GPUs, and a network between the nodes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
SYSTEM_PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))  # daemons are not on every user's PATH

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_min_interval=1000,sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=2
ReturnToService=2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=normal Nodes=n1,n2 Default=YES PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes=n1,n2 PriorityTier=2 PreemptMode=OFF
"""


def missing_programs() -> list[str]:
    """The programs of PROGRAMS that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name, path=SYSTEM_PATH) is None]


def wait_for(condition: Callable[[], Any], what: str, seconds: float, report: Callable[[], str] = str) -> Any:
    """The first true value of `condition()`; AssertionError with `what` and `report()` after `seconds` without one."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"no {what} within {seconds} s\n{report()}"
        time.sleep(0.1)
    return value


class Cluster:
    """A running cluster of nodes n1 and n2 with the partitions `normal` (default) and `urgent`, which preempts it."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: a socket's path has at most 107 characters
        self.conf = self.folder / "slurm.conf"
        # What a shell on a login node has. Variables of a job this test may itself run in would mislead sbatch.
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
        self.env = kept | {"SLURM_CONF": str(self.conf), "PATH": SYSTEM_PATH}
        self.daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    # -- for tests -----------------------------------------------------------------------------------------------------

    def run(self, *command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
        """A command as a user of this cluster gives it; returns it finished, whatever its exit code."""
        return subprocess.run(
            list(map(str, command)), env=self.env, capture_output=True, text=True, timeout=600, check=False, **options
        )

    def sbatch(self, *arguments: str | Path, cwd: Path, **env: str) -> str:
        """Submit and return the job's id."""
        command = ["sbatch", "--parsable", *map(str, arguments)]
        done = subprocess.run(command, env=self.env | env, cwd=cwd, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says of a job or an array's element (ID or ID_INDEX)."""
        text = self.run("scontrol", "--oneliner", "show", "job", job).stdout.splitlines()
        return dict(field.split("=", 1) for field in text[0].split() if "=" in field) if text else {}

    def wait_until_requeued(self, job: str, seconds: float) -> None:
        """Wait until the job is back in the queue, and let it start soon."""
        wait_for(lambda: self._start_soon(job, self.job(job)), f"requeue of job {job}", seconds, self.logs)

    def wait_until_over(self, *jobs: str, seconds: float) -> list[dict[str, str]]:
        """Wait until all jobs have left the queue for good, through requeues, and return their last records."""

        def over() -> list[dict[str, str]]:
            records = [self.job(job) for job in jobs]
            for job, record in zip(jobs, records, strict=True):
                self._start_soon(job, record)
            return records if all(record.get("JobState") in OVER for record in records) else []

        return wait_for(over, f"end of jobs {jobs}", seconds, self.logs)

    def _start_soon(self, job: str, record: dict[str, str]) -> bool:
        """Shorten a requeued job's wait, two minutes, to more than the second in which a node refuses a job it just ended."""
        if (record.get("JobState"), record.get("Reason")) != ("PENDING", "BeginTime"):
            return False
        if (datetime.fromisoformat(record["EligibleTime"]) - datetime.now()).total_seconds() > 10:
            self.run("scontrol", "update", f"JobId={job}", "StartTime=now+3seconds")
        return True

    def logs(self) -> str:
        """The last lines of every daemon's log."""
        return "\n".join(f"== {p.name}\n{p.read_text(errors='replace')[-2000:]}" for p in sorted(self.folder.glob("*.log")))

    # -- daemons -------------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        (self.folder / "state").mkdir()
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o600)
        # No cgroups are used, but slurmd looks for them, and does not start in a container that mounts none, unless told this.
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        self.conf.write_text(
            CONFIG.format(
                folder=self.folder,
                host=socket.gethostname().partition(".")[0],
                user=self.run("id", "-un").stdout.strip(),
                ports=free_ports(3),
            )
        )
        options = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid", "seed-file": "munged.seed"}
        self._daemon("munged", "--foreground", "--force", *(f"--{k}={self.folder / v}" for k, v in options.items()))
        wait_for((self.folder / "munge.socket").exists, "socket of munged", 600, self.logs)
        self._daemon("slurmctld", "-D")
        for node in ("n1", "n2"):
            self._daemon("slurmd", "-D", "-N", node)
        idle = ["sinfo", "--noheader", "--Node", "--partition=normal", "--format=%T"]
        wait_for(lambda: self.run(*idle).stdout.split() == ["idle", "idle"], "two idle nodes", 600, self.logs)

    def _daemon(self, program: str, *arguments: str) -> None:
        path = shutil.which(program, path=SYSTEM_PATH)
        assert path is not None
        with (self.folder / f"{len(self.daemons)}-{program}.log").open("wb") as log:
            daemon = subprocess.Popen(
                [path, *arguments], env=self.env, cwd=self.folder, stdout=log, stderr=log, start_new_session=True
            )
        self.daemons.append(daemon)

    def _stop(self) -> None:
        deadline = time.monotonic() + 120
        while (processes := self.processes()) and time.monotonic() < deadline:  # what is killed may just have started another
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            for daemon in self.daemons:
                daemon.poll()  # reaps it
            time.sleep(0.05)
        shutil.rmtree(self.folder, ignore_errors=True)
        assert not processes, f"processes {processes} of the cluster outlived it"

    def processes(self) -> list[int]:
        """Every process that was started for this cluster or by one of its jobs."""
        mark, found = f"SLURM_CONF={self.conf}".encode(), []
        for entry in Path("/proc").glob("[0-9]*/environ"):
            try:
                if mark in entry.read_bytes().split(b"\0"):
                    found.append(int(entry.parent.name))
            except OSError:  # ended meanwhile, or another user's
                continue
        return found


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()
