"""How well `titan-dp estimate` knows the memory of a step: predicted against measured on CPU ranks, and its own speed.

    python benchmarks/estimate.py            prints the tables and writes benchmarks/results/estimate{,_time}.{md,json}
    python benchmarks/estimate.py fsdp muon  these cases only, nothing written
    python benchmarks/estimate.py --time     only how long estimates of 800m.toml take

Each case is a real run of the trainer over gloo, in processes started for it alone. Measured twice on rank 0, over the second
step: what torch's CPU allocator held at most (its profiler reports every allocation), and the peak resident set of the
process over what it was before the trainer was built. The second contains all that no tensor shows: scratch space of
libraries, gloo's buffers, the heap's slack. A small run of the same kind goes before in each process, so that code and
libraries are loaded; the C library is told to give back freed memory.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import Report

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.distributed.allocator import most_held
from titan_dp.cli import dispatch
from titan_dp.config.load import PROJECT, load_config
from titan_dp.hardware import NETWORKS

MODEL = {
    "model.hidden_size": "768",
    "model.num_hidden_layers": "4",
    "model.num_heads": "6",
    "model.head_dim": "128",
    "model.num_householder": "1",
    "model.vocab_size": "16000",
    "training.seq_len": "512",
    "training.local_batch_size": "2",
    "training.global_batch_size": "-1",
    "data.document_boundaries": "carry",
}
SMALL = {"model.hidden_size": "96", "model.num_heads": "2", "model.head_dim": "16", "model.vocab_size": "512"}
BFLOAT16 = {"training.mixed_precision_param": "bfloat16"}
HYBRID = {"model.attention_layers": "[1, 3]", "model.attention_num_heads": "12"}
# name: (ranks, settings)
CASES: dict[str, tuple[int, dict[str, str]]] = {
    "one rank": (1, {}),
    "fsdp": (2, {}),
    "fsdp, 4 ranks": (4, {}),
    "hsdp 2 x 2": (4, {"parallelism.data_parallel_replicate_degree": "2"}),
    "bfloat16": (2, BFLOAT16),
    "full checkpointing": (2, {"activation_checkpoint.mode": "full"}),
    "selective op": (2, {"activation_checkpoint.mode": "selective"}),
    "selective op, bfloat16": (2, {"activation_checkpoint.mode": "selective", **BFLOAT16}),
    "every 2nd block": (2, {"activation_checkpoint.mode": "selective", "activation_checkpoint.selective_ac_option": "2"}),
    "accumulation 3": (2, {"training.global_batch_size": "12"}),
    "accumulation 3, bfloat16": (2, {"training.global_batch_size": "12", **BFLOAT16}),
    "muon": (2, {"optimizer.name": "Muon"}),
    "gated, n_h = 2": (2, {"model.num_householder": "2", "model.use_forget_gate": "true"}),
    "hybrid": (2, HYBRID),
    "hybrid, bfloat16": (2, {**HYBRID, **BFLOAT16}),
    "context parallelism": (2, {"parallelism.context_parallel_degree": "2", "training.local_batch_size": "4"}),
    "long rows": (1, {"training.seq_len": "4096", "training.local_batch_size": "1", "activation_checkpoint.mode": "selective"}),
}

LARGE = (
    "--activation_checkpoint.mode=selective",
    "--parallelism.data_parallel_replicate_degree=8",
    "--parallelism.context_parallel_degree=4",
)
"""Settings whose estimates of many ranks are timed."""


def arguments(settings: dict[str, str]) -> list[str]:
    defaults = {"training.mixed_precision_param": "float32", "training.steps": "4", **MODEL}
    off = [
        "--validation.enable=false",
        "--checkpoint.enable=false",
        "--generate.enable=false",
        "--metrics.enable_tensorboard=false",
    ]
    return ["--config", "debug.toml", *off, *(f"--{k}={v}" for k, v in {**defaults, **settings}.items())]


# -- one rank of a real run --------------------------------------------------------------------------------------------


def status(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"^{key}:\s+(\d+) kB", text, re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def give_back() -> None:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def work(settings: list[str], scratch: Path) -> None:
    """A rank: a small run, then the real one; rank 0 writes what it measured."""
    from titan_dp.distributed import distributed
    from titan_dp.train.trainer import Trainer

    def steps(argv: list[str], name: str) -> dict[str, Any]:
        loaded = load_config(
            [*argv, f"--job.run_name={name}", f"--job.dump_folder={scratch}", f"--data.path={scratch}/tokens/train"]
        )
        give_back()
        before = status("VmRSS")
        trainer = Trainer(loaded, world)
        steps_of_loader = iter(trainer.loader)

        def step() -> None:
            trainer._train_step(next(steps_of_loader))
            trainer.step += 1

        step()
        give_back()
        held = sum(storage_bytes(trainer))
        Path("/proc/self/clear_refs").write_text("5")
        step()
        resident = status("VmHWM") - before
        allocated = held + most_held(step, scratch / f"trace-{world.rank}.json")
        if trainer.lock is not None:
            trainer.lock.close()
        return {"resident": resident, "allocator": allocated}

    with distributed(load_config(settings).config.comm) as world:
        steps([*settings, *(f"--{k}={v}" for k, v in SMALL.items()), "--training.seq_len=64"], "small")
        result = steps(settings, "measured")
        if world.is_main:
            (scratch / "result.json").write_text(json.dumps(result))


def storage_bytes(trainer: Any) -> list[int]:
    """Of what lives between two steps: the shards and the optimizer's state."""
    from titan_dp.distributed import local_tensor

    tensors = [local_tensor(p.detach()) for p in trainer.model.parameters()]
    for optimizer in trainer.optimizers:
        tensors += [local_tensor(v) for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    return list({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def measured(ranks: int, settings: dict[str, str], scratch: Path) -> dict[str, int]:
    """Bytes of rank 0 of a real run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    env |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, __file__, "--rank", str(scratch), *arguments(settings)]
    processes = [
        subprocess.Popen(command, env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, cwd=PROJECT) for rank in range(ranks)
    ]
    assert [process.wait() for process in processes] == [0] * ranks
    return json.loads((scratch / "result.json").read_text())


def write_tokens(scratch: Path) -> None:
    (scratch / "text.txt").write_text("It was a dark and stormy night. " * 40_000)
    dispatch(["prepare", str(scratch / "text.txt"), "--out", str(scratch / "tokens"), "--validation-fraction", "0"])


# -- the table ---------------------------------------------------------------------------------------------------------


def predicted(ranks: int, settings: dict[str, str]) -> tuple[int, float]:
    """Bytes, and seconds it took."""
    from titan_dp.estimate.result import estimate

    start = time.perf_counter()
    found = estimate(load_config(arguments(settings)).config, ranks, None, NETWORKS["ib-400"], search=False)
    return found.tensors, time.perf_counter() - start


def time_commands() -> None:
    """Seconds of whole commands, the search for the largest batch included."""
    report = Report("estimate_time", "titan-dp estimate of 800m.toml as a command, Python's start and the search included")
    for settings in ("", *LARGE):
        command = [sys.executable, "-m", "titan_dp.cli", "estimate", "--config", "800m.toml", "--nproc", "1024", "--json"]
        start, before = time.perf_counter(), os.times()
        found = json.loads(subprocess.run([*command, *settings.split()], cwd=PROJECT, check=True, capture_output=True).stdout)
        seconds, after = time.perf_counter() - start, os.times()
        used = after.children_user + after.children_system - before.children_user - before.children_system
        row = {"ranks": 1024, "settings": settings or "as they are", "seconds": seconds, "seconds of a core": used}
        report.add(row | {"GiB a GPU": found["total"] / 2**30, "largest batch": found["largest_batch"]})
    report.write()


def main() -> None:
    if sys.argv[1:2] == ["--rank"]:
        work(sys.argv[3:], Path(sys.argv[2]))
        return
    if sys.argv[1:] == ["--time"]:
        time_commands()
        return
    chosen = sys.argv[1:] or list(CASES)
    report = Report("estimate", "Estimated and measured peak memory of a training step, CPU ranks over gloo, rank 0")
    with tempfile.TemporaryDirectory() as name:
        write_tokens(Path(name))
        for case in chosen:
            ranks, settings = CASES[case]
            estimate, seconds = predicted(ranks, settings)
            real = measured(ranks, settings, Path(name))
            report.add(
                {
                    "case": case,
                    "ranks": ranks,
                    "estimate MiB": estimate / 2**20,
                    "tensors MiB": real["allocator"] / 2**20,
                    "error %": (estimate / real["allocator"] - 1) * 100,
                    "resident MiB": real["resident"] / 2**20,
                    "error of resident %": (estimate / real["resident"] - 1) * 100,
                    "seconds": seconds,
                }
            )
    if not sys.argv[1:]:
        report.write()
        time_commands()


if __name__ == "__main__":
    main()
