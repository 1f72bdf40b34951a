"""Everything about the kernels that needs a GPU, in one command of minutes: is it right, how fast, against whom.

    python benchmarks/gpu.py                   all parts, into results/gpu_*.md and .json
    python benchmarks/gpu.py check op          some of: check, op, front_end, norm, train
    python benchmarks/gpu.py --smoke           tiny sizes and nothing written; also without a GPU (TRITON_INTERPRET=1)

check      every head size, n, dtype and option against the float64 recurrence, and twice for equal bits
op         forward and backward, a kernel at a time, against the roofline measured here and against flash-linear-attention
           if it can be imported
front_end  the fused kernels against the same code under torch.compile
norm       the gated output norm: torch.compile against eager, and the bandwidth it reaches
train      a step of 800m.toml and of its n_h = 1 partner, with and without compilation and checkpointing

Times are medians after warm-up. Errors are root mean squares over the reference's. Needs torch and triton (where nothing is
installed, PYTHONPATH=.:kernels), and titan_dp's own dependencies for the last part.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from common import Report, machine
from deltaproduct_kernels import front_end, gated_delta_product
from deltaproduct_kernels.triton_backend import cost, launch
from deltaproduct_kernels.triton_backend.layout import Size
from gpu_check import DEVICE, NAMES, check, check_offsets, error, make
from torch import Tensor

# -- how fast ---------------------------------------------------------------------------------------------------------


def milliseconds(function: Callable[[], object], smoke: bool) -> float:
    if DEVICE == "cpu":
        start = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - start)
    from triton.testing import do_bench

    return float(do_bench(function, warmup=25, rep=5 if smoke else 100, return_mode="median"))


@dataclass(frozen=True)
class Timed(launch.Runner):
    """Launches kernels and adds up what each takes, by events around it."""

    spent: dict[str, list[tuple[Any, Any]]] = field(default_factory=dict)

    def __call__(self, kernel: Any, grid: int, config: Any, **arguments: Any) -> None:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        super().__call__(kernel, grid, config, **arguments)
        after.record()
        again = "_again" if arguments.get("SAVE_ERRORS") else ""  # as the table calls the states kernel's second use
        self.spent.setdefault(kernel.__name__.removesuffix("_kernel") + again, []).append((before, after))

    def medians(self) -> dict[str, float]:
        """Milliseconds a launch."""
        torch.cuda.synchronize()
        times = {name: sorted(a.elapsed_time(b) for a, b in pairs) for name, pairs in self.spent.items()}
        return {name: values[len(values) // 2] for name, values in times.items()}


def roofline(smoke: bool) -> tuple[float, float]:
    """Bytes/s of a large copy (read plus written), and bf16 FLOP/s of a large product, on random data."""
    size = 2**20 if smoke else 2**30
    source = torch.randn(size, device=DEVICE, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    bandwidth = 4 * size / milliseconds(lambda: target.copy_(source), smoke) * 1e3
    m = 256 if smoke else 8192
    a, b = torch.randn(2, m, m, device=DEVICE, dtype=torch.bfloat16)
    return bandwidth, 2 * m**3 / milliseconds(lambda: a @ b, smoke) * 1e3


def fla_call() -> tuple[Callable[..., Any] | None, str]:
    """The peer's operator, and how it was made to run."""
    try:
        import fla
        from fla.ops.common import chunk_o
        from fla.ops.gated_delta_product import chunk_gated_delta_product
    except Exception as e:
        return None, f"flash-linear-attention not importable: {type(e).__name__}: {e}"
    patched = hasattr(chunk_o, "TRITON_ABOVE_3_7_1")
    if patched:  # it refuses its gated backward on Hopper with Triton below 3.7.1; dk = 128 is said to be right
        chunk_o.TRITON_ABOVE_3_7_1 = True
    return (
        chunk_gated_delta_product,
        f"fla {fla.__version__}, its guard against Triton < 3.7.1 {'lifted' if patched else 'absent'}",
    )


