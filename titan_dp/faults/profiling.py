"""Traces of a few steps and CUDA memory snapshots, by configuration; nothing is loaded or timed when they are off."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from titan_dp import config


class Profiler:
    """Context of the training loop; call `step` after each step.

    Every `profile_freq` steps it warms up, records `profiler_active` steps and writes a Chrome trace
    `profile/step-N-rank-R.json`, where N counts on from the `steps` done before; with snapshots, also the allocator's
    history, as at an out-of-memory error.
    """

    def __init__(self, c: config.Profiling, run_folder: Path, rank: int, steps: int = 0) -> None:
        self.folder, self.rank, self.steps = run_folder / "profile", rank, steps
        self.snapshots = c.enable_memory_snapshot and torch.cuda.is_available()
        self._profile: Any = None
        if c.enable_profiling:
            self.folder.mkdir(parents=True, exist_ok=True)
            wait = c.profile_freq - c.profiler_warmup - c.profiler_active
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profile = torch.profiler.profile(
                activities=activities,
                schedule=torch.profiler.schedule(wait=wait, warmup=c.profiler_warmup, active=c.profiler_active),
                on_trace_ready=self._write_trace,
            )

    def step(self) -> None:
        self.steps += 1
        if self._profile is not None:
            self._profile.step()

    def __enter__(self) -> Profiler:
        if self.snapshots:
            self.folder.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._record_memory_history(max_entries=100_000)
        if self._profile is not None:
            self._profile.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._profile is not None:
            self._profile.__exit__(kind, error, trace)
        if self.snapshots and isinstance(error, torch.cuda.OutOfMemoryError):
            self._write_snapshot("out-of-memory")

    def _write_trace(self, profile: Any) -> None:
        profile.export_chrome_trace(str(self.folder / f"step-{self.steps}-rank-{self.rank}.json"))
        if self.snapshots:
            self._write_snapshot(f"step-{self.steps}")

    def _write_snapshot(self, name: str) -> None:
        torch.cuda.memory._dump_snapshot(str(self.folder / f"{name}-rank-{self.rank}.pickle"))
