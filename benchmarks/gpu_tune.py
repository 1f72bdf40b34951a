"""Every block size, number of warps and of stages of each kernel, timed: what triton_backend/configs.py should say.

Candidates are compiled beforehand in all cores at once. One that does not fit the chip or has a race (triton_backend/races.py)
is left out, one that spills is timed like any other: two programs on a multiprocessor that spill often beat one that does
not. Each candidate's results are compared with the table's, so no line is printed for a kernel that computes something else.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from deltaproduct_kernels.check import Case, error, inputs, step, upstream
from deltaproduct_kernels.triton_backend import configs, launch
from deltaproduct_kernels.triton_backend.aot import Compiler
from deltaproduct_kernels.triton_backend.configs import Config
from gpu_op import Shape, Timed, ahead_of_the_gpu, table_name

REPEATS = 5
SHOWN = 4
BLOCKS = {
    "gradients": [(bk, bv) for bk in (32, 64, 128) for bv in (32, 64, 128)],
    "states": [(0, bv) for bv in (32, 64, 128)],
    "adjoint": [(0, bv) for bv in (32, 64, 128)],
    "solve": [(bk, 0) for bk in (64, 128)],
}
STAGES = {"gradients": (1,), "solve": (1,)}
WARPS = {"solve": (2, 4)}
WIDTHS = ("<12", *(f">{w}" for w in (4, 4, 4, 4, 3, 4, 8, 7, 5, 6)))  # of the table's columns


@dataclass(frozen=True)
class Tuned:
    """One kernel at one size."""

    kernel: str
    n: int
    gated: bool = True
    d: int = 128

    @property
    def name(self) -> str:
        return f"{self.kernel} d={self.d} n={self.n} {'gated' if self.gated else 'ungated'}"

    @property
    def shape(self) -> Shape:
        return Shape(self.n, self.gated, H=8 * 128 // self.d, d=self.d)

    def config(self, arch: int) -> Config:
        return configs.config(self.kernel, dk=self.d, dv=self.d, n=self.n, bits=16, arch=arch, gated=self.gated)

    def candidates(self, arch: int) -> list[Config]:
        """The table's first."""
        fitting = [(bk, bv) for bk, bv in BLOCKS[self.kernel] if bk <= self.d and bv <= self.d]
        product = itertools.product(fitting, WARPS.get(self.kernel, (4, 8)), STAGES.get(self.kernel, (1, 2, 3)))
        return list(dict.fromkeys([self.config(arch), *(Config(*blocks, warps, stages) for blocks, warps, stages in product)]))


def cases(smoke: bool) -> list[Tuned]:
    if smoke:
        return []
    sizes = ((2, True, 128), (1, True, 128), (3, True, 128), (2, False, 128), (4, True, 128), (2, True, 64), (1, True, 64))
    return [Tuned(kernel, *size) for size in sizes for kernel in BLOCKS]


Launch = tuple[int, Shape, str, Config | None]
"""For an architecture, a step of this shape, its kernel, and what stands in for the table's line."""


def launches(cases: Sequence[Shape | Case]) -> list[Launch]:
    """As the table has them."""
    found: list[Launch] = []
    for case in cases:
        shape = case if isinstance(case, Shape) else Shape(case.n, case.gate is not None, case.B, case.T, case.H, case.dk)
        found += [(_arch(), shape, kernel, None) for kernel in BLOCKS]
    return found


def candidate_launches(cases: Sequence[Tuned]) -> list[Launch]:
    arch = _arch()
    return [(arch, case.shape, case.kernel, config) for case in cases for config in case.candidates(arch)]


def _arch() -> int:
    return launch.runner(torch.device("cuda")).arch


