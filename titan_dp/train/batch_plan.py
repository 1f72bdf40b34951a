"""The arithmetic of a run: ranks, accumulation, steps and tokens from a few settings.

Pure functions of the configuration and the number of ranks, shared by the trainer and by `--dry-run`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from titan_dp import config
from titan_dp.errors import UserError, counted


@dataclass(frozen=True)
class BatchPlan:
    """How an optimizer step's sequences are spread over ranks and micro-batches."""

    local_batch_size: int
    global_batch_size: int
    accumulation: int
    seq_len: int
    steps: int
    """Of the whole run, including those before it was resumed."""
    steps_before: int = 0
    tokens_before: int = 0
    """Done before the run was resumed, perhaps in steps of another size."""

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.seq_len

    @property
    def tokens(self) -> int:
        """Of the whole run."""
        return self.tokens_before + (self.steps - self.steps_before) * self.tokens_per_step


def plan_batches(training: config.Training, world_size: int) -> BatchPlan:
    """Resolve a batch size of -1, gradient accumulation, and steps from tokens (rounded up).

    Raises UserError if the global batch is not a whole number of micro-batches.
    """
    local, total = training.local_batch_size, training.global_batch_size
    per_pass = world_size * max(1, local)
    total = per_pass if total == -1 else total
    if total < per_pass or total % per_pass:
        below = max(1, total // per_pass) * per_pass
        several = f"training.local_batch_size = {local} times " if local > 0 else "the "
        raise UserError(
            f"training.global_batch_size = {total} is not a multiple of {several}{counted(world_size, 'rank')}; {below} or "
            f"{below + per_pass} would be" + (", or choose another local_batch_size" if local > 0 else "")
        )
    local = local if local > 0 else total // world_size
    tokens_per_step = total * training.seq_len
    steps = training.steps or -(-training.tokens // tokens_per_step)  # type: ignore[operator]  # one of the two is set
    return BatchPlan(local, total, total // (local * world_size), training.seq_len, steps)


def plan_rest(plan: BatchPlan, training: config.Training, step: int, tokens: int, last_step_tokens: int) -> BatchPlan:
    """The plan of a run that goes on after `step` steps over `tokens` tokens; the last step had `last_step_tokens`.

    A run over training.tokens ends once it has seen them, whatever size its steps had. Raises UserError if more is done than
    the settings ask for.
    """
    ways = "ask for at least that, go on from an earlier step with checkpoint.load_step, or choose another job.run_name"
    if training.tokens is None:
        if step > plan.steps:
            raise UserError(f"training.steps = {plan.steps}, but the run to resume has done {step} steps; {ways}")
        return replace(plan, steps_before=step, tokens_before=tokens)
    left = training.tokens - tokens
    if -left >= max(plan.tokens_per_step, last_step_tokens):  # less than a step too many is how tokens become whole steps
        raise UserError(f"training.tokens = {training.tokens}, but the run to resume has seen {tokens} tokens; {ways}")
    return replace(plan, steps=step + max(0, -(-left // plan.tokens_per_step)), steps_before=step, tokens_before=tokens)
