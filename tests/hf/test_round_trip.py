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
from titan_dp import config
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
WINDOWED = {"attention_num_kv_heads": 1, "attention_window": 9}
UNTIED = {"expand_v": 0.5, "tie_word_embeddings": False, "norm_eps": 1e-5, "allow_neg_eigval": False}
SHARDS = {"max_shard_bytes": 10_000}
GATED_DELTANET, DELTA_NET = {"model_type": "gated_deltanet"}, {"model_type": "delta_net"}
REMOTE_CODE = {"target": "remote-code"}
CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"use_forget_gate": True, "num_householder": 3}),
    ({}, {**UNTIED, "use_output_gate": True}),
    ({}, {"use_short_conv": False, "intermediate_size": None}),
    ({}, {**WINDOWED, "attention_layers": [1], "rope_theta": 500.0, "conv_size": 3}),
    ({}, {"mixer": "attention", "attention_num_heads": None}),
    (SHARDS, {"use_forget_gate": True}),
    (GATED_DELTANET, {**GATED, "use_output_gate": True, "expand_v": 2.0, "attention_layers": [0]}),
    (DELTA_NET, {"num_householder": 1, "num_heads": 3, "expand_v": 2.0, "use_output_gate": True}),
    (DELTA_NET, {"num_householder": 1, "hidden_size": 70, "head_dim": 25}),  # a width of 7/5 of the keys
    (REMOTE_CODE, {"use_forget_gate": True, "use_output_gate": True}),
    (REMOTE_CODE, {**GATED, "mixer": "gla"}),
    (REMOTE_CODE, {**WINDOWED, "attention_layers": [0], "tie_word_embeddings": False}),
]


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
    folder = export_of({"use_forget_gate": True}, target=target)
    loaded, ids = load_pretrained(folder, CPU), tokens(2, 40)
    assert torch.equal(loaded.model(ids), random_model(use_forget_gate=True)[1](ids))
    assert loaded.tokenizer.encode("whale") == list(b"whale")
    export(open_source(folder), tmp_path / "again", target=next(other for other in FORMATS if other != target))
    imported = import_folder(FolderSource(tmp_path / "again"), tmp_path / "imported")
    assert_same_checkpoint(imported, checkpoint_of(use_forget_gate=True))


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


def released(folder: Path, changes: dict[str, Any]) -> Path:
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
    return folder


RELEASED: list[dict[str, Any]] = [
    {**UNTIED, "num_householder": 3, "use_forget_gate": True, "use_output_gate": True},
    {"num_householder": 2, "use_short_conv": False},
]


@pytest.mark.parametrize("changes", RELEASED)
def test_the_layout_the_paper_was_released_in_becomes_the_model_it_was_made_from(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    """Two of the authors' files say gated_delta_product, know no forget gate, and hold keys that nobody reads."""
    c, model = random_model(**changes)
    folder = released(tmp_path / "released", changes)
    if not c.use_forget_gate:
        values = json.loads((folder / "config.json").read_text())
        values |= {"model_type": "gated_delta_product", "clamp_min": None, "use_beta_conv1d": False}
        del values["use_forget_gate"]
        (folder / "config.json").write_text(json.dumps(values))
    checkpoint = import_folder(FolderSource(folder), tmp_path / "imported", tokenizer="bytes")
    loaded, ids = load_pretrained(checkpoint, CPU), tokens(2, 40)
    assert torch.equal(loaded.model(ids), model(ids))
    assert loaded.source.config.use_output_gate == c.use_output_gate
    assert loaded.source.tokenizer == "bytes"


def test_steps_of_the_old_layout_are_joined_in_the_order_of_numbers() -> None:
    """Step 10 comes after step 9."""
    parts = [f"model.layers.0.attn.k_projs.{i}.weight" for i in (10, 2, 0, 1, 11, 9, 3, 4, 5, 6, 7, 8)]
    joined = our_names(parts)["layers.0.attn.k_proj.weight"]
    assert joined == sorted(parts, key=lambda name: int(name.split(".")[-2]))
