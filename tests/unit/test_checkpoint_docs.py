"""docs/checkpoints.md tells other tools how to read our checkpoints: what it shows is run here, with torch alone."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.pretrained import random_model, save_checkpoint

MODEL = {"num_householder": 2, "use_forget_gate": True, "tie_word_embeddings": False}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("runs") / "run", **MODEL)


@pytest.fixture(scope="module")
def shown(checkpoint: Path, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the page's Python was run, as it stands there."""
    text = (root / "docs/checkpoints.md").read_text()
    folder, blocks = tmp_path_factory.mktemp("shown"), re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert "titan_dp" not in "".join(blocks), "it must work where this project is not installed"
    names: dict[str, Any] = {"CHECKPOINT": str(checkpoint)}
    with contextlib.chdir(folder), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is")
        for block in blocks:
            exec(block, names)
        torch.save(names["weights"], "weights.pt")
    return folder


def read(file: Path) -> dict[str, torch.Tensor]:
    return torch.load(file, weights_only=True)


def test_plain_dcp_reads_our_weights(shown: Path) -> None:
    expected = {f"model.{name}": tensor for name, tensor in random_model(**MODEL)[1].state_dict().items()}
    found = read(shown / "weights.pt")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_dcp_to_torch_gives_the_same_under_flat_names(shown: Path) -> None:
    weights, state = read(shown / "weights.pt"), read(shown / "checkpoint.pt")
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.items())


def test_what_is_made_for_flame_are_the_tensors_of_an_fla_export(shown: Path, export_of: Callable[..., Path]) -> None:
    expected = load_file(export_of(MODEL) / "model.safetensors")
    found = torch.load(shown / "flame.pt", weights_only=True)["model"]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
