"""A Hugging Face folder as a source of weights: settings, tensor names and files, checked before a tensor is read.

Weights may be safetensors or PyTorch's older .bin files, sharded or not; .bin files are read with `weights_only`, so nothing
in a folder can run code. Every tensor of the model must be there and no other: a tensor without a place means that the
file describes something else than its config.json.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from titan_dp.data.tokenizer import ORIGIN, read_settings
from titan_dp.errors import UserError
from titan_dp.files import JsonObject, Natural, file_sha256, inside, parse_json, shorten
from titan_dp.inference.hf import layout
from titan_dp.inference.pretrained import in_the_models_order

CONFIG = "config.json"
TRAINING = "training.json"
WEIGHTS = "model.safetensors"
_SINGLE = (WEIGHTS, "pytorch_model.bin")


class FolderSource:
    """The model of a folder; see `pretrained.Source`. Raises UserError where there is none that we know, or it is damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.label = "".join(c if c.isprintable() else "_" for c in path.resolve().name) or "model"
        values = _read_json(path / CONFIG)
        self.config, self.seq_len, self.assumed = layout.from_hf(values, str(path / CONFIG))
        """`assumed`: settings that config.json is silent about."""
        self.model_type: str = values["model_type"]
        self.training = _read_training(path / TRAINING)
        self._files = _weight_files(path)
        self._where = {name: file for file in self._files for name in _tensors_of(file)}
        parts = self._parts = layout.our_names(self._where)
        if self.config.tie_word_embeddings and "lm_head.weight" in parts:  # some folders hold the tied matrix twice
            self._check_tied(parts)
            del parts["lm_head.weight"]
        found = {name: [self._look(part) for part in of] for name, of in parts.items()}
        for name, looks in found.items():
            if len({shape[1:] for shape, _ in looks}) > 1:
                raise UserError(f"{path} holds {parts[name][0]} and its kin in shapes that do not fit together; copy it again")
        shapes = {name: torch.Size([sum(s[0] for s, _ in looks), *looks[0][0][1:]]) for name, looks in found.items()}
        self.shapes = in_the_models_order(self.config, shapes, str(path))
        self.dtypes = {name: looks[0][1] for name, looks in found.items()}

    def _check_tied(self, parts: dict[str, list[str]]) -> None:
        own, tied = (self._load(parts[name][0]) for name in ("lm_head.weight", "embeddings.weight"))
        if not torch.equal(own, tied):
            raise UserError(
                f"{self.path} has tie_word_embeddings = true, but an lm_head.weight other than its embeddings; set it to false"
            )

    @cached_property
    def tokenizer(self) -> str:
        """The folder itself; raises UserError where it holds no tokenizer."""
        if not (self.path / "tokenizer.json").exists():
            raise UserError(f"{self.path} has no tokenizer.json; name a tokenizer with --tokenizer")
        return str(self.path)

    @property
    def tokenizer_origin(self) -> dict[str, str]:
        """{"name", "hash"} of the tokenizer that an exported one was converted from; empty for others."""
        return read_settings(self.path).get(ORIGIN, {})

    @cached_property
    def identity(self) -> dict[str, Any]:
        digest = hashlib.sha256("".join(file_sha256(file) for file in [self.path / CONFIG, *self._files]).encode())
        kept: dict[str, Any] = {key: self.training[key] for key in ("step", "tokens", "git_commit") if key in self.training}
        return {"path": str(self.path), "model_type": self.model_type, "weights_sha256": digest.hexdigest(), **kept}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self._join([self._load(part) for part in self._parts[name]]) for name in names}

    @staticmethod
    def _join(parts: list[Tensor]) -> Tensor:
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def problems(self) -> list[str]:
        return []  # safetensors have no checksums

    def _look(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of a tensor without reading it; a number's shape is (0,), which fits nowhere."""
        file = self._where[name]
        if file.suffix == ".bin":
            tensor = _mapped(file)[name]
            return tuple(tensor.shape) or (0,), tensor.dtype
        with safe_open(file, "pt") as opened:
            part = opened.get_slice(name)
            return tuple(part.get_shape()) or (0,), _DTYPES[part.get_dtype()]

    def _load(self, name: str) -> Tensor:
        file = self._where[name]
        if file.suffix == ".bin":
            return _mapped(file)[name].clone()
        with safe_open(file, "pt") as opened:
            return opened.get_tensor(name)


_DTYPES = {short: getattr(torch, name) for name, short in layout.SAFETENSORS_DTYPES.items()}


def _weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights, all there."""
    for single in _SINGLE:
        if (folder / single).is_file():
            return [folder / single]
        index = folder / f"{single}.index.json"
        if index.exists():
            try:
                names = sorted(set(_read_json(index)["weight_map"].values()))
                files = [inside(folder, name, index) for name in names]
            except (KeyError, AttributeError, TypeError) as error:
                raise UserError(
                    f"{index} is no index of weights ({shorten(str(error))}); take it from where the weights come from"
                ) from error
            for file in files:
                if not file.is_file():
                    raise UserError(f"{folder} lacks {file.name}, one of {len(names)} files of weights; copy the folder again")
                if file.suffix not in (".safetensors", ".bin"):
                    raise UserError(f"{index} names {file.name}, which is neither .safetensors nor .bin; take the weights' own")
            return files
    raise UserError(f"{folder} has a {CONFIG} but no weights ({' or '.join(_SINGLE)}, or an index of shards)")


def _tensors_of(file: Path) -> list[str]:
    if file.suffix == ".bin":
        return list(_mapped(file))
    try:
        with safe_open(file, "pt") as opened:
            names = list(opened.keys())
            if unknown := {opened.get_slice(name).get_dtype() for name in names} - set(_DTYPES):
                raise UserError(
                    f"{file} holds tensors of dtype {shorten(', '.join(sorted(unknown)))}; expected {', '.join(_DTYPES)}"
                )
            return names
    except SafetensorError as error:
        raise UserError(f"{file} is cut off or no safetensors file ({shorten(str(error))}); copy it again") from error


@lru_cache(maxsize=64)
def _mapped(file: Path) -> dict[str, Tensor]:
    """The tensors of a .bin file, mapped into memory where its format allows."""
    try:
        try:
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # written by a torch older than 1.6
            found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle's, zip's and torch's own
        raise UserError(f"{file} is no file of tensors alone ({shorten(str(error).partition(chr(10))[0], 120)})") from error
    tensors = found.items() if isinstance(found, dict) else [(None, None)]
    if not all(isinstance(k, str) and isinstance(t, Tensor) and _is_plain(t) for k, t in tensors):
        raise UserError(f"{file} is no file of named floating-point tensors; take the weights' own file")
    return found


def _is_plain(tensor: Tensor) -> bool:
    """Numbers of a known kind that the file really holds: a tensor of stride 0 has any size in a few bytes."""
    if tensor.dtype not in _DTYPES.values() or tensor.layout is not torch.strided or tensor.device.type != "cpu":
        return False
    return tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.itemsize


class _Training(JsonObject):
    """training.json: a checkpoint's manifest, as far as it is used."""

    step: Natural = 0
    tokens: Natural = 0
    git_commit: str = ""


def _read_training(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    training = parse_json(
        _Training, path.read_bytes(), path, "training summary", "move it out of the folder, or take it from its source"
    )
    return training.model_dump(exclude_unset=True)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} is no JSON ({shorten(str(error))}); take it from where the folder comes from") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is no JSON object; take it from where the folder comes from")
    return value
