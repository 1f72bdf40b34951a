"""Are the Triton kernels right here? Outputs and every gradient against the recurrence in float64, and twice for equal bits.

One mechanism for a run before its first step, `titan-dp check-kernels` and `benchmarks/gpu.py check`. Compilers have made wrong
code of kernels like these (docs/kernels.md); this shows it where it happens, on the card, driver and assembler at hand.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from deltaproduct_kernels.recurrent import recurrent_forward
from deltaproduct_kernels.triton_backend import configs, launch
from deltaproduct_kernels.triton_backend.ops import bits, computable

NAMES = ("q", "k", "v", "beta", "g", "initial_state")
HEADS = {"q": 2, "k": 3, "v": 3, "beta": 3, "g": 2, "initial_state": 1, "o": 2, "state": 1}
"""The axis of heads."""
GRADIENTS = {"initial_state": "dh0", "q": "dq", "k": "dk", "v": "dv", "beta": "dbeta", "g": "dg"}
LIMIT, LIMIT_FLOAT32 = 0.02, 1e-5
"""The error that counts as rounding, in 16 bits and in float32: root mean square over the reference's. On an H200 rounding made
0.7 % and 6e-7 at most; 16 columns without decay are to make 1.2 % (float16 in the interpreter, times 8). A wrong row of a tile
makes over 10 %."""


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
    groups: int | None = None
    """Of heads that share q and k; None: as many as heads."""
    state: bool = True
    """Whether there are an initial state and a gradient of the final one; in runs only where ranks share a sequence."""

    @property
    def name(self) -> str:
        """What is not as usual."""
        return " ".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default)


@dataclass(frozen=True)
class Checked:
    errors: dict[str, float]
    """Root mean square of the difference over that of the reference, by output and gradient."""
    faults: list[str]
    """What is wrong, in words."""

    @property
    def largest(self) -> str:
        name = max(self.errors, key=lambda name: self.errors[name])
        return f"{self.errors[name]:.2g} in {name}"


def sizes() -> list[Case]:
    """The head sizes and n that configs.TABLE tells apart, in the dtypes that a run may have."""
    every = [*itertools.product(configs.SIZES, configs.SIZES, (1, 2, 3, 4))]
    single = [Case(dk, dv, n, "float32", T=70) for dk, dv, n in every if dk <= 128]
    return [Case(dk, dv, n, "bfloat16") for dk, dv, n in every] + single


def short_row(case: Case, packed: bool, device: torch.device) -> Case:
    """What stands for `case`, a whole batch: the same kernels on one row of five chunks and a half, cut if its rows are.

    The number of heads stays, because kernels are compiled for it.
    """
    chip, width = launch.runner(device), getattr(torch, case.dtype).itemsize * 8
    B, T = (1, case.B * case.T) if packed else (case.B, case.T)
    shape = launch.Shape(
        B=B, T=T, n=case.n, H=case.H, groups=case.groups, dk=case.dk, dv=case.dv, bits=width,
        gated=case.gate is not None, erase=case.erase, sequences=case.B if packed else None, arch=chip.arch,
        processors=chip.processors,
    )  # fmt: skip
    T = 5 * shape.chunk + shape.chunk // 2 + 1
    offsets = (0, 0, shape.chunk // 4 + 1, T) if packed else None
    return replace(case, B=1, T=T, offsets=offsets, spans=2 if shape.part < shape.whole else None)


def make(
    B: int,
    T: int,
    H: int,
    n: int,
    dk: int,
    dv: int,
    *,
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
    gate: float | None = 0.05,
    beta: tuple[float, float] = (0.0, 2.0),
    correlation: float = 0.0,
    states: int | None = None,
    groups: int | None = None,
) -> dict[str, Any]:
    """Fresh random inputs; beta and g in float32, as the front end gives them."""
    common = torch.randn(dk, device=device)
    G = groups or H
    k = (1 - correlation) * torch.randn(B, T, n, G, dk, device=device) + correlation * common
    x = {
        "q": torch.randn(B, T, G, dk, device=device, dtype=dtype),
        "k": torch.nn.functional.normalize(k, dim=-1).to(dtype),
        "v": torch.randn(B, T, n, H, dv, device=device, dtype=dtype),
        "beta": beta[0] + (beta[1] - beta[0]) * torch.rand(B, T, n, H, device=device),
    }
    if gate is not None:
        x["g"] = -2 * gate * torch.rand(B, T, H, device=device)
    if states is not None:
        x["initial_state"] = torch.randn(states, H, dk, dv, device=device)
    return x


def inputs(case: Case, device: torch.device | str) -> dict[str, Any]:
    """The same each time; sets torch's random numbers."""
    torch.manual_seed(0)
    states = (len(case.offsets) - 1 if case.offsets else case.B) if case.state else None
    options: dict[str, Any] = {name: getattr(case, name) for name in ("gate", "beta", "correlation", "groups")}
    options |= {"dtype": getattr(torch, case.dtype), "states": states}
    return make(case.B, case.T, case.H, case.n, case.dk, case.dv, device=device, **options)


