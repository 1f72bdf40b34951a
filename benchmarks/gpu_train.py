"""Steps of real training runs, each in a process of its own, read from their metrics.jsonl."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STEPS, EVERY, WARM = 24, 4, 3
"""Steps, steps a record, and records that are left out: compilation and warm-up."""
SECONDS = 300


@dataclass(frozen=True)
class Run:
    config: str
    local_batch: int = 4
    checkpointing: str = "none"
    compiled: bool = True
    settings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        eager = "" if self.compiled else " eager"
        rest = "".join(f" {setting}" for setting in self.settings)
        return f"{self.config} local batch {self.local_batch}, checkpointing {self.checkpointing}{eager}{rest}"


def cases(smoke: bool) -> list[Run]:
    if smoke:
        return [Run("debug.toml", 2, compiled=False)]
    return [
        Run("800m.toml"),
        Run("800m_nh1.toml"),
        Run("800m.toml", 8, "selective"),
        Run("paper/800m.toml"),
        Run("800m.toml", compiled=False),
    ]


def train(run: Run, smoke: bool) -> dict[str, Any]:
    """Tokens a second, MFU and memory of steady steps."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text.txt").write_text("It was a dark and stormy night. " * 300_000)
        prepare = ["prepare", str(folder / "text.txt"), "--out", str(folder / "tokens"), "--validation-fraction", "0"]
        subprocess.run([sys.executable, "-m", "titan_dp.cli", *prepare], check=True, cwd=ROOT, capture_output=True)
        settings = {
            "data.path": folder / "tokens/train", "job.dump_folder": folder, "job.run_name": "run",
            "metrics.log_freq": 1 if smoke else EVERY, "training.steps": 3 if smoke else STEPS,
            "training.global_batch_size": 2 * run.local_batch, "training.local_batch_size": run.local_batch,
            "compile.enable": str(run.compiled).lower(), "activation_checkpoint.mode": run.checkpointing,
            "checkpoint.enable": "false", "validation.enable": "false", "generate.enable": "false",
            "metrics.enable_tensorboard": "false", "lr_scheduler.warmup_steps": 2,
        }  # fmt: skip
        flags = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
        command = [sys.executable, "train.py", "--config", run.config, *flags, *run.settings]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return {"fault": f"not done in {SECONDS} s"}
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        if done.returncode:
            print(*lines[-30:], sep="\n", flush=True)
            return {"fault": lines[-1][:160] if lines else f"exit code {done.returncode}"}
        records = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    steady = [record for record in records if "tokens_per_second" in record][0 if smoke else WARM :]
    return {
        "tokens/s": statistics.median(record["tokens_per_second"] for record in steady),
        "MFU": statistics.median(record.get("mfu") or float("nan") for record in steady),
        "memory (GiB)": max(record["memory_gib"] for record in steady),
        "loss": records[-1].get("loss", float("nan")),
        "fault": "",
    }
