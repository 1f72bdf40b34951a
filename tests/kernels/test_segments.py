"""Summaries of a segment against the float64 recurrence: the map of the state, and the adjoint of its start."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deltaproduct_kernels import gated_delta_product, native, segment_adjoint, segment_flops, segment_summary
from deltaproduct_kernels.triton_backend import segments
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.kernels.helpers import assert_same, in_float64, make

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def expected(x: dict[str, Tensor], do: Tensor, erase: bool) -> dict[str, Tensor]:
    """What a state becomes over the rows, and the initial state's gradient, by the recurrence and autograd in float64."""
    wide = {name: y.requires_grad_() for name, y in in_float64(x).items()}
    o, final = gated_delta_product(**wide, output_final_state=True, erase=erase, backend="recurrent")  # type: ignore[arg-type]
    return {"final": final, "dinitial": torch.autograd.grad(o, wide["initial_state"], do.to(o.dtype))[0]}


def summarised(x: dict[str, Tensor], M: Tensor, N: Tensor, dS: Tensor) -> dict[str, Tensor]:
    S = x["initial_state"].to(M.dtype)
    return {"final": (M @ S if M.shape[-1] > 1 else M * S) + N, "dinitial": dS}


def compare(x: dict[str, Tensor], backend: str, tolerance: float, erase: bool = True) -> None:
    do = torch.randn_like(x["v"][:, :, 0])
    M, N = segment_summary(x["k"], x["v"], x["beta"], x.get("g"), erase=erase, backend=backend)
    dS = segment_adjoint(do, x["q"], x["k"], x["beta"], x.get("g"), erase=erase, backend=backend)
    assert_same(summarised(x, M, N, dS), expected(x, do, erase), tolerance)


@pytest.mark.usefixtures("either_path")
@pytest.mark.parametrize("backend", ["torch", "recurrent"])
@pytest.mark.parametrize("erase", [True, False], ids=["delta", "linear attention"])
@pytest.mark.parametrize("gate", [None, 0.3, 10.0])
@pytest.mark.parametrize(("n", "T"), [(1, 1), (1, 70), (2, 33), (3, 70)])
def test_a_summary_and_an_adjoint_are_those_of_the_recurrence(
    n: int, T: int, gate: float | None, erase: bool, backend: str
) -> None:
    compare(make(T, n=n, gate=gate), backend, 1e-10, erase)


@pytest.mark.usefixtures("either_path")
@pytest.mark.parametrize("beta", [0.0, 1e-4, 2.0, (1.9, 2.0)])
def test_step_sizes_that_hurt(beta: float | tuple[float, float]) -> None:
    compare(make(70, beta=beta, dk=64, correlation=0.5, gate=None), "torch", 1e-9)


@pytest.mark.usefixtures("either_path")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_lower_precisions_are_summed_up_in_float32(dtype: torch.dtype, tolerance: float) -> None:
    x = make(130, dk=32, dv=32, dtype=dtype)
    compare(x, "torch", tolerance)
    M, N = segment_summary(x["k"], x["v"], x["beta"], x["g"], backend="torch")
    assert (M.dtype, N.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize(("gate", "erase"), [(0.1, True), (None, True), (0.1, False)])
@pytest.mark.parametrize(("n", "T", "part"), [(1, 40, None), (1, 40, 16), (2, 20, 8), (3, 3, None), (3, 6, None), (3, 14, 5)])
def test_the_kernels_sum_up_rows_of_two_parts_and_of_more(
    n: int, T: int, part: int | None, gate: float | None, erase: bool
) -> None:
    """Chunks have 16, 8 and 5 tokens: rows of one chunk and less too."""
    x = make(T, n=n, gate=gate, B=2, H=1, dk=16, dv=32, dtype=torch.float32)
    x = {name: y.detach().to(DEVICE) for name, y in x.items()}
    do = torch.randn_like(x["v"][:, :, 0])
    k, v, beta, g = x["k"], x["v"], x["beta"], x.get("g")
    M, N = segments.summary(k, v, beta, g, erase, 32, part=part)
    dS = segments.adjoint(do, x["q"], k, beta, g, 16**-0.5, erase, 32, part=part)
    assert_same(summarised(x, M, N, dS), expected(x, do, erase), 5e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernels_are_reached_by_name(dtype: torch.dtype) -> None:
    x = {name: y.detach().to(DEVICE) for name, y in make(40, H=1, dk=16, dv=32, dtype=dtype).items()}
    compare(x, "triton", 5e-6 if dtype == torch.float32 else 2e-2)
    compare(x, "triton", 5e-6 if dtype == torch.float32 else 2e-2, erase=False)


def test_tokens_masked_by_zeros_leave_no_trace() -> None:
    x = {name: y.detach() for name, y in make(70).items()}
    kept = torch.arange(70) >= 41
    mask = {"beta": kept[:, None, None], "g": kept[:, None]}
    for backend in ("torch", "recurrent"):
        masked = segment_summary(x["k"], x["v"], x["beta"] * mask["beta"], x["g"] * mask["g"], backend=backend)
        alone = segment_summary(x["k"][:, 41:], x["v"][:, 41:], x["beta"][:, 41:], x["g"][:, 41:], backend=backend)
        for got, wanted in zip(masked, alone, strict=True):
            torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("erase", [True, False])
@pytest.mark.parametrize(("n", "dk"), [(1, 8), (2, 64), (4, 16)])
def test_flops_are_those_torch_counts(n: int, dk: int, erase: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda device, dtype: False)  # torch's counter does not see C
    x = make(64, n=n, dk=dk, gate=None)
    counts = []
    calls: list[Any] = [
        lambda: segment_summary(x["k"], x["v"], x["beta"], erase=erase, backend="torch"),
        lambda: segment_adjoint(torch.randn_like(x["v"][:, :, 0]), x["q"], x["k"], x["beta"], erase=erase, backend="torch"),
    ]
    for call in calls:
        with FlopCounterMode(display=False) as counter:
            call()
        counts.append(counter.get_total_flops())
    assert tuple(counts) == segment_flops(x["k"].shape, x["v"].shape, erase=erase)


def test_a_wrong_shape_is_named() -> None:
    x = make(10)
    with pytest.raises(ValueError, match="k has shape"):
        segment_summary(x["q"], x["v"], x["beta"])
    with pytest.raises(ValueError, match="beta has shape"):
        segment_summary(x["k"], x["v"], x["beta"][:, :-1])
    with pytest.raises(ValueError, match="do has shape"):
        segment_adjoint(x["v"][:, :-1, 0], x["q"], x["k"], x["beta"])
