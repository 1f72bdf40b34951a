"""`titan-dp report`: run folders read, grouped, compared and fitted; the files it writes; what it refuses in one sentence."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from collections.abc import Callable
from datetime import date
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean, median
from typing import Any

import pandas as pd
import pytest

from tests.runs import config_text, step_record, write_run, write_study, write_sweep
from titan_dp.cli import dispatch
from titan_dp.errors import UserError
from titan_dp.studies.report import families, read
from titan_dp.studies.report.compare import clusters, compare, front, group, welch
from titan_dp.studies.report.fits import fit_power_law
from titan_dp.studies.report.read import find_runs, read_run, read_runs
from titan_dp.studies.report.results import Results, results_of
from titan_dp.studies.report.tables import summary


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Intervals are test_fits.py's."""
    monkeypatch.setattr(families, "fit_power_law", partial(fit_power_law, resamples=3))


def results(folder: Path, loss: str = "nats") -> Results:
    return results_of(read_runs(find_runs([folder])), loss, "study")


def configurations(folder: Path) -> pd.DataFrame:
    return group(read_runs(find_runs([folder])), "nats")[1]


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_runs(find_runs([path]))
    message = str(caught.value)
    assert "\n" not in message
    return message


def law(noise: float = 0.0) -> Callable[[int, int, int, int], float]:
    """A loss that falls with size, tokens and n_h; seeds shift it up and down."""
    return lambda n_h, N, D, seed: 1.5 - 0.02 * n_h + 60 / N**0.34 + 60 / D**0.4 + noise * (-1) ** seed


# -- what is read from a run -------------------------------------------------------------------------------------------


