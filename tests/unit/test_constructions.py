"""Constructed weights: no error in 4,096 random tokens, with the layers and steps that the theorems name, and why it works."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from titan_dp.data.synthetic.groups import Group, parse_group
from titan_dp.model.deltaproduct import DeltaProduct
from titan_dp.model.transformer import Transformer
from titan_dp.studies.state_tracking import constructions, representations
from titan_dp.studies.state_tracking.theory import CONSTRUCTIONS

TOKENS = 4096
# construction: layers and n_h of its theorem
SIZES = {
    "S3-swaps": (1, 2),
    "S4-swaps": (1, 3),
    "S5-swaps": (1, 4),
    "S4-rotations": (1, 2),
    "A5-rotations": (1, 2),
    "Z2-parity": (1, 1),
    **{f"{group}-mirrors": (2, 1) for group in ("Z3", "Z5", "Z7", "Z60", "D3", "D4", "D5", "D8")},
}
REPRESENTATIONS = [
    (representations.permutation_matrices, "S4"),
    (representations.signs, "Z2"),
    (representations.rotations, "S4"),
    (representations.rotations, "A5"),
    (representations.polygon, "Z7"),
    (representations.polygon, "D8"),
]


def build(name: str) -> tuple[Transformer, Group]:
    kind, group_name = CONSTRUCTIONS[name]
    group = parse_group(group_name)
    return getattr(constructions, kind)(group, "torch"), group


def words(group: Group, tokens: int = TOKENS) -> Tensor:
    """[1, 1 + tokens]: BOS and elements."""
    return torch.cat([torch.tensor([[group.order + 1]]), torch.randint(group.order, (1, tokens))], 1)


@torch.no_grad()
def errors(model: Transformer, group: Group) -> int:
    """Wrong answers on a fresh word, against permutations composed one after the other."""
    inputs = words(group)
    answers = model(inputs)[0, 1:].argmax(-1).tolist()
    product, wrong = np.arange(group.points), 0
    for x, answer in zip(inputs[0, 1:].tolist(), answers, strict=True):
        product = group.permutations[x][product]
        wrong += answer >= group.order or (group.permutations[answer] != product).any()
    return int(wrong)


def mixer(model: Transformer, layer: int) -> DeltaProduct:
    attn = model.blocks[layer].attn
    assert isinstance(attn, DeltaProduct)
    return attn


# -- the models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIZES)
def test_no_token_of_thousands_is_wrong_with_the_layers_and_steps_of_the_theorem(name: str) -> None:
    model, group = build(name)
    assert (len(model.blocks), mixer(model, 0).n) == SIZES[name]
    assert errors(model, group) == 0
    assert errors(model.float(), group) == 0


def test_every_construction_is_tested() -> None:
    assert CONSTRUCTIONS.keys() == SIZES.keys()


def test_a_permutation_takes_as_many_steps_as_swaps_and_switches_off_the_others() -> None:
    model, group = build("S5-swaps")
    x = model.blocks[0].attn_norm.apply_to(model.float().embeddings(torch.arange(group.order)[None]))
    beta = mixer(model, 0).recurrence_inputs(x, None).beta[0, :, :, 0]
    matrices = torch.eye(5)[torch.from_numpy(group.permutations)]
    swaps = torch.linalg.matrix_rank(matrices - torch.eye(5))  # points minus cycles
    assert torch.equal(beta, 2.0 * (torch.arange(4) < swaps[:, None]))


def test_s5_needs_its_fourth_step() -> None:
    model, group = build("S5-swaps")
    attn = mixer(model, 0)
    attn.b_proj.weight[3 * attn.heads :, : group.order] = -constructions.LOGIT  # beta = 0 there, but BOS writes as before
    assert errors(model, group) > TOKENS / 2


def test_mirrors_need_the_parity_that_layer_one_counts() -> None:
    model, group = build("D5-mirrors")
    mixer(model, 0).o_proj.weight.zero_()
    assert errors(model, group) > TOKENS / 2


@pytest.mark.parametrize("name", ["S5-swaps", "Z60-mirrors"])
@torch.no_grad()
def test_the_state_neither_grows_nor_fades(name: str) -> None:
    model, group = build(name)
    model.float()
    _, start = model.step_hidden(words(group, 0))
    _, end = model.step_hidden(words(group))
    ratio = end[-1].state.norm() / start[-1].state.norm()
    assert 0.9 < ratio < 1.001


def test_projections_undo_silu() -> None:
    y = torch.cat([torch.empty(100).uniform_(-0.25, 0.25), torch.empty(100).uniform_(0, 1000), torch.zeros(1)]).double()
    x = constructions.before_silu(y)
    torch.testing.assert_close(F.silu(x), y, rtol=1e-12, atol=0)


# -- the algebra -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("represent", "name"), REPRESENTATIONS)
def test_representations_are_orthogonal_faithful_and_multiply_as_the_group(
    represent: Callable[[Group], np.ndarray], name: str
) -> None:
    group = parse_group(name)
    matrices = represent(group)
    np.testing.assert_allclose(matrices @ matrices.swapaxes(1, 2) - np.eye(matrices.shape[1]), 0, atol=1e-12)
    np.testing.assert_allclose(matrices[:, None] @ matrices[None], matrices[group.table], atol=1e-12)
    assert len(np.unique(matrices.round(6), axis=0)) == group.order


@pytest.mark.parametrize("d", [1, 2, 6])
def test_an_orthogonal_matrix_is_a_product_of_reflections_one_for_each_dimension_it_moves(d: int) -> None:
    for moved in range(d + 1):
        basis = np.linalg.qr(np.random.default_rng().standard_normal((d, d)))[0]
        matrix = np.eye(d)
        matrix[:moved, :moved] = np.linalg.qr(np.random.default_rng().standard_normal((moved, moved)))[0]
        matrix = basis @ matrix @ basis.T
        keys = representations.reflections(matrix)
        product = np.eye(d)
        for k in keys:
            product = product - 2 * np.outer(k, k @ product)
        np.testing.assert_allclose(product, matrix, atol=1e-9)
        assert len(keys) == np.linalg.matrix_rank(matrix - np.eye(d), tol=1e-9)
