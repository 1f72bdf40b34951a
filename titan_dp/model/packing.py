"""Where documents begin in a row of packed tokens, in the forms the mixers need."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Packing(NamedTuple):
    """Document boundaries of one row of T tokens; all shapes are known without the data, so blocks compile once."""

    cu_seqlens: Tensor
    """[N + 1] offsets from 0 to T; repeated offsets are empty documents (padding)."""
    document: Tensor
    """[T] index of each token's document."""
    position: Tensor
    """[T] index of each token in its document."""
    rows: int = 1
    """Rows of equal length that these T tokens were; only context parallelism asks."""

    @staticmethod
    def build(cu_seqlens: Tensor, tokens: int) -> Packing:
        index = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
        document = torch.searchsorted(cu_seqlens, index, right=True) - 1
        return Packing(cu_seqlens, document, index - cu_seqlens[document])
