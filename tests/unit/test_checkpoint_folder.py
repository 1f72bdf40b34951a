"""The protocol on disk: what counts as a checkpoint, which one a path means, what is kept, what is noticed."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash

from titan_dp.checkpoint.folder import apply_retention, resolve_checkpoint, set_aside
from titan_dp.checkpoint.manifest import (
    all_steps,
    committed_steps,
    read_manifest,
    size_problems,
    step_folder,
    write_manifest,
)
from titan_dp.cli import dispatch
from titan_dp.errors import UserError


def make(folder: Path, step: int, *, healthy: bool = True, committed: bool = True, **meta: object) -> Path:
    """A checkpoint with one file; `committed=False` leaves it as a kill would."""
    path = step_folder(folder, step)
    path.mkdir(parents=True)
    data = b"tensors of step %d" % step
    (path / "__0_0.distcp").write_bytes(data)
    if committed:
        facts = {
            "step": step,
            "healthy": healthy,
            "tokens": step * 10,
            "world_size": 1,
            "saved": "2026-01-01T00:00:00+00:00",
            "config": "",
            "fingerprint": "",
            "tokenizer": "bytes",
            "global_batch_size": 1,
            "loader": {"samples": step},
        }
        entry = {"name": "__0_0.distcp", "bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}
        write_manifest(path, {**facts, **meta}, [entry])
    return path


def listed(path: Path, capsys: pytest.CaptureFixture) -> list[list[str]]:
    """The cells of the table's rows; what is said below the table, up to what to do next, as rows of one cell."""
    capsys.readouterr()
    assert dispatch(["checkpoint", "list", str(path)]) == 0
    table, _, said = capsys.readouterr().out.partition("check its files:")[0].partition("\n\n")
    rows = table.splitlines()[3:]
    return [re.split(r" {2,}", row.strip()) for row in rows] + [[line] for line in said.splitlines() if line[:1].isalnum()]


# -- commit and retention ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "k", "left"),
    [
        ("1 2 3 4", 0, [1, 2, 3, 4]),
        ("1 2 3 4", 2, [3, 4]),
        ("1 2 3 4", 9, [1, 2, 3, 4]),
        ("1 2 3! 4! 5!", 2, [2, 4, 5]),  # the newest healthy one stays
        ("1 2 3?", 2, [1, 2, 3]),  # a newer folder may be one that is being written, and does not count
        ("1? 2", 5, [2]),  # old cut-off folders are swept
        ("1 2 3# 4", 2, [3, 4]),  # a damaged manifest does not keep retention from its work
    ],
)
def test_retention_keeps_the_newest_k_and_the_newest_healthy_one(tmp_path: Path, steps: str, k: int, left: list[int]) -> None:
    """Steps marked "!" are not healthy, "?" cut off, "#" damaged."""
    for word in steps.split():
        path = make(tmp_path, int(word.strip("!?#")), healthy="!" not in word, committed="?" not in word)
        if "#" in word:
            (path / "manifest.json").write_text("{")
    apply_retention(tmp_path, k)
    assert all_steps(tmp_path) == left


def test_retention_keeps_the_steps_that_others_branch_from(tmp_path: Path) -> None:
    for step in range(1, 7):
        make(tmp_path, step)
    apply_retention(tmp_path, 2, keep_steps=[2, 3, 99])
    assert all_steps(tmp_path) == [2, 3, 5, 6]


