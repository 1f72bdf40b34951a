"""Time block sizes, warps and stages of each kernel on this GPU and print lines for triton_backend/configs.py.

    python benchmarks/tune.py                          dk = dv = 64 and 128, n 1 to 4, bf16
    python benchmarks/tune.py --dk 256 --dv 128 --n 2 --bits 32

Candidates that spill, or do not fit the chip, lose by themselves: they are timed too, or fail to launch and are skipped. Each
candidate's results are compared with the table's, so a line is never printed for a kernel that computes something else.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from typing import Any

import torch
from deltaproduct_kernels.triton_backend import configs, launch
from deltaproduct_kernels.triton_backend.configs import Config
from gpu import Timed
from gpu_check import error, make

REPEATS = 15
WIDTHS = ("<12", *(f">{w}" for w in (4, 4, 4, 4, 3, 4, 8, 7, 5, 6)))  # of the table's columns
BLOCKS = {
    "solve": [(bk, 0) for bk in (32, 64, 128)],
    "states": [(0, bv) for bv in (16, 32, 64, 128)],
    "states_again": [(0, bv) for bv in (16, 32, 64, 128)],
    "adjoint": [(0, bv) for bv in (16, 32, 64, 128)],
    "gradients": [(bk, bv) for bk in (32, 64, 128) for bv in (16, 32, 64, 128)],
}


def candidates(kernel: str, dk: int, dv: int) -> list[Config]:
    fitting = [(bk, bv) for bk, bv in BLOCKS[kernel] if bk <= configs.padded(dk) and bv <= configs.padded(dv)]
    return [Config(*blocks, warps, stages) for blocks in fitting for warps in (4, 8) for stages in (1, 2, 3)]


def step(x: dict[str, Any], bits: int, run: launch.Runner) -> list[torch.Tensor]:
    """Forward and backward; everything they compute."""
    q, k, v, beta = (x[name] for name in ("q", "k", "v", "beta"))
    g = x.get("g")
    o, final, saved = launch.forward(q, k, v, beta, g, None, None, 1.0, True, True, bits, run=run)
    grads: Any = launch.backward(v[:, :, 0], None, q, k, v, beta, g, saved, None, 1.0, True, bits, run=run)
    return [o, final, *grads]


def tune(kernel: str, dk: int, dv: int, n: int, bits: int, gated: bool) -> tuple[Config, float, float]:
    """The fastest candidate, its milliseconds and the table's."""
    dtype = torch.float32 if bits == 32 else torch.bfloat16
    x = make(8, 4096, 16, n, dk, dv, dtype=dtype, gate=0.05 if gated else None)
    default = launch.runner(x["k"].device)
    current = configs.config(kernel, dk=dk, dv=dv, n=n, bits=bits, arch=default.arch, gated=gated)
    expected = step(x, bits, default)
    times: dict[Config, float] = {}
    original = configs.config
    for candidate in dict.fromkeys([current, *candidates(kernel, dk, dv)]):
        configs.config = lambda name, c=candidate, **key: c if name == kernel else original(name, **key)  # type: ignore[misc, assignment]
        try:
            got = step(x, bits, default)
            if not all(error(a, b.double()) < 0.01 for a, b in zip(got, expected, strict=True)):
                print(f"# {kernel} {tuple(candidate)} computes something else", file=sys.stderr)
                continue
            timed = Timed(default.arch, default.processors)
            for _ in range(REPEATS):
                step(x, bits, timed)
            times[candidate] = timed.medians()[kernel]
        except Exception as e:  # out of resources, mostly
            print(f"# {kernel} {tuple(candidate)}: {type(e).__name__}", file=sys.stderr)
        finally:
            configs.config = original
    best = min(times, key=times.__getitem__)
    return best, times[best], times[current]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dk", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--dv", type=int, nargs="+", help="default: as dk, pair by pair")
    parser.add_argument("--n", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--bits", type=int, choices=(16, 32), default=16)
    parser.add_argument("--kernel", nargs="+", choices=tuple(BLOCKS), default=list(BLOCKS))
    parser.add_argument("--ungated", action="store_true")
    a = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device here")
    arch = launch.runner(torch.device("cuda")).arch
    sizes = list(zip(a.dk, a.dv or a.dk, strict=True))
    print("kernel       bits arch   dk   dv   n gate  block_k block_v warps stages   # ms, and the table's")
    for kernel, (dk, dv), n in itertools.product(a.kernel, sizes, a.n):
        best, ms, before = tune(kernel, dk, dv, n, a.bits, not a.ungated)
        key = (kernel, a.bits, arch, configs.padded(dk), configs.padded(dv), n, "n" if a.ungated else "y")
        line = [f"{value:{width}}" for value, width in zip((*key, *best), WIDTHS, strict=True)]
        print(*line, f"  # {ms:.3f}, {before:.3f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
