"""A task with right answers: what word problems and formal languages share."""

from __future__ import annotations

from torch import Tensor

from titan_dp.data.synthetic.counter_rng import Random


class Problem:
    """A vocabulary of symbols, a filler and BOS, and rows of words over it.

    Args:
        name: of the group or the language.
        symbols: they are the tokens 0 to symbols - 1.
        answers: how many there are.
    """

    answers_everywhere = False
    """Whether every symbol has an answer; otherwise a word has one, at its end."""
    tokens_per_element = 1
    """A symbol, then fillers."""
    shortest = 1
    """Symbols of the shortest word."""

    def __init__(self, name: str, symbols: int, answers: int) -> None:
        self.name, self.filler, self.bos, self.vocab_size = name, symbols, symbols + 1, symbols + 2
        self.chance = 1 / answers
        """Accuracy of a uniform guess."""

    def describe(self) -> str:
        raise NotImplementedError

    def lengths(self, low: int, high: int) -> range:
        """The lengths in [low, high] that words have. Raises UserError if there is none."""
        return range(low, high + 1)

    def rows(self, random: Random, samples: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
        """Rows of words of `low` to `high` symbols, each length as likely as another.

        Args:
            random: the stream.
            samples: [B] int64 indices; a row depends on its index alone.

        Returns:
            input_ids and labels [B, 1 + high * tokens_per_element] int64: BOS, the word, and fillers after its end; the
            labels are -100 where nothing is asked.

        Raises UserError if no word has such a length.
        """
        raise NotImplementedError
