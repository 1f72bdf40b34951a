"""`titan-dp state-tracking inspect RUN`: what a trained model does with a group's elements, in numbers and figures.

For each head: the step sizes (reflections have beta = 2, unused steps 0); how many dimensions the keys of the steps taken
span; and the orbit of the state over random words, which falls into one cluster per element if the head tracks the group,
with how far these clusters are from an orbit under an orthogonal representation. A model that has learnt S4 as the rotations of
a cube has keys in three dimensions with beta near 2 (Siems et al. 2025, section 5.1). Beside it stands how many words are right
up to four times the training length, as trained and with every reflection made exact. Writes inspect.json and a figure per
layer, layer-N.png.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titan_dp.config.arguments import positive
from titan_dp.errors import UserError, counted
from titan_dp.files import check_own, make_folder, write_json
from titan_dp.output import (
    add_format_option,
    check_matplotlib,
    number_table,
    print_table,
    print_text,
    save_figure,
    subplots,
    thousands,
)
from titan_dp.train.run_folder import run_of

if TYPE_CHECKING:
    import numpy as np
    import torch

    from titan_dp.data.synthetic.groups import Group
    from titan_dp.data.synthetic.words import WordProblem
    from titan_dp.model.transformer import Transformer

_SHOWN_HEADS = 4
_NAMED_ELEMENTS = 24


@dataclass(frozen=True)
class Trace:
    """One layer over words [B, L], BOS left out, on the CPU in float32."""

    beta: torch.Tensor  # [B, L, n, H]
    k: torch.Tensor  # [B, L, n, H, dk]
    states: torch.Tensor  # [B, L, H, dk, dv], after each element
    products: torch.Tensor  # [B, L] int64: the running product, what the state should tell

    @cached_property
    def main_columns(self) -> list[np.ndarray]:
        """[B L, dk] for each head: what its states hold of the value that varies most, in float64."""
        return [_main_column(states) for states in self.states.unbind(2)]


@dataclass(frozen=True)
class Head:
    """What one head does."""

    layer: int
    head: int
    steps_near_2: float
    """Fraction of the steps with beta > 1.9: reflections."""
    steps_near_0: float
    """Fraction with beta < 0.1: steps not taken."""
    key_variance: list[float]
    """Fraction of the keys' second moment, weighted by beta, in their first 1, 2, ... principal components; empty if every
    beta is 0."""
    state_within: float
    """Variance of the state within the words of equal product, as a fraction of all: 0 if it tells the element alone, 1 if it
    tells nothing."""
    state_dimensions: int
    """Principal components that hold 95 % of the variance of the main columns, a mean per element; 0 if one did not come up."""
    state_places: int
    """Different places among these means: fewer than elements if some elements have one, as the five that keep a corner of the
    icosahedron."""
    representation_error: float | None
    """How far these components are from an orthogonal representation, see `representation_error`; None if there are none."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="RUN", help="run folder or checkpoint of a word problem")
    parser.add_argument("--length", type=positive, help="elements per word (default: as in training)")
    parser.add_argument("--words", type=positive, default=128, help="words (default: 128)")
    parser.add_argument("--out", type=Path, help="where to write (default: inspect/ in the run folder)")
    add_format_option(parser)


def run(args: argparse.Namespace) -> int:
    import torch

    from titan_dp.data.synthetic.loader import build_problem
    from titan_dp.data.synthetic.words import WordProblem
    from titan_dp.inference.pretrained import load_model
    from titan_dp.inference.sources import CheckpointSource

    check_matplotlib()
    if not args.path.exists():
        raise UserError(f"{args.path} does not exist; give the folder of a run of `titan-dp state-tracking train`")
    source = CheckpointSource(args.path)
    c = source.training_config
    problem = build_problem(c.state_tracking) if c.data.source == "state_tracking" else None
    if not isinstance(problem, WordProblem):
        raise UserError(f"{args.path} was not trained on a group's word problem; name a run that was")
    out = args.out or (run_of(args.path) or args.path) / "inspect"
    figures = [f"layer-{i}.{args.format}" for i in range(c.model.num_hidden_layers)]
    check_own(out, "inspect.json", {"task", "run", "heads"}, figures)
    length = args.length or (c.training.seq_len - 1) // problem.tokens_per_element
    model = load_model(source, torch.device("cpu"))
    traces = trace(model, problem, args.words, length)
    if not traces:
        raise UserError(f"{args.path} has no DeltaProduct layer to look into; name a run of one that has")
    heads = [describe(layer, head, t, problem.group) for layer, t in traces.items() for head in range(t.beta.shape[-1])]
    right = words_right(model, problem, length)
    _print(heads, right, length, problem.name)
    make_folder(out)
    facts = {"task": problem.name, "run": source.label, "words_right": right, "heads": [asdict(head) for head in heads]}
    write_json(out / "inspect.json", facts)
    for layer, t in traces.items():
        _draw(layer, t, [head for head in heads if head.layer == layer], problem.group, out / figures[layer])
    print_text(f"written: {out}")
    return 0


