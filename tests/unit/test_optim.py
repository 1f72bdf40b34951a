"""Parameter groups by role and what Muon splits, the learning rate's schedule, and the guard's counting."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

from tests.unit.test_model import make
from titan_dp import config
from titan_dp.errors import UserError
from titan_dp.train.lr_scheduler import build_lr_scheduler
from titan_dp.train.optim import NonFiniteError, NonFiniteGuard, build_optimizer, clip_grad_norm

# -- groups ------------------------------------------------------------------------------------------------------------

ROLES = ("matrices", "embeddings", "convolutions", "norms and gates")


def groups(**settings: object) -> dict[str, tuple[str, float, set[str]]]:
    """Role -> (optimizer, weight decay, names of its parameters) of a small untied gated model; AdamW's matrices are gates'."""
    gates = {"use_forget_gate": True, "adaptive_householder": True, "use_output_gate": True}
    model = make(torch.float32, tie_word_embeddings=False, **gates)
    names = {id(p): name for name, p in model.named_parameters()}
    optimizers = build_optimizer(model, config.Optimizer(weight_decay=0.1, **settings))  # type: ignore[arg-type]
    found: dict[str, tuple[str, float, set[str]]] = {}
    members = []
    for o in optimizers:
        for g in o.param_groups:
            own = [names[id(p)] for p in g["params"]]
            members += own
            role = "gates' matrices" if (type(o), g["role"]) == (torch.optim.AdamW, "matrices") else g["role"]
            before = found.get(role, (type(o).__name__, g["weight_decay"], set()))
            found[role] = (*before[:2], before[2] | set(own))
    assert sorted(members) == sorted(names.values()), "each in one group"
    return found


def test_only_matrices_decay_and_embeddings_by_choice() -> None:
    found = groups(name="Muon")
    assert [found[role][1] for role in ROLES] == [0.1, 0.0, 0.0, 0.0]
    assert found["gates' matrices"][1] == 0.1
    assert found["embeddings"][2] == {"embeddings.weight", "lm_head.weight"}
    assert {"layers.0.attn.forget_gate.A_log", "layers.1.attn.forget_gate.dt_bias", "norm.weight"} < found["norms and gates"][2]
    assert groups(decay_embeddings=True)["embeddings"][1] == 0.1


def test_the_head_of_a_run_counts_each_role_in_the_right_number() -> None:
    optimizers = build_optimizer(make(torch.float32, num_hidden_layers=1), config.Optimizer(weight_decay=0.1))
    shown = optimizers.describe()
    assert ", 1 embedding (" in shown
    assert re.match(r"AdamW lr \S+: \d+ matrices \([\d,]+, decay 0.1\)", shown)


def test_adamw_takes_everything_without_muon() -> None:
    assert {name for name, _, _ in groups().values()} == {"AdamW"}


def test_muon_takes_q_k_v_o_and_the_mlp_and_adamw_beta_decay_gate_and_router() -> None:
    found = groups(name="Muon")
    assert [found[role][0] for role in ROLES] == ["Muon", "AdamW", "AdamW", "AdamW"]
    assert kinds(found["matrices"][2]) == {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    assert kinds(found["gates' matrices"][2]) == {f"{name}_proj" for name in "bagr"}


def kinds(names: set[str]) -> set[str]:
    return {name.split(".")[-2] for name in names}


def rows_of(split: str, **model: object) -> dict[str, int]:
    """Rows of the matrices of layer 0 that Muon orthogonalises."""
    found = make(torch.float32, hidden_size=24, intermediate_size=40, **model).muon_rows(split)  # type: ignore[arg-type]
    return {name.split(".")[-2]: rows for name, rows in found.items() if name.startswith("layers.0.")}


SPLIT_3_STEPS = {  # of 2 heads with keys of 8 and values of 16
    "heads": {"q_proj": 8, "k_proj": 8, "v_proj": 16},
    "steps": {"q_proj": 16, "k_proj": 16, "v_proj": 32},
    "whole": {"q_proj": 16, "k_proj": 48, "v_proj": 96},
}


@pytest.mark.parametrize("split", SPLIT_3_STEPS)
def test_q_k_and_v_are_split_into_heads_and_steps_and_o_and_the_mlp_are_not(split: str) -> None:
    whole = {"o_proj": 24, "gate_proj": 40, "up_proj": 40, "down_proj": 24}
    assert rows_of(split, num_heads=2, head_dim=8, expand_v=2.0, num_householder=3) == SPLIT_3_STEPS[split] | whole


def test_softmax_attention_is_split_into_its_own_heads() -> None:
    rows = rows_of("heads", mixer="attention", num_householder=1, attention_num_heads=4, attention_num_kv_heads=2)
    assert (rows["q_proj"], rows["k_proj"], rows["v_proj"]) == (6, 6, 6)


def test_the_schedules_factor_multiplies_each_groups_own_peak() -> None:
    optimizers = build_optimizer(make(torch.float32), config.Optimizer(name="Muon", lr=1e-3, muon_lr=2e-2))
    optimizers.set_lr(0.5)
    assert {(type(o).__name__, g["lr"]) for o in optimizers for g in o.param_groups} == {("Muon", 1e-2), ("AdamW", 5e-4)}


def test_clipping_leaves_small_gradients_as_they_are() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([0.3, 0.4])
    assert float(clip_grad_norm([parameter], 1.0)) == pytest.approx(0.5)
    assert parameter.grad.tolist() == pytest.approx([0.3, 0.4])


# -- the learning rate -------------------------------------------------------------------------------------------------


def factors(steps: int = 100, **settings: object) -> list[float]:
    factor = build_lr_scheduler(config.LRScheduler(**settings), steps)  # type: ignore[arg-type]
    return [factor(step) for step in range(steps)]


@pytest.mark.parametrize(("shape", "middle"), [("cosine", 0.55), ("linear", 0.55), ("sqrt", 0.1 + 0.9 * (1 - 0.5**0.5))])
def test_each_shape_passes_its_middle_and_ends_at_the_floor(shape: str, middle: float) -> None:
    values = factors(warmup_steps=0, decay_type=shape, min_lr_factor=0.1)
    assert (values[49], values[-1]) == pytest.approx((middle, 0.1))
    assert all(a > b for a, b in itertools.pairwise(values))


def test_warmup_rises_from_above_zero_to_the_peak_which_decay_ratio_holds_until_the_last_part() -> None:
    assert factors(warmup_steps=4)[:4] == [0.25, 0.5, 0.75, 1.0]
    values = factors(warmup_steps=10, decay_ratio=0.2, decay_type="linear", min_lr_factor=0.0)
    assert values[9:80] == [1.0] * 71
    assert (values[80], values[-1]) == (pytest.approx(0.95), 0)


@pytest.mark.parametrize("settings", [{"warmup_steps": 0}, {"warmup_steps": 100}, {"warmup_steps": 500}, {"decay_ratio": 1.0}])
def test_extremes_stay_within_zero_and_the_peak(settings: dict) -> None:
    assert all(0 < value <= 1 for value in factors(**settings))


def test_a_schedule_may_be_longer_or_shorter_than_the_run_and_begin_anew_at_a_later_step() -> None:
    assert factors(50, warmup_steps=0, total_steps=100) == factors(100, warmup_steps=0)[:50]
    assert factors(100, warmup_steps=0, total_steps=50)[49:] == pytest.approx([0.1] * 51)
    assert factors(100, start_step=60, warmup_steps=5)[60:] == factors(40, warmup_steps=5)
    with pytest.raises(UserError, match=r"lr_scheduler.start_step = 12 is not before the end of the schedule, step 12"):
        factors(12, start_step=12)


# -- the guard ---------------------------------------------------------------------------------------------------------

GOOD, BAD = torch.tensor(1.0), torch.tensor(float("nan"))


def after(*norms: torch.Tensor) -> NonFiniteGuard:
    guard = NonFiniteGuard(torch.device("cpu"))
    for norm in norms:
        guard.update(norm)
    return guard


def test_the_guard_stops_after_the_limit_in_a_row_even_if_the_run_recovered_before_the_check() -> None:
    with pytest.raises(NonFiniteError, match=r"for 3 steps in a row \(training.max_nonfinite_steps = 3; 3 skipped in all\)"):
        after(GOOD, BAD, BAD, BAD).check(3)
    with pytest.raises(NonFiniteError):
        after(BAD, BAD, BAD, GOOD).check(3)


def test_good_steps_in_between_start_the_count_anew_and_checks_do_not() -> None:
    guard = after(BAD, BAD, GOOD, BAD, BAD)
    guard.check(3)
    assert guard.total == 4
    assert not guard.healthy()
    guard.update(GOOD)
    assert guard.healthy()
    guard = after(BAD, BAD)
    guard.check(3)
    guard.update(BAD)
    with pytest.raises(NonFiniteError, match="3 steps in a row"):
        guard.check(3)
