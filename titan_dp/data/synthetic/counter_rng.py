"""Random integers as a function of (key, sample, draw): made on any device, in any order, by any number of ranks.

SplitMix64's finaliser over counters, in wrapping int64 arithmetic, so that sample i of a run is the same whoever makes
it and nothing has to be saved to resume. `data/order.py` permutes with the same finaliser on the host.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    return value - 2**64 if value >= 2**63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MULTIPLIERS = ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)))


class Random:
    """A stream of random integers named by `key` (any text); streams of different keys are independent."""

    def __init__(self, key: str) -> None:
        self.key = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big", signed=True)

    def integers(self, samples: Tensor, draws: int, below: int | Tensor, start: int = 0) -> Tensor:
        """Uniform integers in [0, below).

        Args:
            samples: [B] int64 indices; row i of the result depends on samples[i] alone.
            draws: how many for each sample: numbers `start` to `start + draws - 1` of its endless row.
            below: an int, or int64 that broadcasts with [B, draws]; up to 2^31 (the bias is below 2^-32).

        Returns:
            [B, draws] int64 on the samples' device.
        """
        row = _mix(samples * _GAMMA + self.key)[:, None]
        column = torch.arange(start + 1, start + draws + 1, dtype=torch.int64, device=samples.device) * _GAMMA
        return (_mix(row + column) & (2**63 - 1)) % below


def _mix(x: Tensor) -> Tensor:
    """Every bit of x moves every bit of the result (Steele et al. 2014)."""
    for shift, multiplier in _MULTIPLIERS:
        x = (x ^ _shift_right(x, shift)) * multiplier
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: int64's own copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
