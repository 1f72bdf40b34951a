"""Triton kernels of the gated delta product, and what launches them. Importing this needs triton."""
