"""Compile launches for a GPU that is not here, and read from the machine code what they need.

`Compiler` is a Runner: give it to `launch.forward` with tensors on the meta device and it compiles what a run on that chip
would launch, through the JIT's own specialisation of arguments, so that these are the binaries that run. Triton brings its
own assembler and disassembler: this needs no CUDA and no driver.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import MockTensor

from deltaproduct_kernels.triton_backend import assembler
from deltaproduct_kernels.triton_backend.configs import Config
from deltaproduct_kernels.triton_backend.launch import Runner
from deltaproduct_kernels.triton_backend.races import Race, races

_PROCESSORS = {80: 108, 86: 82, 89: 128, 90: 132, 100: 148, 120: 170}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_MATRIX = {"wgmma": r"wgmma\.mma_async", "tcgen05": r"tcgen05\.mma", "mma": r"mma\.sync"}


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel needs of a chip."""

    kernel: str
    arch: int
    config: Config
    registers: int
    """A thread."""
    spills: int
    """Loads and stores of local memory in the machine code."""
    shared: int
    """Bytes of shared memory a program."""
    tensor_memory: int
    """Columns of Blackwell's tensor memory a program. Past 512 Triton emits a kernel that only traps."""
    matrix: dict[str, int]
    """Matrix instructions in the PTX, by kind."""
    races: list[Race]
    """Operands that are overwritten while a product may still read them."""


@dataclass(frozen=True)
class Compiler(Runner):
    """Compiles instead of launching; `compiled` collects one Resources a launch."""

    compiled: list[Resources] = field(default_factory=list)

    @staticmethod
    def of(arch: int) -> Compiler:
        return Compiler(arch, _PROCESSORS[arch])

    def __call__(self, kernel: Any, grid: int, config: Config, **arguments: Any) -> None:
        self.compiled.append(_resources(kernel.__name__, self.arch, config, self.build(kernel, grid, config, **arguments)))

    def build(self, kernel: Any, grid: int, config: Config, **arguments: Any) -> Any:
        """Triton's CompiledKernel, as the JIT would build it for these arguments on this chip."""
        plain = {n: MockTensor(x.dtype) if isinstance(x, torch.Tensor) else x for n, x in arguments.items()}
        with _chip(self.arch), assembler.chosen_for(self.arch):
            return kernel.run(grid=(grid,), warmup=True, num_warps=config.warps, num_stages=config.stages, **plain)


class _Chip:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> str:
        return f"sm_{self.arch}"  # the JIT keeps its kernels by device: these are no real one's

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def _chip(arch: int) -> Iterator[None]:
    try:
        real = driver.active
    except RuntimeError:  # no GPU here
        real = None
    driver.set_active(_Chip(arch))
    try:
        yield
    finally:
        driver.set_active(real)


def _resources(name: str, arch: int, config: Config, built: Any) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        code = _run("cuobjdump", "-sass", file.name)
    found = re.search(r"REG:(\d+)", usage)
    assert found, usage
    return Resources(
        name,
        arch,
        config,
        registers=int(found[1]),
        spills=len(re.findall(r"\b(?:STL|LDL)\b", code)),
        shared=built.metadata.shared,
        tensor_memory=getattr(built.metadata, "tmem_size", None) or 0,
        matrix={kind: count for kind, pattern in _MATRIX.items() if (count := len(re.findall(pattern, built.asm["ptx"])))},
        races=races(built.asm["ttgir"], config.stages),
    )


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / tool, *arguments], check=True, capture_output=True, text=True).stdout
