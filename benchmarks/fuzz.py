"""The long form of tests/fuzz: 100,000 cases over all readers of files that may come from somewhere else.

A case is taken or refused in one message; anything else ends the script with the smallest case that shows it, and no result
is written. Other cases every time than those of the tests, which are always the same.

    python benchmarks/fuzz.py [CASES]
"""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from common import Report

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.fuzz.harness import Counts, fuzz
from tests.fuzz.targets import TARGETS

_SEED = 20_000
_PROCESSES = os.cpu_count() or 1


def one(name: str, cases: int) -> tuple[Counts, float]:
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        counts = fuzz(TARGETS[name], Path(folder), cases, seeds=itertools.count(_SEED))
    return counts, time.process_time() - started


def main(cases: int) -> None:
    shares = {name: target.share for name, target in TARGETS.items()}
    wanted = {name: -(-cases * share // sum(shares.values())) for name, share in shares.items()}
    report = Report("fuzz", f"Fuzzing: {cases:,} cases, each taken or refused in one message, no other outcome")
    total, seconds = Counts(), 0.0
    with ProcessPoolExecutor(_PROCESSES) as pool:
        for name, (counts, took) in zip(wanted, pool.map(one, wanted, wanted.values()), strict=True):
            report.add(_row(name, counts, took))
            total = Counts(total.accepted + counts.accepted, total.refused + counts.refused, max(total.slowest, counts.slowest))
            seconds += took
    report.add(_row("all", total, seconds))
    report.write()


def _row(name: str, counts: Counts, seconds: float) -> dict[str, object]:
    return {
        "reader": name,
        "cases": counts.cases,
        "taken": counts.accepted,
        "refused": counts.refused,
        "slowest case (ms)": counts.slowest * 1e3,
        "CPU seconds": seconds,
    }


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000)
