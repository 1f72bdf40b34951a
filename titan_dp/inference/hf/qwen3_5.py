"""Qwen3_5ForCausalLM (Qwen3.5's text model, dense): step sizes in (0, 1), shared keys, any epsilon.

Its norms, but the mixers', multiply by 1 + w. Where float32 would round w - 1 (below 0.5, mostly), float64 holds it, so that
a model comes back bit for bit. Its idle layer's output is 0 because the last matrices of attention and MLP are. Qwen3-Next has
the same mixer, with the rows of its projections in another order, and expresses nothing more of ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from titan_dp import config
from titan_dp.errors import UserError
from titan_dp.inference.hf.architectures import Architecture, filled, last_token, no_decay

if TYPE_CHECKING:
    from torch import Tensor

_HEADS, _HEAD = 16, 64  # of the idle layer, which has one head of keys and values; as many as ranks may share


class Qwen35(Architecture):
    target, model_type, name, less_one = "qwen3_5_text", "qwen3_5_text", "Qwen3_5ForCausalLM", True

    def limits(self, c: config.Model) -> dict[str, bool]:
        return {
            "attention_layers": "attention" in c.mixers(),
            "allow_neg_eigval = true": c.allow_neg_eigval,
        }

    def own_keys(self, c: config.Model) -> dict[str, Any]:
        return {
            "num_attention_heads": _HEADS,
            "num_key_value_heads": 1,
            "head_dim": _HEAD,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        }

    def own_settings(self, v: dict[str, Any], softmax: list[int], where: str) -> dict[str, Any]:
        if softmax:
            raise UserError(
                f"{where} has softmax layers among its layer_types; titan_dp reads a {self.model_type} model only if it has "
                f"one, the last and without effect, as `titan-dp export --format {self.target}` writes it"
            )
        return {"allow_neg_eigval": False}

    def layer(self, c: config.Model, i: int) -> dict[str, list[str]]:
        return {
            "input_layernorm.weight": ["attn_norm.weight"],
            "linear_attn.in_proj_qkv.weight": [f"attn.{part}_proj.weight" for part in "qkv"],
            "linear_attn.in_proj_z.weight": ["attn.g_proj.weight"],
            "linear_attn.in_proj_b.weight": ["attn.b_proj.weight"],
            "linear_attn.in_proj_a.weight": ["attn.a_proj.weight"],
            "linear_attn.conv1d.weight": [f"attn.{part}_conv1d.weight" for part in "qkv"],
            **{f"linear_attn.{name}": [f"attn.forget_gate.{name}"] for name in ("A_log", "dt_bias")},
            "linear_attn.norm.weight": ["attn.o_norm.weight"],
            "linear_attn.out_proj.weight": ["attn.o_proj.weight"],
            "post_attention_layernorm.weight": ["mlp_norm.weight"],
        }

    def lacking(self, c: config.Model) -> dict[str, Tensor]:
        found = {} if c.use_forget_gate else no_decay(c, "in_proj_a.weight")
        if not c.use_short_conv:
            channels = 2 * c.key_heads * c.head_dim + c.num_heads * c.head_v_dim
            found["conv1d.weight"] = last_token(c, channels)
        return found

    def idle_attention(self, c: config.Model) -> dict[str, Tensor]:
        D, both = c.hidden_size, _HEADS * _HEAD
        shapes = {"q": (2 * both, D), "k": (_HEAD, D), "v": (_HEAD, D), "o": (D, both)}  # q and its gate
        return {
            **{f"self_attn.{part}_proj.weight": filled(0.0, *shape) for part, shape in shapes.items()},
            **{f"self_attn.{part}_norm.weight": filled(0.0, _HEAD) for part in "qk"},
            **{f"{part}_layernorm.weight": filled(0.0, D) for part in ("input", "post_attention")},
        }

    def idle_tensors(self, c: config.Model) -> list[str]:
        return [f"model.layers.{c.num_hidden_layers}.{name}.weight" for name in ("self_attn.o_proj", "mlp.down_proj")]
