"""What fuzzing shares: values and bytes that a reader may meet, and the one property.

A reader takes what it is given, and then certain things hold, or it raises UserError with a message a person can read.
Nothing else: no other exception, no endless computing, no gigabyte of memory. Both outcomes are counted, so that it is
seen that both happen.
"""

from __future__ import annotations

import copy
import json
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from titan_dp.errors import UserError

LONGEST_MESSAGE = 20_000
"""Characters: a configuration with dozens of mistakes lists them all, a line each."""
LONGEST_LINE = 1500
_SECONDS = 20.0
"""Of this process's own computing, a thousand times what a case takes: only what would go on and on exceeds it."""
_MEMORY = 2**30

Check = Callable[[Any], None]


@dataclass(frozen=True)
class Target:
    """A reader under test.

    `prepare` makes what it needs in a folder of its own and returns cases, and the check of one case; `share` is that of all
    cases.
    """

    name: str
    share: int
    prepare: Callable[[Path], tuple[st.SearchStrategy[Any], Check]]


@dataclass
class Counts:
    accepted: int = 0
    refused: int = 0
    slowest: float = 0.0
    """Seconds of computing of the slowest case."""

    @property
    def cases(self) -> int:
        return self.accepted + self.refused


def fuzz(target: Target, folder: Path, cases: int, *, seeds: Iterator[int] | None = None) -> Counts:
    """Try so many cases; without `seeds` always the same ones. The first that breaks the property is made small and raised."""
    counts = Counts()
    strategy, check = target.prepare(folder)

    def one(case: Any) -> None:
        started = time.process_time()
        accepted = _is_taken(check, case)
        took = time.process_time() - started
        assert took < _SECONDS, f"{took:.1f} s for one case"
        counts.slowest = max(counts.slowest, took)
        counts.accepted += accepted
        counts.refused += not accepted

    with limited_memory():
        while counts.cases < cases:
            rounds = settings(
                max_examples=min(2000, cases - counts.cases),
                derandomize=seeds is None,
                database=None,
                deadline=None,
                phases=[Phase.generate, Phase.shrink],
                suppress_health_check=list(HealthCheck),
            )
            before = counts.cases

            @given(strategy)
            def test(case: Any) -> None:
                one(case)

            rounds(test if seeds is None else seed(next(seeds))(test))()
            if seeds is None or counts.cases == before:  # the same again, or nothing left to try
                break
    return counts


def _is_taken(check: Check, case: Any) -> bool:
    try:
        check(case)
    except UserError as error:
        message = str(error)
        assert 10 < len(message) < LONGEST_MESSAGE, f"a message of {len(message):,} characters"
        assert max(map(len, message.split("\n"))) < LONGEST_LINE, (
            f"a line of {max(map(len, message.splitlines())):,} characters"
        )
        return False
    return True


@contextmanager
def limited_memory() -> Iterator[None]:
    """Inside, this process gets no more than another GiB of address space, so that a giant allocation is an error."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


# -- what a reader may meet -----------------------------------------------------------------------------------------------

NAMES = ["", "..", "../up", "/etc/passwd", "a/b", "a\x00b", "a\nb", "n" * 300, "\ud800", "~", "-rf"]
NUMBERS = [-1, 0, 1, 2, 2**31, 2**32, 2**62, 2**63, 2**64, -(2**63), 10**30, 10**400, 0.5, -0.0, 1e308, 5e-324]
NOT_FINITE = [float("inf"), float("-inf"), float("nan")]
_CHUNKS = [b"\x00", b"\xff\xfe", b"[" * 20_000, b"{" * 3000, b"(" * 900, b"9" * 5000, b"0x" + b"f" * 5000, b"NaN", b"1e999"]
_CHUNKS += b'../ \n " \'\'\' """ # = , \r\n null - \xf0\x9f\x92\xa9 PK\x03\x04 \x80\x04'.split(b" ")

_NESTED: list[Any] = [[], {}, [1, 2], [None], [[]], {"": 1}, [{"a": [1]}], {"a": {"b": {"c": []}}}, ["x"] * 50]

scalars = st.sampled_from([*NAMES, *NUMBERS, *NOT_FINITE, None, True, False]) | st.integers() | st.text(max_size=9)
values = scalars | st.sampled_from(_NESTED)


@st.composite
def mutated_bytes(draw: st.DrawFn, raw: bytes, head: int | None = None) -> bytes:
    """`raw` with one to three changes: flipped, cut, put in twice, overwritten; most of them in the first `head` bytes."""
    changed = bytearray(raw)
    for _ in range(draw(st.integers(1, 3))):
        size = len(changed) if head is None or draw(st.integers(0, 3)) == 0 else min(head, len(changed))
        at = draw(st.integers(0, max(0, size - 1)))
        match draw(st.sampled_from(["flip", "byte", "cut", "drop", "repeat", "insert", "number"])):
            case "flip" if changed:
                changed[at] ^= 1 << draw(st.integers(0, 7))
            case "byte" if changed:
                changed[at] = draw(st.integers(0, 255))
            case "cut":
                del changed[at:]
            case "drop":
                del changed[at : at + draw(st.integers(1, 16))]
            case "repeat":
                changed[at:at] = changed[at : at + draw(st.integers(1, 64))]
            case "number":
                changed[at : at + 8] = draw(st.sampled_from([0, 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1])).to_bytes(8, "little")
            case _:
                changed[at:at] = draw(st.sampled_from(_CHUNKS) | st.binary(max_size=12))
    return bytes(changed)


@st.composite
def mutated_json(draw: st.DrawFn, original: Any, alternatives: Any = values) -> bytes:
    """JSON text of `original` with up to three entries replaced, taken away, renamed or doubled; sometimes bytes changed."""
    value = copy.deepcopy(original)
    for _ in range(draw(st.integers(0, 3))):
        where = list(_places(value))
        if not where:
            break
        holder, key = where[draw(st.integers(0, len(where) - 1))]
        match draw(st.sampled_from(["set", "set", "set", "shift", "delete", "rename", "double"])):
            case "set":
                holder[key] = copy.deepcopy(draw(alternatives))
            case "shift" if isinstance(holder[key], int | float):
                holder[key] += draw(st.sampled_from([-1, 1, 2**32, 2**63, 0.5]))
            case "delete":
                del holder[key]
            case "rename" if isinstance(holder, dict):
                holder[draw(st.text(max_size=8))] = holder.pop(key)
            case "double" if isinstance(holder, list):
                holder.insert(0, copy.deepcopy(holder[key]))
    text = json.dumps(value)
    if draw(st.integers(0, 7)) == 0:  # a name twice
        key = draw(st.sampled_from(sorted(_keys(original)) or ["x"]))
        text = text.replace("{", f"{{{json.dumps(key)}: {json.dumps(draw(scalars))}, ", 1)
    raw = text.encode()
    return draw(mutated_bytes(raw)) if draw(st.integers(0, 7)) == 0 else raw


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key or index) in `value`."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def _keys(value: Any) -> set[str]:
    return {key for holder, key in _places(value) if isinstance(holder, dict)}
