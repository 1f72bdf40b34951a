"""Runs grouped into configurations; whether their losses can be compared at all; which n_h is best at equal size and tokens.

A configuration is everything that can change the loss except the seeds; its runs are repetitions of one experiment. Losses
have one meaning here (nats per token under one tokenizer, or bits per byte), and runs that are not finished or have diverged
are in no mean. A comparison holds configurations that are equal in everything except mixer and shape, and within 1 % of one
size and one number of tokens; each is compared with the smallest n_h among them.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import pairwise
from typing import Any

import numpy as np
from pandas import DataFrame, Series
from scipy import stats

from titan_dp.config.describe import all_keys
from titan_dp.errors import UserError
from titan_dp.files import to_json

SAME_SIZE = SAME_TOKENS = 0.01
SAME_BUDGET = 0.03
CONFIDENCE = 0.95
"""Of the intervals of differences."""
INSIDE = "inside the noise"
"""Verdict on a difference no larger than the noise."""
CONFIDENCE_TEXT = f"{100 * CONFIDENCE:.0f} %"

UNITS = {"nats": "nats per token", "bits-per-byte": "bits per byte"}
LOSSES = {"nats": "validation_loss", "bits-per-byte": "validation_bits_per_byte"}
SEEDS = ["debug.seed", "data.seed"]

# These change the loss by rounding at most, or are known better from run.json: the batch, the steps, the data.
_SECTIONS = {"job", "metrics", "checkpoint", "profiling", "comm", "generate", "parallelism", "activation_checkpoint", "compile"}
_SECTIONS |= {"training.dataloader"}
_KEYS = {*SEEDS, "debug.deterministic", "model.backend", "training.local_batch_size", "training.gc_freq"}
_KEYS |= {"training.global_batch_size", "training.steps", "training.tokens", "training.max_nonfinite_steps", "data.path"}
_KEYS |= {f"validation.{name}" for name in ("enable", "path", "freq", "local_batch_size")}
# What parameter matching may change between two models that are compared at equal size, and what makes a family.
_SHAPE = ["hidden_size", "num_hidden_layers", "num_heads", "head_dim", "expand_v", "intermediate_size"]
_SHAPE = [f"model.{name}" for name in _SHAPE]
_FAMILY = ["mixer", "num_householder", "use_forget_gate", "allow_neg_eigval", "attention_layers", "attention_num_heads"]
_FAMILY += ["num_key_heads", "attention_block", "attention_num_kv_heads", "attention_window", "rope_theta"]
_FREE = {*_SHAPE, *(f"model.{name}" for name in _FAMILY), "steps"}

_RENAMED = {"tokens a step": "tokens_per_step", "data": "fingerprint"}  # as tables show them
_DECIDING = [name for name, key in all_keys().items() if key.section not in _SECTIONS and name not in _KEYS]
_DECIDING += ["checkpoint.initial_load_path", "steps", *_RENAMED, "tokenizer"]
"""Columns of all that can change a run's loss, except its seeds."""
_LENGTH = ("training.steps", "training.tokens", "training.global_batch_size")


