"""`accelerate_fla`: fla's layers on our operator compute what fla defines, and what our model computes.

The adapters are compared with fla's own naive functions in plain torch. Whole layers run fla's convolutions and norms in
Triton's interpreter if there is no GPU.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from deltaproduct_kernels import accelerate_fla, fla_layers
from torch import Tensor
from torch.nn.functional import normalize

from tests.hf.exported import load, tokens
from tests.kernels.helpers import error
from tests.pretrained import Make, random_model
from titan_dp.inference.hf.layout import hf_name

pytestmark = [pytest.mark.usefixtures("fla"), pytest.mark.filterwarnings("ignore:ShortConvolution is crucial")]
PLACES = {layer: (f"fla.layers.{layer}", ours.__name__) for layer, ours in fla_layers._LAYERS.items()}
T, H, DK, DV = 13, 2, 8, 6
CU_SEQLENS = [0, 5, 6, 13]


def functions() -> dict[str, Callable[..., Any]]:
    return {layer: getattr(importlib.import_module(module), name) for layer, (module, name) in PLACES.items()}


@pytest.fixture
def accelerated() -> Iterator[dict[str, Callable[..., Any]]]:
    with accelerate_fla():
        yield functions()


def inputs(n: int = 1, *, gated: bool = True, packed: bool = False, state: bool = False, groups: int = 1) -> dict[str, Any]:
    """As fla's functions take them, in float32; leaves of autograd. Keys are not of unit length."""
    B = 1 if packed else 2
    shapes = {"q": (B, T, H, DK), "k": (B, T * n, H, DK), "v": (B, T * n, H * groups, DV), "beta": (B, T * n, H * groups)}
    x: dict[str, Any] = {name: torch.randn(shape) for name, shape in shapes.items()}
    x["beta"] = 2 * x["beta"].sigmoid()
    x["g"] = -torch.rand(B, T, H * groups) if gated else None
    x["initial_state"] = torch.randn(len(CU_SEQLENS) - 1 if packed else B, H * groups, DK, DV) if state else None
    x = {name: None if value is None else value.requires_grad_() for name, value in x.items()}
    return x | {"cu_seqlens": torch.tensor(CU_SEQLENS) if packed else None}


def unit(x: dict[str, Any]) -> dict[str, Any]:
    return x | {name: normalize(x[name], dim=-1) for name in "qk"}


def assert_same_values_and_gradients(
    x: dict[str, Any], ours: tuple[Tensor, Tensor | None], theirs: tuple[Tensor, Tensor | None]
) -> None:
    leaves = [value for value in x.values() if value is not None and value.requires_grad]
    found = []
    for o, state in (ours, theirs):
        assert state is not None
        generator = torch.Generator().manual_seed(0)
        loss = sum((y * torch.randn(y.shape, generator=generator)).sum() for y in (o, state))
        found.append([o, state, *torch.autograd.grad(loss, leaves)])  # type: ignore[arg-type]
    assert max(error(mine, exact) for mine, exact in zip(*found, strict=True)) < 1e-5  # of single numbers any may be near 0


