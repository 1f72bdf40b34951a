"""A soak: one run on two ranks, killed at random again and again, started again until it is done; nothing may be lost.

    python benchmarks/soak.py                           50 kills; prints the table and writes benchmarks/results/soak.{md,json}
    python benchmarks/soak.py --kills 6 --seed 1 --try  a short one that writes nothing

What dies (a rank, all ranks, the launcher) or is asked to stop (SIGTERM to the launcher, SIGUSR1 to a rank) and when (while it
starts, or some steps after it resumed, anywhere in a step or a save) is drawn from the seed; where in a step a signal falls is
the machine's. Afterwards every loss is compared with those of a run that nothing disturbed, bit for bit, and every checkpoint
with its checksums. Restarts are counted from the command to the first log line, starting Python and torch included.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from common import Report

from titan_dp.checkpoint.manifest import all_steps, committed_steps, step_folder, verify
from titan_dp.train.run_folder import read_records

ROOT = Path(__file__).resolve().parent.parent
INTERVAL = 10
STEPS_PER_KILL = 30  # a start gets 10 to 30 steps further, and repeats some
STARTING = 0.1  # of all kills hit a run that has not reached its first step
MINUTE = 60.0
KINDS = (
    "SIGKILL to one rank",
    "SIGKILL to all ranks",
    "SIGKILL to the launcher",
    "SIGTERM to the launcher",
    "SIGUSR1 to a rank",
)
CONFIG = """
job = {{ dump_folder = "{folder}" }}
model = {{ hidden_size = 32, num_hidden_layers = 2, num_heads = 2, head_dim = 16, intermediate_size = 64, vocab_size = 320 }}
data = {{ path = "{folder}/tokens/train" }}
validation = {{ enable = false }}
training = {{ steps = {steps}, seq_len = 32, local_batch_size = 2, mixed_precision_param = "float32" }}
optimizer = {{ lr = 0.003 }}
lr_scheduler = {{ warmup_steps = 20 }}
checkpoint = {{ interval = {interval}, keep_latest_k = 3 }}
metrics = {{ log_freq = 1, enable_tensorboard = false }}
generate = {{ enable = false }}
"""


@dataclass
class Start:
    """One start of the command, and how it ended."""

    kind: str
    process: subprocess.Popen[bytes]
    log: Path
    began: float
    stopped: float = 0.0
    first_step: float | None = None

    @property
    def resumed(self) -> int:
        """The step it took up, 0 for a fresh start."""
        match = re.search(r"^resumed at step ([\d,]+)", self.log.read_text(), re.MULTILINE)
        return int(match[1].replace(",", "")) if match else 0

    @property
    def last(self) -> int:
        """The last step it logged, 0 where there was none."""
        steps = re.findall(r"^step +([\d,]+)/", self.log.read_text(), re.MULTILINE)
        return int(steps[-1].replace(",", "")) if steps else 0

    def ranks(self) -> list[int]:
        """Process ids of the launcher's children, none while there are none."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in children.read_text().split()] if children.exists() else []

    def wait_for(self, done: float, steps: int) -> None:
        """Return at time `done`, or, where that is 0, `steps` steps after the first; sooner when the command has ended."""
        while self.process.poll() is None and time.monotonic() - self.began < 10 * MINUTE:
            if self.first_step is None and re.search(r"^step +[\d,]+/", self.log.read_text(), re.MULTILINE):
                self.first_step = time.monotonic()
            if done and time.monotonic() > done:
                return
            if not done and self.first_step is not None and self.last >= self.resumed + steps:
                return
            time.sleep(0.02)


