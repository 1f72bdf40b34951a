"""Results of evaluations: what makes two of them the same, what is kept between runs, and what is never overwritten."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.pretrained import save_checkpoint
from titan_dp.errors import UserError
from titan_dp.evals.session import Report, Session, session
from titan_dp.inference.pretrained import open_source


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def open_report(run_folder: Path, tmp_path: Path) -> Iterator[Callable[..., Report]]:
    args = argparse.Namespace(out=tmp_path / "results", overwrite=False, dtype="float32", backend="auto", checkpoints=[])
    with session(args) as opened:

        def open_report(path: Path = run_folder, text: str = "a.txt", sha256: str = "1", **changes: object) -> Report:
            vars(args).update(changes)
            return opened.report("length", open_source(path), {"texts": {"file": text, "sha256": sha256}})

        open_report.session = opened  # type: ignore[attr-defined]
        yield open_report


def test_a_finished_evaluation_is_known_again_with_its_checkpoints_identity(open_report: Callable[..., Report]) -> None:
    report = open_report()
    assert report.finished is None
    report.finish({"loss": 1.5})
    assert open_report().finished == {"loss": 1.5}
    content = json.loads(report.path.read_text())
    assert content["checkpoint"]["step"] == 7
    assert content["checkpoint"]["manifest_sha256"]
    assert content["made_on"]["device"] in ("cpu", "cuda")


def test_it_is_the_same_by_another_path_and_after_moving_the_run(
    open_report: Callable[..., Report], run_folder: Path, tmp_path: Path
) -> None:
    open_report().finish({"loss": 1.5})
    (tmp_path / "elsewhere").mkdir()
    moved = run_folder.rename(tmp_path / "elsewhere" / "run")
    relative = Path(os.path.relpath(moved))
    assert open_report(moved, text="/other/a.txt").finished == open_report(relative).finished == {"loss": 1.5}


@pytest.mark.parametrize("change", [{"backend": "recurrent"}, {"dtype": "bfloat16"}, {"sha256": "2"}])
def test_results_of_other_settings_are_not_overwritten_unless_asked(open_report: Callable[..., Report], change: dict) -> None:
    open_report().finish({"loss": 1.5})
    with pytest.raises(UserError, match="holds results of other settings or weights; choose another --out, or --overwrite"):
        open_report(**change)
    assert open_report(**change, overwrite=True).finished is None


def test_what_was_kept_is_there_again_and_goes_when_the_result_is_written(open_report: Callable[..., Report]) -> None:
    open_report().keep(now=True, done=3, sums=np.arange(4.0))
    again = open_report()
    assert int(again.resume()["done"]) == 3
    assert again.resume()["sums"].tolist() == [0, 1, 2, 3]
    again.finish({})
    assert [path.name for path in again.folder.iterdir()] == ["length-run-step-00000007.json"]


def test_what_was_kept_for_other_settings_or_is_damaged_is_not_taken(open_report: Callable[..., Report]) -> None:
    report = open_report()
    report.keep(now=True, done=3)
    assert open_report(dtype="bfloat16").resume() == {}
    for path in report.folder.glob(".*.npz"):
        path.write_bytes(b"PK\x03\x04 cut off")
    assert open_report(dtype="float32").resume() == {}


def test_a_file_that_is_no_result_is_left_alone(open_report: Callable[..., Report]) -> None:
    path = open_report().path
    path.parent.mkdir()
    path.write_text("[1, 2]")
    with pytest.raises(UserError, match="is no result of an evaluation"):
        open_report()
    assert path.read_text() == "[1, 2]"


def test_two_checkpoints_of_one_name_cannot_be_compared_in_one_folder(
    open_report: Callable[..., Report], run_folder: Path, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path / "other" / "run")
    opened: Session = open_report.session  # type: ignore[attr-defined]
    opened.args.checkpoints = [run_folder, tmp_path / "other" / "run"]
    with pytest.raises(UserError, match="are both called 'run-step-00000007'"):
        opened.check_labels()
