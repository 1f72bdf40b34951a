"""The weights of a source under the names, and in the pieces, of a model type of transformers' own."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from titan_dp.inference.hf.architectures import Architecture
from titan_dp.inference.sources import Source


class Converted(Source):
    """`source` as `architecture`, which can express it.

    Attributes:
        wide: tensors that lose bits in float32: some of those that are stored as w - 1.
    """

    def __init__(self, source: Source, architecture: Architecture) -> None:
        self.path, self.config = source.path, source.config
        self._source, self._architecture = source, architecture
        self._made, self._table = architecture.made(source.config), architecture.tensors(source.config)
        self.shapes = {name: torch.Size(self._shape(ours)) for name, ours in self._table.items()}
        self.dtypes = {
            name: torch.float64 if architecture.is_less_one(name) else source.dtypes[ours[0]]
            for name, ours in self._table.items()
        }
        self.shapes |= {name: tensor.shape for name, tensor in self._made.items()}
        self.dtypes |= {name: tensor.dtype for name, tensor in self._made.items()}
        norms = self.read(name for name in self._table if architecture.is_less_one(name))
        self.wide = frozenset(name for name, tensor in norms.items() if not torch.equal(tensor.float().double(), tensor))

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        wanted = list(names)
        held = self._source.read([ours for name in wanted for ours in self._table.get(name, ())])
        return {name: self._made[name] if name in self._made else self._joined(name, held) for name in wanted}

    def _joined(self, name: str, held: dict[str, Tensor]) -> Tensor:
        parts = [held[ours] for ours in self._table[name]]
        if self._architecture.is_less_one(name):
            return parts[0].double() - 1
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _shape(self, ours: list[str]) -> list[int]:
        first, *others = [self._source.shapes[name] for name in ours]
        return [first[0] + sum(other[0] for other in others), *first[1:]]
