"""Translates between our [model] keys and tensor names and those of a Hugging Face folder. No files, no torch.

Six model types are spoken: flash-linear-attention's gated_deltaproduct, gated_deltanet and delta_net, transformers' own
olmo_hybrid and qwen3_5_text (architectures.py), and our titan_dp (modeling_titan_dp.py), which has gated_deltaproduct's keys
and `mixer`. `to_hf` refuses what a type cannot express and `from_hf` what we cannot; neither guesses. In fla's types and ours
tensors keep their shapes and layouts, so a conversion is a rename; only the layout that flash-linear-attention had before June
2025 (one matrix for each Householder step) is concatenated.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from titan_dp import config
from titan_dp.config.mixers import MIXERS
from titan_dp.errors import UserError
from titan_dp.files import first_mistake, shorten, shown
from titan_dp.inference.hf.architectures import Architecture, only_ours
from titan_dp.inference.hf.olmo_hybrid import OlmoHybrid
from titan_dp.inference.hf.qwen3_5 import Qwen35

REMOTE_CODE = "titan_dp"
FLA_TYPES = {
    "gated_deltaproduct": "GatedDeltaProductForCausalLM",
    "gated_deltanet": "GatedDeltaNetForCausalLM",
    "delta_net": "DeltaNetForCausalLM",
}
ARCHITECTURES: dict[str, Architecture] = {each.model_type: each for each in (OlmoHybrid(), Qwen35())}
"""Transformers' own, by model type."""
MODEL_TYPES = [*FLA_TYPES, *ARCHITECTURES, REMOTE_CODE]
# Some configurations that the paper's authors published use this name, which no library knows.
_OTHER_NAMES = {"gated_delta_product": "gated_deltaproduct"}
_MODELING_FILE = "modeling_titan_dp"

# Keys that flash-linear-attention wants and that do not change what the model computes.
_FLA_RUNTIME = {
    "attn_mode": "chunk",
    "attnres_block_size": None,
    "fuse_cross_entropy": True,
    "fuse_linear_cross_entropy": False,
    "fuse_norm": True,
    "fuse_swiglu": True,
    "use_l2warp": False,
}
# The values of a key that describe our model; the first is what we write, any other value is refused.
_FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    "": {"hidden_act": ("swish", "silu"), "attnres_block_size": (None,)},
    "gated_deltanet": {"output_gate_activation": ("swish", "silu")},
    "delta_net": {"qk_activation": ("silu",), "qk_norm": ("l2",), "use_beta": (True,), "use_output_norm": (True,)},
}
# What flash-linear-attention 0.6 takes for a key that config.json lacks, as files of older versions do.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "": {
        "allow_neg_eigval": False,
        "attn": None,
        "conv_size": 4,
        "hidden_ratio": 4,
        "initializer_range": 0.02,
        "intermediate_size": None,
        "norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "use_short_conv": True,
        "max_position_embeddings": 2048,
    },
    "gated_deltaproduct": {
        "expand_v": 2.0,
        "head_dim": 256,
        "num_heads": 6,
        "num_householder": 1,
        "use_forget_gate": False,
        "use_output_gate": True,
    },
    "gated_deltanet": {"expand_v": 2.0, "head_dim": 256, "num_heads": 6, "use_gate": True},
    "delta_net": {"expand_k": 1.0, "expand_v": 1.0, "num_heads": 16, "use_gate": False},
}
_NEEDED = ("hidden_size", "num_hidden_layers", "vocab_size")
# Keys with the same name and meaning in every type and in ours.
_SAME = [*_NEEDED, "num_heads", "tie_word_embeddings", "norm_eps", "initializer_range", "allow_neg_eigval"]
_SAME += ["use_short_conv", "conv_size"]
_PRODUCT = ("num_householder", "use_forget_gate", "use_output_gate")
# What only our own type has.
_OURS = ("mixer", "num_key_heads", "beta_stretch", "output_norm", "gate_before_norm", "attention_block")


# -- settings -----------------------------------------------------------------------------------------------------------


