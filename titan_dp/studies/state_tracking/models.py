"""The models a study compares, by names people use, and how they get equally many parameters.

"gated-deltaproduct_2[-1,1]": a name that a record in config/mixers.py has, n_h behind an underscore, the range of each factor's
eigenvalues in brackets ([-1,1] if it is left out). "rwkv7_2[c=2]" says how much a transition erases instead: c = 1 as in
RWKV-7, the default, or 2, which lets eigenvalues be negative (down to w - c = -1.45 for the smallest decay w). Sizes are made
equal by the width of the MLP, which is the same everywhere in what is compared, so that only the token mixers differ.
"""

from __future__ import annotations

import re

from titan_dp import config
from titan_dp.config.mixers import MIXERS, Mixer
from titan_dp.errors import UserError
from titan_dp.model.size import model_size

MODEL_KEYS = ("mixer", "num_householder", "use_forget_gate", "adaptive_householder", "allow_neg_eigval")
"""What a model's name decides."""


def _in_brackets(record: Mixer) -> dict[str, bool]:
    """What may follow a name, "[-1,1]" or "[c=2]", and the `allow_neg_eigval` it means."""
    return {f"[{text[1:-1].replace(' ', '')}]": negative for text, negative in record.ranges.items()}


def _known() -> str:
    parts = []
    for record in MIXERS.values():
        names = ", ".join(name if "num_householder" in keys else f"{name}_2" for name, keys in record.names.items())
        parts.append(names + (f" (also with {' or '.join(_in_brackets(record))} behind it)" if record.ranges else ""))
    return ", ".join(filter(None, parts))


KNOWN = _known()


def model_settings(name: str) -> dict[str, object]:
    """The keys of [model] that make the model called `name`. Raises UserError if there is no such model."""
    match = re.fullmatch(r"([a-z0-9-]+?)(?:_(\d+))?(\[.*\])?", name)
    family, n, choice = match.groups() if match else ("", None, None)
    mixer = next((mixer for mixer, record in MIXERS.items() if family in record.names), None)
    if mixer is None:
        raise UserError(f"--models: there is no model {name!r}; choose from {KNOWN}")
    keys, choices = MIXERS[mixer].names[family], _in_brackets(MIXERS[mixer])
    if n is not None and ("num_householder" in keys or not 1 <= int(n) <= 8):
        several = [each for record in MIXERS.values() for each, those in record.names.items() if "num_householder" not in those]
        raise UserError(f"--models: {name!r} asks for n_h = {n}; from 1 to 8 are possible, for {', '.join(several)}")
    if n is None and family.endswith("deltaproduct"):
        raise UserError(f"--models: {name!r} does not say how many Householder steps; write {family}_2")
    if choice is not None and choice not in choices:
        those = f"choose {' or '.join(choices)}" if choices else f"write {family}"
        raise UserError(f"--models: {name!r}: {family} has no {choice}; {those}")
    settings = {"mixer": mixer, "num_householder": int(n or 1), "use_forget_gate": False, "adaptive_householder": False, **keys}
    return settings | ({"allow_neg_eigval": choices[choice or next(iter(choices))]} if choices else {})


def label(c: config.Model) -> str:
    """'DeltaProduct_2 [-1, 1]', 'RWKV-7 (c = 1)': the family and the choice that goes with it."""
    ranges = MIXERS[c.mixer].ranges
    return " ".join([c.family, *(text for text, negative in ranges.items() if negative == c.allow_neg_eigval)])


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
