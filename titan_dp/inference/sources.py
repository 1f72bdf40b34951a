"""A trained model's weights on disk, before a model is built: what is there, whether it fits together, and tensors by name.

A source is a checkpoint of ours (`CheckpointSource`) or a Hugging Face folder (`hf.folder.FolderSource`), and
`pretrained.open_source` finds out which. Opening one reads settings and the shapes of tensors, no weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titan_dp import config
from titan_dp.checkpoint.folder import resolve_checkpoint
from titan_dp.checkpoint.manifest import MANIFEST, read_manifest, verify
from titan_dp.checkpoint.state import not_finite
from titan_dp.checkpoint.weights import CheckpointTensors, tensor_difference
from titan_dp.config.load import config_from_toml
from titan_dp.data.tokenizer import Tokenizer, load_tokenizer
from titan_dp.errors import UserError, say_once
from titan_dp.files import file_sha256
from titan_dp.model.transformer import build_model


class Source:
    """Weights on disk and what is known of them.

    Attributes:
        path: the checkpoint or folder.
        label: a short name for tables, plots and files: 'debug-step-00000170'.
        config: the model's settings.
        seq_len: tokens per sequence in training.
        training: the manifest of the checkpoint that the weights come from, as far as it is known. JSON.
        shapes: of every tensor, by its name in `Transformer`, in the model's order.
        dtypes: of every tensor as stored.
    """

    path: Path
    label: str
    config: config.Model
    seq_len: int
    training: dict[str, Any]
    shapes: Mapping[str, torch.Size]
    dtypes: Mapping[str, torch.dtype]

    @property
    def tokenizer(self) -> str:
        """Name for `load_tokenizer`. Raises UserError if none is known."""
        raise NotImplementedError

    @property
    def identity(self) -> dict[str, Any]:
        """What tells these weights from all others; goes into every result. JSON."""
        raise NotImplementedError

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Whole tensors on the CPU, as stored."""
        raise NotImplementedError

    def problems(self) -> list[str]:
        """A sentence per file that is not what was saved, as far as that can be told; reads everything."""
        return []

    def batches(self, names: Iterable[str], most: int) -> Iterator[dict[str, Tensor]]:
        """The tensors `names`, read a few at a time: each dictionary holds at most `most` bytes as stored, or one tensor.

        Raises UserError if a weight is not finite.
        """
        sizes = {name: self.shapes[name].numel() * self.dtypes[name].itemsize for name in names}
        for batch in within(sizes, most):
            tensors = self.read(batch)
            if wrong := not_finite(tensors):
                more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
                raise UserError(
                    f"the weights in {self.path} are not finite: {wrong[0]}{more}; take an earlier, healthy checkpoint of the "
                    "run (`titan-dp checkpoint list RUN` shows which are)"
                )
            yield tensors


class CheckpointSource(Source):
    """A committed checkpoint of ours; see `resolve_checkpoint`. Raises UserError if it is cut off or damaged."""

    def __init__(self, path: Path) -> None:
        self.path = folder = resolve_checkpoint(path)
        manifest = read_manifest(folder)
        loaded = config_from_toml(manifest["config"], f"configuration in {folder / MANIFEST}", newer=True)
        name = loaded.job.run_name.replace("/", "-") or "run"
        self.label = f"{name}-{folder.resolve().name}"
        self.config, self.seq_len = loaded.model, loaded.training.seq_len
        self.training_config = loaded
        self._tokenizer = manifest["tokenizer"]
        self._identity: dict[str, Any] = {
            "path": str(folder),
            "step": manifest["step"],
            "tokens": manifest["tokens"],
            "manifest_sha256": file_sha256(folder / MANIFEST),
            "git_commit": manifest["git_commit"],
        }
        self.training = {key: value for key, value in manifest.items() if key != "files"}
        self._tensors = CheckpointTensors(folder)
        self.shapes = in_the_models_order(self.config, self._tensors.shapes, f"checkpoint {folder}")
        self.dtypes = self._tensors.dtypes

    @property
    def tokenizer(self) -> str:
        if self.training_config.data.source == "state_tracking":
            task = self.training_config.state_tracking.task
            raise UserError(
                f"{self.path} was trained on {task}, not on text, and has no tokenizer; titan-dp state-tracking inspects it"
            )
        return self._tokenizer

    @property
    def identity(self) -> dict[str, Any]:
        return self._identity

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return self._tensors.read(names)

    def problems(self) -> list[str]:
        return verify(self.path)


