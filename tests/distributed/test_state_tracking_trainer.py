"""The trainer on word problems and languages: any number of ranks, a stop on the way, and what a router's steps cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import run_ranks
from tests.distributed.test_trainer import losses_of, train


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """A config file for 12 steps on words of S3 that grow to 8 elements over the first 8 steps, in float32."""
    path = tmp_path / "words.toml"
    path.write_text(
        f"""
[job]
dump_folder = "{tmp_path / "outputs"}"
[model]
hidden_size = 16
num_hidden_layers = 2
num_heads = 2
head_dim = 8
num_householder = 2
use_short_conv = false
intermediate_size = 32
vocab_size = 8
initializer_range = 0.02
[data]
source = "state_tracking"
[state_tracking]
task = "S3"
curriculum_steps = 8
validation_samples = 30
test_samples = 30
[training]
steps = 12
seq_len = 9
local_batch_size = 4
global_batch_size = 16
mixed_precision_param = "float32"
[optimizer]
lr = 0.01
[lr_scheduler]
warmup_steps = 2
total_steps = 12
[validation]
freq = 3
local_batch_size = 8
[checkpoint]
interval = 5
[metrics]
log_freq = 1
enable_tensorboard = false
"""
    )
    return path


def read(config: Path, name: str, file: str) -> dict[str, Any]:
    return json.loads((config.parent / "outputs" / name / file).read_text())


def records(config: Path, name: str, *overrides: str) -> list[dict[str, Any]]:
    """Of the steps of a run on one rank."""
    run_ranks(1, train, config, "--job.run_name", name, *overrides)
    lines = (config.parent / "outputs" / name / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record]


# -- ranks and stops ---------------------------------------------------------------------------------------------------


def test_two_ranks_accumulating_on_growing_words_train_and_test_as_one_does(words: Path) -> None:
    one, two = losses_of(words, 1, "one"), losses_of(words, 2, "two")
    assert list(one) == list(two) == list(range(1, 13))
    assert two == pytest.approx(one, rel=1e-5)
    assert one[1] != pytest.approx(one[12], rel=0.01), "the run must have learnt something for the comparison to mean it"
    assert read(words, "two", "test.json") == read(words, "one", "test.json")


def test_two_ranks_stopped_while_words_grow_and_resumed_equal_ones_never_stopped(words: Path) -> None:
    whole = losses_of(words, 2, "whole")
    losses_of(words, 2, "parts", "--training.steps", "5")
    assert losses_of(words, 2, "parts") == whole
    assert read(words, "parts", "test.json") == read(words, "whole", "test.json")


def test_a_run_that_ended_as_solved_goes_on_to_its_last_step_once_it_shall_not_end_early(words: Path) -> None:
    soon = ("--state_tracking.task", "Z2", "--training.seq_len", "2", "--state_tracking.solved_accuracy", "0.01")
    whole = losses_of(words, 1, "whole", *soon)
    stopped = losses_of(words, 1, "stopped", *soon, "--state_tracking.stop_when_solved", "true")
    ended = max(stopped)
    assert ended < 12
    assert ended % 3 == 0, "at a validation"
    assert [read(words, "stopped", "run.json")[key] for key in ("state", "step", "steps")] == ["finished", ended, 12]
    assert losses_of(words, 1, "stopped", *soon, "--state_tracking.stop_when_solved", "true") == stopped, "it stays finished"
    assert losses_of(words, 1, "stopped", *soon) == whole
    assert [read(words, "stopped", "run.json")[key] for key in ("state", "step", "steps")] == ["finished", 12, 12]
    assert read(words, "stopped", "test.json") == read(words, "whole", "test.json")


# -- the price of a step -----------------------------------------------------------------------------------------------

ROUTER = ("--model.adaptive_householder", "true", "--training.local_batch_size", "16", "--validation.enable", "false")


def test_with_all_steps_taken_a_token_takes_n_h_a_layer_however_long_the_padding(words: Path) -> None:
    language = ("--state_tracking.task", "parity", "--state_tracking.min_length", "2")
    price = ("--training.householder_cost", "0.1", "--training.seq_len", "17", "--training.steps", "1")
    (first,) = records(words, "run", *ROUTER, *language, *price)
    assert first["householder_steps"] == 2 * 2


def test_padding_changes_neither_what_is_learnt_nor_the_steps_that_are_counted(words: Path) -> None:
    """The same words in rows of 10 and of 33 tokens: steps that fillers take neither cost nor count."""
    same = ("--state_tracking.min_length", "8", "--state_tracking.curriculum_steps", "1000")
    price = ("--training.householder_cost", "1.0", "--optimizer.lr", "0.1", "--training.steps", "5")
    narrow, wide = (
        records(words, f"rows of {width}", *ROUTER, *same, *price, "--training.seq_len", str(width)) for width in (10, 33)
    )
    taken = [record["householder_steps"] for record in narrow]
    assert taken[0] == 4
    assert min(taken) < 3.5, "routers must have switched steps off for the comparison to mean it"
    for key, rel in (("loss", 1e-3), ("grad_norm", 1e-3), ("householder_steps", 1e-5)):  # at this rate rounding grows
        assert [record[key] for record in wide] == pytest.approx([record[key] for record in narrow], rel=rel), key
