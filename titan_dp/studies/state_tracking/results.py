"""What came out of state-tracking runs: one `Outcome` a run folder, one `Summary` a model.

Training is bistable: most runs stay on a plateau or leave it abruptly, so the fraction of seeds that solved the task comes
with a confidence interval, and a mean of accuracies is never shown. The run that stands for a model is the one that
validates best on words of the training lengths; the test on longer words chooses nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_dp import config
from titan_dp.config.load import config_from_toml
from titan_dp.errors import UserError
from titan_dp.studies.state_tracking.models import label
from titan_dp.train.length_test import FILE, LengthTest, read_length_test
from titan_dp.train.run_folder import identity, read_records, read_run


@dataclass(frozen=True)
class Outcome:
    """A finished run."""

    folder: Path
    config: config.Config
    parameters: int
    steps: int
    """Done, fewer than planned where it stopped when solved."""
    validations: list[dict[str, Any]]
    """Records of metrics.jsonl, in order: step, validation_loss, validation_token_accuracy, validation_sequence_accuracy."""
    seconds: dict[int, float]
    """Of training, without validation and checkpoints, up to each step that was logged."""
    data_wait: float
    """Largest fraction of the time between two log lines that training waited for data, the first line left out."""
    householder_steps: float | None
    """Last mean number of steps a token that a router took."""
    test: LengthTest

    @property
    def solved_step(self) -> int | None:
        """The first validation that reached `state_tracking.solved_accuracy`, of a run that is solved at the end."""
        if not self.is_solved:
            return None
        wanted = self.config.state_tracking.solved_accuracy
        return next((r["step"] for r in self.validations if r["validation_sequence_accuracy"] >= wanted), None)

    @property
    def solved_seconds(self) -> float | None:
        """Training up to `solved_step`, to the last log line before it."""
        return None if self.solved_step is None else max(s for step, s in self.seconds.items() if step <= self.solved_step)

    @property
    def is_solved(self) -> bool:
        """Whether it is so at the end: a run may fall back."""
        return self.last["validation_sequence_accuracy"] >= self.config.state_tracking.solved_accuracy

    @property
    def last(self) -> dict[str, Any]:
        return self.validations[-1]


@dataclass(frozen=True)
class Summary:
    """The seeds of one model on one task."""

    label: str
    outcomes: list[Outcome]
    unfinished: int = 0
    """Runs that were cut off, diverged, or are on their way: not solved, as far as is known."""

    @property
    def seeds(self) -> int:
        return len(self.outcomes) + self.unfinished

    @property
    def solved(self) -> int:
        return sum(outcome.is_solved for outcome in self.outcomes)

    def escape_interval(self) -> tuple[float, float]:
        """95 % Clopper-Pearson interval of the probability that a seed solves the task (exact, for few seeds).

        A run that is not finished counts as one that did not: to leave out those that diverged would flatter a model.
        """
        from scipy.stats import binomtest

        interval = binomtest(self.solved, self.seeds).proportion_ci(0.95, method="exact")
        return float(interval.low), float(interval.high)

    @property
    def chosen(self) -> Outcome:
        """The run that validates best: by words all right, then by loss, one that is not finite last."""

        def key(outcome: Outcome) -> tuple[float, float]:
            loss = outcome.last["validation_loss"]
            known = loss is not None and math.isfinite(loss)
            return -outcome.last["validation_sequence_accuracy"], loss if known else math.inf

        return min(self.outcomes, key=key)


def read_config(folder: Path) -> config.Config:
    """Of a run. Raises UserError where it is none of a state-tracking task."""
    loaded = config_from_toml((folder / "config.toml").read_text(), str(folder / "config.toml"))
    if loaded.data.source != "state_tracking":
        raise UserError(f"{folder} was trained on text; name folders of `titan-dp state-tracking train`")
    return loaded


def read_outcome(folder: Path) -> Outcome | None:
    """The run in `folder`; None where it is not finished. Raises UserError where it is none of a state-tracking task."""
    loaded, facts = read_config(folder), read_run(folder)
    if facts is None or facts.get("state") != "finished" or not (folder / FILE).exists():
        return None
    try:
        records = read_records(folder)
    except OSError as error:
        raise UserError(f"{folder / 'metrics.jsonl'} cannot be read ({error}); train the run again") from error
    if not records:
        raise UserError(f"{folder / 'metrics.jsonl'} holds no record; train the run again")
    steps = [r for r in records if {"loss", "step_seconds", "data_wait"} <= r.keys()]
    validations = [r for r in records if "validation_sequence_accuracy" in r]
    if not validations:
        raise UserError(f"{folder} was never validated; train it with validation.enable = true")
    return Outcome(
        folder=folder,
        config=loaded,
        parameters=facts["parameters"],
        steps=facts["step"],
        validations=validations,
        seconds=_seconds(steps),
        data_wait=max([r["data_wait"] for r in steps[1:]], default=0.0),
        householder_steps=steps[-1].get("householder_steps"),
        test=read_length_test(folder),
    )


def _seconds(records: list[dict[str, Any]]) -> dict[int, float]:
    done, total = 0, 0.0
    seconds = {}
    for record in records:
        total += (record["step"] - done) * record["step_seconds"]
        done = record["step"]
        seconds[done] = total
    return seconds


def summarise(outcomes: list[Outcome], unfinished: Sequence[config.Config] = ()) -> list[Summary]:
    """By model, in the order in which they come: runs that differ in nothing but their seeds.

    `unfinished` are the settings of runs without an outcome; those of a model without any are left out.

    Raises UserError where the runs are of several tasks or training lengths.
    """
    tasks = {f"{o.test.problem}, words of {o.test.train_length}, tested to {o.test.lengths[-1]}" for o in outcomes}
    if len(tasks) > 1:
        raise UserError(f"the runs are of several tasks ({'; '.join(sorted(tasks))}); report one at a time")
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(_without_seeds(outcome.config), []).append(outcome)
    without = [_without_seeds(c) for c in unfinished]
    names = [_name(runs[0].config.model) for runs in groups.values()]
    return [
        Summary(name if names.count(name) == 1 else f"{name} ({runs[0].folder})", runs, without.count(key))
        for name, (key, runs) in zip(names, groups.items(), strict=True)
    ]


def _without_seeds(c: config.Config) -> str:
    seedless = {"debug": c.debug.model_copy(update={"seed": 0}), "data": c.data.model_copy(update={"seed": 0})}
    return identity(c.model_copy(update=seedless))


def _name(c: config.Model) -> str:
    return label(c) + (f", {c.num_hidden_layers} layers" if c.num_hidden_layers > 1 else "")
