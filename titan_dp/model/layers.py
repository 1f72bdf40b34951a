"""What all blocks are made of: first values, norm, SwiGLU, convolution weights, document boundaries, and what a mixer must do.

Some modules here are holders, never called: their parameters compute in float32 whatever the dtype of the matrices is, and
FSDP2 keeps all of these in one group, whose hooks must not run inside a compiled block (see parallelize.apply_fsdp).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from deltaproduct_kernels import rms_norm
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from titan_dp.distributed import local_tensor


class Initializer:
    """Writes first values from one stream of random numbers, the same on any number of ranks.

    Every rank draws the full tensors in the order in which the modules are written, and keeps its own shard of each: one full
    parameter of temporary memory. Every layer has `init_weights(init)` and writes all parameters it owns; `check` refuses one
    that was written twice or never, or with a value that is not finite.

    Args:
        seed: of the stream.
        device: where parameters live; CPU and CUDA draw different numbers.
        std: standard deviation of matrices, convolutions and embeddings (`model.initializer_range`).
        factors: multiply the first values of these parameters, by id.
    """

    def __init__(self, seed: int, device: torch.device, std: float, factors: Mapping[int, float] | None = None) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)
        self.std, self.factors = std, factors or {}
        self.written: Counter[int] = Counter()

    def normal_(self, *parameters: Tensor) -> None:
        """N(0, std^2)."""
        for parameter in parameters:
            self.fill_(parameter, lambda full: full.normal_(0, self.std, generator=self.generator))

    def ones_(self, parameter: Tensor) -> None:
        self.fill_(parameter, lambda full: full.fill_(1))

    def uniform(self, full: Tensor, low: float, high: float) -> Tensor:
        return full.uniform_(low, high, generator=self.generator)

    @torch.no_grad()
    def fill_(self, parameter: Tensor, draw: Callable[[Tensor], Tensor]) -> None:
        """Write `draw(an empty full tensor)` into `parameter`."""
        self.written[id(parameter)] += 1
        full = draw(torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device))
        if (factor := self.factors.get(id(parameter), 1.0)) != 1:
            full = full * factor
        if isinstance(parameter, DTensor):
            full = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(full)

    def check(self, model: nn.Module) -> None:
        """Assert that each parameter was written once and is finite."""
        for name, parameter in model.named_parameters():
            times = self.written[id(parameter)]
            assert times == 1, f"{name} was initialised {times} times"
            assert bool(local_tensor(parameter).isfinite().all()), f"{name} has non-finite first values"


def upcast(x: Tensor) -> Tensor:
    """x in float32, or as it is if it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Float32(nn.Module):
    """A holder of parameters that compute in float32 whatever the dtype of the matrices is; never called."""


class RMSNorm(Float32):
    """The weight [size] of a root-mean-square norm; use `apply_to`, do not call it.

    Args:
        size: of the last dimension.
        eps: added to the mean square.
        groups: equal parts of the last dimension, each of which is normalised for itself.
    """

    def __init__(self, size: int, eps: float, groups: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps, self.groups = eps, groups

    def apply_to(self, x: Tensor) -> Tensor:
        """x / rms(x) * weight over the last dimension, in float32 at least, returned in x's dtype."""
        if self.groups == 1:
            return rms_norm(upcast(x), self.weight, self.eps).to(x.dtype)
        parts = upcast(x).unflatten(-1, (self.groups, -1))
        return (F.rms_norm(parts, parts.shape[-1:], eps=self.eps).flatten(-2) * self.weight).to(x.dtype)

    def init_weights(self, init: Initializer) -> None:
        init.ones_(self.weight)


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x), x [..., D] (Shazeer 2020)."""

    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, hidden, bias=False)
        self.up_proj = nn.Linear(size, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    def init_weights(self, init: Initializer) -> None:
        init.normal_(self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)


class ShortConv(nn.Module):
    """The weights [channels, 1, W] (nn.Conv1d's layout) of a causal depthwise convolution over a few tokens.

    A holder, never called: `deltaproduct_kernels.front_end` convolves.
    """

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


class TokenMixer(nn.Module):
    """The part of a block that mixes tokens: x [B, T, D] -> [B, T, D], causal. `transformer.LAYERS` lists the kinds.

    What `step` passes on from call to call has a static method `join(caches)`: one cache of all rows of several.
    """

    o_proj: nn.Linear
    """What every mixer ends with."""
    context: Any = None
    """This rank's place (`ContextParallel`, whose file imports this one), if ranks share rows and x is a segment of them."""

    def forward(self, x: Tensor, packing: Packing | None = None) -> Tensor:
        return self.mix(x, packing)[0]

    def mix(self, x: Tensor, packing: Packing | None = None) -> tuple[Tensor, Tensor | None]:
        """The mixed tokens, and how many Householder steps a router took for each, [B, T]; None without a router.

        With `packing`, x is one row [1, T, D] of documents, and nothing passes from one into the next.
        """
        raise NotImplementedError

    def step(self, x: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """The tokens x [B, T, D] after those in `cache`; T at once or one by one give the same."""
        raise NotImplementedError

    def stacks(self) -> dict[str, tuple[int, int]]:
        """Steps and heads of every projection whose rows are laid out (steps, heads, dim), by name. Muon takes these."""
        return {}

    def init_weights(self, init: Initializer) -> None:
        """Children in their order: N(0, std^2) for matrices; others have `init_weights` of their own."""
        for module in self.children():
            if (own := getattr(module, "init_weights", None)) is not None:
                own(init)
            else:
                assert isinstance(module, nn.Linear)
                init.normal_(module.weight)

    def describe(self) -> str:
        """For the banner."""
        raise NotImplementedError
