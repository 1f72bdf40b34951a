"""Runs grouped into configurations, their statistics over seeds, and whether their losses can be compared at all.

A configuration is everything that can change the loss but the seeds; its runs are repetitions of one experiment. Losses
enter here under one meaning (nats a token under one tokenizer, or bits a byte), and runs that are not finished or have
diverged never enter a mean. What is compared between configurations is comparisons.py's.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from titan_dp.config.describe import all_keys
from titan_dp.errors import UserError
from titan_dp.files import to_json
from titan_dp.studies.report.runs import Run

SAME_SIZE = SAME_TOKENS = 0.01
SAME_BUDGET = 0.03
CONFIDENCE = 0.95
"""Of the intervals of differences."""
CONFIDENCE_TEXT = f"{100 * CONFIDENCE:.0f} %"

LOSSES = {"nats": "nats a token", "bits-per-byte": "bits a byte"}

# What cannot change the loss, but for rounding, or is known better from run.json: the batch, the steps, the data.
_SECTIONS = {"job", "metrics", "checkpoint", "profiling", "comm", "generate", "parallelism", "activation_checkpoint", "compile"}
_SECTIONS |= {"training.dataloader"}
_KEYS = {"debug.seed", "data.seed", "debug.deterministic", "model.backend", "training.local_batch_size", "training.gc_freq"}
_KEYS |= {"training.global_batch_size", "training.steps", "training.tokens", "training.max_nonfinite_steps", "data.path"}
_KEYS |= {f"validation.{name}" for name in ("enable", "path", "freq", "local_batch_size")}
# What makes a family, and what parameter matching may change between two models that are compared at equal size.
SHAPE = {"hidden_size", "num_hidden_layers", "num_heads", "head_dim", "expand_v", "intermediate_size"}
FAMILY = {"mixer", "num_householder", "use_forget_gate", "allow_neg_eigval", "attention_layers", "attention_num_heads"}
FAMILY |= {"attention_num_kv_heads", "attention_window", "rope_theta"}

T = TypeVar("T")


def deciding_settings(run: Run) -> dict[str, Any]:
    """All that can change a run's loss but its seeds, by dotted key."""
    facts, model = run.started, run.config.model
    settings = {
        name: key.of(run.config) for name, key in all_keys().items() if key.section not in _SECTIONS and name not in _KEYS
    }
    settings |= {
        "model.intermediate_size": model.mlp_size,
        "checkpoint.initial_load_path": run.config.checkpoint.initial_load_path,
        "steps": facts["steps"],
        "tokens a step": facts["tokens_per_step"],
        "data": facts["fingerprint"],
        "tokenizer": facts["tokenizer"],
    }
    return settings


