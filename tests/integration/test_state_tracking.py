"""`titan-dp state-tracking train` as a user runs it: several seeds in one table, and S3 learnt in 400 steps.

That runs are resumed, and stop when they have solved their task, is tested in tests/distributed/test_state_tracking_trainer.py;
what starts and ends them in tests/unit/test_launch_local.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_user_journey import ENV, losses

TINY = "--model.hidden_size 16 --model.num_heads 2 --model.head_dim 8 --length 8 --training.local_batch_size 8".split()
TINY += "--state_tracking.test_samples 16 --state_tracking.validation_samples 32 --validation.freq 10".split()
TINY += "--validation.local_batch_size 32 --parameters 6000 --steps 20 --min-length 3 --curriculum 10".split()
# Measured: 8 of 8 seeds solve it after 100 to 225 steps, 3 to 8 s of training; n_h = 1 is below 10 % after 600 steps of 64.
S3 = "--task S3 --length 16 --training.local_batch_size 32 --model.num_heads 8 --model.intermediate_size 256".split()
S3 += "--steps 400 --optimizer.lr 2e-3 --lr_scheduler.warmup_steps 20 --curriculum 0 --validation.freq 25".split()
S3 += "--validation.local_batch_size 512 --state_tracking.test_samples 256 --num-householder 2 --stop-when-solved".split()


def train(root: Path, out: Path, *options: str) -> str:
    """What the command prints."""
    command = [sys.executable, "-m", "titan_dp.cli", "state-tracking", "train", *options, "--out", str(out)]
    answer = subprocess.run(command, env=ENV, cwd=root, capture_output=True, text=True, timeout=600, check=False)
    logs = "".join(path.read_text() for path in sorted(out.glob("*/attempt-*.log")))
    assert answer.returncode == 0, answer.stdout + answer.stderr + logs
    return answer.stdout


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_two_seeds_of_a_model_end_in_one_table(tmp_path: Path, root: Path) -> None:
    printed = train(root, tmp_path, *TINY, "--models", "deltaproduct_2[0,1]", "--seeds", "2", "--at-once", "2")
    names = [f"deltaproduct_2_0_1-seed{seed}" for seed in (1, 2)]
    assert sorted(path.parent.name for path in tmp_path.glob("*/run.json")) == names
    facts = [read(tmp_path / name / "run.json") for name in names]
    assert [(run["state"], run["step"], run["steps"]) for run in facts] == [("finished", 20, 20)] * 2
    assert all(run["parameters"] == pytest.approx(6000, rel=0.01) for run in facts)
    assert losses(tmp_path / names[0]) != losses(tmp_path / names[1])
    assert "DeltaProduct_2 [0, 1]" in printed

    summary = read(tmp_path / "summary.json")
    assert [(m["model"], m["seeds"]) for m in summary["tasks"][0]["models"]] == [("DeltaProduct_2 [0, 1]", 2)]
    for name in names:
        test = read(tmp_path / name / "test.json")
        assert (test["lengths"], test["asked"]) == (list(range(1, 33)), [16] * 32)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_s3_is_learnt_with_two_steps_per_token_in_400_steps(tmp_path: Path, root: Path) -> None:
    train(root, tmp_path, *S3)
    (run,) = read(tmp_path / "summary.json")["tasks"][0]["models"][0]["runs"]
    assert run["validation"]["validation_sequence_accuracy"] >= 0.99
    assert run["test"]["16"] >= 0.95  # 256 other words, of a run that stopped as soon as it was at 99 %
