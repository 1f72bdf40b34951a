"""How many processes start on a machine: a made-up nvidia-smi and CUDA_VISIBLE_DEVICES, no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import sees_gpus
from titan_dp import config
from titan_dp.cli import dispatch
from titan_dp.data import shards
from titan_dp.distributed import distributed
from titan_dp.errors import UserError
from titan_dp.hardware import visible_gpus

MIG = "  MIG 1g.10gb     Device  0: (UUID: MIG-3f2c)\n"
EIGHT = "".join(f"GPU {i}: NVIDIA H100 80GB HBM3 (UUID: GPU-{i})\n{MIG if i == 0 else ''}" for i in range(8))
ONE = "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-0)\n"


def machine(folder: Path, listing: str | None, visible: str | None) -> dict[str, str]:
    """The environment on a machine whose nvidia-smi lists these GPUs; None: it has no such program."""
    tools = folder / "tools"
    tools.mkdir()
    if listing is not None:
        script(tools / "nvidia-smi", f"cat <<'END'\n{listing}END")
    environment = {k: v for k, v in os.environ.items() if k not in ("CUDA_VISIBLE_DEVICES", "NPROC", "MAKEFLAGS")}
    if visible is not None:
        environment["CUDA_VISIBLE_DEVICES"] = visible
    return environment | {"PATH": f"{tools}:/usr/bin:/bin"}


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


CASES = {
    "eight GPUs, one of them cut": (EIGHT, None, 8),
    "two of eight": (EIGHT, "0,1", 2),
    "a cut one's instances": (EIGHT, "MIG-3f2c,MIG-77aa,MIG-0b1d", 3),
    "one GPU": (ONE, None, 1),
    "hidden": (EIGHT, "", 0),
    "ended by -1": (EIGHT, "3, 4,-1,5", 2),
    "no GPU": (None, None, 0),
}


@pytest.mark.parametrize("case", CASES)
def test_gpus_are_counted_as_cuda_sees_them(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listing, visible, expected = CASES[case]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, value in machine(tmp_path, listing, visible).items():
        monkeypatch.setenv(name, value)
    assert len(visible_gpus()) == expected


@pytest.mark.parametrize(("listing", "visible", "own", "expected"), [
    (EIGHT, "0,1", [], 2), (ONE, None, [], 1), (None, None, [], 2), (EIGHT, None, ["--nproc", "3"], 3),
    (None, None, ["--nproc=1"], 1),
])  # fmt: skip
def test_titan_dp_train_starts_a_process_per_gpu_or_two(
    listing: str | None, visible: str | None, own: list[str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, value in machine(tmp_path, listing, visible).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "execv", lambda path, argv: started.append(argv))
    monkeypatch.setattr(shards, "require_data", lambda c: None)  # that of debug.toml is made by `make train`
    started: list[list[str]] = []
    dispatch(["train", "--config", "debug.toml", *own, "--training.steps=3"])
    ((python, *launcher, module, name, config, file, steps),) = started
    options = [f"--nproc-per-node={expected}"] * (expected > 1)
    assert (python, [word for word in launcher if "nproc" in word]) == (sys.executable, options)
    assert [module, name, config, file, steps] == ["-m", "titan_dp.train", "--config", "debug.toml", "--training.steps=3"]


@pytest.mark.parametrize("own", [["--nproc", "0"], ["--nproc"], ["--nproc=two"]], ids=" ".join)
def test_a_wrong_number_of_processes_is_refused(own: list[str]) -> None:
    with pytest.raises(UserError, match="--nproc '.*': expected integer > 0"):
        dispatch(["train", "--config", "debug.toml", *own])


def test_make_train_hands_its_number_of_processes_on(root: Path) -> None:
    planned = subprocess.run(["make", "-n", "train", "NPROC=3"], cwd=root, capture_output=True, text=True, check=True).stdout
    assert "titan-dp train --config debug.toml --nproc 3\n" in planned


def test_more_processes_than_gpus_are_refused_with_the_number_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "3"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as mistake, distributed(config.Comm()):
        pass
    assert str(mistake.value) == (
        "this machine has 1 GPU to use (CUDA_VISIBLE_DEVICES=3), and 2 processes were started on it; start one per GPU "
        "(--nproc_per_node=1), or train on CPUs (CUDA_VISIBLE_DEVICES= before the command)"
    )


def test_only_the_kernels_tests_run_on_a_gpu() -> None:
    """Other tests start as many ranks as they like; this one is run among them."""
    assert not torch.cuda.is_available()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert sees_gpus(["tests/kernels/test_triton.py::test_x", "tests/kernels"])
    assert not sees_gpus(["tests/kernels", "tests/unit"])
    assert not sees_gpus([])
