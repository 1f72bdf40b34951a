"""What a report shows: numbers and sentences, tables for the terminal and the page, CSV, JSON, and the page itself.

A table is a frame of text. In CSV an unknown value is empty, and a loss that is not a number is `nan`.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Sequence
from datetime import date
from typing import Any

import pandas as pd
from pandas import DataFrame

from titan_dp.errors import counted
from titan_dp.files import short
from titan_dp.output import duration, number_table, print_table
from titan_dp.studies.report.compare import CONFIDENCE_TEXT, INSIDE, LOSSES, SEEDS
from titan_dp.studies.report.families import Fit, IsoFlop, Speed
from titan_dp.studies.report.fits import Estimate
from titan_dp.studies.report.forecast import HELD_OUT, Forecast
from titan_dp.studies.report.read import STATES
from titan_dp.studies.report.results import Results
from titan_dp.studies.report.tune import AROUND, Tuning

_NAMED = 5  # runs in a sentence; the tables name all
_STEPS = ["step", "steps"]
NOT_FITTED = "Not fitted: "
"""How the note on a fit begins that was not made."""

# -- numbers -----------------------------------------------------------------------------------------------------------


def _texts(values: pd.Series, form: Any, unknown: str = "n/a") -> list[str]:
    """`form(value)`, or `unknown` for None and NaN."""
    return [unknown if pd.isna(value) else form(value) for value in values]


def _means(rows: DataFrame) -> list[str]:
    spreads = _texts(rows["spread"], " ± {:.4f}".format, "")
    return [mean + spread for mean, spread in zip(_texts(rows["mean"], "{:.4f}".format), spreads, strict=True)]


def _estimate(value: Estimate) -> str:
    return f"{value.value:.3g} [{value.low:.3g}, {value.high:.3g}]"


# -- sentences ---------------------------------------------------------------------------------------------------------


def summary(results: Results) -> list[str]:
    """What was read, what is left out of means and fits, and what came out at equal size and tokens."""
    runs = results.runs
    by_state = {state: runs[runs["state"] == state] for state in STATES}
    counts = ", ".join(f"{len(those):,} {state}" for state, those in by_state.items() if len(those))
    lines = [f"{counted(len(runs), 'run')} ({counts}) of {counted(len(results.configurations), 'configuration')}."]
    for state in ("diverged", "unfinished", "not started"):
        those = by_state[state]
        if len(those):
            at = [f" (step {step:,} of {steps:,})" if state == "unfinished" else "" for step, steps in those[_STEPS].values]
            names = ", ".join(map("".join, zip(those["run"][:_NAMED], at, strict=False)))
            more = f" and {len(those) - _NAMED:,} more" if len(those) > _NAMED else ""
            lines.append(f"{state.capitalize()}, so in no mean and no fit: {names}{more}.")
    branches = runs[runs["branched_from"].notna()]
    if len(branches):
        tokens, shared = (short(int(branches[key].sum())) for key in ("tokens", "shared_tokens"))
        lines.append(
            f"{counted(len(branches), 'run')} began as a branch: {shared} of {tokens} tokens are those of the runs they branch "
            "from. A run's tokens and FLOPs are of both, its time is its own."
        )
    return [*lines, *_verdicts(results), *_forecast_lines(results)]


def _verdicts(results: Results) -> Iterator[str]:
    """For each family and what it is compared with: how often its loss is lower, and how often that can be told apart."""
    for (family, against), rows in results.compared.groupby(["family", "against_family"], sort=False):
        found, verdicts = rows["difference"], rows["verdict"].tolist()
        interval = ""
        if rows["low"].notna().any():  # one seed has none
            interval = (
                f"; by its {CONFIDENCE_TEXT} interval lower in {verdicts.count('lower')}, higher in {verdicts.count('higher')}"
            )
        noise = f"; inside the noise in {verdicts.count(INSIDE)}" if INSIDE in verdicts else ""
        yield (
            f"At equal size and tokens {family} has a lower validation loss than {against} in {(found < 0).sum()} of "
            f"{counted(len(found), 'comparison')}, mean difference {found.mean():+.4f} {results.unit}{interval}{noise}."
        )


def _note(fit: Fit) -> str:
    """What a reader must know about a fit beside its numbers."""
    if fit.law is None:
        return f"{NOT_FITTED}{fit.lacks}."
    notes = []
    at = [name for name in fit.law.undetermined if fit.law.estimates[name].bound == "value"]
    reaching = [name for name in fit.law.undetermined if name not in at]
    if at:
        notes.append(f"undetermined: {', '.join(at)} at the bound of the search")
    if reaching:
        notes.append(f"undetermined: the interval of {', '.join(reaching)} reaches the bound of the search")
    if fit.left_out:
        notes.append(f"{fit.left_out} configurations with a higher loss at equal size and tokens left out")
    return "; ".join(notes) + "." if notes else ""


def _minimum(profile: IsoFlop) -> str:
    """Where an isoFLOP parabola is lowest, in words."""
    parabola = profile.parabola
    if parabola.minimum is None:
        return "none: the parabola opens downwards"
    if not parabola.inside:
        side = "below" if parabola.minimum < profile.points["parameters"].min() else "above"
        return f"outside, {side} the sampled sizes"
    if parabola.interval is None:
        return f"{short(parabola.minimum)}, no interval (as many runs as coefficients)"
    if not math.isfinite(parabola.interval[1]):
        return f"{short(parabola.minimum)}, undetermined (unbounded interval)"
    return f"{short(parabola.minimum)} [{short(parabola.interval[0])}, {short(parabola.interval[1])}]"


# -- tables ------------------------------------------------------------------------------------------------------------


def tables(results: Results) -> dict[str, list[tuple[str, DataFrame]]]:
    """Titles and tables by the name of their section; an isoFLOP section without profiles is empty."""
    isoflop = [("isoFLOP minima", _isoflop_table(results))] if results.isoflops else []
    surface = _laws(results.surfaces, ["E", "A", "a", "B", "b"])
    return {
        "tuning": [(f"best values, by a parabola in the logarithm; losses in {results.unit}", tuning_table(results))]
        if results.tunings
        else [],
        "comparisons": [(_comparison_title(results, rows), _comparison_table(results, rows)) for rows in results.comparisons],
        "configurations": [
            (
                "configurations (training loss: nats per token, last 5 % of steps; validation loss: "
                f"{results.unit}, ± standard deviation over seeds; front C: by FLOPs, N: by parameters)",
                _configurations_table(results),
            )
        ],
        "isoflop": isoflop,
        "surface": [("L(N, D) = E + A/N^a + B/D^b, 90 % bootstrap intervals", surface)],
        "speed": [("time per step = fixed + N x per parameter", _speed_table(results))] if results.speeds else [],
        "forecasts": [(f"forecasts, {results.unit}", forecast_table(results.forecasts))] if results.forecasts else [],
        "evaluations": [("evaluations over tokens", _evaluations_table(results))] if len(results.evaluations) else [],
        "compute": [("L(C) = E + A/C^a, 90 % bootstrap intervals", _laws(results.computes, ["E", "A", "a"]))],
    }


def _configurations_table(results: Results) -> DataFrame:
    rows = results.configurations
    marks = zip(rows["on_front_by_flops"], rows["on_front_by_parameters"], strict=True)
    table = {
        "family": rows["family"],
        "n_h": _texts(rows["n_h"], str, "-"),
        "shape": rows["shape"],
        **{name: rows[name.lower()].map(short) for name in ("parameters", "tokens", "FLOPs")},
        "training loss": _texts(rows["training_loss"], "{:.4f}".format),
        "validation loss": _means(rows),
        "seeds": rows["used"].map(str),
        "front": [" ".join(mark for mark, on in zip("CN", both, strict=True) if on) for both in marks],
        **_speeds(rows),
    }
    return DataFrame(table | {key: rows[key].map(str) for key in results.differing})


def _speeds(rows: DataFrame) -> dict[str, list[str]]:
    speed, mfu = _texts(rows["tokens_per_second"], short), _texts(rows["mfu"], "{:.1%}".format)
    return {"tokens/s": speed, "MFU": mfu, "time": _texts(rows["seconds"], duration)}


def runs_table(results: Results) -> DataFrame:
    """One row per run, in whatever state."""
    rows = results.runs
    at = [
        f" at step {step:,} of {steps:,}" if state == "unfinished" else ""
        for state, step, steps in rows[["state", *_STEPS]].values
    ]
    table = {
        "run": rows["run"],
        "state": rows["state"] + at,
        "family": rows["family"],
        "shape": rows["shape"],
        "parameters": _texts(rows["parameters"], short),
        "tokens": _texts(rows["tokens"], short),
        "seeds": [f"{one}, {other}" for one, other in rows[SEEDS].values],
        "training loss": _texts(rows["training_loss"], "{:.4f}".format),
        "validation loss": _texts(rows[LOSSES[results.loss]], "{:.4f}".format),
        **_speeds(rows),
        "skipped steps": rows["skipped_steps"].map(str),
    }
    shown = DataFrame(table, dtype=object)
    shown.loc[rows["state"] == "not started", shown.columns[2:]] = ""
    return shown


def tuning_table(results: Results) -> DataFrame:
    """One row per arm and tuned axis, in the order of the comparisons."""
    found = sorted(results.tunings, key=lambda t: (t.points["parameters"].iloc[0], t.points["tokens"].iloc[0]))
    rows = []
    for tuning in found:
        first, tried = tuning.points.iloc[0], ", ".join(f"{value:g}" for value in tuning.points[tuning.key])
        lowest = tuning.points["mean"][tuning.best]
        rows.append(
            {
                "family": first["family"],
                "parameters": short(first["parameters"]),
                "tokens": short(first["tokens"]),
                **{key: str(first[key]) for key in results.differing_untuned},
                "axis": tuning.axis,
                "tried": tried,
                "best": _best_value(tuning) if tuning.settled else "none",
                "loss there": f"{lowest + tuning.gain:.4f}" if tuning.settled else "",
                f"rise at {AROUND:g}x": f"+{tuning.rise:.4f}" if tuning.parabola else "",
                "note": "" if tuning.settled and not tuning.note else _unsettled(tuning),
            }
        )
    return DataFrame(rows, dtype=object)


def _best_value(tuning: Tuning) -> str:
    """The best value, with its interval if there is one."""
    interval = tuning.parabola.interval if tuning.parabola else None
    return f"{tuning.value:.3g}" + (f" [{interval[0]:.3g}, {interval[1]:.3g}]" if interval else "")


def _unsettled(tuning: Tuning) -> str:
    return f"at the edge: add {tuning.add:g}" if tuning.add is not None else tuning.lacks or tuning.note


def _comparison_table(results: Results, rows: DataFrame) -> DataFrame:
    """One row per family (and shape) at one size and number of tokens."""
    between = []
    for against, low, high, verdict in rows[["against", "low", "high", "verdict"]].values:
        no_interval = "" if pd.isna(against) else verdict or "none: needs scatter of 2 seeds on both sides"
        between.append((f"[{low:+.4f}, {high:+.4f}]", verdict) if low <= high else ("", no_interval))
    tuned = {axis: _texts(rows[key], "{:g}".format) for axis, key in results.tuned.items()}
    table = {
        "family": rows["family"],
        **tuned,
        "validation loss": _means(rows),
        "seeds": rows["losses"].map(len).map(str),
        "difference": _texts(rows["difference"], "{:+.4f}".format, ""),
        "noise": _texts(rows["noise_of_difference"], "{:.4f}".format, ""),
        f"{CONFIDENCE_TEXT} interval": [interval for interval, _ in between],
        "verdict": [verdict for _, verdict in between],
        "compared with": _texts(rows["against_name"], str, ""),
        "shape": rows["shape"],
        "parameters": rows["parameters"].map(short),
        "FLOPs": rows["flops"].map(short),
    }
    return DataFrame(table)


def _comparison_title(results: Results, rows: DataFrame) -> str:
    first = rows.iloc[0]
    others = "".join(f", {key} {first[key]}" for key in results.differing_untuned)
    return f"{short(rows['parameters'].min())} parameters, {short(rows['tokens'].min())} tokens{others}"


def _laws(fits: list[Fit], names: list[str]) -> DataFrame:
    rows = []
    for fit in fits:
        values = [_estimate(fit.law.estimates[name]) if fit.law else "" for name in names]
        rows.append([fit.family, str(len(fit.points)), *values, f"{fit.law.error:.2g}" if fit.law else "", _note(fit)])
    return DataFrame(rows, columns=["family", "configurations", *names, "error of log L", "note"])


def _speed_table(results: Results) -> DataFrame:
    """One row per family; the last column is what its n_h costs in time."""
    rows = []
    for speed in results.speeds:
        row = {"family": speed.family, "sizes": ", ".join(speed.points["parameters"].map(short).unique())}
        if speed.law is None:
            rows.append(row | {"note": f"{NOT_FITTED}{speed.lacks}."})
            continue
        largest = speed.points["parameters"].max()
        fixed, slope = (1e3 * speed.tokens_per_step * term for term in (speed.law.fixed, speed.law.per_parameter * 1e6))
        numbers = {"fixed": f"{fixed:.3g} ms", "per M parameters": f"{slope:.3g} ms", "error": f"{speed.law.error:.1%}"}
        at = {"tokens/s at the largest": short(1 / speed.law.predict(largest))}
        rows.append(row | numbers | at | {"time to smallest n_h": _cost_of_n_h(speed, results.speeds)})
    return DataFrame(rows).fillna("")


def _cost_of_n_h(speed: Speed, others: list[Speed]) -> str:
    """Time per token at the family's largest size over that of the smallest n_h of its kind there, by both fits."""
    first = speed.points.iloc[0]
    kin = [o for o in others if o.law is not None and o.points["kind"].iloc[0] == first["kind"]]
    kin = [o for o in kin if o.points["n_h"].iloc[0] is not None and first["n_h"] is not None]
    smallest = min(kin, key=lambda other: other.points["n_h"].iloc[0], default=None)
    if speed.law is None or smallest is None or smallest.law is None or smallest.family == speed.family:
        return ""
    largest = speed.points["parameters"].max()
    return f"{speed.law.predict(largest) / smallest.law.predict(largest):.2f}x"


