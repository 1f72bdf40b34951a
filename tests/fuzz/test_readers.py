"""The short form of benchmarks/fuzz.py: the same hundred cases of every reader, or a few hundred, each time."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.harness import fuzz
from tests.fuzz.targets import TARGETS

CASES = 1000


@pytest.mark.parametrize("name", TARGETS)
def test_whatever_is_read_is_taken_or_refused_in_a_sentence(name: str, tmp_path: Path) -> None:
    target = TARGETS[name]
    counts = fuzz(target, tmp_path, max(100, CASES * target.share // 100))
    assert counts.accepted, "not one case was good: the original is not"
    assert counts.refused
