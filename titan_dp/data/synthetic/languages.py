"""Formal languages: a string, and one question about it that is answered at its last symbol.

Parity, even pairs, cycle navigation and arithmetic modulo 5 without and with brackets, as defined by Deletang et al. 2023
("Neural networks and the Chomsky hierarchy", arXiv 2207.02098) and trained on by Grazzi et al. 2025 (arXiv 2411.12537).
Sample i is a pure function of (key, i, low, high). Rows are made together on the samples' device, with no loop over rows;
bracketed expressions alone read the device back, once a level of their trees. Lengths count every symbol, "=" included.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from titan_dp.data.batch import IGNORE
from titan_dp.data.synthetic.counter_rng import Random
from titan_dp.data.synthetic.problem import Problem
from titan_dp.errors import UserError

Make = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
MODULUS = 5
_PLUS, _MINUS, _TIMES = 5, 6, 7
_OPEN, _CLOSE = 8, 9
_ARITHMETIC = tuple("01234+-*=")
_BRACKETS = tuple("01234+-*()=")


class Language(Problem):
    """Strings of random lengths, and their answers as the labels of their last symbols.

    Args:
        symbols: what the tokens 0, 1, ... stand for.
        answers: these are 0 to answers - 1. Multiplication makes 0 commoner than a uniform guess: see LANGUAGES.
        make: (numbers, lengths [B]) -> (tokens [B, L], answers [B]); numbers [B, L] are uniform in [0, 2^31), and 0 after a
            row's end, where the tokens may be anything.
        shortest, step: strings have `shortest`, `shortest` + `step`, ... symbols.
    """

    def __init__(self, name: str, symbols: tuple[str, ...], answers: int, make: Make, shortest: int = 1, step: int = 1) -> None:
        super().__init__(name, len(symbols), answers)
        assert answers <= self.vocab_size, "answers are tokens too"
        self.symbols, self.answers, self.make, self.shortest, self.step = symbols, answers, make, shortest, step

    def describe(self) -> str:
        return f"formal language {self.name}, {self.answers} answers"

    def lengths(self, low: int, high: int) -> range:
        steps = -(-max(0, low - self.shortest) // self.step)
        valid = range(self.shortest + steps * self.step, high + 1, self.step)
        if not valid:
            some = ", ".join(str(self.shortest + i * self.step) for i in range(3))
            raise UserError(
                f"{self.name} has no string of {low} to {high} symbols, only of {some}, ...; change --min-length or --length "
                "(state_tracking.min_length, training.seq_len - 1)"
            )
        return valid

    def sample(self, random: Random, samples: Tensor, low: int, high: int) -> tuple[Tensor, Tensor, Tensor]:
        """`rows` without BOS: tokens [B, high] int64, fillers after each row's end; lengths [B] int64; answers [B] int64."""
        valid = self.lengths(low, high)
        lengths = valid.start + valid.step * random.integers(samples, 1, len(valid))[:, 0]
        after = torch.arange(high, device=samples.device) >= lengths[:, None]
        numbers = random.integers(samples, high, 2**31, start=1).masked_fill_(after, 0)
        tokens, answers = self.make(numbers, lengths)
        return tokens.masked_fill_(after, self.filler), lengths, answers

    def rows(self, random: Random, samples: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
        tokens, lengths, answers = self.sample(random, samples, low, high)
        input_ids = F.pad(tokens, (1, 0), value=self.bos)
        return input_ids, torch.full_like(input_ids, IGNORE).scatter_(1, lengths[:, None], answers[:, None])


def find_language(name: str) -> Language:
    """The language called `name`. Raises UserError if there is none."""
    if name not in LANGUAGES:
        raise UserError(f"task {name!r} is not known; choose {', '.join(LANGUAGES)}, or a group such as S3")
    return LANGUAGES[name]


def _parity(numbers: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The number of ones, modulo 2."""
    tokens = numbers % 2
    return tokens, tokens.sum(1) % 2


def _even_pairs(numbers: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The number of "ab" and "ba", modulo 2. Each of them changes the letter: it is odd if the last is not the first."""
    tokens = numbers % 2
    return tokens, (tokens[:, 0] != tokens.gather(1, lengths[:, None] - 1)[:, 0]).long()


def _cycle_navigation(numbers: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Where the moves 0, +1 and -1 lead from position 0 of a cycle."""
    tokens = numbers % 3
    return tokens, ((tokens == 1).sum(1) - (tokens == 2).sum(1)) % MODULUS


def _arithmetic(numbers: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Digits with + - * between them; multiplication binds first.

    Modulo 5 every digit but 0 is a power of 2, so a product is a sum of exponents, and no loop over positions is needed.
    """
    position = torch.arange(numbers.shape[1], device=numbers.device)
    tokens = torch.where(position % 2 == 0, numbers % MODULUS, _PLUS + numbers % 3)
    tokens.scatter_(1, lengths[:, None] - 1, len(_ARITHMETIC) - 1)
    digits = tokens[:, ::2]  # after the end come = 0 + 0 + 0 ...: more terms, of value 0
    operators = F.pad(tokens[:, 1::2], (1, 0), value=_PLUS)[:, : digits.shape[1]]
    # 1, 2, 3, 4 are 2^4, 2^1, 2^3, 2^2, and -1 is 2^2. One zero outweighs any exponents; an exponent of 0 is no factor.
    zero = 2**32
    exponents = torch.tensor([zero, 4, 1, 3, 2], device=numbers.device)[digits] + 2 * (operators == _MINUS)
    term = (operators != _TIMES).cumsum(1) - 1
    sums = torch.zeros_like(exponents).scatter_add_(1, term, exponents)
    values = torch.where((sums > 0) & (sums < zero), 2 ** (sums % 4), 0)
    return tokens, values.sum(1) % MODULUS


def _brackets(operators: int) -> Make:
    """Bracketed expressions with the first `operators` of + - *.

    Those of 1 to 4 symbols are x, -x, (x) and (-x); a longer one is (left op right), its length split uniformly. Nodes of
    the tree are known by where they start in the flattened batch: no two longer ones start together. A position's number
    chooses its digit or operator, or, if a longer expression opens there, how that splits.
    """

    def make(numbers: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        B, L = numbers.shape
        numbers = numbers.flatten()
        start, size = torch.arange(0, B * L, L, device=numbers.device), lengths - 1
        leaves, levels = [], []
        while len(start):
            leaf = size <= 4
            leaves.append((start[leaf], size[leaf]))
            start, size = start[~leaf], size[~leaf]
            left = 1 + numbers[start] % (size - 4)
            operator = start + 1 + left
            levels.append((start, operator, start + size - 1))
            start, size = torch.cat([start + 1, operator + 1]), torch.cat([left, size - 3 - left])

        tokens, values = torch.zeros_like(numbers), torch.zeros_like(numbers)
        start, size = (torch.cat(parts) for parts in zip(*leaves, strict=True))
        digit = start + size // 2
        tokens[start], tokens[start + size - 1] = _OPEN, _CLOSE
        tokens[start + (size - 1) // 2] = _MINUS  # each overwrites what a shorter expression lacks: an odd one its minus,
        tokens[digit] = numbers[digit] % MODULUS  # at its digit, and x and -x their brackets
        values[start] = torch.where(size % 2 == 0, -tokens[digit], tokens[digit])
        for start, operator, end in reversed(levels):
            which, a, b = numbers[operator] % operators, values[start + 1], values[operator + 1]
            tokens[start], tokens[operator], tokens[end] = _OPEN, _PLUS + which, _CLOSE
            values[start] = torch.where(which == 0, a + b, torch.where(which == 1, a - b, a * b)) % MODULUS
        tokens = tokens.view(B, L).scatter_(1, lengths[:, None] - 1, len(_BRACKETS) - 1)
        return tokens, values.view(B, L)[:, 0] % MODULUS

    return make


LANGUAGES = {
    language.name: language
    for language in (
        Language("parity", ("0", "1"), 2, _parity),
        Language("even-pairs", ("a", "b"), 2, _even_pairs),
        Language("cycle-navigation", ("0", "+1", "-1"), MODULUS, _cycle_navigation),
        Language("modular-arithmetic", _ARITHMETIC, MODULUS, _arithmetic, shortest=2, step=2),
        Language("modular-arithmetic-brackets", _BRACKETS, MODULUS, _brackets(2), shortest=2),
        Language("modular-arithmetic-brackets-mult", _BRACKETS, MODULUS, _brackets(3), shortest=2),
    )
}
"""By name. Both bracket languages have one alphabet; the task of Grazzi et al.'s table 3 is the one without *.

Answers are uniform except in languages with *: answering always 0 is right for 30 % of "...-brackets-mult" at lengths 40 to
256, a scaled accuracy of 0.13 (27 % and 0.09 at 3 to 40; "modular-arithmetic": 20 %, and 21 % at 3 to 40).
"""
