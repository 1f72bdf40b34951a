"""Multi-query associative recall: does a model find again what it has just read? On sequences made here, without text.

A sequence is BOS (if documents had it at the training), pairs "key value", and then queries: keys of these pairs in random
order, each followed by its value. At each queried key, the value should be the likeliest next token. It is the task of Arora et
al. 2023 (Zoology, arXiv 2312.04927) with two changes for models that were trained on text. The value follows its query, so that
the sequence goes on as it began; and queries lie uniformly in the slots of two tokens after the pairs, not at power-law gaps,
so that every distance is asked for. If --length leaves slots without a query, they hold keys that have no pair here. Keys and
values come from two disjoint random halves of the vocabulary without special tokens. A sequence is a function of --seed, its
number of pairs and its index alone.

Two levels say what an accuracy is worth: that of a random id (among all of the vocabulary, or among the sequence's values),
and the best guess of a model that knows which values there are and which of them have been an answer, but not which key has
which.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from titan_dp.config.arguments import natural, positive
from titan_dp.errors import UserError
from titan_dp.evals.session import Arrays, Result, Session, add_common_arguments, batched, run_evaluation
from titan_dp.output import add_format_option, number_table, print_table, print_written, save_figure, subplots, write_csv

if TYPE_CHECKING:
    from titan_dp.data.tokenizer import Tokenizer
    from titan_dp.inference.pretrained import Pretrained
    from titan_dp.model.transformer import Transformer

_DISTANCES = 32  # powers of two that a distance can lie below
_Z = 1.959964  # of a 95 % interval
_AMONG = (("", "all ids"), ("_among_values", "the sequence's values"))  # suffix of the names in the results, in words
_MARKERS = "os^Dv"
_LEVELS = ("chance", "chance_among_values", "unpaired_guess")


class Vocabulary(NamedTuple):
    """Ids of the task, [n] int64 each, disjoint."""

    keys: np.ndarray
    values: np.ndarray


class Example(NamedTuple):
    """A sequence, its questions and the answers."""

    tokens: np.ndarray
    """[T] int64."""
    queries: np.ndarray
    """[Q] int64, rising: positions of the queried keys."""
    answers: np.ndarray
    """[Q] int64: index of the value among `values`."""
    values: np.ndarray
    """[pairs] int64: ids of the pairs' values, in order."""
    distances: np.ndarray
    """[Q] int64: tokens from a key in its pair to the same key as a query."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, "sequences", batch_size=16, several=True)
    pairs = "pairs per sequence (default: 4 8 16 32 64)"
    parser.add_argument("--pairs", type=positive, nargs="+", default=[4, 8, 16, 32, 64], metavar="N", help=pairs)
    parser.add_argument("--queries", type=positive, help="most keys asked for per sequence (default: all of its keys)")
    parser.add_argument("--length", type=positive, help="tokens per sequence (default: the fewest for its pairs and queries)")
    parser.add_argument("--sequences", type=positive, default=256, help="sequences of each number of pairs (default: 256)")
    parser.add_argument("--seed", type=natural, default=0, help="of the sequences (default: 0)")
    add_format_option(parser)


def run(args: argparse.Namespace) -> int:
    return run_evaluation(evaluate, args)


def evaluate(s: Session) -> list[Result]:
    """Measure each checkpoint, write JSON and CSV files and the figure and print the tables; every rank calls it.

    Raises UserError if the vocabulary or --length is too small for the pairs.
    """
    args = s.args
    args.pairs = sorted(set(args.pairs))
    figure = args.out / f"recall.{args.format}"
    s.check_comparison("recall", figure.name)
    results = []
    for path in args.checkpoints:
        pretrained = s.load(path)
        vocabulary = split_vocabulary(pretrained.tokenizer, args.seed)
        _check_sizes(args, pretrained.tokenizer, vocabulary)
        names = ("pairs", "queries", "length", "sequences", "seed", "batch_size")
        settings = {name: getattr(args, name) for name in names} | {"tokenizer": pretrained.tokenizer.hash}
        result = Result(s, "recall", pretrained.source, settings, beside=(".csv",))
        if not result.results:
            counts = _measure(args, pretrained, vocabulary, result)
            found = _summary(args.pairs, counts, pretrained.tokenizer.vocab_size, args.queries)
            if s.world.is_main:
                _write_csv(found, result.beside(".csv"))
            result.finish(found)
        results.append(result)
    if s.world.is_main:
        _draw(results, figure)
        for result in results:
            _show(result)
        print_written(*(file for result in results for file in (result.path, result.beside(".csv"))), figure)
    return results


# -- sequences -----------------------------------------------------------------------------------------------------------


def split_vocabulary(tokenizer: Tokenizer, seed: int) -> Vocabulary:
    """Two random halves of the ids that are not special tokens."""
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
            f"that are not special tokens; ask for at most {half - spare} pairs"
        )
    shortest = _shortest(most, args.queries, _first_id(tokenizer))
    if args.length is not None and args.length < shortest:
        raise UserError(f"--length {args.length} is too short for {most} pairs and their queries; give at least {shortest}")


def _first_id(tokenizer: Tokenizer) -> int | None:
    """BOS, if documents began with it at the training."""
    return next(iter(tokenizer.beginning()), None)


def _shortest(pairs: int, queries: int | None, bos_id: int | None) -> int:
    return (bos_id is not None) + 2 * pairs + 2 * min(pairs, queries or pairs)


def make_example(
    vocabulary: Vocabulary, bos_id: int | None, pairs: int, queries: int | None, length: int | None, seed: int, index: int
) -> Example:
    """Sequence `index` of `pairs` pairs, as the module's docstring says; it has `length` tokens, or one less by parity."""
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


