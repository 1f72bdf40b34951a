"""The mixer of NVIDIA's gated DeltaProduct: groups of heads, one norm for each, the gate before it or after it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.kernels.helpers import error
from tests.unit.conftest import Folder
from tests.unit.test_model import make, settings
from titan_dp import config
from titan_dp.config.advice import explain_unknown
from titan_dp.errors import UserError
from titan_dp.inference.megatron import from_megatron, to_megatron
from titan_dp.model.deltaproduct import DeltaProduct
from titan_dp.model.layers import Initializer, RMSNorm

GDP = {
    "num_heads": 4,
    "num_key_heads": 2,
    "expand_v": 0.5,
    "num_householder": 3,
    "use_forget_gate": True,
    "allow_neg_eigval": False,
    "use_output_gate": True,
    "output_norm": "group",
    "gate_before_norm": True,
    "norm_eps": 1e-5,
}
ORDERS = pytest.mark.parametrize("gate_before_norm", [True, False], ids=["gate, norm", "norm, gate"])


def mixer_of(c: config.Model, dtype: torch.dtype = torch.float32) -> DeltaProduct:
    """With weights that are all different."""
    mixer = DeltaProduct(c).to(dtype)
    mixer.init_weights(Initializer(0, torch.device("cpu"), 0.3))
    nn.init.uniform_(mixer.o_norm.weight, 0.5, 1.5)
    return mixer


def tensors_of(mixer: DeltaProduct) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in mixer.named_parameters()}


# -- the whole mixer against its definition, from Megatron's tensors ----------------------------------------------------------


def by_definition(c: config.Model, w: dict[str, Tensor], x: Tensor) -> Tensor:
    """out [T, D] of x [T, D], token by token and step by step; w: one layer's tensors as Megatron-LM names them."""
    n, H, G, dk, dv = c.num_householder, c.num_heads, c.num_key_heads or 0, c.head_dim, c.head_v_dim
    T, inner = len(x), H * dv
    z, vkq, b, a = (x @ w["in_proj.weight"].T).split([inner, n * inner + (n + 1) * G * dk, n * H, H], -1)

    taps = w["conv1d.weight"][:, 0]  # [channels, W], the last one for the token itself
    W = taps.shape[1]
    mixed = []
    for t in range(T):
        seen = [vkq[t - back] * taps[:, W - 1 - back] for back in range(min(W, t + 1))]
        mixed.append(F.silu(torch.stack(seen).sum(0)))
    v, k, q = torch.stack(mixed).split([n * inner, n * G * dk, G * dk], -1)
    v, k, q = v.reshape(T, n, H, dv), k.reshape(T, n, G, dk), q.reshape(T, G, dk)
    k, q = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (k, q))
    beta = b.sigmoid().view(T, n, H)
    decay = torch.exp(-w["A_log"].exp() * F.softplus(a + w["dt_bias"]))

    heads = []
    for h in range(H):
        group, S, read = h // (H // G), x.new_zeros(dk, dv), []
        for t in range(T):
            S = decay[t, h] * S
            for j in range(n):
                key = k[t, j, group]
                S = S + beta[t, j, h] * torch.outer(key, v[t, j, h] - S.T @ key)
            read.append(S.T @ q[t, group] / dk**0.5)
        heads.append(torch.stack(read))
    o = torch.cat(heads, -1)  # [T, H dv]

    gate = F.silu(z)
    y = o * gate if c.gate_before_norm else o
    parts = [part / (part.square().mean(-1, keepdim=True) + 1e-5).sqrt() for part in y.chunk(G, -1)]
    y = torch.cat(parts, -1) * w["norm.weight"]
    return (y if c.gate_before_norm else y * gate) @ w["out_proj.weight"].T


@ORDERS
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-13)], ids=["float32", "float64"])
def test_outputs_and_gradients_are_those_of_the_definition(gate_before_norm: bool, dtype: torch.dtype, bound: float) -> None:
    """With keys of 128 and values of 64 numbers, over several chunks."""
    c = settings(**(GDP | {"hidden_size": 64, "head_dim": 128, "gate_before_norm": gate_before_norm}))
    mixer = mixer_of(c, dtype)
    x, weight = torch.randn(50, 64, dtype=dtype), torch.randn(50, 64, dtype=dtype)
    own = x.clone()[None].requires_grad_()
    out = mixer(own)
    (out[0] * weight).sum().backward()

    leaves = {name: y.double().requires_grad_() for name, y in to_megatron(c, tensors_of(mixer)).items()}
    exact = x.double().requires_grad_()
    expected = by_definition(c, leaves, exact)
    (expected * weight.double()).sum().backward()

    gradients = to_megatron(c, {name: p.grad for name, p in mixer.named_parameters() if p.grad is not None})
    errors = {name: error(gradient, leaves[name].grad) for name, gradient in gradients.items()}  # type: ignore[arg-type]
    errors |= {"out": error(out[0], expected), "x": error(own.grad[0], exact.grad)}  # type: ignore[arg-type,index]
    # Sums over all tokens of terms that cancel: the definition in float32 is 2e-6 off itself.
    cancelling = {name: errors.pop(name) for name in ("A_log", "dt_bias")}
    assert max(errors.values()) < bound, errors
    assert max(cancelling.values()) < 10 * bound, cancelling


