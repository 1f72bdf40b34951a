"""Convolution, SiLU, unit length and the gates: the torch definition by hand, and the Triton kernels against it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from deltaproduct_kernels import front_end
from torch import Tensor

from tests.kernels.helpers import assert_same, error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TENSORS = ("q", "k", "v", "b", "a", "wq", "wk", "wv", "A_log", "dt_bias")
LENGTHS = [1, 2, 3, 30, 1, 33]  # documents shorter than the convolution, and longer than a tile


def make(
    T: int = 70,
    *,
    B: int = 1,
    H: int = 2,
    n: int = 2,
    dk: int = 16,
    dv: int = 24,
    W: int = 4,
    gated: bool = True,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {"q": (B, T, H * dk), "k": (B, T, n * H * dk), "v": (B, T, n * H * dv)}
    shapes["b"] = (B, T, n * H)
    if gated:
        shapes |= {"a": (B, T, H), "A_log": (H,), "dt_bias": (H,)}
    if W:
        shapes |= {"wq": (H * dk, 1, W), "wk": (n * H * dk, 1, W), "wv": (n * H * dv, 1, W)}
    single = ("A_log", "dt_bias")
    return {
        name: torch.randn(shape, device=DEVICE).to(torch.float32 if name in single else dtype).requires_grad_()
        for name, shape in shapes.items()
    }


def run(x: dict[str, Tensor], backend: str, heads: int = 2, max_beta: float = 2.0, **options: Any) -> dict[str, Tensor]:
    q, k, v, b, a, wq, wk, wv, A_log, dt_bias = (x.get(name) for name in TENSORS)
    weights: Any = () if wq is None else (wq, wk, wv)
    out = front_end(q, k, v, b, a, weights, A_log, dt_bias, heads=heads, max_beta=max_beta, backend=backend, **options)  # type: ignore[arg-type]
    return {name: y for name, y in zip(("q", "k", "v", "beta", "g"), out, strict=True) if y is not None}


def results(x: dict[str, Tensor], backend: str, **options: Any) -> dict[str, Tensor]:
    """Outputs, and gradients of every input for a fixed cotangent."""
    leaves = {name: y.detach().clone().requires_grad_() for name, y in x.items()}
    out = run(leaves, backend, **options)
    generator = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(y.shape, generator=generator).to(y) for y in out.values()]
    torch.autograd.backward(list(out.values()), cotangents)
    return {**{name: y.detach() for name, y in out.items()}, **{f"d{name}": y.grad for name, y in leaves.items()}}  # type: ignore[dict-item]


def in_float64(x: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: y.detach().double() for name, y in x.items()}


def documents() -> Tensor:
    return torch.cat([torch.arange(length) for length in LENGTHS]).to(DEVICE)


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({"n": 1}, id="one step"),
        pytest.param({"n": 3, "B": 2}, id="three steps, two rows"),
        pytest.param({"W": 0}, id="no convolution"),
        pytest.param({"W": 2, "gated": False}, id="two taps, no gate"),
        pytest.param({"W": 8, "dk": 32, "dv": 16}, id="eight taps, dk > dv"),
        *(pytest.param({"T": T}, id=f"{T} tokens") for T in (1, 29, 30, 32, 33)),
    ],
)
def test_the_kernels_equal_the_definition(sizes: dict) -> None:
    x = make(**sizes)
    assert_same(results(x, "triton"), results(in_float64(x), "torch"), 2e-6)


@pytest.mark.parametrize("W", [0, 2, 4])
def test_the_convolution_stops_at_document_starts(W: int) -> None:
    x = make(sum(LENGTHS), W=W)
    together = results(x, "triton", position=documents())
    assert_same(together, results(in_float64(x), "torch", position=documents()), 2e-6)
    ends = list(itertools.accumulate(LENGTHS))
    for start, end in zip([0, *ends], ends, strict=False):
        part = {name: y[:, start:end] if name in ("q", "k", "v", "b", "a") else y for name, y in x.items()}
        alone = run(part, "torch")
        for name, y in alone.items():
            torch.testing.assert_close(together[name][:, start:end], y.detach())


def test_not_a_number_stays_in_its_own_document() -> None:
    x = make(sum(LENGTHS))
    for name in ("q", "k", "v"):
        x[name].data[:, 4] = torch.nan  # in the third document
    got = results(x, "triton", position=documents())
    for name in ("q", "k", "v", "dq", "dk", "dv"):
        assert got[name][:, :3].isfinite().all(), name
        assert got[name][:, 6:].isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_comes_back_in_its_dtype_and_near(dtype: torch.dtype) -> None:
    x = make(dtype=dtype)
    got = results(x, "triton")
    assert_same(got, results(in_float64(x), "torch"), 1e-2)
    assert {name: got[name].dtype for name in ("q", "k", "v", "beta", "g")} == {
        **dict.fromkeys("qkv", dtype), "beta": torch.float32, "g": torch.float32,
    }  # fmt: skip
    assert {name: got[f"d{name}"].dtype for name in x} == {name: y.dtype for name, y in x.items()}


@pytest.mark.parametrize("a", [-100.0, -20.0, 20.1, 100.0])
def test_the_gate_is_stable_far_out(a: float) -> None:
    x = make(5)
    x["a"].data.fill_(a)
    got, expected = results(x, "triton"), results(in_float64(x), "torch")
    assert error(got["g"], expected["g"]) < 1e-5
    assert all(got[name].isfinite().all() for name in ("dA_log", "da", "ddt_bias"))


def test_the_definition_is_convolution_silu_and_unit_length() -> None:
    x = in_float64(make(9, B=1))
    got = run(x, "torch")
    conv = F.conv1d(F.pad(x["k"].mT, (3, 0)), x["wk"], groups=x["k"].shape[-1]).mT
    k = F.silu(conv).view(1, 9, 2, 2, 16)
    torch.testing.assert_close(got["k"], F.normalize(k, dim=-1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got["beta"], 2 * x["b"].sigmoid().view(1, 9, 2, 2))
    torch.testing.assert_close(got["g"], -x["A_log"].exp() * F.softplus(x["a"] + x["dt_bias"]))


@pytest.mark.parametrize("cut", [1, 2, 5])
def test_tails_continue_a_row(cut: int) -> None:
    x = in_float64(make(9))
    whole = run(x, "torch")
    rest = {name: y[:, cut:] if name in ("q", "k", "v", "b", "a") else y for name, y in x.items()}
    tails = [F.pad(x[name], (0, 0, 3, 0))[:, cut : cut + 3] for name in ("q", "k", "v")]
    for name, y in run(rest, "torch", tails=tails).items():
        torch.testing.assert_close(y, whole[name][:, cut:])


@pytest.mark.parametrize("given", [{"gated": True}, {"gated": False, "W": 0}])
def test_the_operator_passes_torchs_own_checks(given: dict) -> None:
    x = make(20, **given)
    arguments = [x.get(name) for name in TENSORS]
    torch.library.opcheck(torch.ops.deltaproduct.front_end, (*arguments, None, 2, 2.0))


def test_compiles_into_one_full_graph() -> None:
    x = make(20)
    compiled = torch.compile(lambda x: run(x, "triton"), fullgraph=True, backend="aot_eager")(x)
    for name, y in run(x, "triton").items():
        torch.testing.assert_close(compiled[name], y)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.randn(1, 5, 33)}, r"q has shape \(1, 5, 33\); .* a multiple of heads = 2"),
        ({"k": torch.randn(1, 5, 40)}, r"k has shape \(1, 5, 40\); expected \[1, 5, n \* 32\]"),
        ({"v": torch.randn(1, 5, 42)}, r"v has shape \(1, 5, 42\); .* a multiple of n \* heads = 4"),
        ({"b": torch.randn(1, 5, 2)}, r"b has shape \(1, 5, 2\); expected \(1, 5, 4\)"),
        ({"A_log": None}, "A_log is missing, but a is not: a, A_log and dt_bias go together"),
        ({"a": None}, "A_log is given, but a is not"),
        ({"wk": torch.randn(64, 1, 3)}, r"conv_weights of k have shape \(64, 1, 3\); expected \[64, 1, W\]"),
        ({"position": torch.arange(4)}, r"position has shape \(4,\) for B = 1 rows; expected \[5\] and one row"),
    ],
)
def test_wrong_arguments_are_named(change: dict, message: str) -> None:
    options = {"position": change.pop("position")} if "position" in change else {}
    x = {name: y.detach().cpu() for name, y in make(5).items()} | change
    with pytest.raises(ValueError, match=message):
        run({name: y for name, y in x.items() if y is not None}, "torch", **options)
