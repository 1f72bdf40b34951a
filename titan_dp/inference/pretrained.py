"""A trained model on disk, whoever wrote it: a checkpoint of ours, or a Hugging Face folder in one of our formats.

`open_source` looks at a path and says what is there without reading weights; `load_pretrained` builds the model. What is
done with a trained model (generation, evaluation, export) starts here and never asks which of the two it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from titan_dp import config
from titan_dp.checkpoint.manifest import MANIFEST, read_manifest, resolve_checkpoint, verify
from titan_dp.checkpoint.saver import CheckpointTensors, not_finite, tensor_difference
from titan_dp.config.load import config_from_toml
from titan_dp.data.tokenizer import Tokenizer, load_tokenizer
from titan_dp.errors import UserError
from titan_dp.files import file_sha256
from titan_dp.model.transformer import Transformer, build_model, chosen_backend

_READ_BYTES = 2**28


class Source(Protocol):
    """Weights on disk and what is known of them."""

    @property
    def path(self) -> Path: ...

    @property
    def label(self) -> str:
        """A short name for tables, plots and files: 'debug-step-00000170'."""

    @property
    def config(self) -> config.Model: ...

    @property
    def seq_len(self) -> int:
        """Tokens a sequence the model was trained on."""

    @property
    def tokenizer(self) -> str:
        """Name for `load_tokenizer`. Raises UserError where none is known."""

    @property
    def identity(self) -> dict[str, Any]:
        """What tells these weights from all others; goes into every result. JSON."""

    @property
    def training(self) -> dict[str, Any]:
        """The manifest of the checkpoint the weights come from, as far as known. JSON."""

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """Of every tensor, by the name it has in `Transformer`, in the model's order."""

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]: ...

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Whole tensors on the CPU, as stored."""

    def problems(self) -> list[str]:
        """A sentence for each file that is not what was saved, as far as that can be told; reads everything."""


class CheckpointSource:
    """A committed checkpoint of ours; see `resolve_checkpoint`. Raises UserError where it is cut off or damaged."""

    def __init__(self, path: Path) -> None:
        self.path = folder = resolve_checkpoint(path)
        manifest = read_manifest(folder)
        try:
            loaded = config_from_toml(manifest["config"], f"configuration in {folder / MANIFEST}", newer=True)
            name = loaded.job.run_name.replace("/", "-") or "run"
            self.label = f"{name}-{folder.resolve().name}"
            self.config, self.seq_len = loaded.model, loaded.training.seq_len
            self.training_config = loaded
            self._tokenizer = str(manifest["tokenizer"])
            self.identity: dict[str, Any] = {
                "path": str(folder),
                "step": manifest["step"],
                "tokens": manifest["tokens"],
                "manifest_sha256": file_sha256(folder / MANIFEST),
                "git_commit": manifest["git_commit"],
            }
            self.training = {key: value for key, value in manifest.items() if key != "files"}
            tensors = CheckpointTensors(folder)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{folder / MANIFEST} is damaged ({error!r}); take another step of the run") from error
        self.shapes = in_the_models_order(self.config, tensors.shapes, f"checkpoint {folder}")
        self.dtypes, self.read = tensors.dtypes, tensors.read

    @property
    def tokenizer(self) -> str:
        if self.training_config.data.source == "state_tracking":
            task = self.training_config.state_tracking.task
            raise UserError(
                f"{self.path} was trained on {task}, not on text, and has no tokenizer; titan-dp state-tracking inspects it"
            )
        return self._tokenizer

    def problems(self) -> list[str]:
        return verify(self.path)


def in_the_models_order(c: config.Model, shapes: Mapping[str, torch.Size], where: str) -> dict[str, torch.Size]:
    """The `shapes` of a model of settings `c`, all there; raises UserError where one is missing, another or left over."""
    if c.num_hidden_layers > len(shapes):  # every block has tensors: none is built for a number out of a damaged file
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


def open_source(path: Path) -> Source:
    """What is at `path`: a Hugging Face folder, a checkpoint, or the newest healthy one of a run or checkpoint folder.

    Raises UserError where it is none of these, or damaged.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; give a run folder, a checkpoint, or a folder written by `titan-dp export`")
    if (path / "config.json").exists():
        from titan_dp.inference.hf.folder import FolderSource

        return FolderSource(path)
    return CheckpointSource(path)


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

    Raises UserError where there is none, the tokenizer cannot be had or has more ids than the model, or the backend cannot run.
    """
    source = open_source(path)
    loaded_tokenizer = load_tokenizer(tokenizer or source.tokenizer)
    check_vocabulary(loaded_tokenizer, source)
    return Pretrained(load_model(source, device, dtype=dtype, backend=backend), loaded_tokenizer, source)


def load_model(
    source: Source, device: torch.device, *, dtype: torch.dtype = torch.float32, backend: str = "auto"
) -> Transformer:
    """The model of `source` in evaluation mode, without gradients.

    Raises UserError where a weight is not finite or more than `dtype` can hold, or the backend cannot run.
    """
    c = source.config.model_copy(update={"backend": backend})
    chosen_backend(c, device)
    with torch.device("meta"):
        model = build_model(c)
    islands = {id(p) for module in model.fp32_modules() for p in module.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in islands:
            parameter.data = parameter.data.to(dtype)
    model.to_empty(device=device)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for names in batches(source, parameters, _READ_BYTES):
            tensors = source.read(names)
            check_weights(tensors, source.path)
            for name, tensor in tensors.items():
                parameters[name].copy_(narrowed(tensor, parameters[name].dtype, name, source.path))
    return model.eval().requires_grad_(False)


def check_weights(tensors: Mapping[str, Tensor], where: Path) -> None:
    """Raises UserError where one of `tensors`, read from `where`, holds a NaN or an infinity."""
    if wrong := not_finite(tensors):
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise UserError(
            f"the weights in {where} are not finite: {wrong[0]}{more}; take an earlier, healthy checkpoint of the run "
            "(`titan-dp checkpoint list RUN` shows which are)"
        )


def narrowed(tensor: Tensor, dtype: torch.dtype, name: str, where: Path) -> Tensor:
    """`tensor`, finite and `name` in `where`, in `dtype`. Raises UserError where a number would become infinite."""
    converted = tensor.to(dtype)
    if not bool(converted.isfinite().all()):
        lost = tensor[~converted.isfinite()]
        kind, most = str(dtype).removeprefix("torch."), torch.finfo(dtype).max
        wider = {"float16": "bfloat16 or float32", "bfloat16": "float32"}.get(kind, "weights within its range")
        raise UserError(
            f"{name} in {where} holds {float(lost[0]):.6g}, which {kind} cannot hold (at most {most:.6g}); take {wider}"
        )
    return converted


def check_vocabulary(tokenizer: Tokenizer, source: Source) -> None:
    """Raises UserError where `tokenizer` has ids that the model at `source` has no embedding for."""
    if tokenizer.vocab_size > source.config.vocab_size:
        raise UserError(
            f"tokenizer {tokenizer.name!r} has {tokenizer.vocab_size} ids, but the model in {source.path} has vocab_size = "
            f"{source.config.vocab_size}: it was trained with another; name that one with --tokenizer"
        )


def batches(source: Source, names: Iterable[str], most: int) -> Iterator[list[str]]:
    """`names` in their order, in lists whose tensors as stored take at most `most` bytes together (or are one)."""
    batch: list[str] = []
    size = 0
    for name in names:
        each = source.shapes[name].numel() * source.dtypes[name].itemsize
        if batch and size + each > most:
            yield batch
            batch, size = [], 0
        batch.append(name)
        size += each
    if batch:
        yield batch
