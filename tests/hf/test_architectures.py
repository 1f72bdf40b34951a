"""An exported gated delta net in models of transformers' own, whose code is not ours: the same logits, cache and text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.hf.exported import assert_same, greedy, load, tokens
from tests.pretrained import Make, random_model, save_checkpoint
from titan_dp.config import Model
from titan_dp.errors import UserError
from titan_dp.inference.hf.export import export
from titan_dp.inference.hf.folder import FolderSource
from titan_dp.inference.hf.layout import ARCHITECTURES
from titan_dp.inference.pretrained import load_model, open_source
from titan_dp.output import Progress

BASE: dict[str, Any] = {"num_householder": 1, "use_output_gate": True, "norm_eps": 1e-5, "use_forget_gate": True}
UNIT_BETA: dict[str, Any] = {**BASE, "allow_neg_eigval": False}
OLMO, QWEN = "olmo-hybrid", "qwen3_5_text"
BARE: dict[str, Any] = {"use_short_conv": False, "allow_neg_eigval": False}
WIDE: dict[str, Any] = {"expand_v": 2.0, "conv_size": 2, "tie_word_embeddings": False}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Gated DeltaNet": (OLMO, BASE),
    "DeltaNet, no gate of decay": (OLMO, {**BASE, "use_forget_gate": False}),
    "no convolution, beta in [0, 1]": (OLMO, {**BASE, **BARE}),
    "wide values, short convolution, untied": (OLMO, {**BASE, **WIDE, "use_forget_gate": False}),
    "Gated DeltaNet, beta in [0, 1]": (QWEN, UNIT_BETA),
    "shared keys, another epsilon, wide values, untied": (
        QWEN,
        {**UNIT_BETA, **WIDE, "num_heads": 6, "num_key_heads": 2, "norm_eps": 1e-2},
    ),
    "neither gate of decay nor convolution": (QWEN, {**UNIT_BETA, **BARE, "use_forget_gate": False}),
}
HYBRID: dict[str, Any] = {**BASE, "num_hidden_layers": 3, "attention_layers": [0], "attention_block": "olmo"}
MODELS |= {
    "hybrid": (OLMO, HYBRID),
    "hybrid, grouped, another base, no convolution": (
        OLMO,
        {**HYBRID, **BARE, "attention_layers": [2], "attention_num_kv_heads": 1, "rope_theta": 500.0},
    ),
}
CLASSES = {OLMO: "OlmoHybridForCausalLM", QWEN: "Qwen3_5ForCausalLM"}


@pytest.fixture(autouse=True)
def without_fla(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models take flash-linear-attention's kernels where that is installed, and they need a GPU."""
    for name in ("olmo_hybrid", "qwen3_5"):
        modeling = pytest.importorskip(f"transformers.models.{name}.modeling_{name}")
        for function in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"):
            monkeypatch.setattr(modeling, function, getattr(modeling, function).__wrapped__)


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_what_is_written_are_the_models_own(name: str, export_of: Make) -> None:
    target, changes = MODELS[name]
    ours, theirs = random_model(**changes)[1], load(export_of(changes, target=target))
    assert type(theirs).__name__ == CLASSES[target]
    ids = tokens(2, 70)
    with torch.no_grad():
        assert_same(theirs(ids).logits, ours(ids))
    written = theirs.generate(ids[:1, :5], max_new_tokens=8, do_sample=False)[:, 5:]
    assert torch.equal(written, greedy(ours, ids[:1, :5], 8))