def trace(model: Transformer, problem: WordProblem, words: int, length: int) -> dict[int, Trace]:
    """Every DeltaProduct layer over random words, by the index of its block."""
    import torch

    from titan_dp.data.batch import IGNORE
    from titan_dp.data.synthetic.counter_rng import Random
    from titan_dp.model.deltaproduct import DeltaProduct
    from titan_dp.model.loss import check_finite
    from titan_dp.model.replay import replay

    tokens, labels = problem.rows(Random("inspect"), torch.arange(words), length, length)
    asked = (labels[0] != IGNORE).nonzero().flatten()  # BOS and fillers are left out
    x, traces = model.embeddings(tokens), {}
    for i, block in enumerate(model.blocks):
        if isinstance(block.attn, DeltaProduct):
            inputs = block.attn.recurrence_inputs(block.attn_norm.apply_to(x), None)
            states = replay(inputs, block.attn.erase, asked.tolist())[0][:, :, 0]
            check_finite(states, f"the states of layer {i}")
            traces[i] = Trace(inputs.beta[:, asked], inputs.k[:, asked], states, labels[:, asked])
        x, _ = block(x)
    return traces


def words_right(model: Transformer, problem: WordProblem, length: int) -> dict[str, list[float]]:
    """The share of 256 words with no wrong answer up to 1, 2, 3 and 4 times `length`, computed in three ways.

    As trained, in float32 and in float64, which tells rounding from what was learnt; and in float64 with every beta that is
    within a tenth of its range of an end moved there, so that these steps are exact reflections or none.
    """
    import torch

    from titan_dp.data.synthetic.counter_rng import Random
    from titan_dp.model.deltaproduct import DeltaProduct

    tokens, labels = problem.rows(Random("inspect words"), torch.arange(256), 4 * length, 4 * length)
    each, dtype = problem.tokens_per_element, model.embeddings.weight.dtype

    def accuracies() -> list[float]:
        right = (model(tokens).argmax(-1) == labels)[:, each::each]
        return [right[:, : times * length].all(1).double().mean().item() for times in (1, 2, 3, 4)]

    found = {"as trained": accuracies()}
    model.double()
    found["in float64"] = accuracies()
    exact = [
        block.attn.b_proj.register_forward_hook(
            lambda _, __, logits: logits.where((logits.sigmoid() - 0.5).abs() < 0.4, 50 * logits)
        )
        for block in model.blocks
        if isinstance(block.attn, DeltaProduct)
    ]
    found["exact steps"] = accuracies()
    for hook in exact:
        hook.remove()
    model.to(dtype)
    return found


def describe(layer: int, head: int, t: Trace, group: Group) -> Head:
    """The numbers of one head."""
    import numpy as np

    beta, keys = t.beta[..., head], (t.k * t.beta[..., None].sqrt())[..., head, :].flatten(0, 2).numpy()
    moments = np.linalg.svd(keys, compute_uv=False) ** 2  # a key and its negative are one reflection: no mean is taken off
    states, products = t.states[:, :, head].flatten(2).flatten(0, 1).double().numpy(), t.products.flatten().numpy()
    seen = np.unique(products)
    within = sum(((states[products == y] - states[products == y].mean(0)) ** 2).sum() for y in seen)
    total = ((states - states.mean(0)) ** 2).sum()
    dimensions, places, error = 0, 0, None
    if total and len(seen) == group.order:
        reads = t.main_columns[head]
        means = np.stack([reads[products == y].mean(0) for y in seen])
        dimensions, error = representation_error(means, group)
        places = count_places(_components(means, centred=True)[:, :dimensions])
    return Head(
        layer=layer,
        head=head,
        steps_near_2=float((beta > 1.9).float().mean()),
        steps_near_0=float((beta < 0.1).float().mean()),
        key_variance=(moments.cumsum() / moments.sum()).tolist() if moments.sum() else [],
        state_within=float(within / total) if total else 1.0,
        state_dimensions=dimensions,
        state_places=places,
        representation_error=error,
    )


