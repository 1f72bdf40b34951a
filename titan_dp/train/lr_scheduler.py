"""The learning rate as a pure function of the step: warmup, then decay; nothing to save or restore.

Factors multiply each parameter group's peak rate. Step s (from 0) is the one that turns s updates into s + 1, and its factor is
never 0: warmup ends, at the peak, with step warmup_steps - 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from titan_dp import config
from titan_dp.checkpoint.manifest import saved_sections, saved_value
from titan_dp.config.describe import all_keys
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

    Raises UserError if the schedule would end before it begins.
    """
    total = (c.total_steps or steps) - c.start_step
    if total < 1:
        raise UserError(
            f"lr_scheduler.start_step = {c.start_step} is not before the end of the schedule, step {c.total_steps or steps}; "
            "lower it, or raise lr_scheduler.total_steps or the run's length"
        )
    warmup = min(c.warmup_steps, total)
    start = warmup if c.decay_ratio is None else max(warmup, total - decay_steps(c.decay_ratio, total))
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


def decay_steps(ratio: float, total: int) -> int:
    """Steps of the decay at the end of a schedule of `total` steps."""
    return round(ratio * total)


_RATES = {"AdamW": ("optimizer.lr",), "Muon": ("optimizer.lr", "optimizer.muon_lr")}


def rate_jump(saved: dict[str, Any], current: dict[str, Any]) -> str | None:
    """What to say if the learning rate of the next step is far from what the saved run's own schedule has for that step.

    A schedule that has ended keeps its last rate. None if the rates are near, or the saved run's length is not known.
    """
    before, now = saved_sections(saved["config"]), saved_sections(current["config"])
    step, old_steps = saved["step"], saved.get("steps", saved_value(before, "training.steps"))
    if not isinstance(old_steps, int):
        return None
    rates: dict[str, list[float]] = {}
    for sections, steps in ((before, old_steps), (now, current["steps"])):
        known = {key: value for key, value in sections.get("lr_scheduler", {}).items() if f"lr_scheduler.{key}" in all_keys()}
        try:
            factor = build_lr_scheduler(config.LRScheduler.model_validate(known), steps)(step)
            for key in _RATES[str(saved_value(now, "optimizer.name"))]:
                rates.setdefault(key, []).append(factor * float(saved_value(sections, key)))  # type: ignore[arg-type]
        except (ValueError, TypeError, ArithmeticError):  # a schedule of another version, or one that this run will refuse
            return None
    jumps = {key: (old, new) for key, (old, new) in rates.items() if not 0.5 * old <= new <= 1.1 * old}
    if not jumps or step >= current["steps"]:
        return None
    told = " and ".join(f"{key.partition('.')[2]} from {old:.3g} to {new:.3g}" for key, (old, new) in jumps.items())
    again = " ".join(f"--{key} {old:.6g}" for key, (old, _) in rates.items() if old > 0)
    ways = [f"--lr_scheduler.start_step {step} --lr_scheduler.warmup_steps 0 {again} decays again from there"] if again else []
    alike = {k: v for k, v in before.get("lr_scheduler", {}).items() if k != "total_steps"}
    if alike == {k: v for k, v in now.get("lr_scheduler", {}).items() if k != "total_steps"} and all(
        saved_value(before, key) == saved_value(now, key) for key in rates
    ):
        held = saved_value(before, "lr_scheduler.total_steps") or old_steps
        ways.insert(0, f"--lr_scheduler.total_steps {held} keeps the schedule it had, whose last rate then stays")
    return f"the learning rate jumps with step {step + 1}: {told}; {'; '.join(ways) or 'see lr_scheduler'}"
