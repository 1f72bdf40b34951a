"""`titan-dp evaluate perplexity`: the numbers of a definition-level computation in float64, for every way to cut documents."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Container
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.pretrained import evaluate, random_model, write_documents
from titan_dp.data.batch import Place
from titan_dp.data.loader import ValidationLoader
from titan_dp.data.shards import TokenShards
from titan_dp.inference.pretrained import load_pretrained
from titan_dp.train.validate import bits_per_byte, evaluate_loss

BOS = 256
TEXTS = ["The fox sees the dog, and the dog sees the fox. " * 3, "Größe", "a", "", "one two three four five six seven " * 2]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("text") / "documents.jsonl", TEXTS)


@functools.cache
def model64() -> Any:
    return random_model(num_householder=2, use_forget_gate=True)[1].double()  # that of the fixture `checkpoint`


def losses64(tokens: list[int]) -> Tensor:
    """-log p of every token but the first, by one plain forward in float64."""
    with torch.no_grad():
        logits = model64()(torch.tensor([tokens[:-1]])).double()
    return -logits.log_softmax(-1)[0, torch.arange(len(tokens) - 1), tokens[1:]]


def documents(bos: bool = True) -> list[list[int]]:
    return [[BOS] * bos + list(text.encode()) for text in TEXTS]


def by_definition(streams: list[list[int]], context: int, stride: int, unscored: Container[int] = ()) -> tuple[float, int]:
    """Summed loss and count: token i is scored in the first window from a multiple of stride that reaches it."""
    total, count = 0.0, 0
    for ids in streams:
        scored = (i for i in range(1, len(ids)) if i not in unscored)
        for start, group in itertools.groupby(scored, lambda i: max(0, math.ceil((i - context) / stride)) * stride):
            in_window = list(group)
            losses = losses64(ids[start : in_window[-1] + 1])
            total += sum(float(losses[i - start - 1]) for i in in_window)
            count += len(in_window)
    return total, count


@pytest.mark.parametrize(("context", "stride"), [(32, 7), (1000, 1000), (1, 1)])
def test_every_token_is_scored_once_in_the_window_that_first_reaches_it(
    checkpoint: Path, text: Path, tmp_path: Path, context: int, stride: int
) -> None:
    options = ["--context", context, "--stride", stride, "--batch-size", 3]
    found = evaluate("perplexity", checkpoint, tmp_path, "--text", text, *options)["results"]
    total, count = by_definition(documents(), context, stride)
    assert found["tokens"] == count
    assert found["loss"] == pytest.approx(total / count, rel=1e-5)
    size = sum(len(text.encode()) for text in TEXTS)
    assert (found["documents"], found["text_bytes"]) == (len(TEXTS), size)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["bits_per_token"] == pytest.approx(found["loss"] / math.log(2))
    assert found["bits_per_byte"] == pytest.approx(found["loss"] * count / size / math.log(2))


def test_the_carried_state_gives_every_token_its_whole_document(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    options = ["--text", text, "--context", 10]
    found = evaluate("perplexity", checkpoint, tmp_path, *options, "--state", "carry")["results"]
    total = sum(float(losses64(ids).sum()) for ids in documents() if len(ids) > 1)
    reset = evaluate("perplexity", checkpoint, tmp_path / "reset", *options)["results"]
    assert found["loss"] == pytest.approx(total / found["tokens"], rel=1e-5)
    assert found["tokens"] == reset["tokens"]
    assert abs(found["loss"] - reset["loss"]) > 1e-3  # the test would notice a state that is not carried


def test_concatenated_documents_are_one_stream(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    options = ["--concatenate", "--context", 20, "--stride", 15]
    found = evaluate("perplexity", checkpoint, tmp_path, "--text", text, *options)["results"]
    firsts = {sum(map(len, documents()[:i])) for i in range(len(TEXTS))}
    total, count = by_definition([list(itertools.chain(*documents()))], 20, 15, unscored=firsts)
    assert found["tokens"] == count == sum(map(len, documents())) - len(TEXTS)
    assert found["loss"] == pytest.approx(total / count, rel=1e-5)


def test_loss_and_bits_per_byte_are_those_of_trainings_validation(checkpoint: Path, shards: Path, tmp_path: Path) -> None:
    folder = shards / "validation"
    found = evaluate("perplexity", checkpoint, tmp_path, "--shards", folder, "--concatenate")["results"]
    held_out = ValidationLoader([TokenShards(folder)], Place(32, 1, 1, 0, 1), reset=False)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        trained = evaluate_loss(load_pretrained(checkpoint, torch.device("cpu")).model, held_out, torch.device("cpu"))
    finally:
        dist.destroy_process_group()
    assert found["tokens"] == trained.tokens
    assert found["loss"] == pytest.approx(trained.loss, rel=1e-5)
    assert held_out.bytes_per_token is not None
    assert found["bits_per_byte"] == pytest.approx(bits_per_byte(trained.loss, held_out.bytes_per_token), rel=1e-5)


def test_without_bos_the_first_token_of_a_document_is_not_counted(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    found = evaluate("perplexity", checkpoint, tmp_path, "--text", text, "--no-bos")
    total, count = by_definition([ids for ids in documents(bos=False) if ids], 32, 32)
    assert found["results"]["tokens"] == count
    assert found["results"]["loss"] == pytest.approx(total / count, rel=1e-5)
    assert found["settings"]["scored"] == "from the second token of each document (no BOS before it)"


def test_shards_give_what_their_documents_give(checkpoint: Path, shards: Path, tmp_path: Path) -> None:
    folder = shards / "validation"
    found = evaluate("perplexity", checkpoint, tmp_path, "--shards", folder, "--max-documents", 2)["results"]
    ids, starts = np.load(folder / "shard-00000.npy"), np.load(folder / "shard-00000.starts.npy")
    streams = [ids[first:end].tolist() for first, end in itertools.pairwise(starts[:3])]
    total, count = by_definition(streams, 32, 32)
    assert found["tokens"] == count
    assert found["loss"] == pytest.approx(total / count, rel=1e-5)
    assert found["bits_per_byte"] is None  # the bytes of two documents of a shard are not known
