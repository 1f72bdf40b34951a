"""Are the kernels right? Every head size, n, dtype and option against the float64 recurrence, twice for equal bits."""

from __future__ import annotations

import itertools
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch
from common import Report
from deltaproduct_kernels import gated_delta_product
from deltaproduct_kernels.recurrent import recurrent_forward
from deltaproduct_kernels.triton_backend import launch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMITS = {"dbeta": 0.02, "dg": 0.02}  # of the reference's root mean square; others 0.8 %
NAMES = ("q", "k", "v", "beta", "g", "initial_state")


def make(
    B: int,
    T: int,
    H: int,
    n: int,
    dk: int,
    dv: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    gate: float | None = 0.05,
    beta: tuple[float, float] = (0.0, 2.0),
    correlation: float = 0.0,
    states: int | None = None,
) -> dict[str, Any]:
    """Fresh random inputs; beta and g in float32, as the front end gives them."""
    common = torch.randn(dk, device=DEVICE)
    k = (1 - correlation) * torch.randn(B, T, n, H, dk, device=DEVICE) + correlation * common
    x = {
        "q": torch.randn(B, T, H, dk, device=DEVICE, dtype=dtype),
        "k": torch.nn.functional.normalize(k, dim=-1).to(dtype),
        "v": torch.randn(B, T, n, H, dv, device=DEVICE, dtype=dtype),
        "beta": beta[0] + (beta[1] - beta[0]) * torch.rand(B, T, n, H, device=DEVICE),
    }
    if gate is not None:
        x["g"] = -2 * gate * torch.rand(B, T, H, device=DEVICE)
    if states is not None:
        x["initial_state"] = torch.randn(states, H, dk, dv, device=DEVICE)
    return x


@dataclass(frozen=True)
class Case:
    dk: int
    dv: int
    n: int
    dtype: str
    T: int = 200
    gate: float | None = 0.05
    beta: tuple[float, float] = (0.0, 2.0)
    correlation: float = 0.0
    offsets: tuple[int, ...] | None = None
    erase: bool = True
    B: int = 2
    part: int | None = None


def cases(smoke: bool) -> list[Case]:
    widths = (32, 64, 128, 256)
    if smoke:
        return [Case(16, 32, 2, "float32", T=40, B=1), Case(16, 16, 1, "float16", T=40, B=1)]
    sizes = itertools.product(widths, widths, (1, 2, 3, 4))
    out = [Case(dk, dv, n, "bfloat16") for dk, dv, n in sizes]
    out += [Case(dk, dv, n, "float32", T=70) for dk, dv, n in itertools.product(widths[:-1], widths, (1, 2, 3, 4))]
    for n in (1, 2, 3, 4):
        base: dict[str, Any] = {"dk": 128, "dv": 128, "n": n, "dtype": "bfloat16"}
        out += [Case(**{**base, "dtype": "float16"}), Case(**base, gate=None), Case(**base, gate=None, erase=False)]
        out += [Case(**base, gate=gate) for gate in (1e-3, 1.0, 10.0)]
        out += [Case(**base, beta=(0.0, 0.0)), Case(**base, beta=(2.0, 2.0)), Case(**base, beta=(1.8, 2.0), correlation=0.5)]
        out += [Case(**base, T=T) for T in (1, 15, 16, 17, 63, 64, 65)]
        out += [Case(**base, B=1, offsets=(0, 0, 5, 69, 69, 70, 200, 200)), Case(**base, B=1, T=2000, part=512)]
        out += [Case(96, 48, n, "bfloat16"), Case(64, 64, n, "float16"), Case(64, 64, n, "bfloat16", gate=None)]
    out += [Case(128, 128, n, "bfloat16") for n in (5, 6, 7, 8)]
    return out


