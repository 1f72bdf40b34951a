"""One training step of the real model under the real sharding, on fake tensors and a process group that only pretends.

What training runs is run here: `sharded_model`, `build_optimizer` and `train_step` themselves. So checkpointing
policies, FSDP2's prefetching and the shapes that our operators save are not modelled but observed. A step after the first is
what is recorded: optimizer state exists. For a GPU, the recurrence's operators run the code of its backend with kernels that
are not launched; softmax attention stays a CPU's operator. Compilation is left out: what it saves is unknown here.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from deltaproduct_kernels import resolve_backend
from torch._subclasses.fake_tensor import FakeTensorMode

from titan_dp import config
from titan_dp.data.batch import Batch
from titan_dp.distributed import World
from titan_dp.errors import SIGNALS, UserError
from titan_dp.estimate import ledger
from titan_dp.estimate.collectives import Collective
from titan_dp.estimate.ledger import Ledger, Peak, Work
from titan_dp.hardware import GPU, GPUS
from titan_dp.model import loss
from titan_dp.model.parallelize import sharded_model
from titan_dp.model.parametrization import scales
from titan_dp.train.optim import NonFiniteGuard, build_optimizer
from titan_dp.train.step import PhaseName, train_step

_CPU = torch.device("cpu")
_MICRO_BATCHES = 2
"""With accumulation we trace two micro-batches: one that keeps its gradients, and the last, which reduces them. Further ones
count as copies of the first; the time they take to add up gradients is ignored."""
_DOCUMENTS = 64
"""Document boundaries of a micro-batch if they are reset; the loader pads their number to a multiple of this."""


@dataclass(frozen=True)
class Step:
    """What a rank's optimizer step takes.

    `work` and `collectives` are the whole step's, accumulation included.
    """

    peak: Peak
    work: list[Work]
    collectives: list[Collective]


class FakeRun:
    """A model sharded over ranks that do not exist; use it within `fake_run`."""

    def __init__(self, c: config.Config, world: World) -> None:
        self.c, self.world, self.ledger = c, world, Ledger()
        self.model = sharded_model(c.model_copy(update={"compile": config.Compile(), "quantize": config.Quantize()}), world)

    def start(self) -> None:
        """Parameters and optimizer state: what there is before a step."""
        record = self.ledger
        self.model.to_empty(device=_CPU)
        self.model.train()
        for parameter in self.model.parameters():
            record.belongs(parameter, ledger.PARAMETERS)
        self.optimizers = build_optimizer(self.model, self.c.optimizer, scales(self.c))
        self.guard = NonFiniteGuard(_CPU)
        record.enter("optimizer")
        for optimizer in self.optimizers:
            for parameter in itertools.chain(*(group["params"] for group in optimizer.param_groups)):
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            optimizer.zero_grad()
            for value in itertools.chain(*(state.values() for state in optimizer.state.values())):
                if isinstance(value, torch.Tensor):
                    record.belongs(value, ledger.OPTIMIZER)

    def step(self, local_batch_size: int, accumulation: int) -> Step:
        """Record an optimizer step of `accumulation` micro-batches of `local_batch_size` sequences."""
        record, shown = self.ledger, min(accumulation, _MICRO_BATCHES)
        since, record.work, record.collectives = record.mark(), [], []
        record.enter("forward")
        batches = [self._batch(local_batch_size) for _ in range(accumulation)]  # all are held, as in training
        train_step(
            self.model,
            self.optimizers,
            self.guard,
            batches[:shown],
            world=self.world,
            max_norm=self.c.training.max_norm,
            lr_factor=1.0,
            householder_cost=self.c.training.householder_cost if self.c.model.adaptive_householder else None,
            flags=torch.zeros(len(SIGNALS), dtype=torch.int64),
            phase=self._phase,
        )
        repeated = accumulation - shown
        return Step(
            record.peak(since),
            record.work + [w for w in record.work if w.micro == 0] * repeated,
            record.collectives + [c for c in record.collectives if c.micro == 0] * repeated,
        )

    @contextmanager
    def _phase(self, name: PhaseName, micro: int) -> Iterator[None]:
        """Tell the record what is being done, until it is told of something else."""
        if name == "clip":
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    self.ledger.belongs(parameter.grad, ledger.GRADIENTS)
        phase = {"loss": "forward", "clip": "optimizer", "update": "optimizer"}.get(name, name)
        self.ledger.enter(phase, {"forward": ledger.ACTIVATIONS, "loss": ledger.LOSS}.get(name, ledger.OTHER), micro)
        yield

    def _batch(self, rows: int) -> Batch:
        """int64 ids and labels [B, T], and boundaries if documents are kept apart."""
        T = self.c.training.seq_len // self.c.parallelism.context_parallel_degree
        apart = self.c.data.source != "state_tracking" and self.c.data.document_boundaries == "reset"
        return {
            "input_ids": torch.zeros(rows, T, dtype=torch.int64),
            "labels": torch.zeros(rows, T, dtype=torch.int64),
            "cu_seqlens": torch.zeros(_DOCUMENTS, dtype=torch.int32) if apart else None,
        }


@contextmanager
def fake_run(c: config.Config, ranks: int, gpu: GPU | None) -> Iterator[FakeRun]:
    """One of `ranks` that train `c` on `gpu` (None: CPUs), the one that needs the most.

    Raises UserError if the ranks do not fit the degrees of parallelism or the backend does not fit the device. Call it without
    a process group: it makes one.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    importlib.import_module("torch.distributed._tools.fake_collectives")  # for tensors on the meta device
    # The busiest rank: under context parallelism the last one, whose softmax layers attend to every earlier segment; otherwise
    # rank 0, which holds the largest shards.
    rank = c.parallelism.context_parallel_degree - 1 if "attention" in c.model.mixers() else 0
    if rank >= ranks:
        rank = 0  # the degrees do not fit, which sharded_model says
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        run = FakeRun(c, World(rank, ranks, _CPU))
        with ExitStack() as stack:
            if gpu is not None or backend_on(c, gpu) == "triton":  # on a CPU: in Triton's interpreter, for tests
                stack.enter_context(_kernels_of(gpu or GPUS["H200"], backend_on(c, gpu)))
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            stack.enter_context(run.ledger)
            stack.enter_context(run.ledger.watching_resizes())
            run.start()
            yield run
    finally:
        dist.destroy_process_group()


