"""Loss by position in sequences far longer than those trained on, after Siems et al. 2025 (arXiv 2502.10297, Fig. 8).

Documents are joined and cut into full sequences of `--max-length` tokens; the rest is dropped. Position p is the prediction
made after p tokens, p = 1 ... max_length - 1. A sequence goes through the model segment by segment with the state carried, so
memory does not grow with its length unless softmax layers keep what they saw. Losses are averaged over sequences in float64,
position by position; smoothing comes after.

One JSON file per checkpoint holds the numbers. `length-extrapolation.csv` and the figure beside it compare the
checkpoints of the last command; they follow from the JSON files alone, and the same command makes them again.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from titan_dp.config.arguments import positive
from titan_dp.errors import UserError
from titan_dp.evals.scoring import keeps_all_tokens, token_losses
from titan_dp.evals.session import Arrays, Result, Session, add_common_arguments, batched, run_evaluation
from titan_dp.evals.texts import Texts, add_text_arguments, open_texts
from titan_dp.output import (
    add_format_option,
    number_table,
    print_table,
    print_written,
    save_figure,
    subplots,
    thousands,
    write_csv,
)

if TYPE_CHECKING:
    from titan_dp.inference.pretrained import Pretrained

NAME = "length-extrapolation"
# Tokens through the model at once, and of each sequence at least. On a CPU with debug.toml's model and 8 sequences, a segment
# of 256 costs 1.03 times a plain forward's time per token, one of 1024 1.2 times and one of 4096 2.2 times, because
# activations leave the cache; shorter ones pay for more calls. For a GPU this is a guess: enough to keep it busy.
_TOKENS_AT_ONCE = {"cpu": 1024, "cuda": 16384}
_SHORTEST = 256
_CURVE_POINTS = 256
_RANGES = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, "sequences", several=True)
    add_text_arguments(parser)
    parser.add_argument("--max-length", type=positive, default=32768, help="tokens per sequence (default: 32768)")
    parser.add_argument("--sequences", type=positive, default=64, help="take so many at most (default: 64)")
    segment = "tokens of each at once (default: 1024 / BATCH_SIZE on a CPU, 16384 / BATCH_SIZE on a GPU, at least 256)"
    parser.add_argument("--segment", type=positive, help=segment)
    smooth = "positions the curve is averaged over (default: MAX_LENGTH / 64)"
    parser.add_argument("--smooth", type=positive, help=smooth)
    parser.add_argument("--x-axis", choices=("log", "linear"), default="log", help="of the plot (default: log)")
    add_format_option(parser)


def run(args: argparse.Namespace) -> int:
    return run_evaluation(evaluate, args)


def evaluate(s: Session) -> list[Result]:
    """Measure each checkpoint, write JSON and CSV files and the figure and print the table; every rank calls it.

    Raises UserError if the text does not fill one sequence.
    """
    args = s.args
    if args.max_length < 2:
        raise UserError(f"--max-length is {args.max_length}; give at least 2")
    table, plot = (args.out / f"{NAME}.{ending}" for ending in ("csv", args.format))
    s.check_comparison(NAME, table.name, plot.name)
    results = [_evaluate(s, path) for path in args.checkpoints]
    if len({str(result.settings["texts"]) for result in results}) > 1:
        s.console.print("the checkpoints have different tokenizers: losses per token cannot be compared")
    if s.world.is_main:
        _show(results)
        _write_csv(results, table)
        _draw(results, args.x_axis, plot)
        print_written(*(result.path for result in results), table, plot)
    return results


def _evaluate(s: Session, path: Path) -> Result:
    args = s.args
    pretrained = s.load(path)
    texts = open_texts(args, pretrained.tokenizer)
    settings = {
        "texts": texts.identity,
        "max_length": args.max_length,
        "sequences_at_most": args.sequences,
        "segment": args.segment or default_segment(s.world.device.type, args.batch_size),
        "batch_size": args.batch_size,
        "smooth": args.smooth or max(1, args.max_length // 64),
        "trained_length": pretrained.source.seq_len,
        "position": "tokens before the predicted one",
    }
    result = Result(s, NAME, pretrained.source, settings)
    if not result.results:
        result.finish(_measure(s, pretrained, texts, result))
    return result


def default_segment(device: str, batch_size: int) -> int:
    """Tokens of each sequence that go through the model at once."""
    return max(_SHORTEST, _TOKENS_AT_ONCE[device] // batch_size)


def sequences(texts: Texts, length: int) -> Iterator[np.ndarray]:
    """The documents joined and cut into full sequences [length] int64; nothing is left out between them.

    Raises UserError if the text ends before the first is full.
    """
    pieces, waiting, full = list[np.ndarray](), 0, False
    for document in texts:
        pieces.append(document.ids)
        waiting += len(document.ids)
        if waiting >= length:
            tokens = np.concatenate(pieces)
            cut = waiting - waiting % length
            yield from tokens[:cut].reshape(-1, length)
            pieces, waiting, full = [tokens[cut:]], waiting - cut, True
    if not full:
        remedy = f"give more text, or --max-length {waiting} at most" if waiting > 1 else "give more text"
        raise UserError(f"--max-length is {length}, but the text has {waiting} tokens, not one full sequence; {remedy}")


# -- measuring -----------------------------------------------------------------------------------------------------------


def _measure(s: Session, pretrained: Pretrained, texts: Texts, result: Result) -> dict[str, Any]:
    import torch

    model, settings = pretrained.model, result.settings
    length, smooth, edges = settings["max_length"], settings["smooth"], range_edges(settings["max_length"])
    if keeps_all_tokens(model):
        s.console.print(
            f"{result.source.label}: softmax layers without a window keep the keys and values of all tokens, so memory and "
            "time per token grow with --max-length"
        )

    def score(batch: list[np.ndarray]) -> Arrays:
        ids = torch.from_numpy(np.stack(batch).astype(np.int64)).to(s.world.device)
        losses, right = token_losses(model, ids[:, :-1], ids[:, 1:], settings["segment"])
        return _addend(losses.double().cpu().numpy(), right.cpu().numpy(), edges, smooth)

    # int32, because every rank holds all sequences: their number must be known before the first is scored.
    found = [ids.astype(np.int32) for ids in itertools.islice(sequences(texts, length), settings["sequences_at_most"])]
    nothing = np.zeros((0, length - 1))
    batches = list(batched(found, settings["batch_size"]))
    sums = result.sums(batches, score, _addend(nothing, nothing, edges, smooth), total=len(batches))
    return _results(sums, len(found), edges, smooth)


def _addend(losses: np.ndarray, right: np.ndarray, edges: list[int], smooth: int) -> Arrays:
    """What is summed over sequences, of losses [B, P] float64 and right guesses [B, P] of B of them: float64, by name."""
    smoothed = moving_average(losses, smooth)
    ranges = np.add.reduceat(losses, edges[:-1], axis=1) / np.diff(edges)
    return {
        "loss": losses.sum(0),
        "right": right.sum(0, dtype=np.float64),
        "smoothed_squared": (smoothed**2).sum(0),
        "range": ranges.sum(0),
        "range_squared": (ranges**2).sum(0),
    }


def moving_average(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over about `width` neighbours on the last axis: (width - 1) // 2 on each side.

    Near the start both sides shrink alike, so that the steep first positions are not mixed with what follows. At the end
    only the right side shrinks.
    """
    P = values.shape[-1]
    index = np.arange(P)
    half = np.minimum((width - 1) // 2, index)
    low, high = index - half, np.minimum(index + half + 1, P)
    total = np.concatenate([np.zeros((*values.shape[:-1], 1)), values.cumsum(-1)], -1)
    return (total[..., high] - total[..., low]) / (high - low)


def range_edges(length: int) -> list[int]:
    """Offsets into the length - 1 positions: from 0, doubling up to the end; powers of two of the length."""
    edges = [length >> k for k in range(_RANGES) if 0 < length >> k < length - 1]
    return [0, *sorted(edges), length - 1]


def _results(sums: Arrays, count: int, edges: list[int], smooth: int) -> dict[str, Any]:
    """Losses in nats per token; standard errors are over sequences, None if there is only one."""
    loss, right = sums["loss"] / count, sums["right"] / count
    position = np.arange(1, len(loss) + 1)
    at = _curve_positions(len(loss)) - 1
    running = loss.cumsum() / position
    smoothed = moving_average(loss, smooth)
    right_by_range = np.add.reduceat(right, edges[:-1]) / np.diff(edges)
    range_loss = sums["range"] / count
    return {
        "sequences": count,
        "tokens": count * len(loss),
        "loss": running[-1],
        "ranges": {
            "first_position": [edge + 1 for edge in edges[:-1]],
            "last_position": edges[1:],
            "loss": range_loss.tolist(),
            "standard_error": _standard_error(range_loss, sums["range_squared"], count),
            "perplexity": np.exp(range_loss).tolist(),
            "accuracy": right_by_range.tolist(),
        },
        "curve": {
            "position": position[at].tolist(),
            "smoothed_loss": smoothed[at].tolist(),
            "standard_error": _standard_error(smoothed[at], sums["smoothed_squared"][at], count),
            "running_loss": running[at].tolist(),
            "running_perplexity": np.exp(running[at]).tolist(),
            "running_accuracy": (right.cumsum() / position)[at].tolist(),
        },
        "loss_by_position": loss.tolist(),
    }


def _curve_positions(last: int) -> np.ndarray:
    """From 1 to `last`, close enough for a plot whose axis is linear or logarithmic."""
    spaced = [space(1, last, _CURVE_POINTS) for space in (np.linspace, np.geomspace)]
    return np.unique(np.concatenate(spaced).round().astype(np.int64))


def curves(results: dict[str, Any]) -> dict[str, float]:
    """What `titan-dp evaluate watch` follows over tokens: the loss by range of positions."""
    ranges = results["ranges"]
    edges = zip(ranges["first_position"], ranges["last_position"], strict=True)
    return {f"loss, {first}-{last}": loss for (first, last), loss in zip(edges, ranges["loss"], strict=True)}


def _standard_error(mean: np.ndarray, squared: np.ndarray, count: int) -> list[float] | None:
    """Of means over `count` values, from the sums of their squares."""
    if count < 2:
        return None
    return np.sqrt(np.maximum(squared / count - mean**2, 0) / (count - 1)).tolist()


# -- what is shown -------------------------------------------------------------------------------------------------------


def _show(results: list[Result]) -> None:
    def cell(ranges: dict[str, Any], i: int) -> str:
        error = "" if ranges["standard_error"] is None else f" ± {ranges['standard_error'][i]:.4f}"
        return f"{ranges['loss'][i]:.4f}{error}  {ranges['perplexity'][i]:.3f}"

    trained = [f"trained on {r.settings['trained_length']}, {r.results['sequences']} sequences" for r in results]
    columns = ["positions", *(f"{r.source.label}\n{facts}" for r, facts in zip(results, trained, strict=True))]
    ranges = [result.results["ranges"] for result in results]
    bounds = zip(ranges[0]["first_position"], ranges[0]["last_position"], strict=True)
    rows = [(f"{first:,} - {last:,}", *(cell(r, i) for r in ranges)) for i, (first, last) in enumerate(bounds)]
    title = "loss in nats per token (± standard error over sequences), then perplexity; by position"
    print_table(number_table(title, columns, rows))


def _curves(result: Result) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """By position: loss, smoothed loss, and the running mean of the loss."""
    loss = np.array(result.results["loss_by_position"])
    return loss, moving_average(loss, result.settings["smooth"]), loss.cumsum() / np.arange(1, len(loss) + 1)


def _write_csv(results: list[Result], path: Path) -> None:
    names = [f"{result.source.label} {what}" for result in results for what in ("loss", "smoothed loss", "running mean loss")]
    rows = zip(*(curve for result in results for curve in _curves(result)), strict=True)
    write_csv(path, ["position", *names], ([p, *(f"{x:.6f}" for x in row)] for p, row in enumerate(rows, 1)))


def _draw(results: list[Result], x_axis: str, path: Path) -> None:
    figure, (above, below) = subplots(2, 1, figsize=(8, 7.5), sharex=True)
    settings = results[0].settings
    # On a linear axis the steep first positions would take most of the height and look like a vertical line.
    start = 0 if x_axis == "log" else min(16, settings["max_length"] // 64)
    for i, result in enumerate(results):
        color, label = f"C{i}", f"{result.source.label} ({result.results['sequences']} sequences)"
        loss, smoothed, running = _curves(result)
        position = np.arange(1, len(loss) + 1)
        above.plot(position[start:], smoothed[start:], color=color, label=label, linewidth=1.2)
        below.plot(position[start:], np.exp(running)[start:], color=color, label=label, linewidth=1.5)
        curve = {key: np.array(values) for key, values in result.results["curve"].items()}
        if result.results["sequences"] > 1:
            shown = curve["position"] > start
            mean, error = curve["smoothed_loss"][shown], curve["standard_error"][shown]
            above.fill_between(curve["position"][shown], mean - error, mean + error, color=color, alpha=0.2, linewidth=0)
    _mark_trained_lengths(above, below, [result.settings["trained_length"] for result in results])
    above.set_ylabel("loss (nats per token)")
    smooth = f"mean over {settings['smooth']} positions (near the ends over as many as there are)"
    above.set_title(f"Loss by position, {smooth}; band: standard error over sequences", fontsize="small")
    below.set_ylabel("perplexity of positions so far")
    below.set_xlabel("position (tokens before the predicted one)")
    if x_axis == "log":
        below.set_xscale("log", base=2)
    thousands(below.xaxis)
    below.legend(edgecolor="none", framealpha=0.9)
    save_figure(figure, path)


def _mark_trained_lengths(above: Any, below: Any, lengths: list[int]) -> None:
    """A vertical line at each; in the checkpoint's colour if they differ."""
    differ = len(set(lengths)) > 1
    for i, length in enumerate(lengths if differ else lengths[:1]):
        for axes in (above, below):
            axes.axvline(length, color=f"C{i}" if differ else "0.3", linestyle="--", linewidth=1)
        below.plot([], [], color=f"C{i}" if differ else "0.3", linestyle="--", label=f"training length {length:,}")
