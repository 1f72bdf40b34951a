"""The whole trainer on 1, 2 and 4 gloo ranks: the same losses however the work is split, and across a stop."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import run_ranks
from titan_dp import distributed
from titan_dp.checkpoint.folder import resolve_checkpoint
from titan_dp.checkpoint.manifest import committed_steps, read_manifest
from titan_dp.config.load import load_config
from titan_dp.errors import UserError
from titan_dp.output import Progress
from titan_dp.studies.sweep_file import load_sweep
from titan_dp.train import trainer
from titan_dp.train.run_folder import read_records


def train(config: Path, *overrides: str) -> None:
    """One rank of a run; what `torchrun train.py --config ...` does in each process."""
    trainer.Trainer(load_config(["--config", str(config), *overrides]), distributed.current_world()).train()


def losses_of(config: Path, world_size: int, name: str, *overrides: str) -> dict[int, float]:
    """Losses by step of a run named `name` on `world_size` ranks."""
    run_ranks(world_size, train, config, "--job.run_name", name, *overrides)
    records = (config.parent / "outputs" / name / "metrics.jsonl").read_text().splitlines()
    return {r["step"]: r["loss"] for r in map(json.loads, records) if "loss" in r}


def saved_tensors(config: Path, name: str) -> dict[str, str]:
    """Checksums of the tensors' files in a run's last checkpoint: weights, moments, random-number states."""
    manifest = read_manifest(resolve_checkpoint(config.parent / "outputs" / name))
    return {file["name"]: file["xxh3_128"] for file in manifest["files"] if file["name"].endswith(".distcp")}


HSDP = ("--parallelism.data_parallel_replicate_degree", "2")


def test_twenty_steps_give_the_same_losses_on_1_rank_fsdp_on_2_and_4_and_hsdp_2x2(tiny_config: Path) -> None:
    undisturbed = losses_of(tiny_config, 1, "undisturbed")
    runs = {"fsdp2": (2,), "fsdp4": (4,), "hsdp2x2": (4, *HSDP)}
    for name, (world_size, *overrides) in runs.items():
        losses = losses_of(tiny_config, world_size, name, *overrides)
        assert losses == pytest.approx(undisturbed, abs=1e-5), name
    assert undisturbed[20] < undisturbed[1] - 0.5, "the run must have learnt something for the comparison to mean it"


def test_a_run_stopped_and_resumed_equals_one_never_stopped_bit_for_bit(tiny_config: Path) -> None:
    whole = losses_of(tiny_config, 2, "whole")
    losses_of(tiny_config, 2, "parts", "--training.steps", "7", "--lr_scheduler.total_steps", "20")
    assert losses_of(tiny_config, 2, "parts") == whole
    assert saved_tensors(tiny_config, "parts") == saved_tensors(tiny_config, "whole"), "generator states are among them"


# -- another batch, another length -------------------------------------------------------------------------------------

ALLOW = ("--checkpoint.allow_changed", '["training.global_batch_size", "training.seq_len"]')


def facts_of(config: Path, name: str) -> dict:
    return json.loads((config.parent / "outputs" / name / "run.json").read_text())


def tokens_of(config: Path, name: str) -> dict[int, int]:
    records = (config.parent / "outputs" / name / "metrics.jsonl").read_text().splitlines()
    return {r["step"]: r["tokens"] for r in map(json.loads, records) if "loss" in r}


def said_by(config: Path, *overrides: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        train(config, *overrides)
    return said.getvalue()


def test_tokens_are_the_samples_consumed_after_a_change_of_batch_and_length(tiny_config: Path) -> None:
    """Steps of 8 x 32 tokens, then of 16 x 32, then of 16 x 64 until 8,192 are seen."""
    run_ranks(1, train, tiny_config, "--training.steps", "4", "--validation.enable=false")
    (said,) = run_ranks(1, said_by, tiny_config, "--training.steps", "8", "--training.global_batch_size", "16", *ALLOW)
    assert "changed since step 4: training.global_batch_size (was 8, now 16), training.steps (was 4, now 8)" in said
    assert "WARNING: the learning rate jumps with step 5" in said
    assert tokens_of(tiny_config, "tiny") == {s: 256 * s + 256 * max(0, s - 4) for s in range(1, 9)}
    facts = facts_of(tiny_config, "tiny")
    assert (facts["step"], facts["tokens"], facts["planned_tokens"]) == (8, 3072, 3072)
    longer = ("--training.global_batch_size", "16", "--training.seq_len", "64", "--training.tokens", "8192", *ALLOW)
    run_ranks(1, train, tiny_config, *longer)
    assert tokens_of(tiny_config, "tiny")[13] == 3072 + 5 * 1024
    facts = facts_of(tiny_config, "tiny")
    assert (facts["state"], facts["step"], facts["steps"], facts["tokens"]) == ("finished", 13, 13, 8192)
    (said,) = run_ranks(1, refused, tiny_config, *longer[:4], "--training.steps", "10", *ALLOW)
    assert "training.steps = 10, but the run to resume has done 13 steps" in said
    assert facts_of(tiny_config, "tiny") == facts


def passes_of(config: Path) -> list[tuple[str, int | None, int]]:
    """What is shown of the steps that are watched: its words, how many micro-batches there are, and the last one begun."""
    shown: list[Progress] = []

    @contextlib.contextmanager
    def watched(what: str, total: int | None = None) -> Iterator[Progress]:
        shown.append(Progress(what, total))
        yield shown[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "progress", watched)
        patch.setattr(trainer, "FIRST_SIGN", -1.0)  # every step takes long
        train(config, "--training.steps", "2", "--validation.enable=false", "--generate.enable=false")
    return [(each.what, each.total, each.done) for each in shown]


def test_a_step_that_takes_long_shows_its_micro_batches(tiny_config: Path) -> None:
    """8 sequences per step, 2 at a time."""
    (shown,) = run_ranks(1, passes_of, tiny_config)
    assert shown == [("step 1, micro-batch", 4, 3), ("step 2, micro-batch", 4, 3)]


# -- weights of another run --------------------------------------------------------------------------------------------


def refused(config: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as refusal:
        train(config, *overrides)
    return str(refusal.value)


def test_a_run_from_weights_that_computed_something_else_is_refused_or_says_so(tiny_config: Path, shards: Path) -> None:
    """Another epsilon, and data of another tokenizer of the same name: neither has a tensor that would not fit."""
    run_ranks(1, train, tiny_config, "--training.steps", "2", "--validation.enable=false")
    start = ("--checkpoint.initial_load_path", str(tiny_config.parent / "outputs/tiny"))
    start += ("--training.steps", "1", "--validation.enable=false", "--generate.enable=false")
    eps = ("--model.norm_eps", "1e-3")
    (said,) = run_ranks(1, refused, tiny_config, "--job.run_name", "a", *start, *eps)
    assert "another model.norm_eps (was 1e-06, now 0.001)" in said
    other = shutil.copytree(shards / "train", tiny_config.parent / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["tokenizer"]["hash"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    (said,) = run_ranks(1, refused, tiny_config, "--job.run_name", "b", *start, "--data.path", str(other))
    assert "another data.tokenizer (was 'bytes " in said
    assert "now 'bytes 000000000000...')" in said
    allow = ("--checkpoint.allow_changed", '["model.norm_eps"]')
    (said,) = run_ranks(1, said_by, tiny_config, "--job.run_name", "c", *start, *eps, *allow)
    assert "changed since it was saved, as allowed: model.norm_eps (was 1e-06, now 0.001)" in said


# -- kernels that compute wrong numbers ----------------------------------------------------------------------------------

ONE_HEAD = ("--model.backend", "triton", "--model.num_householder", "1", "--model.num_heads", "1")


def refused_by_rank_1(config: Path, *overrides: str) -> str:
    """What each rank says where the check finds wrong kernels on rank 1 alone."""

    def check_run(c: object, local_batch_size: int, device: object) -> str:
        if distributed.current_world().rank == 1:
            raise UserError("dq is off by 0.01")
        return "right"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "check_run", check_run)
        return refused(config, *overrides)


def test_kernels_that_are_wrong_on_one_rank_end_all_as_what_no_retry_mends(tiny_config: Path) -> None:
    """A UserError, which is exit code 2."""
    assert run_ranks(2, refused_by_rank_1, tiny_config, *ONE_HEAD) == ["rank 1: dq is off by 0.01", "dq is off by 0.01"]
    assert not (tiny_config.parent / "outputs/tiny/metrics.jsonl").exists()


def head_of(config: Path, result: str | None, *overrides: str) -> str:
    """The first lines of a run; the check says `result`, or refuses."""

    def check_run(c: object, local_batch_size: int, device: object) -> str:
        if result is None:
            raise UserError("wrong")
        return result.format(local_batch_size)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.setattr(trainer, "check_run", check_run)
        made = trainer.Trainer(load_config(["--config", str(config), *overrides]), distributed.current_world())
        made._announce()
        assert made.lock is not None
        made.lock.close()
    return said.getvalue()


def test_the_head_of_a_run_says_that_its_kernels_are_right(tiny_config: Path) -> None:
    share = ("--training.local_batch_size=-1", "--training.global_batch_size=6")
    (said,) = run_ranks(1, head_of, tiny_config, "right for {} rows", *ONE_HEAD, *share)
    assert re.search(r"^kernels +right for 6 rows$", said, re.MULTILINE)


def test_the_check_of_the_kernels_can_be_switched_off(tiny_config: Path) -> None:
    (said,) = run_ranks(1, head_of, tiny_config, None, *ONE_HEAD, "--debug.check_kernels=false")
    assert re.search(r"^kernels +not checked \(debug.check_kernels = false\)$", said, re.MULTILINE)


@pytest.mark.parametrize("other", [("--model.backend", "torch"), ("--model.mixer", "rwkv7", *ONE_HEAD[:4])])
def test_a_run_without_these_kernels_checks_none(tiny_config: Path, other: tuple[str, ...]) -> None:
    (said,) = run_ranks(1, head_of, tiny_config, None, "--model.use_forget_gate=false", *other)
    assert not re.search(r"^kernels", said, re.MULTILINE)


# -- branches ----------------------------------------------------------------------------------------------------------


def cells_of_a_sweep_of_branches(tiny_config: Path) -> list[Path]:
    """Configs of a run of 10 steps that branches from step 6 of one of 20, and of that one, as a sweep expands them."""
    path = tiny_config.parent / "lengths.toml"
    axes = '[sweep]\nbranch = true\n[sweep.axes]\n"training.steps" = [10, 20]\n'
    settings = "[lr_scheduler]\ndecay_ratio = 0.4\n[checkpoint]\nkeep_latest_k = 2\n"
    settings += "[validation]\nenable = false\n[generate]\nenable = false\n"
    path.write_text(f'extends = "{tiny_config.name}"\n{axes}{settings}')
    configs = []
    for cell in load_sweep(path).cells:
        configs.append(tiny_config.parent / f"{cell.name}.toml")
        configs[-1].write_text(cell.toml())
    return configs


def train_each(runs: list[tuple[Any, ...]]) -> None:
    """In one process, one after the other."""
    for run in runs:
        train(*run)


def records_of(folder: Path) -> dict[int, tuple[float, float]]:
    """Loss and learning rate by step."""
    return {record["step"]: (record["loss"], record["lr"]) for record in read_records(folder) if "loss" in record}


def test_a_branch_equals_the_run_of_its_length_trained_alone_bit_for_bit(tiny_config: Path) -> None:
    branch, trunk = cells_of_a_sweep_of_branches(tiny_config)
    runs = tiny_config.parent / "outputs/lengths"
    part = (branch, "--training.steps", "8", "--lr_scheduler.total_steps", "10")  # is stopped, and goes on
    alone = (branch, "--job.run_name", "alone", "--checkpoint.branch_from=")
    run_ranks(1, train_each, [(trunk,), part, (branch,), alone])
    assert committed_steps(runs / "steps20/checkpoint") == [6, 15, 20], "the branch point outlives retention"
    whole, own = records_of(runs / "alone"), records_of(runs / "steps10")
    assert own == {step: whole[step] for step in range(7, 11)}
    assert len({rate for _, rate in own.values()}) == 4, "it decays"
    name = "lengths/steps10"
    same = saved_tensors(tiny_config, name) == saved_tensors(tiny_config, "lengths/alone")
    assert same, "weights, moments and generator states"
    facts = facts_of(tiny_config, name)
    assert (facts["branched_at"], facts["shared_tokens"], facts["tokens"]) == (6, 6 * 256, 10 * 256)
    assert facts["branched_from"] == str(runs / "steps20/checkpoint/step-00000006")
    assert "branched_from" not in facts_of(tiny_config, "lengths/alone")


def refusals(config: Path, cases: list[tuple[str, ...]]) -> list[str]:
    return [refused(config, *overrides) for overrides in cases]


def test_a_branch_is_checked_as_a_resume_is(tiny_config: Path) -> None:
    run_ranks(1, train, tiny_config, "--training.steps", "2", "--validation.enable=false", "--generate.enable=false")
    saved = tiny_config.parent / "outputs/tiny/checkpoint/step-00000002"
    absent = saved.with_name("step-00000003")
    branch = ("--checkpoint.branch_from", str(saved), "--job.run_name")
    cases = [
        (*branch, "a", "--data.seed", "9"),
        (*branch, "b", "--model.norm_eps", "1e-3"),
        (*branch, "c", "--training.steps", "1"),
        ("--checkpoint.branch_from", str(absent), "--job.run_name", "d"),
    ]
    (said,) = run_ranks(1, refusals, tiny_config, cases)
    expected = [
        "another data.seed (was ",
        "another model.norm_eps (was 1e-06, now 0.001)",
        "training.steps = 1",
        f"checkpoint.branch_from: checkpoint {absent} does not exist; committed steps there: 2; the run to branch from",
    ]
    for words, message in zip(expected, said, strict=True):
        assert words in message
