"""Accumulation and steps from batch sizes, ranks and tokens."""

from __future__ import annotations

import pytest

from titan_dp import config
from titan_dp.distributed import shard_degree
from titan_dp.errors import UserError
from titan_dp.schedule import plan_batches


def plan(world_size: int, **settings: object):  # type: ignore[no-untyped-def]
    return plan_batches(config.Training(**settings), world_size)  # type: ignore[arg-type]


def test_accumulation_fills_the_global_batch_from_what_the_ranks_do_not() -> None:
    batch = plan(4, local_batch_size=2, global_batch_size=32, seq_len=10, steps=7)
    assert (batch.accumulation, batch.tokens_per_step, batch.tokens) == (4, 320, 2240)


def test_without_a_global_batch_there_is_no_accumulation() -> None:
    assert plan(4, local_batch_size=2, steps=1).global_batch_size == 8


def test_tokens_become_whole_steps_rounded_up() -> None:
    assert plan(1, local_batch_size=1, seq_len=1000, tokens="1.5M").steps == 1500
    assert plan(1, local_batch_size=1, seq_len=1000, tokens=1001).steps == 2


@pytest.mark.parametrize("total", [31, 4])
def test_a_batch_that_does_not_divide_names_both_keys_and_sizes_that_would(total: int) -> None:
    with pytest.raises(UserError, match=r"training.global_batch_size = \d+ .* training.local_batch_size = 2 times 4 rank"):
        plan(4, local_batch_size=2, global_batch_size=total, steps=1)


@pytest.mark.parametrize(("replicate", "shard"), [(1, 8), (3, -1), (2, 4), (8, -1)])
def test_more_shards_than_ranks_are_refused(replicate: int, shard: int) -> None:
    parallelism = config.Parallelism(data_parallel_replicate_degree=replicate, data_parallel_shard_degree=shard)
    with pytest.raises(UserError, match="must be the number of ranks, which is 4; set data_parallel_shard_degree = -1"):
        shard_degree(parallelism, 4)
