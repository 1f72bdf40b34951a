"""Word problems against products of permutations in plain Python, and the counter-based random numbers behind them."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from torch import Tensor

from titan_dp.data.synthetic.counter_rng import Random
from titan_dp.data.synthetic.groups import Group, parse_group
from titan_dp.data.synthetic.words import WordProblem
from titan_dp.errors import UserError


@pytest.fixture
def random() -> Random:
    return Random(secrets.token_hex())


def assert_even(values: Iterable[object], classes: int) -> None:
    """Each of `classes` values is as common as another, within six standard deviations."""
    counts = Counter(values)
    n, p = counts.total(), 1 / classes
    assert len(counts) == classes
    assert all(abs(count - n * p) <= 6 * (n * p * (1 - p)) ** 0.5 for count in counts.values()), counts


def running_products(group: Group, word: list[int]) -> list[int]:
    """Of a word's elements, the later one applied after, by moving every point on its own."""
    names = {tuple(row): i for i, row in enumerate(group.permutations.tolist())}
    points, products = list(range(group.points)), []
    for x in word:
        points = [int(group.permutations[x, point]) for point in points]
        products.append(names[tuple(points)])
    return products


def split(problem: WordProblem, input_ids: Tensor, labels: Tensor) -> list[tuple[list[int], list[int]]]:
    """The word and the answers of each row, its layout checked: BOS, elements with their fillers, fillers to the end."""
    n, rows = problem.tokens_per_element, []
    for ids, wanted in zip(input_ids.tolist(), labels.tolist(), strict=True):
        assert (ids[0], wanted[0]) == (problem.group.order + 1, -100)
        length = sum(x < problem.group.order for x in ids)
        elements, answers = ids[1::n], wanted[n::n]
        assert all(x < problem.group.order for x in elements[:length])
        assert all(x == problem.group.order for x in elements[length:])
        assert all(y == -100 for y in answers[length:])
        for other in range(1, n):
            assert set(ids[1 + other :: n]) <= {problem.group.order}
            assert set(wanted[other::n]) <= {-100}
        rows.append((elements[:length], answers[:length]))
    return rows


# -- words -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Z1", "Z2", "Z7", "D4", "S3", "S5", "A5", "S3xZ2"])
@pytest.mark.parametrize("length", [1, 2, 3, 8, 9, 16, 17, 100])
def test_labels_are_the_running_products_of_the_permutations(random: Random, name: str, length: int) -> None:
    problem = WordProblem(parse_group(name))
    input_ids, labels = problem.rows(random, torch.randint(2**50, (5,)), length, length)
    assert input_ids.shape == labels.shape == (5, 1 + length)
    assert input_ids.dtype == labels.dtype == torch.int64
    for word, answers in split(problem, input_ids, labels):
        assert len(word) == length
        assert answers == running_products(problem.group, word)


def test_the_later_element_acts_after_the_earlier() -> None:
    group = parse_group("S3")
    first, then = next((a, b) for a in range(6) for b in range(6) if group.table[a, b] != group.table[b, a])
    point_by_point = group.permutations[then][group.permutations[first]]
    (_, product), *_ = WordProblem(group).products(torch.tensor([[first, then]])).tolist()
    assert group.permutations[product].tolist() == point_by_point.tolist()


def test_a_word_of_the_identity_stays_there_and_one_swap_comes_and_goes() -> None:
    problem = WordProblem(parse_group("S4"))
    swap = int(np.flatnonzero(problem.group.moved == 2)[0])
    assert problem.products(torch.zeros(1, 33, dtype=torch.int64)).unique().tolist() == [0]
    assert problem.products(torch.full((1, 33), swap)).tolist() == [[swap, 0] * 16 + [swap]]


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize(("low", "high"), [(1, 1), (1, 9), (5, 6), (16, 17)])
def test_rows_hold_low_to_high_elements_and_are_filled_up(random: Random, low: int, high: int, n: int) -> None:
    problem = WordProblem(parse_group("D3"), tokens_per_element=n)
    input_ids, labels = problem.rows(random, torch.arange(400), low, high)
    assert input_ids.shape == labels.shape == (400, 1 + high * n)
    rows = split(problem, input_ids, labels)
    for word, answers in rows[:50]:
        assert answers == running_products(problem.group, word)
    assert_even((len(word) for word, _ in rows), high - low + 1)