def test_totals_are_those_of_every_record(tmp_path: Path) -> None:
    """At uneven steps, every fourth record without an MFU."""
    at = [i * (i + 3) // 2 for i in range(1, 301)]
    mfu = [{"mfu": s / 1e7} if s % 4 else {} for s in at]
    speeds = [{"step_seconds": 0.1 + s / 1e5, "tokens_per_second": 1000.5 + s} for s in at]
    records = [step_record(s, 3 + s / 1e5, **more, **other) for s, more, other in zip(at, speeds, mfu, strict=True)]
    run = read_run(write_run(tmp_path / "run", until=1, records=records), None)
    assert run["step"] == at[-1]
    assert run["training_loss"] == pytest.approx(fmean(r["loss"] for r in records[-15:]))
    assert run["tokens_per_second"] == median(r["tokens_per_second"] for r in records)
    assert run["mfu"] == median(r["mfu"] for r in records if "mfu" in r)
    pairs = zip([0, *at], at, records, strict=False)
    assert run["seconds"] == pytest.approx(sum((b - a) * r["step_seconds"] for a, b, r in pairs))
    assert run["curve_loss"].tolist() == [r["loss"] for r in records]


def test_a_long_curve_is_thinned_to_means(tmp_path: Path) -> None:
    records = [step_record(s, float(s % 3)) for s in range(1, 3001)]
    run = read_run(write_run(tmp_path / "run", until=1, records=records), None)
    assert run["curve_loss"].tolist() == [1.0] * 1000
    assert run["curve_tokens"][:2].tolist() == [256.0, 640.0]


def test_the_last_validation_is_the_one_that_counts(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", loss=2.5)
    first = {"step": 50, "validation_loss": 9.0, "validation_tokens": 10}
    (folder / "metrics.jsonl").write_text(json.dumps(first) + "\n" + (folder / "metrics.jsonl").read_text())
    run = read_run(folder, None)
    assert (run["state"], run["validation_loss"], run["validation_step"]) == ("finished", 2.5, 100)


def test_lines_that_are_not_records_are_left_out_and_counted_unless_one_is_cut_off_at_the_end(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", until=60)
    whole, text = pd.Series(read_run(folder, None)).map(str), (folder / "metrics.jsonl").read_text()
    lines = ['{"step": 6, "loss": 1.0, "tokens', "5", '{"step": "9", "loss": 1.0}', '{"step": 9, "loss": [], "lr": 1}']
    lines += ['{"step": 9, "loss": 1.0}', '{"loss": null}']
    first, rest = text.split("\n", 1)
    (folder / "metrics.jsonl").write_text("\n".join([first, *lines, rest]))
    torn = read_run(folder, None)
    assert torn["unreadable_lines"] == len(lines)
    assert (pd.Series(torn | {"unreadable_lines": 0}).map(str) == whole).all()
    (folder / "metrics.jsonl").write_text(text + '{"step": 61, "loss": 1.0, "tok')
    assert (pd.Series(read_run(folder, None)).map(str) == whole).all()


def test_a_loss_that_is_not_a_number_is_in_no_mean(tmp_path: Path) -> None:
    records = [step_record(s, math.nan if s == 99 else 2.0) for s in range(1, 101)]
    folder = write_run(tmp_path / "run", records=[*records, {"step": 100, "validation_loss": math.nan}])
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text.replace("NaN", "null", 1))  # as runs write it now, and as they once did
    run = read_run(folder, None)
    assert (run["state"], run["training_loss"]) == ("diverged", 2.0)
    assert math.isnan(run["curve_loss"][98])


def test_tokens_are_those_that_were_consumed_if_steps_changed_their_size(tmp_path: Path) -> None:
    """50 steps of 128 tokens and 50 of 256: not 100 of the last."""
    records = [step_record(s, 2.0) | {"tokens": 128 * s + 128 * max(0, s - 50)} for s in range(1, 101)]
    records.append({"step": 100, "validation_loss": 2.0, "validation_tokens": 10})
    facts = {"tokens_per_step": 256, "planned_tokens": 19_200}
    run = read_run(write_run(tmp_path / "run", facts=facts, records=records), None)
    assert (run["tokens"], run["flops"]) == (19_200, 19_200 * run["flops_per_token"])
    assert run["curve_tokens"].tolist() == [record["tokens"] for record in records[:-1]]


def test_a_branchs_tokens_are_its_own_and_its_trunks_and_its_time_is_its_own(tmp_path: Path) -> None:
    records = [step_record(step, 2.0, step_seconds=0.5) for step in range(81, 101)]
    records.append({"step": 100, "validation_loss": 2.0, "validation_tokens": 10})
    facts = {"branched_from": "sweep/long/checkpoint/step-00000080", "branched_at": 80, "shared_tokens": 80 * 128}
    write_run(tmp_path / "sweep/branch", facts=facts, records=records)
    write_run(tmp_path / "sweep/long", {"training.steps": 200})
    runs = read_runs(find_runs([tmp_path / "sweep"]))
    branch, trunk = runs.to_dict("records")
    assert (branch["tokens"], branch["shared_tokens"], branch["seconds"]) == (100 * 128, 80 * 128, pytest.approx(20 * 0.5))
    assert (trunk["shared_tokens"], trunk["branched_from"]) == (0, None)
    said = summary(results_of(runs, "nats", "study"))
    assert "1 run began as a branch: 10.2k of 12.8k tokens are those of the runs they branch from. A run's tokens" in " ".join(
        said
    )
    assert "branch" not in " ".join(summary(results_of(runs[1:].reset_index(drop=True), "nats", "study")))


def test_a_run_killed_before_its_first_record_is_unfinished_at_step_0(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", until=60)
    assert (read_run(folder, None)["state"], read_run(folder, None)["step"]) == ("unfinished", 60)
    for text in ("", '{"step": 1, "lo'):
        (folder / "metrics.jsonl").write_text(text)
        assert (read_run(folder, None)["state"], read_run(folder, None)["step"]) == ("unfinished", 0)


def test_processes_read_what_one_process_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(3):
        write_run(tmp_path / f"run-{i}", loss=2.0 + i)
    alone = read_runs(find_runs([tmp_path]))
    monkeypatch.setattr(read, "_POOL_BYTES", 0)
    assert read_runs(find_runs([tmp_path])).map(str).equals(alone.map(str))


# -- which folders are runs --------------------------------------------------------------------------------------------


def test_runs_are_found_alone_in_a_folder_and_in_sweeps_each_once(tmp_path: Path) -> None:
    write_run(tmp_path / "outputs" / "one")
    sweep = write_sweep(tmp_path / "outputs" / "sweep", {"a": {}, "b": {"debug.seed": 7}})
    write_run(sweep / "a", {"job.dump_folder": "elsewhere", "job.description": "other words"})  # moved, and renamed
    (tmp_path / "outputs" / "notes").mkdir()
    (sweep / "report").mkdir()
    found = find_runs([tmp_path / "outputs", tmp_path / "outputs" / "one", sweep])
    assert sorted(folder.name for folder in found) == ["a", "b", "one"]
    assert sorted(read_runs(found)["state"]) == ["finished", "finished", "not started"]


def test_runs_of_one_name_are_told_apart_by_the_folders_above_them(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name) for name in ("paperA/213m", "paperB/213m", "paperA/400m", "x/c/s1", "y/c/s1")]
    named = read_runs(dict.fromkeys(folders))["run"]
    assert named.tolist() == ["paperA/213m", "paperB/213m", "400m", "x/c/s1", "y/c/s1"]


def edited(path: Path, edit: Callable[[str], str]) -> None:
    path.write_text(edit(path.read_text()))


def without(key: str) -> Callable[[str], str]:
    return lambda text: json.dumps({name: value for name, value in json.loads(text).items() if name != key})


def cut(*lines: int | None) -> Callable[[str], str]:
    return lambda text: "".join(text.splitlines(keepends=True)[slice(*lines)])


def promise(name: str) -> Callable[[Path], Any]:
    return lambda sweep: (sweep / "sweep.json").write_text(json.dumps({"cells": [{"name": name, "identity": ""}]}))


# what happens to the finished run "run" or to the sweep "sweep" with the cell "a", and what is said
REFUSALS: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "it is gone": ("run", shutil.rmtree, "is not a folder"),
    "no files": ("run", lambda run: [path.unlink() for path in run.iterdir()], "is not a run folder"),
    "no configuration": ("run", lambda run: (run / "config.toml").unlink(), "is not a run folder: it has no config.toml"),
    "no TOML": ("run", lambda run: (run / "config.toml").write_text("[model"), "is not a configuration of this program"),
    "unknown keys": ("run", lambda run: (run / "config.toml").write_text("[model]\na = 3\nb = 4\n"), "problems, the first"),
    "no run.json": ("run", lambda run: (run / "run.json").unlink(), "has metrics.jsonl but no run.json"),
    "run.json lacks a key": ("run", lambda run: edited(run / "run.json", without("tokenizer")), "(tokenizer: Field required)"),
    "no record": ("run", lambda run: (run / "metrics.jsonl").write_text("hello\nworld\n"), "metrics.jsonl holds no record"),
    "metrics cut off": ("run", lambda run: edited(run / "metrics.jsonl", cut(10)), "is cut off: it ends at step 50 of the 100"),
    "no last validation": ("run", lambda run: edited(run / "metrics.jsonl", cut(-1)), "without the last validation"),
    "a cell is gone": ("sweep", lambda sweep: shutil.rmtree(sweep / "a"), "/sweep/a is gone"),
    "other settings": (
        "sweep",
        lambda sweep: (sweep / "a/config.toml").write_text(config_text({"optimizer.lr": 0.5})),
        "/sweep/a is a run of another sweep",
    ),
    "a stray run": ("sweep", lambda sweep: write_run(sweep / "stray"), "/sweep/stray is a run that "),
    "a cell elsewhere": ("sweep", promise("../a"), "/sweep/sweep.json names '../a', which is not a file of its folder"),
    "sweep.json cut off": (
        "sweep",
        lambda sweep: (sweep / "sweep.json").write_text('{"cells": [{"name": "a"}]}'),
        "/sweep/sweep.json is no list of a sweep's cells",
    ),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_cannot_be_counted_is_refused_by_each_of_its_names(tmp_path: Path, what: str) -> None:
    kind, harm, said = REFUSALS[what]
    folder = write_run(tmp_path / "run") if kind == "run" else write_sweep(tmp_path / "sweep", {"a": {}})
    harm(folder)
    for path in (folder, folder / ("stray" if "stray" in what else "a")) if kind == "sweep" else (folder,):
        if path.exists() or kind == "run":
            message = refusal(path)
            assert said in message
            assert str(folder) in message


# -- seeds -------------------------------------------------------------------------------------------------------------


def test_the_spread_over_seeds_is_the_sample_standard_deviation(tmp_path: Path) -> None:
    for seed, loss in ((1, 3.0), (2, 3.1), (3, 3.5)):
        write_run(tmp_path / f"run-{seed}", {"debug.seed": seed}, loss)
    write_run(tmp_path / "one", {"optimizer.lr": 0.1})
    three, one = (row for _, row in configurations(tmp_path).sort_values("used", ascending=False).iterrows())
    assert three["mean"] == pytest.approx(3.2)
    assert three["spread"] == pytest.approx(math.sqrt((0.2**2 + 0.1**2 + 0.3**2) / 2))
    assert math.isnan(one["spread"])


@pytest.mark.parametrize(
    ("key", "value", "divides"),
    [
        ("metrics.log_freq", 3, False),
        ("validation.freq", 9, False),
        ("model.head_dim", 16, True),
    ],
)
def test_settings_divide_seeds_if_they_can_change_the_loss(tmp_path: Path, key: str, value: Any, divides: bool) -> None:
    write_run(tmp_path / "a", {"debug.seed": 1})
    write_run(tmp_path / "b", {"data.seed": 2, key: value, "job.description": "another"})
    assert len(configurations(tmp_path)) == 1 + divides


def test_unfinished_diverged_and_repeated_runs_are_in_no_mean_and_named(tmp_path: Path) -> None:
    write_run(tmp_path / "good", {"debug.seed": 1}, 3.0)
    write_run(tmp_path / "early", {"debug.seed": 2}, 9.0, until=60)
    write_run(tmp_path / "broken", {"debug.seed": 3}, math.nan)
    write_run(tmp_path / "zcopy", {"debug.seed": 1}, 3.0)
    found = results(tmp_path)
    assert found.configurations["losses"].tolist() == [[3.0]]
    assert found.warnings == ["zcopy repeats good (same configuration and seeds) and is not counted"]
    text = " ".join(summary(found))
    assert "Unfinished, so in no mean and no fit: early (step 60 of 100)." in text
    assert "Diverged, so in no mean and no fit: broken." in text


def test_runs_that_never_started_make_no_report(tmp_path: Path) -> None:
    (write_run(tmp_path / "run") / "run.json").unlink()
    (tmp_path / "run" / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="none of 1 run has started"):
        results(tmp_path)


# -- what is comparable ------------------------------------------------------------------------------------------------

OTHER_TOKENIZER = {"tokenizer": "gpt2", "validation_fingerprint": "e" * 64, "bytes_per_token": 4.0}


@pytest.mark.parametrize(
    ("loss", "a", "b", "said"),
    [
        ("nats", {}, OTHER_TOKENIZER, r"'bytes' and .*'gpt2': losses in nats per token are not comparable.*bits-per-byte"),
        ("nats", {}, {"validation_fingerprint": "e" * 64}, "were validated on different texts"),
        ("bits-per-byte", {"validation_text_bytes": 6}, OTHER_TOKENIZER | {"validation_text_bytes": 5}, "different texts"),
        ("bits-per-byte", {"bytes_per_token": None}, {}, "has no validation_bits_per_byte"),
    ],
)
def test_losses_that_cannot_be_compared_are_refused(tmp_path: Path, loss: str, a: dict, b: dict, said: str) -> None:
    write_run(tmp_path / "runs" / "a", facts=a)
    write_run(tmp_path / "runs" / "b", facts=b)
    with pytest.raises(UserError, match=said):
        dispatch(["report", str(tmp_path / "runs"), "--loss", loss, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_bits_per_byte_compare_two_tokenizers(tmp_path: Path) -> None:
    write_run(tmp_path / "bytes", loss=1.0)
    write_run(tmp_path / "gpt2", {"model.vocab_size": 50304}, 3.0, facts=OTHER_TOKENIZER)
    found = results(tmp_path, "bits-per-byte").configurations
    means = dict(zip(found["tokenizer"], found["mean"], strict=True))
    assert means == pytest.approx({"bytes": 1 / math.log(2), "gpt2": 3 / 4 / math.log(2)})


def test_runs_are_compared_by_what_their_tokenizer_does_not_by_its_name(tmp_path: Path) -> None:
    names = {"a": ("tok", "1" * 64), "b": ("moved/tok", "1" * 64), "old": ("tok", "")}
    for seed, (name, (tokenizer, digest)) in enumerate(names.items()):
        write_run(tmp_path / "runs" / name, {"debug.seed": seed}, facts={"tokenizer": tokenizer, "tokenizer_hash": digest})
    assert results(tmp_path / "runs").tokenizers == ["tok"]
    write_run(tmp_path / "runs" / "c", facts={"tokenizer": "tok", "tokenizer_hash": "2" * 64})
    with pytest.raises(UserError, match=r"'tok 1{12}\.\.\.' and .*'tok 2{12}\.\.\.': losses in nats per token are not"):
        results(tmp_path / "runs")


def test_what_can_be_compared_with_care_carries_a_warning(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", facts={"fingerprint": "0" * 64})
    write_run(tmp_path / "c", {"debug.seed": 2}, facts={"world_size": 8})
    more = [step_record(100, 2.0), {"step": 100, "validation_loss": 2.0, "validation_tokens": 6000}]
    write_run(tmp_path / "d", {"debug.seed": 3}, records=more)
    write_run(tmp_path / "e", {"debug.seed": 4, "validation.enable": False}, records=more[:1])
    assert results(tmp_path).warnings == [
        "runs were trained on 2 different data sets, for example a (dddddddd) and b (00000000)",
        "validations covered different parts of the text: a on 5,000 tokens, d on 6,000",
        "tokens/s and times are of different machines: 1 x a test's CPU, 8 x a test's CPU",
        "1 finished runs have no validation loss and are in no fit, for example e",
    ]


# -- equal size, fronts ------------------------------------------------------------------------------------------------


def test_each_n_h_is_compared_with_the_smallest_at_equal_size_and_tokens(tmp_path: Path) -> None:
    found = compare(configurations(write_study(tmp_path / "s", law(0.001), sizes=((64, 2), (128, 4)), steps=(100, 400))))
    assert len(found) == 4
    for rows in found:
        assert rows["n_h"].tolist() == [1, 2, 3]
        assert rows["difference"].tolist()[1:] == pytest.approx([-0.02, -0.04])
        assert pd.isna(rows["against"].iloc[0])
        assert (rows["against"].iloc[1:] == rows.index[0]).all()


@pytest.mark.parametrize("b", [{"optimizer.lr": 1.0}, {"parameters": 102_000}])
def test_neither_another_learning_rate_nor_a_size_two_percent_off_is_compared(tmp_path: Path, b: dict[str, float]) -> None:
    write_run(tmp_path / "a", {"model.num_householder": 1}, facts={"parameters": 100_000})
    settings = {key: value for key, value in b.items() if "." in key}
    write_run(tmp_path / "b", {"model.num_householder": 2, **settings}, facts={"parameters": b.get("parameters", 100_000)})
    assert compare(configurations(tmp_path)) == []


def test_the_smallest_n_h_of_the_same_gate_and_shape_is_compared_with(tmp_path: Path) -> None:
    for gate in (False, True):
        for n_h, heads, head_dim in ((1, 8, 16), (1, 4, 32), (2, 4, 16), (2, 2, 32)):
            shape = {"model.num_householder": n_h, "model.num_heads": heads, "model.head_dim": head_dim}
            settings = {**shape, "model.use_forget_gate": gate}
            write_run(tmp_path / f"{gate}{n_h}{head_dim}", settings, facts={"parameters": 100000})
    (rows,) = compare(configurations(tmp_path))
    two = rows[rows["n_h"] == 2]
    against = rows.loc[two["against"]]
    assert len(two) == 4
    assert (against["n_h"] == 1).all()
    for key in ("model.use_forget_gate", "model.head_dim"):
        assert against[key].tolist() == two[key].tolist()


def test_welchs_interval_is_that_of_the_textbook() -> None:
    # Means 3 and 2, variances of the means 1/3 and 4/3: 2.941 degrees of freedom, t(0.975) = 3.219 (from tables).
    half = 3.219 * math.sqrt(1 / 3 + 4 / 3)
    assert welch([2, 3, 4], [0, 2, 4]) == pytest.approx((1 - half, 1 + half), abs=0.01)


@pytest.mark.parametrize(("a", "b"), [([1.0], [1.0, 2.0]), ([1.0, 1.0], [2.0, 2.0])])
def test_without_scatter_on_both_sides_there_is_no_interval(a: list[float], b: list[float]) -> None:
    assert welch(a, b) is None


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([(100, 3.0), (200, 3.5), (300, 2.5), (300, 2.6), (400, 2.5)], [0, 2]),
        ([(1000, 3.0), (1003, 2.5)], [1]),  # hardly smaller is not smaller
        ([(100, math.nan), (200, 3.0)], [1]),
    ],
)
def test_the_front_is_what_nothing_cheaper_beats(losses: list[tuple[int, float]], expected: list[int]) -> None:
    assert front(pd.DataFrame(losses, columns=["parameters", "mean"]), "parameters", 0.01).index.tolist() == expected


def test_clusters_start_anew_beyond_their_tolerance() -> None:
    found = clusters(pd.DataFrame({"size": [103, 100, 101, 250]}), "size", 0.02)
    assert [rows["size"].tolist() for rows in found] == [[100, 101], [103], [250]]


def validated(folder: Path, n_h: int, seed: int, losses: list[float]) -> None:
    """A run of `n_h` whose validations were `losses`, the last at its end."""
    records = [step_record(100, 3.0)]
    records += [{"step": 100 - 5 * i, "validation_loss": loss} for i, loss in enumerate(reversed(losses))][::-1]
    settings = {"model.num_householder": n_h, "debug.seed": seed, "data.seed": seed}
    write_run(folder / f"{n_h}-{seed}", settings, facts={"parameters": 100_000}, records=records)


def test_the_noise_of_a_run_is_the_scatter_of_its_last_validations_around_a_line(tmp_path: Path) -> None:
    """Around a falling line +0.02, -0.02, -0.02, +0.02 fits with no slope: variance 4 x 0.02^2 over 4 - 2."""
    validated(tmp_path, 1, 1, [3.4 + 0.02, 3.3 - 0.02, 3.2 - 0.02, 3.1 + 0.02])
    validated(tmp_path, 1, 2, [3.2, 3.1, 3.0])  # too few
    by_seed = read_runs(find_runs([tmp_path])).set_index("debug.seed")["validation_noise"]
    assert by_seed[1] == pytest.approx(0.02 * math.sqrt(2))
    assert by_seed[2] is None


@pytest.mark.parametrize(("difference", "verdict"), [(0.039, "inside the noise"), (0.041, "")])
def test_a_difference_of_single_seeds_is_measured_against_their_validations(
    tmp_path: Path, difference: float, verdict: str
) -> None:
    """Each run's noise is 0.02 sqrt(2), that of the difference 0.04."""
    wave = [3 + 0.02, 3 - 0.02, 3 - 0.02, 3 + 0.02]
    validated(tmp_path, 1, 1, wave)
    validated(tmp_path, 2, 1, [loss - difference for loss in wave])
    (rows,) = compare(configurations(tmp_path))
    assert rows["noise_of_difference"].iloc[1] == pytest.approx(0.04)
    assert rows["verdict"].iloc[1] == verdict


@pytest.mark.parametrize(("seeds", "interval"), [([1], ""), ([1, 2], "; by its 95 % interval lower in 0, higher in 0")])
def test_a_report_speaks_of_intervals_only_if_there_is_one(tmp_path: Path, seeds: list[int], interval: str) -> None:
    study = write_study(tmp_path / "s", law(0.1), sizes=((64, 2),), steps=(100,), n_h=(1, 2), seeds=seeds)
    (said,) = [line for line in summary(results(study)) if line.startswith("At equal size")]
    assert said.partition("nats per token")[2].removesuffix(".").partition("; inside")[0] == interval
    assert " in 1 of 1 comparison, mean difference -0.0200 " in said


def test_seeds_that_scatter_more_than_validations_are_the_noise_and_more_of_them_lower_it(tmp_path: Path) -> None:
    for seed, shift in ((1, -0.1), (2, 0.0), (3, 0.1)):
        for n_h in (1, 2):
            validated(tmp_path, n_h, seed, [3 + shift - 0.07 * (n_h == 2)] * 5)
    (rows,) = compare(configurations(tmp_path))
    assert rows["noise_of_difference"].iloc[1] == pytest.approx(math.sqrt(2 * 0.1**2 / 3))
    assert rows["verdict"].iloc[1] == "inside the noise"


# -- which fits are made -----------------------------------------------------------------------------------------------


def test_tokens_in_proportion_to_size_cannot_tell_the_two_apart(tmp_path: Path) -> None:
    for i in range(7):
        facts = {"parameters": 1000 * 2**i, "flops_per_token": 6000 * 2**i}
        write_run(tmp_path / str(i), {"training.steps": 100 * 2**i}, 4 - 0.1 * i, facts=facts)
    found = results(tmp_path)
    assert "size and tokens change together" in found.surfaces[0].lacks
    assert found.computes[0].law is not None


def test_a_grid_of_sizes_and_tokens_is_fitted_for_each_family(tmp_path: Path) -> None:
    sizes, steps = ((64, 2), (128, 4), (256, 6)), (1000, 4000, 16000)
    found = results(write_study(tmp_path / "study", law(0.001), n_h=(1, 2), sizes=sizes, steps=steps))
    assert [fit.family for fit in found.surfaces] == ["DeltaNet [-1, 1]", "DeltaProduct_2 [-1, 1]"]
    for fit in found.surfaces:
        assert fit.law is not None
        assert fit.law.estimates["a"].value == pytest.approx(0.34, abs=0.05)
        assert fit.law.estimates["b"].value == pytest.approx(0.40, abs=0.05)


def test_only_the_best_learning_rate_at_a_size_is_fitted(tmp_path: Path) -> None:
    for lr, loss in ((0.001, 3.0), (0.002, 2.9), (0.004, 3.3)):
        write_run(tmp_path / str(lr), {"optimizer.lr": lr}, loss)
    (fit,) = results(tmp_path).surfaces
    assert (fit.points["mean"].tolist(), fit.left_out) == ([2.9], 2)


def test_sizes_that_share_a_budget_give_a_parabola(tmp_path: Path) -> None:
    for i, (N, loss) in enumerate(((1e5, 3.2), (2e5, 3.0), (4e5, 3.2))):
        facts = {"parameters": int(N), "flops_per_token": int(6 * N)}
        for seed in (1, 2):
            settings = {"training.steps": 4000 // 2**i, "debug.seed": seed}
            write_run(tmp_path / f"{i}-{seed}", settings, loss + 0.001 * seed, facts=facts)
        write_run(
            tmp_path / f"{i}-0", {"training.steps": 4000 // 2**i, "optimizer.lr": 1.0}, 4.0 + i, facts=facts
        )  # not the best
    (profile,) = results(tmp_path).isoflops
    assert profile.parabola.minimum == pytest.approx(2e5, rel=0.01)
    assert profile.budget == pytest.approx(6e5 * 4000 * 128)


# -- the files ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a small study of all mixers, with a run each that is unfinished, diverged and hostile in name."""
    losses = lambda n_h, N, D, seed: 3 - 0.1 * n_h + 1000 / N + 0.003 * seed  # noqa: E731
    folder = write_study(tmp_path_factory.mktemp("report") / "study", losses, n_h=(1, 2), sizes=((64, 2), (128, 4)))
    write_run(folder / "early", {"debug.seed": 8}, until=60)
    write_run(folder / "broken", {"debug.seed": 9}, math.nan)
    write_run(folder / "<script>alert(1)<\N{FRACTION SLASH}script>&", {"debug.seed": 10})
    for mixer in ("gla", "rwkv7", "attention"):
        settings = {"model.mixer": mixer, "model.num_householder": 1, "model.attention_num_heads": 2}
        write_run(folder / mixer, settings, facts={"parameters": 90_000})
    assert dispatch(["report", str(folder), "--out", str(folder.parent / "out")]) == 0
    return folder.parent / "out"


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open()))


def test_every_run_and_every_configuration_is_a_row_of_its_csv(written: Path) -> None:
    runs, configurations = rows(written / "runs.csv"), rows(written / "configurations.csv")
    assert sorted(row["state"] for row in runs) == ["diverged"] + ["finished"] * 12 + ["unfinished"]
    assert next(row for row in runs if row["run"] == "broken")["validation_loss_nats_per_token"] == "nan"
    assert {row["n_h"] for row in runs} == {row["n_h"] for row in configurations} == {"", "1", "2"}
    first = next(row for row in configurations if (row["n_h"], row["hidden_size"]) == ("1", "64"))
    assert int(first["parameters"]) - int(first["parameters_without_embedding"]) == 320 * 64
    assert float(first["validation_loss_standard_deviation"]) == pytest.approx(0.003 / math.sqrt(2))
    assert (first["seeds"], first["mfu"]) == ("2", "")
    families = [row["family"] for row in configurations if row["parameters"] == "90000"]
    assert families == ["RWKV-7 [-1, 1]", "linear attention", "softmax attention"]


def test_the_page_needs_nothing_but_itself_and_shows_a_hostile_name_as_text(written: Path) -> None:
    page = (written / "report.html").read_text()
    assert not re.search(r"https?://", page)
    assert not re.search(r"\b(src|href)\s*=\s*[\"'](?!data:image/png;base64,|#[a-z])", page)
    assert page.count("data:image/png;base64,") == len(list(written.glob("*.png")))
    tags: list[str] = []
    text: list[str] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: tags.append(tag)  # type: ignore[method-assign]
    parser.handle_data = text.append  # type: ignore[method-assign,assignment]
    parser.feed(page)
    assert "script" not in tags
    assert any("<script>alert(1)" in part for part in text)


def test_too_few_points_say_so_and_draw_nothing(written: Path) -> None:
    page, fits = (written / "report.html").read_text(), json.loads((written / "report.json").read_text())["fits"]
    lacks = fits["DeltaNet [-1, 1]"]["L(N, D)"]["not_fitted"]
    assert lacks.startswith("the fit needs 3 sizes (there are 2), 3 numbers of tokens (there are 1), 6 configurations")
    assert f"Not fitted: {lacks}" in page
    assert all("4 budgets of FLOPs" in laws["L(C)"]["not_fitted"] for laws in fits.values())
    assert "No parabola: that needs three sizes" in page
    assert "Not drawn against tokens" in page
    drawn = {path.name for path in written.glob("*.png")}
    assert drawn == {"differences.png", "loss_by_parameters.png", "loss_by_flops.png", "loss_curves.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written.glob("*.png"))


def test_the_page_says_where_it_comes_from_and_begins_with_its_contents_and_the_losses(written: Path) -> None:
    page = (written / "report.html").read_text()
    typed = f"titan-dp report {written.parent / 'study'} --out {written}"
    for text in (date.today().isoformat(), f"<code>{typed}</code>", "<dd>2.13</dd>", "<dd>cccccccccccc</dd>"):
        assert text in page
    order = [page.index(part) for part in ("<h1>", "<code>", "<nav", 'id="equal"', 'class="lowest"', "<details>", "<h3>")]
    assert order == sorted(order)
    names = re.findall(r'<a href="#(\w+)">', page)
    assert len(names) == 7
    assert names == re.findall(r'<h2 id="(\w+)">', page)
    assert "<th>validation loss</th>" in page
    assert '<th class="words">family</th>' in page


def test_figures_are_written_in_the_format_asked_for_and_the_page_still_holds_pngs(tmp_path: Path) -> None:
    run, out = write_run(tmp_path / "run"), tmp_path / "out"
    for ending in ("svg", "png"):
        assert dispatch(["report", str(run), "--out", str(out), "--format", ending]) == 0
        assert {path.name for path in out.iterdir() if "loss" in path.name} == {f"loss_curves.{ending}"}
        assert (out / "report.html").read_text().count("data:image/png;base64,") == 1


def test_a_report_is_written_over_but_nothing_of_somebody_elses_is(written: Path, tmp_path: Path) -> None:
    out, run = tmp_path / "out", write_run(tmp_path / "run", until=60)
    shutil.copytree(written, out)
    (out / "notes.txt").write_text("mine")
    assert dispatch(["report", str(run), "--out", str(out)]) == 0
    assert "unfinished at step 60 of 100" in (out / "report.html").read_text()  # nothing is finished, and it is listed
    assert not (out / "differences.png").exists()
    assert len(rows(out / "runs.csv")) == 1
    (out / "isoflop.png").write_text("mine")
    with pytest.raises(UserError, match="isoflop.png is not a file of the report there; move it away"):
        dispatch(["report", str(run), "--out", str(out)])
    assert (out / "notes.txt").read_text() == (out / "isoflop.png").read_text() == "mine"
    before = sorted(run.iterdir())
    for path, said in ((run, "holds files and is not a report"), (run / "config.toml", "is a file")):
        with pytest.raises(UserError, match=said):
            dispatch(["report", str(run), "--out", str(path)])
    assert sorted(run.iterdir()) == before


def test_fits_that_were_not_made_are_one_sentence_on_the_console(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_run(tmp_path / "runs/a")
    assert dispatch(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "report")]) == 0
    shown = capsys.readouterr().out
    assert "1 run (1 finished) of 1 configuration.\n" in shown
    assert "not fitted: L(N, D), time per step, L(C); report.html says what each of them lacks\n" in shown
    assert "bootstrap" not in shown
    assert (tmp_path / "report/report.html").read_text().count("Not fitted: ") == 3


def test_a_sweeps_report_lies_in_its_folder_and_bears_its_name(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sweep = write_sweep(tmp_path / "widths", {"a": {}, "b": {"debug.seed": 7}}, description="wide & narrow")
    write_run(sweep / "a")
    for _ in range(2):  # the second time there is a report in the sweep's folder
        dispatch(["report", str(sweep)])
    page = (sweep / "report" / "report.html").read_text()
    assert "<h1>widths</h1>" in page
    assert "wide &amp; narrow" in page
    shown = capsys.readouterr().out
    assert "2 runs (1 finished, 1 not started)" in shown
    assert f"written to {sweep / 'report'}: report.json, runs.csv, " in shown
    assert f"{sweep / 'report' / 'report.html'} shows it all on one page" in shown


def test_curves_of_several_tokenizers_are_left_out_of_a_report_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "runs" / "a")
    write_run(tmp_path / "runs" / "b", facts=OTHER_TOKENIZER)
    monkeypatch.chdir(tmp_path)
    dispatch(["report", "runs", "--loss", "bits-per-byte"])
    assert not (tmp_path / "report" / "loss_curves.png").exists()
    assert "the runs have different tokenizers (bytes, gpt2)" in (tmp_path / "report" / "report.html").read_text()


def test_missing_packages_are_named_with_the_way_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("titan_dp.errors.find_spec", lambda name: None if name == "jinja2" else True)
    with pytest.raises(UserError, match=re.escape("needs jinja2: pip install jinja2")):
        dispatch(["report", str(tmp_path)])
