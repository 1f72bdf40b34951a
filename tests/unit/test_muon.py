"""Muon's updates in closed form, and what they cost on several ranks, counted on tensors without data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tests.distributed.helpers import pretended
from tests.unit.test_model import make
from titan_dp import config
from titan_dp.config.load import load_config
from titan_dp.model.transformer import build_model
from titan_dp.train.muon import Muon, orthogonalise
from titan_dp.train.optim import build_optimizer

# -- closed form -------------------------------------------------------------------------------------------------------

N, H, DK, D = 2, 2, 8, 64
LR = 0.1


def update_of(split: str, name: str, louder: slice = slice(0)) -> torch.Tensor:
    """What one step of Muon adds to a projection of layer 0, as a multiple of -LR; the gradient of rows `louder` 100 times."""
    model = make(torch.float32, hidden_size=D, num_heads=H, head_dim=DK, num_householder=N)
    settings = config.Optimizer(name="Muon", muon_lr=LR, weight_decay=0.0, muon_split=split)  # type: ignore[arg-type]
    optimizers = build_optimizer(model, settings)
    optimizers.set_lr(1.0)
    weight = dict(model.named_parameters())[f"layers.0.{name}.weight"]
    before = weight.detach().clone()
    weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    weight.grad[louder] *= 100
    optimizers.step(torch.zeros(()))
    return (before - weight.detach()) / LR


@pytest.mark.parametrize(
    ("split", "name", "shape"),
    [
        ("heads", "attn.q_proj", (H, DK, D)),
        ("heads", "attn.k_proj", (N * H, DK, D)),
        ("steps", "attn.k_proj", (N, H * DK, D)),
        ("whole", "attn.k_proj", (1, N * H * DK, D)),
        ("heads", "attn.o_proj", (1, D, H * DK)),
    ],
)
def test_each_block_of_an_update_is_orthogonal_and_has_0_2_root_of_its_larger_side(
    split: str, name: str, shape: tuple[int, int, int]
) -> None:
    blocks = update_of(split, name).view(shape) / (0.2 * max(shape[1:]) ** 0.5)
    values = torch.linalg.svdvals(blocks)
    assert values.shape == (shape[0], min(shape[1:]))
    # Five of Jordan's quintic iterations take a singular value to within 0.68 and 1.13, in bfloat16 a little further.
    assert float(values.min()) > 0.6
    assert float(values.max()) < 1.2


@pytest.mark.parametrize(("split", "block"), [("heads", DK), ("steps", H * DK)])
def test_a_loud_block_leaves_the_others_as_they_are(split: str, block: int) -> None:
    loud, quiet = update_of(split, "attn.k_proj", slice(block)), update_of(split, "attn.k_proj")
    assert torch.equal(loud[block:], quiet[block:])
    together = update_of("whole", "attn.k_proj", slice(block)), update_of("whole", "attn.k_proj")
    assert not torch.allclose(together[0][block:], together[1][block:], rtol=0.1)


@pytest.mark.parametrize("shape", [(3, 4, 9), (3, 9, 4), (2, 5, 5)])
def test_a_batch_is_the_loop_of_the_published_iteration_over_its_matrices_in_float64(shape: tuple[int, int, int]) -> None:
    a, b, c = coefficients = (3.4445, -4.7750, 2.0315)
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for matrix, found in zip(matrices, orthogonalise(matrices, coefficients, 5, 1e-7), strict=True):
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        S = S / S.square().sum().sqrt()
        for _ in range(5):
            S = a * S + b * S**3 + c * S**5
        torch.testing.assert_close(found, U @ torch.diag(S) @ Vh)


def test_a_block_without_gradient_is_not_moved() -> None:
    assert not orthogonalise(torch.zeros(2, 3, 4), (3.4445, -4.7750, 2.0315), 5, 1e-7).any()


# -- what it costs -----------------------------------------------------------------------------------------------------


class Sent(TorchDispatchMode):
    """Bytes that a rank sends to others by all-to-all."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank, self.bytes = rank, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented
        if func._opname == "alltoall_base_":
            values, counts = args[1], args[4]
            self.bytes += (values.numel() - counts[self.rank]) * values.element_size()
        return func(*args, **(kwargs or {}))


def cost(shapes: list[tuple[int, int, int]], rank: int, ranks: int) -> tuple[int, int, int]:
    """FLOPs of a rank in a step on matrices of (rows, columns, rows of a block), bytes it sends, and bytes of its gradients."""
    with pretended(rank, ranks):
        mesh, groups, size = init_device_mesh("cpu", (ranks,)), [], 0

        def shard(rows: int, columns: int) -> torch.Tensor:
            most = -(-rows // ranks)
            local = torch.empty(max(0, min(most, rows - rank * most)), columns, device="meta")
            return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=(rows, columns), stride=(columns, 1))

        for rows, columns, block in shapes:
            parameter = torch.nn.Parameter(shard(rows, columns))
            parameter.grad = gradient = shard(rows, columns)
            size += gradient.to_local().numel() * gradient.element_size()  # type: ignore[attr-defined]
            groups.append({"params": [parameter], "block_rows": block})
        with Sent(rank) as sent, FlopCounterMode(display=False) as flops:
            Muon(groups).step()
    return flops.get_total_flops(), sent.bytes, size


def shapes_of(name: str, split: str) -> list[tuple[int, int, int]]:
    with torch.device("meta"):
        model = build_model(load_config(["--config", name]).config.model)
    shapes = {name: parameter.shape for name, parameter in model.named_weights()}
    return [(*shapes[name], rows) for name, rows in model.muon_rows(split).items()]  # type: ignore[arg-type, misc]


@pytest.mark.parametrize(("name", "split", "ranks"), [("213m_gated.toml", "heads", 8), ("debug.toml", "whole", 2)])
def test_ranks_divide_the_work_and_send_no_more_than_their_gradients(name: str, split: str, ranks: int) -> None:
    shapes = shapes_of(name, split)
    alone, sent, _ = cost(shapes, 0, 1)
    assert sent == 0
    costs = [cost(shapes, rank, ranks) for rank in range(ranks)]
    assert sum(flops for flops, _, _ in costs) == alone, "nothing is computed twice"
    assert max(flops for flops, _, _ in costs) <= 1.2 * alone / ranks
    assert all(0 < sent <= gradients for _, sent, gradients in costs)


def test_heads_that_a_rank_holds_whole_are_not_sent() -> None:
    assert [cost([(64, 16, 8), (32, 16, 8)], rank, 4)[1] for rank in range(4)] == [0] * 4
