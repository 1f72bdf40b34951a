"""`titan-dp estimate`: memory, communication, FLOPs, speed and the largest batch of a run, on a laptop, before a GPU is rented.

    titan-dp estimate --config 800m.toml --nproc 512 --training.global_batch_size 2048
    titan-dp estimate --config debug.toml --nproc 2 --gpu cpu --json

The numbers are result.py's; here are the options and the table. Settings are given as for train.py, whose `--dry-run` is the
same estimate for the device and the number of ranks that are here.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from typing import TYPE_CHECKING

from titan_dp.config.arguments import above_zero, fraction, positive, take_settings
from titan_dp.config.load import Loaded, load_config
from titan_dp.config.mixers import MIXERS
from titan_dp.errors import UserError
from titan_dp.hardware import GPU, GPUS, NETWORKS, find_gpu, find_network, gpu_of
from titan_dp.output import print_table

if TYPE_CHECKING:
    from rich.table import Table

    from titan_dp.estimate.result import Estimate
    from titan_dp.train.batch_plan import BatchPlan

_GIB = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="NAME", help="as for train.py")
    parser.add_argument("--nproc", type=positive, required=True, metavar="N", help="ranks of the run, one per GPU")
    parser.add_argument("--gpu", default="H200", metavar="NAME", help=f"cpu, {', '.join(GPUS)} (default: H200)")
    parser.add_argument("--network", default="ib-400", metavar="NAME", help=f"{', '.join(NETWORKS)} (default: ib-400)")
    parser.add_argument("--gpus-per-node", type=positive, default=8, metavar="N", help="default: 8")
    parser.add_argument("--gpu-memory", type=above_zero, metavar="GIB", help="memory of a device (default: its data sheet's)")
    parser.add_argument("--matmul-efficiency", type=fraction, default=0.6, help="of the peak, an assumption (default: 0.6)")
    parser.add_argument(
        "--bandwidth-efficiency", type=fraction, default=0.8, help="of the memory's, an assumption (default: 0.8)"
    )
    parser.add_argument("--link-efficiency", type=fraction, default=0.8, help="of the links', an assumption (default: 0.8)")
    parser.add_argument("--json", action="store_true", help="all numbers in bytes, seconds and FLOPs")
    take_settings(parser, "settings as for train.py (--activation_checkpoint.mode full)")


def run(args: argparse.Namespace) -> int:
    loaded = load_config(["--config", args.config, *args.settings])
    gpu = None if args.gpu.lower() == "cpu" else find_gpu(args.gpu)
    network = find_network(args.network)
    memory = None if args.gpu_memory is None else int(args.gpu_memory * _GIB)
    if args.nproc > 2**20:
        raise UserError(f"--nproc {args.nproc} is more ranks than can be imagined here; give at most {2**20}")

    from titan_dp.estimate.result import estimate
    from titan_dp.estimate.speed import Assumptions

    assumed = Assumptions(
        matmul=args.matmul_efficiency,
        bandwidth=args.bandwidth_efficiency,
        link=args.link_efficiency,
        gpus_per_node=args.gpus_per_node,
    )
    result = estimate(loaded.config, args.nproc, gpu, network, assumed, available=memory)
    if args.json:
        print(result.as_json())
        return 0
    title = f"{loaded.run_name}: estimate for {args.nproc:,} x {result.device}"
    print_table(_table(title, loaded, args.nproc, result.batch, result))
    _print_assumptions(result)
    return 0


def _print_assumptions(result: Estimate) -> None:
    for line in result.notes:
        print(f"note: {line}")
    if result.assumptions:
        print("The time and MFU are predicted, not measured, assuming that")
        for line in result.assumptions:
            print(f"  - {line}")


def dry_run(loaded: Loaded) -> None:
    """Print on rank 0 what a run would be here, without data or other ranks.

    Raises UserError for what would stop the run before its first step.
    """
    import torch

    from titan_dp.distributed import World, data_world, rank_from_env, world_size_from_env
    from titan_dp.estimate.result import estimate
    from titan_dp.train.batch_plan import plan_batches

    c, ranks = loaded.config, world_size_from_env()
    batch = plan_batches(c.training, data_world(c.parallelism, World(0, ranks, torch.device("cpu"))).size)
    if rank_from_env() != 0:
        return
    result = None
    if not MIXERS[c.model.mixer].is_loop:  # followed operator by operator, a loop over tokens takes minutes
        result = estimate(c, ranks, _gpu_here(), NETWORKS["ib-400"], search=False)
    print_table(_table(f"{loaded.run_name}: dry run", loaded, ranks, batch, result))
    if result:
        _print_assumptions(result)
    for line in loaded.warnings():
        print(f"warning: {line}")


def _gpu_here() -> GPU | None:
    """The GPU a rank would have; None if there are only CPUs. What no data sheet of ours says of it is NaN."""
    import torch

    if not torch.cuda.is_available():
        return None
    here, unknown = torch.cuda.get_device_properties(0), math.nan
    known = gpu_of(here.name) or GPU(here.name, unknown, unknown, unknown, unknown, unknown, 0, 0)
    arch = here.major * 10 + here.minor
    return replace(known, memory=here.total_memory, arch=arch, processors=here.multi_processor_count)


def gib(size: float) -> str:
    return f"{size / _GIB:.2f} GiB" if size >= 0.005 * _GIB else f"{size / 2**20:.2f} MiB"


def _table(title: str, loaded: Loaded, ranks: int, batch: BatchPlan, e: Estimate | None) -> Table:
    """All that is known of a run before it is one; without an estimate, what follows from the settings alone."""
    from rich.table import Table

    from titan_dp.train.facts import planned

    table = Table(title=title, show_header=False)
    for name, text in planned(loaded.config, batch, ranks).items():
        table.add_row(name, text)
    if e is None:
        table.add_row("memory", f"not counted for {loaded.config.model.mixer}; titan-dp estimate does, in minutes")
        return table
    table.add_row("recurrence", f"{e.backend} backend, on {e.device}")
    table.add_section()
    for part, size in e.memory.items():
        table.add_row(part, gib(size))
    table.add_row("tensors at the peak", f"{gib(e.tensors)} per rank, {e.peak_phase}")
    if e.allowance:
        table.add_row("allowance", f"{gib(e.allowance)} for context, NCCL, workspaces, fragmentation: chosen, not counted")
    if e.available:
        fits = "fits" if e.total <= e.available else "does NOT fit"
        table.add_row("in all", f"{gib(e.total)} of {gib(e.available)}: {fits}")
    if e.largest_batch is not None:
        table.add_row("largest local batch", str(e.largest_batch) if e.largest_batch else "not even one sequence fits")
    table.add_section()
    for purpose, row in e.communication.items():
        where = f"{gib(row['inside a node'])} inside a node, {gib(row['between nodes'])} between nodes"
        table.add_row(purpose, f"{gib(row['sent'])} sent per step in {int(row['calls']):,} calls: {where}")
    table.add_section()
    table.add_row("model FLOPs", f"{e.model_flops / 1e12:,.4g} T per step of all ranks")
    table.add_row("executed FLOPs", f"{e.executed_flops / 1e12:,.4g} T per step and rank (recomputation included)")
    if e.speed is not None and e.mfu is not None:
        s = e.speed
        parts = f"{s.compute:.3g} compute + {s.exposed:.3g} of {s.communication:.3g} communication"
        table.add_row("predicted step time", f"{s.step:.3g} s = {parts}")
        table.add_row("predicted MFU", f"{e.mfu:.1%}, {e.batch.tokens_per_step / s.step:,.0f} tokens/s")
    return table
