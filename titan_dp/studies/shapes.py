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
from titan_dp.model.size import model_size

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
_PROMISING = 50  # candidates a model that are compared with those of the others
_HEAD_DIM_STEP, _LARGEST_HEAD_DIM = 16, 256  # what the kernels take


@dataclass(frozen=True)
class Rule:
    """What is matched, and how.

    Args:
        by: the knob that makes up for what the models differ in.
        quantity: "parameters" (embedding included) or "flops" (model FLOPs a token, forward and backward).
        multiple: grid of every matrix dimension, but for the one column a head of beta and the gate.
        tolerance: largest relative deviation from the target; None: 0.1 % where the grid allows, else 0.25 %, which is
            taken as well where only then the models differ in nothing but the knob.
    """

    by: Knob = "heads"
    quantity: Literal["parameters", "flops"] = "parameters"
    multiple: int = 64
    tolerance: float | None = None

    @property
    def tolerances(self) -> tuple[float, ...]:
        return (0.001, 0.0025) if self.tolerance is None else (self.tolerance,)


@dataclass(frozen=True)
class Variant:
    """A model to find a shape for: its settings, of which those of the shape do not count unless `pinned`."""

    model: config.Model
    pinned: frozenset[str] = frozenset()


@dataclass(frozen=True, order=True)
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
        UserError: where a pinned key is the knob, or no shape of the grid is within the tolerance; names the nearest size
            that all variants reach.
    """
    for variant in variants:
        if KNOBS[rule.by] in variant.pinned:
            raise UserError(
                f"{KNOBS[rule.by]} = {getattr(variant.model, KNOBS[rule.by])} is given for {variant.model.family}, but "
                f"models are matched by {rule.by}, which sets it; match by another of "
                f"{', '.join(k for k in KNOBS if k != rule.by)}"
            )
    ideal = _ideal(variants[0], target, like, rule, seq_len)
    grids = [list(_grid(variant, ideal, target, like, rule, seq_len)) for variant in variants]
    best: tuple[float, list[Shape]] | None = None
    for tolerance in rule.tolerances:
        candidates = [[shape for shape in shapes if abs(shape.deviation) <= tolerance] for shapes in grids]
        if all(candidates):
            found = _most_alike(variants, candidates, ideal, rule)
            if best is None or found[0] == 0:  # a wider tolerance only for models that differ in nothing but the knob
                best = found
            if best[0] == 0:
                break
    if best is None:
        raise UserError(_unreachable(variants, grids, target, like, rule, seq_len))
    shaped = [shape.apply(variant.model) for shape, variant in zip(best[1], variants, strict=True)]
    return [config.Model.model_validate(model.model_dump()) for model in shaped]


def _most_alike(
    variants: Sequence[Variant], candidates: list[list[Shape]], ideal: Shape, rule: Rule
) -> tuple[float, list[Shape]]:
    """One candidate a variant, and by how much they differ beside the knob (0: in nothing).

    Every candidate of the first variant is tried as the one the others are to be like.
    """
    origin = _coordinates(ideal, variants[0].model.num_householder, rule)
    coordinates = []
    for variant, shapes in zip(variants, candidates, strict=True):
        n = variant.model.num_householder
        points = [(_coordinates(shape, n, rule), shape) for shape in shapes]
        coordinates.append(sorted(points, key=lambda pair: _difference(pair[0], origin))[:_PROMISING])
    best, chosen, apart = math.inf, [shapes[0] for shapes in candidates], math.inf
    references = sorted((_disproportion(shape, ideal), point, shape) for point, shape in coordinates[0])
    for disproportion, reference, _ in references:
        if _PULL * disproportion >= best:
            break
        pairs = [min((_difference(point, reference), i) for i, (point, _) in enumerate(near)) for near in coordinates]
        cost = _PULL * disproportion + sum(difference for difference, _ in pairs)
        if cost < best:
            best, chosen = cost, [near[i][1] for near, (_, i) in zip(coordinates, pairs, strict=True)]
            apart = sum(
                sum(abs(a - b) for a, b in zip(near[i][0][:2], reference[:2], strict=True))
                for near, (_, i) in zip(coordinates, pairs, strict=True)
            )
    return apart, chosen


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


def _unreachable(
    variants: Sequence[Variant], grids: list[list[Shape]], target: int, like: Proportions, rule: Rule, seq_len: int
) -> str:
    """Why `target` cannot be had, and the nearest size that every variant reaches."""
    tolerance = rule.tolerances[-1]
    missing = next(i for i, shapes in enumerate(grids) if not any(abs(s.deviation) <= tolerance for s in shapes))
    layers = variants[missing].model.num_hidden_layers
    where = f"{variants[missing].model.family} of {layers} layers with dimensions in multiples of {rule.multiple}"
    wanted = f"{target:,} {'parameters' if rule.quantity == 'parameters' else 'FLOPs a token'}"
    out = "choose a smaller multiple, another number of layers or another vocab_size"
    for nearest in sorted(grids[missing], key=lambda shape: abs(shape.deviation))[:_PROMISING]:
        size = _size(nearest.apply(variants[missing].model), rule, seq_len)
        ideal = _ideal(variants[0], size, like, rule, seq_len)
        if all(
            any(abs(shape.deviation) <= tolerance for shape in _grid(variant, ideal, size, like, rule, seq_len))
            for variant in variants
        ):
            return (
                f"{wanted} cannot be reached within {100 * tolerance:.3g} % by {where}; the nearest is hidden_size "
                f"{nearest.hidden_size}, {nearest.num_heads} heads of {nearest.head_dim}, intermediate_size "
                f"{nearest.intermediate_size}: {size:,} ({nearest.deviation:+.2%}); ask for that size, or {out}"
            )
    return f"{wanted} cannot be reached within {100 * tolerance:.3g} % by {where}, nor any size near it; {out}"


def _grid(variant: Variant, ideal: Shape, target: int, like: Proportions, rule: Rule, seq_len: int) -> Iterator[Shape]:
    """The shapes around the ideal one: every width and number of heads (or head_dim), and the MLP that fits best."""
    model, step = variant.model, rule.multiple
    pinned = {key: getattr(model, key) for key in variant.pinned}
    reach = 0.5 if rule.by == "hidden_size" else 0.75
    widths = [pinned["hidden_size"]] if "hidden_size" in pinned else _near(ideal.hidden_size, step, reach)
    for width in widths:
        if not _splits(model.model_copy(update={"hidden_size": width})):
            continue
        lines: dict[int, tuple[int, int, int]] = {}  # by head_dim: the size is linear in the heads and in the MLP's width
        for heads, head_dim in _heads(variant, ideal, like.natural_heads(width, model, rule), rule):
            if head_dim not in lines:
                one, two, wider = (
                    _size(Shape(width, h, head_dim, mlp, 0.0).apply(model), rule, seq_len)
                    for h, mlp in ((1, step), (2, step), (1, 2 * step))
                )
                lines[head_dim] = one, two - one, wider - one
            one, per_head, per_step = lines[head_dim]
            size = one + (heads - 1) * per_head
            if "intermediate_size" in pinned:
                mlp = pinned["intermediate_size"]
                size = _size(Shape(width, heads, head_dim, mlp, 0.0).apply(model), rule, seq_len)
            else:
                steps = max(0, round((target - size) / per_step))
                mlp, size = step + steps * step, size + steps * per_step
            yield Shape(width, heads, head_dim, mlp, size / target - 1)


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


def _coordinates(shape: Shape, n: int, rule: Rule) -> tuple[float, float, float, float]:
    """What two models of a set should have in common, as weighted logarithms, and the deviation; the knob is not among it.

    Heads are compared by what they cost, heads x head_dim x (1 + n_h), where they are the knob, and as they are else.
    """
    width, mlp = 4 * math.log(shape.hidden_size), math.log(shape.intermediate_size)
    if rule.by in ("heads", "head_dim"):
        return width, mlp, math.log(shape.num_heads * shape.head_dim * (1 + n)) / 2, shape.deviation
    heads = 4 * math.log(shape.num_heads)
    return (mlp if rule.by == "hidden_size" else width), heads, 0.0, shape.deviation


def _difference(point: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> float:
    """How much two models differ beside the knob: absolute values, as equal is best; less deviation decides between equals."""
    return abs(point[0] - other[0]) + abs(point[1] - other[1]) + abs(point[2] - other[2]) + abs(point[3])
