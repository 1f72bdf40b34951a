"""The Triton kernels, interpreted on the CPU (or run on a GPU), against the recurrence in float64."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deltaproduct_kernels import gated_delta_product, resolve_backend
from deltaproduct_kernels.triton_backend import cost, launch, ops
from deltaproduct_kernels.triton_backend.layout import EVERY, Size
from deltaproduct_kernels.triton_backend.ops import why_not
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.kernels.helpers import (
    CU_SEQLENS,
    RANGES,
    Forgetful,
    assert_nan_stays_in_its_own_sequence,
    assert_same,
    assert_selective_checkpointing_saves_a_forward,
    error,
    in_float64,
    make,
    results,
    run,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 5e-6


@pytest.fixture(autouse=True)
def tiles_of_64_rows(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Interpreted, float32 tensors stand for 16-bit ones: the chunks that training uses, with errors of float32."""
    if DEVICE == "cpu" and "tiles_of_float32" not in request.fixturenames:
        monkeypatch.setattr(ops, "bits", lambda x: 16)


@pytest.fixture
def tiles_of_float32() -> None:
    """The chunks of 16 rows that float32 inputs really have."""


def inputs(T: int = 40, **options: Any) -> dict[str, Tensor]:
    """Two heads, of one token eight: a gradient of one or two sums that all but cancel has an error of any size."""
    made = make(T, **{"B": 1, "H": 8 if T == 1 else 2, "dk": 16, "dv": 32, "dtype": torch.float32} | options)
    return {name: x.detach().to(DEVICE).requires_grad_() for name, x in made.items()}


def assert_equals_the_recurrence(x: dict[str, Tensor], tolerance: float = TOLERANCE, **options: Any) -> None:
    assert_same(results(x, "triton", **options), results(in_float64(x), "recurrent", **options), tolerance)


@pytest.mark.parametrize(
    ("n", "T"), [*((n, 70 if n < 4 else 20) for n in range(1, 9)), *((2, T) for T in (1, 31, 32, 33, 64, 65))]
)
def test_every_number_of_steps_and_every_edge_of_a_chunk(n: int, T: int) -> None:
    assert_equals_the_recurrence(inputs(T, n=n))


@pytest.mark.parametrize("n", [1, 2, 3, 8])
@pytest.mark.parametrize("T", [1, 40])
def test_tiles_of_float32_are_smaller_and_as_right(tiles_of_float32: None, n: int, T: int) -> None:
    assert_equals_the_recurrence(inputs(T, n=n))


OWN_RANGES = {"beta near 2, correlated keys": {"beta": (1.9, 2.0), "correlation": 0.5, "gate": None}}


@pytest.mark.parametrize("name", RANGES | OWN_RANGES)
@pytest.mark.parametrize("erase", [True, False], ids=["delta", "linear attention"])
def test_the_ranges_that_hurt(name: str, erase: bool) -> None:
    assert_equals_the_recurrence(inputs(n=2, **(RANGES | OWN_RANGES)[name]), erase=erase, tolerance=2e-5)  # type: ignore[arg-type]


def test_beta_near_two_and_all_but_parallel_keys() -> None:
    """Powers of the triangular matrix overflow here; substitution does not."""
    assert_equals_the_recurrence(inputs(70, gate=None, beta=(1.99, 2.0), correlation=0.95), tolerance=2e-3)


def test_decays_that_underflow_are_forgotten_and_nothing_else(forgetful: Forgetful) -> None:
    x = inputs(70, n=1)
    forgetful(x)
    assert_equals_the_recurrence(x, tolerance=1e-4)


def test_step_sizes_of_zero_keep_their_gradient() -> None:
    x = inputs()
    x["beta"].data[:, ::3, 1] = 0
    got, expected = results(x, "triton"), results(in_float64(x), "recurrent")
    off = x["beta"] == 0
    assert error(got["dbeta"][off], expected["dbeta"][off]) < TOLERANCE


@pytest.mark.parametrize(("dk", "dv"), [(16, 16), (24, 40), (32, 128), (64, 32), (96, 48), (128, 64), (32, 256), (128, 128)])
def test_every_head_size(dk: int, dv: int) -> None:
    assert_equals_the_recurrence(inputs(34, H=1, dk=dk, dv=dv))


def test_heads_of_256_in_half_precision() -> None:
    assert_equals_the_recurrence(inputs(34, H=1, dk=256, dv=32, dtype=torch.float16), 4e-3)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 4e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("gate", [None, 0.1, 10.0])
