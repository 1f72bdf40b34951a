"""Loss by position in sequences far longer than those trained on, after Siems et al. 2025 (arXiv 2502.10297, Fig. 8).

Documents are joined and cut into full sequences of `--max-length` tokens; what is left over is dropped. Position p is the
prediction made after p tokens, p = 1 ... max_length - 1. A sequence goes through the model segment by segment with the
state carried, so memory does not grow with its length unless softmax layers keep what they saw. Losses are averaged over
sequences in float64, position by position; smoothing comes after.

One JSON file a checkpoint holds the numbers. `length-extrapolation.csv` and `.png` compare the checkpoints of the last
command and are made anew from the JSON files by the same command.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from titan_dp.errors import UserError
from titan_dp.evals.scoring import keeps_all_tokens, token_losses
from titan_dp.evals.session import Report, Session, add_common_arguments, check_positive, session
from titan_dp.evals.texts import Texts, add_text_arguments, open_texts
from titan_dp.output import check_matplotlib

if TYPE_CHECKING:
    import numpy as np

    from titan_dp.inference.pretrained import Pretrained

NAME = "length-extrapolation"
# Tokens through the model at once, and of each sequence at least. On a CPU with debug.toml's model and 8 sequences a segment
# of 256 costs 1.03 times a plain forward's time a token, one of 1024 1.2 times and one of 4096 2.2 times, as activations
# leave the cache; shorter ones pay for more calls. For a GPU a guess: enough to keep it busy.
_TOKENS_AT_ONCE = {"cpu": 1024, "cuda": 16384}
_SHORTEST = 256
_CURVE_POINTS = 256
_RANGES = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, several=True)
    add_text_arguments(parser)
    parser.add_argument("--max-length", type=int, default=32768, help="tokens a sequence (default: 32768)")
    parser.add_argument("--sequences", type=int, default=64, help="take so many at most (default: 64)")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences at once (default: 8)")
    parser.add_argument(
        "--segment",
        type=int,
        help="tokens of each at once (default: 1024 / BATCH_SIZE on a CPU, 16384 / BATCH_SIZE on a GPU, at least 256)",
    )
    parser.add_argument("--smooth", type=int, help="positions the curve is averaged over (default: MAX_LENGTH / 64)")
    parser.add_argument("--x-axis", choices=("log", "linear"), default="log", help="of the plot (default: log)")


def run(args: argparse.Namespace) -> int:
    from titan_dp.evals import length_extrapolation_output as output

    check_positive(args, "sequences", "segment", "batch_size", "smooth")
    if args.max_length < 2:
        raise UserError(f"--max-length is {args.max_length}; give at least 2")
    with session(args) as s:
        check_matplotlib()
        s.check_labels()
        s.check_comparison(NAME, (f"{NAME}.csv", f"{NAME}.png"))
        reports = [_evaluate(s, path) for path in args.checkpoints]
        if len({str(report.head["settings"]["texts"]) for report in reports}) > 1:
            s.console.print("the checkpoints have different tokenizers: losses a token cannot be compared")
        if s.world.is_main:
            output.write(reports, args.out / NAME, args.x_axis)
    return 0


def _evaluate(s: Session, path: Any) -> Report:
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
    report = s.report(NAME, pretrained.source, settings)
    if report.finished is None:
        report.finish(_measure(s, pretrained, texts, report))
    return report


def default_segment(device: str, batch_size: int) -> int:
    """Tokens of each sequence that go through the model at once."""
    return max(_SHORTEST, _TOKENS_AT_ONCE[device] // batch_size)


def sequences(texts: Texts, length: int) -> Iterator[np.ndarray]:
    """The documents joined and cut into full sequences [length] int64; nothing is left out between them.

    Raises UserError where the text ends before the first is full.
    """
    import numpy as np

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


class Sums:
    """What is summed over sequences; float64 arrays by name, so that they can be kept and reduced."""

    def __init__(self, length: int, smooth: int, kept: dict[str, np.ndarray]) -> None:
        import numpy as np

        self.smooth, self.edges = smooth, range_edges(length)
        P, R = length - 1, len(self.edges) - 1
        shapes: dict[str, Any] = {"done": (), "loss": P, "right": P, "smoothed_squared": P, "range": R, "range_squared": R}
        self.arrays: dict[str, Any] = {name: kept.get(name, np.zeros(shape)) for name, shape in shapes.items()}

    def add(self, losses: np.ndarray, right: np.ndarray) -> None:
        """Losses [B, P] float64 and right guesses [B, P] bool of B more sequences."""
        import numpy as np

        smoothed = moving_average(losses, self.smooth)
        ranges = np.add.reduceat(losses, self.edges[:-1], axis=1) / np.diff(self.edges)
        new = {
            "done": np.float64(len(losses)),
            "loss": losses.sum(0),
            "right": right.sum(0),
            "smoothed_squared": (smoothed**2).sum(0),
            "range": ranges.sum(0),
            "range_squared": (ranges**2).sum(0),
        }
        self.arrays = {name: value + new[name] for name, value in self.arrays.items()}

    def reduced(self, device: Any) -> dict[str, np.ndarray]:
        """The arrays summed over all ranks."""
        import torch

        from titan_dp.distributed import all_reduce_sum

        return {name: all_reduce_sum(torch.tensor(x, device=device)).cpu().numpy() for name, x in self.arrays.items()}


def moving_average(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over about `width` neighbours on the last axis: (width - 1) // 2 on each side.

    Near the start the sides shrink alike, so that the steep first positions are not mixed with what follows; at the end
    only the side that is missing does.
    """
    import numpy as np

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


