"""What cannot be exported or imported is refused in one sentence, and nothing is written."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.pretrained import Make
from titan_dp import config
from titan_dp.checkpoint.weights import save_model_weights
from titan_dp.errors import UserError
from titan_dp.inference.hf.export import export
from titan_dp.inference.hf.folder import FolderSource
from titan_dp.inference.hf.importer import import_folder
from titan_dp.inference.hf.layout import to_hf
from titan_dp.inference.pretrained import load_model, open_source
from titan_dp.inference.sources import Source


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

GATED, ONE_STEP = {"use_forget_gate": True}, {"num_householder": 1}
GATE: dict[str, Any] = {**ONE_STEP, "use_output_gate": True}
OLMO_BLOCK: dict[str, Any] = {**GATE, **GATED, "norm_eps": 1e-5, "attention_layers": [1], "attention_block": "olmo"}
INEXPRESSIBLE: list[tuple[dict[str, Any], str, str]] = [
    ({**ONE_STEP, "mixer": "gla"}, "gated_deltaproduct", "mixer = 'gla'.*remote-code"),
    (ONE_STEP, "gated_deltanet", "use_forget_gate = false"),
    ({**GATED, "num_householder": 2}, "gated_deltanet", "num_householder = 2.*gated_deltaproduct"),
    ({**ONE_STEP, **GATED}, "delta_net", "use_forget_gate = true.*gated_deltanet"),
    ({"num_householder": 2}, "delta_net", "num_householder = 2"),
    (
        {"num_householder": 2},
        "olmo_hybrid",
        "num_householder = 2 and use_output_gate = false and norm_eps .*--format fla --model-type gated_deltaproduct or --f",
    ),
    ({**ONE_STEP, "mixer": "gla"}, "olmo_hybrid", "mixer = 'gla' and .*; use --format remote-code$"),
    ({**ONE_STEP, "attention_layers": [1]}, "olmo_hybrid", "attention_layers with attention_block = 'llama' and norm_eps"),
    ({**ONE_STEP, **GATED, "num_key_heads": 2}, "olmo_hybrid", "num_key_heads = 2 and .*--model-type gated_deltanet or"),
    (
        {"num_householder": 2},
        "qwen3_5_text",
        "num_householder = 2 and use_output_gate = false and allow_neg_eigval = true; use",
    ),
    (GATE | {"norm_eps": 1e-5}, "qwen3_5_text", "express allow_neg_eigval = true; use .*delta_net or --format olmo-hybrid or"),
    (GATE | {"allow_neg_eigval": False}, "olmo_hybrid", "norm_eps = 1e-06 .only 1e-05.; use .*--format qwen3_5_text or"),
    (GATE | {"allow_neg_eigval": False, "attention_layers": [1]}, "qwen3_5_text", "express attention_layers; use --format fla"),
    (OLMO_BLOCK, "gated_deltanet", "express attention_block = 'olmo'; use --format olmo-hybrid or --format remote-code$"),
    (OLMO_BLOCK, "qwen3_5_text", "allow_neg_eigval = true and attention_layers|attention_layers and allow_neg_eigval = true"),
    (OLMO_BLOCK | {"attention_window": 9}, "olmo_hybrid", "express attention_window = 9; use --format remote-code$"),
    ({**GATED, "num_key_heads": 2}, "gated_deltaproduct", "cannot express num_key_heads = 2; use --format remote-code$"),
    ({**ONE_STEP, **GATED, "num_key_heads": 2}, "gated_deltaproduct", "num_key_heads = 2; use --model-type gated_deltanet or"),
    ({"beta_stretch": 0.05}, "gated_deltaproduct", "cannot express beta_stretch = 0.05; use --format remote-code$"),
    ({"output_norm": "group"}, "gated_deltaproduct", "cannot express output_norm = 'group'; use --format remote-code$"),
    ({"use_output_gate": True, "gate_before_norm": True}, "gated_deltaproduct", "gate_before_norm = true; use --format remote"),
    ({**ONE_STEP, **GATED, "output_norm": "group"}, "gated_deltanet", "output_norm = 'group'; use --format remote-code$"),
    ({**ONE_STEP, **GATED, "output_norm": "group"}, "olmo_hybrid", "output_norm = 'group' and norm_eps.*remote-code$"),
    ({"mixer": "rwkv7"}, "titan_dp", "^mixer = 'rwkv7' cannot be exported: no Hugging Face format has it"),
    ({"adaptive_householder": True}, "titan_dp", "^adaptive_householder = true cannot be exported: no Hugging Face format"),
]


@pytest.mark.parametrize(("changes", "model_type", "match"), INEXPRESSIBLE)
def test_a_model_that_a_type_cannot_express_is_refused_with_one_that_can(
    changes: dict[str, Any], model_type: str, match: str
) -> None:
    with pytest.raises(UserError, match=match):
        to_hf(config.Model(**changes), model_type, 64)


UNFIT: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({**ONE_STEP, "mixer": "gla"}, {}, "mixer = 'gla'"),
    ({}, {"target": "remote-code", "model_type": "gated_deltaproduct"}, "model-type"),
    ({"vocab_size": 200}, {}, "258 ids.*vocab_size = 200"),
    ({}, {"tokenizer": "nowhere/at_all.tiktoken"}, "nowhere/at_all.tiktoken"),
]


@pytest.mark.parametrize(("changes", "how", "match"), UNFIT)
def test_what_does_not_fit_together_is_not_exported(
    changes: dict[str, Any], how: dict[str, Any], match: str, checkpoint_of: Make, tmp_path: Path
) -> None:
    with refused(tmp_path, match):
        export(open_source(checkpoint_of(**changes)), tmp_path / "out", **how)


def test_an_output_that_exists_is_not_touched(checkpoint_of: Make, export_of: Make, tmp_path: Path) -> None:
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
    checkpoint_of: Make,
    export_of: Make,
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


def checkpoint_with(checkpoint: Path, run_folder: Path, value: float, name: str) -> Source:
    """A checkpoint in which one weight has that value."""
    source = open_source(checkpoint)
    held = source.read(source.shapes)
    held[name].view(-1)[5] = value
    save_model_weights(run_folder / "checkpoint/step-00000007", held, dict(source.training))
    return open_source(run_folder)


UP, NORM = "layers.1.mlp.up_proj.weight", "layers.0.mlp_norm.weight"
TOO_LARGE = {
    torch.float16: (1e5, "holds 100000, which float16 cannot hold .at most 65504.; take bfloat16 or float32"),
    torch.bfloat16: (-3.4e38, "holds -3.4e.38, which bfloat16 cannot hold .at most 3.38953e.38.; take float32"),
}


@pytest.mark.parametrize("dtype", TOO_LARGE)
def test_a_weight_that_the_dtype_cannot_hold_is_not_exported_nor_loaded(
    dtype: torch.dtype, checkpoint_of: Make, tmp_path: Path
) -> None:
    value, match = TOO_LARGE[dtype]
    source = checkpoint_with(checkpoint_of(), tmp_path / "run", value, UP)
    with refused(tmp_path, f"{UP} in .*{match}"):
        export(source, tmp_path / "out", dtype=dtype)
    with refused(tmp_path, match):
        load_model(source, torch.device("cpu"), dtype=dtype)
    export(source, tmp_path / "out")  # in float32
    norm = checkpoint_with(checkpoint_of(), tmp_path / "other", 1e5, NORM)
    export(norm, tmp_path / "norm", dtype=dtype)  # norms are float32 whatever the dtype is
    assert load_file(tmp_path / "norm" / "model.safetensors")[f"model.{NORM}"].view(-1)[5] == 1e5


# -- import ------------------------------------------------------------------------------------------------------------


def edit_config(**changes: object) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, **changes}))

    return edit


def edit_weights(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def save(folder: Path) -> None:
        held = load_file(folder / "model.safetensors")
        edit(held)
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})

    return save


def without(pattern: str) -> Callable[[Path], object]:
    return lambda folder: [path.unlink() for path in folder.glob(pattern)]


def cut_vocabulary(folder: Path) -> None:
    edit_config(vocab_size=200)(folder)
    name = "model.embeddings.weight"
    edit_weights(lambda held: held.update({name: held[name][:200].clone()}))(folder)


ATTENTION = {"layers": [0], "num_heads": 2, "qkv_bias": True}
SPOILT: list[tuple[Callable[[Path], object], str]] = [
    (without("config.json"), "config.json"),
    (edit_config(model_type="llama"), "'llama'"),
    (edit_config(hidden_act="relu"), "hidden_act = 'relu'"),
    (edit_config(attn=ATTENTION), "qkv_bias"),
    (edit_config(num_householder=10), "num_householder = 10"),
    (edit_config(intermediate_size=64), "gate_proj"),
    (without("model.safetensors"), "no weights"),
    (edit_weights(lambda h: h.pop("model.layers.1.attn.b_proj.weight")), "layers.1.attn.b_proj"),
    (edit_weights(lambda h: h.update(extra=torch.zeros(3))), "extra"),
    (edit_weights(lambda h: h.update({f"model.{UP}": h[f"model.{UP}"].mT.contiguous()})), "up_proj"),
    (
        edit_weights(lambda h: h.update({"model.norm.weight": torch.full((32,), 1e39, dtype=torch.float64)})),
        "norm.weight .*holds 1e.39, which float32 cannot hold",
    ),
    (without("tokenizer*"), "has no tokenizer.json.*--tokenizer"),
    (cut_vocabulary, "258 ids.*vocab_size = 200"),
    (without("model-*.safetensors"), "lacks model-000.*copy the folder again"),
]


@pytest.mark.parametrize(("spoil", "match"), SPOILT, ids=[match for _, match in SPOILT])
def test_a_spoilt_folder_is_not_imported(spoil: Callable[[Path], object], match: str, export_of: Make, tmp_path: Path) -> None:
    original = export_of({}, max_shard_bytes=10_000) if match.startswith("lacks") else export_of({})
    folder = Path(shutil.copytree(original, tmp_path / "folder"))
    spoil(folder)
    with refused(tmp_path, match):
        import_folder(FolderSource(folder), tmp_path / "imported")


def test_a_checkpoint_of_ours_is_no_folder_to_import(checkpoint_of: Make) -> None:
    with pytest.raises(UserError, match="is no Hugging Face folder: it has no config.json"):
        FolderSource(checkpoint_of())
