"""What a forecast is of, and what a report holds out: a size, a number of tokens, or both."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from titan_dp.config.arguments import reader
from titan_dp.config.schema import parse_count
from titan_dp.files import short

if TYPE_CHECKING:
    from pandas import DataFrame

_COLUMNS = {"size": "parameters", "tokens": "tokens"}
_WITHIN = 0.01


@dataclass(frozen=True)
class Target:
    """A size in parameters and a number of tokens; None stands for any."""

    size: int | None = None
    tokens: int | None = None

    def __str__(self) -> str:
        return ",".join(f"{name}={short(value)}" for name, value in vars(self).items() if value is not None)

    def among(self, rows: DataFrame) -> DataFrame:
        """Those of `rows` (of configurations) that have this size and number of tokens, to 1 %."""
        for name, column in _COLUMNS.items():
            if (wanted := getattr(self, name)) is not None:
                near = [abs(math.log(value / wanted)) <= math.log1p(_WITHIN) for value in rows[column]]
                rows = rows.loc[rows.index[np.array(near, bool)]]
        return rows


def _parse(text: str) -> Target:
    found: dict[str, int] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        count = parse_count(value)
        number = float(count) if isinstance(count, int | float) else float(value)
        if name not in _COLUMNS or name in found or not 1 <= number < 1e18:
            raise ValueError
        found[name] = round(number)
    return Target(**found)


target = reader(_parse, "size=COUNT, tokens=COUNT or both, such as size=1.75M,tokens=800K")
"""A reader for argparse."""