@dataclass(eq=False)
class Configuration:
    """Runs that differ in their seeds only, and their statistics.

    `used` are the finished ones with a finite loss, one for each pair of seeds; only they count.
    """

    settings: dict[str, Any]
    loss: str
    """A key of LOSSES."""
    runs: list[Run] = field(default_factory=list)

    @property
    def first(self) -> Run:
        return self.runs[0]

    @cached_property
    def used(self) -> list[Run]:
        by_seeds = {run.seeds: run for run in reversed(self.runs) if run.state == "finished"}
        return list(by_seeds.values())[::-1]

    @property
    def repeats(self) -> list[Run]:
        """Finished runs left out because another has the same seeds."""
        return [run for run in self.runs if run.state == "finished" and run not in self.used]

    @cached_property
    def losses(self) -> list[float]:
        """Validation losses of the used runs that were validated."""
        return [value for run in self.used if (value := validation_loss(run, self.loss)) is not None]

    @cached_property
    def mean(self) -> float:
        """Of `losses`; NaN where there are none."""
        return statistics.fmean(self.losses) if self.losses else math.nan

    @property
    def spread(self) -> float | None:
        """Sample standard deviation over seeds; one seed has none."""
        return statistics.stdev(self.losses) if len(self.losses) > 1 else None

    def median(self, of: Callable[[Run], float | None]) -> float | None:
        values = [value for run in self.used if (value := of(run)) is not None]
        return statistics.median(values) if values else None

    @property
    def training_loss(self) -> float | None:
        """Mean over the used runs, in nats a token whatever `loss` is."""
        values = [run.totals.training_loss for run in self.used if run.totals.training_loss is not None]
        return statistics.fmean(values) if values else None

    @property
    def parameters(self) -> int:
        return self.first.started["parameters"]

    @property
    def without_embedding(self) -> int:
        return self.parameters - self.first.started["embedding_parameters"]

    @property
    def tokens(self) -> int:
        return self.first.tokens

    @property
    def flops(self) -> int:
        return self.first.flops

    @property
    def seconds(self) -> float | None:
        return self.median(lambda run: run.totals.seconds)

    @property
    def n_h(self) -> int | None:
        """Householder steps or RWKV-7 transitions a token; None for mixers without any."""
        model = self.first.config.model
        return model.num_householder if model.mixer in ("deltaproduct", "rwkv7") else None

    @cached_property
    def family(self) -> str:
        """What is fitted and coloured as one: mixer, n_h, gate and eigenvalue range."""
        model = self.first.config.model
        eigenvalues = "" if self.n_h is None else " [-1, 1]" if model.allow_neg_eigval else " [0, 1]"
        softmax = len(set(model.attention_layers)) if model.mixer != "attention" else 0
        return model.family + eigenvalues + (f" + {softmax} softmax" if softmax else "")

    @property
    def kind(self) -> tuple[Any, ...]:
        """The family without n_h, in the order families are shown."""
        model = self.first.config.model
        mixers = ("deltaproduct", "rwkv7", "gla", "attention")
        choices = (model.use_forget_gate, model.adaptive_householder, not model.allow_neg_eigval)
        return mixers.index(model.mixer), len(model.attention_layers), *choices

    @property
    def shape(self) -> str:
        model = self.first.config.model
        heads = f"{model.num_heads} x {model.head_dim}" if model.mixer != "attention" else f"{model.softmax_heads} heads"
        return f"{model.num_hidden_layers} x {model.hidden_size}, {heads}, {model.mlp_size}"

    def shape_shared_with(self, other: Configuration) -> int:
        """How many of the shape's values are equal."""
        return sum(self.settings[f"model.{key}"] == other.settings[f"model.{key}"] for key in SHAPE)


def validation_loss(run: Run, loss: str) -> float | None:
    """The run's last validation loss in the unit `loss` (a key of LOSSES); None without validation."""
    return run.totals.validation_loss if loss == "nats" else run.totals.validation_bits_per_byte


def group(runs: Iterable[Run], loss: str) -> list[Configuration]:
    """Configurations of the runs that have started, by family, size and tokens."""
    found: dict[str, Configuration] = {}
    for run in runs:
        if run.facts is not None:
            settings = deciding_settings(run)
            key = to_json(settings, sort_keys=True)
            found.setdefault(key, Configuration(settings, loss)).runs.append(run)
    return sorted(found.values(), key=lambda c: (c.kind, c.n_h or 0, c.parameters, c.tokens))


def differing_settings(configurations: list[Configuration]) -> list[str]:
    """Keys, other than those a table shows as family, shape and tokens, in which the configurations differ."""
    shown = {f"model.{key}" for key in SHAPE | FAMILY} | {"steps"}
    keys = [key for key in configurations[0].settings if key not in shown] if configurations else []
    return [key for key in keys if len({to_json(c.settings[key]) for c in configurations}) > 1]


def clusters(items: Iterable[T], size: Callable[[T], float], within: float) -> list[list[T]]:
    """Items whose sizes are within a share `within` of the smallest of their cluster, in order of size."""
    found: list[list[T]] = []
    for item in sorted(items, key=size):
        if found and size(item) <= size(found[-1][0]) * (1 + within):
            found[-1].append(item)
        else:
            found.append([item])
    return found