def forecast_table(forecasts: Sequence[Forecast]) -> DataFrame:
    """One row per forecast, with what came out where there is something."""
    rows = []
    for each in forecasts:
        ran = each.outcome is not None
        spread = f" ± {each.outcome_spread:.4f}" if each.outcome_spread is not None else ""
        after = f", after {each.started} runs there had started" if each.started else ""
        rows.append(
            {
                "family": each.family,
                "parameters": short(each.parameters),
                "tokens": short(each.tokens),
                "forecast": f"{each.loss:.4f}",
                "90 % interval": f"[{each.low:.4f}, {each.high:.4f}]",
                "outcome": f"{each.outcome:.4f}{spread}" if ran else "not run",
                "error": f"{each.outcome - each.loss:+.4f}" if each.outcome is not None else "",
                "verdict": ("inside" if each.inside else "outside") if ran else "",
                "tokens/s expected": short(each.tokens_per_second) if each.tokens_per_second else "n/a",
                "tokens/s found": short(each.outcome_tokens_per_second) if each.outcome_tokens_per_second else "",
                "s/step expected": _step_seconds(each),
                "written": each.written + after,
            }
        )
    return DataFrame(rows, dtype=object)


def _step_seconds(forecast: Forecast) -> str:
    speed, tokens = forecast.tokens_per_second, forecast.tokens_per_step
    return f"{tokens / speed:.3g}" if speed and tokens else "n/a"