@pytest.mark.parametrize("target", [OLMO, QWEN])
def test_every_tensor_that_is_written_is_counted(
    target: str, checkpoint_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: dict[str, Progress] = {}

    @contextmanager
    def progress(what: str, total: int | None = None) -> Iterator[Progress]:
        counted[what] = Progress(what, total)
        yield counted[what]

    monkeypatch.setattr("titan_dp.inference.hf.export.progress", progress)
    export(open_source(checkpoint_of(**UNIT_BETA, use_short_conv=False)), tmp_path / "out", target=target)
    state = counted["tensors written"]
    assert state.done == state.total == len(load_file(tmp_path / "out/model.safetensors"))


@pytest.mark.parametrize("target", CLASSES)
def test_the_configuration_leaves_nothing_to_defaults(target: str, export_of: Make) -> None:
    """Theirs are another model's: a padding id beyond our vocabulary, positions, heads and dimensions."""
    written = json.loads((export_of(UNIT_BETA, target=target) / "config.json").read_text())
    assert {"pad_token_id", "bos_token_id", "eos_token_id", "rope_parameters", "layer_types"} <= written.keys()
    assert (written["pad_token_id"], written["eos_token_id"]) == (None, 257)
    assert written["layer_types"] == ["linear_attention"] * 2 + ["full_attention"]


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_value_dimension_comes_back(model_type: str) -> None:
    """44 times 240 / 44 is a little less than 240."""
    architecture = ARCHITECTURES[model_type]
    for dv in (240, 44, 22, 4):
        written = architecture.to_hf(random_model(head_dim=44, expand_v=dv / 44 + 1e-9, **UNIT_BETA)[0], 64)
        assert written["linear_value_head_dim"] == dv
        assert Model(**architecture.from_hf(written, "it")).head_v_dim == dv


@pytest.mark.parametrize("target", CLASSES)
def test_a_last_layer_with_an_effect_is_refused_on_import(target: str, export_of: Make, tmp_path: Path) -> None:
    folder = export_of(UNIT_BETA, target=target)
    weights = load_file(folder / "model.safetensors")
    last = {OLMO: "post_attention_layernorm", QWEN: "self_attn.o_proj"}[target]
    weights[f"model.layers.2.{last}.weight"] += 1
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(UserError, match=f"a last softmax layer with an effect .*{last}.*--format {target}"):
        FolderSource(tmp_path)


@pytest.mark.parametrize(
    ("target", "changes", "edit", "match"),
    [
        (QWEN, UNIT_BETA, {"layer_types": ["full_attention"] * 3}, "has softmax layers among its layer_types"),
        (OLMO, HYBRID, {"rope_parameters": None}, "^[^:]*rope_parameters = None.*have plain rotary positions"),
        (OLMO, HYBRID, {"attention_bias": True}, "attention_bias = True.*only False"),
        (OLMO, HYBRID, {"rms_norm_eps": 1e-6}, "rms_norm_eps = 1e-06.*only 1e-05"),
        (OLMO, HYBRID, {"layer_types": ["sliding_attention"] * 3}, "layer_types = .*for 3 layers"),
        (OLMO, HYBRID, {"layer_types": ["linear_attention"] * 2 + ["full_attention"]}, "is of another architecture"),
    ],
)
def test_what_our_model_does_not_have_is_refused_on_import(
    target: str, changes: dict[str, Any], edit: dict[str, Any], match: str, export_of: Make, tmp_path: Path
) -> None:
    folder = export_of(changes, target=target)
    values = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | edit))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=match):
        FolderSource(tmp_path)


def test_only_a_model_without_softmax_layers_gets_one_more(export_of: Make) -> None:
    card = {name: (export_of(changes, target=OLMO) / "README.md").read_text() for name, changes in (("a", BASE), ("b", HYBRID))}
    assert ("does nothing" in card["a"], "does nothing" in card["b"]) == (True, False)
    assert json.loads((export_of(HYBRID, target=OLMO) / "config.json").read_text())["num_hidden_layers"] == 3


def test_a_qwen3_5_of_gated_delta_nets_alone_is_imported(tmp_path: Path) -> None:
    """As transformers builds and saves it; norms are stored around 0."""
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 320, "head_dim": 16}
    mixer = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 8}
    c = Qwen3_5TextConfig(**sizes, **mixer, layer_types=["linear_attention"] * 2, initializer_range=0.2, rms_norm_eps=1e-3)
    torch.manual_seed(0)
    theirs = Qwen3_5ForCausalLM(c).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("norm.weight"):
                parameter.add_(torch.randn_like(parameter) / 4)
    theirs.save_pretrained(tmp_path / "theirs")
    ids = tokens(2, 70)
    ours = load_model(FolderSource(tmp_path / "theirs"), torch.device("cpu"))
    with torch.no_grad():
        assert_same(ours(ids), theirs(ids, use_cache=False).logits)


def test_a_small_norm_that_float32_cannot_hold_less_one_comes_back_bit_for_bit(tmp_path: Path) -> None:
    """0.1 is 0.1 + 1.5e-9 in float32; less one and plus one again, in float32, it is 0.1 + 2.4e-8."""
    source = open_source(save_checkpoint(tmp_path / "run", **UNIT_BETA))
    small = torch.full((32,), 0.1)
    read = source.read
    source.read = lambda names: {n: small if n == "norm.weight" else t for n, t in read(names).items()}  # type: ignore[method-assign]
    export(source, tmp_path / "out", target=QWEN)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert weights["model.norm.weight"].dtype == torch.float64
    assert weights["model.layers.0.input_layernorm.weight"].dtype == torch.float32
    assert torch.equal(FolderSource(tmp_path / "out").read(["norm.weight"])["norm.weight"], small)
    assert load(tmp_path / "out").model.norm.weight.dtype == torch.float32
