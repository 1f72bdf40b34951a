"""The learning rate as a pure function of the step: warmup, then decay; nothing to save or restore.

Factors multiply each parameter group's peak rate. Step s (from 0) is the one that turns s updates into s + 1, and its factor is
never 0: warmup ends, at the peak, with step warmup_steps - 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from titan_dp import config
from titan_dp.errors import UserError

_SHAPES: dict[str, Callable[[float], float]] = {  # from 1 at 0 to 0 at 1
    "cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x)),
    "linear": lambda x: 1 - x,
    "sqrt": lambda x: 1 - math.sqrt(x),
}


def build_lr_scheduler(c: config.LRScheduler, steps: int) -> Callable[[int], float]:
    """Factor of the peak learning rate at each step.

    Args:
        c: the schedule. Without decay_ratio the decay follows warmup; with it the rate is held until the last
            decay_ratio of the run (warmup-stable-decay; `sqrt` is the 1 - sqrt shape of Haegele et al. 2024).
        steps: of the run; c.total_steps takes precedence. All are counted from c.start_step.

    Raises UserError where the schedule would end before it begins.
    """
    total = (c.total_steps or steps) - c.start_step
    if total < 1:
        raise UserError(
            f"lr_scheduler.start_step = {c.start_step} is not before the end of the schedule, step {c.total_steps or steps}; "
            "lower it, or raise lr_scheduler.total_steps or the run's length"
        )
    warmup = min(c.warmup_steps, total)
    start = warmup if c.decay_ratio is None else max(warmup, total - round(c.decay_ratio * total))
    shape, floor = _SHAPES[c.decay_type], c.min_lr_factor

    def factor(step: int) -> float:
        step = max(0, step - c.start_step)
        if step < warmup:
            return (step + 1) / warmup
        if step < start:
            return 1.0
        done = min(1.0, (step - start + 1) / (total - start)) if total > start else 1.0
        return floor + (1 - floor) * shape(done)

    return factor
