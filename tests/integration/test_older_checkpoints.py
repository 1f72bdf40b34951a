"""A run folder of an earlier layout of the code, packed as it was written: tokens, settings, a checkpoint, a log.

`tests/data/before_the_move.tar.xz` was saved at 7cf7463, before modules moved into packages; nothing in it may name a module.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

RUN = "outputs/before-the-move"


@pytest.fixture
def older(tmp_path: Path, root: Path) -> Path:
    with tarfile.open(root / "tests" / "data" / "before_the_move.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def losses(folder: Path) -> dict[int, float]:
    lines = (folder / RUN / "metrics.jsonl").read_text().splitlines()
    return {record["step"]: record["loss"] for record in map(json.loads, lines) if "loss" in record}


def test_an_older_checkpoint_resumes_and_goes_on_as_the_older_code_did(older: Path, root: Path) -> None:
    expected = losses(older)
    command = [sys.executable, str(root / "train.py"), "--config", "tiny.toml"]
    done = subprocess.run(command, cwd=older, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "resumed at step 6" in done.stdout
    found = losses(older)
    assert found.keys() == expected.keys() == set(range(1, 13))
    assert found == pytest.approx(expected, rel=1e-5)


def test_an_older_checkpoint_is_exported(older: Path, root: Path) -> None:
    command = [sys.executable, "-m", "titan_dp.cli", "export", str(older / RUN), str(older / "hf")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert (older / "hf" / "model.safetensors").exists()
