"""mup: factors against closed forms, what they leave as it is, and activations that keep their size."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests.unit.conftest import Folder
from titan_dp.cli import dispatch
from titan_dp.config import ActivationCheckpoint, Config
from titan_dp.config.load import load_config
from titan_dp.errors import UserError
from titan_dp.model.parallelize import apply_activation_checkpoint
from titan_dp.model.parametrization import Scale, scales
from titan_dp.model.transformer import build_model
from titan_dp.studies import coordinate_check
from titan_dp.train.optim import build_optimizer

BASE = {"hidden_size": 128, "head_dim": 32, "num_heads": 4, "num_hidden_layers": 3, "num_householder": 2}
MUP = ["--optimizer.parametrization=mup", *(f"--optimizer.mup_base.{name}={value}" for name, value in BASE.items())]


def config_of(**model: object) -> Config:
    """debug.toml, whose shape is BASE, with other sizes."""
    return load_config(["--config", "debug.toml", *MUP, *(f"--model.{name}={value}" for name, value in model.items())]).config


def test_at_the_base_shape_nothing_is_scaled() -> None:
    assert set(scales(config_of()).values()) == {Scale()}


def test_without_mup_nothing_is_scaled() -> None:
    assert scales(load_config(["--config", "debug.toml"]).config) == {}


WIDER = {"hidden_size": 512, "num_heads": 16, "intermediate_size": 1536}
"""Four times the width, the heads and the MLP."""
RULES = {
    "embeddings.weight": Scale(1, 1, 1 / 4),
    "norm.weight": Scale(1 / 4, 1 / 4, 1),
    "layers.0.attn_norm.weight": Scale(1, 1, 1 / 4),
    "layers.0.attn.forget_gate.A_log": Scale(1, 1, 1 / 4),
    # Muon's updates have 0.2 sqrt(max(rows, columns)) in any case, which is 2 here. Square matrices keep their norm, and those
    # of a head, whose rows are as many as before, halve it. beta is AdamW's.
    "layers.0.attn.q_proj.weight": Scale(1 / 2, 1 / 4, 1 / 4, 1 / 4),
    "layers.2.attn.v_proj.weight": Scale(1 / 2, 1 / 4, 1 / 4, 1 / 4),
    "layers.0.attn.b_proj.weight": Scale(1 / 2, 1 / 4, 1 / 4, 1),
    "layers.0.attn.o_proj.weight": Scale(1 / 2, 1 / 4, 1 / 4, 1 / 2),
    "layers.0.mlp.down_proj.weight": Scale(1 / 2, 1 / 4, 1 / 4, 1 / 2),
}


@pytest.mark.parametrize("name", RULES)
def test_width(name: str) -> None:
    assert scales(config_of(**WIDER))[name] == pytest.approx(RULES[name])


def with_split(c: Config, split: str) -> Config:
    return c.model_copy(update={"optimizer": c.optimizer.model_copy(update={"muon_split": split})})


@pytest.mark.parametrize(
    ("split", "wider", "more_steps"),
    # 4 times the heads and the width; 4 times the steps. A step of the base is 128 x 128, its keys are 256 x 128.
    [("heads", 1 / 4, 1), ("steps", 1 / 2, 1), ("whole", 1 / 2, 1)],
)
def test_muons_factor_is_by_the_shape_of_what_it_orthogonalises(split: str, wider: float, more_steps: float) -> None:
    factors = [
        scales(with_split(config_of(**model), split))["layers.0.attn.k_proj.weight"].muon
        for model in (WIDER, {"num_householder": 8})
    ]
    assert factors == pytest.approx([wider, more_steps])


def test_depth_scales_what_blocks_add_and_the_epsilons_within() -> None:
    deeper = scales(config_of(num_hidden_layers=12))
    for last in ("attn.o_proj", "mlp.down_proj"):
        assert deeper[f"layers.11.{last}.weight"] == pytest.approx(Scale(1 / 4, 1 / 4, 1, 1 / 4))
    assert deeper["layers.11.attn.q_proj.weight"] == pytest.approx(Scale(eps=1 / 4))
    assert deeper["norm.weight"] == deeper["embeddings.weight"] == Scale()


def test_more_steps_write_smaller_values_and_share_gradients() -> None:
    more = scales(config_of(num_householder=8))
    v = more["layers.0.attn.v_proj.weight"]
    assert (v.init, v.lr, v.eps) == pytest.approx((1 / 2, 1 / 2, 1 / 2))
    for name in ("k_proj", "b_proj", "k_conv1d", "v_conv1d"):
        scale = more[f"layers.0.attn.{name}.weight"]
        assert (scale.init, scale.lr, scale.eps) == pytest.approx((1, 1, 1 / 4)), name
    for name in ("q_proj", "o_proj", "q_conv1d"):
        assert more[f"layers.0.attn.{name}.weight"] == pytest.approx(Scale()), name


def test_scores_of_softmax_attention_shrink_with_its_head_dimension() -> None:
    wide_heads = config_of(**WIDER, mixer="attention", attention_num_heads=4)
    q = scales(wide_heads)["layers.0.attn.q_proj.weight"]
    assert (q.init, q.lr) == pytest.approx((1 / 2 / 2, 1 / 4 / 2))


@pytest.mark.parametrize("optimizer", ["AdamW", "Muon"])
def test_a_weight_loses_the_same_part_of_itself_per_step_at_every_size(optimizer: str) -> None:
    c = config_of(**WIDER, num_hidden_layers=6)
    settings = c.optimizer.model_copy(update={"name": optimizer, "weight_decay": 0.1, "muon_lr": 0.02})
    optimizers = build_optimizer(build_model(c.model), settings, scales(c))
    lost = {
        (type(o).__name__, g["role"]): g["peak_lr"] * g["weight_decay"]
        for o in optimizers
        for g in o.param_groups
        if g["weight_decay"]
    }
    rates = {"AdamW": settings.lr} | ({"Muon": 0.02} if optimizer == "Muon" else {})
    assert lost == pytest.approx({(name, "matrices"): 0.1 * rate for name, rate in rates.items()})


def test_first_values_have_the_scaled_size() -> None:
    c = config_of(**WIDER)
    model = build_model(c.model)
    model.init_weights(0, {name: scale.init for name, scale in scales(c).items()})
    std = c.model.initializer_range
    assert float(model.blocks[0].mlp.gate_proj.weight.std()) == pytest.approx(std / 2, rel=0.01)
    assert float(model.embeddings.weight.std()) == pytest.approx(std, rel=0.01)
    assert model.norm.weight.tolist() == [1 / 4] * 512


def test_activation_checkpointing_changes_no_factor() -> None:
    c = config_of(**WIDER)
    plain, wrapped = build_model(c.model), build_model(c.model)
    apply_activation_checkpoint(wrapped, ActivationCheckpoint(mode="full"))
    for model in (plain, wrapped):
        model.init_weights(0, {name: scale.init for name, scale in scales(c).items()})
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), wrapped.parameters(), strict=True))
    plain_groups, groups = (
        [
            ({key: value for key, value in g.items() if key != "params"}, len(g["params"]))
            for o in build_optimizer(model, c.optimizer.model_copy(update={"name": "Muon"}), scales(c))
            for g in o.param_groups
        ]
        for model in (plain, wrapped)
    )
    assert groups == plain_groups


# -- the coordinate check ------------------------------------------------------------------------------------------------


def grown(kind: str, axis: str, values: list[int]) -> dict[str, float]:
    """Growth of each change after two steps of AdamW; of logits not, whose first values shrink with the width."""
    words = ["--config", "debug.toml", *MUP, "--model.num_hidden_layers=2", "--optimizer.mup_base.num_hidden_layers=2"]
    c = load_config(words).config
    c = c.model_copy(update={"optimizer": c.optimizer.model_copy(update={"parametrization": kind})})
    rows = [coordinate_check.measure(coordinate_check.at(c, axis, value), steps=2, tokens=128, seed=0) for value in values]
    return {
        name: coordinate_check.growth(values, [row[name] for row in rows])
        for name in rows[0]
        if name.startswith("change") and "logits" not in name
    }


@pytest.mark.parametrize(("axis", "values"), [("width", [64, 256]), ("depth", [2, 8]), ("n_h", [1, 4])])
def test_changes_keep_their_size_under_mup(axis: str, values: list[int]) -> None:
    growths = grown("mup", axis, values)
    assert all(abs(p) < 0.45 for p in growths.values()), growths


@pytest.mark.parametrize(("axis", "values"), [("width", [64, 256]), ("depth", [2, 8])])
def test_and_grow_without_it(axis: str, values: list[int]) -> None:
    assert grown("standard", axis, values)["change of mixer"] > 0.45


def test_growth_is_the_exponent() -> None:
    assert coordinate_check.growth([1, 2, 8], [3, 3 * math.sqrt(2), 3 * math.sqrt(8)]) == pytest.approx(0.5)
    assert coordinate_check.growth([1, 2], [0, 0]) == 0


def test_the_command_prints_a_table_per_axis_and_writes_what_it_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--widths", "32,64", "--depths", "1,2", "--num-householder", "1,2", "--steps", "1", "--tokens", "64"]
    files = ["--out", str(tmp_path), "--format", "svg"]
    assert dispatch(["coordinate-check", *small, *files]) == 0
    shown = capsys.readouterr().out
    assert all(f"{axis}, under mup" in shown for axis in ("width", "depth", "n_h"))
    assert len((tmp_path / "coordinates.csv").read_text().splitlines()) == 1 + 2 * 6 * 10
    assert "<svg" in (tmp_path / "coordinates.svg").read_text()[:1000]


# -- mistakes ------------------------------------------------------------------------------------------------------------


def test_a_base_without_a_size_is_refused_by_its_key(folder: Folder) -> None:
    text = 'extends = "debug.toml"\n[optimizer]\nparametrization = "mup"\nmup_base.head_dim = 32\n'
    (problem,) = folder.problems(text)
    assert "mup_base.hidden_size, mup_base.num_heads, mup_base.num_hidden_layers, mup_base.num_householder" in problem


def test_a_mixer_without_rules_is_refused() -> None:
    with pytest.raises(UserError, match="'rwkv7', which has no rules; set it to 'standard'"):
        config_of(mixer="rwkv7", use_forget_gate="false")
    with pytest.raises(UserError, match="attention_block = 'olmo', whose norms undo .*; set it to 'standard'"):
        config_of(attention_layers="[1]", attention_block="olmo")


def test_a_base_that_nothing_reads_is_warned_of(folder: Folder) -> None:
    loaded = folder.load('extends = "debug.toml"\noptimizer.mup_base.head_dim = 32\n')
    assert [warning.split(" ")[0] for warning in loaded.warnings()] == ["optimizer.mup_base.head_dim"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--widths", "128,100"], "--widths 100: 4 heads at width 128 leave 3.125"),
        (["--depths", "4"], "at least two different sizes"),
        (["--num-householder", "1,9"], "n_h 9"),
        (["--optimizer.lr", "1e9", "--widths", "32,64"], "optimizer.lr = 1000000000.0 is too high"),
    ],
)
def test_a_mistake_is_one_sentence(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--widths", "32,64", "--depths", "1,2", "--num-householder", "1,2", "--tokens", "64"]
    try:
        dispatch(["coordinate-check", *small, *words])
        said = ""
    except (UserError, SystemExit) as error:
        said = str(error) + capsys.readouterr().err
    assert message in said
