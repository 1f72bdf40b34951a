"""Word problems: the running product of a sequence of group elements, the task that shows which state a model can track.

A row is BOS and a word; the label at every element is the product so far, y_t = x_t y_(t-1). Elements are drawn uniformly
and independently, and products come from a scan of log2(length) table look-ups, all on the samples' device, so making
data is a small part of a step. Recipe: Siems et al. 2025 (arXiv 2502.10297), section 5.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titan_dp.data.batch import IGNORE
from titan_dp.data.synthetic.counter_rng import Random
from titan_dp.data.synthetic.groups import Group
from titan_dp.data.synthetic.problem import Problem
from titan_dp.errors import UserError


class WordProblem(Problem):
    """Rows of the word problem of `group`.

    Args:
        group: its elements are the tokens 0 to order - 1.
        max_moved: draw only elements that move at most so many points (2: the swaps and the identity); None: all.
        tokens_per_element: an element, then fillers, to give a layer more steps per element (Grazzi et al. 2025, "4 tokens
            per permutation"); the label stands at the last of them.

    Raises UserError if `max_moved` leaves nothing to draw except the identity.
    """

    answers_everywhere = True

    def __init__(self, group: Group, max_moved: int | None = None, tokens_per_element: int = 1) -> None:
        super().__init__(group.name, group.order, group.order)
        self.group, self.tokens_per_element = group, tokens_per_element
        drawn = torch.arange(group.order) if max_moved is None else torch.from_numpy((group.moved <= max_moved).nonzero()[0])
        if len(drawn) < 2 <= group.order:
            raise UserError(
                f"state_tracking.max_moved = {max_moved} leaves only the identity of {group.name}, whose other elements move "
                f"{group.moved[1:].min()} points or more; raise it or leave it out"
            )
        self.drawn, self.table = drawn, torch.from_numpy(group.table).flatten()

    def describe(self) -> str:
        some = f", drawing {len(self.drawn)} of them" if len(self.drawn) < self.group.order else ""
        spread = f", {self.tokens_per_element} tokens an element" if self.tokens_per_element > 1 else ""
        return f"word problem of {self.name}, {self.group.order:,} elements{some}{spread}"

    def rows(self, random: Random, samples: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
        """See `Problem.rows`. Every element has an answer, at its last token."""
        self.drawn, self.table = self.drawn.to(samples.device), self.table.to(samples.device)
        # Draw 0 is the length, whether it is needed or not, so that words do not change with `low`.
        length = low + random.integers(samples, 1, high - low + 1)
        x = self.drawn[random.integers(samples, high, len(self.drawn), start=1)]
        y = self.products(x)
        beyond = torch.arange(high, device=x.device) >= length
        x, y = x.masked_fill(beyond, self.filler), y.masked_fill(beyond, IGNORE)
        n, B = self.tokens_per_element, len(samples)
        if n > 1:
            x = torch.cat([x[..., None], x.new_full((B, high, n - 1), self.filler)], -1).flatten(1)
            y = torch.cat([y.new_full((B, high, n - 1), IGNORE), y[..., None]], -1).flatten(1)
        return torch.cat([x.new_full((B, 1), self.bos), x], 1), torch.cat([y.new_full((B, 1), IGNORE), y], 1)

    def products(self, x: Tensor) -> Tensor:
        """y_t = x_t ... x_1 of elements x [B, L], by a scan that doubles its reach (Hillis & Steele 1986)."""
        y, reach, order = x, 1, self.group.order
        while reach < x.shape[1]:
            y = torch.cat([y[:, :reach], self.table[y[:, reach:] * order + y[:, :-reach]]], 1)
            reach *= 2
        return y
