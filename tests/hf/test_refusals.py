"""What cannot be exported or imported is refused in one sentence, and nothing is written."""

from __future__ import annotations

import json
import pickle
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.pretrained import save_checkpoint
from titan_dp import config
from titan_dp.checkpoint.weights import save_model_weights
from titan_dp.errors import UserError
from titan_dp.inference.hf.export import FORMATS, export
from titan_dp.inference.hf.folder import FolderSource
from titan_dp.inference.hf.importer import import_folder
from titan_dp.inference.hf.layout import MODEL_TYPES, to_hf
from titan_dp.inference.pretrained import load_model, open_source


@contextmanager
def refused(folder: Path, match: str) -> Iterator[None]:
    """Inside, a UserError of one line that `match`es, after which `folder` holds what it held."""
    before = contents(folder)
    with pytest.raises(UserError, match=match) as caught:
        yield
    assert "\n" not in str(caught.value)
    assert contents(folder) == before


def contents(folder: Path) -> dict[Path, int]:
    """Everything inside, with the time a file was last written."""
    return {path: path.stat().st_mtime_ns if path.is_file() else 0 for path in folder.rglob("*")}


# -- export ------------------------------------------------------------------------------------------------------------

INEXPRESSIBLE: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "gated linear attention in fla": ({"mixer": "gla", "num_householder": 1}, {}, "mixer = 'gla'.*remote-code"),
    "gated linear attention in a hybrid": (
        {"mixer": "gla", "num_householder": 1, "attention_layers": [0]},
        {},
        "mixer = 'gla'.*remote-code",
    ),
    "an ungated gated_deltanet": ({"num_householder": 1}, {"model_type": "gated_deltanet"}, "use_forget_gate = false"),
    "gated_deltanet of two steps": (
        {"num_householder": 2, "use_forget_gate": True},
        {"model_type": "gated_deltanet"},
        "num_householder = 2.*gated_deltaproduct",
    ),
    "a gated delta_net": (
        {"num_householder": 1, "use_forget_gate": True},
        {"model_type": "delta_net"},
        "use_forget_gate = true.*gated_deltanet",
    ),
    "delta_net of two steps": ({}, {"model_type": "delta_net"}, "num_householder = 2"),
    "a model type for remote code": ({}, {"target": "remote-code", "model_type": "gated_deltaproduct"}, "model-type"),
    "a tokenizer larger than the vocabulary": ({"vocab_size": 200}, {}, "258 ids.*vocab_size = 200"),
    "a tokenizer that is not there": ({}, {"tokenizer": "nowhere/at_all.tiktoken"}, "nowhere/at_all.tiktoken"),
}


@pytest.mark.parametrize("name", INEXPRESSIBLE)
def test_a_model_that_the_format_cannot_express_is_not_exported(
    name: str, checkpoint_of: Callable[..., Path], tmp_path: Path
) -> None:
    changes, how, match = INEXPRESSIBLE[name]
    with refused(tmp_path, match):
        export(open_source(checkpoint_of(**changes)), tmp_path / "out", **how)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_model_that_is_ours_alone_has_no_format(model_type: str) -> None:
    for name, c in {
        "mixer = 'rwkv7'": config.Model(mixer="rwkv7"),
        "adaptive_householder = true": config.Model(adaptive_householder=True),
    }.items():
        with pytest.raises(UserError, match=f"^{name} cannot be exported: no Hugging Face format has it"):
            to_hf(c, model_type, 64)


