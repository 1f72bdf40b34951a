"""`titan-dp match`: shapes of equal parameters or FLOPs for several n_h, before anything is trained.

    titan-dp match --params 805M --num-householder 1,2,3,4 --by heads --gated both

shapes.py does the solving; here are the options, and the table people choose from. Everything that is not a shape
(vocabulary, convolution, head_dim if it is not the knob) comes from a config. `--model.KEY VALUE` overrides it, and a shape
setting given that way is kept.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from titan_dp import config
from titan_dp.config.arguments import count, grid, householder_list, percent, take_settings
from titan_dp.config.describe import to_toml
from titan_dp.config.load import SHIPPED, keys_of, load_config
from titan_dp.errors import UserError
from titan_dp.files import short
from titan_dp.model.size import embedding_parameters, model_size, state_size
from titan_dp.output import number_table, print_command, print_table, print_text
from titan_dp.studies.shapes import KNOBS, SHAPE_KEYS, Proportions, Rule, Variant, choose_depth, match_shapes

_DETAILS = ("recurrence", "matmul", "without embedding", "exactly", "GiB to train", "state per layer")
"""Columns that a terminal may leave out, the first of them first."""
LARGEST = 10**13
"""Parameters, or FLOPs per token. Every depth is tried, and this takes half a minute."""
PAPER_SIZES = ("213m", "392m", "800m")
PAPER = [f"{size}{partner}" for size in PAPER_SIZES for partner in ("_nh1", "", "_nh3")]
"""The configs of the paper's nine language models, n_h = 1, 2, 3 of each size."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--params", type=count, metavar="N", help="parameters of every model, embedding included: 805M, 1.3B")
    what.add_argument("--flops", type=count, metavar="N", help="model FLOPs per token, forward and backward: 5G")
    what.add_argument("--preset", choices=["paper"], help="the paper's nine language models as they were trained")
    parser.add_argument(
        "--num-householder", type=householder_list, default=[1, 2, 3], metavar="LIST", help="n_h of the models (default: 1,2,3)"
    )
    parser.add_argument("--by", choices=list(KNOBS), default="heads", help="what makes up for n_h (default: heads)")
    parser.add_argument("--gated", choices=["no", "yes", "both"], default="no", help="with a forget gate (default: no)")
    parser.add_argument(
        "--multiple",
        type=grid,
        default=64,
        metavar="N",
        help="grid of width, MLP and heads x head_dim (default: 64)",
    )
    parser.add_argument(
        "--tolerance",
        type=percent,
        metavar="PERCENT",
        help="largest deviation (default: 0.1 where the grid allows, else 0.25)",
    )
    parser.add_argument(
        "--config",
        metavar="NAME",
        help="config with the proportions and all that is not a shape; its depth is kept (default: the paper's, of any depth)",
    )
    about = "settings of the model as for train.py (--model.vocab_size 50304); a shape given so (--model.head_dim 64) is kept"
    take_settings(parser, about)


