"""Which tokens sample i of a run consists of: pure arithmetic on (fingerprint, seed, i).

A source of W windows is read in epochs; epoch e visits its windows in a permutation keyed by (fingerprint, seed, e),
computed for any index in O(1) by a Feistel network with cycle walking, so there is no array on disk and step 1,000,000
is reached as fast as step 0. A mixture deals samples to sources in blocks of `_BLOCK`: every block gives each source a fixed
number of places, in an order keyed by the block. Ranks, workers and batch sizes do not enter.
"""

from __future__ import annotations

import hashlib

import numpy as np

from titan_dp.errors import UserError

_BLOCK = 4096  # so a weight is a multiple of 1 / 4096
_ROUNDS = 6  # of the Feistel network; another number is another order, with which no run can go on


def permute(index: np.ndarray, size: int, key: str) -> np.ndarray:
    """Images of `index` (int64 array, 0 <= index < size) under the permutation of range(size) that `key` names."""
    if size <= 1:
        return np.zeros_like(index)
    half = np.uint64(((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << int(half)) - 1)
    digest = hashlib.sha256(key.encode()).digest() + hashlib.sha256(b"more " + key.encode()).digest()
    keys = np.frombuffer(digest, dtype=np.uint64)[:_ROUNDS]
    values = index.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():  # the network permutes 4^half >= size values: walk on until back inside; on average < 4 times
        left, right = values[outside] >> half, values[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        values[outside] = (left << half) | right
        outside = values >= np.uint64(size)
    return values.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: every bit of x moves every bit of the result (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Order:
    """The sample order of a mixture.

    Args:
        fingerprints: of the sources.
        windows: number of samples an epoch of each source holds.
        weights: relative frequency of each source; resolved to 1/4096.
        seed: of the order.

    Raises UserError for a weight too small to get a place.
    """

    def __init__(self, fingerprints: list[str], windows: list[int], weights: list[float], seed: int) -> None:
        self.fingerprints, self.windows, self.seed = fingerprints, windows, seed
        shares = np.array(weights, dtype=np.float64) / sum(weights) * _BLOCK
        counts = np.floor(shares).astype(np.int64)
        rest = _BLOCK - int(counts.sum())
        counts[np.argsort(counts - shares, kind="stable")[:rest]] += 1  # largest remainders
        if (counts == 0).any():
            raise UserError(
                f"data.weights: source {int(np.argmin(counts))} has less than 1/{_BLOCK} of the total weight and would "
                "never be read; raise its weight or leave it out"
            )
        self.counts = counts
        self._bounds = np.cumsum(counts)

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source and window of each sample (int64 array of indices >= 0)."""
        source, turn = self._deal(samples)
        window = np.empty_like(samples)
        for s in np.unique(source):
            mine = source == s
            epoch, index = np.divmod(turn[mine], self.windows[s])
            images = np.empty_like(index)
            for e in np.unique(epoch):
                key = f"window {self.fingerprints[s]} {self.seed} {e}"
                images[epoch == e] = permute(index[epoch == e], self.windows[s], key)
            window[mine] = images
        return source, window

    def _deal(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source of each sample, and which of that source's samples it is (each once, in some order)."""
        if len(self.windows) == 1:
            return np.zeros_like(samples), samples
        block, place = np.divmod(samples, _BLOCK)
        slot = np.empty_like(place)
        for b in np.unique(block):
            slot[block == b] = permute(place[block == b], _BLOCK, f"mixture {' '.join(self.fingerprints)} {self.seed} {b}")
        source = np.searchsorted(self._bounds, slot, side="right")
        return source, block * self.counts[source] + slot - (self._bounds[source] - self.counts[source])
