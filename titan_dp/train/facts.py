"""What a run is, in words: for the banner of a run and for the dry run."""

from __future__ import annotations

from titan_dp import config
from titan_dp.model.size import embedding_parameters, model_size
from titan_dp.train.batch_plan import BatchPlan


def model_facts(c: config.Model, seq_len: int) -> dict[str, str]:
    """Sizes and FLOPs, for the dry run and the trainer's banner."""
    size = model_size(c, seq_len)
    kinds = {"matmul": size.matmul, "conv": size.conv, "recurrence": size.recurrence, "attention": size.attention}
    parts = " + ".join(f"{flops / 1e9:.3g} {kind}" for kind, flops in kinds.items() if flops)
    taken = ", all Householder steps taken" if c.adaptive_householder else ""
    return {
        "parameters": f"{size.parameters:,} ({size.parameters - embedding_parameters(c):,} without the embedding)",
        "FLOPs a token": f"{size.flops_per_token / 1e9:.4g} G = {parts} (forward + backward, no recomputation{taken})",
    }


def run_facts(c: config.Config, batch: BatchPlan, world_size: int) -> dict[str, str]:
    context = c.parallelism.context_parallel_degree
    ranks = f"{world_size} rank(s)" if context == 1 else f"{world_size // context} group(s) of {context} ranks"
    return {
        "batch": (
            f"{batch.global_batch_size} sequences of {batch.seq_len} = {batch.tokens_per_step:,} tokens a step "
            f"({ranks} x {batch.local_batch_size} x {batch.accumulation} accumulation)"
        ),
        "length": f"{batch.steps:,} steps = {batch.tokens / 1e9:.4g} B tokens",
        "precision": f"compute {c.training.mixed_precision_param}, reduction {c.training.mixed_precision_reduce}, "
        "norms, A_log, dt_bias and the sharded originals float32",
    }
