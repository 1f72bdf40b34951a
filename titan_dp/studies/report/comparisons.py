"""Which n_h is best at equal size and tokens, and which configurations nothing cheaper beats.

A comparison holds configurations that are equal in everything but mixer and shape, within 1 % of one size and one number of
tokens. Each is compared with the smallest n_h among them. Intervals are claimed only where both sides have several seeds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from titan_dp.files import to_json
from titan_dp.studies.report.configurations import (
    CONFIDENCE,
    FAMILY,
    SAME_SIZE,
    SAME_TOKENS,
    SHAPE,
    Configuration,
    clusters,
)


@dataclass(frozen=True)
class Row:
    """One configuration of a comparison; `against` is None for those the others are compared with."""

    configuration: Configuration
    against: Configuration | None
    difference: float | None
    interval: tuple[float, float] | None
    """CONFIDENCE interval of the difference (Welch's t), None where one side has a single seed."""

    @property
    def verdict(self) -> str:
        if self.interval is None or self.against is None:
            return ""
        low, high = self.interval
        return "lower" if high < 0 else "higher" if low > 0 else "not told apart"


@dataclass(frozen=True)
class Comparison:
    """Configurations of one size, number of tokens and set of other settings."""

    rows: list[Row]
    others: dict[str, object]
    """Settings that differ from another comparison's."""

    @property
    def parameters(self) -> int:
        return min(row.configuration.parameters for row in self.rows)

    @property
    def tokens(self) -> int:
        return min(row.configuration.tokens for row in self.rows)


def compare(configurations: list[Configuration], differing: list[str]) -> list[Comparison]:
    """Every set of at least two families at equal size, tokens and other settings, by size and tokens.

    `differing`: keys of other settings that are worth showing (`differing_settings`).
    """
    found = []
    for same in _equal_settings([c for c in configurations if c.losses]):
        for sized in clusters(same, lambda c: c.parameters, SAME_SIZE):
            for equal in clusters(sized, lambda c: c.tokens, SAME_TOKENS):
                if len({c.family for c in equal}) > 1:
                    rows = [_row(c, equal) for c in sorted(equal, key=lambda c: (c.kind, c.n_h or 0))]
                    found.append(Comparison(rows, {key: equal[0].settings[key] for key in differing}))
    return sorted(found, key=lambda comparison: (comparison.parameters, comparison.tokens))


def _equal_settings(configurations: list[Configuration]) -> list[list[Configuration]]:
    """Configurations in groups that agree in all but mixer, shape and tokens."""
    free = {f"model.{key}" for key in SHAPE | FAMILY} | {"steps"}
    groups: dict[str, list[Configuration]] = {}
    for configuration in configurations:
        rest = {key: value for key, value in configuration.settings.items() if key not in free}
        groups.setdefault(to_json(rest, sort_keys=True), []).append(configuration)
    return list(groups.values())


def _row(configuration: Configuration, equal: list[Configuration]) -> Row:
    against = _reference(configuration, equal)
    if against is None:
        return Row(configuration, None, None, None)
    return Row(configuration, against, configuration.mean - against.mean, welch(configuration.losses, against.losses))


def _reference(configuration: Configuration, equal: list[Configuration]) -> Configuration | None:
    """The smallest n_h of the same kind (mixer, gate, eigenvalue range), or where that has no other n_h, of all.

    Among several shapes, the one most like `configuration`'s, then the lowest loss. None where it would be itself.
    """
    with_n_h = [c for c in equal if c.n_h is not None]
    if not with_n_h:
        return None
    kin = [c for c in with_n_h if c.kind == configuration.kind]
    if len({c.n_h for c in kin}) < 2:
        kin = [c for c in with_n_h if c.kind == min(c.kind for c in with_n_h)]
    smallest = min(c.n_h or 0 for c in kin)
    if configuration in kin and configuration.n_h == smallest:
        return None
    candidates = [c for c in kin if c.n_h == smallest]
    return min(candidates, key=lambda c: (-c.shape_shared_with(configuration), c.mean))


def welch(a: list[float], b: list[float]) -> tuple[float, float] | None:
    """Interval of mean(a) - mean(b) by Welch's t; None for fewer than two values on a side, or without any scatter."""
    from scipy import stats

    if len(a) < 2 or len(b) < 2 or len(set(a)) == len(set(b)) == 1:
        return None
    interval = stats.ttest_ind(a, b, equal_var=False).confidence_interval(CONFIDENCE)
    return float(interval.low), float(interval.high)


def front(configurations: list[Configuration], cost: Callable[[Configuration], float], within: float) -> list[Configuration]:
    """The Pareto front, by cost: configurations that no other beats in loss at a lower `cost`, or at one equal to `within`.

    Matched models differ a little in size: without the tolerance the smallest of each set would always be on the front.
    """
    best: list[Configuration] = []
    for same in clusters([c for c in configurations if c.losses], cost, within):
        lowest = min(same, key=lambda c: c.mean)
        if not best or lowest.mean < best[-1].mean:
            best.append(lowest)
    return best
