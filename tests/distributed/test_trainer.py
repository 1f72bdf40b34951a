"""The whole trainer on 1, 2 and 4 gloo ranks: the same losses however the work is split, and across a stop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.harness import run_ranks
from titan_dp.checkpoint import read_manifest, resolve_checkpoint


def train(config: Path, *overrides: str) -> None:
    """One rank of a run; what `torchrun train.py --config ...` does in each process."""
    from titan_dp.config_loader import load_config
    from titan_dp.distributed import current_world
    from titan_dp.trainer import Trainer

    Trainer(load_config(["--config", str(config), *overrides]), current_world()).train()


def losses_of(config: Path, world_size: int, name: str, *overrides: str) -> dict[int, float]:
    """Losses by step of a run named `name` on `world_size` ranks."""
    run_ranks(world_size, train, config, "--job.run_name", name, *overrides)
    records = (config.parent / "outputs" / name / "metrics.jsonl").read_text().splitlines()
    return {r["step"]: r["loss"] for r in map(json.loads, records) if "loss" in r}


def saved_tensors(config: Path, name: str) -> dict[str, str]:
    """Checksums of the tensors' files in a run's last checkpoint: weights, moments, random-number states."""
    manifest = read_manifest(resolve_checkpoint(config.parent / "outputs" / name))
    return {file["name"]: file["xxh3_128"] for file in manifest["files"] if file["name"].endswith(".distcp")}


@pytest.fixture
def undisturbed(tiny_config: Path) -> dict[int, float]:
    return losses_of(tiny_config, 1, "undisturbed")


HSDP = ("--parallelism.data_parallel_replicate_degree", "2")


def test_twenty_steps_give_the_same_losses_on_1_rank_fsdp_on_2_and_4_and_hsdp_2x2(
    tiny_config: Path, undisturbed: dict[int, float]
) -> None:
    runs = {"fsdp2": (2,), "fsdp4": (4,), "hsdp2x2": (4, *HSDP)}
    for name, (world_size, *overrides) in runs.items():
        losses = losses_of(tiny_config, world_size, name, *overrides)
        assert losses == pytest.approx(undisturbed, abs=1e-5), name
    assert undisturbed[20] < undisturbed[1] - 0.5, "the run must have learnt something for the comparison to mean it"


@pytest.mark.parametrize("stop", [5, 7])
def test_a_run_stopped_at_any_step_and_resumed_equals_one_never_stopped_bit_for_bit(tiny_config: Path, stop: int) -> None:
    whole = losses_of(tiny_config, 2, "whole")
    steps = ["--lr_scheduler.total_steps", "20", "--checkpoint.interval", str(stop)]
    losses_of(tiny_config, 2, "parts", "--training.steps", str(stop), *steps)
    assert losses_of(tiny_config, 2, "parts", *steps) == whole
    assert saved_tensors(tiny_config, "parts") == saved_tensors(tiny_config, "whole"), "generator states are among them"


def test_two_runs_of_the_same_config_are_bit_equal(tiny_config: Path) -> None:
    assert losses_of(tiny_config, 2, "first") == losses_of(tiny_config, 2, "second")


def test_compiled_checkpointed_and_plain_blocks_give_the_same_losses(tiny_config: Path, undisturbed: dict[int, float]) -> None:
    for option in ("full", "selective"):
        losses = losses_of(tiny_config, 1, option, "--activation_checkpoint.mode", option)
        assert losses == pytest.approx(undisturbed, abs=1e-6), option
