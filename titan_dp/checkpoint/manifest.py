"""The manifest of a checkpoint: what it says, and whether the files beside it are what was saved. Without torch.

    step-00001000/    __0_0.distcp ...   torch.distributed.checkpoint's files
                      .metadata          its index, written when every rank has written
                      manifest.json      the commit marker, written last

A checkpoint is a folder that holds a manifest, whatever it is called and wherever it was copied. Without a manifest it was cut
off: never loaded, never counted by retention, never a reason to delete another. The manifest holds sizes and checksums of
all files and of itself, the step, the health bit, the resolved configuration, the git commit, the data's fingerprint and the
position in the data. A checkpoint whose checksums differ is damaged. `folder.py` finds, sets aside and deletes checkpoints;
`saver.py` writes and reads the tensors; `changed_settings.py` says whether a run may go on from one.
"""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import tomli
import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from titan_dp.config.describe import all_keys
from titan_dp.errors import UserError
from titan_dp.files import (
    STRICT,
    JsonObject,
    checksum,
    first_mistake,
    inside,
    shorten,
    shown,
    to_json,
    write_json,
)

MANIFEST = "manifest.json"
FORMAT_VERSION = 2


class DamagedError(UserError):
    """A checkpoint that is not as it was saved."""


class NewerError(UserError):
    """A checkpoint that a newer version of this program saved, with more in it than this one understands."""


class _File(BaseModel):
    """A file as the manifest lists it."""

    model_config = ConfigDict(**STRICT, extra="forbid")

    name: str
    bytes: Annotated[int, Field(ge=0)]
    xxh3_128: str


class _Manifest(JsonObject):
    """What every manifest says; other entries are for people. Defaults stand for entries that older versions did not write."""

    files: list[_File]
    step: Annotated[int, Field(ge=0)]
    healthy: bool
    """Whether weights, moments and losses are finite; readers of a run take the newest checkpoint that is."""
    unhealthy: list[str] = Field([])
    """Why not: clauses."""
    finite: bool = True
    """Whether weights and moments are, whatever the losses."""
    world_size: Annotated[int, Field(gt=0)]
    tokens: Annotated[int, Field(ge=0)]
    saved: str
    git_commit: str = "unknown"
    config: str
    fingerprint: str
    tokenizer: str
    tokenizer_hash: str = ""
    """Of what it did at the training; empty: not known."""
    adds_bos: bool | None = None
    """Whether documents began with BOS; None: not known."""
    global_batch_size: int
    loader: dict[str, Any]
    weights_only: bool = False


_DEFAULTS = {name: field.default for name, field in _Manifest.model_fields.items() if not field.is_required()}


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a committed checkpoint, every entry of `_Manifest` in it and of its type.

    Raises UserError if the folder is not a committed checkpoint, DamagedError, NewerError.
    """
    path = checkpoint / MANIFEST
    if not path.exists():
        others = ", ".join(map(str, committed_steps(checkpoint.parent))) or "none"
        state = "was cut off while it was saved (no manifest.json)" if checkpoint.exists() else "does not exist"
        raise UserError(f"checkpoint {checkpoint} {state}; committed steps there: {others}")
    try:
        manifest = json.loads(path.read_text())
        if "shards" in manifest:
            raise UserError(f"{checkpoint} is a folder of token shards; give a run folder or a checkpoint")
        if (version := manifest.pop("format_version")) != FORMAT_VERSION:
            raise NewerError(f"{path} has format version {shown(version)}, this program reads {FORMAT_VERSION}")
        if manifest.pop("checksum") != _own_checksum(manifest):
            raise ValueError("its checksum differs")
        _Manifest.model_validate(manifest)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = first_mistake(error) if isinstance(error, ValidationError) else error
        raise DamagedError(f"{path} is damaged ({reason}); take another step") from error
    _refuse_newer(manifest["config"], path)
    return {**_DEFAULTS, **manifest}


def write_manifest(checkpoint: Path, meta: dict[str, Any], files: list[dict[str, Any]]) -> None:
    """Commit: from now on the checkpoint exists."""
    manifest = {**meta, "files": sorted(files, key=lambda f: f["name"])}
    whole = {"format_version": FORMAT_VERSION, **manifest, "checksum": _own_checksum(manifest)}
    write_json(checkpoint / MANIFEST, whole)


def _own_checksum(manifest: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(to_json(manifest, sort_keys=True).encode())


def now() -> str:
    """For `saved`: the time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def unhealthy(manifest: dict[str, Any]) -> str:
    """Why its checkpoint is not healthy: a clause; empty if it is healthy."""
    if manifest["healthy"]:
        return ""
    return "; ".join(manifest["unhealthy"]) or "its last step was skipped for a gradient that was not finite"


