"""Parameter groups by role, and the guard's counting."""

from __future__ import annotations

import pytest
import torch

from tests.unit.test_model import make
from titan_dp import config
from titan_dp.train.optim import NonFiniteError, NonFiniteGuard, build_optimizer, clip_grad_norm


def groups(**settings: object) -> dict[str, tuple[str, float, set[str]]]:
    """Role -> (optimizer, weight decay, names of its parameters) of a small untied gated model."""
    model = make(torch.float32, use_forget_gate=True, tie_word_embeddings=False)
    names = {id(p): name for name, p in model.named_parameters()}
    optimizers = build_optimizer(model, config.Optimizer(weight_decay=0.1, **settings))  # type: ignore[arg-type]
    found = {
        g["role"]: (type(o).__name__, g["weight_decay"], {names[id(p)] for p in g["params"]})
        for o in optimizers
        for g in o.param_groups
    }
    assert sorted(n for _, _, members in found.values() for n in members) == sorted(names.values()), "each in one group"
    return found


def test_only_matrices_decay() -> None:
    found = groups()
    assert {role: decay for role, (_, decay, _) in found.items()} == {
        "matrices": 0.1, "embeddings": 0.0, "convolutions": 0.0, "norms and gates": 0.0,
    }  # fmt: skip
    assert found["embeddings"][2] == {"embeddings.weight", "lm_head.weight"}
    assert {"layers.0.attn.forget_gate.A_log", "layers.1.attn.forget_gate.dt_bias", "norm.weight"} < found["norms and gates"][2]


def test_embeddings_decay_by_choice() -> None:
    assert groups(decay_embeddings=True)["embeddings"][1] == 0.1


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest() -> None:
    found = groups(name="Muon")
    assert {role: optimizer for role, (optimizer, _, _) in found.items()} == {
        "matrices": "Muon", "embeddings": "AdamW", "convolutions": "AdamW", "norms and gates": "AdamW",
    }  # fmt: skip
    assert all(".proj" in n or "_proj" in n for n in found["matrices"][2])


def test_the_schedules_factor_multiplies_each_groups_own_peak() -> None:
    optimizers = build_optimizer(make(torch.float32), config.Optimizer(name="Muon", lr=1e-3, muon_lr=2e-2))
    optimizers.set_lr(0.5)
    assert {(type(o).__name__, g["lr"]) for o in optimizers for g in o.param_groups} == {("Muon", 1e-2), ("AdamW", 5e-4)}


def test_clipping_leaves_small_gradients_as_they_are() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([0.3, 0.4])
    assert float(clip_grad_norm([parameter], 1.0)) == pytest.approx(0.5)
    assert parameter.grad.tolist() == pytest.approx([0.3, 0.4])


GOOD, BAD = torch.tensor(1.0), torch.tensor(float("nan"))


def after(*norms: torch.Tensor) -> NonFiniteGuard:
    guard = NonFiniteGuard(torch.device("cpu"))
    for norm in norms:
        guard.update(norm)
    return guard


def test_the_guard_stops_after_the_limit_in_a_row() -> None:
    with pytest.raises(NonFiniteError, match=r"for 3 steps in a row \(training.max_nonfinite_steps = 3; 3 skipped in all\)"):
        after(GOOD, BAD, BAD, BAD).check(3)


def test_a_run_of_bad_steps_that_recovered_before_the_check_counts_as_well() -> None:
    with pytest.raises(NonFiniteError):
        after(BAD, BAD, BAD, GOOD).check(3)


def test_good_steps_in_between_start_the_count_anew() -> None:
    guard = after(BAD, BAD, GOOD, BAD, BAD)
    guard.check(3)
    assert guard.total == 4
    assert not guard.healthy()
    guard.update(GOOD)
    guard.check(3)
    assert guard.healthy()


def test_a_run_of_bad_steps_across_checks_is_one_run() -> None:
    guard = after(BAD, BAD)
    guard.check(3)
    guard.update(BAD)
    with pytest.raises(NonFiniteError, match="3 steps in a row"):
        guard.check(3)
