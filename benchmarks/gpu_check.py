"""Are the kernels right? Every head size, n, dtype and option against the float64 recurrence, and again for equal bits."""

from __future__ import annotations

from typing import Any

import torch
from deltaproduct_kernels import gated_delta_product
from deltaproduct_kernels.check import GRADIENTS, LIMIT, Case, error, inputs, make, sizes, step, upstream
from deltaproduct_kernels.check import check as check_case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def cases(smoke: bool) -> list[Case]:
    if smoke:
        return [Case(16, 32, 2, "float32", T=40, B=1), Case(16, 16, 1, "float16", T=40, B=1)]
    out = sizes()
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


def check(case: Case, smoke: bool = False) -> dict[str, Any]:
    """Errors of outputs and gradients against the recurrence in float64, and whether a second run gives the same bits."""
    if case.T > 10_000:
        return check_offsets(case)
    torch.set_num_threads(1)
    checked = check_case(case, DEVICE)
    return {**checked.errors, "fault": ", ".join(checked.faults)}


def check_offsets(case: Case) -> dict[str, Any]:
    """More than 2^31 elements of k: the last row must come out as it does alone, but for where long rows are cut."""
    rows = [make(1, case.T, case.H, case.n, case.dk, case.dv, device=DEVICE, gate=case.gate) for _ in range(case.B)]
    x: dict[str, Any] = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    with torch.no_grad():
        o, _ = gated_delta_product(**x, backend="triton")
        last, _ = gated_delta_product(**rows[-1], backend="triton")
    difference = error(o[-1:], last)
    return {"o": difference, "fault": "" if difference < LIMIT else f"another last row with {x['k'].numel():,} elements of k"}


def repeated(smoke: bool) -> list[Case]:
    """What is trained: B 12, T 4096, 8 heads."""
    if smoke:
        return [Case(32, 32, 2, "float32", B=1, T=40)]
    batch: dict[str, Any] = {"B": 12, "T": 4096, "H": 8}
    steps = ((2, 0.05), (2, None), (1, 0.05), (3, 0.05), (4, 0.05))
    main = [Case(128, 128, n, "bfloat16", gate=gate, **batch) for n, gate in steps]
    return main + [Case(dk, dv, 2, "bfloat16", **batch) for dk, dv in ((64, 64), (32, 32), (64, 128))]


def repeat(case: Case, smoke: bool = False) -> dict[str, Any]:
    """How many of 50 runs gave other bits than the first, and how far the last row is from the torch backend in float32."""
    x = inputs(case, DEVICE)
    do, dfinal = upstream(x)
    assert dfinal is not None
    first = step(case, x, do, dfinal)
    differ: dict[str, int] = {}
    for _ in range(2 if smoke else 50):
        for name, y in step(case, x, do, dfinal).items():
            differ[name] = differ.get(name, 0) + (not torch.equal(y, first[name]))
    wide: dict[str, Any] = {name: y[-1:].float().requires_grad_() for name, y in x.items()}
    slow_o, slow_state = gated_delta_product(**wide, output_final_state=True, backend="torch")
    assert slow_state is not None
    grads = torch.autograd.grad([slow_o, slow_state], list(wide.values()), [do[-1:].float(), dfinal[-1:]])
    expected = {"o": slow_o, "state": slow_state, **dict(zip((GRADIENTS[name] for name in wide), grads, strict=True))}
    errors = {f"{name} (last row)": error(first[name][-1:], y) for name, y in expected.items()}
    wrong = [name for name, count in differ.items() if count]
    bad = [name for name, e in errors.items() if not e < LIMIT]
    return {**errors, "fault": ", ".join(bad + [f"{differ[name]} times other bits in {name}" for name in wrong])}


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
