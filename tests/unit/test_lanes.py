"""Benchmark cases in processes of their own: what ends one of them does not end the others."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent

WORKER = """
import os, sys, time
sys.path.insert(0, {benchmarks!r})
from lanes import work
lost = False
def run(number):
    global lost
    if lost:
        raise AssertionError("another case ran in a process that was lost")
    if number == 1:
        raise ValueError("of this case")
    if number == 2:
        os._exit(7)
    if number == 3:
        lost = True
        raise RuntimeError("CUDA error")
    if number == 4:
        time.sleep(600)
    return {{"square": number**2}}
work(run, list(map(int, sys.argv[1:])), lambda: lost)
"""


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from lanes import run_cases

    (tmp_path / "worker.py").write_text(WORKER.format(benchmarks=str(ROOT / "benchmarks")))

    def run(numbers: list[int], **options: float) -> dict[int, dict]:
        got: dict[int, dict] = {}
        settings: dict = {"lanes": 2, "patience": 300, **options}
        run_cases([sys.executable, str(tmp_path / "worker.py")], numbers, got.__setitem__, **settings)
        return got

    return run


def test_an_exception_a_death_and_a_lost_process_are_rows_with_a_fault_and_the_rest_is_measured(rows) -> None:  # type: ignore[no-untyped-def]
    assert rows([0, 1, 2, 3, 5, 6, 7]) == {
        0: {"square": 0},
        1: {"fault": "ValueError: of this case"},
        2: {"fault": "the process ended with 7"},
        3: {"fault": "RuntimeError: CUDA error"},
        5: {"square": 25},
        6: {"square": 36},
        7: {"square": 49},
    }


def test_a_case_that_is_silent_for_too_long_is_ended(rows) -> None:  # type: ignore[no-untyped-def]
    assert rows([4], lanes=1, patience=1) == {4: {"fault": "no result in 1 s"}}


def test_when_the_time_is_over_what_was_measured_stays_and_nothing_else_begins(rows) -> None:  # type: ignore[no-untyped-def]
    assert rows([0, 5], lanes=1, seconds=0) == {}
