"""A small sharded model for tests of what surrounds it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from titan_dp import config
from titan_dp.distributed import current_world
from titan_dp.model import parallelize
from titan_dp.model.transformer import Transformer
from titan_dp.train.optim import Optimizers, build_optimizer

TINY = config.Model(
    hidden_size=32,
    num_hidden_layers=2,
    num_heads=2,
    head_dim=16,
    use_forget_gate=True,
    intermediate_size=64,
    vocab_size=64,
    initializer_range=0.02,
)
FLOAT32 = config.Training(mixed_precision_param="float32")


def sharded_model(
    replicate: int = 1,
    training: config.Training = FLOAT32,
    ac: config.ActivationCheckpoint | None = None,
    compile: bool = False,
    seed: int = 0,
    c: config.Model = TINY,
    context: int = 1,
) -> Transformer:
    """A model on all ranks, initialised as the trainer does it; `context` ranks share rows."""
    parallelism = config.Parallelism(data_parallel_replicate_degree=replicate, context_parallel_degree=context)
    sections = {"model": c, "training": training, "parallelism": parallelism, "compile": config.Compile(enable=compile)}
    own = config.Config.model_construct(**sections, activation_checkpoint=ac or config.ActivationCheckpoint())
    model = parallelize.sharded_model(own, current_world())
    model.to_empty(device="cpu")
    model.init_weights(seed)
    return model


@contextmanager
def pretended(rank: int, ranks: int) -> Iterator[None]:
    """A process group whose other ranks do not exist; what they would send is not there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    importlib.import_module("torch.distributed._tools.fake_collectives")  # for tensors on the meta device
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def optimizer_of(model: Transformer, **settings: object) -> Optimizers:
    return build_optimizer(model, config.Optimizer(**settings))  # type: ignore[arg-type]


def backward(model: Transformer, seed: int, factor: float = 1.0) -> None:
    """Gradients of one batch, the same on every rank; `factor` multiplies the loss of rank 0."""
    tokens = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(seed))
    (model(tokens, tokens).loss / 48 * (factor if torch.distributed.get_rank() == 0 else 1.0)).backward()


def clean(name: str) -> str:
    """A parameter's name without what activation checkpointing adds."""
    return name.replace("_checkpoint_wrapped_module.", "")


def full_state(model: Transformer) -> dict[str, torch.Tensor]:
    """Whole parameters by name, copied."""
    return {clean(name): p.full_tensor().detach().clone() for name, p in model.named_parameters()}  # type: ignore[attr-defined]


def optimizer_state(optimizers: Optimizers) -> list[torch.Tensor]:
    """Copies of every local moment and step count."""
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    tensors = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
    return [(t.to_local() if hasattr(t, "to_local") else t).detach().clone() for t in tensors]