def _forecast_lines(results: Results) -> Iterator[str]:
    """How forecasts came out: those written before their runs and those of what is held out, each by itself."""
    ran = [each for each in results.forecasts if each.outcome is not None]
    for held_out in (False, True):
        those = [each for each in ran if (each.written == HELD_OUT) is held_out]
        if those:
            inside, error = sum(each.inside for each in those), max(abs((each.outcome or 0) / each.loss - 1) for each in those)
            what = "held-out outcomes lie" if held_out else "outcomes that were forecast lie"
            yield f"{inside} of {len(those)} {what} inside their 90 % intervals; the largest error is {error:.2%} of the loss."


def _isoflop_table(results: Results) -> DataFrame:
    rows = []
    for profile in results.isoflops:
        lowest = f"{profile.parabola.loss:.4f}" if profile.parabola.inside else ""
        sizes = ", ".join(profile.points["parameters"].map(short))
        rows.append([short(profile.budget), profile.family, sizes, _minimum(profile), lowest])
    return DataFrame(rows, columns=["FLOPs", "family", "sizes", "parameters at the minimum", "loss there"])


def _evaluations_table(results: Results) -> DataFrame:
    """One row per run and curve: where it begins and ends, and between what values it lies."""
    rows = []
    for (run, name), points in results.evaluations.groupby(["run", "evaluation"], sort=False):
        first, last = points.iloc[0], points.iloc[-1]
        row = {"run": run, "evaluation": name, "checkpoints": str(len(points))}
        for when, point in (("first", first), ("last", last)):
            row |= {f"{when} at": short(point["tokens"]), when: f"{point['value']:.5g}"}
        rows.append(row | {"lowest": f"{points['value'].min():.5g}", "highest": f"{points['value'].max():.5g}"})
    return DataFrame(rows, dtype=object)


