"""An exported folder computes in flash-linear-attention what the model it was made from computes.

The folder is loaded by fla's own AutoModelForCausalLM. Its kernels are replaced by plain torch (fla_on_cpu.py; compared with
the kernels in test_fla_kernels.py), and a few whole models run on the kernels with nothing replaced.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.hf import fla_on_cpu
from tests.hf.exported import exported, greedy, tokens

pytestmark = pytest.mark.filterwarnings("ignore:ShortConvolution is crucial")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

VARIANTS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "DeltaProduct_2": (None, {}),
    "Gated DeltaProduct_2": (None, {"use_forget_gate": True}),
    "Gated DeltaProduct_3, output gate, expand_v 2, untied": (
        None,
        {
            "num_householder": 3,
            "use_forget_gate": True,
            "use_output_gate": True,
            "expand_v": 2.0,
            "tie_word_embeddings": False,
        },
    ),
    "DeltaProduct_3, beta in [0, 1], no convolution": (
        None,
        {"num_householder": 3, "allow_neg_eigval": False, "use_short_conv": False},
    ),
    "output gate, ungated, narrow values, short convolution": (
        None,
        {"use_output_gate": True, "expand_v": 0.5, "conv_size": 3, "norm_eps": 1e-2},
    ),
    "DeltaNet, more heads than fit the width": (None, {"num_householder": 1, "num_heads": 3}),
    "Gated DeltaNet": (None, {"num_householder": 1, "use_forget_gate": True}),
    "hybrid": (None, {"attention_layers": [1], "use_forget_gate": True, "rope_theta": 500.0}),
    "hybrid, windowed, grouped": (
        None,
        {"attention_layers": [0], "attention_num_heads": 4, "attention_num_kv_heads": 2, "attention_window": 9},
    ),
    "Transformer": (None, {"mixer": "attention", "attention_num_kv_heads": 1}),
    "gated_deltanet": ("gated_deltanet", {"num_householder": 1, "use_forget_gate": True}),
    "gated_deltanet, output gate, expand_v 2, untied, beta in [0, 1]": (
        "gated_deltanet",
        {
            "num_householder": 1,
            "use_forget_gate": True,
            "use_output_gate": True,
            "expand_v": 2.0,
            "tie_word_embeddings": False,
            "allow_neg_eigval": False,
            "norm_eps": 1e-2,
        },
    ),
    "gated_deltanet, hybrid, no convolution": (
        "gated_deltanet",
        {"num_householder": 1, "use_forget_gate": True, "use_short_conv": False, "attention_layers": [1]},
    ),
    "delta_net": ("delta_net", {"num_householder": 1}),
    "delta_net, output gate, three heads, expand_v 2, beta in [0, 1]": (
        "delta_net",
        {
            "num_householder": 1,
            "use_output_gate": True,
            "num_heads": 3,
            "expand_v": 2.0,
            "allow_neg_eigval": False,
            "norm_eps": 1e-2,
        },
    ),
    "delta_net, hybrid, no convolution, untied": (
        "delta_net",
        {"num_householder": 1, "use_short_conv": False, "attention_layers": [0], "tie_word_embeddings": False},
    ),
}
ON_KERNELS = [
    "Gated DeltaProduct_3, output gate, expand_v 2, untied",
    "output gate, ungated, narrow values, short convolution",
    "hybrid, windowed, grouped",
    "gated_deltanet, output gate, expand_v 2, untied, beta in [0, 1]",
    "delta_net, output gate, three heads, expand_v 2, beta in [0, 1]",
]


@pytest.fixture(scope="module", autouse=True)
def _fla() -> Iterator[None]:
    """fla registers its models with transformers, and says once that there is no GPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("fla")
        yield


@pytest.fixture
def plain() -> Iterator[None]:
    with fla_on_cpu.fla_on_cpu():
        yield


def load(folder: Path) -> Any:
    """The folder as any user of flash-linear-attention loads it; every tensor must find its place."""
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    assert type(model).__module__.startswith("fla.models.")
    return model.to(DEVICE)


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    return model(ids.to(DEVICE)).logits.float().cpu()


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Within 1e-4, where logits are of a size to tell models apart."""
    assert float(expected.detach().std()) > 0.1
    torch.testing.assert_close(actual, expected.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("name", VARIANTS)
def test_fla_computes_our_logits_in_chunks_and_in_steps(name: str, tmp_path: Path) -> None:
    model_type, changes = VARIANTS[name]
    ours, folder = exported(tmp_path, changes, model_type=model_type)
    theirs = load(folder)
    for length in (70, 20):  # fla's chunked path, and its recurrent path for up to 64 tokens
        ids = tokens(2, length)
        assert_same(logits(theirs, ids), ours(ids))


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("name", ["Gated DeltaProduct_2", "hybrid, windowed, grouped", "gated_deltanet", "delta_net"])
def test_fla_generates_our_continuation_token_by_token(name: str, tmp_path: Path) -> None:
    model_type, changes = VARIANTS[name]
    ours, folder = exported(tmp_path, changes, model_type=model_type)
    prompt = tokens(2, 12)
    written = load(folder).generate(
        prompt.to(DEVICE), attention_mask=torch.ones_like(prompt), max_new_tokens=15, do_sample=False
    )
    assert torch.equal(written[:, 12:].cpu(), greedy(ours, prompt, 15))


@pytest.mark.parametrize("model_type", ["gated_deltaproduct", "gated_deltanet"])
def test_no_token_is_cut_off_from_fine_tuning(model_type: str, tmp_path: Path) -> None:
    """fla makes pad_token_id the embedding's padding_idx, which gets no gradient: the end of the text must not be it."""
    _, folder = exported(tmp_path, {"num_householder": 1, "use_forget_gate": True}, model_type=model_type)
    theirs = load(folder)
    assert theirs.model.embeddings.padding_idx is None
    assert theirs.generation_config.pad_token_id is not None


@pytest.mark.parametrize("name", ON_KERNELS)
def test_fla_computes_our_logits_on_its_own_kernels(name: str, tmp_path: Path) -> None:
    model_type, changes = VARIANTS[name]
    ours, folder = exported(tmp_path, changes, model_type=model_type)
    ids = tokens(1, 11)
    with fla_on_cpu.fla_interpreted():
        actual = logits(load(folder), ids)
    assert_same(actual, ours(ids))


def test_a_model_whose_weights_are_not_the_exported_ones_is_told_apart(tmp_path: Path) -> None:
    ours, folder = exported(tmp_path, {"use_forget_gate": True})
    theirs = load(folder)
    with torch.no_grad():
        theirs.model.layers[1].attn.dt_bias += 0.1
    with fla_on_cpu.fla_on_cpu():
        difference = (logits(theirs, tokens(2, 20)) - ours(tokens(2, 20)).detach()).abs().max()
    assert float(difference) > 1e-2
