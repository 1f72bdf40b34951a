"""How torch.distributed.checkpoint's files are written and read here: with checksums, and without trust.

The writer hashes data while it writes them, so that checksums are of what was meant to be saved, and nothing is read back. The
reader unpickles the index through an allow-list; torch reads tensors with weights_only.
"""

from __future__ import annotations

import errno
import io
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed.checkpoint as dcp
import xxhash
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata, TensorStorageMetadata

from titan_dp.errors import UserError
from titan_dp.files import inside, shorten, shown

_DCP = "torch.distributed.checkpoint"


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
    """Raises UserError if it is damaged, or lists anything except tensors, which torch would unpickle without a check."""
    try:
        index = _IndexUnpickler(io.BytesIO(path.read_bytes())).load()
        if isinstance(index, Metadata):
            _check_index(index, path)
    except UserError:
        raise
    except Exception as error:  # a pickle with flipped bits raises anything, and holds anything
        reason = shorten(f"{type(error).__name__}: {error}")
        raise UserError(f"{path} is damaged ({reason}); take another step of the run") from error
    if not isinstance(index, Metadata):
        raise UserError(f"{path} is not a checkpoint's index; take another step of the run")
    return index


def _check_index(index: Metadata, path: Path) -> None:
    """Every entry must be a tensor that fits into files of the folder. Raises UserError, or anything for a wrong type."""
    listed = 0
    for name, entry in index.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise UserError(
                f"{path} lists {shorten(str(name))}, which is no tensor: our checkpoints hold only tensors; do not trust it"
            )
        if not isinstance(name, str) or not isinstance(entry.properties.dtype, torch.dtype):
            raise ValueError(f"entry {shown(name)}")
        for shape in (entry.size, *(chunk.sizes for chunk in entry.chunks), *(chunk.offsets for chunk in entry.chunks)):
            if type(shape) is not torch.Size or len(shape) != len(entry.size) or min(shape, default=0) < 0:
                raise ValueError(f"shape {shown(shape)} in {shown(name)}")
        listed += entry.size.numel() * entry.properties.dtype.itemsize
    for info in index.storage_data.values():
        if not all(type(number) is int and number >= 0 for number in (info.offset, info.length)) or info.transform_descriptors:
            raise ValueError(f"place {shown(info)}")
    names = {info.relative_path for info in index.storage_data.values()}
    held = sum(inside(path.parent, name, path).stat().st_size for name in names)
    if listed > held:  # or a few bytes would ask for any amount of memory
        raise ValueError(f"it lists {listed:,} bytes of tensors, its files hold {held:,}")


class _IndexUnpickler(pickle._Unpickler):  # type: ignore[name-defined, misc]
    """Python's own, because the one in C reserves as much memory as the file asks for, however short it is."""

    _NAMES: ClassVar = {
        _DCP + ".metadata": "Metadata TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata TensorProperties "
        "MetadataIndex StorageMeta _MEM_FORMAT_ENCODING",
        _DCP + ".filesystem": "_StorageInfo",
        "torch": "Size",
        "torch.serialization": "_get_layout",
        "torch._utils": "_get_dtype",
        "collections": "OrderedDict",
        "pathlib": "PosixPath",
        "pathlib._local": "PosixPath",
    }

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if name in self._NAMES.get(module, "").split() or is_dtype:
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):
            return _member
        raise _not_ours(f"{module}.{name}")


def _member(kind: object, name: str) -> _MEM_FORMAT_ENCODING:
    """What `getattr` may do: Python 3.11.0 to 3.11.3 pickle a member of an Enum as getattr(class, name)."""
    if kind is not _MEM_FORMAT_ENCODING:
        raise _not_ours("builtins.getattr")
    return _MEM_FORMAT_ENCODING[name]


def _not_ours(name: str) -> UserError:
    return UserError(
        f"a checkpoint's .metadata asks for {shorten(name)}, which none of ours needs; do not trust this checkpoint"
    )


def os_error(error: BaseException | None) -> OSError | None:
    """The operating system's error inside DCP's, which wraps what each rank raised; None if there is none."""
    if isinstance(error, dcp.api.CheckpointException):
        found = (os_error(failure[0]) for failure in error.failures.values())
        return next((e for e in found if e is not None), None)
    if isinstance(error, OSError):
        return error
    if error is not None and "No space left" in str(error):
        return OSError(errno.ENOSPC, "No space left on device")  # torch's writer reports it as a RuntimeError
    return None if error is None else os_error(error.__cause__ or error.__context__)
