"""The weights of a Hugging Face folder: read as a `Source`, checked before a tensor is read, and written.

Weights may be safetensors or PyTorch's older .bin files, sharded or not; .bin files are read with `weights_only`, so nothing
in a folder can run code. Every tensor of the model must be there and no other: a tensor without a place means that the
file describes something else than its config.json.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from titan_dp.data.tokenizer import ORIGIN, read_settings
from titan_dp.errors import UserError
from titan_dp.files import JsonObject, Natural, file_sha256, inside, parse_json, shorten, to_json, write_json
from titan_dp.inference.hf import layout
from titan_dp.inference.hf.architectures import IDLE, Architecture, Piece
from titan_dp.inference.sources import Source, in_the_models_order, narrowed, within

CONFIG = "config.json"
TRAINING = "training.json"
_WEIGHTS = "model.safetensors"
_SINGLE = (_WEIGHTS, "pytorch_model.bin")
_READ_BYTES = 2**26  # 64 MB: many small tensors per read of the checkpoint, and still far less than one large matrix
_CONVERTED_AT_ONCE = 2**22  # numbers of a tensor: a converted copy of all of it would double the peak
_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}  # in safetensors
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


class Stored(NamedTuple):
    """Where a tensor lies, and what it is."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


class FolderSource(Source):
    """The model of a folder. Raises UserError if it holds none that we know, or is damaged.

    Attributes:
        assumed: settings that config.json does not name, with the defaults taken.
    """

    def __init__(self, path: Path) -> None:
        if not (path / CONFIG).exists():
            raise UserError(f"{path} is no Hugging Face folder: it has no {CONFIG}")
        self.path = path
        self.label = "".join(c if c.isprintable() else "_" for c in path.resolve().name) or "model"
        values = _read_json(path / CONFIG)
        self.config, self.seq_len, self.assumed = layout.from_hf(values, str(path / CONFIG))
        self.model_type: str = values["model_type"]
        self.training = _read_training(path / TRAINING)
        self._files = _weight_files(path)
        self._stored = {name: stored for file in self._files for name, stored in _tensors_of(file).items()}
        if architecture := layout.ARCHITECTURES.get(self.model_type):
            if values.get(IDLE):
                self._check_idle_layer(architecture)
            parts = architecture.pieces(self.config, self._stored)
        else:
            parts = {ours: [Piece(name) for name in of] for ours, of in layout.our_names(self._stored).items()}
        self._parts = parts
        if self.config.tie_word_embeddings and "lm_head.weight" in parts:  # some folders hold the tied matrix twice
            own, tied = (self._load(parts[name][0]) for name in ("lm_head.weight", "embeddings.weight"))
            if not torch.equal(own, tied):
                raise UserError(
                    f"{path} has tie_word_embeddings = true, but an lm_head.weight other than its embeddings; set it to false"
                )
            del parts["lm_head.weight"]
        shapes: dict[str, torch.Size] = {}
        for name, of in parts.items():
            first, *others = [self._shape(piece) for piece in of]
            if any(other[1:] != first[1:] for other in others):
                raise UserError(f"{path} holds {of[0].name} and its kin in shapes that do not fit together; copy it again")
            shapes[name] = torch.Size([first[0] + sum(other[0] for other in others), *first[1:]])
        self.shapes = in_the_models_order(self.config, shapes, str(path))
        self.dtypes = {name: torch.float32 if of[0].less_one else self._stored[of[0].name].dtype for name, of in parts.items()}

    def _check_idle_layer(self, architecture: Architecture) -> None:
        for name in architecture.idle_tensors(self.config):
            if name not in self._stored or bool(self._load(Piece(name)).any()):
                raise UserError(
                    f"{self.path} has a last softmax layer with an effect ({name} is not 0), which titan_dp's model does not "
                    f"have; import what `titan-dp export --format {architecture.target}` wrote"
                )

    def _shape(self, piece: Piece) -> tuple[int, ...]:
        """Of what `_load` gives; rows that the file does not have are not counted."""
        rows, *others = self._stored[piece.name].shape
        left = max(0, rows - piece.first)
        return left if piece.rows is None else min(left, piece.rows), *others

    @property
    def tokenizer(self) -> str:
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
        parts = {name: [self._load(part) for part in self._parts[name]] for name in names}
        return {name: of[0] if len(of) == 1 else torch.cat(of) for name, of in parts.items()}

    def _load(self, piece: Piece) -> Tensor:
        file = self._stored[piece.name].file
        rows = slice(piece.first, None if piece.rows is None else piece.first + piece.rows)
        if file.suffix == ".bin":
            tensor = _mapped(file)[piece.name][rows].clone()
        else:
            with safe_open(file, "pt") as opened:
                tensor = opened.get_slice(piece.name)[rows]
        return (tensor.double() + 1).float() if piece.less_one else tensor


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


