"""Compiled blocks over the life of a run: how many graphs there are, and that a run's losses are those of a plain one.

Dynamo does its work, and Inductor, which takes a minute, does not: the backend is aot_eager.
"""

from __future__ import annotations

import json
from functools import partialmethod
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

from tests.distributed.harness import run_ranks
from tests.distributed.helpers import sharded_model
from titan_dp import config
from titan_dp.config.load import load_config
from titan_dp.distributed import current_world
from titan_dp.train.trainer import Trainer

# Softmax layers with other heads than the mixer has, and fewer keys and values: a hybrid's blocks differ in every size.
HYBRID = config.Model(
    hidden_size=32, num_hidden_layers=2, num_heads=4, head_dim=8, num_householder=2, use_forget_gate=True, intermediate_size=48,
    vocab_size=64, initializer_range=0.02, attention_layers=[1], attention_num_heads=2, attention_num_kv_heads=1,
)  # fmt: skip
TOKENS = 192
quick = mock.patch.object(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))


def graphs_of_a_run() -> list[int]:
    """Graphs after the first training batch, after the first validation batch, and after many more of either."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    with quick:
        model = sharded_model(ac=config.ActivationCheckpoint(mode="selective"), compile=True, c=HYBRID)

    def run(rows: int, boundaries: int, training: bool) -> int:
        model.train(training)
        tokens = torch.randint(0, 64, (rows, TOKENS))
        ends = torch.arange(boundaries - 1, dtype=torch.int32).clamp(max=rows * TOKENS)
        documents = torch.cat([ends, torch.tensor([rows * TOKENS], dtype=torch.int32)])
        with torch.set_grad_enabled(training):
            loss = model(tokens, tokens, documents).loss
        if training:
            loss.backward()
        return counters["stats"]["unique_graphs"]

    first, validated = run(1, 64, True), run(2, 64, False)
    for boundaries in (128, 64, 192):
        run(2, boundaries, False)
        last = run(1, boundaries, True)
    return [first, validated, last]


def test_a_hybrid_compiles_a_graph_a_kind_of_block_for_training_and_validation_and_never_again() -> None:
    """Whatever the number of documents, which would else compile anew on one rank, in the middle of a run."""
    assert run_ranks(1, graphs_of_a_run)[0] == [2, 4, 4]


def train(settings: list[str]) -> None:
    torch._dynamo.reset()
    with quick:
        Trainer(load_config(settings), current_world()).train()


def test_a_compiled_hybrid_trains_and_validates_with_the_losses_of_a_plain_one(tiny_config: Path) -> None:
    mixers = ["--model.attention_layers=[1]", "--model.attention_num_heads=4", "--model.attention_num_kv_heads=1"]
    short = ["--training.steps=4", "--validation.freq=2", "--validation.local_batch_size=4", "--generate.enable=false"]
    losses = []
    for compile in ("true", "false"):
        own = [f"--job.run_name=compile-{compile}", f"--compile.enable={compile}", "--checkpoint.enable=false"]
        run_ranks(2, train, ["--config", str(tiny_config), *mixers, *short, *own])
        lines = (tiny_config.parent / "outputs" / f"compile-{compile}" / "metrics.jsonl").read_text().splitlines()
        losses.append([value for line in lines for key, value in json.loads(line).items() if "loss" in key])
    assert len(losses[0]) == 6
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