_WORDS = {
    "axis",
    "evaluation",
    "written",
    "tried",
    "shape",
    "compared with",
    "note",
    "front",
    "verdict",
    "sizes",
    "parameters at the minimum",
}
_DETAILS = ("MFU", "n_h", "tokens/s", "time", "shape", "FLOPs", "training loss")
_DETAILS += ("parameters", "compared with", "front", "seeds")  # type: ignore[assignment]
"""Columns that a terminal may leave out, the first of them first."""


def show(title: str, table: DataFrame, details: Sequence[str] = _DETAILS, last: bool = True) -> None:
    """Print a table; `details` and `last` as in `print_table`."""
    print_table(number_table(title, table.columns, table.values.tolist(), {table.columns[0], *_WORDS}), details, last)


# -- CSV and JSON ------------------------------------------------------------------------------------------------------

_MODEL = {"family": "family", "n_h": "n_h", "layers": "model.num_hidden_layers"}
_MODEL |= {name: f"model.{name}" for name in ("hidden_size", "num_heads", "head_dim", "intermediate_size")}
_SIZES = {"parameters": "parameters", "parameters_without_embedding": "without_embedding", "tokens": "tokens", "flops": "flops"}
_TRAINING_LOSS = {"training_loss_nats_per_token": "training_loss"}
_SPEED = {"tokens_per_second": "tokens_per_second", "mfu": "mfu", "training_seconds": "seconds"}
_RUN = {name: name for name in ("run", "folder", "state", "step", "steps")} | _MODEL | _SIZES
_RUN |= {"vocab_size": "model.vocab_size", "seed": "debug.seed", "data_seed": "data.seed"} | _TRAINING_LOSS
_RUN |= {"validation_loss_nats_per_token": "validation_loss", "validation_bits_per_byte": "validation_bits_per_byte"} | _SPEED
_RUN |= {name: name for name in ("skipped_steps", "tokenizer", "fingerprint", "validation_fingerprint", "device")}
_RUN |= {name: name for name in ("world_size", "git_commit", "branched_from", "shared_tokens")}
"""Names of columns of runs.csv, and those of the frame. SI units."""


