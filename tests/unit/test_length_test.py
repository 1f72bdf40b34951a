"""Accuracies against counting in plain Python over logits that were chosen, and the length test's result on disk."""

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
def one_rank() -> Iterator[None]:
    """A process group of this process alone: sums are over all ranks."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
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


def random_case(rows: int = 12, T: int = 9) -> tuple[list[Tensor], list[Tensor]]:
    """Labels (a third of them -100, a row without any) and logits of three batches, right about half the time."""
    torch.seed()
    labels = [torch.randint(V, (rows, T)) for _ in range(3)]
    logits = [torch.randn(rows, T, V, dtype=torch.float64) for _ in labels]
    for x, y in zip(labels, logits, strict=True):
        help_row = torch.rand(rows) < 0.5
        y[help_row] += 20 * nn.functional.one_hot(x, V)[help_row]
        x[torch.rand(rows, T) < 0.3] = -100
        x[0] = -100
    labels[0][3:] = -100  # batches weigh by their labels
    return labels, logits


def test_losses_accuracies_and_counts_are_those_counted_by_hand() -> None:
    labels, logits = random_case()
    batches: Any = [{"input_ids": torch.full_like(x, i), "labels": x, "cu_seqlens": None} for i, x in enumerate(labels)]
    losses, right, solved, counts = list[float](), list[bool](), list[bool](), [[0] * 9 for _ in range(3)]
    for x, y in zip(torch.cat(labels).tolist(), torch.cat(logits).tolist(), strict=True):
        right_so_far = True
        for t, label in enumerate(x):
            if label == -100:
                continue
            losses.append(math.log(sum(math.exp(v - y[t][label]) for v in y[t])))
            right.append(y[t].index(max(y[t])) == label)
            right_so_far = right_so_far and right[-1]
            for count, here in zip(counts, (1, right[-1], right_so_far), strict=True):
                count[t] += here
        solved += [right_so_far] * (x != [-100] * 9)
    model: Any = Given(logits)
    result = evaluate_answers(model, batches, CPU)
    assert result.tokens == len(losses)
    assert result.loss == pytest.approx(sum(losses) / len(losses), rel=1e-9)
    assert (result.token_accuracy, result.sequence_accuracy) == (sum(right) / len(right), sum(solved) / len(solved))
    assert accuracy_by_position(model, batches, CPU).tolist() == counts
    assert model.training
    labels[0].fill_(-100)
    nothing = evaluate_answers(model, batches[:1], CPU)
    assert (nothing.tokens, nothing.loss, nothing.token_accuracy, nothing.sequence_accuracy) == (0, 0, 0, 0)


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


def length_test_of(problem: Any, until: int, size: int, low: int, high: int, train_length: int = 4) -> LengthTest:
    """The length test of an oracle on so many words of `low` to `high` symbols."""
    words = SyntheticSet(problem, secrets.token_hex(), size, low, high, Place(1 + high, 7, 7, 0, 1), CPU)
    return run_length_test(Oracle(problem, until), words, train_length, CPU)  # type: ignore[arg-type]


@pytest.mark.parametrize("n", [1, 3])
def test_a_word_counts_at_a_length_if_it_is_right_up_to_there(n: int) -> None:
    result = length_test_of(WordProblem(parse_group("S3"), tokens_per_element=n), 10, 20, 16, 16)
    assert result.problem == "word problem of S3, 6 elements" + (f", {n} tokens an element" if n > 1 else "")
    assert (result.chance, result.train_length) == (1 / 6, 4)
    assert result.lengths == list(range(1, 17))
    assert result.asked == [20] * 16
    assert result.right == result.right_so_far == [20] * 10 + [0] * 6
    assert (result.sequence_accuracy(10), result.sequence_accuracy(11)) == (1, 0)
    assert (result.token_accuracy(1, 16), result.token_accuracy(9, 12)) == (10 / 16, 0.5)
    assert result.answers_everywhere
    assert "100.0% at 4" in result.describe()
    assert "0.0% at 16" in result.describe()


def test_a_string_counts_at_its_own_length() -> None:
    result = length_test_of(find_language("parity"), 8, 300, 4, 12)
    assert result.lengths == list(range(4, 13))
    assert sum(result.asked) == 300
    assert not result.answers_everywhere
    assert result.right == [asked if length <= 8 else 0 for length, asked in zip(result.lengths, result.asked, strict=True)]
    assert result.token_accuracy(5, 12) == sum(result.right[1:]) / sum(result.asked[1:])
    scaled = (sum(result.right) / 300 - 0.5) / 0.5
    assert result.scaled_accuracy() == pytest.approx(scaled)
    assert f"scaled accuracy {scaled:.3f}" in result.describe()
    alike = length_test_of(find_language("parity"), 99, 30, 12, 12, 12)  # as many at every length, and yet no prefixes
    assert (alike.lengths, alike.answers_everywhere) == ([12], False)


def test_lengths_nobody_asked_about_have_no_accuracy() -> None:
    result = LengthTest("parity", 0.5, False, 4, [5, 7], [2, 3], [1, 3], [1, 3])
    assert math.isnan(result.token_accuracy(8, 20))
    assert result.token_accuracy(1, 5) == 0.5
    with pytest.raises(ValueError, match="6"):
        result.sequence_accuracy(6)


def test_a_result_comes_back_from_its_file_and_what_is_none_is_the_users_to_mend(tmp_path: Path) -> None:
    lengths = list(range(1, 9))
    result = LengthTest("S3", 1 / 6, True, 2, lengths, [8] * 8, [8, 8, 8, 7, 6, 4, 3, 1], [8, 8, 8, 7, 6, 3, 2, 0])
    result.write(tmp_path)
    assert read_length_test(tmp_path) == result
    assert json.loads((tmp_path / FILE).read_text())["lengths"] == lengths
    for text in (None, "{", "[1, 2]", '{"problem": "S3"}'):
        (tmp_path / FILE).unlink() if text is None else (tmp_path / FILE).write_text(text)
        with pytest.raises(UserError, match=r"^[^\n]*test.json cannot be read [^\n]*run it again[^\n]*$"):
            read_length_test(tmp_path)


def test_reading_needs_no_torch() -> None:
    code = "import sys, titan_dp.train.length_test; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)