def _measure(s: Session, pretrained: Pretrained, texts: Texts, report: Report) -> dict[str, Any]:
    import numpy as np
    import torch

    args, device = s.args, s.world.device
    if keeps_all_tokens(pretrained.model):
        s.console.print(
            f"{pretrained.source.label}: softmax layers without a window keep the keys and values of all tokens, so memory and "
            "time a token grow with --max-length"
        )
    settings = report.head["settings"]
    sums = Sums(args.max_length, settings["smooth"], report.resume())
    # int32: all of this rank's sequences are held, so that their number is known.
    found = [ids.astype(np.int32) for ids in itertools.islice(sequences(texts, args.max_length), args.sequences)]
    mine = [found[i] for i in s.share(len(found), int(sums.arrays["done"]))]
    with s.progress() as progress:
        task = progress.add_task("sequences", total=len(s.share(len(found))), completed=int(sums.arrays["done"]))
        for start in range(0, len(mine), args.batch_size):
            ids = torch.from_numpy(np.stack(mine[start : start + args.batch_size]).astype(np.int64)).to(device)
            losses, right = token_losses(pretrained.model, ids[:, :-1], ids[:, 1:], settings["segment"])
            sums.add(losses.double().cpu().numpy(), right.cpu().numpy())
            report.keep(**sums.arrays)
            progress.advance(task, len(ids))
    return results(sums.reduced(device), sums.edges, sums.smooth)


def results(sums: dict[str, np.ndarray], edges: list[int], smooth: int) -> dict[str, Any]:
    """Losses in nats a token; standard errors are over sequences, None where there is but one."""
    import numpy as np

    count = float(sums["done"])
    loss, right = sums["loss"] / count, sums["right"] / count
    position = np.arange(1, len(loss) + 1)
    at = _curve_positions(len(loss)) - 1
    running = loss.cumsum() / position
    smoothed = moving_average(loss, smooth)
    right_by_range = np.add.reduceat(right, edges[:-1]) / np.diff(edges)
    range_loss = sums["range"] / count
    return {
        "sequences": int(count),
        "tokens": int(count) * len(loss),
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
    import numpy as np

    spaced = [space(1, last, _CURVE_POINTS) for space in (np.linspace, np.geomspace)]
    return np.unique(np.concatenate(spaced).round().astype(np.int64))


def _standard_error(mean: np.ndarray, squared: np.ndarray, count: float) -> list[float] | None:
    """Of means over `count` values, from their sums of squares."""
    import numpy as np

    if count < 2:
        return None
    return np.sqrt(np.maximum(squared / count - mean**2, 0) / (count - 1)).tolist()
