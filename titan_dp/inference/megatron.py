"""One mixer's weights between ours and NVIDIA's gated DeltaProduct in Megatron-LM (megatron/core/ssm/gated_delta_product.py).

Theirs are those of a `GatedDeltaProductMixer` that one tensor-parallel rank holds whole, without the mixer's prefix. Several of
our matrices stand in one of theirs, one below the other, laid out (n_h, heads, dim) as ours are, so a conversion moves rows and
changes none. The norm before the mixer, which Megatron keeps in `in_proj.layer_norm_weight`, is our block's `attn_norm`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from titan_dp import config
from titan_dp.errors import UserError
from titan_dp.model.deltaproduct import DeltaProduct

_PARTS = {
    "in_proj.weight": [f"{name}_proj.weight" for name in ("g", "v", "k", "q", "b", "a")],
    "conv1d.weight": [f"{name}_conv1d.weight" for name in ("v", "k", "q")],
    "A_log": ["forget_gate.A_log"],
    "dt_bias": ["forget_gate.dt_bias"],
    "norm.weight": ["o_norm.weight"],
    "out_proj.weight": ["o_proj.weight"],
}
"""What each of their tensors is made of, from the top down."""
_EPS = 1e-5  # of their output norm, whatever the configuration says
_THEIRS = "Megatron-LM's gated DeltaProduct mixer"


def to_megatron(c: config.Model, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors of a mixer of ours; `norm_before_gate` there is `not c.gate_before_norm`.

    Args:
        c: of the model.
        tensors: of one mixer by their names in it: what follows `layers.0.attn.`.

    Raises UserError if their mixer cannot express ours, or a tensor is missing, left over or of another shape.
    """
    shapes = _shapes(c)
    _check(tensors, shapes, "the mixer")
    return {theirs: torch.cat([tensors[name] for name in parts]) for theirs, parts in _PARTS.items()}


def from_megatron(c: config.Model, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The other way: our tensors, by their names in a mixer, of those of theirs.

    Raises UserError as `to_megatron` does, also for tensors that our mixer lacks, such as biases.
    """
    shapes = _shapes(c)
    rows = {theirs: [shapes[name][0] for name in parts] for theirs, parts in _PARTS.items()}
    theirs = {name: torch.Size([sum(rows[name]), *shapes[parts[0]][1:]]) for name, parts in _PARTS.items()}
    _check(tensors, theirs, _THEIRS)
    found: dict[str, Tensor] = {}
    for name, parts in _PARTS.items():
        split = tensors[name].split(rows[name])
        found |= {ours: part.clone() for ours, part in zip(parts, split, strict=True)}  # a view would keep all of it
    return found


def _shapes(c: config.Model) -> dict[str, torch.Size]:
    """Of our mixer's tensors. Raises UserError if theirs cannot express it."""
    reasons = {
        f"mixer = {c.mixer!r}": c.mixer != "deltaproduct",
        "adaptive_householder = true": c.adaptive_householder,
        "use_forget_gate = false": not c.use_forget_gate,
        "allow_neg_eigval = true": c.allow_neg_eigval,
        f"beta_stretch = {c.beta_stretch:g}": c.beta_stretch != 0,
        "use_output_gate = false": not c.use_output_gate,
        "use_short_conv = false": not c.use_short_conv,
        f"output_norm = {c.output_norm!r}": c.output_norm != "group",
        f"norm_eps = {c.norm_eps:g} (only {_EPS:g})": c.norm_eps != _EPS,
    }
    if found := [reason for reason, applies in reasons.items() if applies]:
        raise UserError(
            f"{_THEIRS} cannot express {' and '.join(found)}; train with the [model] section of gdp-1b.toml, or use "
            "`titan-dp export --format remote-code`"
        )
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in DeltaProduct(c).named_parameters()}


def _check(tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], whose: str) -> None:
    def named(names: Iterable[str]) -> str:
        return ", ".join(sorted(names))

    if missing := shapes.keys() - tensors.keys():
        raise UserError(f"{named(missing)} of {whose} is missing; give all of {named(shapes)}")
    if more := tensors.keys() - shapes.keys():
        raise UserError(f"{named(more)} is not among the tensors of {whose} that convert; give {named(shapes)} alone")
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise UserError(
                f"{name} of {whose} has shape {list(tensors[name].shape)} and not {list(shape)}; take the [model] section that "
                "the weights were trained with, and whole tensors if ranks shared them"
            )
