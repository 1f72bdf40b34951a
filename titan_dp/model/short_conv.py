"""Causal depthwise convolution over a few tokens, respecting document starts, followed by SiLU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_dp.model.initialise import Initializer
from titan_dp.model.packing import Packing


class ShortConv(nn.Module):
    """y_t = silu(sum_w weight[:, 0, w] x_{t - W + 1 + w}) for each channel; the last tap multiplies the token itself.

    The weight has nn.Conv1d's layout [channels, 1, W]. Tokens before the sequence, or before a document, count as zero.
    """

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, size))

    def forward(self, x: Tensor, packing: Packing | None = None, tail: Tensor | None = None) -> Tensor:
        """x [B, T, channels]; `tail` [B, W - 1, channels]: the tokens before x, zero if None."""
        T, W = x.shape[1], self.weight.shape[-1]
        padded = F.pad(x, (0, 0, W - 1, 0)) if tail is None else torch.cat([tail, x], 1)
        taps = self.weight[:, 0].unbind(-1)
        out = x * taps[-1]
        for back in range(1, W):
            earlier = padded[:, W - 1 - back : W - 1 - back + T] * taps[W - 1 - back]
            if packing is not None:
                earlier = torch.where((packing.position >= back)[:, None], earlier, 0)
            out = out + earlier
        return F.silu(out)

    def next_tail(self, x: Tensor, tail: Tensor | None) -> Tensor:
        """The last W - 1 tokens seen, for the next call."""
        size = self.weight.shape[-1] - 1
        seen = F.pad(x, (0, 0, size, 0)) if tail is None else torch.cat([tail, x], 1)
        return seen[:, seen.shape[1] - size :]

    def init_weights(self, init: Initializer) -> None:
        init.normal_(self.weight)

    def flops_per_token(self) -> int:
        """Forward and backward: 6 a weight."""
        return 6 * self.weight.numel()