def op(smoke: bool) -> None:
    report = Report("gpu_op", "The gated delta product on a GPU: ns a token and head")
    bandwidth, flops = roofline(smoke)
    peer, note = fla_call()
    print(f"measured: copy {bandwidth / 1e12:.2f} TB/s, bf16 product {flops / 1e12:.0f} TFLOP/s; {note}")
    shapes = [(1, 64, 2, 32)] if smoke else [(12, 4096, 8, 128), (4, 8192, 16, 128), (1, 32768, 16, 128), (12, 4096, 16, 64)]
    for (B, T, H, d), n, gated in itertools.product(shapes, (2,) if smoke else (1, 2, 3, 4), (True, False)):
        x = {name: y.requires_grad_() for name, y in make(B, T, H, n, d, d, gate=0.05 if gated else None).items()}
        size, unit = Size(B, T, n, H, d, d, gated=gated), B * T * H / 1e6  # ms -> ns a token-head

        def forward(x: dict[str, Any] = x) -> Tensor:
            return gated_delta_product(**x, backend="triton")[0]

        o = forward()
        do = torch.randn_like(o)
        row: dict[str, Any] = {"B": B, "T": T, "H": H, "d": d, "n": n, "gate": gated}
        with torch.no_grad():
            row["inference"] = milliseconds(forward, smoke) / unit
        row["forward"] = milliseconds(forward, smoke) / unit
        row["backward"] = milliseconds(partial(grad, o, list(x.values()), do), smoke) / unit
        row["forward roofline"] = cost.roofline(cost.forward(size), bandwidth, flops) * 1e3 / unit
        row["backward roofline"] = cost.roofline(cost.backward(size), bandwidth, flops) * 1e3 / unit
        row |= {f"{name} (ms)": t for name, t in kernels_alone(x, do).items()}
        if peer is not None:
            row |= against_peer(peer, x, o, do, row, unit, smoke)
        report.add(row)
    keys = list(dict.fromkeys(itertools.chain.from_iterable(report.rows)))
    report.rows = [{key: row.get(key, "-") for key in keys} for row in report.rows]
    report.title += f" (copy {bandwidth / 1e12:.2f} TB/s, bf16 {flops / 1e12:.0f} TFLOP/s; {note})"
    if not smoke:
        report.write()


def grad(y: Any, x: list[Tensor], dy: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, x, dy, retain_graph=True)


def kernels_alone(x: dict[str, Any], do: Tensor) -> dict[str, float]:
    if DEVICE == "cpu":
        return {}
    plain: dict[str, Any] = {name: y.detach() for name, y in x.items()}
    q, k, v, beta = (plain[name] for name in NAMES[:4])
    g = plain.get("g")
    default = launch.runner(k.device)
    ahead, back = (Timed(default.arch, default.processors) for _ in range(2))
    for _ in range(10):
        _, _, saved = launch.forward(q, k, v, beta, g, None, None, 1.0, True, True, 16, run=ahead)
        launch.backward(do, None, q, k, v, beta, g, saved, None, 1.0, True, 16, run=back)
    return ahead.medians() | {f"backward {name}": t for name, t in back.medians().items()}


def against_peer(
    peer: Callable[..., Any], x: dict[str, Tensor], o: Tensor, do: Tensor, ours: dict[str, Any], unit: float, smoke: bool
) -> dict[str, Any]:
    n = x["k"].shape[2]
    rows = {name: x[name].flatten(1, 2) for name in ("k", "v", "beta")}
    leaves = {name: y.detach().requires_grad_() for name, y in {**x, **rows}.items()}

    def forward() -> Tensor:
        return peer(**{"g": None, **leaves}, num_householder=n)[0]  # type: ignore[no-any-return]

    try:
        theirs = forward()
        ahead = milliseconds(forward, smoke) / unit
        back = milliseconds(partial(grad, theirs, list(leaves.values()), do), smoke) / unit
    except Exception as e:
        return {"fla": f"{type(e).__name__}"}
    return {
        "fla": f"o differs by {error(theirs, o):.1e}", "fla forward": ahead, "fla backward": back,
        "forward x": ahead / ours["forward"], "backward x": back / ours["backward"],
    }  # fmt: skip


