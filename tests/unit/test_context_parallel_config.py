"""Rows shared by ranks: what the configuration refuses, and which tokens and documents are whose."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from titan_dp import config
from titan_dp.data.batch import IGNORE, Place, make_batch
from titan_dp.distributed import World, data_world, describe, shard_degree
from titan_dp.errors import UserError


def parallelism(context: int, replicate: int = 1, shard: int = -1) -> config.Parallelism:
    return config.Parallelism(
        context_parallel_degree=context, data_parallel_replicate_degree=replicate, data_parallel_shard_degree=shard
    )


def problems(context: int, **sections: Any) -> list[str]:
    training = sections.pop("training", {"seq_len": 2048}) | {"steps": 1}
    with pytest.raises(ValidationError) as error:
        config.Config(training=config.Training(**training), parallelism=parallelism(context), **sections)
    return str(error.value).splitlines()


def test_what_cannot_be_split_is_refused_by_its_key() -> None:
    assert "does not divide training.seq_len = 100" in " ".join(problems(8, training={"seq_len": 100}))
    assert "fewer than the 3 that model.conv_size = 4" in " ".join(problems(8, training={"seq_len": 16}))
    assert "model.mixer = 'rwkv7'" in " ".join(problems(2, model=config.Model(mixer="rwkv7")))
    words = {"data": config.Data(source="state_tracking"), "state_tracking": config.StateTracking(task="S3")}
    assert "data.source = 'state_tracking'" in " ".join(problems(2, **words))
    short = config.Training(seq_len=16, steps=1)
    assert config.Config(training=short, parallelism=parallelism(8), model=config.Model(use_short_conv=False))


def test_parameters_are_sharded_over_context_ranks_and_rows_are_read_by_data_ranks() -> None:
    world = World(5, 8, torch.device("cpu"))
    for replicate, shards in ((1, 8), (2, 4), (4, 2)):
        assert shard_degree(parallelism(2, replicate), 8) == shards
        assert data_world(parallelism(2, replicate), world) == World(2, 4, world.device)
    assert "replicate 2 x shard 2 x context 2" in describe(world, parallelism(2, 2))
    assert "context" not in describe(world, parallelism(1))


def test_degrees_that_are_not_the_ranks_are_refused() -> None:
    with pytest.raises(UserError, match="times context_parallel_degree = 3 must be the number of ranks, which is 8; start a"):
        data_world(parallelism(3), World(0, 8, torch.device("cpu")))
    for degrees in (parallelism(2, shard=8), parallelism(1, replicate=3), parallelism(1, replicate=16)):
        with pytest.raises(UserError, match="set data_parallel_shard_degree = -1"):
            shard_degree(degrees, 8)


def test_segments_put_together_are_the_row() -> None:
    rows, starts = np.random.default_rng().integers(5, size=(2, 13)), [np.array([0, 6]), np.array([], np.int64)]
    rows[:, -3:] = IGNORE
    whole, *parts = (make_batch(rows, starts, Place(12, 2, 2, 0, 1, part, n), True) for n in (1, 4) for part in range(n))
    for key in ("input_ids", "labels"):
        assert torch.equal(torch.cat([part[key] for part in parts], 1), whole[key])  # type: ignore[arg-type]
    assert all(torch.equal(part["cu_seqlens"], whole["cu_seqlens"]) for part in parts)  # type: ignore[arg-type]
    priced = torch.cat([part["priced"] for part in parts], 1)  # type: ignore[arg-type]
    assert priced[0, 5], "a label comes later, if not in this segment"
    assert not priced[:, -3:].any()
    assert "priced" not in whole
