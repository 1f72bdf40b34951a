"""`titan-dp estimate`: memory, communication, FLOPs, speed and the largest batch of a run, on a laptop, before a GPU is rented.

    titan-dp estimate --config 800m.toml --nproc 512 --training.global_batch_size 2048
    titan-dp estimate --config debug.toml --nproc 2 --gpu cpu --json

The numbers are result.py's; here are the options and the table. Settings are given as for train.py, whose `--dry-run` is the
same estimate for the device and the number of ranks that are here.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from titan_dp.config.arguments import above_zero, fraction, positive, take_settings
from titan_dp.config.load import Loaded, load_config
from titan_dp.config.mixers import MIXERS
from titan_dp.errors import UserError, counted
from titan_dp.files import short, si
from titan_dp.hardware import GPU, GPUS, NETWORKS, find_gpu, find_network, gpu_of
from titan_dp.output import number_table, print_next, print_pairs, print_table, print_text, progress

if TYPE_CHECKING:
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
    with progress("counting a step"):
        result = estimate(loaded.config, args.nproc, gpu, network, assumed, available=memory)
    if args.json:
        print(result.as_json())
        return 0
    title = f"{loaded.run_name}: estimate for {args.nproc:,} x {result.device}"
    _print(title, loaded, args.nproc, result.batch, result)
    _print_assumptions(result)
    return 0


def _print_assumptions(result: Estimate) -> None:
    for line in result.notes:
        print_text(f"note: {line}")
    if result.assumptions:
        print_text("The time and MFU are predicted, not measured, assuming that")
        for line in result.assumptions:
            print_text(f"  - {line}")


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
        with progress("counting a step"):
            result = estimate(c, ranks, _gpu_here(), NETWORKS["ib-400"], search=False)
    _print(f"{loaded.run_name}: dry run", loaded, ranks, batch, result)
    if result:
        _print_assumptions(result)
    for line in loaded.warnings():
        print_text(f"warning: {line}")
    if result and result.device == "cpu":
        print_next("on GPUs, with memory and speed", "titan-dp estimate --config ... --nproc 8 --gpu H100")


def _gpu_here() -> GPU | None:
    """The GPU a rank would have; None if there are only CPUs. What no data sheet of ours says of it is NaN."""
    import torch

    if not torch.cuda.is_available():
        return None
    here, unknown = torch.cuda.get_device_properties(0), math.nan
    known = gpu_of(here.name) or GPU(here.name, unknown, unknown, unknown, unknown, unknown, 0, 0)
    arch = here.major * 10 + here.minor
    return replace(known, memory=here.total_memory, arch=arch, processors=here.multi_processor_count)


def _print(title: str, loaded: Loaded, ranks: int, batch: BatchPlan, e: Estimate | None) -> None:
    """All that is known of a run before it is one; without an estimate, what follows from the settings alone."""
    from titan_dp.train.facts import planned

    facts = planned(loaded.config, batch, ranks)
    if e is None:
        facts["memory"] = f"not counted for {loaded.config.model.mixer}; titan-dp estimate does, in minutes"
        print_pairs(title, facts)
        return
    print_pairs(title, facts | {"recurrence": f"{e.backend} backend, on {e.device}"})
    _print_memory(e)
    _print_communication(e)
    print_pairs("computation", _computation(e))


def _print_memory(e: Estimate) -> None:
    size, unit = unit_of([e.tensors])
    rows = [[part, amount(bytes, size), ""] for part, bytes in e.memory.items()]
    rows.append(["tensors", amount(e.tensors, size), ""])
    if e.allowance:
        rows.append(["allowance", amount(e.allowance, size), "context, NCCL, workspaces, fragmentation: chosen, not counted"])
    if e.available:
        fits = "fits" if e.total <= e.available else "does NOT fit"
        rows.append(["in all", amount(e.total, size), f"{fits} in {amount(e.available, size)}"])
    columns = ("memory per rank", unit, f"at the peak, {e.peak_phase}")
    print_table(number_table("", columns, rows, left=(columns[0], columns[2])))
    if e.largest_batch is not None and e.available:
        most = f"the largest that fits is {e.largest_batch}" if e.largest_batch else "not even 1 fits"
        more = "" if e.total <= e.available else "; --activation_checkpoint.mode full, or more ranks, need less memory"
        if e.more_would_fit:
            on = f"global_batch_size {e.batch.global_batch_size:,} on {counted(e.ranks, 'rank')}"
            own = "" if e.largest_batch == e.batch.local_batch_size else f" is {e.largest_batch}"
            most, more = f"the largest that {on} allows{own}", "; memory has room for more"
        print_text(f"local batch {e.batch.local_batch_size}: {most}{more}", "")


def _print_communication(e: Estimate) -> None:
    if not any(row["sent"] for row in e.communication.values()):
        return
    size, unit = unit_of([row["sent"] for row in e.communication.values()])
    names = ("sent", "inside a node", "between nodes")
    rows = []
    for what, row in e.communication.items():
        rows.append([what, *(amount(row[name], size) for name in names), f"{int(row['calls']):,}"])
    columns = (f"sent per rank and step, {unit}", "in all", *names[1:], "calls")
    print_table(number_table("", columns, rows, left=columns[:1]))


def _computation(e: Estimate) -> dict[str, str]:
    found = {
        "model FLOPs": f"{si(e.model_flops, 'FLOPs')} per step of all ranks",
        "executed FLOPs": f"{si(e.executed_flops, 'FLOPs')} per step and rank (recomputation included)",
    }
    if e.speed is not None and e.mfu is not None:
        s, (times, unit) = e.speed, (1e3, "ms") if e.speed.step < 1 else (1, "s")
        step, compute, exposed, communication = (f"{x * times:.3g}" for x in (s.step, s.compute, s.exposed, s.communication))
        found["predicted step"] = f"{step} {unit} = {compute} computation + {exposed} of {communication} communication"
        found["predicted speed"] = f"{short(e.batch.tokens_per_step / s.step)} tokens/s, an MFU of {e.mfu:.1%}"
    return found


def unit_of(sizes: Iterable[float]) -> tuple[int, str]:
    """The one unit for a column of bytes: the largest in which the largest of them is at least 1."""
    largest = max(sizes, default=0)
    return next(((size, unit) for size, unit in ((2**30, "GiB"), (2**20, "MiB")) if largest >= size), (2**10, "KiB"))


def amount(bytes: float, size: int) -> str:
    """`bytes` in units of `size`, to the hundredth."""
    return f"{bytes / size:,.2f}" if bytes >= 0.005 * size or not bytes else "< 0.01"
