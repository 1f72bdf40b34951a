"""What a run says of itself: to people in its banner, in run.json, and in the manifest of every checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from titan_dp import config
from titan_dp.config.load import Loaded
from titan_dp.config.mixers import Counts
from titan_dp.data.batch import Loader
from titan_dp.data.loader import ValidationLoader
from titan_dp.data.synthetic.loader import SyntheticSet
from titan_dp.distributed import World, device_name
from titan_dp.errors import counted
from titan_dp.files import short, si
from titan_dp.model.size import embedding_parameters, model_size
from titan_dp.output import duration
from titan_dp.train.batch_plan import BatchPlan

CPU_FLOPS = 10e9
"""FLOP/s of a thread that trains on a CPU, for estimates: modest, as debug.toml's in benchmarks/results/debug_run.md."""
_SLOW_STEP = 120.0
"""Seconds from which on a step's length is said before the first."""
_MANY_EPOCHS = 10
"""Text that is read up to 4 times is nearly worth new text, and ever less beyond that (Muennighoff et al. 2023)."""


@dataclass
class RunFacts:
    """The facts of a run that do not change from step to step, as the keys under which they are written."""

    loaded: Loaded
    world: World
    size: Counts
    batch: BatchPlan
    """Of what is left, once the run is resumed."""
    loader: Loader
    held_out: ValidationLoader | SyntheticSet | None
    branch: dict[str, Any] = field(default_factory=dict)
    """Of a run that branches from another's checkpoint: `branched_from`, its path, `branched_at`, its step, `shared_tokens`,
    those of that run up to there, which are this run's as well. Empty for others."""

    def _shared(self) -> dict[str, Any]:
        return {
            "git_commit": self.loaded.git_commit,
            "fingerprint": self.loader.fingerprint,
            "tokenizer": self.loader.tokenizer_name,
            "tokenizer_hash": self.loader.tokenizer_hash,
            "adds_bos": self.loader.adds_bos,
            "steps": self.batch.steps,
            "tokens_per_step": self.batch.tokens_per_step,
            **self.branch,
        }

    @property
    def step_seconds(self) -> float:
        """About how long a step takes on CPUs: an estimate from its FLOPs and CPU_FLOPS. 0 on GPUs."""
        if self.world.device.type != "cpu":
            return 0.0
        return self._step_flops / (CPU_FLOPS * self.world.size * torch.get_num_threads())

    @property
    def _step_flops(self) -> int:
        return self.size.flops_per_token * self.batch.tokens_per_step

    def warnings(self) -> list[str]:
        """A sentence for each plan that is hardly meant: steps that take minutes, and data that is read again and again."""
        found, training = [], self.loaded.config.training
        length = "training.steps" if training.tokens is None else "training.tokens"
        if (step := self.step_seconds) > _SLOW_STEP:
            threads = f"{counted(self.world.size, 'rank')} of {counted(torch.get_num_threads(), 'thread')}"
            rest = duration(step * (self.batch.steps - self.batch.steps_before))
            found.append(
                f"a step will take about {duration(step)} on this CPU, the rest of the run {rest} "
                f"(an estimate: {si(self._step_flops, 'FLOPs')} "
                f"per step, {threads} at {si(CPU_FLOPS, 'FLOP/s')} each); train on a GPU, or lower "
                f"training.global_batch_size, training.seq_len, {length} or the size of the model"
            )
        if (epochs := self.loader.epochs(self.batch.tokens)) > _MANY_EPOCHS:
            found.append(
                f"the run reads its data {epochs:,.0f} times, and text that is repeated so often teaches little; prepare more "
                f"text, or lower {length}"
            )
        return found

    def manifest(self) -> dict[str, Any]:
        """What a checkpoint keeps beside tensors: enough to refuse a wrong resume and to rebuild the model."""
        return self._shared() | {
            "config": self.loaded.resolved_toml(),
            "global_batch_size": self.batch.global_batch_size,
            "seed": self.loaded.config.debug.seed,
        }

    def run_json(self) -> dict[str, Any]:
        """What a reader of the metrics needs to know and cannot compute from config.toml."""
        held_out = self.held_out
        return self._shared() | {
            "planned_tokens": self.batch.tokens,
            "parameters": self.size.parameters,
            "embedding_parameters": embedding_parameters(self.loaded.config.model),
            "flops_per_token": self.size.flops_per_token,
            "validation_fingerprint": held_out.fingerprint if held_out else None,
            "validation_text_bytes": held_out.text_bytes if held_out else None,
            "bytes_per_token": held_out.bytes_per_token if held_out else None,
            "device": device_name(self.world),
            "world_size": self.world.size,
            "torch": torch.__version__,
        }


def planned(c: config.Config, batch: BatchPlan, world_size: int) -> dict[str, str]:
    """Sizes, FLOPs, batch, length and precision in words, for the banner and the dry run."""
    size = model_size(c.model, batch.seq_len)
    kinds = {"matmul": size.matmul, "conv": size.conv, "recurrence": size.recurrence, "attention": size.attention}
    parts = ", ".join(f"{flops / size.flops_per_token:.1%} {kind}" for kind, flops in kinds.items() if flops)
    taken = ", all Householder steps taken" if c.model.adaptive_householder else ""
    context = c.parallelism.context_parallel_degree
    groups = world_size // context
    ranks = counted(groups, "rank") if context == 1 else f"{counted(groups, 'group')} of {context} ranks"
    return {
        "parameters": f"{size.parameters:,} ({size.parameters - embedding_parameters(c.model):,} without the embedding)",
        "FLOPs per token": f"{si(size.flops_per_token, '')} ({parts}; forward + backward, no recomputation{taken})",
        "batch": (
            f"{counted(batch.global_batch_size, 'sequence')} of {batch.seq_len:,} = {short(batch.tokens_per_step)} tokens per "
            f"step ({ranks} x local batch {batch.local_batch_size} x accumulation {batch.accumulation})"
        ),
        "length": f"{counted(batch.steps, 'step')} = {short(batch.tokens)} tokens",
        "precision": f"compute {c.training.mixed_precision_param}, reduction {c.training.mixed_precision_reduce}, "
        "norms, A_log, dt_bias and the sharded originals float32",
    }
