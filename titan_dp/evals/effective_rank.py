"""How much of each head's recurrent state is used, token by token: effective rank, norm, step sizes and decay.

The effective rank of a state S is exp(-sum p ln p), where p are its singular values over their sum (Roy and Vetterli 2007):
1 for rank one, min(dk, dv) if all are equal. The text is the first documents joined, and no state is reset between them,
because the question is whether a head forgets at a document's start (Siems et al. 2025, arXiv 2502.10297, section on
effective rank).

The text goes through the model in segments with the cache carried. Within a segment the recurrence of every layer is replayed
as it is defined, in float32, from the state that the model carried into it. The replay should end in the state that the model
carries out; the largest difference is reported. Looked at are the states after a token's last Householder step or, with
--micro-steps, after each step. (The paper looks *before* each step: the same states, one step later.) Softmax layers have no
state and are skipped. Every rank runs the whole model and looks at its share of the heads.

Means are over the positions on the --every grid and over the states after a token's last step. The CSV has every number. A
figure by position shows, for neighbouring tokens, their mean as a line and their lowest and highest value as a band, so that
a state wiped at one token is still seen; for many heads and layers only the means, as colours. Figures of a finished result are
drawn from its CSV if they are not there.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from titan_dp.config.arguments import positive
from titan_dp.errors import UserError, counted
from titan_dp.evals.session import Arrays, Result, Session, add_common_arguments, run_evaluation
from titan_dp.evals.texts import Texts, add_text_arguments, open_texts
from titan_dp.output import (
    add_format_option,
    check_matplotlib,
    number_table,
    print_table,
    print_text,
    print_written,
    progress,
    save_figure,
    subplots,
    thousands,
    write_csv,
)

if TYPE_CHECKING:
    from torch import Tensor

    from titan_dp.model.deltaproduct import DeltaProduct, RecurrenceInputs
    from titan_dp.model.transformer import Transformer

# Singular value decompositions that a run takes without being asked, times dk dv min(dk, dv): ten minutes of one CPU core at
# dk = dv = 128, where one takes 0.7 ms.
_CHEAP = 2e12
_FIGURES = ("", "-norm", "-steps")
_STRETCHES = 250  # most points of a line in a figure
_PALETTE = ("#0072B2", "#E69F00", "#56B4E9", "#CC79A7", "#000000", "#8C6D31")  # no red: that marks positions
_MARKS = "#D62728"
_ROWS, _COLUMNS = 8, 6  # most panels of a figure that has one per head and layer


@dataclass(frozen=True)
class Look:
    """What is looked at."""

    ids: np.ndarray
    """[T] int64."""
    starts: list[int]
    """Positions of the documents' first tokens."""
    every: int
    layers: dict[int, DeltaProduct]
    """The mixers that have a state, by the index of their block."""
    micro_steps: bool
    trained: int
    """Tokens per sequence in training."""

    @property
    def positions(self) -> np.ndarray:
        """[P] int64, rising: every so many tokens, and the first token of every document."""
        return np.union1d(np.arange(0, len(self.ids), self.every), np.array(self.starts, dtype=np.int64))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, "")
    add_text_arguments(parser)
    parser.add_argument("--max-length", type=positive, default=16384, help="most tokens to read (default: 16384)")
    every = "look at every N-th token, and at documents' first ones (default: 1, more if costly)"
    parser.add_argument("--every", type=positive, metavar="N", help=every)
    parser.add_argument("--micro-steps", action="store_true", help="look after each Householder step, not only a token's last")
    parser.add_argument("--segment", type=positive, default=256, help="tokens at once; memory grows with it (default: 256)")
    add_format_option(parser)


def run(args: argparse.Namespace) -> int:
    return run_evaluation(evaluate, args)


