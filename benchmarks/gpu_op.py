"""How fast is the recurrence: against the roofline measured here, a kernel at a time, and against flash-linear-attention."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from deltaproduct_kernels import gated_delta_product
from deltaproduct_kernels.check import NAMES, error, make
from deltaproduct_kernels.triton_backend import cost, launch
from deltaproduct_kernels.triton_backend.layout import Size
from gpu_check import DEVICE
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    n: int
    gated: bool = True
    B: int = 12
    T: int = 4096
    H: int = 8
    d: int = 128
    peer: bool = False
    """Time flash-linear-attention too: its autotuning takes minutes."""

    @property
    def name(self) -> str:
        return f"n={self.n} {'gated' if self.gated else 'ungated'} B={self.B} T={self.T} H={self.H} d={self.d}"

    @property
    def rows(self) -> tuple[int, int, int]:
        return self.B, self.T, self.H

    @property
    def size(self) -> Size:
        return Size(self.B, self.T, self.n, self.H, self.d, self.d, gated=self.gated)


def cases(smoke: bool) -> list[Shape]:
    """What matters most comes first: a rented machine may end."""
    if smoke:
        return [Shape(2, B=1, T=64, H=2, d=32)]
    main = [Shape(2, peer=True), Shape(2, False, peer=True), Shape(1), Shape(3), Shape(4), Shape(1, False), Shape(3, False)]
    longer = [Shape(2, B=4, T=8192, H=16), Shape(2, B=1, T=32768, H=16), Shape(2, B=12, T=4096, H=12)]
    return main + longer + [Shape(n, H=16, d=64) for n in (2, 1, 3)] + [Shape(1, peer=True)]


def time_op(shape: Shape, smoke: bool) -> dict[str, Any]:
    """Nanoseconds a token and head, forward and backward, and milliseconds of each kernel."""
    bandwidth, flops = roofline(smoke)
    gate = 0.05 if shape.gated else None
    made = make(shape.B, shape.T, shape.H, shape.n, shape.d, shape.d, device=DEVICE, gate=gate)
    x = {name: y.requires_grad_() for name, y in made.items()}
    unit = shape.B * shape.T * shape.H / 1e6  # ms -> ns a token and head

    def forward() -> Tensor:
        return gated_delta_product(**x, backend="triton")[0]

    o = forward()
    do = torch.randn_like(o)
    row: dict[str, Any] = {}
    with torch.no_grad():
        row["inference"] = milliseconds(forward, smoke) / unit
    row["forward"] = milliseconds(forward, smoke) / unit
    row["backward"] = milliseconds(partial(grad, o, list(x.values()), do), smoke) / unit
    row["forward roofline"] = cost.roofline(cost.forward(shape.size), bandwidth, flops) * 1e3 / unit
    row["backward roofline"] = cost.roofline(cost.backward(shape.size), bandwidth, flops) * 1e3 / unit
    row |= {f"{name} (ms)": t for name, t in kernels_alone(x, do).items()}
    if shape.peer:
        row |= against_peer(x, o, do, row, unit, smoke)
    return row | {"copy (TB/s)": bandwidth / 1e12, "bf16 product (TFLOP/s)": flops / 1e12}


def milliseconds(function: Callable[[], object], smoke: bool) -> float:
    if DEVICE == "cpu":
        start = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - start)
    from triton.testing import do_bench

    return float(do_bench(function, warmup=25, rep=5 if smoke else 100, return_mode="median"))


@cache
def roofline(smoke: bool) -> tuple[float, float]:
    """Bytes/s of a large copy (read plus written), and bf16 FLOP/s of a large product, on random data."""
    size = 2**20 if smoke else 2**30
    source = torch.randn(size, device=DEVICE, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    bandwidth = 4 * size / milliseconds(lambda: target.copy_(source), smoke) * 1e3
    m = 256 if smoke else 8192
    a, b = torch.randn(2, m, m, device=DEVICE, dtype=torch.bfloat16)
    return bandwidth, 2 * m**3 / milliseconds(lambda: a @ b, smoke) * 1e3


def table_name(kernel: Any) -> str:
    """What configs.py's table calls it in an uncut step."""
    return str(kernel.__name__.removesuffix("_kernel"))


