"""A report over 500 runs of 10,000 step records each: seconds and peak memory of the whole command, its processes together.

    python benchmarks/report.py    prints the table and writes benchmarks/results/report.{md,json}

The runs are made up (six families, six sizes, seven lengths, two seeds) and need 2 GB in the system's temporary folder. Their
files are in the page cache when they are read. Memory is the sum of the proportional set sizes of all processes, ten times a
second. On a machine that does other work the seconds are too many; its load is shown beside them.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import Report, proportional_set_size

from titan_dp.config.load import PROJECT, config_from_toml
from titan_dp.model.size import embedding_parameters, model_size

RUNS, RECORDS = 500, 10_000
SIZES = ((256, 4), (320, 5), (384, 6), (512, 8), (640, 10), (768, 12))
TOKENS_PER_STEP = 8192


def write_runs(folder: Path) -> int:
    """Write the runs; returns the bytes of their metrics."""
    rng = random.Random(0)
    noise = [[rng.gauss(0, 1) for _ in range(RECORDS)] for _ in range(8)]
    grid = itertools.product((1, 2, 3), (False, True), SIZES, range(1, 8), (1, 2))
    written = 0
    for i, (n_h, gated, (width, layers), length, seed) in enumerate(itertools.islice(grid, RUNS)):
        steps = RECORDS * length
        text = (
            f"[model]\nnum_householder = {n_h}\nuse_forget_gate = {str(gated).lower()}\nhidden_size = {width}\n"
            f"num_hidden_layers = {layers}\n[training]\nsteps = {steps}\n[debug]\nseed = {seed}\n"
        )
        model = config_from_toml(text).model
        size, run = model_size(model, 2048), folder / f"run-{i:03}"
        run.mkdir()
        (run / "config.toml").write_text(text)
        facts = {
            "state": "finished",
            "step": steps,
            "steps": steps,
            "tokens_per_step": TOKENS_PER_STEP,
            "parameters": size.parameters,
            "embedding_parameters": embedding_parameters(model),
            "flops_per_token": size.flops_per_token,
            "tokenizer": "bytes",
            "fingerprint": "d",
            "validation_fingerprint": "v",
            "bytes_per_token": 1.0,
            "device": "none",
            "world_size": 8,
        }
        (run / "run.json").write_text(json.dumps(facts))
        tokens = steps * TOKENS_PER_STEP
        final = 1.7 - 0.01 * n_h + 400 / size.parameters**0.34 + 410 / tokens**0.28 + 0.004 * rng.gauss(0, 1)
        lines = [record(length * (j + 1), final, steps, e) for j, e in enumerate(noise[i % 8])]
        lines.append(json.dumps({"step": steps, "validation_loss": final, "validation_tokens": 10**6}) + "\n")
        written += (run / "metrics.jsonl").write_text("".join(lines))
    return written


def record(step: int, final: float, steps: int, noise: float) -> str:
    """One line as metrics.py writes it, with as many digits."""
    values = {
        "step": step,
        "loss": final + 3 * (1 - step / steps) ** 2 + 0.03 * noise,
        "lr": 3e-4 * (1 - step / steps),
        "grad_norm": 0.5 + 0.01 * noise,
        "tokens": step * TOKENS_PER_STEP,
        "tokens_per_second": 812345.6 + 100 * noise,
        "tflops_per_device": 412.3 + noise,
        "memory_gib": 61.23046875,
        "data_wait": 1e-3 + 1e-5 * noise,
        "step_seconds": 0.01008 + 1e-6 * noise,
        "skipped_steps": 0,
        "mfu": 0.41 + noise / 1e3,
    }
    return json.dumps(values) + "\n"


def cpu_seconds() -> float:
    """Of all processes that have ended: what other work on the machine does not stretch."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    report = Report("report", f"titan-dp report over {RUNS} runs of {RECORDS:,} step records")
    with tempfile.TemporaryDirectory() as name:
        runs = Path(name) / "runs"
        runs.mkdir()
        written = write_runs(runs)
        for attempt in range(3):
            command = [sys.executable, "-m", "titan_dp.cli", "report", str(runs), "--out", f"{name}/report-{attempt}"]
            before, start, peak = cpu_seconds(), time.perf_counter(), 0
            process = subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.DEVNULL)
            while process.poll() is None:
                peak = max(peak, proportional_set_size(process.pid))
                time.sleep(0.1)
            assert process.returncode == 0
            seconds = time.perf_counter() - start
            report.add(
                {
                    "attempt": attempt + 1,
                    "metrics GB": written / 1e9,
                    "seconds": seconds,
                    "CPU seconds": cpu_seconds() - before,
                    "peak memory GB": peak / 1e9,
                    "load": os.getloadavg()[0],
                }
            )
    report.write()


if __name__ == "__main__":
    main()