def check_case(case: Case) -> dict[str, Any]:
    """Errors of outputs and gradients against the recurrence in float64, and whether a second run gives the same bits."""
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    count = len(case.offsets) - 1 if case.offsets else case.B
    options: dict[str, Any] = {"dtype": dtype, "gate": case.gate, "beta": case.beta, "correlation": case.correlation}
    x = make(case.B, case.T, 2, case.n, case.dk, case.dv, states=count, **options)
    cu_seqlens = None if case.offsets is None else torch.tensor(case.offsets, device=DEVICE, dtype=torch.int32)
    q, k, v, beta = (x[name] for name in NAMES[:4])
    g, state = x.get("g"), x["initial_state"]
    scale, bits = case.dk**-0.5, k.element_size() * 8
    do, dfinal = torch.randn_like(v[:, :, 0]), torch.randn(count, 2, case.dk, case.dv, device=DEVICE)

    def run() -> dict[str, Tensor]:
        o, final, saved = launch.forward(
            q, k, v, beta, g, state, cu_seqlens, scale, case.erase, True, bits, part=case.part
        )  # fmt: skip
        grads = launch.backward(
            do, dfinal, q, k, v, beta, g, saved, cu_seqlens, scale, case.erase, bits, part=case.part
        )  # fmt: skip
        named = zip(("dq", "dk", "dv", "dbeta", "dg", "dh0"), grads, strict=True)
        return {"o": o, "state": final, **{name: y for name, y in named if y is not None}}

    got, again = run(), run()
    wide: dict[str, Any] = {name: y.double().requires_grad_() for name, y in x.items()}
    arguments: list[Any] = [*(wide.get(name) for name in NAMES), cu_seqlens, scale, case.erase]
    expected_o, expected_state = recurrent_forward(*arguments)
    grads = torch.autograd.grad([expected_o, expected_state], list(wide.values()), [do.double(), dfinal.double()])
    labels = {"initial_state": "dh0", "q": "dq", "k": "dk", "v": "dv", "beta": "dbeta", "g": "dg"}
    expected = {"o": expected_o, "state": expected_state, **dict(zip((labels[name] for name in wide), grads, strict=True))}
    errors = {name: error(got[name], expected[name]) for name in expected}
    equal = all(torch.equal(got[name], again[name]) for name in got)
    # Nearly parallel keys reflected again and again, nothing forgotten: bfloat16 itself loses twice as much there.
    slack = 2.5 if case.correlation else 1.0
    bad = [name for name, e in errors.items() if not e < slack * LIMITS.get(name, 0.008)]
    fault = ", ".join(bad + ["bits differ"] * (not equal))
    return {
        "case": " ".join(f"{k}={v}" for k, v in case.__dict__.items() if v != getattr(Case, k, ...)),
        **errors,
        "fault": fault,
    }


def error(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach(), expected.detach()
    difference = (actual.double() - expected.double()).square().mean().sqrt()
    return float(difference / expected.double().square().mean().sqrt().clamp_min(1e-6))


def check(smoke: bool) -> bool:
    todo, report = cases(smoke), Report("gpu_check", "The Triton kernels against the float64 recurrence")
    if smoke:
        results = [check_case(case) for case in todo]
    else:  # kernels compile in the processes that use them: many at once
        workers = min(16, os.cpu_count() or 1)
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            results = list(pool.map(check_case, todo))
    keys = ["case", "o", "state", "dq", "dk", "dv", "dbeta", "dg", "dh0", "fault"]
    report.rows = [{key: row.get(key, "-") for key in keys} for row in results]
    faulty = [row for row in results if row["fault"]]
    for row in faulty:
        print("FAULT", row)
    print(f"check: {len(results)} cases, {len(faulty)} with a fault")
    if not smoke:
        report.write()
    return not faulty


def check_offsets() -> str:
    """More than 2^31 elements of k: the last sequence must come out as it does alone."""
    if DEVICE == "cpu" or torch.cuda.get_device_properties(0).total_memory < 100 * 2**30:
        return "not run: needs 100 GiB"
    B, T, H, n, d = 5, 65536, 16, 4, 128
    x = make(B, T, H, n, d, d)
    with torch.no_grad():
        o, _ = gated_delta_product(**x, backend="triton")
        last, _ = gated_delta_product(**{name: y[-1:].contiguous() for name, y in x.items()}, backend="triton")
    return f"{x['k'].numel():,} elements: last row {'equal' if torch.equal(o[-1:], last) else 'DIFFERENT'}"
