"""A language model of your own around the recurrence: an nn.Module that predicts the next byte, trained on one sentence.

    python examples/layer.py

It needs `deltaproduct_kernels` and torch alone. kernels/README.md has the layer with a forget gate; this one has none, carries
its state from call to call, and so can read a text in pieces.
"""

from __future__ import annotations

import torch
from deltaproduct_kernels import gated_delta_product
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

HEADS, DIM, STEPS = 2, 16, 2
"""Heads, the size of a key and of a value, and Householder steps per token (n_h)."""


class DeltaProduct(nn.Module):
    """[batch, time, width] to the same; a token sees itself and the tokens before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, HEADS * DIM, bias=False)
        self.key = nn.Linear(width, STEPS * HEADS * DIM, bias=False)
        self.value = nn.Linear(width, STEPS * HEADS * DIM, bias=False)
        self.step_size = nn.Linear(width, STEPS * HEADS)
        self.out = nn.Linear(HEADS * DIM, width, bias=False)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        q = self.query(x).unflatten(-1, (HEADS, DIM))
        k = self.key(x).unflatten(-1, (STEPS, HEADS, DIM))
        v = self.value(x).unflatten(-1, (STEPS, HEADS, DIM))
        beta = 2 * self.step_size(x).unflatten(-1, (STEPS, HEADS)).sigmoid()  # in (0, 2): eigenvalues in (-1, 1)
        o, state = gated_delta_product(
            normalize(q, dim=-1), normalize(k, dim=-1), v, beta, initial_state=state, output_final_state=True
        )
        return self.out(o.flatten(-2)), state


class TinyModel(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(256, width), DeltaProduct(width), nn.Linear(width, 256)

    def forward(self, ids: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.embed(ids)
        y, state = self.mix(x, state)
        return self.head(x + y), state


def main() -> None:
    torch.manual_seed(0)
    text = torch.tensor([list(b"Call me Ishmael. Some years ago, never mind how long precisely, I went to sea. " * 2)])
    model = TinyModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(1, 61):
        logits, _ = model(text[:, :-1])
        loss = cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step}: {loss.item():.3f} nats per byte")

    with torch.no_grad():
        whole, _ = model(text)
        first, state = model(text[:, :100])
        second, _ = model(text[:, 100:], state)
    difference = (whole - torch.cat((first, second), 1)).abs().max().item()
    print(f"in two pieces, with the state handed on: the same logits to {difference:.0e}")


if __name__ == "__main__":
    main()
