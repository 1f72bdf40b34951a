"""Loaders: the same samples however many ranks read them, labels and boundaries where documents meet."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from titan_dp import config
from titan_dp.data.batch import Place
from titan_dp.data.loader import ShardLoader, ValidationLoader, build_dataloader, build_validation_loader
from titan_dp.data.shards import ShardWriter, TokenShards
from titan_dp.data.tokenizer import load_tokenizer
from titan_dp.data.workers import read_in_workers
from titan_dp.errors import RunError, UserError, run_main

T, G = 32, 8


def loader(
    path: Path | list[Path], rank: int = 0, world_size: int = 1, L: int = 2, workers: int = 0, seq_len: int = T, **data: Any
) -> ShardLoader:
    paths, place = [str(p) for p in path] if isinstance(path, list) else str(path), Place(seq_len, L, G, rank, world_size)
    built = build_dataloader(config.Data(path=paths, **data), config.Dataloader(num_workers=workers), place, 300)
    assert isinstance(built, ShardLoader)
    return built


def steps(path: Path, count: int, world_size: int, L: int, start: int = 0, workers: int = 0) -> Tensor:
    """Input ids [count, G, T] of `count` steps after `start` samples, put together from all ranks."""
    ranks = []
    for rank in range(world_size):
        one = loader(path, rank, world_size, L, workers)
        one.load_state_dict({"samples": start})
        batches = list(chain.from_iterable(islice(one, count)))
        assert one.state_dict() == {"samples": start + count * G}
        ranks.append(torch.stack([b["input_ids"] for b in batches]).view(count, -1, L, T))  # type: ignore[misc]
    return torch.stack(ranks, 2).view(count, G, T)


@pytest.mark.parametrize(
    ("world_size", "L", "start", "workers"),
    [(2, 4, 0, 0), (8, 1, 0, 0), (4, 1, 3, 0), (2, 2, 2, 2)],
)
def test_any_ranks_and_workers_starting_at_any_step_read_the_same_samples(
    shards: Path, world_size: int, L: int, start: int, workers: int
) -> None:
    whole = steps(shards / "train", 6, 1, 8)
    assert torch.equal(steps(shards / "train", 6 - start, world_size, L, start * G, workers), whole[start:])


def test_reading_draws_nothing_from_the_global_generators(shards: Path) -> None:
    before = torch.get_rng_state(), random.getstate()
    next(iter(loader(shards / "train", workers=1)))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def row_of(shards: TokenShards) -> tuple[np.ndarray, set[int]]:
    """All tokens, and the positions at which documents begin."""
    tokens = np.empty(len(shards), np.int64)
    shards.read(0, tokens)
    return tokens, set(shards.document_starts(0, len(shards)).tolist())


@pytest.mark.parametrize("boundaries", ["carry", "reset"])
def test_labels_are_the_next_tokens_and_boundaries_are_where_documents_meet(shards: Path, boundaries: str) -> None:
    tokens, starts = row_of(TokenShards(shards / "train"))
    windows = {tuple(tokens[w : w + T]): w for w in range(0, len(tokens) - T, T)}
    joins = 0
    for batch in chain.from_iterable(islice(loader(shards / "train", document_boundaries=boundaries), 10)):
        ids, labels, cu_seqlens = batch["input_ids"], batch["labels"], batch["cu_seqlens"]
        assert ids is not None
        assert labels is not None
        for row, wanted in zip(ids.tolist(), labels.tolist(), strict=True):
            w = windows[tuple(row)]
            expected = [-100 if w + i + 1 in starts else int(tokens[w + i + 1]) for i in range(T)]
            assert wanted == expected
            joins += expected.count(-100)
        if boundaries == "carry":
            assert cu_seqlens is None
        else:
            assert cu_seqlens is not None
            begins = {0, T} | {int(i) for i in (ids.flatten() == 256).nonzero()}  # BOS begins each document
            assert sorted(set(cu_seqlens.tolist())) == sorted(begins | {2 * T})
            assert (cu_seqlens.dtype, len(cu_seqlens) % 64) == (torch.int32, 0)
    assert joins > 0


def test_a_mixture_reads_from_all_its_folders_in_proportion(shards: Path) -> None:
    said = loader([shards / "train", shards / "validation"], weights=[3.0, 1.0]).describe(1000)
    assert "train 75.0%" in said
    assert "validation 25.0%" in said


def validation(
    trained: Path, held_out: Path, rank: int = 0, world_size: int = 1, L: int = 1, most: int | None = None
) -> ValidationLoader:
    data, place = config.Data(path=str(trained), document_boundaries="reset"), Place(T, L, L * world_size, rank, world_size)
    return build_validation_loader(config.Validation(path=str(held_out)), data, place, 300, [TokenShards(trained)], most)


def test_folders_without_tokens_are_refused_for_training_and_for_validation(shards: Path, tmp_path: Path) -> None:
    around = {"split": "validation", "validation_fraction": 0.1, "adds_bos": True, "adds_eos": True}
    ShardWriter(tmp_path, np.dtype(np.uint16), 100, []).finish(load_tokenizer("bytes"), around)
    with pytest.raises(UserError, match="has 0 tokens, fewer than one sample"):
        loader(tmp_path)
    with pytest.raises(UserError, match="holds no token to predict; name other shards"):
        validation(shards / "train", tmp_path)


@pytest.mark.parametrize("most", [None, 5])
@pytest.mark.parametrize(("world_size", "L"), [(1, 3), (4, 1)])
def test_validation_predicts_the_held_out_tokens_once_on_any_ranks(
    shards: Path, world_size: int, L: int, most: int | None
) -> None:
    tokens, starts = row_of(TokenShards(shards / "validation"))
    tokens = tokens if most is None else tokens[: most * T + 1]
    loaders = [validation(shards / "train", shards / "validation", rank, world_size, L, most) for rank in range(world_size)]
    assert len({len(one) for one in loaders}) == 1
    labels = torch.cat([batch["labels"].flatten() for one in loaders for batch in one])  # type: ignore[union-attr]
    expected = np.bincount([t for i, t in enumerate(tokens) if i and i not in starts], minlength=258)
    assert np.array_equal(np.bincount(labels[labels >= 0], minlength=258), expected)


# -- data that does not fit ----------------------------------------------------------------------------------------------


@pytest.fixture
def broken(shards: Path, tmp_path: Path) -> Path:
    """A copy of the training shards to damage."""
    return Path(shutil.copytree(shards / "train", tmp_path / "train"))


def edit(**changes: Any) -> Callable[[Path], object]:
    """Changes the manifest; a dictionary changes the entries it has."""

    def apply(folder: Path) -> None:
        path = folder / "manifest.json"
        manifest = json.loads(path.read_text())
        for key, value in changes.items():
            manifest[key] = manifest[key] | value if isinstance(value, dict) else value
        path.write_text(json.dumps(manifest))

    return apply


def names_another_folder(folder: Path) -> None:
    (first, *rest) = json.loads((folder / "manifest.json").read_text())["shards"]
    edit(shards=[first | {"file": "../validation/shard-00000.npy"}, *rest])(folder)


def cut_off(folder: Path) -> None:
    os.truncate(folder / "shard-00000.npy", (folder / "shard-00000.npy").stat().st_size - 10)


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (shutil.rmtree, {}, r"there are no token shards in .*write them with `titan-dp prepare INPUT --out"),
        (lambda f: (f / "shard-00000.npy").unlink(), {}, r"token shard .*shard-00000.npy is missing"),
        (cut_off, {}, r"token shard .*shard-00000.npy is cut off"),
        (lambda f: np.save(f / "shard-00000.npy", np.zeros(10, np.int8)), {}, r"holds \(10,\) int8, the manifest says"),
        (edit(format_version=99), {}, "has format version 99, this program reads 1"),
        (edit(dtype="float64"), {}, "dtype = 'float64'"),
        (names_another_folder, {}, "which is not a file of its folder"),
        (edit(tokenizer={"vocab_size": 50_000}), {}, r"model.vocab_size = 300 is too small for data.path .* has 50000 ids"),
        (
            edit(tokenizer={"name": "gpt2", "hash": "x"}),
            {"tokenizer": "bytes"},
            r"data.tokenizer = 'bytes', but data.path .* was made with 'gpt2'",
        ),
        (lambda f: None, {"seq_len": 10**6}, r"fewer than one sample of training.seq_len"),
    ],
)
def test_shards_that_do_not_fit_are_refused(broken: Path, damage: Any, options: dict[str, Any], message: str) -> None:
    damage(broken)
    with pytest.raises(UserError, match=message):
        loader(broken, **options)


def test_folders_of_two_tokenizers_are_refused(shards: Path, broken: Path) -> None:
    edit(tokenizer={"name": "gpt2", "hash": "x"})(broken)
    with pytest.raises(UserError, match=r"data.path mixes tokenizers: .* was made with 'gpt2', .* with 'bytes'; prepare both"):
        loader([shards / "train", broken])
    with pytest.raises(UserError, match=r"validation.path .* with tokenizer 'bytes', data.path .* with 'gpt2'; prepare both"):
        validation(broken, shards / "validation")


def test_validation_that_may_hold_training_documents_is_refused(shards: Path, broken: Path) -> None:
    edit(validation_fraction=0.01)(broken)  # of those that validation holds out, training has the most
    for trained, held_out in ((shards / "train", shards / "train"), (broken, shards / "validation")):
        with pytest.raises(UserError, match=r"may hold documents of data.path"):
            validation(trained, held_out)


# -- workers that end ----------------------------------------------------------------------------------------------------


def test_a_killed_worker_is_one_sentence_and_worth_another_try(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def killed(worker: int, workers: int) -> Iterator[int]:
        for index in range(worker, 9, workers):
            if index == 3:
                os.kill(os.getpid(), 9)
            yield index

    # Seconds between two looks for workers that have ended.
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.1,))
    assert run_main(lambda: sum(read_in_workers(killed, config.Dataloader(num_workers=2)))) == 1
    said = capfd.readouterr().err
    assert said.startswith("error: a process that reads data has ended, often killed for want of memory (")
    assert "training.dataloader.num_workers" in said
    assert "Traceback" not in said


def broken_pipe() -> None:
    raise ConnectionResetError(104, "Connection reset by peer")


class OfAKilledWorker:
    """What a worker had sent but not yet handed over when it was killed."""

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return broken_pipe, ()


def test_a_pipe_that_a_killed_worker_leaves_is_no_lost_rank() -> None:
    items = read_in_workers(lambda *_: iter([OfAKilledWorker()]), config.Dataloader(num_workers=1))
    with pytest.raises(RunError, match=r"a process that reads data has ended.*ConnectionResetError"):
        next(items)