def test_a_folder_without_a_manifest_is_not_a_checkpoint(tmp_path: Path) -> None:
    make(tmp_path, 10)
    make(tmp_path, 20, committed=False)
    assert committed_steps(tmp_path) == [10]
    assert resolve_checkpoint(tmp_path).name == "step-00000010"
    for step, state in ((20, "was cut off while it was saved .*"), (99, "does not exist")):
        with pytest.raises(UserError, match=f"step-000000{step} {state}; committed steps there: 10"):
            read_manifest(step_folder(tmp_path, step))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.write_bytes(b"short"), "__0_0.distcp has 5 bytes, the manifest says 17"),
        (lambda p: p.unlink(), "__0_0.distcp is missing"),
        (lambda p: p.write_bytes(b"tensors of step X"), "__0_0.distcp is not what was saved"),
        (lambda p: p.with_name("manifest.json").write_text("{"), "step-00000001/manifest.json is damaged"),
        (lambda p: change(p, '"tokens": 10', '"tokens": 11'), "manifest.json is damaged .its checksum differs."),
        (lambda p: change(p, '"format_version": 2', '"format_version": 3'), "has format version 3, this program reads 2"),
    ],
    ids=["truncated", "missing", "flipped", "manifest", "manifest flipped", "newer"],
)
def test_verify_names_the_damaged_file(
    tmp_path: Path, damage: Callable[[Path], object], message: str, capsys: pytest.CaptureFixture
) -> None:
    file = make(tmp_path, 1) / "__0_0.distcp"
    make(tmp_path, 2)
    assert dispatch(["checkpoint", "verify", str(tmp_path)]) == 0
    damage(file)
    with pytest.raises(UserError, match=message):
        dispatch(["checkpoint", "verify", str(tmp_path)])
    assert "step-00000002: good" in capsys.readouterr().out


def change(file: Path, text: str, other: str) -> None:
    manifest = file.with_name("manifest.json")
    assert text in manifest.read_text()
    manifest.write_text(manifest.read_text().replace(text, other))


def test_a_manifest_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    path = make(tmp_path, 1)
    write_manifest(path, read_manifest(path), [{"name": "../../secret", "bytes": 1, "xxh3_128": ""}])
    (problem,) = size_problems(path)
    assert "manifest.json names '../../secret', which is not a file of its folder" in problem


# -- titan-dp checkpoint list --------------------------------------------------------------------------------------------


