"""Export and import undo each other bit for bit, and what the paper's authors released becomes the same model.

Tensors and settings of the checkpoint at the end are compared with those of the one at the start; the authors' layout is
written here, tensor by tensor, from a checkpoint of ours.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.distributed.test_trainer import losses_of
from tests.hf.exported import exported, function_of, tokens
from tests.pretrained import random_model, save_checkpoint
from titan_dp.checkpoint.manifest import verify
from titan_dp.checkpoint.weights import load_model_weights
from titan_dp.inference.hf.export import export
from titan_dp.inference.hf.folder import FolderSource
from titan_dp.inference.hf.importer import import_folder
from titan_dp.inference.pretrained import load_pretrained, open_source
from titan_dp.model.transformer import build_model

GATED = {"num_householder": 1, "use_forget_gate": True}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gated_deltaproduct": ({"target": "fla"}, {"use_forget_gate": True, "num_householder": 3}),
    "gated_deltaproduct, output gate, untied": (
        {"target": "fla"},
        {"use_output_gate": True, "expand_v": 0.5, "tie_word_embeddings": False, "norm_eps": 1e-5, "allow_neg_eigval": False},
    ),
    "gated_deltaproduct, no convolution": ({"target": "fla"}, {"use_short_conv": False, "intermediate_size": None}),
    "gated_deltaproduct, hybrid": (
        {"target": "fla"},
        {"attention_layers": [1], "attention_num_kv_heads": 1, "attention_window": 9, "rope_theta": 500.0, "conv_size": 3},
    ),
    "gated_deltaproduct, Transformer": ({"target": "fla"}, {"mixer": "attention", "attention_num_heads": None}),
    "gated_deltanet": ({"model_type": "gated_deltanet"}, {**GATED, "use_output_gate": True, "expand_v": 2.0}),
    "gated_deltanet, hybrid": ({"model_type": "gated_deltanet"}, {**GATED, "attention_layers": [0]}),
    "delta_net": ({"model_type": "delta_net"}, {"num_householder": 1, "num_heads": 3, "expand_v": 2.0}),
    "delta_net, width 7/5 of the keys": (
        {"model_type": "delta_net"},
        {"num_householder": 1, "hidden_size": 70, "head_dim": 25},
    ),
    "delta_net, output gate": ({"model_type": "delta_net"}, {"num_householder": 1, "use_output_gate": True}),
    "remote-code": ({"target": "remote-code"}, {"use_forget_gate": True, "use_output_gate": True}),
    "remote-code, gated linear attention": ({"target": "remote-code"}, {**GATED, "mixer": "gla"}),
    "remote-code, hybrid, untied": (
        {"target": "remote-code"},
        {"attention_layers": [0], "attention_num_kv_heads": 1, "attention_window": 9, "tie_word_embeddings": False},
    ),
    "remote-code, Transformer": ({"target": "remote-code"}, {"mixer": "attention", "rope_theta": 500.0}),
}


def tensors(path: Path) -> dict[str, Tensor]:
    source = open_source(path)
    return source.read(source.shapes)


def assert_same_checkpoint(imported: Path, original: Path) -> None:
    before, after = open_source(original), open_source(imported)
    assert function_of(after.config) == function_of(before.config)
    assert (after.seq_len, after.tokenizer) == (before.seq_len, before.tokenizer)
    expected, actual = tensors(original), tensors(imported)
    assert set(actual) == set(expected)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


# -- ours to theirs and back -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_shard_bytes", [2 * 10**9, 10_000], ids=["one file", "shards"])
@pytest.mark.parametrize("name", CASES)
def test_an_exported_checkpoint_comes_back_bit_for_bit(name: str, max_shard_bytes: int, tmp_path: Path) -> None:
    how, changes = CASES[name]
    _, folder = exported(tmp_path, changes, max_shard_bytes=max_shard_bytes, **how)
    assert (folder / "model.safetensors.index.json").exists() == (max_shard_bytes == 10_000)
    checkpoint = import_folder(FolderSource(folder), tmp_path / "imported")
    assert checkpoint == tmp_path / "imported" / "checkpoint" / "step-00000000"
    assert verify(checkpoint) == []
    assert_same_checkpoint(checkpoint, tmp_path / "run")


def test_shards_keep_to_the_size_asked_for_and_the_index_lists_every_tensor_once(tmp_path: Path) -> None:
    _, folder = exported(tmp_path, {}, max_shard_bytes=10_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    assert len(files) > 3
    assert {name: file for file, held in files.items() for name in held} == index["weight_map"]
    sizes = {file: [tensor.nbytes for tensor in held.values()] for file, held in files.items()}
    assert all(sum(each) <= 10_000 or len(each) == 1 for each in sizes.values())
    assert index["metadata"]["total_size"] == sum(map(sum, sizes.values()))


def test_bfloat16_rounds_matrices_and_leaves_norms_and_gates_as_they_were(tmp_path: Path) -> None:
    _, folder = exported(tmp_path, {"use_forget_gate": True}, dtype=torch.bfloat16)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    imported = tensors(import_folder(FolderSource(folder), tmp_path / "imported"))
    for name, tensor in tensors(tmp_path / "run").items():
        kept = "norm" in name or "forget_gate" in name
        assert torch.equal(imported[name].float(), tensor if kept else tensor.bfloat16().float()), name


@pytest.mark.parametrize("target", ["fla", "remote-code"])
def test_an_exported_folder_is_a_source_like_a_checkpoint(target: str, tmp_path: Path) -> None:
    ours, folder = exported(tmp_path, {"use_forget_gate": True}, target=target)
    loaded = load_pretrained(folder, torch.device("cpu"))
    ids = tokens(2, 40)
    assert torch.equal(loaded.model(ids), ours(ids))
    assert loaded.tokenizer.encode("whale") == list(b"whale")
    other = "remote-code" if target == "fla" else "fla"
    export(open_source(folder), tmp_path / "again", target=other)
    assert_same_checkpoint(import_folder(FolderSource(tmp_path / "again"), tmp_path / "imported"), tmp_path / "run")


# -- training goes on --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_imported_weights_load_into_a_model_to_be_trained(tmp_path: Path) -> None:
    """From bfloat16 too: what is trained is in float32."""
    _, folder = exported(tmp_path, {"use_forget_gate": True}, dtype=torch.bfloat16)
    checkpoint = import_folder(FolderSource(folder), tmp_path / "imported")
    model, stored = build_model(open_source(checkpoint).config), tensors(checkpoint)
    load_model_weights(checkpoint, model)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, stored[name].float()), name


def test_a_run_from_imported_weights_is_the_run_from_the_original_ones(tiny_config: Path, tmp_path: Path) -> None:
    _, folder = exported(tmp_path, {"num_householder": 2, "use_forget_gate": True, "intermediate_size": 64})
    imported = import_folder(FolderSource(folder), tmp_path / "imported")
    starts = {"original": tmp_path / "run", "imported": imported}
    options = ("--training.steps", "2", "--lr_scheduler.total_steps", "20", "--checkpoint.initial_load_path")
    losses = {name: losses_of(tiny_config, 1, name, *options, str(path)) for name, path in starts.items()}
    assert losses["imported"] == losses["original"]


# -- the authors' layout -----------------------------------------------------------------------------------------------


def released(folder: Path, changes: dict[str, Any]) -> None:
    """A folder as released with the paper: a matrix for each Householder step, fewer keys, no tokenizer."""
    c, model = random_model(**changes)
    held: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        theirs = name if name.startswith("lm_head") else "model." + name.replace(".forget_gate", "")
        stem, _, last = theirs.rpartition(".attn.")
        kind = last.removesuffix(".weight")
        if kind in ("k_proj", "v_proj", "b_proj", "k_conv1d", "v_conv1d"):
            for i, part in enumerate(tensor.chunk(c.num_householder)):
                held[f"{stem}.attn.{kind}s.{i}.weight"] = part.contiguous()
        elif kind == "q_conv1d":
            for i in range(c.num_householder):
                held[f"{stem}.attn.q_conv1ds.{i}.weight"] = tensor if i == 0 else torch.randn_like(tensor)
        else:
            held[theirs] = tensor
    settings = {
        "architectures": ["GatedDeltaProductForCausalLM"],
        "model_type": "gated_deltaproduct",
        "attn": None,
        "attn_mode": "chunk",
        "hidden_act": "swish",
        "hidden_ratio": 4,
        "norm_first": False,
        "use_gate": c.use_output_gate,
        "intermediate_size": c.mlp_size,
        "max_position_embeddings": 2048,
        "torch_dtype": "float32",
    }
    same = ("hidden_size", "num_hidden_layers", "num_heads", "head_dim", "expand_v", "num_householder", "use_forget_gate")
    same += ("allow_neg_eigval", "use_short_conv", "conv_size", "vocab_size", "tie_word_embeddings", "norm_eps")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**settings, **{key: getattr(c, key) for key in same}}))
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "changes",
    [
        {"num_householder": 2, "use_forget_gate": True},
        {"num_householder": 3, "use_forget_gate": True, "use_output_gate": True, "expand_v": 2.0, "tie_word_embeddings": False},
        {"num_householder": 1, "allow_neg_eigval": False},
        {"num_householder": 2, "use_short_conv": False},
    ],
    ids=["gated, n_h 2", "gated, n_h 3, output gate", "ungated, n_h 1", "no convolution"],
)
def test_the_layout_the_paper_was_released_in_becomes_the_model_it_was_made_from(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    c, model = random_model(**changes)
    released(tmp_path / "released", changes)
    checkpoint = import_folder(FolderSource(tmp_path / "released"), tmp_path / "imported", tokenizer="bytes")
    loaded = load_pretrained(checkpoint, torch.device("cpu"))
    ids = tokens(2, 40)
    assert torch.equal(loaded.model(ids), model(ids))
    assert open_source(checkpoint).config.use_output_gate == c.use_output_gate


def test_a_published_configuration_of_another_name_is_imported(tmp_path: Path) -> None:
    """Two of the authors' files say gated_delta_product, know no forget gate, and hold keys that nobody reads."""
    changes = {"num_householder": 3, "allow_neg_eigval": False}
    _, model = random_model(**changes)
    released(tmp_path / "released", changes)
    path = tmp_path / "released" / "config.json"
    values = json.loads(path.read_text()) | {"model_type": "gated_delta_product", "clamp_min": None, "use_beta_conv1d": False}
    del values["use_forget_gate"]
    path.write_text(json.dumps(values))
    checkpoint = import_folder(FolderSource(tmp_path / "released"), tmp_path / "imported", tokenizer="bytes")
    ids = tokens(2, 40)
    assert torch.equal(load_pretrained(checkpoint, torch.device("cpu")).model(ids), model(ids))


