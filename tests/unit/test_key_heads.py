"""`model.num_key_heads`: one head of q and k for several of v, against a model whose weights of q and k are written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.unit.conftest import Folder
from tests.unit.test_model import make, settings, tokens_of
from titan_dp import config
from titan_dp.config.advice import explain_unknown
from titan_dp.config.load import load_config
from titan_dp.errors import UserError
from titan_dp.model.parametrization import scales
from titan_dp.model.size import model_size, state_size
from titan_dp.model.transformer import Transformer
from titan_dp.studies.coordinate_check import at
from titan_dp.studies.report.read import _named
from titan_dp.studies.shapes import Proportions, Rule, Variant, match_shapes

H, G, DK = 4, 2, 8
STEPS = {"q_proj": 1, "k_proj": 3, "q_conv1d": 1, "k_conv1d": 3}
"""What there is of each group, and for how many steps."""


def grouped(**changes: object) -> Transformer:
    return make(num_heads=H, num_key_heads=G, num_householder=3, use_forget_gate=True, **changes)


def shared(name: str) -> int:
    """Steps of a weight whose rows are laid out (steps, groups, dk); 0 for others."""
    return STEPS.get(name.removesuffix(".weight").split(".")[-1], 0)


def written_out(model: Transformer) -> Transformer:
    """The same model with a copy of its group's weights for each head's q and k."""
    whole = make(num_heads=H, num_householder=3, use_forget_gate=True)
    weights = model.state_dict()
    for name, x in weights.items():
        if n := shared(name):
            weights[name] = x.unflatten(0, (n, G, DK)).repeat_interleave(H // G, 1).flatten(0, 2)
    whole.load_state_dict(weights)
    return whole


def gradients(model: Transformer, tokens: Tensor) -> dict[str, Tensor]:
    out = model(tokens)
    out.square().mean().backward()
    return {name: x.grad for name, x in model.named_parameters() if x.grad is not None} | {"logits": out.detach()}


def test_a_group_computes_what_each_of_its_heads_would_with_the_same_weights_and_adds_up_their_gradients() -> None:
    model, tokens = grouped(), tokens_of(2, 20)
    got, expected = gradients(model, tokens), gradients(written_out(model), tokens)
    for name, value in expected.items():
        if n := shared(name):
            value = value.unflatten(0, (n, G, H // G, DK)).sum(2).flatten(0, 2)
        torch.testing.assert_close(got[name], value)


def test_tables_tell_models_that_share_keys_from_others() -> None:
    named = [_named(settings(num_heads=4, num_key_heads=G, num_householder=2, head_dim=16)) for G in (None, 4, 2)]
    assert [each["family"] for each in named] == ["DeltaProduct_2 [-1, 1]"] * 2 + ["DeltaProduct_2 [-1, 1] (2 heads per key)"]
    assert [each["shape"].split(", ")[1] for each in named] == ["4 x 16", "4 x 16", "4/2 x 16"]


def test_as_many_key_heads_as_heads_is_the_model_without_the_key() -> None:
    one, other = make(num_heads=H), make(num_heads=H, num_key_heads=H)
    assert {name: x.shape for name, x in one.named_parameters()} == {name: x.shape for name, x in other.named_parameters()}
    assert all(torch.equal(x, y) for x, y in zip(one.parameters(), other.parameters(), strict=True))


def test_queries_and_keys_shrink_and_states_and_model_flops_of_the_recurrence_do_not() -> None:
    c, whole = settings(num_heads=H, num_key_heads=G), settings(num_heads=H)
    fewer = c.num_hidden_layers * (1 + c.num_householder) * (H - G) * DK  # columns of q and k
    assert model_size(whole, 64).parameters - model_size(c, 64).parameters == fewer * (c.hidden_size + c.conv_size)
    assert (state_size(c), model_size(c, 64).recurrence) == (state_size(whole), model_size(whole, 64).recurrence)


def test_muon_orthogonalises_the_heads_that_there_are() -> None:
    rows = grouped().muon_rows("heads")
    assert {rows[f"layers.0.attn.{name}_proj.weight"] for name in "qkv"} == {DK}
    assert grouped().muon_rows("steps")["layers.0.attn.k_proj.weight"] == G * DK
    assert grouped().muon_rows("steps")["layers.0.attn.v_proj.weight"] == H * DK


def test_a_model_says_how_many_heads_share() -> None:
    assert "4 heads on 2 of q and k, dk 8, dv 8" in grouped().layers[0].attn.describe()


# -- settings and studies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixer", ["deltaproduct", "gla"])
def test_heads_that_no_group_divides_are_one_mistake(mixer: str, folder: Folder) -> None:
    model = f'[model]\nmixer = "{mixer}"\nnum_householder = 1\nnum_heads = 4\nnum_key_heads = 3\n'
    [problem] = folder.problems(f'extends = "debug.toml"\n{model}')
    assert problem.startswith("[model] num_heads = 4 is not a multiple of num_key_heads = 3 (num_heads from run.toml:")


def test_a_mixer_without_groups_says_that_the_key_has_no_effect(folder: Folder) -> None:
    loaded = folder.load('extends = "debug.toml"\n[model]\nmixer = "rwkv7"\nuse_forget_gate = false\nnum_key_heads = 2\n')
    assert any(warning.startswith("model.num_key_heads") for warning in loaded.warnings())
    assert loaded.config.model.key_heads == loaded.config.model.num_heads


def test_what_others_call_them_is_explained() -> None:
    assert "model.num_key_heads" in explain_unknown("model.num_v_heads")
    assert explain_unknown("model.num_k_heads") == "set model.num_key_heads"


@pytest.mark.parametrize("by", ["heads", "head_dim", "intermediate_size", "hidden_size"])
def test_models_are_matched_with_their_groups_as_given(by: str) -> None:
    variants = [
        Variant(config.Model(num_hidden_layers=8, num_heads=8, num_key_heads=4, num_householder=n, head_dim=64)) for n in (1, 2)
    ]
    like = Proportions.of(variants[0].model)
    found = match_shapes(variants, 60_000_000, like, Rule(by), 1024)  # type: ignore[arg-type]
    for c in found:
        assert (c.num_key_heads, c.num_heads % 4) == (4, 0)
        assert model_size(c, 1024).parameters == pytest.approx(60_000_000, rel=0.0025)


def test_wider_models_of_a_coordinate_check_have_more_groups() -> None:
    c = load_config(["--config", "debug.toml", "--model.num_heads", "4", "--model.num_key_heads", "2"]).config
    wide = at(c, "width", 2 * c.model.hidden_size).model
    assert (wide.num_heads, wide.num_key_heads) == (8, 4)
    with pytest.raises(UserError, match="2 key heads at width .* leave 0.5"):
        at(c, "width", c.model.hidden_size // 4)


def test_under_mup_the_base_has_as_many_heads_to_a_group() -> None:
    base = {"hidden_size": 128, "head_dim": 32, "num_heads": 4, "num_hidden_layers": 3, "num_householder": 2}
    mup = ["--optimizer.parametrization=mup", *(f"--optimizer.mup_base.{name}={value}" for name, value in base.items())]
    wide = ["--model.hidden_size=512", "--model.num_heads=16", "--model.intermediate_size=1536"]

    def muon(*words: str) -> list[float]:
        c = load_config(["--config", "debug.toml", "--optimizer.muon_split=steps", *mup, *wide, *words]).config
        return [scales(c)[f"layers.0.attn.{name}_proj.weight"].muon for name in "qkv"]

    assert muon("--model.num_key_heads=8") == pytest.approx(muon())
