"""State tracking on this machine: minutes until S3 is solved, and what making the data costs.

    python benchmarks/state_tracking.py    prints the tables and writes benchmarks/results/state_tracking.{md,json}

The first rows are runs of `titan-dp state-tracking train --group S3 --num-householder 2`, with --length 128 too, the whole
process, ended by the first validation with every word right at every symbol. "data" is the time to make a step's words over the
step's time, both in this process with the same threads, for the shipped small recipe and each kind of problem. The goals
are a minute and 5 %.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import Report, median_seconds

from titan_dp.config.load import PROJECT, load_config
from titan_dp.data.synthetic.counter_rng import Random
from titan_dp.data.synthetic.loader import build_problem
from titan_dp.model.transformer import build_model
from titan_dp.train.run_folder import read_records

SEEDS, LENGTHS = 2, (32, 128)
TASKS = ("S3", "S5", "S6", "parity", "modular-arithmetic", "modular-arithmetic-brackets-mult")


def measure_solving(report: Report, folder: Path, length: int) -> None:
    """One command a seed, so that each has the whole machine."""
    options = ["--group", "S3", "--num-householder", "2", "--length", str(length), "--stop-when-solved"]
    options += ["--solved-accuracy", "1.0", "--launch", "print"]
    command = [sys.executable, "-m", "titan_dp.cli", "state-tracking", "train", *options, "--seeds", str(SEEDS)]
    subprocess.run([*command, "--out", str(folder)], cwd=PROJECT, check=True, stdout=subprocess.DEVNULL)
    for run in sorted(path.parent for path in folder.glob("*/config.toml")):
        start = time.perf_counter()
        train = [sys.executable, "train.py", "--config", str(run / "config.toml")]
        subprocess.run(train, cwd=PROJECT, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        records = read_records(run)
        last = [r for r in records if "validation_sequence_accuracy" in r][-1]
        report.add(
            {
                "what": f"S3, n_h = 2, {run.name.rpartition('-')[2]}: all words right at {length} symbols",
                "steps": last["step"],
                "right": last["validation_sequence_accuracy"],
                "seconds": seconds,
                "goal s": 60,
                "data, % of a step": 100 * max(r["data_wait"] for r in records if r.get("data_wait") and r["step"] > 1),
                "goal %": 5,
            }
        )


def measure_data(report: Report, task: str) -> None:
    """Words of a step against forward and backward of the same step."""
    c = load_config(["--config", str(PROJECT / "train_configs/state_tracking/small.toml")]).config
    problem = build_problem(c.state_tracking.model_copy(update={"task": task}))
    model = build_model(c.model.model_copy(update={"vocab_size": problem.vocab_size}))
    model.init_weights(0)
    samples, length = torch.arange(c.training.local_batch_size), c.training.seq_len - 1
    low = length if problem.answers_everywhere else 3
    tokens, labels = problem.rows(Random("benchmark"), samples, low, length)
    data = median_seconds(lambda: problem.rows(Random("benchmark"), samples, low, length), repeats=9)
    step = median_seconds(lambda: model(tokens, labels).loss.backward(), repeats=3)
    report.add(
        {
            "what": f"words of a step, {task}, {len(samples)} of up to {length} symbols",
            "steps": "",
            "right": "",
            "seconds": data,
            "goal s": "",
            "data, % of a step": 100 * data / step,
            "goal %": 5,
        }
    )


def main() -> None:
    report = Report("state_tracking", "State tracking: time to solve S3, and the cost of making data")
    for length in LENGTHS:
        with tempfile.TemporaryDirectory() as folder:
            measure_solving(report, Path(folder), length)
    for task in TASKS:
        measure_data(report, task)
    report.write()


if __name__ == "__main__":
    main()
