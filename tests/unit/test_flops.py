"""The FLOP convention against torch's own counter."""

from __future__ import annotations

import pytest
import torch
from deltaproduct_kernels import executed_flops, recurrence_flops
from deltaproduct_kernels.chunked import chunk_tokens
from deltaproduct_kernels.ops import max_chunks
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.unit.test_model import make, settings, tokens_of

B, T = 2, 40


def counted(model: nn.Module) -> int:
    """FLOPs torch sees in the forward and backward of a batch, output matrix included."""
    tokens = tokens_of(B, T)
    with FlopCounterMode(display=False) as counter:
        model(tokens).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("changes", [{}, {"num_householder": 3}, {"use_output_gate": True, "expand_v": 2.0}])
def test_matmuls_are_six_a_weight_and_the_rest_is_the_chunked_recurrence(changes: dict) -> None:
    model, c = make(**changes), settings(**changes)
    k, v = (torch.Size([B, T, c.num_householder, 2, d]) for d in (8, c.head_v_dim))
    chunks = max_chunks(B, T, c.num_householder, 8, None)
    recurrence = sum(executed_flops(k, v, chunks, erase=True, backward=b) for b in (False, True)) * c.num_hidden_layers
    assert counted(model) == model.flops_breakdown(T)["matmul"] * B * T + recurrence


def test_the_chunked_algorithm_executes_more_than_the_model_needs_and_mfu_counts_the_latter() -> None:
    k = torch.Size([1, 4096, 2, 12, 128])
    chunks = max_chunks(1, 4096, 2, 128, None)
    executed = sum(executed_flops(k, k, chunks, erase=True, backward=b) for b in (False, True))
    model = 3 * recurrence_flops(4096, 12, 128, 128, 2, gated=False)
    assert chunk_tokens(2, 128) == 32
    assert 1.2 < executed / model < 2.5


@pytest.mark.parametrize("window", [None, 7])
def test_attention_counts_visible_pairs_only(window: int | None) -> None:
    flops = make(mixer="attention", attention_window=window).flops_breakdown(T)
    visible = sum(min(t + 1, window or T) for t in range(T)) / T
    assert flops["attention"] == pytest.approx(2 * 3 * (2 + 2) * visible * 24, rel=1e-3)  # layers, fwd+bwd, QK and PV, width


def test_a_transformer_is_matmuls_and_attention_over_the_full_square_as_torch_counts_it() -> None:
    model = make(mixer="attention")
    full_square = 2 * 3 * (2 + 2) * T * 24 * B * T
    with sdpa_kernel(SDPBackend.MATH):  # the counter has no formula for the CPU's flash attention
        assert counted(model) == model.flops_breakdown(T)["matmul"] * B * T + full_square


def test_the_parts_of_a_real_model_are_the_closed_forms() -> None:
    model = make(use_forget_gate=True)
    c, layers = settings(), 2
    flops = model.flops_breakdown(T)
    mixer = 24 * (16 + 2 * 16 + 2 * 16 + 2 * 2 + 2 + 16)
    assert flops["matmul"] == 6 * (layers * (mixer + 3 * 24 * 40) + 50 * 24)
    assert flops["conv"] == 6 * layers * 4 * (16 + 32 + 32)
    assert flops["recurrence"] == layers * 3 * (4 * c.num_householder + 2 + 1) * 8 * 8 * 2
    assert model.flops_per_token(T) == sum(flops.values())