def _tensors_of(file: Path) -> dict[str, Stored]:
    """The tensors of a file, of which none is read. A single number gets shape (0,), which fits nowhere in a model."""
    if file.suffix == ".bin":
        return {name: Stored(file, tuple(tensor.shape) or (0,), tensor.dtype) for name, tensor in _mapped(file).items()}
    try:
        with safe_open(file, "pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  # it is no dictionary
            if unknown := {part.get_dtype() for part in slices.values()} - set(_DTYPES):
                raise UserError(
                    f"{file} holds tensors of dtype {shorten(', '.join(sorted(unknown)))}; expected {', '.join(_DTYPES)}"
                )
            found = {name: (tuple(part.get_shape()) or (0,), _DTYPES[part.get_dtype()]) for name, part in slices.items()}
    except SafetensorError as error:
        raise UserError(f"{file} is cut off or no safetensors file ({shorten(str(error))}); copy it again") from error
    return {name: Stored(file, *what) for name, what in found.items()}


@lru_cache(maxsize=64)
def _mapped(file: Path) -> dict[str, Tensor]:
    """The tensors of a .bin file, mapped into memory if its format allows: what torch older than 1.6 wrote is no zip file."""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
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
    tokenizer_hash: str = ""
    adds_bos: bool | None = None


def _read_training(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    remedy = "move it out of the folder, or take it from its source"
    return parse_json(_Training, path.read_bytes(), path, "training summary", remedy).model_dump(exclude_unset=True)


def _read_json(path: Path) -> dict[str, Any]:
    found = parse_json(JsonObject, path.read_bytes(), path, "JSON object", "take it from where the folder comes from")
    return found.model_extra or {}


# -- writing -----------------------------------------------------------------------------------------------------------


def write_weights(
    source: Source,
    folder: Path,
    dtype: torch.dtype,
    max_shard_bytes: int,
    written: Callable[[], object],
    hf_name: Callable[[str], str] = layout.hf_name,
    wide: frozenset[str] = frozenset(),
) -> None:
    """The weights of `source` as safetensors files in `folder`, with an index if there are several.

    Written by hand, a few tensors at a time, because the package's own writer wants all tensors in memory. The format: the
    header's length in 8 bytes, little-endian; the header, JSON, padded to 8 bytes; the tensors' bytes.

    Args:
        source: of the weights.
        folder: exists.
        dtype: of the matrices; norms, A_log and dt_bias are float32, as in training.
        max_shard_bytes: a file holds at most so much (or one tensor).
        written: called after each tensor.
        hf_name: the name in the folder of a tensor of `source`.
        wide: tensors that are float64.

    Raises UserError if a weight is not finite or more than its dtype can hold.
    """
    dtypes = {name: torch.float32 if layout.stays_float32(name) else dtype for name in source.shapes}
    dtypes |= dict.fromkeys(wide, torch.float64)
    sizes = {name: shape.numel() * dtypes[name].itemsize for name, shape in source.shapes.items()}
    shards = list(within(sizes, max_shard_bytes))
    files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for file, names in zip(files if len(shards) > 1 else [_WEIGHTS], shards, strict=True):
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            start, end = end, end + sizes[name]
            entry = {"dtype": _NAMES[dtypes[name]], "shape": list(source.shapes[name]), "data_offsets": [start, end]}
            header[hf_name(name)] = entry
        text = to_json(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for tensors in source.batches(names, _READ_BYTES):
                for name in list(tensors):
                    for part in tensors.pop(name).contiguous().view(-1).split(_CONVERTED_AT_ONCE):
                        out.write(narrowed(part, dtypes[name], name, source.path).view(torch.uint8).numpy().data)
                    written()
    if len(shards) > 1:
        index = {hf_name(name): file for file, names in zip(files, shards, strict=True) for name in names}
        write_json(folder / f"{_WEIGHTS}.index.json", {"metadata": {"total_size": sum(sizes.values())}, "weight_map": index})
