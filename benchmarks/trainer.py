"""What the trainer costs around forward, backward, clipping and optimizer: the rest of a step, measured inside one run.

    python benchmarks/trainer.py       prints the table and writes benchmarks/results/trainer.{md,json}

One process, debug.toml's model, made-up text, a log line every five steps. The four calls are timed where the trainer makes
them, so the noise of the machine is in both sides: a bare loop timed before or after differed by 20 % either way.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import Report

import titan_dp.train.trainer
from titan_dp.cli import dispatch
from titan_dp.config.load import load_config
from titan_dp.distributed import current_world, distributed
from titan_dp.train.run_folder import read_records

STEPS, LOG = 60, 5


class Stopwatch:
    """Seconds spent in the functions it wraps; stands in for an object whose calls are to be timed."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds += time.perf_counter() - start
            return result

        return timed


class TimedModel:
    def __init__(self, model: Any, watch: Stopwatch) -> None:
        self._model, self._call = model, watch.wrap(model)

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def main() -> None:
    report = Report("trainer", "Trainer: the part of a step that is not forward, backward, clipping or optimizer, one process")
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text.txt").write_text("It was a dark and stormy night. " * 40_000)
        out = ["--out", str(folder / "tokens"), "--validation-fraction", "0"]
        dispatch(["prepare", str(folder / "text.txt"), *out])
        settings = ["--data.path", str(folder / "tokens/train"), "--job.dump_folder", name, "--training.steps", str(STEPS)]
        off = [
            "--validation.enable=false",
            "--checkpoint.enable=false",
            "--generate.enable=false",
            "--metrics.log_freq",
            str(LOG),
        ]
        loaded = load_config(["--config", "debug.toml", *settings, *off])
        with distributed(loaded.config.comm):
            trainer = titan_dp.train.trainer.Trainer(loaded, current_world())
            trainer.model = TimedModel(trainer.model, watch)  # type: ignore[assignment]
            trainer.optimizers.step = watch.wrap(trainer.optimizers.step)  # type: ignore[method-assign]
            titan_dp.train.trainer.clip_grad_norm = watch.wrap(titan_dp.train.trainer.clip_grad_norm)  # type: ignore[attr-defined]
            torch.Tensor.backward = watch.wrap(torch.Tensor.backward)  # type: ignore[method-assign]
            start = time.perf_counter()
            trainer.train()
            total = time.perf_counter() - start
        records = read_records(folder / "debug")
    step = statistics.median(r["step_seconds"] for r in records)
    waits = statistics.median(r["data_wait"] for r in records)
    row = {"ms a step": step * 1e3, "ms around the model": (total - watch.seconds) / STEPS * 1e3}
    report.add(row | {"overhead %": (1 - watch.seconds / total) * 100, "of it data wait %": waits * 100})
    report.write()


if __name__ == "__main__":
    main()
