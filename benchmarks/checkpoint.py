"""How long a save keeps training waiting: blocking against asynchronous, one process, model and AdamW state.

    python benchmarks/checkpoint.py    prints the table and writes benchmarks/results/checkpoint.{md,json}

A blocking save writes, hashes and commits before it returns; an asynchronous one returns once the state is copied. The last
column is what the next save would wait for if it came at once. Written to the system's temporary folder.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch
from common import Report

from titan_dp import config
from titan_dp.checkpointer import Checkpointer
from titan_dp.distributed import build_mesh, current_world, distributed
from titan_dp.model import build_model
from titan_dp.model.parallelize import parallelize
from titan_dp.optim import build_optimizer, clip_grad_norm

MODEL = config.Model(hidden_size=512, num_hidden_layers=12, num_heads=4, head_dim=128, vocab_size=16000)
META = {"config": "", "fingerprint": "", "global_batch_size": 1, "seed": 0, "tokens": 0}
REPEATS = 5


def main() -> None:
    report = Report("checkpoint", "Checkpoint: time training waits, blocking against asynchronous")
    with distributed(config.Comm()), tempfile.TemporaryDirectory() as folder:
        parallelism = config.Parallelism()
        with torch.device("meta"):
            model = build_model(MODEL)
        parallelize(
            model,
            build_mesh(parallelism, current_world()),
            training=config.Training(mixed_precision_param="float32"),
            parallelism=parallelism,
            activation_checkpoint=config.ActivationCheckpoint(),
            compile=config.Compile(),
        )
        model.to_empty(device="cpu")
        model.init_weights(0)
        optimizers = build_optimizer(model, config.Optimizer())
        tokens = torch.randint(0, 16000, (1, 16))
        model(tokens, tokens).backward()
        clip_grad_norm(model.parameters(), 1.0)
        optimizers.step(torch.zeros(()))
        optimizers.zero_grad()
        gib = 3 * 4 * model.num_params() / 2**30
        checkpointer = Checkpointer(config.Checkpoint(keep_latest_k=2), Path(folder))
        stalls: dict[bool, list[float]] = {True: [], False: []}
        rest = []
        for i in range(2 * (REPEATS + 1)):
            blocking = i % 2 == 0
            start = time.perf_counter()
            checkpointer.save(i + 1, model, optimizers, meta=META, healthy=True, blocking=blocking)
            stalls[blocking].append(time.perf_counter() - start)
            start = time.perf_counter()
            checkpointer.wait()
            if not blocking:
                rest.append(time.perf_counter() - start)
        blocked, stalled = (statistics.median(stalls[b][1:]) for b in (True, False))  # the first of each warms up
        report.add(
            {
                "parameters": f"{model.num_params():,}",
                "state GiB": gib,
                "blocking s": blocked,
                "async stall s": stalled,
                "stall / blocking": stalled / blocked,
                "async written after s": statistics.median(rest[1:]),
            }
        )
    report.write()


if __name__ == "__main__":
    main()
