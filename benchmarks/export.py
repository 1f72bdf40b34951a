"""Export of an 800m training checkpoint, optimizer state beside the weights: seconds and peak memory of the whole command.

    python benchmarks/export.py    prints the table and writes benchmarks/results/export.{md,json}

Needs 20 GB in the system's temporary folder and 4 GB of memory. Peak memory is the resident set the operating system reports
for the process, Python and torch included.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from common import Report

from titan_dp.checkpoint.dcp_files import Writer
from titan_dp.checkpoint.manifest import step_folder, write_manifest
from titan_dp.config.load import PROJECT, load_config
from titan_dp.model.transformer import build_model

FORMATS = (("fla", "float32"), ("fla", "bfloat16"), ("remote-code", "bfloat16"))


def save_checkpoint(run_folder: Path) -> int:
    """A checkpoint of 800m.toml with random weights and zero moments; returns the number of parameters."""
    loaded = load_config(["--config", "800m.toml"])
    model = build_model(loaded.config.model)
    model.init_weights(0)
    tensors: dict[str, torch.Tensor] = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"optimizer.state.{name}.{moment}"] = torch.zeros(parameter.shape)
    folder = step_folder(run_folder / "checkpoint", 1000)
    folder.mkdir(parents=True)
    writer = Writer(folder)
    dcp.save(tensors, storage_writer=writer, no_dist=True)
    meta = {"step": 1000, "tokens": 0, "config": loaded.resolved_toml(), "git_commit": "", "tokenizer": "bytes"}
    rest = {"healthy": True, "world_size": 1, "saved": "", "fingerprint": "", "global_batch_size": 1, "loader": {}}
    write_manifest(folder, {**meta, **rest}, writer.entries())
    return model.num_params()


def measured(*command: str) -> tuple[float, float]:
    """Seconds and peak resident GB of a command."""
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, f"{' '.join(command)} failed"
    return time.perf_counter() - start, usage.ru_maxrss * 1024 / 1e9


def main() -> None:
    report = Report("export", "Export of an 800m checkpoint to a Hugging Face folder")
    with tempfile.TemporaryDirectory() as scratch:
        # In a process of its own: a child's peak memory counts what its parent held when it was forked.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            parameters = pool.submit(save_checkpoint, Path(scratch) / "run").result()
        for target, dtype in FORMATS:
            out = Path(scratch) / f"{target}-{dtype}"
            options = ["--format", target, "--dtype", dtype]
            seconds, peak = measured(sys.executable, "-m", "titan_dp.cli", "export", f"{scratch}/run", str(out), *options)
            sizes = [file.stat().st_size / 1e9 for file in out.glob("*.safetensors")]
            report.add(
                {
                    "format": target,
                    "dtype": dtype,
                    "parameters": f"{parameters:,}",
                    "written GB": sum(sizes),
                    "largest file GB": max(sizes),
                    "seconds": seconds,
                    "peak memory GB": peak,
                    "peak / largest file": peak / max(sizes),
                }
            )
    report.write()


if __name__ == "__main__":
    main()
