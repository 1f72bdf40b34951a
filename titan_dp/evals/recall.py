"""Multi-query associative recall: does a model find again what it has just read? On sequences made here, without text.

A sequence is BOS (where the tokenizer has one), pairs "key value" and then queries: keys of these pairs in random order,
each followed by its value; wanted is the value as the likeliest next token at each queried key. It is the task of Arora et al.
2023 (Zoology, arXiv 2312.04927) with two changes for models that were trained on text. The value follows its
query, so that the sequence goes on as it began; and queries lie uniformly in the slots of two tokens after the pairs, not
at power-law gaps, so that every distance is asked for. Slots without a query, if --length leaves any, hold keys that have
no pair here. Keys and values come from two disjoint random halves of the vocabulary without special tokens.

A sequence is a function of --seed, its number of pairs and its index alone; the unit of work is a sequence.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, NamedTuple

from titan_dp.errors import UserError
from titan_dp.evals.session import Report, Session, add_common_arguments, check_positive, session
from titan_dp.output import check_matplotlib

if TYPE_CHECKING:
    import numpy as np

    from titan_dp.data.tokenizer import Tokenizer
    from titan_dp.inference.pretrained import Pretrained
    from titan_dp.model.transformer import Transformer

_DISTANCES = 32  # powers of two that a distance can lie below


class Vocabulary(NamedTuple):
    """Ids of the task, [n] int64 each, disjoint."""

    keys: np.ndarray
    values: np.ndarray


class Example(NamedTuple):
    """A sequence, its questions and the answers."""

    tokens: np.ndarray
    """[T] int64."""
    queries: np.ndarray
    """[Q] int64, rising: where the queried keys stand."""
    answers: np.ndarray
    """[Q] int64: index of the value among `values`."""
    values: np.ndarray
    """[pairs] int64: ids of the pairs' values, in order."""
    distances: np.ndarray
    """[Q] int64: tokens from a key in its pair to the same key as a query."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, several=True)
    parser.add_argument(
        "--pairs", type=int, nargs="+", default=[4, 8, 16, 32, 64], help="pairs a sequence (default: 4 8 16 32 64)"
    )
    parser.add_argument("--queries", type=int, help="keys asked for a sequence, at most (default: all of its keys)")
    parser.add_argument("--length", type=int, help="tokens a sequence (default: as short as the pairs and queries allow)")
    parser.add_argument("--sequences", type=int, default=256, help="sequences of each number of pairs (default: 256)")
    parser.add_argument("--seed", type=int, default=0, help="of the sequences (default: 0)")
    parser.add_argument("--batch-size", type=int, default=16, help="sequences at once (default: 16)")


def run(args: argparse.Namespace) -> int:
    with session(args) as s:
        evaluate(s)
    return 0


def evaluate(s: Session) -> list[Report]:
    """Measure each checkpoint, write JSON, CSV and PNG files and print the table; every rank calls it.

    Raises UserError where the vocabulary or --length is too small for the pairs.
    """
    from titan_dp.evals import recall_output as output

    args = s.args
    check_positive(args, "queries", "length", "sequences", "batch_size")
    args.pairs = sorted(set(args.pairs))
    if args.pairs[0] < 1 or args.seed < 0:
        raise UserError(f"--pairs {args.pairs[0]} and --seed {args.seed}: give at least 1 pair and a seed of at least 0")
    check_matplotlib()
    s.check_labels()
    s.check_comparison("recall", ("recall.png",))
    reports = []
    for path in args.checkpoints:
        pretrained = s.load(path)
        vocabulary = split_vocabulary(pretrained.tokenizer, args.seed)
        _check_sizes(args, pretrained.tokenizer, vocabulary)
        names = ("pairs", "queries", "length", "sequences", "seed", "batch_size")
        settings = {name: getattr(args, name) for name in names} | {"tokenizer": pretrained.tokenizer.hash}
        report = s.report("recall", pretrained.source, settings, beside=(".csv",))
        if report.finished is None:
            counts = measure(s, pretrained, vocabulary, report)
            results = output.summary(args.pairs, counts, pretrained.tokenizer.vocab_size, args.queries)
            if s.world.is_main:
                output.write_csv(report, results)
            report.finish(results)
        reports.append(report)
    if s.world.is_main:
        output.draw(reports)
        output.show(reports)
    return reports


def split_vocabulary(tokenizer: Tokenizer, seed: int) -> Vocabulary:
    """Two random halves of the ids that are no special tokens."""
    import numpy as np

    ordinary = np.setdiff1d(np.arange(tokenizer.vocab_size), list(tokenizer.special_tokens.values()))
    half = len(ordinary) // 2
    ids = np.random.default_rng(seed).permutation(ordinary)
    return Vocabulary(ids[:half], ids[half : 2 * half])


def _check_sizes(args: argparse.Namespace, tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    most, half = args.pairs[-1], len(vocabulary.keys)
    spare = 1 if args.length else 0  # a key without a pair, for slots without a query
    if most + spare > half:
        raise UserError(
            f"--pairs {most} needs {most + spare} keys and as many values, but tokenizer {tokenizer.name!r} has {2 * half} ids "
            f"that are no special tokens; ask for at most {half - spare} pairs"
        )
    shortest = _shortest(most, args.queries, tokenizer.bos_id)
    if args.length is not None and args.length < shortest:
        raise UserError(f"--length {args.length} is too short for {most} pairs and their queries; give at least {shortest}")


def _shortest(pairs: int, queries: int | None, bos_id: int | None) -> int:
    return (bos_id is not None) + 2 * pairs + 2 * min(pairs, queries or pairs)


def make_example(
    vocabulary: Vocabulary, bos_id: int | None, pairs: int, queries: int | None, length: int | None, seed: int, index: int
) -> Example:
    """Sequence `index` of `pairs` pairs, as the module's docstring says; of `length` tokens, or one less by parity."""
    import numpy as np

    rng = np.random.default_rng([seed, pairs, index])
    shuffled = rng.permutation(vocabulary.keys)
    keys, spare = shuffled[:pairs], shuffled[pairs:]
    values = rng.choice(vocabulary.values, pairs, replace=False)
    start = 0 if bos_id is None else 1
    length = length or _shortest(pairs, queries, bos_id)
    slots = (length - start - 2 * pairs) // 2
    asked = rng.permutation(pairs)[: queries or pairs]
    taken = np.sort(rng.choice(slots, len(asked), replace=False))
    after = rng.choice(spare, (slots, 2)) if slots > len(asked) else np.empty((slots, 2), np.int64)
    after[taken] = np.stack([keys[asked], values[asked]], 1)
    parts = [np.full(start, bos_id or 0), np.stack([keys, values], 1).ravel(), after.ravel()]
    where = start + 2 * (pairs + taken)
    return Example(np.concatenate(parts), where, asked, values, where - (start + 2 * asked))


