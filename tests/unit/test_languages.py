"""Formal languages against plain Python: counting, Python's own arithmetic, and a grammar of the bracketed expressions."""

from __future__ import annotations

import re
import secrets
from collections import Counter
from collections.abc import Iterable

import pytest
import torch

from titan_dp.data.synthetic.counter_rng import Random
from titan_dp.data.synthetic.languages import LANGUAGES, LanguageProblem, find_language
from titan_dp.errors import UserError

NAMES = [
    "parity",
    "even-pairs",
    "cycle-navigation",
    "modular-arithmetic",
    "modular-arithmetic-brackets",
    "modular-arithmetic-brackets-mult",
]
BRACKETS = NAMES[-2:]
every_language = pytest.mark.parametrize("name", NAMES)


@pytest.fixture
def random() -> Random:
    return Random(secrets.token_hex())


def strings(name: str, random: Random, count: int, low: int, high: int) -> list[tuple[list[str], int]]:
    """Samples 0 to count - 1: the symbols of a string, and its answer."""
    language = find_language(name)
    tokens, lengths, answers = language.sample(random, torch.arange(count), low, high)
    rows = zip(tokens.tolist(), lengths.tolist(), answers.tolist(), strict=True)
    return [([language.symbols[token] for token in row[:length]], answer) for row, length, answer in rows]


def right_answer(name: str, string: list[str]) -> int:
    text = "".join(string)
    if name == "parity":
        return text.count("1") % 2
    if name == "even-pairs":
        return len(re.findall("(?=ab|ba)", text)) % 2
    if name == "cycle-navigation":
        return sum(int(move) for move in string) % 5
    assert text.index("=") == len(text) - 1
    return int(eval(text[:-1])) % 5


def assert_even(values: Iterable[object], classes: int) -> None:
    """Each of `classes` values is as common as another, within six standard deviations."""
    counts = Counter(values)
    n, p = counts.total(), 1 / classes
    assert len(counts) == classes
    assert all(abs(count - n * p) < 6 * (n * p * (1 - p)) ** 0.5 for count in counts.values()), counts


def test_all_languages_are_tested() -> None:
    assert list(LANGUAGES) == NAMES


@every_language
@pytest.mark.parametrize(("low", "high", "count"), [(1, 9, 500), (3, 40, 500), (40, 256, 100)])
def test_answers_are_those_of_plain_python(random: Random, name: str, low: int, high: int, count: int) -> None:
    for string, answer in strings(name, random, count, low, high):
        assert answer == right_answer(name, string), string


@every_language
def test_every_valid_length_is_as_likely_as_another_and_no_other_occurs(random: Random, name: str) -> None:
    valid = {"modular-arithmetic": [2, 4, 6, 8, 10]}.get(name, list(range(2 if "=" in find_language(name).symbols else 1, 12)))
    assert find_language(name).valid_lengths(0, 11) == valid
    lengths = [len(string) for string, _ in strings(name, random, 3000, 1, 11)]
    assert set(lengths) == set(valid)
    assert_even(lengths, len(valid))


@pytest.mark.parametrize("name", NAMES[:3])
def test_a_single_symbol_is_a_string(random: Random, name: str) -> None:
    assert {string[0] for string, _ in strings(name, random, 200, 1, 1)} == set(find_language(name).symbols)


def test_lengths_keep_to_their_bounds() -> None:
    assert find_language("modular-arithmetic").valid_lengths(3, 9) == [4, 6, 8]
    assert find_language("modular-arithmetic").valid_lengths(4, 8) == [4, 6, 8]
    assert find_language("parity").valid_lengths(40, 42) == [40, 41, 42]


@pytest.mark.parametrize("name", ["parity", "even-pairs", "cycle-navigation", "modular-arithmetic-brackets"])
def test_without_multiplication_every_answer_is_as_likely_as_another(random: Random, name: str) -> None:
    assert_even((answer for _, answer in strings(name, random, 3000, 2, 40)), find_language(name).answers)


@pytest.mark.parametrize("name", NAMES[:3])
def test_symbols_are_even_whatever_the_length(random: Random, name: str) -> None:
    samples = strings(name, random, 2000, 1, 4)
    assert_even(((len(string), string[0]) for string, _ in samples), 4 * len(find_language(name).symbols))
    samples = strings(name, random, 200, 1, 40)
    assert_even((symbol for string, _ in samples for symbol in string), len(find_language(name).symbols))


