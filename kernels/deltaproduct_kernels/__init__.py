"""The gated delta product: the recurrence of DeltaProduct, DeltaNet, Gated DeltaNet and gated linear attention.

Needs torch, and Triton for its kernels on a GPU. `gated_delta_product` is the recurrence (`interface.py`
states its contract), `front_end` what comes between a layer's projections and it. `segment_summary` and `segment_adjoint` are
what processes that share a sequence tell each other (`segments.py`).
"""

import torch

from deltaproduct_kernels.fla_layers import accelerate_fla
from deltaproduct_kernels.front_end import front_end
from deltaproduct_kernels.interface import gated_delta_product, resolve_backend
from deltaproduct_kernels.ops import executed_flops
from deltaproduct_kernels.rows import rms_norm
from deltaproduct_kernels.segments import segment_adjoint, segment_flops, segment_summary

CHUNK_OPS = frozenset(getattr(torch.ops.deltaproduct, name).default for name in ("chunk", "triton_chunk", "fla_chunk"))
"""The operators whose outputs a checkpointing policy keeps so that the recurrence is not run twice."""

__all__ = [
    "CHUNK_OPS",
    "accelerate_fla",
    "executed_flops",
    "front_end",
    "gated_delta_product",
    "resolve_backend",
    "rms_norm",
    "segment_adjoint",
    "segment_flops",
    "segment_summary",
]
