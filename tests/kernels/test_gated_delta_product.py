"""The chunked operator against the recurrence in float64: outputs, every gradient, in the ranges that hurt."""

from __future__ import annotations

import itertools

import pytest
import torch
from deltaproduct_kernels import executed_flops, gated_delta_product, native, ops, resolve_backend
from deltaproduct_kernels.chunked import chunk_tokens, chunked_backward, chunked_forward
from deltaproduct_kernels.ops import max_chunks, products
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.kernels.helpers import (
    CU_SEQLENS,
    RANGES,
    Forgetful,
    assert_nan_stays_in_its_own_sequence,
    assert_same,
    assert_selective_checkpointing_saves_a_forward,
    in_float64,
    make,
    results,
    run,
)

INPUTS = ("q", "k", "v", "beta", "g", "initial_state")


@pytest.mark.usefixtures("either_path")
@pytest.mark.parametrize(("T", "n", "dk"), [
    *((40, n, 8) for n in range(1, 9)),
    *((T, 2, dk) for T in (1, 15, 16, 17, 31, 32, 33, 65) for dk in (8, 64)),
])  # fmt: skip
def test_chunked_equals_the_recurrence_for_every_number_of_steps_and_at_every_edge_of_a_chunk(T: int, n: int, dk: int) -> None:
    inputs = make(T, n=n, dk=dk)
    assert_same(results(inputs, "torch"), results(inputs, "recurrent"), 1e-10)


OWN_RANGES = {
    "weak gate": {"gate": 1e-3},
    "beta near 2, nearly parallel keys": {"beta": (1.99, 2.0), "correlation": 0.9, "gate": None},
    "beta 2, keys all but parallel, gated": {"beta": 2.0, "correlation": 0.99},
    "dk > dv": {"dk": 16, "dv": 3},
    "dk < dv": {"dk": 4, "dv": 24},
}


@pytest.mark.usefixtures("either_path")
@pytest.mark.parametrize("name", RANGES | OWN_RANGES)
@pytest.mark.parametrize("erase", [True, False], ids=["delta", "linear attention"])
def test_chunked_equals_the_recurrence_in_the_ranges_that_hurt(name: str, erase: bool) -> None:
    inputs = make(70, n=3, **(RANGES | OWN_RANGES)[name])  # type: ignore[arg-type]
    assert_same(results(inputs, "torch", erase=erase), results(inputs, "recurrent", erase=erase), 1e-9)


@pytest.mark.usefixtures("either_path")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_decays_that_underflow_are_forgotten_and_nothing_else(
    forgetful: Forgetful, dtype: torch.dtype, tolerance: float
) -> None:
    x = make(70, n=1, dtype=dtype)
    forgetful(x)
    assert_same(results(x, "torch"), results(in_float64(x), "recurrent"), tolerance)


@pytest.mark.usefixtures("either_path")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 8e-3), (torch.float16, 2e-3)])
@pytest.mark.parametrize("gate", [None, 0.05, 10.0])
def test_lower_precisions_stay_near_the_float64_recurrence_of_the_same_inputs(
    dtype: torch.dtype, tolerance: float, gate: float | None
) -> None:
    inputs = make(130, n=2, dk=32, dv=32, gate=gate, dtype=dtype)
    for backend in ("torch", "recurrent"):
        # After strong gates the initial state's gradient is below float16's smallest normal number.
        least = torch.finfo(dtype).tiny
        assert_same(results(inputs, backend), results(in_float64(inputs), "recurrent"), tolerance, least=least)


@pytest.mark.usefixtures("either_path")
def test_float32_survives_parallel_keys_and_steps_near_two() -> None:
    inputs = make(130, n=2, dk=32, dv=32, gate=None, beta=(1.9, 2.0), correlation=0.9, dtype=torch.float32)
    assert_same(results(inputs, "torch"), results(in_float64(inputs), "recurrent"), 1e-3)


