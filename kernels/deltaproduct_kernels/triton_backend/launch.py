"""From tensors to kernel launches: shapes, buffers, configurations, and the split of long sequences among programs.

`forward` and `backward` are all there is to the chunked algorithm on a GPU. A `Runner` launches their kernels; another one
compiles them ahead of time from tensors on the meta device, and so sees exactly the launches that a run makes. Nothing here
waits for the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from deltaproduct_kernels.recurrent import by_group
from deltaproduct_kernels.triton_backend import assembler, configs
from deltaproduct_kernels.triton_backend.adjoint import adjoint_kernel
from deltaproduct_kernels.triton_backend.configs import Config
from deltaproduct_kernels.triton_backend.decode import decode_kernel
from deltaproduct_kernels.triton_backend.gradients import gradients_kernel
from deltaproduct_kernels.triton_backend.layout import EVERY, Size
from deltaproduct_kernels.triton_backend.scan import scan_kernel
from deltaproduct_kernels.triton_backend.solve import solve_kernel
from deltaproduct_kernels.triton_backend.states import states_kernel

INTERPRETED = not isinstance(solve_kernel, triton.JITFunction)
"""Whether TRITON_INTERPRET=1 was set when triton was imported: kernels then run on the CPU."""


@dataclass(frozen=True)
class Runner:
    """Launches kernels on one kind of chip."""

    arch: int  # one of configs.ARCHITECTURES
    processors: int

    def __call__(self, kernel: Any, grid: int, config: Config, **arguments: Any) -> None:
        """On the tensors' device, which need not be the current one."""
        if grid:
            with torch.cuda.device_of(next(x for x in arguments.values() if isinstance(x, Tensor))):
                kernel[(grid,)](**arguments, num_warps=config.warps, num_stages=config.stages)


@cache
def runner(device: torch.device) -> Runner:
    """For `device`; one that is no GPU is treated as a Hopper."""
    if device.type != "cuda":
        return Runner(90, 132)
    properties = torch.cuda.get_device_properties(device)
    if properties.major == 9 and (reason := assembler.choose()):
        raise ValueError(f"Triton cannot compile these kernels: {reason}")
    arch = configs.architecture(10 * properties.major + properties.minor) or configs.ARCHITECTURES[0]
    return Runner(arch, properties.multi_processor_count)


