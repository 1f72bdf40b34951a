"""The contract of exits: every cause in the table of docs/reliability.md names the test that holds its code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from titan_dp.errors import EXIT_STOPPED

ROWS = re.compile(
    r"^\| (?P<cause>[^|]+) \| (?P<code>[^|]+) \| [^|]+ \| `(?P<file>tests/\S+\.py)::(?P<test>\w+)` \|$", re.MULTILINE
)
TABLE = ROWS.findall((Path(__file__).parents[2] / "docs/reliability.md").read_text())


def test_the_table_knows_every_code_that_a_scheduler_acts_on() -> None:
    assert {code for _, code, _, _ in TABLE} >= {"0", "1", "2", str(EXIT_STOPPED)}


@pytest.mark.parametrize(("cause", "code", "file", "test"), TABLE, ids=[cause for cause, *_ in TABLE])
def test_a_cause_and_its_code_are_held_by_a_test(cause: str, code: str, file: str, test: str, root: Path) -> None:
    assert f"\ndef {test}(" in (root / file).read_text(), f"{file} has no {test}, which is to hold code {code} of {cause!r}"
