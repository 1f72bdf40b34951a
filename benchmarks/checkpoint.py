"""How long a save keeps training waiting: blocking against asynchronous, one process, model and AdamW state.

    python benchmarks/checkpoint.py    prints the table and writes benchmarks/results/checkpoint.{md,json}

A blocking save writes, hashes and commits before it returns. An asynchronous one returns at once; a step's forward and
backward pass then run beside the copy, and the update waits for it: the stall is both waits, the pass itself not counted
(it shares the processor with the copy and the writing; how much longer it takes is a column of its own). Saves without
checksums alternate with the others: the same writer of torch's without our hashing. Written to the system's temporary folder.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from common import Report

from titan_dp import config
from titan_dp.checkpoint import saver as checkpointer_module
from titan_dp.checkpoint.manifest import verify
from titan_dp.checkpoint.saver import Checkpointer
from titan_dp.distributed import current_world, distributed
from titan_dp.model.parallelize import sharded_model
from titan_dp.train.optim import build_optimizer, clip_grad_norm

MODEL = config.Model(hidden_size=512, num_hidden_layers=12, num_heads=4, head_dim=128, vocab_size=16000)
META = {
    "config": "",
    "fingerprint": "",
    "global_batch_size": 1,
    "seed": 0,
    "tokens": 0,
    "tokenizer": "bytes",
    "loader": {"samples": 0},
}
REPEATS = 5


@contextmanager
def unhashed() -> Iterator[None]:
    """Saves without checksums: every file is listed with an empty one."""

    class Unhashed(dcp.FileSystemWriter):
        def entries(self) -> list[dict[str, Any]]:
            return [{"name": p.name, "bytes": p.stat().st_size, "xxh3_128": ""} for p in Path(self.path).iterdir()]

    ours, checkpointer_module.Writer = checkpointer_module.Writer, Unhashed  # type: ignore[misc, assignment]
    yield
    checkpointer_module.Writer = ours  # type: ignore[misc]


def main() -> None:
    report = Report("checkpoint", "Checkpoint: time training waits, blocking against asynchronous")
    with distributed(config.Comm()), tempfile.TemporaryDirectory() as folder:
        training = config.Training(steps=1, mixed_precision_param="float32")
        model = sharded_model(config.Config(model=MODEL, training=training), current_world())
        model.to_empty(device="cpu")
        model.init_weights(0)
        optimizers = build_optimizer(model, config.Optimizer())
        tokens = torch.randint(0, 16000, (1, 256))
        model(tokens, tokens).loss.backward()
        clip_grad_norm(model.parameters(), 1.0)
        optimizers.step(torch.zeros(()))
        optimizers.zero_grad()
        gib = 3 * 4 * model.num_params() / 2**30
        checkpointer = Checkpointer(config.Checkpoint(keep_latest_k=2), Path(folder))
        seconds: dict[str, list[float]] = {}

        def timed(name: str, action: Callable[[], object]) -> None:
            start = time.perf_counter()
            action()
            seconds.setdefault(name, []).append(time.perf_counter() - start)

        def save(step: int, blocking: bool) -> None:
            checkpointer.save(step, model, optimizers, meta=META, healthy=True, blocking=blocking)

        def forward_backward() -> None:
            model(tokens, tokens).loss.backward()
            optimizers.zero_grad()

        for i in range(1, REPEATS + 2):
            timed("blocking", partial(save, 4 * i, True))
            with unhashed():
                timed("unhashed", partial(save, 4 * i + 1, True))
            timed("pass alone", forward_backward)
            timed("returned", partial(save, 4 * i + 2, False))
            timed("pass", forward_backward)
            timed("copied", checkpointer.wait_until_copied)
            timed("written", checkpointer.wait)
            timed("verified", lambda: verify(checkpointer.newest()))
        middle = {name: statistics.median(values[1:]) for name, values in seconds.items()}  # the first of each warms up
        hashing = [1 - b / a for a, b in zip(seconds["blocking"][1:], seconds["unhashed"][1:], strict=True)]
        stall = middle["returned"] + middle["copied"]
        report.add(
            {
                "parameters": f"{model.num_params():,}",
                "state GiB": gib,
                "blocking s": middle["blocking"],
                "of it checksums": f"{statistics.median(hashing):.1%} ({min(hashing):.1%} to {max(hashing):.1%})",
                "async stall s": stall,
                "stall / blocking": stall / middle["blocking"],
                "forward + backward s, alone": middle["pass alone"],
                "beside the save": middle["pass"],
                "verified before loading s": middle["verified"],
            }
        )
    report.write()


if __name__ == "__main__":
    main()