@dataclass(frozen=True, kw_only=True)
class Shape(Size):
    """The sizes of one call on one chip."""

    arch: int
    processors: int

    @staticmethod
    def of(k: Tensor, v: Tensor, g: Tensor | None, cu_seqlens: Tensor | None, erase: bool, bits: int, run: Runner) -> Shape:
        B, T, n, G, dk = k.shape
        return Shape(
            B=B,
            T=T,
            n=n,
            H=v.shape[-2],
            groups=G,
            dk=dk,
            dv=v.shape[-1],
            bits=bits,
            gated=g is not None,
            erase=erase,
            sequences=None if cu_seqlens is None else cu_seqlens.shape[0] - 1,
            arch=run.arch,
            processors=run.processors,
        )

    @property
    def unit(self) -> int:
        """Spans are multiples of so many tokens: one state is saved in each."""
        return self.chunk * EVERY

    @property
    def whole(self) -> int:
        """A span that no sequence exceeds."""
        return max(1, -(-self.T // self.unit)) * self.unit

    def check_span(self, part: int, unit: int) -> int:
        """`part`. Raises ValueError for a span that is no multiple of `unit` tokens: two programs would share a chunk."""
        if part <= 0 or part % unit:
            raise ValueError(f"part = {part}; with n = {self.n} steps a token it must be a multiple of {unit} tokens")
        return part

    @property
    def part(self) -> int:
        """Tokens of a sequence that one program of a serial pass takes: all, unless most of the GPU would be idle.

        Cutting a sequence costs a summary of every part, about as much again as the pass itself for each of dk and dv; it
        pays from four parts on. Packed sequences are counted as one, because how long they are is not known here.
        """
        blocks = triton.cdiv(self.dv, self.config("states").block_v)
        programs = (1 if self.sequences is not None else self.B) * self.H * blocks
        parts = min(self.processors // max(programs, 1), self.T // (2 * self.unit))
        return self.whole if parts < 4 else -(-self.T // (parts * self.unit)) * self.unit

    def config(self, kernel: str) -> Config:
        return configs.config(kernel, dk=self.dk, dv=self.dv, n=self.n, bits=self.bits, arch=self.arch, gated=self.gated)

    def common(self, cu_seqlens: Tensor | None, *, values: bool = True) -> dict[str, Any]:
        """Arguments that (nearly) all kernels have."""
        arguments: dict[str, Any] = {
            "cu_seqlens": cu_seqlens,
            "T": self.T,
            "sequences": self.states,
            "H": self.H,
            "GROUPS": self.key_heads,
            "N": self.n,
            "DK": self.dk,
            "CHUNK": self.chunk,
            "ROWS": self.rows,
            "GATED": self.gated,
            "ERASE": self.erase,
            "PACKED": self.sequences is not None,
            "PRECISION": "ieee",  # of float32 inputs; 16-bit ones have one precision
        }
        if values:
            arguments |= {"DV": self.dv, "TOKENS": self.tile_tokens}
        return arguments


class Saved(NamedTuple):
    """What the backward pass needs besides the inputs; rows as in layout.ROWS."""

    y: Tensor
    """[slots, H, rows, rows] in k's dtype: solve.py's Y of every chunk; no slots without erasing."""
    gates: Tensor
    """[slots, H, rows] in float32: g summed within chunks, in units of log 2; no slots without gates."""
    states: Tensor
    """[slots, H, dv, dk] in k's dtype: the state before every EVERY-th chunk; no slots if it is not wanted."""


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    erase: bool,
    save: bool,
    bits: int,
    *,
    part: int | None = None,
    run: Runner | None = None,
) -> tuple[Tensor, Tensor, Saved]:
    """Contiguous inputs as in `gated_delta_product`.

    Returns o, the final state [N, H, dk, dv] in float32, and what the backward pass needs; `save` wants its states.
    `bits` is the width of the dtype that decides the chunks (layout.ROWS). `part` overrides `Shape.part`.

    Raises:
        ValueError: for a `part` that is no multiple of `Shape.unit`.
    """
    run = run or runner(k.device)
    shape = Shape.of(k, v, g, cu_seqlens, erase, bits, run)
    part = shape.check_span(shape.part if part is None else part, shape.unit)
    y, gates = solve(shape, k, beta, g, cu_seqlens, run)
    initial, kind = initial_state, 0 if initial_state is None else 1
    if part < shape.whole:
        maps = summarise(shape, k, v, beta, gates, y, cu_seqlens, part, run)
        initial, kind = scan(shape, maps, None, initial_state, cu_seqlens, part, run), 2
    o = q.new_empty(*q.shape[:2], shape.H, shape.dv)
    final = k.new_empty(shape.states, shape.H, shape.dk, shape.dv, dtype=torch.float32)
    states = k.new_empty(shape.slots(shape.chunk * EVERY) if save else 0, shape.H, shape.dv, shape.dk)
    run_states(
        shape, q, k, v, beta, gates, y, cu_seqlens, scale, part, run,
        initial=initial, kind=kind, o=o, states=states if save else None, final=final,
    )  # fmt: skip
    return o, final, Saved(y, gates, states)


def backward(
    do: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    saved: Saved,
    cu_seqlens: Tensor | None,
    scale: float,
    erase: bool,
    bits: int,
    *,
    part: int | None = None,
    run: Runner | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of q, k, v, beta, g and the initial state [N, H, dk, dv] (float32); `saved` by `forward`.

    Where heads share q and k, those of every head are written in the inputs' dtype, and then summed in float32.
    """
    y, gates, states = saved
    run = run or runner(k.device)
    shape = Shape.of(k, v, g, cu_seqlens, erase, bits, run)
    part = shape.check_span(shape.part if part is None else part, shape.unit)
    chunks = shape.slots(shape.chunk)
    adjoint = shape.config("adjoint" if part >= shape.whole else "adjoint_cut")
    blocks = triton.cdiv(shape.dv, adjoint.block_v)

    def run_adjoint(span: int, final: Tensor | None, kind: int, initial: Tensor, summary: bool, **out: Tensor | None) -> None:
        run(
            adjoint_kernel, shape.slots(span) * shape.H * blocks, adjoint,
            do=do, q=q, k=k, beta=beta, gates=gates, y=y, final=final, dv=out.get("dv"), adjoints=out.get("adjoints"),
            initial=initial, scale=scale, span=span, BK=configs.padded(shape.dk), BV=adjoint.block_v, BLOCKS=blocks,
            FINAL=kind, SUMMARY=summary, **shape.common(cu_seqlens),
        )  # fmt: skip

    final, kind = dfinal, 0 if dfinal is None else 1
    if part < shape.whole:
        maps = summarise(shape, k, v, beta, gates, y, cu_seqlens, part, run, only_maps=True)
        local = k.new_empty(shape.slots(part), shape.H, shape.dv, shape.dk, dtype=torch.float32)
        run_adjoint(part, None, 0, local, True)
        final, kind = scan(shape, maps, local, dfinal, cu_seqlens, part, run), 2
    dv = torch.empty_like(v)
    adjoints = k.new_empty(chunks, shape.H, shape.dv, shape.dk)
    dinitial = k.new_empty(shape.states, shape.H, shape.dk, shape.dv, dtype=torch.float32)
    run_adjoint(part, final, kind, dinitial, False, dv=dv, adjoints=adjoints)

    dq, dk = (x.new_empty(*x.shape[:-2], shape.H, shape.dk) for x in (q, k))
    dbeta = torch.empty_like(beta)
    dg = None if g is None else torch.empty_like(g)
    c = shape.config("gradients")
    run(
        gradients_kernel, shape.slots(shape.unit) * shape.H, c,
        do=do, q=q, k=k, v=v, beta=beta, gates=gates, y=y, dv=dv, states=states, scratch=states.new_empty(2, *states.shape),
        adjoints=adjoints, dq=dq, dk=dk, dbeta=dbeta, dg=dg, scale=scale, EVERY=EVERY, BK=c.block_k, BV=c.block_v,
        **shape.common(cu_seqlens),
    )  # fmt: skip
    return by_group(dq, shape.key_heads), by_group(dk, shape.key_heads), dv, dbeta, dg, dinitial


def solve(
    shape: Shape, k: Tensor, beta: Tensor, g: Tensor | None, cu_seqlens: Tensor | None, run: Runner
) -> tuple[Tensor, Tensor]:
    """Y and the summed gates of every chunk."""
    chunks, c = shape.slots(shape.chunk), shape.config("solve")
    y = k.new_empty(chunks if shape.erase else 0, shape.H, shape.rows, shape.rows)
    gates = k.new_empty(chunks if shape.gated else 0, shape.H, shape.rows, dtype=torch.float32)
    if shape.erase or shape.gated:
        run(
            solve_kernel, chunks * shape.H, c,
            k=k, beta=beta, g=g, y=y, gates=gates, BK=c.block_k, **shape.common(cu_seqlens, values=False),
        )  # fmt: skip
    return y, gates


def run_states(
    shape: Shape,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    gates: Tensor,
    y: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    span: int,
    run: Runner,
    *,
    initial: Tensor | None,
    kind: int,
    o: Tensor | None = None,
    states: Tensor | None = None,
    final: Tensor | None = None,
    summary: bool = False,
    first_block: int = 0,
) -> None:
    """One launch of states.py; what is None is not written."""
    c = shape.config("states_cut" if summary or kind == 2 else "states")
    values = triton.cdiv(shape.dv, c.block_v)
    blocks = values + triton.cdiv(shape.dk, c.block_v) - first_block if summary else values
    run(
        states_kernel, shape.slots(span) * shape.H * blocks, c,
        q=q, k=k, v=v, beta=beta, gates=gates, y=y, initial=initial, o=o, states=states, final=final,
        scale=scale, span=span, first_block=first_block, EVERY=EVERY, BK=configs.padded(shape.dk), BV=c.block_v,
        BLOCKS=blocks, INITIAL=kind, READ=o is not None, SAVE_STATES=states is not None, SAVE_FINAL=final is not None,
        SUMMARY=summary, **shape.common(cu_seqlens),
    )  # fmt: skip


def summarise(
    shape: Shape,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    gates: Tensor,
    y: Tensor,
    cu_seqlens: Tensor | None,
    span: int,
    run: Runner,
    *,
    only_maps: bool = False,
) -> Tensor:
    """N^T and M^T of S' = M S + N for every span [slots, H, dv + dk, dk] in float32; `only_maps` leaves N^T unwritten."""
    maps = k.new_empty(shape.slots(span), shape.H, shape.dv + shape.dk, shape.dk, dtype=torch.float32)
    skipped = triton.cdiv(shape.dv, shape.config("states_cut").block_v) if only_maps else 0
    run_states(
        shape, k, k, v, beta, gates, y, cu_seqlens, 1.0, span, run,
        initial=None, kind=0, final=maps, summary=True, first_block=skipped,
    )  # fmt: skip
    return maps


def scan(
    shape: Shape,
    maps: Tensor,
    local: Tensor | None,
    given: Tensor | None,
    cu_seqlens: Tensor | None,
    span: int,
    run: Runner,
) -> Tensor:
    """The state before every span, or with `local` the adjoint after it, transposed: [slots, H, dv, dk] in float32."""
    out = maps.new_empty(shape.slots(span), shape.H, shape.dv, shape.dk)
    c = shape.config("scan")
    blocks = triton.cdiv(shape.dv, c.block_v)
    run(
        scan_kernel, shape.states * shape.H * blocks, c,
        maps=maps, local=local, given=given, out=out, cu_seqlens=cu_seqlens, T=shape.T, span=span,
        H=shape.H, DK=shape.dk, DV=shape.dv, BLOCK=c.block_k, BV=c.block_v, BLOCKS=blocks,
        PACKED=shape.sequences is not None, GIVEN=given is not None, REVERSE=local is not None, PRECISION="tf32x3",
    )  # fmt: skip
    return out


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    state: Tensor | None,
    scale: float,
    erase: bool,
    bits: int,
    *,
    run: Runner | None = None,
) -> tuple[Tensor, Tensor]:
    """A few tokens, no gradients: o and the state after them [B, H, dk, dv] in float32."""
    run = run or runner(k.device)
    shape = Shape.of(k, v, g, None, erase, bits, run)
    c = shape.config("decode")
    blocks = triton.cdiv(shape.dv, c.block_v)
    o = q.new_empty(*q.shape[:2], shape.H, shape.dv)
    after = k.new_empty(shape.B, shape.H, shape.dk, shape.dv, dtype=torch.float32)
    run(
        decode_kernel, shape.B * shape.H * blocks, c,
        q=q, k=k, v=v, beta=beta, g=g, before=state, o=o, after=after, scale=scale, T=shape.T, H=shape.H,
        GROUPS=shape.key_heads, N=shape.n, DK=shape.dk, DV=shape.dv, BK=configs.padded(shape.dk), BV=c.block_v,
        BLOCKS=blocks, GATED=shape.gated, ERASE=erase, GIVEN=state is not None,
    )  # fmt: skip
    return o, after
