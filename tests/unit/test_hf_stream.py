"""Streaming a dataset into training: packing, ranks, and resuming in the middle of a document."""

from __future__ import annotations

import json
import random
import shutil
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest
import torch

from titan_dp import config
from titan_dp.data.batch import Loader, Place
from titan_dp.data.loader import build_dataloader
from titan_dp.data.stream import files_of_dataset
from titan_dp.errors import UserError

TEXTS = [f"Document {i}: " + "tale " * (i % 7) for i in range(60)]
T, G = 16, 4


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return folder


def stream(
    dataset: Path, rank: int = 0, world_size: int = 1, L: int = 4, buffer: int = 0, workers: int = 0, **settings: Any
) -> Loader:
    data = config.Data(source="hf", hf_dataset=str(dataset), tokenizer="bytes", hf_shuffle_buffer=buffer, **settings)
    return build_dataloader(data, config.Dataloader(num_workers=workers), Place(T, L, G, rank, world_size), 300)


def ids(loader: Loader, steps: int) -> torch.Tensor:
    """[steps * rows, T]."""
    return torch.cat([batch["input_ids"] for batch in chain.from_iterable(islice(loader, steps))])  # type: ignore[misc]


def test_documents_are_packed_in_order_without_loss(dataset: Path) -> None:
    row = [token for text in TEXTS for token in (256, *text.encode(), 257)]
    assert ids(stream(dataset), 20).flatten().tolist() == row[: 80 * T]


def test_a_stream_draws_nothing_from_the_global_generators(dataset: Path) -> None:
    before = torch.get_rng_state(), random.getstate()
    ids(stream(dataset, buffer=20), 2)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_copies_of_a_dataset_on_two_nodes_are_told_apart_by_what_is_in_them(dataset: Path, tmp_path: Path) -> None:
    def files(folder: Path) -> str | None:
        return files_of_dataset(config.Data(source="hf", hf_dataset=str(folder), tokenizer="bytes"))

    copy = Path(shutil.copytree(dataset, tmp_path / "copy"))
    assert files(copy) == files(dataset)
    (copy / "train.jsonl").write_text((copy / "train.jsonl").read_text().replace("Document 7", "Document 8"))
    assert files(copy) != files(dataset)
    assert files(Path("roneneldan/TinyStories")) is None, "a name on the Hub"


def test_labels_and_boundaries_mark_where_documents_meet(dataset: Path) -> None:
    (batch,) = next(iter(stream(dataset, document_boundaries="reset")))
    tokens, labels, cu_seqlens = (batch[k] for k in ("input_ids", "labels", "cu_seqlens"))
    assert torch.equal(labels[:, :-1] == -100, tokens[:, 1:] == 256)  # type: ignore[index]
    begins = {int(i) for i in (tokens.flatten() == 256).nonzero()} | set(range(0, G * T + 1, T))  # type: ignore[union-attr]
    assert sorted(set(cu_seqlens.tolist())) == sorted(begins)  # type: ignore[union-attr]


def test_two_ranks_share_the_stream_of_one(dataset: Path) -> None:
    whole = ids(stream(dataset, buffer=20), 5).view(5, 2, 2, T)
    for rank in range(2):
        assert torch.equal(ids(stream(dataset, rank, 2, 2, 20), 5).view(5, 2, T), whole[:, rank])


@pytest.mark.parametrize(("buffer", "stop"), [(0, 1), (0, 30), (20, 7)])
def test_a_stream_resumed_in_the_middle_of_a_document_goes_on_with_the_next_token(
    dataset: Path, buffer: int, stop: int
) -> None:
    whole = ids(stream(dataset, buffer=buffer), stop + 6)
    first = stream(dataset, buffer=buffer, workers=1 if stop == 7 else 0)
    ids(first, stop)
    state = json.loads(json.dumps(first.state_dict()))
    assert state["samples"] == stop * G
    second = stream(dataset, 0, 1, 2, buffer)  # with accumulation this time
    second.load_state_dict(state)
    assert torch.equal(ids(second, 6), whole[stop * G :])


def test_epochs_are_shuffled_anew(dataset: Path) -> None:
    tokens = ids(stream(dataset, buffer=60), 70).flatten().tolist()
    order = [text for text in bytes(t if t < 256 else 10 for t in tokens).decode().split("\n") if text.startswith("Document")]
    first, second = order[:60], order[60:100]
    assert first[: len(second)] != second
    assert len(set(first)) == 60


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hf_column": "body"}, "has no column 'body'; it has text"),
        ({"hf_split": "test"}, "cannot be loaded"),
        ({"workers": 2}, "num_workers = 2: a stream is read in order by one process"),
    ],
)
def test_a_stream_that_cannot_be_read_is_refused_at_the_start(dataset: Path, settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        stream(dataset, **settings)
