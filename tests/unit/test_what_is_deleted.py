"""Nothing is deleted, overwritten, or advised to be deleted that this program did not write; its advice is run here."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from base64 import b64encode
from pathlib import Path

import pytest

from tests.pretrained import save_checkpoint
from tests.unit.test_state_tracking_report import write_run as write_state_tracking_run
from titan_dp.checkpoint.folder import apply_retention, set_aside
from titan_dp.checkpoint.manifest import all_steps, committed_steps, step_folder
from titan_dp.checkpoint.weights import save_model_weights
from titan_dp.cli import dispatch
from titan_dp.config.load import load_config
from titan_dp.data.shards import TokenShards, require_shards
from titan_dp.errors import UserError, run_main
from titan_dp.files import check_own
from titan_dp.train.run_folder import check_config_is_ours, holds_config, read_run, write_run

SHARD = ("shard-00000.npy", "shard-00000.starts.npy")


def prepare(source: Path, out: Path | str, *options: str) -> int:
    return dispatch(["prepare", str(source), "--out", str(out), "--workers", "1", "--validation-fraction", "0.3", *options])


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of forty documents in the current folder."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "input.jsonl"
    path.write_text("".join(f'{{"text": "document {i}"}}\n' for i in range(40)))
    return path


@pytest.fixture
def made(text: Path, tmp_path: Path) -> Path:
    """What `titan-dp prepare` makes of it."""
    prepare(text, "d1")
    return Path("d1")


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# -- prepare -----------------------------------------------------------------------------------------------------------


def test_overwrite_refuses_a_folder_that_prepare_did_not_make(text: Path, capsys: pytest.CaptureFixture) -> None:
    Path("mine/train").mkdir(parents=True)
    Path("mine/thesis.txt").write_text("years of work")
    Path("mine/train/manifest.json").write_text('{"of": "something else"}')
    assert run_main(lambda: prepare(text, "mine", "--overwrite")) == 2
    assert "was not made by prepare, so nothing is deleted; choose another folder" in capsys.readouterr().err
    assert files(Path("mine")) == {"thesis.txt", "train/manifest.json"}


def test_overwrite_deletes_what_prepare_wrote_and_leaves_everything_else(made: Path, text: Path) -> None:
    for name in ("thesis.txt", "train/notes.md", "raw/input.jsonl"):
        (made / name).parent.mkdir(exist_ok=True)
        (made / name).write_text("mine")
    prepare(text, made, "--overwrite", "--shard-tokens", "100")
    assert len(TokenShards(made / "train").shards) > 1
    prepare(text, made, "--overwrite")
    mine = {"thesis.txt", "train/notes.md", "raw/input.jsonl"}
    shards = {f"{split}/{name}" for split in ("train", "validation") for name in ("manifest.json", *SHARD)}
    assert files(made) == mine | shards | {"progress.json"}


def test_overwrite_begins_again_where_prepare_was_cut_off(made: Path, text: Path) -> None:
    record = (made / "progress.json").read_text().replace('"finished": true', '"finished": false')
    (made / "progress.json").write_text(record)
    for name in ("train/manifest.json", "validation/manifest.json"):
        (made / name).unlink()
    for name in ("train/shard-00001.npy", "train/.shard-00001.starts.npy.tmp"):  # being written, and listed nowhere
        (made / name).write_bytes(b"cut off")
    prepare(text, made, "--overwrite")
    assert TokenShards(made / "train").manifest["documents"] + TokenShards(made / "validation").manifest["documents"] == 40
    assert not list(made.rglob("*00001*"))


def test_overwrite_refuses_to_write_over_a_shard_that_no_record_lists(made: Path, text: Path) -> None:
    name = "validation/shard-00007.starts.npy"
    (made / name).write_bytes(b"somebody's")
    before = files(made)
    with pytest.raises(UserError, match=f"no earlier prepare lists .*{name}, which would be overwritten; move it away"):
        prepare(text, made, "--overwrite")
    assert files(made) == before
    (made / name).rename("elsewhere")  # the advice
    prepare(text, made, "--overwrite")


def test_a_record_that_cannot_be_read_is_moved_away_by_the_advice(made: Path, text: Path) -> None:
    (made / "progress.json").write_text('{"percent": 3}')
    for options in ([], ["--overwrite"]):
        with pytest.raises(
            UserError, match="progress.json is no record of an earlier prepare .* move it away and take --overw"
        ):
            prepare(text, made, *options)
    (made / "progress.json").rename("elsewhere")
    prepare(text, made, "--overwrite")


def test_a_kill_while_shards_are_deleted_leaves_nothing_that_looks_prepared(
    made: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink = Path.unlink

    def killed(path: Path, **kwargs: object) -> None:
        unlink(path)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "unlink", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(text, made, "--overwrite")
    monkeypatch.undo()
    with pytest.raises(UserError, match="or --overwrite"):
        prepare(text, Path(text.parent / made))
    prepare(text, text.parent / made, "--overwrite")


# -- advice about data ---------------------------------------------------------------------------------------------------


def refusal(path: str, tokenizer: str = "") -> str:
    with pytest.raises(UserError) as error:
        require_shards(Path(path), tokenizer)
        TokenShards(Path(path))
    return str(error.value)


def test_the_folder_above_the_shards_is_told_where_they_are(made: Path) -> None:
    assert refusal("d1").endswith("; there are some in 'd1/train' and in 'd1/validation': name that folder")
    assert refusal("d1/train/manifest.json").endswith("; there are some in 'd1/train': name that folder")


@pytest.mark.parametrize("tokenizer", ["", "my tokens.tiktoken"])
@pytest.mark.parametrize("path", ["d2", "d2/train", "full/validation", "."])
def test_advice_to_prepare_data_makes_it_and_harms_nothing(text: Path, path: str, tokenizer: str) -> None:
    Path("full").mkdir()
    Path("full/mine.txt").write_text("mine")
    Path("my tokens.tiktoken").write_text("".join(f"{b64encode(bytes([i])).decode()} {i}\n" for i in range(256)))
    before = {name: Path(name).read_bytes() for name in files(Path())}
    advice = re.search(r"write them with `(titan-dp .*)`(, or another tokenizer,)? and name '(.*)'$", refusal(path, tokenizer))
    assert advice is not None
    assert (advice[2] is None) == bool(tokenizer)
    command = shlex.split(advice[1].replace("INPUT", str(text)))
    assert dispatch([*command[1:], "--workers", "1", "--validation-fraction", "0.3"]) == 0
    assert TokenShards(Path(advice[3])).tokenizer.name == (tokenizer or "bytes")
    assert {name: Path(name).read_bytes() for name in before} == before


def test_a_prepare_that_was_cut_off_is_to_be_repeated(made: Path, text: Path) -> None:
    record = (made / "progress.json").read_text().replace('"finished": true', '"finished": false')
    (made / "progress.json").write_text(record)
    (made / "train/manifest.json").unlink()
    assert "into 'd1' was cut off or held nothing out: give its command again" in refusal("d1/train")
    prepare(text, made)
    assert TokenShards(made / "train").tokens


def test_preparing_again_mends_a_missing_shard_but_no_folder_that_lies_beside_other_files(made: Path, text: Path) -> None:
    (made / "train/shard-00000.npy").unlink()
    assert "with --overwrite" in refusal("d1/train")
    prepare(text, made, "--overwrite")
    assert TokenShards(made / "train").tokens
    Path("project").mkdir()
    Path("project/thesis.txt").write_text("mine")
    (made / "train").rename("project/tokens")  # its parent is not prepare's
    Path("project/tokens/shard-00000.npy").unlink()
    said = refusal("project/tokens")
    assert said.endswith("is missing; restore it, or prepare the data again, into a new folder or with --overwrite")
    with pytest.raises(UserError, match="was not made by prepare"):
        prepare(text, "project", "--overwrite")
    assert Path("project/thesis.txt").exists()


# -- checkpoints and run folders -----------------------------------------------------------------------------------------


def make_checkpoint(folder: Path, step: int) -> Path:
    path = step_folder(folder, step)
    path.mkdir(parents=True)
    for name in ("__0_0.distcp", "__1_0.distcp", ".metadata"):
        (path / name).write_bytes(b"tensors")
    (path / "manifest.json").write_text("{}")
    return path


def test_retention_leaves_what_no_save_wrote(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        make_checkpoint(tmp_path, step)
    (tmp_path / "step-00000001/why_this_one_matters.txt").write_text("mine")
    apply_retention(tmp_path, 1)
    assert files(tmp_path / "step-00000001") == {"why_this_one_matters.txt"}
    assert all_steps(tmp_path) == [1, 3]
    assert committed_steps(tmp_path) == [3]


def test_a_step_that_is_saved_again_leaves_what_no_save_wrote(tmp_path: Path) -> None:
    import torch

    path = make_checkpoint(tmp_path, 1)
    (path / "notes.md").write_text("mine")
    save_model_weights(path, {"w": torch.ones(2)}, {"step": 1})
    assert files(path) == {"__0_0.distcp", ".metadata", "manifest.json", "notes.md"}


def test_only_what_was_set_aside_and_holds_nothing_else_is_advised_to_be_deleted(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    names = [set_aside(make_checkpoint(tmp_path, 1)).name for _ in range(3)]
    assert names == ["step-00000001.damaged", "step-00000001.damaged-2", "step-00000001.damaged-3"]
    assert all((tmp_path / name / "__0_0.distcp").exists() for name in names), "what was set aside before stays"
    (tmp_path / "step-00000001.damaged-2/notes.md").write_text("mine")
    make_checkpoint(tmp_path, 1).rename(tmp_path / "step-00000001.keep")
    make_checkpoint(tmp_path, 2)
    dispatch(["checkpoint", "list", str(tmp_path)])
    said = capsys.readouterr().out
    (advice,) = [line.strip() for line in said.splitlines() if line.startswith("  rm -r ")]
    assert shlex.split(advice) == ["rm", "-r", *(str(tmp_path / names[i]) for i in (0, 2))]
    assert f"{tmp_path / 'step-00000001.damaged-2'} holds files that no save wrote" in said
    assert "step-00000001.keep" in said, "a checkpoint under a name of its own is listed as one"
    subprocess.run(advice, shell=True, check=True)
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000001.keep", "step-00000002", names[1]}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.toml", "# the settings of my thesis\n[optimizer]\nlr = 1e-3\n"),
        ("run.json", '{"loss": 1.0}\n'),
        ("metrics.jsonl", '{"loss": 1.0}\n'),
    ],
)
def test_files_of_others_are_not_written_over_by_a_run(tmp_path: Path, name: str, text: str) -> None:
    loaded = load_config(["--config", "debug.toml"])
    (tmp_path / name).write_text(text)
    refusal = f"{name} was not written by a run, which would overwrite it; rename it"
    with pytest.raises(UserError, match=refusal):
        check_config_is_ours(tmp_path, "rename it")
    if name == "config.toml":
        with pytest.raises(UserError, match=refusal):
            holds_config(tmp_path, loaded.config, loaded.resolved_toml(), "rename it")
    (tmp_path / name).rename(tmp_path / "elsewhere")  # the advice
    check_config_is_ours(tmp_path, "rename it")
    (tmp_path / "config.toml").write_text(loaded.annotated_toml())  # what a run wrote
    check_config_is_ours(tmp_path, "rename it")


def test_advice_about_a_damaged_run_json_keeps_the_run(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match="move it away: resuming the run writes it again"):
        read_run(tmp_path)
    (tmp_path / "run.json").rename(tmp_path / "elsewhere")
    assert read_run(tmp_path) is None
    write_run(tmp_path, {"state": "training"})
    assert read_run(tmp_path) == {"state": "training"}


# -- reports, evaluations ----------------------------------------------------------------------------------------


def test_an_evaluation_that_begins_again_refuses_a_file_that_is_none(tmp_path: Path) -> None:
    run = save_checkpoint(tmp_path / "run")
    out = tmp_path / "out"
    (tmp_path / "text.txt").write_text("some text to read")
    command = ["evaluate", "perplexity", str(run), "--text", str(tmp_path / "text.txt"), "--out", str(out)]
    assert dispatch(command) == 0
    (result,) = out.glob("perplexity-*.json")
    assert dispatch([*command, "--overwrite"]) == 0
    result.write_text('{"mine": true}')
    with pytest.raises(UserError, match="is no result of an evaluation .* choose another --out"):
        dispatch([*command, "--overwrite"])
    assert result.read_text() == '{"mine": true}'


EVALUATION = "was not written by an evaluation, .* move it away, or choose another --out"
COMMAND = "is no file of this command, .* move it away, or choose another --out"


@pytest.mark.parametrize(
    ("command", "name", "refusal"),
    [
        ("state-tracking report", "summary.json", COMMAND),
        ("state-tracking report", "curves.png", COMMAND),
        ("evaluate recall", "recall.png", EVALUATION),
    ],
)
def test_files_of_others_are_not_written_over_by_a_report(tmp_path: Path, command: str, name: str, refusal: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("[]")
    if command == "evaluate recall":
        source = [str(save_checkpoint(tmp_path / "run")), "--pairs", "2", "--sequences", "2"]
    else:
        source = [str(write_state_tracking_run(tmp_path / "run", [0.5, 1.0]))]
    argv = [*command.split(), *source, "--out", str(out)]
    with pytest.raises(UserError, match=f"{name} {refusal}"):
        dispatch(argv)
    assert (out / name).read_text() == "[]"
    assert files(out) == {name}
    (out / name).rename(tmp_path / "elsewhere")  # the advice
    assert dispatch(argv) == dispatch([*argv, "--overwrite"] if command == "evaluate recall" else argv) == 0


def test_a_state_tracking_study_refuses_them_before_it_trains(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"mine": true}')
    with pytest.raises(UserError, match="summary.json is no file of this command"):
        dispatch(["state-tracking", "train", "--task", "S3", "--launch", "print", "--out", str(tmp_path)])
    assert files(tmp_path) == {"summary.json"}


def test_other_files_are_a_commands_own_only_beside_its_record(tmp_path: Path) -> None:
    (tmp_path / "layer-0.png").write_bytes(b"mine")
    keys = {"task", "run", "heads"}
    with pytest.raises(UserError, match="layer-0.png is no file of this command"):
        check_own(tmp_path, "inspect.json", keys, ("layer-0.png",))
    (tmp_path / "inspect.json").write_text(json.dumps(dict.fromkeys(keys)))
    check_own(tmp_path, "inspect.json", keys, ("layer-0.png",))
