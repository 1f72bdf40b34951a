"""A trained model on disk: what is there is loaded as it was, and what is damaged, foreign or malicious is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.pretrained import Make, random_model
from titan_dp.checkpoint.manifest import read_manifest, write_manifest
from titan_dp.errors import UserError
from titan_dp.inference.hf.export import export
from titan_dp.inference.pretrained import load_pretrained, open_source
from titan_dp.model.transformer import Transformer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def saved(checkpoint_of: Make) -> Path:
    return checkpoint_of("run", use_forget_gate=True)


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "run" / "checkpoint" / saved.name))


def recommit(checkpoint: Path, change: Callable[[dict], object]) -> None:
    """Change the manifest as somebody would who can also write its checksum."""
    manifest = read_manifest(checkpoint)
    change(manifest)
    write_manifest(checkpoint, manifest, manifest.pop("files", []))


def logits(model: Transformer) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(40)[None])


def test_a_checkpoint_is_the_model_that_was_saved(saved: Path) -> None:
    loaded = load_pretrained(saved, CPU)
    assert torch.equal(logits(loaded.model), logits(random_model(use_forget_gate=True)[1]))
    assert loaded.source.label == "run-step-00000007"
    assert loaded.source.identity["step"] == 7
    assert loaded.tokenizer.name == "bytes"


@pytest.mark.parametrize("place", ["run/ckpt/step-00000007", "best"])
def test_a_model_is_read_from_wherever_its_checkpoint_was_copied_to(saved: Path, tmp_path: Path, place: str) -> None:
    copy = Path(shutil.copytree(saved, tmp_path / place))
    named = tmp_path / place.partition("/")[0]  # the run, or the copy itself
    source = open_source(named)
    assert source.path == copy
    assert source.label == f"run-{copy.name}"
    assert torch.equal(logits(load_pretrained(named, CPU).model), logits(load_pretrained(saved, CPU).model))


def test_in_bfloat16_norms_and_gates_stay_float32(saved: Path) -> None:
    model = load_pretrained(saved, CPU, dtype=torch.bfloat16).model
    dtypes = {name.split(".")[-2 if "weight" in name else -1]: p.dtype for name, p in model.named_parameters()}
    assert dtypes["q_proj"] == dtypes["q_conv1d"] == dtypes["embeddings"] == torch.bfloat16
    assert dtypes["attn_norm"] == dtypes["o_norm"] == dtypes["A_log"] == dtypes["dt_bias"] == torch.float32


def test_a_run_name_with_a_slash_gives_a_label_without(checkpoint: Path) -> None:
    recommit(checkpoint, lambda m: m.update(config=m["config"].replace('"run"', '"group/run"', 1)))
    assert open_source(checkpoint).label == "group-run-step-00000007"


@pytest.mark.parametrize("key", ["config", "tokenizer", "step", "tokens"])
def test_a_manifest_that_lacks_an_entry_is_damaged(checkpoint: Path, key: str) -> None:
    recommit(checkpoint, lambda m: m.pop(key))
    with pytest.raises(UserError, match=rf"manifest.json is damaged .*{key}.*; take another step"):
        open_source(checkpoint)


def test_weights_of_another_shape_than_the_settings_are_refused(checkpoint: Path) -> None:
    recommit(checkpoint, lambda m: m.update(config=m["config"].replace("head_dim = 16", "head_dim = 8")))
    with pytest.raises(UserError, match=r"is of another architecture: layers.0.attn.q_proj.weight"):
        open_source(checkpoint)


def test_flipped_bytes_of_the_weights_are_found_before_anything_is_exported(checkpoint: Path, tmp_path: Path) -> None:
    file = next(checkpoint.glob("*.distcp"))
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    with pytest.raises(UserError, match=r"its checksum differs.*; take another step"):
        export(open_source(checkpoint), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_backend_that_does_not_exist_is_the_users_mistake(saved: Path) -> None:
    with pytest.raises(UserError, match="backend = 'fast' is not available"):
        load_pretrained(saved, CPU, backend="fast")
