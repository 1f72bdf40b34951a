"""Forecasts: of made-up runs whose law is known, written before and held out; what came out; what cannot be forecast."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.runs import step_record, write_run
from tests.unit.test_tune import study
from titan_dp.cli import dispatch
from titan_dp.errors import run_main
from titan_dp.studies.report import families
from titan_dp.studies.report.compare import UNITS
from titan_dp.studies.report.fits import fit_power_law, fit_time
from titan_dp.studies.report.forecast import read_written
from titan_dp.studies.report.read import find_runs, read_runs
from titan_dp.studies.report.results import Results, results_of
from titan_dp.studies.report.tables import tables
from titan_dp.studies.report.target import Target

SIZES, TOKENS = (100_000, 200_000, 400_000), (1000, 2000, 4000)
"""Parameters and steps of 128 tokens."""
LARGE = (800_000, 8000)
FIXED, SLOPE = 2e-5, 3e-10
"""Seconds per token and per token and parameter of n_h = 1; n_h = 2 takes twice the slope."""


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "fit_power_law", partial(fit_power_law, resamples=20))


def law(n_h: int, N: int, D: int) -> float:
    return 1.5 - 0.05 * n_h + 60 / N**0.34 + 60 / D**0.4


def run(folder: Path, n_h: int, N: int, steps: int, loss: float, until: int | None = None, **facts: Any) -> None:
    """A run of n_h with the loss and the speed given."""
    per_token = FIXED + SLOPE * n_h * N
    records = [step_record(until or steps, loss, tokens_per_second=1 / per_token, step_seconds=128 * per_token)]
    if until is None:
        records.append({"step": steps, "validation_loss": loss, "validation_tokens": 5000})
    known = {"parameters": N, "flops_per_token": 6 * N, **facts}
    settings = {"model.num_householder": n_h, "training.steps": steps, "model.intermediate_size": N // 1000}
    write_run(folder / f"nh{n_h}-{N}-{steps}", settings, facts=known, records=records, until=until)


def grid(folder: Path, loss: Callable[[int, int, int], float] = law) -> Path:
    for n_h in (1, 2):
        for N in SIZES:
            for steps in TOKENS:
                run(folder, n_h, N, steps, loss(n_h, N, steps * 128))
    return folder


TARGET = f"size={LARGE[0]},tokens={LARGE[1] * 128}"


def forecast(folder: Path, target: str = TARGET) -> int:
    arguments = ["forecast", str(folder), "--target", target, "--out", str(folder / "forecast.json")]
    return run_main(lambda: dispatch(arguments))


def results(folder: Path, held_out: Target | None = None) -> Results:
    runs = read_runs(find_runs([folder]))
    written, warnings = read_written([folder], UNITS["nats"], runs["validation_fingerprint"].dropna())
    found = results_of(runs, "nats", "study", forecasts=written, held_out=held_out)
    return replace(found, warnings=found.warnings + warnings)


# -- what is forecast --------------------------------------------------------------------------------------------------


def test_a_forecast_follows_the_law_that_the_losses_came_from(tmp_path: Path) -> None:
    assert forecast(grid(tmp_path / "runs")) == 0
    written = json.loads((tmp_path / "runs" / "forecast.json").read_text())
    assert (written["written"], written["started"], written["interval"]) == (date.today().isoformat(), 0, 0.9)
    for n_h, found in zip((1, 2), written["forecasts"], strict=True):
        truth = law(n_h, LARGE[0], LARGE[1] * 128)
        assert found["loss"] == pytest.approx(truth, rel=2e-3)
        assert found["low"] <= found["loss"] <= found["high"]


def test_speeds_are_forecast_from_a_fixed_time_and_one_that_grows_with_the_size(tmp_path: Path) -> None:
    assert forecast(grid(tmp_path / "runs")) == 0
    for n_h, found in zip((1, 2), json.loads((tmp_path / "runs/forecast.json").read_text())["forecasts"], strict=True):
        assert 1 / found["tokens_per_second"] == pytest.approx(FIXED + SLOPE * n_h * LARGE[0])
        assert found["tokens_per_step"] == 128


def test_the_runs_at_the_target_are_not_fitted_and_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = grid(tmp_path / "runs")
    run(folder, 1, *LARGE, 9.0)  # would spoil any fit
    run(folder, 2, *LARGE, 9.0, until=10)
    assert forecast(folder) == 0
    written = json.loads((folder / "forecast.json").read_text())
    assert written["forecasts"][0]["loss"] == pytest.approx(law(1, LARGE[0], LARGE[1] * 128), rel=2e-3)
    assert written["started"] == 2
    assert "warning: 2 runs at the target have started already" in capsys.readouterr().out


def test_the_interval_of_scattered_losses_holds_the_truth_and_is_wider_than_that_of_less_scatter(tmp_path: Path) -> None:
    widths = []
    for scale in (0.001, 0.004):
        rng = np.random.default_rng(3)
        folder = grid(tmp_path / str(scale), lambda n, N, D, rng=rng, scale=scale: law(n, N, D) + scale * rng.standard_normal())
        assert forecast(folder) == 0
        for n_h, found in zip((1, 2), json.loads((folder / "forecast.json").read_text())["forecasts"], strict=True):
            assert found["low"] < law(n_h, LARGE[0], LARGE[1] * 128) < found["high"]
            widths.append(found["high"] - found["low"])
    assert max(widths[:2]) < min(widths[2:])


# -- what came out -----------------------------------------------------------------------------------------------------


def test_the_report_puts_the_outcome_beside_the_forecast(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    folder = grid(tmp_path / "runs", lambda n, N, D: law(n, N, D) + 0.002 * rng.standard_normal())
    assert forecast(folder) == 0
    assert [each.outcome for each in results(folder).forecasts] == [None, None]
    truth = law(1, LARGE[0], LARGE[1] * 128)
    run(folder, 1, *LARGE, truth)
    run(folder, 2, *LARGE, truth + 1)  # the law went wrong
    before = (folder / "forecast.json").read_bytes()
    assert dispatch(["report", str(folder), "--out", str(tmp_path / "out")]) == 0
    one, two = json.loads((tmp_path / "out" / "report.json").read_text())["forecasts"]
    assert (one["outcome"], two["outcome"]) == pytest.approx((truth, truth + 1))
    assert one["outcome_tokens_per_second"] == pytest.approx(one["tokens_per_second"])
    assert (folder / "forecast.json").read_bytes() == before
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Forecasts and outcomes</h2>" in page
    assert "1 of 2 outcomes that were forecast lie inside their 90 % intervals" in page
    assert date.today().isoformat() in page


def test_holding_out_forecasts_every_length_of_the_largest_size(tmp_path: Path) -> None:
    forecasts = results(with_large_size(grid(tmp_path / "runs")), Target(size=LARGE[0])).forecasts
    assert [(each.parameters, each.tokens) for each in forecasts] == [(LARGE[0], steps * 128) for steps in TOKENS] * 2
    for each in forecasts:
        assert each.written == "held out"
        assert each.outcome == pytest.approx(each.loss, rel=2e-3)
        assert each.configurations == 9


def with_large_size(folder: Path) -> Path:
    for steps in TOKENS:
        for n_h in (1, 2):
            run(folder, n_h, LARGE[0], steps, law(n_h, LARGE[0], steps * 128))
    return folder


def test_a_forecast_of_other_texts_is_left_out_with_a_warning(tmp_path: Path) -> None:
    folder = grid(tmp_path / "runs")
    assert forecast(folder) == 0
    text = (folder / "forecast.json").read_text()
    (folder / "forecast.json").write_text(text.replace("f" * 64, "0" * 64))
    assert results(folder).forecasts == []
    assert results(folder).warnings == [
        f"{folder / 'forecast.json'} is of other validation texts or of another unit, and is left out"
    ]


# -- times -------------------------------------------------------------------------------------------------------------


def test_a_fixed_time_and_one_per_parameter_are_recovered_and_neither_is_below_zero() -> None:
    N = np.array([1e5, 3e5, 1e6])
    found = fit_time(N, 1 / (FIXED + SLOPE * N))
    assert (found.fixed, found.per_parameter) == pytest.approx((FIXED, SLOPE))
    assert found.error < 1e-9
    assert fit_time(N, 1 / (SLOPE * N - 1e-6)).fixed == 0


def test_the_report_says_what_n_h_costs(tmp_path: Path) -> None:
    ((_, table),) = tables(results(grid(tmp_path / "runs")))["speed"]
    ratio = (FIXED + 2 * SLOPE * SIZES[-1]) / (FIXED + SLOPE * SIZES[-1])
    assert table["time to smallest n_h"].tolist() == ["", f"{ratio:.2f}x"]
    assert table["fixed"].tolist() == ["2.56 ms"] * 2  # 128 tokens of 20 us


def test_times_of_two_machines_are_not_fitted(tmp_path: Path) -> None:
    folder = grid(tmp_path / "runs")
    run(folder, 1, *LARGE, 2.0, device="another")
    one, two = results(folder).speeds
    assert "different machines" in one.lacks
    assert (two.lacks, two.law is None) == ("", False)


# -- refusals ----------------------------------------------------------------------------------------------------------

INSIDE = f"size={SIZES[1]},tokens={TOKENS[1] * 128}"


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (INSIDE, "size=200k,tokens=256k lies inside the fitted range of DeltaNet [-1, 1] (100k to 400k parameters and 128k to"),
        ("size=800K", "--target size=800k lacks a size or a number of tokens; name both"),
        ("tokens=800K", "--target tokens=800k lacks a size or a number of tokens"),
    ],
)
def test_what_is_no_forecast_is_refused_in_one_sentence(
    tmp_path: Path, target: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert forecast(grid(tmp_path / "runs"), target) == 2
    error = capsys.readouterr().err
    assert said in error
    assert [line.startswith("error: ") for line in error.splitlines()].count(True) == 1
    assert not (tmp_path / "runs" / "forecast.json").exists()


@pytest.mark.parametrize("target", ["size=", "size=0,tokens=1", "size=1M,size=2M", "width=3", "1M", "size=nan,tokens=1"])
def test_what_is_no_target_is_refused_with_an_example(tmp_path: Path, target: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        forecast(tmp_path, target)
    assert end.value.code == 2
    assert "expected size=COUNT, tokens=COUNT or both, such as size=1.75M,tokens=800K" in capsys.readouterr().err


def test_a_forecast_that_was_written_is_never_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = grid(tmp_path / "runs")
    (folder / "forecast.json").write_text("mine")
    assert forecast(folder) == 2
    assert "a forecast is kept as it was written; name another file with --out" in capsys.readouterr().err
    assert (folder / "forecast.json").read_text() == "mine"


def test_too_few_runs_say_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for N in SIZES[:2]:
        run(tmp_path / "runs", 1, N, 1000, 3.0)
    assert forecast(tmp_path / "runs") == 2
    assert (
        "too few runs to forecast size=800k,tokens=1.02M from those elsewhere; DeltaNet [-1, 1]: the fit needs 3 sizes (there"
        in (capsys.readouterr().err)
    )


def test_an_optimum_at_the_edge_gives_no_forecast(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert forecast(study(tmp_path / "s", lrs=[0.004, 0.008])) == 2
    assert "no optimum, but an edge" in capsys.readouterr().err


NOWHERE = "--hold-out size=5M: no finished run is there; sizes are 100k, 200k"


@pytest.mark.parametrize(
    ("held_out", "said"),
    [
        ("size=200K", "lies inside the fitted range"),
        ("size=5M", NOWHERE),
    ],
)
def test_holding_out_what_is_inside_or_not_there_is_refused(
    tmp_path: Path, held_out: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = with_large_size(grid(tmp_path / "runs"))
    assert run_main(lambda: dispatch(["report", str(folder), "--out", str(tmp_path / "out"), "--hold-out", held_out])) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_sizes_that_read_alike_are_named_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for n, parameters in ((1, 150_000), (2, 150_064)):  # as of models that match the same size
        write_run(tmp_path / "runs" / f"n{n}", {"model.num_householder": n}, facts={"parameters": parameters})
    command = ["report", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--hold-out", "size=5M"]
    assert run_main(lambda: dispatch(command)) == 2
    assert "sizes are 150k, tokens" in capsys.readouterr().err


def test_a_damaged_forecast_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = grid(tmp_path / "runs")
    (folder / "forecast.json").write_text('{"made_by": "titan-dp forecast"')
    assert run_main(lambda: dispatch(["report", str(folder), "--out", str(tmp_path / "out")])) == 2
    assert f"{folder / 'forecast.json'} is no forecast" in capsys.readouterr().err


def test_seeds_of_an_outcome_are_its_mean_and_spread(tmp_path: Path) -> None:
    folder = grid(tmp_path / "runs")
    assert forecast(folder) == 0
    for seed, loss in ((1, 2.0), (2, 2.2)):
        settings = {"model.num_householder": 1, "training.steps": LARGE[1], "debug.seed": seed}
        records = [step_record(LARGE[1], loss), {"step": LARGE[1], "validation_loss": loss, "validation_tokens": 5000}]
        write_run(folder / str(seed), settings, facts={"parameters": LARGE[0]}, records=records)
    one = results(folder).forecasts[0]
    assert (one.outcome, one.outcome_spread, one.outcome_seeds) == pytest.approx((2.1, 0.2 / math.sqrt(2), 2))
