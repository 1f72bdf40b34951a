"""What all evaluations share: results that are known again, go on after a kill and overwrite nothing; and what is refused."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from rich.console import Console

from tests.pretrained import evaluate, save_checkpoint, write_documents
from titan_dp.cli import dispatch
from titan_dp.distributed import World
from titan_dp.errors import UserError
from titan_dp.evals.session import Result, Session
from titan_dp.inference.pretrained import open_source

TEXTS = ["The fox sees the dog. " * n for n in (3, 1, 9, 4, 5)] + ["a", "", "Größe"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("text") / "documents.jsonl", TEXTS)


def words(kind: str, text: Path, root: Path) -> list[str]:
    """A small evaluation of each kind."""
    task = ["--tasks", "devils_dictionary", "--include-path", root / "docs/lm_eval_tasks", "--limit", 9, "--batch-size", 2]
    options: dict[str, list[Any]] = {
        "perplexity": ["--text", text, "--batch-size", 1, "--context", 16],
        "length-extrapolation": ["--text", text, "--max-length", 60, "--batch-size", 2],
        "effective-rank": ["--text", text, "--segment", 128],
        "recall": ["--pairs", 3, 6, "--sequences", 10, "--batch-size", 4],
        "lm-eval": [*task, "--log-samples"],
    }
    return list(map(str, options[kind]))


BESIDE = {
    "perplexity": set(),
    "length-extrapolation": {"length-extrapolation.csv", "length-extrapolation.png"},
    "effective-rank": {f"effective-rank-tiny-step-00000007{e}" for e in (".csv.gz", ".png", "-norm.png", "-steps.png")},
    "recall": {"recall.png", "recall-tiny-step-00000007.csv"},
    "lm-eval": {"lm-eval-devils_dictionary-tiny-step-00000007-samples.jsonl"},
}
kinds = pytest.mark.parametrize("kind", [kind for kind in BESIDE if kind != "lm-eval" or find_spec("lm_eval")])
# What computes: the function, calls made before a kill, and how many of them are lost (not yet kept) and made again.
WORK = {
    "perplexity": ("titan_dp.evals.perplexity.token_losses", 19, 3),
    "length-extrapolation": ("titan_dp.evals.length_extrapolation.token_losses", 2, 0),
    "effective-rank": ("titan_dp.evals.effective_rank._look", 5, 1),
    "recall": ("titan_dp.evals.recall.score", 4, 0),
    "lm-eval": ("titan_dp.evals.lm_eval_model.token_losses", 3, 0),
}


@pytest.fixture(scope="module")
def whole(checkpoint: Path, text: Path, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a finished evaluation of each kind."""
    folder, done = tmp_path_factory.mktemp("whole"), set[str]()

    def whole(kind: str) -> Path:
        if kind not in done:
            evaluate(kind, checkpoint, folder / kind, *words(kind, text, root))
            done.add(kind)
        return folder / kind

    return whole


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def results(folder: Path) -> Any:
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())["results"]


