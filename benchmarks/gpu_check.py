"""Are the kernels right? Every head size, n, dtype and option against the float64 recurrence, and again for equal bits."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields
from typing import Any

import torch
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
    spans: int | None = None
    """Programs that a row is cut among; each takes as many units of launch.Shape as it can."""
    H: int = 2

    @property
    def name(self) -> str:
        """What is not as usual."""
        return " ".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default)


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
        out += [Case(**base, B=1, offsets=(0, 0, 5, 69, 69, 70, 200, 200)), Case(**base, B=1, T=2000, spans=4)]
        out += [Case(96, 48, n, "bfloat16"), Case(64, 64, n, "float16"), Case(64, 64, n, "bfloat16", gate=None)]
    out += [Case(128, 128, n, "bfloat16") for n in (5, 6, 7, 8)]
    out += [Case(128, 128, 4, "bfloat16", B=5, T=65536, H=16)]
    return out


def inputs(case: Case) -> dict[str, Any]:
    torch.manual_seed(0)
    states = len(case.offsets) - 1 if case.offsets else case.B
    ranges: dict[str, Any] = {"gate": case.gate, "beta": case.beta, "correlation": case.correlation, "states": states}
    return make(case.B, case.T, case.H, case.n, case.dk, case.dv, dtype=getattr(torch, case.dtype), **ranges)


def step(case: Case, x: dict[str, Any], do: Tensor, dfinal: Tensor, run: launch.Runner | None = None) -> dict[str, Tensor]:
    """Outputs and gradients of one call."""
    q, k, v, beta = (x[name] for name in NAMES[:4])
    g, state = x.get("g"), x.get("initial_state")
    cu_seqlens = None if case.offsets is None else torch.tensor(case.offsets, device=DEVICE, dtype=torch.int32)
    scale, bits = case.dk**-0.5, k.element_size() * 8
    part = None
    if case.spans is not None:
        unit = launch.Shape.of(k, v, g, cu_seqlens, case.erase, bits, launch.runner(k.device)).unit
        part = -(-case.T // (case.spans * unit)) * unit
    options: Any = {"part": part, "run": run}
    o, final, saved = launch.forward(q, k, v, beta, g, state, cu_seqlens, scale, case.erase, True, bits, **options)
    grads = launch.backward(do, dfinal, q, k, v, beta, g, saved, cu_seqlens, scale, case.erase, bits, **options)
    named = zip(("dq", "dk", "dv", "dbeta", "dg", "dh0"), grads, strict=True)
    return {"o": o, "state": final, **{name: y for name, y in named if y is not None}}


def upstream(case: Case, x: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Gradients of o and of the final state."""
    return torch.randn_like(x["v"][:, :, 0]).contiguous(), torch.randn_like(x["initial_state"])


def check(case: Case, smoke: bool = False) -> dict[str, Any]:
    """Errors of outputs and gradients against the recurrence in float64, and whether a second run gives the same bits.

    The recurrence runs on the CPU: it is half a million operations on small tensors, which a GPU would only launch.
    """
    if case.T > 10_000:
        return check_offsets(case)
    torch.set_num_threads(1)
    x = inputs(case)
    do, dfinal = upstream(case, x)
    got, again = step(case, x, do, dfinal), step(case, x, do, dfinal)
    wide: dict[str, Any] = {name: y.cpu().double().requires_grad_() for name, y in x.items()}
    cu_seqlens = None if case.offsets is None else torch.tensor(case.offsets, dtype=torch.int32)
    arguments: list[Any] = [*(wide.get(name) for name in NAMES), cu_seqlens, case.dk**-0.5, case.erase]
    expected_o, expected_state = recurrent_forward(*arguments)
    upstreams = [do.cpu().double(), dfinal.cpu().double()]
    grads = torch.autograd.grad([expected_o, expected_state], list(wide.values()), upstreams)
    labels = {"initial_state": "dh0", "q": "dq", "k": "dk", "v": "dv", "beta": "dbeta", "g": "dg"}
    expected = {"o": expected_o, "state": expected_state, **dict(zip((labels[name] for name in wide), grads, strict=True))}
    errors = {name: error(got[name], expected[name]) for name in ("o", "state", *labels.values()) if name in expected}
    equal = all(torch.equal(got[name], again[name]) for name in got)
    # Nearly parallel keys reflected again and again, nothing forgotten: bfloat16 itself loses twice as much there.
    slack = 2.5 if case.correlation else 1.0
    bad = [name for name, e in errors.items() if not e < slack * LIMITS.get(name, 0.008)]
    return {**errors, "fault": ", ".join(bad + ["bits differ"] * (not equal))}


