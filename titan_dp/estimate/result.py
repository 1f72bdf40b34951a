"""What is said of a run: memory by part, communication, FLOPs, speed, and the largest local batch that fits.

`estimate` runs the fake step (trace.py) and counts; how a person reads it is command.py's. Bytes and FLOPs are counted. The
allowance is not: it stands for what no tensor shows on a GPU, and is a line of its own wherever a sum contains it.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec

import torch

from titan_dp import config
from titan_dp.distributed import World, data_world
from titan_dp.errors import UserError
from titan_dp.estimate.collectives import Collective
from titan_dp.estimate.speed import Assumptions, Speed, links, predict
from titan_dp.estimate.trace import FakeRun, Step, backend_on, fake_run
from titan_dp.files import to_json
from titan_dp.hardware import GPU, Network
from titan_dp.model.size import model_size
from titan_dp.train.batch_plan import BatchPlan, plan_batches

ALLOWANCE, ALLOWANCE_SHARE = 2 * 2**30, 0.05
"""Bytes, and a share of the tensors' peak, allowed on a GPU for its context, communication buffers, the libraries' workspaces
and the allocator's fragmentation. Chosen, not measured."""

_MOST = 4096
"""Sequences per micro-batch up to which the largest that fits is looked for."""


@dataclass
class Estimate:
    """Of one rank, unless it says otherwise. Bytes, seconds, FLOPs."""

    ranks: int
    device: str
    backend: str
    batch: BatchPlan
    notes: list[str]
    memory: dict[str, int]
    """By part, at the moment with the most in all."""
    tensors: int
    """The sum of `memory`."""
    peak_phase: str
    allowance: int
    available: int | None
    """Memory of the device; None if it is not known."""
    communication: dict[str, dict[str, float]]
    """Bytes a rank sends in a step by purpose: in all, inside a node, between nodes; and the number of calls."""
    model_flops: int
    """A step's, over all ranks, without recomputation."""
    flops_per_token: int
    executed_flops: int
    """A step's on one rank: matrix products and the recurrence as the operators run them, recomputation included."""
    speed: Speed | None = None
    mfu: float | None = None
    assumptions: list[str] = field(default_factory=list)
    largest_batch: int | None = None
    """Sequences per micro-batch whose peak and allowance fit in `available`; 0: not even one."""
    largest_peak: int | None = None
    more_would_fit: bool = False
    """Whether `largest_batch` is what the global batch allows, and one sequence more would fit as well."""

    @property
    def total(self) -> int:
        return self.tensors + self.allowance

    def as_json(self) -> str:
        batch = {**vars(self.batch), "tokens_per_step": self.batch.tokens_per_step}
        shown = {k: v for k, v in vars(self).items() if k not in ("batch", "speed")}
        speed = None if self.speed is None else {**vars(self.speed), "step": self.speed.step}
        return to_json({**shown, "total": self.total, "batch": batch, "predicted_seconds": speed}, indent=1)


