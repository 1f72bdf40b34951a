"""train.py as a user calls it: exit codes, what it prints, two ranks; and what it refuses."""

from __future__ import annotations

import gc
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.distributed.harness import run_ranks
from tests.distributed.test_trainer import said_by
from tests.distributed.test_trainer import train as train_here
from tests.processes import run_script, run_script_in_ranks
from titan_dp.data.tokenizer import load_tokenizer
from titan_dp.errors import UserError


def train(root: Path, *arguments: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    return run_script(root / "train.py", *arguments, env=env)


# -- what is refused ---------------------------------------------------------------------------------------------------

MISTAKES = [
    (["--model.vocab_size", "100"], "model.vocab_size = 100 is too small"),
    (["--parallelism.data_parallel_shard_degree", "4"], "must be the number of ranks, which is 1"),
    (["--checkpoint.initial_load_path", "nowhere"], "nowhere does not exist; give a run folder"),
]


def refusals(config: Path, commands: list[list[str]]) -> list[str]:
    """What a run on each command's settings is refused with."""
    said = []
    for arguments in commands:
        try:
            train_here(config, *arguments)
        except UserError as error:
            said.append(str(error))
        gc.collect()  # the trainer that failed holds the run folder's lock
    return said


def test_mistakes_are_refused_before_anything_is_saved(tiny_config: Path) -> None:
    (said,) = run_ranks(1, refusals, tiny_config, [arguments for arguments, _ in MISTAKES])
    for (arguments, message), text in zip(MISTAKES, said, strict=True):
        assert message in text, arguments
    assert not (tiny_config.parent / "outputs/tiny/checkpoint").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.num_heads", "3.5"], "model.num_heads"),
        (
            ["--model.backend", "triton"],
            "model.backend = 'triton' cannot run: it needs a CUDA device, not 'cpu'; choose 'torch'",
        ),
        (
            ["--model.backend", "fla", "--training.mixed_precision_param", "bfloat16"],
            "model.backend = 'fla' cannot run: it needs a CUDA device, not 'cpu'; choose 'auto'",
        ),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(tiny_config: Path, root: Path, arguments: list[str], message: str) -> None:
    result = train(root, "--config", tiny_config, *arguments, TRITON_INTERPRET="0")
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_changed_architecture_or_data_is_refused_on_resume_and_harms_nothing(tiny_config: Path) -> None:
    run_ranks(1, train_here, tiny_config, "--training.steps", "2")
    (said,) = run_ranks(1, refusals, tiny_config, [["--model.num_heads", "1"], ["--data.seed", "7"]])
    assert re.match(r"\S+ holds another run \(step 2\); choose another job\.run_name\. It was", said[0])
    assert "was started with another model.num_heads" in said[0]
    assert "was started with another data.seed" in said[1]
    (again,) = run_ranks(1, said_by, tiny_config, "--training.steps", "3")
    assert "resumed at step 2" in again
    assert "nothing to do" not in again
    (finished,) = run_ranks(1, said_by, tiny_config, "--training.steps", "3")
    assert "nothing to do: all steps (3) are done; to start anew, choose another job.run_name" in finished
    assert "with --lr_scheduler.total_steps 3" in finished, "more steps alone would make the rate jump"


# -- what a run does ---------------------------------------------------------------------------------------------------


def test_without_torchrun_one_process_trains_and_shows_a_sample(tiny_config: Path, root: Path) -> None:
    prompt = ["--generate.prompt", "Ring \x07"]
    result = train(root, "--config", tiny_config, "--training.steps", "3", "--metrics.enable_tensorboard", *prompt)
    assert result.returncode == 0, result.stderr
    assert "\x07" not in result.stdout
    shown = "1 rank on|torch backend, kernels in C|FLOPs per token|step 3/3|validation loss|sample\nRing \\x07|checkpoint  "
    shown += "|titan-dp generate |to train it further: docs/guides/more-tokens.md; |--lr_scheduler.total_steps 3 "
    for part in shown.split("|"):
        assert part in result.stdout, part
    run = tiny_config.parent / "outputs/tiny"
    files = {"checkpoint", "config.toml", "data_verified.json", "metrics.jsonl", "run.json", "tb", ".lock"}
    assert {p.name for p in run.iterdir()} == files
    record, made_with = json.loads((run / "run.json").read_text()), load_tokenizer("bytes")
    assert (record["tokenizer_hash"], record["adds_bos"]) == (made_with.hash, True)
    (manifest,) = run.glob("checkpoint/*/manifest.json")
    saved = json.loads(manifest.read_text())
    assert (saved["tokenizer_hash"], saved["adds_bos"]) == (made_with.hash, True)


def test_the_closing_sample_cannot_fail_a_run_that_is_done_and_saved(tiny_config: Path, root: Path) -> None:
    result = train(root, "--config", tiny_config, "--training.steps", "2", "--generate.prompt", "<|nobody|>")
    assert result.returncode == 0, result.stderr
    assert "no sample\n" in result.stdout
    assert "no special token of tokenizer" in result.stdout
    assert json.loads((tiny_config.parent / "outputs/tiny/run.json").read_text())["state"] == "finished"


def test_two_ranks_train_the_debug_config(shards: Path, tmp_path: Path, root: Path) -> None:
    data = ["--data.path", str(shards / "train"), "--validation.path", str(shards / "validation"), "--validation.steps", "1"]
    arguments = ["--config", "debug.toml", "--training.steps", "2", "--job.dump_folder", str(tmp_path), *data]
    log = tmp_path / "log"
    assert run_script_in_ranks(2, root / "train.py", *arguments, log=log) == [0, 0], log.read_text()
    assert "2 ranks" in log.read_text()
    assert log.read_text().count("step 2/2 ") == 1


def test_the_dry_run_and_the_configuration_are_printed_once_without_data(tiny_config: Path, tmp_path: Path, root: Path) -> None:
    log = tmp_path / "log"
    settings = ["--config", str(tiny_config), "--data.path", "nowhere", "--dry-run"]
    assert run_script_in_ranks(2, root / "train.py", *settings, log=log) == [0, 0], log.read_text()
    assert log.read_text().count("dry run") == log.read_text().count("FLOPs per token") == 1
    for rank, lines in (("0", True), ("1", False)):
        assert bool(train(root, "--config", tiny_config, "--print-config", RANK=rank).stdout) == lines


def test_a_profile_and_a_deterministic_run(tiny_config: Path, root: Path) -> None:
    profile = ["--profiling.enable_profiling", "--profiling.profile_freq", "5"]
    result = train(root, "--config", tiny_config, *profile, "--debug.deterministic", "--training.steps", "6")
    assert result.returncode == 0, result.stderr
    trace = tiny_config.parent / "outputs/tiny/profile/step-5-rank-0.json"
    assert json.loads(trace.read_text())["traceEvents"]


def test_a_stream_trains_and_resumes_too(tiny_config: Path, tmp_path: Path, root: Path) -> None:
    dataset = tmp_path / "dataset"
    dataset.mkdir()
    shutil.copy(root / "corpus/moby_dick.jsonl", dataset / "train.jsonl")
    stream = ["--data.source", "hf", "--data.hf_dataset", str(dataset), "--data.tokenizer", "bytes"]
    stream += ["--data.hf_shuffle_buffer", "16", "--validation.enable=false"]
    result = train(root, "--config", tiny_config, *stream, "--training.steps", "4")
    assert result.returncode == 0, result.stderr
    resumed = train(root, "--config", tiny_config, *stream, "--training.steps", "6")
    assert "resumed at step 4" in resumed.stdout, resumed.stderr
