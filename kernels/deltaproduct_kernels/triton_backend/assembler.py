"""Which assembler (ptxas) makes machine code for Hopper: the newest at hand that is known to be right.

Triton 3.6 and 3.7 bring ptxas 12.8.93 for it, which gives some kernels that use two kinds of matrix instructions wrong
addresses in shared memory. On an H100 `gradients_kernel` for dk = 32, dv = 64, n = 4 read outside shared memory, always, and
with ptxas 13.0.88 was right (benchmarks/results/gpu_ptxas.md); in flash-linear-attention's pull request 1262 the same PTX gave
wrong numbers with 12.8.93, an invalid write with 13.0.88 too, and was right with 13.1.80. Triton took CUDA 13's for Hopper in
pull request 11854. Machine code of CUDA 13 needs a driver of CUDA 13.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

VARIABLE = "TRITON_PTXAS_PATH"
"""Triton's own: set by a user, it is taken whatever it names."""
RIGHT = (13, 1)
"""The oldest release that is known to be right."""
MISSING = "on Hopper it needs"
"""How a reason begins that says what must be installed."""
REMEDY = f"to take an older one all the same, name it in {VARIABLE}"


def choose() -> str | None:
    """Make Triton use an assembler for Hopper that is right, for this process and those it starts.

    Returns why there is none, as the end of a sentence; None if there is one.
    """
    if os.environ.get(VARIABLE):
        return None
    path, reason = _right()
    if path is not None and path != str(_BUNDLED / "ptxas"):
        os.environ[VARIABLE] = path
        _forget_version()
    return reason


@contextmanager
def chosen_for(arch: int) -> Iterator[None]:
    """Within it kernels for `arch` get the assembler that they would get on such a GPU; none is chosen but for Hopper."""
    before = os.environ.get(VARIABLE)
    if arch == 90:
        choose()
    try:
        yield
    finally:
        if before is None and os.environ.pop(VARIABLE, None) is not None:
            _forget_version()


@cache
def _right() -> tuple[str | None, str | None]:
    """The first that is right, or why there is none."""
    found = {path: version for path in _candidates() if (version := _release(path))}
    right = {path: version for path, version in found.items() if version >= RIGHT}
    release = ".".join(map(str, RIGHT))
    if not right:
        seen = ", ".join(f"{path} ({major}.{minor})" for path, (major, minor) in found.items()) or "none"
        return None, (
            f"{MISSING} the assembler ptxas of release {release} or later, because older ones make wrong code; found: {seen}. "
            f"pip install nvidia-cuda-nvcc brings one; {REMEDY}"
        )
    if (driver := _driver()) is not None and driver < 1000 * RIGHT[0]:
        return None, (
            f"{MISSING} a driver of CUDA {RIGHT[0]} (580 or later) for the code of ptxas {release}, because older assemblers "
            f"make wrong code; the driver is of CUDA {driver // 1000}.{driver % 1000 // 10}. Update it; {REMEDY}"
        )
    return next(iter(right)), None


_BUNDLED = Path((find_spec("triton") and find_spec("triton").origin) or "triton/__init__.py").parent / "backends/nvidia/bin"  # type: ignore[union-attr]


def _candidates() -> Iterator[str]:
    """Triton's own first: they were tested with it."""
    yield str(_BUNDLED / "ptxas")
    yield str(_BUNDLED / "ptxas-blackwell")
    packages = find_spec("nvidia")
    for folder in packages.submodule_search_locations or [] if packages else []:
        yield from map(str, sorted(Path(folder).glob("cu*/bin/ptxas"), reverse=True))
    if home := os.environ.get("CUDA_HOME"):
        yield f"{home}/bin/ptxas"
    if path := shutil.which("ptxas"):
        yield path


def _release(path: str) -> tuple[int, int] | None:
    """(13, 1) of ptxas 13.1.80."""
    try:
        printed = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"release (\d+)\.(\d+)", printed)
    return (int(found[1]), int(found[2])) if found else None


def _driver() -> int | None:
    """13000 of a driver of CUDA 13.0; None without one."""
    return torch._C._cuda_getDriverVersion() if torch.cuda.is_available() else None  # type: ignore[attr-defined, no-any-return]


def _forget_version() -> None:
    """Triton keeps the assembler's version, which is part of the names in its cache of kernels."""
    from triton.backends.nvidia import compiler

    getattr(compiler.get_ptxas_version, "cache_clear", lambda: None)()
