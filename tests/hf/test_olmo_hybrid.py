"""An exported gated delta net in transformers' OlmoHybrid, whose code is not ours: the same logits, cache and text."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.hf.exported import assert_same, greedy, load, tokens
from tests.pretrained import Make, random_model
from titan_dp.config import Model
from titan_dp.errors import UserError
from titan_dp.inference.hf.folder import FolderSource
from titan_dp.inference.hf.olmo_hybrid import from_hf, to_hf

modeling = pytest.importorskip("transformers.models.olmo_hybrid.modeling_olmo_hybrid")

BASE: dict[str, Any] = {"num_householder": 1, "use_output_gate": True, "norm_eps": 1e-5}
MODELS: dict[str, dict[str, Any]] = {
    "Gated DeltaNet": {"use_forget_gate": True},
    "DeltaNet, no gate of decay": {},
    "no convolution, beta in [0, 1]": {"use_forget_gate": True, "use_short_conv": False, "allow_neg_eigval": False},
    "wide values, short convolution, untied": {"expand_v": 2.0, "conv_size": 2, "tie_word_embeddings": False},
}


@pytest.fixture(autouse=True)
def without_fla(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model takes flash-linear-attention's kernels where that is installed, and they need a GPU."""
    for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"):
        monkeypatch.setattr(modeling, name, getattr(modeling, name).__wrapped__)


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_what_is_written_are_the_models_own(name: str, export_of: Make) -> None:
    changes = BASE | MODELS[name]
    ours, theirs = random_model(**changes)[1], load(export_of(changes, target="olmo-hybrid"))
    assert type(theirs).__name__ == "OlmoHybridForCausalLM"
    ids = tokens(2, 70)
    with torch.no_grad():
        assert_same(theirs(ids).logits, ours(ids))
    written = theirs.generate(ids[:1, :5], max_new_tokens=8, do_sample=False)[:, 5:]
    assert torch.equal(written, greedy(ours, ids[:1, :5], 8))


def test_the_configuration_leaves_nothing_to_defaults(export_of: Make) -> None:
    """Its defaults are another model's: a padding id beyond our vocabulary, positions, heads and dimensions."""
    written = json.loads((export_of(BASE, target="olmo-hybrid") / "config.json").read_text())
    assert {"pad_token_id", "bos_token_id", "eos_token_id", "rope_parameters", "layer_types"} <= written.keys()
    assert (written["pad_token_id"], written["eos_token_id"], written["rope_parameters"]) == (None, 257, None)
    assert written["layer_types"] == ["linear_attention"] * 2 + ["full_attention"]


def test_every_value_dimension_comes_back() -> None:
    """44 times 240 / 44 is a little less than 240."""
    for dv in (240, 44, 22, 4):
        written = to_hf(random_model(head_dim=44, expand_v=dv / 44 + 1e-9, **BASE)[0], 64)
        assert written["linear_value_head_dim"] == dv
        assert Model(**from_hf(written, "it")).head_v_dim == dv


def test_a_last_layer_with_an_effect_is_refused_on_import(export_of: Make, tmp_path: Any) -> None:
    folder = export_of(BASE, target="olmo-hybrid")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.post_attention_layernorm.weight"] += 1
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(UserError, match="a last softmax layer with an effect"):
        FolderSource(tmp_path)
    changed = json.loads((folder / "config.json").read_text()) | {"layer_types": ["full_attention"] * 3}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match="has softmax layers among its layer_types"):
        FolderSource(tmp_path)
