"""Synthetic batches: the same samples however many ranks make them, three sets that share nothing, a growing curriculum."""

from __future__ import annotations

import secrets
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from titan_dp import config
from titan_dp.data.batch import Place
from titan_dp.data.synthetic import loader as synthetic
from titan_dp.data.synthetic.loader import SyntheticLoader, SyntheticSet, build_problem, fingerprint, validation_set
from titan_dp.errors import UserError

CPU = torch.device("cpu")
G = 8
S3_FILLER, S3_BOS = 6, 7


def settings(task: str = "S3", **keys: Any) -> config.StateTracking:
    return config.StateTracking(task=task, **keys)


def loader(
    c: config.StateTracking, rank: int = 0, world_size: int = 1, L: int = G, seed: int = 1, seq_len: int = 17, vocab: int = 64
) -> SyntheticLoader:
    return SyntheticLoader(c, seed, Place(seq_len, L, G, rank, world_size), vocab, CPU)


def steps(c: config.StateTracking, count: int, world_size: int = 1, L: int = G, start: int = 0, **options: Any) -> Tensor:
    """Input ids and labels [count, 2, G, T] of `count` steps after `start` samples, put together from all ranks."""
    accumulation = G // (L * world_size)
    ranks = []
    for rank in range(world_size):
        one = loader(c, rank, world_size, L, **options)
        one.load_state_dict({"samples": start})
        batches = list(chain.from_iterable(islice(one, count)))
        assert one.state_dict()["samples"] == start + count * G
        assert all(b["cu_seqlens"] is None for b in batches)
        pairs = [torch.stack([b["input_ids"], b["labels"]]) for b in batches]  # type: ignore[list-item]
        ranks.append(torch.stack(pairs).view(count, accumulation, 2, L, -1))
    whole = torch.stack(ranks, 2)  # count, accumulation, rank, 2, L, T
    return whole.permute(0, 3, 1, 2, 4, 5).reshape(count, 2, G, -1)


def words(rows: Tensor) -> list[tuple[int, ...]]:
    return [tuple(row) for row in rows.flatten(0, -2).tolist()]


EVERYTHING: dict[str, dict[str, Any]] = {
    "a group": {"task": "S3"},
    "words of many lengths": {"task": "S3", "min_length": 3},
    "a curriculum": {"task": "S3", "min_length": 2, "curriculum_steps": 4},
    "two tokens an element": {"task": "D4", "tokens_per_element": 2, "curriculum_steps": 3},
    "a language": {"task": "parity", "min_length": 3, "curriculum_steps": 3},
    "brackets": {"task": "modular-arithmetic-brackets", "min_length": 4},
}
every_problem = pytest.mark.parametrize("name", EVERYTHING)


# -- training ----------------------------------------------------------------------------------------------------------


@every_problem
@pytest.mark.parametrize(("world_size", "L"), [(1, 2), (2, 4), (2, 1), (4, 2), (8, 1)])
def test_a_step_has_the_same_samples_in_the_same_order_on_any_ranks(name: str, world_size: int, L: int) -> None:
    c = settings(**EVERYTHING[name])
    assert torch.equal(steps(c, 6, world_size, L), steps(c, 6))


@every_problem
def test_resuming_at_any_step_on_other_ranks_goes_on_with_the_next_sample(name: str) -> None:
    c = settings(**EVERYTHING[name])
    whole = steps(c, 7)
    for start, world_size in ((1, 2), (3, 4), (5, 8)):
        assert torch.equal(steps(c, 7 - start, world_size, 1, start * G), whole[start:])


def test_a_loader_that_went_on_was_not_changed_by_being_asked_where_it_is() -> None:
    one, other = loader(settings()), loader(settings())
    for _, (batch,), (expected,) in zip(range(10), one, other, strict=False):
        assert one.state_dict() == one.state_dict()
        assert torch.equal(batch["input_ids"], expected["input_ids"])  # type: ignore[arg-type]


def test_the_state_is_the_position_after_the_steps_handed_out() -> None:
    one = loader(settings(), L=2)
    assert [(len(step), one.state_dict()["samples"]) for step in islice(one, 2)] == [(4, G), (4, 2 * G)]


def test_every_sample_is_new_and_a_seed_makes_a_run() -> None:
    c, seed = settings(), secrets.randbelow(2**31)
    ours = words(steps(c, 20, seed=seed)[:, 0])
    assert len(set(ours)) == len(ours) == 20 * G
    assert ours == words(steps(c, 20, seed=seed)[:, 0])
    assert not set(ours) & set(words(steps(c, 20, seed=seed + 1)[:, 0]))


