"""What came out of state-tracking runs: one `Outcome` a run folder, one `Summary` a model.

Training is bistable: most runs stay on a plateau or leave it abruptly, so the fraction of seeds that solved the task comes
with a confidence interval, and a mean of accuracies is never shown. The run that stands for a model is the one that
validates best on words of the training lengths; the test on longer words chooses nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_dp import config
from titan_dp.config_loader import config_from_toml
from titan_dp.errors import UserError
from titan_dp.run_folder import read_run
from titan_dp.state_tracking.models import label
from titan_dp.synthetic_test import FILE, TestResult, read_test


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
    seconds: float
    """Of training, without validation and checkpoints."""
    data_wait: float
    """Largest fraction of the time between two log lines that training waited for data, the first line left out."""
    householder_steps: float | None
    """Last mean number of steps a token that a router took."""
    test: TestResult

    @property
    def solved_step(self) -> int | None:
        """The first validation that reached `state_tracking.solved_accuracy`."""
        wanted = self.config.state_tracking.solved_accuracy
        return next((r["step"] for r in self.validations if r["validation_sequence_accuracy"] >= wanted), None)

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

    @property
    def solved(self) -> int:
        return sum(outcome.is_solved for outcome in self.outcomes)

    def escape_interval(self) -> tuple[float, float]:
        """95 % Clopper-Pearson interval of the probability that a seed solves the task (exact, for few seeds)."""
        from scipy.stats import binomtest

        interval = binomtest(self.solved, len(self.outcomes)).proportion_ci(0.95, method="exact")
        return float(interval.low), float(interval.high)

    @property
    def chosen(self) -> Outcome:
        """The run that validates best: by words all right, then by loss."""
        return min(self.outcomes, key=lambda o: (-o.last["validation_sequence_accuracy"], o.last["validation_loss"]))


def read_outcome(folder: Path) -> Outcome | None:
    """The run in `folder`; None where it is not finished. Raises UserError where it is none of a state-tracking task."""
    facts = read_run(folder)
    if facts is None or facts.get("state") != "finished" or not (folder / FILE).exists():
        return None
    loaded = config_from_toml((folder / "config.toml").read_text(), str(folder / "config.toml"))
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in records if "loss" in r]
    validations = [r for r in records if "validation_sequence_accuracy" in r]
    if not validations:
        raise UserError(f"{folder} was never validated; train it with validation.enable = true")
    seconds = sum((r["step"] - before) * r["step_seconds"] for r, before in zip(steps, _steps_before(steps), strict=True))
    return Outcome(
        folder=folder,
        config=loaded,
        parameters=facts["parameters"],
        steps=facts["step"],
        validations=validations,
        seconds=seconds,
        data_wait=max([r["data_wait"] for r in steps[1:]], default=0.0),
        householder_steps=steps[-1].get("householder_steps"),
        test=read_test(folder),
    )


def _steps_before(records: list[dict[str, Any]]) -> list[int]:
    return [0, *(record["step"] for record in records[:-1])]


def summarise(outcomes: list[Outcome]) -> list[Summary]:
    """By model, in the order in which they come. Raises UserError where the runs are of several tasks."""
    tasks = {outcome.test.problem for outcome in outcomes}
    if len(tasks) > 1:
        raise UserError(f"the runs are of several tasks ({', '.join(sorted(tasks))}); report one at a time")
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        c = outcome.config.model
        layers = f", {c.num_hidden_layers} layers" if c.num_hidden_layers > 1 else ""
        groups.setdefault(f"{label(c)}{layers}", []).append(outcome)
    return [Summary(name, runs) for name, runs in groups.items()]
