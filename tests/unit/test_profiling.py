"""Traces by configuration, and nothing without it."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from titan_dp import config
from titan_dp.faults.profiling import Profiler


def run(folder: Path, steps: int = 0, **settings: object) -> None:
    with Profiler(config.Profiling(**settings), folder, rank=0, steps=steps) as profiler:  # type: ignore[arg-type]
        for _ in range(12):
            torch.ones(8) @ torch.ones(8)
            profiler.step()


def test_a_trace_is_written_every_profile_freq_steps(tmp_path: Path) -> None:
    for steps in (0, 12):  # resumed
        run(tmp_path, steps, enable_profiling=True, profile_freq=5, profiler_warmup=1, profiler_active=1)
    names = sorted(p.name for p in (tmp_path / "profile").iterdir())
    assert names == [f"step-{step}-rank-0.json" for step in (10, 17, 22, 5)]
    events = json.loads((tmp_path / "profile/step-5-rank-0.json").read_text())["traceEvents"]
    assert any(event.get("name") == "aten::dot" for event in events)


def test_nothing_is_written_when_profiling_is_off(tmp_path: Path) -> None:
    run(tmp_path)
    assert list(tmp_path.iterdir()) == []