def test_tasks_with_the_same_symbols_have_words_of_their_own() -> None:
    assert not set(words(steps(settings("S3"), 5)[:, 0])) & set(words(steps(settings("D3"), 5)[:, 0]))


def test_rows_fill_the_sequence_and_begin_with_bos() -> None:
    for seq_len in (2, 3, 17, 33):
        rows = steps(settings(), 2, seq_len=seq_len)
        assert rows.shape == (2, 2, G, seq_len)
        assert (rows[:, 0, :, 0] == S3_BOS).all()
        assert (rows[:, 0, :, 1:] < 6).all()
        assert (rows[:, 1, :, 0] == -100).all()
        assert (rows[:, 1, :, 1:] >= 0).all()


def test_words_of_many_lengths_keep_to_their_bounds() -> None:
    rows = steps(settings(min_length=5), 100)
    lengths = (rows[:, 1] != -100).sum(-1)
    assert set(lengths.flatten().tolist()) == set(range(5, 17))
    for ids, labels, length in zip(rows[:, 0].flatten(0, 1), rows[:, 1].flatten(0, 1), lengths.flatten().tolist(), strict=True):
        assert (ids[1 : 1 + length] < 6).all()
        assert (ids[1 + length :] >= 0).all()  # whatever it is, the model can look it up
        assert (labels[1 + length :] == -100).all()


@pytest.mark.parametrize(("min_length", "first"), [(None, 1), (4, 4)])
def test_the_curriculum_grows_in_a_straight_line_and_stays(min_length: int | None, first: int) -> None:
    grow = 16 - first
    rows = steps(settings(min_length=min_length, curriculum_steps=grow), grow + 4)
    asked = (rows[:, 1] != -100).sum(-1)
    for step in range(grow + 4):
        longest = min(16, first + step)
        if min_length is None:  # all words of a step are as long as may be
            assert set(asked[step].tolist()) == {longest}
        else:
            assert min_length <= asked[step].min() <= asked[step].max() <= longest
    if min_length:
        assert asked[-4:].min() < 16


def test_a_curriculum_goes_on_with_the_next_step_when_steps_get_larger() -> None:
    c = settings(curriculum_steps=100)
    small, large = loader(c), SyntheticLoader(c, 1, Place(17, 2 * G, 2 * G, 0, 1), 64, CPU)
    list(islice(small, 50))
    large.load_state_dict(small.state_dict())
    ((batch,),) = islice(large, 1)
    assert batch["labels"] is not None
    assert large.state_dict() == {"samples": 52 * G, "step": 51}
    assert int((batch["labels"][0] != -100).sum()) == large.longest(50)


def test_a_slow_curriculum_rounds_down_and_ends_on_time() -> None:
    one = loader(settings(curriculum_steps=100))
    lengths = [one.longest(step) for step in (0, 6, 7, 50, 99, 100, 10**6)]
    assert lengths == [1, 1, 2, 8, 15, 16, 16]


def test_several_tokens_an_element_take_several_places() -> None:
    rows = steps(settings(tokens_per_element=4), 3, seq_len=17)
    assert (rows[:, 0, :, 1::4] < 6).all()
    for other in (2, 3, 4):
        assert (rows[:, 0, :, other::4] == S3_FILLER).all()
    assert (rows[:, 1, :, 4::4] >= 0).all()
    assert (rows[:, 1] != -100).sum() == 3 * G * 4


def test_a_language_asks_once_a_row() -> None:
    rows = steps(settings("cycle-navigation", min_length=3), 10)
    assert ((rows[:, 1] != -100).sum(-1) == 1).all()


def test_describe_and_fingerprint_tell_one_training_set_from_another() -> None:
    all_settings = [settings(), settings("D3"), settings(min_length=3), settings(curriculum_steps=9), settings("parity")]
    all_settings += [settings(tokens_per_element=2), settings("S4", max_moved=2), settings("S4")]
    assert len({fingerprint(build_problem(c), c) for c in all_settings}) == len(all_settings)
    one = loader(settings(min_length=3, curriculum_steps=9))
    assert one.fingerprint == loader(settings(min_length=3, curriculum_steps=9)).fingerprint
    assert "words of 3 to 16 symbols, growing over 9 steps" in one.describe(10**6)


# -- validation and test -----------------------------------------------------------------------------------------------


def held_out(c: config.StateTracking, rank: int, world_size: int, L: int, kind: str = "validation") -> SyntheticSet:
    build = validation_set if kind == "validation" else synthetic.test_set
    return build(c, Place(17, L, L * world_size, rank, world_size), 64, CPU)