def test_ids_are_elements_then_filler_then_bos() -> None:
    problem = WordProblem(parse_group("A4"), tokens_per_element=3)
    assert (problem.filler, problem.bos, problem.vocab_size) == (12, 13, 14)
    assert problem.chance == 1 / 12
    assert problem.name == "A4"


@pytest.mark.parametrize("name", ["S3", "Z10", "A5"])
def test_every_element_is_drawn_as_often_as_another_wherever_it_stands(random: Random, name: str) -> None:
    problem = WordProblem(parse_group(name))
    input_ids, labels = problem.rows(random, torch.arange(3000), 6, 6)
    for place in (1, 2, 6):
        assert_even(input_ids[:, place].tolist(), problem.group.order)
        assert_even(labels[:, place].tolist(), problem.group.order)


def test_neighbouring_elements_and_neighbouring_rows_are_independent(random: Random) -> None:
    input_ids, _ = WordProblem(parse_group("S3")).rows(random, torch.arange(4000), 4, 4)
    pairs = input_ids[:, 1:]
    assert_even(map(tuple, pairs[:, :2].tolist()), 36)
    assert_even(zip(pairs[:-1, 0].tolist(), pairs[1:, 0].tolist(), strict=True), 36)
    assert_even(zip(pairs[:-1, 1].tolist(), pairs[1:, 0].tolist(), strict=True), 36)


def test_lengths_and_elements_are_independent(random: Random) -> None:
    input_ids, _ = WordProblem(parse_group("S3")).rows(random, torch.arange(6000), 1, 4)
    lengths = (input_ids[:, 1:] < 6).sum(1)
    assert_even(zip(lengths.tolist(), input_ids[:, 1].tolist(), strict=True), 24)


# -- variants ----------------------------------------------------------------------------------------------------------


def test_only_swaps_are_drawn_where_two_points_may_move(random: Random) -> None:
    problem = WordProblem(parse_group("S5"), max_moved=2)
    assert problem.vocab_size == 122
    rows = split(problem, *problem.rows(random, torch.arange(300), 12, 12))
    drawn = {x for word, _ in rows for x in word}
    swaps = {i for i, row in enumerate(problem.group.permutations.tolist()) if sum(p != j for j, p in enumerate(row)) <= 2}
    assert drawn == swaps
    assert len(swaps) == 1 + 10
    assert_even((x for word, _ in rows for x in word), 11)
    assert len({y for _, answers in rows for y in answers}) > 60  # products are any element
    for word, answers in rows[:20]:
        assert answers == running_products(problem.group, word)


def test_three_points_may_move_in_a5(random: Random) -> None:
    problem = WordProblem(parse_group("A5"), max_moved=3)
    input_ids, _ = problem.rows(random, torch.arange(100), 20, 20)
    assert set(problem.group.moved[input_ids[:, 1:].unique().numpy()]) == {0, 3}


@pytest.mark.parametrize(("name", "moved", "least"), [("A5", 2, 3), ("Z7", 6, 7), ("S3", 1, 2)])
def test_a_limit_that_leaves_only_the_identity_is_refused_with_what_would_do(name: str, moved: int, least: int) -> None:
    with pytest.raises(UserError, match=rf"state_tracking.max_moved = {moved} leaves only the identity of {name}.* {least} "):
        WordProblem(parse_group(name), max_moved=moved)
    WordProblem(parse_group(name), max_moved=least)


def test_describe_names_what_makes_words_what_they_are() -> None:
    group = parse_group("S5")
    words = {
        WordProblem(group, moved, n).describe() for moved in (None, 2, 3) for n in (1, 2, 4)
    } | {WordProblem(parse_group("A5")).describe()}  # fmt: skip
    assert len(words) == 10
    assert any("S5, 120 elements, drawing 11 of them, 4 tokens an element" in text for text in words)