def test_half_precision_is_as_near_as_its_rounding(dtype: torch.dtype, tolerance: float, gate: float | None) -> None:
    """The state in float32, as a layer keeps it. After strong gates its gradient is below float16's smallest normal number,
    and what the kernels compute it from has fewer bits there: in 6 of 40 draws it is off by more than the tolerance."""
    x = inputs(70, gate=gate, dtype=dtype)
    x["initial_state"] = x["initial_state"].detach().float().requires_grad_()
    expected = results(in_float64(x), "recurrent")
    assert_same(results(x, "triton"), expected, tolerance, least=torch.finfo(dtype).tiny)
    assert {name: y.dtype for name, y in results(x, "triton").items() if name != "state"} == {
        "o": dtype, **{f"d{name}": y.dtype for name, y in x.items()},
    }  # fmt: skip


@pytest.mark.skipif(DEVICE == "cuda", reason="about the interpreter")
def test_the_interpreter_is_wrong_about_bfloat16_and_never_gets_any() -> None:
    plain = {name: x.detach().bfloat16() for name, x in inputs(20, n=1).items()}
    q, k, v, beta, g = (plain[name] for name in ("q", "k", "v", "beta", "g"))
    arguments = (beta, g, None, None, 1.0, True, False, 16)
    right, *_ = gated_delta_product(q.float(), k.float(), v.float(), beta, g, scale=1.0, backend="recurrent")
    garbage, *_ = launch.forward(q, k, v, *arguments)
    assert not error(garbage, right) < 0.1, "the interpreter has learned bfloat16: ops.computable can go"
    upcast, *_ = gated_delta_product(q, k, v, beta, g, scale=1.0, backend="triton")
    assert error(upcast, right) < 8e-3


# -- packed sequences, and sequences cut among programs --------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_sequences_with_empty_ones(dtype: torch.dtype) -> None:
    cu_seqlens = torch.tensor(CU_SEQLENS, dtype=dtype, device=DEVICE)
    assert_equals_the_recurrence(inputs(103, states=8), cu_seqlens=cu_seqlens)


def test_not_a_number_stays_in_its_own_sequence() -> None:
    assert_nan_stays_in_its_own_sequence(inputs(103, states=8), "triton")


@pytest.mark.parametrize("packed", [None, [0, 0, 200], [0, 65, 65, 66, 200]])
@pytest.mark.parametrize(("gate", "erase"), [(0.1, True), (None, True), (0.1, False)])
def test_a_sequence_cut_among_programs_is_the_same_sequence(packed: list[int] | None, gate: float | None, erase: bool) -> None:
    x = inputs(200, gate=gate, states=len(packed) - 1 if packed else 1, dv=16)
    cu_seqlens = None if packed is None else torch.tensor(packed, device=DEVICE)
    plain = {name: y.detach() for name, y in x.items()}
    q, k, v, beta, state, g = (plain.get(name) for name in ("q", "k", "v", "beta", "initial_state", "g"))
    part = 16 * EVERY
    o, final, saved = launch.forward(q, k, v, beta, g, state, cu_seqlens, 0.25, erase, True, 32, part=part)  # type: ignore[arg-type]
    do, dfinal = torch.randn_like(o), torch.randn_like(final)
    names = [name for name in ("q", "k", "v", "beta", "g", "initial_state") if name in x]
    got = launch.backward(do, dfinal, q, k, v, beta, g, saved, cu_seqlens, 0.25, erase, 32, part=part)  # type: ignore[arg-type]
    wide = {name: y.double().requires_grad_() for name, y in plain.items()}
    expected_o, expected_final = run(wide, "recurrent", cu_seqlens=cu_seqlens, scale=0.25, erase=erase)
    expected = torch.autograd.grad([expected_o, expected_final], [wide[name] for name in names], [do.double(), dfinal.double()])
    gradients = [y for y in got if y is not None]
    assert_same(
        dict(zip(["o", "final", *names], [o, final, *gradients], strict=True)),
        dict(zip(["o", "final", *names], [expected_o, expected_final, *expected], strict=True)),
        TOLERANCE,
    )


def shape(B: int, T: int, H: int, sequences: int | None = None) -> launch.Shape:
    return launch.Shape(B=B, T=T, n=2, H=H, dk=128, dv=128, sequences=sequences, arch=90, processors=132)