def group(runs: DataFrame, loss: str) -> tuple[DataFrame, DataFrame]:
    """The runs with a column "configuration", and the configurations by family, size and tokens.

    A configuration has the columns of its first run and, over its `used` runs (finished, one per pair of seeds): "losses",
    the validation losses in the unit `loss` (a key of UNITS), with their "seeds" (pairs), "mean" and "spread" (sample standard
    deviation; NaN for one seed); "noise", the larger of that and the mean "validation_noise" of its runs in the same unit; the
    mean "training_loss"; medians of "tokens_per_second", "mfu" and "seconds". "names" are those of all its runs, "repeats"
    pairs of names: runs that are not used, and the run with the same seeds that is.
    """
    runs = runs.assign(**{name: runs[column] for name, column in _RENAMED.items()})
    started = runs[runs["state"] != "not started"]
    rows = []
    for _, members in started.groupby(_as_text(started, _DECIDING), sort=False):
        finished = members[members["state"] == "finished"]
        used = finished.drop_duplicates(SEEDS)
        measured = used.dropna(subset=LOSSES[loss])
        losses = measured[LOSSES[loss]].astype(float)
        first_of = dict(zip(zip(*(used[seed] for seed in SEEDS), strict=True), used["run"], strict=True))
        again = finished.drop(used.index)
        medians = {key: used[key].astype(float).median() for key in ("tokens_per_second", "mfu", "seconds")}
        statistics = {
            "losses": losses.tolist(),
            "seeds": list(measured[SEEDS].itertuples(index=False, name=None)),
            "mean": losses.mean(),
            "spread": losses.std(),
            "noise": np.fmax(losses.std(), _validation_noise(measured, loss)),
            "training_loss": used["training_loss"].astype(float).mean(),
            "used": len(used),
            "names": members["run"].tolist(),
            "repeats": [(row["run"], first_of[tuple(row[SEEDS])]) for _, row in again.iterrows()],
        }
        rows.append(members.iloc[0].to_dict() | medians | statistics)
    rows.sort(key=lambda row: (row["kind"], row["n_h"] or 0, row["parameters"], row["tokens"]))
    kinds = sorted({row["kind"] for row in rows})
    found = DataFrame(rows, dtype=object)
    found = found.assign(
        kind=found["kind"].map(kinds.index), **{key: found[key].astype(float) for key in ("mean", "spread", "noise")}
    )
    owner = {name: label for label, names in found["names"].items() for name in names}
    return runs.assign(configuration=runs["run"].map(owner)), found


def _validation_noise(runs: DataFrame, loss: str) -> float:
    """Mean over runs of the scatter of their last validations, in the unit `loss`; NaN if none has enough of them."""
    scale = runs[LOSSES[loss]].astype(float) / runs["validation_loss"].astype(float)
    return float((runs["validation_noise"].astype(float) * scale).mean())


def _as_text(frame: DataFrame, columns: list[str]) -> Series:
    """The columns of each row as one JSON text: values may be lists, which pandas cannot group by."""
    return Series(map(to_json, frame[columns].to_numpy().tolist()), frame.index, dtype=object)


def alike(frame: DataFrame, without: Collection[str]) -> Series:
    """A text per row that is equal for rows which agree in all that can change a loss, except seeds and `without`."""
    return _as_text(frame, [key for key in _DECIDING if key not in without])


def configured_alike(frame: DataFrame, without: Collection[str]) -> Series:
    """The same by settings alone, which runs have that have not started."""
    return _as_text(frame, [key for key in (*_DECIDING, *_LENGTH) if "." in key and key not in without])


def differing_settings(configurations: DataFrame) -> list[str]:
    """Columns in which the configurations differ, other than those that a table shows as family, shape and tokens."""
    shown = [key for key in _DECIDING if key not in _FREE]
    return [key for key in shown if _as_text(configurations, [key]).nunique() > 1]


def clusters(frame: DataFrame, column: str, within: float) -> list[DataFrame]:
    """The rows in order of `column`, cut wherever a value exceeds the smallest of its cluster by more than a share `within`."""
    frame = frame.sort_values(column, kind="stable")
    starts: list[int] = []
    for i, size in enumerate(sizes := frame[column].tolist()):
        if not starts or size > sizes[starts[-1]] * (1 + within):
            starts.append(i)
    return [frame.iloc[start:end] for start, end in pairwise([*starts, len(frame)])]


def best(frame: DataFrame) -> Any:
    """The label of the configuration with the lowest mean loss, the first of equals."""
    return frame["mean"].idxmin()


