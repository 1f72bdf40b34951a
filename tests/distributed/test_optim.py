"""Optimizers on sharded parameters: the guard leaves everything as it was, bit for bit; norms count every shard once."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed.harness import run_ranks
from tests.distributed.helpers import backward, full_state, optimizer_of, optimizer_state, sharded_model
from titan_dp import config
from titan_dp.config.load import load_config
from titan_dp.distributed import build_mesh, current_world
from titan_dp.train import muon
from titan_dp.train.muon import Muon
from titan_dp.train.optim import NonFiniteGuard, clip_grad_norm
from titan_dp.train.trainer import Trainer


def poisoned_step(name: str, poison: float, replicate: int) -> None:
    """A poisoned step and, after a good one, another: they must change nothing; a good one at the end must."""
    model = sharded_model(replicate)
    optimizers = optimizer_of(model, name=name)
    guard = NonFiniteGuard(torch.device("cpu"))

    def step(seed: int, factor: float = 1.0) -> None:
        backward(model, seed, factor)
        optimizers.step(guard.update(clip_grad_norm(model.parameters(), 1.0)))
        optimizers.zero_grad()

    first = full_state(model)
    step(0, poison)
    assert all(torch.equal(a, b) for a, b in zip(first.values(), full_state(model).values(), strict=True))
    step(0)
    parameters, moments = full_state(model), optimizer_state(optimizers)
    step(1, poison)
    assert all(torch.equal(a, b) for a, b in zip(parameters.values(), full_state(model).values(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(moments, optimizer_state(optimizers), strict=True))
    assert not guard.healthy()
    step(2)
    assert guard.healthy()
    changed = full_state(model)
    assert all(bool(p.isfinite().all()) and not torch.equal(p, parameters[name]) for name, p in changed.items())


@pytest.mark.parametrize("name", ["AdamW", "Muon"])
def test_a_step_with_a_non_finite_gradient_on_one_rank_changes_nothing_on_any(name: str) -> None:
    run_ranks(1, poisoned_step, name, float("nan"), 1)
    run_ranks(2, poisoned_step, name, float("inf"), 1)
    run_ranks(4, poisoned_step, name, float("nan"), 2)


def clipped(replicate: int, max_norm: float) -> tuple[float, dict[str, torch.Tensor]]:
    model = sharded_model(replicate)
    backward(model, 0)
    norm = clip_grad_norm(model.parameters(), max_norm)
    return float(norm), {name: p.grad.full_tensor() for name, p in model.named_parameters()}


def test_the_gradient_norm_counts_every_shard_once_and_clipping_reaches_the_limit() -> None:
    norm, gradients = run_ranks(1, clipped, 1, 1e9)[0]
    assert norm == pytest.approx(float(torch.cat([g.flatten() for g in gradients.values()]).norm()), rel=1e-5)
    for world_size, replicate in ((2, 1), (4, 2)):
        sharded_norm, small = run_ranks(world_size, clipped, replicate, norm / 10)[0]
        assert sharded_norm == pytest.approx(norm, rel=1e-5)
        assert float(torch.cat([g.flatten() for g in small.values()]).norm()) == pytest.approx(norm / 10, rel=1e-4)


Tensors = list[torch.Tensor]
# Rows, columns, and rows of a block. On four ranks: equal shards, a smaller one, and one to three empty ones; blocks that a
# rank holds whole, that straddle shards, and of equal size in parameters of different sizes.
SHAPES = [(8, 6, 8), (7, 16, 7), (5, 3, 5), (2, 12, 2), (1, 4, 1), (24, 6, 3), (12, 6, 3), (9, 6, 3), (6, 6, 2), (8, 6, 8)]


def blocks_of(tensor: torch.Tensor, rows: int) -> list[torch.Tensor]:
    return [block.clone() for block in tensor.split(rows)]


def muon_of(
    cut: Callable[[torch.Tensor, int], list[torch.Tensor]],
    optimizer_of_blocks: Callable[[list[list[torch.nn.Parameter]]], torch.optim.Muon],
    poison: bool = False,
) -> list[torch.Tensor]:
    """Three steps on matrices and gradients that all ranks know: weights and momentum, whole.

    Args:
        cut: from a matrix and the rows of its blocks to the parameters that hold it, one or several.
    """
    generator = torch.Generator().manual_seed(0)

    def draw() -> list[list[torch.Tensor]]:
        return [cut(torch.randn(*shape, generator=generator), rows) for *shape, rows in SHAPES]

    def set_gradients(gradients: list[list[torch.Tensor]]) -> None:
        for own, theirs in zip(parameters, gradients, strict=True):
            for parameter, gradient in zip(own, theirs, strict=True):
                parameter.grad = gradient

    parameters = [[torch.nn.Parameter(part) for part in parts] for parts in draw()]
    optimizer = optimizer_of_blocks(parameters)
    for step in range(3):
        set_gradients(draw())
        optimizer.step()
        if poison:
            value = float("nan") if step else float("inf")
            set_gradients([cut(torch.full(shape, value), rows) for *shape, rows in SHAPES])
            optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
            optimizer.step()
            optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
    weights = [torch.cat([whole(p.detach()) for p in own]) for own in parameters]
    return weights + [torch.cat([whole(optimizer.state[p]["momentum_buffer"]) for p in own]) for own in parameters]


OPTIONS: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}


def torchs_muon_of_every_block() -> Tensors:
    return muon_of(blocks_of, lambda parameters: torch.optim.Muon(itertools.chain(*parameters), **OPTIONS))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_muon(replicate: int, at_once: int) -> Tensors:
    mesh = build_mesh(config.Parallelism(data_parallel_replicate_degree=replicate), current_world())
    placements = [*[Replicate()] * (mesh.ndim - 1), Shard(0)]
    muon._AT_ONCE = at_once

    def optimizer(parameters: list[list[torch.nn.Parameter]]) -> Muon:
        groups = [{"params": own, "block_rows": rows} for own, (*_, rows) in zip(parameters, SHAPES, strict=True)]
        return Muon(groups, **OPTIONS)

    return muon_of(lambda full, rows: [distribute_tensor(full, mesh, placements)], optimizer, poison=True)


@pytest.mark.parametrize(
    ("ranks", "replicate", "at_once"), [(1, 1, 2**24), (2, 1, 2**24), (4, 1, 2**24), (4, 1, 1), (4, 2, 2**24), (8, 1, 2**24)]
)
def test_muon_on_any_shards_is_torchs_on_every_block_bit_for_bit_whatever_is_skipped(
    ranks: int, replicate: int, at_once: int
) -> None:
    expected = torchs_muon_of_every_block()
    for result in run_ranks(ranks, sharded_muon, replicate, at_once):
        assert all(torch.equal(own, theirs) for own, theirs in zip(result, expected, strict=True))


class HostReads(TorchDispatchMode):
    """Counts reads of a tensor's value by the host, each of which waits for the device where that is a GPU."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def reads_of_two_steps(config_file: Path, name: str) -> int:
    trainer = Trainer(load_config(["--config", str(config_file), f"--optimizer.name={name}"]), current_world())
    steps = list(itertools.islice(trainer.loader, 2))
    with HostReads() as reads:
        for micro_batches in steps:
            trainer._train_step(micro_batches)
    assert trainer.lock is not None
    trainer.lock.close()
    return reads.count


@pytest.mark.parametrize("name", get_args(get_type_hints(config.Optimizer)["name"]))
def test_no_optimizers_step_waits_for_the_device(name: str, tiny_config: Path) -> None:
    assert run_ranks(1, reads_of_two_steps, tiny_config, name) == [0]
