"""One process of a training run: where train.py and `python -m titan_dp.train` end. The steps are in train/start.py.

Training knows nothing of what lies above it. The dry run and the sample of text at the end are handed in here.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from titan_dp.train.start import start


def main() -> int:
    """Train as the command line says; returns the exit code."""
    return start(_dry_run, _sampler)


def _dry_run(loaded: Any) -> None:
    from titan_dp.estimate.command import dry_run

    dry_run(loaded)


def _sampler(c: Any) -> Any:
    from titan_dp.inference import pretrained  # noqa: F401  # the sample needs it: loaded when the run starts, as its code was then
    from titan_dp.inference.generate import sample_text

    return partial(sample_text, c=c.generate, seed=c.debug.seed)
