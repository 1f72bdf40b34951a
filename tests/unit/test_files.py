"""What is written as JSON is JSON, which has no word for NaN."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import titan_dp
from titan_dp.errors import RunError, explained
from titan_dp.files import make_folder, to_json, write_json
from titan_dp.output import write_csv


def refuse(word: str) -> None:
    raise AssertionError(f"{word} is no JSON")


def test_numbers_that_are_not_finite_are_null_at_any_depth(tmp_path: Path) -> None:
    value = {"a": [1.5, math.nan, {"b": (-math.inf, np.float64("nan"))}], "c": "NaN", "d": 3}
    write_json(tmp_path / "x.json", value)
    read = json.loads((tmp_path / "x.json").read_text(), parse_constant=refuse)
    assert read == {"a": [1.5, None, {"b": [None, None]}], "c": "NaN", "d": 3}


def test_what_a_converter_makes_of_other_objects_is_written_the_same_way() -> None:
    assert to_json({"x": object()}, default=lambda other: [math.inf, 1]) == '{"x": [null, 1]}'


def test_nothing_else_in_the_package_writes_json(root: Path) -> None:
    """A hash of JSON is not read by anybody, and answers.py leaves out what is not finite."""
    lines = [
        f"{path.relative_to(root)}: {line.strip()}"
        for path in sorted((root / "titan_dp").rglob("*.py"))
        if path.name != "files.py"
        for line in path.read_text().splitlines()
        if re.search(r"json\.dumps?\(", line) and "hexdigest" not in line and "allow_nan=False" not in line
    ]
    assert lines == []


@pytest.mark.parametrize(
    "write", [make_folder, lambda path: write_json(path, {}), lambda path: write_csv(path / "x.csv", [], [])]
)
def test_a_path_where_nothing_can_be_made_is_one_sentence_and_another_try_may_succeed(write: Callable[[Path], None]) -> None:
    with pytest.raises(OSError, match="/proc/x") as refused:
        write(Path("/proc/x"))
    known = explained(refused.value)
    assert isinstance(known, RunError)
    assert re.fullmatch(r"/proc/x cannot be written \(No such file or directory\); choose another folder", str(known))


def test_folders_are_made_by_the_function_that_explains_what_goes_wrong() -> None:
    """Except where a failure is handled: inside a run folder (faults/), and beside a command's output."""
    package = Path(titan_dp.__file__).parent
    own = {str(path.relative_to(package)) for path in package.rglob("*.py") if "mkdir(parents=True" in path.read_text()}
    assert own == {"files.py", "faults/watchdog.py", "faults/profiling.py", "launch/torchrun.py"}
