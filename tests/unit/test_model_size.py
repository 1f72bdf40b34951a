"""Counts from the configuration alone, against the tensors of real models and torch's own FLOP counter."""

from __future__ import annotations

import pytest
import torch
from deltaproduct_kernels import executed_flops
from deltaproduct_kernels.ops import max_chunks
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.unit.test_model import VARIANTS, make, settings, tokens_of
from titan_dp.config.mixers import recurrence_flops
from titan_dp.model.size import model_size, state_size
from titan_dp.model.transformer import build_model

B, T = 2, 40


def counted(model: nn.Module) -> int:
    """FLOPs torch sees in the forward and backward of a batch, output matrix included."""
    tokens = tokens_of(B, T)
    with FlopCounterMode(display=False) as counter:
        model(tokens).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("changes", [{"num_householder": 3, "adaptive_householder": True}, {"use_output_gate": True}])
def test_matmuls_are_six_a_weight_and_the_rest_is_the_chunked_recurrence(changes: dict) -> None:
    model, c = make(**changes), settings(**changes)
    k, v = (torch.Size([B, T, c.num_householder, 2, d]) for d in (8, c.head_v_dim))
    chunks = max_chunks(B, T, c.num_householder, 8, None)
    recurrence = sum(executed_flops(k, v, chunks, erase=True, backward=b) for b in (False, True)) * c.num_hidden_layers
    assert counted(model) == model_size(c, T).matmul * B * T + recurrence


@pytest.mark.parametrize("window", [None, 7])
def test_attention_counts_visible_pairs_only(window: int | None) -> None:
    size = model_size(settings(mixer="attention", attention_window=window), T)
    visible = sum(min(t + 1, window or T) for t in range(T)) / T
    assert size.attention == pytest.approx(2 * 3 * (2 + 2) * visible * 24, rel=1e-3)  # layers, fwd+bwd, QK and PV, width


def test_a_transformer_is_matmuls_and_attention_over_the_full_square_as_torch_counts_it() -> None:
    c, model = settings(mixer="attention"), make(mixer="attention")
    full_square = 2 * 3 * (2 + 2) * T * 24 * B * T
    with sdpa_kernel(SDPBackend.MATH):  # the counter has no formula for the CPU's flash attention
        assert counted(model) == model_size(c, T).matmul * B * T + full_square


def test_rwkv7_is_matmuls_and_its_definition_but_for_the_decays_as_torch_counts_it() -> None:
    n, changes = 2, {"mixer": "rwkv7", "num_householder": 2, "expand_v": 2.0}
    size, entries = model_size(settings(**changes), T), 2 * B * 2 * 8 * 16  # layers, rows, heads, dk, dv
    assert size.recurrence * B * T == entries * T * 3 * ((2 + 1 + 2 + 2) * n + 2)  # read, decay, erase, write; query
    decays = entries * T * 3 * n  # elementwise, which the counter leaves out
    zero_state = entries * 2  # the first read's gradient that nobody wants
    assert counted(make(**changes)) == (size.matmul + size.recurrence) * B * T - decays - zero_state


SHAPES = [
    *VARIANTS.values(),
    {"adaptive_householder": True, "num_householder": 5},
    {"mixer": "rwkv7", "use_forget_gate": True, "expand_v": 0.5, "attention_layers": [0]},
    {"mixer": "attention", "attention_num_kv_heads": 1},
]


@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_parameters_are_those_of_the_model_that_is_built(changes: dict) -> None:
    c = settings(**changes)
    with torch.device("meta"):
        tensors = build_model(c).parameters()
    assert model_size(c, T).parameters == sum(p.numel() for p in tensors)


def test_model_flops_are_those_of_the_definition() -> None:
    """Each of the n steps reads and writes a rank one, the gate scales the state, the query reads; each token is convolved."""
    H, dk, dv, n = 2, 8, 8, 2
    read = write = 2 * dk * dv  # one multiply-add per entry of the state
    assert recurrence_flops(10, H, dk, dv, n, gated=True) == 10 * H * (n * (read + write) + read + dk * dv)
    assert recurrence_flops(10, H, dk, dv, 1, gated=False, erase=False) == 10 * H * (write + read)
    size = model_size(settings(use_forget_gate=True), T)
    assert size.recurrence == 2 * 3 * recurrence_flops(1, H, dk, dv, n, gated=True), "two layers, forward and backward"
    assert size.conv == 6 * 2 * 4 * (16 + 32 + 32)
    assert size.flops_per_token == size.matmul + size.conv + size.recurrence
    assert state_size(settings()) == H * dk * dv
