"""Associative recall: the sequences, a model that recalls by construction, and what the delta rule is for."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deltaproduct_kernels import gated_delta_product

import tests.pretrained
from tests.pretrained import Make, evaluate, random_model, save_checkpoint
from titan_dp import config
from titan_dp.cli import dispatch
from titan_dp.data.tokenizer import load_tokenizer
from titan_dp.evals.recall import Example, make_example, split_vocabulary, unpaired_guess, wilson
from titan_dp.model.transformer import Transformer

BOS = 256  # of the bytes tokenizer


def measured(checkpoint: Path, out: Path, *words: object) -> list[dict[str, Any]]:
    """The results in the JSON file, by number of pairs; without the figure."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("titan_dp.evals.recall._draw", lambda *_: None)
        return evaluate("recall", checkpoint, out, *words)["results"]["by_pairs"]


# -- the sequences -----------------------------------------------------------------------------------------------------


def example(pairs: int = 8, queries: int | None = None, length: int | None = None, seed: int = 0, index: int = 0) -> Example:
    return make_example(split_vocabulary(load_tokenizer("bytes"), seed), BOS, pairs, queries, length, seed, index)


@pytest.mark.parametrize(("queries", "length"), [(None, None), (3, 61)])
def test_every_query_is_a_key_of_the_sequence_with_its_value_as_answer(queries: int | None, length: int | None) -> None:
    found = example(8, queries, length)
    tokens = found.tokens.tolist()
    assert (tokens[0], len(tokens)) == (BOS, length or 33)
    pairs = dict(zip(tokens[1:17:2], tokens[2:18:2], strict=True))
    assert len(pairs) == len(set(pairs.values())) == 8
    assert list(pairs.values()) == found.values.tolist()
    assert len(found.queries) == len({tokens[i] for i in found.queries}) == (queries or 8)
    for where, answer, distance in zip(found.queries, found.answers, found.distances, strict=True):
        assert found.values[answer] == pairs[tokens[where]] == tokens[where + 1]
        assert tokens[where - distance] == tokens[where]
        assert where >= 17 > where - distance
    fillers = {tokens[i] for i in set(range(17, len(tokens))) - {i + j for i in found.queries for j in (0, 1)}}
    assert fillers <= set(split_vocabulary(load_tokenizer("bytes"), 0).keys) - pairs.keys(), "keys without a pair"


def test_keys_and_values_are_disjoint_halves_of_the_vocabulary_without_special_tokens() -> None:
    vocabulary = split_vocabulary(load_tokenizer("bytes"), 0)
    assert sorted([*vocabulary.keys, *vocabulary.values]) == list(range(256))
    assert len(vocabulary.keys) == 128


def test_a_sequence_is_a_function_of_seed_pairs_and_index() -> None:
    first = example(index=3).tokens.tolist()
    assert example(index=3).tokens.tolist() == first
    others = [example(index=4), example(index=3, seed=1), example(7, index=3)]
    assert all(other.tokens.tolist()[:15] != first[:15] for other in others)


def test_queries_come_in_random_order_at_all_distances() -> None:
    found = [example(3, index=i) for i in range(60)]
    assert {tuple(e.answers) for e in found} == {tuple(p) for p in itertools.permutations(range(3))}
    assert {int(d) for e in found for d in e.distances} == set(range(2, 12, 2))


# -- models that recall, and that do not -------------------------------------------------------------------------------


def recalling_model(seed: int = 0, **changes: object) -> tuple[config.Model, Transformer]:
    """One DeltaNet layer over one-hot tokens: writes at each token (token before -> token), reads at the token itself."""
    settings = {"hidden_size": 320, "num_hidden_layers": 1, "num_heads": 1, "head_dim": 320, "num_householder": 1}
    c, model = random_model(seed, **settings, **changes)
    mixer, identity = model.blocks[0].attn, torch.eye(320)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1)
        for matrix in (model.embeddings, mixer.q_proj, mixer.k_proj, mixer.v_proj):
            matrix.weight.copy_(identity)
        mixer.o_proj.weight.copy_(100 * identity)
        for conv, back in ((mixer.q_conv1d, 0), (mixer.k_conv1d, 1), (mixer.v_conv1d, 0)):
            conv.weight[:, 0, -1 - back] = 1
    return c, model


@pytest.fixture
def recalling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tests.pretrained, "random_model", recalling_model)
    return save_checkpoint(tmp_path / "recalling")


