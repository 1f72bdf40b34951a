"""Loss, perplexity and bits per byte of a model on shards or text.

Each document is read by itself: a window never holds two, unless --concatenate joins all of them into one stream as in
training. As in training, the first token of a document is not scored; every other one is, exactly once. Bits per byte are
`validate.bits_per_byte`, training's own.

A window has `--context` tokens and begins `--stride` after the one before. So in all windows except a document's first,
context - stride tokens come before the ones that are scored. `--state carry` instead hands the recurrent state from window
to window, so that every token is predicted from the whole document before it. Losses are
summed in float64.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from titan_dp.config.arguments import positive
from titan_dp.errors import UserError, counted
from titan_dp.evals.scoring import row_losses
from titan_dp.evals.session import Result, Session, add_common_arguments, batched, run_evaluation
from titan_dp.evals.texts import Texts, add_text_arguments, open_texts
from titan_dp.output import number_table, print_table, print_written

if TYPE_CHECKING:
    from torch import Tensor

    from titan_dp.model.transformer import Transformer

_BATCHES_AT_ONCE = 8  # sorted by length together


class Window(NamedTuple):
    """Consecutive tokens of one document (or of the stream), to be scored."""

    ids: np.ndarray
    """[T + 1] int64: T inputs, and after each of them what it should predict."""
    known: int
    """So many of the T predictions are not scored: an earlier window has scored them."""
    joins: np.ndarray
    """[J] int64: predictions that are not scored either, because what they predict begins a document."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, "windows")
    add_text_arguments(parser)
    parser.add_argument("--context", type=positive, help="tokens per window (default: the training sequence length)")
    parser.add_argument("--stride", type=positive, help="tokens from one window's start to the next one's (default: CONTEXT)")
    parser.add_argument(
        "--state",
        choices=("reset", "carry"),
        default="reset",
        help="at the start of a window: reset, or carried through the document (default: reset)",
    )
    parser.add_argument("--concatenate", action="store_true", help="join the documents into one stream, as in training")


def run(args: argparse.Namespace) -> int:
    return run_evaluation(evaluate, args)


def evaluate(s: Session) -> Result:
    """Measure, write the JSON file and print the table; every rank calls it.

    Raises UserError if options do not fit together, or the text has nothing to score.
    """
    args = s.args
    pretrained = s.load(args.checkpoint)
    context, stride = _window_size(args, pretrained.source.seq_len)
    texts = open_texts(args, pretrained.tokenizer)
    first = "the first is BOS" if texts.identity["bos"] else "no BOS before it"
    settings = {
        "texts": texts.identity,
        "context": context,
        "stride": stride,
        "state": args.state,
        "concatenate": args.concatenate,
        "scored": f"from the second token of each document ({first})",
        "batch_size": args.batch_size,
    }
    result = Result(s, "perplexity", pretrained.source, settings)
    if not result.results:
        result.finish(_measure(pretrained.model, texts, result))
    if s.world.is_main:
        _show(result)
    return result


def _window_size(args: argparse.Namespace, trained: int) -> tuple[int, int]:
    """--context and --stride, with their defaults."""
    context = args.context or trained
    stride = args.stride or context
    if stride > context:
        raise UserError(
            f"--stride {stride} is more than --context {context} and would leave out tokens; give at most {context}"
        )
    if args.state == "carry" and (stride != context or args.concatenate):
        option = "--concatenate" if args.concatenate else f"--stride {stride}"
        raise UserError(
            f"{option} does not go with --state carry, which passes each document's state on; leave out one of them"
        )
    return context, stride


def windows(pieces: Iterable[np.ndarray], context: int, stride: int) -> Iterator[Window]:
    """Windows over `pieces` [tokens] int64 joined; each has `context` predictions, the last one may have fewer.

    Every token except the first of each piece is scored in exactly one window.
    """
    tokens, begins, known = np.empty(0, dtype=np.int64), np.empty(0, dtype=bool), 0
    for piece in pieces:
        tokens, begins = np.concatenate([tokens, piece]), np.concatenate([begins, np.arange(len(piece)) == 0])
        while len(tokens) > context:
            yield Window(tokens[: context + 1], known, np.flatnonzero(begins[1 : context + 1]))
            tokens, begins, known = tokens[stride:], begins[stride:], context - stride
    if len(tokens) - 1 > known:
        yield Window(tokens, known, np.flatnonzero(begins[1:]))


