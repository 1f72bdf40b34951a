"""Shards that change after they were prepared are noticed while training, and hashed once a run."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from titan_dp.data.shard_check import RECORD, ShardCheck
from titan_dp.data.shards import ShardWriter, TokenShards
from titan_dp.data.tokenizer import load_tokenizer
from titan_dp.errors import RunError, UserError


@pytest.fixture
def source(tmp_path: Path) -> TokenShards:
    folder = tmp_path / "shards"
    writer = ShardWriter(folder, np.dtype(np.uint16), 100, [])
    rng = np.random.default_rng()
    for _ in range(5):
        writer.add(rng.integers(0, 256, 60).astype(np.uint16), 60)
    writer.finish(load_tokenizer("bytes"), {"adds_bos": False, "adds_eos": False})
    return TokenShards(folder)


def problem_of(source: TokenShards, run_folder: Path) -> Exception | None:
    check = ShardCheck([source], run_folder)
    check.wait()
    return check.problem


def flip_a_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("name", ["shard-00001.npy", "shard-00000.starts.npy"])
def test_a_changed_file_is_named(source: TokenShards, tmp_path: Path, name: str) -> None:
    flip_a_bit(source.folder / name)
    problem = problem_of(source, tmp_path)
    assert isinstance(problem, UserError)
    assert f"{name} is not what was prepared" in str(problem)


def test_a_file_that_cannot_be_read_is_the_machines_fault(source: TokenShards, tmp_path: Path) -> None:
    (source.folder / "shard-00001.npy").unlink()
    assert isinstance(problem_of(source, tmp_path), RunError)


def test_a_file_found_good_is_hashed_again_only_after_a_change(source: TokenShards, tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text("{")  # a record that cannot be read says nothing
    assert problem_of(source, tmp_path) is None
    assert len(json.loads((tmp_path / RECORD).read_text())) == 2 * len(source.shards)
    path = source.folder / source.shards[0].file
    times = path.stat()
    flip_a_bit(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert problem_of(source, tmp_path) is None, "same size and time: not read"
    os.utime(path)
    assert problem_of(source, tmp_path) is not None