def runs_csv(results: Results) -> bytes:
    """One row per run with everything a report knows about it."""
    values = results.runs[list(_RUN.values())].to_numpy().tolist()
    values = [["nan" if value != value else value for value in row] for row in values]
    rows = DataFrame(values, columns=list(_RUN), dtype=object)  # or pandas writes 100.0 for the integers beside an unknown one
    for key in results.differing:
        if "." in key:
            rows[key] = results.started[key]  # empty for runs that have not started
    return rows.to_csv(index=False).encode()


def configurations_csv(results: Results) -> bytes:
    """One row per configuration: means and spreads over seeds, medians of speeds."""
    rows = results.configurations
    sizes = {name: rows[column] for name, column in (_MODEL | _SIZES | _TRAINING_LOSS).items()}
    found = sizes | {
        "loss_unit": results.unit,
        "validation_loss_mean": rows["mean"],
        "validation_loss_standard_deviation": rows["spread"],
        "seeds": rows["losses"].map(len),
        "not_counted": rows["names"].map(len) - rows["used"],
        **{name: rows[column] for name, column in _SPEED.items()},
        **{name: rows[name] for name in ("on_front_by_flops", "on_front_by_parameters", *results.differing)},
        "runs": rows["names"].map(" ".join),
    }
    return DataFrame(found).to_csv(index=False).encode()


