"""What all evaluations share: results that are known again, go on after a kill and overwrite nothing; and what is refused."""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from rich.console import Console

from tests.pretrained import Make, evaluate, save_checkpoint, write_documents
from titan_dp.cli import dispatch
from titan_dp.distributed import World
from titan_dp.errors import UserError
from titan_dp.evals.session import Result, Session, batched
from titan_dp.inference.pretrained import open_source

TEXTS = ["The fox sees the dog. " * n for n in (3, 1, 9, 4, 5)] + ["a", "", "Größe"]
BESIDE = {
    "perplexity": set(),
    "length-extrapolation": {"length-extrapolation.csv", "length-extrapolation.png"},
    "effective-rank": {f"effective-rank-tiny-step-00000007{e}" for e in (".csv.gz", ".png", "-norm.png", "-steps.png")},
    "recall": {"recall.png", "recall-tiny-step-00000007.csv"},
    "lm-eval": {"lm-eval-devils_dictionary-tiny-step-00000007-samples.jsonl"},
}
kinds = pytest.mark.parametrize("kind", [kind for kind in BESIDE if kind != "lm-eval" or find_spec("lm_eval")])
WORK = {  # what computes
    "perplexity": "titan_dp.evals.perplexity.row_losses",
    "length-extrapolation": "titan_dp.evals.length_extrapolation.token_losses",
    "effective-rank": "titan_dp.evals.effective_rank._look",
    "recall": "titan_dp.evals.recall.score",
    "lm-eval": "titan_dp.evals.lm_eval_model.row_losses",
}
LOST = {"effective-rank": 1}  # calls before a kill that are made again: it keeps what it has after all layers of a segment
Measure = Callable[..., int]


class Work:
    """Counts the calls of what computes an evaluation; at call number `stop_at` the evaluation is killed."""

    def __init__(self, kind: str, stop_at: int | None) -> None:
        module, _, name = WORK[kind].rpartition(".")
        self.function, self.calls, self.stop_at = getattr(import_module(module), name), 0, stop_at

    def __call__(self, *args: Any, **kw: Any) -> Any:
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        self.calls += 1
        return self.function(*args, **kw)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("text") / "documents.jsonl", TEXTS)


@pytest.fixture(scope="module")
def measure(checkpoint: Path, text: Path, root: Path) -> Measure:
    """Runs a small evaluation of a kind into a folder; returns how often what computes was called."""
    task = ["--tasks", "devils_dictionary", "--include-path", root / "docs/lm_eval_tasks", "--limit", 9, "--batch-size", 2]
    words: dict[str, list[Any]] = {
        "perplexity": ["--text", text, "--batch-size", 1, "--context", 16],
        "length-extrapolation": ["--text", text, "--max-length", 60, "--batch-size", 2],
        "effective-rank": ["--text", text, "--segment", 128],
        "recall": ["--pairs", 3, 6, "--sequences", 10, "--batch-size", 4],
        "lm-eval": [*task, "--log-samples"],
    }

    def measure(kind: str, out: Path, *more: str, stop_at: int | None = None) -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(WORK[kind], work := Work(kind, stop_at))
            evaluate(kind, checkpoint, out, *words[kind], *more)
        return work.calls

    return measure


@pytest.fixture(scope="module")
def whole(measure: Measure, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, int]]:
    """The folder of a finished evaluation of a kind, and the calls it took."""
    folder = tmp_path_factory.mktemp("whole")
    return functools.cache(lambda kind: (folder / kind, measure(kind, folder / kind)))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def results(folder: Path) -> Any:
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())["results"]