def test_a_group_of_one_head_has_a_weight_for_each_channel_and_else_the_norm_of_a_head() -> None:
    one = make(num_heads=2, use_output_gate=True, output_norm="group")
    other = make(num_heads=2, use_output_gate=True)
    for ours, theirs in zip(one.blocks, other.blocks, strict=True):
        nn.init.uniform_(theirs.attn.o_norm.weight)
        ours.attn.o_norm.weight.data = theirs.attn.o_norm.weight.detach().repeat(2)
    tokens = torch.randint(0, 50, (2, 20))
    torch.testing.assert_close(one(tokens), other(tokens))


def test_a_norm_of_groups_takes_each_part_for_itself_in_float32_at_least() -> None:
    norm = RMSNorm(6, 1e-5, groups=2)
    nn.init.uniform_(norm.weight)
    x = torch.randn(5, 6)
    alone = [F.rms_norm(x[:, i : i + 3], (3,), norm.weight[i : i + 3], 1e-5) for i in (0, 3)]
    torch.testing.assert_close(norm.apply_to(x), torch.cat(alone, -1))
    rounded = x.bfloat16()
    assert torch.equal(norm.apply_to(rounded), norm.apply_to(rounded.float()).bfloat16())


# -- Megatron's tensors -------------------------------------------------------------------------------------------------------


def gdp_settings(**changes: object) -> config.Model:
    return settings(**(GDP | changes))


@ORDERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_goes_to_megatron_and_back_bit_for_bit(gate_before_norm: bool, dtype: torch.dtype) -> None:
    c = gdp_settings(gate_before_norm=gate_before_norm)
    ours = tensors_of(mixer_of(c, dtype))
    theirs = to_megatron(c, ours)
    back = from_megatron(c, theirs)
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name], ours[name]) and back[name].dtype == dtype for name in ours)
    again = to_megatron(c, back)
    assert all(torch.equal(again[name], theirs[name]) for name in theirs)


def test_rows_stand_where_megatron_has_them() -> None:
    """z, V, K, Q, b, a; V, K and b step by step, and heads in each step."""
    c = gdp_settings()
    n, H, G, dk, dv = 3, 4, 2, 8, 4
    ours = tensors_of(mixer_of(c))
    theirs = to_megatron(c, ours)
    rows = theirs["in_proj.weight"]
    assert rows.shape == (H * dv * (1 + n) + G * dk * (n + 1) + H * (n + 1), 24)
    start = H * dv  # behind z
    assert torch.equal(rows[:start], ours["g_proj.weight"])
    step, head = 1, 2
    at = start + (step * H + head) * dv
    assert torch.equal(rows[at : at + dv], ours["v_proj.weight"].view(n, H, dv, 24)[step, head])
    at = start + n * H * dv + (2 * G + 1) * dk
    assert torch.equal(rows[at : at + dk], ours["k_proj.weight"].view(n, G, dk, 24)[2, 1])
    assert torch.equal(rows[-H:], ours["a_proj.weight"])
    assert torch.equal(rows[-H - n * H : -H], ours["b_proj.weight"])
    assert torch.equal(theirs["conv1d.weight"][-G * dk :], ours["q_conv1d.weight"])
    assert theirs["norm.weight"].shape == (H * dv,)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"mixer": "gla", "num_householder": 1}, "mixer = 'gla'"),
        ({"adaptive_householder": True}, "adaptive_householder = true"),
        ({"use_forget_gate": False}, "use_forget_gate = false"),
        ({"allow_neg_eigval": True}, "allow_neg_eigval = true"),
        ({"use_output_gate": False}, "use_output_gate = false"),
        ({"use_short_conv": False}, "use_short_conv = false"),
        ({"output_norm": "head"}, "output_norm = 'head'"),
        ({"norm_eps": 1e-6}, r"norm_eps = 1e-06 \(only 1e-05\)"),
    ],
)
def test_what_megatrons_mixer_cannot_express_is_refused_by_name(changes: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=f"mixer cannot express {named}; .*remote-code"):
        to_megatron(gdp_settings(**changes), {})


def test_tensors_that_do_not_fit_are_named() -> None:
    c = gdp_settings()
    theirs = to_megatron(c, tensors_of(mixer_of(c)))
    without = {name: x for name, x in theirs.items() if name != "A_log"}
    with pytest.raises(UserError, match=r"^A_log of Megatron-LM's .* is missing"):
        from_megatron(c, without)
    with pytest.raises(UserError, match=r"^conv1d\.bias is not among the tensors"):
        from_megatron(c, theirs | {"conv1d.bias": torch.zeros(1)})
    with pytest.raises(UserError, match=r"^in_proj\.weight .* has shape \[72, 24\] and not \[144, 24\]; .*ranks shared them"):
        from_megatron(c, theirs | {"in_proj.weight": theirs["in_proj.weight"][:72]})


# -- settings -----------------------------------------------------------------------------------------------------------------


def test_a_gate_before_the_norm_without_a_gate_has_no_effect_and_says_so(folder: Folder) -> None:
    loaded = folder.load('extends = "debug.toml"\n[model]\nuse_output_gate = false\ngate_before_norm = true\n')
    assert any(warning.startswith("model.gate_before_norm") for warning in loaded.warnings())


def test_megatrons_names_are_explained() -> None:
    for theirs, ours in {
        "gdp_num_householder": "num_householder",
        "mamba_num_groups": "num_key_heads",
        "mamba_state_dim": "head_dim",
        "norm_before_gate": "gate_before_norm",
    }.items():
        assert f"model.{ours}" in explain_unknown(f"model.{theirs}")
