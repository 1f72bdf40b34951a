"""Signals at moments that tests/faults, which strikes in steps, does not reach: in a validation, while processes start."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.distributed.harness import run_ranks
from tests.processes import SERVER
from titan_dp.distributed import end_with_launcher
from titan_dp.errors import LAUNCHER_PID

SETTINGS = [
    *("--training.steps", "6", "--training.seq_len", "16"),
    *("--training.local_batch_size", "2", "--training.global_batch_size", "4"),
    *("--validation.freq", "3", "--checkpoint.interval", "100", "--generate.enable=false"),
]


class Struck:
    """Held-out batches; while rank 1 reads the second, it gets a SIGTERM."""

    def __init__(self, held_out: Any) -> None:
        self.held_out = held_out

    def __iter__(self) -> Iterator[Any]:
        for number, batch in enumerate(self.held_out):
            if number == 1 and dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    def __len__(self) -> int:
        return len(self.held_out)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.held_out, name)


def train(config: Path, name: str, struck: bool) -> str:
    """Train to the end, or to the signal; returns what is said then."""
    from titan_dp.config.load import load_config
    from titan_dp.distributed import current_world
    from titan_dp.errors import StoppedError
    from titan_dp.train.trainer import Trainer

    trainer = Trainer(load_config(["--config", str(config), *SETTINGS, "--job.run_name", name]), current_world())
    if struck:
        trainer.task.held_out = Struck(trainer.task.held_out)  # type: ignore[misc, assignment]
    try:
        trainer.train()
    except StoppedError as stopped:
        return str(stopped)
    return "finished"


def validations(config: Path, name: str) -> dict[int, float]:
    records = map(json.loads, (config.parent / "outputs" / name / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["validation_loss"] for record in records if "validation_loss" in record}


def test_a_signal_breaks_a_validation_off_and_the_run_that_resumes_does_it(tiny_config: Path) -> None:
    assert run_ranks(2, train, tiny_config, "undisturbed", False) == ["finished", "finished"]
    said = run_ranks(2, train, tiny_config, "struck", True)
    assert said == ["stopped by SIGTERM after step 3; saved; the same command resumes"] * 2
    assert validations(tiny_config, "struck") == {}
    assert run_ranks(2, train, tiny_config, "struck", False) == ["finished", "finished"]
    assert validations(tiny_config, "struck") == validations(tiny_config, "undisturbed")


def die_beside_a_rank(pipe: Connection) -> None:
    """A launcher that is killed while its rank starts."""
    os.environ[LAUNCHER_PID] = str(os.getpid())
    if os.fork() == 0:
        while os.getppid() == int(os.environ[LAUNCHER_PID]):
            time.sleep(0.01)
        end_with_launcher()
        pipe.send("still here")
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_rank_whose_launcher_has_died_already_ends() -> None:
    ours, theirs = SERVER.Pipe()
    launcher = SERVER.Process(target=die_beside_a_rank, args=(theirs,))
    launcher.start()
    theirs.close()
    with pytest.raises(EOFError):  # the pipe is open until the rank has ended
        ours.recv()
    launcher.join()
    assert launcher.exitcode == -signal.SIGKILL