def evaluate(s: Session) -> Result:
    """Measure, write JSON and CSV files and figures and print the table; every rank calls it.

    Raises UserError if the model has no recurrent layer or the text no token, RunError if a state is not finite.
    """
    args = s.args
    check_matplotlib()
    pretrained = s.load(args.checkpoint)
    model, trained = pretrained.model, pretrained.source.seq_len
    layers = recurrent_layers(model)
    if not layers:
        raise UserError(f"{args.checkpoint} has no DeltaProduct or GLA layer, whose state is measured; name a model with one")
    texts = open_texts(args, pretrained.tokenizer)
    ids, starts = read(texts, args.max_length)
    look = Look(
        ids, starts, args.every or cheap_interval(len(ids), layers, args.micro_steps), layers, args.micro_steps, trained
    )
    settings = {
        "texts": texts.identity,
        "max_length": args.max_length,
        "every": look.every,
        "micro_steps": args.micro_steps,
        "segment": args.segment,
    }
    endings = [f"{name}.{args.format}" for name in _FIGURES]
    result = Result(s, "effective-rank", pretrained.source, settings, beside=(".csv.gz", *endings))
    figures = [result.beside(ending) for ending in endings]
    if not result.results:
        arrays = measure(s, model, look, result)
        if s.world.is_main:
            _write_csv(look, arrays, result)
            _draw(look, arrays, result, figures)
        result.finish(_summary(look, arrays, len(model.blocks)))
    elif s.world.is_main and not all(figure.exists() for figure in figures):
        if not (table := result.beside(".csv.gz")).exists():
            raise UserError(f"{table} is gone, from which figures are drawn; measure again with --overwrite")
        _draw(look, _read_csv(look, table), result, figures)
    if s.world.is_main:
        _show(result, figures)
    return result


def recurrent_layers(model: Transformer) -> dict[int, DeltaProduct]:
    """The mixers that have a state, by the index of their block."""
    from titan_dp.model.deltaproduct import DeltaProduct

    return {i: block.attn for i, block in enumerate(model.blocks) if isinstance(block.attn, DeltaProduct)}


def read(texts: Texts, max_length: int) -> tuple[np.ndarray, list[int]]:
    """Ids [T] int64 of the first documents joined, T at most `max_length`, and where each of them starts."""
    pieces: list[np.ndarray] = []
    starts: list[int] = []
    length = 0
    for document in texts:
        if length == max_length:
            break
        if len(document.ids):
            starts.append(length)
            pieces.append(document.ids[: max_length - length])
            length += len(pieces[-1])
    if not pieces:
        raise UserError("there is nothing to look at: the text has no tokens; give more of it")
    return np.concatenate(pieces), starts


