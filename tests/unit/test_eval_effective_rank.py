"""Effective rank: the formula, the states against the definition in float64, and a run that can be cut, split and repeated."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.pretrained import Make, evaluate, random_model, write_documents
from titan_dp.evals.effective_rank import cheap_interval, effective_rank
from titan_dp.model.deltaproduct import DeltaProduct

BOS = 256  # of the bytes tokenizer
DOCUMENTS = ["a red fox", "", "sees the old green river and the dog that likes it", "runs"]
STARTS = [0, 10, 11, 62]
TRAINED = 30  # tokens a sequence

GATED = {"use_forget_gate": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "n_h 3, no convolution": {"num_householder": 3, "use_short_conv": False},
    "n_h 3, gated, wide values": {**GATED, "num_householder": 3, "expand_v": 1.5},
    "hybrid": {**GATED, "num_hidden_layers": 3, "attention_layers": [1]},
    "grouped heads": {**GATED, "num_heads": 4, "num_key_heads": 2},
    "linear attention": {**GATED, "mixer": "gla", "num_householder": 1},
}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_documents(tmp_path / "text.jsonl", DOCUMENTS)


def token_ids() -> list[int]:
    return [id_ for document in DOCUMENTS for id_ in (BOS, *document.encode())]


def measured(checkpoint: Path, text: Path, out: Path, *words: object) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """The results in the JSON file, and the rows of the CSV file; without figures, which take longest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("titan_dp.evals.effective_rank._draw", lambda *_: None)
        results = evaluate("effective-rank", checkpoint, out, "--text", text, *words)["results"]
    (path,) = out.glob("*.csv.gz")
    with gzip.open(path, "rt", newline="") as file:
        return results, [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def column(rows: list[dict[str, float]], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows])


