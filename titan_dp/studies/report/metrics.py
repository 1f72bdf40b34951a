"""metrics.jsonl reduced to a run's totals and a thinned training curve.

A file of 10,000 records takes some 30 ms, half the time of parsing all of it: reports read hundreds. A line that a kill
has cut off at the end is left out, one torn elsewhere is left out and counted, and a loss may be NaN.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from titan_dp.train.run_folder import is_number, parsed_record

CURVE_POINTS = 1000
FINAL_SHARE = 0.05
"""Of a run's step records, at its end: their mean is the final training loss."""
_STEP_KEYS = ("step", "loss", "tokens", "tokens_per_second", "step_seconds", "skipped_steps")
_NUMBERS = (*_STEP_KEYS, "mfu")
_VALIDATION_KEYS = ("validation_loss", "validation_bits_per_byte", "validation_tokens")
_COLUMNS = [re.compile(b'"%s": ([^,}]+)' % key) for key in (b"step", b"loss", b"step_seconds", b"tokens")]
_ENDS = re.compile(rb"\}$", re.MULTILINE)


@dataclass(frozen=True)
class Totals:
    """What metrics.jsonl comes to; losses in nats a token, None where nothing of the kind was recorded."""

    step: int = 0
    training_loss: float | None = None
    validation_step: int | None = None
    validation_loss: float | None = None
    validation_bits_per_byte: float | None = None
    validation_tokens: int | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    """Both medians over at most CURVE_POINTS evenly spaced records."""
    seconds: float = 0.0
    """Of training, without validation and checkpoints."""
    skipped_steps: int = 0
    unreadable_lines: int = 0
    """Lines before the last that are no records."""
    curve_steps: list[float] = field(default_factory=list, repr=False)
    curve_tokens: list[float] = field(default_factory=list, repr=False)
    curve_loss: list[float] = field(default_factory=list, repr=False)
    """Means over blocks of records, at most CURVE_POINTS of them; NaN where a block has no finite loss."""


def reduce_metrics(data: bytes) -> Totals | None:
    """The totals of a metrics.jsonl, or None where it holds no record."""
    text, validations, unreadable = _split(data)
    lines = text.splitlines()
    totals = _totals(lines, text, validations, unreadable)
    if totals is None:  # a line is torn
        good = [line for line in lines if _is_step(parsed_record(line))]
        totals = _totals(good, b"\n".join(good), validations, unreadable + len(lines) - len(good))
    return totals


def _totals(lines: list[bytes], text: bytes, validations: list[dict[str, Any]], unreadable: int) -> Totals | None:
    """Of step records, as lines and as one text, and validation records; None where there are none, or a line is no record."""
    columns = _columns(text, len(lines))
    if columns is None or not (lines or validations):
        return None
    step, loss, step_seconds, tokens = columns
    final = validations[-1] if validations else {}
    shown = [*map(parsed_record, lines[:: math.ceil(len(lines) / CURVE_POINTS) or 1])]
    last = parsed_record(lines[-1]) if lines else None
    if not all(map(_is_step, [*shown, *([last] if lines else [])])):
        return None
    curve_steps, curve_tokens, curve_loss = _thin(step, tokens, loss)
    return Totals(
        step=int(step[-1]) if lines else 0,
        training_loss=_finite_mean(loss[-math.ceil(FINAL_SHARE * len(loss)) :]) if lines else None,
        validation_step=final.get("step"),
        validation_loss=final.get("validation_loss"),
        validation_bits_per_byte=final.get("validation_bits_per_byte"),
        validation_tokens=final.get("validation_tokens"),
        tokens_per_second=_median([record["tokens_per_second"] for record in shown if record]),
        mfu=_median([record["mfu"] for record in shown if record and "mfu" in record]),
        seconds=sum((now - before) * took for before, now, took in zip([0.0, *step], step, step_seconds, strict=False)),
        skipped_steps=int(last["skipped_steps"]) if last else 0,
        unreadable_lines=unreadable,
        curve_steps=curve_steps,
        curve_tokens=curve_tokens,
        curve_loss=curve_loss,
    )


def _split(data: bytes) -> tuple[bytes, list[dict[str, Any]], int]:
    """The text of the step records, the parsed validation records, and how many of the latter are torn.

    A kill can cut off the last line, which is then left out and no cause for a warning.
    """
    last = data.rfind(b"\n", 0, len(data) - 1) + 1
    if parsed_record(data[last:]) is None:
        data = data[:last]
    steps, validations, torn, end = [], [], 0, 0
    for match in re.finditer(rb'"validation_loss"', data):
        start = data.rfind(b"\n", 0, match.start()) + 1
        steps.append(data[end:start])
        end = (data.find(b"\n", start) + 1) or len(data)
        record = parsed_record(data[start:end])
        if record is not None and _is_validation(record):
            validations.append(record)
        else:
            torn += 1
    return b"".join([*steps, data[end:]]), validations, torn


def _columns(text: bytes, lines: int) -> list[list[float]] | None:
    """Step, loss, seconds a step and tokens of the records in `text`, or None where one of so many lines is not whole.

    Every record has a dozen numbers, of which these four are needed of all: parsing nothing else takes half the time.
    """
    found = [pattern.findall(text) for pattern in _COLUMNS]
    if any(len(values) != lines for values in found) or len(_ENDS.findall(text)) != lines:
        return None
    found[1] = [b"nan" if loss == b"null" else loss for loss in found[1]]
    try:
        return [list(map(float, values)) for values in found]
    except ValueError:
        return None


def _is_step(record: dict[str, Any] | None) -> bool:
    return record is not None and all(is_number(record.get(key, 0 if key == "mfu" else None)) for key in _NUMBERS)


def _is_validation(record: dict[str, Any]) -> bool:
    return all(is_number(record[key]) for key in _VALIDATION_KEYS if key in record)


def _thin(*columns: list[float]) -> list[list[float]]:
    """Means over the same blocks of all columns."""
    size = math.ceil(len(columns[0]) / CURVE_POINTS) or 1
    return [[_finite_mean(column[i : i + size]) for i in range(0, len(column), size)] for column in columns]


def _finite_mean(values: list[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _median(values: list[float]) -> float | None:
    return median(values) if values else None
