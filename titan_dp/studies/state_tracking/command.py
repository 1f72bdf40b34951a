"""`titan-dp state-tracking KIND ...`: one module a kind, each with `add_arguments(parser)` and `run(args) -> exit code`."""

from __future__ import annotations

import argparse

from titan_dp.config.arguments import add_kinds

# kind: (module, what it does)
KINDS = {
    "train": (
        "titan_dp.studies.state_tracking.train",
        "train models on a word problem or a formal language, several seeds of each",
    ),
    "report": ("titan_dp.studies.state_tracking.report", "table and curves of trained models, from their run folders"),
    "inspect": (
        "titan_dp.studies.state_tracking.inspect",
        "what a trained model does: step sizes, keys, the orbit of its state",
    ),
    "theory": ("titan_dp.studies.state_tracking.theory", "the theorems as executable checks on weights written by hand"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_kinds(parser, KINDS)


def run(args: argparse.Namespace) -> int:
    return args.run_kind(args)
