"""`titan-dp train --config NAME`: one process per GPU of this machine, or two on its CPUs.

The configuration is checked here, and whether its data is there, so that a mistake is one sentence before any process starts.
This process then becomes the run: `python -m titan_dp.train`, under launch/torchrun.py if there are several processes.
"""

from __future__ import annotations

import argparse
import os
import sys

from titan_dp.config.arguments import positive
from titan_dp.config.load import load_config
from titan_dp.errors import UserError
from titan_dp.hardware import processes


def run(argv: list[str]) -> int:
    """Train with `argv`: settings as for train.py, and --nproc N. Does not return if the run starts.

    Raises UserError for whatever is wrong with the command line or the files it names.
    """
    nproc, settings = take_nproc(argv)
    loaded = load_config(settings)
    if loaded.dry_run and "RANK" not in os.environ:  # one process, which speaks of as many as the run would have
        os.environ["WORLD_SIZE"] = str(nproc or processes())
    if loaded.print_config or loaded.dry_run or "RANK" in os.environ:  # RANK: torchrun has started this process
        nproc = 1
    else:
        from titan_dp.data.shards import require_data  # numpy, which --help can do without

        require_data(loaded.config)
    sys.stdout.flush()
    command = training_command(settings, nproc or processes())
    os.execv(command[0], command)


def take_nproc(argv: list[str]) -> tuple[int | None, list[str]]:
    """The number of processes that `argv` asks for, None if it does not, and the other arguments."""
    nproc, rest, words = None, [], iter(argv)
    for word in words:
        name, has_value, text = word.partition("=")
        if name != "--nproc":
            rest.append(word)
            continue
        try:
            nproc = positive(text if has_value else next(words, ""))
        except argparse.ArgumentTypeError as error:
            raise UserError(f"--nproc {error}") from error
    return nproc, rest


def training_command(arguments: list[str], nproc: int) -> list[str]:
    """What trains with `arguments` (of train.py) in `nproc` processes on this machine."""
    launcher = ["-m", "titan_dp.launch.torchrun", "--standalone", f"--nproc-per-node={nproc}"] if nproc > 1 else []
    return [sys.executable, *launcher, "-m", "titan_dp.train", *arguments]