def cheap_interval(tokens: int, layers: dict[int, DeltaProduct], micro_steps: bool) -> int:
    """The smallest --every that takes minutes; 1 for small models and short texts."""
    each = sum(m.heads * m.dk * m.dv * min(m.dk, m.dv) * (m.n if micro_steps else 1) for m in layers.values())
    return max(1, -(-tokens * each // int(_CHEAP)))


# -- measuring -----------------------------------------------------------------------------------------------------------


def measure(s: Session, model: Transformer, look: Look, result: Result) -> Arrays:
    """What the model's states are like at P positions, for L recurrent layers of H heads and n steps.

    Returns float32 arrays on the CPU, the same on every rank: effective_rank and norm (Frobenius) [L, H, P, m], m = n with
    --micro-steps and 1 without; beta [L, H, P, n]; decay [L, H, P], 1 without a gate; difference and largest [L, H], over all
    segments the largest entry of |replayed - carried state| and of |carried state|.
    """
    import torch

    from titan_dp.distributed import all_reduce_sum

    segment, positions, layers = s.args.segment, look.positions, look.layers
    arrays = result.resume() or _empty(look)
    done = int(arrays.pop("done", 0))
    pieces = torch.from_numpy(look.ids).to(s.world.device)[None].split(segment, 1)
    cache: list[Any] = [None] * len(model.blocks)
    with torch.inference_mode(), progress("segments", len(pieces)) as state:
        for i, piece in enumerate(state.each(pieces)):
            first = i * segment
            low, high = positions.searchsorted([first, first + segment])
            where = (positions[low:high] - first).tolist()
            x = model.embeddings(piece)
            for j, block in enumerate(model.blocks):
                before, seen = cache[j], i >= done and j in layers  # a segment done before is only needed for its cache
                inputs = layers[j].recurrence_inputs(block.attn_norm.apply_to(x), before) if seen else None
                x, cache[j] = block.step(x, before)
                if inputs is not None:
                    row, after = list(layers).index(j), cache[j].state
                    heads = [h for h in range(layers[j].heads) if (row * layers[j].heads + h) % s.world.size == s.world.rank]
                    here = {name: a[row, :, low:high] if a.ndim > 2 else a[row] for name, a in arrays.items()}
                    states = before.state if before else torch.zeros_like(after), after
                    _look(inputs, states, layers[j].erase, heads, where, here, f"layer {j} at token {first}")
            if i >= done:
                result.keep({"done": i + 1, **arrays}, now=i + 1 == len(pieces))
    return {name: all_reduce_sum(torch.from_numpy(a)).numpy() for name, a in arrays.items()}


def _empty(look: Look) -> Arrays:
    mixer = next(iter(look.layers.values()))  # the recurrent layers of a model are alike
    heads = len(look.layers), mixer.heads
    decay = *heads, len(look.positions)
    looks, steps = (*decay, mixer.n if look.micro_steps else 1), (*decay, mixer.n)
    shapes = {"effective_rank": looks, "norm": looks, "beta": steps, "decay": decay, "difference": heads, "largest": heads}
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def _look(
    inputs: RecurrenceInputs,
    carried: tuple[Tensor, Tensor],
    erase: bool,
    heads: list[int],
    where: list[int],
    out: Arrays,
    name: str,
) -> None:
    """Fill `out` for `heads` at the tokens `where` of a segment; `carried` are the model's states before and after it."""
    import torch

    from titan_dp.model.loss import check_finite
    from titan_dp.model.replay import replay

    if not heads:
        return
    q, k, v, beta, g = inputs
    mine = type(inputs)(
        q[..., heads, :], k[..., heads, :], v[..., heads, :], beta[..., heads], None if g is None else g[..., heads]
    )
    before, after = (state[:, heads] for state in carried)
    (states,), last = replay(mine, erase, where, before, every_step=out["norm"].shape[-1] > 1)
    for values in (states, last, after):
        check_finite(values, f"the states of {name} or soon after")
    out["effective_rank"][heads] = effective_rank(states).permute(2, 0, 1).cpu().numpy()
    out["norm"][heads] = torch.linalg.matrix_norm(states).permute(2, 0, 1).cpu().numpy()
    out["beta"][heads] = mine.beta[0, where].permute(2, 0, 1).cpu().numpy()
    out["decay"][heads] = 1 if mine.g is None else mine.g[0, where].exp().T.cpu().numpy()
    for key, value in (("difference", last - after), ("largest", after)):
        out[key][heads] = out[key][heads].clip(min=value[0].abs().amax((1, 2)).cpu().numpy())


def effective_rank(matrices: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values of `matrices` [..., a, b]; [...] float64 (Roy and Vetterli 2007).

    Singular values of at most the dtype's eps times the largest are rounding and count as 0. A zero matrix has rank 0.
    """
    import torch

    sigma = torch.linalg.svdvals(matrices)
    sigma = sigma.where(sigma > torch.finfo(sigma.dtype).eps * sigma[..., :1], 0).double()
    total = sigma.sum(-1, keepdim=True)
    p = sigma / total.where(total > 0, 1)
    return torch.special.entr(p).sum(-1).exp().where(total[..., 0] > 0, 0)


def _summary(look: Look, arrays: Arrays, blocks: int) -> dict[str, Any]:
    """The JSON of the results: means per head, inside and beyond the training length, and how true the replay is."""
    grid, inside = look.positions % look.every == 0, look.positions < look.trained
    starts = np.isin(look.positions, look.starts)

    def mean(values: np.ndarray, where: np.ndarray) -> Any:
        return values[where].mean(0, dtype=np.float64).tolist() if where.any() else None

    def halves(values: np.ndarray) -> dict[str, Any]:
        return {"inside": mean(values, grid & inside), "beyond": mean(values, grid & ~inside)}

    def head(i: int, h: int) -> dict[str, Any]:
        return {
            "head": h,
            "effective_rank": halves(arrays["effective_rank"][i, h, :, -1]),
            "state_norm": halves(arrays["norm"][i, h, :, -1]),
            "beta": mean(arrays["beta"][i, h], grid),
            "decay": mean(arrays["decay"][i, h], grid),
            "decay_at_document_starts": mean(arrays["decay"][i, h], starts),
            "largest_replay_difference": float(arrays["difference"][i, h]),
            "largest_state_entry": float(arrays["largest"][i, h]),
        }

    heads = range(arrays["decay"].shape[1])
    return {
        "tokens": len(look.ids),
        "documents": len(look.starts),
        "document_starts": look.starts,
        "training_length": look.trained,
        "largest_replay_difference": float(arrays["difference"].max()),
        "layers": [{"layer": layer, "heads": [head(i, h) for h in heads]} for i, layer in enumerate(look.layers)],
        "skipped_layers": [i for i in range(blocks) if i not in look.layers],
        "largest_possible": max(min(mixer.dk, mixer.dv) for mixer in look.layers.values()),
    }


# -- what is shown -------------------------------------------------------------------------------------------------------


def _write_csv(look: Look, arrays: Arrays, result: Result) -> None:
    """A row per layer, head, position and step looked at."""
    looks, n = arrays["norm"].shape[-1], arrays["beta"].shape[-1]
    marks = list(zip(look.positions.tolist(), np.isin(look.positions, look.starts).astype(int).tolist(), strict=True))

    def rows() -> Iterator[list[Any]]:
        for i, layer in enumerate(look.layers):
            for h in range(arrays["decay"].shape[1]):
                numbers = [arrays[name][i, h].tolist() for name in ("effective_rank", "norm", "beta", "decay")]
                for mark, rank, norm, beta, decay in zip(marks, *numbers, strict=True):
                    end = [f"{x:.6g}" for x in (*beta, decay)]
                    for step, *state in zip(range(n - looks + 1, n + 1), rank, norm, strict=True):
                        yield [layer, h, *mark, step, *(f"{x:.6g}" for x in state), *end]

    betas = [f"beta_{j + 1}" for j in range(n)]
    header = ["layer", "head", "position", "document_start", "step", "effective_rank", "norm", *betas, "decay"]
    write_csv(result.beside(".csv.gz"), header, rows())


def _read_csv(look: Look, path: Path) -> Arrays:
    """The arrays of `measure` that `_write_csv` wrote, to its six digits."""
    rows = np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2)
    heads, steps = next(iter(look.layers.values())).heads, rows.shape[1] - 8
    table = rows.reshape(len(look.layers), heads, len(look.positions), -1, rows.shape[1])
    after_all = table[..., -1, :]
    return {
        "effective_rank": table[..., 5],
        "norm": table[..., 6],
        "beta": after_all[..., 7 : 7 + steps],
        "decay": after_all[..., -1],
    }


def _draw(look: Look, arrays: Arrays, result: Result, figures: list[Path]) -> None:
    """Three figures: effective ranks and norms by position, step sizes and decays by head."""
    bos, label = result.settings["texts"]["bos"], result.source.label
    rank = _draw_by_position(look, arrays["effective_rank"], "effective rank", bos)
    rank.suptitle(f"Effective rank of the states of {label}, {len(look.ids):,} tokens")
    norm = _draw_by_position(look, arrays["norm"], "Frobenius norm", bos)
    norm.suptitle(f"Norm of the states of {label}, {len(look.ids):,} tokens")
    for figure, path in zip((rank, norm, _draw_by_head(look, arrays, label)), figures, strict=True):
        save_figure(figure, path)


def _panels(layers: dict[int, DeltaProduct], xlabel: str) -> tuple[Any, dict[int, Any]]:
    """A figure and a panel per layer in a grid with common scales; the lowest panel in each column says what x is."""
    count = len(layers)
    columns = min(count, 4 if count > 9 else 3)
    rows = -(-count // columns)
    size = max(7.0, 3.6 * columns), 1.4 + (1.9 if rows > 1 else 3.2) * rows
    figure, axes = subplots(rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False)
    for spare in axes.flat[count:]:
        spare.set_visible(False)
    for panel in axes.flat[max(0, count - columns) : count]:
        panel.set_xlabel(xlabel)
        panel.tick_params(labelbottom=True)
    for layer, panel in zip(layers, axes.flat, strict=False):
        panel.set_title(f"layer {layer}", fontsize=9)
    return figure, dict(zip(layers, axes.flat, strict=False))


def _legend(figure: Any, handles: list[Any]) -> None:
    columns = min(len(handles), 8)
    drawn = figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    for line in drawn.get_lines():
        line.set_linewidth(2)


def _draw_by_position(look: Look, values: np.ndarray, of: str, bos: bool) -> Any:
    """Nothing lies over anything else; `values` [L, H, P, m].

    A panel per layer (column) and head (row) with a line for means and a band from lowest to highest value; for more than a
    page holds a panel per layer, in which a head is a row and its mean a colour.
    """
    import matplotlib
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    layers, heads, _, looks = values.shape
    x = (look.positions[:, None] + (np.arange(looks) + 1 - looks) / looks).ravel()
    xlabel, filled = "position in tokens", layers <= _COLUMNS and heads <= _ROWS
    if filled:
        size = max(7.0, 3.2 * layers), 1.4 + 1.25 * heads
        figure, panels = subplots(heads, layers, figsize=size, sharex=True, sharey=True, squeeze=False)
        for layer, head in zip(look.layers, panels[0], strict=True):
            head.set_title(f"layer {layer}", fontsize=9)
        for h, panel in enumerate(panels[:, 0]):
            panel.set_ylabel(f"head {h}", fontsize=9)
        for panel in panels[-1]:
            panel.set_xlabel(xlabel)
    else:
        figure, by_layer = _panels(look.layers, xlabel)
        panels = np.array([list(by_layer.values())] * heads)
        scale: dict[str, Any] = {"vmin": float(values.min()), "vmax": float(values.max()), "rasterized": True}
        for of_layer, panel in zip(values, by_layer.values(), strict=True):
            drawn = [stretches(x, of_head.ravel()) for of_head in of_layer]
            mesh = panel.pcolormesh(drawn[0][0], np.arange(heads), np.stack([mean for _, mean, *_ in drawn]), **scale)
            panel.grid(visible=False)
            panel.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        figure.colorbar(mesh, ax=list(by_layer.values()), label=f"{of}, mean of neighbouring tokens", aspect=40)
    for i, h in np.ndindex(layers, heads if filled else 0):
        middle, mean, low, high = stretches(x, values[i, h].ravel())
        panels[h, i].fill_between(middle, low, high, color=_PALETTE[0], alpha=0.25, lw=0)
        panels[h, i].plot(middle, mean, lw=1.0, color=_PALETTE[0])
    for panel in set(panels.flat):
        low, high = panel.get_ylim()
        marks = {"transform": panel.get_xaxis_transform(), "color": _MARKS, "lw": 0.7, "clip_on": False, "zorder": 3}
        panel.vlines(look.starts, -0.06, 0, **marks)
        panel.set_ylim(low, high)
        if len(look.ids) > look.trained:
            panel.axvline(look.trained, color="0.25", lw=1, ls=(0, (4, 2)), zorder=1)
        panel.margins(x=0.01)
        panel.tick_params(axis="x", pad=6)
        panel.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4, steps=[1, 2, 4, 5, 10]))
        thousands(panel.xaxis)
    handles: list[Any] = []
    if filled:
        handles.append(Line2D([], [], color=_PALETTE[0], label="mean of neighbouring tokens"))
        handles.append(Patch(color=_PALETTE[0], alpha=0.25, lw=0, label="their lowest to highest value"))
    starts = "BOS" if bos else "documents' first tokens"
    handles.append(Line2D([], [], color=_MARKS, ls="", marker="|", ms=7, label=starts))
    if len(look.ids) > look.trained:
        handles.append(Line2D([], [], color="0.25", lw=1, ls=(0, (4, 2)), label=f"training length, {look.trained:,}"))
    figure.supylabel(of if filled else "head")
    _legend(figure, handles)
    return figure


def stretches(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of the points (x, y) in at most `_STRETCHES` stretches of neighbours: mean x, mean y, lowest y and highest y."""
    cuts = np.unique(np.linspace(0, len(x), _STRETCHES + 1).astype(int)[:-1])
    counts = np.diff(np.append(cuts, len(x)))
    means = (np.add.reduceat(z, cuts, dtype=np.float64) / counts for z in (x, y))
    return *means, np.minimum.reduceat(y, cuts), np.maximum.reduceat(y, cuts)  # type: ignore[return-value]


def _draw_by_head(look: Look, arrays: Arrays, label: str) -> Any:
    """Median and 5 to 95 % range of each step's beta and of the decay; mean decay at documents' first tokens."""
    heads, n = arrays["beta"].shape[1], arrays["beta"].shape[-1]
    grid, starts = look.positions % look.every == 0, np.isin(look.positions, look.starts)
    gated = bool((arrays["decay"] != 1).any())
    series = [(f"beta of step {j + 1}", arrays["beta"][..., j], _PALETTE[j % 6], "o") for j in range(n)]
    series += [("decay exp(g)", arrays["decay"], "black", "s")] * gated
    figure, panels = _panels(look.layers, "head")
    for i, panel in enumerate(panels.values()):
        handles = []
        for j, (name, values, colour, marker) in enumerate(series):
            low, middle, high = np.quantile(values[i][:, grid], (0.05, 0.5, 0.95), axis=1)
            x = np.arange(heads) + 0.6 * ((j + 0.5) / len(series) - 0.5)
            bars = [middle - low, high - middle]
            handles.append(panel.errorbar(x, middle, bars, fmt=marker, ms=3, lw=1.2, color=colour, label=name))
        if gated:
            decay = arrays["decay"][i][:, starts].mean(1)
            handles += panel.plot(x, decay, "x", color="red", ms=6, mew=1.5, label="mean decay at documents' first tokens")
        panel.set_xticks(np.arange(0, heads, max(1, heads // 12)))
    figure.suptitle(f"step sizes{' and decay' * gated} of {label}: median, 5 to 95 % of tokens")
    figure.supylabel("beta, decay" if gated else "beta")
    _legend(figure, handles)
    return figure


def _show(result: Result, figures: list[Path]) -> None:
    """The table, averaged over heads, and the files."""
    results, length = result.results, result.results["training_length"]

    def cells(layer: int, heads: list[dict[str, Any]]) -> list[str]:
        inside, beyond = ([head["effective_rank"][half] for head in heads] for half in ("inside", "beyond"))
        return [
            str(layer),
            f"{np.mean(inside):.2f}",
            f"{min(inside):.1f}-{max(inside):.1f}",
            "-" if beyond[0] is None else f"{np.mean(beyond):.2f}",
            f"{np.mean([head['state_norm']['inside'] for head in heads]):.2f}",
            " ".join(f"{x:.2f}" for x in np.mean([head["beta"] for head in heads], 0)),
            f"{np.mean([head['decay'] for head in heads]):.3f}",
            f"{np.mean([head['decay_at_document_starts'] for head in heads]):.3f}",
        ]

    columns = ("layer", f"below {length}", "heads", f"from {length}", "norm", "beta", "decay", "decay, starts")
    title = f"effective rank (at most {results['largest_possible']}) of {result.source.label}, means over tokens and heads"
    table = number_table(title, columns, (cells(**layer) for layer in results["layers"]))
    print_table(table, details=("decay, starts", "norm", "heads", "decay"))
    print_text(
        f"{results['tokens']:,} tokens of {counted(results['documents'], 'document')}, every {result.settings['every']}; "
        f"replayed and carried states differ by at most {results['largest_replay_difference']:.1e}"
    )
    if results["skipped_layers"]:
        print_text(f"skipped, softmax layers have no state: {', '.join(map(str, results['skipped_layers']))}")
    print_written(result.path, result.beside(".csv.gz"), *figures)
