"""Formal languages against plain Python: counting, Python's own arithmetic, and a grammar of the bracketed expressions."""

from __future__ import annotations

import re
import secrets
from collections import Counter
from collections.abc import Callable

import pytest
import torch

from titan_dp.data.synthetic.counter_rng import Random
from titan_dp.data.synthetic.languages import LANGUAGES, find_language
from titan_dp.errors import UserError


def calculated(string: list[str]) -> int:
    text = "".join(string)
    assert text.index("=") == len(text) - 1
    return int(eval(text[:-1])) % 5


RIGHT: dict[str, Callable[[list[str]], int]] = {
    "parity": lambda string: string.count("1") % 2,
    "even-pairs": lambda string: len(re.findall("(?=ab|ba)", "".join(string))) % 2,
    "cycle-navigation": lambda string: sum(map(int, string)) % 5,
    "modular-arithmetic": calculated,
    "modular-arithmetic-brackets": calculated,
    "modular-arithmetic-brackets-mult": calculated,
}
BRACKETS = list(RIGHT)[-2:]
every_language = pytest.mark.parametrize("name", RIGHT)


@pytest.fixture
def random() -> Random:
    return Random(secrets.token_hex())


def strings(name: str, random: Random, count: int, low: int, high: int) -> list[tuple[list[str], int]]:
    """Samples 0 to count - 1: the symbols of a string, and its answer."""
    language = find_language(name)
    tokens, lengths, answers = language.sample(random, torch.arange(count), low, high)
    rows = zip(tokens.tolist(), lengths.tolist(), answers.tolist(), strict=True)
    return [([language.symbols[token] for token in row[:length]], answer) for row, length, answer in rows]


def test_all_languages_are_tested() -> None:
    assert list(LANGUAGES) == list(RIGHT)


@every_language
@pytest.mark.parametrize(("low", "high", "count"), [(1, 9, 500), (40, 256, 100)])
def test_a_row_is_bos_a_string_and_the_answer_of_plain_python_at_its_last_symbol(
    random: Random, name: str, low: int, high: int, count: int
) -> None:
    language, samples = find_language(name), torch.arange(count)
    filler, bos = len(language.symbols), len(language.symbols) + 1
    input_ids, labels = language.rows(random, samples, low, high)
    assert input_ids.shape == labels.shape == (count, 1 + high)
    assert (input_ids.dtype, labels.dtype, language.vocab_size) == (torch.int64, torch.int64, bos + 1)
    made = strings(name, random, count, low, high)
    for (string, answer), ids, wanted in zip(made, input_ids.tolist(), labels.tolist(), strict=True):
        length = len(string)
        assert low <= length <= high
        assert answer == RIGHT[name](string) < language.answers <= language.vocab_size, string
        assert ids == [bos, *map(language.symbols.index, string), *[filler] * (high - length)]
        assert wanted == [-100] * length + [answer] + [-100] * (high - length)


@every_language
def test_every_valid_length_is_as_likely_as_another_and_no_other_occurs(random: Random, name: str) -> None:
    language = find_language(name)
    valid = {"modular-arithmetic": [2, 4, 6, 8, 10]}.get(name, list(range(2 if "=" in language.symbols else 1, 12)))
    assert list(language.lengths(0, 11)) == valid
    lengths = [len(string) for string, _ in strings(name, random, 3000, 1, 11)]
    counts = Counter(lengths)
    assert set(counts) == set(valid)
    assert min(counts.values()) > 3000 / len(valid) / 2
    assert list(find_language("modular-arithmetic").lengths(3, 9)) == [4, 6, 8]


def test_arithmetic_alternates_digits_and_operators(random: Random) -> None:
    samples = strings("modular-arithmetic", random, 500, 2, 40)
    assert all(re.fullmatch(r"[0-4]([-+*][0-4])*=", "".join(string)) for string, _ in samples)


@pytest.mark.parametrize(("name", "operators"), list(zip(BRACKETS, ["+-", "+-*"], strict=True)))
def test_bracketed_expressions_follow_their_grammar(random: Random, name: str, operators: str) -> None:
    for string, _ in strings(name, random, 300, 2, 64):
        text, reductions = re.sub(r"\(-?[0-4]\)", "E", "".join(string)), 1
        while reductions:
            text, reductions = re.subn(rf"\((E|-?[0-4])[{re.escape(operators)}](E|-?[0-4])\)", "E", text)
        assert re.fullmatch("(E|-?[0-4])=", text), string


@every_language
def test_a_row_depends_on_its_sample_and_key_alone(random: Random, name: str) -> None:
    language, samples = find_language(name), torch.randint(2**40, (30,))
    for part in (torch.randperm(30), samples.argmin()[None]):
        for whole, made in zip(language.rows(random, samples, 3, 40), language.rows(random, samples[part], 3, 40), strict=True):
            assert torch.equal(whole[part], made)
    both = [string for key in (random, Random("other")) for string, _ in strings(name, key, 20, 40, 40)]
    assert len(set(map("".join, both))) == 40


def test_lengths_that_no_string_has_and_unknown_languages_are_refused(random: Random) -> None:
    with pytest.raises(UserError, match="modular-arithmetic has no string of 3 to 3 symbols.*--min-length or --length"):
        find_language("modular-arithmetic").rows(random, torch.arange(4), 3, 3)
    with pytest.raises(UserError, match="'dyck'.*parity, even-pairs, .*a group such as S3"):
        find_language("dyck")
