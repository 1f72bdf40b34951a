"""A run that goes on with another number of ranks: the same samples, schedule and global batch, losses within rounding.

24 sequences a step divide among 8, 6, 4, 2 and 1 ranks with different accumulation; the fingerprint of every sequence a rank
trained on is compared, not what the loader says of its position. Bit-equality on the same ranks is tests/faults' subject.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_tiny_config
from tests.distributed.harness import run_ranks
from titan_dp.checkpoint.manifest import committed_steps, read_manifest, step_folder

STEPS, BATCH = 15, 24
SETTINGS = [
    *("--training.global_batch_size", str(BATCH), "--training.local_batch_size", "1", "--lr_scheduler.total_steps", str(STEPS)),
    *("--checkpoint.interval", "1000", "--validation.enable=false", "--generate.enable=false"),
    *("--training.seq_len", "16", "--model.num_householder", "1"),
]

Part = tuple[int, int, int]
"""Ranks, replicas of the model (HSDP) among them, and the step they go on to."""
FSDP: list[Part] = [(8, 1, 3), (4, 1, 6), (2, 1, 9), (6, 1, 12), (1, 1, 15)]
HSDP: list[Part] = [(8, 2, 4), (4, 2, 8), (6, 3, 12), (8, 4, 15)]


def train(config: Path, *overrides: str) -> list[tuple[int, str]]:
    """One rank of a run; returns (step, sha256) of every sequence it trained on."""
    from titan_dp.config.load import load_config
    from titan_dp.distributed import current_world
    from titan_dp.train.trainer import Trainer

    trainer = Trainer(load_config(["--config", str(config), *overrides]), current_world())
    seen: list[tuple[int, str]] = []

    def look(module: Any, args: tuple[Any, ...]) -> None:
        for sequence in args[0]:
            seen.append((trainer.step + 1, hashlib.sha256(sequence.numpy().tobytes()).hexdigest()))

    trainer.model.register_forward_pre_hook(look)
    trainer.train()
    return seen


class Run:
    """A run in parts; what it trained on and logged."""

    def __init__(self, config: Path, name: str, parts: list[Part]) -> None:
        self.folder = config.parent / "outputs" / name
        self.samples: list[tuple[int, str]] = []
        for ranks, replicas, stop in parts:
            degree = ["--parallelism.data_parallel_replicate_degree", str(replicas)]
            own = ["--job.run_name", name, "--training.steps", str(stop)]
            self.samples += [pair for seen in run_ranks(ranks, train, config, *SETTINGS, *degree, *own) for pair in seen]
        self.records = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def column(self, key: str) -> list[Any]:
        return [record[key] for record in self.records]


@pytest.fixture(scope="module")
def config(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_config(tmp_path_factory.mktemp("elastic") / "tiny.toml", shards)


@pytest.fixture(scope="module")
def undisturbed(config: Path) -> Run:
    run = Run(config, "undisturbed", [(8, 1, STEPS)])
    losses = run.column("loss")
    assert losses[-1] < losses[0] - 0.5, "the run must have learnt something for the comparison to mean it"
    assert len(run.samples) == STEPS * BATCH
    return run


@pytest.fixture(scope="module", params=[FSDP, HSDP], ids=["fsdp_8_4_2_6_1", "hsdp_2x4_2x2_3x2_4x2"])
def parts(request: pytest.FixtureRequest) -> list[Part]:
    return request.param


@pytest.fixture(scope="module")
def elastic(config: Path, parts: list[Part], undisturbed: Run) -> Run:
    return Run(config, "-".join(f"{ranks}x{replicas}" for ranks, replicas, _ in parts), parts)


def test_every_step_is_of_the_same_samples(elastic: Run, undisturbed: Run) -> None:
    assert sorted(elastic.samples) == sorted(undisturbed.samples)


def test_losses_are_those_of_the_undisturbed_run_to_rounding(elastic: Run, undisturbed: Run) -> None:
    assert elastic.column("step") == list(range(1, STEPS + 1))
    assert elastic.column("loss") == pytest.approx(undisturbed.column("loss"), abs=1e-5)


def test_schedule_and_tokens_go_on_where_they_were(elastic: Run, undisturbed: Run) -> None:
    assert elastic.column("lr") == undisturbed.column("lr")
    assert elastic.column("tokens") == [step * BATCH * 16 for step in range(1, STEPS + 1)]


def test_every_part_saved_on_its_own_ranks_what_the_next_took_up(elastic: Run, parts: list[Part]) -> None:
    folder = elastic.folder / "checkpoint"
    saved = [read_manifest(step_folder(folder, step)) for step in committed_steps(folder)]
    assert [(manifest["world_size"], manifest["step"]) for manifest in saved] == [(ranks, stop) for ranks, _, stop in parts]
    assert [manifest["samples"] for manifest in saved] == [stop * BATCH for _, _, stop in parts]