def _measure(model: Transformer, texts: Texts, result: Result) -> dict[str, Any]:
    settings = result.settings
    context, size = settings["context"], settings["batch_size"]
    documents, text_bytes = 0, texts.text_bytes

    def read() -> Iterator[np.ndarray]:
        nonlocal documents, text_bytes
        for document in texts:
            documents += 1
            if document.text_bytes is not None:
                text_bytes = (text_bytes or 0) + document.text_bytes
            yield document.ids

    def units() -> Iterator[Window]:
        if settings["concatenate"]:
            yield from windows(read(), context, settings["stride"])
            return
        for ids in read():
            if settings["state"] == "carry":  # the whole document, which `token_losses` cuts into segments of `context`
                length = max(len(ids) - 1, 1)
                yield from windows([ids], length, length)
            else:
                yield from windows([ids], context, settings["stride"])

    # Every rank reads all documents, of which it scores a share of the windows, so each knows how many there are.
    sums = result.sums(
        itertools.chain.from_iterable(batches(group, size) for group in batched(units(), _BATCHES_AT_ONCE * size)),
        lambda batch: {"sums": _score(model, batch, context)},
        {"sums": np.zeros(4)},
        name="documents",
        total=texts.documents,
        position=lambda: documents,
    )["sums"]
    return _results(sums.tolist(), documents, text_bytes)


def batches(group: list[Window], size: int) -> Iterator[list[Window]]:
    """`group` in batches of at most `size`, longest first, in which no window is shorter than 3/4 of the longest.

    So little is padded to the longest; padding is on the right and changes nothing for a causal model.
    """
    batch: list[Window] = []
    for window in sorted(group, key=lambda window: -len(window.ids)):
        if batch and (len(batch) == size or 4 * len(window.ids) < 3 * len(batch[0].ids)):
            yield batch
            batch = []
        batch.append(window)
    yield batch


def _score(model: Transformer, batch: list[Window], segment: int) -> np.ndarray:
    """[loss in nats, tokens, right guesses, windows] of a batch, float64."""
    import torch

    from titan_dp.data.batch import IGNORE

    def row(window: Window) -> tuple[Tensor, Tensor]:
        labels = window.ids[1:].copy()
        labels[: window.known] = labels[window.joins] = IGNORE
        return torch.from_numpy(window.ids[:-1]), torch.from_numpy(labels)

    losses, right, labels = row_losses(model, map(row, batch), segment)
    return np.array([float(losses.double().sum()), int((labels != IGNORE).sum()), int(right.sum()), len(batch)])


def _results(total: list[float], documents: int, text_bytes: int | None) -> dict[str, Any]:
    from titan_dp.train.validate import bits_per_byte

    nats, tokens, right, count = total
    if not tokens:
        raise UserError(f"nothing to score in {counted(documents, 'document')}: none has two tokens; give more text")
    loss = nats / tokens
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "bits_per_byte": bits_per_byte(nats, text_bytes) if text_bytes else None,
        "bits_per_token": loss / math.log(2),
        "accuracy": right / tokens,
        "tokens": int(tokens),
        "documents": documents,
        "text_bytes": text_bytes,
        "windows": int(count),
    }


def curves(results: dict[str, Any]) -> dict[str, float]:
    """What `titan-dp evaluate watch` follows over tokens."""
    names = ("loss", "perplexity", "bits_per_byte", "accuracy")
    return {name: results[name] for name in names if results[name] is not None}


_SHOWN = (
    ("loss, nats per token", "loss", ".5f"),
    ("perplexity", "perplexity", ".4f"),
    ("bits per byte", "bits_per_byte", ".5f"),
    ("bits per token", "bits_per_token", ".5f"),
    ("likeliest token right", "accuracy", ".2%"),
    ("tokens scored", "tokens", ",d"),
    ("documents", "documents", ",d"),
    ("bytes of text", "text_bytes", ",d"),
    ("windows", "windows", ",d"),
)


def _show(result: Result) -> None:
    results, settings = result.results, result.settings
    rows = [(name, "not known" if results[key] is None else format(results[key], form)) for name, key, form in _SHOWN]
    rows.append(("context, stride", f"{settings['context']}, {settings['stride']} tokens; state {settings['state']}"))
    joined = "joined into one stream" if settings["concatenate"] else "each by itself"
    marks = " and ".join(mark.upper() for mark in ("bos", "eos") if settings["texts"][mark]) or "neither BOS nor EOS"
    rows += [("documents with", f"{marks}, {joined}"), ("scored", settings["scored"])]
    columns = ("", " ")
    title = f"perplexity of {result.source.label}"
    print_table(number_table(title, columns, rows, left=columns, show_header=False))
    print_written(result.path)