# -- answers -------------------------------------------------------------------------------------------------------------


def _measure(args: argparse.Namespace, pretrained: Pretrained, vocabulary: Vocabulary, result: Result) -> np.ndarray:
    """Counts [numbers of pairs, distances, 3] int64: queries; right among all ids; right among the sequence's values.

    Row b of the distances counts those d with 2^b <= d < 2^(b + 1).
    """
    tokenizer, zeros = pretrained.tokenizer, np.zeros((len(args.pairs), _DISTANCES, 3), np.int64)

    def count(indices: tuple[int, list[int]]) -> Arrays:
        row, of_row = indices
        counts, shape = np.zeros_like(zeros), (_first_id(tokenizer), args.pairs[row], args.queries, args.length, args.seed)
        batch = [make_example(vocabulary, *shape, index) for index in of_row]
        right, among = score(pretrained.model, batch, tokenizer.vocab_size)
        bins = np.log2(np.stack([example.distances for example in batch])).astype(int)
        for i, hits in enumerate((np.ones_like(right), right, among)):
            np.add.at(counts[row, :, i], bins, hits)
        return {"counts": counts}

    of_row = list(batched(range(args.sequences), args.batch_size))
    batches = [(row, indices) for row in range(len(args.pairs)) for indices in of_row]
    return result.sums(batches, count, {"counts": zeros}, total=len(batches))["counts"]


def score(model: Transformer, batch: list[Example], vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Whether each query's likeliest id is its value, [B, Q] bool: of the first `vocab_size` ids, and of the pairs' values.

    The examples of `batch` have one shape. Raises RunError if logits are not finite.
    """
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


# -- what an accuracy is worth -------------------------------------------------------------------------------------------


def unpaired_guess(pairs: int, queries: int | None) -> float:
    """Mean over a sequence's queries of 1 / (values that have not been an answer yet)."""
    asked = min(pairs, queries or pairs)
    return sum(1 / (pairs - i) for i in range(asked)) / asked


def wilson(right: int, asked: int) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson 1927), which takes the queries as independent."""
    p, z = right / asked, _Z**2 / asked
    middle, half = p + z / 2, _Z * math.sqrt(p * (1 - p) / asked + z / asked / 4)
    return max(0.0, (middle - half) / (1 + z)), min(1.0, (middle + half) / (1 + z))


def _summary(pairs: list[int], counts: np.ndarray, vocab_size: int, queries: int | None) -> dict[str, Any]:
    """The JSON of the results, from `_measure`'s counts [len(pairs), distances, 3]."""

    def entry(asked: int, *right: int) -> dict[str, Any]:
        found: dict[str, Any] = {"queries": asked}
        for hits, (suffix, _) in zip(right, _AMONG, strict=True):
            found |= {f"accuracy{suffix}": hits / asked, f"interval{suffix}": wilson(hits, asked)}
        return found

    def row(i: int, count: int) -> dict[str, Any]:
        bins = [(b, *counts[i, b].tolist()) for b in range(counts.shape[1]) if counts[i, b, 0]]
        levels = dict(zip(_LEVELS, (1 / vocab_size, 1 / count, unpaired_guess(count, queries)), strict=True))
        near = [{"distance": [2**b, 2 ** (b + 1) - 1], **entry(*numbers)} for b, *numbers in bins]
        return {"pairs": count, **entry(*counts[i].sum(0).tolist()), **levels, "by_distance": near}

    return {"by_pairs": [row(i, count) for i, count in enumerate(pairs)]}


def curves(results: dict[str, Any]) -> dict[str, float]:
    """What `titan-dp evaluate watch` follows over tokens: how much is right among all ids."""
    return {f"accuracy, {row['pairs']} pairs": row["accuracy"] for row in results["by_pairs"]}