@pytest.mark.parametrize("backend", ["torch", "recurrent"])
@pytest.mark.parametrize("gated", [True, False])
def test_gradcheck_of_every_input(backend: str, gated: bool) -> None:
    inputs = make(5, B=1, H=1, n=2, dk=3, dv=2, gate=0.5 if gated else None)
    names = [name for name in INPUTS if name in inputs]

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return run(dict(zip(names, tensors, strict=True)), backend)

    assert torch.autograd.gradcheck(function, tuple(inputs[name] for name in names))


@pytest.mark.usefixtures("either_path")
@pytest.mark.parametrize("backend", ["torch", "recurrent"])
def test_packed_sequences_equal_each_sequence_alone(backend: str) -> None:
    inputs = make(103, B=1, states=8)
    packed = results(inputs, backend, cu_seqlens=torch.tensor(CU_SEQLENS, dtype=torch.int32))
    whole = torch.Generator().manual_seed(0)
    do = torch.randn(packed["o"].shape, generator=whole, dtype=torch.float64)
    dstate = torch.randn(packed["state"].shape, generator=whole, dtype=torch.float64)
    for i, (start, end) in enumerate(itertools.pairwise(CU_SEQLENS)):
        part = {
            name: (x[i : i + 1] if name == "initial_state" else x[:, start:end]).detach().clone().requires_grad_()
            for name, x in inputs.items()
        }
        o, state = run(part, "recurrent")
        if end == start:
            state.backward(dstate[i : i + 1])
        else:
            torch.autograd.backward([o, state], [do[:, start:end], dstate[i : i + 1]])
        torch.testing.assert_close(packed["o"][:, start:end], o)
        torch.testing.assert_close(packed["state"][i : i + 1], state)
        for name, x in part.items():
            expected = packed[f"d{name}"]
            mine = expected[i : i + 1] if name == "initial_state" else expected[:, start:end]
            torch.testing.assert_close(mine, torch.zeros_like(x) if x.grad is None else x.grad)


@pytest.mark.usefixtures("either_path")
def test_not_a_number_stays_in_its_own_sequence() -> None:
    assert_nan_stays_in_its_own_sequence(make(103, B=1, states=8), "torch")


@pytest.mark.usefixtures("either_path")
def test_no_tokens_at_all_leave_the_state_as_it_was() -> None:
    inputs = make(0)
    for backend in ("torch", "recurrent"):
        o, state = run(inputs, backend)
        assert o.shape == (2, 0, 2, 6)
        assert torch.equal(state, inputs["initial_state"])


@pytest.mark.usefixtures("either_path")
@pytest.mark.parametrize("cut", [1, 31, 50])
def test_a_sequence_in_two_parts_carries_its_state(cut: int) -> None:
    inputs = make(70)
    o, state = run(inputs, "torch")
    first = {name: x if name == "initial_state" else x[:, :cut] for name, x in inputs.items()}
    o_first, between = run(first, "torch")
    second = {name: between if name == "initial_state" else x[:, cut:] for name, x in inputs.items()}
    o_second, end = run(second, "torch")
    torch.testing.assert_close(torch.cat([o_first, o_second], 1), o)
    torch.testing.assert_close(end, state)


def test_one_step_a_token_is_the_delta_rule() -> None:
    x = make(9, B=1, H=1, n=1, gate=None)
    S, outputs = x["initial_state"][0, 0], []
    for t in range(9):
        k, v, beta = x["k"][0, t, 0, 0], x["v"][0, t, 0, 0], x["beta"][0, t, 0, 0]
        S = (torch.eye(8) - beta * torch.outer(k, k)) @ S + beta * torch.outer(k, v)
        outputs.append(S.T @ x["q"][0, t, 0] * 8**-0.5)
    torch.testing.assert_close(run(x, "torch")[0][0, :, 0], torch.stack(outputs))


