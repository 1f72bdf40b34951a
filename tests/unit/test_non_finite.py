"""NaN and infinity in weights or logits: every command that reads a model ends with a message, and none computes a result."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.pretrained import save_checkpoint, write_documents
from titan_dp.checkpoint.manifest import read_manifest, write_manifest
from titan_dp.checkpoint.state import not_finite
from titan_dp.checkpoint.weights import save_model_weights
from titan_dp.cli import dispatch
from titan_dp.errors import RunError, UserError
from titan_dp.inference.hf.card import _measured_rows
from titan_dp.inference.hf.export import export
from titan_dp.inference.hf.folder import FolderSource
from titan_dp.inference.hf.importer import import_folder
from titan_dp.inference.pretrained import open_source
from titan_dp.train.validate import accuracy_by_position, evaluate_answers

CPU = torch.device("cpu")
TASK = ["--tasks", "devils_dictionary", "--limit", 2]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("runs") / "good", seq_len=32, use_forget_gate=True)


@pytest.fixture(scope="module")
def overflowing(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every weight is finite, and nothing that is computed from them."""

    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["layers.0.attn.v_proj.weight"].fill_(3e38)

    return resaved(good, tmp_path_factory.mktemp("runs") / "overflowing", change)


@pytest.fixture(scope="module")
def exported(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of `titan-dp export` in which one number was damaged since."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    export(open_source(good), folder, target="remote-code")
    file = folder / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-4:] = torch.tensor(math.nan).numpy().tobytes()
    file.write_bytes(raw)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(
        tmp_path_factory.mktemp("text") / "d.jsonl", ["The fox sees the dog, and the dog sees the fox. " * 3]
    )


def resaved(checkpoint: Path, run_folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A run like the one of `checkpoint` but for its weights."""
    source = open_source(checkpoint)
    weights = source.read(source.shapes)
    change(weights)
    manifest = read_manifest(checkpoint)
    del manifest["files"]
    save_model_weights(run_folder / "checkpoint" / checkpoint.name, weights, manifest)
    return run_folder


def command(name: str, model: Path, text: Path, out: Path, root: Path) -> list[str]:
    words: dict[str, list[Any]] = {
        "generate, greedy": ["generate", model, "--temperature", 0, "--max-new-tokens", 4],
        "generate, sampled": ["generate", model, "--max-new-tokens", 4],
        "perplexity": ["evaluate", "perplexity", model, "--text", text, "--out", out],
        "length": ["evaluate", "length-extrapolation", model, "--text", text, "--max-length", 64, "--out", out],
        "rank": ["evaluate", "effective-rank", model, "--text", text, "--out", out],
        "recall": ["evaluate", "recall", model, "--pairs", 4, "--sequences", 4, "--out", out],
        "lm-eval": ["evaluate", "lm-eval", model, *TASK, "--include-path", root / "docs/lm_eval_tasks", "--out", out],
    }
    return [str(word) for word in words[name]]


COMMANDS = ["generate, greedy", "generate, sampled", "perplexity", "length", "rank", "recall"]
COMMANDS += ["lm-eval"] if find_spec("lm_eval") else []


@pytest.mark.parametrize("name", ["generate, greedy", "perplexity"])  # all read weights by one function
def test_a_weight_that_is_not_finite_ends_a_command_and_is_named(
    name: str, exported: Path, text: Path, tmp_path: Path, root: Path
) -> None:
    with pytest.raises(UserError, match=r"the weights in .*model are not finite: .*; take an earlier, healthy"):
        dispatch(command(name, exported, text, tmp_path / "out", root))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_logits_losses_and_states_that_are_not_finite_end_a_command(
    name: str, overflowing: Path, text: Path, tmp_path: Path, root: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(RunError, match=r"the (model's|states) .*are not finite.*titan-dp checkpoint list"):
        dispatch(command(name, overflowing, text, tmp_path / "out", root))
    assert not (tmp_path / "out").exists()
    assert "\0" not in capsys.readouterr().out


def test_weights_that_are_not_finite_are_neither_exported_nor_imported(good: Path, exported: Path, tmp_path: Path) -> None:
    bad = resaved(good, tmp_path / "bad", lambda weights: weights["norm.weight"].fill_(math.inf))
    with pytest.raises(UserError, match=r"are not finite: norm.weight"):
        export(open_source(bad), tmp_path / "out")
    with pytest.raises(UserError, match="are not finite"):
        import_folder(FolderSource(exported), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_of_a_run_is_of_its_newest_healthy_checkpoint(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    checkpoints = tmp_path / "run/checkpoint"
    shutil.copytree(good, checkpoints / "step-00000007")
    newer = Path(shutil.copytree(good, checkpoints / "step-00000009"))
    manifest = read_manifest(newer) | {"step": 9, "healthy": False, "unhealthy": ["the training loss of step 9 is nan"]}
    write_manifest(newer, manifest, manifest.pop("files"))
    assert dispatch(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--format", "remote-code"]) == 0
    assert "step 9 is not healthy (the training loss of step 9 is nan); taking step 7" in capsys.readouterr().err
    assert '"step": 7' in (tmp_path / "out/training.json").read_text()


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_one_number_in_a_tensor_is_found(value: float, dtype: torch.dtype) -> None:
    bad = torch.ones(3, 1001, dtype=dtype)
    bad[1, 500] = value
    tensors = {"good": torch.full((5,), 1e38, dtype=dtype), "empty": torch.empty(0), "bad": bad, "ids": torch.arange(3)}
    assert not_finite(tensors) == ["bad"]


class NanAt2(torch.nn.Module):
    """Answers every question with its label, but for position 2, where logits are NaN."""

    def __init__(self, labels: torch.Tensor) -> None:
        super().__init__()
        self.labels = labels

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = torch.nn.functional.one_hot(self.labels, 8).float()
        logits[:, 2] = math.nan
        return logits


@pytest.fixture
def answers() -> Iterator[tuple[Any, list[dict[str, Any]]]]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    labels = torch.zeros(2, 4, dtype=torch.int64)  # the argmax of NaN is 0
    yield NanAt2(labels), [{"input_ids": labels, "labels": labels, "cu_seqlens": None}]
    dist.destroy_process_group()


def test_an_answer_of_nan_is_not_right(answers: tuple[Any, list[dict[str, Any]]]) -> None:
    result = evaluate_answers(*answers, CPU)
    assert (result.token_accuracy, result.sequence_accuracy) == (0.75, 0.0)
    assert math.isnan(result.loss)


def test_a_test_by_length_on_nan_ends_with_a_message(answers: tuple[Any, list[dict[str, Any]]]) -> None:
    with pytest.raises(RunError, match="the model's logits are not finite"):
        accuracy_by_position(*answers, CPU)


def test_theory_counts_an_answer_of_nan_as_an_error() -> None:
    from titan_dp.data.synthetic.groups import parse_group
    from titan_dp.studies.state_tracking.theory import count_errors

    model: Any = lambda inputs: torch.full((*inputs.shape, 4), math.nan)  # noqa: E731
    assert count_errors(model, parse_group("Z2"), tokens=50, seed=0) == 50


@pytest.mark.parametrize("bad", [math.nan, None])
def test_a_model_card_says_that_a_loss_is_not_finite(bad: float | None) -> None:
    assert _measured_rows({"validation_loss": bad, "validation_tokens": 5}) == {"validation loss": "not finite"}
