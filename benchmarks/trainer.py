"""What the trainer costs around forward, backward, clipping and optimizer: the rest of a step, measured inside one run.

    python benchmarks/trainer.py       prints the table and writes benchmarks/results/trainer.{md,json}

One process, debug.toml's model, made-up text, a log line every five steps. The phases are timed where the step takes them
(`train_step`'s own hook), so the noise of the machine is in both sides: a bare loop timed before or after differed by 20 %
either way.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common import Report

from titan_dp.cli import dispatch
from titan_dp.config.load import load_config
from titan_dp.distributed import current_world, distributed
from titan_dp.train.run_folder import read_records
from titan_dp.train.step import PhaseName
from titan_dp.train.trainer import Trainer

STEPS, LOG = 60, 5


class TimedTrainer(Trainer):
    """Adds up the seconds of forward, backward, clipping and update."""

    seconds = 0.0

    @contextmanager
    def _phase(self, name: PhaseName, micro: int) -> Iterator[None]:
        start = time.perf_counter()
        with super()._phase(name, micro):
            yield
        if name != "loss":  # which is inside the forward pass
            self.seconds += time.perf_counter() - start


def main() -> None:
    report = Report("trainer", "Trainer: the part of a step that is not forward, backward, clipping or optimizer, one process")
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
            trainer = TimedTrainer(loaded, current_world())
            start = time.perf_counter()
            trainer.train()
            total = time.perf_counter() - start
        inside = trainer.seconds
        records = read_records(folder / "debug")
    step = statistics.median(r["step_seconds"] for r in records)
    waits = statistics.median(r["data_wait"] for r in records)
    row = {"ms a step": step * 1e3, "ms around the model": (total - inside) / STEPS * 1e3}
    report.add(row | {"overhead %": (1 - inside / total) * 100, "of it data wait %": waits * 100})
    report.write()


if __name__ == "__main__":
    main()
