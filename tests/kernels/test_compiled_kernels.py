"""The kernels compiled ahead of time for GPUs that are not here, and the committed report of it."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from deltaproduct_kernels.triton_backend import configs

ROOT = Path(__file__).resolve().parent.parent.parent


def report(*flags: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "benchmarks/compile_report.py", *flags]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_kernels_for_three_architectures_spill_nothing_and_fit_the_chip() -> None:
    """The sizes trained most; `python benchmarks/compile_report.py` compiles every line of the table."""
    done = report("--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    for architecture, instruction in ((80, "mma"), (90, "wgmma"), (100, "tcgen05")):
        lines = [line for line in done.stdout.splitlines() if line.startswith(f"{architecture}  bfloat16  128")]
        assert any("states" in line and instruction in line for line in lines), done.stdout


def test_the_gpu_benchmark_runs_on_tiny_sizes() -> None:
    """So that the one command for a lent GPU does not fail there for a reason that could be seen here."""
    command = [sys.executable, "benchmarks/gpu.py", "--smoke", "check", "op", "front_end", "norm"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "check: 2 cases, 0 with a fault" in done.stdout


@pytest.fixture(scope="module")
def committed() -> dict:
    return json.loads((ROOT / "benchmarks/results/compile.json").read_text())


@pytest.fixture
def compile_report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("compile_report")


def test_the_committed_report_is_of_these_kernels(committed: dict, compile_report: ModuleType) -> None:
    remedy = "kernels changed: run python benchmarks/compile_report.py and commit"
    assert committed["fingerprint"] == compile_report.fingerprint(), remedy


def test_the_committed_report_has_every_line_of_the_table_and_no_fault(committed: dict) -> None:
    rows = committed["rows"]
    assert not [row for row in rows if row["fault"] or row["spills"]]
    assert max(row["shared"] - configs.SHARED_MEMORY[row["arch"]] for row in rows) <= 0
    seen = {(row["kernel"].split()[0], row["dtype"] == "float32", row["arch"], row["n"], row["dk"], row["dv"]) for row in rows}
    for kernel in ("solve", "states", "adjoint", "gradients"):
        for single in (False, True):
            for arch in configs.ARCHITECTURES:
                for n in (1, 2, 4) if single else (1, 2, 3, 4):
                    for dk in configs.SIZES[: 3 if single else 4]:
                        for dv in (32, 64, 128) if single else configs.SIZES:
                            assert (kernel, single, arch, n, dk, dv) in seen


@pytest.mark.parametrize(("dk", "dv", "n"), [(16, 16, 1), (96, 200, 3), (256, 256, 8)])
@pytest.mark.parametrize("bits", [16, 32])
def test_the_table_has_a_line_for_every_size(dk: int, dv: int, n: int, bits: int) -> None:
    uses = ("solve", "states", "states_again", "states_cut", "adjoint", "adjoint_cut", "gradients", "scan", "decode")
    for kernel in uses:
        for arch in configs.ARCHITECTURES:
            c = configs.config(kernel, dk=dk, dv=dv, n=n, bits=bits, arch=arch, gated=True)
            assert c.block_k <= configs.padded(dk)
            assert c.block_v <= configs.padded(dv)
            assert c.warps in (1, 2, 4, 8)


def test_a_kernel_that_traps_for_lack_of_tensor_memory_is_a_fault(compile_report: ModuleType) -> None:
    fault = compile_report.fault
    assert fault(100, spills=0, shared=0, tensor=736, no_matrix=True) == "tensor memory, no matrix instructions"
    assert fault(90, spills=3, shared=300_000, tensor=0, no_matrix=False) == "spills, shared memory"
    assert fault(90, spills=0, shared=200_000, tensor=0, no_matrix=False) == ""
