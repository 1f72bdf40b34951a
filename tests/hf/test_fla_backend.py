"""Backend 'fla': flash-linear-attention's operator behind our contract, in Triton's interpreter if there is no GPU.

What runs here is fla's own autograd function in float32, which it refuses on a GPU.
"""

from __future__ import annotations

from importlib.metadata import version

import pytest
import torch
from deltaproduct_kernels import fla_backend, gated_delta_product, resolve_backend
from torch import Tensor

from tests.hf.exported import tokens
from tests.kernels.helpers import assert_same, assert_selective_checkpointing_saves_a_forward, error, make, results
from tests.pretrained import random_model
from titan_dp import config
from titan_dp.model.parallelize import apply_activation_checkpoint
from titan_dp.model.transformer import chosen_backend

pytestmark = [
    pytest.mark.usefixtures("fla"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2"),  # of what a mask then leaves out
]
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def inputs(T: int = 35, **options: object) -> dict[str, Tensor]:
    return make(T, dtype=torch.float32, **({"B": 1, "H": 1, "dk": 16, "dv": 16} | options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [{"n": 1}, {"n": 2, "gate": None}, {"n": 3, "B": 2}],
    ids=["one step, gate", "two steps", "three steps, gate, two rows"],
)
def test_it_computes_the_definition(options: dict[str, object]) -> None:
    x = inputs(**options)
    assert_same(results(x, "fla"), results(x, "recurrent"), 1e-4)  # its gates are differences of sums of logarithms


def test_packed_sequences_from_their_states() -> None:
    x, cu_seqlens = inputs(states=3), torch.tensor([0, 5, 6, 35], dtype=torch.int32)
    assert_same(results(x, "fla", cu_seqlens=cu_seqlens), results(x, "recurrent", cu_seqlens=cu_seqlens), 1e-4)


@pytest.mark.parametrize("gate", [None, 0.3], ids=["no gate", "gate"])
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_it_is_an_operator_as_torch_wants_one(gate: float | None, packed: bool) -> None:
    """Shapes and strides without data, autograd, and the same under a compiler."""
    x = inputs(5, gate=gate, states=2 if packed else None)
    cu_seqlens = torch.tensor([0, 2, 5]) if packed else None
    arguments = [x[name] for name in ("q", "k", "v", "beta")] + [x.get("g"), x["initial_state"], cu_seqlens, 0.25]
    torch.library.opcheck(fla_backend.fla_chunk, arguments)


def test_checkpointing_that_keeps_operators_runs_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_selective_checkpointing_saves_a_forward(monkeypatch, fla_backend, "_forward", inputs(5), "fla")


@pytest.mark.parametrize("loss_of", [0, 1], ids=["the output alone", "the state alone"])
def test_gradients_of_one_result(loss_of: int) -> None:
    x, found = inputs(5), []
    for backend in ("fla", "recurrent"):
        y = gated_delta_product(**x, output_final_state=True, backend=backend)[loss_of]
        assert y is not None
        found.append(torch.autograd.grad(y.square().sum(), list(x.values()), allow_unused=True, materialize_grads=True))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("compiled", [False, True], ids=["as it is", "in one graph"])
def test_a_model_trains_on_it_under_activation_checkpointing(compiled: bool) -> None:
    """Its front end is ours."""
    gradients = []
    for backend in ("fla", "recurrent"):
        model = random_model(num_hidden_layers=1, use_forget_gate=True, backend=backend)[1]
        if backend == "fla":
            apply_activation_checkpoint(model, config.ActivationCheckpoint(mode="selective", selective_ac_option="op"))
            for block in model.layers if compiled else ():
                block.compile(fullgraph=True, backend="aot_eager")
        model(tokens(1, 7)).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert error(*gradients) < 1e-4


def test_it_does_not_compute_linear_attention() -> None:
    with pytest.raises(ValueError, match="erase = False is not in flash-linear-attention's gated delta product"):
        gated_delta_product(**inputs(2), erase=False, backend="fla")


def test_a_run_says_which_version() -> None:
    assert chosen_backend(config.Model(backend="fla"), CPU) == f"fla {version('fla-core')}"


# -- where it cannot run ---------------------------------------------------------------------------------------------------


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from deltaproduct_kernels.triton_backend import launch

    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(ValueError, match="backend = 'fla' cannot run: it needs a CUDA device, not 'cpu'; choose 'auto'"):
        resolve_backend("fla", CPU)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise fla_backend.PackageNotFoundError(name)

    monkeypatch.setattr(fla_backend, "version", missing)
    with pytest.raises(ValueError, match="cannot run: the package flash-linear-attention is not installed; choose 'auto'"):
        resolve_backend("fla", GPU)


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fla_backend, "version", lambda name: "0.7.1")
    with pytest.raises(ValueError, match=r"was written for flash-linear-attention 0\.6, and fla-core 0\.7\.1 is installed"):
        resolve_backend("fla", GPU)


def test_float32_is_refused_on_a_gpu() -> None:
    assert resolve_backend("fla", GPU, torch.bfloat16) == "fla"
    with pytest.raises(ValueError, match=r"q has dtype torch\.float32; flash-linear-attention takes bfloat16 and float16"):
        resolve_backend("fla", GPU, torch.float32)
