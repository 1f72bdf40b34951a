"""Bytes and FLOPs of every kernel, counted from what the code loads, stores and multiplies; no Triton needed.

Bytes count each load and store once; what a second program reads again soon after is taken to hit the second-level cache.
FLOPs are those of matrix products as executed, 2 a multiply-add, whole tiles whether full or not; the triangular
solve counts its merges. `roofline` turns both into the least time a chip can need.
"""

from __future__ import annotations

from typing import NamedTuple

from deltaproduct_kernels.triton_backend.layout import EVERY, Size


class Cost(NamedTuple):
    kernel: str
    bytes: int
    flops: int


def _sizes(s: Size) -> tuple[int, int, int, int, int]:
    """Bytes an element; tokens and steps of all heads; bytes of Q and of K, which heads of a group share."""
    w, tokens = s.bits // 8, s.B * s.T
    Q = tokens * s.key_heads * s.dk * w
    return w, tokens * s.H, tokens * s.H * s.n, Q, Q * s.n


def _chunks(s: Size) -> int:
    """Chunks of all heads; for packed sequences their bound."""
    return s.slots(s.chunk) * s.H


def forward(s: Size, *, save: bool = True) -> list[Cost]:
    """`launch.forward` for sequences that are not split."""
    w, th, rows, Q, K = _sizes(s)
    R, C = s.rows, s.tile_tokens
    y, gates = _chunks(s) * R * R * w * s.erase, _chunks(s) * R * 4 * s.gated
    out = [
        Cost(
            "solve",
            ((K + rows * 4) * s.erase + th * 4 * s.gated) + y + gates,
            2 * _chunks(s) * (R * R * s.dk + 6 * R * 16**2 + (4 * R**3 if R == 64 else 0)) * s.erase,
        )
    ]
    sparse = _chunks(s) // EVERY * s.dk * s.dv * w * save
    read = Q + K + rows * (s.dv * w + 4) + y + gates
    macs = R * s.dk * s.dv * (1 + s.erase) + R * R * s.dv * s.erase  # K S and U^T K; Y E
    macs += C * s.dk * s.dv + R * C * (s.dk + s.dv)  # the read-out
    return [*out, Cost("states", read + th * s.dv * w + sparse, 2 * _chunks(s) * macs)]


def backward(s: Size) -> list[Cost]:
    """`launch.backward` for sequences that are not split."""
    w, th, rows, Q, K = _sizes(s)
    R, C = s.rows, s.tile_tokens
    y, gates, states = _chunks(s) * R * R * w * s.erase, _chunks(s) * R * 4 * s.gated, _chunks(s) * s.dk * s.dv * w
    adjoint = Cost(
        "adjoint",
        Q + K + rows * (s.dv * w + 4) + th * s.dv * w + y + gates + states,
        2 * _chunks(s) * (R * s.dk * s.dv * (1 + s.erase) + C * s.dk * s.dv + R * C * (s.dk + s.dv) + R * R * s.dv * s.erase),
    )
    between = 2 * states // EVERY  # two tiles a group for the states between its chunks
    macs = R * s.dk * s.dv * (2 + 2 * s.erase) + R * R * s.dv * s.erase  # K S, Y E; E dS', dV S; U^T K
    macs += R * C * 3 * s.dk + R * C * s.dv + C * s.dk * s.dv + R * R * (s.dv + 3 * s.dk) * s.erase
    gradients = Cost(
        "gradients",
        Q + K + rows * ((s.dk + s.dv + s.dv * s.erase) * w + 8) + th * ((s.dk + s.dv) * w + 4 * s.gated)
        + y + gates + states // EVERY + between + states,
        2 * _chunks(s) * macs,
    )  # fmt: skip
    if s.key_heads == s.H:
        return [adjoint, gradients]
    return [adjoint, gradients, Cost("sums of groups", (th + rows) * s.dk * w + Q + K, 0)]  # of every head's dQ and dK


def saved(s: Size) -> int:
    """Bytes kept for the backward pass besides the inputs."""
    return _chunks(s) * (s.rows * s.rows * s.bits // 8 * s.erase + s.rows * 4 * s.gated + s.dk * s.dv * s.bits // 8 // EVERY)


def ideal(s: Size) -> tuple[int, int]:
    """Bytes that no implementation can avoid, forward and backward: inputs read once, outputs written once."""
    w, th, rows, Q, K = _sizes(s)
    inputs = Q + K + rows * (s.dv * w + 4) + th * 4 * s.gated
    return inputs + th * s.dv * w, 2 * inputs + th * s.dv * w


def roofline(costs: list[Cost], bandwidth: float, flops: float) -> float:
    """Seconds: for each kernel the longer of its traffic at `bandwidth` bytes/s and its products at `flops` FLOP/s."""
    return sum(max(c.bytes / bandwidth, c.flops / flops) for c in costs)