def front_end_times(smoke: bool) -> None:
    report = Report("gpu_front_end", "Convolution, SiLU, unit length and gates: ms")
    bandwidth, _ = roofline(smoke)
    B, T, H, d, W = (1, 40, 2, 16, 4) if smoke else (12, 4096, 8, 128, 4)
    for n in (2,) if smoke else (1, 2, 3):
        channels = (H * d, n * H * d, n * H * d)
        q, k, v = (torch.randn(B, T, c, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for c in channels)
        weights = [torch.randn(c, 1, W, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for c in channels]
        b = torch.randn(B, T, n * H, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        a = torch.randn(B, T, H, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        gate = [torch.randn(H, device=DEVICE, requires_grad=True) for _ in range(2)]
        leaves = [q, k, v, b, a, *weights, *gate]

        def run(backend: str, inputs: list[Any] = [q, k, v, b, a, weights, *gate]) -> list[Any]:  # noqa: B006
            return list(front_end(*inputs, heads=H, max_beta=2.0, backend=backend))

        moved = 2 * 2 * B * T * sum(channels)
        eager = partial(run, "torch")
        for name, function in (
            ("triton", partial(run, "triton")),
            ("torch.compile", eager if smoke else torch.compile(eager)),
            ("eager", eager),
        ):
            out = function()
            ahead = milliseconds(function, smoke)
            back = milliseconds(partial(grad, out, leaves, [torch.randn_like(y) for y in out]), smoke)
            report.add(
                {
                    "n": n,
                    "how": name,
                    "forward": ahead,
                    "backward": back,
                    "forward roofline": 1e3 * moved / bandwidth,
                    "backward roofline": 1.5e3 * moved / bandwidth,
                }
            )
    if not smoke:
        report.write()


def norm(smoke: bool) -> None:
    """rms_norm(o) * silu(gate): is what torch.compile makes of it near the bandwidth of a copy?"""
    report = Report("gpu_norm", "The gated output norm: ms and the share of a copy's bandwidth")
    bandwidth, _ = roofline(smoke)
    B, T, H, d = (1, 40, 2, 16) if smoke else (12, 4096, 8, 128)
    o, gate = (torch.randn(B, T, H, d, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    weight = torch.ones(d, device=DEVICE, requires_grad=True)

    def gated(o: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        wide = torch.nn.functional.rms_norm(o.float(), weight.shape, weight, 1e-5).to(o.dtype)
        return wide * torch.nn.functional.silu(gate)

    for name, function in (("torch.compile", gated if smoke else torch.compile(gated)), ("eager", gated)):
        y = function(o, gate, weight)
        ahead = milliseconds(partial(function, o, gate, weight), smoke)
        back = milliseconds(partial(grad, y, [o, gate, weight], torch.randn_like(y)), smoke)
        least, least_back = 3 * 2e3 * o.numel() / bandwidth, 5 * 2e3 * o.numel() / bandwidth
        shares = {"forward's share": least / ahead, "backward's share": least_back / back}
        report.add({"how": name, "forward": ahead, "backward": back, **shares})
    if not smoke:
        report.write()


# -- a training step --------------------------------------------------------------------------------------------------


def train(smoke: bool) -> None:
    try:
        from gpu_train import training_steps
    except ImportError as e:
        print(f"train: not run, {e}")
        return
    report = Report("gpu_train", "A training step on one GPU")
    for row in training_steps(smoke):
        report.add(row)
    if not smoke and report.rows:
        report.write()


def main() -> int:
    parts = ("check", "op", "front_end", "norm", "train")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(parts)}; default all")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, nothing written")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(parts):
        parser.error(f"unknown part {sorted(unknown)[0]!r}; choose from {', '.join(parts)}")
    if DEVICE == "cpu" and not arguments.smoke:
        parser.error("no CUDA device here; --smoke runs tiny sizes under TRITON_INTERPRET=1")
    print(json.dumps(machine()))
    good = True
    for part in arguments.parts or parts:
        start = time.perf_counter()
        if part == "check":
            good = check(arguments.smoke)
            print("offsets:", check_offsets())
        else:
            {"op": op, "front_end": front_end_times, "norm": norm, "train": train}[part](arguments.smoke)
        print(f"-- {part}: {time.perf_counter() - start:.0f} s", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