def backend_on(c: config.Config, gpu: GPU | None) -> str:
    """The recurrence's backend on the device that `c` is trained on. Raises UserError for one that cannot run there."""
    wanted, model = c.model.backend, c.model
    if gpu is None:
        try:
            return resolve_backend(wanted, _CPU, dk=model.head_dim, dv=model.head_v_dim)
        except ValueError as error:
            raise UserError(f"model.{error}") from error
    if wanted == "fla":
        raise UserError("model.backend = 'fla' is not estimated: what its kernels keep and take is not known; choose 'auto'")
    if wanted not in ("auto", "triton"):
        return wanted
    reason = _why_not(c, gpu)
    if reason is not None and wanted == "triton":
        raise UserError(f"model.backend = 'triton' cannot run on {gpu.name}: {reason}; choose 'torch' or 'auto'")
    return "torch" if reason is not None else "triton"


def _why_not(c: config.Config, gpu: GPU) -> str | None:
    """As deltaproduct_kernels' own check, for a GPU that is not here."""
    from deltaproduct_kernels.triton_backend import configs, ops

    if configs.architecture(gpu.arch) is None:
        return f"it is of compute capability {gpu.arch / 10}; the kernels need 8.0"
    if find_spec("triton") is None:
        return None  # the machine of the run will have it
    from deltaproduct_kernels.triton_backend import launch

    with _replaced(launch, "INTERPRETED", True):  # the device is not looked at then, only sizes and dtype
        return ops.why_not(_CPU, getattr(torch, c.training.mixed_precision_param), c.model.head_dim, c.model.head_v_dim)


@contextmanager
def _kernels_of(gpu: GPU, backend: str) -> Iterator[None]:
    """Within it the model takes `backend` whatever device its tensors are on, and no kernel is launched."""
    with ExitStack() as stack:
        for name in ("interface", "front_end"):
            module = importlib.import_module(f"deltaproduct_kernels.{name}")
            stack.enter_context(_replaced(module, "resolve_backend", lambda *_, **__: backend))
        stack.enter_context(_replaced(loss, "CHUNK", {"cpu": loss.CHUNK["cuda"]}))
        if backend == "triton" and find_spec("triton") is not None:
            from deltaproduct_kernels.triton_backend import configs, front_end, launch

            arch = configs.architecture(gpu.arch) or gpu.arch

            class NoLaunch(launch.Runner):
                def __call__(self, *_: Any, **__: Any) -> None:
                    pass

            stack.enter_context(_replaced(launch, "INTERPRETED", False))
            for module in (launch, front_end):
                stack.enter_context(_replaced(module, "runner", lambda _: NoLaunch(arch, gpu.processors)))
        yield


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)