# -- what is comparable ------------------------------------------------------------------------------------------------


def check_comparable(runs: list[Run], loss: str) -> list[str]:
    """Warnings about runs whose losses can be compared with care; `runs` are those that have started.

    Raises UserError where they cannot be: several tokenizers under nats a token, several validation texts.
    """
    by_tokenizer = _by(runs, "tokenizer")
    if loss == "nats" and len(by_tokenizer) > 1:
        (a, first), (b, other), *_ = by_tokenizer.items()
        raise UserError(
            f"{first.folder} was trained with the tokenizer {a!r} and {other.folder} with {b!r}: losses in nats a token are "
            "not comparable; report them apart, or with --loss bits-per-byte"
        )
    validated = [run for run in runs if run.started["validation_fingerprint"] is not None]
    for tokenizer in by_tokenizer:
        _check_one_text([run for run in validated if run.started["tokenizer"] == tokenizer], "validation_fingerprint")
    if len(by_tokenizer) > 1:  # token ids differ, so does their fingerprint; the text's length in bytes must not
        _check_one_text([run for run in validated if "validation_text_bytes" in run.started], "validation_text_bytes")
    if loss == "bits-per-byte":
        for run in runs:
            if run.state == "finished" and run.totals.validation_loss is not None and validation_loss(run, loss) is None:
                raise UserError(f"{run.folder} has no validation_bits_per_byte in its metrics.jsonl; leave it out")
    warnings = [*_data_warnings(runs, list(by_tokenizer)), *_length_warnings(validated)]
    return [*warnings, *_machine_warnings(runs), *_line_warnings(runs)]


def _by(runs: list[Run], key: str) -> dict[Any, Run]:
    """The first run for each value of run.json's `key`."""
    found: dict[Any, Run] = {}
    for run in runs:
        found.setdefault(run.started[key], run)
    return found


def _check_one_text(runs: list[Run], key: str) -> None:
    found = _by(runs, key)
    if len(found) > 1:
        a, b, *_ = (run.folder for run in found.values())
        raise UserError(f"{a} and {b} were validated on different texts ({key} in run.json): report them apart")


def _data_warnings(runs: list[Run], tokenizers: list[str]) -> list[str]:
    warnings = []
    for tokenizer in tokenizers:
        data = _by([run for run in runs if run.started["tokenizer"] == tokenizer], "fingerprint")
        if len(data) > 1:
            names = " and ".join(f"{run.name} ({fingerprint[:8]})" for fingerprint, run in list(data.items())[:2])
            warnings.append(f"runs were trained on {len(data)} different data sets, for example {names}")
    return warnings


def _length_warnings(runs: list[Run]) -> list[str]:
    """Of validations that covered different parts of one text."""
    covered = [
        (run.totals.validation_tokens * (run.started["bytes_per_token"] or 1), run)
        for run in runs
        if run.state == "finished" and run.totals.validation_tokens
    ]
    if not covered:
        return []
    (least, a), (most, b) = (pick(covered, key=lambda pair: pair[0]) for pick in (min, max))
    if most <= 1.01 * least:
        return []
    counts = f"{a.name} on {a.totals.validation_tokens:,} tokens, {b.name} on {b.totals.validation_tokens:,}"
    return [f"validations covered different parts of the text: {counts}"]


def _machine_warnings(runs: list[Run]) -> list[str]:
    machines = {f"{run.started['world_size']} x {run.started['device']}" for run in runs}
    return [f"tokens/s and times are of different machines: {', '.join(sorted(machines))}"] if len(machines) > 1 else []


def _line_warnings(runs: list[Run]) -> list[str]:
    torn = [run for run in runs if run.totals.unreadable_lines]
    return [f"{run.folder / 'metrics.jsonl'}: {run.totals.unreadable_lines} lines are no records" for run in torn]