def check_offsets(case: Case) -> dict[str, Any]:
    """More than 2^31 elements of k: the last row must come out as it does alone, but for where long rows are cut."""
    rows = [make(1, case.T, case.H, case.n, case.dk, case.dv, gate=case.gate) for _ in range(case.B)]
    x: dict[str, Any] = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    with torch.no_grad():
        o, _ = gated_delta_product(**x, backend="triton")
        last, _ = gated_delta_product(**rows[-1], backend="triton")
    difference = error(o[-1:], last)
    return {"o": difference, "fault": "" if difference < 0.008 else f"another last row with {x['k'].numel():,} elements of k"}


def repeated(smoke: bool) -> list[Case]:
    """What is trained: B 12, T 4096, 8 heads."""
    if smoke:
        return [Case(32, 32, 2, "float32", B=1, T=40)]
    sizes: dict[str, Any] = {"B": 12, "T": 4096, "H": 8}
    steps = ((2, 0.05), (2, None), (1, 0.05), (3, 0.05), (4, 0.05))
    main = [Case(128, 128, n, "bfloat16", gate=gate, **sizes) for n, gate in steps]
    return main + [Case(dk, dv, 2, "bfloat16", **sizes) for dk, dv in ((64, 64), (32, 32), (64, 128))]


def repeat(case: Case, smoke: bool = False) -> dict[str, Any]:
    """How many of 50 runs gave other bits than the first, and how far the last row is from the torch backend in float32."""
    x = inputs(case)
    do, dfinal = upstream(case, x)
    first = step(case, x, do, dfinal)
    differ: dict[str, int] = {}
    for _ in range(2 if smoke else 50):
        for name, y in step(case, x, do, dfinal).items():
            differ[name] = differ.get(name, 0) + (not torch.equal(y, first[name]))
    wide: dict[str, Any] = {name: y[-1:].float().requires_grad_() for name, y in x.items()}
    slow_o, slow_state = gated_delta_product(**wide, output_final_state=True, backend="torch")
    assert slow_state is not None
    grads = torch.autograd.grad([slow_o, slow_state], list(wide.values()), [do[-1:].float(), dfinal[-1:]])
    labels = {"q": "dq", "k": "dk", "v": "dv", "beta": "dbeta", "g": "dg", "initial_state": "dh0"}
    expected = {"o": slow_o, "state": slow_state, **dict(zip((labels[name] for name in wide), grads, strict=True))}
    errors = {f"{name} (last row)": error(first[name][-1:], y) for name, y in expected.items()}
    wrong = [name for name, count in differ.items() if count]
    bad = [name for name, e in errors.items() if not e < LIMITS.get(name.split()[0], 0.008)]
    return {**errors, "fault": ", ".join(bad + [f"{differ[name]} times other bits in {name}" for name in wrong])}


def error(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().to(expected.device), expected.detach()
    difference = (actual.double() - expected.double()).square().mean().sqrt()
    return float(difference / expected.double().square().mean().sqrt().clamp_min(1e-6))


def cuda_is_lost() -> bool:
    """Whether an error has made this process useless for CUDA."""
    if DEVICE == "cpu":
        return False
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception:
        return True
    return False
