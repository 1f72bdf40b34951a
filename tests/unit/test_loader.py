"""Loaders: the same samples however many ranks read them, labels and boundaries where documents meet."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from titan_dp import config
from titan_dp.data.batch import Loader, Place
from titan_dp.data.loader import ValidationLoader, build_dataloader, build_validation_loader
from titan_dp.data.shards import TokenShards
from titan_dp.data.workers import read_in_workers
from titan_dp.errors import RunError, UserError

T, G = 32, 8


def loader(path: Path | list[Path], rank: int = 0, world_size: int = 1, L: int = 2, workers: int = 0, **data: object) -> Loader:
    paths = [str(p) for p in path] if isinstance(path, list) else str(path)
    place = Place(data.pop("seq_len", T), L, G, rank, world_size)  # type: ignore[arg-type]
    return build_dataloader(config.Data(path=paths, **data), config.Dataloader(num_workers=workers), place, 300)  # type: ignore[arg-type]


def steps(path: Path, count: int, world_size: int, L: int, start: int = 0, **options: object) -> Tensor:
    """Input ids [count, G, T] of `count` steps after `start` samples, put together from all ranks."""
    accumulation = G // (L * world_size)
    ranks = []
    for rank in range(world_size):
        one = loader(path, rank, world_size, L, **options)  # type: ignore[arg-type]
        one.load_state_dict({"samples": start})
        batches = list(chain.from_iterable(islice(one, count)))
        assert one.state_dict() == {"samples": start + count * G}
        ranks.append(torch.stack([b["input_ids"] for b in batches]).view(count, accumulation, L, T))  # type: ignore[misc]
    return torch.stack(ranks, 2).view(count, G, T)


@pytest.mark.parametrize(("world_size", "L"), [(1, 8), (1, 2), (2, 4), (2, 1), (4, 2), (8, 1)])
def test_a_step_has_the_same_samples_in_the_same_order_on_any_ranks(shards: Path, world_size: int, L: int) -> None:
    assert torch.equal(steps(shards / "train", 3, world_size, L), steps(shards / "train", 3, 1, 8))


def test_resuming_at_any_step_on_other_ranks_goes_on_with_the_next_sample(shards: Path) -> None:
    whole = steps(shards / "train", 6, 1, 8)
    for start, world_size in ((1, 2), (3, 4), (5, 8)):
        assert torch.equal(steps(shards / "train", 6 - start, world_size, 1, start * G), whole[start:])


def test_workers_change_neither_order_nor_state(shards: Path) -> None:
    assert torch.equal(steps(shards / "train", 3, 2, 2, workers=2), steps(shards / "train", 3, 2, 2))


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_draws_nothing_from_the_global_generators(shards: Path, workers: int) -> None:
    before = torch.get_rng_state(), random.getstate()
    next(iter(loader(shards / "train", workers=workers)))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def row_of(shards: TokenShards) -> tuple[np.ndarray, set[int]]:
    """All tokens, and the positions at which documents begin."""
    tokens = np.empty(len(shards), np.int64)
    shards.read(0, tokens)
    return tokens, set(shards.document_starts(0, len(shards)).tolist())


def test_labels_are_the_next_tokens_but_none_where_a_document_ends(shards: Path) -> None:
    tokens, starts = row_of(TokenShards(shards / "train"))
    windows = {tuple(tokens[w : w + T]): w for w in range(0, len(tokens) - T, T)}
    joins = 0
    for batch in chain.from_iterable(islice(loader(shards / "train"), 10)):
        for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):  # type: ignore[union-attr]
            w = windows[tuple(ids)]
            expected = [-100 if w + i + 1 in starts else int(tokens[w + i + 1]) for i in range(T)]
            assert labels == expected
            joins += expected.count(-100)
    assert joins > 0


def test_carry_has_no_boundaries_and_reset_marks_rows_and_documents_exactly(shards: Path) -> None:
    assert next(iter(loader(shards / "train")))[0]["cu_seqlens"] is None
    one = loader(shards / "train", document_boundaries="reset")
    for batch in chain.from_iterable(islice(one, 10)):
        ids, cu_seqlens = batch["input_ids"].flatten(), batch["cu_seqlens"]  # type: ignore[union-attr]
        begins = {0, T} | {int(i) for i in (ids == 256).nonzero()}  # BOS begins each document
        assert sorted(set(cu_seqlens.tolist())) == sorted(begins | {2 * T})  # type: ignore[union-attr]
        assert cu_seqlens.dtype == torch.int32  # type: ignore[union-attr]
        assert len(cu_seqlens) % 64 == 0  # type: ignore[arg-type]


def test_a_mixture_reads_from_all_its_folders_in_proportion(shards: Path) -> None:
    one = loader([shards / "train", shards / "validation"], weights=[3.0, 1.0])
    assert "75.0%" in one.describe(1000)
    assert "25.0%" in one.describe(1000)


def validation(shards: Path, rank: int, world_size: int, L: int) -> ValidationLoader:
    return build_validation_loader(
        config.Validation(path=str(shards / "validation")),
        config.Data(path=str(shards / "train"), document_boundaries="reset"),
        Place(T, L, L * world_size, rank, world_size),
        300,
        loader(shards / "train").sources,
    )


@pytest.mark.parametrize(("world_size", "L"), [(1, 3), (2, 4), (4, 1)])
def test_validation_predicts_every_held_out_token_once_on_any_ranks(shards: Path, world_size: int, L: int) -> None:
    tokens, starts = row_of(TokenShards(shards / "validation"))
    loaders = [validation(shards, rank, world_size, L) for rank in range(world_size)]
    assert len({len(one) for one in loaders}) == 1
    labels = torch.cat([batch["labels"].flatten() for one in loaders for batch in one])  # type: ignore[union-attr]
    expected = np.bincount([t for i, t in enumerate(tokens) if i and i not in starts], minlength=258)
    assert np.array_equal(np.bincount(labels[labels >= 0], minlength=258), expected)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(shards: Path, tmp_path: Path) -> Path:
    """A copy of the training shards to damage."""
    import shutil

    return Path(shutil.copytree(shards / "train", tmp_path / "train"))


def edit(folder: Path, **changes: object) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))


def refused(path: Path, message: str, **options: object) -> None:
    with pytest.raises(UserError, match=message):
        loader(path, **options)  # type: ignore[arg-type]


def test_a_missing_folder_says_how_to_make_it(tmp_path: Path) -> None:
    refused(tmp_path / "train", r"there are no token shards in .*write them with `titan-dp prepare INPUT --out")


def test_a_missing_shard_is_named(broken: Path) -> None:
    (broken / "shard-00000.npy").unlink()
    refused(broken, r"token shard .*shard-00000.npy is missing")


def test_a_truncated_shard_is_named(broken: Path) -> None:
    shard = broken / "shard-00000.npy"
    shard.write_bytes(shard.read_bytes()[:-10])
    refused(broken, r"token shard .*shard-00000.npy is cut off")


def test_a_shard_of_another_dtype_is_named(broken: Path) -> None:
    np.save(broken / "shard-00000.npy", np.zeros(10, np.int8))
    refused(broken, r"shard-00000.npy holds \(10,\) int8, the manifest says")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 99}, "has format version 99, this program reads 1"),
        ({"dtype": "float64"}, "dtype = 'float64'"),
        ({"shards": "none"}, "is no manifest of token shards"),
    ],
)
def test_a_manifest_that_does_not_fit_is_named(broken: Path, changes: dict, message: str) -> None:
    edit(broken, **changes)
    refused(broken, message)


def test_a_manifest_cannot_name_files_elsewhere(broken: Path) -> None:
    manifest = json.loads((broken / "manifest.json").read_text())
    manifest["shards"][0]["file"] = "../validation/shard-00000.npy"
    edit(broken, **manifest)
    refused(broken, "which is not a file of its folder")


def test_a_vocabulary_larger_than_the_models_is_refused(broken: Path) -> None:
    edit(broken, tokenizer={**json.loads((broken / "manifest.json").read_text())["tokenizer"], "vocab_size": 50_000})
    refused(broken, r"model.vocab_size = 300 is too small for data.path .* has 50000 ids")


def test_a_tokenizer_that_did_not_make_the_shards_is_refused(broken: Path) -> None:
    edit(broken, tokenizer={**json.loads((broken / "manifest.json").read_text())["tokenizer"], "name": "gpt2", "hash": "x"})
    refused(broken, r"data.tokenizer = 'bytes', but data.path .* was made with 'gpt2'", tokenizer="bytes")


def test_less_than_one_sample_is_refused(shards: Path) -> None:
    refused(shards / "train", r"fewer than one sample of training.seq_len", seq_len=10**6)


def refused_validation(trained: Path, held_out: Path) -> None:
    data, validation = config.Data(path=str(trained)), config.Validation(path=str(held_out))
    with pytest.raises(UserError, match=r"may hold documents of data.path"):
        build_validation_loader(validation, data, Place(T, 1, 1, 0, 1), 300, [TokenShards(trained)])


def test_validation_on_the_training_tokens_is_refused(shards: Path) -> None:
    refused_validation(shards / "train", shards / "train")


def test_validation_held_out_by_a_larger_fraction_than_training_is_refused(shards: Path, broken: Path) -> None:
    edit(broken, validation_fraction=0.01)
    refused_validation(broken, shards / "validation")


KILLED = """
import os, sys
import torch.utils.data._utils
from titan_dp import config
from titan_dp.data.workers import read_in_workers
from titan_dp.errors import run_main

torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.1  # seconds between two looks for workers that have ended

def killed(worker, workers):
    for index in range(worker, 9, workers):
        if index == 3:
            os.kill(os.getpid(), 9)
        yield index

sys.exit(run_main(lambda: sum(read_in_workers(killed, config.Dataloader(num_workers=2)))))
"""


def test_a_killed_worker_is_one_sentence_and_worth_another_try(root: Path) -> None:
    result = subprocess.run([sys.executable, "-c", KILLED], cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("error: a process that reads data has ended, often killed for want of memory (")
    assert "training.dataloader.num_workers" in result.stderr
    assert "Traceback" not in result.stderr


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
