"""The sharding recipe: same numbers on any mesh, float32 islands, one full graph a block."""

from __future__ import annotations

import torch

from tests.distributed.harness import run_ranks
from tests.distributed.helpers import TINY, backward, clean, full_state, sharded_model
from titan_dp import config
from titan_dp.model.transformer import build_model


def first_values(replicate: int) -> dict[str, torch.Tensor]:
    return full_state(sharded_model(replicate))


def test_first_values_do_not_depend_on_the_mesh() -> None:
    plain = build_model(TINY)
    plain.init_weights(0)
    expected = {name: p.detach() for name, p in plain.named_parameters()}
    for world_size, replicate in ((2, 1), (4, 2)):
        for values in run_ranks(world_size, first_values, replicate):
            assert values.keys() == expected.keys()
            assert all(torch.equal(values[name], expected[name]) for name in expected), (world_size, replicate)


def dtypes_in_compute() -> dict[str, torch.dtype]:
    """Dtypes of the parameters while a block runs, and of its input."""
    model = sharded_model(training=config.Training())
    seen = {}

    def look(block: torch.nn.Module, inputs: tuple) -> None:
        seen.update({name: p.dtype for name, p in block.named_parameters()}, x=inputs[0].dtype)

    model.layers[0].register_forward_pre_hook(look)
    backward(model, 0)
    return seen


def test_matrices_compute_in_bfloat16_while_norms_a_log_and_dt_bias_stay_float32() -> None:
    for seen in run_ranks(2, dtypes_in_compute):
        islands = {name for name, dtype in seen.items() if dtype == torch.float32}
        assert islands == {
            "attn_norm.weight", "mlp_norm.weight", "attn.o_norm.weight", "attn.forget_gate.A_log", "attn.forget_gate.dt_bias",
        }  # fmt: skip
        assert seen["x"] == torch.bfloat16


def gradients(mode: str, option: str | int, compile: bool) -> tuple[dict[str, torch.Tensor], int, int]:
    """Gradients, and how many graphs and graph breaks torch.compile counted.

    The graphs run as they are: code is generated from one, and tested, in tests/unit/test_adaptive_householder.py.
    """
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    torch.compiler.set_default_backend("aot_eager")
    try:
        model = sharded_model(ac=config.ActivationCheckpoint(mode=mode, selective_ac_option=option), compile=compile)  # type: ignore[arg-type]
    finally:
        torch.compiler.set_default_backend(None)
    backward(model, 0)
    grads = {clean(name): p.grad.full_tensor() for name, p in model.named_parameters()}  # type: ignore[union-attr]
    return grads, counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def test_checkpointing_does_not_change_gradients() -> None:
    expected, _, _ = run_ranks(1, gradients, "none", "op", False)[0]
    for mode, option in (("full", "op"), ("selective", 2)):
        grads, _, _ = run_ranks(2, gradients, mode, option, False)[0]
        for name, gradient in expected.items():
            torch.testing.assert_close(grads[name], gradient, rtol=1e-5, atol=1e-7, msg=f"{mode} {option} {name}")


def test_a_compiled_block_is_one_full_graph_without_breaks_even_under_checkpointing() -> None:
    expected, _, _ = run_ranks(1, gradients, "none", "op", False)[0]
    grads, graphs, breaks = run_ranks(1, gradients, "selective", "op", True)[0]
    assert breaks == 0
    assert graphs == 1, "both blocks share one graph"
    for name, gradient in expected.items():
        torch.testing.assert_close(grads[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