def to_hf(c: config.Model, model_type: str, seq_len: int) -> dict[str, Any]:
    """config.json of `c` as `model_type`, without the tokenizer's ids and the dtype.

    Raises UserError if that type cannot express the model; it names the format that can.
    """
    if ours := MIXERS[c.mixer].not_exported(c):
        raise UserError(f"{ours} cannot be exported: no Hugging Face format has it; use the checkpoint itself")
    if reasons := _inexpressible(c, model_type):
        others = [name for name in MODEL_TYPES if not _inexpressible(c, name)]
        fla = "--format fla " if model_type in ARCHITECTURES else ""
        ways = [f"{fla}--model-type {name}" for name in others if name in FLA_TYPES]
        ways += [f"--format {ARCHITECTURES[name].target}" for name in others if name in ARCHITECTURES]
        ways += ["--format remote-code"]
        raise UserError(f"{model_type} cannot express {' and '.join(reasons)}; use {' or '.join(ways)}")
    if model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type].to_hf(c, seq_len)
    common = {
        "model_type": model_type,
        "architectures": [FLA_TYPES.get(model_type, "TitanDPForCausalLM")],
        **{key: getattr(c, key) for key in _SAME},
        "intermediate_size": c.mlp_size,
        "max_position_embeddings": seq_len,
        "use_cache": True,
        "attn": _softmax_layers(c),
    }
    product = {key: getattr(c, key) for key in ("head_dim", "expand_v", *_PRODUCT)}
    if model_type == REMOTE_CODE:
        auto = {"AutoConfig": "TitanDPConfig", "AutoModel": "TitanDPModel", "AutoModelForCausalLM": "TitanDPForCausalLM"}
        auto_map = {name: f"{_MODELING_FILE}.{target}" for name, target in auto.items()}
        own = {key: getattr(c, key) for key in _OURS}
        return {**common, **product, **own, "auto_map": auto_map}
    fixed = {key: values[0] for key, values in {**_FIXED[""], **_FIXED.get(model_type, {})}.items()}
    common |= {**_FLA_RUNTIME, **fixed, "hidden_ratio": 4}
    expand_v = c.head_v_dim / c.head_dim  # fla computes the value dimension as int(head_dim * expand_v)
    if model_type == "gated_deltaproduct":
        return {**common, **product, "expand_v": expand_v}
    if model_type == "gated_deltanet":
        heads = {"num_heads": c.key_heads, "num_v_heads": None if c.key_heads == c.num_heads else c.num_heads}
        return {**common, **heads, "head_dim": c.head_dim, "expand_v": expand_v, "use_gate": c.use_output_gate}
    keys, values = c.num_heads * c.head_dim, c.num_heads * c.head_v_dim
    return {**common, "expand_k": keys / c.hidden_size, "expand_v": values / c.hidden_size, "use_gate": c.use_output_gate}


def _inexpressible(c: config.Model, model_type: str) -> list[str]:
    """The settings of `c` that the type cannot have."""
    if model_type == REMOTE_CODE:
        return []
    if model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type].inexpressible(c)
    dv = int(c.head_dim * (c.head_v_dim / c.head_dim))  # as fla computes it
    reasons = {
        f"mixer = {c.mixer!r}": not MIXERS[c.mixer].in_fla,
        f"a value dimension of {c.head_v_dim} at head_dim = {c.head_dim}": dv != c.head_v_dim,
        f"num_householder = {c.num_householder}": model_type != "gated_deltaproduct" and c.num_householder != 1,
        "use_forget_gate = false": model_type == "gated_deltanet" and not c.use_forget_gate,
        "use_forget_gate = true": model_type == "delta_net" and c.use_forget_gate,
        f"num_key_heads = {c.key_heads}": model_type != "gated_deltanet" and c.key_heads != c.num_heads,
        f"attention_block = {c.attention_block!r}": "attention" in c.mixers() and c.attention_block != "llama",
        **only_ours(c),
    }
    return [reason for reason, applies in reasons.items() if applies]


def _softmax_layers(c: config.Model) -> dict[str, Any] | None:
    layers = [i for i in range(c.num_hidden_layers) if c.mixer_of(i) == "attention"]
    if not layers:
        return None
    return {
        "layers": layers,
        "num_heads": c.softmax_heads,
        "num_kv_heads": c.attention_num_kv_heads or c.softmax_heads,
        "qkv_bias": False,
        "window_size": c.attention_window,
        "rope_theta": c.rope_theta,
    }


def from_hf(values: dict[str, Any], where: str) -> tuple[config.Model, int, list[str]]:
    """Of a config.json: our settings, the sequence length, and "key = default" for each key it lacks and the model depends on.

    Raises UserError for another type of model, a missing key that has no default, or what our model cannot express.
    """
    model_type = values.get("model_type")
    if isinstance(model_type, str):
        model_type = _OTHER_NAMES.get(model_type, model_type)
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
        raise UserError(f"{where} is of a model of type {shown(model_type)}; expected one of {', '.join(MODEL_TYPES)}")
    if missing := [key for key in _NEEDED if key not in values]:
        raise UserError(f"{where} lacks {', '.join(missing)}; take the file that belongs to the weights")
    architecture = ARCHITECTURES.get(model_type)
    kind = "gated_deltaproduct" if model_type == REMOTE_CODE or architecture else model_type
    old_name = {"use_output_gate": values["use_gate"]} if kind == "gated_deltaproduct" and "use_gate" in values else {}
    defaults = {**_DEFAULTS[""], **_DEFAULTS[kind]}
    v = {**defaults, **old_name, **values}
    absent = sorted(
        set(defaults) - set(old_name) - set(values) - {"hidden_ratio", "max_position_embeddings", "initializer_range"}
    )
    for key, allowed in {**_FIXED[""], **_FIXED.get(kind, {})}.items():
        if v.get(key, allowed[0]) not in allowed:
            raise UserError(f"{where} has {key} = {shown(v[key])}; titan_dp's model has only {allowed[0]!r}")
    try:
        if architecture:
            absent, settings = [], architecture.from_hf(values, where)
        else:
            settings = {**_shared_keys(v), **_mixer_keys(v, kind), **_attention_keys(v, where)}
        seq_len = v["max_position_embeddings"]
        if type(seq_len) is not int or seq_len < 1:
            raise ValueError(f"max_position_embeddings = {shown(seq_len)} is no positive integer")
        return config.Model(**settings), seq_len, [f"{key} = {defaults[key]!r}" for key in absent]
    except UserError:  # a ValueError, too
        raise
    except ValidationError as error:
        raise UserError(f"{where} describes a model that titan_dp cannot build: {first_mistake(error)}") from error
    except (TypeError, ValueError, ArithmeticError, AttributeError, KeyError) as error:
        message = repr(error) if isinstance(error, KeyError | AttributeError) else str(error)
        raise UserError(f"{where} describes a model that titan_dp cannot build: {shorten(message)}") from error


