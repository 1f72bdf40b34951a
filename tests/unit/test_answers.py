"""Accuracies against counting in plain Python over logits that were chosen, and the test's results on disk."""

from __future__ import annotations

import json
import math
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from titan_dp.data.batch import Place
from titan_dp.data.synthetic.groups import parse_group
from titan_dp.data.synthetic.languages import find_language
from titan_dp.data.synthetic.loader import SyntheticSet
from titan_dp.data.synthetic.words import WordProblem
from titan_dp.errors import UserError
from titan_dp.train.length_test import FILE, LengthTest, read_length_test, run_length_test
from titan_dp.train.validate import accuracy_by_position, evaluate_answers

CPU = torch.device("cpu")
V = 5


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this process alone: sums are over all ranks."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path_factory.mktemp('group')}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Given(nn.Module):
    """A model whose logits were chosen: those of the batch that its first token numbers."""

    def __init__(self, logits: list[Tensor]) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, tokens: Tensor) -> Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        return self.logits[int(tokens[0, 0])]


def batches_of(labels: list[Tensor]) -> list[dict[str, Tensor | None]]:
    return [{"input_ids": torch.full_like(x, i), "labels": x, "cu_seqlens": None} for i, x in enumerate(labels)]


def random_case(rows: int = 6, T: int = 9) -> tuple[Any, list[dict[str, Tensor | None]], list[Tensor], list[Tensor]]:
    """A stub, its batches, their labels (a third of them -100, a row without any) and logits, right about half the time."""
    generator = torch.Generator().manual_seed(secrets.randbits(40))
    labels = [torch.randint(V, (rows, T), generator=generator) for _ in range(3)]
    logits = [torch.randn(rows, T, V, generator=generator, dtype=torch.float64) for _ in labels]
    for x, y in zip(labels, logits, strict=True):
        help_row = torch.rand(rows, generator=generator) < 0.5
        y[help_row] += 20 * nn.functional.one_hot(x, V)[help_row]
        x[torch.rand(rows, T, generator=generator) < 0.3] = -100
        x[0] = -100
    labels[0][3:] = -100  # batches weigh by their labels
    return Given(logits), batches_of(labels), labels, logits


def rows_of(labels: list[Tensor], logits: list[Tensor]) -> list[list[tuple[int, int, list[float]]]]:
    """Of every row, (position, label, logits) where something is asked."""
    found = []
    for x, y in zip(labels, logits, strict=True):
        for row, values in zip(x.tolist(), y.tolist(), strict=True):
            found.append([(t, label, values[t]) for t, label in enumerate(row) if label != -100])
    return found


# -- evaluate_answers --------------------------------------------------------------------------------------------------


def test_loss_and_accuracies_are_those_counted_by_hand() -> None:
    model, batches, labels, logits = random_case()
    result = evaluate_answers(model, batches, CPU)
    rows = rows_of(labels, logits)
    answers = [answer for row in rows for answer in row]
    losses = [math.log(sum(math.exp(v - values[label]) for v in values)) for _, label, values in answers]
    right = [values.index(max(values)) == label for _, label, values in answers]
    solved = [all(values.index(max(values)) == label for _, label, values in row) for row in rows if row]
    assert result.tokens == len(answers)
    assert result.loss == pytest.approx(sum(losses) / len(losses), rel=1e-9)
    assert result.token_accuracy == sum(right) / len(right)
    assert result.sequence_accuracy == sum(solved) / len(solved)
    assert model.training


def test_nothing_asked_is_no_division_by_zero() -> None:
    labels = torch.full((2, 3), -100)
    result = evaluate_answers(Given([torch.randn(2, 3, V)]), batches_of([labels]), CPU)  # type: ignore[arg-type]
    assert (result.tokens, result.loss, result.token_accuracy, result.sequence_accuracy) == (0, 0, 0, 0)


# -- accuracy_by_position ----------------------------------------------------------------------------------------------


def test_counts_at_each_position_are_those_counted_by_hand() -> None:
    model, batches, labels, logits = random_case(rows=12)
    counts = accuracy_by_position(model, batches, CPU)
    expected = [[0] * 9 for _ in range(3)]
    for row in rows_of(labels, logits):
        all_right = True
        for t, label, values in row:
            right = values.index(max(values)) == label
            all_right = all_right and right
            for count, here in zip(expected, (1, right, all_right), strict=True):
                count[t] += here
    assert counts.tolist() == expected
    assert model.training


# -- the test ----------------------------------------------------------------------------------------------------------


