"""A run folder of an earlier layout of the code, packed as it was written: tokens, settings, a checkpoint, a log.

`tests/data/before_the_move.tar.xz` was saved at 7cf7463, before modules moved into packages; nothing in it may name a module.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from tests.integration.test_user_journey import losses
from tests.processes import run_script

RUN = "outputs/before-the-move"


@pytest.fixture
def older(tmp_path: Path, root: Path) -> Path:
    with tarfile.open(root / "tests" / "data" / "before_the_move.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def test_an_older_checkpoint_is_exported_and_resumes_as_the_older_code_did(older: Path, root: Path) -> None:
    done = run_script("titan_dp.cli", "export", older / RUN, older / "hf")
    assert done.returncode == 0, done.stderr
    assert (older / "hf" / "model.safetensors").exists()
    expected = losses(older / RUN)
    done = run_script(root / "train.py", "--config", "tiny.toml", cwd=older)
    assert done.returncode == 0, done.stderr
    assert "resumed at step 6" in done.stdout
    found = losses(older / RUN)
    assert found.keys() == expected.keys() == set(range(1, 13))
    assert found == pytest.approx(expected, rel=1e-5)
