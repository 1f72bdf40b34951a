"""`titan-dp COMMAND ...`: everything but training, which is train.py's.

A command is a module with `add_arguments(parser)` and `run(args) -> exit code`. Only the chosen one is imported, and
such modules import torch late, so that every --help answers at once. A new command is a line in COMMANDS.
"""

from __future__ import annotations

import argparse
import re
import sys
from importlib import import_module

from titan_dp.errors import UserError, run_main

# name: (module, what it does)
COMMANDS = {
    "prepare": ("titan_dp.data.prepare", "turn text files or a Hugging Face dataset into token shards"),
    "checkpoint": ("titan_dp.checkpoint.manifest", "list the checkpoints of a run, or verify one"),
    "export": ("titan_dp.inference.hf.export", "write a trained model as a Hugging Face folder"),
    "import": ("titan_dp.inference.hf.importer", "make a checkpoint of a Hugging Face folder"),
    "evaluate": ("titan_dp.evals.command", "measure a trained model: perplexity, lm-eval, length, effective rank, recall"),
    "generate": ("titan_dp.inference.generate", "continue a prompt with a trained model"),
    "match": ("titan_dp.studies.match", "find shapes of equal parameters or FLOPs for several n_h"),
    "sweep": ("titan_dp.studies.sweep", "expand a sweep file into runs, and launch them"),
    "state-tracking": (
        "titan_dp.studies.state_tracking.command",
        "word problems and formal languages: train, compare, inspect, prove",
    ),
    "estimate": ("titan_dp.estimate.command", "memory, communication and speed of a run, before there is a machine for it"),
    "report": ("titan_dp.studies.report.command", "tables, fits and plots of many runs"),
}


def main() -> int:
    """Entry point of the console script: returns the exit code."""
    return run_main(lambda: dispatch(sys.argv[1:]))


def dispatch(argv: list[str]) -> int:
    """Parse `argv` and run the command it names. argparse itself leaves with code 2 on a wrong argument."""
    parser = argparse.ArgumentParser(prog="titan-dp", description="Work around training runs; training itself is train.py.")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (module_name, summary) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary.capitalize() + ".", allow_abbrev=False)
        if argv[:1] == [name]:
            module = import_module(module_name)
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    args, rest = parser.parse_known_args(argv)
    if rest and hasattr(args, "settings") and (unknown := re.match(r"--(\w+\.[\w.]+)", rest[0])):
        from titan_dp.config.hints import explain_unknown

        raise UserError(f"command line: unknown key {unknown[1]}; {explain_unknown(unknown[1])}")
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
