"""What torch's function transforms would get wrong in silence on a custom operator, refused by name.

Without a batching rule torch.vmap calls an operator once an example, slowly; in forward mode an operator that has no rule gives
a tangent of zero. The definition, backend 'recurrent', is plain torch and takes both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def refuse_vmap(operator: Any, name: str) -> None:
    """Make torch.vmap over `operator` raise NotImplementedError."""

    def rule(info: Any, in_dims: Any, *arguments: Any) -> Any:
        raise NotImplementedError(f"{name} has no batching rule for torch.vmap: put the mapped dimension into B")

    operator.register_vmap(rule)


def refuse_forward_mode(name: str, *tensors: Tensor | None) -> None:
    """Raises NotImplementedError if one of the tensors is a dual number (torch.func.jvp, torch.autograd.forward_ad)."""
    if torch.compiler.is_compiling():
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(f"{name} has no forward-mode derivative; use reverse mode, or backend 'recurrent'")