# -- steps of a folder ---------------------------------------------------------------------------------------------------


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08}"


def all_steps(folder: Path) -> list[int]:
    """Steps with a folder, committed or cut off, rising."""
    found = (re.fullmatch(r"step-(\d{8,})", path.name) for path in folder.glob("step-*"))
    return sorted(int(match[1]) for match in found if match)


def committed_steps(folder: Path) -> list[int]:
    """Steps with a committed checkpoint, rising."""
    return [step for step in all_steps(folder) if (step_folder(folder, step) / MANIFEST).exists()]


# -- the files beside it -------------------------------------------------------------------------------------------------


def size_problems(checkpoint: Path) -> list[str]:
    """A sentence for each file that is missing or not as long as the manifest says."""
    return [problem for entry in read_manifest(checkpoint)["files"] if (problem := size_problem(checkpoint, entry))]


def size_problem(checkpoint: Path, entry: dict[str, Any]) -> str | None:
    """A sentence if a file of the manifest is missing or of another length; reads no contents."""
    try:
        path = inside(checkpoint, entry["name"], checkpoint / MANIFEST)
    except UserError as error:
        return str(error)
    try:
        size = path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return f"{path} is missing"
    if size != entry["bytes"]:
        return f"{path} has {size} bytes, the manifest says {entry['bytes']}"
    return None


def verify(checkpoint: Path, part: int = 0, parts: int = 1, files: list[dict[str, Any]] | None = None) -> list[str]:
    """A sentence for each file that is not what was saved; reads everything.

    Args:
        part, parts: look only at this one of so many equal parts of the files.
        files: those of the manifest, if that has been read already.
    """
    problems = []
    for entry in (read_manifest(checkpoint)["files"] if files is None else files)[part::parts]:
        problem = size_problem(checkpoint, entry)
        if problem is None:
            path = checkpoint / entry["name"]
            problem = None if checksum(path) == entry["xxh3_128"] else f"{path} is not what was saved (its checksum differs)"
        if problem is not None:
            problems.append(problem)
    return problems


# -- the configuration in it ---------------------------------------------------------------------------------------------


def saved_sections(config: str) -> dict[str, Any]:
    """The resolved TOML of a manifest, by section. Raises DamagedError if it is not such TOML."""
    try:
        sections = tomli.loads(config)
    except (ValueError, RecursionError):
        sections = {}
    if "model" not in sections or not all(isinstance(section, dict) for section in sections.values()):
        raise DamagedError("the checkpoint's configuration is damaged; resume from another step with checkpoint.load_step")
    return sections


def saved_value(config: dict[str, Any], dotted: str) -> object:
    """The value of a key in resolved TOML; its default if it was unset, or unknown to the version that wrote it."""
    default = all_keys()[dotted].default if dotted in all_keys() else None
    *path, name = dotted.split(".")
    for part in path:
        config = config.get(part, {})
    return config.get(name, default) if isinstance(config, dict) else default


def _refuse_newer(config: str, where: Path) -> None:
    """Raise NewerError if [model] has a key, or a word as a value, that this version does not know.

    The one rule for what a newer version added, whoever reads the manifest: in [model] it may change what the weights compute,
    anywhere else it does not, and is passed over (a resume names it as it names every changed setting).
    """
    try:
        model = saved_sections(config)["model"]
    except DamagedError:  # for readers who need the configuration to say
        return
    keys = {name: all_keys().get(f"model.{name}") for name in sorted(model)}
    unknown = [f"model.{shorten(name)} = {shown(model[name])}" for name, key in keys.items() if key is None]
    if unknown:
        raise NewerError(
            f"{where} has {', '.join(unknown[:4])}, which this version of titan_dp does not know: a newer one saved it; "
            "read it with that"
        )
    for name, key in keys.items():
        if key is not None and isinstance(model[name], str) and not key.accepts(model[name]):
            raise NewerError(
                f"{where} has model.{name} = {shown(model[name])}, and this version of titan_dp knows {key.expected}: a newer "
                "one saved it; read it with that"
            )