def test_list_shows_every_step_and_its_state(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    make(tmp_path / "checkpoint", 1)
    make(tmp_path / "checkpoint", 2, healthy=False, unhealthy=["the weights are not finite"])
    make(tmp_path / "checkpoint", 3, committed=False)
    (make(tmp_path / "checkpoint", 4) / "manifest.json").write_text("{")
    set_aside(make(tmp_path / "checkpoint", 5))
    rows = listed(tmp_path, capsys)
    states = [["1", "healthy"], ["2", "NOT healthy"], ["3", "cut off"], ["4", "DAMAGED"], ["5", "damaged, set aside"]]
    assert [row[:2] for row in rows[:5]] == states
    assert rows[5] == ["2 is not healthy: the weights are not finite"]


def test_in_a_pipe_no_figure_of_the_list_is_cut(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    make(tmp_path, 123_456_789, tokens=804_741_000_000, world_size=1024)
    assert dispatch(["checkpoint", "list", str(tmp_path)]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "healthy" in line]
    assert all(part in row for part in ("123456789", "804,741,000,000", "1024", "2026-01-01 00:00:00"))


# -- where a checkpoint is: wherever a manifest is -----------------------------------------------------------------------


def run_folder(path: Path, folder: str = "ckpt") -> Path:
    """A run whose checkpoints are not in the default folder."""
    path.mkdir()
    (path / "config.toml").write_text(f"[model]\n[checkpoint]\nfolder = '{folder}'\n")
    return path


def test_config_toml_of_a_run_names_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = run_folder(tmp_path / "run", "on/disk2")
    newest = make(run / "on/disk2", 20)
    make(run / "on/disk2", 10)
    assert resolve_checkpoint(run) == newest
    assert [row[0] for row in listed(run, capsys)] == ["10", "20"]
    assert dispatch(["checkpoint", "verify", str(run)]) == 0


def test_without_its_config_a_run_is_known_by_the_one_folder_of_checkpoints_in_it(tmp_path: Path) -> None:
    newest = make(tmp_path / "ckpt", 1)
    assert resolve_checkpoint(tmp_path) == newest
    make(tmp_path / "other", 1)
    with pytest.raises(UserError, match=r"holds several .*name one: .*ckpt, .*other"):
        resolve_checkpoint(tmp_path)


@pytest.mark.parametrize("place", ["elsewhere/best", "run/ckpt/best"])
def test_a_copied_checkpoint_is_one(tmp_path: Path, place: str, capsys: pytest.CaptureFixture) -> None:
    original = make(run_folder(tmp_path / "run") / "ckpt", 7)
    copy = Path(shutil.copytree(original, tmp_path / place))
    assert resolve_checkpoint(copy) == copy
    assert listed(copy, capsys)[0][:2] == ["7 (best)", "healthy"]
    assert dispatch(["checkpoint", "verify", str(copy)]) == 0
    assert resolve_checkpoint(tmp_path / "run") == original, "a copy is not the newest of a run"


@pytest.mark.parametrize("place", ["best", "ckpt/best"])
def test_the_one_copy_that_was_kept_of_a_run_is_what_the_run_means(
    tmp_path: Path, place: str, capsys: pytest.CaptureFixture
) -> None:
    run = run_folder(tmp_path / "run")
    (run / "ckpt").mkdir()
    best = make(tmp_path, 7).rename(run / place)
    assert resolve_checkpoint(run) == best
    assert listed(run, capsys)[0][:2] == ["7 (best)", "healthy"]
    shutil.copytree(best, run / "second")
    with pytest.raises(UserError, match=r"holds several .*name one: .*"):
        resolve_checkpoint(run)


def test_copies_in_a_run_are_listed_and_verified_with_it(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    original = make(run_folder(tmp_path / "run") / "ckpt", 7)
    shutil.copytree(original, tmp_path / "run/ckpt/best")
    (Path(shutil.copytree(original, tmp_path / "run/last")) / "__0_0.distcp").unlink()
    assert [row[0] for row in listed(tmp_path / "run", capsys)] == ["7", "7 (best)", "7 (last)"]
    with pytest.raises(UserError, match=r"last/__0_0.distcp is missing"):
        dispatch(["checkpoint", "verify", str(tmp_path / "run")])


def test_a_checkpoint_is_found_from_inside_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(make(tmp_path, 7).rename(tmp_path / "best"))
    assert resolve_checkpoint(Path()) == Path()


def test_a_path_that_holds_no_checkpoint_is_said_to_be_so(tmp_path: Path, shards: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub/config.json").write_text("{}")
    for path, message in (
        (tmp_path / "typo", "typo does not exist; give a run folder"),
        (tmp_path / "empty", "holds no committed checkpoint; give a run folder"),
        (tmp_path / "hub", "hub is a Hugging Face folder; make a checkpoint of it first: titan-dp import .*hub OUT"),
        (shards / "train", "train is a folder of token shards; give a run folder or a checkpoint"),
    ):
        for read in (
            resolve_checkpoint,
            lambda path: dispatch(["checkpoint", "list", str(path)]),
            lambda path: dispatch(["checkpoint", "verify", str(path)]),
        ):
            with pytest.raises(UserError, match=message):
                read(path)


# -- health ------------------------------------------------------------------------------------------------------------


def test_of_a_run_the_newest_healthy_checkpoint_is_read_and_what_is_newer_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    healthy = make(tmp_path, 10)
    assert resolve_checkpoint(tmp_path) == healthy
    assert capsys.readouterr().err == ""
    make(tmp_path, 20, healthy=False, unhealthy=["the weights are not finite: embeddings.weight"])
    (make(tmp_path, 30) / "manifest.json").write_text("{")
    make(tmp_path, 40, committed=False)
    assert resolve_checkpoint(tmp_path) == healthy
    said = capsys.readouterr().err
    assert "step 40 was cut off while it was saved; step 30 is damaged; step 20 is not healthy (the weights are not" in said
    assert "taking step 10, the newest healthy checkpoint" in said


def test_a_run_without_a_healthy_checkpoint_is_refused_and_the_advice_works(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for step in (1, 2):
        make(tmp_path, step, healthy=False, unhealthy=[f"the loss of step {step} is nan"])
    with pytest.raises(UserError, match=r"holds no healthy checkpoint: step 2 is not healthy .*; step 1 is") as caught:
        resolve_checkpoint(tmp_path)
    advised = Path(str(caught.value).rsplit(": ", 1)[1])
    assert resolve_checkpoint(advised) == step_folder(tmp_path, 2)
    assert re.search(r"WARNING.*step-00000002 is not healthy \(the loss of step 2 is nan\)", capsys.readouterr().err)
