"""Steps of real training runs, one after another, each in a process of its own, read from their metrics.jsonl."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import titan_dp.trainer  # noqa: F401  # says at once what is not installed

ROOT = Path(__file__).resolve().parent.parent
STEPS, WARM = 16, 6


def training_steps(smoke: bool) -> Iterator[dict[str, Any]]:
    """800m.toml and its n_h = 1 partner with and without compilation and checkpointing: tokens/s, MFU and memory."""
    configs = ("debug.toml",) if smoke else ("800m.toml", "800m_nh1.toml")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text.txt").write_text("It was a dark and stormy night. " * 300_000)
        prepare = ["prepare", str(folder / "text.txt"), "--out", str(folder / "tokens"), "--validation-fraction", "0"]
        subprocess.run([sys.executable, "-m", "titan_dp.cli", *prepare], check=True, cwd=ROOT, capture_output=True)
        for compiled in (False,) if smoke else (True, False):
            for checkpointing in ("none",) if smoke else ("none", "selective", "full"):
                for config in configs:
                    yield run(config, folder, compiled, checkpointing, smoke)


def run(config: str, folder: Path, compiled: bool, checkpointing: str, smoke: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"config": config, "compile": compiled, "checkpointing": checkpointing}
    name = f"{config}-{compiled}-{checkpointing}"
    settings = {
        "data.path": folder / "tokens/train", "job.dump_folder": folder, "job.run_name": name, "metrics.log_freq": 1,
        "training.steps": 3 if smoke else STEPS, "training.global_batch_size": 2 if smoke else 8,
        "training.local_batch_size": 2 if smoke else 8, "compile.enable": str(compiled).lower(),
        "activation_checkpoint.mode": checkpointing, "checkpoint.enable": "false", "validation.enable": "false",
        "generate.enable": "false", "metrics.enable_tensorboard": "false",
    }  # fmt: skip
    flags = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
    command = [sys.executable, "train.py", "--config", config, *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    nothing = dict.fromkeys(("tokens/s", "MFU", "memory (GiB)"), float("nan"))
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        return row | nothing | {"fault": lines[-1][:120] if lines else f"exit code {done.returncode}"}
    records = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    steady = [record for record in records if "tokens_per_second" in record][0 if smoke else WARM :]
    figures = {
        "tokens/s": statistics.median(record["tokens_per_second"] for record in steady),
        "MFU": statistics.median(record.get("mfu") or float("nan") for record in steady),
        "memory (GiB)": max(record["memory_gib"] for record in steady),
    }
    return row | figures | {"fault": ""}