def estimate(
    c: config.Config,
    ranks: int,
    gpu: GPU | None,
    network: Network,
    assumptions: Assumptions | None = None,
    *,
    available: int | None = None,
    search: bool = True,
) -> Estimate:
    """Count a step of `c` on `ranks` GPUs, or CPU ranks if `gpu` is None.

    Args:
        gpu: its peaks may be NaN; then no speed is predicted.
        available: bytes of a device; default: the GPU's data sheet.
        search: look for the largest local batch as well, which takes some further fake steps.

    Raises UserError for what training would refuse, except a global batch that does not fit the ranks: that is noted, and one
    micro-batch per rank is counted.
    """
    a = assumptions or Assumptions()
    backend = backend_on(c, gpu)
    rows = data_world(c.parallelism, World(0, ranks, torch.device("cpu"))).size
    batch, notes = _batch(c, rows)
    available = available or (None if gpu is None else int(gpu.memory))
    with fake_run(c, ranks, gpu) as run:
        step = run.step(batch.local_batch_size, batch.accumulation)
        largest: tuple[int | None, int | None] = (None, None)
        more_would_fit = False
        if search and available:
            limit = available if gpu is None else (available - ALLOWANCE) / (1 + ALLOWANCE_SHARE)
            total = None if c.training.global_batch_size == -1 or notes else batch.global_batch_size
            choices, accumulation = _choices(batch, total, rows)
            largest = _largest(run, step, batch, choices, accumulation, limit)
            if total is not None and largest[0] == choices[-1]:
                more_would_fit = run.step(choices[-1] + 1, 1).peak.bytes <= limit
    if c.compile.enable:
        notes.append("torch.compile's savings of memory are not counted")
    if c.quantize.linear != "none":
        notes.append("float8 is not counted: products are taken to be in bfloat16")
    if backend == "triton" and find_spec("triton") is None:
        notes.append("the kernels' working memory is not counted: the package triton is not installed here")
    size = model_size(c.model, c.training.seq_len)
    result = Estimate(
        ranks=ranks,
        device="cpu" if gpu is None else gpu.name,
        backend=backend,
        batch=batch,
        notes=notes,
        memory=step.peak.parts,
        tensors=step.peak.bytes,
        peak_phase=step.peak.phase,
        allowance=_allowance(step.peak.bytes, gpu),
        available=available,
        communication=_communication(step.collectives, a.gpus_per_node),
        model_flops=size.flops_per_token * batch.tokens_per_step,
        flops_per_token=size.flops_per_token,
        executed_flops=sum(w.flops for w in step.work),
        largest_batch=largest[0],
        largest_peak=largest[1],
        more_would_fit=more_would_fit,
    )
    if gpu is not None and math.isnan(gpu.tflops):
        notes.append(f"no speed is predicted: {gpu.name} is not in the table of data sheets")
    elif gpu is not None and c.training.mixed_precision_param == "bfloat16":
        compiled = c.compile.enable
        result.speed = predict(step.work, step.collectives, batch.accumulation, gpu, network, compiled, a)
        result.mfu = result.model_flops / (result.speed.step * ranks * gpu.tflops * 1e12)
        result.assumptions = a.sentences(gpu, network, compiled)
    elif gpu is not None:
        notes.append(
            "no speed is predicted for training.mixed_precision_param = float32: the efficiencies assumed are bfloat16's"
        )
    return result


def _batch(c: config.Config, rows: int) -> tuple[BatchPlan, list[str]]:
    try:
        return plan_batches(c.training, rows), []
    except UserError as error:
        plain = c.training.model_copy(update={"global_batch_size": -1, "local_batch_size": max(1, c.training.local_batch_size)})
        note = f"training would refuse this: {error}. Counted here: one micro-batch per rank"
        return plan_batches(plain, rows), [note]


def _choices(batch: BatchPlan, total: int | None, rows: int) -> tuple[Sequence[int], Callable[[int], int]]:
    """Candidate local batch sizes, and the accumulation of each; a global batch that is given (`total`) is kept."""
    if total is None:
        return range(1, _MOST), lambda _: batch.accumulation
    return [b for b in range(1, total // rows + 1) if total % (b * rows) == 0], lambda b: total // (b * rows)


def _allowance(tensors: int, gpu: GPU | None) -> int:
    return 0 if gpu is None else ALLOWANCE + int(ALLOWANCE_SHARE * tensors)


def _communication(collectives: list[Collective], gpus_per_node: int) -> dict[str, dict[str, float]]:
    table: dict[str, dict[str, float]] = {}
    for c in collectives:
        within, between = links(c, gpus_per_node)
        row = table.setdefault(c.purpose, {"sent": 0.0, "inside a node": 0.0, "between nodes": 0.0, "calls": 0})
        row["sent"] += c.sent
        row["inside a node"] += within
        row["between nodes"] += between
        row["calls"] += 1
    return table


def _largest(
    run: FakeRun, step: Step, batch: BatchPlan, choices: Sequence[int], accumulation: Callable[[int], int], limit: float
) -> tuple[int, int | None]:
    """The largest local batch of `choices` whose tensors take at most `limit` bytes, and its peak; (0, None) if none does.

    The peak is nearly affine in the batch, so a line through two counted batches guesses the next; the answer and the choice
    after it are always counted themselves.
    """
    counted = {batch.local_batch_size: step.peak.bytes}
    low, high, guess = -1, len(choices), 0
    while high - low > 1:
        b = choices[guess]
        if b not in counted:
            counted[b] = run.step(b, accumulation(b)).peak.bytes
        low, high = (guess, high) if counted[b] <= limit else (low, guess)
        guess = low + 1
        if len(counted) > 1:
            (first, less), (last, more) = sorted(counted.items())[-2:]
            slope = max((more - less) / (last - first), 1.0)
            guess = max(bisect_right(choices, first + (limit - less) / slope) - 1, guess)
        guess = min(guess, high - 1)
    return (0, None) if low < 0 else (choices[low], counted[choices[low]])
