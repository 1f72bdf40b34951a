"""`titan-dp evaluate length-extrapolation`: segments change nothing, and every curve is the mean it says it is."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.pretrained import Make, evaluate, random_model, write_documents
from titan_dp.cli import dispatch
from titan_dp.evals.scoring import keeps_all_tokens, token_losses

LENGTH, COUNT, SMOOTH = 90, 5, 8
TEXTS = ["The fox sees the dog. " * n for n in (3, 1, 9, 4, 5)]
MODEL = {"num_householder": 2, "use_forget_gate": True}
HYBRID = {"attention_layers": [1]}
MODELS: dict[str, dict[str, Any]] = {
    "gated": MODEL,
    "linear attention": {"mixer": "gla", "num_householder": 1, "use_forget_gate": True},
    "hybrid": HYBRID,
    "hybrid with a window": {**HYBRID, "attention_window": 10},
    "without convolutions": {"use_short_conv": False},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("text") / "documents.jsonl", TEXTS)


@pytest.fixture(scope="module")
def losses() -> np.ndarray:
    """[COUNT, LENGTH - 1]: of the full sequences of the joined documents, by plain forwards in float64."""
    joined = [token for text in TEXTS for token in [256, *text.encode()]]
    assert len(joined) // LENGTH == COUNT
    tokens = torch.tensor(joined)[: COUNT * LENGTH].view(COUNT, LENGTH)
    return plain_losses(tokens[:, :-1], tokens[:, 1:], **MODEL).numpy()


def plain_losses(tokens: torch.Tensor, labels: torch.Tensor, **model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits = random_model(**model)[1].double()(tokens).double()
    return -logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]


def results(checkpoint: Path, text: Path, out: Path, *options: object) -> dict[str, Any]:
    words = ("--text", text, "--max-length", LENGTH, "--smooth", SMOOTH, "--segment", 32, *options)
    return evaluate("length-extrapolation", checkpoint, out, *words)["results"]


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_losses_are_those_of_the_plain_forward_whatever_the_segment(model: dict[str, Any]) -> None:
    torch.seed()
    tokens, labels = torch.randint(0, 320, (2, 2, 65))
    expected = plain_losses(tokens, labels, **model)
    for segment in (1, 7, 64, 1000):
        found, _ = token_losses(random_model(**model)[1], tokens, labels, segment)
        torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-5)


def test_a_guess_is_right_where_the_label_is_the_likeliest_id() -> None:
    _, model = random_model(**MODEL)
    tokens = torch.randint(0, 320, (2, 40), generator=torch.Generator().manual_seed(0))
    likeliest = model(tokens).argmax(-1)
    wrong = torch.zeros(2, 40, dtype=torch.bool)
    wrong[0, 3] = wrong[1, 39] = True
    _, right = token_losses(model, tokens, torch.where(wrong, (likeliest + 1) % 320, likeliest), 16)
    assert torch.equal(right, ~wrong)


class _Largest(TorchDispatchMode):
    """The most elements any tensor had that an operator returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


def test_no_tensor_grows_with_the_sequence() -> None:
    _, model = random_model(**MODEL)
    largest = []
    for length in (32, 256):
        with _Largest() as seen:
            token_losses(model, *torch.zeros(2, 1, length, dtype=torch.int64), 32)
        largest.append(seen.elements)
    assert largest[0] == largest[1] > 256


def test_only_softmax_without_a_window_keeps_all_tokens() -> None:
    keeping = [name for name, model in MODELS.items() if keeps_all_tokens(random_model(**model)[1])]
    assert keeping == ["hybrid"]


def test_the_curves_are_means_over_sequences_and_positions(
    checkpoint: Path, text: Path, tmp_path: Path, losses: np.ndarray
) -> None:
    found = results(checkpoint, text, tmp_path, "--batch-size", 2)
    assert found["sequences"] == COUNT
    assert found["loss"] == pytest.approx(losses.mean(), rel=1e-5)
    np.testing.assert_allclose(found["loss_by_position"], losses.mean(0), rtol=2e-5)
    curve = found["curve"]
    for i, p in enumerate(curve["position"]):
        half = min((SMOOTH - 1) // 2, p - 1)
        near = losses[:, p - 1 - half : p + half].mean(1)
        assert curve["smoothed_loss"][i] == pytest.approx(near.mean(), rel=2e-5)
        assert curve["standard_error"][i] == pytest.approx(near.std(ddof=1) / COUNT**0.5, rel=1e-4)
        assert curve["running_loss"][i] == pytest.approx(losses[:, :p].mean(), rel=2e-5)
        assert curve["running_perplexity"][i] == pytest.approx(np.exp(losses[:, :p].mean()), rel=1e-4)
    assert curve["position"][-1] == LENGTH - 1
    ranges = found["ranges"]
    assert ranges["first_position"] == [1] + [last + 1 for last in ranges["last_position"][:-1]]
    assert ranges["last_position"][-1] == LENGTH - 1
    for i, (first, last) in enumerate(zip(ranges["first_position"], ranges["last_position"], strict=True)):
        means = losses[:, first - 1 : last].mean(1)
        assert ranges["loss"][i] == pytest.approx(means.mean(), rel=2e-5)
        assert ranges["standard_error"][i] == pytest.approx(means.std(ddof=1) / COUNT**0.5, rel=1e-4)


def test_several_checkpoints_share_a_csv_file_and_a_plot(
    checkpoint: Path, checkpoint_of: Make, text: Path, tmp_path: Path, losses: np.ndarray
) -> None:
    words = [checkpoint, checkpoint_of("other", seed=1), "--text", text, "--max-length", LENGTH, "--out", tmp_path]
    words += ["--sequences", 1, "--x-axis", "linear"]
    assert dispatch(["evaluate", "length-extrapolation", *map(str, words)]) == 0
    header, *rows = csv.reader((tmp_path / "length-extrapolation.csv").open())
    labels = ["tiny-step-00000007", "other-step-00000007"]
    what = ["loss", "smoothed loss", "running mean loss"]
    assert header == ["position", *(f"{label} {column}" for label in labels for column in what)]
    assert [int(row[0]) for row in rows] == list(range(1, LENGTH))
    for i, label in enumerate(labels):
        found = json.loads((tmp_path / f"length-extrapolation-{label}.json").read_text())["results"]
        assert found["curve"]["standard_error"] is None
        mean = np.array(found["loss_by_position"])
        np.testing.assert_allclose([float(row[1 + 3 * i]) for row in rows], mean, atol=1e-6)
        assert float(rows[-1][3 + 3 * i]) == pytest.approx(mean.mean(), abs=1e-6)
    np.testing.assert_allclose([float(row[1]) for row in rows], losses[0], rtol=2e-5, atol=1e-6)
    assert (tmp_path / "length-extrapolation.png").read_bytes().startswith(b"\x89PNG")
