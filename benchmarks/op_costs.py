"""What every line of the chunked recurrence costs: FLOPs, and bytes in the cache and in memory, for a chunk of a head.

    python benchmarks/op_costs.py      prints the table and writes benchmarks/results/op_costs.{md,json}

Nothing is measured but the rate of one sgemm. FLOPs are those needed: pairs of a read and a row that it does not see are left
out. Bytes are of float32 operands, each once: a product of R x dk x dv reads both factors and writes (or adds to) its result.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

import torch
from common import Report
from deltaproduct_kernels.chunked import chunk_tokens
from deltaproduct_kernels.ops import products

SIZES = [(2, 32), (2, 64), (2, 128)]  # n_h, dk = dv


class Line(NamedTuple):
    line: str
    flops: float
    cache: int  # bytes of the workspace read and written
    memory: int = 0  # bytes of tensors read and written


def lines(C: int, n: int, dk: int, dv: int, *, backward: bool) -> list[Line]:
    """The lines of a pass over a chunk, gated and erasing, in the order of the equations in `chunked.py`."""
    R = C * n
    reads, pairs = C + R, R * (R - 1) / 2

    def passed(line: str, numbers: int, memory: int = 0, flops: int = 0) -> Line:
        return Line(line, flops, 4 * numbers, 4 * memory)

    inputs = C * dk + R * (dk + dv + 1) + C
    substitution = Line("(3) x, u by substitution", 2 * pairs * dv, 4 * (R * R // 2 + 3 * R * dv))
    found = [
        Line(p.equation, p.flops * p.share, 4 * (p.M * p.K + p.K * p.N + p.M * p.N))
        for p in products(C, n, dk, dv, erase=True, backward=backward)
    ]
    found += [
        passed("load q, k, v, beta, g", inputs, inputs),
        passed("K^T", 2 * R * dk),
        passed("(1) D and D o", 2 * C * R + 3 * reads * R, flops=C * R // 2 + reads * R // 2),
        passed("(3) v - e z", 3 * R * dv, flops=2 * R * dv),
        substitution,
    ]
    if not backward:
        found += [
            passed("(4) e z", 2 * C * dv, flops=C * dv),
            passed("(5) D_last o u", 2 * R * dv, flops=R * dv),
            passed("store o, S", C * dv + dk * dv, C * dv + dk * dv),
        ]
    else:
        found += [
            passed("load dO, S", C * dv + dk * dv, C * dv + dk * dv),
            passed("(6) D_last o", 2 * R * dv, flops=R * dv),
            Line("(7) w by substitution", 2 * pairs * dv, 4 * (R * R // 2 + 3 * R * dv)),
            passed("(8) w . x", 2 * R * dv, flops=2 * R * dv),
            passed("u^T, S^T, dS^T", 2 * R * dv + 4 * dk * dv),
            passed("(9) D o", 3 * reads * R, flops=reads * R // 2),
            passed("(10) e o", 2 * reads * dk, flops=reads * dk),
            passed("(11) D_last o u", 2 * R * dv, flops=R * dv),
            passed("(12) e o Y", 2 * reads * dk, flops=reads * dk),
            passed("(13) dg", 2 * (dk * dv + R * dv + reads * dk + reads * R // 2), flops=2 * (dk * dv + R * dv + reads * dk)),
            passed("store dq, dk, dv, dbeta, dg", inputs, inputs),
        ]
    return found


def needed_flops(n: int, dk: int, dv: int, tokens: int, *, backward: bool) -> float:
    """FLOPs that `tokens` tokens of a head need in whole chunks: products and substitution, without elementwise work."""
    C = chunk_tokens(n, dk)
    R = C * n
    substitution = R * (R - 1) * dv * (2 if backward else 1)
    needed = sum(p.flops * p.share for p in products(C, n, dk, dv, erase=True, backward=backward)) + substitution
    return needed * tokens / C


def workspace(C: int, n: int, dk: int, dv: int, *, backward: bool) -> int:
    """Bytes of a thread's workspace, but for the padding of rows."""
    R = C * n
    reads = C + R
    numbers = reads * (dk + R + dv) + dk * R + C * R + dk * dv + 2 * R * dv
    if backward:
        numbers += 2 * dk * dv + R * dv + reads * (dv + dk + R) + dv * R
    return 4 * numbers


def sgemm_rate(n: int = 512) -> float:
    """FLOP/s of the best of some sgemm on one thread, by the processor's time."""
    a, b = torch.randn(n, n), torch.randn(n, n)
    out, times = torch.empty(n, n), []
    for _ in range(30):
        start = time.process_time()
        torch.mm(a, b, out=out)
        times.append(time.process_time() - start)
    return 2 * n**3 / min(times)


def main() -> None:
    torch.set_num_threads(1)
    caches = {
        f"L{level}": Path(f"/sys/devices/system/cpu/cpu0/cache/index{level if level > 1 else 0}/size") for level in (1, 2)
    }
    sizes = ", ".join(f"{name} {path.read_text().strip() if path.exists() else 'unknown'}" for name, path in caches.items())
    rate = sgemm_rate()
    report = Report(
        "op_costs",
        f"Cost of each line of the chunked recurrence, a chunk of a head ({sizes}; one sgemm {rate / 1e9:.0f} GFLOP/s)",
    )
    for n, d in SIZES:
        C = chunk_tokens(n, d)
        for backward in (False, True):
            found = lines(C, n, d, d, backward=backward)
            where = {"n_h": n, "d": d, "tokens": C, "pass": "backward" if backward else "forward"}
            total = Line("all lines", *(sum(column) for column in list(zip(*found, strict=True))[1:]))  # type: ignore[arg-type]
            for x in (*found, total):
                report.add({
                    **where,
                    "line": x.line,
                    "kFLOP": x.flops / 1e3,
                    "KB in the cache": x.cache / 1024,
                    "KB of memory": x.memory / 1024,
                    "us at sgemm's rate": x.flops / rate * 1e6,
                    "workspace KB": workspace(C, n, d, d, backward=backward) / 1024 if x is total else "",
                })  # fmt: skip
    report.write()


if __name__ == "__main__":
    main()
