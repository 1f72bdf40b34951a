"""`titan-dp evaluate KIND ...`: one module a kind, each with `add_arguments(parser)` and `run(args) -> exit code`."""

from __future__ import annotations

import argparse

from titan_dp.config.arguments import add_kinds

# kind: (module, what it measures)
KINDS = {
    "perplexity": ("titan_dp.evals.perplexity", "loss, perplexity and bits a byte on shards or text"),
    "lm-eval": ("titan_dp.evals.lm_eval", "tasks of EleutherAI's harness"),
    "length-extrapolation": ("titan_dp.evals.length_extrapolation", "loss by position, far beyond the training length"),
    "effective-rank": ("titan_dp.evals.effective_rank", "how much of each head's state is used, token by token"),
    "recall": ("titan_dp.evals.recall", "multi-query associative recall on generated sequences"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_kinds(parser, KINDS)


def run(args: argparse.Namespace) -> int:
    return args.run_kind(args)
