"""Optimizers on sharded parameters: the guard leaves everything as it was, bit for bit; norms count every shard once."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.harness import run_ranks
from tests.distributed.helpers import backward, full_state, optimizer_of, optimizer_state, sharded_model
from titan_dp.optim import NonFiniteGuard, clip_grad_norm


def poisoned_step(name: str, poison: float, replicate: int) -> None:
    """A good step, a poisoned one that must change nothing, and a good one that must change something."""
    model = sharded_model(replicate)
    optimizers = optimizer_of(model, name=name)
    guard = NonFiniteGuard(torch.device("cpu"))

    def step(seed: int, factor: float = 1.0) -> None:
        backward(model, seed, factor)
        optimizers.step(guard.update(clip_grad_norm(model.parameters(), 1.0)))
        optimizers.zero_grad()

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


def first_step_poisoned(name: str) -> None:
    model = sharded_model()
    optimizers = optimizer_of(model, name=name)
    before = full_state(model)
    backward(model, 0, float("nan"))
    optimizers.step(NonFiniteGuard(torch.device("cpu")).update(clip_grad_norm(model.parameters(), 1.0)))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), full_state(model).values(), strict=True))


@pytest.mark.parametrize("name", ["AdamW", "Muon"])
def test_the_very_first_step_may_be_the_bad_one(name: str) -> None:
    run_ranks(2, first_step_poisoned, name)


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


def muon_updates() -> dict[str, torch.Tensor]:
    """What three steps of Muon add to the matrices of the blocks."""
    model = sharded_model()
    before = full_state(model)
    optimizers = optimizer_of(model, name="Muon", muon_lr=0.01)
    for seed in range(3):
        backward(model, seed)
        optimizers.step(torch.zeros(()))
        optimizers.zero_grad()
    return {name: p - before[name] for name, p in full_state(model).items() if name.endswith("proj.weight")}


def test_muon_orthogonalises_whole_matrices_not_shards() -> None:
    alone, sharded = run_ranks(1, muon_updates)[0], run_ranks(2, muon_updates)[0]
    for name, update in alone.items():
        # Newton-Schulz runs in bfloat16: 2 % of rounding; orthogonalised shard by shard it would be half of the update.
        assert float((sharded[name] - update).norm() / update.norm()) < 0.05, name
