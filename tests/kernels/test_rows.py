"""The convolution and the norm of a CPU, in C and by torch, against torch in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from deltaproduct_kernels import rms_norm, rows
from torch import Tensor

from tests.kernels.helpers import error

# Rows, tokens, channels, taps, channels of unit length; the span of a task and its neighbours; no multiple of any vector.
SHAPES = [
    (2, 20, 96, 4, 32),
    (1, 129, 24, 4, 24),
    (3, 257, 30, 8, 5),
    (1, 128, 7, 2, 0),
    (1, 5, 48, 8, 12),
    (2, 140, 1200, 3, 48),
    (1, 40, 1000, 1, 0),
    (1, 0, 8, 4, 4),
]


def gradients(y: Tensor, inputs: list[Tensor], seed: int = 0) -> list[Tensor]:
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return list(torch.autograd.grad(y, inputs, dy.to(y.dtype)))


def convolved(inputs: list[Tensor], position: Tensor | None, unit: int, *, by_torch: bool) -> list[Tensor]:
    """The result and the gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    weight = leaves[1] if len(leaves) > 1 else None
    y = (
        rows.torch_convolution(leaves[0], weight, position, None, unit)
        if by_torch
        else rows.convolution(leaves[0], weight, position, None, unit)
    )
    return [y.detach(), *gradients(y, leaves)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_convolution_and_its_gradients(either_path: str, shape: tuple[int, ...], packed: bool) -> None:
    B, T, C, W, unit = shape
    inputs = [torch.randn(B, T, C).double(), *([torch.randn(C, 1, W).double()] if W > 1 else [])]
    position = None
    if packed:
        inputs[0], position = inputs[0][:1], torch.cat([torch.arange(T // 3), torch.arange(T - T // 3)]).int()
    expected = convolved(inputs, position, unit, by_torch=True)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        found = convolved([x.to(dtype) for x in inputs], position, unit, by_torch=False)
        assert all(x.dtype == dtype for x in found)
        assert all(error(a, b) < tolerance for a, b in zip(found, expected, strict=True) if b.numel())


def test_half_precision_is_as_near_as_its_rounding(either_path: str) -> None:
    x, weight = torch.randn(2, 30, 32).bfloat16(), torch.randn(32, 1, 4).bfloat16()
    exact = rows.torch_convolution(x.double(), weight.double(), None, None, 16)
    found = rows.convolution(x, weight, None, None, 16)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.double(), exact, rtol=2**-8, atol=1e-6)  # half a unit in the last place, and a little


def test_documents_do_not_see_one_another(either_path: str) -> None:
    x, weight = torch.randn(1, 50, 16), torch.randn(16, 1, 4)
    position = torch.cat([torch.arange(20), torch.arange(30)])
    x[:, :20] = torch.nan
    assert rows.convolution(x, weight, position, None, 16)[:, 20:].isfinite().all()


def test_values_far_out_stay_numbers(either_path: str) -> None:
    x = torch.tensor([-1e30, -200.0, -80.0, 0.0, 80.0, 200.0, 1e15]).view(1, 1, -1).requires_grad_()
    y = rows.convolution(x, None, None, None, 0)
    assert torch.allclose(y, F.silu(x), atol=1e-7)
    (dx,) = torch.autograd.grad(y.sum(), [x])
    assert dx.flatten().tolist() == pytest.approx([0, 0, 0, 0.5, 1, 1, 1], abs=1e-6)


@pytest.mark.parametrize("size", [4, 7, 16, 100, 1000])  # of one number the gradient all but cancels
def test_the_norm_and_its_gradients(either_path: str, size: int) -> None:
    x, weight = torch.randn(3, 100, size).double() * 10 ** (4 * torch.rand(3, 100, 1).double() - 2), torch.randn(size).double()
    x[0, 0] = 0
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    y = F.rms_norm(leaves[0], (size,), leaves[1], 1e-6)
    expected = [y.detach(), *gradients(y, leaves)]
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 5e-6)):
        own = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
        y = rms_norm(own[0], own[1], 1e-6)
        assert all(error(a, b) < tolerance for a, b in zip([y, *gradients(y, own)], expected, strict=True))


def test_nothing_depends_on_the_number_of_threads() -> None:
    inputs = [torch.randn(2, 300, 64), torch.randn(64, 1, 4)]
    results = []
    threads = torch.get_num_threads()
    for number in (1, 3):
        torch.set_num_threads(number)
        try:
            norm = [inputs[0].requires_grad_(), torch.ones(64, requires_grad=True)]
            y = rms_norm(norm[0], norm[1], 1e-6)
            results.append([*convolved(inputs, None, 16, by_torch=False), y.detach(), *gradients(y, norm)])
        finally:
            torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", ["convolution", "norm"])
def test_the_operators_keep_to_torchs_rules(name: str) -> None:
    x, weight = torch.randn(2, 20, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    if name == "norm":
        torch.library.opcheck(rows._norm, (x, weight, 1e-6))
    else:
        torch.library.opcheck(rows._convolution, (x, torch.randn(8, 1, 4, requires_grad=True), None, 4))


def test_on_the_meta_device_only_memory_is_taken() -> None:
    x, weight = torch.empty(2, 20, 8, device="meta"), torch.empty(8, 1, 4, device="meta")
    for y in (rows._convolution._init_fn(x, weight, None, 4), rows._norm._init_fn(x, weight[:, 0, 0], 1e-6)):
        assert (y.shape, y.device.type) == (x.shape, "meta")
    for grads in (
        rows._convolution_backward._init_fn(x, x, weight, None, 4),
        rows._norm_backward._init_fn(x, x, weight[:, 0, 0], 1e-6),
    ):
        assert [g.device.type for g in grads] == ["meta"] * 2
