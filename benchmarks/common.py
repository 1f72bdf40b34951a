"""What every benchmark shares: medians, a table on the screen, and a Markdown and JSON file that say on what it was run."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch

from titan_dp.files import to_json

RESULTS = Path(__file__).parent / "results"


def median_seconds(function: Callable[[], object], repeats: int = 5, warmup: int = 1) -> float:
    """Median wall-clock seconds of `function` after `warmup` calls."""
    for _ in range(warmup):
        function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def machine() -> dict[str, object]:
    """What a figure depends on besides the code."""
    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor())
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cpu}, {os.cpu_count()} cores"
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


class Report:
    """Rows of one benchmark; `write` prints them and keeps them under benchmarks/results/."""

    def __init__(self, name: str, title: str) -> None:
        self.name, self.title, self.rows = name, title, list[dict[str, object]]()

    def add(self, row: dict[str, object]) -> None:
        self.rows.append(row)
        print("  ".join(f"{key} {_show(value)}" for key, value in row.items()), flush=True)

    def write(self) -> None:
        facts = machine()
        where = ", ".join(f"{key} {value}" for key, value in facts.items())
        keys = list(self.rows[0])
        lines = [f"# {self.title}", "", f"`python benchmarks/{self.name}.py` on {where}", ""]
        lines += ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
        lines += ["| " + " | ".join(_show(row[key]) for key in keys) + " |" for row in self.rows]
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{self.name}.md").write_text("\n".join(lines) + "\n")
        (RESULTS / f"{self.name}.json").write_text(
            to_json({"title": self.title, "machine": facts, "rows": self.rows}, indent=1) + "\n"
        )
        print(f"written to {RESULTS / self.name}.md and .json")


def _show(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
