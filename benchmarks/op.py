"""The recurrence on this device: chunked against the definition, forward and forward + backward.

    python benchmarks/op.py            prints the table and writes benchmarks/results/op.{md,json}

Both run in one process on the same inputs; the ratio is what counts, the times depend on the machine.
"""

from __future__ import annotations

from functools import partial

import torch
from common import Report, median_seconds
from deltaproduct_kernels import gated_delta_product

CASES = [(1, 256), (2, 256), (1, 2048), (2, 2048), (3, 2048)]  # n_h, T
B, H, D = 1, 4, 64


def main() -> None:
    report = Report(
        "op", f"Recurrence, chunked (torch) against the definition (recurrent): B={B}, H={H}, dk=dv={D}, gated, float32"
    )
    for n, T in CASES:
        q, k, v = torch.randn(B, T, H, D), torch.randn(B, T, n, H, D), torch.randn(B, T, n, H, D)
        k = torch.nn.functional.normalize(k, dim=-1)
        beta, g = 2 * torch.rand(B, T, n, H), -torch.rand(B, T, H)
        inputs = [x.requires_grad_() for x in (q, k, v, beta, g)]

        def forward(backend: str, inputs: list[torch.Tensor] = inputs) -> None:
            with torch.no_grad():
                gated_delta_product(*inputs, backend=backend)

        def both(backend: str, inputs: list[torch.Tensor] = inputs) -> None:
            gated_delta_product(*inputs, backend=backend)[0].sum().backward()

        row: dict[str, object] = {"n_h": n, "T": T}
        for name, function in (("forward", forward), ("forward+backward", both)):
            chunked = median_seconds(partial(function, "torch"), repeats=9)
            recurrent = median_seconds(partial(function, "recurrent"), repeats=3)
            row |= {
                f"{name} chunked ms": chunked * 1e3,
                f"{name} recurrent ms": recurrent * 1e3,
                f"{name} ratio": recurrent / chunked,
            }
        report.add(row)
    report.write()


if __name__ == "__main__":
    main()
