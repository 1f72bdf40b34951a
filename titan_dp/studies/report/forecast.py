"""Forecasts: what a law, fitted without a run, says of it; and what came out.

All configurations at the target are left out, L(N, D) and the time per token of each family are fitted to the others, and
the target must lie beyond them: between fitted sizes there is nothing to forecast. An interval holds the law's uncertainty
and the scatter of runs. That the law does not go on as it did is in no interval, and is what a forecast can fail by.

A written forecast (forecast_command.py) is never changed. It says how many runs at its target had started when it was
written: one that was written afterwards is none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from pandas import DataFrame

from titan_dp.errors import UserError
from titan_dp.files import JsonObject, Natural, parse_json, short
from titan_dp.studies.report.compare import best
from titan_dp.studies.report.families import Fit, Speed, fit_speeds, fit_surfaces
from titan_dp.studies.report.target import Target

MADE_BY = "titan-dp forecast"
HELD_OUT = "held out"


class Forecast(JsonObject):
    """What is expected of one family at one size and number of tokens, and what came out, if it has been run."""

    family: str
    parameters: Natural
    tokens: Natural
    loss: float
    low: float
    high: float
    """The 90 % interval."""
    configurations: Natural
    """How many it was fitted to."""
    tokens_per_second: float | None = None
    tokens_per_step: Natural | None = None
    """Of the runs that the time was fitted to."""
    written: str = HELD_OUT
    """The day on which it was written."""
    started: Natural = 0
    """Runs at the target that had started then."""
    outcome: float | None = None
    outcome_spread: float | None = None
    outcome_seeds: Natural = 0
    outcome_tokens_per_second: float | None = None

    @property
    def inside(self) -> bool:
        return self.outcome is not None and self.low <= self.outcome <= self.high


class Written(JsonObject):
    """forecast.json."""

    made_by: str
    written: str
    command: str
    loss: str
    """The unit."""
    validation_texts: list[str]
    """Fingerprints."""
    target: str
    started: Natural
    interval: float
    forecasts: list[Forecast]
    not_forecast: dict[str, str]
    """Why, by family."""


def read_written(paths: Iterable[Path], unit: str, texts: Iterable[str]) -> tuple[list[Forecast], list[str]]:
    """The forecasts in the files forecast*.json of the folders `paths`, and warnings about those that cannot be compared.

    Args:
        unit, texts: of the losses that are there now, and the fingerprints of their validation texts.

    Raises UserError if a file is cut off or something else.
    """
    found, warnings = [], []
    for path in sorted({file for folder in paths if folder.is_dir() for file in folder.glob("forecast*.json")}):
        written = parse_json(Written, path.read_bytes(), path, "forecast", "take it from where it was copied, or move it away")
        if written.loss != unit or not set(texts) <= set(written.validation_texts):
            warnings.append(f"{path} is of other validation texts or of another unit, and is left out")
            continue
        found += [
            each.model_copy(update={"written": written.written, "started": written.started}) for each in written.forecasts
        ]
    return found, warnings


def with_outcomes(forecasts: Sequence[Forecast], configurations: DataFrame) -> list[Forecast]:
    """The forecasts, with what came out at the best configuration of the same family, size and number of tokens."""
    measured = configurations.dropna(subset="mean")
    found = []
    for forecast in forecasts:
        there = Target(forecast.parameters, forecast.tokens).among(measured[measured["family"] == forecast.family])
        if there.empty:
            found.append(forecast)
            continue
        row = there.loc[best(there)]
        outcome = {
            "outcome": row["mean"],
            "outcome_spread": None if math.isnan(row["spread"]) else row["spread"],
            "outcome_seeds": len(row["losses"]),
            "outcome_tokens_per_second": row["tokens_per_second"],
        }
        found.append(forecast.model_copy(update=outcome))
    return found


def forecast(best_ones: DataFrame, configurations: DataFrame, target: Target) -> tuple[list[Forecast], dict[str, str]]:
    """What every family is expected to come out as at `target`, which has both, and why some cannot be forecast.

    Args:
        best_ones: configurations whose losses are fitted, tuned ones at their best.
        configurations: all, whose speeds are fitted.

    Raises UserError if no family has enough runs without the target, or if the target lies inside the fitted range.
    """
    assert target.size is not None
    assert target.tokens is not None
    fits, speeds = _fits_without(best_ones, configurations, target)
    lacks = {fit.family: fit.lacks for fit in fits if fit.law is None}
    found = [_at(fit, speeds, target.size, target.tokens) for fit in fits if fit.law is not None]
    if not found:
        raise _too_few(lacks, target)
    return found, lacks


def hold_out(best_ones: DataFrame, configurations: DataFrame, target: Target) -> list[Forecast]:
    """The same for what has been run already: every configuration at `target`, with its outcome. Raises as `forecast`."""
    held = target.among(best_ones.dropna(subset="mean"))
    if held.empty:
        sizes, tokens = (", ".join(dict.fromkeys(map(short, sorted(best_ones[c])))) for c in ("parameters", "tokens"))
        raise UserError(
            f"--hold-out {target}: no finished run is there; sizes are {sizes or 'none'}, tokens {tokens or 'none'}"
        )
    fits, speeds = _fits_without(best_ones, configurations, target)
    found = []
    for fit in fits:
        members = held[held["family"] == fit.family]
        if fit.law is not None:
            pairs = dict.fromkeys(zip(members["parameters"], members["tokens"], strict=True))
            found += [_at(fit, speeds, size, tokens) for size, tokens in pairs]
    if not found:
        raise _too_few({fit.family: fit.lacks for fit in fits}, target)
    return with_outcomes(found, best_ones)


def _fits_without(best_ones: DataFrame, configurations: DataFrame, target: Target) -> tuple[list[Fit], dict[str, Speed]]:
    rest, others = (rows.drop(target.among(rows).index) for rows in (best_ones, configurations))
    return fit_surfaces(rest), {speed.family: speed for speed in fit_speeds(others)}


def _at(fit: Fit, speeds: dict[str, Speed], size: int, tokens: int) -> Forecast:
    """The forecast of one family. Raises UserError if (size, tokens) lies inside what was fitted."""
    assert fit.law is not None
    ranges = {column: (fit.points[column].min(), fit.points[column].max()) for column in ("parameters", "tokens")}
    if all(low / 1.01 <= value <= high * 1.01 for value, (low, high) in zip((size, tokens), ranges.values(), strict=True)):
        fitted = " and ".join(f"{short(low)} to {short(high)} {column}" for column, (low, high) in ranges.items())
        raise UserError(
            f"{Target(size, tokens)} lies inside the fitted range of {fit.family} ({fitted}), so there is nothing to forecast; "
            "name a larger size or more tokens"
        )
    expected, speed = fit.law.forecast(size, tokens), speeds.get(fit.family)
    found = Forecast(
        family=fit.family,
        parameters=size,
        tokens=tokens,
        loss=expected.value,
        low=expected.low,
        high=expected.high,
        configurations=len(fit.points),
    )
    if speed is None or speed.law is None:
        return found
    return found.model_copy(update={"tokens_per_second": 1 / speed.law.predict(size), "tokens_per_step": speed.tokens_per_step})


def _too_few(lacks: dict[str, str], target: Target) -> UserError:
    why = next((f"{family}: {reason}" for family, reason in lacks.items()), "none is left")
    return UserError(f"too few runs to forecast {target} from those elsewhere; {why}; run more, or name another target")
