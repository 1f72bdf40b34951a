"""The loss: a sum in float32, exact gradients, and never all logits at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from titan_dp.model import loss as loss_module
from titan_dp.model.loss import summed_cross_entropy

N, D, V = 300, 16, 1000


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK", {"cpu": 37 * V})


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    labels = torch.randint(0, V, (N,))
    labels[::7] = -100
    return torch.randn(N, D, dtype=dtype).requires_grad_(), torch.randn(V, D, dtype=dtype).requires_grad_(), labels


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_loss_and_gradients_are_those_of_cross_entropy(dtype: torch.dtype, tolerance: float) -> None:
    hidden, weight, labels = inputs(dtype)
    loss = summed_cross_entropy(hidden, weight, labels)
    (3 * loss).backward()
    reference = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = F.cross_entropy(reference[0] @ reference[1].T, labels, reduction="sum")
    (3 * expected).backward()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert float(loss) == pytest.approx(float(expected), rel=max(tolerance / 10, 1e-10))
    for x, y in zip((hidden, weight), reference, strict=True):
        assert x.grad is not None
        assert y.grad is not None
        assert float((x.grad.double() - y.grad).norm() / y.grad.norm()) < tolerance


def test_compiled_chunks_give_the_same_loss_and_gradients() -> None:
    """As on a GPU, for a chunk and a shorter last one."""
    hidden, weight, labels = inputs(torch.bfloat16)
    results = []
    for compiled in (False, True):
        hidden.grad = weight.grad = None
        loss = summed_cross_entropy(hidden, weight, labels, compiled)
        loss.backward()
        results.append([loss.detach(), hidden.grad, weight.grad])
    for eager, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager, rtol=2e-2, atol=2e-2)


def test_many_rows_at_once_are_whole_tiles_of_128(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK", {"cpu": 200 * V})
    hidden, weight, _ = inputs(torch.float32)
    assert list(loss_module._chunks(hidden, weight)) == [slice(0, 128), slice(128, 256), slice(256, 384)]


def test_labels_all_ignored_give_zero_loss_and_zero_gradients() -> None:
    hidden, weight, labels = inputs(torch.float32)
    loss = summed_cross_entropy(hidden, weight, torch.full_like(labels, -100))
    loss.backward()
    assert float(loss) == 0
    assert not hidden.grad.any()  # type: ignore[union-attr]
    assert not weight.grad.any()  # type: ignore[union-attr]


class Watch(TorchDispatchMode):
    """Counts matrix products, and the most elements of any tensor that an operator returned."""

    products = most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += func is torch.ops.aten.mm.default
        out = func(*args, **(kwargs or {}))
        tensors = out if isinstance(out, tuple | list) else (out,)
        self.most = max([self.most, *(tensor.numel() for tensor in tensors if isinstance(tensor, Tensor))])
        return out


def test_the_logits_of_all_tokens_never_exist_at_once_and_validation_takes_a_third_of_the_products() -> None:
    hidden, weight, labels = inputs(torch.bfloat16)
    with Watch() as training:
        loss = summed_cross_entropy(hidden, weight, labels)
        products = training.products
        loss.backward()
    with torch.no_grad(), Watch() as validation:
        summed_cross_entropy(hidden, weight, labels)
    assert training.most < N * V / 2
    assert products == 3 * validation.products
