"""The recurrence on one thread of a CPU against its definition, transformers' fallback and a square sgemm of equal FLOPs.

    python benchmarks/op.py            prints the table and writes benchmarks/results/op.{md,json}

Forward and backward in float32, gated. All four take turns in one process on the same inputs. What is timed is the processor's
time of this process, which other processes on the machine disturb least; times are medians and ratios medians of the ratios of
neighbouring runs. transformers has no n_h: its gated delta rule takes n_h T tokens, of which the first of a token decays and
the last is read. FLOPs are those that the chunked algorithm needs (op_costs.py); sgemm is best
at 512 x 512 x 512, where everything fits the cache.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from common import Report
from deltaproduct_kernels import gated_delta_product
from op_costs import needed_flops
from torch import Tensor
from transformers.models.olmo_hybrid.modeling_olmo_hybrid import torch_chunk_gated_delta_rule

SIZES = [(4, 256, 4, 32), (1, 2048, 4, 64), (1, 2048, 4, 128)]  # B, T, H, dk = dv
STEPS = (1, 2, 3)
ROUNDS = 9

fallback = torch_chunk_gated_delta_rule.__wrapped__  # itself, where a library of kernels is installed too


def by_transformers(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Tensor:
    B, T, n, H, _ = k.shape
    query = torch.cat([q.new_zeros(B, T, n - 1, *q.shape[2:]), q[:, :, None]], 2)
    decay = torch.cat([g[:, :, None], g.new_zeros(B, T, n - 1, H)], 2)
    o, _ = fallback(*(x.flatten(1, 2) for x in (query, k, v, decay, beta)))
    return o.unflatten(1, (T, n))[:, :, -1]


def forward(x: list[Tensor], backend: str = "torch") -> Tensor:
    return gated_delta_product(*x, backend=backend)[0]


def both(x: list[Tensor], do: Tensor, backend: str = "torch") -> None:
    torch.autograd.grad(forward(x, backend), x, do)


def both_by_transformers(x: list[Tensor], do: Tensor) -> None:
    torch.autograd.grad(by_transformers(*x), x, do)


def seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def inputs(B: int, T: int, H: int, d: int, n: int) -> list[Tensor]:
    q, k, v = torch.randn(B, T, H, d), torch.randn(B, T, n, H, d), torch.randn(B, T, n, H, d)
    k = torch.nn.functional.normalize(k, dim=-1)
    return [x.requires_grad_() for x in (q, k, v, 2 * torch.rand(B, T, n, H), -0.1 * torch.rand(B, T, H))]


def main() -> None:
    torch.set_num_threads(1)
    report = Report("op", "Recurrence, forward and backward on one thread, float32, gated", live=True)
    for B, T, H, d in SIZES:
        for n in STEPS:
            x, do = inputs(B, T, H, d, n), torch.randn(B, T, H, d)
            torch.testing.assert_close(by_transformers(*x), forward(x), rtol=1e-3, atol=1e-3)
            flops = [needed_flops(n, d, d, B * H * T, backward=backward) for backward in (False, True)]
            size = round((sum(flops) / 2) ** (1 / 3))
            a, c = torch.randn(size, size), torch.empty(size, size)
            small, product = torch.randn(512, 512), torch.empty(512, 512)
            turns: dict[str, Callable[[], object]] = {
                "forward": partial(forward, x),
                "chunked": partial(both, x, do),
                "sgemm": partial(torch.mm, a, a, out=c),
                "best sgemm": partial(torch.mm, small, small, out=product),
                "transformers": partial(both_by_transformers, x, do),
            }
            runs = [{name: seconds(turn) for name, turn in turns.items()} for _ in range(ROUNDS + 1)][1:]
            definition = seconds(partial(both, x, do, "recurrent"))
            median = {name: statistics.median(run[name] for run in runs) for name in turns}
            rate, best = sum(flops) / median["chunked"], 2 * 512**3 / median["best sgemm"]
            report.add({
                "B": B, "T": T, "H": H, "d": d, "n_h": n,
                "forward ms": median["forward"] * 1e3,
                "both ms": median["chunked"] * 1e3,
                "transformers ms": median["transformers"] * 1e3,
                "definition ms": definition * 1e3,
                "sgemm ms": median["sgemm"] * 1e3,
                "times transformers": statistics.median(run["transformers"] / run["chunked"] for run in runs),
                "times the definition": definition / median["chunked"],
                "times sgemm": statistics.median(run["chunked"] / run["sgemm"] for run in runs),
                "GFLOP/s": rate / 1e9,
                "% of sgemm's best": 100 * rate / best,
            })  # fmt: skip
    report.write()


if __name__ == "__main__":
    main()
