"""Batches of a synthetic problem: endless for training, a fixed set for validation and for the test.

Sample i is a pure function of (problem, data.seed, i) and of the step it falls in, whose longest word the curriculum sets;
so, as with token shards, the state is the samples consumed, with the steps that took, and any number of ranks sees the same
run. The three sets are three streams of random numbers. Rows are made on the device and are not longer than the longest word
of their step needs: short words of a curriculum cost less.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from titan_dp import config
from titan_dp.data.batch import IGNORE, Batch, Place
from titan_dp.data.synthetic.counter_rng import Random
from titan_dp.data.synthetic.groups import parse_group
from titan_dp.data.synthetic.languages import find_language
from titan_dp.data.synthetic.problem import Problem
from titan_dp.data.synthetic.words import WordProblem
from titan_dp.errors import UserError, counted

_WIDTHS = 8
"""Rows are padded to a multiple of this, so that a growing curriculum has few shapes to compile."""


def build_problem(c: config.StateTracking) -> Problem:
    """The problem that `c.task` names: a formal language, or a group for its word problem. Raises UserError."""
    if not c.is_group:
        return find_language(c.task)
    return WordProblem(parse_group(c.task), c.max_moved, c.tokens_per_element)


class SyntheticLoader:
    """The training batches of one rank; a `batch.Loader`."""

    tokenizer_name = "none"
    """Tokens are elements and symbols: there is no text."""
    adds_bos = True

    def __init__(self, c: config.StateTracking, seed: int, place: Place, vocab_size: int, device: torch.device) -> None:
        self.c, self.place, self.device, self.samples, self.step = c, place, device, 0, 0
        self.problem, self.length = problem_that_fits(c, place.seq_len, vocab_size)
        self.random = Random(f"training {seed} {self.problem.describe()}")
        self.fingerprint = fingerprint(self.problem, c)
        named = f"{self.problem.name} {self.problem.vocab_size} {self.problem.tokens_per_element}"
        self.tokenizer_hash = hashlib.sha256(named.encode()).hexdigest()

    def __iter__(self) -> Iterator[list[Batch]]:
        while True:
            longest = self.longest(self.step)
            firsts = [self.place.first_sample(self.samples, micro) for micro in range(self.place.accumulation)]
            step = [self._batch(first, longest) for first in firsts]
            self.samples += self.place.total
            self.step += 1
            yield step

    def longest(self, step: int) -> int:
        """Symbols of the longest words of a step: grows to the whole over curriculum_steps."""
        if step >= self.c.curriculum_steps:
            return self.length
        first = first_longest(self.c, self.problem, self.length)
        if self.c.curriculum_growth == "geometric":
            grown = first * (self.length / first) ** (step / self.c.curriculum_steps)
            return math.floor(grown + 1e-9)  # the same whatever the last bit of a power is
        return first + math.floor((self.length - first) * step / self.c.curriculum_steps)

    def _batch(self, first: int, longest: int) -> Batch:
        samples = torch.arange(first, first + self.place.local, device=self.device)
        tokens, labels = self.problem.rows(self.random, samples, shortest(self.c, self.problem, longest), longest)
        missing = min(-(-tokens.shape[1] // _WIDTHS) * _WIDTHS, self.place.seq_len) - tokens.shape[1]
        tokens, labels = F.pad(tokens, (0, missing), value=self.problem.filler), F.pad(labels, (0, missing), value=IGNORE)
        return {"input_ids": tokens, "labels": labels, "cu_seqlens": None}

    def state_dict(self) -> dict[str, int]:
        return {"samples": self.samples, "step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.samples = state["samples"]
        self.step = state.get("step", self.samples // self.place.total)  # older checkpoints have no other

    def epochs(self, run_tokens: int) -> float:
        return 0.0

    def describe(self, run_tokens: int) -> str:
        low = f"{self.c.min_length} to " if self.c.min_length else ""
        growing = f", growing over {self.c.curriculum_steps:,} steps" if self.c.curriculum_steps else ""
        return f"{self.problem.describe()}; words of {low}{self.length} symbols{growing}, made on {self.device.type}"


class SyntheticSet:
    """`size` samples of a stream of their own, split over ranks; all ranks have the same number of batches.

    Args:
        low, high: symbols per word.
    """

    text_bytes = bytes_per_token = None

    def __init__(
        self, problem: Problem, stream: str, size: int, low: int, high: int, place: Place, device: torch.device
    ) -> None:
        self.problem, self.size, self.low, self.high, self.place, self.device = problem, size, low, high, place, device
        self.random = Random(f"{stream} {problem.describe()}")
        self.fingerprint = hashlib.sha256(f"{stream} {problem.describe()} {size} {low} {high}".encode()).hexdigest()

    def __len__(self) -> int:
        return -(-self.size // self.place.total)

    def __iter__(self) -> Iterator[Batch]:
        for number in range(len(self)):
            first = self.place.first_sample(number * self.place.total, 0)
            samples = torch.arange(first, first + self.place.local, device=self.device)
            tokens, labels = self.problem.rows(self.random, samples, self.low, self.high)
            labels[samples >= self.size] = IGNORE
            yield {"input_ids": tokens, "labels": labels, "cu_seqlens": None}


def validation_set(c: config.StateTracking, place: Place, vocab_size: int, device: torch.device) -> SyntheticSet:
    """Fresh words of the training lengths: what a run is watched, stopped and chosen by."""
    problem, length = problem_that_fits(c, place.seq_len, vocab_size)
    return SyntheticSet(problem, "validation", c.validation_samples, shortest(c, problem, length), length, place, device)


def test_set(c: config.StateTracking, place: Place, vocab_size: int, device: torch.device) -> SyntheticSet:
    """Words up to `test_length`, longer than those trained on; looked at once, when training is over.

    If every symbol has an answer, each word is as long as can be. Strings have all lengths from the longest that was trained
    on to test_length.
    """
    problem, length = problem_that_fits(c, place.seq_len, vocab_size)
    longest = c.test_length or 4 * length
    low = longest if problem.answers_everywhere else length
    return SyntheticSet(problem, "test", c.test_samples, low, longest, place, device)


def problem_that_fits(c: config.StateTracking, seq_len: int, vocab_size: int) -> tuple[Problem, int]:
    """The problem and the symbols a row of `seq_len` tokens holds. Raises UserError if something does not fit."""
    problem = build_problem(c)
    each = problem.tokens_per_element
    length, rest = divmod(seq_len - 1, each)
    if length < 1 or rest:
        raise UserError(
            f"training.seq_len = {seq_len} does not hold BOS and a whole number of elements of {counted(each, 'token')}; "
            f"{1 + each * max(1, length)} would, for words of {max(1, length)}"
        )
    if problem.vocab_size > vocab_size:
        raise UserError(
            f"model.vocab_size = {vocab_size} is too small for {problem.name}, which needs {problem.vocab_size} (its symbols, "
            "a filler and BOS); set it to at least that"
        )
    if c.min_length and c.min_length > length:
        raise UserError(
            f"state_tracking.min_length = {c.min_length} does not fit into training.seq_len = {seq_len}, which holds words of "
            f"at most {length}; lower it or raise training.seq_len"
        )
    if c.test_length and c.test_length < length:
        raise UserError(
            f"state_tracking.test_length = {c.test_length} is shorter than the words trained on, {length}; give at least that"
        )
    first = first_longest(c, problem, length)
    for low, high in ((shortest(c, problem, first), first), (length, c.test_length or 4 * length)):
        problem.lengths(low, high)  # raises if no string is so long
    return problem, length


def shortest(c: config.StateTracking, problem: Problem, longest: int) -> int:
    """Symbols of the shortest words of a step whose longest have `longest`.

    Words with an answer at every symbol hold shorter ones, so they are all of one length unless min_length says otherwise.
    """
    return min(c.min_length or (longest if problem.answers_everywhere else problem.shortest), longest)


def first_longest(c: config.StateTracking, problem: Problem, length: int) -> int:
    """Initial maximum length of the curriculum. In languages that is a second length, because some only have strings of even
    length.
    """
    if c.curriculum_steps == 0:
        return length
    low = c.min_length or problem.shortest
    return min(length, low if problem.answers_everywhere else low + 1)


def fingerprint(problem: Problem, c: config.StateTracking) -> str:
    """Of what training draws from; its seed is in the configuration, as with token shards."""
    growth = "" if c.curriculum_growth == "linear" else f" {c.curriculum_growth}"  # what older runs did not know
    return hashlib.sha256(f"{problem.describe()} {c.min_length} {c.curriculum_steps}{growth}".encode()).hexdigest()
