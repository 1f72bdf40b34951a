"""A small trained model and its exported folder, for tests of what others make of the folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.pretrained import random_model, save_checkpoint
from titan_dp import config
from titan_dp.inference.hf.export import export
from titan_dp.inference.pretrained import open_source
from titan_dp.model.transformer import Transformer


def exported(folder: Path, changes: dict[str, Any], **how: Any) -> tuple[Transformer, Path]:
    """The model with those [model] keys, and the Hugging Face folder that `export(..., **how)` writes of its checkpoint."""
    _, model = random_model(**changes)
    checkpoint = save_checkpoint(folder / "run", **changes)
    export(open_source(checkpoint), folder / "exported", **how)
    return model, folder / "exported"


def tokens(*shape: int, vocab_size: int = 256) -> Tensor:
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def greedy(model: Transformer, prompt: Tensor, count: int) -> Tensor:
    """The likeliest continuation [B, count] of prompt [B, T]: the last logits of a parallel forward for each token."""
    seen = prompt
    for _ in range(count):
        seen = torch.cat([seen, model(seen)[:, -1:].argmax(-1)], 1)
    return seen[:, prompt.shape[1] :]


def function_of(c: config.Model) -> dict[str, Any]:
    """The settings that the function computed and its initialisation depend on, in one spelling: defaults filled in, the
    keys of mixers that no layer has left out."""
    values = c.model_dump(exclude={"backend", "mixer", "attention_layers"})
    mixers = [c.mixer_of(i) for i in range(c.num_hidden_layers)]
    values |= {"mixers": mixers, "intermediate_size": c.mlp_size, "expand_v": c.head_v_dim / c.head_dim}
    values |= {"attention_num_heads": c.softmax_heads, "attention_num_kv_heads": c.attention_num_kv_heads or c.softmax_heads}
    softmax = {"attention_num_heads", "attention_num_kv_heads", "attention_window", "rope_theta"}
    shared = {"hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size", "tie_word_embeddings", "norm_eps"}
    shared |= {"initializer_range", "mixers"}
    if "attention" not in mixers:
        values = {key: value for key, value in values.items() if key not in softmax}
    if set(mixers) == {"attention"}:
        values = {key: value for key, value in values.items() if key in softmax | shared}
    return values