@pytest.mark.parametrize("normed", [False, True], ids=["unit keys given", "lengths inside"])
@pytest.mark.parametrize("state", [False, True], ids=["from zero", "from a state"])
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("gated", [False, True], ids=["no gate", "gate"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_delta_product_is_the_one_of_fla(
    n: int, gated: bool, packed: bool, state: bool, normed: bool, accelerated: dict[str, Callable[..., Any]]
) -> None:
    from fla.ops.gated_delta_product.naive import naive_recurrent_gated_delta_product as naive

    x = inputs(n, gated=gated, packed=packed, state=state)
    how = {"num_householder": n, "output_final_state": True, "scale": 0.3}
    given = x if normed else unit(x)
    ours = accelerated["gated_deltaproduct"](**given, **how, use_qk_l2norm_in_kernel=normed)
    assert_same_values_and_gradients(x, ours, naive(**unit(x), **how))


@pytest.mark.parametrize("normed", [False, True], ids=["unit keys given", "lengths inside"])
@pytest.mark.parametrize("state", [False, True], ids=["from zero", "from a state"])
def test_the_delta_rule_is_the_one_of_fla(state: bool, normed: bool, accelerated: dict[str, Callable[..., Any]]) -> None:
    from fla.ops.delta_rule.naive import delta_rule_recurrence

    x = inputs(gated=False, state=state)
    x.pop("g")
    given = x if normed else unit(x)
    ours = accelerated["delta_net"](**given, output_final_state=True, use_qk_l2norm_in_kernel=normed, chunk_size=32)
    rows = {name: unit(x)[name].transpose(1, 2) for name in ("q", "k", "v", "beta")}
    o, final = delta_rule_recurrence(**rows, initial_state=x["initial_state"])
    assert_same_values_and_gradients(x, ours, (o.transpose(1, 2), final))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("v_first", [False, True], ids=["[dk, dv]", "[dv, dk]"])
@pytest.mark.parametrize("raw", [False, True], ids=["activated", "raw gate and beta"])
def test_the_gated_delta_rule_is_the_one_of_fla(
    raw: bool, v_first: bool, groups: int, accelerated: dict[str, Callable[..., Any]]
) -> None:
    from fla.ops.gated_delta_rule.gate import naive_gdn_gate
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule as naive

    x = inputs(state=True, groups=groups) | {"A_log": torch.randn(H * groups).requires_grad_()}
    x["dt_bias"] = torch.randn(H * groups).requires_grad_()
    x.pop("cu_seqlens")
    given, meant = dict(x), unit(x)
    A_log, dt_bias = meant.pop("A_log"), meant.pop("dt_bias")
    how: dict[str, Any] = {"output_final_state": True, "use_qk_l2norm_in_kernel": True, "state_v_first": v_first}
    if raw:
        how |= {"use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True, "allow_neg_eigval": True}
        meant |= {"g": naive_gdn_gate(x["g"], A_log, dt_bias), "beta": 2 * x["beta"].sigmoid()}
    else:
        x = {name: value for name, value in x.items() if name not in ("A_log", "dt_bias")}
        given = dict(x)
    if v_first:
        given["initial_state"] = x["initial_state"].mT
    o, state = accelerated["gated_deltanet"](**given, **how)
    meant |= {name: meant[name].repeat_interleave(groups, 2) for name in "qk"}
    assert_same_values_and_gradients(x, (o, state.mT if v_first else state), naive(**meant, output_final_state=True))


def test_a_final_state_is_returned_only_on_request(accelerated: dict[str, Callable[..., Any]]) -> None:
    x = unit(inputs(2))
    assert accelerated["gated_deltaproduct"](**x, num_householder=2, output_final_state=None)[1] is None


def test_lengths_are_the_ones_of_fla_s_kernel() -> None:
    """Which is called on a GPU; torch's operations on a CPU."""
    from fla.modules.norm.l2norm import l2norm

    x = torch.cat([torch.randn(3, 4, DK), torch.zeros(1, 4, DK)])
    torch.testing.assert_close(fla_layers._unit(x), l2norm(x))


def test_a_compiler_sees_no_break(accelerated: dict[str, Callable[..., Any]]) -> None:
    x = inputs(2)
    how = {"num_householder": 2, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    function = accelerated["gated_deltaproduct"]
    compiled = torch.compile(lambda **given: function(**given, **how), fullgraph=True, backend="aot_eager")
    assert_same_values_and_gradients(x, compiled(**x), function(**x, **how))


# -- what is not supported -------------------------------------------------------------------------------------------------


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of fla's functions that were called, by adapters over stand-ins of the same signatures."""
    names: list[str] = []

    def stand_in(ours: Callable[..., Any]) -> Callable[..., Any]:
        def theirs(*args: Any, **how: Any) -> tuple[None, None]:
            names.append(ours.__name__)
            return None, None

        theirs.__name__ = ours.__name__
        theirs.__signature__ = inspect.signature(ours)  # type: ignore[attr-defined]
        return theirs

    for layer, ours in fla_layers._LAYERS.items():
        monkeypatch.setattr(f"fla.layers.{layer}.{ours.__name__}", stand_in(ours))
    monkeypatch.setattr(fla_layers, "_WARNED", set())
    with accelerate_fla():
        yield names


@pytest.mark.parametrize(
    ("layer", "arguments", "reason"),
    [
        ("gated_deltaproduct", {"num_householder": 1, "cp_context": object()}, "cp_context was given"),
        ("gated_deltaproduct", {"num_householder": 9}, "num_householder = 9; from 1 to 8 are supported"),
        ("gated_deltanet", {"cp_context": object()}, "cp_context was given"),
        ("gated_deltanet", {"allow_neg_eigval": True}, "allow_neg_eigval was given without use_beta_sigmoid_in_kernel"),
        ("gated_deltanet", {"transpose_state_layout": True}, "transpose_state_layout was given"),
        ("delta_net", {"head_first": False}, "head_first was given"),
    ],
)
def test_what_we_do_not_do_goes_to_fla_with_one_warning(
    layer: str, arguments: dict[str, Any], reason: str, called: list[str]
) -> None:
    x, name = inputs(), PLACES[layer][1]
    if layer == "delta_net":
        x.pop("g")
    with pytest.warns(UserWarning, match=f"{name} runs fla's own kernels: {reason}"):
        functions()[layer](**x, **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        functions()[layer](**x, **arguments)
    assert called == [name, name]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"k": torch.bfloat16}, "q, k and v have dtypes torch.float32, torch.bfloat16 and torch.float32; one is supported"),
        ({}, "it needs a CUDA device, not 'meta'"),
    ],
)
def test_a_device_without_our_kernels_keeps_fla_s(
    change: dict[str, torch.dtype], reason: str, called: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from deltaproduct_kernels.triton_backend import launch

    monkeypatch.setattr(launch, "INTERPRETED", False)
    x = {name: None if value is None else value.to("meta", change.get(name)) for name, value in inputs().items()}
    with pytest.warns(UserWarning, match=reason):
        functions()["gated_deltaproduct"](**x, num_householder=1)
    assert called == ["chunk_gated_delta_product"]


# -- putting in and taking out ---------------------------------------------------------------------------------------------


def test_it_is_undone_and_a_second_call_changes_nothing() -> None:
    before = functions()
    first = accelerate_fla()
    within = functions()
    assert not set(within.values()) & set(before.values())
    with accelerate_fla():
        assert functions() == within
    assert functions() == within, "who came second undid what was not theirs"
    first.close()
    assert functions() == before


def test_what_somebody_else_has_put_there_since_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def other() -> None:
        pass

    before = functions()
    monkeypatch.setattr("fla.layers.delta_net.chunk_delta_rule", before["delta_net"])  # what it is set back to in the end
    with accelerate_fla():
        importlib.import_module("fla.layers.delta_net").chunk_delta_rule = other
    assert functions() == before | {"delta_net": other}


def test_without_fla_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fla.layers.gated_deltaproduct", None)
    with pytest.raises(ImportError, match=r"accelerate_fla needs flash-linear-attention 0\.6 .*pip install 'flash-linear"):
        accelerate_fla()


@pytest.mark.parametrize(
    ("theirs", "found"),
    [(lambda q, k, v, scale=None: None, "q, k, v, scale"), (None, "no such function")],
    ids=["another signature", "another name"],
)
def test_another_version_of_fla_is_refused_and_nothing_is_replaced(
    theirs: Callable[..., Any] | None, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("fla.layers.delta_net")
    if theirs is not None:
        module.chunk_delta_rule = theirs  # type: ignore[attr-defined]
    before = functions()
    monkeypatch.setitem(sys.modules, "fla.layers.delta_net", module)
    with pytest.raises(ImportError, match=f"does not know this version .*chunk_delta_rule .* found: {found}\\. It knows 0.6"):
        accelerate_fla()
    monkeypatch.undo()
    assert functions() == before


# -- whole models ----------------------------------------------------------------------------------------------------------

ONE = {"num_hidden_layers": 1, "use_output_gate": True}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "DeltaProduct_2": ("gated_deltaproduct", ONE),
    "Gated DeltaProduct_3": ("gated_deltaproduct", ONE | {"num_householder": 3, "use_forget_gate": True}),
    "Gated DeltaNet": ("gated_deltanet", ONE | {"num_householder": 1, "use_forget_gate": True}),
    "DeltaNet": ("delta_net", ONE | {"num_householder": 1}),
}


@pytest.mark.parametrize("name", MODELS)
def test_fla_s_model_trains_on_our_operator_as_our_model_does(name: str, export_of: Make) -> None:
    """Logits and the gradient of every weight, in float32, by the definition on our side; fla does 66 tokens in chunks."""
    model_type, changes = MODELS[name]
    ids, generator = tokens(1, 66), torch.Generator().manual_seed(0)
    ours = random_model(**changes, backend="recurrent")[1]
    theirs = load(export_of(changes, model_type=model_type), attn_implementation="eager").train()
    expected = ours(ids)
    cotangent = torch.randn(expected.shape, generator=generator)
    expected.backward(cotangent)
    with accelerate_fla(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        actual = theirs(ids).logits
        actual.backward(cotangent)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    wanted = {hf_name(name): p.grad.view_as(gradients[hf_name(name)]) for name, p in ours.named_parameters()}
    errors = {name: error(gradients[name], wanted[name]) for name in wanted}
    assert errors.keys() == gradients.keys()
    assert max(errors.values()) < 1e-4, errors


def test_the_readme_s_example_trains(root: Path) -> None:
    """On the device at hand, in float32."""
    _, example = re.findall(r"```python\n(.*?)```", (root / "kernels/README.md").read_text(), re.DOTALL)
    scope: dict[str, Any] = {}
    with accelerate_fla(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        exec(example.replace('.to("cuda", torch.bfloat16)', "").replace(', device="cuda"', ""), scope)
    assert all(p.grad.isfinite().all() for p in scope["model"].parameters())
