"""How fast is what surrounds the recurrence in a layer: the front end's kernels and the gated output norm."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from deltaproduct_kernels import front_end as front_end_op
from gpu_check import DEVICE
from gpu_op import grad, milliseconds, roofline
from torch import Tensor

FRONT_ENDS = ("triton", "torch.compile", "eager")


def front_end_cases(smoke: bool) -> list[tuple[int, str]]:
    return [(n, how) for n in ((2,) if smoke else (2, 1, 3)) for how in FRONT_ENDS]


def front_end(case: tuple[int, str], smoke: bool) -> dict[str, Any]:
    """Convolution, SiLU, unit length and gates for `n` steps a token, computed in one of three ways."""
    n, how = case
    bandwidth, _ = roofline(smoke)
    B, T, H, d, W = (1, 40, 2, 16, 4) if smoke else (12, 4096, 8, 128, 4)
    channels = (H * d, n * H * d, n * H * d)
    q, k, v = (torch.randn(B, T, c, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for c in channels)
    weights = [torch.randn(c, 1, W, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for c in channels]
    b = torch.randn(B, T, n * H, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    a = torch.randn(B, T, H, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    gate = [torch.randn(H, device=DEVICE, requires_grad=True) for _ in range(2)]
    leaves = [q, k, v, b, a, *weights, *gate]

    def eager(backend: str = "torch") -> list[Any]:
        return list(front_end_op(q, k, v, b, a, weights, *gate, heads=H, max_beta=2.0, backend=backend))

    function: Callable[[], list[Any]] = partial(eager, "triton") if how == "triton" else eager
    if how == "torch.compile" and not smoke:
        function = torch.compile(eager)
    out = function()
    moved = 2 * 2 * B * T * sum(channels)
    return {
        "forward": milliseconds(function, smoke),
        "backward": milliseconds(partial(grad, out, leaves, [torch.randn_like(y) for y in out]), smoke),
        "forward roofline": 1e3 * moved / bandwidth,
        "backward roofline": 1.5e3 * moved / bandwidth,
    }


def norm_cases(smoke: bool) -> list[str]:
    return ["torch.compile", "eager"]


def norm(how: str, smoke: bool) -> dict[str, Any]:
    """rms_norm(o) * silu(gate): is what torch.compile makes of it near the bandwidth of a copy?"""
    bandwidth, _ = roofline(smoke)
    B, T, H, d = (1, 40, 2, 16) if smoke else (12, 4096, 8, 128)
    o, gate = (torch.randn(B, T, H, d, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    weight = torch.ones(d, device=DEVICE, requires_grad=True)

    def gated(o: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        wide = torch.nn.functional.rms_norm(o.float(), weight.shape, weight, 1e-5).to(o.dtype)
        return wide * torch.nn.functional.silu(gate)

    function = torch.compile(gated) if how == "torch.compile" and not smoke else gated
    y = function(o, gate, weight)
    forth = milliseconds(partial(function, o, gate, weight), smoke)
    back = milliseconds(partial(grad, y, [o, gate, weight], torch.randn_like(y)), smoke)
    least, least_back = 3 * 2e3 * o.numel() / bandwidth, 5 * 2e3 * o.numel() / bandwidth
    return {"forward": forth, "backward": back, "forward's share": least / forth, "backward's share": least_back / back}