def asked_rows(c: config.StateTracking, world_size: int, L: int, kind: str = "validation") -> list[tuple[int, ...]]:
    """The ids and labels of every row that has a label, over all ranks."""
    found = []
    sets = [held_out(c, rank, world_size, L, kind) for rank in range(world_size)]
    assert len({len(one) for one in sets}) == 1
    for one in sets:
        batches = list(one)
        assert len(batches) == len(one)
        for batch in batches:
            assert batch["input_ids"].shape[0] == L  # type: ignore[union-attr]
            keep = (batch["labels"] != -100).any(1)  # type: ignore[union-attr]
            found += words(torch.cat([batch["input_ids"], batch["labels"]], 1)[keep])  # type: ignore[list-item]
    return found


@pytest.mark.parametrize("kind", ["validation", "test"])
@pytest.mark.parametrize(("world_size", "L"), [(1, 20), (1, 7), (2, 5), (3, 4), (4, 1), (8, 16)])
def test_held_out_words_are_the_same_on_any_ranks_each_once(kind: str, world_size: int, L: int) -> None:
    c = settings(validation_samples=20, test_samples=20, min_length=9)
    found = asked_rows(c, world_size, L, kind)
    assert len(found) == len(set(found)) == 20
    assert sorted(found) == sorted(asked_rows(c, 1, 1, kind))


def test_a_set_is_the_same_every_time_it_is_gone_through() -> None:
    one = held_out(settings(validation_samples=10), 0, 1, 4)
    first, again = ([b["labels"].tolist() for b in one] for _ in range(2))  # type: ignore[union-attr]
    assert first == again


def test_training_validation_and_test_share_no_word() -> None:
    c = settings(validation_samples=200, test_samples=200, test_length=16)
    length = 17
    training = {row[:length] for row in words(steps(c, 25)[:, 0])}
    validation = {row[:length] for row in asked_rows(c, 1, 50)}
    test = {row[:length] for row in asked_rows(c, 1, 50, "test")}
    assert (len(training), len(validation), len(test)) == (200, 200, 200)
    assert not training & validation
    assert not training & test
    assert not validation & test


def test_held_out_words_do_not_depend_on_the_seed_of_training() -> None:
    assert not set(words(steps(settings(), 5, seed=0)[:, 0])) & {row[:17] for row in asked_rows(settings(), 1, 64)}


def test_validation_has_the_training_lengths_and_the_test_of_a_group_the_longest() -> None:
    c = settings(min_length=5, validation_samples=300, test_samples=30)
    lengths = {sum(x >= 0 for x in row[17:]) for row in asked_rows(c, 1, 100)}
    assert lengths == set(range(5, 17))
    assert {len(row) for row in asked_rows(c, 1, 10, "test")} == {2 * (1 + 4 * 16)}
    assert {sum(x >= 0 for x in row[65:]) for row in asked_rows(c, 1, 10, "test")} == {64}


def test_the_test_of_a_language_has_all_lengths_from_the_longest_trained_on() -> None:
    c = settings("parity", min_length=3, test_length=24, test_samples=400)
    places = {next(i for i, x in enumerate(row[25:]) if x >= 0) for row in asked_rows(c, 1, 100, "test")}
    assert places == set(range(16, 25))  # as 3 to 40 and 40 to 256


def test_a_set_has_one_fingerprint_for_its_words() -> None:
    def prints(**keys: Any) -> set[str]:
        return {held_out(settings(**keys), 0, 1, 4, kind).fingerprint for kind in ("validation", "test")}

    a, b, c = prints(), prints(validation_samples=9, test_samples=9), prints(task="D3")
    assert len(a | b | c) == 6
    assert prints() == a


# -- bad input ---------------------------------------------------------------------------------------------------------


def refused(message: str, c: config.StateTracking, **options: Any) -> None:
    with pytest.raises(UserError, match=message) as caught:
        loader(c, **options)
    assert "\n" not in str(caught.value)


def test_a_sequence_that_does_not_hold_whole_elements_is_refused_with_one_that_does() -> None:
    four = settings(tokens_per_element=4)
    refused(r"training.seq_len = 16 .*whole number of elements of 4 token\(s\); 13 would, for words of 3", four, seq_len=16)
    refused(r"training.seq_len = 3 .*; 5 would, for words of 1", four, seq_len=3)
    refused(r"training.seq_len = 1 .*; 2 would, for words of 1", settings(), seq_len=1)


