"""The front end's kernels against its torch code in float64, and that against nn.functional: results, every gradient, errors.

Without a GPU the kernels run in Triton's interpreter, which is slow: shapes are small, and what depends on the compiler
(spills, NaN in minima, mixed pointer types) is not seen here.
"""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported; conftest does the same

import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.nn.functional as F
from deltaproduct_kernels import front_end
from torch import Tensor

from tests.kernels.helpers import assert_same, error

pytest.importorskip("triton")
from deltaproduct_kernels.triton_backend.front_end import tile_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK = tile_rows(32)
TOLERANCE = 2e-6
NAMES = ("q", "k", "v", "b", "a", "wq", "wk", "wv", "A_log", "dt_bias")
DOCUMENTS = [1, 2, 1, 20, 3, 13]  # of one token, shorter than W, across the edges of blocks
_ROOT = Path(__file__).resolve().parent.parent.parent


def inputs(
    T: int = 20, *, B: int = 2, H: int = 2, n: int = 2, dk: int = 16, dv: int = 24, W: int = 4, gated: bool = True
) -> dict[str, Any]:
    """Fresh random float32 inputs; W = 0: no convolution."""
    shapes: dict[str, tuple[int, ...]] = {
        "q": (B, T, H * dk),
        "k": (B, T, n * H * dk),
        "v": (B, T, n * H * dv),
        "b": (B, T, n * H),
    }
    if gated:
        shapes |= {"a": (B, T, H), "A_log": (H,), "dt_bias": (H,)}
    if W:
        shapes |= {f"w{x}": (shapes[x][-1], 1, W) for x in "qkv"}
    return {name: torch.randn(shape, device=DEVICE) for name, shape in shapes.items()} | {"heads": H}


def call(x: dict[str, Any], backend: str, max_beta: float = 2.0, **options: Any) -> dict[str, Tensor]:
    weights = tuple(x[name] for name in ("wq", "wk", "wv") if name in x)
    out = front_end(
        x["q"], x["k"], x["v"], x["b"], x.get("a"), weights or None, x.get("A_log"), x.get("dt_bias"),
        heads=x["heads"], max_beta=max_beta, backend=backend, **options,
    )  # fmt: skip
    return {name: y for name, y in zip(("q", "k", "v", "beta", "g"), out, strict=True) if y is not None}


def results(x: dict[str, Any], backend: str, **options: Any) -> dict[str, Tensor]:
    """Outputs and all gradients for a random cotangent, the same for every backend."""
    leaves = {name: y.detach().clone().requires_grad_() if isinstance(y, Tensor) else y for name, y in x.items()}
    out = call(leaves, backend, **options)
    generator = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) for y in out.values()]
    torch.autograd.backward(list(out.values()), cotangents)
    gradients = {f"d{name}": leaves[name].grad for name in NAMES if name in leaves}
    assert all(d is not None for d in gradients.values())
    return {**{name: y.detach() for name, y in out.items()}, **gradients}


