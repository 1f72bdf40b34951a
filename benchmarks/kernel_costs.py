"""Bytes and FLOPs a token and head of every Triton kernel, and the least time they need; counted, nothing is run.

    python benchmarks/kernel_costs.py      prints the table and writes benchmarks/results/kernel_costs.{md,json}

The counts are those of deltaproduct_kernels.triton_backend.cost, which tests compare with what interpreted kernels touch and
multiply. Times assume an H200 that copies 4.3 TB/s and multiplies 770 TFLOP/s in bf16; `benchmarks/gpu.py` measures both.
"""

from __future__ import annotations

from common import Report
from deltaproduct_kernels.triton_backend import cost
from deltaproduct_kernels.triton_backend.layout import Size

BANDWIDTH, FLOPS = 4.3e12, 770e12


def main() -> None:
    report = Report("kernel_costs", "Triton kernels by the byte model: a token and head, bf16, gated, T = 4032 of one row")
    for d in (128, 64):
        for n in (1, 2, 3, 4):
            T = 4032  # whole chunks for every n
            size = Size(1, T, n, 1, d, d)
            ideal = cost.ideal(size)
            for name, costs, least in (("forward", cost.forward(size), ideal[0]), ("backward", cost.backward(size), ideal[1])):
                for c in (*costs, cost.Cost("sum", sum(c.bytes for c in costs), sum(c.flops for c in costs))):
                    seconds = cost.roofline([c] if c.kernel != "sum" else costs, BANDWIDTH, FLOPS)
                    bound = "bytes" if c.bytes / BANDWIDTH > c.flops / FLOPS else "FLOPs"
                    row: dict[str, object] = {
                        "dk = dv": d,
                        "n": n,
                        "pass": name,
                        "kernel": c.kernel,
                        "bytes": round(c.bytes / T),
                    }
                    row |= {"kFLOP": round(c.flops / T / 1e3)}
                    row |= {"ns at the roofline": seconds / T * 1e9, "bound by": bound}
                    report.add(row | {"of the bytes no code avoids": c.bytes / least if c.kernel == "sum" else "-"})
            saved = {"kernel": "kept for the backward pass", "bytes": round(cost.saved(size) / T)}
            report.add({"dk = dv": d, "n": n, "pass": "-", **saved, **dict.fromkeys(list(report.rows[0])[5:], "-")})
    report.write()


if __name__ == "__main__":
    main()
