"""The kernel in C: found, compiled, kept and done without; the same bits whoever computes them."""

from __future__ import annotations

import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from deltaproduct_kernels import native
from torch import Tensor

from tests.kernels.helpers import CU_SEQLENS, assert_same, in_float64, make, results

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("cc", "gcc", "clang")), reason="there is no C compiler here"
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder, and a process that has not looked for the kernel yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    native._library.cache_clear()
    yield tmp_path / "cache" / "deltaproduct_kernels"
    native._library.cache_clear()


def check() -> None:
    """Outputs and gradients are the definition's, whichever way they were computed."""
    x = make(50, n=3, dk=20, dv=33, dtype=torch.float32)
    assert_same(results(x, "torch"), results(in_float64(x), "recurrent"), 5e-6)


def silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.available(CPU, torch.float32)
    check()


def program(path: Path, text: str) -> Path:
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@needs_compiler
def test_it_is_compiled_once_and_found_from_then_on(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    silent()
    (made,) = cache.iterdir()
    assert made.suffix == ".so"
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("it was compiled again"))
    native._library.cache_clear()
    silent()


def test_without_a_compiler_torch_computes_the_same_and_one_sentence_says_so(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", RuntimeWarning)
        check()
        check()
    (sentence,) = (str(warning.message) for warning in said if warning.category is RuntimeWarning)
    assert re.fullmatch("the gated delta product .* without its C kernel, .*: there is no C compiler .* on PATH", sentence)
    assert not cache.exists()


def test_a_compiler_that_fails_is_quoted(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = program(tmp_path / "broken", "echo 'chunked.c: error: it does not like this' >&2\nexit 3\n")
    monkeypatch.setenv("CC", str(broken))
    with pytest.warns(RuntimeWarning, match="broken ended with 3: chunked.c: error: it does not like this"):
        check()
    assert not cache.exists()


def test_a_compiler_that_is_not_there_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler -O2")
    with pytest.warns(RuntimeWarning, match="no-such-compiler"):
        check()


@needs_compiler
def test_a_compiler_that_makes_no_library_is_done_without(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", str(program(tmp_path / "idle", "exit 0\n")))
    with pytest.warns(RuntimeWarning, match="without its C kernel"):
        check()


@needs_compiler
def test_a_cache_that_cannot_be_written_is_done_without(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")  # root may write into any folder, but not into a file's
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    silent()


@needs_compiler
def test_a_library_that_is_none_is_made_again(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    silent()
    (made,) = cache.iterdir()
    other = tmp_path / "other" / "deltaproduct_kernels"
    other.mkdir(parents=True)
    (other / made.name).write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(other.parent))
    native._library.cache_clear()
    silent()
    assert (other / made.name).stat().st_size == made.stat().st_size


@needs_compiler
def test_processes_that_start_at_once_share_one_library_and_agree_in_every_bit(cache: Path) -> None:
    code = (
        "import torch; torch.manual_seed(0)\n"
        "from tests.kernels.helpers import make, results\n"
        "from deltaproduct_kernels import native\n"
        "assert native.available(torch.device('cpu'), torch.float32)\n"
        "print([x.double().sum().item().hex() for x in results(make(40, dtype=torch.float32), 'torch').values()])\n"
    )
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", code]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len(set(said)) == 1
    assert len(list(cache.iterdir())) == 1


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are those of x86-64")
@pytest.mark.parametrize("flag", ["-mno-avx512f", "-mno-avx"])
def test_narrower_vectors_are_right_too(flag: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", f"cc {flag}")
    silent()
    for dtype in (torch.float32, torch.float64):
        x = make(40, n=2, dk=9, dv=5, dtype=dtype)
        tolerance = 5e-6 if dtype == torch.float32 else 1e-12
        assert_same(results(x, "torch"), results(in_float64(x), "recurrent"), tolerance)


@needs_compiler
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_threads_and_every_repetition_gives_the_same_bits(dtype: torch.dtype, packed: bool) -> None:
    inputs = make(103, B=1 if packed else 3, H=3, dtype=dtype, states=8 if packed else 3)
    cu_seqlens = torch.tensor(CU_SEQLENS) if packed else None
    before = torch.get_num_threads()
    try:
        got = []
        for threads in (1, 2, 5, 1):
            torch.set_num_threads(threads)
            got.append(results(inputs, "torch", cu_seqlens=cu_seqlens))
    finally:
        torch.set_num_threads(before)
    for other in got[1:]:
        assert all(torch.equal(x, other[name]) for name, x in got[0].items())


def test_tensors_may_lie_in_memory_as_they_like() -> None:
    inputs = make(40)

    def scattered(x: Tensor) -> Tensor:
        return x.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_()

    expected = results(inputs, "torch")
    leaves = {name: scattered(x) for name, x in inputs.items()}
    assert not any(x.is_contiguous() for x in leaves.values())
    o, state = torch.ops.deltaproduct.chunk(
        *(leaves[name] for name in ("q", "k", "v", "beta", "g", "initial_state")), None, 8**-0.5, True
    )[:2]
    assert torch.equal(o, expected["o"])
    assert torch.equal(state, expected["state"])
    generator = torch.Generator().manual_seed(0)
    do, dstate = (torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (o, state))
    torch.autograd.backward([o, state], [do.mT.contiguous().mT, dstate.mT.contiguous().mT])
    assert all(torch.equal(x.grad, expected[f"d{name}"]) for name, x in leaves.items())  # type: ignore[arg-type]


@needs_compiler
def test_a_user_without_a_home_compiles_for_each_process(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as it is for a user that nobody knows
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    silent()
    assert list((tmp_path / "here").iterdir()) == []
