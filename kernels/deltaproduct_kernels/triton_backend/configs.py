"""Block sizes, warps and pipeline stages of every kernel: a table, read from top to bottom, first match wins.

Nothing is tuned while a program runs, so a run starts at once and two runs compute the same bits. The rule behind the lines for
sm_90 is two programs of 4 warps on a multiprocessor, blocks of 64, even where some registers spill: timed on an H100 it beat
the widest block that spills nothing (benchmarks/results/gpu_tune.md), and so it does in the model that the lines of `solve` and
`gradients` are from (benchmarks/results/model.md: modelled, not measured). With mma.sync (sm_80 and 86) and tcgen05 (100) lines
are such as compile with few spills and fit, timed by nobody. `python benchmarks/gpu.py tune` times candidates on a GPU and
prints lines. `gradients` has one stage: its state changes in memory, and a pipelined loop would read it ahead of that.

Columns: `bits` of the inputs' dtype; `arch` 80, 86 (also for 89 and 120: 99 KB of shared memory), 90 or 100; `dk` and `dv`
rounded up to 32, 64, 128 or 256, columns past the real size reading as zero (dv: >127 is 128 and 256); `n` steps a token, 4 for
more; `gate` y or n. `block_k`: columns of dk a step (states and adjoint hold all of dk); `block_v`: columns of dv a program
(states, adjoint, scan, decode) or a step (gradients). `_cut` works on parts of sequences; what has no line of its own there
takes the kernel's.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

SIZES = (32, 64, 128, 256)
SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
"""Bytes of shared memory a program may use, by compute capability: A100; RTX 30, A6000; RTX 40, L40S; H100; B200; RTX 50."""
ARCHITECTURES = tuple(SHARED_MEMORY)
_LINES_OF = {89: 86, 120: 86}
TENSOR_MEMORY = 512
"""Columns of tensor memory of a multiprocessor of compute capability 10.0."""

TABLE = """
kernel       bits arch   dk   dv   n gate  block_k block_v warps stages
solve          16    *    *    *   *    *      128       0     4      1
solve          32    *    *    *   *    *       64       0     4      1
states         16   80    *    *   *    *        0      64     8      1
states         16   86  256    *   *    *        0      32     8      1
states         16   86    *    *   *    *        0      64     8      1
states         16   90  256    *   *    *        0      32     8      1
states         16  100  256    *   *    *        0      32     8      1
states         16  100  128    *   *    *        0      64     8      2
states         16    *    *    *   *    *        0      64     4      2
states         32    *    *    *   *    *        0      32     8      1
adjoint        16   80    *    *   *    *        0      64     8      1
adjoint        16   86  256    *   *    *        0      32     8      1
adjoint        16   86    *    *   *    *        0      64     8      1
adjoint        16   90  256    *   *    *        0      32     8      1
adjoint        16   90    *    *   1    *        0      64     4      2
adjoint        16   90    *    *   *    *        0      64     4      3
adjoint        16  100  256    *   1    *        0      32     8      1
adjoint        16  100  256    *   *    *        0      64     8      1
adjoint        16  100  128    *   2    *        0      64     8      1
adjoint        16  100  128    *   3    *        0      64     8      1
adjoint        16  100  128    *   *    *        0      64     8      2
adjoint        16  100    *    *   1    *        0      64     8      2
adjoint        16  100    *    *   *    *        0      64     4      2
adjoint        32    *    *    *   *    *        0      32     8      1
gradients      16   80    *    *   *    *       64      64     8      1
gradients      16   86    *    *   *    *       64      64     8      1
gradients      16   90    *    *   *    *       64     128     4      1
gradients      16  100  256    *   *    *      128      64     8      1
gradients      16  100    *    *   *    *       64      64     4      1
gradients      32    *    *    *   *    *       32     128     8      1
scan            *    *    *    *   *    *       64      32     4      1
decode          *    *  256    *   *    *        0      32     4      1
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
    for special in ("states_cut", "adjoint_cut"):
        lines[special] = lines.get(special, []) + lines[special.split("_")[0]]
    return lines


def architecture(capability: int) -> int | None:
    """The newest of ARCHITECTURES that a GPU of compute capability 86 (for 8.6) can stand for; None before Ampere."""
    return max((a for a in ARCHITECTURES if a <= capability), default=None)


def padded(size: int) -> int:
    """The tile that holds a head of `size` columns."""
    return next(s for s in SIZES if s >= size)


def _covers(have: str, want: str) -> bool:
    return have in ("*", want) or (have == ">127" and want in ("128", "256"))


def line(kernel: str, *, dk: int, dv: int, n: int, bits: int, arch: int, gated: bool) -> tuple[int, Config]:
    """The table's line for a kernel at these sizes: its number among the kernel's, and what it says."""
    wanted = (
        str(bits),
        str(_LINES_OF.get(arch, arch)),
        str(padded(dk)),
        str(padded(dv)),
        str(min(n, 4)),
        "y" if gated else "n",
    )
    return next((i, c) for i, (words, c) in enumerate(_lines()[kernel]) if all(map(_covers, words, wanted)))


def config(kernel: str, *, dk: int, dv: int, n: int, bits: int, arch: int, gated: bool) -> Config:
    """What a kernel is launched with; blocks are no wider than the padded head."""
    _, c = line(kernel, dk=dk, dv=dv, n=n, bits=bits, arch=arch, gated=gated)
    return c._replace(block_k=min(c.block_k, padded(dk)), block_v=min(c.block_v, padded(dv)))
