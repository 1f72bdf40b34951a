"""Shapes of equal size: for several models (n_h, gates, ...) the widths, heads and MLPs that bring each to one target.

The grid of shapes is small: hidden_size and intermediate_size in multiples of `multiple`, whole heads. For every model
all shapes of the grid near the wanted proportions are counted (exactly, `model_size`), and those within the tolerance of
the target are its candidates. One candidate per model is chosen, so that the models differ from each other as little
as possible in everything except the knob the study is matched by, and are close to the proportions of the base configuration.
Pinned settings stay as they are. Nothing here knows how a model trains.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

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

ASPECT = 64  # width over depth if the depth is free: the paper's 805M models have 1536 / 24
_PULL = 4  # weight of the wanted proportions against the differences between the models
_PROMISING = 50  # candidates per model that are compared with those of the others
_HEAD_DIM_STEP, _LARGEST_HEAD_DIM = 16, 256  # what the kernels take


@dataclass(frozen=True)
class Rule:
    """What is matched, and how.

    Args:
        by: the knob that makes up for what the models differ in.
        quantity: "parameters" (embedding included) or "flops" (model FLOPs per token, forward and backward).
        multiple: all matrix dimensions are multiples of this, except those of beta and the gate (one column per head).
        tolerance: largest relative deviation from the target. None: 0.1 %, and 0.25 % if the grid has nothing closer or if
            only then the models differ in nothing except the knob.
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
    """A model to find a shape for: its settings, of which those of the shape do not count unless they are `pinned`."""

    model: config.Model
    pinned: frozenset[str] = frozenset()

    def deep(self, layers: int) -> Variant:
        return Variant(self.model.model_copy(update={"num_hidden_layers": layers}), self.pinned)


class Shape(NamedTuple):
    hidden_size: int
    num_heads: int
    head_dim: int
    intermediate_size: int
    deviation: float = 0.0
    """From the target, relative."""

    def apply(self, model: config.Model) -> config.Model:
        return model.model_copy(update=dict(zip(self._fields[:4], self[:4], strict=True)))


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


def match_shapes(variants: Sequence[Variant], target: int, like: Proportions, rule: Rule, seq_len: int) -> list[config.Model]:
    """The variants with shapes of size `target`, in their order.

    Args:
        target: parameters or FLOPs per token, as the rule says.
        like: proportions to come close to.
        seq_len: at which the FLOPs of softmax attention are counted.

    Raises:
        UserError: if the knob is pinned, or if no shape of the grid is within the tolerance; names the nearest size
            that all variants reach.
    """
    knob = KNOBS[rule.by]
    if pinned := next((variant.model for variant in variants if knob in variant.pinned), None):
        raise UserError(
            f"{knob} = {getattr(pinned, knob)} is given for {pinned.family}, but models are matched by {rule.by}, which sets "
            f"it; match by another of {', '.join(k for k in KNOBS if k != rule.by)}"
        )
    search = _Search(target, like, rule, seq_len)
    ideal = search.ideal(variants[0])
    grids = [list(search.grid(variant, ideal)) for variant in variants]
    best: tuple[float, list[Shape]] | None = None
    for tolerance in rule.tolerances:
        candidates = [[shape for shape in shapes if abs(shape.deviation) <= tolerance] for shapes in grids]
        if all(candidates):
            found = _most_alike(variants, candidates, ideal, rule)
            if best is None or found[0] == 0:  # a wider tolerance only for models that differ in nothing except the knob
                best = found
            if best[0] == 0:
                break
    if best is None:
        raise UserError(search.unreachable(variants, grids))
    shaped = [shape.apply(variant.model) for shape, variant in zip(best[1], variants, strict=True)]
    return [config.Model.model_validate(model.model_dump()) for model in shaped]


def choose_depth(variant: Variant, target: int, like: Proportions, rule: Rule, seq_len: int, aspect: int = ASPECT) -> Variant:
    """`variant` with the number of layers at which a model of the target is about `aspect` times as wide as deep."""
    search, low, high = _Search(target, like, rule, seq_len), 2, 256
    while low < high:
        layers = (low + high) // 2
        wide = search.ideal(variant.deep(layers)).hidden_size > aspect * layers
        low, high = (layers + 1, high) if wide else (low, layers)
    return variant.deep(low)