def in_the_models_order(c: config.Model, shapes: Mapping[str, torch.Size], where: str) -> dict[str, torch.Size]:
    """`shapes`, which must be exactly those of a model with settings `c`, in that model's order.

    Raises UserError if a tensor is missing, has another shape or does not belong to the model.
    """
    if c.num_hidden_layers > len(shapes):  # every block has tensors, so a damaged number never builds a million blocks
        raise UserError(
            f"{where} is of another architecture: num_hidden_layers = {c.num_hidden_layers} for {len(shapes)} tensors; "
            "take the settings it was made with"
        )
    try:
        with torch.device("meta"):
            wanted = dict(build_model(c).named_parameters())
    except (RuntimeError, OverflowError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{where} describes a model that cannot be built ({reason}); take the settings it was made with"
        ) from error
    if difference := tensor_difference(shapes, wanted):
        raise UserError(
            f"{where} is of another architecture: {difference}; its settings and its weights do not belong together: copy both "
            "again"
        )
    return {name: shapes[name] for name in wanted}


def within(sizes: Mapping[str, int], most: int) -> Iterator[list[str]]:
    """The names of `sizes` in their order, in lists whose sizes add up to at most `most` (or which hold one name)."""
    batch: list[str] = []
    total = 0
    for name, size in sizes.items():
        if batch and total + size > most:
            yield batch
            batch, total = [], 0
        batch.append(name)
        total += size
    if batch:
        yield batch


def narrowed(tensor: Tensor, dtype: torch.dtype, name: str, where: Path) -> Tensor:
    """The finite `tensor`, called `name` in `where`, in `dtype`. Raises UserError if a number would become infinite."""
    converted = tensor.to(dtype)
    if not bool(converted.isfinite().all()):
        lost = tensor[~converted.isfinite()]
        kind, most = str(dtype).removeprefix("torch."), torch.finfo(dtype).max
        wider = {"float16": "bfloat16 or float32", "bfloat16": "float32"}.get(kind, "weights within its range")
        raise UserError(
            f"{name} in {where} holds {float(lost[0]):.6g}, which {kind} cannot hold (at most {most:.6g}); take {wider}"
        )
    return converted


def open_tokenizer(source: Source, named: str = "") -> Tokenizer:
    """The tokenizer that the model at `source` was trained with; or the one `named`, which is said to be another if it is.
    Whether a document begins with BOS is as it was at the training, if that is known.

    Raises UserError if it cannot be had, is not what it was at the training, or has ids that the model has no embedding for.
    """
    tokenizer = load_tokenizer(named or source.tokenizer)
    expected = source.training.get("tokenizer_hash", "")
    if source.training and not expected:
        say_once(
            f"note: {source.path} was saved without the hash of its tokenizer: whether {tokenizer.name!r} is the one it was "
            "trained with is not known"
        )
    if not tokenizer.has_hash(expected):
        differs = (
            f"{source.path} was trained with a tokenizer whose hash is {expected[:16]}..., and {tokenizer.name!r} has "
            f"{tokenizer.hash[:16]}..."
        )
        if not named:
            raise UserError(f"{differs}: it was changed since; restore it, or name a copy of what it was with --tokenizer")
        say_once(f"WARNING: {differs}; it is taken because --tokenizer names it")
    if tokenizer.vocab_size > source.config.vocab_size:
        raise UserError(
            f"tokenizer {tokenizer.name!r} has {tokenizer.vocab_size} ids, but the model in {source.path} has vocab_size = "
            f"{source.config.vocab_size}: it was trained with another; name that one with --tokenizer"
        )
    adds_bos = source.training.get("adds_bos")
    return tokenizer if adds_bos is None else replace(tokenizer, adds_bos=adds_bos)
