"""The assembler for Hopper: one that is right, wherever it is, or a reason with a way out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from deltaproduct_kernels import resolve_backend
from deltaproduct_kernels.triton_backend import assembler


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(assembler.VARIABLE, raising=False)
    assembler._right.cache_clear()
    yield
    assembler._right.cache_clear()


def have(monkeypatch: pytest.MonkeyPatch, folder: Path, *releases: str) -> list[str]:
    """Assemblers that say they are of these releases, in the order in which they are looked at."""
    paths = []
    for release in releases:
        path = folder / f"ptxas-{release}"
        path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.80'\n")
        path.chmod(0o755)
        paths.append(str(path))
    monkeypatch.setattr(assembler, "_candidates", lambda: iter([*paths, str(folder / "not there")]))
    return paths


def test_the_first_that_is_right_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, _, right, _ = have(monkeypatch, tmp_path, "12.8", "13.0", "13.1", "13.5")
    assert assembler.choose() is None
    assert os.environ[assembler.VARIABLE] == right


def test_kernels_compiled_for_other_gpus_keep_tritons_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (right,) = have(monkeypatch, tmp_path, "13.1")
    for arch, expected in ((90, right), (80, None), (90, right), (100, None)):
        with assembler.chosen_for(arch):
            assert os.environ.get(assembler.VARIABLE) == expected
    assert assembler.VARIABLE not in os.environ


def test_what_the_user_names_is_taken_whatever_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    have(monkeypatch, tmp_path, "13.1")
    monkeypatch.setenv(assembler.VARIABLE, "/my/ptxas")
    assert assembler.choose() is None
    assert os.environ[assembler.VARIABLE] == "/my/ptxas"


def test_none_that_is_right_is_refused_with_what_was_found_and_the_way_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    old, nearly = have(monkeypatch, tmp_path, "12.8", "13.0")
    reason = assembler.choose()
    assert reason is not None
    assert f"found: {old} (12.8), {nearly} (13.0)" in reason
    assert "pip install nvidia-cuda-nvcc" in reason
    assert assembler.VARIABLE not in os.environ


def test_a_driver_too_old_for_the_right_ones_code_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    have(monkeypatch, tmp_path, "13.1")
    monkeypatch.setattr(assembler, "_driver", lambda: 12080)
    reason = assembler.choose()
    assert reason is not None
    assert "the driver is of CUDA 12.8" in reason
    assert assembler.VARIABLE not in os.environ


@pytest.mark.parametrize("name", ["auto", "triton"])
def test_a_hopper_without_one_is_no_reason_to_train_slowly_in_silence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    have(monkeypatch, tmp_path, "12.8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    with pytest.raises(ValueError, match="pip install nvidia-cuda-nvcc .* or choose 'torch'$"):  # 'auto' would not help
        resolve_backend(name, torch.device("cuda"))


def test_the_tritons_that_are_tested_bring_one_or_say_what_is_missing() -> None:
    """Triton 3.7.1 brings 13.1 for Blackwell, which assembles for Hopper as well."""
    pytest.importorskip("triton")
    reason = assembler.choose()
    assert reason is None or assembler.REMEDY in reason
