"""The kernels compiled ahead of time for GPUs that are not here, and the committed report of it."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from deltaproduct_kernels.triton_backend import configs

ROOT = Path(__file__).resolve().parent.parent.parent


def report(*flags: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "benchmarks/compile_report.py", *flags]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_kernels_for_four_architectures_fit_the_chip_and_have_no_race() -> None:
    """The sizes trained most; `python benchmarks/compile_report.py` compiles every line of the table."""
    done = report("--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    for architecture, instruction in ((80, "mma"), (86, "mma"), (90, "wgmma"), (100, "tcgen05")):
        lines = [line for line in done.stdout.splitlines() if line.startswith(f"{architecture}  bfloat16  128")]
        assert any("states" in line and instruction in line for line in lines), done.stdout


def test_the_gpu_benchmark_runs_on_tiny_sizes_and_keeps_what_it_measures(tmp_path: Path) -> None:
    """So that the one command for a lent GPU does not fail there for a reason that could be seen here."""
    command = [sys.executable, "benchmarks/gpu.py", "--smoke", "check", "repeat", "op", "front_end", "norm"]
    environment = {**os.environ, "BENCHMARK_RESULTS": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "check: 2 cases, 0 with a fault" in done.stdout
    rows = {path.stem: len(json.loads(path.read_text())["rows"]) for path in tmp_path.glob("*.json")}
    assert rows == {"gpu_check": 2, "gpu_repeat": 1, "gpu_op": 1, "gpu_front_end": 3, "gpu_norm": 2}


BUILDS = """
import json, sys
import torch
sys.path.insert(0, "benchmarks")
from deltaproduct_kernels.triton_backend import launch
from deltaproduct_kernels.triton_backend.aot import Compiler

class Kept(Compiler):
    def __call__(self, kernel, grid, config, **arguments):
        kept.append(self.build(kernel, grid, config, **arguments))

def step(T, sequences):
    empty = lambda *size, dtype=torch.bfloat16: torch.empty(*size, dtype=dtype, device="meta")
    k, beta = empty(1, T, 1, 1, 64), empty(1, T, 1, 1, dtype=torch.float32)
    shape = launch.Shape.of(k, k, None, empty(sequences + 1, dtype=torch.int32), True, 16, run)
    launch.solve(shape, k, beta, None, empty(sequences + 1, dtype=torch.int32), run)

kept, run = [], Kept(90, 132)
for T, sequences in ((4096, 16), (4095, 1), (1, 7)):
    step(T, sequences)
print(json.dumps({"binaries": len({id(built) for built in kept})}))
"""


@pytest.fixture(scope="module")
def builds() -> dict:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", BUILDS], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_other_lengths_and_numbers_of_documents_run_the_same_binary(builds: dict) -> None:
    """Or a run would compile in its middle, when a batch of packed documents has one document, or a multiple of 16."""
    assert builds["binaries"] == 1


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


def test_the_committed_report_has_every_line_of_the_table_and_no_fault(committed: dict, compile_report: ModuleType) -> None:
    rows = committed["rows"]
    assert not [row for row in rows if row["fault"]]
    assert max(row["shared"] - configs.SHARED_MEMORY[row["arch"]] for row in rows) <= 0
    seen = {(row["arch"], row["dtype"], row["dk"], row["dv"], row["n"], row["options"]) for row in rows}
    wanted = compile_report.cases(quick=False)
    assert seen == {(c.arch, c.dtype, c.dk, c.dv, c.n, c.options) for c in wanted}
    for arch in configs.ARCHITECTURES:
        lines = {line for case in wanted for line in compile_report.lines_of(case) if line[0] == arch}
        assert lines == {
            line for case in compile_report.possible() if case.arch == arch for line in compile_report.lines_of(case)
        }


@pytest.mark.parametrize(("dk", "dv", "n"), [(16, 16, 1), (96, 200, 3), (256, 256, 8)])
@pytest.mark.parametrize("bits", [16, 32])
def test_the_table_has_a_line_for_every_size(dk: int, dv: int, n: int, bits: int) -> None:
    uses = ("solve", "states", "states_cut", "adjoint", "adjoint_cut", "gradients", "scan", "decode")
    for kernel in uses:
        for arch in configs.ARCHITECTURES:
            c = configs.config(kernel, dk=dk, dv=dv, n=n, bits=bits, arch=arch, gated=True)
            assert c.block_k <= configs.padded(dk)
            assert c.block_v <= configs.padded(dv)
            assert c.warps in (1, 2, 4, 8)


def test_what_is_a_fault_of_a_compiled_kernel(compile_report: ModuleType) -> None:
    from deltaproduct_kernels.triton_backend.races import Race

    def fault(needs_matrix: bool = False, **facts: object) -> str:
        plain = {"arch": 90, "spills": 0, "shared": 0, "tensor_memory": 0, "matrix": {}, "races": []}
        return compile_report.fault(SimpleNamespace(**{**plain, **facts}), needs_matrix)

    assert fault(True, arch=100, tensor_memory=736) == "tensor memory, no matrix instructions"
    assert fault(spills=3, shared=300_000) == "shared memory"
    assert fault(races=[Race("64x64", 1, 2)]) == "race on 64x64"
    assert fault(True, shared=200_000, matrix={"wgmma": 4}) == ""