class Soak:
    """A folder with data, a config and the logs of all starts."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps = folder, steps
        self.config = folder / "soak.toml"
        self.config.write_text(CONFIG.format(folder=folder, steps=steps, interval=INTERVAL))
        text = str(ROOT / "corpus/devils_dictionary.jsonl")
        prepare = [
            sys.executable,
            "-m",
            "titan_dp.cli",
            "prepare",
            text,
            "--out",
            str(folder / "tokens"),
            "--tokenizer",
            "bytes",
        ]
        subprocess.run(prepare, check=True, capture_output=True, cwd=ROOT)
        self.starts: list[Start] = []

    def start(self, name: str, kind: str) -> Start:
        command = [
            sys.executable,
            str(ROOT / "launch/torchrun.py"),
            "--standalone",
            "--nproc-per-node=2",
            str(ROOT / "train.py"),
        ]
        command += ["--config", str(self.config), "--job.run_name", name]
        log = self.folder / f"{name}-{len(self.starts)}.log"
        with log.open("w") as output:
            env = os.environ | {"OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT, cwd=self.folder)
        start = Start(kind, process, log, time.monotonic())
        self.starts.append(start)
        return start

    def losses(self, name: str) -> list[tuple[int, float]]:
        """(step, loss) as metrics.jsonl has them."""
        return [(record["step"], record["loss"]) for record in read_records(self.folder / name)]

    def problems(self) -> list[str]:
        """What is not as it would be had nothing happened; nothing, it is hoped."""
        found = []
        if self.losses("soak") != self.losses("undisturbed"):
            found.append("losses differ from the undisturbed run's")
        if [step for step, _ in self.losses("soak")] != list(range(1, self.steps + 1)):
            found.append("metrics.jsonl does not have every step once")
        folder = self.folder / "soak/checkpoint"
        if committed_steps(folder) != all_steps(folder) or committed_steps(folder)[-1] != self.steps:
            found.append(f"checkpoints left: {all_steps(folder)}, committed {committed_steps(folder)}")
        found += [problem for step in committed_steps(folder) for problem in verify(step_folder(folder, step))]
        found += [f"{path} is left over" for path in (self.folder / "soak").rglob("*") if path.suffix in (".tmp", ".damaged")]
        return found


def strike(start: Start, rng: random.Random) -> None:
    """Send what the kind says; to the launcher where there are no ranks yet."""
    ranks = start.ranks()
    one = [rng.choice(ranks)] if ranks else []
    launcher = [start.process.pid]
    to = {KINDS[0]: one, KINDS[1]: ranks, KINDS[4]: one}.get(start.kind, launcher) or launcher
    for pid in to:
        try:
            os.kill(pid, signal.Signals[start.kind.split()[0]])
        except ProcessLookupError:  # it has just ended by itself
            continue
    start.stopped = time.monotonic()


def run(soak: Soak, kills: int, rng: random.Random) -> None:
    """The requeue loop: start the same command until it is done. Raises RuntimeError where it does not get there."""
    kinds = [KINDS[i % len(KINDS)] for i in range(kills)]
    rng.shuffle(kinds)
    for kind in kinds:
        start = soak.start("soak", kind)
        starting = rng.random() < STARTING
        start.wait_for(start.began + rng.uniform(0, 6) if starting else 0.0, rng.randint(INTERVAL, 3 * INTERVAL))
        time.sleep(rng.uniform(0, 0.2))
        strike(start, rng)
        code = start.process.wait(3 * MINUTE)
        seconds = time.monotonic() - start.stopped
        print(f"{len(soak.starts) - 1:>3} {kind:<24} steps {start.resumed} to {start.last}; code {code}, {seconds:.1f} s later")
        if code in (0, 2):
            raise RuntimeError(f"the command ended by itself with exit code {code}; see {start.log}")
    last = soak.start("soak", "none")
    last.wait_for(0.0, soak.steps)
    if (code := last.process.wait(10 * MINUTE)) != 0:
        raise RuntimeError(f"left alone, the command ended with exit code {code}:\n{last.log.read_text()[-2000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--try", action="store_true", dest="trial", help="write no results")
    arguments = parser.parse_args()
    steps = STEPS_PER_KILL * arguments.kills
    print(f"seed {arguments.seed}, {arguments.kills} kills, {steps} steps")
    with tempfile.TemporaryDirectory() as name:
        soak = Soak(Path(name), steps)
        undisturbed = soak.start("undisturbed", "none")
        undisturbed.wait_for(0.0, steps)
        if undisturbed.process.wait():
            raise SystemExit(undisturbed.log.read_text()[-2000:])
        alone = time.monotonic() - undisturbed.began
        began = time.monotonic()
        run(soak, arguments.kills, random.Random(arguments.seed))
        minutes = (time.monotonic() - began) / MINUTE
        problems = soak.problems()
        result = (
            "every loss is the undisturbed run's bit for bit, every checkpoint is whole"
            if not problems
            else "; ".join(problems)
        )
        title = (
            f"Soak: {arguments.kills} random kills (seed {arguments.seed}) of one run of {steps:,} steps, checkpoint.interval "
            f"= {INTERVAL}: {result}; {minutes:.1f} minutes, alone {alone / MINUTE:.1f}"
        )
        report = Report("soak", title)
        starts = soak.starts[1:]
        pairs = [(start, next(s for s in starts[i + 1 :] if s.last)) for i, start in enumerate(starts[:-1])]
        for kind in (*KINDS, "all"):
            chosen = [pair for pair in pairs if kind in (pair[0].kind, "all")]
            if chosen:
                report.add(row(kind, chosen))
        print(title)
        if not arguments.trial:
            report.write()
    sys.exit(1 if problems else 0)


def row(kind: str, pairs: list[tuple[Start, Start]]) -> dict[str, object]:
    """What kills of one kind cost: each pair is a start that was hit and the next that reached a step."""
    repeated = [killed.last - after.resumed if killed.last else 0 for killed, after in pairs]
    seconds = [after.first_step - after.began for _, after in pairs if after.first_step is not None]
    codes = sorted({killed.process.returncode for killed, _ in pairs})
    return {
        "what was sent": kind,
        "times": len(pairs),
        "steps repeated, mean": statistics.mean(repeated),
        "most": max(repeated),
        "restart to first step, median s": statistics.median(seconds) if seconds else "",
        "longest s": max(seconds, default=0.0),
        "exit codes": " ".join(map(str, codes)),
    }


if __name__ == "__main__":
    main()
