"""`titan-dp coordinate-check`: do activations and their changes keep their size over width, depth and n_h?

    titan-dp coordinate-check --config debug.toml --out coordinates

Models of many shapes take a few steps on one batch of random tokens. Where the parametrisation is right, no number below
depends on the shape: the root mean square of the residual stream, of what mixers and MLPs add to it (times the depth, for each
adds its share), of the state and of the logits, and of how far each of them has moved from its first value (Yang et al. 2022,
arXiv 2203.03466, appendix D.1). A growth is the exponent p of size ~ shape^p, by least squares in logarithms. First logits may
shrink with the width: that of them is not a fault, and it is left out.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titan_dp import config, output
from titan_dp.config.arguments import natural, positive, reader, take_settings
from titan_dp.config.load import load_config
from titan_dp.config.schema import MupBase
from titan_dp.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

FLAT = 0.25
"""The largest growth that is called flat: a factor of 2 over 16 times the width."""
QUANTITIES = ("residual", "mixer", "MLP", "state", "logits")
PARAMETRIZATIONS = ("standard", "mup")


def _numbers(text: str) -> list[int]:
    values = [positive(part) for part in text.split(",")]
    if len(set(values)) < 2:
        raise ValueError
    return sorted(values)


_list = reader(_numbers, "list of at least two different sizes such as 64,128,256")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="NAME", default="debug.toml", help="the base shape and its settings (debug.toml)")
    parser.add_argument("--widths", type=_list, default=[64, 128, 256, 512, 1024], metavar="LIST", help="64,128,256,512,1024")
    parser.add_argument("--depths", type=_list, default=[2, 4, 8, 16], metavar="LIST", help="2,4,8,16")
    parser.add_argument("--num-householder", type=_list, default=[1, 2, 3, 4], metavar="LIST", help="1,2,3,4")
    parser.add_argument("--steps", type=positive, default=5, help="optimizer steps before the second look (5)")
    parser.add_argument("--tokens", type=positive, default=256, help="of the batch, in rows of 64 (256)")
    parser.add_argument("--seed", type=natural, default=0, help="of first values and tokens (0)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write every size and a figure into this folder")
    output.add_format_option(parser)
    take_settings(parser, "settings as for titan-dp train; optimizer.mup_base is the config's own shape unless it is given")


def run(args: argparse.Namespace) -> int:
    if args.out:
        output.check_matplotlib()
    axes = {"width": args.widths, "depth": args.depths, "n_h": args.num_householder}
    total = len(PARAMETRIZATIONS) * sum(map(len, axes.values()))
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    with output.progress("models", total) as done:
        for kind in PARAMETRIZATIONS:
            base = _config(args, kind)
            for axis, values in axes.items():
                rows = [measure(at(base, axis, value), args.steps, args.tokens, args.seed) for value in done.each(values)]
                found[kind, axis] = {name: [row[name] for row in rows] for name in rows[0]}
    for axis, values in axes.items():
        _print_axis(axis, values, {kind: found[kind, axis] for kind in PARAMETRIZATIONS})
    steep = [
        f"{name} over {axis} ({p:+.2f})"
        for axis in axes
        for name, sizes in found["mup", axis].items()
        if abs(p := growth(axes[axis], sizes)) > FLAT and name != "logits"
    ]
    flat = f"flat (between -{FLAT} and {FLAT})"
    output.print_text(
        f"under mup these are not {flat}: {', '.join(steep)}"
        if steep
        else f"under mup everything but the first logits is {flat}"
    )
    if args.out:
        cells = (
            (kind, axis, value, name, sizes[i])
            for (kind, axis), table in found.items()
            for name, sizes in table.items()
            for i, value in enumerate(axes[axis])
        )
        files = args.out / "coordinates.csv", args.out / f"coordinates.{args.format}"
        output.write_csv(files[0], ("parametrization", "axis", "value", "quantity", "root mean square"), cells)
        _draw(files[1], axes, found)
        output.print_written(*files)
    return 0


def _config(args: argparse.Namespace, kind: str) -> config.Config:
    settings = [*args.settings, "--optimizer.parametrization", "standard", "--training.steps", str(args.steps)]
    c = load_config(["--config", args.config, *settings]).config
    given = c.optimizer.mup_base
    own = {name: getattr(given, name) or getattr(c.model, name) for name in MupBase.model_fields}
    optimizer = c.optimizer.model_copy(update={"parametrization": kind, "mup_base": MupBase(**own)})
    return c.model_copy(update={"optimizer": optimizer})


def at(base: config.Config, axis: str, value: int) -> config.Config:
    """`base` with another width (heads and MLP in proportion), depth or n_h. Raises UserError for one that is no model."""
    m = base.model
    ratio = value / m.hidden_size if axis == "width" else 1.0
    change: dict[str, Any] = {"depth": {"num_hidden_layers": value}, "n_h": {"num_householder": value}}.get(axis, {})
    if axis == "width":
        change = {"hidden_size": value, "intermediate_size": round(m.mlp_size * ratio)}
        for key, kind in (("num_heads", "heads"), ("num_key_heads", "key heads")):
            had = getattr(m, key) or 0
            if (heads := had * ratio) != int(heads):
                raise UserError(f"--widths {value}: {had} {kind} at width {m.hidden_size} leave {heads:g}; choose another")
            change[key] = int(heads) or None
    try:
        model = config.Model.model_validate(m.model_dump() | change)
    except ValueError as error:
        raise UserError(f"{axis} {value}: {error}") from error
    return base.model_copy(update={"model": model})


def measure(c: config.Config, steps: int, tokens: int, seed: int) -> dict[str, float]:
    """Root mean squares of QUANTITIES at first ("first residual", ...), then of their change after `steps` steps."""
    import torch

    from titan_dp.model.loss import IGNORE
    from titan_dp.model.parametrization import scales
    from titan_dp.model.transformer import build_model
    from titan_dp.train.optim import build_optimizer

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with device:
        model = build_model(c.model)
    factors = scales(c)
    model.init_weights(seed, {name: scale.init for name, scale in factors.items()})
    optimizers = build_optimizer(model, c.optimizer, factors)
    optimizers.set_lr(1.0)
    often = 1 / torch.arange(1, c.model.vocab_size + 1)  # as words are: Zipf's law
    rows = max(1, tokens // 64)
    ids = torch.multinomial(often, rows * 65, replacement=True, generator=torch.Generator().manual_seed(seed)).view(rows, 65)
    inputs, labels = ids[:, :-1].to(device), ids[:, 1:].to(device)
    assert not bool((labels == IGNORE).any())
    first = _look(model, inputs)
    for _ in range(steps):
        (model(inputs, labels).loss / labels.numel()).backward()
        optimizers.step(torch.zeros((), device=device))
        optimizers.zero_grad()
    last = _look(model, inputs)
    sizes = {name: _rms(first[name]) for name in QUANTITIES}
    sizes |= {f"change of {name}": _rms(last[name] - first[name]) for name in QUANTITIES}
    if not all(map(math.isfinite, sizes.values())):
        raise UserError(f"optimizer.lr = {c.optimizer.lr} is too high for {c.model.family}: its activations are not finite")
    return sizes


def _look(model: Any, inputs: Tensor) -> dict[str, Tensor]:
    """QUANTITIES as they are now: of the last block, what is added times the depth."""
    import torch

    block, depth, seen = model.blocks[-1], len(model.blocks), dict[str, Any]()

    def keep(name: str, factor: int) -> Any:
        def hook(module: nn.Module, inputs: object, result: Tensor) -> None:
            seen[name] = result * factor

        return hook

    hooks = [block.attn.o_proj.register_forward_hook(keep("mixer", depth))]
    hooks.append(block.mlp.down_proj.register_forward_hook(keep("MLP", depth)))
    try:
        with torch.no_grad():
            x, caches = model.embeddings(inputs), []
            for each in model.blocks:
                x, cache = each.step(x, None)
                caches.append(cache)
            state = getattr(caches[-1], "state", None)
            logits = model.norm.apply_to(x) @ model.output_weight.T
    finally:
        for handle in hooks:
            handle.remove()
    return seen | {
        "residual": torch.nn.functional.rms_norm(x, x.shape[-1:]),
        "logits": logits,
        "state": x.new_zeros(1) if state is None else state,
    }


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def growth(values: list[int], sizes: list[float]) -> float:
    """p of size ~ value^p; 0 of what is 0 everywhere."""
    if not all(size > 0 for size in sizes):
        return 0.0
    x, y = [math.log(v) for v in values], [math.log(s) for s in sizes]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def _print_axis(axis: str, values: list[int], tables: dict[str, dict[str, list[float]]]) -> None:
    columns = ["root mean square", *map(str, values), "growth", "standard"]
    rows = []
    for name, sizes in tables["mup"].items():
        growths = (f"{growth(values, table):+.2f}" for table in (sizes, tables["standard"][name]))
        rows.append([name, *(f"{size:.2g}" for size in sizes), *growths])
    output.print_table(output.number_table(f"{axis}, under mup (standard: growth alone)", columns, rows, left=columns[:1]))


def _draw(path: Path, axes: dict[str, list[int]], found: dict[tuple[str, str], dict[str, list[float]]]) -> None:
    figure, panels = output.subplots(len(PARAMETRIZATIONS), len(axes), figsize=(11, 6.5), sharey="row", squeeze=False)
    for y, kind in enumerate(PARAMETRIZATIONS):
        for x, (axis, values) in enumerate(axes.items()):
            panel = panels[y, x]
            for number, name in enumerate(QUANTITIES):
                for prefix, style in (("", "--"), ("change of ", "-")):
                    sizes = found[kind, axis][prefix + name]
                    if all(size > 0 for size in sizes):
                        label = prefix + name if (x, y) == (0, 0) else None
                        panel.plot(values, sizes, style, color=f"C{number}", marker="o", markersize=3, label=label)
            panel.set(xscale="log", yscale="log", xlabel=axis, title=kind if x == 0 else "")
            panel.set_xticks(values, [str(value) for value in values])
            panel.minorticks_off()
        panels[y, 0].set_ylabel("root mean square")
    figure.legend(loc="outside lower center", ncols=len(QUANTITIES))
    output.save_figure(figure, path)
