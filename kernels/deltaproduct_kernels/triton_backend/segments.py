"""A segment of rows summed up on a GPU: its affine map of the state, and the adjoint of the state at its start.

The kernels are those that cut a long sequence among programs (launch.py): they sum up the parts of a row, two at least, and
here the parts are composed into one by a few small products in float32. Outputs of the recurrence are not computed.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad

from deltaproduct_kernels.triton_backend import configs
from deltaproduct_kernels.triton_backend.adjoint import adjoint_kernel
from deltaproduct_kernels.triton_backend.launch import Runner, Shape, runner, solve, summarise


def summary(
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    erase: bool,
    bits: int,
    *,
    part: int | None = None,
    run: Runner | None = None,
) -> tuple[Tensor, Tensor]:
    """M [B, H, dk, dk] and N [B, H, dk, dv] in float32 of contiguous inputs; arguments as in `launch.forward`."""
    run = run or runner(k.device)
    shape = Shape.of(k, v, g, None, erase, bits, run)
    if missing := _missing(shape):
        k, v, beta = (_longer(x, missing) for x in (k, v, beta))
        g = None if g is None else _longer(g, missing)
        shape = Shape.of(k, v, g, None, erase, bits, run)
    part = shape.check_span(_part(shape) if part is None else part, shape.chunk)
    y, gates = solve(shape, k, beta, g, None, run)
    maps = summarise(shape, k, v, beta, gates, y, None, part, run)
    total, *rest = maps.unflatten(0, (shape.B, -1)).unbind(1)
    for moved in rest:  # transposed: [N^T; M^T] M_p^T + [N_p^T; 0]
        N, M = moved.split([shape.dv, shape.dk], 2)
        total = total @ M
        total[:, :, : shape.dv] += N
    N, M = total.split([shape.dv, shape.dk], 2)
    return M.mT, N.mT


def adjoint(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    beta: Tensor,
    g: Tensor | None,
    scale: float,
    erase: bool,
    bits: int,
    *,
    part: int | None = None,
    run: Runner | None = None,
) -> Tensor:
    """Gradient [B, H, dk, dv] in float32 of the initial state, the final one having none; arguments as in `launch.backward`."""
    run = run or runner(k.device)
    shape = Shape.of(k, do, g, None, erase, bits, run)
    if missing := _missing(shape):
        do, q, k, beta = (_longer(x, missing) for x in (do, q, k, beta))
        g = None if g is None else _longer(g, missing)
        shape = Shape.of(k, do, g, None, erase, bits, run)
    part = shape.check_span(_part(shape) if part is None else part, shape.chunk)
    y, gates = solve(shape, k, beta, g, None, run)
    local = k.new_empty(shape.slots(part), shape.H, shape.dv, shape.dk, dtype=torch.float32)
    c = shape.config("adjoint_cut")
    blocks = triton.cdiv(shape.dv, c.block_v)
    run(
        adjoint_kernel, shape.slots(part) * shape.H * blocks, c,
        do=do, q=q, k=k, beta=beta, gates=gates, y=y, final=None, dv=None, adjoints=None, initial=local, scale=scale,
        span=part, BK=configs.padded(shape.dk), BV=c.block_v, BLOCKS=blocks, FINAL=0, SUMMARY=True, **shape.common(None),
    )  # fmt: skip
    *before, dS = local.unflatten(0, (shape.B, -1)).unbind(1)
    # Maps read no values: `do`, of their width, stands for them.
    maps = summarise(shape, k, do, beta, gates, y, None, part, run, only_maps=True)
    moves = maps[:, :, shape.dv :].unflatten(0, (shape.B, -1)).unbind(1)
    for own, moved in zip(reversed(before), reversed(moves[:-1]), strict=True):
        dS = dS @ moved.mT + own
    return dS.mT


def _part(shape: Shape) -> int:
    """Tokens a program sums up: `Shape.part`, or half of a row where that would be all, because the kernels want parts."""
    return min(shape.part, triton.cdiv(triton.cdiv(shape.T, 2), shape.chunk) * shape.chunk)


def _missing(shape: Shape) -> int:
    """Tokens that a row has too few for two parts."""
    return max(0, shape.chunk + 1 - shape.T)


def _longer(x: Tensor, tokens: int) -> Tensor:
    """`tokens` more at a row's end, all zero: they change no state."""
    return pad(x, [0, 0] * (x.dim() - 2) + [0, tokens])