def test_a_step_with_beta_zero_is_no_step() -> None:
    two = make(40, n=2)
    two["beta"].data[:, :, 1] = 0
    one = {name: x[:, :, :1] if name in ("k", "v", "beta") else x for name, x in two.items()}
    torch.testing.assert_close(run(two, "torch")[0], run(one, "torch")[0])


@pytest.mark.usefixtures("either_path")
def test_a_gate_of_one_equals_no_gate() -> None:
    gated = make(70, gate=0.0)
    ungated = {name: x for name, x in gated.items() if name != "g"}
    torch.testing.assert_close(run(gated, "torch"), run(ungated, "torch"))


@pytest.mark.usefixtures("either_path")
def test_gradients_come_back_in_the_dtype_of_each_input() -> None:
    inputs = make(10, dtype=torch.bfloat16) | {"g": -torch.rand(2, 10, 2).requires_grad_()}
    got = results(inputs, "torch")
    assert {name: x.dtype for name, x in got.items()} == {
        "o": torch.bfloat16, "state": torch.float32, "dg": torch.float32,
        **dict.fromkeys(("dq", "dk", "dv", "dbeta", "dinitial_state"), torch.bfloat16),
    }  # fmt: skip


# -- as a node of torch.compile and of checkpointing ---------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_the_operator_passes_torchs_own_checks(packed: bool) -> None:
    inputs = make(20, B=1, n=2, states=3 if packed else 1)
    cu_seqlens = torch.tensor([0, 4, 4, 20]) if packed else None
    arguments = tuple(inputs[name] for name in INPUTS)
    torch.library.opcheck(torch.ops.deltaproduct.chunk, (*arguments, cu_seqlens, 0.3, True))


def test_compiles_into_one_full_graph_with_equal_gradients() -> None:
    inputs = make(20, dtype=torch.float32)
    compiled = torch.compile(lambda x: run(x, "auto"), fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(inputs), run(inputs, "torch"), strict=True):
        torch.testing.assert_close(got, expected)


def test_selective_checkpointing_does_not_run_the_recurrence_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_selective_checkpointing_saves_a_forward(monkeypatch, ops, "chunked_forward", make(20), "torch")


# -- FLOPs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("erase", [True, False])
@pytest.mark.parametrize(("n", "T"), [(1, 64), (3, 70)])
def test_the_flop_formula_counts_the_products_of_the_torch_operations(
    n: int, T: int, erase: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "available", lambda device, dtype: False)
    x = {name: t.detach() for name, t in make(T, n=n).items()}
    arguments = (x["q"], x["k"], x["v"], x["beta"], x["g"])
    with FlopCounterMode(display=False) as forward:
        o, final, states = chunked_forward(*arguments, x["initial_state"], None, 1.0, erase)
    with FlopCounterMode(display=False) as backward:
        chunked_backward(o, final, *arguments, states, None, 1.0, erase)
    shapes = x["k"].shape, x["v"].shape
    assert forward.get_total_flops() == executed_flops(*shapes, len(states), erase=erase, backward=False)
    assert backward.get_total_flops() == executed_flops(*shapes, len(states), erase=erase, backward=True)


@pytest.mark.parametrize(("T", "sequences"), [(64, None), (70, None), (70, [0, 3, 70])])
def test_torchs_flop_counter_sees_the_operator(T: int, sequences: list[int] | None) -> None:
    cu_seqlens = None if sequences is None else torch.tensor(sequences)
    inputs = make(T, B=1, states=1 if sequences is None else 2)
    with FlopCounterMode(display=False) as operator:
        results(inputs, "torch", cu_seqlens=cu_seqlens)
    chunks = max_chunks(1, T, 2, 8, None if sequences is None else 2)
    shapes = inputs["k"].shape, inputs["v"].shape
    expected = sum(executed_flops(*shapes, chunks, erase=True, backward=backward) for backward in (False, True))
    assert operator.get_total_flops() == expected


