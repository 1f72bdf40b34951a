"""The kernels in C for a CPU, compiled at first use by the system's compiler into the user's cache folder and called by ctypes.

The library's name there is a hash of the sources, the compiler's command and the processor. It appears under that name whole
or not at all, so any number of processes may start at once; those that find none compile one each. Where there is no compiler,
or it fails, a warning says so once, and torch operations give the same results, more slowly.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCES = tuple(Path(__file__).with_name(name) for name in ("chunked.c", "front_end.c", "norm.c"))
HEADER = Path(__file__).with_name("common.h")
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-std=gnu11", "-fPIC", "-shared", "-pthread")
DTYPES = {torch.float32: (), torch.float64: ("-DDOUBLE",)}


def _structure(integers: str, real: str, pointers: str) -> type[ctypes.Structure]:
    fields: list[tuple[str, Any]] = [(name, ctypes.c_ssize_t) for name in integers.split()] + [(real, ctypes.c_double)]
    fields += [(name, ctypes.c_void_p) for name in pointers.split()]
    return type("Problem", (ctypes.Structure,), {"_fields_": fields})


# What each function takes: the structures Problem, Convolution and Norm of their files.
_PROBLEMS = {
    "solve_all": _structure(
        "sequences n heads groups dk dv tokens erase threads",
        "scale",
        "offsets chunks q k v beta g o S states d_o dS d_q d_k d_v d_beta d_g",
    ),
    "convolve_all": _structure("tasks tokens span channels taps unit threads", "eps", "position x weight y d_y d_x d_weight"),
    "normalise_all": _structure("tasks rows span size threads", "eps", "x weight y d_y d_x d_weight"),
}


def available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `run` can be called with tensors of this kind. The first call with a dtype may compile for some seconds."""
    return device.type in ("cpu", "meta") and _library(dtype) is not None


def run(function: str, dtype: torch.dtype, **values: Tensor | float | None) -> None:
    """Calls a function of the library with its structure of `values`; tensors are contiguous, of `dtype` or int64.

    As many threads work as torch uses; the results do not depend on how many. With tensors on the meta device nothing is
    computed: whoever counts memory has seen what is allocated.
    """
    if any(isinstance(x, Tensor) and x.is_meta for x in values.values()):
        return
    library = _library(dtype)
    assert library is not None
    fields: dict[str, Any] = {"threads": torch.get_num_threads()}
    for name, x in values.items():
        if isinstance(x, Tensor):
            assert x.is_contiguous(), name
            assert x.dtype in (dtype, torch.int64), name
        if x is not None:
            fields[name] = x.data_ptr() if isinstance(x, Tensor) else x
    if getattr(library, function)(ctypes.byref(_PROBLEMS[function](**fields))):
        raise MemoryError("the gated delta product has no memory for its workspace")


@cache
def _library(dtype: torch.dtype) -> ctypes.CDLL | None:
    try:
        library = _load(DTYPES[dtype])
    except (OSError, subprocess.SubprocessError) as error:
        warnings.warn(
            f"the gated delta product runs on the CPU without its C kernel, several times slower: {_reason(error)}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    for function, problem in _PROBLEMS.items():
        getattr(library, function).argtypes = [ctypes.POINTER(problem)]
    return library


def _load(define: tuple[str, ...]) -> ctypes.CDLL:
    """Raises OSError or SubprocessError where no library can be had."""
    command, texts = (*_compiler(), *FLAGS, *define), (path.read_text() for path in (HEADER, *SOURCES))
    key = hashlib.sha256("\0".join((*texts, *command, _processor())).encode()).hexdigest()[:20]
    folder = _cache_folder()
    kept = None if folder is None else folder / f"kernels-{key}.so"
    if kept is not None and kept.exists():
        try:
            return ctypes.CDLL(str(kept))
        except OSError:  # no library: made again
            pass
    with tempfile.TemporaryDirectory(prefix="deltaproduct_kernels-") as here:
        made = Path(here) / "kernels.so"
        subprocess.run(
            [*command, *map(str, SOURCES), "-o", str(made), "-lm"], check=True, capture_output=True, text=True, timeout=300
        )
        if kept is not None and _keep(made, kept):
            made = kept
        return ctypes.CDLL(str(made))


def _keep(made: Path, path: Path) -> bool:
    """Whether the library is at `path` now; where that cannot be written, the next process compiles again."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent)
    except OSError:
        return False
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(made.read_bytes())
            file.flush()
            os.fsync(file.fileno())  # a machine that loses power must not leave half a library under the name
        os.chmod(name, 0o755)
        os.replace(name, path)
    except OSError:
        os.unlink(name)
        return False
    return True


def _compiler() -> tuple[str, ...]:
    """The command that CC names, or the first compiler on PATH. Raises FileNotFoundError."""
    if os.environ.get("CC"):
        return tuple(shlex.split(os.environ["CC"]))
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return (name,)
    raise FileNotFoundError("there is no C compiler (cc, gcc or clang) on PATH")


def _cache_folder() -> Path | None:
    """None for a user without a home."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return folder / "deltaproduct_kernels" if folder.is_absolute() else None


def _processor() -> str:
    """What -march=native looks at."""
    kinds = ("model name", "flags", "Features", "CPU part")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return "\n".join((platform.machine(), platform.processor(), *dict.fromkeys(x for x in lines if x.startswith(kinds))))


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        said = [line for line in error.stderr.splitlines() if "error" in line] or error.stderr.splitlines() or ["no message"]
        return f"{error.cmd[0]} ended with {error.returncode}: {said[0]}"
    return str(error)
