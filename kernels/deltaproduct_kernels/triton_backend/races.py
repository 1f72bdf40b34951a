"""Find in Triton's GPU code the copies that overwrite what an unfinished matrix product still reads.

On Hopper a product (`warp_group_dot`) runs on while the program goes on, and reads its operands from shared memory until a
`warp_group_dot_wait` says that it has ended. A pipelined loop copies the tiles of iteration i + num_stages - 1 while the
products of iteration i may still run, so such a tile needs num_stages buffers. Triton 3.6 and 3.7 give it one fewer where the
same tile is also used in registers, or by a product of the older kind: the copy then overwrites what is being read, and the
result depends on which is faster. Seen with num_stages 2 and 3; with 1 nothing is copied ahead.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

_DEFINITION = re.compile(r"\s*(%[\w$.-]+)(?::\d+)?\s*=\s*(.*)")
_VIEW = re.compile(r"ttg\.memdesc_\w+\s+(%[\w$.-]+)")
_BUFFERS = re.compile(r"ttg\.local_alloc\b.*?!ttg\.memdesc<(\d+)x([\dx]+)")
_PRODUCT = re.compile(r"ttng\.warp_group_dot\s+(%[\w$.-]+)(?:#\d+)?\s*,\s*(%[\w$.-]+)")
_COPY = re.compile(r"(?:ttg\.async_copy_global_to_local|ttg\.local_store)\s+%[\w$.#-]+\s*,\s*(%[\w$.-]+)")
_WAIT = re.compile(r"ttng\.warp_group_dot_wait\b.*pendings = (\d+)")


class Race(NamedTuple):
    """An operand of an unfinished product that the loop copies into."""

    tile: str
    """Its shape, as in the code: '64x64'."""
    buffers: int
    wanted: int


def races(ttgir: str, stages: int) -> list[Race]:
    """Of one kernel; `ttgir` as in `CompiledKernel.asm`, `stages` its num_stages."""
    lines = ttgir.splitlines()
    values = {found[1]: found[2] for line in lines if (found := _DEFINITION.match(line))}

    def allocation(name: str) -> str:
        while view := _VIEW.match(values.get(name, "")):
            name = str(view[1])
        return name

    hits: set[Race] = set()
    for body in _loop_bodies(lines):
        if not any(int(wait[1]) for line in body if (wait := _WAIT.search(line))):
            continue
        copied = {allocation(copy[1]) for line in body if (copy := _COPY.search(line))}
        for line in body:
            product = _PRODUCT.search(line)
            if product is None or "isAsync = true" not in line:
                continue
            for name in map(allocation, product.groups()):
                buffers = _BUFFERS.match(values.get(name, ""))
                if buffers and name in copied and int(buffers[1]) < stages:
                    hits.add(Race(buffers[2].strip("x"), int(buffers[1]), stages))
    return sorted(hits)


def _loop_bodies(lines: list[str]) -> Iterator[list[str]]:
    """The lines of every loop without those of loops in it."""
    open_loops: list[tuple[int, list[str]]] = []
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if open_loops and line.lstrip().startswith("}") and indent == open_loops[-1][0]:
            yield open_loops.pop()[1]
        elif "scf.for" in line or "scf.while" in line:
            open_loops.append((indent, []))
        elif open_loops:
            open_loops[-1][1].append(line)