def _main_column(states: torch.Tensor) -> np.ndarray:
    """Of one head, whose states are [B, L, dk, dv]."""
    import numpy as np

    flat = states.double().flatten(0, 1).numpy()
    _, _, values = np.linalg.svd((flat - flat.mean(0)).reshape(-1, flat.shape[-1]), full_matrices=False)
    return flat @ values[0]


def representation_error(means: np.ndarray, group: Group) -> tuple[int, float]:
    """The dimension d of what `means` [order, D] span, and how far it is from an orthogonal representation of `group`.

    d principal components hold 95 % of the means' variance. If the means are an orbit, m_(ab) = R_a m_b for orthogonal R_a in
    some basis, then reading a first, whatever a is, only permutes the rows of the components' basis [order, d] within its
    span. The error is the root mean square of the sines of the angles between that span and its image, over all a: 0 for an
    orbit, near 1 for clusters that have nothing to do with the group.
    """
    import numpy as np

    basis, values, _ = np.linalg.svd(means - means.mean(0), full_matrices=False)
    d = 1 + int((np.cumsum(values**2) < 0.95 * (values**2).sum()).sum())
    basis = basis[:, :d]
    cosines = np.einsum("agd,ge->ade", basis[group.table], basis)  # [order, d, d]: row g of the image is that of a g
    return d, float(np.sqrt(max(0.0, 1 - (cosines**2).sum((1, 2)).mean() / d)))


def count_places(means: np.ndarray) -> int:
    """How many different places `means` [order, D] have. Neighbours nearer than 0.3 of the mean radius are in one."""
    import numpy as np
    from scipy.sparse.csgraph import connected_components

    radius = np.linalg.norm(means - means.mean(0), axis=1).mean()
    return int(connected_components(np.linalg.norm(means[:, None] - means, axis=-1) < 0.3 * radius)[0])


def _print(heads: list[Head], right: dict[str, list[float]], length: int, task: str) -> None:
    columns = (
        "layer",
        "head",
        "beta > 1.9",
        "beta < 0.1",
        "keys in 1, 2, 3, 4 dimensions",
        "state within",
        "state dims",
        "places",
        "not a rep.",
    )
    rows = []
    for head in sorted(heads, key=lambda head: (head.layer, head.state_within)):
        variance = ", ".join(f"{share:.0%}" for share in head.key_variance[:4])
        steps = (f"{head.steps_near_2:.0%}", f"{head.steps_near_0:.0%}")
        error = "" if head.representation_error is None else f"{head.representation_error:.2f}"
        found = (head.state_dimensions or "", head.state_places or "", error)
        rows.append((head.layer, head.head, *steps, variance, f"{head.state_within:.1%}", *found))
    print_table(number_table(f"{task}: what each head does", columns, rows, left=columns[4:5]))
    names = ["words right", *(f"at {times * length}" for times in (1, 2, 3, 4))]
    shares = [(what, *(f"{share:.1%}" for share in at)) for what, at in right.items()]
    print_table(number_table("", names, shares, left=names[:1]))
    print_text(
        "exact steps: every beta near 2 or 0 set to it",
        "state within: variance of states with one right answer, as a share of all; state dims: principal components of the "
        "answers' mean states; places: how many of these differ; not a rep.: their distance from an orthogonal representation, "
        "0 to 1",
    )


