"""Random inputs of the gated delta product, and how far one backend's outputs and gradients are from another's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from deltaproduct_kernels import CHUNK_OPS, gated_delta_product
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

CU_SEQLENS = [0, 0, 5, 69, 69, 70, 103, 103, 103]
"""Of packed sequences of 103 tokens: empty ones at the start, in the middle and at the end."""
RANGES = {
    "no gate": {"gate": None},
    "gate of one": {"gate": 0.0},
    "strong gate, down to -20 per token": {"gate": 10.0},
    "beta exactly 0": {"beta": 0.0},
    "beta exactly 2": {"beta": 2.0},
    "beta near 0": {"beta": 1e-4},
}
"""Options of `make` that hurt, whatever the backend."""
Forgetful = Callable[[dict[str, Tensor]], None]
"""Gives inputs log decays that underflow."""


def make(
    T: int = 70,
    *,
    B: int = 2,
    H: int = 2,
    n: int = 2,
    dk: int = 8,
    dv: int = 6,
    gate: float | None = 0.3,
    beta: float | tuple[float, float] = (0.0, 2.0),
    correlation: float = 0.0,
    dtype: torch.dtype = torch.float64,
    states: int | None = None,
    groups: int | None = None,
) -> dict[str, Tensor]:
    """Fresh random inputs; `gate` is the mean of -g, `correlation` how nearly parallel all keys are, `groups` G."""
    common, G = torch.randn(dk, dtype=torch.float64), groups or H
    k = torch.nn.functional.normalize((1 - correlation) * torch.randn(B, T, n, G, dk).double() + correlation * common, dim=-1)
    low, high = beta if isinstance(beta, tuple) else (beta, beta)
    tensors = {
        "q": torch.randn(B, T, G, dk),
        "k": k,
        "v": torch.randn(B, T, n, H, dv),
        "beta": low + (high - low) * torch.rand(B, T, n, H),
        "initial_state": torch.randn(states or B, H, dk, dv),
    }
    if gate is not None:
        tensors["g"] = -2 * gate * torch.rand(B, T, H)
    return {name: x.to(dtype).requires_grad_() for name, x in tensors.items()}


def run(inputs: dict[str, Tensor], backend: str, **options: object) -> tuple[Tensor, Tensor]:
    o, state = gated_delta_product(**inputs, output_final_state=True, backend=backend, **options)  # type: ignore[arg-type]
    assert state is not None
    return o, state


def results(inputs: dict[str, Tensor], backend: str, seed: int = 0, **options: object) -> dict[str, Tensor]:
    """Output, final state and all gradients for a random cotangent (the same for every backend)."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    o, state = run(leaves, backend, **options)
    generator = torch.Generator().manual_seed(seed)
    do = torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o)
    dstate = torch.randn(state.shape, generator=generator, dtype=torch.float64).to(state)
    torch.autograd.backward([o, state], [do, dstate])
    gradients = {f"d{name}": x.grad for name, x in leaves.items() if x.grad is not None}
    assert set(gradients) == {f"d{name}" for name in leaves}
    return {"o": o.detach(), "state": state.detach(), **gradients}


def error(actual: Tensor, expected: Tensor, least: float = 1e-12) -> float:
    """Root mean square error relative to the expected root mean square, or to `least` if that is more."""
    assert actual.shape == expected.shape
    actual, expected = actual.detach(), expected.detach()
    difference = (actual.double() - expected.double()).square().mean().sqrt()
    return float(difference / expected.double().square().mean().sqrt().clamp_min(least))


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, least: float = 1e-12) -> None:
    assert actual.keys() == expected.keys()
    errors = {name: error(actual[name], expected[name], least) for name in expected}
    assert all(e < tolerance for e in errors.values()), errors


def in_float64(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach().double() for name, x in inputs.items()}


def assert_nan_stays_in_its_own_sequence(inputs: dict[str, Tensor], backend: str) -> None:
    """`inputs` of 103 tokens and 8 states."""
    inputs["v"].data[:, 3] = torch.nan
    got = results(inputs, backend, cu_seqlens=torch.tensor(CU_SEQLENS, device=inputs["v"].device))
    assert got["o"][:, 3:5].isnan().all()
    for name in ("o", "dq", "dk", "dv", "dbeta", "dg"):
        assert got[name][:, 5:].isfinite().all(), name
    assert got["state"][2:].isfinite().all()


def assert_selective_checkpointing_saves_a_forward(
    monkeypatch: pytest.MonkeyPatch, module: object, name: str, inputs: dict[str, Tensor], backend: str
) -> None:
    """`name` of `module` runs twice under checkpointing, and once if the policy keeps what the operator returns."""
    calls = []
    original = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *a: (calls.append(1), original(*a))[1])

    def policy(ctx: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in CHUNK_OPS else CheckpointPolicy.PREFER_RECOMPUTE

    for context, expected in ((None, 2), (lambda: create_selective_checkpoint_contexts(policy), 1)):
        calls.clear()
        extra = {} if context is None else {"context_fn": context}
        o, _ = checkpoint(lambda: run({k: x * 1 for k, x in inputs.items()}, backend), use_reentrant=False, **extra)
        o.sum().backward()
        assert len(calls) == expected