def test_needed_flops_are_those_of_pairs_that_see_each_other() -> None:
    F = products(2, 3, 1, 1, erase=True, backward=False)[0]  # two queries and six keys
    assert F.share * F.M * F.N == pytest.approx((3 + 6) + (0 + 1 + 2 + 3 + 4 + 5))


def test_chunks_hold_at_most_64_rows_and_32_for_small_heads() -> None:
    assert [chunk_tokens(n, 64) * n for n in range(1, 9)] == [64, 64, 63, 64, 60, 60, 63, 64]
    assert [chunk_tokens(n, 32) * n for n in range(1, 9)] == [32, 32, 30, 32, 30, 30, 28, 32]


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.randn(2, 5, 2)}, r"q has shape \(2, 5, 2\); expected \[B, T, G, dk\]"),
        ({"q": torch.randn(2, 5, 2, 0)}, "q has dk = 0"),
        ({"k": torch.randn(2, 5, 2, 8)}, r"k has shape .* expected \[B, T, n, G, dk\]"),
        ({"k": torch.randn(2, 5, 9, 2, 8)}, "n = 9 steps a token; from 1 to 8"),
        ({"v": torch.randn(2, 4, 2, 2, 6)}, r"v has shape .* expected \(2, 5, 2, 2, 6\)"),
        ({"beta": torch.randn(2, 5, 2)}, "beta has shape"),
        ({"g": torch.randn(2, 5)}, "g has shape"),
        ({"initial_state": torch.randn(1, 2, 8, 6)}, "initial_state has shape"),
        ({"beta": torch.ones(2, 5, 2, 2, dtype=torch.int64)}, "beta has dtype torch.int64"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "B must be 1"),
        ({"backend": "cuda"}, "backend = 'cuda' is not available; choose 'auto' or one of 'recurrent', 'torch'"),
    ],
)
def test_wrong_arguments_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gated_delta_product(**{**{name: x.float() for name, x in make(5).items()}, **change})


@pytest.mark.usefixtures("either_path")
@pytest.mark.parametrize(("B", "H"), [(0, 2), (2, 0)])
def test_no_rows_and_no_heads_are_as_empty_as_their_results(B: int, H: int) -> None:
    x = make(20, B=B, H=H)
    got = results(x, "torch")
    assert {name: y.shape for name, y in got.items()} == {name: y.shape for name, y in results(x, "recurrent").items()}


def test_compiles_with_every_size_dynamic() -> None:
    x, longer = make(20, dtype=torch.float32), make(33, B=3, dtype=torch.float32)
    compiled = torch.compile(lambda x: run(x, "auto"), dynamic=True, fullgraph=True, backend="aot_eager")
    for inputs in (x, longer):
        assert all(torch.equal(a, b) for a, b in zip(compiled(inputs), run(inputs, "auto"), strict=True))


def test_forward_mode_and_vmap_are_refused_by_name_and_had_from_the_definition() -> None:
    x = {name: y.detach() for name, y in make(5).items()}
    read = {backend: lambda q, backend=backend: run({**x, "q": q}, backend)[0] for backend in ("torch", "recurrent")}
    with pytest.raises(NotImplementedError, match="backend 'torch' has no forward-mode derivative; .* backend 'recurrent'"):
        torch.func.jvp(read["torch"], (x["q"],), (x["q"],))
    with pytest.raises(NotImplementedError, match="gated_delta_product has no batching rule for torch.vmap"):
        torch.vmap(read["torch"])(x["q"][None])
    o, tangent = torch.func.jvp(read["recurrent"], (x["q"],), (x["q"],))
    torch.testing.assert_close(tangent, o)  # linear in q
    once, twice = torch.vmap(read["recurrent"])(torch.stack([x["q"], 2 * x["q"]]))
    torch.testing.assert_close(2 * once, twice)


def test_auto_is_the_chunked_backend() -> None:
    assert resolve_backend("auto", torch.device("cpu")) == "torch"
