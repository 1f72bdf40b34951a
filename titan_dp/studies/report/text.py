"""Numbers and sentences as a report writes them, the same in the terminal, the figures and the page."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from titan_dp.studies.report.configurations import CONFIDENCE_TEXT
from titan_dp.studies.report.families import FamilyFits, IsoFlop
from titan_dp.studies.report.fits import Estimate, PowerLaw
from titan_dp.studies.report.results import Results

_NAMED = 5  # runs in a sentence; the tables name all


def count(value: float) -> str:
    """1_234_567 -> '1.23M'; below 0.01 and from 1e15 on (FLOPs) in powers of ten."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if value >= 1e15 or value < 0.01:
        return re.sub(r"e\+?(-?)0*", r"e\1", f"{value:.3g}")
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= 0.9995 * size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def loss(value: float | None) -> str:
    return "n/a" if value is None or math.isnan(value) else f"{value:.4f}"


def percent(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.1%}"


def duration(seconds: float | None) -> str:
    """'45 s', '12 min', '3.4 h', '9.1 d'."""
    if seconds is None:
        return "n/a"
    for unit, size, least in (("d", 86400, 2), ("h", 3600, 1.5), ("min", 60, 1.5)):
        if seconds >= least * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def estimate(value: Estimate) -> str:
    return f"{value.value:.3g} [{value.low:.3g}, {value.high:.3g}]"


def of_runs(n: int) -> str:
    return "1 run" if n == 1 else f"{n:,} runs"


# -- sentences ---------------------------------------------------------------------------------------------------------


def summary(results: Results) -> list[str]:
    """What was read, what is left out of means and fits, and what came out at equal size and tokens."""
    counts = ", ".join(f"{n:,} {state}" for state, n in results.counts.items())
    lines = [f"{of_runs(len(results.runs))} ({counts}) of {len(results.configurations):,} configurations."]
    lines += [line for state in ("diverged", "unfinished", "not started") if (line := _left_out(results, state))]
    return lines + list(_verdicts(results))


def _left_out(results: Results, state: str) -> str:
    runs = results.in_state(state)
    if not runs:
        return ""
    at = {run: f" (step {run.totals.step:,} of {run.started['steps']:,})" if state == "unfinished" else "" for run in runs}
    names = ", ".join(run.name + at[run] for run in runs[:_NAMED])
    more = f" and {len(runs) - _NAMED:,} more" if len(runs) > _NAMED else ""
    return f"{state.capitalize()}, so in no mean and no fit: {names}{more}."


def _verdicts(results: Results) -> Iterator[str]:
    """For each family and what it is compared with: how often its loss is lower, and how often that is told apart."""
    pairs: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for comparison in results.comparisons:
        for row in comparison.rows:
            if row.against is not None and row.difference is not None:
                pair = row.configuration.family, row.against.family
                pairs.setdefault(pair, []).append((row.difference, row.verdict))
    for (family, against), found in pairs.items():
        mean = sum(difference for difference, _ in found) / len(found)
        lower = sum(difference < 0 for difference, _ in found)
        clear = {verdict: sum(v == verdict for _, v in found) for verdict in ("lower", "higher")}
        yield (
            f"At equal size and tokens {family} has a lower validation loss than {against} in {lower} of {len(found)} "
            f"comparisons, mean difference {mean:+.4f} {results.unit}; by its {CONFIDENCE_TEXT} interval lower in "
            f"{clear['lower']}, higher in {clear['higher']}."
        )


def fit_note(fits: FamilyFits, law: PowerLaw | None, lacks: str) -> str:
    """What a reader must know of one fit beside its numbers."""
    if law is None:
        return f"Not fitted: {lacks}."
    notes = []
    at = [name for name in law.undetermined if law.estimates[name].bound == "value"]
    reaching = [name for name in law.undetermined if name not in at]
    if at:
        notes.append(f"undetermined: {', '.join(at)} at the bound of the search")
    if reaching:
        notes.append(f"undetermined: the interval of {', '.join(reaching)} reaches the bound of the search")
    if fits.left_out:
        notes.append(f"{fits.left_out} configurations with a higher loss at equal size and tokens left out")
    return "; ".join(notes) + "." if notes else ""


def minimum(profile: IsoFlop) -> str:
    """Where an isoFLOP parabola is lowest, in words."""
    parabola = profile.parabola
    if parabola.minimum is None:
        return "none: the parabola opens downwards"
    if not parabola.inside:
        side = "below" if parabola.minimum < min(c.parameters for c in profile.configurations) else "above"
        return f"outside, {side} the sampled sizes"
    if parabola.interval is None:
        return f"{count(parabola.minimum)}, no interval (as many runs as coefficients)"
    if not math.isfinite(parabola.interval[1]):
        return f"{count(parabola.minimum)}, undetermined (unbounded interval)"
    return f"{count(parabola.minimum)} [{count(parabola.interval[0])}, {count(parabola.interval[1])}]"
