"""Word problems against products of permutations in plain Python, and the counter-based random numbers behind them."""

from __future__ import annotations

import itertools
import secrets

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from titan_dp.data.synthetic.counter_rng import Random
from titan_dp.data.synthetic.groups import Group, parse_group
from titan_dp.data.synthetic.words import WordProblem
from titan_dp.errors import UserError

S3 = WordProblem(parse_group("S3"))


@pytest.fixture
def random() -> Random:
    return Random(secrets.token_hex())


def running_products(group: Group, word: list[int]) -> list[int]:
    """Of a word's elements, the later one applied after, by moving every point on its own."""
    names = {tuple(row): i for i, row in enumerate(group.permutations.tolist())}
    points, products = list(range(group.points)), []
    for x in word:
        points = [int(group.permutations[x, point]) for point in points]
        products.append(names[tuple(points)])
    return products


def checked_words(problem: WordProblem, input_ids: Tensor, labels: Tensor) -> list[list[int]]:
    """The word of each row: BOS, elements with their fillers, fillers to the end; labels are its running products."""
    n, order, words = problem.tokens_per_element, problem.group.order, []
    assert input_ids.dtype == labels.dtype == torch.int64
    for ids, wanted in zip(input_ids.tolist(), labels.tolist(), strict=True):
        length = sum(x < order for x in ids)
        word = ids[1 : 1 + n * length : n]
        fillers = [order] * (n - 1)
        assert ids == [order + 1, *(y for x in word for y in (x, *fillers)), *[order] * (len(ids) - 1 - n * length)]
        answers = [y for x in running_products(problem.group, word) for y in (*[-100] * (n - 1), x)]
        assert wanted == [-100, *answers, *[-100] * (len(ids) - 1 - n * length)]
        words.append(word)
    return words


@given(
    st.sampled_from(["Z1", "Z2", "Z7", "D4", "S3", "S5", "A5", "S3xZ2"]),
    st.sampled_from([1, 2, 3, 8, 9, 16, 17, 100]),
    st.integers(0, 9),
    st.integers(1, 4),
    st.integers(0, 2**50),
)
def test_rows_are_words_and_their_running_products(name: str, high: int, fewer: int, n: int, sample: int) -> None:
    problem, low = WordProblem(parse_group(name), tokens_per_element=n), max(1, high - fewer)
    assert (problem.name, problem.vocab_size, problem.chance) == (name, problem.group.order + 2, 1 / problem.group.order)
    input_ids, labels = problem.rows(Random(name), torch.arange(sample, sample + 3), low, high)
    assert input_ids.shape == labels.shape == (3, 1 + high * n)
    assert all(low <= len(word) <= high for word in checked_words(problem, input_ids, labels))


@pytest.mark.parametrize("name", ["S3", "S4", "S5"])
def test_products_in_the_authors_order_are_ours_with_every_element_inverted(name: str, random: Random) -> None:
    """Their library numbers permutations lexicographically, a * b takes i to a(b(i)), and they scan y_t = y_(t-1) * x_t."""
    elements = list(itertools.permutations(range(int(name[1:]))))
    number = {element: i for i, element in enumerate(elements)}
    inverse = [number[tuple(sorted(range(len(a)), key=a.__getitem__))] for a in elements]
    group = parse_group(name)
    assert group.permutations.tolist() == [list(element) for element in elements]

    def theirs(word: list[int]) -> list[int]:
        return list(itertools.accumulate(word, lambda y, x: number[tuple(elements[y][i] for i in elements[x])]))

    tokens, labels = WordProblem(group).rows(random, torch.arange(4), 9, 9)
    for word, answers in zip(tokens[:, 1:].tolist(), labels[:, 1:].tolist(), strict=True):
        assert theirs([inverse[x] for x in word]) == [inverse[y] for y in answers]


def test_only_elements_that_move_few_points_are_drawn(random: Random) -> None:
    moved, drawn = 2, 1 + 10  # the identity and the swaps
    problem = WordProblem(parse_group("S5"), max_moved=moved)
    words = checked_words(problem, *problem.rows(random, torch.arange(300), 12, 12))
    permutations = problem.group.permutations.tolist()
    allowed = {i for i, row in enumerate(permutations) if sum(p != j for j, p in enumerate(row)) <= moved}
    assert len(allowed) == drawn
    assert {x for word in words for x in word} == allowed
    assert len({running_products(problem.group, word)[-1] for word in words}) > problem.group.order / 2


def test_a_limit_that_leaves_only_the_identity_is_refused_with_what_would_do() -> None:
    with pytest.raises(UserError, match=r"state_tracking.max_moved = 6 leaves only the identity of Z7.* 7 points or more"):
        WordProblem(parse_group("Z7"), max_moved=6)
    WordProblem(parse_group("Z7"), max_moved=7)


def test_describe_names_what_makes_words_what_they_are() -> None:
    group = parse_group("S5")
    words = {WordProblem(group, moved, n).describe() for moved in (None, 2, 3) for n in (1, 2, 4)}
    assert len(words | {WordProblem(parse_group("A5")).describe()}) == 10
    assert any("S5, 120 elements, drawing 11 of them, 4 tokens an element" in text for text in words)


def test_a_row_depends_on_its_index_alone(random: Random) -> None:
    problem, samples = WordProblem(parse_group("S4"), tokens_per_element=3), torch.randint(2**50, (30,))
    for part in (torch.randperm(30), samples.argmin()[None], torch.arange(0)):
        for whole, made in zip(problem.rows(random, samples, 3, 20), problem.rows(random, samples[part], 3, 20), strict=True):
            assert torch.equal(whole[part], made)


def test_a_longer_row_begins_as_the_shorter_and_low_does_not_change_the_elements(random: Random) -> None:
    samples = torch.arange(20)
    short, long, varied = (S3.rows(random, samples, *lengths) for lengths in ((10, 10), (30, 30), (1, 30)))
    for one, other, cut in zip(short, long, varied, strict=True):
        assert torch.equal(one, other[:, :11])
        assert torch.equal(torch.where((cut == S3.filler) | (cut == -100), cut, other), cut)


# -- random numbers ----------------------------------------------------------------------------------------------------


@given(st.text(), st.integers(0, 2**62), st.integers(0, 20), st.lists(st.integers(1, 2**31), min_size=1, max_size=8))
def test_numbers_are_those_of_python_integers(key: str, sample: int, start: int, below: list[int]) -> None:
    def mix(z: int) -> int:
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    random, gamma, n = Random(key), 0x9E3779B97F4A7C15, len(below)
    row = mix((sample * gamma + random.key) % 2**64)
    expected = [(mix((row + (start + i + 1) * gamma) % 2**64) & (2**63 - 1)) % below[i] for i in range(n)]
    numbers = random.integers(torch.tensor([0, sample]), n, torch.tensor(below), start)
    assert (numbers.dtype, numbers[1].tolist()) == (torch.int64, expected)
