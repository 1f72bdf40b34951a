"""The protocol on disk: what counts as a checkpoint, what is kept, what is noticed."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import xxhash

from titan_dp.checkpoint import manifest as ckpt
from titan_dp.checkpoint.changed_settings import check_resumable
from titan_dp.cli import dispatch
from titan_dp.errors import UserError


def entry(path: Path) -> dict[str, object]:
    data = path.read_bytes()
    return {"name": path.name, "bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}


def make(folder: Path, step: int, *, healthy: bool = True, committed: bool = True, **meta: object) -> Path:
    """A checkpoint with one file; `committed=False` leaves it as a kill would."""
    path = ckpt.step_folder(folder, step)
    path.mkdir(parents=True)
    (path / "__0_0.distcp").write_bytes(b"tensors of step %d" % step)
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
        ckpt.write_manifest(path, {**facts, **meta}, [entry(path / "__0_0.distcp")])
    return path


def test_a_folder_without_a_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    make(tmp_path, 10)
    make(tmp_path, 20, committed=False)
    assert ckpt.committed_steps(tmp_path) == [10]
    assert ckpt.resolve_checkpoint(tmp_path).name == "step-00000010"
    with pytest.raises(UserError, match=r"step-00000020 was cut off while it was saved .* committed steps there: 10"):
        ckpt.read_manifest(ckpt.step_folder(tmp_path, 20))


def test_a_step_that_was_never_saved_lists_those_that_were(tmp_path: Path) -> None:
    make(tmp_path, 10)
    with pytest.raises(UserError, match="step-00000099 does not exist; committed steps there: 10"):
        ckpt.read_manifest(ckpt.step_folder(tmp_path, 99))


@pytest.mark.parametrize(("k", "left"), [(0, [1, 2, 3, 4]), (2, [3, 4]), (3, [2, 3, 4]), (9, [1, 2, 3, 4])])
def test_retention_keeps_the_newest_k(tmp_path: Path, k: int, left: list[int]) -> None:
    for step in (1, 2, 3, 4):
        make(tmp_path, step)
    ckpt.apply_retention(tmp_path, k)
    assert ckpt.all_steps(tmp_path) == left


def test_retention_never_removes_the_newest_healthy_checkpoint(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        make(tmp_path, step, healthy=step <= 2)
    ckpt.apply_retention(tmp_path, 2)
    assert ckpt.all_steps(tmp_path) == [2, 4, 5]


def test_a_cut_off_folder_neither_counts_nor_deletes_a_good_one(tmp_path: Path) -> None:
    make(tmp_path, 1)
    make(tmp_path, 2)
    make(tmp_path, 3, committed=False)
    ckpt.apply_retention(tmp_path, 2)
    assert ckpt.committed_steps(tmp_path) == [1, 2]
    assert ckpt.all_steps(tmp_path) == [1, 2, 3], "a newer folder may be one that is being written"


def test_old_cut_off_folders_are_swept(tmp_path: Path) -> None:
    make(tmp_path, 1, committed=False)
    make(tmp_path, 2)
    ckpt.apply_retention(tmp_path, 5)
    assert ckpt.all_steps(tmp_path) == [2]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.write_bytes(b"short"), "has 5 bytes, the manifest says 17"),
        (lambda p: p.unlink(), "is missing"),
        (lambda p: p.write_bytes(b"tensors of step X"), "is not what was saved"),
    ],
    ids=["truncated", "missing", "flipped"],
)
def test_verify_names_the_damaged_file(tmp_path: Path, damage, message: str, capsys: pytest.CaptureFixture) -> None:  # type: ignore[no-untyped-def]
    file = make(tmp_path, 1) / "__0_0.distcp"
    make(tmp_path, 2)
    assert dispatch(["checkpoint", "verify", str(tmp_path)]) == 0
    damage(file)
    with pytest.raises(UserError, match=f"__0_0.distcp {message}"):
        dispatch(["checkpoint", "verify", str(tmp_path)])
    assert "step-00000002: good" in capsys.readouterr().out


def listed(path: Path, capsys: pytest.CaptureFixture) -> list[list[str]]:
    """The cells of the table's rows; whatever is said below the table as rows of one cell."""
    capsys.readouterr()
    assert dispatch(["checkpoint", "list", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if "│" in line or line[:1].isalnum()]


def test_list_shows_every_step_and_its_state(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    make(tmp_path / "checkpoint", 1)
    make(tmp_path / "checkpoint", 2, healthy=False, unhealthy=["the weights are not finite"])
    make(tmp_path / "checkpoint", 3, committed=False)
    (make(tmp_path / "checkpoint", 4) / "manifest.json").write_text("{")
    ckpt.set_aside(make(tmp_path / "checkpoint", 5))
    rows = listed(tmp_path, capsys)
    states = [["1", "healthy"], ["2", "NOT healthy"], ["3", "cut off"], ["4", "DAMAGED"], ["5", "damaged, set aside"]]
    assert [row[:2] for row in rows[:5]] == states
    assert rows[5] == ["2 is not healthy: the weights are not finite"]


def test_what_is_set_aside_is_counted_and_the_advice_to_delete_it_works(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = tmp_path / "a run"
    for step in (1, 2, 3):
        make(run / "checkpoint", step)
    for step, why in ((1, "damaged"), (2, "abandoned")):
        ckpt.set_aside(ckpt.step_folder(run / "checkpoint", step), why)
    assert dispatch(["checkpoint", "list", str(run)]) == 0
    out = capsys.readouterr().out
    assert "2 set aside, " in out
    (advice,) = [line for line in out.splitlines() if line.startswith("  rm -r ")]
    subprocess.run(advice, shell=True, check=True)
    assert [path.name for path in (run / "checkpoint").iterdir()] == ["step-00000003"]
    assert dispatch(["checkpoint", "list", str(run)]) == 0
    assert "set aside" not in capsys.readouterr().out


# -- where a checkpoint is: wherever a manifest is -----------------------------------------------------------------------


def run_folder(path: Path, folder: str = "ckpt") -> Path:
    """A run whose checkpoints lie elsewhere than by default."""
    path.mkdir()
    (path / "config.toml").write_text(f"[model]\n[checkpoint]\nfolder = '{folder}'\n")
    return path


@pytest.mark.parametrize("folder", ["ckpt", "on/disk2"])
def test_a_run_is_what_holds_config_toml_which_names_the_folder(
    tmp_path: Path, folder: str, capsys: pytest.CaptureFixture
) -> None:
    run = run_folder(tmp_path / "run", folder)
    newest = make(run / folder, 20)
    make(run / folder, 10)
    assert ckpt.resolve_checkpoint(run) == newest
    assert [row[0] for row in listed(run, capsys)] == ["10", "20"]
    assert dispatch(["checkpoint", "verify", str(run)]) == 0


def test_without_its_config_a_run_is_known_by_the_one_folder_of_checkpoints_in_it(tmp_path: Path) -> None:
    newest = make(tmp_path / "ckpt", 1)
    assert ckpt.resolve_checkpoint(tmp_path) == newest
    make(tmp_path / "other", 1)
    with pytest.raises(UserError, match=r"holds several .*name one: .*ckpt, .*other"):
        ckpt.resolve_checkpoint(tmp_path)


@pytest.mark.parametrize("place", ["elsewhere/best", "run/best", "run/ckpt/best"])
def test_a_copied_checkpoint_is_one(tmp_path: Path, place: str, capsys: pytest.CaptureFixture) -> None:
    original = make(run_folder(tmp_path / "run") / "ckpt", 7)
    copy = Path(shutil.copytree(original, tmp_path / place))
    assert ckpt.resolve_checkpoint(copy) == copy
    assert listed(copy, capsys)[0][:2] == ["7 (best)", "healthy"]
    assert dispatch(["checkpoint", "verify", str(copy)]) == 0
    assert ckpt.resolve_checkpoint(tmp_path / "run") == original, "a copy is not the newest of a run"


@pytest.mark.parametrize("place", ["best", "ckpt/best"])
def test_the_one_copy_that_was_kept_of_a_run_is_what_the_run_means(
    tmp_path: Path, place: str, capsys: pytest.CaptureFixture
) -> None:
    run = run_folder(tmp_path / "run")
    (run / "ckpt").mkdir()
    best = make(tmp_path, 7).rename(run / place)
    assert ckpt.resolve_checkpoint(run) == best
    assert listed(run, capsys)[0][:2] == ["7 (best)", "healthy"]
    shutil.copytree(best, run / "second")
    with pytest.raises(UserError, match=r"holds several .*name one: .*"):
        ckpt.resolve_checkpoint(run)


def test_a_path_that_is_not_there_is_said_to_be_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="typo does not exist; give a run folder"):
        ckpt.resolve_checkpoint(tmp_path / "typo")


def test_copies_in_a_run_are_listed_and_verified_with_it(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    original = make(run_folder(tmp_path / "run") / "ckpt", 7)
    shutil.copytree(original, tmp_path / "run/ckpt/best")
    (Path(shutil.copytree(original, tmp_path / "run/last")) / "__0_0.distcp").unlink()
    assert [row[0] for row in listed(tmp_path / "run", capsys)] == ["7", "7 (best)", "7 (last)"]
    with pytest.raises(UserError, match=r"last/__0_0.distcp is missing"):
        dispatch(["checkpoint", "verify", str(tmp_path / "run")])


def test_a_checkpoint_is_found_from_inside_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(make(tmp_path, 7).rename(tmp_path / "best"))
    assert ckpt.resolve_checkpoint(Path()) == Path()


def test_a_folder_of_token_shards_is_said_to_be_one(shards: Path) -> None:
    with pytest.raises(UserError, match="train is a folder of token shards; give a run folder or a checkpoint"):
        ckpt.resolve_checkpoint(shards / "train")


# -- health ------------------------------------------------------------------------------------------------------------


def test_of_a_run_the_newest_healthy_checkpoint_is_read_and_what_is_newer_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    healthy = make(tmp_path, 10)
    make(tmp_path, 20, healthy=False, unhealthy=["the weights are not finite: embeddings.weight"])
    (make(tmp_path, 30) / "manifest.json").write_text("{")
    make(tmp_path, 40, committed=False)
    assert ckpt.resolve_checkpoint(tmp_path) == healthy
    said = capsys.readouterr().err
    assert "step 40 was cut off while it was saved; step 30 is damaged; step 20 is not healthy (the weights are not" in said
    assert "taking step 10, the newest healthy checkpoint" in said


def test_a_healthy_newest_checkpoint_needs_no_words(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    make(tmp_path, 10, healthy=False)
    newest = make(tmp_path, 20)
    assert ckpt.resolve_checkpoint(tmp_path) == newest
    assert capsys.readouterr().err == ""


def test_an_unhealthy_checkpoint_that_is_named_itself_is_read_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    named = make(tmp_path, 10, healthy=False, unhealthy=["the loss of step 10 is nan"])
    assert ckpt.resolve_checkpoint(named) == named
    assert "WARNING" in (said := capsys.readouterr().err)
    assert "step-00000010 is not healthy (the loss of step 10 is nan)" in said


def test_a_run_without_a_healthy_checkpoint_is_refused_and_the_advice_works(tmp_path: Path) -> None:
    for step in (1, 2):
        make(tmp_path, step, healthy=False)
    with pytest.raises(UserError, match=r"holds no healthy checkpoint: step 2 is not healthy .*; step 1 is") as caught:
        ckpt.resolve_checkpoint(tmp_path)
    advised = Path(str(caught.value).rsplit(": ", 1)[1])
    assert ckpt.resolve_checkpoint(advised) == ckpt.step_folder(tmp_path, 2)


def test_in_a_pipe_no_figure_of_the_list_is_cut(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    make(tmp_path, 123_456_789, tokens=804_741_000_000, world_size=1024)
    assert dispatch(["checkpoint", "list", str(tmp_path)]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "healthy" in line]
    assert all(part in row for part in ("123456789", "804,741,000,000", "1024", "2026-01-01 00:00:00"))


@pytest.mark.parametrize("command", ["list", "verify"])
def test_a_folder_without_checkpoints_is_said_to_be_one(tmp_path: Path, command: str) -> None:
    with pytest.raises(UserError, match="holds no committed checkpoint; give a run folder"):
        dispatch(["checkpoint", command, str(tmp_path)])


def test_a_damaged_manifest_is_said_to_be_one(tmp_path: Path) -> None:
    path = make(tmp_path, 1)
    (path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest.json is damaged"):
        ckpt.read_manifest(path)
    make(tmp_path, 2)
    with pytest.raises(UserError, match=r"step-00000001/manifest.json is damaged"):
        dispatch(["checkpoint", "verify", str(tmp_path)])


def test_a_manifest_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    path = make(tmp_path, 1)
    ckpt.write_manifest(path, ckpt.read_manifest(path), [{"name": "../../secret", "bytes": 1, "xxh3_128": ""}])
    (problem,) = ckpt.size_problems(path)
    assert "manifest.json names '../../secret', which is not a file of its folder" in problem


CONFIG = """
[model]
num_heads = 4
backend = 'torch'
[data]
seed = 1
[training]
seq_len = 64
[optimizer]
name = 'AdamW'
lr = 1.0
"""
SAVED = {"config": CONFIG, "fingerprint": "a" * 64, "global_batch_size": 8, "step": 5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": CONFIG.replace("num_heads = 4", "num_heads = 8")}, r"another model.num_heads \(was 4, now 8\)"),
        ({"config": CONFIG.replace("seed = 1", "seed = 2")}, r"another data.seed \(was 1, now 2\)"),
        ({"config": CONFIG.replace("seq_len = 64", "seq_len = 32")}, "another training.seq_len"),
        ({"config": CONFIG.replace("'AdamW'", "'Muon'")}, "another optimizer.name"),
        ({"fingerprint": "b" * 64}, r"another data.path \(was tokens aaaaaaaaaaaa..., now tokens bbbbbbbbbbbb...\)"),
        ({"global_batch_size": 16}, r"another training.global_batch_size \(was 8, now 16\)"),
    ],
)
def test_resuming_with_another_architecture_or_other_data_is_refused_by_name(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_resumable(SAVED, {**SAVED, **change}, [])


def test_a_change_that_was_allowed_and_changes_that_do_no_harm_pass() -> None:
    check_resumable(SAVED, {**SAVED, "config": CONFIG.replace("seed = 1", "seed = 2")}, ["data.seed"])
    harmless = CONFIG.replace("lr = 1.0", "lr = 0.5").replace("'torch'", "'recurrent'")
    check_resumable(SAVED, {**SAVED, "config": harmless}, [])


def test_a_changed_character_of_the_manifest_is_noticed(tmp_path: Path) -> None:
    manifest = make(tmp_path, 1) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"tokens": 10', '"tokens": 11'))
    with pytest.raises(UserError, match="manifest.json is damaged .its checksum differs."):
        ckpt.read_manifest(manifest.parent)


def test_a_checkpoint_of_format_version_1_is_still_verified(tmp_path: Path) -> None:
    path = make(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["checksum"]
    data = b"tensors of step 1"
    manifest["files"] = [{"name": "__0_0.distcp", "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}]
    (path / "manifest.json").write_text(json.dumps({**manifest, "format_version": 1}))
    assert ckpt.verify(path) == []
    (path / "__0_0.distcp").write_bytes(data[::-1])
    assert ckpt.verify(path) == [f"{path / '__0_0.distcp'} is not what was saved (its checksum differs)"]


def test_a_damaged_manifest_does_not_keep_retention_from_its_work(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        make(tmp_path, step)
    (ckpt.step_folder(tmp_path, 3) / "manifest.json").write_text("{")
    ckpt.apply_retention(tmp_path, 2)
    assert ckpt.all_steps(tmp_path) == [3, 4]
