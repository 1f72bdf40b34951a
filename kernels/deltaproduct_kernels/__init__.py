"""The gated delta product: the recurrence of DeltaProduct, DeltaNet, Gated DeltaNet and gated linear attention.

Needs torch alone. `gated_delta_product` is the one entry point; `interface.py` states its contract.
"""

from deltaproduct_kernels.interface import gated_delta_product, resolve_backend
from deltaproduct_kernels.ops import CHUNK_OP, executed_flops
from deltaproduct_kernels.recurrent import recurrence_flops

__all__ = ["CHUNK_OP", "executed_flops", "gated_delta_product", "recurrence_flops", "resolve_backend"]
