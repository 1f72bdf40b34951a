"""An exported folder computes in flash-linear-attention what the model it was made from computes.

The folder is loaded by fla's own AutoModelForCausalLM. Its kernels are replaced by plain torch (fla_on_cpu.py), the
replacements compared with the kernels themselves, and a few whole models run on the kernels with nothing replaced.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
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


# -- whole models ------------------------------------------------------------------------------------------------------


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


# -- each replacement against the kernel it stands for -----------------------------------------------------------------


CHUNKED = {"rtol": 1e-2, "atol": 1e-2} if DEVICE == "cuda" else {"rtol": 1e-5, "atol": 1e-5}  # tensor cores round to tf32


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


q, k, v_ = normal(1, 12, 2, 8), normal(1, 12, 2, 8, seed=1), normal(1, 12, 2, 16, seed=2)
beta, g = normal(1, 12, 2, seed=3), -normal(1, 12, 2, seed=4).abs()
gate = {"A_log": normal(2, seed=5), "dt_bias": normal(2, seed=6)}
three = torch.tensor([0, 5, 6, 12], device=DEVICE)
state, state_v_first = normal(3, 2, 8, 16, seed=7), normal(3, 2, 16, 8, seed=7)
UNIT = {"q": F.normalize(q, dim=-1), "k": F.normalize(k, dim=-1), "v": v_, "beta": beta.sigmoid(), "scale": 0.3}
RAW = {"q": q, "k": k, "v": v_, "gk": None, "gv": None, "scale": 8**-0.5, "output_final_state": True}
CONV = {"weight": normal(6, 4, seed=8), "bias": None, "residual": None, "activation": "silu"}
angle = normal(20, 4, seed=9)

KERNEL_CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "l2norm": ("fla.ops.delta_rule.fused_recurrent.l2norm_fwd", {"x": 1e-3 * q}),
    "rms norm": (
        "fla.modules.norm.layernorm.layer_norm_fwd",
        {"x": normal(9, 24), "weight": normal(24, seed=1), "bias": None, "eps": 0.1, "is_rms_norm": True},
    ),
    "rms norm of a sum": (
        "fla.modules.norm.layernorm.layer_norm_fwd",
        {
            "x": normal(9, 24),
            "residual": normal(9, 24, seed=2),
            "weight": normal(24, seed=1),
            "bias": None,
            "is_rms_norm": True,
        },
    ),
    "gated rms norm": (
        "fla.modules.norm.fused_norm_gate.layer_norm_gated_fwd",
        {"x": normal(9, 24), "g": normal(9, 24, seed=2), "weight": normal(24, seed=1), "bias": None, "is_rms_norm": True},
    ),
    "swiglu": ("fla.modules.activations.ops.swiglu_fwd", {"x": normal(9, 24), "y": normal(9, 24, seed=1)}),
    "beta": ("fla.ops.gated_delta_rule.chunk.fused_beta_sigmoid", {"x": beta, "scale": 2.0}),
    "rotary": (
        "fla.modules.rotary.ops.rotary_embedding_fwdbwd",
        {"x": q, "cos": angle.cos(), "sin": angle.sin(), "seqlen_offsets": 3},
    ),
    "rotary after left padding": (
        "fla.modules.rotary.ops.rotary_embedding_fwdbwd",
        {
            "x": q.view(2, 6, 2, 8),
            "cos": angle.cos(),
            "sin": angle.sin(),
            "seqlen_offsets": torch.tensor([4, -2], device=DEVICE),
        },
    ),
    "convolution": (
        "fla.modules.causal_conv1d.ops.causal_conv1d_fwd",
        {"x": normal(2, 9, 6), "output_final_state": True, **CONV},
    ),
    "convolution of three sequences with states": (
        "fla.modules.causal_conv1d.ops.causal_conv1d_fwd",
        {
            "x": normal(1, 12, 6),
            "cu_seqlens": three,
            "initial_state": normal(3, 6, 4, seed=1),
            "output_final_state": True,
            **CONV,
        },
    ),
    "convolution of one token": (
        "fla.modules.causal_conv1d.ops.causal_conv1d_update",
        {"x": normal(3, 1, 6), "cache": normal(3, 6, 4, seed=1), **CONV},
    ),
    "delta rule in steps": (
        "fla.ops.delta_rule.fused_recurrent.fused_recurrent_delta_rule_fwd",
        {**UNIT, "initial_state": state, "output_final_state": True, "cu_seqlens": three},
    ),
    "gated delta rule in chunks": (
        "fla.ops.gated_delta_rule.chunk.chunk_gated_delta_rule_fwd",
        {**UNIT, "g": g, "use_gate_in_kernel": True, **gate, "initial_state": state_v_first, "cu_seqlens": three}
        | {
            "output_final_state": True,
            "state_v_first": True,
            "chunk_indices": torch.tensor([[0, 0], [1, 0], [2, 0]], device=DEVICE),
        },
    ),
    "gated delta rule in steps": (
        "fla.ops.gated_delta_rule.fused_recurrent.fused_recurrent_gated_delta_rule_fwd",
        {**RAW, "g": g, "beta": beta.sigmoid(), "A_log": None, "dt_bias": None, "initial_state": state, "cu_seqlens": three}
        | {"use_qk_l2norm_in_kernel": True},
    ),
    "gated delta rule in steps, everything in the kernel": (
        "fla.ops.gated_delta_rule.fused_recurrent.fused_recurrent_gated_delta_rule_fwd",
        {**RAW, "g": beta, "beta": beta, **gate, "initial_state": state_v_first, "cu_seqlens": three}
        | {
            "use_beta_sigmoid_in_kernel": True,
            "allow_neg_eigval": True,
            "state_v_first": True,
            "use_qk_l2norm_in_kernel": True,
        },
    ),
}


def original(target: str) -> Callable[..., Any]:
    module, _, name = target.rpartition(".")
    return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", KERNEL_CALLS)
def test_a_replacement_computes_what_flas_kernel_computes(name: str) -> None:
    target, arguments = KERNEL_CALLS[name]
    copies = {key: value.clone() if isinstance(value, Tensor) else value for key, value in arguments.items()}
    with fla_on_cpu.fla_interpreted():
        kernel = original(target)(**copies)
    replacement = fla_on_cpu.REPLACEMENTS[target](**arguments)
    pairs = [(kernel, replacement)] if isinstance(kernel, Tensor) else list(zip(kernel, replacement, strict=True))
    compared = [torch.testing.assert_close(a, b) for a, b in pairs if a is not None and b is not None]
    assert compared


@pytest.mark.parametrize("gated", [False, True])
def test_the_replacement_of_the_chunked_product_computes_what_flas_kernels_compute(gated: bool) -> None:
    """Below the function that refuses float32; 70 tokens of three steps are four chunks, of which the last is cut off."""
    from fla.ops.gated_delta_product.chunk import ChunkGatedDeltaProductFunction

    q, k, v = normal(1, 70, 2, 8), normal(1, 210, 2, 8, seed=1), normal(1, 210, 2, 16, seed=2)
    beta, g = 2 * normal(1, 210, 2, seed=3).sigmoid(), -normal(1, 70, 2, seed=4).abs() if gated else None
    with fla_on_cpu.fla_interpreted():
        expected = ChunkGatedDeltaProductFunction.apply(q, k, v, g, beta, 0.3, 3, None, True, True)
    actual = fla_on_cpu.chunk_gated_delta_product(q, k, v, g, beta, 3, 0.3, None, True, True)
    torch.testing.assert_close(actual, expected, **CHUNKED)


def test_the_replacement_of_the_chunked_delta_rule_computes_what_flas_kernels_compute() -> None:
    from fla.ops.delta_rule.chunk import chunk_delta_rule_fwd

    q, k, v, beta = (x.repeat(1, 7, *[1] * (x.ndim - 2)) for x in (UNIT["q"], UNIT["k"], v_, UNIT["beta"]))
    arguments = {"q": q, "k": k, "v": v, "beta": beta, "scale": 0.3, "initial_state": state[:1], "output_final_state": True}
    with fla_on_cpu.fla_interpreted():
        o, _, last = chunk_delta_rule_fwd(**arguments)
    actual = fla_on_cpu.chunk_delta_rule(**arguments)
    torch.testing.assert_close(actual, (o, last), **CHUNKED)
