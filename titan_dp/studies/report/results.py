"""All that a report says, computed once from the runs: tables, figures and the page only show it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from titan_dp.errors import UserError
from titan_dp.studies.report.comparisons import Comparison, compare, front
from titan_dp.studies.report.configurations import (
    LOSSES,
    SAME_BUDGET,
    SAME_SIZE,
    Configuration,
    check_comparable,
    differing_settings,
    group,
)
from titan_dp.studies.report.families import FamilyFits, IsoFlop, fit_families, isoflops
from titan_dp.studies.report.runs import Run

STATES = ("finished", "diverged", "unfinished", "not started")


@dataclass(frozen=True)
class Results:
    """What a report is about and what came out of it.

    Raises UserError (from `results_of`) where the losses of the runs cannot be compared.
    """

    title: str
    description: str
    loss: str
    """A key of LOSSES."""
    runs: list[Run]
    configurations: list[Configuration]
    differing: list[str]
    """Settings in which configurations differ beside family, shape and tokens."""
    comparisons: list[Comparison]
    front_by_flops: list[Configuration]
    front_by_parameters: list[Configuration]
    fits: list[FamilyFits]
    isoflops: list[IsoFlop]
    warnings: list[str]

    @property
    def unit(self) -> str:
        return LOSSES[self.loss]

    @cached_property
    def tokenizers(self) -> list[str]:
        return sorted({run.started["tokenizer"] for run in self.runs if run.facts is not None})

    @cached_property
    def counts(self) -> dict[str, int]:
        """Runs in each state that occurs."""
        found = Counter(run.state for run in self.runs)
        return {state: found[state] for state in STATES if found[state]}

    def in_state(self, state: str) -> list[Run]:
        return [run for run in self.runs if run.state == state]


def results_of(runs: list[Run], loss: str, title: str, description: str = "") -> Results:
    """Compute everything. Raises UserError where no run has started, or losses are not comparable."""
    started = [run for run in runs if run.facts is not None]
    if not started:
        raise UserError(f"none of the {len(runs)} runs has started; launch them first, for example {runs[0].folder}")
    warnings = check_comparable(started, loss)
    configurations = group(started, loss)
    differing = differing_settings(configurations)
    warnings += [_repeated(c) for c in configurations if c.repeats]
    without = [run.name for run in started if run.state == "finished" and run.totals.validation_loss is None]
    if without:
        warnings.append(f"{len(without)} finished runs have no validation loss and are in no fit, for example {without[0]}")
    return Results(
        title=title,
        description=description,
        loss=loss,
        runs=runs,
        configurations=configurations,
        differing=differing,
        comparisons=compare(configurations, differing),
        front_by_flops=front(configurations, lambda c: c.flops, SAME_BUDGET),
        front_by_parameters=front(configurations, lambda c: c.parameters, SAME_SIZE),
        fits=fit_families(configurations),
        isoflops=isoflops(configurations),
        warnings=warnings,
    )


def _repeated(configuration: Configuration) -> str:
    one = configuration.repeats[0]
    same = next(run for run in configuration.used if run.seeds == one.seeds)
    return f"{one.name} repeats {same.name} (same configuration and seeds) and is not counted"
