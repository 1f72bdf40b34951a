"""The model: initialisation, causality, packing and decoding for every variant, and the mixer against its definition."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_dp import config
from titan_dp.model.attention import Attention
from titan_dp.model.deltaproduct import DeltaProduct, ForgetGate
from titan_dp.model.layers import Initializer, Packing, ShortConv
from titan_dp.model.transformer import Transformer, build_model

GROUPED = {"num_heads": 4, "num_key_heads": 2, "use_forget_gate": True, "use_output_gate": True, "expand_v": 0.5}
VARIANTS: dict[str, dict] = {
    "DeltaNet": {"num_householder": 1},
    "Gated DeltaProduct_3": {"num_householder": 3, "use_forget_gate": True},
    "step sizes that reach 2": {"beta_stretch": 0.1},
    "output gate, expand_v 2": {"use_output_gate": True, "expand_v": 2.0},
    "no convolution, beta in [0, 1], untied": {
        "use_short_conv": False,
        "allow_neg_eigval": False,
        "tie_word_embeddings": False,
    },
    "adaptive Gated DeltaProduct_2": {"adaptive_householder": True, "use_forget_gate": True},
    "grouped heads": GROUPED,
    "norm over groups behind the gate": {**GROUPED, "output_norm": "group", "gate_before_norm": True},
    "norm of a head behind the gate": {"use_output_gate": True, "gate_before_norm": True},
    "linear attention": {"mixer": "gla", "num_householder": 1, "use_forget_gate": True},
    "RWKV-7 product_2": {"mixer": "rwkv7", "use_output_gate": True, "expand_v": 2.0},
    "windowed, grouped softmax": {"mixer": "attention", "attention_window": 7, "attention_num_kv_heads": 1},
    "hybrid": {"attention_layers": [1], "use_forget_gate": True},
    "hybrid in OLMo's blocks": {"attention_layers": [1], "attention_block": "olmo", "attention_num_kv_heads": 1},
}


def settings(**changes: object) -> config.Model:
    base = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_heads": 2,
        "head_dim": 8,
        "intermediate_size": 40,
        "vocab_size": 50,
        "initializer_range": 0.3,
        "attention_num_heads": 2,
    }
    return config.Model(**(base | changes))  # type: ignore[arg-type]


def make(dtype: torch.dtype = torch.float64, **changes: object) -> Transformer:
    """An initialised model, in float64 so that equal means equal."""
    model = build_model(settings(**changes)).to(dtype)
    model.init_weights(0)
    return model


@pytest.fixture(params=VARIANTS, ids=str)
def variant(request: pytest.FixtureRequest) -> Transformer:
    """Its routers, if it has any, take about half of the steps."""
    model = make(**VARIANTS[request.param])
    for name, parameter in model.named_parameters():
        if name.endswith("r_proj.bias"):
            nn.init.normal_(parameter, std=0.5)
    return model


def tokens_of(*shape: int) -> Tensor:
    return torch.randint(0, 50, shape)


# -- initialisation ----------------------------------------------------------------------------------------------------


def test_a_meta_model_in_poisoned_memory_is_written_whole(variant: Transformer) -> None:
    with torch.no_grad():
        for parameter in variant.parameters():
            parameter.fill_(math.nan)
    variant.init_weights(1)  # asserts that each was written once and is finite
    assert all(bool(p.isfinite().all()) for p in variant.parameters())


def test_a_parameter_that_init_weights_forgets_is_caught() -> None:
    model = make()
    model.extra = nn.Parameter(torch.zeros(3))
    with pytest.raises(AssertionError, match="extra was initialised 0 times"):
        model.init_weights(0)


def test_first_values_have_their_distributions() -> None:
    model = make(use_forget_gate=True, hidden_size=128, num_heads=16, initializer_range=0.02)
    gates = [m for m in model.modules() if isinstance(m, ForgetGate)]
    A = torch.cat([gate.A_log.exp() for gate in gates])
    assert bool(((A > 0) & (A <= 16)).all())
    assert A.max() > 8
    dt = F.softplus(torch.cat([gate.dt_bias for gate in gates]))
    assert bool(((dt >= 9.9e-4) & (dt <= 0.101)).all())
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert bool((parameter == 1).all()), name
        elif "forget_gate" not in name:
            assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.15), name


# -- what every variant must do ----------------------------------------------------------------------------------------


def test_changing_a_token_changes_nothing_before_it_and_something_after(variant: Transformer) -> None:
    tokens = tokens_of(2, 20)
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 50
    before, after = variant(tokens), variant(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert bool((before[:, 9:] != after[:, 9:]).any(-1).all(0)[:3].all())


CU_SEQLENS = torch.tensor([0, 11, 12, 40, 45, 80, 80, 80], dtype=torch.int32)


def test_packed_documents_equal_each_document_alone_in_loss_and_gradients(variant: Transformer) -> None:
    tokens, labels = tokens_of(2, 40), tokens_of(2, 40)
    labels[0, 10] = -100
    packed = variant(tokens, labels, CU_SEQLENS).loss
    packed.backward()
    gradients = [p.grad.clone() for p in variant.parameters()]  # type: ignore[union-attr]
    variant.zero_grad()
    alone = torch.zeros(())
    for start, end in itertools.pairwise(CU_SEQLENS[:6].tolist()):
        loss = variant(tokens.flatten()[None, start:end], labels.flatten()[None, start:end]).loss
        loss.backward()
        alone = alone + loss.detach()
    torch.testing.assert_close(packed.detach(), alone, check_dtype=False, rtol=1e-6, atol=1e-6)
    for gradient, parameter in zip(gradients, variant.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_decoding_token_by_token_or_in_blocks_equals_the_parallel_forward(variant: Transformer) -> None:
    tokens = tokens_of(2, 60)
    expected = variant(tokens)
    cache, position = None, 0
    for size in itertools.chain([5, 1, 17], itertools.repeat(1)):
        if position + size > 60:
            break
        logits, cache = variant.step(tokens[:, position : position + size], cache)
        position += size
        torch.testing.assert_close(logits, expected[:, position - 1], rtol=1e-5, atol=1e-5)


ONE_GRAPH = [
    "adaptive Gated DeltaProduct_2",
    "norm over groups behind the gate",
    "linear attention",
    "windowed, grouped softmax",
]


# The others' blocks are in tests/distributed/test_compile.py; RWKV-7's loop is refused to the compiler.
@pytest.mark.parametrize("name", ONE_GRAPH)
def test_a_block_is_one_graph_with_and_without_packing(name: str) -> None:
    torch._dynamo.reset()
    block = make(**VARIANTS[name]).layers[1]
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 80, 24, dtype=torch.float64)
    longer = torch.cat([CU_SEQLENS, torch.full((64,), 80, dtype=torch.int32)])
    for packing in (None, Packing.build(CU_SEQLENS, 80), Packing.build(longer, 80)):
        torch.testing.assert_close(compiled(x, packing), block(x, packing))


def test_bfloat16_matrices_with_float32_islands_stay_near_float32(variant: Transformer) -> None:
    model, islands = variant.float(), {id(p) for m in variant.fp32_modules() for p in m.parameters()}
    model.init_weights(0)  # routers take all steps: an undecided one would decide otherwise after rounding
    tokens, labels = tokens_of(2, 40), tokens_of(2, 40)
    expected = model(tokens, labels).loss
    for parameter in model.parameters():
        if id(parameter) not in islands:
            parameter.data = parameter.data.bfloat16()
    loss = model(tokens, labels).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=0.05)
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


# -- the pieces against their definitions ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [name for name, v in VARIANTS.items() if v.get("mixer", "deltaproduct") in ("deltaproduct", "gla")]
)
def test_the_mixer_follows_the_papers_definition(name: str) -> None:
    """Token by token, step by step, in float64, from projections to output."""
    c = settings(**{k: v for k, v in VARIANTS[name].items() if k != "attention_layers"})
    mixer = DeltaProduct(c).double()
    mixer.init_weights(Initializer(0, torch.device("cpu"), 0.3))
    nn.init.uniform_(mixer.o_norm.weight)
    x = torch.randn(1, 13, 24, dtype=torch.float64)
    n, H, G, dk, dv = c.num_householder, c.num_heads, c.key_heads, 8, c.head_v_dim

    def activated(projection: nn.Linear, conv: ShortConv | None) -> Tensor:
        y = projection(x)
        if conv is not None:
            y = F.conv1d(F.pad(y.mT, (3, 0)), conv.weight, groups=y.shape[-1]).mT
        return F.silu(y)[0]

    def unit(y: Tensor) -> Tensor:
        return y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt()

    q = unit(activated(mixer.q_proj, mixer.q_conv1d).view(13, G, dk)).repeat_interleave(H // G, 1)
    k = unit(activated(mixer.k_proj, mixer.k_conv1d).view(13, n, G, dk)).repeat_interleave(H // G, 2)
    v = activated(mixer.v_proj, mixer.v_conv1d).view(13, n, H, dv)
    s = c.beta_stretch
    share = ((1 + 2 * s) * mixer.b_proj(x)[0].sigmoid() - s).clamp(0, 1)
    beta = share.view(13, n, H) * (2 if c.allow_neg_eigval else 1)
    gate = torch.ones(13, H, dv) if mixer.g_proj is None else F.silu(mixer.g_proj(x)[0]).view(13, H, dv)
    heads = []
    for h in range(H):
        S, rows = torch.zeros(dk, dv, dtype=torch.float64), []
        for t in range(13):
            if mixer.forget_gate is not None and mixer.a_proj is not None:
                A_log, dt_bias = mixer.forget_gate.A_log, mixer.forget_gate.dt_bias
                S = S * torch.exp(-A_log.exp()[h] * F.softplus(mixer.a_proj(x)[0, t, h] + dt_bias[h]))
            for j in range(n):
                read = S.T @ k[t, j, h] if c.mixer == "deltaproduct" else 0
                S = S + torch.outer(k[t, j, h], beta[t, j, h] * (v[t, j, h] - read))
            rows.append(S.T @ q[t, h] * dk**-0.5)
        heads.append(torch.stack(rows))
    o = torch.stack(heads, 1)  # [T, H, dv]
    o = o * gate if c.gate_before_norm else o
    normed = o.unflatten(1, (G, H // G) if c.output_norm == "group" else (H, 1)).flatten(2)
    normed = normed / (normed.square().mean(-1, keepdim=True) + c.norm_eps).sqrt()
    out = normed.view(13, H, dv) * mixer.o_norm.weight.view(-1, dv)
    out = out if c.gate_before_norm else out * gate
    torch.testing.assert_close(mixer(x)[0], mixer.o_proj(out.flatten(1)))


@pytest.mark.parametrize(("window", "kv_heads"), [(None, 2), (5, 1)])
def test_attention_is_softmax_over_visible_rotated_keys(window: int | None, kv_heads: int) -> None:
    c = settings(mixer="attention", attention_window=window, attention_num_kv_heads=kv_heads)
    attention = Attention(c).double()
    attention.init_weights(Initializer(0, torch.device("cpu"), 0.3))
    x = torch.randn(1, 12, 24, dtype=torch.float64)
    q = attention.q_proj(x)[0].view(12, 2, 12)
    k, v = (p(x)[0].view(12, kv_heads, 12).repeat_interleave(2 // kv_heads, 1) for p in (attention.k_proj, attention.v_proj))

    def rotated(y: Tensor, t: int) -> Tensor:
        pairs = torch.complex(y[:6], y[6:])
        angle = t * 10000.0 ** (-torch.arange(6, dtype=torch.float64) / 6)
        turned = pairs * torch.polar(torch.ones(6, dtype=torch.float64), angle)
        return torch.cat([turned.real, turned.imag])

    out = torch.zeros(12, 2, 12, dtype=torch.float64)
    for h, t in itertools.product(range(2), range(12)):
        visible = [s for s in range(t + 1) if window is None or t - s < window]
        scores = torch.stack([rotated(q[t, h], t) @ rotated(k[s, h], s) for s in visible]) * 12**-0.5
        out[t, h] = scores.softmax(0) @ v[visible, h]
    torch.testing.assert_close(attention(x)[0], attention.o_proj(out.flatten(1)), rtol=1e-5, atol=1e-5)
