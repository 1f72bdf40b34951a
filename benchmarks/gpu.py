"""Everything about the kernels that needs a GPU: are they right, how fast, against whom. Results are kept as they come.

    python benchmarks/gpu.py                   all parts, one after another
    python benchmarks/gpu.py check op          some of: check, repeat, op, tune, front_end, norm, train
    python benchmarks/gpu.py --smoke           tiny sizes; also without a GPU (TRITON_INTERPRET=1)

check      every head size, n, dtype and option against the float64 recurrence, and twice for equal bits (about 4 minutes)
repeat     the shapes that are trained, 50 times: the same bits each time (1 minute)
op         forward and backward, a kernel at a time, against the roofline measured here and against flash-linear-attention
           if it can be imported (4 minutes, most of it the peer's autotuning)
tune       every block size, number of warps and of stages that compiles without a race, timed (6 minutes)
front_end  the fused kernels against the same code under torch.compile
norm       the gated output norm: torch.compile against eager, and the bandwidth it reaches
train      steps of 800m.toml and of its n_h = 1 partner (5 minutes)

Every row is written when it is measured, into benchmarks/results/gpu_*.md and .json or the folder that BENCHMARK_RESULTS
names; cases run in processes of their own (lanes.py), so a fault in one is a row and the rest goes on. `--seconds` ends a
part early. Times are medians after warm-up; errors are root mean squares over the reference's. Needs torch and triton (where
nothing is installed, PYTHONPATH=.:kernels), and titan_dp's own dependencies for the last part.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import gpu_check
import gpu_layers
import gpu_op
import gpu_train
import gpu_tune
from common import Report, machine
from gpu_check import DEVICE
from lanes import run_cases, work


@dataclass(frozen=True)
class Part:
    title: str
    cases: Callable[[bool], Sequence[Any]]
    """Everything to do; the argument is `smoke`. The same in every process."""
    run: Callable[[Any, bool], dict[str, Any]]
    """One case in, one row out."""
    side_by_side: bool = False
    """Whether cases may share the GPU: where nothing is timed."""
    patience: float = 240
    """Seconds in which a case must be done."""
    compiled: Callable[[Sequence[Any]], Sequence[Any]] | None = None
    """Launches to compile beforehand in all cores at once, each an argument of `gpu_tune.compile_launch`."""


PARTS = {
    "check": Part("The Triton kernels against the float64 recurrence", gpu_check.cases, gpu_check.check, side_by_side=True),
    "repeat": Part("The same inputs 50 times: the same bits", gpu_check.repeated, gpu_check.repeat, compiled=gpu_tune.launches),
    "op": Part(
        "The gated delta product on a GPU: ns a token and head", gpu_op.cases, gpu_op.time_op, compiled=gpu_tune.launches
    ),
    "tune": Part(
        "Block sizes, warps and stages of each kernel, ms", gpu_tune.cases, gpu_tune.tune, compiled=gpu_tune.candidate_launches
    ),
    "front_end": Part("Convolution, SiLU, unit length and gates: ms", gpu_layers.front_end_cases, gpu_layers.front_end),
    "norm": Part("The gated output norm: ms and the share of a copy's bandwidth", gpu_layers.norm_cases, gpu_layers.norm),
    "train": Part("A training step on one GPU", gpu_train.cases, gpu_train.train, patience=330),
}


def run_part(name: str, smoke: bool, seconds: float) -> bool:
    """All cases of a part into its report; whether no row has a fault."""
    part = PARTS[name]
    report = Report(f"gpu_{name}", part.title, live=True, command=f"python benchmarks/gpu.py {name}")
    cases = part.cases(smoke)
    start = time.monotonic()
    if part.compiled is not None and DEVICE == "cuda":
        with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
            list(pool.map(gpu_tune.compile_launch, part.compiled(cases)))
        print(f"{name}: compiled in {time.monotonic() - start:.0f} s", flush=True)
    command = [sys.executable, __file__, name, *["--smoke"] * smoke, "--cases"]

    def add(number: int, row: dict[str, Any]) -> None:
        case = getattr(cases[number], "name", None) or str(cases[number])
        report.add({"case": case, **row})

    lanes = min(os.cpu_count() or 1, len(cases)) if part.side_by_side and not smoke else 1
    left = seconds - (time.monotonic() - start)
    run_cases(command, range(len(cases)), add, lanes=lanes, patience=part.patience, seconds=left)
    faulty = [row for row in report.rows if row.get("fault")]
    for row in faulty:
        print("FAULT", row, flush=True)
    print(f"{name}: {len(report.rows)} cases, {len(faulty)} with a fault, {time.monotonic() - start:.0f} s", flush=True)
    return not faulty


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; default all")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes")
    parser.add_argument("--seconds", type=float, default=3600, help="after which a part starts no further case")
    parser.add_argument("--cases", type=int, nargs="+", help=argparse.SUPPRESS)  # a worker
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"unknown part {sorted(unknown)[0]!r}; choose from {', '.join(PARTS)}")
    if DEVICE == "cpu" and not arguments.smoke:
        parser.error("no CUDA device here; --smoke runs tiny sizes under TRITON_INTERPRET=1")
    if arguments.cases:
        [name] = arguments.parts
        cases = PARTS[name].cases(arguments.smoke)
        work(lambda i: PARTS[name].run(cases[i], arguments.smoke), arguments.cases, gpu_check.cuda_is_lost)
        return 0
    print(json.dumps(machine()), flush=True)
    good = [run_part(name, arguments.smoke, arguments.seconds) for name in arguments.parts or PARTS]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
