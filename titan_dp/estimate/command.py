"""`titan-dp estimate`: memory, communication, FLOPs, speed and the largest batch of a run, on a laptop, before a GPU is rented.

    titan-dp estimate --config 800m.toml --nproc 512 --training.global_batch_size 2048
    titan-dp estimate --config debug.toml --nproc 2 --gpu cpu --json

The numbers are result.py's; here are the options and the table. Settings are given as for train.py.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from titan_dp.config.arguments import above_zero, fraction, positive, take_settings
from titan_dp.config.load import load_config
from titan_dp.errors import UserError
from titan_dp.hardware import GPUS, NETWORKS, find_gpu, find_network
from titan_dp.output import print_table

if TYPE_CHECKING:
    from rich.table import Table

    from titan_dp.estimate.result import Estimate

_GIB = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="NAME", help="as for train.py")
    parser.add_argument("--nproc", type=positive, required=True, metavar="N", help="ranks of the run, one a GPU")
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
    print_table(_table(result, loaded.run_name))
    for line in result.notes:
        print(f"note: {line}")
    if result.assumptions:
        print("The time and MFU are predicted, not measured, assuming that")
        for line in result.assumptions:
            print(f"  - {line}")
    return 0


def gib(size: float) -> str:
    return f"{size / _GIB:.2f} GiB" if size >= 0.005 * _GIB else f"{size / 2**20:.2f} MiB"


def memory_rows(e: Estimate, whose: str = "") -> dict[str, str]:
    """The parts of a rank's memory, each with its bytes; also what the dry run shows, with `whose` behind the sums."""
    rows = {part: gib(size) for part, size in e.memory.items()}
    rows["tensors at the peak"] = f"{gib(e.tensors)}{whose}, {e.peak_phase}"
    if e.allowance:
        rows["allowance"] = f"{gib(e.allowance)} for context, NCCL, workspaces, fragmentation: chosen, not counted"
    if e.available:
        rows["in all"] = f"{gib(e.total)} of {gib(e.available)}: {'fits' if e.total <= e.available else 'does NOT fit'}"
    return rows


def _table(e: Estimate, name: str) -> Table:
    from rich.table import Table

    table = Table(title=f"{name}: estimate for {e.ranks:,} x {e.device}", show_header=False)
    b = e.batch
    table.add_row(
        "batch",
        f"{b.global_batch_size:,} sequences of {b.seq_len:,} = {b.tokens_per_step:,} tokens a step; {b.local_batch_size} a "
        f"micro-batch, accumulation {b.accumulation}",
    )
    table.add_row("recurrence", f"{e.backend} backend")
    table.add_section()
    for part, text in memory_rows(e).items():
        table.add_row(part, text)
    if e.largest_batch is not None:
        table.add_row("largest local batch", str(e.largest_batch) if e.largest_batch else "not even one sequence fits")
    table.add_section()
    for purpose, row in e.communication.items():
        where = f"{gib(row['inside a node'])} inside a node, {gib(row['between nodes'])} between nodes"
        table.add_row(purpose, f"{gib(row['sent'])} sent a step in {int(row['calls']):,} calls: {where}")
    table.add_section()
    table.add_row("model FLOPs", f"{e.flops_per_token / 1e9:.4g} G a token, {e.model_flops / 1e12:,.4g} T a step of all ranks")
    table.add_row("executed FLOPs", f"{e.executed_flops / 1e12:,.4g} T a step and rank (recomputation included)")
    if e.speed is not None and e.mfu is not None:
        s = e.speed
        parts = f"{s.compute:.3g} compute + {s.exposed:.3g} of {s.communication:.3g} communication"
        table.add_row("predicted step time", f"{s.step:.3g} s = {parts}")
        table.add_row("predicted MFU", f"{e.mfu:.1%}, {e.batch.tokens_per_step / s.step:,.0f} tokens/s")
    return table
