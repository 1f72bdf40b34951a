"""Heads that share queries and keys: H of v, beta and g over G of q and k, against the ungrouped recurrence in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deltaproduct_kernels import front_end, gated_delta_product, segment_adjoint, segment_summary
from deltaproduct_kernels.check import Case, check
from deltaproduct_kernels.triton_backend import launch, ops, segments
from deltaproduct_kernels.triton_backend.layout import EVERY
from torch import Tensor

from tests.kernels.helpers import CU_SEQLENS, assert_same, error, in_float64, make, results, run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPERATOR = ("q", "k", "v", "beta", "g", "initial_state")


@pytest.fixture(autouse=True)
def tiles_of_64_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted, float32 tensors stand for 16-bit ones."""
    if DEVICE == "cpu":
        monkeypatch.setattr(ops, "bits", lambda x: 16)


def inputs(T: int = 40, **options: Any) -> dict[str, Tensor]:
    """Sizes that kernels take, in float32."""
    made = make(T, **{"B": 1, "H": 4, "groups": 2, "dk": 16, "dv": 32, "dtype": torch.float32} | options)
    return {name: x.detach().to(DEVICE).requires_grad_() for name, x in made.items()}


def repeated(x: dict[str, Tensor]) -> dict[str, Tensor]:
    """Queries and keys copied to each head of their group: q[..., h] is q[..., h // (H // G)]."""
    each = x["v"].shape[3] // x["k"].shape[3]
    return x | {name: x[name].repeat_interleave(each, -2) for name in ("q", "k")}


