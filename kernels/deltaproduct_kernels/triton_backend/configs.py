"""Block sizes, warps and pipeline stages of every kernel: a table, read from top to bottom, first match wins.

Nothing is tuned while a program runs, so a run starts at once and two runs compute the same bits. `python
benchmarks/tune.py` measures candidates on a GPU and prints the lines for this file. Every entry is compiled ahead of time
for each architecture by `python benchmarks/compile_report.py`: no spills, shared memory within the chip's.

Head sizes are looked up rounded up to the next of SIZES; a tile's columns past the real size read as zero.
"""

from __future__ import annotations

from typing import NamedTuple

SIZES = (32, 64, 128, 256)
ARCHITECTURES = (80, 90, 100)
SHARED_MEMORY = {80: 166_912, 90: 232_448, 100: 232_448}
"""Bytes of shared memory a program may use: compute capability 8.0, 9.0 and 10.0."""
TENSOR_MEMORY = 512
"""Columns of tensor memory of a multiprocessor of compute capability 10.0."""


class Config(NamedTuple):
    block_k: int
    """Columns of dk a step; states and adjoint hold all of dk."""
    block_v: int
    """Columns of dv a program (states, adjoint, decode) or a step (gradients)."""
    warps: int
    stages: int


class Key(NamedTuple):
    """What an entry depends on; None matches anything."""

    dk: int | None = None
    dv: int | None = None
    n: int | None = None
    bits: int | None = None  # 16 or 32: width of the inputs' dtype
    arch: int | None = None  # 80, 90, 100

    def matches(self, other: Key) -> bool:
        return all(mine is None or mine == theirs for mine, theirs in zip(self, other, strict=True))


TABLE: dict[str, list[tuple[Key, Config]]] = {
    "solve": [
        (Key(bits=32), Config(32, 0, 4, 1)),
        (Key(), Config(64, 0, 4, 1)),
    ],
    "states": [
        (Key(dk=256, bits=32), Config(0, 16, 4, 1)),
        (Key(dk=128, bits=32), Config(0, 32, 4, 1)),
        (Key(bits=32), Config(0, 32, 4, 1)),
        (Key(dk=256), Config(0, 64, 8, 2)),
        (Key(), Config(0, 64, 4, 2)),
    ],
    "adjoint": [
        (Key(dk=256, bits=32), Config(0, 16, 4, 1)),
        (Key(dk=128, bits=32), Config(0, 32, 4, 1)),
        (Key(bits=32), Config(0, 32, 4, 1)),
        (Key(dk=256), Config(0, 64, 8, 2)),
        (Key(), Config(0, 64, 4, 2)),
    ],
    "gradients": [
        (Key(bits=32), Config(32, 32, 8, 1)),
        (Key(), Config(64, 64, 8, 2)),
    ],
    "scan": [
        (Key(), Config(64, 32, 4, 1)),
    ],
    "decode": [
        (Key(dk=256), Config(0, 32, 4, 1)),
        (Key(), Config(0, 32, 2, 1)),
    ],
}


def padded(size: int) -> int:
    """The tile that holds a head of `size` columns."""
    return next(s for s in SIZES if s >= size)


def config(kernel: str, *, dk: int, dv: int, n: int, bits: int, arch: int) -> Config:
    """The table's entry for a kernel; blocks are no wider than the padded head."""
    key = Key(padded(dk), padded(dv), min(n, 4), bits, arch)
    c = next(entry for pattern, entry in TABLE[kernel] if pattern.matches(key))
    return c._replace(block_k=min(c.block_k, padded(dk)), block_v=min(c.block_v, padded(dv)))
