"""`titan-dp COMMAND ...`: training and everything around it.

A command is a module with `add_arguments(parser)` and `run(args) -> exit code`; a command of several kinds is a table of such
modules. Only the chosen module is imported, and such modules import torch late, so that every --help answers at once. A new
command is a line in COMMANDS.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from typing import Any

from titan_dp.config.arguments import Parser, parse
from titan_dp.errors import run_main

Commands = dict[str, tuple[Any, str]]
"""By name: (the module, or the commands of a lower level; what it does)."""

EVALUATIONS: Commands = {
    "perplexity": ("titan_dp.evals.perplexity", "loss, perplexity and bits per byte on shards or text"),
    "lm-eval": ("titan_dp.evals.lm_eval", "tasks of EleutherAI's harness"),
    "length-extrapolation": ("titan_dp.evals.length_extrapolation", "loss by position, far beyond the training length"),
    "effective-rank": ("titan_dp.evals.effective_rank", "how much of each head's state is used, token by token"),
    "recall": ("titan_dp.evals.recall", "multi-query associative recall on generated sequences"),
    "watch": ("titan_dp.evals.watch", "evaluate the checkpoints of a run beside its training, each once"),
}
STATE_TRACKING: Commands = {
    "train": (
        "titan_dp.studies.state_tracking.train",
        "train models on a word problem or a formal language, several seeds of each",
    ),
    "report": ("titan_dp.studies.state_tracking.report", "table and curves of trained models, from their run folders"),
    "inspect": (
        "titan_dp.studies.state_tracking.inspection",
        "what a trained model does: step sizes, keys, the orbit of its state",
    ),
    "theory": ("titan_dp.studies.state_tracking.theory", "the theorems as executable checks on weights written by hand"),
}
DATA: Commands = {
    "inspect": ("titan_dp.data.inspect.command", "what is in token shards: lengths, text, duplicates, a batch of a run"),
}
COMMANDS: Commands = {
    "train": ("titan_dp.train.command", "train a model, in one process per GPU of this machine"),
    "prepare": ("titan_dp.data.prepare", "turn text files or a Hugging Face dataset into token shards"),
    "data": (DATA, "look at token shards before training on them"),
    "checkpoint": ("titan_dp.checkpoint.command", "list the checkpoints of a run, or verify one"),
    "export": ("titan_dp.inference.hf.export", "write a trained model as a Hugging Face folder"),
    "import": ("titan_dp.inference.hf.importer", "make a checkpoint of a Hugging Face folder"),
    "evaluate": (EVALUATIONS, "measure a trained model: perplexity, lm-eval, length, effective rank, recall"),
    "generate": ("titan_dp.inference.generate", "continue a prompt with a trained model"),
    "match": ("titan_dp.studies.match", "find shapes of equal parameters or FLOPs for several n_h"),
    "coordinate-check": ("titan_dp.studies.coordinate_check", "do activations keep their size over width, depth and n_h?"),
    "sweep": ("titan_dp.studies.sweep", "expand a sweep file into runs, and launch them"),
    "state-tracking": (STATE_TRACKING, "word problems and formal languages: train, compare, inspect, prove"),
    "estimate": ("titan_dp.estimate.command", "memory, communication and speed of a run, before there is a machine for it"),
    "check-kernels": ("titan_dp.model.check_kernels", "do the Triton kernels compute the right numbers on this GPU?"),
    "forecast": ("titan_dp.studies.report.forecast_command", "what a larger run will come out as, by the laws of smaller ones"),
    "report": ("titan_dp.studies.report.command", "tables, fits and plots of many runs"),
}


_ONE_PROCESS = "titan_dp.run"


def train_here() -> int:
    """What `python -m titan_dp.train` does: one process of a training run. Returns the exit code."""
    return int(import_module(_ONE_PROCESS).main())


def main() -> int:
    """Entry point of the console script: returns the exit code."""
    return run_main(lambda: dispatch(sys.argv[1:]))


def dispatch(argv: list[str]) -> int:
    """Parse `argv` and run the command it names. argparse itself leaves with code 2 on a wrong argument."""
    if argv[:1] == ["train"]:  # its arguments are the configuration's own, whose --help lists them all
        return import_module(COMMANDS["train"][0]).run(argv[1:])
    parser = Parser(prog="titan-dp", description="Pretraining for DeltaProduct language models.")
    if argv[:1] == ["--version"]:  # looked up only where it is asked for
        from importlib.metadata import version

        print(f"titan-dp {version('titan_dp')}")
        return 0
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    _add_commands(parser, COMMANDS, argv)
    args = parse(parser, argv)
    return args.run(args)


def _add_commands(parser: argparse.ArgumentParser, commands: Commands, argv: list[str]) -> None:
    """A subcommand for each; only of the one that `argv` names is the module imported."""
    parser.set_defaults(run=lambda args: print(parser.format_help(), end="") or 0)  # of a command without its kind
    subparsers = parser.add_subparsers(metavar="COMMAND" if commands is COMMANDS else "KIND")
    for name, (where, summary) in commands.items():
        subparser = subparsers.add_parser(
            name, help=summary, description=summary[0].upper() + summary[1:] + ".", allow_abbrev=False
        )
        if argv[:1] != [name]:
            continue
        if isinstance(where, dict):
            _add_commands(subparser, where, argv[1:])
        else:
            module = import_module(where)
            subparser.description = (module.__doc__ or summary).split("\n\n")[0]
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)


if __name__ == "__main__":
    sys.exit(main())