# -- what is shown -------------------------------------------------------------------------------------------------------


def _write_csv(found: dict[str, Any], path: Path) -> None:
    """A row per number of pairs and range of distances."""
    rows = []
    for row in found["by_pairs"]:
        for near in row["by_distance"]:
            numbers = [x for suffix, _ in _AMONG for x in (near[f"accuracy{suffix}"], *near[f"interval{suffix}"])]
            numbers += [row[level] for level in _LEVELS]
            rows.append([row["pairs"], *near["distance"], near["queries"], *(f"{x:.6g}" for x in numbers)])
    measured = [f"{name}{suffix}" for suffix, _ in _AMONG for name in ("accuracy", "low", "high")]
    write_csv(path, ["pairs", "distance_from", "distance_to", "queries", *measured, *_LEVELS], rows)


def _draw(results: list[Result], path: Path) -> None:
    """Accuracy by number of pairs, a curve per checkpoint, a panel each for all ids and for the sequence's values.

    A figure in which nothing is better than a guess is small, and its axis ends above the guesses.
    """
    rows = results[0].results["by_pairs"]
    found = [row for result in results for row in result.results["by_pairs"]]
    learnt = any(row[f"interval{suffix}"][0] > row["unpaired_guess"] for row in found for suffix, _ in _AMONG)
    figure, panels = subplots(1, 2, figsize=(9, 4.2) if learnt else (6.5, 2.9), sharey=True)
    ticks = [row["pairs"] for row in rows]
    levels = (
        ("chance", "0.25", ":", f"chance among all ids: 1 in {1 / rows[0]['chance']:,.0f}"),
        ("chance_among_values", "0.25", "-.", "chance among the values: 1 in the number of pairs"),
        ("unpaired_guess", "0.55", "--", "best guess without knowing which key has which value"),
    )
    for panel, (suffix, words) in zip(panels, _AMONG, strict=True):
        curves = [_curve(panel, result, suffix, i - (len(results) - 1) / 2) for i, result in enumerate(results)]
        for name, colour, style, _ in levels:
            if name in (f"chance{suffix}", "unpaired_guess"):
                panel.plot(ticks, [row[name] for row in rows], style, color=colour, lw=1.2, zorder=1)
        panel.set_xscale("log", base=2)
        panel.set_xticks(ticks, map(str, ticks))
        panel.minorticks_off()
        panel.set_xlabel("pairs in the sequence")
        panel.set_title(f"likeliest of {words}", fontsize="medium")
    panels[0].set_ylim(*((-0.02, 1.02) if learnt else (-0.02, 1.15 * panels[0].dataLim.y1)))
    panels[0].yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    panels[0].set_ylabel("keys answered right, 95 % interval" if learnt else "keys answered right,\n95 % interval")
    figure.suptitle("Recall of values by key" + ("" if learnt else ": no better than guessing"), fontsize="large")
    guesses = [panels[0].plot([], [], style, color=colour, lw=1.2, label=label)[0] for _, colour, style, label in levels]
    figure.legend(handles=[*curves, *guesses], loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    save_figure(figure, path)


def _curve(panel: Any, result: Result, suffix: str, shift: float) -> Any:
    """One checkpoint's accuracies, moved a little aside so that equal ones do not hide one another."""
    rows = result.results["by_pairs"]
    x = [row["pairs"] * 1.08**shift for row in rows]
    y = [row[f"accuracy{suffix}"] for row in rows]
    bars = [[abs(row[f"interval{suffix}"][side] - row[f"accuracy{suffix}"]) for row in rows] for side in (0, 1)]
    marker = _MARKERS[round(2 * shift) % len(_MARKERS)]
    return panel.errorbar(x, y, bars, marker=marker, ms=4, lw=1, capsize=2, label=result.source.label)


def _show(result: Result) -> None:
    def cells(row: dict[str, Any]) -> Iterator[str]:
        yield from (str(row["pairs"]), f"{row['queries']:,}")
        for suffix, _ in _AMONG:
            low, high = (f"{100 * x:.1f}" for x in row[f"interval{suffix}"])
            yield from (f"{100 * row[f'accuracy{suffix}']:.1f} ({low}-{high})", f"{100 * row[f'chance{suffix}']:.1f}")
        yield f"{100 * row['unpaired_guess']:.1f}"

    columns = ("pairs", "queries", "all ids", "chance", "values", "chance", "unpaired guess")
    title = f"recall of {result.source.label}: right answers in % (95 % interval)"
    print_table(number_table(title, columns, map(cells, result.results["by_pairs"])), details=("queries",))