def as_json(results: Results) -> dict[str, Any]:
    """Fits, profiles and comparisons as numbers; the writer makes null of what is not finite."""

    def law(fit: Fit) -> dict[str, Any]:
        if fit.law is None:
            return {"not_fitted": fit.lacks}
        values = {key: [e.value, e.low, e.high] for key, e in fit.law.estimates.items()}
        return {
            "estimates": values,
            "undetermined": fit.law.undetermined,
            "runs": fit.law.points,
            "rms_error_of_log": fit.law.error,
        }

    isoflop = [
        {
            "flops": profile.budget,
            "family": profile.family,
            "minimum": profile.parabola.minimum if profile.parabola.inside else None,
            "interval": profile.parabola.interval,
        }
        for profile in results.isoflops
    ]
    comparisons = [
        {
            **{name: row[name] for name in ("parameters", "tokens", "family")},
            "against": row["against_family"],
            "difference": row["difference"],
            "noise": row["noise_of_difference"],
            "verdict": row["verdict"],
            "interval": [row["low"], row["high"]] if row["low"] <= row["high"] else None,
        }
        for row in results.compared.to_dict("records")
    ]
    both = zip(results.surfaces, results.computes, strict=True)
    fits = {surface.family: {"L(N, D)": law(surface), "L(C)": law(compute)} for surface, compute in both}
    tunings = [
        {
            **{name: t.points[name].iloc[0] for name in ("family", "parameters", "tokens")},
            "axis": t.axis,
            "tried": [float(value) for value in t.points[t.key]],
            "losses": t.points["mean"].tolist(),
            "best": t.value if t.settled else None,
            "interval": t.parabola.interval if t.parabola else None,
            f"rise_at_{AROUND:g}x": t.rise,
            "add": t.add,
            "lacks": t.lacks or None,
        }
        for t in results.tunings
    ]
    speeds = [
        {
            "family": speed.family,
            "seconds_per_token_fixed": speed.law and speed.law.fixed,
            "seconds_per_token_and_parameter": speed.law and speed.law.per_parameter,
            "rms_relative_error": speed.law and speed.law.error,
            "tokens_per_step": speed.tokens_per_step,
            "not_fitted": speed.lacks or None,
        }
        for speed in results.speeds
    ]
    forecasts = [each.model_dump() for each in results.forecasts]
    found = {"fits": fits, "isoflop": isoflop, "comparisons": comparisons, "tuning": tunings}
    evaluations = results.evaluations.drop(columns="configuration").to_dict("records")
    return {"loss": results.unit, **found, "speeds": speeds, "forecasts": forecasts, "evaluations": evaluations}


# -- the page ----------------------------------------------------------------------------------------------------------


def page(results: Results, figures: dict[str, tuple[bytes, str]], typed: str) -> bytes:
    """One HTML page that holds its own figures and needs no network; `figures` are PNGs and captions, `typed` the command.

    Names and descriptions of runs are text from elsewhere: the template escapes everything it is given.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("titan_dp.studies.report")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    content = {
        "results": results,
        "summary": summary(results),
        "losses": _losses_table(results),
        "tables": tables(results),
        "runs": runs_table(results),
        "words": {"family", "run", "state", *_WORDS},
        "confidence": CONFIDENCE_TEXT,
        "facts": {"made": date.today().isoformat(), "command": typed} | _provenance(results),
        "figures": {
            name: {"data": base64.b64encode(raw).decode("ascii"), "caption": caption}
            for name, (raw, caption) in figures.items()
        },
    }
    return environment.get_template("report.html").render(content).encode()


def _losses_table(results: Results) -> tuple[list[str], list[list[tuple[str, bool]]]]:
    """The validation losses of all comparisons: headers, and rows of cells with whether one is the lowest of its row.

    A column is a family; of several shapes at one size the best counts.
    """
    families = list(dict.fromkeys(family for rows in results.comparisons for family in rows["family"]))
    families.sort(key=results.configurations["family"].tolist().index)
    table = []
    for rows in results.comparisons:
        lowest = rows.loc[[same["mean"].idxmin() for _, same in rows.groupby("family")]].set_index("family")
        cells = dict(zip(lowest.index, _means(lowest), strict=True))
        first = rows.iloc[0]
        others = (str(first[key]) for key in results.differing_untuned)
        place = [short(rows["parameters"].min()), short(rows["tokens"].min()), *others]
        best = lowest["mean"].idxmin()
        table.append([*((text, False) for text in place), *((cells.get(f, ""), f == best) for f in families)])
    return ["parameters", "tokens", *results.differing_untuned, *families], table


def _provenance(results: Results) -> dict[str, str]:
    """Tokenizers, validation texts, commits, versions of torch and machines of the runs."""
    started = results.started
    parts = {
        "tokenizer": results.tokenizers,
        "validation text": started["validation_fingerprint"].dropna().str[:12],
        "commit of the runs": started["git_commit"].fillna("unknown").str[:12],
        "torch of the runs": started["torch"].fillna("unknown"),
        "trained on": started["world_size"].map(str) + " x " + started["device"],
    }
    return {name: ", ".join(sorted(set(values))) or "none" for name, values in parts.items()}
