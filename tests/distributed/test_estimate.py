"""An estimate against real steps: the trainer's own, on gloo ranks, with torch's profiler counting every allocation.

The long form, larger models and the resident set of the process, is benchmarks/estimate.py.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed.allocator import most_held
from tests.distributed.harness import run_ranks
from titan_dp.config.load import load_config
from titan_dp.distributed import World, current_world, data_world, local_tensor
from titan_dp.estimate.collectives import Collective, collective_of
from titan_dp.estimate.trace import fake_run
from titan_dp.train.batch_plan import plan_batches
from titan_dp.train.trainer import Trainer

MODEL = [
    "--model.hidden_size=256", "--model.num_hidden_layers=3", "--model.num_heads=4", "--model.head_dim=64",
    "--model.intermediate_size=512", "--model.attention_layers=[1]", "--training.seq_len=256", "--training.local_batch_size=2",
    "--training.global_batch_size=-1", "--data.document_boundaries=carry", "--checkpoint.enable=false",
    "--generate.enable=false", "--validation.enable=false", "--metrics.enable_tensorboard=false",
]  # fmt: skip


class CollectiveCounter(TorchDispatchMode):
    """Records the collectives of whatever runs within it."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        if (found := collective_of(func, args, out)) is not None:
            self.collectives.append(found)
        return out


def real_step(settings: list[str], scratch: Path) -> tuple[int, list[Collective]]:
    """Most bytes of torch's CPU allocator in a step after the first, and the step's collectives."""
    world = current_world()
    trainer = Trainer(load_config(settings), world)
    steps = iter(trainer.loader)

    def step() -> None:
        trainer._train_step(next(steps))

    step()
    tensors = [local_tensor(p.detach()) for p in trainer.model.parameters()]
    for optimizer in trainer.optimizers:
        tensors += [local_tensor(v) for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    held = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
    with CollectiveCounter() as counter:
        step()
    peak = held + most_held(step, scratch / f"trace-{world.rank}.json")
    if trainer.lock is not None:
        trainer.lock.close()
    return peak, counter.collectives


CASES = {
    "FSDP2, selective checkpointing": (2, ["--activation_checkpoint.mode=selective"]),
    "HSDP, accumulation, bfloat16": (
        4,
        [
            "--parallelism.data_parallel_replicate_degree=2",
            "--training.global_batch_size=16",
            "--training.mixed_precision_param=bfloat16",
        ],
    ),
    "Muon, full checkpointing": (2, ["--optimizer.name=Muon", "--activation_checkpoint.mode=full"]),
    "context parallelism": (4, ["--parallelism.context_parallel_degree=2"]),
}


@pytest.mark.parametrize("case", CASES)
def test_memory_and_communication_are_those_of_a_real_step(case: str, tiny_config: Path, tmp_path: Path) -> None:
    ranks, own = CASES[case]
    settings = ["--config", str(tiny_config), *MODEL, *own]
    c = load_config(settings).config
    seen = c.parallelism.context_parallel_degree - 1  # which rank the estimate is of in a hybrid
    peak, collectives = run_ranks(ranks, real_step, settings, tmp_path)[seen]
    with fake_run(c, ranks, None) as run:
        batch = plan_batches(c.training, data_world(c.parallelism, World(0, ranks, torch.device("cpu"))).size)
        step = run.step(batch.local_batch_size, batch.accumulation)
    assert step.peak.bytes == pytest.approx(peak, rel=0.001)
    # What context parallelism exchanges within operators the counter cannot see; a unit test has its arithmetic.
    assert kinds([c for c in step.collectives if not c.inside]) == kinds(collectives)


def kinds(collectives: list[Collective]) -> Counter[tuple[str, int, int]]:
    """How often each kind of collective of so many bytes is called among so many ranks."""
    return Counter((c.kind, c.size, len(c.ranks)) for c in collectives)
