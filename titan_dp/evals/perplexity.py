"""Loss, perplexity and bits a byte of a model on shards or text.

Each document is read by itself: a window never holds two, unless --concatenate joins all of them into one stream as in
training. The first token of a document is not scored, as in training; every other one is, exactly once. Bits a byte are
`validate.bits_per_byte`, training's own.

A window has `--context` tokens and begins `--stride` after the one before, so that all but a document's first window know
the context - stride tokens before what they are scored on. `--state carry` instead hands the recurrent state from window
to window, so that every token knows its whole document. The unit of work is a window, or the document whose state is
carried; losses are summed in float64.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from titan_dp.errors import UserError
from titan_dp.evals.scoring import token_losses
from titan_dp.evals.session import Report, Session, add_common_arguments, check_positive, session
from titan_dp.evals.texts import Texts, add_text_arguments, open_texts
from titan_dp.output import print_table

if TYPE_CHECKING:
    import numpy as np

    from titan_dp.inference.pretrained import Pretrained

_BATCHES_AT_ONCE = 8  # sorted by length together, and saved together


class Window(NamedTuple):
    """Consecutive tokens of one document (or of the stream), to be scored."""

    ids: np.ndarray
    """[T + 1] int64: T inputs, and after each of them what it should predict."""
    known: int
    """So many of the T predictions are not scored: an earlier window has scored them."""
    joins: np.ndarray
    """[J] int64: predictions that are not scored either, as what they predict begins a document."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser)
    add_text_arguments(parser)
    parser.add_argument("--context", type=int, help="tokens a window (default: the training sequence length)")
    parser.add_argument("--stride", type=int, help="tokens from one window's start to the next one's (default: CONTEXT)")
    parser.add_argument(
        "--state",
        choices=("reset", "carry"),
        default="reset",
        help="at the start of a window: reset, or carried through the document (default: reset)",
    )
    parser.add_argument("--concatenate", action="store_true", help="join the documents into one stream, as in training")
    parser.add_argument("--batch-size", type=int, default=8, help="windows at once (default: 8)")


def run(args: argparse.Namespace) -> int:
    with session(args) as s:
        pretrained = s.load(args.checkpoint)
        context, stride = _window_size(args, pretrained.source.seq_len)
        texts = open_texts(args, pretrained.tokenizer)
        settings = {
            "texts": texts.identity,
            "context": context,
            "stride": stride,
            "state": args.state,
            "concatenate": args.concatenate,
            "scored": _scored(texts),
            "batch_size": args.batch_size,
        }
        report = s.report("perplexity", pretrained.source, settings)
        if report.finished is None:
            report.finish(_measure(s, pretrained, texts, context, stride, report))
        if s.world.is_main:
            _show(report)
    return 0


def _window_size(args: argparse.Namespace, trained: int) -> tuple[int, int]:
    """--context and --stride, with their defaults."""
    check_positive(args, "context", "stride", "batch_size")
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


def _scored(texts: Texts) -> str:
    return f"from the second token of each document ({'the first is BOS' if texts.bos_id is not None else 'no BOS before it'})"


def windows(pieces: Iterable[np.ndarray], context: int, stride: int) -> Iterator[Window]:
    """Windows over `pieces` [tokens] int64 joined, of `context` predictions each but the last one.

    Every token but the first of each piece is scored in exactly one window.
    """
    import numpy as np

    tokens, begins, known = np.empty(0, dtype=np.int64), np.empty(0, dtype=bool), 0
    for piece in pieces:
        tokens, begins = np.concatenate([tokens, piece]), np.concatenate([begins, np.arange(len(piece)) == 0])
        while len(tokens) > context:
            yield Window(tokens[: context + 1], known, np.flatnonzero(begins[1 : context + 1]))
            tokens, begins, known = tokens[stride:], begins[stride:], context - stride
    if len(tokens) - 1 > known:
        yield Window(tokens, known, np.flatnonzero(begins[1:]))


class _Reader:
    """The windows of all documents in their order; counts what it has read."""

    def __init__(self, texts: Texts, args: argparse.Namespace) -> None:
        self._texts, self._args = texts, args
        self.documents = 0
        self.text_bytes: int | None = 0
        """None where documents do not know."""

    def windows(self, context: int, stride: int) -> Iterator[Window]:
        if self._args.concatenate:
            yield from windows(self._documents(), context, stride)
            return
        for ids in self._documents():
            if self._args.state == "carry":  # the whole document, to be run in segments of `context`
                context = stride = max(len(ids) - 1, 1)
            yield from windows([ids], context, stride)

    def _documents(self) -> Iterator[np.ndarray]:
        for document in self._texts:
            self.documents += 1
            known = self.text_bytes is not None and document.text_bytes is not None
            self.text_bytes = self.text_bytes + document.text_bytes if known else None  # type: ignore[operator]
            yield document.ids