def test_a_model_that_recalls_by_construction_answers_every_query(recalling: Path, tmp_path: Path) -> None:
    for row in measured(recalling, tmp_path / "out", "--pairs", 1, 4, 128, "--sequences", 2):
        assert row["queries"] == 2 * row["pairs"]
        assert row["accuracy"] == row["accuracy_among_values"] == 1.0
    fillers = ("--pairs", 8, "--queries", 2, "--length", 100, "--sequences", 20)
    (row,) = measured(recalling, tmp_path / "fillers", *fillers)
    assert (row["queries"], row["accuracy"]) == (40, 1.0)
    distances = np.concatenate([example(8, 2, 100, index=i).distances for i in range(20)])
    for near in row["by_distance"]:
        low, high = near["distance"]
        assert near["queries"] == int(((distances >= low) & (distances <= high)).sum())
    assert sum(near["queries"] for near in row["by_distance"]) == 40


def test_a_random_model_guesses(checkpoint: Path, tmp_path: Path) -> None:
    (row,) = measured(checkpoint, tmp_path / "out", "--pairs", 8, "--sequences", 50)
    assert row["accuracy"] < 0.05
    assert row["interval_among_values"][0] < row["chance_among_values"] + 0.03
    assert row["interval_among_values"][1] > row["chance_among_values"] - 0.03


def recall_of_overwritten_keys(erase: bool) -> float:
    """Share of keys whose last value is found: 8 orthogonal keys, each written three times, twice with the older value."""
    rng = np.random.default_rng(0)
    order = np.concatenate([rng.permutation(8) for _ in range(3)])
    old, new = rng.permutation(16).reshape(2, 8)
    values = np.concatenate([old[order[:16]], new[order[16:]]])
    keys = torch.from_numpy(np.linalg.qr(rng.standard_normal((8, 8)))[0])
    k = torch.cat([keys[order], torch.zeros(8, 8)])[None, :, None, None]  # then eight tokens that only read
    v = torch.cat([torch.eye(16, dtype=torch.float64)[values], torch.zeros(8, 16)])[None, :, None, None]
    q = torch.cat([torch.zeros(24, 8), keys])[None, :, None]
    o, _ = gated_delta_product(q.double(), k, v, torch.ones(1, 32, 1, 1).double(), scale=1.0, erase=erase)
    return float((o[0, 24:, 0].argmax(-1) == torch.from_numpy(new)).double().mean())


def test_the_delta_rule_recalls_overwritten_keys_and_accumulation_does_not() -> None:
    assert recall_of_overwritten_keys(erase=True) == 1.0
    assert recall_of_overwritten_keys(erase=False) == 0.0


# -- numbers that say what an accuracy is worth ------------------------------------------------------------------------


@pytest.mark.parametrize(("right", "asked"), [(0, 10), (3, 10), (1000, 1000)])
def test_the_interval_is_of_proportions_the_count_does_not_contradict(right: int, asked: int) -> None:
    z = 1.959964
    grid = np.linspace(0, 1, 200_001)
    inside = grid[np.abs(right / asked - grid) <= z * np.sqrt(grid * (1 - grid) / asked)]
    assert wilson(right, asked) == pytest.approx((inside.min(), inside.max()), abs=1e-5)


@pytest.mark.parametrize(("pairs", "queries"), [(4, None), (8, 3)])
def test_the_guess_without_pairing_is_that_of_elimination(pairs: int, queries: int | None) -> None:
    rng, hits = np.random.default_rng(0), []
    for _ in range(2000):
        answers = rng.permutation(pairs)[: queries or pairs]
        left = set(range(pairs))
        for answer in answers.tolist():
            hits.append(rng.choice(sorted(left)) == answer)
            left.remove(answer)
    assert unpaired_guess(pairs, queries) == pytest.approx(np.mean(hits), abs=0.03)


# -- files ------------------------------------------------------------------------------


def test_several_checkpoints_share_a_figure_and_keep_files_of_their_own(
    checkpoint_of: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*map(checkpoint_of, ("one", "two")), "--out", tmp_path / "out", "--pairs", 2, 4, "--sequences", 3]
    assert dispatch(["evaluate", "recall", *map(str, words)]) == 0
    labels = ["one-step-00000007", "two-step-00000007"]
    expected = {"recall.png", *(f"recall-{label}.{ending}" for label in labels for ending in ("json", "csv"))}
    assert {path.name for path in (tmp_path / "out").iterdir()} == expected
    assert (tmp_path / "out" / "recall.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "out" / "recall-one-step-00000007.csv").open(newline="") as file:
        assert sum(int(row["queries"]) for row in csv.DictReader(file)) == 3 * (2 + 4)
    printed = capsys.readouterr().out
    assert all(label in printed for label in labels)
    assert printed.count("written to") == 1


def test_the_batch_does_not_matter(checkpoint: Path, tmp_path: Path) -> None:
    words = ("--pairs", 3, 6, "--sequences", 4, "--batch-size")
    assert measured(checkpoint, tmp_path / "1", *words, 1) == measured(checkpoint, tmp_path / "3", *words, 3)
