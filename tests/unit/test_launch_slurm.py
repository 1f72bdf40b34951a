"""What `--launch slurm` submits, with an sbatch and a squeue that only write down what they are told.

What SLURM makes of it is tested in tests/slurm/test_slurm.py, where there is one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.test_sweep import BRANCHES, STUDY, Run, sweep, train  # noqa: F401  # a fixture

Submit = Callable[..., list[tuple[list[str], list[str]]]]


@pytest.fixture
def submit(sweep: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Submit:  # noqa: F811
    """submit(active): launch when the arrays of these numbers are with SLURM; options and cells of each array submitted."""
    programs = tmp_path / "bin"
    programs.mkdir()
    count = "n=$(($(cat NUMBER 2>/dev/null || echo 100) + 1)); echo $n > NUMBER; echo $n"
    for name, script in {"sbatch": 'echo "$@" >> SUBMITTED; ' + count, "squeue": "cat ACTIVE"}.items():
        (programs / name).write_text("#!/bin/sh\n" + script.replace("NUMBER", str(tmp_path / "number")))
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=":")

    def run(*active: str) -> list[tuple[list[str], list[str]]]:
        Path("ACTIVE").write_text("".join(f"{job}\n" for job in active))
        Path("SUBMITTED").write_text("")
        answer = sweep(BRANCHES, "--launch", "slurm")
        assert answer.code == 0, answer.err
        Path("said").write_text(answer.out)
        lines = [line.split() for line in Path("SUBMITTED").read_text().splitlines()]
        return [(words[1:-2], [Path(line).parent.name for line in Path(words[-1]).read_text().split()]) for words in lines]

    return run


def test_branches_are_an_array_that_waits_for_the_array_of_their_trunks(submit: Submit) -> None:
    assert submit() == [
        (["--array=0-0%1"], ["steps100"]),
        (["--array=0-0%1", "--dependency=afterany:101"], ["steps50"]),
    ]
    assert "array 102: 1 cell, 1 at once after 101" in Path("said").read_text()
    assert submit("101 0", "102 0") == []
    assert submit("101 0") == [(["--array=0-0%1", "--dependency=afterany:101"], ["steps50"])], "somebody has cancelled 102"


def test_a_branch_whose_trunk_has_saved_what_it_needs_waits_for_nothing(submit: Submit) -> None:
    checkpoint = STUDY / "steps100/checkpoint/step-00000040"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").touch()
    assert submit() == [(["--array=0-1%1"], ["steps50", "steps100"])]


def test_a_branch_whose_trunk_will_not_save_what_it_needs_is_not_submitted(submit: Submit) -> None:
    submit()
    train("steps100", "finished")
    assert json.loads((STUDY / "slurm.json").read_text())[0]["cells"] == ["steps100"]
    assert submit() == []
    assert "1 cell not submitted: what they branch from is not there" in Path("said").read_text()
