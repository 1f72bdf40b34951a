"""The models a study compares, by names people use, and how they get equally many parameters.

"gated-deltaproduct_2[-1,1]": a family, n_h behind an underscore, the range of each factor's eigenvalues in brackets ([-1,1]
where it is left out). "rwkv7_2[c=2]" says how much a transition erases instead: RWKV-7's own c = 1, if left out, or 2, which
lets eigenvalues be negative, and with a decay w of its own as low as -1.45 (w - c). Sizes are made equal by the width of the
MLP, which is the same everywhere in what is compared, so nothing but the token mixer differs.
"""

from __future__ import annotations

import re

from titan_dp import config
from titan_dp.errors import UserError
from titan_dp.model.size import model_size

_FAMILIES: dict[str, dict[str, object]] = {
    "deltanet": {"mixer": "deltaproduct"},
    "gated-deltanet": {"mixer": "deltaproduct", "use_forget_gate": True},
    "deltaproduct": {"mixer": "deltaproduct"},
    "gated-deltaproduct": {"mixer": "deltaproduct", "use_forget_gate": True},
    "adaptive-deltaproduct": {"mixer": "deltaproduct", "adaptive_householder": True},
    "rwkv7": {"mixer": "rwkv7"},
    "gla": {"mixer": "gla", "use_forget_gate": True},
    "attention": {"mixer": "attention"},
}
_SEVERAL = ("deltaproduct", "gated-deltaproduct", "adaptive-deltaproduct", "rwkv7")  # that take n_h
_ALL_OFF = {"num_householder": 1, "use_forget_gate": False, "adaptive_householder": False}
MODEL_KEYS = [f"model.{key}" for key in ("mixer", *_ALL_OFF, "allow_neg_eigval")]
"""What a model's name decides."""
KNOWN = (
    "deltanet, gated-deltanet, deltaproduct_2, gated-deltaproduct_2, adaptive-deltaproduct_2 (each also with [0,1] or [-1,1] "
    "behind it), rwkv7, rwkv7_2 (with [c=1] or [c=2]), gla, attention"
)


def model_settings(name: str) -> dict[str, object]:
    """The keys of [model] that make the model called `name`. Raises UserError where there is no such model."""
    match = re.fullmatch(r"([a-z0-9-]+?)(?:_(\d+))?(?:\[(0,1|-1,1|c=1|c=2)\])?", name)
    family = match[1] if match else ""
    if match is None or family not in _FAMILIES:
        raise UserError(f"--models: there is no model {name!r}; choose from {KNOWN}")
    n, choice = match[2], match[3]
    if n is not None and (family not in _SEVERAL or not 1 <= int(n) <= 8):
        raise UserError(f"--models: {name!r} asks for n_h = {n}; from 1 to 8 are possible, for {', '.join(_SEVERAL)}")
    if n is None and family.endswith("deltaproduct"):
        raise UserError(f"--models: {name!r} does not say how many Householder steps; write {family}_2")
    choices = {"rwkv7": ("c=1", "c=2"), "gla": (), "attention": ()}.get(family, ("0,1", "-1,1"))
    if choice is not None and choice not in choices:
        those = f"choose {' or '.join(f'[{c}]' for c in choices)}" if choices else f"write {family}"
        raise UserError(f"--models: {name!r}: {family} has no [{choice}]; {those}")
    settings = {**_ALL_OFF, **_FAMILIES[family], "num_householder": int(n or 1)}
    if choices:
        settings["allow_neg_eigval"] = (choice or ("c=1" if family == "rwkv7" else "-1,1")) in ("-1,1", "c=2")
    return settings


def label(c: config.Model) -> str:
    """'DeltaProduct_2 [-1, 1]', 'RWKV-7 (c = 1)': the family and the choice that goes with it."""
    if c.mixer in ("gla", "attention"):
        return c.family
    if c.mixer == "rwkv7":
        return f"{c.family} (c = {2 if c.allow_neg_eigval else 1})"
    return f"{c.family} [{-1 if c.allow_neg_eigval else 0}, 1]"


def folder_name(c: config.Model) -> str:
    """`label` as part of a file name: 'deltaproduct_2_-1_1'."""
    return re.sub(r"[^a-z0-9_-]+", "_", label(c).lower()).strip("_")


def with_parameters(c: config.Model, target: int, seq_len: int) -> config.Model:
    """`c` with the width of its MLP chosen so that it comes as near to `target` parameters as that allows.

    Raises UserError where even the narrowest MLP leaves it more than 1 % too large.
    """
    unit = 3 * c.hidden_size * c.num_hidden_layers  # SwiGLU has three matrices
    rest = model_size(c, seq_len).parameters - unit * c.mlp_size
    width = max(1, round((target - rest) / unit))
    matched = c.model_copy(update={"intermediate_size": width})
    if (size := rest + unit * width) > 1.01 * target:
        raise UserError(
            f"--models: {label(c)} has {size:,} parameters with the narrowest MLP, more than the {target:,} to be matched; "
            "lower model.num_heads or model.head_dim, or raise --parameters"
        )
    return matched
