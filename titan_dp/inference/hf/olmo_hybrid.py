"""Gated DeltaNets (n_h = 1 with an output gate) as OlmoHybridForCausalLM, which transformers and vLLM run without code of ours.

That model wants at least one softmax layer. Ours is added behind the last one and does nothing: its two norms, through which
everything it computes goes, have weight 0. What it has and our model may lack is made so that it has no effect: decays of a
model without a forget gate are exp(-exp(-1000) ...) = 1, convolutions of one without them take the last token alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from titan_dp import config
from titan_dp.errors import UserError
from titan_dp.files import shown

if TYPE_CHECKING:
    from torch import Tensor

    from titan_dp.inference.sources import Source

MODEL_TYPE = "olmo_hybrid"
_EPS = 1e-5  # of its output norm, whatever the configuration says
_NO_DECAY = -1000.0
"""A_log whose exponential is 0 in every dtype. Minus infinity would do as well, but no reader takes it for a healthy weight."""
_TOP = {
    "embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
_IN_LAYER = [("attn_norm.", "input_layernorm."), ("mlp_norm.", "post_attention_layernorm."), ("attn.", "linear_attn.")]


def inexpressible(c: config.Model) -> list[str]:
    """The settings of `c` that an OlmoHybrid cannot have."""
    reasons = {
        f"mixer = {c.mixer!r}": c.mixer != "deltaproduct",
        "attention_layers": any(c.mixer_of(i) == "attention" for i in range(c.num_hidden_layers)),
        f"num_householder = {c.num_householder}": c.num_householder != 1,
        f"num_key_heads = {c.key_heads}": c.key_heads != c.num_heads,
        "use_output_gate = false": not c.use_output_gate,
        **norm_and_gate(c),
        f"norm_eps = {c.norm_eps:g} (only {_EPS:g})": c.norm_eps != _EPS,
    }
    return [reason for reason, applies in reasons.items() if applies]


def norm_and_gate(c: config.Model) -> dict[str, bool]:
    """What the others' output norms cannot have, and whether `c` has it: they are of one head each, and before the gate."""
    return {
        f"output_norm = {c.output_norm!r}": c.output_norm != "head",
        "gate_before_norm = true": c.use_output_gate and c.gate_before_norm,
    }


def to_hf(c: config.Model, seq_len: int) -> dict[str, Any]:
    """config.json of `c`, every key that matters, without the tokenizer's ids and the dtype."""
    softmax_head = next(d for d in (128, 64, 32, 16, 8, 4, 2, 1) if c.hidden_size % d == 0)
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["OlmoHybridForCausalLM"],
        "hidden_size": c.hidden_size,
        "intermediate_size": c.mlp_size,
        "num_hidden_layers": c.num_hidden_layers + 1,
        "layer_types": ["linear_attention"] * c.num_hidden_layers + ["full_attention"],
        "num_attention_heads": c.hidden_size // softmax_head,
        "num_key_value_heads": 1,
        "linear_num_key_heads": c.num_heads,
        "linear_num_value_heads": c.num_heads,
        "linear_key_head_dim": c.head_dim,
        "linear_value_head_dim": c.head_v_dim,
        "linear_conv_kernel_dim": c.conv_size,
        "linear_allow_neg_eigval": c.allow_neg_eigval,
        "use_forget_gate": c.use_forget_gate,  # this and the next are for `titan-dp import`
        "use_short_conv": c.use_short_conv,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rope_parameters": None,
        "rms_norm_eps": c.norm_eps,
        "initializer_range": c.initializer_range,
        "tie_word_embeddings": c.tie_word_embeddings,
        "max_position_embeddings": seq_len,
        "vocab_size": c.vocab_size,
        "use_cache": True,
    }


def from_hf(v: dict[str, Any], where: str) -> dict[str, Any]:
    """Our [model] settings of a config.json. Raises UserError for softmax layers with an effect, KeyError for a missing key."""
    layers = len(v["layer_types"]) - 1
    if v["num_hidden_layers"] != layers + 1 or v["layer_types"] != ["linear_attention"] * layers + ["full_attention"]:
        raise UserError(
            f"{where} has softmax layers among its layer_types; titan_dp reads an olmo_hybrid model only if it has one, the "
            "last and without effect, as `titan-dp export --format olmo-hybrid` writes it"
        )
    fixed = {"rms_norm_eps": _EPS, "hidden_act": "silu", "linear_num_key_heads": v["linear_num_value_heads"]}
    for key, allowed in fixed.items():
        if v[key] != allowed:
            raise UserError(f"{where} has {key} = {shown(v[key])}; titan_dp's model has only {allowed!r}")
    dk, dv = v["linear_key_head_dim"], v["linear_value_head_dim"]
    expand_v = dv / dk
    if int(dk * expand_v) != dv:  # how the model gets dv back: the quotient was rounded down
        expand_v = math.nextafter(expand_v, math.inf)
    return {
        "hidden_size": v["hidden_size"],
        "intermediate_size": v["intermediate_size"],
        "num_hidden_layers": layers,
        "num_heads": v["linear_num_value_heads"],
        "head_dim": dk,
        "expand_v": expand_v,
        "num_householder": 1,
        "use_output_gate": True,
        "use_forget_gate": v.get("use_forget_gate", True),
        "use_short_conv": v.get("use_short_conv", True),
        "conv_size": v["linear_conv_kernel_dim"],
        "allow_neg_eigval": v["linear_allow_neg_eigval"],
        "norm_eps": v["rms_norm_eps"],
        "initializer_range": v["initializer_range"],
        "tie_word_embeddings": v["tie_word_embeddings"],
        "vocab_size": v["vocab_size"],
    }


