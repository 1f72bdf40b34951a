"""First values of every parameter, independent of how many ranks share it.

One generator draws full tensors in the order the modules are written; a sharded parameter (an FSDP2 DTensor) keeps its
own part of the full draw. So one rank and sixty-four start from the same numbers, at the price of one full parameter
of temporary memory. Every layer has `init_weights(init)` and writes all parameters it owns; `Initializer` counts them, and
`Transformer.init_weights` refuses a parameter written twice, never, or with a non-finite value.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


class Initializer:
    """Writes parameters from one stream of random numbers.

    Args:
        seed: of the stream.
        device: where parameters live; CPU and CUDA draw different numbers.
        std: standard deviation of matrices, convolutions and embeddings (`model.initializer_range`).
    """

    def __init__(self, seed: int, device: torch.device, std: float) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)
        self.std = std
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
        if isinstance(parameter, DTensor):
            full = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(full)

    def check(self, model: nn.Module) -> None:
        """Assert that each parameter was written once and is finite."""
        for name, parameter in model.named_parameters():
            times = self.written[id(parameter)]
            assert times == 1, f"{name} was initialised {times} times"
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            assert bool(local.isfinite().all()), f"{name} has non-finite first values"
