"""One process of a training run, from its command line to its exit code. titan_dp/run.py calls it and hands in what lies above.

Read on in trainer.py (the loop), titan_dp/config/schema.py (every setting) and titan_dp/model/ (what is trained). Exit codes:
0 done, 2 the user's mistake, 75 stopped by a signal and saved (start it again), 1 anything else.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from titan_dp.errors import UserError, is_main_rank, run_main

if TYPE_CHECKING:
    from titan_dp.config import Config
    from titan_dp.config.load import Loaded
    from titan_dp.train.tasks import Sample


def start(dry_run: Callable[[Loaded], None], sampler: Callable[[Config], Sample]) -> int:
    """Train as the command line says; returns the exit code.

    Args:
        dry_run: prints what the run would need.
        sampler: makes what shows a sample of text at the end.
    """
    return run_main(lambda: _train(dry_run, sampler))


def _train(dry_run: Callable[[Loaded], None], sampler: Callable[[Config], Sample]) -> int:
    from titan_dp.config.load import load_config  # from here on an error or a Ctrl-C is one sentence

    try:
        loaded = load_config(sys.argv[1:])  # answers --help by itself
        if not (loaded.print_config or loaded.dry_run):
            from titan_dp.data.shards import require_data

            require_data(loaded.config)
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
        dry_run(loaded)
        return 0
    from titan_dp.distributed import distributed
    from titan_dp.train.trainer import Trainer

    c = loaded.config
    sample = sampler(c) if c.generate.enable else None
    with distributed(c.comm) as world:
        Trainer(loaded, world, sample).train()
    return 0