# -- rows are functions of their index ---------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3])
def test_a_row_depends_on_its_index_alone(random: Random, n: int) -> None:
    problem = WordProblem(parse_group("S4"), tokens_per_element=n)
    samples = torch.randint(2**50, (30,))
    whole, order = problem.rows(random, samples, 3, 20), torch.randperm(30)
    for made, again in zip(whole, problem.rows(random, samples[order], 3, 20), strict=True):
        assert torch.equal(made[order], again)
    for i in range(30):
        for made, alone in zip(whole, problem.rows(random, samples[i : i + 1], 3, 20), strict=True):
            assert torch.equal(made[i : i + 1], alone)


def test_a_longer_row_begins_as_the_shorter_and_low_does_not_change_the_elements(random: Random) -> None:
    problem, samples = WordProblem(parse_group("S4")), torch.arange(20)
    short, long = (problem.rows(random, samples, n, n) for n in (10, 30))
    assert torch.equal(short[0], long[0][:, :11])
    assert torch.equal(short[1], long[1][:, :11])
    varied, labels = problem.rows(random, samples, 1, 30)
    assert torch.equal(torch.where(varied == problem.filler, varied, long[0]), varied)
    assert torch.equal(torch.where(labels == -100, labels, long[1]), labels)


def test_samples_and_keys_differ(random: Random) -> None:
    problem = WordProblem(parse_group("S4"))
    ours, others = (problem.rows(key, torch.arange(50), 40, 40)[0] for key in (random, Random("other")))
    assert len({tuple(row) for row in torch.cat([ours, others]).tolist()}) == 100


def test_no_samples_make_no_rows(random: Random) -> None:
    input_ids, labels = WordProblem(parse_group("S3")).rows(random, torch.arange(0), 5, 5)
    assert input_ids.shape == labels.shape == (0, 6)


# -- random numbers ----------------------------------------------------------------------------------------------------


def test_numbers_are_in_their_range_and_even(random: Random) -> None:
    numbers = random.integers(torch.arange(4000), 5, 7)
    assert numbers.shape == (4000, 5)
    assert numbers.dtype == torch.int64
    assert_even(numbers.flatten().tolist(), 7)
    large = random.integers(torch.arange(3000), 4, 2**31)
    assert 0 <= large.min() <= large.max() < 2**31
    assert_even((large >> 28).flatten().tolist(), 8)
    assert_even((large & 7).flatten().tolist(), 8)
    assert len(large.unique()) > 11_980  # 12,000 draws of 2^31 meet 0.03 times


def test_a_range_for_each_draw(random: Random) -> None:
    below = torch.tensor([1, 2, 50])
    numbers = random.integers(torch.arange(2000), 3, below)
    assert numbers.max(0).values.tolist() == [0, 1, 49]


def test_start_goes_on_in_the_same_row(random: Random) -> None:
    samples = torch.randint(2**60, (9,))
    whole = random.integers(samples, 20, 1000)
    assert torch.equal(whole[:, 6:], random.integers(samples, 14, 1000, start=6))
    assert random.integers(samples, 0, 1000).shape == (9, 0)


def test_the_same_key_gives_the_same_numbers_and_another_one_others(random: Random) -> None:
    samples, key = torch.arange(50), secrets.token_hex()
    ours = Random(key).integers(samples, 40, 2**31)
    assert torch.equal(ours, Random(key).integers(samples, 40, 2**31))
    assert (ours == Random(key + "x").integers(samples, 40, 2**31)).sum() <= 1


def test_rows_are_no_shifted_copies_of_one_another(random: Random) -> None:
    numbers = random.integers(torch.arange(100), 100, 2**31)
    assert len(numbers.unique()) >= 9_998


def test_numbers_are_those_of_python_integers(random: Random) -> None:
    def mix(z: int) -> int:
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    gamma, samples = 0x9E3779B97F4A7C15, [0, 1, secrets.randbelow(2**62)]
    for sample, row in zip(samples, random.integers(torch.tensor(samples), 8, 1000).tolist(), strict=True):
        start = mix((sample * gamma + random.key) % 2**64)
        assert row == [(mix((start + (draw + 1) * gamma) % 2**64) & (2**63 - 1)) % 1000 for draw in range(8)]