class Oracle(nn.Module):
    """Answers a word problem, or a language, rightly up to `until` symbols, and with 0's neighbour after."""

    def __init__(self, problem: Any, until: int) -> None:
        super().__init__()
        self.problem, self.until = problem, until

    def forward(self, tokens: Tensor) -> Tensor:
        n, V = self.problem.tokens_per_element, self.problem.vocab_size
        answers = torch.zeros_like(tokens)
        if isinstance(self.problem, WordProblem):
            elements = tokens[:, 1::n].clamp(max=self.problem.group.order - 1)
            state, table = torch.zeros_like(elements[:, 0]), torch.from_numpy(self.problem.group.table)
            for t in range(elements.shape[1]):
                state = table[elements[:, t], state]
                answers[:, (1 + t) * n] = state if t < self.until else (state + 1) % self.problem.group.order
        else:
            ones = ((tokens == 1) * (tokens < 2)).cumsum(1)
            place = torch.arange(tokens.shape[1])
            answers = (ones + (place > self.until)) % 2
        return nn.functional.one_hot(answers, V).double()


def test_set_of(problem: Any, size: int, low: int, high: int) -> SyntheticSet:
    return SyntheticSet(problem, secrets.token_hex(), size, low, high, Place(1 + high, 7, 7, 0, 1), CPU)


test_set_of.__test__ = False  # type: ignore[attr-defined]


@pytest.mark.parametrize("n", [1, 3])
def test_a_word_counts_at_a_length_if_it_is_right_up_to_there(n: int) -> None:
    problem = WordProblem(parse_group("S3"), tokens_per_element=n)
    result = run_length_test(Oracle(problem, until=10), test_set_of(problem, 20, 16, 16), 4, CPU)  # type: ignore[arg-type]
    assert result.problem == "word problem of S3, 6 elements" + (f", {n} tokens an element" if n > 1 else "")
    assert (result.chance, result.train_length) == (1 / 6, 4)
    assert result.lengths == list(range(1, 17))
    assert result.asked == [20] * 16
    assert result.right == result.right_so_far == [20] * 10 + [0] * 6
    assert (result.sequence_accuracy(10), result.sequence_accuracy(11)) == (1, 0)
    assert result.token_accuracy(1, 16) == 10 / 16
    assert result.token_accuracy(9, 12) == 0.5
    assert result.answers_everywhere
    assert "100.0% at 4" in result.describe()
    assert "0.0% at 16" in result.describe()


def test_a_string_counts_at_its_own_length() -> None:
    problem = find_language("parity")
    result = run_length_test(Oracle(problem, until=8), test_set_of(problem, 300, 4, 12), 4, CPU)  # type: ignore[arg-type]
    assert result.lengths == list(range(4, 13))
    assert sum(result.asked) == 300
    assert not result.answers_everywhere
    for length, asked, right in zip(result.lengths, result.asked, result.right, strict=True):
        assert right == (asked if length <= 8 else 0)
    assert result.token_accuracy(5, 12) == sum(result.right[1:]) / sum(result.asked[1:])
    scaled = (sum(result.right) / 300 - 0.5) / 0.5
    assert result.scaled_accuracy() == pytest.approx(scaled)
    assert f"scaled accuracy {scaled:.3f}" in result.describe()


def test_lengths_nobody_asked_about_have_no_accuracy() -> None:
    result = LengthTest("parity", 0.5, False, 4, [5, 7], [2, 3], [1, 3], [1, 3])
    assert math.isnan(result.token_accuracy(8, 20))
    assert result.token_accuracy(1, 5) == 0.5
    with pytest.raises(ValueError, match="6"):
        result.sequence_accuracy(6)


def test_strings_that_happen_to_be_as_many_at_every_length_are_no_prefixes() -> None:
    problem = find_language("parity")
    result = run_length_test(Oracle(problem, until=99), test_set_of(problem, 30, 12, 12), 12, CPU)  # type: ignore[arg-type]
    assert result.lengths == [12]
    assert not result.answers_everywhere


# -- test.json ---------------------------------------------------------------------------------------------------------


def test_a_result_comes_back_from_its_file(tmp_path: Path) -> None:
    lengths = list(range(1, 9))
    result = LengthTest("S3", 1 / 6, True, 2, lengths, [8] * 8, [8, 8, 8, 7, 6, 4, 3, 1], [8, 8, 8, 7, 6, 3, 2, 0])
    result.write(tmp_path)
    assert read_length_test(tmp_path) == result
    assert json.loads((tmp_path / FILE).read_text())["lengths"] == lengths


def test_reading_needs_no_torch() -> None:
    code = "import sys, titan_dp.train.length_test; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


@pytest.mark.parametrize("text", [None, "", "[1, 2]", "{", '{"problem": "S3"}', '{"another": 1}', "3", "\x00"])
def test_a_file_that_is_no_result_is_the_users_to_mend(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / FILE).write_text(text)
    with pytest.raises(UserError, match=r"test.json cannot be read .*run it again") as caught:
        read_length_test(tmp_path)
    assert "\n" not in str(caught.value)