@kinds
def test_a_killed_evaluation_goes_on_where_it_was(
    kind: str, whole: Callable[[str], tuple[Path, int]], measure: Measure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, needed = whole(kind)
    monkeypatch.setattr("titan_dp.evals.session._SAVE_SECONDS", -1)
    with pytest.raises(KeyboardInterrupt):
        measure(kind, tmp_path, stop_at=needed - 1)
    assert not list(tmp_path.glob("*.json"))
    assert measure(kind, tmp_path) == 1 + LOST.get(kind, 0)
    assert results(tmp_path) == results(expected)
    assert names(tmp_path) == names(expected), "what was kept is gone"


@kinds
def test_a_finished_evaluation_is_shown_again_without_computing(
    kind: str, whole: Callable[[str], tuple[Path, int]], measure: Measure, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = whole(kind)
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {name for name in found if not name.endswith(".json")} == BESIDE[kind]
    assert all(raw.startswith(b"\x89PNG") for name, raw in found.items() if name.endswith(".png"))
    own = [path for path in folder.iterdir() if "tiny-step" in path.name]  # the others compare checkpoints
    written = [path.stat().st_mtime_ns for path in own]
    assert measure(kind, folder) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in found), "every file is named"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == found
    assert [path.stat().st_mtime_ns for path in own] == written
    with pytest.raises(UserError, match="holds results of other dtype; give --out another folder"):
        measure(kind, folder, "--dtype", "bfloat16")


@pytest.mark.parametrize("kind", ["length-extrapolation", "effective-rank", "recall"])
def test_figures_of_a_finished_evaluation_are_drawn_in_another_format_without_computing(
    kind: str, whole: Callable[[str], tuple[Path, int]], measure: Measure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("titan_dp.evals.effective_rank._ROWS", 0)  # as if there were more heads than a page holds
    folder = Path(shutil.copytree(whole(kind)[0], tmp_path / kind))
    drawn = [path for path in folder.iterdir() if path.suffix == ".png"]
    assert measure(kind, folder, "--format", "svg") == 0
    assert {path.stem for path in folder.glob("*.svg")} == {path.stem for path in drawn}
    if kind == "effective-rank":
        assert "effective rank, mean of neighbouring tokens</text>" in next(folder.glob("*07.svg")).read_text()
        next(folder.glob("*-norm.png")).unlink()
        next(folder.glob("*.csv.gz")).unlink()
        with pytest.raises(UserError, match="is gone, from which figures are drawn; measure again with --overwrite"):
            measure(kind, folder)


@kinds
def test_a_file_that_no_evaluation_wrote_is_never_overwritten(kind: str, measure: Measure, tmp_path: Path) -> None:
    for i, name in enumerate(sorted(BESIDE[kind])):
        out = tmp_path / str(i)
        out.mkdir()
        (out / name).write_text("ours")
        with pytest.raises(UserError, match=f"{name} was not written by an evaluation, which would overwrite it"):
            measure(kind, out, *["--overwrite"] * (i % 2))
        assert names(out) == {name}


@pytest.mark.parametrize("kind", ["length-extrapolation", "effective-rank", "recall"])
def test_without_matplotlib_nothing_is_begun(
    kind: str, measure: Measure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("titan_dp.errors.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"a plot needs matplotlib: pip install matplotlib"):
        measure(kind, tmp_path / "out")
    assert not (tmp_path / "out").exists()


TEXT = ["--text", "TEXT"]
PERPLEXITY, LENGTH = ["perplexity", "ONE", *TEXT], ["length-extrapolation", "ONE", *TEXT]
RANK, RECALL, HARNESS = ["effective-rank", "ONE"], ["recall", "ONE"], ["lm-eval", "ONE", "--tasks", "piqa"]
REFUSED = [
    ([*PERPLEXITY, "--stride", "40"], "--stride 40 is more than --context 32"),
    ([*PERPLEXITY, "--state", "carry", "--stride", "5"], "--stride 5 does not go with --state carry"),
    ([*PERPLEXITY, "--state", "carry", "--concatenate"], "--concatenate does not go with --state carry"),
    (["perplexity", "ONE", "--text", "EMPTY", "--no-bos"], "nothing to score"),
    (["perplexity", "ONE"], "give exactly one of --shards FOLDER, --text FILE... and --hf-dataset NAME"),
    (["perplexity", "ONE", "--shards", "x", "--no-bos"], "--no-bos does not go with --shards"),
    ([*LENGTH, "--max-length", "1"], "--max-length is 1; give at least 2"),
    ([*LENGTH, "--max-length", "1000"], "--max-length is 1000, but the text has .* tokens, not one full.*--max-length"),
    (["length-extrapolation", "ONE", "ONE", *TEXT], "both called 'tiny-step-00000007'"),
    ([*RANK, "--text", "EMPTY", "--no-bos"], "there is nothing to look at: the text has no tokens"),
    (["effective-rank", "ATTENTION", *TEXT], "no DeltaProduct or GLA layer"),
    ([*RECALL, "--pairs", "129"], "--pairs 129 needs 129 keys .* 256 ids .* at most 128 pairs"),
    ([*RECALL, "--pairs", "128", "--length", "2000"], "needs 129 keys .* at most 127 pairs"),
    ([*RECALL, "--pairs", "4", "8", "--length", "32"], "--length 32 is too short for 8 pairs .* at least 33"),
    ([*HARNESS, "--stock-bos", "--no-add-bos"], "--stock-bos and --add-bos .* give one of them"),
    ([*HARNESS, "--include-path", "TEXT"], "is not a folder"),
]


@pytest.mark.parametrize(("argv", "message"), REFUSED, ids=[" ".join(argv) for argv, _ in REFUSED])
def test_what_does_not_fit_is_refused_before_anything_is_written(
    argv: list[str], message: str, checkpoint_of: Make, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    if argv[0] == "lm-eval":
        pytest.importorskip("lm_eval")
    empty, attention = write_documents(tmp_path / "empty.jsonl", [""]), checkpoint_of(mixer="attention")
    places = {"ONE": checkpoint, "ATTENTION": attention, "TEXT": text, "EMPTY": empty}
    with pytest.raises(UserError, match=message):
        dispatch(["evaluate", *(str(places.get(word, word)) for word in argv), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


NUMBERS = {
    "perplexity": "context stride batch-size max-documents",
    "length-extrapolation": "max-length sequences segment batch-size smooth",
    "effective-rank": "max-length every segment",
    "recall": "pairs queries length sequences batch-size seed",
    "lm-eval": "limit batch-size max-length num-fewshot",
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_numbers_have_bounds(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    for option in NUMBERS[kind].split():
        below = -1 if option in ("seed", "num-fewshot") else 0
        with pytest.raises(SystemExit) as left:
            dispatch(["evaluate", kind, "ONE", f"--{option}={below}"])
        assert left.value.code == 2
        assert f"argument --{option}: '{below}'" in capsys.readouterr().err


# -- one result ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "run").parents[1]


@pytest.fixture
def open_result(run_folder: Path, tmp_path: Path) -> Callable[..., Result]:
    args = argparse.Namespace(out=tmp_path / "results", overwrite=False, dtype="float32", backend="auto")
    session = Session(args, World(0, 1, torch.device("cpu")), Console(quiet=True))

    def open_result(path: Path = run_folder, text: str = "a.txt", sha256: str = "1", **changes: object) -> Result:
        vars(args).update(changes)
        return Result(session, "length", open_source(path), {"texts": {"file": text, "sha256": sha256}})

    return open_result


def test_a_result_is_known_again_by_another_path_and_after_moving_the_run(
    open_result: Callable[..., Result], run_folder: Path, tmp_path: Path
) -> None:
    result = open_result()
    assert result.results == {}
    result.finish({"loss": 1.5})
    content = json.loads(result.path.read_text())
    assert (content["checkpoint"]["step"], content["made_on"]["device"]) == (7, "cpu")
    assert content["checkpoint"]["manifest_sha256"]
    moved = run_folder.rename(tmp_path / "elsewhere")
    relative = Path(os.path.relpath(moved))
    assert open_result(moved, text="/other/a.txt").results == open_result(relative).results == {"loss": 1.5}


@pytest.mark.parametrize("change", [{"backend": "recurrent"}, {"dtype": "bfloat16"}, {"sha256": "2"}])
def test_results_of_other_settings_are_not_overwritten_unless_asked(open_result: Callable[..., Result], change: dict) -> None:
    open_result().finish({"loss": 1.5})
    with pytest.raises(UserError, match=r"holds results of other \w+; give --out another folder to keep both, or --overwrite"):
        open_result(**change)
    assert open_result(**change, overwrite=True).results == {}


def test_what_was_kept_is_taken_unless_it_is_of_other_settings_or_damaged(open_result: Callable[..., Result]) -> None:
    result = open_result()
    result.keep({"done": 3}, now=True)
    assert open_result().resume() == {"done": 3}
    assert open_result(dtype="bfloat16").resume() == {}
    for path in result.path.parent.glob(".*.npz"):
        path.write_bytes(b"PK\x03\x04 cut off")
    again = open_result(dtype="float32")
    assert again.resume() == {}
    again.finish({"loss": 1.5})
    assert names(again.path.parent) == {"length-run-step-00000007.json"}


def test_a_file_that_is_no_result_is_left_alone(open_result: Callable[..., Result]) -> None:
    path = open_result().path
    path.parent.mkdir()
    path.write_text("[1, 2]")
    with pytest.raises(UserError, match="is no result of an evaluation"):
        open_result(overwrite=True)
    assert path.read_text() == "[1, 2]"


@pytest.mark.parametrize("kept", [{}, {"done": 3, "sum": np.full(2, 9.0)}, {"batches_done": 2, "sum": np.array([6.0, 4.0])}])
def test_batches_are_measured_once_after_those_that_were_kept(open_result: Callable[..., Result], kept: dict[str, Any]) -> None:
    """What an older version of titan_dp kept begins again."""
    measured: list[list[int]] = []

    def measure(batch: list[int]) -> dict[str, np.ndarray]:
        measured.append(batch)
        return {"sum": np.array([sum(batch), len(batch)], dtype=float)}

    batches = list(batched(range(7), 2))
    assert batches == [[0, 1], [2, 3], [4, 5], [6]]
    if kept:
        open_result().keep(kept, now=True)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sums = open_result().sums(batches, measure, {"sum": np.zeros(2)}, total=4)
    finally:
        dist.destroy_process_group()
    assert measured == batches[2 if "batches_done" in kept else 0 :]
    assert sums["sum"].tolist() == [21, 7]
