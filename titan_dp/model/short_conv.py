"""The weights of a causal depthwise convolution over a few tokens, and what decoding must remember for it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_dp.model.initialise import Initializer


class ShortConv(nn.Module):
    """A holder, never called: `deltaproduct_kernels.front_end` convolves. Weight [channels, 1, W], nn.Conv1d's layout."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, size))

    def next_tail(self, x: Tensor, tail: Tensor | None) -> Tensor:
        """The last W - 1 tokens seen [B, W - 1, channels], for the next call, after x [B, T, channels]."""
        size = self.weight.shape[-1] - 1
        if x.shape[1] >= size:
            return x[:, x.shape[1] - size :].clone()  # a view would keep all of x
        seen = F.pad(x, (0, 0, size, 0)) if tail is None else torch.cat([tail, x], 1)
        return seen[:, seen.shape[1] - size :]

    def init_weights(self, init: Initializer) -> None:
        init.normal_(self.weight)