def compile_launch(wanted: Launch) -> dict[str, Any]:
    """Compile one kernel of a step as the JIT will want it, into Triton's cache. Returns what it needs of the chip."""
    arch, shape, kernel, config = wanted
    compiler = _One(arch, _PROCESSORS, wanted=kernel)

    def empty(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device="meta")

    q, k, v = empty(*shape.rows, shape.d), *(empty(shape.B, shape.T, shape.n, shape.H, shape.d) for _ in range(2))
    beta, g = empty(*k.shape[:4], dtype=torch.float32), empty(*shape.rows, dtype=torch.float32) if shape.gated else None
    with replaced(kernel, config):
        o, _, saved = launch.forward(q, k, v, beta, g, None, None, 1.0, True, True, 16, run=compiler)
        launch.backward(o, None, q, k, v, beta, g, saved, None, 1.0, True, 16, run=compiler)
    r = compiler.compiled[0]  # all there is, but where a long row is cut
    return {"spills": r.spills, "registers": r.registers, "shared": r.shared, "races": len(r.races)}


_PROCESSORS = 132  # decides only how rows are cut, and these are not


@dataclass(frozen=True)
class _One(Compiler):
    """Compiles one kernel of a step."""

    wanted: str = ""

    def __call__(self, kernel: Any, grid: int, config: Config, **arguments: Any) -> None:
        if table_name(kernel) == self.wanted:
            super().__call__(kernel, grid, config, **arguments)


@contextmanager
def replaced(kernel: str, config: Config | None) -> Iterator[None]:
    """The table with one kernel's line replaced."""
    table = configs.config
    if config is not None:
        configs.config = lambda name, **key: config if name == kernel else table(name, **key)
    try:
        yield
    finally:
        configs.config = table


def tune(case: Tuned, smoke: bool) -> dict[str, Any]:
    """The fastest candidates of one kernel, the table's among them, and the table's line for the best."""
    shape, default = case.shape, launch.runner(torch.device("cuda"))
    check = Case(case.d, case.d, case.n, "bfloat16", T=shape.T, gate=0.05 if case.gated else None, B=shape.B, H=shape.H)
    x = inputs(check, "cuda")
    do, dfinal = upstream(x)
    expected = step(check, x, do, dfinal)
    times: dict[Config, float] = {}
    notes: dict[Config, dict[str, Any]] = {}
    left_out: dict[str, int] = {}
    for candidate in case.candidates(default.arch):
        needs = compile_launch((default.arch, shape, case.kernel, candidate))
        if needs["races"] or needs["shared"] > configs.SHARED_MEMORY[default.arch]:
            why = "a race" if needs["races"] else "too much shared memory"
            left_out[why] = left_out.get(why, 0) + 1
            continue
        timed = Timed(default.arch, default.processors)
        with replaced(case.kernel, candidate):
            got = step(check, x, do, dfinal)
            again = step(check, x, do, dfinal)
            for _ in range(REPEATS):
                ahead_of_the_gpu()
                step(check, x, do, dfinal, timed)
        if any(error(got[name][-1:], y[-1:]) > 0.01 for name, y in expected.items()):
            left_out["another result"] = left_out.get("another result", 0) + 1
        elif any(not torch.equal(got[name], y) for name, y in again.items()):
            left_out["other bits"] = left_out.get("other bits", 0) + 1
        else:
            times[candidate], notes[candidate] = timed.medians()[case.kernel], needs
    current, best = case.config(default.arch), sorted(times, key=times.__getitem__)
    key = (case.kernel, 16, default.arch, case.d, case.d, min(case.n, 4), "y" if case.gated else "n")
    line = " ".join(f"{value:{width}}" for value, width in zip((*key, *best[0]), WIDTHS, strict=True))
    fastest = {
        f"{i + 1}.": f"{'/'.join(map(str, c))} {times[c]:.3f} ({notes[c]['registers']} registers, {notes[c]['spills']} spills)"
        for i, c in enumerate(best[:SHOWN])
    }
    return {
        "table": f"{'/'.join(map(str, current))} {times.get(current, float('nan')):.3f}", **fastest,
        "left out": ", ".join(f"{count}: {why}" for why, count in left_out.items()) or "-", "timed": len(times),
        "line": line,
    }  # fmt: skip
