"""How torch.distributed.checkpoint's files are written and read here: with checksums, and without trust.

The writer hashes what it writes while it writes it, so that a checkpoint is known by what was meant to be in it, and nothing
is read back. The reader unpickles the index through an allow-list; tensors are read by torch with weights_only.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import xxhash
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from titan_dp.errors import UserError


class Writer(dcp.FileSystemWriter):
    """DCP's writer into `folder`, which notes the checksum of every file of this rank."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.fs = self._files = _HashedFiles()

    def entries(self) -> list[dict[str, Any]]:
        """This rank's files as the manifest lists them."""
        return [
            {"name": path.name, "bytes": path.stat().st_size, "xxh3_128": digest.hexdigest()}
            for path, digest in self._files.digests.items()
        ]


class _HashedFiles(FileSystem):
    def __init__(self) -> None:
        self.digests: dict[Path, xxhash.xxh3_128] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:  # type: ignore[override]
        digest = self.digests[Path(path)] = xxhash.xxh3_128()
        with _HashedFile(io.FileIO(path, mode), digest) as stream:
            yield stream

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        super().rename(path, new_path)
        self.digests[Path(new_path)] = self.digests.pop(Path(path))


class _HashedFile(io.BufferedWriter):
    def __init__(self, raw: io.FileIO, digest: xxhash.xxh3_128) -> None:
        super().__init__(raw)
        self._digest = digest

    def write(self, data: Any) -> int:
        self._digest.update(data)
        return super().write(data)

    def seek(self, *args: int) -> int:
        raise io.UnsupportedOperation("the checksum is taken in the order of writing")


class Reader(dcp.FileSystemReader):
    """DCP's reader, but the index is read once, and unpickled through an allow-list: a foreign checkpoint cannot run code."""

    _metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is None:
            self._metadata = _read_index(Path(self.path) / ".metadata")
        metadata = self._metadata
        if metadata.storage_meta is None:
            metadata.storage_meta = dcp.metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def _read_index(path: Path) -> Metadata:
    """Raises UserError where it is damaged, or lists anything but tensors, which torch would unpickle without a check."""
    try:
        with path.open("rb") as file:
            index = _IndexUnpickler(file).load()
    except UserError:
        raise
    except Exception as error:  # a pickle with flipped bits raises anything
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); take another step of the run") from error
    if not isinstance(index, Metadata):
        raise UserError(f"{path} is no index of a checkpoint; take another step of the run")
    for name, entry in index.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise UserError(f"{path} lists {name}, which is no tensor: no checkpoint of ours has such; do not trust it")
    return index


class _IndexUnpickler(pickle.Unpickler):
    _MODULES = frozenset({"torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"})
    _NAMES = frozenset(
        {
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("torch._utils", "_get_dtype"),
            ("collections", "OrderedDict"),
            ("pathlib", "PosixPath"),
            ("pathlib._local", "PosixPath"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) in self._NAMES or is_dtype:
            return super().find_class(module, name)
        if module in self._MODULES and "." not in name:  # a dotted name would reach what these modules import
            found = super().find_class(module, name)
            if getattr(found, "__module__", None) == module:
                return found
        raise UserError(
            f"a checkpoint's .metadata asks for {module}.{name}, which none of ours needs; do not trust this checkpoint"
        )