@kinds
def test_a_killed_evaluation_goes_on_where_it_was(
    kind: str,
    whole: Callable[[str], Path],
    checkpoint: Path,
    text: Path,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name, before_kill, lost = WORK[kind]
    expected = results(whole(kind))
    module, _, function = name.rpartition(".")
    work, calls = getattr(__import__(module, fromlist=[function]), function), 0

    def counted(*args: Any, **kw: Any) -> Any:
        nonlocal calls
        if calls == stop_at:
            raise KeyboardInterrupt
        calls += 1
        return work(*args, **kw)

    monkeypatch.setattr("titan_dp.evals.session._SAVE_SECONDS", -1)
    monkeypatch.setattr(name, counted)
    stop_at = -1
    evaluate(kind, checkpoint, tmp_path / "all", *words(kind, text, root))
    needed, calls, stop_at = calls, 0, before_kill
    with pytest.raises(KeyboardInterrupt):
        evaluate(kind, checkpoint, tmp_path / "parts", *words(kind, text, root))
    assert not list((tmp_path / "parts").glob("*.json"))
    stop_at = -1
    evaluate(kind, checkpoint, tmp_path / "parts", *words(kind, text, root))
    assert results(tmp_path / "parts") == results(tmp_path / "all") == expected
    assert calls == needed + lost
    assert names(tmp_path / "parts") == names(whole(kind)), "what was kept is gone"


@kinds
def test_a_finished_evaluation_is_shown_again_without_computing(
    kind: str,
    whole: Callable[[str], Path],
    checkpoint: Path,
    text: Path,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = whole(kind)
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {name for name in found if not name.endswith(".json")} == BESIDE[kind]
    assert all(raw.startswith(b"\x89PNG") for name, raw in found.items() if name.endswith(".png"))
    monkeypatch.setattr(WORK[kind][0], None)
    evaluate(kind, checkpoint, folder, *words(kind, text, root))
    shown = capsys.readouterr().out
    assert all(name in shown for name in found), "every file is named"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == found
    with pytest.raises(UserError, match="other settings"):
        evaluate(kind, checkpoint, folder, *words(kind, text, root), "--dtype", "bfloat16")


@kinds
def test_a_file_that_no_evaluation_wrote_is_never_overwritten(
    kind: str, checkpoint: Path, text: Path, root: Path, tmp_path: Path
) -> None:
    for i, name in enumerate(BESIDE[kind]):
        out = tmp_path / str(i)
        out.mkdir()
        (out / name).write_text("ours")
        for other in ([], ["--overwrite"]):
            with pytest.raises(UserError, match=f"{name} was not written by an evaluation, which would overwrite it"):
                evaluate(kind, checkpoint, out, *words(kind, text, root), *other)
        assert names(out) == {name}


TEXT = ["--text", "TEXT"]
PERPLEXITY, LENGTH = ["perplexity", "ONE", *TEXT], ["length-extrapolation", "ONE", *TEXT]
RANK, RECALL, HARNESS = ["effective-rank", "ONE"], ["recall", "ONE"], ["lm-eval", "ONE", "--tasks", "piqa"]
REFUSED = [
    ([*PERPLEXITY, "--stride", "40"], "--stride 40 is more than --context 32"),
    ([*PERPLEXITY, "--state", "carry", "--stride", "5"], "--stride 5 does not go with --state carry"),
    ([*PERPLEXITY, "--state", "carry", "--concatenate"], "--concatenate does not go with --state carry"),
    (["perplexity", "ONE", "--text", "EMPTY", "--no-bos"], "there is nothing to score"),
    (["perplexity", "ONE"], "give exactly one of --shards FOLDER, --text FILE... and --hf-dataset NAME"),
    ([*PERPLEXITY, "--shards", "x"], "give exactly one of"),
    (["perplexity", "ONE", "--shards", "x", "--no-bos"], "--no-bos does not go with --shards"),
    ([*LENGTH, "--max-length", "1"], "--max-length is 1; give at least 2"),
    ([*LENGTH, "--max-length", "1000"], "--max-length is 1000, but the text has .* tokens, not one full.*--max-length"),
    (["length-extrapolation", "ONE", "ONE", *TEXT], "both called 'tiny-step-00000007'"),
    ([*RANK, "--text", "EMPTY", "--no-bos"], "there is nothing to look at: the text has no tokens"),
    (["effective-rank", "ATTENTION", *TEXT], "no DeltaProduct or GLA layer"),
    ([*RECALL, "--pairs", "129"], "--pairs 129 needs 129 keys .* 256 ids .* at most 128 pairs"),
    ([*RECALL, "--pairs", "128", "--length", "2000"], "needs 129 keys .* at most 127 pairs"),
    ([*RECALL, "--pairs", "4", "8", "--length", "32"], "--length 32 is too short for 8 pairs .* at least 33"),
    ([*HARNESS, "--stock-bos", "--add-bos"], "--stock-bos and --add-bos .* give one of them"),
    ([*HARNESS, "--stock-bos", "--no-add-bos"], "--stock-bos and --add-bos .* give one of them"),
    ([*HARNESS, "--include-path", "TEXT"], "is not a folder"),
]
NUMBERS = [
    *((PERPLEXITY, f"--{name}", "0") for name in ("context", "stride", "batch-size", "max-documents")),
    *((LENGTH, f"--{name}", "0") for name in ("max-length", "sequences", "segment", "batch-size", "smooth")),
    *(([*RANK, *TEXT], f"--{name}", "0") for name in ("max-length", "every", "segment")),
    *((RECALL, f"--{name}", "0") for name in ("pairs", "queries", "length", "sequences", "batch-size")),
    (RECALL, "--seed", "-1"),
    *((HARNESS, f"--{name}", "0") for name in ("limit", "batch-size", "max-length")),
    (HARNESS, "--num-fewshot", "-1"),
]


def refused(argv: list[str], checkpoint_of: Callable[..., Path], checkpoint: Path, text: Path, tmp_path: Path) -> list[str]:
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    attention = checkpoint_of(mixer="attention")
    places = {"ONE": checkpoint, "ATTENTION": attention, "TEXT": text, "EMPTY": tmp_path / "empty.jsonl"}
    return ["evaluate", *(str(places.get(word, word)) for word in argv), "--out", str(tmp_path / "out")]


@pytest.mark.parametrize(("argv", "message"), REFUSED, ids=[" ".join(argv) for argv, _ in REFUSED])
def test_what_does_not_fit_is_refused_before_anything_is_written(
    argv: list[str], message: str, checkpoint_of: Callable[..., Path], checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    if argv[0] == "lm-eval":
        pytest.importorskip("lm_eval")
    with pytest.raises(UserError, match=message):
        dispatch(refused(argv, checkpoint_of, checkpoint, text, tmp_path))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("argv", "option", "value"), NUMBERS, ids=[f"{argv[0]} {option}" for argv, option, _ in NUMBERS])
def test_numbers_have_bounds(argv: list[str], option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        dispatch(["evaluate", *argv, f"{option}={value}"])
    assert left.value.code == 2
    assert f"argument {option}: '{value}'" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["length-extrapolation", "effective-rank", "recall"])
def test_without_matplotlib_nothing_is_begun(
    kind: str, checkpoint: Path, text: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("titan_dp.output.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"plots need matplotlib: pip install 'titan_dp\[eval\]'"):
        evaluate(kind, checkpoint, tmp_path / "out", *words(kind, text, root))
    assert not (tmp_path / "out").exists()


# -- one result ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "run")
    return tmp_path / "run"


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
    assert content["checkpoint"]["step"] == 7
    assert content["checkpoint"]["manifest_sha256"]
    assert content["made_on"]["device"] in ("cpu", "cuda")
    (tmp_path / "elsewhere").mkdir()
    moved = run_folder.rename(tmp_path / "elsewhere" / "run")
    relative = Path(os.path.relpath(moved))
    assert open_result(moved, text="/other/a.txt").results == open_result(relative).results == {"loss": 1.5}


@pytest.mark.parametrize("change", [{"backend": "recurrent"}, {"dtype": "bfloat16"}, {"sha256": "2"}])
def test_results_of_other_settings_are_not_overwritten_unless_asked(open_result: Callable[..., Result], change: dict) -> None:
    open_result().finish({"loss": 1.5})
    with pytest.raises(UserError, match="holds results of other settings or weights; choose another --out, or --overwrite"):
        open_result(**change)
    assert open_result(**change, overwrite=True).results == {}


def test_what_was_kept_is_taken_unless_it_is_of_other_settings_or_damaged(open_result: Callable[..., Result]) -> None:
    open_result().keep({"done": 3, "sums": np.arange(4.0)}, now=True)
    again = open_result()
    assert int(again.resume()["done"]) == 3
    assert again.resume()["sums"].tolist() == [0, 1, 2, 3]
    assert open_result(dtype="bfloat16").resume() == {}
    for path in again.path.parent.glob(".*.npz"):
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


def test_units_are_measured_in_batches_of_their_kind(open_result: Callable[..., Result]) -> None:
    batches: list[list[int]] = []

    def measure(batch: list[int]) -> Iterator[dict[str, np.ndarray]]:
        batches.append(batch)
        yield from ({"sum": np.array([unit, 1.0])} for unit in batch)

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        options: dict[str, Any] = {"batch_size": 2, "name": "units", "total": 7, "alike": lambda unit: unit // 3}
        sums = open_result().sums(range(7), measure, {"sum": np.zeros(2)}, **options)
    finally:
        dist.destroy_process_group()
    assert batches == [[0, 1], [2], [3, 4], [5], [6]]
    assert sums["sum"].tolist() == [21, 7]