def run(args: argparse.Namespace) -> int:
    gates = {"no": [False], "yes": [True], "both": [False, True]}[args.gated]
    if args.preset:
        others = {"--by": args.by != "heads", "--multiple": args.multiple != 64, "--config": args.config is not None}
        others |= {"--num-householder": args.num_householder != [1, 2, 3], "--tolerance": args.tolerance is not None}
        others |= dict.fromkeys((f"--{key}" for key in keys_of(args.settings)), True)
        if given := [option for option, is_given in others.items() if is_given]:
            raise UserError(f"--preset paper shows the models as they are, so {given[0]} has no effect; remove it")
        loaded = [
            load_config(["--config", f"paper/{name}.toml", f"--model.use_forget_gate={str(gate).lower()}"])
            for name in PAPER
            for gate in gates
        ]
        models = [each.config.model for each in loaded]
        smallest = [models[i // (3 * len(gates)) * 3 * len(gates)] for i in range(len(models))]
        targets = [model_size(model, 4096).parameters for model in smallest]
        _print_table("the paper's language models", models, targets, "parameters", loaded[0].config.training.seq_len)
        print_text("train one with titan-dp train --config paper/800m.toml, or 213m, 392m; _nh1 and _nh3 name the others")
        return 0
    models, seq_len = solve(args, gates)
    quantity = "parameters" if args.params else "flops"
    wanted = f"{short(args.params)} parameters" if args.params else f"{short(args.flops)} FLOPs per token"
    _print_table(f"models of {wanted}", models, [args.params or args.flops] * len(models), quantity, seq_len)
    _print_differences(models, args.by)
    _print_settings(models)
    return 0


def solve(args: argparse.Namespace, gates: list[bool]) -> tuple[list[config.Model], int]:
    """The matched models of the command line and the sequence length their FLOPs are counted at. Raises UserError."""
    if (args.params or args.flops) > LARGEST:
        what = "--params" if args.params else "--flops"
        raise UserError(f"{what} {short(args.params or args.flops)}: models of at most {short(LARGEST)} are sought; give less")
    given = keys_of(args.settings)
    if other := next((key for key in given if not key.startswith("model.")), None):
        raise UserError(f"--{other} does not change a model's shape; give settings of [model] only")
    name = args.config or str(SHIPPED / "base" / "paper.toml")
    # A length is of no concern here.
    overrides = [*args.settings, f"--model.num_householder={args.num_householder[0]}", "--training.steps=1"]
    # Proportions are those of the config; what is given beside it is kept, or concerns no shape.
    loaded = load_config(["--config", name, *overrides]).config
    if clash := set(given) & {"model.num_householder", "model.use_forget_gate"}:
        raise UserError(f"--{min(clash)} sets what is compared; use --num-householder and --gated")
    if loaded.model.mixer == "gla" and args.num_householder != [1]:
        raise UserError("a model with mixer = 'gla' takes one step per token: give --num-householder 1")
    pinned = frozenset(key for key in SHAPE_KEYS if f"model.{key}" in given)
    rule = Rule(args.by, "parameters" if args.params else "flops", args.multiple, args.tolerance)
    target, seq_len = args.params or args.flops, loaded.training.seq_len
    proportions = load_config(["--config", name, "--training.steps", "1"]).config.model
    like = Proportions.of(proportions)

    def at(base: Variant) -> list[config.Model]:
        changes = [{"num_householder": n, "use_forget_gate": gated} for n in args.num_householder for gated in gates]
        variants = [Variant(base.model.model_copy(update=change), pinned) for change in changes]
        return match_shapes(variants, target, like, rule, seq_len)

    base = Variant(loaded.model, pinned)
    if args.config is not None or "num_hidden_layers" in pinned:
        return at(base), seq_len
    return _at_some_depth(at, choose_depth(base, target, like, rule, seq_len)), seq_len


def _at_some_depth(solved: Callable[[Variant], list[config.Model]], base: Variant) -> list[config.Model]:
    """`solved` at the base's depth, or if that has no solution at one or two layers less or more."""
    first: UserError | None = None
    for more in (0, -1, 1, -2, 2):
        layers = base.model.num_hidden_layers + more
        if layers > 0:
            try:
                return solved(base.deep(layers))
            except UserError as error:
                first = first or error
    assert first is not None
    raise first


def _print_table(title: str, models: Sequence[config.Model], targets: Sequence[int], quantity: str, seq_len: int) -> None:
    rows, sizes = [], [model_size(model, seq_len) for model in models]
    prefix, unit = ("G", 1e9) if max(size.flops_per_token for size in sizes) >= 1e9 else ("M", 1e6)
    for model, size, target in zip(models, sizes, targets, strict=True):
        reached = size.parameters if quantity == "parameters" else size.flops_per_token
        row = {
            "model": model.family,
            "layers": model.num_hidden_layers,
            "width": model.hidden_size,
            "heads": model.heads,
            "MLP": model.mlp_size,
            "params": short(size.parameters),
            "off": f"{reached / target - 1:+.2%}",
            f"{prefix}FLOPs per token": f"{size.flops_per_token / unit:#.4g}",
            "state per layer": short(state_size(model)),
            "GiB to train": f"{16 * size.parameters / 2**30:.3g}",
            "exactly": f"{size.parameters:,}",
            "without embedding": f"{size.parameters - embedding_parameters(model):,}",
            "matmul": f"{size.matmul / unit:#.4g}",
            "recurrence": f"{size.recurrence / unit:.3g}",
        }
        rows.append(row)
    print_table(number_table(title, list(rows[0]), [row.values() for row in rows], left=["model"]), details=_DETAILS)
    print_text(
        "FLOPs are the model's, forward and backward. A state is one sequence's, in numbers. To train takes 16 bytes per "
        "parameter (weight, gradient and AdamW in float32, unsharded) and activations.",
        "",
    )


def _print_differences(models: Sequence[config.Model], by: str) -> None:
    """Say so if the models differ in more than the knob."""
    shared = {"width": "hidden_size", "MLP": "intermediate_size"}
    shared |= {} if by in ("heads", "head_dim") else {"heads": "num_heads"}
    ranges = []
    for name, key in shared.items():
        values = sorted({getattr(model, key) for model in models})
        if key != KNOBS[by] and len(values) > 1:
            ranges.append(f"{name} {values[0]} to {values[-1]}")
    if ranges:
        differing = f"they differ in more than {by}: {', '.join(ranges)}"
        print_text(f"{differing}; another size, a smaller --multiple or a larger --tolerance may find models that do not", "")


def _print_settings(models: Sequence[config.Model]) -> None:
    """The settings of each model as `titan-dp train` takes them."""
    print_text("train one with titan-dp train --config ... and its settings:")
    for model in models:
        values = {key: getattr(model, key) for key in (*SHAPE_KEYS, "num_householder", "use_forget_gate")}
        print_text(f"  {model.family}")
        print_command(" ".join(f"--model.{key} {to_toml(value)}" for key, value in values.items()), indent=4)