def test_sequences_are_cut_only_when_most_of_the_gpu_would_be_idle() -> None:
    assert shape(12, 4096, 8).part == shape(12, 4096, 8).whole
    few = shape(1, 32768, 8)
    assert few.part < few.whole
    assert few.part % (few.chunk * EVERY) == 0
    assert 4 <= -(-few.T // few.part) <= 132
    assert shape(1, 300, 2).part == shape(1, 300, 2).whole  # too short to be worth it
    packed = shape(1, 49152, 8, sequences=100)
    assert packed.part < packed.whole


# -- the interface ----------------------------------------------------------------------------------------------------


def test_strided_inputs_are_read_rightly() -> None:
    x = inputs()
    strided = {name: y.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for name, y in x.items()}
    assert not any(strided[name].is_contiguous() for name in ("q", "k", "v"))
    assert_same(results(strided, "triton"), results(in_float64(x), "recurrent"), TOLERANCE)


def test_no_tokens_at_all_leave_the_state_as_it_was() -> None:
    x = inputs(0)
    o, state = run(x, "triton")
    assert o.shape == (1, 0, 2, 32)
    assert torch.equal(state, x["initial_state"])


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("gate", [None, 0.3])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_decoding_equals_the_recurrence(n: int, gate: float | None, tokens: int) -> None:
    x = inputs(tokens, B=2, n=n, gate=gate, dk=24, dv=40)
    with torch.no_grad():
        got, expected = run(x, "triton"), run(in_float64(x), "recurrent")
    assert error(got[0], expected[0]) < TOLERANCE
    assert error(got[1], expected[1]) < TOLERANCE


def test_token_by_token_equals_all_at_once() -> None:
    x = {name: y.detach() for name, y in inputs(9).items()}
    o, state = run(x, "triton")
    now, outputs = x["initial_state"], []
    for t in range(9):
        token = {name: now if name == "initial_state" else y[:, t : t + 1] for name, y in x.items()}
        out, now = run(token, "triton")
        outputs.append(out)
    assert error(torch.cat(outputs, 1), o) < TOLERANCE
    assert error(now, state) < TOLERANCE


def test_inference_keeps_nothing_and_training_less_than_a_kilobyte_a_token_and_head() -> None:
    from deltaproduct_kernels.triton_backend.ops import triton_chunk

    size = Size(1, 128, 2, 2, 16, 32)
    x = {name: y.detach() for name, y in inputs(128, dtype=torch.float16).items()}
    arguments = (x["q"], x["k"], x["v"], x["beta"], x["g"], None, None, 1.0, True)
    assert [kept.numel() for kept in triton_chunk(*arguments, False)[2:]] == [0, 0, 0]
    y, gates, states = triton_chunk(*arguments, True)[2:]
    assert 2 * (y.numel() + states.numel()) + gates.nbytes == cost.saved(size)
    assert cost.saved(Size(1, 4096, 2, 1, 128, 128)) / 4096 < 1024


@pytest.mark.parametrize("packed", [False, True])
def test_the_operators_pass_torchs_own_checks(packed: bool) -> None:
    x = inputs(20, states=3 if packed else 1)
    cu_seqlens = torch.tensor([0, 9, 18, 20], device=DEVICE) if packed else None  # no slot stays unwritten
    arguments = tuple(x[name] for name in ("q", "k", "v", "beta", "g", "initial_state"))
    torch.library.opcheck(torch.ops.deltaproduct.triton_chunk, (*arguments, cu_seqlens, 0.3, True, True))
    plain = tuple(y.detach() for y in arguments)
    torch.library.opcheck(torch.ops.deltaproduct.triton_decode, (*plain, 0.3, True))


def test_compiles_into_one_full_graph_with_equal_gradients() -> None:
    def step(x: dict[str, Tensor]) -> list[Tensor]:
        o, state = run(x, "triton")
        return [o, state, *torch.autograd.grad(o.sum() + state.sum(), list(x.values()))]

    x = inputs(20)
    o, state = torch.compile(lambda x: run(x, "triton"), fullgraph=True, backend="aot_eager")(x)
    gradients = torch.autograd.grad(o.sum() + state.sum(), list(x.values()))
    for got, expected in zip([o, state, *gradients], step(x), strict=True):
        torch.testing.assert_close(got, expected)


def test_selective_checkpointing_does_not_run_the_kernels_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_selective_checkpointing_saves_a_forward(monkeypatch, launch, "forward", inputs(20), "triton")


# -- bytes and FLOPs --------------------------------------------------------------------------------------------------


class Counter(launch.Runner):
    """Counts what each interpreted kernel multiplies, and the bytes it touches: each once, read or written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(90, 132)
        from triton.runtime.interpreter import InterpreterBuilder

        touched: dict[int, set[int]] = {}
        flops = [0]
        self.__dict__.update(touched=touched, flops=flops, totals={})

        def watch(name: str, note: Any) -> None:
            original = getattr(InterpreterBuilder, name)

            def watched(builder: Any, *args: Any, **kwargs: Any) -> Any:
                note(*args)
                return original(builder, *args, **kwargs)

            monkeypatch.setattr(InterpreterBuilder, name, watched)

        def touch(pointers: Any, mask: Any) -> None:
            width = pointers.get_element_ty().primitive_bitwidth // 8
            touched.setdefault(width, set()).update(pointers.data[mask.data].tolist())

        def multiply(a: Any, b: Any) -> None:
            flops[0] += 2 * a.data.size * b.data.shape[-1]

        watch("create_masked_load", lambda pointers, mask, *_: touch(pointers, mask))
        watch("create_masked_store", lambda pointers, value, mask, *_: touch(pointers, mask))
        watch("create_dot", lambda a, b, *_: multiply(a, b))

    def __call__(self, kernel: Any, grid: int, config: Any, **arguments: Any) -> None:
        touched, flops, totals = (self.__dict__[name] for name in ("touched", "flops", "totals"))
        touched.clear()
        flops[0] = 0
        super().__call__(kernel, grid, config, **arguments)
        name = kernel.__name__.removesuffix("_kernel")
        moved = sum(width * len(addresses) for width, addresses in touched.items())
        totals[name] = (moved, flops[0])


@pytest.mark.skipif(DEVICE == "cuda", reason="counted by the interpreter")
@pytest.mark.parametrize("part", [512, -84, 0])
def test_a_span_that_two_programs_would_share_a_chunk_of_is_refused(part: int) -> None:
    """n = 3: chunks of 21 tokens, a state kept in every fourth."""
    x = {name: y.detach() for name, y in inputs(600, n=3).items()}
    arguments = (x["q"], x["k"], x["v"], x["beta"], x["g"], None, None, 1.0, True, True, 16)
    with pytest.raises(ValueError, match=f"part = {part}; with n = 3 steps a token it must be a multiple of 84 tokens"):
        launch.forward(*arguments, part=part)


@pytest.mark.parametrize(("n", "bits"), [(1, 32), (2, 32), (2, 16)])
@pytest.mark.parametrize(("gate", "erase", "H"), [(0.1, True, 1), (None, True, 1), (0.1, False, 1), (0.1, True, 2)])
def test_the_cost_model_counts_what_the_kernels_move_and_multiply(
    monkeypatch: pytest.MonkeyPatch, gate: float | None, erase: bool, H: int, n: int, bits: int
) -> None:
    """Two heads share one query and its keys."""
    T = 8 * 64 // n
    dtype = torch.float32 if bits == 32 else torch.float16
    x = {name: y.detach() for name, y in inputs(T, n=n, gate=gate, H=H, groups=1, dk=64, dtype=dtype).items()}
    x |= {name: x[name].float() for name in ("beta", "g") if name in x}
    q, k, v, beta, g = (x.get(name) for name in ("q", "k", "v", "beta", "g"))
    counter = Counter(monkeypatch)
    o, _, saved = launch.forward(q, k, v, beta, g, None, None, 1.0, erase, True, bits, part=T, run=counter)  # type: ignore[arg-type]
    launch.backward(o, None, q, k, v, beta, g, saved, None, 1.0, erase, bits, part=T, run=counter)  # type: ignore[arg-type]
    size = Size(1, T, n, H, 64, 32, bits=bits, gated=gate is not None, erase=erase, groups=1)
    for kernel, moved, flops in [*cost.forward(size), *cost.backward(size)]:
        if kernel in counter.__dict__["totals"]:
            assert flops == counter.__dict__["totals"][kernel][1], kernel
            assert moved == pytest.approx(counter.__dict__["totals"][kernel][0], rel=0.05), kernel


@pytest.mark.parametrize("bits", [16, 32])
def test_torchs_flop_counter_sees_the_kernels_with_the_chunks_of_their_dtype(bits: int, tiles_of_float32: None) -> None:
    x = inputs(64, dtype=torch.float16 if bits == 16 else torch.float32)
    x |= {name: x[name].detach().float().requires_grad_() for name in ("beta", "g", "initial_state") if name in x}
    with FlopCounterMode(display=False) as counted:
        results(x, "triton")
    size = Size(1, 64, 2, 2, 16, 32, bits=bits)
    assert counted.get_total_flops() == sum(c.flops for c in [*cost.forward(size), *cost.backward(size)])


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.randn(1, 5, 2, 16).half()}, "k has dtype torch.float32, but q torch.float16; .* takes one dtype"),
        (dict.fromkeys(("q", "k", "v"), None), "q has dtype torch.float64; allowed are float32, bfloat16 and float16"),
        ({"dk": 8}, "dk = 8; heads of 16 to 256 are allowed; choose 'torch' or 'auto'"),
        ({"dv": 512}, "dv = 512; heads of 16 to 256 are allowed"),
        ({"dk": 256}, "dk = 256; in float32 heads of at most 128 are allowed"),
        ({"cu_seqlens": [0, 4]}, "cu_seqlens runs from 0 to 4; it must run from 0 to T = 5"),
        ({"cu_seqlens": [0, 4, 3, 5]}, "cu_seqlens decreases from 4 to 3"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused_by_name(change: dict, message: str) -> None:
    sizes = {name: change.pop(name) for name in ("dk", "dv") if name in change}
    x: dict[str, Any] = {name: y.detach() for name, y in inputs(5, **sizes).items() if name != "initial_state"}
    for name, value in change.items():
        x[name] = x[name].double() if value is None else torch.as_tensor(value, device=DEVICE)
    with pytest.raises(ValueError, match=message):
        gated_delta_product(**x, backend="triton", validate=True)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("k", 3.0, "k has a key of length 3; keys must have length 1"),
        ("beta", 2.5, "beta has values from .* to 2.5; expected 0 to 2"),
        ("g", 0.5, "g has values up to 0.5; a log decay is at most 0"),
    ],
)
def test_values_are_checked_on_request(monkeypatch: pytest.MonkeyPatch, name: str, value: float, message: str) -> None:
    x = {name: y.detach() for name, y in inputs(5).items()}
    x[name][0, 2] = 0
    x[name][0, 2, ..., 0] = value
    for check in ({"validate": True}, {}):
        monkeypatch.setenv("DELTAPRODUCT_VALIDATE", "1")
        with pytest.raises(ValueError, match=message):
            gated_delta_product(**x, **check)
    monkeypatch.delenv("DELTAPRODUCT_VALIDATE")
    gated_delta_product(**x)


def test_a_machine_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    assert why_not(torch.device("cpu")) == "it needs a CUDA device, not 'cpu'"
    with pytest.raises(ValueError, match="backend = 'triton' cannot run: it needs a CUDA device"):
        resolve_backend("triton", torch.device("cpu"))


def gpu_of(monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int], shared: int) -> torch.device:
    """What torch says of a GPU that is not here."""
    major, minor = capability
    facts = SimpleNamespace(major=major, minor=minor, multi_processor_count=82, shared_memory_per_block_optin=shared)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    launch.runner.cache_clear()
    return torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("name", "capability", "shared", "arch"),
    [
        ("A100", (8, 0), 166_912, 80),
        ("RTX 3090", (8, 6), 101_376, 86),
        ("RTX 4090", (8, 9), 101_376, 89),
        ("B300", (10, 3), 232_448, 100),
        ("RTX 5090", (12, 0), 101_376, 120),
    ],
)
def test_auto_takes_triton_on_every_gpu_that_has_lines(
    monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int], shared: int, arch: int
) -> None:
    gpu = gpu_of(monkeypatch, name, capability, shared)
    assert launch.runner(gpu).arch == arch
    assert resolve_backend("auto", gpu) == "triton"


def test_a_gpu_with_too_little_shared_memory_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = gpu_of(monkeypatch, "Small", (8, 6), 65_536)
    assert why_not(gpu) == "Small has 65,536 bytes of shared memory a program; the kernels are set up for 101,376"
    assert resolve_backend("auto", gpu) == "torch"


def test_a_machine_without_triton_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="the package triton is not installed; choose 'torch' or 'auto'"):
        resolve_backend("triton", torch.device("cpu"))


def test_packed_lengths_are_all_tried() -> None:
    """Every way to cut 6 tokens into 3 sequences, around chunks of 2 tokens' worth of slots."""
    for a, b in itertools.combinations_with_replacement(range(7), 2):
        offsets = [0, a, b, 6]
        for span in (1, 2, 3, 4):
            size = Size(1, 6, 2, 1, 16, 16, sequences=3)
            taken = [start // span + s + part
                     for s, (start, end) in enumerate(itertools.pairwise(offsets))
                     for part in range(max(1, -(-(end - start) // span)))]  # fmt: skip
            assert len(taken) == len(set(taken)), "two spans share a slot"
            assert max(taken) < size.slots(span)
