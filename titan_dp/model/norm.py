"""Root-mean-square norm, with statistics and weight in float32.

The weight sits in a holder that is never called: FSDP2 keeps all norms in one float32 group, whose hooks must not run
inside a compiled block (see parallelize.apply_fsdp).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_dp.model.initialise import Initializer


def upcast(x: Tensor) -> Tensor:
    """x in float32, or as it is if it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """The weight [size] of a norm; use `apply_to`, do not call it."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def apply_to(self, x: Tensor) -> Tensor:
        """x / rms(x) * weight over the last dimension, in float32 at least, returned in x's dtype."""
        return F.rms_norm(upcast(x), self.weight.shape, self.weight, self.eps).to(x.dtype)

    def init_weights(self, init: Initializer) -> None:
        init.ones_(self.weight)