def test_twelve_steps_of_the_old_layout_would_be_joined_in_their_order(tmp_path: Path) -> None:
    """Numbers, not strings: step 10 comes after step 9."""
    from titan_dp.inference.hf.layout import our_names

    parts = [f"model.layers.0.attn.k_projs.{i}.weight" for i in (10, 2, 0, 1, 11, 9, 3, 4, 5, 6, 7, 8)]
    joined = our_names(parts)["layers.0.attn.k_proj.weight"]
    assert joined == sorted(parts, key=lambda name: int(name.split(".")[-2]))


def test_weights_in_a_bin_file_are_imported_like_safetensors(tmp_path: Path) -> None:
    _, folder = exported(tmp_path, {"tie_word_embeddings": False})
    held = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(held, folder / "pytorch_model.bin")
    assert_same_checkpoint(import_folder(FolderSource(folder), tmp_path / "imported"), tmp_path / "run")


def test_a_tied_matrix_held_twice_is_taken_once(tmp_path: Path) -> None:
    _, folder = exported(tmp_path, {})
    held = load_file(folder / "model.safetensors")
    held["lm_head.weight"] = held["model.embeddings.weight"].clone()
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    assert_same_checkpoint(import_folder(FolderSource(folder), tmp_path / "imported"), tmp_path / "run")


def test_the_tokenizer_named_on_import_is_the_checkpoints(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "run")
    export(open_source(checkpoint), tmp_path / "exported")
    for file in (tmp_path / "exported").glob("tokenizer*"):
        file.unlink()
    assert (
        open_source(import_folder(FolderSource(tmp_path / "exported"), tmp_path / "imported", tokenizer="bytes")).tokenizer
        == "bytes"
    )
