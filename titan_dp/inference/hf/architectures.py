"""Gated delta nets (n_h = 1 with an output gate) as models of transformers' own, which run there and in vLLM without our code.

What these model types share; each has a file: olmo_hybrid.py, qwen3_5.py. All want at least one softmax layer. Where a model
has none, an idle one is added behind its last layer, whose output is 0. What a type has and a model may lack is made so that
it has no effect: decays of a model without a forget gate are exp(-exp(-1000) ...) = 1, convolutions of one without them take
the last token alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from titan_dp import config
from titan_dp.errors import UserError
from titan_dp.files import shown

if TYPE_CHECKING:
    from torch import Tensor

_NO_DECAY = -1000.0
"""A_log whose exponential is 0 in every dtype. Minus infinity would do as well, but no reader takes it for a healthy weight."""
_TOP = {
    "model.embed_tokens.weight": "embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "lm_head.weight",
}
IDLE = "idle_layer"
"""Key of config.json, for `titan-dp import`: whether the last layer is the one without an effect."""


class Piece(NamedTuple):
    """A tensor of a folder, or rows of one, that one of ours is made of."""

    name: str
    first: int = 0
    rows: int | None = None
    """None: all from `first` on."""
    less_one: bool = False
    """It is stored as w - 1."""


class Architecture:
    """A model type. `c` is always the section [model] of the model."""

    target: str
    """--format of `titan-dp export`."""
    model_type: str
    name: str
    """Of the class in transformers."""
    less_one = False
    """Whether norms but the mixers' are stored as w - 1."""

    def inexpressible(self, c: config.Model) -> list[str]:
        """The settings of `c` that this type cannot have."""
        reasons = {
            f"mixer = {c.mixer!r}": c.mixer != "deltaproduct",
            f"num_householder = {c.num_householder}": c.num_householder != 1,
            "use_output_gate = false": not c.use_output_gate,
            **only_ours(c),
            **self.limits(c),
        }
        return [reason for reason, applies in reasons.items() if applies]

    def limits(self, c: config.Model) -> dict[str, bool]:
        """What only this type cannot have, and whether `c` has it."""
        raise NotImplementedError

    def to_hf(self, c: config.Model, seq_len: int) -> dict[str, Any]:
        """config.json of `c`, every key that matters, without the tokenizer's ids and the dtype."""
        idle = has_idle_layer(c)
        types = ["full_attention" if c.mixer_of(i) == "attention" else "linear_attention" for i in range(c.num_hidden_layers)]
        return {
            "model_type": self.model_type,
            "architectures": [self.name],
            "hidden_size": c.hidden_size,
            "intermediate_size": c.mlp_size,
            "num_hidden_layers": c.num_hidden_layers + idle,
            "layer_types": types + ["full_attention"] * idle,
            "linear_num_key_heads": c.key_heads,
            "linear_num_value_heads": c.num_heads,
            "linear_key_head_dim": c.head_dim,
            "linear_value_head_dim": c.head_v_dim,
            "linear_conv_kernel_dim": c.conv_size,
            IDLE: idle,  # this and the next two are for `titan-dp import`
            "use_forget_gate": c.use_forget_gate,
            "use_short_conv": c.use_short_conv,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "rms_norm_eps": c.norm_eps,
            "initializer_range": c.initializer_range,
            "tie_word_embeddings": c.tie_word_embeddings,
            "max_position_embeddings": seq_len,
            "vocab_size": c.vocab_size,
            "use_cache": True,
            **self.own_keys(c),
        }

    def own_keys(self, c: config.Model) -> dict[str, Any]:
        """What only this type's config.json has."""
        raise NotImplementedError

    def from_hf(self, v: dict[str, Any], where: str) -> dict[str, Any]:
        """Our [model] settings of a config.json. Raises UserError for what we cannot express, KeyError for a missing key."""
        layers = v["num_hidden_layers"] - bool(v.get(IDLE, False))
        kinds = v["layer_types"]
        if len(kinds) != v["num_hidden_layers"] or not set(kinds) <= {"linear_attention", "full_attention"}:
            raise UserError(
                f"{where} has layer_types = {shown(kinds)} for {v['num_hidden_layers']} layers; take the model's own"
            )
        softmax = [i for i, kind in enumerate(kinds[:layers]) if kind == "full_attention"]
        dk, dv = v["linear_key_head_dim"], v["linear_value_head_dim"]
        expand_v = dv / dk
        if int(dk * expand_v) != dv:  # how the model gets dv back: the quotient was rounded down
            expand_v = math.nextafter(expand_v, math.inf)
        groups, heads = v["linear_num_key_heads"], v["linear_num_value_heads"]
        self.check({"hidden_act": "silu"}, v, where)
        return {
            "hidden_size": v["hidden_size"],
            "intermediate_size": v["intermediate_size"],
            "num_hidden_layers": layers,
            "num_heads": heads,
            "num_key_heads": None if groups == heads else groups,
            "head_dim": dk,
            "expand_v": expand_v,
            "num_householder": 1,
            "use_output_gate": True,
            "use_forget_gate": v.get("use_forget_gate", True),
            "use_short_conv": v.get("use_short_conv", True),
            "conv_size": v["linear_conv_kernel_dim"],
            "norm_eps": v["rms_norm_eps"],
            "initializer_range": v["initializer_range"],
            "tie_word_embeddings": v["tie_word_embeddings"],
            "vocab_size": v["vocab_size"],
            **self.own_settings(v, softmax, where),
        }

    def own_settings(self, v: dict[str, Any], softmax: list[int], where: str) -> dict[str, Any]:
        """What only this type's config.json says; `softmax` are the layers of attention but the idle one."""
        raise NotImplementedError

    @staticmethod
    def check(fixed: dict[str, Any], v: dict[str, Any], where: str) -> None:
        """Raises UserError if a key of `fixed` has another value in config.json."""
        for key, allowed in fixed.items():
            if v[key] != allowed:
                raise UserError(f"{where} has {key} = {shown(v[key])}; titan_dp's model has only {allowed!r}")

    # -- tensors --

    def layer(self, c: config.Model, i: int) -> dict[str, list[str]]:
        """Layer i: what each of its tensors is made of, one below the other; names behind `model.layers.i.` and `layers.i.`."""
        raise NotImplementedError

    def rows(self, c: config.Model, ours: str) -> int:
        """Of a tensor that shares one of theirs with others."""
        keys, values = c.key_heads * c.head_dim, c.num_heads * c.head_v_dim
        return values if ours.split(".")[-2].startswith("v_") else keys

    def made(self, c: config.Model) -> dict[str, Tensor]:
        """What the type has and the model lacks, by its name there; expanded from single numbers where it is large."""
        found: dict[str, Tensor] = {}
        for i in range(c.num_hidden_layers):
            if c.mixer_of(i) != "attention":
                found |= {f"model.layers.{i}.linear_attn.{name}": tensor for name, tensor in self.lacking(c).items()}
        if has_idle_layer(c):
            last = f"model.layers.{c.num_hidden_layers}"
            D, I = c.hidden_size, c.mlp_size  # noqa: E741
            found |= {f"{last}.mlp.{part}_proj.weight": filled(0.0, I, D) for part in ("gate", "up")}
            found |= {f"{last}.mlp.down_proj.weight": filled(0.0, D, I)}
            found |= {f"{last}.{name}": tensor for name, tensor in self.idle_attention(c).items()}
        return found

    def lacking(self, c: config.Model) -> dict[str, Tensor]:
        """For a mixer without a forget gate or convolutions: tensors that do nothing."""
        raise NotImplementedError

    def idle_attention(self, c: config.Model) -> dict[str, Tensor]:
        """The idle layer's norms and attention."""
        raise NotImplementedError

    def idle_tensors(self, c: config.Model) -> list[str]:
        """Those that must be 0 for the idle layer to have no effect."""
        raise NotImplementedError

    def tensors(self, c: config.Model) -> dict[str, list[str]]:
        """For each of their tensors what it is made of; without `made`."""
        found = {theirs: [ours] for theirs, ours in _TOP.items() if not (c.tie_word_embeddings and ours == "lm_head.weight")}
        made = self.made(c)
        for i in range(c.num_hidden_layers):
            parts = self.layer(c, i) | {
                f"mlp.{part}_proj.weight": [f"mlp.{part}_proj.weight"] for part in ("gate", "up", "down")
            }
            named = {f"model.layers.{i}.{theirs}": [f"layers.{i}.{name}" for name in ours] for theirs, ours in parts.items()}
            found |= {theirs: ours for theirs, ours in named.items() if theirs not in made}
        return found

    def is_less_one(self, theirs: str) -> bool:
        return self.less_one and theirs.endswith("norm.weight") and ".linear_attn." not in theirs

    def pieces(self, c: config.Model, names: Iterable[str]) -> dict[str, list[Piece]]:
        """For each of our tensors what it is made of, given the tensors of a folder; those without a place as they are."""
        stored = list(names)
        if c.num_hidden_layers > len(stored):  # every layer has tensors, so a damaged number never counts to a million
            return {name: [Piece(name)] for name in stored}
        table, made = self.tensors(c), self.made(c)
        found: dict[str, list[Piece]] = {}
        for theirs in stored:
            ours = table.get(theirs, [] if theirs in made else [theirs])
            first = 0
            for name in ours:
                rows = self.rows(c, name) if len(ours) > 1 else None
                found[name] = [Piece(theirs, first, rows, self.is_less_one(theirs))]
                first += rows or 0
        return found


def has_idle_layer(c: config.Model) -> bool:
    return "attention" not in c.mixers()


def only_ours(c: config.Model) -> dict[str, bool]:
    """What the others' mixers cannot have, and whether `c` has it. Their output norms are of one head each, before the gate."""
    return {
        f"beta_stretch = {c.beta_stretch:g}": c.beta_stretch != 0,
        f"output_norm = {c.output_norm!r}": c.output_norm != "head",
        "gate_before_norm = true": c.use_output_gate and c.gate_before_norm,
    }


def filled(value: float, *shape: int) -> Tensor:
    import torch

    return torch.tensor(value).expand(shape)


def no_decay(c: config.Model, projection: str) -> dict[str, Tensor]:
    """The gate, whose `projection` has this name, of a mixer without one."""
    H = c.num_heads
    return {projection: filled(0.0, H, c.hidden_size), "dt_bias": filled(0.0, H), "A_log": filled(_NO_DECAY, H)}


def last_token(c: config.Model, channels: int) -> Tensor:
    """A convolution [channels, 1, taps] that takes the last token alone."""
    import torch

    return torch.tensor([0.0] * (c.conv_size - 1) + [1.0]).expand(channels, 1, c.conv_size)