def definition(x: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Outputs and gradients of the ungrouped recurrence in float64; those of q and k added up over the heads of a group."""
    wide = results(repeated(in_float64(x)), "recurrent", **options)
    G = x["q"].shape[2]
    return wide | {name: wide[name].unflatten(-2, (G, -1)).sum(-2) for name in ("dq", "dk")}


@pytest.mark.usefixtures("either_path")
@pytest.mark.parametrize("backend", ["recurrent", "torch"])
@pytest.mark.parametrize(("H", "groups"), [(4, 1), (4, 2), (6, 3), (3, 3)])
@pytest.mark.parametrize("gate", [None, 0.3])
@pytest.mark.parametrize("erase", [True, False], ids=["delta", "linear attention"])
def test_a_group_is_its_queries_and_keys_repeated(backend: str, H: int, groups: int, gate: float | None, erase: bool) -> None:
    x = make(40, H=H, groups=groups, gate=gate, n=3)
    assert_same(results(x, backend, erase=erase), definition(x, erase=erase), 1e-10)


@pytest.mark.parametrize(("H", "groups"), [(4, 1), (4, 2), (6, 3)])
@pytest.mark.parametrize(("gate", "erase"), [(0.3, True), (None, True), (0.3, False)])
def test_the_kernels_read_a_group(H: int, groups: int, gate: float | None, erase: bool) -> None:
    x = inputs(H=H, groups=groups, gate=gate)
    assert_same(results(x, "triton", erase=erase), definition(x, erase=erase), 5e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_heads_of_128_and_64_with_three_steps(dtype: torch.dtype) -> None:
    x = inputs(45, n=3, dk=128, dv=64, dtype=dtype)
    x["initial_state"] = x["initial_state"].detach().float().requires_grad_()
    assert_same(results(x, "triton"), definition(x), 5e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("backend", ["recurrent", "torch", "triton"])
def test_packed_sequences_of_grouped_heads(backend: str) -> None:
    x, cu_seqlens = inputs(103, states=8), torch.tensor(CU_SEQLENS, device=DEVICE)
    assert_same(results(x, backend, cu_seqlens=cu_seqlens), definition(x, cu_seqlens=cu_seqlens), 5e-6)


def test_grouped_sequences_cut_among_programs_are_the_same_sequences() -> None:
    x = inputs(150, H=2, groups=1, dv=16)
    q, k, v, beta, g, state = (x[name].detach() for name in OPERATOR)
    part = 16 * EVERY
    o, final, saved = launch.forward(q, k, v, beta, g, state, None, 0.25, True, True, 32, part=part)
    do, dfinal = torch.randn_like(o), torch.randn_like(final)
    got = launch.backward(do, dfinal, q, k, v, beta, g, saved, None, 0.25, True, 32, part=part)
    leaves = {name: y.requires_grad_() for name, y in in_float64(x).items()}
    wanted = run(repeated(leaves), "recurrent", scale=0.25)
    gradients = torch.autograd.grad(wanted, [leaves[name] for name in OPERATOR], [do.double(), dfinal.double()])
    assert_same(
        dict(zip(["o", "final", *OPERATOR], [o, final, *got], strict=True)),
        dict(zip(["o", "final", *OPERATOR], [*wanted, *gradients], strict=True)),
        5e-6,
    )


@pytest.mark.parametrize("backend", ["recurrent", "torch", "triton", "auto"])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("gate", [None, 0.3])
def test_decoding_grouped_heads(backend: str, tokens: int, gate: float | None) -> None:
    x = {name: y.detach() for name, y in inputs(tokens, B=2, gate=gate, dk=24, dv=40).items()}
    for got, expected in zip(run(x, backend), run(repeated(in_float64(x)), "recurrent"), strict=True):
        assert error(got, expected) < 5e-6


# -- segments -------------------------------------------------------------------------------------------------------------


def summed_up(x: dict[str, Tensor], do: Tensor, backend: str, erase: bool) -> dict[str, Tensor]:
    M, N = segment_summary(x["k"], x["v"], x["beta"], x.get("g"), erase=erase, backend=backend)
    return {"M": M, "N": N, "D": segment_adjoint(do, x["q"], x["k"], x["beta"], x.get("g"), erase=erase, backend=backend)}


@pytest.mark.parametrize("backend", ["recurrent", "torch", "triton"])
@pytest.mark.parametrize(("gate", "erase"), [(0.3, True), (None, True), (0.3, False)])
def test_segments_of_grouped_heads_are_summed_up(backend: str, gate: float | None, erase: bool) -> None:
    x = {name: y.detach() for name, y in inputs(gate=gate).items()}
    do = torch.randn_like(x["v"][:, :, 0])
    expected = summed_up(repeated(in_float64(x)), do.double(), "recurrent", erase)
    assert_same(summed_up(x, do, backend, erase), expected, 5e-6)


@pytest.mark.parametrize("part", [None, 8])
def test_the_kernels_sum_up_grouped_segments_in_parts(part: int | None) -> None:
    x = {name: y.detach() for name, y in inputs(20).items()}
    do = torch.randn_like(x["v"][:, :, 0])
    M, N = segments.summary(x["k"], x["v"], x["beta"], x["g"], True, 32, part=part)
    D = segments.adjoint(do, x["q"], x["k"], x["beta"], x["g"], 16**-0.5, True, 32, part=part)
    expected = summed_up(repeated(in_float64(x)), do.double(), "recurrent", True)
    assert_same({"M": M, "N": N, "D": D}, expected, 5e-6)


# -- what a run relies on --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_sums_over_a_group_have_the_same_bits_each_time(backend: str) -> None:
    x = inputs(40, H=3, groups=1)
    first, second = results(x, backend), results(x, backend)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 4e-3), (torch.bfloat16, 2e-2)])
def test_gradients_of_a_group_come_in_the_dtype_of_its_keys(backend: str, dtype: torch.dtype, tolerance: float) -> None:
    x = inputs(70, dtype=dtype)
    x["initial_state"] = x["initial_state"].detach().float().requires_grad_()
    got = results(x, backend)
    assert {got["dq"].dtype, got["dk"].dtype} == {dtype}
    assert_same(got, definition(x), tolerance, least=torch.finfo(dtype).tiny)


def test_the_kernels_read_the_callers_keys_and_no_copy_of_them() -> None:
    read = set()

    class Reader(launch.Runner):
        def __call__(self, kernel: Any, grid: int, config: Any, **arguments: Any) -> None:
            read.update(arguments[name].data_ptr() for name in ("q", "k") if arguments.get(name) is not None)
            super().__call__(kernel, grid, config, **arguments)

    x = {name: y.detach() for name, y in inputs().items()}
    launch.forward(*(x[name] for name in OPERATOR), None, 0.25, True, True, 16, run=Reader(90, 132))
    assert read == {x["q"].data_ptr(), x["k"].data_ptr()}


@pytest.mark.parametrize("name", ["chunk", "triton_chunk"])
def test_the_operators_pass_torchs_own_checks(name: str) -> None:
    x = inputs(20)
    arguments = (*(x[name] for name in OPERATOR), None, 0.3, True)
    operator = getattr(torch.ops.deltaproduct, name).default
    torch.library.opcheck(operator, arguments + ((True,) if name == "triton_chunk" else ()))


def test_the_decoding_operator_passes_torchs_own_checks() -> None:
    plain = tuple(y.detach() for y in (inputs(2)[name] for name in OPERATOR))
    torch.library.opcheck(torch.ops.deltaproduct.triton_decode, (*plain, 0.3, True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_checks_the_kernels_of_its_groups(dtype: str) -> None:
    checked = check(Case(16, 32, 2, dtype, T=9, B=1, H=6, groups=3), DEVICE)
    assert checked.faults == []


def test_a_gradient_that_lacks_a_head_of_its_group_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "by_group", lambda d, G: d.unflatten(-2, (G, -1))[..., 0, :])
    faults = check(Case(16, 32, 2, "float32", T=9, B=1, H=4, groups=2), DEVICE).faults
    assert [fault.split()[0] for fault in faults] == ["dq", "dk"]


@pytest.mark.parametrize(("H", "groups"), [(3, 2), (2, 4), (1, 2)])
def test_heads_that_are_no_multiple_of_the_groups_are_refused_in_one_sentence(H: int, groups: int) -> None:
    x = make(5, H=H, groups=groups)
    message = f"^v has H = {H} heads, but q has G = {groups}: H must be a multiple of G$"
    with pytest.raises(ValueError, match=message):
        gated_delta_product(**x)
    with pytest.raises(ValueError, match=message):
        segment_summary(x["k"], x["v"], x["beta"])
    with pytest.raises(ValueError, match=message):
        segment_adjoint(x["v"][:, :, 0], x["q"], x["k"], x["beta"])


# -- the front end ---------------------------------------------------------------------------------------------------------


def projections(T: int = 20, n: int = 2, H: int = 4, G: int = 2, dk: int = 16, dv: int = 24) -> dict[str, Tensor]:
    shapes = {"q": (2, T, G * dk), "k": (2, T, n * G * dk), "v": (2, T, n * H * dv), "b": (2, T, n * H), "a": (2, T, H)}
    weights = {f"w{name}": (shapes[name][-1], 1, 4) for name in "qkv"}
    made = {name: torch.randn(shape) for name, shape in (shapes | weights | {"A_log": (H,), "dt_bias": (H,)}).items()}
    return {name: x.to(DEVICE) for name, x in made.items()}


def prepared(x: dict[str, Tensor], backend: str, **sizes: int) -> dict[str, Tensor]:
    """Outputs and gradients of the front end."""
    leaves = {name: y.detach().clone().requires_grad_() for name, y in x.items()}
    q, k, v, b, a, *rest, A_log, dt_bias = leaves.values()
    out: Any = front_end(q, k, v, b, a, rest, A_log, dt_bias, max_beta=2.0, backend=backend, **sizes)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    torch.autograd.backward(out, [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) for y in out])
    return dict(zip(("q", "k", "v", "beta", "g"), (y.detach() for y in out), strict=True)) | {
        f"d{name}": y.grad for name, y in leaves.items() if y.grad is not None
    }


@pytest.mark.parametrize("backend", ["torch", "recurrent", "triton"])
def test_the_front_end_makes_one_query_and_n_keys_a_group(backend: str) -> None:
    x = projections()
    got = prepared(x, backend, heads=4, groups=2)
    assert (got["q"].shape, got["k"].shape, got["v"].shape) == ((2, 20, 2, 16), (2, 20, 2, 2, 16), (2, 20, 2, 4, 24))
    # As many heads as groups make the same queries and keys, and as many groups as heads the same of everything else.
    wide = {name: y.double() for name, y in x.items()}
    fewer = wide | {"b": wide["b"][..., :4], **{name: wide[name][..., :2] for name in ("a", "A_log", "dt_bias")}}
    of_groups, of_heads = prepared(fewer, "recurrent", heads=2), prepared(wide, "recurrent", heads=4)
    shared = {"q", "k", "dq", "dk", "dwq", "dwk"}
    for name in got:
        expected = (of_groups if name in shared else of_heads)[name]
        assert error(got[name], expected) < 1e-5, name


@pytest.mark.parametrize("groups", [0, 3, 8])
def test_groups_that_do_not_divide_the_heads_are_refused_by_the_front_end(groups: int) -> None:
    q, k, v, b, a, *weights, A_log, dt_bias = projections().values()
    with pytest.raises(ValueError, match=f"^groups = {groups}; expected a divisor of heads = 4$"):
        front_end(q, k, v, b, a, weights, A_log, dt_bias, heads=4, groups=groups, max_beta=2.0)