def _shared_keys(v: dict[str, Any]) -> dict[str, Any]:
    width = v["intermediate_size"]
    if width is None:
        width = 256 * -(-int(v["hidden_size"] * (v["hidden_ratio"] or 4) * 2 / 3) // 256)
    return {**{key: v[key] for key in _SAME}, "intermediate_size": width}


def _mixer_keys(v: dict[str, Any], kind: str) -> dict[str, Any]:
    if kind == "delta_net":
        keys, values = round(v["hidden_size"] * v["expand_k"]), round(v["hidden_size"] * v["expand_v"])
        head_dim = keys // v["num_heads"]
        expand_v = values // v["num_heads"] / head_dim
        return {"head_dim": head_dim, "expand_v": expand_v, "num_householder": 1, "use_output_gate": v["use_gate"]}
    common = {"head_dim": v["head_dim"], "expand_v": float(v["expand_v"])}
    if kind == "gated_deltanet":
        values = v.get("num_v_heads")
        heads = {"num_heads": values or v["num_heads"], "num_key_heads": values and v["num_heads"]}
        return {**common, **heads, "num_householder": 1, "use_forget_gate": True, "use_output_gate": v["use_gate"]}
    return {**common, **{key: v[key] for key in (*_PRODUCT, *_OURS) if key in v}}


def _attention_keys(v: dict[str, Any], where: str) -> dict[str, Any]:
    groups = [v["attn"]] if isinstance(v["attn"], dict) else v["attn"] or []
    if not groups:
        return {}
    kinds = {tuple((key, value) for key, value in sorted(group.items()) if key != "layers") for group in groups}
    if len(kinds) > 1:
        raise UserError(f"{where} has softmax layers of {len(kinds)} kinds in attn; titan_dp's hybrids have one")
    group = groups[0]
    if group.get("qkv_bias"):
        raise UserError(f"{where} has qkv_bias = true in attn; titan_dp's softmax layers have no biases")
    layers = sorted(layer for group in groups for layer in group["layers"])
    every = len(layers) == v["num_hidden_layers"] and layers == list(range(len(layers)))
    pure = {"mixer": "attention"} if every else {"attention_layers": layers}
    return {
        **pure,
        "attention_num_heads": group["num_heads"],
        "attention_num_kv_heads": group.get("num_kv_heads"),
        "attention_window": group.get("window_size"),
        "rope_theta": float(group.get("rope_theta", 10000.0)),
    }


# -- tensors ------------------------------------------------------------------------------------------------------------


def hf_name(name: str) -> str:
    """Our tensor name in a Hugging Face folder."""
    return name if name.startswith("lm_head.") else "model." + name.replace(".forget_gate.", ".")


def our_names(names: Iterable[str]) -> dict[str, list[str]]:
    """For each of our tensors the names in the folder that it is made of, to be concatenated along dimension 0."""
    found: dict[str, list[str]] = {}
    for name in names:
        base, index = _without_step(name)
        if index and base.endswith(".q_conv1d.weight"):
            continue  # the old layout had a query convolution for each step and used the first
        ours = re.sub(r"\.attn\.(A_log|dt_bias)$", r".attn.forget_gate.\1", base.removeprefix("model."))
        found.setdefault(ours, []).append(name)
    return {ours: sorted(parts, key=lambda name: _without_step(name)[1]) for ours, parts in found.items()}


def _without_step(name: str) -> tuple[str, int]:
    """'...attn.k_projs.1.weight' -> ('...attn.k_proj.weight', 1); others as they are, 0."""
    match = re.fullmatch(r"(.*\.attn\.)([kvb]_proj|[qkv]_conv1d)s\.(\d+)\.weight", name)
    return (f"{match[1]}{match[2]}.weight", int(match[3])) if match else (name, 0)


def stays_float32(name: str) -> bool:
    """Whether the tensor is float32 whatever dtype the matrices have: norms, A_log and dt_bias, as in training."""
    return name.endswith(("norm.weight", "A_log", "dt_bias"))
