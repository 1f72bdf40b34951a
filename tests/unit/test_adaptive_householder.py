"""The router of adaptive models: which steps are taken, what they cost, what their gradient is, and that a cost works.

What every model must do (causality, packing, decoding, one graph per block) is asked in test_model.py with routers that are
undecided; here is what only they do.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch._inductor import config as inductor

from tests.distributed.harness import run_ranks
from tests.distributed.helpers import clean, sharded_model
from tests.unit.test_model import CU_SEQLENS, make, settings, tokens_of
from titan_dp import config
from titan_dp.model.deltaproduct import DeltaProduct
from titan_dp.model.layers import Initializer
from titan_dp.model.transformer import Transformer, build_model
from titan_dp.train.optim import build_optimizer


def steps_of(model: Transformer, tokens: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """[B, T], summed over layers."""
    return model(tokens, tokens, cu_seqlens).householder_steps


def adaptive(undecided: bool = True, **changes: object) -> Transformer:
    """A model with routers; undecided ones take about half of the steps."""
    model = make(adaptive_householder=True, **changes)
    for block in model.blocks:
        if undecided:
            torch.nn.init.normal_(block.attn.r_proj.bias, std=0.5)  # type: ignore[union-attr]
    return model


def test_with_all_steps_taken_it_is_exactly_the_model_without_a_router() -> None:
    model, plain = adaptive(undecided=False, num_householder=3), make(num_householder=3)
    plain.load_state_dict({name: p for name, p in model.state_dict().items() if "r_proj" not in name})
    tokens = tokens_of(2, 30)
    assert torch.equal(model(tokens), plain(tokens))
    assert float(steps_of(model, tokens).sum()) == 2 * 30 * 3 * 2
    assert steps_of(plain, tokens) is None


@pytest.mark.parametrize("gate", [False, True])
def test_a_step_that_is_switched_off_is_left_out_of_the_recurrence(gate: bool) -> None:
    c = settings(adaptive_householder=True, num_householder=3, use_forget_gate=gate)
    mixer = DeltaProduct(c).double()
    mixer.init_weights(Initializer(0, torch.device("cpu"), 0.3))
    torch.nn.init.zeros_(mixer.r_proj.bias)
    x = torch.randn(1, 15, 24, dtype=torch.float64)
    on = x[0] @ mixer.r_proj.weight.T > 0  # [T, n]
    assert 0 < int(on.sum()) < on.numel()
    router, mixer.r_proj = mixer.r_proj, None
    q, k, v, beta, g = mixer.recurrence_inputs(x, None)
    mixer.r_proj = router
    S, rows = torch.zeros(2, 8, 8, dtype=torch.float64), []
    for t in range(15):
        S = S if g is None else S * g[0, t].exp()[:, None, None]
        for j in range(3):
            if on[t, j]:
                key, read = k[0, t, j], torch.einsum("hkv,hk->hv", S, k[0, t, j])
                S = S + torch.einsum("hk,hv->hkv", key, beta[0, t, j, :, None] * (v[0, t, j] - read))
        rows.append(torch.einsum("hkv,hk->hv", S, q[0, t]) * 8**-0.5)
    o = torch.stack(rows)
    o = o / (o.square().mean(-1, keepdim=True) + c.norm_eps).sqrt()
    out, steps = mixer.mix(x)
    torch.testing.assert_close(out[0], mixer.o_proj(o.flatten(1)))
    assert steps is not None
    assert torch.equal(steps.detach()[0], on.sum(-1).to(steps.dtype))
    assert bool((mixer.recurrence_inputs(x, None).beta[0][~on] == 0).all())


def test_the_steps_gradient_is_that_of_the_sigmoids_sum() -> None:
    model, tokens = adaptive(num_hidden_layers=1), tokens_of(2, 20)
    router, block = model.blocks[0].attn.r_proj, model.blocks[0]  # type: ignore[union-attr]
    steps = steps_of(model, tokens).sum()
    steps.backward()
    with torch.no_grad():
        x = block.attn_norm.apply_to(model.embeddings(tokens)).flatten(0, 1)
        soft = (x @ router.weight.T + router.bias).sigmoid()
        slope = soft * (1 - soft)
        assert steps == int((soft > 0.5).sum())
        torch.testing.assert_close(router.weight.grad, slope.T @ x)
        torch.testing.assert_close(router.bias.grad, slope.sum(0))


def test_the_losss_gradient_reaches_the_router_through_beta() -> None:
    """d loss / d logit = slope of the sigmoid times d loss / d gate, where the gate multiplies beta in every head."""
    model, tokens = adaptive(num_hidden_layers=1), tokens_of(2, 20)
    mixer, seen = model.blocks[0].attn, []
    recur = mixer._recur  # type: ignore[union-attr]

    def look(inputs, *rest, **options):  # type: ignore[no-untyped-def]
        inputs.beta.retain_grad()
        seen.append(inputs.beta)
        return recur(inputs, *rest, **options)

    mixer._recur = look  # type: ignore[union-attr, method-assign]
    model(tokens, tokens).loss.backward()
    with torch.no_grad():
        x = model.blocks[0].attn_norm.apply_to(model.embeddings(tokens))
        full_beta = 2 * mixer.b_proj(x).sigmoid().view(2, 20, 2, 2)  # type: ignore[union-attr]
        soft = (x @ mixer.r_proj.weight.T + mixer.r_proj.bias).sigmoid()  # type: ignore[union-attr]
        expected = (seen[0].grad * full_beta).sum(-1) * soft * (1 - soft)
        torch.testing.assert_close(mixer.r_proj.bias.grad, expected.sum((0, 1)), rtol=1e-5, atol=1e-8)  # type: ignore[union-attr]


def test_packed_documents_take_the_steps_that_each_takes_alone() -> None:
    model, tokens = adaptive(), tokens_of(2, 40)
    packed, steps = model(tokens, None, CU_SEQLENS).flatten(0, 1), steps_of(model, tokens, CU_SEQLENS)
    assert steps.shape == (2, 40)
    for start, end in itertools.pairwise(CU_SEQLENS[:6].tolist()):
        document = tokens.flatten()[None, start:end]
        torch.testing.assert_close(model(document)[0], packed[start:end], rtol=1e-5, atol=1e-5)
        assert torch.equal(steps_of(model, document)[0], steps.flatten()[start:end])
    assert 0 < float(steps.detach().sum()) < 80 * 2 * 2


def test_the_count_is_in_float32_whatever_the_matrices_are_in() -> None:
    model, tokens = adaptive(undecided=False).bfloat16(), tokens_of(8, 301)
    assert float(steps_of(model, tokens).sum()) == 8 * 301 * 2 * 2  # 9,632 is no bfloat16 number


def mean_steps_after_training(cost: float) -> float:
    """Steps a token and layer, after learning text in which every token is followed by the next id."""
    model = adaptive(undecided=False, num_hidden_layers=1, initializer_range=0.02).float()
    optimizers = build_optimizer(model, config.Optimizer(lr=0.02))
    tokens = (torch.arange(21) + torch.randint(0, 50, (8, 1))) % 50
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    for _ in range(80):
        loss, steps = model(inputs, labels)
        ((loss + cost * steps.sum()) / labels.numel()).backward()
        optimizers.step(torch.zeros(()))
        optimizers.zero_grad()
    return float(steps_of(model, inputs).mean())


def test_a_cost_switches_off_steps_that_are_not_needed() -> None:
    assert mean_steps_after_training(1.0) < 0.7
    assert mean_steps_after_training(1e-9) > 1.4


# -- sharded, recomputed, compiled -------------------------------------------------------------------------------------

SHARDED = settings(adaptive_householder=True, use_forget_gate=True, initializer_range=0.1, num_hidden_layers=1)


def gradients(model: Transformer) -> dict[str, Tensor]:
    """Of loss and steps together, and the two themselves; the routers are undecided."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("r_proj.bias"):
                parameter.zero_()
    tokens = torch.randint(0, 50, (2, 24), generator=torch.Generator().manual_seed(0))
    loss, steps = model(tokens, tokens)
    ((loss + 0.5 * steps.sum()) / 48).backward()
    whole = {clean(name): getattr(p.grad, "full_tensor", lambda grad=p.grad: grad)() for name, p in model.named_parameters()}
    return whole | {"loss": loss.detach(), "steps": steps.detach().sum()}


def sharded() -> tuple[dict[str, Tensor], int, int]:
    """`gradients` of SHARDED with everything that sharding does; graphs and graph breaks."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    with inductor.patch({"cpp.simdlen": 1}):  # plain loops take three quarters of the time to compile
        found = gradients(sharded_model(ac=config.ActivationCheckpoint(mode="selective"), compile=True, c=SHARDED))
    return found, counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def test_a_sharded_recomputed_and_compiled_model_takes_the_same_steps_with_the_same_gradients() -> None:
    """The only test in which the compiler generates code."""
    model = build_model(SHARDED)
    model.init_weights(0)
    expected = gradients(model)
    assert 0 < float(expected["steps"]) < 48 * 2
    ((found, graphs, breaks),) = run_ranks(1, sharded)
    assert (graphs, breaks) == (1, 0)
    assert found["steps"] == expected["steps"]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)
