"""The shipped configs: every one loads without a warning, sizes match, and the paper's are the paper's."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch

from titan_dp.cli import dispatch
from titan_dp.config.load import SHIPPED, Loaded, load_config
from titan_dp.data.synthetic.loader import problem_that_fits
from titan_dp.inference.megatron import to_megatron
from titan_dp.model.deltaproduct import DeltaProduct
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
TARGETS = {"213m": 213_000_000, "392m": 392_200_000, "800m": 805_000_000}
STEPS = {"213m": 36_240, "392m": 66_758, "800m": 104_905}


def shipped() -> list[str]:
    return sorted(path.stem for path in SHIPPED.glob("*.toml")) + sorted(
        f"paper/{path.stem}" for path in SHIPPED.glob("paper/*.toml")
    )


def load(name: str) -> Loaded:
    return load_config(["--config", name])


def parameters(loaded: Loaded) -> int:
    return model_size(loaded.config.model, loaded.config.training.seq_len).parameters


def test_the_folder_holds_the_debug_config_and_each_size_with_its_partners_gated_and_ungated() -> None:
    partners = {*PAPER, *(f"{name}_gated" for name in PAPER), *(f"paper/{name}" for name in PAPER)}
    assert set(shipped()) == {"debug", "gdp-1b", *partners}


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_config_loads_and_sets_nothing_in_vain(name: str) -> None:
    loaded = load(name)
    assert loaded.run_name == Path(name).name
    assert loaded.warnings() == []


@pytest.mark.parametrize("name", PAPER)
def test_a_paper_config_has_the_papers_parameters(name: str) -> None:
    assert parameters(load(f"paper/{name}")) == PAPER[name]


@pytest.mark.parametrize("size", TARGETS)
def test_partners_of_a_size_match_in_parameters_and_differ_in_heads_n_h_and_gate_alone(size: str) -> None:
    partners = [load(size + partner + gate) for partner in ("_nh1", "", "_nh3") for gate in ("", "_gated")]
    assert all(abs(parameters(partner) / TARGETS[size] - 1) < 0.0025 for partner in partners)
    changed = [(p.config.model.num_householder, p.config.model.use_forget_gate) for p in partners]
    assert changed == [(1, False), (1, True), (2, False), (2, True), (3, False), (3, True)]

    def the_rest(loaded: Loaded) -> dict[str, object]:
        sections = loaded.config.model_dump()
        del sections["job"]["run_name"]
        for key in ("num_heads", "num_householder", "use_forget_gate"):
            del sections["model"][key]
        return sections

    assert all(the_rest(partner) == the_rest(partners[0]) for partner in partners)


@pytest.mark.parametrize("size", TARGETS)
def test_the_shapes_are_those_that_match_finds(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["match", "--params", str(TARGETS[size]), "--gated", "both", "--config", size]) == 0
    found = [
        line.split("--config ... ")[-1] for line in capsys.readouterr().out.splitlines() if line.startswith("    --model.")
    ]
    settings = [dict(zip(words[::2], words[1::2], strict=True)) for words in map(shlex.split, found)]
    heads = [int(each["--model.num_heads"]) for each in settings]
    assert heads == [
        load(size + partner).config.model.num_heads for partner in ("_nh1", "_nh1_gated", "", "_gated", "_nh3", "_nh3_gated")
    ]
    model = load(size).config.model
    shape = {(int(each["--model.hidden_size"]), int(each["--model.intermediate_size"])) for each in settings}
    assert shape == {(model.hidden_size, model.intermediate_size)}


@pytest.mark.parametrize("name", [name for name in shipped() if name.startswith((*STEPS, "gdp-"))])
def test_every_matrix_of_a_config_for_gpus_has_dimensions_that_are_multiples_of_64(name: str) -> None:
    m = load(name).config.model
    columns = (m.key_heads * m.head_dim, m.num_heads * m.head_v_dim)
    assert [d % 64 for d in (m.hidden_size, m.mlp_size, *columns, m.vocab_size)] == [0, 0, 0, 0, 0]


def test_the_shape_of_nvidias_mixer_is_about_a_billion_parameters_and_megatron_can_have_its_weights() -> None:
    loaded = load("gdp-1b")
    m = loaded.config.model
    assert parameters(loaded) == 1_036_446_720
    assert (m.num_householder, m.head_dim, m.head_v_dim, m.heads) == (3, 128, 64, "32/8 x 128")
    with torch.device("meta"):
        theirs = to_megatron(m, dict(DeltaProduct(m).named_parameters()))
    assert theirs["in_proj.weight"].shape == (2048 * 4 + 1024 * 4 + 32 * 4, 1536)
    assert theirs["conv1d.weight"].shape == (2048 * 3 + 1024 * 4, 1, 4)


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
    assert {plan_batches(load("debug").config.training, ranks).global_batch_size for ranks in (1, 2, 4, 8)} == {8}


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("state_tracking/*.toml")), ids=lambda path: path.stem)
def test_a_state_tracking_config_fits_its_task_and_sets_nothing_in_vain(path: Path) -> None:
    loaded = load(str(path))
    c = loaded.config
    problem, length = problem_that_fits(c.state_tracking, c.training.seq_len, c.model.vocab_size)
    assert problem.name == c.state_tracking.task
    assert length == {"formal_languages": 40, "small": 32}.get(path.stem, 128)
    assert loaded.warnings() == []


def test_the_papers_word_problems_have_the_papers_number_of_words() -> None:
    for path in SHIPPED.glob("state_tracking/paper_*.toml"):
        training = load(str(path)).config.training
        assert plan_batches(training, 1).steps * training.local_batch_size == pytest.approx(100 * 2_000_000, rel=1e-3)