def upstream(x: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Gradients of o and, if there is an initial state, of the final one."""
    state = x.get("initial_state")
    return torch.randn_like(x["v"][:, :, 0]).contiguous(), None if state is None else torch.randn_like(state)


def step(
    case: Case, x: dict[str, Any], do: Tensor, dfinal: Tensor | None, run: launch.Runner | None = None
) -> dict[str, Tensor]:
    """Outputs and gradients of one call."""
    width = bits(x["k"])
    q, k, v, beta, g, state = (computable(x.get(name)) for name in NAMES)
    cu_seqlens = None if case.offsets is None else torch.tensor(case.offsets, device=k.device, dtype=torch.int32)
    scale, part = case.dk**-0.5, None
    if case.spans is not None:
        unit = launch.Shape.of(k, v, g, cu_seqlens, case.erase, width, launch.runner(k.device)).unit
        part = -(-case.T // (case.spans * unit)) * unit
    options: Any = {"part": part, "run": run}
    o, final, saved = launch.forward(q, k, v, beta, g, state, cu_seqlens, scale, case.erase, True, width, **options)
    arguments: list[Any] = [computable(do), dfinal, q, k, v, beta, g, saved, cu_seqlens, scale, case.erase, width]
    named = zip(("dq", "dk", "dv", "dbeta", "dg", "dh0"), launch.backward(*arguments, **options), strict=True)
    return {"o": o, "state": final, **{name: y for name, y in named if y is not None}}


def check(case: Case, device: torch.device | str) -> Checked:
    """Errors of one call, and what is wrong with it; torch's random numbers stay as they were.

    The recurrence runs on the CPU: it is half a million operations on small tensors, which a GPU would only launch. Heads have
    nothing to do with each other but within a group, so it does for the first and the last group of them.
    """
    with torch.random.fork_rng([device] if torch.device(device).type == "cuda" else []):
        x = inputs(case, device)
        do, dfinal = upstream(x)
    got, again = step(case, x, do, dfinal), step(case, x, do, dfinal)
    G = case.groups or case.H
    some = torch.tensor(sorted({0, G - 1}))

    def wide(name: str, y: Tensor) -> Tensor:
        by_group = y.detach().cpu().double().unflatten(HEADS[name], (G, -1))
        return by_group.index_select(HEADS[name], some).flatten(HEADS[name], HEADS[name] + 1)

    leaves: dict[str, Any] = {name: wide(name, y).requires_grad_() for name, y in x.items()}
    cu_seqlens = None if case.offsets is None else torch.tensor(case.offsets, dtype=torch.int32)
    arguments: list[Any] = [*(leaves.get(name) for name in NAMES), cu_seqlens, case.dk**-0.5, case.erase]
    o, state = recurrent_forward(*arguments)
    outputs = [(o, wide("o", do)), *([] if dfinal is None else [(state, wide("state", dfinal))])]
    grads = torch.autograd.grad([y for y, _ in outputs], list(leaves.values()), [d for _, d in outputs])
    expected = {"o": ("o", o), "state": ("state", state)}
    expected |= {GRADIENTS[name]: (name, d) for name, d in zip(leaves, grads, strict=True)}
    errors = {label: error(wide(axis, got[label]), y) for label, (axis, y) in expected.items()}
    return Checked(errors, _faults(case, errors, [name for name in got if not torch.equal(got[name], again[name])]))


def _faults(case: Case, errors: dict[str, float], differ: Iterable[str]) -> list[str]:
    # Nearly parallel keys reflected again and again, nothing forgotten: bfloat16 itself loses twice as much there.
    limit = LIMIT_FLOAT32 if case.dtype == "float32" else 2.5 * LIMIT if case.correlation else LIMIT
    wrong = [f"{name} is off by {e:.2g} (allowed {limit:.2g})" for name, e in errors.items() if not e < limit]
    return wrong + [f"{name} has other bits when run again" for name in differ]


def error(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().to(expected.device), expected.detach()
    difference = (actual.double() - expected.double()).square().mean().sqrt()
    return float(difference / expected.double().square().mean().sqrt().clamp_min(1e-6))