def to(x: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {name: y.detach().to(dtype) if isinstance(y, Tensor) else y for name, y in x.items()}


def positions(lengths: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.cat([torch.arange(n, dtype=dtype) for n in lengths]).to(DEVICE)


def assert_equals_torch(x: dict[str, Any], **options: Any) -> None:
    assert_near(results(x, "triton", **options), results(to(x, torch.float64), "torch", **options), TOLERANCE)


def assert_near(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Relative to each result's size, but for sums over all tokens of one head, which may cancel to nothing."""
    got, expected = dict(got), dict(expected)
    for name in ("dA_log", "ddt_bias"):
        if name in expected:
            sums = got.pop(name).double(), expected.pop(name)
            torch.testing.assert_close(*sums, rtol=max(1e-5, tolerance), atol=max(1e-3, tolerance))
    assert_same(got, expected, tolerance)


# -- the torch code is the definition --------------------------------------------------------------------------------


def test_torch_equals_a_grouped_convolution_and_the_textbook_maps() -> None:
    x = to(inputs(9, n=3), torch.float64)
    got = call(x, "torch")
    for name, dim, unit in (("q", 16, True), ("k", 16, True), ("v", 24, False)):
        w = x[f"w{name}"]
        y = F.silu(F.conv1d(F.pad(x[name].mT, (3, 0)), w, groups=len(w)).mT).unflatten(-1, (-1, dim))
        expected = y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() if unit else y
        torch.testing.assert_close(got[name].flatten(2, -2), expected)
    torch.testing.assert_close(got["beta"].flatten(2), 2 * x["b"].sigmoid())
    torch.testing.assert_close(got["g"], -x["A_log"].exp() * F.softplus(x["a"] + x["dt_bias"]))
    assert {y.dtype for y in got.values()} == {torch.float64}
    assert (got["k"].shape, got["v"].shape, got["beta"].shape) == ((2, 9, 3, 2, 16), (2, 9, 3, 2, 24), (2, 9, 3, 2))


def test_gradcheck_of_every_input_of_the_torch_code() -> None:
    x = to(inputs(5, B=1, H=1, dk=2, dv=3, W=3), torch.float64)
    position = positions([1, 4])

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(call(x | dict(zip(NAMES, tensors, strict=True)), "torch", position=position).values())

    assert torch.autograd.gradcheck(function, tuple(x[name].requires_grad_() for name in NAMES))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_packed_documents_equal_each_document_alone(backend: str) -> None:
    x = inputs(sum(DOCUMENTS), B=1)
    packed = call(x, backend, position=positions(DOCUMENTS))
    start = 0
    for length in DOCUMENTS:
        part = {name: y[:, start : start + length] if name in ("q", "k", "v", "b", "a") else y for name, y in x.items()}
        for name, y in call(part, backend).items():
            torch.testing.assert_close(packed[name][:, start : start + length], y, rtol=1e-6, atol=1e-6)
        start += length


@pytest.mark.parametrize("cut", [1, 2, 5])
def test_a_sequence_in_two_parts_carries_its_tails(cut: int) -> None:
    x = to(inputs(9), torch.float64)
    tokens = ("q", "k", "v", "b", "a")
    second = {name: y[:, cut:] if name in tokens else y for name, y in x.items()}
    tails = tuple(F.pad(x[name], (0, 0, 3, 0))[:, cut : cut + 3] for name in ("q", "k", "v"))
    whole = call(x, "torch")
    for name, y in call(second, "auto", tails=tails).items():
        torch.testing.assert_close(y, whole[name][:, cut:])


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
def test_half_precision_is_rounded_once_and_no_garbage(backend: str, dtype: torch.dtype, tolerance: float) -> None:
    x = to(inputs(BLOCK + 1, B=1), dtype)
    x |= {name: x[name].float() for name in ("A_log", "dt_bias")}
    got, expected = results(x, backend), results(to(x, torch.float64), "torch")
    assert_near(got, expected, tolerance)
    for name in ("q", "k", "v"):  # the nearest number of that dtype, but for ties that float32 decides
        assert (got[name] != expected[name].to(dtype)).double().mean() < 2e-3, name
    wide = ("beta", "g", "dA_log", "ddt_bias")
    assert {name: y.dtype for name, y in got.items()} == {n: torch.float32 if n in wide else dtype for n in got}


# -- the kernels equal the torch code --------------------------------------------------------------------------------


def test_memory_that_nobody_wrote_is_not_a_number_here() -> None:
    """What lets all other tests see an output that a kernel left out."""
    assert torch.empty(3).isnan().all()


@pytest.mark.parametrize("gated", [True, False], ids=["gate", "no gate"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "whole rows"])
@pytest.mark.parametrize("W", [0, 2, 4])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_kernels_equal_torch_for_every_combination(n: int, W: int, packed: bool, gated: bool) -> None:
    T, options = (sum(DOCUMENTS), {"position": positions(DOCUMENTS)}) if packed else (7, {})
    x = inputs(T, B=1 if packed else 2, H=1 if packed else 2, n=n, W=W, gated=gated)
    assert_equals_torch(x, max_beta=1.0 if n == 1 else 2.0, **options)


@pytest.mark.parametrize("stretch", [0.05, 1.0])
def test_stretched_step_sizes_reach_both_ends_and_have_no_gradient_beyond_them(stretch: float) -> None:
    x = inputs(BLOCK + 1, B=1, n=3)
    x["b"] = 4 * x["b"]
    assert_equals_torch(x, beta_stretch=stretch)
    got, p = results(x, "triton", beta_stretch=stretch), (1 + 2 * stretch) * x["b"].double().sigmoid() - stretch
    beta = got["beta"].flatten(2)
    torch.testing.assert_close(beta.double(), 2 * p.clamp(0, 1), rtol=0, atol=TOLERANCE)
    low, high = p < -1e-6, p > 1 + 1e-6
    assert (int(low.sum()) > 0, int(high.sum()) > 0) == (True, True)
    assert (beta[low].abs().sum(), (beta[high] - 2).abs().sum(), got["db"][low | high].abs().sum()) == (0, 0, 0)


@pytest.mark.parametrize("W", [2, 4, 8])
@pytest.mark.parametrize("edge", ["one token", "a block of the backward pass", "one more", "a block", "one more than a block"])
def test_kernels_equal_torch_at_every_edge_of_a_block(edge: str, W: int) -> None:
    """Tiles have BLOCK rows, of which the backward pass shares W - 1 with the next block."""
    tokens = {
        "one token": 1,
        "a block of the backward pass": BLOCK - W + 1,
        "one more": BLOCK - W + 2,
        "a block": BLOCK,
        "one more than a block": BLOCK + 1,
    }
    assert_equals_torch(inputs(tokens[edge], B=1, H=1, n=1, W=W))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_no_tokens_at_all_have_zero_gradients(backend: str) -> None:
    got = results(inputs(0), backend)
    assert got["v"].shape == (2, 0, 2, 2, 24)
    assert all(got[f"d{name}"].eq(0).all() for name in ("wq", "wk", "wv", "A_log", "dt_bias"))


@pytest.mark.parametrize(("dk", "dv"), [(16, 256), (48, 40), (128, 64)])
def test_kernels_equal_torch_for_every_head_size(dk: int, dv: int) -> None:
    assert_equals_torch(inputs(18, B=1, H=2, n=1, dk=dk, dv=dv))


def test_the_widest_keys_which_are_16_bit() -> None:
    x = to(inputs(18, B=1, H=2, n=1, dk=256), torch.float16)
    assert_near(results(x, "triton"), results(to(x, torch.float64), "torch"), 5e-4)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_positions_of_either_integer_type(dtype: torch.dtype) -> None:
    assert_equals_torch(inputs(sum(DOCUMENTS), B=1, H=1), position=positions(DOCUMENTS, dtype))


def test_inputs_that_are_views_give_the_same() -> None:
    x = inputs(9)
    views = {name: torch.stack([y, y], -1)[..., 0] if isinstance(y, Tensor) else y for name, y in x.items()}
    assert not views["q"].is_contiguous()
    got, expected = call(views, "triton"), call(x, "triton")
    assert all(torch.equal(got[name], y) for name, y in expected.items())


def test_large_inputs_neither_overflow_nor_lose_the_slow_gates() -> None:
    """1 + e^x rounds to 1 long before a gate stops forgetting; e^x overflows at 89."""
    x = inputs(16, B=1, H=1)
    x["a"][0, :, 0] = torch.tensor([-100, -80, -40, -20, -15, -10, -7, -1e-3, 0, 1e-3, 5, 19, 21, 40, 100, 1e4])
    x["b"][0, :, 0] = x["a"][0, :, 0]
    x["A_log"].zero_()
    x["dt_bias"].zero_()
    got, expected = results(x, "triton"), results(to(x, torch.float64), "torch")
    normal = expected["g"].abs() > 1e-37
    torch.testing.assert_close(got["g"][normal].double(), expected["g"][normal], rtol=2e-6, atol=0)
    torch.testing.assert_close(got["beta"].double(), expected["beta"], rtol=2e-6, atol=1e-37)
    assert_near(got, expected, TOLERANCE)


def test_a_key_of_zeros_has_a_finite_gradient() -> None:
    x = inputs(6, W=0)
    x["k"][:, 2] = 0
    assert_equals_torch(x)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("sick", [1, 3], ids=["of two tokens", "of twenty"])
def test_not_a_number_stays_in_its_own_document(backend: str, sick: int) -> None:
    x = inputs(sum(DOCUMENTS), B=1)
    start = sum(DOCUMENTS[:sick])
    inside = torch.zeros(sum(DOCUMENTS), dtype=torch.bool, device=DEVICE)
    inside[start : start + DOCUMENTS[sick]] = True
    for name in ("q", "k", "v", "b", "a"):
        x[name][:, start + DOCUMENTS[sick] - 1] = math.nan  # the last one, next to the next document
    got = results(x, backend, position=positions(DOCUMENTS))
    for name in ("q", "k", "v", "beta", "g", "dq", "dk", "dv", "db", "da"):
        assert got[name][:, inside].isnan().any(), name
        assert got[name][:, ~inside].isfinite().all(), name


def test_a_gradient_that_is_not_a_number_stays_in_its_own_document() -> None:
    x = inputs(sum(DOCUMENTS), B=1)
    start = sum(DOCUMENTS[:3])
    x["v"].requires_grad_()
    out = call(x, "triton", position=positions(DOCUMENTS))["v"]
    d = torch.ones_like(out)
    d[:, start] = math.nan  # a document's first token
    out.backward(d)
    assert x["v"].grad[:, start].isnan().all()
    assert x["v"].grad[:, :start].isfinite().all()


def test_two_runs_give_the_same_bits() -> None:
    x = inputs(2 * BLOCK + 3, B=1, H=1)
    first, second = results(x, "triton"), results(x, "triton")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_only_some_outputs_are_used() -> None:
    x = inputs(7)
    x["q"].requires_grad_()
    x["wk"].requires_grad_()
    call(x, "triton")["q"].sum().backward()
    reference = to(x, torch.float64)
    reference["q"].requires_grad_()
    call(reference, "torch")["q"].sum().backward()
    assert error(x["q"].grad, reference["q"].grad) < 1e-5
    assert torch.equal(x["wk"].grad, torch.zeros_like(x["wk"]))


# -- as a node of torch.compile --------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiles_into_one_full_graph_with_equal_gradients(backend: str, gated: bool) -> None:
    x = inputs(10, B=1, H=1, gated=gated)
    position = positions([3, 7])
    for name in NAMES:
        if name in x:
            x[name].requires_grad_()
    leaves = [x[name] for name in NAMES if name in x]

    def function(x: dict[str, Any]) -> list[Tensor]:
        return list(call(x, backend, position=position).values())

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got, expected = compiled(x), function(x)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    cotangents = [torch.randn_like(y) for y in expected]
    mine, theirs = torch.autograd.grad(got, leaves, cotangents), torch.autograd.grad(expected, leaves, cotangents)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("whole", "dtype"), [(True, torch.bfloat16), (False, torch.float32)], ids=["everything", "nothing optional"]
)
def test_the_operators_pass_torchs_own_checks(whole: bool, dtype: torch.dtype) -> None:
    x = to(inputs(5, B=1, H=1, n=1, W=4 if whole else 0, gated=whole), dtype)
    tensors = [x[name].requires_grad_() if name in x else None for name in NAMES]
    arguments = (*tensors, positions([2, 3]) if whole else None, 1, 1, 2.0, 0.1)
    torch.library.opcheck(torch.ops.deltaproduct.front_end, arguments)
    grads = [torch.randn_like(y) for y in call(x, "triton").values()]
    plain = [None if y is None else y.detach() for y in arguments[:11]]
    gradients = (*grads, *[None] * (5 - len(grads)))
    torch.library.opcheck(torch.ops.deltaproduct.front_end_backward, (*gradients, *plain, 1, 1, 2.0, 0.1))


# -- errors, and what is imported ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 8)}, "q has shape (2, 8); expected [B, T, channels], channels a multiple of heads = 2"),
        ({"q": torch.zeros(2, 8, 33)}, "q has shape (2, 8, 33); expected [B, T, channels], channels a multiple of heads = 2"),
        ({"k": torch.zeros(2, 8, 40)}, "k has shape (2, 8, 40); expected [2, 8, n * 32] with n from 1 to 8 to fit q"),
        ({"v": torch.zeros(2, 7, 96)}, "v has shape (2, 7, 96); expected [2, 8, channels], a multiple of n * heads = 4"),
        ({"b": torch.zeros(2, 8, 2)}, "b has shape (2, 8, 2); expected (2, 8, 4)"),
        ({"a": None}, "A_log is given, but a is not"),
        ({"dt_bias": None}, "dt_bias is missing, but a is not"),
        ({"A_log": torch.zeros(3)}, "A_log has shape (3,); expected (2,)"),
        ({"A_log": torch.zeros(2, dtype=torch.int32)}, "A_log has dtype torch.int32; expected one of torch.float64"),
        ({"conv_weights": [torch.zeros(32, 1, 4)]}, "conv_weights has 1 tensors; expected 3, for q, k and v"),
        ({"conv_weights": [torch.zeros(32, 1, 9)] * 3}, "conv_weights have W = 9 taps; from 2 to 8 are allowed"),
        ({"conv_weights": [torch.zeros(32, 1, 4)] * 3}, "conv_weights[1] has shape (32, 1, 4); expected (64, 1, 4)"),
        ({"position": torch.zeros(8, dtype=torch.int64)}, "position packs documents into one row, but q has B = 2 rows"),
        ({"tails": [torch.zeros(2, 2, 32)] * 3}, "tails[0] has shape (2, 2, 32); expected (2, 3, 32)"),
        ({"tails": [torch.zeros(2, 3, 32)] * 3, "conv_weights": None}, "tails are given, but conv_weights is not"),
        ({"b": torch.zeros(2, 8, 4, device="meta")}, "b is on meta, but q is on"),
        ({"heads": 0}, "heads = 0; at least 1 is needed"),
        ({"max_beta": 3.0}, "max_beta = 3.0; above 0 and up to 2 is allowed"),
        ({"beta_stretch": -0.1}, "beta_stretch = -0.1; from 0 to 1 is allowed"),
        ({"backend": "cuda"}, "backend = 'cuda' is not available"),
        ({"q": torch.zeros(2, 8, 32).double(), "backend": "triton"}, "q has dtype torch.float64; allowed are float32"),
        ({"k": torch.zeros(2, 8, 64).half(), "backend": "triton"}, "k has dtype torch.float16, but q torch.float32"),
        ({"b": torch.zeros(2, 8, 4).double(), "backend": "triton"}, "b has dtype torch.float64; backend 'triton' takes"),
    ],
)
def test_errors_name_the_argument_its_value_and_what_is_allowed(change: dict[str, Any], message: str) -> None:
    x = inputs(8)
    x["conv_weights"] = tuple(x.pop(name) for name in ("wq", "wk", "wv"))
    x |= {"max_beta": 2.0} | change
    x = {name: y.to(DEVICE) if isinstance(y, Tensor) and not y.is_meta else y for name, y in x.items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        front_end(**x)


def test_positions_and_tails_that_a_backend_cannot_take_are_refused() -> None:
    with pytest.raises(
        ValueError, match=re.escape("position has dtype torch.float32; expected one of torch.int32, torch.int64")
    ):
        call(inputs(8, B=1), "torch", position=torch.zeros(8, device=DEVICE))
    x = inputs(8)
    tails = tuple(torch.zeros(2, 3, x[name].shape[-1], device=DEVICE) for name in ("q", "k", "v"))
    with pytest.raises(ValueError, match=re.escape("tails are given (3 tensors), which backend 'triton' cannot take")):
        call(x, "triton", tails=tails)


def test_the_package_computes_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from deltaproduct_kernels import front_end\n"
        "x = torch.randn(1, 3, 32)\n"
        "front_end(x, x, x, torch.randn(1, 3, 2), None, None, None, None, heads=2, max_beta=1.0)\n"
    )
    path = os.pathsep.join(["kernels", *filter(None, [os.environ.get("PYTHONPATH")])])
    subprocess.run([sys.executable, "-c", code], check=True, cwd=_ROOT, env={**os.environ, "PYTHONPATH": path}, timeout=600)