def test_a_vocabulary_too_small_is_refused_with_the_size_it_needs() -> None:
    refused(r"model.vocab_size = 7 is too small for S3, which needs 8 ", settings(), vocab=7)
    refused(r"model.vocab_size = 8 is too small for modular-arithmetic.* needs 11 ", settings("modular-arithmetic"), vocab=8)
    loader(settings(), vocab=8)


def test_words_that_cannot_be_so_short_or_long_are_refused() -> None:
    refused(r"state_tracking.min_length = 17 does not fit into training.seq_len = 17.* at most 16", settings(min_length=17))
    refused(r"state_tracking.test_length = 15 is shorter than the words trained on, 16", settings(test_length=15))
    loader(settings(min_length=16, test_length=16))


@pytest.mark.parametrize(
    "keys",
    [
        {"seq_len": 2},  # an expression has an even number of symbols
        {"seq_len": 4, "min_length": 3},
        {"seq_len": 4, "min_length": 3, "curriculum_steps": 5},
        {"seq_len": 16, "test_length": 15},  # the test's lengths begin with the longest trained on
    ],
)
def test_lengths_that_no_string_of_a_language_has_are_refused_before_training(keys: dict[str, int]) -> None:
    seq_len = keys.pop("seq_len")
    refused("modular-arithmetic has no string of", settings("modular-arithmetic", **keys), seq_len=seq_len)


@pytest.mark.parametrize(
    ("min_length", "lengths"), [(None, {2, 4, 6, 8, 10, 12, 14}), (7, {8, 10, 12, 14}), (8, {8, 10, 12, 14})]
)
@pytest.mark.parametrize("curriculum_steps", [0, 5])
def test_strings_have_all_lengths_that_their_language_has(
    min_length: int | None, lengths: set[int], curriculum_steps: int
) -> None:
    c = settings("modular-arithmetic", min_length=min_length, curriculum_steps=curriculum_steps)
    answers = steps(c, 60, seq_len=16)[5:, 1]  # rows of 15 symbols, of which no string has so many
    assert set((answers != -100).flatten(0, 1).nonzero()[:, 1].tolist()) == lengths


@pytest.mark.parametrize(
    ("task", "min_length", "first"), [("parity", None, 2), ("modular-arithmetic", None, 3), ("parity", 5, 6)]
)
def test_a_languages_curriculum_begins_with_two_lengths(task: str, min_length: int | None, first: int) -> None:
    """Of which arithmetic, whose strings are even, has one."""
    one = loader(settings(task, min_length=min_length, curriculum_steps=16 - first))
    assert [one.longest(step) for step in range(20)] == [min(16, first + step) for step in range(20)]


def test_what_is_not_refused_is_trained_on_to_the_end() -> None:
    for task in ("modular-arithmetic", "modular-arithmetic-brackets", "parity", "S3"):
        for seq_len in range(2, 9):
            for keys in ({}, {"min_length": 2}, {"curriculum_steps": 5}, {"curriculum_steps": 5, "min_length": 2}):
                c = settings(task, validation_samples=3, test_samples=3, **keys)
                try:
                    one = loader(c, seq_len=seq_len)
                except UserError:
                    continue
                for (batch,) in islice(one, 8):
                    assert batch["input_ids"].shape == (G, seq_len)  # type: ignore[union-attr]
                for kind in ("validation", "test"):
                    build = validation_set if kind == "validation" else synthetic.test_set
                    assert len(list(build(c, Place(seq_len, 3, 3, 0, 1), 64, CPU))) >= 1


@pytest.mark.parametrize("task", ["dyck", "s3", "Q8", "S3xQ8", "S9", "nowhere.csv", " ", "S3,A5"])
def test_a_task_that_is_none_is_refused(task: str) -> None:
    refused("task|group|S3,A5", settings(task))


def test_a_table_in_lower_case_is_a_file_not_a_language(tmp_path: Path) -> None:
    (tmp_path / "z2.csv").write_text("0,1\n1,0\n")
    problem = build_problem(settings(str(tmp_path / "z2.csv")))
    assert (problem.name[:3], problem.vocab_size) == ("z2-", 4)


def test_tables_of_one_name_that_differ_have_fingerprints_that_differ(tmp_path: Path) -> None:
    found = set()
    for i, text in enumerate(("0,1,2,3\n1,2,3,0\n2,3,0,1\n3,0,1,2\n", "0,1,2,3\n1,0,3,2\n2,3,0,1\n3,2,1,0\n")):  # Z4, Z2xZ2
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "four.csv").write_text(text)
        found.add(loader(settings(str(tmp_path / str(i) / "four.csv"))).fingerprint)
    assert len(found) == 2
