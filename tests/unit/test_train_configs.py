"""The shipped configs: every one loads without a warning, and the paper's sizes and lengths are the paper's."""

from __future__ import annotations

from pathlib import Path

import pytest

from titan_dp.config.load import SHIPPED, Loaded, load_config
from titan_dp.data.synthetic.loader import problem_that_fits
from titan_dp.model.size import model_size
from titan_dp.train.batch_plan import plan_batches

# What one q convolution a layer gives, where the authors' files hold n_h of which n_h - 1 are never used: their totals
# (behind the sum) are larger by (n_h - 1) * heads * 128 channels * 4 taps * 24 layers.
PAPER = {
    "213m_nh1": 213_802_752,
    "213m": 214_168_800 - 1 * 6 * 128 * 4 * 24,
    "213m_nh3": 214_023_936 - 2 * 4 * 128 * 4 * 24,
    "392m_nh1": 392_171_520,
    "392m": 392_417_280 - 1 * 8 * 128 * 4 * 24,
    "392m_nh3": 392_540_160 - 2 * 6 * 128 * 4 * 24,
    "800m_nh1": 805_384_704,
    "800m": 806_410_236 - 1 * 12 * 128 * 4 * 24,
    "800m_nh3": 805_974_528 - 2 * 8 * 128 * 4 * 24,
}
STEPS = {"213m": 36_240, "392m": 66_758, "800m": 104_905}


def shipped() -> list[str]:
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))


def load(name: str) -> Loaded:
    return load_config(["--config", name])


def parameters(loaded: Loaded) -> int:
    return model_size(loaded.config.model, loaded.config.training.seq_len).parameters


def test_the_folder_holds_the_debug_config_and_each_size_with_its_partners_gated_and_ungated() -> None:
    assert set(shipped()) == {"debug", *PAPER, *(f"{name}_gated" for name in PAPER)}


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_config_loads_and_sets_nothing_in_vain(name: str) -> None:
    loaded = load(name)
    assert loaded.run_name == name
    assert loaded.warnings() == []


@pytest.mark.parametrize("name", PAPER)
def test_a_paper_config_has_the_papers_parameters_and_its_gate_adds_little(name: str) -> None:
    """The gate: one projection to heads and two numbers per head in each of 24 layers."""
    assert parameters(load(name)) == PAPER[name]
    model = load(f"{name}_gated").config.model
    assert parameters(load(f"{name}_gated")) == PAPER[name] + 24 * (model.num_heads * model.hidden_size + 2 * model.num_heads)


@pytest.mark.parametrize("size", STEPS)
def test_partners_of_a_size_match_in_parameters_and_in_nothing_else_differ_but_shape(size: str) -> None:
    partners = [load(name) for name in PAPER if name.startswith(size)]
    counts = [parameters(partner) for partner in partners]
    assert max(counts) / min(counts) < 1.002

    def without_shape(loaded: Loaded) -> dict[str, object]:
        sections = loaded.config.model_dump()
        del sections["job"]["run_name"]
        for key in ("hidden_size", "num_heads", "num_householder"):
            del sections["model"][key]
        return sections

    assert [p.config.model.num_householder for p in partners] == [1, 2, 3]
    assert all(without_shape(partner) == without_shape(partners[0]) for partner in partners)


@pytest.mark.parametrize("name", STEPS)  # its partners differ in nothing but shape
def test_a_paper_config_follows_the_papers_recipe(name: str) -> None:
    c = load(name).config
    batch = plan_batches(c.training, world_size=8)
    assert batch.tokens_per_step == 524_288
    assert batch.steps == STEPS[name]
    assert (c.training.seq_len, c.training.max_norm, c.data.document_boundaries) == (4096, 1.0, "carry")
    o, s = c.optimizer, c.lr_scheduler
    assert (o.name, o.lr, o.beta1, o.beta2, o.weight_decay) == ("AdamW", 3e-4, 0.9, 0.95, 0.01)
    assert (s.warmup_steps, s.decay_type, s.min_lr_factor, s.decay_ratio) == (512, "cosine", 0.1, None)
    assert (c.model.vocab_size, c.model.initializer_range, c.model.allow_neg_eigval) == (32000, 0.006, True)


def test_the_debug_batch_divides_over_the_ranks_of_a_laptop_and_of_a_node() -> None:
    assert {plan_batches(load("debug").config.training, ranks).global_batch_size for ranks in (1, 2, 4, 8)} == {32}


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("state_tracking/*.toml")), ids=lambda path: path.stem)
def test_a_state_tracking_config_fits_its_task_and_sets_nothing_in_vain(path: Path) -> None:
    loaded = load(str(path))
    c = loaded.config
    problem, length = problem_that_fits(c.state_tracking, c.training.seq_len, c.model.vocab_size)
    assert problem.name == c.state_tracking.task
    assert length == (40 if path.stem == "formal_languages" else 128)
    assert loaded.warnings() == []


def test_the_papers_word_problems_have_the_papers_number_of_words() -> None:
    for path in SHIPPED.glob("state_tracking/paper_*.toml"):
        training = load(str(path)).config.training
        assert plan_batches(training, 1).steps * training.local_batch_size == pytest.approx(100 * 2_000_000, rel=1e-3)
