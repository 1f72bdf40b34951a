"""Models that exported folders are made of, and what their outputs are compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titan_dp.model.transformer import Transformer

UNTIED: dict[str, Any] = {"use_output_gate": True, "expand_v": 2.0, "tie_word_embeddings": False}
GROUP_NORM: dict[str, Any] = {"num_heads": 4, "num_key_heads": 2, "use_output_gate": True, "output_norm": "group"}
VARIANTS: dict[str, dict[str, Any]] = {
    "DeltaProduct_2": {},
    "DeltaNet, more heads than fit the width": {"num_householder": 1, "num_heads": 3, "norm_eps": 1e-2},
    "Gated DeltaProduct_3, output gate, expand_v 2, untied": {"num_householder": 3, "use_forget_gate": True, **UNTIED},
    "DeltaProduct_3, beta in [0, 1]": {"num_householder": 3, "allow_neg_eigval": False, "use_short_conv": False},
    "narrow values, short convolution": {"use_output_gate": True, "expand_v": 0.5, "conv_size": 2, "norm_eps": 1e-2},
    "step sizes that reach 2": {"beta_stretch": 0.5},
    "grouped heads": {"num_heads": 4, "num_key_heads": 2, "num_householder": 3, "use_forget_gate": True, "expand_v": 0.5},
    "norm over groups behind the gate": {**GROUP_NORM, "gate_before_norm": True, "use_forget_gate": True, "num_householder": 3},
    "norm over groups before the gate": {**GROUP_NORM, "expand_v": 0.5},
    "gated linear attention": {"mixer": "gla", "num_householder": 1, "use_forget_gate": True},
    "Transformer": {"mixer": "attention"},
    "Transformer, windowed": {"mixer": "attention", "attention_num_heads": 4, "attention_window": 9},
    "hybrid, untied": {**UNTIED, "attention_layers": [1], "use_forget_gate": True, "rope_theta": 500.0},
    "hybrid in OLMo's blocks": {"attention_layers": [1], "attention_block": "olmo", "attention_num_kv_heads": 1},
    "hybrid, windowed, grouped": {"attention_layers": [0], "attention_num_kv_heads": 1, "attention_window": 9},
}


def load(folder: Path, **how: Any) -> Any:
    """The folder in transformers; every tensor must find its place."""
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **how)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1))


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Within 1e-4, and logits are large enough to tell models apart."""
    assert float(expected.detach().std()) > 0.1
    torch.testing.assert_close(actual.detach(), expected.detach(), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def greedy(model: Transformer, prompt: Tensor, count: int) -> Tensor:
    """The likeliest continuation [B, count] of prompt [B, T]: for each token the last logits of a parallel forward."""
    seen = prompt
    for _ in range(count):
        seen = torch.cat([seen, model(seen)[:, -1:].argmax(-1)], 1)
    return seen[:, prompt.shape[1] :]
