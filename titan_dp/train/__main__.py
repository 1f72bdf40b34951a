"""One process of a training run: `python -m titan_dp.train --config NAME [--section.key VALUE ...]`, or train.py.

`titan-dp train` and torchrun start as many as there are GPUs. This file puts a run together. What it hands to the trainer from
above it (a sample of text for the end) is loaded by its name, as cli.py loads commands. Read on in trainer.py (the loop),
titan_dp/config/schema.py (every setting) and titan_dp/model/ (what is trained). Exit codes: 0 done, 2 the user's mistake,
75 stopped by a signal and saved (start it again), 1 anything else.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from importlib import import_module

from titan_dp.errors import UserError, is_main_rank, run_main


def main() -> int:
    """Train as the command line says; returns the exit code."""
    return run_main(train)


def train() -> int:
    from titan_dp.config.load import load_config  # from here on an error or a Ctrl-C is one sentence

    try:
        loaded = load_config(sys.argv[1:])  # answers --help by itself
    except UserError as mistake:
        if int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1 and not {"--dry-run", "--print-config"} & set(sys.argv):
            from titan_dp.faults.agreement import share_failure

            share_failure(mistake)  # other nodes may have another command, or other files, and would wait for this one
        raise
    if loaded.print_config:
        if is_main_rank():
            print(loaded.annotated_toml())
        return 0
    # torch takes seconds to import: only from here on.
    if loaded.dry_run:
        import_module("titan_dp.estimate.command").dry_run(loaded)
        return 0
    from titan_dp.distributed import distributed
    from titan_dp.train.trainer import Trainer

    c = loaded.config
    sample = None
    if c.generate.enable:
        import_module("titan_dp.inference.pretrained")  # the sample needs it: loaded now, as the code that started
        sample = partial(import_module("titan_dp.inference.generate").sample_text, c=c.generate, seed=c.debug.seed)
    with distributed(c.comm) as world:
        Trainer(loaded, world, sample).train()
    return 0


if __name__ == "__main__":
    sys.exit(main())