# -- the shapes that come into question --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Search:
    """One target, and where to look for it."""

    target: int
    like: Proportions
    rule: Rule
    seq_len: int

    def size(self, model: config.Model, shape: Shape) -> int:
        counts = model_size(shape.apply(model), self.seq_len)
        return counts.parameters if self.rule.quantity == "parameters" else counts.flops_per_token

    def natural_heads(self, width: int, model: config.Model) -> float:
        """Heads of `model` at a width; in fours if the head dimension is the knob, so that its multiples of 16 fit."""
        if self.rule.by == "head_dim":
            step = math.lcm(4, model.num_key_heads or 1)
            return max(step, step * round(self.like.heads * width / step))
        return self.like.mixer * width / (model.head_dim * (1 + model.num_householder))

    def ideal(self, variant: Variant) -> Shape:
        """The model of the target in the wanted proportions, on the grid in its width only."""
        model, multiple = variant.model, self.rule.multiple
        pins = {key: getattr(model, key) for key in variant.pinned & set(KNOBS.values())}

        def at(width: int) -> Shape:
            heads, head_dim = max(1, round(self.natural_heads(width, model))), model.head_dim
            if self.rule.by == "head_dim":
                mixer = self.like.mixer * width
                head_dim = max(_HEAD_DIM_STEP, round(mixer / (heads * (1 + model.num_householder))))
            return Shape(width, heads, head_dim, max(1, round(self.like.mlp * width)))._replace(**pins)

        low, high = 1, 2**14
        while low < high:
            middle = (low + high) // 2
            enough = self.size(model, at(middle * multiple)) >= self.target
            low, high = (low, middle) if enough else (middle + 1, high)
        below, above = (at(max(1, step) * multiple) for step in (low - 1, low))
        return min((below, above), key=lambda shape: abs(self.size(model, shape) - self.target))

    def grid(self, variant: Variant, ideal: Shape) -> Iterator[Shape]:
        """The shapes around the ideal one: every width and number of heads (or head_dim), and the MLP that fits best."""
        model, step = variant.model, self.rule.multiple
        widths = _near(ideal.hidden_size, step, 0.5 if self.rule.by == "hidden_size" else 0.75)
        for width in [model.hidden_size] if "hidden_size" in variant.pinned else widths:
            if not _splits(model, width):
                continue
            lines: dict[int, tuple[int, int, int]] = {}  # by head_dim: the size is linear in the heads and in the MLP's width
            for heads, head_dim in self._heads(variant, ideal, self.natural_heads(width, model)):
                if "intermediate_size" in variant.pinned:
                    mlp = model.mlp_size
                    size = self.size(model, Shape(width, heads, head_dim, mlp))
                else:
                    if head_dim not in lines:
                        corners = ((1, step), (2, step), (1, 2 * step))
                        one, two, wider = (self.size(model, Shape(width, h, head_dim, mlp)) for h, mlp in corners)
                        lines[head_dim] = one, two - one, wider - one
                    one, per_head, per_step = lines[head_dim]
                    size = one + (heads - 1) * per_head
                    steps = max(0, round((self.target - size) / per_step))
                    mlp, size = step + steps * step, size + steps * per_step
                yield Shape(width, heads, head_dim, mlp, size / self.target - 1)

    def _heads(self, variant: Variant, ideal: Shape, natural: float) -> Iterator[tuple[int, int]]:
        """(heads, head_dim) to try if `natural` heads are in proportion."""
        model, multiple = variant.model, self.rule.multiple
        groups = model.num_key_heads or 1  # of q and k, which stay as many: heads are a multiple

        def whole(heads: int, dim: int) -> bool:
            fits = heads * int(dim * model.expand_v) % multiple == 0
            return fits and heads % groups == 0 and (model.num_key_heads or heads) * dim % multiple == 0

        if model.mixer == "attention" or (self.rule.by != "head_dim" and "num_heads" in variant.pinned):
            yield model.num_heads, model.head_dim
        elif self.rule.by == "head_dim":
            dims = range(_HEAD_DIM_STEP, _LARGEST_HEAD_DIM + 1, _HEAD_DIM_STEP)
            yield from ((ideal.num_heads, dim) for dim in dims if whole(ideal.num_heads, dim))
        else:
            low, high = min(natural, ideal.num_heads) / 2, 2 * max(natural, ideal.num_heads)
            few = range(max(1, math.floor(low)), math.ceil(high) + 2)
            yield from ((heads, model.head_dim) for heads in few if whole(heads, model.head_dim))

    def unreachable(self, variants: Sequence[Variant], grids: list[list[Shape]]) -> str:
        """Why the target cannot be reached, and the nearest size that every variant reaches."""
        tolerance = self.rule.tolerances[-1]

        def reached(shapes: Iterator[Shape] | list[Shape]) -> bool:
            return any(abs(shape.deviation) <= tolerance for shape in shapes)

        model, shapes = next((v.model, shapes) for v, shapes in zip(variants, grids, strict=True) if not reached(shapes))
        wanted = f"{self.target:,} {'parameters' if self.rule.quantity == 'parameters' else 'FLOPs per token'}"
        where = f"{model.family} of {model.num_hidden_layers} layers with dimensions in multiples of {self.rule.multiple}"
        out = "choose a smaller multiple, another number of layers or another vocab_size"
        for nearest in sorted(shapes, key=lambda shape: abs(shape.deviation))[:_PROMISING]:
            other = _Search(self.size(model, nearest), self.like, self.rule, self.seq_len)
            ideal = other.ideal(variants[0])
            if all(reached(other.grid(variant, ideal)) for variant in variants):
                return (
                    f"{wanted} cannot be reached within {100 * tolerance:.3g} % by {where}; the nearest is hidden_size "
                    f"{nearest.hidden_size}, {nearest.num_heads} heads of {nearest.head_dim}, intermediate_size "
                    f"{nearest.intermediate_size}: {other.target:,} ({nearest.deviation:+.2%}); ask for that size, or {out}"
                )
        return f"{wanted} cannot be reached within {100 * tolerance:.3g} % by {where}, nor any size near it; {out}"


