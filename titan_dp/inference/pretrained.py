"""A trained model, ready to be used, whoever wrote it: a checkpoint of ours, or a Hugging Face folder in one of our formats.

Whatever is done with a trained model (generation, evaluation, export) starts here and never asks which of the two it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from titan_dp.data.tokenizer import Tokenizer
from titan_dp.errors import UserError
from titan_dp.inference.hf.folder import FolderSource
from titan_dp.inference.sources import CheckpointSource, Source, narrowed, open_tokenizer
from titan_dp.model.cpu import use_threads
from titan_dp.model.transformer import Transformer, build_model, chosen_backend

_READ_BYTES = 2**28  # 256 MB: a few large tensors at a time beside the model itself


def open_source(path: Path) -> Source:
    """What is at `path`: a Hugging Face folder, a checkpoint, or the newest healthy one of a run or checkpoint folder.

    Raises UserError if it is none of these, or damaged.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; give a run folder, a checkpoint, or a folder written by `titan-dp export`")
    return FolderSource(path) if (path / "config.json").exists() else CheckpointSource(path)


@dataclass(frozen=True)
class Pretrained:
    """A model ready to be used, with what it came with."""

    model: Transformer
    """In evaluation mode; matrices in the dtype asked for, norms, A_log and dt_bias in float32."""
    tokenizer: Tokenizer
    source: Source


def load_pretrained(
    path: Path, device: torch.device, *, dtype: torch.dtype = torch.float32, tokenizer: str = "", backend: str = "auto"
) -> Pretrained:
    """The model at `path` (see `open_source`) and its tokenizer, or the one named.

    Raises UserError if there is no model, its tokenizer cannot be had, was changed since the training or has more ids than the
    model, or the backend cannot run.
    """
    source = open_source(path)
    opened = open_tokenizer(source, tokenizer)
    return Pretrained(load_model(source, device, dtype=dtype, backend=backend), opened, source)


def load_model(
    source: Source, device: torch.device, *, dtype: torch.dtype = torch.float32, backend: str = "auto"
) -> Transformer:
    """The model of `source` in evaluation mode, without gradients.

    Raises UserError if a weight is not finite or more than `dtype` can hold, or the backend cannot run.
    """
    c = source.config.model_copy(update={"backend": backend})
    chosen_backend(c, device)
    use_threads(c.hidden_size)
    with torch.device("meta"):
        model = build_model(c)
    stays_float32 = {id(p) for module in model.fp32_modules() for p in module.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in stays_float32:
            parameter.data = parameter.data.to(dtype)
    model.to_empty(device=device)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for tensors in source.batches(parameters, _READ_BYTES):
            for name, tensor in tensors.items():
                parameters[name].copy_(narrowed(tensor, parameters[name].dtype, name, source.path))
    return model.eval().requires_grad_(False)
