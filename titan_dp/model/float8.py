"""Linear layers that multiply in float8, through torchao: the large ones of every block, and no others.

Inputs, weights and gradients are scaled and cast to float8 for each product; weights stay what they were, parameters of the
same names in the same dtype, so FSDP2, optimizers, checkpoints and exports notice nothing. Beta, decays, gates and routers are
small and decide what a state keeps; they, the embeddings and the output matrix stay in the dtype of compute.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import nn

from titan_dp import config
from titan_dp.errors import UserError

CONVERTED = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
"""Of each block."""
_CAPABILITY = (8, 9)
"""The first with products in float8: Ada; Hopper is 9.0."""


def check_float8(quantize: config.Quantize, device: torch.device) -> None:
    """Raise UserError if torchao is not here or `device` cannot do what `quantize` asks for."""
    if quantize.linear != "float8":
        return
    if find_spec("torchao") is None:
        raise UserError("quantize.linear = 'float8' needs torchao, which is not installed; pip install 'torchao>=0.18,<0.19'")
    if quantize.emulate:
        return
    way = "set quantize.linear = 'none' (quantize.emulate = true computes the same slowly, for tests)"
    if device.type != "cuda":
        raise UserError(f"quantize.linear = 'float8' needs a GPU, and this run is on a {device.type.upper()}; {way}")
    if (found := torch.cuda.get_device_capability(device)) < _CAPABILITY:
        name, has = torch.cuda.get_device_name(device), ".".join(map(str, found))
        raise UserError(f"quantize.linear = 'float8' needs compute capability 8.9, and {name} has {has}; {way}")


def apply_float8(model: nn.Module, quantize: config.Quantize) -> None:
    """Convert the linear layers of `CONVERTED`, in place, if `quantize` asks for it."""
    if quantize.linear != "float8":
        return
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    recipe = Float8LinearConfig.from_recipe_name(quantize.recipe)
    object.__setattr__(recipe, "emulate", quantize.emulate)  # frozen; dataclasses.replace would resolve its defaults again
    convert_to_float8_training(model, module_filter_fn=lambda _, name: name.endswith(CONVERTED), config=recipe)
