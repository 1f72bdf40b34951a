"""What every benchmark shares: medians, a table on the screen, and a Markdown and JSON file that say on what it was run.

The files go to benchmarks/results/, or to the folder that the environment variable BENCHMARK_RESULTS names.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from titan_dp.files import to_json

RESULTS = Path(os.environ.get("BENCHMARK_RESULTS") or Path(__file__).parent / "results")


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
        "triton": _version("triton"),
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }


def proportional_set_size(root: int) -> int:
    """Bytes held by a process and all its descendants; pages they share are counted once."""
    total = 0
    for pid in (root, *descendants(root)):
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:  # gone meanwhile
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


def descendants(pid: int) -> list[int]:
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return children + [grandchild for child in children for grandchild in descendants(child)]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


class Report:
    """Rows of one benchmark; `write` keeps them in RESULTS. With `live` every new row is written at once.

    `command` is what a reader types to repeat it; by default the script named like the report.
    """

    def __init__(self, name: str, title: str, *, live: bool = False, command: str | None = None) -> None:
        self.name, self.title, self.live, self.rows = name, title, live, list[dict[str, object]]()
        self.command = command or f"python benchmarks/{name}.py"

    def add(self, row: dict[str, object]) -> None:
        self.rows.append(row)
        print("  ".join(f"{key} {_show(value)}" for key, value in row.items()), flush=True)
        if self.live:
            self._keep()

    def write(self) -> None:
        self._keep()
        print(f"written to {RESULTS / self.name}.md and .json")

    def _keep(self) -> None:
        facts = machine()
        where = ", ".join(f"{key} {value}" for key, value in facts.items())
        keys = list(dict.fromkeys(key for row in self.rows for key in row))
        lines = [f"# {self.title}", "", f"`{self.command}` on {where}", ""]
        lines += ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
        lines += ["| " + " | ".join(_show(row.get(key, "-")) for key in keys) + " |" for row in self.rows]
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"{self.name}.md").write_text("\n".join(lines) + "\n")
        (RESULTS / f"{self.name}.json").write_text(
            to_json({"title": self.title, "machine": facts, "rows": self.rows}, indent=1) + "\n"
        )


def _show(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