def _splits(model: config.Model, width: int) -> bool:
    """Whether the width splits into the heads of softmax layers, if there are any."""
    if model.mixer != "attention" and not model.attention_layers:
        return True
    heads = model.model_copy(update={"hidden_size": width}).softmax_heads
    return width % heads == 0 and width // heads % 2 == 0


def _near(value: int, step: int, reach: float) -> list[int]:
    """Multiples of `step` from `reach` times `value` to as much above, and at least four to either side."""
    low, high = min(reach * value, value - 4 * step), max(value / reach, value + 4 * step)
    return [i * step for i in range(max(1, math.ceil(low / step)), math.floor(high / step) + 1)]


# -- the choice --------------------------------------------------------------------------------------------------------


def _most_alike(
    variants: Sequence[Variant], candidates: list[list[Shape]], ideal: Shape, rule: Rule
) -> tuple[float, list[Shape]]:
    """One candidate per variant, and by how much they differ beside the knob (0: in nothing).

    Every candidate of the first variant is tried as the reference that the others are to be like. What is minimised is
    _PULL times the reference's disproportion plus the sum of all variants' differences from the reference. With a pull of 4
    a width 5 % off its proportion weighs as much as two models whose widths differ by 0.24 %.
    """
    steps = [variant.model.num_householder for variant in variants]
    origin = _coordinates(ideal, steps[0], rule)
    nearest = []
    for n, shapes in zip(steps, candidates, strict=True):
        points = [(_coordinates(shape, n, rule), shape) for shape in shapes]
        nearest.append(sorted(points, key=lambda pair: _difference(pair[0], origin))[:_PROMISING])
    best, chosen, apart = math.inf, [shapes[0] for shapes in candidates], math.inf
    for disproportion, reference, _ in sorted((_disproportion(shape, ideal), point, shape) for point, shape in nearest[0]):
        if _PULL * disproportion >= best:
            break
        pairs = [min((_difference(point, reference), i) for i, (point, _) in enumerate(near)) for near in nearest]
        cost = _PULL * disproportion + sum(difference for difference, _ in pairs)
        if cost < best:
            picks = [near[i] for near, (_, i) in zip(nearest, pairs, strict=True)]
            best, chosen = cost, [shape for _, shape in picks]
            apart = sum(abs(point[k] - reference[k]) for point, _ in picks for k in (0, 1))
    return apart, chosen


def _disproportion(shape: Shape, ideal: Shape) -> float:
    """How far the first model is from the wanted proportions: squares, because a little does no harm and a lot much."""
    width = math.log(shape.hidden_size / ideal.hidden_size)
    mixer = math.log(shape.num_heads * shape.head_dim / (ideal.num_heads * ideal.head_dim))
    mlp = math.log(shape.intermediate_size / ideal.intermediate_size)
    return width**2 + mixer**2 + mlp**2


def _coordinates(shape: Shape, n: int, rule: Rule) -> tuple[float, float, float, float]:
    """Coordinates in which the models of a set are compared, as weighted logarithms without the knob, then the deviation.

    If heads or head_dim are the knob, heads are compared by what they cost, heads x head_dim x (1 + n_h), else as they are.
    """
    width, mlp = 4 * math.log(shape.hidden_size), math.log(shape.intermediate_size)
    if rule.by in ("heads", "head_dim"):
        return width, mlp, math.log(shape.num_heads * shape.head_dim * (1 + n)) / 2, shape.deviation
    heads = 4 * math.log(shape.num_heads)
    return (mlp if rule.by == "hidden_size" else width), heads, 0.0, shape.deviation


def _difference(point: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> float:
    """How much two models differ beside the knob: absolute values, as equal is best; less deviation decides between equals."""
    return abs(point[0] - other[0]) + abs(point[1] - other[1]) + abs(point[2] - other[2]) + abs(point[3])