def hf_name(name: str) -> str:
    """Our tensor name in an OlmoHybrid."""
    if name in _TOP:
        return _TOP[name]
    _, layer, rest = name.split(".", 2)
    for ours, theirs in _IN_LAYER:
        rest = theirs + rest.removeprefix(ours) if rest.startswith(ours) else rest
    return f"model.layers.{layer}.{rest.replace('.forget_gate.', '.')}"


def our_names(c: config.Model, names: Iterable[str]) -> dict[str, list[str]]:
    """For each of our tensors its name in the folder; without what `exported` made."""
    back, made = {theirs: ours for ours, theirs in _TOP.items()}, made_tensors(c)
    found = {}
    for name in names:
        if name not in made:
            ours = back.get(name, name.removeprefix("model."))
            for our_part, theirs in _IN_LAYER:
                ours = re.sub(rf"^(layers\.\d+\.){re.escape(theirs)}", rf"\g<1>{our_part}", ours)
            found[re.sub(r"\.attn\.(A_log|dt_bias)$", r".attn.forget_gate.\1", ours)] = [name]
    return found


def idle_norms(c: config.Model) -> list[str]:
    """The tensors that must be 0 for the softmax layer to have no effect."""
    return [f"model.layers.{c.num_hidden_layers}.post_{part}_layernorm.weight" for part in ("attention", "feedforward")]


def made_tensors(c: config.Model) -> dict[str, Tensor]:
    """What an OlmoHybrid has and our model lacks, by its name there; expanded from single numbers where it is large."""
    import torch

    def filled(value: float, *shape: int) -> Tensor:
        return torch.tensor(value).expand(shape)

    D, I, H = c.hidden_size, c.mlp_size, c.num_heads  # noqa: E741
    made: dict[str, Tensor] = {}
    for i in range(c.num_hidden_layers):
        mixer = f"model.layers.{i}.linear_attn"
        if not c.use_forget_gate:
            made |= {f"{mixer}.a_proj.weight": filled(0.0, H, D), f"{mixer}.dt_bias": filled(0.0, H)}
            made |= {f"{mixer}.A_log": filled(_NO_DECAY, H)}
        if not c.use_short_conv:
            last = torch.tensor([0.0] * (c.conv_size - 1) + [1.0])
            for part, dim in (("q", c.head_dim), ("k", c.head_dim), ("v", c.head_v_dim)):
                made[f"{mixer}.{part}_conv1d.weight"] = last.expand(H * dim, 1, c.conv_size)
    idle = f"model.layers.{c.num_hidden_layers}"
    head = D // to_hf(c, 1)["num_attention_heads"]
    for part, shape in {"q": (D, D), "k": (head, D), "v": (head, D), "o": (D, D)}.items():
        made[f"{idle}.self_attn.{part}_proj.weight"] = filled(0.0, *shape)
    made |= {f"{idle}.self_attn.q_norm.weight": filled(1.0, D), f"{idle}.self_attn.k_norm.weight": filled(1.0, head)}
    made |= {f"{idle}.mlp.{part}_proj.weight": filled(0.0, I, D) for part in ("gate", "up")}
    made |= {f"{idle}.mlp.down_proj.weight": filled(0.0, D, I)}
    return made | {name: filled(0.0, D) for name in idle_norms(c)}


def exported(source: Source) -> Source:
    """`source` with an OlmoHybrid's tensors under its names."""
    from titan_dp.inference.sources import Source

    made = made_tensors(source.config)
    ours = {hf_name(name): name for name in source.shapes}

    class OlmoHybrid(Source):
        path, config = source.path, source.config
        shapes = {name: source.shapes[of] for name, of in ours.items()} | {name: t.shape for name, t in made.items()}
        dtypes = {name: source.dtypes[of] for name, of in ours.items()} | {name: t.dtype for name, t in made.items()}

        def read(self, names: Iterable[str]) -> dict[str, Tensor]:
            wanted = list(names)
            stored = source.read([ours[name] for name in wanted if name in ours])
            return {name: stored[ours[name]] if name in ours else made[name] for name in wanted}

    return OlmoHybrid()
