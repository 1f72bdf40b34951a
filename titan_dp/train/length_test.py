"""The test at the end of a run on a problem with right answers: accuracy at every length, kept as test.json.

If words have an answer at every symbol, a word counts at a length if it is right up to there (the paper's "accuracy",
Siems et al. 2025, section 5.1); a language's strings count at their own length, because their one answer is at the end.
Reading test.json needs no torch: tables and plots over many runs start here.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from titan_dp.errors import UserError
from titan_dp.files import write_json
from titan_dp.output import progress

if TYPE_CHECKING:
    import torch

    from titan_dp.data.synthetic.loader import SyntheticSet
    from titan_dp.model.transformer import Transformer

FILE = "test.json"


@dataclass(frozen=True)
class LengthTest:
    """Counts at every length that was asked about; all lists have one entry per length."""

    problem: str
    """What was asked, in words."""
    chance: float
    """Accuracy of guessing."""
    answers_everywhere: bool
    """Whether words have an answer at every symbol; otherwise at their end."""
    train_length: int
    lengths: list[int]
    """Symbols."""
    asked: list[int]
    """Words with an answer at that length."""
    right: list[int]
    """Words whose answer there is right."""
    right_so_far: list[int]
    """Words whose answers up to there are all right."""

    def token_accuracy(self, low: int, high: int) -> float:
        """Of all answers at lengths `low` to `high`; NaN if there are none."""
        inside = [i for i, length in enumerate(self.lengths) if low <= length <= high]
        asked = sum(self.asked[i] for i in inside)
        return sum(self.right[i] for i in inside) / asked if asked else float("nan")

    def scaled_accuracy(self) -> float:
        """Of all answers: 1 is perfect, 0 is guessing (Grazzi et al. 2025, arXiv 2411.12537, section 5.1)."""
        return (self.token_accuracy(1, self.lengths[-1]) - self.chance) / (1 - self.chance)

    def sequence_accuracy(self, length: int) -> float:
        """Words right up to `length` symbols."""
        i = self.lengths.index(length)
        return self.right_so_far[i] / self.asked[i]

    def describe(self) -> str:
        longest = self.lengths[-1]
        if not self.answers_everywhere:
            accuracy, scaled = self.token_accuracy(1, longest), self.scaled_accuracy()
            return f"lengths {self.lengths[0]} to {longest}: {accuracy:.2%} right, scaled accuracy {scaled:.3f}"
        shown = sorted({self.train_length, *(self.train_length * i // 2 for i in range(3, 9) if i != 7), longest})
        at = [f"{self.sequence_accuracy(length):.1%} at {length}" for length in shown if length in self.lengths]
        return f"words right so far: {', '.join(at)} symbols; {self.token_accuracy(1, longest):.2%} of all answers"

    def write(self, run_folder: Path) -> None:
        write_json(run_folder / FILE, asdict(self))


def read_length_test(run_folder: Path) -> LengthTest:
    """Raises UserError if the run has none, or it cannot be read."""
    path = run_folder / FILE
    try:
        return LengthTest(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); a finished state-tracking run has one: run it again") from error


def run_length_test(model: Transformer, test: SyntheticSet, train_length: int, device: torch.device) -> LengthTest:
    """Measure; every rank calls it."""
    from titan_dp.train.validate import accuracy_by_position

    with progress("test", len(test)) as state:
        counts = accuracy_by_position(model, state.each(test), device)  # [3, 1 + symbols * tokens_per_element]
    each = test.problem.tokens_per_element
    counts = counts[:, each::each].cpu()
    lengths = (counts[0] > 0).nonzero().flatten()
    asked, right, right_so_far = (row[lengths].tolist() for row in counts)
    problem = test.problem
    return LengthTest(
        problem=problem.describe(),
        chance=problem.chance,
        answers_everywhere=problem.answers_everywhere,
        train_length=train_length,
        lengths=(lengths + 1).tolist(),
        asked=asked,
        right=right,
        right_so_far=right_so_far,
    )
