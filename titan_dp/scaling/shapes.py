"""Shapes of equal size: for several models (n_h, gates, ...) the widths, heads and MLPs that give each one target.

The grid of shapes is small: hidden_size and intermediate_size in multiples of `multiple`, whole heads. For every model
all shapes of the grid near the wanted proportions are counted (exactly, `model_size`), and those within the tolerance of
the target are its candidates. Of these one a model is chosen, so that the models differ from each other as little
as possible in everything but the knob the study is matched by, and are close to the proportions of the base configuration.
Settings that are pinned stay as they are. Nothing here knows how a model trains.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from titan_dp import config
from titan_dp.errors import UserError
from titan_dp.model_size import model_size

Knob = Literal["heads", "head_dim", "intermediate_size", "hidden_size"]
KNOBS: dict[str, str] = {
    "heads": "num_heads",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
    "hidden_size": "hidden_size",
}
SHAPE_KEYS = ("num_hidden_layers", *KNOBS.values())

ASPECT = 64  # width over depth where the depth is free: the paper's 805M models have 1536 / 24
_PULL = 4  # weight of the wanted proportions against the differences between the models
_PROMISING = 100  # candidates a model that are compared with those of the others
_HEAD_DIM_STEP, _LARGEST_HEAD_DIM = 16, 256  # what the kernels take


@dataclass(frozen=True)
class Rule:
    """What is matched, and how.

    Args:
        by: the knob that makes up for what the models differ in.
        quantity: "parameters" (embedding included) or "flops" (model FLOPs a token, forward and backward).
        multiple: grid of every matrix dimension, but for the one column a head of beta and the gate.
        tolerance: largest relative deviation from the target; None: 0.1 % where the grid allows, else 0.25 %.
    """

    by: Knob = "heads"
    quantity: Literal["parameters", "flops"] = "parameters"
    multiple: int = 64
    tolerance: float | None = None


@dataclass(frozen=True)
class Variant:
    """A model to find a shape for: its settings, of which those of the shape do not count unless `pinned`."""

    model: config.Model
    pinned: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Shape:
    hidden_size: int
    num_heads: int
    head_dim: int
    intermediate_size: int
    deviation: float  # from the target, relative

    def apply(self, model: config.Model) -> config.Model:
        return model.model_copy(
            update={
                "hidden_size": self.hidden_size,
                "num_heads": self.num_heads,
                "head_dim": self.head_dim,
                "intermediate_size": self.intermediate_size,
            }
        )


@dataclass(frozen=True)
class Proportions:
    """What stays the same when a model grows, taken from one that has a shape."""

    mixer: float  # heads x head_dim x (1 + n_h) over the width
    mlp: float  # intermediate_size over the width
    heads: float  # over the width

    @staticmethod
    def of(model: config.Model) -> Proportions:
        mixer = model.num_heads * model.head_dim * (1 + model.num_householder)
        return Proportions(*(part / model.hidden_size for part in (mixer, model.mlp_size, model.num_heads)))

    def natural_heads(self, width: int, model: config.Model, rule: Rule) -> float:
        """Heads of `model` at a width; in fours where the head dimension is the knob, so that its multiples of 16 fit."""
        if rule.by == "head_dim":
            return max(4, 4 * round(self.heads * width / 4))
        return self.mixer * width / (model.head_dim * (1 + model.num_householder))


def match_shapes(variants: Sequence[Variant], target: int, like: Proportions, rule: Rule, seq_len: int) -> list[config.Model]:
    """The variants with shapes of size `target`, in their order.

    Args:
        target: parameters or FLOPs a token, as the rule says.
        like: proportions to come close to.
        seq_len: at which the FLOPs of softmax attention are counted.

    Raises:
        UserError: where a pinned key is the knob, or no shape of the grid is within the tolerance; names the nearest.
    """
    for variant in variants:
        if KNOBS[rule.by] in variant.pinned:
            raise UserError(
                f"{KNOBS[rule.by]} = {getattr(variant.model, KNOBS[rule.by])} is given for {variant.model.family}, but "
                f"models are matched by {rule.by}, which sets it; match by another of "
                f"{', '.join(k for k in KNOBS if k != rule.by)}"
            )
    ideal = _ideal(variants[0], target, like, rule, seq_len)
    steps = [variant.model.num_householder for variant in variants]
    candidates = []
    for variant, n in zip(variants, steps, strict=True):
        shapes = _candidates(variant, ideal, target, like, rule, seq_len)
        shapes.sort(key=lambda shape, n=n: _difference(shape, n, ideal, steps[0], rule))  # type: ignore[misc]
        candidates.append(shapes[:_PROMISING])
    best, chosen = math.inf, [shapes[0] for shapes in candidates]
    for reference in candidates[0]:
        pairs = []
        for shapes, n in zip(candidates, steps, strict=True):
            pairs.append(min((_difference(shape, n, reference, steps[0], rule), i) for i, shape in enumerate(shapes)))
        cost = _PULL * _disproportion(reference, ideal) + sum(difference for difference, _ in pairs)
        if cost < best:
            best, chosen = cost, [shapes[i] for shapes, (_, i) in zip(candidates, pairs, strict=True)]
    shaped = [shape.apply(variant.model) for shape, variant in zip(chosen, variants, strict=True)]
    return [config.Model.model_validate(model.model_dump()) for model in shaped]


def choose_depth(variant: Variant, target: int, like: Proportions, rule: Rule, seq_len: int, aspect: int = ASPECT) -> Variant:
    """`variant` with the number of layers at which a model of the target is about `aspect` times as wide as deep."""

    def deep(layers: int) -> Variant:
        return Variant(variant.model.model_copy(update={"num_hidden_layers": layers}), variant.pinned)

    low, high = 2, 256
    while low < high:
        layers = (low + high) // 2
        wide = _ideal(deep(layers), target, like, rule, seq_len).hidden_size > aspect * layers
        low, high = (layers + 1, high) if wide else (low, layers)
    return deep(low)


def _size(model: config.Model, rule: Rule, seq_len: int) -> int:
    counts = model_size(model, seq_len)
    return counts.parameters if rule.quantity == "parameters" else counts.flops_per_token


def _ideal(variant: Variant, target: int, like: Proportions, rule: Rule, seq_len: int) -> Shape:
    """The model of the target in the proportions wanted, off the grid in all but the width."""
    model = variant.model

    def at(width: int) -> Shape:
        heads, head_dim = max(1, round(like.natural_heads(width, model, rule))), model.head_dim
        if rule.by == "head_dim":
            head_dim = max(_HEAD_DIM_STEP, round(like.mixer * width / (heads * (1 + model.num_householder))))
        shape = Shape(width, heads, head_dim, max(1, round(like.mlp * width)), 0.0)
        pins = {key: getattr(model, key) for key in variant.pinned & set(KNOBS.values())}
        return Shape(**{**shape.__dict__, **pins})

    low, high = 1, 2**14
    while low < high:
        middle = (low + high) // 2
        enough = _size(at(middle * rule.multiple).apply(model), rule, seq_len) >= target
        low, high = (low, middle) if enough else (middle + 1, high)
    below, above = (at(max(1, step) * rule.multiple) for step in (low - 1, low))
    return min((below, above), key=lambda shape: abs(_size(shape.apply(model), rule, seq_len) - target))


def _candidates(variant: Variant, ideal: Shape, target: int, like: Proportions, rule: Rule, seq_len: int) -> list[Shape]:
    """All shapes of the grid within the tolerance of the target. Raises UserError, naming the nearest, if there is none."""
    shapes = list(_grid(variant, ideal, target, like, rule, seq_len))
    tolerances = (0.001, 0.0025) if rule.tolerance is None else (rule.tolerance,)
    for tolerance in tolerances:
        if close := [shape for shape in shapes if abs(shape.deviation) <= tolerance]:
            return close
    wanted = f"{target:,} {'parameters' if rule.quantity == 'parameters' else 'FLOPs a token'}"
    layers = variant.model.num_hidden_layers
    where = f"{variant.model.family} of {layers} layers with dimensions in multiples of {rule.multiple}"
    if not shapes:
        raise UserError(f"no shape at all for {where}: loosen what is pinned, or choose another multiple")
    nearest = min(shapes, key=lambda shape: abs(shape.deviation))
    raise UserError(
        f"{wanted} cannot be reached within {tolerances[-1]:.2%} by {where}; the nearest is hidden_size {nearest.hidden_size}, "
        f"{nearest.num_heads} heads of {nearest.head_dim}, intermediate_size {nearest.intermediate_size}: "
        f"{_size(nearest.apply(variant.model), rule, seq_len):,} ({nearest.deviation:+.2%}); ask for that size, or choose a "
        "smaller multiple, another number of layers or another vocab_size"
    )


def _grid(variant: Variant, ideal: Shape, target: int, like: Proportions, rule: Rule, seq_len: int) -> Iterator[Shape]:
    """The shapes around the ideal one: every width and number of heads (or head_dim), and the MLP that fits best."""
    model, step = variant.model, rule.multiple
    pinned = {key: getattr(model, key) for key in variant.pinned}
    reach = 0.5 if rule.by == "hidden_size" else 0.75
    widths = [pinned["hidden_size"]] if "hidden_size" in pinned else _near(ideal.hidden_size, step, reach)
    for width in widths:
        if not _splits(model.model_copy(update={"hidden_size": width})):
            continue
        for heads, head_dim in _heads(variant, ideal, like.natural_heads(width, model, rule), rule):
            shape = Shape(width, heads, head_dim, pinned.get("intermediate_size", step), 0.0)
            size = _size(shape.apply(model), rule, seq_len)
            if "intermediate_size" not in pinned:  # the size is linear in the MLP's width
                per_step = _size(Shape(width, heads, head_dim, 2 * step, 0.0).apply(model), rule, seq_len) - size
                steps = max(0, round((target - size) / per_step))
                shape = Shape(width, heads, head_dim, step + steps * step, 0.0)
                size += steps * per_step
            yield Shape(width, heads, head_dim, shape.intermediate_size, size / target - 1)


def _heads(variant: Variant, ideal: Shape, natural: float, rule: Rule) -> Iterator[tuple[int, int]]:
    """(heads, head_dim) to try where `natural` heads are in proportion."""
    model = variant.model

    def whole(heads: int, dim: int) -> bool:
        return heads * dim % rule.multiple == 0 and heads * int(dim * model.expand_v) % rule.multiple == 0

    if model.mixer == "attention":
        yield model.num_heads, model.head_dim
    elif rule.by == "head_dim":
        dims = range(_HEAD_DIM_STEP, _LARGEST_HEAD_DIM + 1, _HEAD_DIM_STEP)
        yield from ((ideal.num_heads, dim) for dim in dims if whole(ideal.num_heads, dim))
    elif "num_heads" in variant.pinned:
        yield model.num_heads, model.head_dim
    else:
        low, high = min(natural, ideal.num_heads) / 2, 2 * max(natural, ideal.num_heads)
        few = range(max(1, math.floor(low)), math.ceil(high) + 2)
        yield from ((heads, model.head_dim) for heads in few if whole(heads, model.head_dim))


def _splits(model: config.Model) -> bool:
    """Whether the width splits into the heads of softmax layers, where there are any."""
    softmax = model.mixer == "attention" or model.attention_layers
    return not softmax or (model.hidden_size % model.softmax_heads == 0 and model.hidden_size // model.softmax_heads % 2 == 0)


def _near(value: int, step: int, reach: float) -> list[int]:
    """Multiples of `step` from `reach` times `value` to as much above, and at least four to either side."""
    low, high = min(reach * value, value - 4 * step), max(value / reach, value + 4 * step)
    return [i * step for i in range(max(1, math.ceil(low / step)), math.floor(high / step) + 1)]


def _disproportion(shape: Shape, ideal: Shape) -> float:
    """How far the first model is from the proportions wanted: squares, as a little does no harm and a lot much."""
    width = math.log(shape.hidden_size / ideal.hidden_size)
    mixer = math.log(shape.num_heads * shape.head_dim / (ideal.num_heads * ideal.head_dim))
    mlp = math.log(shape.intermediate_size / ideal.intermediate_size)
    return width**2 + mixer**2 + mlp**2


def _difference(shape: Shape, n: int, reference: Shape, reference_n: int, rule: Rule) -> float:
    """How much two models of n and reference_n steps differ in all but the knob: absolute values, as equal is best.

    Heads are compared by what they cost, heads x head_dim x (1 + n_h), where they are the knob, and as they are else.
    """
    width = 0.0 if rule.by == "hidden_size" else abs(math.log(shape.hidden_size / reference.hidden_size))
    mlp = 0.0 if rule.by == "intermediate_size" else abs(math.log(shape.intermediate_size / reference.intermediate_size))
    if rule.by in ("heads", "head_dim"):
        cost, other = shape.num_heads * shape.head_dim * (1 + n), reference.num_heads * reference.head_dim * (1 + reference_n)
        heads = abs(math.log(cost / other)) / 2
    else:
        heads = 4 * abs(math.log(shape.num_heads / reference.num_heads))
    return 4 * width + mlp + heads + abs(shape.deviation)
