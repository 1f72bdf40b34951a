"""Block sizes, warps and pipeline stages of every kernel: a table, read from top to bottom, first match wins.

Nothing is tuned while a program runs, so a run starts at once and two runs compute the same bits. `python benchmarks/gpu.py
tune` times candidates on a GPU and prints lines for this table. On sm_90 the lines for dk = dv = 128 are as timed on an H100
(benchmarks/results/gpu_tune.md; n = 4 and ungated by analogy); the others are the widest blocks that compile without
spilling a register, which is a poor rule: where both were timed, narrower blocks of 4 warps, two on a multiprocessor, won even
with some spills. `gradients` has one stage on sm_90: with more, copies race with unfinished products (races.py).

Columns: `bits` of the inputs' dtype; `arch` 80, 90 or 100; `dk` and `dv` rounded up to 32, 64, 128 or 256, columns past the
real size reading as zero (dv: >127 is 128 and 256); `n` steps a token, 4 for more; `gate` y or n. `block_k`: columns of dk a
step (states and adjoint hold all of dk); `block_v`: columns of dv a program (states, adjoint, scan, decode) or a step
(gradients). `states_again` recomputes for the backward pass, `_cut` works on parts of sequences; what has no line of its
own there takes the kernel's.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

SIZES = (32, 64, 128, 256)
ARCHITECTURES = (80, 90, 100)
SHARED_MEMORY = {80: 166_912, 90: 232_448, 100: 232_448}
"""Bytes of shared memory a program may use: compute capability 8.0, 9.0 and 10.0."""
TENSOR_MEMORY = 512
"""Columns of tensor memory of a multiprocessor of compute capability 10.0."""

TABLE = """
kernel       bits arch   dk   dv   n gate  block_k block_v warps stages
solve          16  100   64    *   1    n       64       0     8      1
solve          16    *   32    *   *    *       32       0     4      1
solve          16    *    *    *   *    *       64       0     4      1
solve          32    *   32    *   *    *       32       0     4      1
solve          32    *    *    *   *    *       64       0     4      1
states         16   80   64   64   1    n        0      64     4      1
states         16   80   64   64   4    n        0      64     4      2
states         16  100   64   64   1    n        0      64     8      2
states         16  100   64   64   2    n        0      64     4      3
states         16  100   64   64   3    n        0      64     4      3
states         16   80   32   32   *    *        0      32     4      2
states         16   80   64   32   1    *        0      32     4      3
states         16   80   64   32   4    *        0      32     8      2
states         16   80   64   32   *    *        0      32     4      2
states         16   80   64   64   4    *        0      64     8      2
states         16   80   64    *   *    *        0      64     8      1
states         16   80  128   32   *    *        0      32     8      1
states         16   80  128    *   *    *        0      64     8      1
states         16   80  256   32   *    *        0      32     8      1
states         16   80  256    *   *    *        0      64     8      1
states         16   90   32   32   *    *        0      32     4      2
states         16   90   64   32   *    *        0      32     4      3
states         16   90  128   32   1    *        0      32     8      1
states         16   90  128   32   *    *        0      32     8      2
states         16   90  128 >127   *    *        0      64     4      2
states         16   90  128    *   *    *        0      64     8      2
states         16   90  256    *   *    *        0      32     8      1
states         16  100   32   32   1    *        0      32     8      2
states         16  100   32   32   *    *        0      32     4      2
states         16  100   64   32   *    *        0      32     4      2
states         16  100   64 >127   2    *        0      64     4      3
states         16  100   64 >127   3    *        0      64     4      3
states         16  100  128   32   *    *        0      32     8      2
states         16  100  128    *   *    *        0      64     8      2
states         16  100  256    *   *    *        0      32     8      1
states         16    *    *    *   *    *        0      64     4      2
states         32  100   64   32   1    *        0      32     4      1
states         32  100   64   64   1    *        0      32     4      1
states         32  100   64 >127   1    *        0      32     4      1
states         32    *    *    *   *    *        0      32     8      1
states_again   16  100  256  256   3    *        0      64     8      2
states_cut     16   80   64   64   4    n        0      64     4      2
states_cut     16  100   64   64   1    n        0      64     4      3
adjoint        16  100  128  256   4    *        0      64     8      2
adjoint        16   90  128 >127   1    *        0      64     4      2
adjoint        16   90  128 >127   *    *        0      64     4      3
adjoint        16  100  128 >127   2    y        0      64     8      1
adjoint        16   80   32   32   *    *        0      32     4      2
adjoint        16   80   64   32   *    *        0      32     4      2
adjoint        16   80   64    *   *    *        0      64     8      1
adjoint        16   80  128   32   1    *        0      32     8      1
adjoint        16   80  128   32   4    *        0      32     4      2
adjoint        16   80  128   32   *    *        0      32     8      2
adjoint        16   80  128   64   1    *        0      64     8      1
adjoint        16   80  128 >127   1    *        0      64     8      1
adjoint        16   80  128    *   *    *        0      64     8      2
adjoint        16   80  256   32   *    *        0      32     8      1
adjoint        16   80  256 >127   1    *        0      32     8      1
adjoint        16   80  256    *   *    *        0      64     8      1
adjoint        16   90   32   32   *    *        0      32     4      2
adjoint        16   90   64   32   *    *        0      32     4      2
adjoint        16   90  128   32   4    *        0      32     4      2
adjoint        16   90  128   64   1    *        0      64     4      2
adjoint        16   90  128   64   4    *        0      64     4      3
adjoint        16   90  128   64   *    *        0      64     8      1
adjoint        16   90  128    *   *    *        0      32     8      2
adjoint        16   90  256   32   4    *        0      32     8      2
adjoint        16   90  256   64   4    *        0      32     8      2
adjoint        16   90  256 >127   4    *        0      32     8      2
adjoint        16   90  256    *   *    *        0      32     8      1
adjoint        16  100   32   32   1    *        0      16     4      2
adjoint        16  100   32   32   *    *        0      32     4      2
adjoint        16  100   32   64   1    *        0      64     8      2
adjoint        16  100   32 >127   1    *        0      64     8      2
adjoint        16  100   64   32   1    *        0      32     4      3
adjoint        16  100   64   32   *    *        0      32     4      2
adjoint        16  100   64   64   1    *        0      64     8      2
adjoint        16  100   64 >127   1    *        0      64     8      2
adjoint        16  100  128   64   2    *        0      64     8      1
adjoint        16  100  128   64   3    *        0      64     8      1
adjoint        16  100  128   64   *    *        0      64     8      2
adjoint        16  100  128 >127   3    *        0      64     8      1
adjoint        16  100  128 >127   4    *        0     128     8      3
adjoint        16  100  128 >127   *    *        0      64     8      2
adjoint        16  100  128    *   *    *        0      32     8      2
adjoint        16  100  256   32   1    *        0      16     8      1
adjoint        16  100  256   32   *    *        0      32     8      1
adjoint        16  100  256   64   1    *        0      32     8      1
adjoint        16  100  256 >127   1    *        0      32     8      1
adjoint        16  100  256    *   *    *        0      64     8      1
adjoint        16    *    *    *   *    *        0      64     4      2
adjoint        32    *    *    *   *    *        0      32     8      1
adjoint_cut    16  100  128 >127   2    *        0      64     8      1
adjoint_cut    16  100  128 >127   4    y        0      64     8      2
gradients      16   80  128  256   2    *       32      16     8      2
gradients      16   80  256  256   2    *       32      16     8      2
gradients      16   80   64   64   3    y       32      64     8      2
gradients      16   80  128 >127   2    n       32      16     8      2
gradients      16   80  128 >127   3    n       32      16     8      2
gradients      16   80   32 >127   3    *       32      64     8      2
gradients      16   80   32 >127   4    *       32      64     8      2
gradients      16   80   64   32   *    *       32      16     8      2
gradients      16   80   64   64   1    *       32      64     8      2
gradients      16   80   64 >127   1    *       32      16     8      2
gradients      16   80   64    *   *    *       64      32     8      2
gradients      16   80  128   64   1    *       32      16     8      2
gradients      16   80  128   64   *    *       32      64     8      2
gradients      16   80  128 >127   1    *       32      16     8      2
gradients      16   80  128 >127   *    *       32      64     8      2
gradients      16   80  256   32   4    *       64      32     8      2
gradients      16   80  256   64   1    *       32      16     8      2
gradients      16   80  256   64   *    *       32      64     8      2
gradients      16   80  256 >127   2    *       32      64     8      2
gradients      16   80  256 >127   4    *       32      64     8      2
gradients      16   90   32   32   *    *       32      16     8      1
gradients      16   90   32    *   *    *       32      64     8      1
gradients      16   90   64   32   1    *       32      16     8      1
gradients      16   90   64   32   *    *       64      32     8      1
gradients      16   90   64   64   1    *       64      32     8      1
gradients      16   90   64    *   1    *       64      64     8      1
gradients      16   90   64    *   *    *       64      64     4      1
gradients      16   90  128   64   *    *       64      32     8      1
gradients      16   90  128 >127   1    *      128      64     8      1
gradients      16   90  128 >127   *    *       64      64     4      1
gradients      16   90  256   64   *    *       64      32     8      1
gradients      16   90  256 >127   *    *       64      64     8      1
gradients      16  100   32   32   *    *       32      16     8      2
gradients      16  100   32    *   *    *       32      64     8      2
gradients      16  100   64   32   *    *       64      32     8      2
gradients      16  100   64    *   *    *       64      64     8      2
gradients      16  100  128   32   *    *       64      32     8      2
gradients      16  100  128 >127   1    *       64      32     8      2
gradients      16  100  128    *   *    *       64      64     8      2
gradients      16  100  256   32   *    *       32      16     8      2
gradients      16  100  256 >127   1    *       64      32     8      2
gradients      16  100  256 >127   *    *       64      64     8      2
gradients      16  100  256    *   *    *       64      32     8      2
gradients      16   90    *    *   *    *       32      16     8      1
gradients      16    *    *    *   *    *       32      16     8      2
gradients      32   80   64   32   2    *       32      32     4      1
gradients      32   90   32 >127   1    *       32      32     8      1
gradients      32   90   32 >127   *    *       32      32     4      1
gradients      32    *    *    *   *    *       32      32     8      1
scan            *    *    *    *   *    *       64      32     4      1
decode          *    *  256    *   *    *        0      32     4      1
decode         16  100   64  256   *    *        0      32     2      1
decode          *  100    *    *   *    *        0      16     2      1
decode          *    *    *    *   *    *        0      32     2      1
"""


class Config(NamedTuple):
    block_k: int
    block_v: int
    warps: int
    stages: int


@cache
def _lines() -> dict[str, list[tuple[list[str], Config]]]:
    """The table by kernel: what a line is for, and its configuration."""
    lines: dict[str, list[tuple[list[str], Config]]] = {}
    for kernel, *words in (line.split() for line in TABLE.strip().splitlines()[1:]):
        lines.setdefault(kernel, []).append((words[:6], Config(*map(int, words[6:]))))
    for special in ("states_again", "states_cut", "adjoint_cut"):
        lines[special] = lines.get(special, []) + lines[special.split("_")[0]]
    return lines


def padded(size: int) -> int:
    """The tile that holds a head of `size` columns."""
    return next(s for s in SIZES if s >= size)


def _covers(have: str, want: str) -> bool:
    return have in ("*", want) or (have == ">127" and want in ("128", "256"))


def line(kernel: str, *, dk: int, dv: int, n: int, bits: int, arch: int, gated: bool) -> tuple[int, Config]:
    """The table's line for a kernel at these sizes: its number among the kernel's, and what it says."""
    wanted = (str(bits), str(arch), str(padded(dk)), str(padded(dv)), str(min(n, 4)), "y" if gated else "n")
    return next((i, c) for i, (words, c) in enumerate(_lines()[kernel]) if all(map(_covers, words, wanted)))


def config(kernel: str, *, dk: int, dv: int, n: int, bits: int, arch: int, gated: bool) -> Config:
    """What a kernel is launched with; blocks are no wider than the padded head."""
    _, c = line(kernel, dk=dk, dv=dv, n=n, bits=bits, arch=arch, gated=gated)
    return c._replace(block_k=min(c.block_k, padded(dk)), block_v=min(c.block_v, padded(dv)))