# -- the formula -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        (np.eye(8), 8.0),
        (np.outer(np.arange(1, 6), np.arange(2, 9)), 1.0),
        (np.diag([1, 1e-3]), 1.008),
        (np.diag([3.0, 3.0, 0.0]), 2.0),
        (np.zeros((4, 6)), 0.0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_effective_rank_of_known_matrices(matrix: np.ndarray, expected: float, dtype: torch.dtype) -> None:
    tensor = torch.tensor(matrix, dtype=dtype)
    assert float(effective_rank(tensor)) == pytest.approx(expected, abs=5e-4)
    assert float(effective_rank(1e-12 * tensor)) == pytest.approx(expected, abs=5e-4)


def rank_by_definition(matrix: np.ndarray) -> float:
    sigma = np.linalg.svd(matrix, compute_uv=False)
    p = sigma[sigma > 0] / sigma.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


# -- the states, against the definition --------------------------------------------------------------------------------


def states_by_definition(inputs: Any, erase: bool) -> np.ndarray:
    """[T, n, H, dk, dv] float64: after every step, by multiplying with the transition matrices one after another."""
    k, v, beta = (z[0].numpy() for z in (inputs.k, inputs.v, inputs.beta))
    T, n, H, dk = k.shape
    S = np.zeros((H, dk, v.shape[-1]))
    states = np.empty((T, n, *S.shape))
    for t in range(T):
        for h in range(H):
            if inputs.g is not None:
                S[h] *= np.exp(float(inputs.g[0, t, h]))
            for j in range(n):
                transition = np.eye(dk) - beta[t, j, h] * np.outer(k[t, j, h], k[t, j, h]) * erase
                S[h] = transition @ S[h] + beta[t, j, h] * np.outer(k[t, j, h], v[t, j, h])
                states[t, j, h] = S[h]
    return states


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_number_is_that_of_the_recurrence_as_defined(
    checkpoint_of: Make, variant: str, tmp_path: Path, text: Path
) -> None:
    """The model in float64 and in one piece; the evaluation in segments of 13, so states are carried."""
    changes = VARIANTS[variant]
    results, rows = measured(checkpoint_of(**changes), text, tmp_path / "out", "--micro-steps", "--segment", 13)
    model, expected = random_model(**changes)[1].double().requires_grad_(False), []
    x = model.embeddings(torch.tensor([token_ids()]))
    for layer, block in enumerate(model.blocks):
        if isinstance(block.attn, DeltaProduct):
            inputs = block.attn.recurrence_inputs(block.attn_norm.apply_to(x), None)
            states = states_by_definition(inputs, block.attn.erase)
            T, n, H = states.shape[:3]
            decay = torch.ones(1, T, H) if inputs.g is None else inputs.g.exp()
            for h, t, j in np.ndindex(H, T, n):
                S = states[t, j, h]
                steps = [*inputs.beta[0, t, :, h].tolist(), float(decay[0, t, h])]
                expected.append([layer, h, t, t in STARTS, j + 1, rank_by_definition(S), np.linalg.norm(S), *steps])
        x, _ = block(x)
    found = np.array([list(row.values()) for row in rows])
    assert found[:, :5].tolist() == [row[:5] for row in expected]
    assert found[:, 5:] == pytest.approx(np.array(expected)[:, 5:], rel=1e-3)
    largest = max(head["largest_state_entry"] for layer in results["layers"] for head in layer["heads"])
    assert 0 < results["largest_replay_difference"] < 1e-5 * largest
    assert results["skipped_layers"] == changes.get("attention_layers", [])


def test_a_kernel_that_differs_from_the_replay_is_noticed(
    checkpoint_of: Make, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = DeltaProduct.recurrence_inputs

    def other(self: DeltaProduct, x: torch.Tensor, cache: Any) -> Any:
        found = inputs(self, x, cache)
        beta = found.beta.clone()
        beta[0, -1, -1, 1] = 0  # the last step of the segment, in head 1
        return found._replace(beta=beta)

    monkeypatch.setattr(DeltaProduct, "recurrence_inputs", other)
    results, _ = measured(checkpoint_of(), text, tmp_path / "out")
    for layer in results["layers"]:
        assert layer["heads"][0]["largest_replay_difference"] < 1e-5
        assert layer["heads"][1]["largest_replay_difference"] > 1e-3


# -- what is looked at -------------------------------------------------------------------------------------------------


def test_documents_first_tokens_are_marked_and_looked_at_whatever_the_interval(
    checkpoint_of: Make, tmp_path: Path, text: Path
) -> None:
    results, rows = measured(checkpoint_of(), text, tmp_path / "out", "--every", 7)
    ids = token_ids()
    assert results["document_starts"] == [i for i, id_ in enumerate(ids) if id_ == BOS] == STARTS
    mine = [row for row in rows if (row["layer"], row["head"]) == (1, 1)]
    assert column(mine, "position").tolist() == sorted({*range(0, len(ids), 7), *STARTS})
    assert [row["position"] for row in mine if row["document_start"]] == STARTS
    assert (column(rows, "decay") == 1).all(), "there is no gate"
    results, rows = measured(checkpoint_of(), text, tmp_path / "first", "--max-length", 40)
    assert (results["tokens"], results["documents"], column(rows, "position").max()) == (40, 3, 39)
    assert results["layers"][0]["heads"][0]["effective_rank"]["beyond"] is None


def test_means_are_over_the_interval_inside_and_beyond_the_training_length(
    checkpoint_of: Make, tmp_path: Path, text: Path
) -> None:
    checkpoint = checkpoint_of(seq_len=TRAINED, num_heads=8)  # more than figures have colours
    results, rows = measured(checkpoint, text, tmp_path / "out", "--every", 4, "--micro-steps")
    head = results["layers"][1]["heads"][0]
    mine = [r for r in rows if (r["layer"], r["head"], r["step"]) == (1, 0, 2) and r["position"] % 4 == 0]
    halves = [r for r in mine if r["position"] < TRAINED], [r for r in mine if r["position"] >= TRAINED]
    for name, key in (("effective_rank", "effective_rank"), ("norm", "state_norm")):
        expected = [column(half, name).mean() for half in halves]
        assert [head[key]["inside"], head[key]["beyond"]] == pytest.approx(expected, rel=1e-4)
    assert head["beta"] == pytest.approx([column(mine, f"beta_{j}").mean() for j in (1, 2)], rel=1e-4)


def test_a_large_model_is_looked_at_less_often() -> None:
    small, large = ({0: DeltaProduct(random_model(head_dim=d)[0])} for d in (16, 256))
    assert cheap_interval(16384, small, micro_steps=False) == 1
    assert cheap_interval(16384 * 20, large, micro_steps=False) > 1
