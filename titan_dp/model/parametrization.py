"""The maximal update parametrisation: factors of first values, learning rates and epsilons that follow from a model's shape.

With `optimizer.parametrization = "mup"` the hyperparameters of a config are those of a base shape (`optimizer.mup_base`), and
what was best there stays best for wider, deeper models and for more Householder steps. docs/parametrization.md derives the
rules from the recurrence. There are no multipliers in the model: where the literature has one (1/width at the logits, 1/depth
at the residual stream), it is in the first values, learning rates and epsilons of the weights beside it, which for Adam is the
same (Yang & Hu 2021, arXiv 2011.14522, section on abc-symmetries). So checkpoints and exports need nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from titan_dp import config
from titan_dp.model.transformer import build_model


class Scale(NamedTuple):
    """Factors of one parameter, on what the config says."""

    init: float = 1.0
    """Of its first values."""
    lr: float = 1.0
    """Of AdamW's learning rate; weight decay times learning rate stays as it is."""
    eps: float = 1.0
    """Of AdamW's epsilon: as small as its gradient becomes."""
    muon: float = 1.0
    """Of Muon's learning rate, beside the 0.2 sqrt(max(rows, columns)) that its updates have in any case.

    Rows are those of one matrix that Muon orthogonalises, of a head for instance."""


def scales(c: config.Config) -> dict[str, Scale]:
    """The factors of every parameter by its name; empty for the standard parametrisation.

    Sources: width, Yang et al. 2022 (arXiv 2203.03466, table 8); depth and epsilon, CompleteP (Dey et al. 2025, arXiv
    2505.01618, table 1, alpha = 1); Muon, the spectral condition (Yang et al. 2023, arXiv 2310.17813).
    """
    base = c.optimizer.mup_base
    if c.optimizer.parametrization == "standard":
        return {}
    width, depth, steps = (
        c.model.hidden_size / base.of("hidden_size"),
        c.model.num_hidden_layers / base.of("num_hidden_layers"),
        c.model.num_householder / base.of("num_householder"),
    )
    split = c.optimizer.muon_split
    (shapes, muons), (base_shapes, base_muons) = _shapes(c.model, split), _shapes(base_model(c.model, base), split)
    found = {}
    for name, shape in shapes.items():
        kind = name.split(".")[-2]
        inside = 1 / (width * depth)  # the size of gradients in a block
        if name.startswith(("embeddings.", "lm_head.")):
            found[name] = Scale(eps=1 / width)
        elif name == "norm.weight":  # the 1/width at the logits, also where they share the embedding's matrix
            found[name] = Scale(init=1 / width, lr=1 / width)
        elif len(shape) != 2:  # convolutions, norms, A_log, dt_bias
            found[name] = Scale(eps=inside / (steps if kind in _PER_STEP else 1))
        else:
            scale = _matrix(name, c.model, base, shape, base_shapes[name], (width, depth, steps))
            own = _muon(muons[name], base_muons[name]) if name in muons else 1.0
            found[name] = scale._replace(muon=scale.muon * own)
    return found


def _matrix(
    name: str, model: config.Model, base: config.MupBase, shape: torch.Size, base_shape: torch.Size, ratios: Sequence[float]
) -> Scale:
    """Of a matrix in a block: 1/sqrt(fan in) of its first values, 1/(fan in) of its learning rate, times what stands beside.

    Muon's factor is without that of the shape, which is `_muon`'s.
    """
    width, depth, steps = ratios
    layer, kind = int(name.split(".")[1]), name.split(".")[-2]
    fan_in = shape[1] / base_shape[1]
    factor, gradient = 1.0, 1 / (width * depth * (steps if kind in _PER_STEP else 1))
    if kind in ("o_proj", "down_proj"):
        factor, gradient = 1 / depth, 1 / (width * depth)  # each block adds its share to the residual stream
    elif model.mixer_of(layer) == "attention" and kind == "q_proj":
        factor = math.sqrt(_head_dim(base_model(model, base)) / _head_dim(model))  # scores over d and not over sqrt(d)
    elif kind == "v_proj" and steps != 1:
        factor = 1 / math.sqrt(steps)  # n_h independent writes add up to sqrt(n_h) of one
    return Scale(factor / math.sqrt(fan_in), factor / fan_in, gradient / factor, factor)


def _muon(matrix: tuple[int, int], base: tuple[int, int]) -> float:
    """What keeps the spectral norm of an update in proportion to sqrt(rows / columns)."""
    fan_out, fan_in = matrix[0] / base[0], matrix[1] / base[1]
    return math.sqrt(fan_out / fan_in * max(base) / max(matrix))


_PER_STEP = ("k_proj", "v_proj", "b_proj", "k_conv1d", "v_conv1d")
"""What each of the n_h steps has of its own, whose gradient is a step's share of the token's."""


def base_model(model: config.Model, base: config.MupBase) -> config.Model:
    """`model` with the widths of the base and its own depth, so that each parameter has its counterpart."""
    mlp = model.intermediate_size and round(model.intermediate_size * base.of("hidden_size") / model.hidden_size)
    widths = {key: base.of(key) for key in ("hidden_size", "head_dim", "num_heads", "num_householder")}
    if model.num_key_heads:  # heads to a group as they are
        widths["num_key_heads"] = max(1, widths["num_heads"] * model.num_key_heads // model.num_heads)
    return model.model_copy(update=widths | {"intermediate_size": base.intermediate_size or mlp})


def _shapes(
    model: config.Model, split: Literal["heads", "steps", "whole"]
) -> tuple[dict[str, torch.Size], dict[str, tuple[int, int]]]:
    """Of every parameter, and of a matrix of those that Muon takes."""
    with torch.device("meta"):
        built = build_model(model)
    shapes = {name: parameter.shape for name, parameter in built.named_weights()}
    return shapes, {name: (rows, shapes[name][1]) for name, rows in built.muon_rows(split).items()}


def _head_dim(model: config.Model) -> int:
    return model.hidden_size // model.softmax_heads
