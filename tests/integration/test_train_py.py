"""train.py as a user calls it: exit codes, messages, the dry run, eight ranks."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.integration.test_user_journey import losses
from tests.processes import run_script, run_script_in_ranks


def train(root: Path, *arguments: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    return run_script(root / "train.py", *arguments, env=env)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.num_heads", "3.5"], "model.num_heads"),
        (["--data.path", "nowhere"], "there are no token shards in 'nowhere'"),
        (["--model.vocab_size", "100"], "model.vocab_size = 100 is too small"),
        (
            ["--training.global_batch_size", "3"],
            "training.global_batch_size = 3 is not a multiple of training.local_batch_size = 2",
        ),
        (["--parallelism.data_parallel_shard_degree", "4"], "must be the number of ranks, which is 1"),
        (
            ["--model.backend", "triton"],
            "model.backend = 'triton' cannot run: it needs a CUDA device, not 'cpu'; choose 'torch'",
        ),
        (
            ["--checkpoint.initial_load_path", "nowhere"],
            "nowhere does not exist; give a run folder",
        ),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(tiny_config: Path, root: Path, arguments: list[str], message: str) -> None:
    result = train(root, "--config", tiny_config, *arguments, TRITON_INTERPRET="0")
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tiny_config.parent / "outputs/tiny/checkpoint").exists()


def test_without_torchrun_one_process_trains(tiny_config: Path, root: Path) -> None:
    result = train(root, "--config", tiny_config, "--training.steps", "3", "--metrics.enable_tensorboard")
    assert result.returncode == 0, result.stderr
    for part in (
        "1 rank(s)",
        "torch backend",
        "FLOPs per token",
        "step 3/3 (100%)",
        "validation loss",
        "sample",
        "checkpoint  ",
    ):
        assert part in result.stdout, part
    run = tiny_config.parent / "outputs/tiny"
    files = {"checkpoint", "config.toml", "data_verified.json", "metrics.jsonl", "run.json", "tb", ".lock"}
    assert {p.name for p in run.iterdir()} == files


def test_the_closing_sample_cannot_fail_a_run_that_is_done_and_saved(tiny_config: Path, root: Path) -> None:
    result = train(root, "--config", tiny_config, "--training.steps", "2", "--generate.prompt", "<|nobody|>")
    assert result.returncode == 0, result.stderr
    assert "no sample\n" in result.stdout
    assert "no special token of tokenizer" in result.stdout
    assert json.loads((tiny_config.parent / "outputs/tiny/run.json").read_text())["state"] == "finished"


def test_changed_architecture_or_data_is_refused_on_resume_and_harms_nothing(tiny_config: Path, root: Path) -> None:
    assert train(root, "--config", tiny_config, "--training.steps", "2").returncode == 0
    for change, key in ((["--model.num_heads", "1"], "model.num_heads"), (["--data.seed", "7"], "data.seed")):
        result = train(root, "--config", tiny_config, *change)
        assert result.returncode == 2
        assert f"was started with another {key}" in result.stderr
    again = train(root, "--config", tiny_config, "--training.steps", "3")
    assert again.returncode == 0, again.stderr
    assert "resumed at step 2" in again.stdout


def test_weights_of_another_run_start_a_new_one(tiny_config: Path, root: Path) -> None:
    assert train(root, "--config", tiny_config, "--training.steps", "15").returncode == 0
    start = tiny_config.parent / "outputs/tiny"
    result = train(root, "--config", tiny_config, "--job.run_name", "second", "--checkpoint.initial_load_path", start)
    assert result.returncode == 0, result.stderr
    first, second = losses(start), losses(tiny_config.parent / "outputs/second")
    assert second[1] < first[1] - 0.5


def test_gradients_that_stay_non_finite_stop_the_run_and_leave_no_bad_checkpoint(tiny_config: Path, root: Path) -> None:
    arguments = ["--optimizer.lr", "1e30", "--training.max_nonfinite_steps", "3", "--training.steps", "100"]
    result = train(root, "--config", tiny_config, *arguments)
    assert result.returncode == 1
    assert "training.max_nonfinite_steps = 3" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tiny_config.parent / "outputs/tiny/checkpoint").exists()


def test_a_full_disk_is_one_message_and_exit_code_1(tiny_config: Path, tmp_path: Path, root: Path) -> None:
    mount = tmp_path / "disk"
    mount.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(mount)], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        result = train(root, "--config", tiny_config, "--job.dump_folder", mount)
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)
    assert result.returncode == 1, result.stderr
    assert "could not be written: No space left on device" in result.stderr
    assert "Traceback" not in result.stderr


def test_eight_ranks_train_the_debug_config(shards: Path, tmp_path: Path, root: Path) -> None:
    data = ["--data.path", str(shards / "train"), "--validation.path", str(shards / "validation"), "--validation.steps", "1"]
    arguments = ["--config", "debug.toml", "--training.steps", "4", "--job.dump_folder", str(tmp_path), *data]
    log = tmp_path / "log"
    assert run_script_in_ranks(8, root / "train.py", *arguments, log=log) == [0] * 8, log.read_text()
    assert "8 rank(s)" in log.read_text()
    assert log.read_text().count("step 4/4 (100%)") == 1


def test_the_dry_run_of_800m_under_torchrun_prints_one_summary_without_data(root: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert run_script_in_ranks(2, root / "train.py", "--config", "800m.toml", "--dry-run", log=log) == [0, 0], log.read_text()
    assert log.read_text().count("dry run") == 1
    for part in ("806,262,780", "FLOPs per token", "104,905 steps", "55 B tokens", "GiB per rank"):
        assert part in log.read_text(), part


def test_print_config_under_torchrun_prints_once(tiny_config: Path, root: Path) -> None:
    for rank, lines in (("0", True), ("1", False)):
        assert bool(train(root, "--config", tiny_config, "--print-config", RANK=rank).stdout) == lines


def test_a_profile_and_a_deterministic_run(tiny_config: Path, root: Path) -> None:
    settings = [
        "--profiling.enable_profiling",
        "--profiling.profile_freq",
        "5",
        "--debug.deterministic",
        "--training.steps",
        "6",
    ]
    result = train(root, "--config", tiny_config, *settings)
    assert result.returncode == 0, result.stderr
    trace = tiny_config.parent / "outputs/tiny/profile/step-5-rank-0.json"
    assert json.loads(trace.read_text())["traceEvents"]


def test_a_stream_trains_too(tiny_config: Path, tmp_path: Path, root: Path) -> None:
    dataset = tmp_path / "dataset"
    dataset.mkdir()
    shutil.copy(root / "corpus/moby_dick.jsonl", dataset / "train.jsonl")
    settings = ["--data.source", "hf", "--data.hf_dataset", str(dataset), "--data.tokenizer", "bytes", "--training.steps", "4"]
    result = train(root, "--config", tiny_config, *settings, "--data.hf_shuffle_buffer", "16", "--validation.enable=false")
    assert result.returncode == 0, result.stderr
    resumed = train(
        root, "--config", tiny_config, *settings[:-1], "6", "--data.hf_shuffle_buffer", "16", "--validation.enable=false"
    )
    assert "resumed at step 4" in resumed.stdout, resumed.stderr
