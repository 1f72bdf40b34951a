"""Streaming a dataset into training: packing, ranks, and resuming in the middle of a document."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from titan_dp import config
from titan_dp.data import stream as stream_module
from titan_dp.data.batch import Loader, Place
from titan_dp.data.loader import build_dataloader
from titan_dp.data.stream import StreamLoader, files_of_dataset
from titan_dp.data.tokenizer import load_tokenizer
from titan_dp.errors import RunError, UserError

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


# -- what goes wrong on the way ------------------------------------------------------------------------------------------


class Hub:
    """A dataset of `rows` whose connection breaks.

    Args:
        breaks: numbers of openings and of the rows at which they break; an opening breaks once. -1: at the opening itself.
    """

    column_names = None

    def __init__(self, rows: list[dict[str, Any]], breaks: dict[int, int] | None = None) -> None:
        self.rows, self.breaks, self.opened = rows, breaks or {}, -1

    def load(self, *args: Any, **options: Any) -> Hub:
        self.opened += 1
        if self.breaks.get(self.opened) == -1:
            try:
                raise ConnectionResetError(104, "Connection reset by peer")
            except OSError as error:
                raise UserError("Hugging Face dataset 'made up' cannot be loaded") from error
        return self

    def skip(self, count: int) -> Iterator[dict[str, Any]]:
        return self.read(count)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.read(0)

    def read(self, first: int) -> Iterator[dict[str, Any]]:
        breaks_at = self.breaks.get(self.opened)
        for number in range(first, len(self.rows)):
            if number == breaks_at:
                raise ConnectionResetError(104, "Connection reset by peer")
            yield self.rows[number]


def from_hub(monkeypatch: pytest.MonkeyPatch, hub: Hub, **options: Any) -> Loader:
    monkeypatch.setattr(stream_module, "load_hugging_face", hub.load)
    monkeypatch.setattr(stream_module, "_PAUSES", (0, 0, 0))
    return stream(Path("made up"), **options)


ROWS = [{"text": text} for text in TEXTS]


@pytest.mark.parametrize("buffer", [0, 20])
def test_a_connection_that_breaks_now_and_then_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], buffer: int
) -> None:
    whole = ids(from_hub(monkeypatch, Hub(ROWS), buffer=buffer), 70)  # 60 documents are about 30 steps
    # Opening 0 is the check at the start. The first epoch breaks in rows 0, 7, 7 again and at the next opening, the second
    # epoch in row 20.
    hub = Hub(ROWS, {1: 0, 2: 7, 3: 7, 4: -1, 6: 20})
    assert torch.equal(ids(from_hub(monkeypatch, hub, buffer=buffer), 70), whole)
    assert hub.opened >= 7
    assert capsys.readouterr().err.count("Connection reset by peer; trying again in 0 s") == 5


def test_a_connection_that_stays_broken_ends_in_a_sentence_and_the_run_goes_on_from_its_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = ids(from_hub(monkeypatch, Hub(ROWS)), 20)
    first = from_hub(monkeypatch, Hub(ROWS, {1: 30, 2: 30, 3: 30, 4: 30}))
    steps, read = iter(first), []
    with pytest.raises(
        RunError, match="'made up' cannot be read on .*Connection reset.*; the same command goes on once it can"
    ):
        while True:
            read += next(steps)
    at = len(read)
    assert 0 < at < 20
    second = from_hub(monkeypatch, Hub(ROWS))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert torch.equal(torch.cat([torch.cat([b["input_ids"] for b in read]), ids(second, 20 - at)]), whole)  # type: ignore[misc]


@pytest.mark.parametrize("buffer", [0, 20])
def test_documents_that_cannot_be_used_are_left_out_and_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], buffer: int
) -> None:
    monkeypatch.setattr(stream_module, "_LONGEST", 1000)
    bad: list[dict[str, Any]] = [{"text": None}, {"text": 3}, {"body": "x"}, {"text": "a" * 1001}]
    rows = [*bad[:2], *ROWS[:30], *bad[2:], *ROWS[30:]]
    loader = from_hub(monkeypatch, Hub(rows), buffer=buffer, hf_on_bad_document="skip")
    found = ids(loader, 70).flatten().tolist()
    assert {bytes(part) for part in documents(found)[:60]} == {text.encode() for text in TEXTS}
    if not buffer:
        assert found == [token for text in TEXTS * 3 for token in (256, *text.encode(), 257)][: len(found)]
    assert isinstance(loader, StreamLoader)
    assert loader.left_out >= 8, "in every epoch anew"
    said = capsys.readouterr().err
    assert "documents left out so far, because they cannot be used: 1, the last: row " in said
    resumed = from_hub(monkeypatch, Hub(rows), buffer=buffer)
    half = from_hub(monkeypatch, Hub(rows), buffer=buffer)
    ids(half, 33)
    resumed.load_state_dict(half.state_dict())  # type: ignore[arg-type]
    assert ids(resumed, 37).flatten().tolist() == found[33 * G * T :]


def documents(tokens: list[int]) -> list[list[int]]:
    """What lies between BOS and EOS."""
    begins = [i for i, token in enumerate(tokens) if token == 256]
    return [tokens[i + 1 : tokens.index(257, i)] for i in begins if 257 in tokens[i:]]


@pytest.mark.parametrize(
    ("row", "reason"),
    [({"text": None}, "row 60 of made up holds NoneType under 'text', not text"), ({"text": 3}, "row 60 of made up holds int")],
)
def test_a_document_that_cannot_be_used_ends_the_run_if_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, row: dict[str, Any], reason: str
) -> None:
    loader = from_hub(monkeypatch, Hub([*ROWS, row]), hf_on_bad_document="stop")
    with pytest.raises(UserError, match=f"{reason}.*data.hf_on_bad_document = 'skip' leaves such documents out"):
        ids(loader, 70)


def test_a_dataset_without_a_document_that_can_be_used_is_not_read_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"holds no documents in split 'train' that can be used \(60 were left out\)"):
        ids(from_hub(monkeypatch, Hub([{"text": None}] * 60)), 1)


def test_a_long_document_is_gone_through_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counted(np.ndarray):
        taken = 0

        def __getitem__(self, key: Any) -> Any:
            found = super().__getitem__(key)
            Counted.taken += np.size(found)
            return found

    length, rows = 100_000, 100_000 // T
    loader = from_hub(monkeypatch, Hub([{"text": "a"}]))
    assert isinstance(loader, StreamLoader)
    monkeypatch.setattr(loader, "_documents", lambda *state: iter([(0, 0, np.arange(length).view(Counted))]))
    begin = {"samples": 0, "epoch": 0, "documents": 0, "offset": 0}
    read = [row for (row, _), _ in loader._rows(load_tokenizer("bytes"), begin)]
    assert [token for row in read for token in row[:-1]] == list(range(len(read) * T))
    assert rows - 1 <= len(read) <= rows
    assert Counted.taken <= length + 2 * rows, "each token once, and those that two rows share twice"