def test_an_output_that_exists_is_not_touched(
    checkpoint_of: Callable[..., Path], export_of: Callable[..., Path], tmp_path: Path
) -> None:
    source = open_source(checkpoint_of())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("out", "file"):
        with refused(tmp_path, f"{name} exists already"):
            export(source, tmp_path / name)
        with refused(tmp_path, f"{name} exists already"):
            import_folder(FolderSource(export_of({})), tmp_path / name)


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """Inside, the operating system refuses to write more than `size` bytes to a file, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("why", ["a full disk", "Ctrl-C"])
@pytest.mark.parametrize("what", ["export", "import"])
def test_what_ends_early_leaves_nothing_behind(
    what: str,
    why: str,
    checkpoint_of: Callable[..., Path],
    export_of: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    out, source, folder = tmp_path / "out", open_source(checkpoint_of()), FolderSource(export_of({}))
    if why == "Ctrl-C":  # after the weights are written
        after = "titan_dp.inference.hf.export.write_json" if what == "export" else "titan_dp.checkpoint.weights.write_manifest"
        monkeypatch.setattr(after, interrupted)
    limit = no_file_larger_than(60_000) if why == "a full disk" else nullcontext()
    with limit, pytest.raises((OSError, KeyboardInterrupt), match="File too large" if why == "a full disk" else None):
        export(source, out) if what == "export" else import_folder(folder, out)
    assert not list(tmp_path.iterdir())


def without_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


CUT_OFF: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "nowhere": ("nowhere", lambda c: None, "nowhere does not exist"),
    "an empty folder": ("run", shutil.rmtree, "no committed checkpoint"),
    "no manifest": ("run/checkpoint/step-00000007", without_manifest, "cut off"),
    "a run without a manifest": ("run", without_manifest, "no committed checkpoint"),
    "a cut-off file": ("run", lambda c: cut(next(c.glob("*.distcp"))), "damaged"),
}


@pytest.mark.parametrize("name", CUT_OFF)
def test_what_is_no_whole_checkpoint_is_no_source(name: str, tmp_path: Path) -> None:
    path, spoil, match = CUT_OFF[name]
    spoil(save_checkpoint(tmp_path / "run"))
    with refused(tmp_path, match):
        export(open_source(tmp_path / path), tmp_path / "out")


def checkpoint_with(folder: Path, value: float, name: str = "layers.1.mlp.up_proj.weight") -> Path:
    """A checkpoint in which one weight has that value."""
    checkpoint = save_checkpoint(folder / "run")
    source = open_source(checkpoint)
    held = source.read(source.shapes)
    held[name].view(-1)[5] = value
    meta = dict(source.training)
    shutil.rmtree(checkpoint)
    save_model_weights(checkpoint, held, meta)
    return checkpoint


TOO_LARGE = {
    torch.float16: (1e5, "holds 100000, which float16 cannot hold .at most 65504.; take bfloat16 or float32"),
    torch.bfloat16: (-3.4e38, "holds -3.4e.38, which bfloat16 cannot hold .at most 3.38953e.38.; take float32"),
}


@pytest.mark.parametrize("dtype", TOO_LARGE)
def test_a_weight_that_the_dtype_cannot_hold_is_not_exported_nor_loaded(dtype: torch.dtype, tmp_path: Path) -> None:
    value, match = TOO_LARGE[dtype]
    source = open_source(checkpoint_with(tmp_path, value))
    for target in FORMATS:
        with refused(tmp_path, f"layers.1.mlp.up_proj.weight in .*{match}"):
            export(source, tmp_path / "out", target=target, dtype=dtype)
    with refused(tmp_path, match):
        load_model(source, torch.device("cpu"), dtype=dtype)
    export(source, tmp_path / "out")  # in float32


def test_a_gate_that_stays_float32_may_be_as_large_as_it_likes(tmp_path: Path) -> None:
    source = open_source(checkpoint_with(tmp_path, 1e5, "layers.0.mlp_norm.weight"))
    export(source, tmp_path / "out", dtype=torch.float16)
    assert load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp_norm.weight"].view(-1)[5] == 1e5


# -- import ------------------------------------------------------------------------------------------------------------


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    changed = {key: value for key, value in {**config, **changes}.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(changed))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    held = load_file(folder / "model.safetensors")
    edit(held)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


def into_bin(folder: Path, what: object) -> None:
    (folder / "model.safetensors").unlink()
    with (folder / "pytorch_model.bin").open("wb") as file:
        pickle.dump(what, file, protocol=2)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def remove_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def spoil_tokenizer(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer.json").write_text("{}")


def cut_vocabulary(folder: Path) -> None:
    edit_config(folder, vocab_size=200)
    edit_weights(folder, lambda held: held.update({"model.embeddings.weight": held["model.embeddings.weight"][:200].clone()}))


UP = "model.layers.0.mlp.up_proj.weight"
ATTENTION = {"layers": [0], "num_heads": 2, "qkv_bias": True}
SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config.json": (lambda f: (f / "config.json").unlink(), "config.json"),
    "a config.json that is no JSON": (lambda f: (f / "config.json").write_text("{'a'"), "config.json is no JSON"),
    "another type of model": (lambda f: edit_config(f, model_type="llama"), "'llama'"),
    "no type of model": (lambda f: edit_config(f, model_type=...), "None"),
    "no width": (lambda f: edit_config(f, hidden_size=...), "hidden_size"),
    "an activation that is not ours": (lambda f: edit_config(f, hidden_act="relu"), "hidden_act = 'relu'"),
    "residual attention": (lambda f: edit_config(f, attnres_block_size=2), "attnres_block_size = 2"),
    "softmax layers with biases": (lambda f: edit_config(f, attn=ATTENTION), "qkv_bias"),
    "a value that is none": (lambda f: edit_config(f, num_householder="two"), "config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights"),
    "a cut-off file": (lambda f: cut(f / "model.safetensors"), "model.safetensors"),
    "a tensor too few": (
        lambda f: edit_weights(f, lambda h: h.pop("model.layers.1.attn.b_proj.weight")),
        "layers.1.attn.b_proj",
    ),
    "a tensor too many": (lambda f: edit_weights(f, lambda h: h.update(extra=torch.zeros(3))), "extra"),
    "a tensor of another shape": (
        lambda f: edit_weights(f, lambda h: h.update({UP: h[UP].mT.contiguous()})),
        "up_proj",
    ),
    "weights of another width": (lambda f: edit_config(f, intermediate_size=64), "gate_proj"),
    "weights of other steps": (lambda f: edit_config(f, num_householder=3), "k_proj"),
    "a pickle of something else": (lambda f: into_bin(f, [1, 2]), "pytorch_model.bin"),
    "a number too large for float32": (
        lambda f: edit_weights(f, lambda h: h.update({"model.norm.weight": torch.full((32,), 1e39, dtype=torch.float64)})),
        "norm.weight .*holds 1e.39, which float32 cannot hold",
    ),
    "more steps than a model of ours takes": (lambda f: edit_config(f, num_householder=10), "num_householder = 10"),
    "no tokenizer": (remove_tokenizer, "has no tokenizer.json.*--tokenizer"),
    "a tokenizer that is none": (spoil_tokenizer, "tokenizer.json is no tokenizer"),
    "a tokenizer larger than the vocabulary": (cut_vocabulary, "258 ids.*vocab_size = 200"),
    "shards, one missing": (lambda f: max(f.glob("model-*.safetensors")).unlink(), "lacks model-000.*copy the folder again"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_folder_is_not_imported(name: str, export_of: Callable[..., Path], tmp_path: Path) -> None:
    spoil, match = SPOILT[name]
    folder = export_of({}, max_shard_bytes=10_000) if name.startswith("shards") else export_of({})
    folder = Path(shutil.copytree(folder, tmp_path / "folder"))
    spoil(folder)
    with refused(tmp_path, match):
        import_folder(FolderSource(folder), tmp_path / "imported", tokenizer="" if "tokenizer" in name else "bytes")


def test_a_checkpoint_of_ours_is_no_folder_to_import(checkpoint_of: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="is no Hugging Face folder: it has no config.json"):
        FolderSource(checkpoint_of())
