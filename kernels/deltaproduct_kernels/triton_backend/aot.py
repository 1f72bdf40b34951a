"""Compile launches for a GPU that is not here, and read from the machine code what they need.

`Compiler` is a Runner: give it to `launch.forward` with tensors on the meta device and it compiles what a run on that chip
would launch. Triton brings its own assembler and disassembler, so this needs no CUDA and no driver.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deltaproduct_kernels.triton_backend.configs import Config
from deltaproduct_kernels.triton_backend.launch import Runner

_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
}
_PROCESSORS = {80: 108, 90: 132, 100: 148}
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


@dataclass(frozen=True)
class Compiler(Runner):
    """Compiles instead of launching; `compiled` collects one Resources a launch."""

    compiled: list[Resources] = field(default_factory=list)

    @staticmethod
    def of(arch: int) -> Compiler:
        return Compiler(arch, _PROCESSORS[arch])

    def __call__(self, kernel: Any, grid: int, config: Config, **arguments: Any) -> None:
        signature, constants, attributes = {}, {}, {}
        for i, parameter in enumerate(kernel.params):
            name, value = parameter.name, arguments[parameter.name]
            if parameter.is_constexpr or value is None:
                signature[name], constants[(i,)] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name], attributes[(i,)] = "*" + _TYPES[value.dtype], [["tt.divisibility", 16]]
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
        source = ASTSource(kernel, signature, constants, attributes)
        options = {"num_warps": config.warps, "num_stages": config.stages}
        built = triton.compile(source, target=GPUTarget("cuda", self.arch, 32), options=options)
        self.compiled.append(_resources(kernel.__name__, self.arch, config, built))


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
    )


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / tool, *arguments], check=True, capture_output=True, text=True).stdout