def measure(s: Session, pretrained: Pretrained, vocabulary: Vocabulary, report: Report) -> np.ndarray:
    """Counts [numbers of pairs, distances, 3] int64: queries; right among all ids; right among the sequence's values.

    Distance d counts in row b where 2^b <= d < 2^(b + 1).
    """
    import itertools

    import numpy as np
    import torch

    from titan_dp.distributed import all_reduce_sum

    args, bos_id = s.args, pretrained.tokenizer.bos_id
    kept = report.resume()
    done, counts = int(kept.get("done", 0)), kept.get("counts", np.zeros((len(args.pairs), _DISTANCES, 3), np.int64))
    units = s.share(len(args.pairs) * args.sequences, done)
    with s.progress() as progress:
        task = progress.add_task("sequences", total=done + len(units), completed=done)
        for row, same in itertools.groupby(units, lambda unit: unit // args.sequences):
            while chosen := list(itertools.islice(same, args.batch_size)):
                shape = args.pairs[row], args.queries, args.length, args.seed
                batch = [make_example(vocabulary, bos_id, *shape, unit % args.sequences) for unit in chosen]
                right, among = score(pretrained.model, batch, pretrained.tokenizer.vocab_size)
                bins = np.log2(np.stack([example.distances for example in batch])).astype(int)
                for i, hits in enumerate((np.ones_like(right), right, among)):
                    np.add.at(counts[row, :, i], bins, hits)
                done += len(batch)
                report.keep(done=done, counts=counts)
                progress.advance(task, len(batch))
    return all_reduce_sum(torch.from_numpy(counts)).numpy()


def score(model: Transformer, batch: list[Example], vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Whether each query's likeliest id is its value, [B, Q] bool: of the first `vocab_size` ids, and of the pairs' values.

    The examples of `batch` have one shape. Raises RunError where logits are not finite.
    """
    import numpy as np
    import torch
    import torch.nn.functional as F

    from titan_dp.model.loss import check_finite

    tokens, queries, answers, values = (
        torch.from_numpy(np.stack([example[i] for example in batch])).to(model.output_weight.device) for i in range(4)
    )
    with torch.inference_mode():
        hidden, _ = model.step_hidden(tokens)
        asked = hidden.gather(1, queries[..., None].expand(-1, -1, hidden.shape[-1]))
        logits = F.linear(asked, model.output_weight[:vocab_size]).float()
        check_finite(logits, "the model's logits")
        right = logits.argmax(-1) == values.gather(1, answers)
        among = logits.gather(2, values[:, None].expand(-1, asked.shape[1], -1)).argmax(-1) == answers
    return right.cpu().numpy(), among.cpu().numpy()
