"""The weights of a checkpoint by themselves: read one by one, loaded into another run's model, or saved without a run."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import set_model_state_dict

from titan_dp.checkpoint.changed_settings import check_changes
from titan_dp.checkpoint.dcp_files import Reader, Writer, os_error
from titan_dp.checkpoint.folder import make_empty, resolve_checkpoint
from titan_dp.checkpoint.manifest import now, size_problems, write_manifest
from titan_dp.checkpoint.seen import manifest_of_rank_0, verify_together
from titan_dp.checkpoint.state import OPTIONS, model_tensors, refuse_not_finite, without_prefix
from titan_dp.errors import UserError
from titan_dp.faults.agreement import agree, on_main, together
from titan_dp.files import shorten


class CheckpointTensors:
    """The model's tensors of a committed checkpoint by name, read one at a time in this process, without a process group.

    Args:
        verified: its files have been compared with the manifest, which this rank may not even see yet.

    Raises UserError if the checkpoint is cut off or damaged.
    """

    def __init__(self, folder: Path, verified: bool = False) -> None:
        if not verified and (problems := size_problems(folder)):
            raise UserError(f"checkpoint {folder} is damaged: {problems[0]}; take another step of the run")
        self.reader = Reader(folder)
        entries: dict[str, Any] = self.reader.read_metadata().state_dict_metadata
        self.every_name = frozenset(entries)  # of what is not the model's as well
        entries = without_prefix({name: e for name, e in entries.items() if name.startswith("model.")}, "model.")
        self.shapes: dict[str, torch.Size] = {name: entry.size for name, entry in entries.items()}
        self.dtypes: dict[str, torch.dtype] = {name: entry.properties.dtype for name, entry in entries.items()}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Whole tensors on the CPU, as they were saved."""
        tensors = {f"model.{name}": torch.empty(self.shapes[name], dtype=self.dtypes[name]) for name in names}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # DCP's remark on no_dist
            try:
                dcp.load(tensors, storage_reader=self.reader, no_dist=True)
            except dcp.api.CheckpointException as error:
                if (cause := os_error(error)) is not None:
                    raise cause from error
                reason = str(next(iter(error.failures.values()))[0]).splitlines()[0]
                raise UserError(f"checkpoint {self.reader.path} is damaged ({reason}); take another step of the run") from error
        return without_prefix(tensors, "model.")


def load_model_weights(
    path: Path, model: nn.Module, current: dict[str, Any] | None = None, allow_changed: Iterable[str] = ()
) -> dict[str, Any]:
    """The weights of another run into a sharded model; returns that checkpoint's manifest. Every rank calls it.

    Args:
        path: a checkpoint, checkpoint folder or run folder (the newest is taken).
        model: its tensors must be the checkpoint's, none missing and none left over.
        current: this run's entries of the manifest, to compare with the saved ones what the weights compute and which
            vocabulary they are of.
        allow_changed: keys that may differ all the same.

    Raises UserError if there is no healthy checkpoint, or it is damaged, not finite, or of another architecture or
    vocabulary.
    """
    # Rank 0 says which one is the newest, for all.
    folder = path / on_main(lambda: os.path.relpath(resolve_checkpoint(path), path))
    manifest = together(lambda: manifest_of_rank_0(folder))
    agree({"the checkpoint at checkpoint.initial_load_path": [manifest["step"], manifest["files"]]})
    if problems := verify_together(folder, manifest):
        raise UserError(f"checkpoint {folder} is damaged: {problems[0]}; take another step of the run")
    tensors = model_tensors(model)
    saved = CheckpointTensors(folder, verified=True)
    difference = tensor_difference(saved.shapes, without_prefix(tensors, "model."))
    check_changes(manifest, current or manifest, list(allow_changed), difference, weights_of=f"checkpoint {folder}")
    dcp.load(tensors, storage_reader=saved.reader)
    refuse_not_finite(tensors, folder)
    set_model_state_dict(model, without_prefix(tensors, "model."), options=OPTIONS)
    return manifest


def tensor_difference(saved: Mapping[str, torch.Size], wanted: Mapping[str, Tensor]) -> str | None:
    """The first tensor of `wanted` that is not among the `saved`, or of another shape there, or that only those have."""
    for name, tensor in wanted.items():
        if (shape := saved.get(name)) != tensor.shape:
            was = "is not in it" if shape is None else f"has shape {tuple(shape)} there"
            return f"{name} of shape {tuple(tensor.shape)} {was}"
    for name, shape in saved.items():
        if name not in wanted:
            return f"{shorten(name)} of shape {tuple(shape)} is in it, and the model has no such tensor"
    return None


def save_model_weights(folder: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """A committed checkpoint of weights alone, from one process; a run starts from it by `checkpoint.initial_load_path`.

    Raises OSError if it cannot be written.
    """
    make_empty(folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is")
        writer = Writer(folder)
        try:
            dcp.save({f"model.{name}": tensor for name, tensor in tensors.items()}, storage_writer=writer, no_dist=True)
        except BaseException as error:
            if (cause := os_error(error)) is None:
                raise
            raise OSError(cause.errno, f"{folder} could not be written: {cause.strerror or cause}") from error
    write_manifest(folder, {"weights_only": True, "torch": torch.__version__, "saved": now(), **meta}, writer.entries())