def front(configurations: DataFrame, cost: str, within: float) -> DataFrame:
    """The Pareto front: configurations that no other beats in loss at a lower `cost`, or at one equal to `within`; by cost.

    Matched models differ a little in size. Without the tolerance the smallest of each set would always be on the front.
    """
    found: list[Any] = []
    for same in clusters(configurations.dropna(subset="mean"), cost, within):
        lowest = best(same)
        if not found or same["mean"][lowest] < configurations["mean"][found[-1]]:
            found.append(lowest)
    return configurations.loc[found]


# -- comparisons -------------------------------------------------------------------------------------------------------


def compare(configurations: DataFrame, tuned: Collection[str] = ()) -> list[DataFrame]:
    """Every set of at least two families at equal size, tokens and other settings but the `tuned` ones, by size and tokens.

    The rows of a set are configurations. "against" is the label of the one that a row is compared with, None for that one
    itself; "difference" is that of the mean losses; "error" is its standard error and "low" and "high" are the ends of its
    interval, NaN without one; "noise_of_difference" is the standard error by the noise of both, which one seed may have too;
    "verdict" is INSIDE for a difference no larger than that, else the interval in words; "against_family" and "against_name"
    are what the other one is called.
    """
    measured, found = configurations.dropna(subset="mean"), []
    for _, same in measured.groupby(alike(measured, {*_FREE, *tuned}), sort=False):
        for sized in clusters(same, "parameters", SAME_SIZE):
            for equal in clusters(sized, "tokens", SAME_TOKENS):
                if equal["family"].nunique() > 1:
                    equal = equal.sort_index()
                    found.append(equal.join(DataFrame([_compared(row, equal) for _, row in equal.iterrows()], equal.index)))
    return sorted(found, key=lambda rows: (rows["parameters"].min(), rows["tokens"].min()))


def _compared(row: Series, equal: DataFrame) -> dict[str, Any]:
    label = _reference(row, equal)
    if label is None:
        return {"against": None}
    other = equal.loc[label]
    low, high = welch(row["losses"], other["losses"]) or (float("nan"), float("nan"))
    verdict = "lower" if high < 0 else "higher" if low > 0 else "not told apart" if low <= high else ""
    noise = float(np.sqrt(sum(each["noise"] ** 2 / len(each["losses"]) for each in (row, other))))
    if abs(row["mean"] - other["mean"]) <= noise:
        verdict = INSIDE
    several = (equal["family"] == other["family"]).sum() > 1
    name = other["family"] + (f", {other['shape']}" if several else "")
    found = {
        "against": label,
        "against_family": other["family"],
        "against_name": name,
        "difference": row["mean"] - other["mean"],
    }
    found |= {"noise_of_difference": noise, "error": _error(row["losses"], other["losses"])}
    return found | {"low": low, "high": high, "verdict": verdict}


def _reference(row: Series, equal: DataFrame) -> Any:
    """The smallest n_h of the same kind (mixer, gate, range of eigenvalues), or of the first kind if that has no other n_h.

    Among several shapes the one most like the row's counts, then the lowest loss. None if it would be the row itself.
    """
    with_n_h = equal.dropna(subset="n_h")
    kin = with_n_h[with_n_h["kind"] == row["kind"]]
    if kin["n_h"].nunique() < 2:
        kin = with_n_h[with_n_h["kind"] == with_n_h["kind"].min()]
    candidates = kin[kin["n_h"] == kin["n_h"].min()]
    if candidates.empty or row.name in candidates.index:
        return None
    shared = (candidates[_SHAPE] == row[_SHAPE]).sum(axis=1)
    return best(candidates[shared == shared.max()])


def welch(a: list[float], b: list[float]) -> tuple[float, float] | None:
    """Interval of mean(a) - mean(b) by Welch's t; None with fewer than two values on a side, or without any scatter."""
    if len(a) < 2 or len(b) < 2 or len(set(a)) == len(set(b)) == 1:
        return None
    interval = stats.ttest_ind(a, b, equal_var=False).confidence_interval(CONFIDENCE)
    return float(interval.low), float(interval.high)


