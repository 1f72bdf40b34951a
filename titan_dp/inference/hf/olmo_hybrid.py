"""OlmoHybridForCausalLM (Ai2's Olmo Hybrid): step sizes in (0, 2) or (0, 1), one epsilon, softmax layers in OLMo's blocks.

Its idle layer's output is 0 because its two norms, which come last, have weight 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from titan_dp import config
from titan_dp.errors import UserError
from titan_dp.files import shown
from titan_dp.inference.hf.architectures import Architecture, filled, has_idle_layer, last_token, no_decay

if TYPE_CHECKING:
    from torch import Tensor

_EPS = 1e-5  # of its output norm, whatever the configuration says


class OlmoHybrid(Architecture):
    target, model_type, name = "olmo-hybrid", "olmo_hybrid", "OlmoHybridForCausalLM"

    def limits(self, c: config.Model) -> dict[str, bool]:
        softmax = c.mixers().get("attention")
        return {
            f"attention_layers with attention_block = {c.attention_block!r}": bool(softmax) and c.attention_block != "olmo",
            f"attention_window = {c.attention_window}": bool(softmax) and c.attention_window is not None,
            f"num_key_heads = {c.key_heads}": c.key_heads != c.num_heads,
            f"norm_eps = {c.norm_eps:g} (only {_EPS:g})": c.norm_eps != _EPS,
        }

    def own_keys(self, c: config.Model) -> dict[str, Any]:
        attention: dict[str, Any] = {
            "num_attention_heads": c.hidden_size // _idle_head(c),
            "num_key_value_heads": 1,
            "rope_parameters": None,
        }
        if not has_idle_layer(c):
            attention = {
                "num_attention_heads": c.softmax_heads,
                "num_key_value_heads": c.attention_num_kv_heads or c.softmax_heads,
                "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
            }
        return {"linear_allow_neg_eigval": c.allow_neg_eigval, **attention}

    def own_settings(self, v: dict[str, Any], softmax: list[int], where: str) -> dict[str, Any]:
        self.check({"rms_norm_eps": _EPS, "linear_num_key_heads": v["linear_num_value_heads"]}, v, where)
        settings = {"allow_neg_eigval": v["linear_allow_neg_eigval"]}
        if not softmax:
            return settings
        self.check({"attention_bias": False}, v, where)
        rope = v["rope_parameters"]
        if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default" or "rope_theta" not in rope:
            raise UserError(
                f"{where} has rope_parameters = {shown(rope)}; titan_dp's softmax layers have plain rotary positions"
            )
        return {
            **settings,
            "attention_layers": softmax,
            "attention_block": "olmo",
            "attention_num_heads": v["num_attention_heads"],
            "attention_num_kv_heads": v["num_key_value_heads"],
            "rope_theta": float(rope["rope_theta"]),
        }

    def layer(self, c: config.Model, i: int) -> dict[str, list[str]]:
        if c.mixer_of(i) == "attention":
            parts = [f"{part}_proj.weight" for part in "qkvo"] + ["q_norm.weight", "k_norm.weight"]
            return {
                **{f"self_attn.{name}": [f"attn.{name}"] for name in parts},
                "post_attention_layernorm.weight": ["attn_norm.weight"],
                "post_feedforward_layernorm.weight": ["mlp_norm.weight"],
            }
        parts = [f"{part}_proj.weight" for part in "qkvabgo"] + [f"{part}_conv1d.weight" for part in "qkv"] + ["o_norm.weight"]
        return {
            "input_layernorm.weight": ["attn_norm.weight"],
            **{f"linear_attn.{name}": [f"attn.{name}"] for name in parts},
            **{f"linear_attn.{name}": [f"attn.forget_gate.{name}"] for name in ("A_log", "dt_bias")},
            "post_attention_layernorm.weight": ["mlp_norm.weight"],
        }

    def lacking(self, c: config.Model) -> dict[str, Tensor]:
        found = {} if c.use_forget_gate else no_decay(c, "a_proj.weight")
        if not c.use_short_conv:
            for part, dim in (("q", c.head_dim), ("k", c.head_dim), ("v", c.head_v_dim)):
                found[f"{part}_conv1d.weight"] = last_token(c, c.num_heads * dim)
        return found

    def idle_attention(self, c: config.Model) -> dict[str, Tensor]:
        D, head = c.hidden_size, _idle_head(c)
        shapes = {"q": (D, D), "k": (head, D), "v": (head, D), "o": (D, D)}
        return {
            **{f"self_attn.{part}_proj.weight": filled(0.0, *shape) for part, shape in shapes.items()},
            "self_attn.q_norm.weight": filled(1.0, D),
            "self_attn.k_norm.weight": filled(1.0, head),
            **{f"post_{part}_layernorm.weight": filled(0.0, D) for part in ("attention", "feedforward")},
        }

    def idle_tensors(self, c: config.Model) -> list[str]:
        return [f"model.layers.{c.num_hidden_layers}.post_{part}_layernorm.weight" for part in ("attention", "feedforward")]


def _idle_head(c: config.Model) -> int:
    return next(d for d in (128, 64, 32, 16, 8, 4, 2, 1) if c.hidden_size % d == 0)
