"""How long a step should take on a named GPU and network: a roofline under assumptions that are printed with every result.

An operator takes the longer of two times: its FLOPs at a fraction of the peak, and its bytes at a fraction of the memory's
bandwidth, a smaller one for the recurrence, whose kernels neither of the two binds. A collective takes the time of its bytes
in a ring over the links it crosses, and the latencies of its hops. Collectives of the forward and the backward pass hide
behind that pass's compute, except each micro-batch's first gather, the step's last reduction and what the context group
exchanges within layers; those of the optimizer hide behind nothing. No number here is measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from titan_dp.estimate.collectives import SMALL, Collective
from titan_dp.estimate.ledger import Work
from titan_dp.hardware import GPU, Network

_HOP = 1e-6


@dataclass(frozen=True)
class Assumptions:
    """Fractions of data sheets' numbers that a run is taken to reach, and the shape of the cluster."""

    matmul: float = 0.6
    bandwidth: float = 0.8
    recurrence: float = 0.25
    """For the bytes of the recurrence's operators: what the modelled times of its kernels come to at dk = dv = 128 and n_h = 2
    on an H200 (docs/kernels.md); earlier kernels were measured at 0.15."""
    link: float = 0.8
    fusion: float = 3.0
    """torch.compile divides the bytes by this, of operators that are neither matrix products nor ours."""
    gpus_per_node: int = 8

    def sentences(self, gpu: GPU, network: Network, compiled: bool) -> list[str]:
        """What the predicted time rests on, for people."""
        return [
            f"matrix products reach {self.matmul:.0%} of {gpu.name}'s {gpu.tflops:g} TFLOP/s (dense bfloat16, data sheet)",
            f"all else moves its tensors at {self.bandwidth:.0%} of {gpu.bandwidth / 1e12:g} TB/s, the recurrence's kernels at "
            f"{self.recurrence:.0%} (a model of them)"
            + (f"; torch.compile divides those of pointwise operators by {self.fusion:g}" if compiled else ""),
            f"links reach {self.link:.0%} of {gpu.link / 1e9:g} GB/s per GPU inside a node of {self.gpus_per_node}, and of "
            f"{network.bandwidth / 1e9:g} GB/s per GPU between nodes ({network.name}); hops take {_HOP * 1e6:g} and "
            f"{network.latency * 1e6:g} us; rings, trees for small all-reduces",
            "communication hides behind compute within each pass, except a micro-batch's first gather, the last reduction, "
            "the exchanges of context parallelism and the optimizer's",
            "no data wait, no launch overhead, no stragglers, no validation or checkpoint",
        ]


@dataclass(frozen=True)
class Speed:
    """Seconds of an optimizer step."""

    compute: float
    communication: float
    exposed: float
    """Of the communication, what is not hidden."""

    @property
    def step(self) -> float:
        return self.compute + self.exposed


def links(c: Collective, gpus_per_node: int) -> tuple[float, float]:
    """Bytes a GPU sends inside its node and between nodes, on average over the GPUs of a node.

    Of a shift those of the slowest GPU: some message crosses to another node if any can.
    """
    inside = max(sum(r // gpus_per_node == c.ranks[0] // gpus_per_node for r in c.ranks), 1)
    if inside == len(c.ranks):
        return c.sent, 0.0
    if c.kind == "shift":
        return 0.0, c.sent
    return c.sent * (inside - 1) / inside, c.sent / inside


def seconds_of(c: Collective, gpu: GPU, network: Network, a: Assumptions) -> float:
    n, per_node = len(c.ranks), a.gpus_per_node
    if n == 1:
        return 0.0
    within, between = links(c, per_node)
    nodes = len({r // per_node for r in c.ranks})
    if c.kind == "all-reduce" and c.size <= SMALL:
        hops, far = 2 * math.ceil(math.log2(n)), 2 * math.ceil(math.log2(nodes))
    elif c.kind == "shift":
        hops, far = 1, min(nodes - 1, 1)
    else:
        hops = (n - 1) * (2 if c.kind == "all-reduce" else 1)
        far = (0 if nodes == 1 else nodes) * (2 if c.kind == "all-reduce" else 1)
    latency = max(hops - far, 0) * _HOP + far * network.latency
    return max(within / (gpu.link * a.link), between / (network.bandwidth * a.link)) + latency


def seconds_of_work(work: Iterable[Work], gpu: GPU, compiled: bool, a: Assumptions) -> float:
    total = 0.0
    for w in work:
        moved = w.bytes / a.fusion if compiled and w.kind == "other" and w.phase != "optimizer" else w.bytes
        fraction = a.recurrence if w.kind == "recurrence" else a.bandwidth
        total += max(w.flops / (gpu.tflops * 1e12 * a.matmul), moved / (gpu.bandwidth * fraction))
    return total


def predict(
    work: list[Work],
    collectives: list[Collective],
    accumulation: int,
    gpu: GPU,
    network: Network,
    compiled: bool,
    a: Assumptions,
) -> Speed:
    """Seconds of an optimizer step of `accumulation` micro-batches."""

    def cost(chosen: Iterable[Collective]) -> float:
        return sum(seconds_of(c, gpu, network, a) for c in chosen)

    exposed = cost(c for c in collectives if c.phase == "optimizer" or c.inside or c.size <= SMALL)
    for phase in ("forward", "backward"):
        hidden = [c for c in collectives if c.phase == phase and not c.inside and c.size > SMALL]
        computed = seconds_of_work((w for w in work if w.phase == phase), gpu, compiled, a)
        gathers = [c for c in hidden if c.kind == "all-gather"]
        edge = cost(gathers[:1]) * accumulation if phase == "forward" else cost([c for c in hidden if c not in gathers][-1:])
        exposed += max(edge, cost(hidden) - computed)
    return Speed(seconds_of_work(work, gpu, compiled, a), cost(collectives), exposed)
