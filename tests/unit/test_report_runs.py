"""Reading run folders: what they come to, what is tolerated, and what is refused in one sentence."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median

import pytest

from tests.runs import config_text, step_record, write_run, write_sweep
from titan_dp.errors import UserError
from titan_dp.studies.report import runs
from titan_dp.studies.report.runs import Found, find_runs, read, read_runs


def refusal(*paths: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_runs(find_runs(list(paths)))
    message = str(caught.value)
    assert "\n" not in message
    return message


def uneven_records(n: int) -> list[dict]:
    """Records whose numbers all differ, every fourth with an MFU, at uneven steps."""
    steps = [i * (i + 3) // 2 for i in range(1, n + 1)]
    return [
        step_record(
            s, 3 + 1 / s, step_seconds=0.1 + s / 1e5, tokens_per_second=1000.5 + s, **({"mfu": s / 1e7} if s % 4 else {})
        )
        for s in steps
    ]


# -- what a run comes to -----------------------------------------------------------------------------------------------


def test_totals_are_those_of_every_record(tmp_path: Path) -> None:
    records = uneven_records(300)
    run = read(Found(write_run(tmp_path / "run", until=1, records=records)))
    assert run.totals.step == records[-1]["step"]
    assert run.totals.training_loss == pytest.approx(fmean(r["loss"] for r in records[-15:]))
    assert run.totals.tokens_per_second == median(r["tokens_per_second"] for r in records)
    assert run.totals.mfu == median(r["mfu"] for r in records if "mfu" in r)
    steps = [0, *(r["step"] for r in records)]
    expected = sum((b - a) * r["step_seconds"] for a, b, r in zip(steps, steps[1:], records, strict=False))
    assert run.totals.seconds == pytest.approx(expected)
    assert run.totals.curve_loss == [r["loss"] for r in records]


def test_runs_of_one_name_are_told_apart_by_the_folders_above_them(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name) for name in ("paperA/213m", "paperB/213m", "paperA/400m", "x/c/s1", "y/c/s1")]
    named = [run.name for run in read_runs([Found(folder) for folder in folders])]
    assert named == ["paperA/213m", "paperB/213m", "400m", "x/c/s1", "y/c/s1"]


def test_a_long_curve_is_thinned_to_means(tmp_path: Path) -> None:
    records = [step_record(s, float(s % 3)) for s in range(1, 3001)]
    totals = read(Found(write_run(tmp_path / "run", until=1, records=records))).totals
    assert totals.curve_loss == [1.0] * 1000
    assert totals.curve_steps[:2] == [2.0, 5.0]


def test_the_last_validation_is_the_one_that_counts(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", loss=2.5)
    first = {"step": 50, "validation_loss": 9.0, "validation_tokens": 10}
    (folder / "metrics.jsonl").write_text(json.dumps(first) + "\n" + (folder / "metrics.jsonl").read_text())
    run = read(Found(folder))
    assert (run.state, run.totals.validation_loss, run.totals.validation_step) == ("finished", 2.5, 100)


def test_a_cut_off_last_line_is_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", until=60)
    whole = read(Found(folder)).totals
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(step_record(61, 1.0))[:75])
    assert read(Found(folder)).totals == whole


def test_a_line_torn_in_the_middle_is_left_out_and_counted(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", until=60)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[5] = lines[5][:100]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    totals = read(Found(folder)).totals
    assert (totals.unreadable_lines, totals.step, len(totals.curve_loss)) == (1, 60, 19)


def test_losses_that_are_no_number_leave_the_mean_of_the_others(tmp_path: Path) -> None:
    records = [step_record(s, math.nan if s == 39 else 2.0) for s in range(1, 41)]
    totals = read(Found(write_run(tmp_path / "run", until=1, records=records))).totals
    assert totals.training_loss == 2.0
    assert math.isnan(totals.curve_loss[38])


def test_a_run_whose_validation_is_no_number_has_diverged(tmp_path: Path) -> None:
    assert read(Found(write_run(tmp_path / "run", loss=math.nan))).state == "diverged"


def test_tokens_are_those_that_were_consumed_where_steps_changed_their_size(tmp_path: Path) -> None:
    """50 steps of 128 tokens and 50 of 256: not 100 of the last."""
    records = [step_record(s, 2.0) | {"tokens": 128 * s + 128 * max(0, s - 50)} for s in range(1, 101)]
    records.append({"step": 100, "validation_loss": 2.0, "validation_tokens": 10})
    facts = {"tokens_per_step": 256, "planned_tokens": 19_200}
    run = read(Found(write_run(tmp_path / "run", facts=facts, records=records)))
    assert run.tokens == 19_200
    assert run.flops == 19_200 * run.started["flops_per_token"]
    assert run.totals.curve_tokens == [record["tokens"] for record in records[:-1]]


def test_null_stands_for_a_loss_that_is_no_number(tmp_path: Path) -> None:
    """As runs write it now; NaN is what they wrote before."""
    records = [step_record(s, math.nan if s == 99 else 2.0) for s in range(1, 101)]
    records.append({"step": 100, "validation_loss": math.nan})
    folder = write_run(tmp_path / "run", records=records)
    old = read(Found(folder))
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text.replace("NaN", "null"))
    new = read(Found(folder))
    assert (new.state, new.totals.training_loss) == (old.state, old.totals.training_loss) == ("diverged", 2.0)
    assert math.isnan(new.totals.curve_loss[98])


@pytest.mark.parametrize("line", ["5", '{"step": "9", "loss": 1.0}', '{"step": 9, "loss": [], "lr": 1}', '{"loss": null}'])
def test_a_line_that_is_json_but_no_record_is_left_out_and_counted(tmp_path: Path, line: str) -> None:
    folder = write_run(tmp_path / "run", until=60)
    whole = read(Found(folder)).totals
    first, rest = (folder / "metrics.jsonl").read_text().split("\n", 1)
    (folder / "metrics.jsonl").write_text(f"{first}\n{line}\n{rest}")
    assert read(Found(folder)).totals == replace(whole, unreadable_lines=1)


def test_an_unfinished_run_knows_its_step(tmp_path: Path) -> None:
    run = read(Found(write_run(tmp_path / "run", until=60)))
    assert (run.state, run.totals.step) == ("unfinished", 60)


def test_a_run_killed_before_its_first_record_is_unfinished_at_step_0(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", until=60, records=[])
    for text in ("", '{"step": 1, "lo'):
        (folder / "metrics.jsonl").write_text(text)
        assert (read(Found(folder)).state, read(Found(folder)).totals.step) == ("unfinished", 0)


def test_processes_read_what_one_process_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(3):
        write_run(tmp_path / f"run-{i}", loss=2.0 + i)
    found = find_runs([tmp_path])
    alone = read_runs(found)
    monkeypatch.setattr(runs, "_POOL_BYTES", 0)
    together = read_runs(found)
    assert [(r.folder, r.config, r.facts, r.totals) for r in together] == [
        (r.folder, r.config, r.facts, r.totals) for r in alone
    ]


# -- finding -----------------------------------------------------------------------------------------------------------


def test_runs_are_found_alone_in_a_folder_and_in_sweeps_each_once(tmp_path: Path) -> None:
    write_run(tmp_path / "outputs" / "one")
    write_sweep(tmp_path / "outputs" / "sweep", {"a": {}, "b": {"debug.seed": 7}})
    (tmp_path / "outputs" / "notes").mkdir()
    found = find_runs([tmp_path / "outputs", tmp_path / "outputs" / "one", tmp_path / "outputs" / "sweep"])
    assert sorted(run.folder.name for run in found) == ["a", "b", "one"]


def test_a_cell_that_has_not_started_is_no_mistake(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "sweep", {"a": {}, "b": {"debug.seed": 7}})
    write_run(sweep / "a")
    assert [run.state for run in read_runs(find_runs([sweep]))] == ["finished", "not started"]


def test_the_folder_of_a_report_in_a_sweep_is_no_run(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "sweep", {"a": {}})
    (sweep / "report").mkdir()
    assert len(find_runs([sweep])) == 1


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    assert f"{tmp_path / 'gone'} is no folder" in refusal(tmp_path / "gone")


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "holiday").mkdir()
    assert f"{tmp_path} is no run folder" in refusal(tmp_path)


def test_a_run_without_configuration_is_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "config.toml").unlink()
    assert f"{folder} is no run folder: it has no config.toml" in refusal(folder)


@pytest.mark.parametrize("text", ["[model", "[model]\nwidth = 3\ndepth = 4\n", "[training]\nsteps = -1\n"])
def test_an_unreadable_configuration_is_refused(tmp_path: Path, text: str) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "config.toml").write_text(text)
    message = refusal(folder)
    assert f"{folder / 'config.toml'} is no configuration of this program" in message
    assert message.endswith(f"leave {folder} out")


def test_metrics_without_run_json_are_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "run.json").unlink()
    assert f"{folder} has metrics.jsonl but no run.json" in refusal(folder)


def test_a_run_json_cut_off_or_without_its_keys_is_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    whole = (folder / "run.json").read_text()
    (folder / "run.json").write_text(whole[:40])
    assert "run.json cannot be read" in refusal(folder)
    (folder / "run.json").write_text(json.dumps({k: v for k, v in json.loads(whole).items() if k != "tokenizer"}))
    assert "run.json lacks tokenizer" in refusal(folder)


def test_metrics_without_a_record_are_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", until=60)
    (folder / "metrics.jsonl").write_text("hello\nworld\n")
    assert f"{folder / 'metrics.jsonl'} holds no record" in refusal(folder)


def test_metrics_that_end_before_a_finished_run_did_are_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:10]))
    assert "is cut off: it ends at step 50 of the 100" in refusal(folder)
    (folder / "metrics.jsonl").write_text("".join(lines[:-1]))
    assert "without the last validation" in refusal(folder)


def test_a_cell_that_is_gone_is_refused(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "sweep", {"a": {}, "b": {"debug.seed": 7}})
    shutil.rmtree(sweep / "b")
    assert f"{sweep / 'b'} is gone" in refusal(sweep)


def test_a_cell_with_another_configuration_is_refused_however_it_is_named(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "sweep", {"a": {}})
    (sweep / "a" / "config.toml").write_text(config_text({"optimizer.lr": 0.5}))
    assert f"{sweep / 'a'} is a run of another sweep" in refusal(sweep)
    assert f"{sweep / 'a'} is a run of another sweep" in refusal(sweep / "a")


def test_a_moved_or_renamed_dump_folder_is_the_same_run(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "sweep", {"a": {}})
    write_run(sweep / "a", {"job.dump_folder": "elsewhere", "job.description": "other words"})
    assert [run.state for run in read_runs(find_runs([sweep]))] == ["finished"]


def test_a_run_that_its_sweep_does_not_name_is_refused(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "sweep", {"a": {}})
    write_run(sweep / "stray")
    assert f"{sweep / 'stray'} is a run that {sweep / 'sweep.json'} does not name" in refusal(sweep)
    assert f"{sweep / 'stray'} is a run that" in refusal(sweep / "stray")


@pytest.mark.parametrize("name", ["../a", "..", "", "/tmp"])
def test_a_cell_is_a_folder_of_its_sweep(tmp_path: Path, name: str) -> None:
    sweep = write_sweep(tmp_path / "sweep", {"a": {}})
    (sweep / "sweep.json").write_text(json.dumps({"cells": [{"name": name, "identity": "0"}]}))
    assert f"{sweep / 'sweep.json'} names {name!r}, which is not a file of its folder" in refusal(sweep)


@pytest.mark.parametrize("text", ["{", "[]", '{"cells": [{"name": "a"}]}', "[" * 100_000])
def test_a_sweep_json_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    sweep = write_sweep(tmp_path / "sweep", {"a": {}})
    (sweep / "sweep.json").write_text(text)
    assert f"{sweep / 'sweep.json'} is no list of a sweep's cells" in refusal(sweep)
