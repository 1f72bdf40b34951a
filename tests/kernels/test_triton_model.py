"""A whole model on the Triton backend, interpreted: its loss and every gradient are those of the torch backend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from titan_dp import config
from titan_dp.model.transformer import build_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def loss_and_gradients(backend: str, **changes: object) -> dict[str, Tensor]:
    settings = config.Model(
        hidden_size=32,
        num_hidden_layers=2,
        num_heads=2,
        head_dim=16,
        intermediate_size=48,
        vocab_size=50,
        backend=backend,  # type: ignore[arg-type]
        **changes,  # type: ignore[arg-type]
    )
    model = build_model(settings).to(DEVICE)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 50, (1, 50), generator=generator).to(DEVICE)
    cu_seqlens = torch.tensor([0, 3, 20, 50, 50], dtype=torch.int32, device=DEVICE)
    loss = model(tokens, tokens.roll(-1, 1), cu_seqlens).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param({"num_householder": 2, "use_forget_gate": True, "use_output_gate": True}, id="gated, n = 2"),
        pytest.param({"num_householder": 3, "expand_v": 2.0}, id="ungated, n = 3, wide values"),
        pytest.param({"num_householder": 1, "use_forget_gate": True, "mixer": "gla"}, id="linear attention"),
    ],
)
def test_loss_and_gradients_of_two_layers_equal_the_torch_backends(variant: dict) -> None:
    got, expected = loss_and_gradients("triton", **variant), loss_and_gradients("torch", **variant)
    assert got.keys() == expected.keys()
    for name, y in expected.items():
        torch.testing.assert_close(got[name], y, rtol=2e-4, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_decoding_token_by_token_gives_the_parallel_forward() -> None:
    settings = config.Model(
        hidden_size=32, num_hidden_layers=1, num_heads=2, head_dim=16, intermediate_size=48, vocab_size=50,
        num_householder=2, use_forget_gate=True, backend="triton",
    )  # fmt: skip
    model = build_model(settings).to(DEVICE)
    model.init_weights(0)
    mixer = model.layers[0].attn
    x = torch.randn(2, 12, 32, device=DEVICE)
    with torch.no_grad():
        whole, cache, outputs = mixer(x), None, []
        for t in range(12):
            out, cache = mixer.step(x[:, t : t + 1], cache)
            outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-4, atol=1e-5)
