"""The models a study compares, by names people use, and how they get equally many parameters.

"gated-deltaproduct_2[-1,1]": a family, n_h behind an underscore, the range of each factor's eigenvalues in brackets ([-1,1]
if it is left out). "rwkv7_2[c=2]" says how much a transition erases instead: c = 1 as in RWKV-7, the default, or 2, which lets
eigenvalues be negative (down to w - c = -1.45 for the smallest decay w). Sizes are made equal by the width of the MLP, which
is the same everywhere in what is compared, so that only the token mixers differ.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from titan_dp import config
from titan_dp.errors import UserError
from titan_dp.model.size import model_size


class _Family(NamedTuple):
    """Keys of [model], whether n_h may be above 1, and what may stand in brackets (default first): the `allow_neg_eigval`."""

    settings: dict[str, object]
    several: bool
    choices: dict[str, bool]


_RANGE = {"-1,1": True, "0,1": False}
_FAMILIES = {
    "deltanet": _Family({"mixer": "deltaproduct"}, False, _RANGE),
    "gated-deltanet": _Family({"mixer": "deltaproduct", "use_forget_gate": True}, False, _RANGE),
    "deltaproduct": _Family({"mixer": "deltaproduct"}, True, _RANGE),
    "gated-deltaproduct": _Family({"mixer": "deltaproduct", "use_forget_gate": True}, True, _RANGE),
    "adaptive-deltaproduct": _Family({"mixer": "deltaproduct", "adaptive_householder": True}, True, _RANGE),
    "rwkv7": _Family({"mixer": "rwkv7"}, True, {"c=1": False, "c=2": True}),
    "gla": _Family({"mixer": "gla", "use_forget_gate": True}, False, {}),
    "attention": _Family({"mixer": "attention"}, False, {}),
}
MODEL_KEYS = ("mixer", "num_householder", "use_forget_gate", "adaptive_householder", "allow_neg_eigval")
"""What a model's name decides."""
KNOWN = (
    "deltanet, gated-deltanet, deltaproduct_2, gated-deltaproduct_2, adaptive-deltaproduct_2 (each also with [0,1] or [-1,1] "
    "behind it), rwkv7, rwkv7_2 (with [c=1] or [c=2]), gla, attention"
)


def model_settings(name: str) -> dict[str, object]:
    """The keys of [model] that make the model called `name`. Raises UserError if there is no such model."""
    match = re.fullmatch(r"([a-z0-9-]+?)(?:_(\d+))?(?:\[(.*)\])?", name)
    if match is None or match[1] not in _FAMILIES:
        raise UserError(f"--models: there is no model {name!r}; choose from {KNOWN}")
    family, n, choice = match.groups()
    kind = _FAMILIES[family]
    if n is not None and not (kind.several and 1 <= int(n) <= 8):
        several = ", ".join(each for each in _FAMILIES if _FAMILIES[each].several)
        raise UserError(f"--models: {name!r} asks for n_h = {n}; from 1 to 8 are possible, for {several}")
    if n is None and family.endswith("deltaproduct"):
        raise UserError(f"--models: {name!r} does not say how many Householder steps; write {family}_2")
    if choice is not None and choice not in kind.choices:
        those = f"choose {' or '.join(f'[{c}]' for c in kind.choices)}" if kind.choices else f"write {family}"
        raise UserError(f"--models: {name!r}: {family} has no [{choice}]; {those}")
    settings = {"num_householder": int(n or 1), "use_forget_gate": False, "adaptive_householder": False, **kind.settings}
    if kind.choices:
        settings["allow_neg_eigval"] = kind.choices[choice or next(iter(kind.choices))]
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


def mlp_for(c: config.Model, target: int, seq_len: int) -> int:
    """The width of the MLP that brings `c` as near to `target` parameters as it can.

    Raises UserError if even the narrowest MLP leaves it more than 1 % too large.
    """
    unit = 3 * c.hidden_size * c.num_hidden_layers  # SwiGLU has three matrices
    rest = model_size(c, seq_len).parameters - unit * c.mlp_size
    width = max(1, round((target - rest) / unit))
    if (size := rest + unit * width) > 1.01 * target:
        raise UserError(
            f"--models: {label(c)} has {size:,} parameters with the narrowest MLP, more than the {target:,} to be matched; "
            "lower model.num_heads or model.head_dim, or raise --parameters"
        )
    return width