def _error(a: list[float], b: list[float]) -> float:
    """Standard error of mean(a) - mean(b); NaN with fewer than two values on a side."""
    return float(np.sqrt(Series(a).var() / len(a) + Series(b).var() / len(b)))


# -- what is comparable ------------------------------------------------------------------------------------------------


def check_comparable(runs: DataFrame, loss: str) -> list[str]:
    """Warnings about runs whose losses must be compared with care; `runs` are those that have started.

    Raises UserError if they cannot be compared: several tokenizers under nats per token, several validation texts.
    """
    tokenizers = runs.drop_duplicates("tokenizer")
    if loss == "nats" and len(tokenizers) > 1:
        (_, first), (_, other), *_ = tokenizers.iterrows()
        raise UserError(
            f"{first['folder']} was trained with the tokenizer {first['tokenizer']!r} and {other['folder']} with "
            f"{other['tokenizer']!r}: losses in nats per token are not comparable; report them apart, or with "
            "--loss bits-per-byte"
        )
    validated = runs.dropna(subset="validation_fingerprint")
    for _, same in validated.groupby("tokenizer", sort=False):
        _check_one_text(same, "validation_fingerprint")
    if len(tokenizers) > 1:  # token ids differ, and so their fingerprints; the text's length in bytes must not
        _check_one_text(validated.dropna(subset="validation_text_bytes"), "validation_text_bytes")
    finished = runs[runs["state"] == "finished"]
    measured = finished.dropna(subset="validation_loss")
    unknown = measured.loc[measured[LOSSES[loss]].isna(), "folder"]
    if len(unknown):
        raise UserError(f"{unknown.iloc[0]} has no {LOSSES[loss]} in its metrics.jsonl; leave it out")
    torn = runs[runs["unreadable_lines"] > 0]
    machines = sorted({f"{n} x {device}" for n, device in zip(runs["world_size"], runs["device"], strict=True)})
    return [
        *_data_warnings(runs),
        *_length_warnings(validated[(validated["state"] == "finished") & (validated["validation_tokens"].fillna(0) > 0)]),
        *([f"tokens/s and times are of different machines: {', '.join(machines)}"] if len(machines) > 1 else []),
        *(f"{row['folder'] / 'metrics.jsonl'}: {row['unreadable_lines']} lines are not records" for _, row in torn.iterrows()),
        *([_without_loss(finished)] if len(measured) < len(finished) else []),
    ]


def _check_one_text(runs: DataFrame, key: str) -> None:
    folders = runs.drop_duplicates(key)["folder"].tolist()
    if len(folders) > 1:
        raise UserError(
            f"{folders[0]} and {folders[1]} were validated on different texts ({key} in run.json): report them apart"
        )


def _data_warnings(runs: DataFrame) -> list[str]:
    warnings = []
    for _, same in runs.groupby("tokenizer", sort=False):
        data = same.drop_duplicates("fingerprint")
        if len(data) > 1:
            names = [f"{row['run']} ({row['fingerprint'][:8]})" for _, row in data.iloc[:2].iterrows()]
            warnings.append(f"runs were trained on {len(data)} different data sets, for example {' and '.join(names)}")
    return warnings


def _length_warnings(runs: DataFrame) -> list[str]:
    """Of validations that covered different parts of one text."""
    covered = runs["validation_tokens"] * runs["bytes_per_token"].fillna(0).replace(0, 1)
    if runs.empty or covered.max() <= 1.01 * covered.min():
        return []
    least, most = (runs.iloc[covered.tolist().index(end)] for end in (covered.min(), covered.max()))
    return [
        f"validations covered different parts of the text: {least['run']} on {least['validation_tokens']:,} tokens, "
        f"{most['run']} on {most['validation_tokens']:,}"
    ]


def _without_loss(finished: DataFrame) -> str:
    without = finished[finished["validation_loss"].isna()]["run"]
    return f"{len(without)} finished runs have no validation loss and are in no fit, for example {without.iloc[0]}"
