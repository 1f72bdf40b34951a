"""The theory as executable checks: models constructed to solve word problems, and the spectra of their transitions.

Each construction reads random words in float64 and float32 and may not be wrong at a single token; each spectral fact is
measured on random draws. The tables show what this run measured; the exit code is 1 if anything is not as the theory
says. The constructions are explained in `constructions.py`, the facts in `spectra.py`; nothing is trained.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import astuple
from typing import TYPE_CHECKING

from titan_dp.config.arguments import natural, positive
from titan_dp.output import number_table, print_table, progress

if TYPE_CHECKING:
    from titan_dp import config
    from titan_dp.data.synthetic.groups import Group
    from titan_dp.model.transformer import Transformer

# A function of `constructions.py`, and the groups it is run for.
GROUPS = {
    "swaps": ("S3", "S4", "S5"),
    "rotations": ("S4", "A5"),
    "mirrors": ("Z3", "Z5", "Z7", "Z60", "D3", "D4", "D5", "D8"),
    "parity": ("Z2",),
}
CONSTRUCTIONS = {f"{group}-{kind}": (kind, group) for kind, groups in GROUPS.items() for group in groups}
LEAST_STEPS = {"Z2": 1, "S3": 2, "S4": 2, "A5": 2, "S5": 4}
"""Smallest n_h with which one layer can track the group. S3, S4 and A5 are rotations of three dimensions, which two reflections
make (Siems et al. 2025, section 4); S5 is not, and one layer takes four (arXiv 2609.24797, theorem 22)."""
ALSO_RECURRENT = ("S3-swaps",)
"""Run token by token too, as the recurrence is defined; the others by chunks only, which is many times faster."""
DRAWS = 50_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=positive, default=4096, help="random elements after BOS (default %(default)s)")
    parser.add_argument("--seed", type=natural, default=0, help="of the words and draws (default %(default)s)")
    parser.add_argument(
        "--construction",
        choices=list(CONSTRUCTIONS),
        metavar="NAME",
        help=f"run only this one, and no spectra: {', '.join(CONSTRUCTIONS)}",
    )


def run(args: argparse.Namespace) -> int:
    """Print the tables; 0 if everything is as the theory says, else 1."""
    import numpy as np

    from titan_dp.studies.state_tracking.spectra import measure_all

    chosen = [args.construction] if args.construction else list(CONSTRUCTIONS)
    with progress("constructions", len(chosen)) as state:
        checks = [check for name in state.each(chosen) for check in run_construction(name, args.tokens, args.seed)]
    with progress("facts about spectra") as state:
        spectra = () if args.construction else measure_all(np.random.default_rng(args.seed), DRAWS)
        facts = [astuple(fact) for fact in state.each(spectra)]
    names = ["construction", "group", "layers", "n_h", "dtype", "backend", "tokens", "errors", "solved"]
    _print("Constructed weights on random words", names, checks)
    if facts:
        names = ["fact", "value", "draws", "found", "theory", "holds"]
        _print("Spectra of random transitions", names, facts)
    held = [bool(row[-1]) for row in (*checks, *facts)]
    failed = held.count(False)
    print(f"{failed} of {len(held)} checks failed" if failed else f"all {len(held)} checks are as the theory says")
    return 1 if failed else 0


def expected(task: config.StateTracking, c: config.Model) -> str:
    """Whether weights of model `c` can solve `task` at every length: "yes", "no", "open", or "" for what is not treated here.

    One layer with eigenvalues in [0, 1] cannot: a product of such factors has eigenvalues 1 or smaller ones, so no power of it
    is the identity except its own (Grazzi et al. 2025, theorem 1). One reflection per token and two layers are enough for
    dihedral groups, such as S3, and four for every S_n and its subgroups (Siems et al. 2025, theorems 1 and 6).
    """
    least = LEAST_STEPS.get(task.task)
    if least is None or task.tokens_per_element > 1 or task.max_moved or c.mixer != "deltaproduct" or c.attention_layers:
        return ""
    if c.num_hidden_layers == 1:
        return "yes" if c.allow_neg_eigval and c.num_householder >= least else "no"
    if not c.allow_neg_eigval:
        return "open"
    enough = 3 if c.num_householder > 1 else 2 if task.task in ("Z2", "S3") else 4
    return "yes" if c.num_householder >= least or c.num_hidden_layers >= enough else "open"


def run_construction(name: str, tokens: int, seed: int) -> Iterator[tuple[object, ...]]:
    """`name` of CONSTRUCTIONS on one random word of `tokens` elements: by chunks in both dtypes, ALSO_RECURRENT both ways.

    Rows of the table: construction, group, layers, n_h, dtype, backend, tokens, errors (tokens at which the largest logit was
    not the product so far), and whether there were none.
    """
    import torch

    from titan_dp.data.synthetic.groups import parse_group
    from titan_dp.studies.state_tracking import constructions

    kind, group_name = CONSTRUCTIONS[name]
    group = parse_group(group_name)
    for backend in ("torch", "recurrent") if name in ALSO_RECURRENT else ("torch",):
        model = getattr(constructions, kind)(group, backend)
        layers, n = len(model.blocks), model.blocks[0].attn.n
        for dtype in ("float64", "float32"):  # float64 first, in which the weights are written
            errors = count_errors(model.to(getattr(torch, dtype)), group, tokens, seed)
            yield name, group.name, layers, n, dtype, backend, tokens, errors, errors == 0


def count_errors(model: Transformer, group: Group, tokens: int, seed: int) -> int:
    """At how many of `tokens` random elements of `group` the largest of all logits is not the product so far."""
    import torch

    from titan_dp.data.synthetic.counter_rng import Random
    from titan_dp.data.synthetic.words import WordProblem

    samples = torch.zeros(1, dtype=torch.int64)
    inputs, labels = WordProblem(group).rows(Random(f"theory {seed}"), samples, tokens, tokens)
    with torch.no_grad():
        logits = model(inputs)
    return int(((logits.argmax(-1) != labels) | ~logits.isfinite().all(-1))[:, 1:].sum())


def _print(title: str, names: list[str], rows: list[tuple[object, ...]]) -> None:
    left = [name for name, value in zip(names, rows[0], strict=True) if isinstance(value, str | bool)]
    print_table(number_table(title, names, [map(_text, row) for row in rows], left), details=("group", "draws", "value"))


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}" if isinstance(value, float) else str(value)
