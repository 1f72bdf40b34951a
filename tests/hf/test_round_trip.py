"""Export and import undo each other bit for bit, and what the paper's authors released becomes the same model.

Tensors and settings of the checkpoint at the end are compared with those of the one at the start; the authors' layout is
written here, tensor by tensor, from a checkpoint of ours.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.distributed.test_trainer import losses_of
from tests.hf.exported import tokens
from tests.pretrained import Make, random_model
from titan_dp.checkpoint.manifest import verify
from titan_dp.checkpoint.weights import load_model_weights
from titan_dp.inference.hf.export import FORMATS, export
from titan_dp.inference.hf.folder import FolderSource
from titan_dp.inference.hf.importer import import_folder
from titan_dp.inference.hf.layout import our_names
from titan_dp.inference.pretrained import load_pretrained, open_source
from titan_dp.model.transformer import build_model

CPU = torch.device("cpu")
GATED = {"num_householder": 1, "use_forget_gate": True}
GROUPED = {"num_heads": 4, "num_key_heads": 2}
WINDOWED = {"attention_num_kv_heads": 1, "attention_window": 9}
UNTIED = {"expand_v": 0.5, "tie_word_embeddings": False, "norm_eps": 1e-5, "allow_neg_eigval": False}
SHARDS = {"max_shard_bytes": 10_000}
GATED_DELTANET, DELTA_NET = {"model_type": "gated_deltanet"}, {"model_type": "delta_net"}
REMOTE_CODE, OLMO_HYBRID, QWEN = {"target": "remote-code"}, {"target": "olmo-hybrid"}, {"target": "qwen3_5_text"}
OLMO: dict[str, Any] = {"num_householder": 1, "use_output_gate": True, "norm_eps": 1e-5}
CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"use_forget_gate": True, "num_householder": 3}),
    ({}, {**UNTIED, "use_output_gate": True}),
    ({}, {"use_short_conv": False, "intermediate_size": None}),
    ({}, {**WINDOWED, "attention_layers": [1], "rope_theta": 500.0, "conv_size": 3}),
    ({}, {"mixer": "attention", "attention_num_heads": None}),
    (SHARDS, {"use_forget_gate": True}),
    (GATED_DELTANET, {**GATED, "use_output_gate": True, "expand_v": 2.0, "attention_layers": [0]}),
    (GATED_DELTANET, {**GATED, **GROUPED}),
    (DELTA_NET, {"num_householder": 1, "num_heads": 3, "expand_v": 2.0, "use_output_gate": True}),
    (DELTA_NET, {"num_householder": 1, "hidden_size": 70, "head_dim": 25}),  # a width of 7/5 of the keys
    (REMOTE_CODE, {"use_forget_gate": True, "use_output_gate": True}),
    (OLMO_HYBRID, {**OLMO, "use_forget_gate": True, "expand_v": 2.0}),
    (OLMO_HYBRID, {**OLMO, "use_short_conv": False, "allow_neg_eigval": False, "tie_word_embeddings": False}),
    (OLMO_HYBRID, {**OLMO, "attention_block": "olmo", "attention_layers": [1], "rope_theta": 500.0}),
    (REMOTE_CODE, {"mixer": "attention", "attention_block": "olmo", **WINDOWED}),
    (QWEN, {**GATED, **GROUPED, "use_output_gate": True, "allow_neg_eigval": False, "expand_v": 2.0}),
    (QWEN, {**UNTIED, "num_householder": 1, "use_output_gate": True, "use_short_conv": False}),
    (REMOTE_CODE, {**GATED, **GROUPED, "mixer": "gla"}),
    (REMOTE_CODE, {"num_householder": 3, "beta_stretch": 0.05, **GROUPED}),
    (REMOTE_CODE, {**GROUPED, "use_output_gate": True, "output_norm": "group", "gate_before_norm": True}),
    (REMOTE_CODE, {**WINDOWED, "attention_layers": [0], "tie_word_embeddings": False}),
]


def tensors(path: Path) -> dict[str, Tensor]:
    source = open_source(path)
    return source.read(source.shapes)


@torch.no_grad()
def assert_same_checkpoint(imported: Path, original: Path) -> None:
    """The same tensors, tokenizer and length, and settings with which they compute the same."""
    before, after, ids = load_pretrained(original, CPU), load_pretrained(imported, CPU), tokens(2, 40)
    assert torch.equal(after.model(ids), before.model(ids))
    assert (after.source.seq_len, after.source.tokenizer) == (before.source.seq_len, before.source.tokenizer)
    assert after.source.config.initializer_range == before.source.config.initializer_range
    expected, actual = tensors(original), tensors(imported)
    assert set(actual) == set(expected)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


# -- ours to theirs and back -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("how", "changes"), CASES)
def test_an_exported_checkpoint_comes_back_bit_for_bit(
    how: dict[str, Any],
    changes: dict[str, Any],
    export_of: Make,
    checkpoint_of: Make,
    tmp_path: Path,
) -> None:
    checkpoint = import_folder(FolderSource(export_of(changes, **how)), tmp_path / "imported")
    assert checkpoint == tmp_path / "imported" / "checkpoint" / "step-00000000"
    assert verify(checkpoint) == []
    assert_same_checkpoint(checkpoint, checkpoint_of(**changes))


def test_shards_keep_to_the_size_asked_for_and_the_index_lists_every_tensor_once(export_of: Make) -> None:
    folder = export_of({"use_forget_gate": True}, **SHARDS)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    assert len(files) > 3
    assert {name: file for file, held in files.items() for name in held} == index["weight_map"]
    sizes = {file: [tensor.nbytes for tensor in held.values()] for file, held in files.items()}
    assert all(sum(each) <= 10_000 or len(each) == 1 for each in sizes.values())
    assert index["metadata"]["total_size"] == sum(map(sum, sizes.values()))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_bfloat16_rounds_matrices_and_leaves_norms_and_gates_as_they_were(
    export_of: Make, checkpoint_of: Make, tmp_path: Path
) -> None:
    """And what is trained on from it is in float32."""
    folder = export_of({"use_forget_gate": True}, dtype=torch.bfloat16)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    checkpoint = import_folder(FolderSource(folder), tmp_path / "imported")
    model, original = build_model(open_source(checkpoint).config), tensors(checkpoint_of(use_forget_gate=True))
    load_model_weights(checkpoint, model)
    for name, parameter in model.named_parameters():
        kept = "norm" in name or "forget_gate" in name
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, original[name] if kept else original[name].bfloat16().float()), name


@pytest.mark.parametrize("target", FORMATS)
def test_an_exported_folder_is_a_source_like_a_checkpoint(
    target: str, export_of: Make, checkpoint_of: Make, tmp_path: Path
) -> None:
    changes = {**OLMO, "use_forget_gate": True, "allow_neg_eigval": False}
    folder = export_of(changes, target=target)
    loaded, ids = load_pretrained(folder, CPU), tokens(2, 40)
    assert torch.equal(loaded.model(ids), random_model(**changes)[1](ids))
    assert loaded.tokenizer.encode("whale") == list(b"whale")
    export(open_source(folder), tmp_path / "again", target=next(other for other in FORMATS if other != target))
    imported = import_folder(FolderSource(tmp_path / "again"), tmp_path / "imported")
    assert_same_checkpoint(imported, checkpoint_of(**changes))


def test_a_run_from_imported_weights_is_the_run_from_the_original_ones(
    tiny_config: Path, export_of: Make, checkpoint_of: Make, tmp_path: Path
) -> None:
    changes = {"num_householder": 2, "use_forget_gate": True, "intermediate_size": 64}
    imported = import_folder(FolderSource(export_of(changes)), tmp_path / "imported")
    starts = {"original": checkpoint_of(**changes), "imported": imported}
    options = ("--training.steps", "1", "--lr_scheduler.total_steps", "20", "--checkpoint.initial_load_path")
    losses = {name: losses_of(tiny_config, 1, name, *options, str(path)) for name, path in starts.items()}
    assert losses["imported"] == losses["original"]


@pytest.mark.parametrize("what", ["a .bin file", "a .bin file as torch 1.5 wrote it", "a tied matrix twice"])
def test_other_ways_to_hold_the_weights_are_read_alike(what: str, export_of: Make, checkpoint_of: Make, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(export_of({}), tmp_path / "folder"))
    file = folder / "model.safetensors"
    held = load_file(file)
    file.unlink()
    if "twice" in what:
        save_file(held | {"lm_head.weight": held["model.embeddings.weight"].clone()}, file, metadata={"format": "pt"})
    else:
        torch.save(held, folder / "pytorch_model.bin", _use_new_zipfile_serialization="1.5" not in what)
    assert_same_checkpoint(import_folder(FolderSource(folder), tmp_path / "imported"), checkpoint_of())


# -- the authors' layout -----------------------------------------------------------------------------------------------


def released(exported: Path, folder: Path) -> Path:
    """`exported` as released with the paper: a matrix for each Householder step, fewer keys, no tokenizer."""
    folder.mkdir()
    values = json.loads((exported / "config.json").read_text())
    values["use_gate"] = values.pop("use_output_gate")
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "attnres_block_size"):
        del values[key]
    if not values["use_forget_gate"]:
        values |= {"model_type": "gated_delta_product", "clamp_min": None, "use_beta_conv1d": False}
        del values["use_forget_gate"]
    (folder / "config.json").write_text(json.dumps(values))
    held = load_file(exported / "model.safetensors")
    for name, part in [(name, name.split(".")[-2]) for name in held if ".attn." in name and name.endswith(".weight")]:
        if part in ("k_proj", "v_proj", "b_proj", "q_conv1d", "k_conv1d", "v_conv1d"):
            tensor, steps = held.pop(name), values["num_householder"]
            parts = [tensor, *torch.randn(steps - 1, *tensor.shape)] if part == "q_conv1d" else tensor.chunk(steps)
            held |= {name.replace(part, f"{part}s.{i}"): each.contiguous() for i, each in enumerate(parts)}
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


RELEASED: list[dict[str, Any]] = [
    {**UNTIED, "num_householder": 3, "use_forget_gate": True, "use_output_gate": True},
    {"num_householder": 2, "use_short_conv": False},
]


@pytest.mark.parametrize("changes", RELEASED)
def test_the_layout_the_paper_was_released_in_becomes_the_model_it_was_made_from(
    changes: dict[str, Any], export_of: Make, tmp_path: Path
) -> None:
    """Two of the authors' files say gated_delta_product, know no forget gate, and hold keys that nobody reads."""
    folder = released(export_of(changes), tmp_path / "released")
    checkpoint = import_folder(FolderSource(folder), tmp_path / "imported", tokenizer="bytes")
    loaded, ids = load_pretrained(checkpoint, CPU), tokens(2, 40)
    assert torch.equal(loaded.model(ids), random_model(**changes)[1](ids))
    assert loaded.source.tokenizer == "bytes"


def test_steps_of_the_old_layout_are_joined_in_the_order_of_numbers() -> None:
    """Step 10 comes after step 9."""
    parts = [f"model.layers.0.attn.k_projs.{i}.weight" for i in (10, 2, 0, 1, 11, 9, 3, 4, 5, 6, 7, 8)]
    joined = our_names(parts)["layers.0.attn.k_proj.weight"]
    assert joined == sorted(parts, key=lambda name: int(name.split(".")[-2]))
