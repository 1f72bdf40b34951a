"""`--dry-run`: what a run would be, in seconds, without data, GPUs or other ranks.

Parameters, FLOPs and tokens are exact. Memory is that of titan_dp/estimate/ for the device that is here; `titan-dp estimate`
says it for GPUs that are not, with communication and speed.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from rich.table import Table

from titan_dp import config
from titan_dp.config.load import Loaded
from titan_dp.distributed import World, data_world, rank_from_env, world_size_from_env
from titan_dp.hardware import GPU, NETWORKS, gpu_of
from titan_dp.output import print_table
from titan_dp.train.batch_plan import plan_batches
from titan_dp.train.facts import model_facts, run_facts


def print_plan(loaded: Loaded) -> None:
    """Print the summary on rank 0. Raises UserError for what would stop the run before its first step."""
    c = loaded.config
    world_size = world_size_from_env()
    batch = plan_batches(c.training, data_world(c.parallelism, World(0, world_size, torch.device("cpu"))).size)
    if rank_from_env() != 0:
        return
    table = Table(title=f"{loaded.run_name}: dry run", show_header=False)
    for name, value in {**model_facts(c.model, batch.seq_len), **run_facts(c, batch, world_size)}.items():
        table.add_row(name, value)
    table.add_section()
    for name, value in memory_facts(c, world_size).items():
        table.add_row(name, value)
    print_table(table)
    for line in loaded.warnings():
        print(f"warning: {line}")


def memory_facts(c: config.Config, world_size: int) -> dict[str, str]:
    """Bytes a rank, by part, on the device that is here; see titan_dp/estimate/, which counts them."""
    if c.model.mixer == "rwkv7":  # its loop over tokens, operator by operator, takes minutes
        return {"memory": "not counted for rwkv7; titan-dp estimate does, in minutes"}
    from titan_dp.estimate.command import memory_rows
    from titan_dp.estimate.result import estimate

    counted = estimate(c, world_size, _gpu_here(), NETWORKS["ib-400"], search=False)
    return {**memory_rows(counted, " a rank"), "recurrence backend": f"{counted.backend}, on {counted.device}"}


def _gpu_here() -> GPU | None:
    """The GPU a rank would have, from the table or as its driver describes it; None where there are only CPUs."""
    if not torch.cuda.is_available():
        return None
    here = torch.cuda.get_device_properties(0)
    return replace(
        gpu_of(here.name)
        or GPU(here.name, tflops=1.0, float32_tflops=1.0, bandwidth=1.0, memory=0.0, link=1.0, arch=0, processors=0),
        memory=here.total_memory,
        arch=here.major * 10 + here.minor,
        processors=here.multi_processor_count,
    )
