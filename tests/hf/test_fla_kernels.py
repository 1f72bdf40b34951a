"""Each plain replacement in fla_on_cpu.py computes what the Triton kernels of flash-linear-attention compute.

The kernels run as they are, on a GPU or in Triton's interpreter. flash-attention's two functions are not among them: that
package installs only with a GPU, and they are written from its documentation.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.hf import fla_on_cpu

pytestmark = [
    pytest.mark.filterwarnings("ignore:Triton is not supported"),
    pytest.mark.filterwarnings("ignore:Flash Attention is not installed"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
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
