"""Synthetic batches: the same samples however many ranks make them, three sets that share nothing, a growing curriculum."""

from __future__ import annotations

import hashlib
import secrets
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from titan_dp import config
from titan_dp.data.batch import Place
from titan_dp.data.synthetic import loader as synthetic
from titan_dp.data.synthetic.loader import SyntheticLoader, SyntheticSet, build_problem, fingerprint, validation_set
from titan_dp.errors import UserError

CPU = torch.device("cpu")
G = 8
Row = tuple[int, ...]


def settings(task: str = "S3", **keys: Any) -> config.StateTracking:
    return config.StateTracking(task=task, **keys)


def loader(
    c: config.StateTracking, rank: int = 0, world_size: int = 1, L: int = G, seed: int = 1, seq_len: int = 17, vocab: int = 64
) -> SyntheticLoader:
    return SyntheticLoader(c, seed, Place(seq_len, L, G, rank, world_size), vocab, CPU)


def steps(c: config.StateTracking, count: int, world_size: int = 1, L: int = G, start: int = 0, **options: Any) -> Tensor:
    """Input ids and labels [count, 2, G, T] of `count` steps after `start` samples, put together from all ranks.

    T is the width of the longest rows, to which the others are filled up.
    """
    ranks = []
    for rank in range(world_size):
        one = loader(c, rank, world_size, L, **options)
        one.load_state_dict({"samples": start})
        batches = list(chain.from_iterable(islice(one, count)))
        assert one.state_dict()["samples"] == start + count * G
        assert all(b["cu_seqlens"] is None for b in batches)
        pairs = [torch.stack([filled(b["input_ids"], one.problem.filler), filled(b["labels"], -100)]) for b in batches]
        ranks.append(torch.stack(pairs).view(count, G // (L * world_size), 2, L, -1))
    whole = torch.stack(ranks, 2)  # count, accumulation, rank, 2, L, T
    return whole.permute(0, 3, 1, 2, 4, 5).reshape(count, 2, G, -1)


def filled(rows: Tensor | None, value: int) -> Tensor:
    assert rows is not None
    return F.pad(rows, (0, 17 - rows.shape[1]), value=value)


def words(rows: Tensor) -> list[Row]:
    return [tuple(row) for row in rows.flatten(0, -2).tolist()]


# -- training ----------------------------------------------------------------------------------------------------------

# What it is, and the beginning of the sha256 of its first ten steps: runs that began with an older version go on with the same.
EVERYTHING: list[tuple[dict[str, Any], str]] = [
    ({"task": "S3", "min_length": 2, "curriculum_steps": 4}, "e0b05f2d9cf1"),
    ({"task": "D4", "tokens_per_element": 2, "curriculum_steps": 3}, "88b26ac3f7a6"),
    ({"task": "S5", "max_moved": 2}, "f39e4ad107a6"),
    ({"task": "A4xZ2"}, "63a180cd7511"),
    ({"task": "parity", "min_length": 3, "curriculum_steps": 3}, "ac9b050d045b"),
    ({"task": "even-pairs"}, "cb04db393801"),
    ({"task": "cycle-navigation", "min_length": 3}, "982415d117ca"),
    ({"task": "modular-arithmetic", "curriculum_steps": 5}, "06da314e9250"),
    ({"task": "modular-arithmetic-brackets", "min_length": 4}, "4a5dca434ba9"),
    ({"task": "modular-arithmetic-brackets-mult"}, "475f72e973ea"),
]


@pytest.mark.parametrize(("keys", "pinned"), EVERYTHING)
def test_any_ranks_starting_at_any_step_make_the_same_samples_as_ever(keys: dict[str, Any], pinned: str) -> None:
    c = settings(**keys)
    whole = steps(c, 10, vocab=128)
    assert hashlib.sha256(whole.numpy().tobytes()).hexdigest().startswith(pinned)
    for world_size, L, start in ((1, 2, 0), (4, 2, 0), (2, 1, 1), (8, 1, 5)):
        assert torch.equal(steps(c, 10 - start, world_size, L, start * G, vocab=128), whole[start:])


def test_every_sample_is_new_and_a_seed_and_a_task_make_a_run() -> None:
    seed = secrets.randbelow(2**31)
    ours, again, other = (words(steps(settings(), 20, seed=s)[:, 0]) for s in (seed, seed, seed + 1))
    assert len(set(ours)) == len(ours) == 20 * G
    assert ours == again
    assert not set(ours) & (set(other) | set(words(steps(settings("D3"), 20, seed=seed)[:, 0])))


@pytest.mark.parametrize(
    ("task", "min_length", "first"),
    [("S3", None, 1), ("S3", 4, 4), ("modular-arithmetic", None, 3), ("parity", 5, 6)],
)
def test_the_curriculum_grows_in_a_straight_line_and_stays(task: str, min_length: int | None, first: int) -> None:
    """A language's begins with two lengths, of which arithmetic, whose strings are even, has one."""
    grow = 16 - first
    c = settings(task, min_length=min_length, curriculum_steps=grow)
    longest = [min(16, first + step) for step in range(grow + 4)]
    assert [loader(c).longest(step) for step in range(grow + 4)] == longest
    ends = (steps(c, grow + 4)[:, 1] != -100).long() * torch.arange(17)
    for step, last in enumerate(ends.amax(-1)):
        assert (min_length or (longest[step] if task == "S3" else 1)) <= last.min() <= last.max() <= longest[step]
    slow = loader(settings(curriculum_steps=100))
    assert [slow.longest(step) for step in (0, 6, 7, 50, 99, 100, 10**6)] == [1, 1, 2, 8, 15, 16, 16], "it rounds down"


def test_a_geometric_curriculum_spends_as_many_steps_on_each_doubling() -> None:
    c = settings(curriculum_steps=40, curriculum_growth="geometric")
    grown = [loader(c).longest(step) for step in range(50)]
    assert grown[:12] == [1] * 10 + [2] * 2, "it rounds down"
    assert [grown.index(length) for length in (1, 2, 4, 8, 16)] == [0, 10, 20, 30, 40]
    assert sorted(grown) == grown
    assert grown[40:] == [16] * 10
    assert loader(c).fingerprint != loader(settings(curriculum_steps=40)).fingerprint


def test_short_words_of_a_curriculum_are_short_rows_in_few_widths() -> None:
    c = settings(curriculum_steps=100, tokens_per_element=2)
    batches = [batch for (batch,) in islice(loader(c, seq_len=65), 120)]
    widths = [batch["input_ids"].shape[1] for batch in batches]  # type: ignore[union-attr]
    assert list(dict.fromkeys(widths)) == [*range(8, 65, 8), 65]
    for batch, width in zip(batches, widths, strict=True):
        labels = batch["labels"]
        assert labels is not None
        assert labels.shape[1] == width
        assert width - 8 <= 2 * (int((labels != -100).sum(1).max())) < width


def test_a_curriculum_goes_on_with_the_next_step_when_steps_get_larger() -> None:
    c = settings(curriculum_steps=100)
    small, large = loader(c), SyntheticLoader(c, 1, Place(17, 2 * G, 2 * G, 0, 1), 64, CPU)
    list(islice(small, 50))
    large.load_state_dict(small.state_dict())
    ((batch,),) = islice(large, 1)
    assert batch["labels"] is not None
    assert large.state_dict() == {"samples": 52 * G, "step": 51}
    assert int((batch["labels"][0] != -100).sum()) == large.longest(50)


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


def asked_rows(c: config.StateTracking, world_size: int, L: int, kind: str = "validation") -> list[tuple[Row, Row]]:
    """The ids and labels of every row that has a label, over all ranks."""
    found = []
    sets = [held_out(c, rank, world_size, L, kind) for rank in range(world_size)]
    assert len({len(one) for one in sets}) == 1
    for one in sets:
        batches, again = list(one), list(one)
        assert len(batches) == len(one)
        for batch, same in zip(batches, again, strict=True):
            ids, labels = batch["input_ids"], batch["labels"]
            assert ids is not None
            assert labels is not None
            assert torch.equal(ids, same["input_ids"])  # type: ignore[arg-type]
            assert len(ids) == L
            keep = (labels != -100).any(1)
            found += zip(words(ids[keep]), words(labels[keep]), strict=True)
    return found


@pytest.mark.parametrize("kind", ["validation", "test"])
@pytest.mark.parametrize(("world_size", "L"), [(1, 7), (3, 4), (8, 16)])
def test_held_out_words_are_the_same_on_any_ranks_each_once(kind: str, world_size: int, L: int) -> None:
    c = settings(validation_samples=20, test_samples=20, min_length=9)
    found = asked_rows(c, world_size, L, kind)
    assert len(found) == len(set(found)) == 20
    assert sorted(found) == sorted(asked_rows(c, 1, 1, kind))


def test_training_validation_and_test_share_no_word() -> None:
    c = settings(validation_samples=200, test_samples=200, test_length=16)
    sets = [{ids for ids, _ in asked_rows(c, 1, 50, kind)} for kind in ("validation", "test")]
    sets += [set(words(steps(c, 25, seed=seed)[:, 0])) for seed in (0, 1)]
    assert [len(found) for found in sets] == [200] * 4
    assert len(set.union(*sets)) == 800


def test_validation_has_the_training_lengths_and_the_test_longer_ones() -> None:
    c = settings(min_length=5, validation_samples=300, test_samples=30)
    assert {sum(x >= 0 for x in labels) for _, labels in asked_rows(c, 1, 100)} == set(range(5, 17))
    asked = [labels for _, labels in asked_rows(c, 1, 10, "test")]
    assert {(len(labels), sum(x >= 0 for x in labels)) for labels in asked} == {(1 + 4 * 16, 64)}, "a group's longest only"
    c = settings("parity", min_length=3, test_length=24, test_samples=400)
    places = {next(i for i, x in enumerate(labels) if x >= 0) for _, labels in asked_rows(c, 1, 100, "test")}
    assert places == set(range(16, 25)), "all lengths of a language, as 3 to 40 and 40 to 256"


def test_a_set_has_one_fingerprint_for_its_words() -> None:
    def prints(**keys: Any) -> set[str]:
        return {held_out(settings(**keys), 0, 1, 4, kind).fingerprint for kind in ("validation", "test")}

    a, b, c = prints(), prints(validation_samples=9, test_samples=9), prints(task="D3")
    assert len(a | b | c) == 6
    assert prints() == a


# -- bad input ---------------------------------------------------------------------------------------------------------

ARITHMETIC = {"task": "modular-arithmetic"}
NO_STRING = "modular-arithmetic has no string of"
NO_TASK = "task|group|S3,A5"


@pytest.mark.parametrize(
    ("keys", "options", "message"),
    [
        (
            {"tokens_per_element": 4},
            {"seq_len": 16},
            r"training.seq_len = 16 .*whole number of elements of 4 tokens; 13 would, for words of 3",
        ),
        ({"tokens_per_element": 4}, {"seq_len": 3}, r"training.seq_len = 3 .*; 5 would, for words of 1"),
        ({}, {"vocab": 7}, r"model.vocab_size = 7 is too small for S3, which needs 8 "),
        ({"min_length": 17}, {}, r"state_tracking.min_length = 17 does not fit into training.seq_len = 17.* at most 16"),
        ({"test_length": 15}, {}, r"state_tracking.test_length = 15 is shorter than the words trained on, 16"),
        (ARITHMETIC, {"seq_len": 2}, NO_STRING),  # an expression has an even number of symbols
        (ARITHMETIC | {"min_length": 3, "curriculum_steps": 5}, {"seq_len": 4}, NO_STRING),
        (ARITHMETIC | {"test_length": 15}, {"seq_len": 16}, NO_STRING),  # the test begins with the longest trained on
        *(({"task": task}, {}, NO_TASK) for task in ("dyck", "S3xQ8", "nowhere.csv", " ")),
    ],
)
def test_what_does_not_fit_is_refused(keys: dict[str, Any], options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        loader(settings(**keys), **options)
    assert "\n" not in str(caught.value)


def test_what_is_not_refused_is_trained_on_to_the_end(tmp_path: Path) -> None:
    (tmp_path / "z2.csv").write_text("0,1\n1,0\n")  # in lower case, and no language
    refused = 0
    for task in ("modular-arithmetic", "modular-arithmetic-brackets", str(tmp_path / "z2.csv")):
        for seq_len in range(2, 9):
            for keys in ({}, {"min_length": 2}, {"curriculum_steps": 5}, {"curriculum_steps": 5, "min_length": 2}):
                c = settings(task, validation_samples=3, test_samples=3, **keys)
                try:
                    one = loader(c, seq_len=seq_len)
                except UserError:
                    refused += 1
                    continue
                for (batch,) in islice(one, 8):
                    assert batch["input_ids"].shape == batch["labels"].shape  # type: ignore[union-attr]
                    assert batch["labels"].shape[1] <= seq_len  # type: ignore[union-attr]
                for build in (validation_set, synthetic.test_set):
                    assert len(list(build(c, Place(seq_len, 3, 3, 0, 1), 64, CPU))) >= 1
    assert 0 < refused < 3 * 7 * 4 / 2
    loader(settings(min_length=16, test_length=16), vocab=8)
