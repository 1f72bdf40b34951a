"""The arithmetic of a run: ranks, accumulation, steps and tokens from a few settings.

Pure functions of the configuration and the number of ranks, shared by the trainer and by `--dry-run`.
"""

from __future__ import annotations

from dataclasses import dataclass

from titan_dp import config
from titan_dp.errors import UserError


@dataclass(frozen=True)
class BatchPlan:
    """How an optimizer step's sequences are spread over ranks and micro-batches."""

    local_batch_size: int
    global_batch_size: int
    accumulation: int
    seq_len: int
    steps: int

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.seq_len

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_per_step


def plan_batches(training: config.Training, world_size: int) -> BatchPlan:
    """Resolve global_batch_size = -1, gradient accumulation, and steps from tokens (rounded up).

    Raises UserError where the global batch is no whole number of micro-batches.
    """
    per_pass = training.local_batch_size * world_size
    total = per_pass if training.global_batch_size == -1 else training.global_batch_size
    if total < per_pass or total % per_pass:
        below = max(1, total // per_pass) * per_pass
        raise UserError(
            f"training.global_batch_size = {training.global_batch_size} is no multiple of training.local_batch_size = "
            f"{training.local_batch_size} times {world_size} rank(s); {below} or {below + per_pass} would be, "
            "or choose another local_batch_size"
        )
    tokens_per_step = total * training.seq_len
    steps = training.steps or -(-training.tokens // tokens_per_step)  # type: ignore[operator]  # one of the two is set
    return BatchPlan(training.local_batch_size, total, total // per_pass, training.seq_len, steps)