def test_arithmetic_alternates_even_digits_and_even_operators(random: Random) -> None:
    samples = strings("modular-arithmetic", random, 500, 2, 40)
    assert all(re.fullmatch(r"[0-4]([-+*][0-4])*=", "".join(string)) for string, _ in samples)
    assert_even((digit for string, _ in samples for digit in string[::2]), 5)
    assert_even((operator for string, _ in samples for operator in string[1:-1:2]), 3)


@pytest.mark.parametrize("name", BRACKETS)
def test_bracketed_expressions_follow_their_grammar(random: Random, name: str) -> None:
    operators = "[-+*]" if name.endswith("mult") else "[-+]"
    for string, _ in strings(name, random, 300, 2, 64):
        text, reductions = re.sub(r"\(-?[0-4]\)", "E", "".join(string)), 1
        while reductions:
            text, reductions = re.subn(rf"\((E|-?[0-4]){operators}(E|-?[0-4])\)", "E", text)
        assert re.fullmatch("(E|-?[0-4])=", text), string


@pytest.mark.parametrize(("name", "operators"), list(zip(BRACKETS, [2, 3], strict=True)))
def test_the_shortest_sum_has_even_digits_and_operators(random: Random, name: str, operators: int) -> None:
    samples = [string for string, _ in strings(name, random, 2000, 6, 6)]  # (x+y)=
    assert_even((string[1] for string in samples), 5)
    assert_even((string[2] for string in samples), operators)
    assert_even((string[1] + string[3] for string in samples), 25)


@pytest.mark.parametrize("name", BRACKETS)
def test_an_expression_splits_anywhere_with_one_chance(random: Random, name: str) -> None:
    def left_length(string: list[str]) -> int:
        depth = 0
        for place, symbol in enumerate(string):
            if depth == 1 and symbol in "+-*" and string[place - 1] in "01234)":
                return place - 1
            depth += {"(": 1, ")": -1}.get(symbol, 0)
        raise AssertionError(string)

    assert_even((left_length(string) for string, _ in strings(name, random, 2000, 15, 15)), 14 - 4)


@every_language
def test_a_row_depends_on_its_sample_alone(random: Random, name: str) -> None:
    problem = LanguageProblem(find_language(name))
    samples = torch.randint(2**40, (30,))
    whole = problem.rows(random, samples, 3, 40)
    order = torch.randperm(30)
    for made, again in zip(whole, problem.rows(random, samples[order], 3, 40), strict=True):
        assert torch.equal(made[order], again)
    for i in range(30):
        for made, alone in zip(whole, problem.rows(random, samples[i : i + 1], 3, 40), strict=True):
            assert torch.equal(made[i : i + 1], alone)


@every_language
def test_samples_and_keys_differ(random: Random, name: str) -> None:
    once, again, other = (strings(name, key, 20, 40, 40) for key in (random, random, Random("other")))
    assert once == again
    assert len({"".join(string) for string, _ in once + other}) == 40


@every_language
def test_a_row_is_bos_a_string_and_its_answer_at_the_last_symbol(random: Random, name: str) -> None:
    language, problem = find_language(name), LanguageProblem(find_language(name))
    tokens, lengths, answers = language.sample(random, torch.arange(50), 2, 20)
    input_ids, labels = problem.rows(random, torch.arange(50), 2, 20)
    filler, bos = len(language.symbols), len(language.symbols) + 1
    assert input_ids.shape == labels.shape == (50, 21)
    assert (input_ids.dtype, labels.dtype, problem.vocab_size) == (torch.int64, torch.int64, bos + 1)
    assert 0 <= answers.min() <= answers.max() < language.answers <= problem.vocab_size
    assert (input_ids[:, 0] == bos).all()
    assert torch.equal(input_ids[:, 1:], tokens)
    for string, label, length, answer in zip(tokens.tolist(), labels.tolist(), lengths.tolist(), answers.tolist(), strict=True):
        assert max(string[:length]) < filler
        assert string[length:] == [filler] * (20 - length)
        assert label == [-100] * length + [answer] + [-100] * (20 - length)


@pytest.mark.parametrize(("name", "low", "high"), [("modular-arithmetic", 3, 3), ("parity", 5, 4), (BRACKETS[0], 1, 1)])
def test_lengths_that_no_string_has_are_refused(random: Random, name: str, low: int, high: int) -> None:
    with pytest.raises(UserError, match=f"{name} has no string of {low} to {high} symbols.*--min-length or --length"):
        LanguageProblem(find_language(name)).rows(random, torch.arange(4), low, high)


def test_an_unknown_language_is_answered_with_those_there_are() -> None:
    with pytest.raises(UserError, match="'dyck'.*parity, even-pairs, .*a group such as S3"):
        find_language("dyck")