def _measure(s: Session, pretrained: Pretrained, texts: Texts, context: int, stride: int, report: Report) -> dict[str, Any]:
    import numpy as np
    import torch

    from titan_dp.distributed import all_reduce_sum

    kept = report.resume()
    done, sums = int(kept.get("done", 0)), kept.get("sums", np.zeros(4))
    reader = _Reader(texts, s.args)
    mine = itertools.islice(reader.windows(context, stride), s.world.rank + done * s.world.size, None, s.world.size)
    size = s.args.batch_size
    with s.progress() as progress:
        task = progress.add_task("documents", total=texts.documents)
        while group := list(itertools.islice(mine, _BATCHES_AT_ONCE * size)):
            for batch in batches(group, size):
                sums = sums + _score(pretrained, batch, context)
            done += len(group)
            report.keep(done=done, sums=sums)
            progress.update(task, completed=reader.documents)
    total = all_reduce_sum(torch.tensor(sums, dtype=torch.float64, device=s.world.device)).tolist()
    return _results(total, reader.documents, texts.text_bytes or reader.text_bytes)


def batches(group: list[Window], size: int) -> Iterator[list[Window]]:
    """`group` in batches of at most `size`, longest first, in which no window is less than 3/4 of the longest.

    So padding to the longest costs little; being on the right, it changes nothing for a causal model.
    """
    batch: list[Window] = []
    for window in sorted(group, key=lambda window: -len(window.ids)):
        if batch and (len(batch) == size or 4 * len(window.ids) < 3 * len(batch[0].ids)):
            yield batch
            batch = []
        batch.append(window)
    yield batch


def _score(pretrained: Pretrained, batch: list[Window], segment: int) -> np.ndarray:
    """[loss in nats, tokens, right guesses, windows] of a batch, float64."""
    import numpy as np
    import torch

    from titan_dp.model.loss import IGNORE

    shape = len(batch), max(len(window.ids) for window in batch) - 1
    tokens, labels = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORE)
    for i, (ids, known, joins) in enumerate(batch):
        tokens[i, : len(ids) - 1] = torch.from_numpy(ids[:-1])
        labels[i, known : len(ids) - 1] = torch.from_numpy(ids[known + 1 :])
        labels[i, torch.from_numpy(joins)] = IGNORE
    device = pretrained.model.output_weight.device
    losses, right = token_losses(pretrained.model, tokens.to(device), labels.to(device), segment)
    return np.array([float(losses.double().sum()), int((labels != IGNORE).sum()), int(right.sum()), len(batch)])


def _results(total: list[float], documents: int, text_bytes: int | None) -> dict[str, Any]:
    from titan_dp.train.validate import bits_per_byte

    nats, tokens, right, count = total
    if not tokens:
        raise UserError(f"there is nothing to score: none of the {documents} document(s) has two tokens; give more text")
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


def _show(report: Report) -> None:
    from rich.table import Table

    results, settings = report.finished or {}, report.head["settings"]
    table = Table(title=f"perplexity of {report.source.label}", show_header=False)
    for name, key, form in (
        ("loss, nats a token", "loss", ".5f"),
        ("perplexity", "perplexity", ".4f"),
        ("bits a byte", "bits_per_byte", ".5f"),
        ("bits a token", "bits_per_token", ".5f"),
        ("likeliest token right", "accuracy", ".2%"),
        ("tokens scored", "tokens", ",d"),
        ("documents", "documents", ",d"),
        ("bytes of text", "text_bytes", ",d"),
        ("windows", "windows", ",d"),
    ):
        table.add_row(name, "not known" if results[key] is None else format(results[key], form))
    texts = settings["texts"]
    table.add_row("context, stride", f"{settings['context']}, {settings['stride']} tokens; state {settings['state']}")
    joined = "joined into one stream" if settings["concatenate"] else "each by itself"
    marks = " and ".join(mark.upper() for mark in ("bos", "eos") if texts[mark]) or "neither BOS nor EOS"
    table.add_row("documents with", f"{marks}, {joined}")
    table.add_row("scored", settings["scored"])
    print_table(table)
    print(f"written to {report.path}")