@dataclass(frozen=True)
class Timed(launch.Runner):
    """Launches kernels and keeps what each takes, by events around it."""

    spent: dict[str, list[tuple[Any, Any]]] = field(default_factory=dict)

    def __call__(self, kernel: Any, grid: int, config: Any, **arguments: Any) -> None:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        super().__call__(kernel, grid, config, **arguments)
        after.record()
        self.spent.setdefault(table_name(kernel), []).append((before, after))

    def medians(self) -> dict[str, float]:
        """Milliseconds a launch."""
        torch.cuda.synchronize()
        times = {name: sorted(a.elapsed_time(b) for a, b in pairs) for name, pairs in self.spent.items()}
        return {name: values[len(values) // 2] for name, values in times.items()}


def ahead_of_the_gpu() -> None:
    """Give the GPU a few milliseconds of nothing, so that launches queue up and none is timed while it is prepared."""
    torch.cuda._sleep(4_000_000)


def kernels_alone(x: dict[str, Any], do: Tensor) -> dict[str, float]:
    if DEVICE == "cpu":
        return {}
    plain: dict[str, Any] = {name: y.detach() for name, y in x.items()}
    q, k, v, beta = (plain[name] for name in NAMES[:4])
    g = plain.get("g")
    default = launch.runner(k.device)
    forth, back = (Timed(default.arch, default.processors) for _ in range(2))
    for _ in range(10):
        ahead_of_the_gpu()
        _, _, saved = launch.forward(q, k, v, beta, g, None, None, 1.0, True, True, 16, run=forth)
        ahead_of_the_gpu()
        launch.backward(do, None, q, k, v, beta, g, saved, None, 1.0, True, 16, run=back)
    return forth.medians() | {f"backward {name}": t for name, t in back.medians().items()}


def peer_operator() -> tuple[Callable[..., Any], str]:
    """flash-linear-attention's, and how it was made to run."""
    import fla
    from fla.ops.common import chunk_o
    from fla.ops.gated_delta_product import chunk_gated_delta_product

    patched = hasattr(chunk_o, "TRITON_ABOVE_3_7_1")
    if patched:  # it refuses its gated backward on Hopper with Triton below 3.7.1
        chunk_o.TRITON_ABOVE_3_7_1 = True
    return chunk_gated_delta_product, f"{fla.__version__}{', its guard on Triton lifted' if patched else ''}"


def against_peer(x: dict[str, Tensor], o: Tensor, do: Tensor, ours: dict[str, Any], unit: float, smoke: bool) -> dict[str, Any]:
    n = x["k"].shape[2]
    rows = {name: x[name].flatten(1, 2) for name in ("k", "v", "beta")}
    leaves = {name: y.detach().requires_grad_() for name, y in {**x, **rows}.items()}
    try:
        peer, how = peer_operator()

        def forward() -> Tensor:
            return peer(**{"g": None, **leaves}, num_householder=n)[0]  # type: ignore[no-any-return]

        theirs = forward()
        mine, others = grad(o, list(x.values()), do), grad(theirs, list(leaves.values()), do)
        furthest = max(error(b.reshape(a.shape), a) for a, b in zip(mine, others, strict=True))
        forth = milliseconds(forward, smoke) / unit
        back = milliseconds(partial(grad, theirs, list(leaves.values()), do), smoke) / unit
    except Exception as e:
        return {"fla": f"{type(e).__name__}: {str(e)[:80]}"}
    return {
        "fla": how, "fla's o differs by": error(theirs, o), "fla's gradients by": furthest,
        "fla forward": forth, "fla backward": back,
        "forward x": forth / ours["forward"], "backward x": back / ours["backward"],
    }  # fmt: skip


def grad(y: Any, x: list[Tensor], dy: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, x, dy, retain_graph=True)