def _draw(layer: int, t: Trace, heads: list[Head], group: Group, path: Path) -> None:
    """A row for each of the heads whose states tell most: step sizes, keys and states in their first principal components.

    States are coloured by the product, and drawn in space if they fill it.
    """
    import matplotlib
    import numpy as np

    shown = sorted(heads, key=lambda head: head.state_within)[:_SHOWN_HEADS]
    figure, rows = subplots(len(shown), 3, figsize=(8.5, 1.4 + 2.5 * len(shown)), squeeze=False)
    small: dict[str, Any] = {"fontsize": "small", "loc": "left"}
    products = t.products.flatten().numpy()
    palette = matplotlib.colormaps["tab10" if group.order <= 10 else "turbo"]
    of_element = palette(np.arange(group.order)) if group.order <= 10 else palette(np.linspace(0, 1, group.order))
    for row, head in zip(rows, shown, strict=True):
        if head.state_dimensions > 2:
            place = row[2].get_subplotspec()
            row[2].remove()
            row[2] = figure.add_subplot(place, projection="3d")
        (steps, keys, orbit), h = row, head.head
        for j in range(t.beta.shape[2]):
            style: dict[str, Any] = {"histtype": "step" if j else "stepfilled", "alpha": 1 if j else 0.45, "lw": 1.6}
            steps.hist(
                t.beta[:, :, j, h].flatten().numpy(), bins=40, range=(0, 2), **style, color=f"C{j}", label=f"step {j + 1}"
            )
        steps.set(ylabel=f"head {h}\nelements read", xlim=(0, 2))
        steps.set_ylim(top=1.2 * steps.get_ylim()[1])  # room for the legend
        thousands(steps.yaxis)
        near = f"{100 * head.steps_near_2:.0f} % above 1.9, {100 * head.steps_near_0:.0f} % below 0.1"
        steps.set_title(f"sizes of the steps:\n{near}", **small)
        taken = t.k[:, :, :, h][t.beta[..., h] > 0.1].numpy()
        if len(taken):
            keys.scatter(*_components(taken, centred=False).T[:2], s=14, color="0.25", alpha=0.3, lw=0)
        dimensions = next((i for i, share in enumerate(head.key_variance, 1) if share > 0.95), 0)
        keys.set(ylabel="component 2", xlim=(-1.08, 1.08), ylim=(-1.08, 1.08), xticks=(-1, 0, 1), yticks=(-1, 0, 1))
        keys.set_title(f"second moment of the keys:\n95 % in {counted(dimensions, 'dimension')}", **small)
        states = _components(t.main_columns[h], centred=True)
        if head.state_dimensions > 2:
            orbit.scatter(*states.T[:3], c=of_element[products], s=5, lw=0, depthshade=False)
            orbit.set(zticklabels=[], xticklabels=[], yticklabels=[], box_aspect=(1, 1, 1))
        else:
            orbit.scatter(*states.T[:2], c=of_element[products], s=7, lw=0)
            orbit.set(ylabel="component 2")
            orbit.margins(0.08)
        far = "" if head.representation_error is None else f"; {head.representation_error:.2f} from an orbit"
        where = f"{head.state_places or 'some'} places in {counted(head.state_dimensions, 'dimension')}"
        orbit.set_title(f"states: {where}\n{100 * head.state_within:.1f} % within{far}", **small)
    labels = ("step size beta", "component 1 of the keys", "component 1 of the states")
    for panel, label in zip(rows[-1], labels, strict=True):
        if panel.name != "3d":
            panel.set_xlabel(label)
    rows[0, 0].legend(fontsize="x-small", frameon=False, loc="upper left", ncols=4)
    many = f", the {len(shown)} of {len(heads)} heads that tell most" if len(heads) > len(shown) else ""
    figure.suptitle(f"{group.name}, layer {layer}{many}: steps, keys, and states coloured by the right answer")
    answer = "right answer: the product of the elements read"
    if group.order <= _NAMED_ELEMENTS:
        dots = [orbit.plot([], [], "o", color=c, ms=5, label=_element(group, i))[0] for i, c in enumerate(of_element)]
        style = {"fontsize": "small", "title_fontsize": "small", "frameon": False, "columnspacing": 1, "handletextpad": 0}
        figure.legend(handles=dots, loc="outside lower center", ncols=min(group.order, 8), title=answer, **style)
    else:
        scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, group.order - 1), palette)
        figure.colorbar(scale, ax=rows, location="bottom", label=f"{answer} (its number)", aspect=60)
    save_figure(figure, path)


def _element(group: Group, number: int) -> str:
    """An element as its cycles, (0 1)(2 3), if it moves few points, otherwise as its number; the identity is e."""
    if number == 0 or group.points > 5:
        return str(number or "e")
    to, cycles, left = group.permutations[number].tolist(), "", set(range(group.points))
    while left:
        cycle = [min(left)]
        while (after := to[cycle[-1]]) != cycle[0]:
            cycle.append(after)
        left -= set(cycle)
        cycles += f"({' '.join(map(str, cycle))})" if len(cycle) > 1 else ""
    return cycles


def _components(x: np.ndarray, centred: bool) -> np.ndarray:
    """x [N, d] in the directions of its largest (second) moments, at least three columns."""
    import numpy as np

    x = x - x.mean(0) if centred else x
    _, _, directions = np.linalg.svd(x, full_matrices=False)
    projected = x @ directions.T
    return np.pad(projected, ((0, 0), (0, max(0, 3 - projected.shape[1]))))
