"""How a call is cut into chunks and spans, in plain numbers: for launching, for counting costs, and needing no Triton."""

from __future__ import annotations

from dataclasses import dataclass

ROWS = {16: 64, 32: 16}
"""Rows a chunk by the width of the inputs' dtype. 64 is the tall side of a Hopper matrix instruction; more would double the
triangular solve and save no traffic. Products in float32 are exact and use no matrix instruction: smaller tiles fit the
registers."""

EVERY = 4
"""Chunks between the states that the forward pass saves: dk dv / 256 elements a row."""


@dataclass(frozen=True)
class Size:
    """One call of `gated_delta_product`."""

    B: int
    T: int
    n: int
    H: int
    dk: int
    dv: int
    bits: int = 16  # of the inputs' dtype
    gated: bool = True
    erase: bool = True
    sequences: int | None = None  # packed sequences; None: B rows
    groups: int | None = None  # of heads that share q and k; None: as many as heads

    @property
    def key_heads(self) -> int:
        """Heads of q and k."""
        return self.H if self.groups is None else self.groups

    @property
    def rows(self) -> int:
        """Rows of a chunk's tile."""
        return ROWS[self.bits]

    @property
    def chunk(self) -> int:
        """Tokens a chunk."""
        return self.rows // self.n

    @property
    def tile_tokens(self) -> int:
        """Rows of a tile with one row a token: a power of two, 16 at least."""
        return max(16, 1 << (self.chunk - 1).bit_length())

    @property
    def states(self) -> int:
        """Number of initial and final states."""
        return self.B if self.sequences is None else self.sequences

    def slots(self, span: int) -> int:
        """Places for spans of `span` tokens; for packed sequences a bound that needs no look at them (see tiles.py)."""
        return self.B * max(1, -(-self.T // span)) if self.sequences is None else self.T // span + self.sequences
