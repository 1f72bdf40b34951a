"""What all ranks must have in common, compared before the first step; and what one rank does on behalf of all.

Each rank starts with its own command line, files, libraries and view of the disks. Settings that differ train a model nobody
asked for, or hang; a run folder that is not shared loses half of every checkpoint. So `agree` compares a hash of everything
that must be equal, and proves that the run folder is shared: rank 0 writes a file of a new name there, tells the name through
the store of the process group, and every rank reads it. If all is well that is one collective, of 65 bytes per rank. If not,
a second one fetches what was hashed, and every rank raises the same error, which names the first difference.

Afterwards `on_main` does something on rank 0 and tells all ranks the result, and `together` does something on each rank that
succeeds on all or fails on all: no rank leaves while the others wait for it, and no two leave with different exit codes.
"""

from __future__ import annotations

import hashlib
import os
import platform
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import xxhash
from torch.distributed.distributed_c10d import _get_default_store

from titan_dp import config
from titan_dp.config.describe import all_keys
from titan_dp.distributed import distributed
from titan_dp.errors import RunError, UserError, explained
from titan_dp.files import shorten, to_json

T = TypeVar("T")
Facts = Mapping[str, object]

SECONDS_TO_SEE = 30.0
"""How long a rank waits for a file that another has written: network file systems show it late to other machines."""
SECONDS_TO_SEE_PROBE = 10.0
"""The same for the probe of the run folder, whose name nobody has looked up before."""

# Paths and the number of reading processes may differ by node: what the files hold is compared instead.
_BY_RANK = {"job.dump_folder", "data.path", "data.tokenizer", "validation.path"}
_BY_RANK |= {"checkpoint.initial_load_path", "checkpoint.branch_from"}
_BY_RANK_SECTION = "training.dataloader"
_PROBE = ".probe-"
_CPU = torch.device("cpu")
_REMEDY = "every rank needs the same command, settings, code, libraries and data: make them equal and start all of them again"


# -- what is compared --------------------------------------------------------------------------------------------------


def settings_of(c: config.Config) -> tuple[dict[str, object], dict[str, object]]:
    """Values by key in schema order: those that must be equal on all ranks, and those that may differ."""
    equal: dict[str, object] = {}
    by_rank: dict[str, object] = {}
    for key in all_keys().values():
        differs = key.dotted in _BY_RANK or key.section == _BY_RANK_SECTION
        (by_rank if differs else equal)[key.dotted] = key.of(c)
    return equal, by_rank


def code() -> dict[str, object]:
    """Versions of what computes, and a hash of every source file of this package and of the kernels."""
    facts: dict[str, object] = {"python": ".".join(platform.python_version_tuple()[:2]), "torch": torch.__version__}
    for name in ("triton", "numpy"):
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = None
    for package in ("titan_dp", "deltaproduct_kernels"):
        spec = find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        root = os.path.dirname(spec.origin)
        for folder, folders, files in os.walk(root):  # plain strings: pathlib would take longer than reading and hashing
            folders.sort()
            for path in sorted(os.path.join(folder, file) for file in files if file.endswith((".py", ".c", ".h"))):
                with open(path, "rb") as source:
                    facts[f"the source file {package}{path[len(root) :]}"] = xxhash.xxh3_64_hexdigest(source.read())
    return facts


# -- before the first step ---------------------------------------------------------------------------------------------


@dataclass
class _Rank:
    """What one rank says of itself; values as JSON."""

    facts: dict[str, str]
    by_rank: dict[str, str]
    found: dict[str, str] = field(default_factory=dict)
    failure: Exception | None = None
    folder: str = ""
    sees: bool = True
    """Whether it reads in `folder` what rank 0 wrote there."""
    host: str = field(default_factory=socket.gethostname)

    @property
    def is_well(self) -> bool:
        return self.failure is None and self.sees

    def hashed(self) -> bytes:
        """65 bytes, equal on all ranks when all is well."""
        equal, by_rank = (to_json(part).encode() for part in ([self.facts, self.found], self.by_rank))
        return hashlib.sha256(equal).digest() + hashlib.sha256(by_rank).digest() + bytes([self.is_well])


def agree(
    facts: Facts, prepare: Callable[[], Facts] = dict, *, by_rank: Facts | None = None, folder: Path | None = None
) -> list[str]:
    """Compare this rank with all others; every rank calls it. Returns a sentence for each of `by_rank` that differs.

    Args:
        facts: what must be equal, by name, in the order in which a difference is looked for.
        prepare: what this rank does by itself and may fail at, such as opening the data; returns further facts.
        by_rank: what may differ by rank.
        folder: must be the same for all; exists on rank 0 once it has prepared.

    Raises:
        UserError: on every rank, if facts differ or `folder` is not shared.
        Exception: on every rank, if `prepare` failed on one; see `together`.
    """
    if _is_alone():
        prepare()
        return []
    own = _Rank(_as_json(facts), _as_json(by_rank or {}), folder=str(folder and folder.absolute()))
    found, own.failure = _attempt(lambda: _as_json(prepare()))
    own.found = found or {}
    with _probe(folder, own):
        states = _gather_bytes(own.hashed())
        if len(set(states)) == 1 and own.is_well:
            return []
        ranks: list[_Rank] = gather(replace(own, failure=_portable(own.failure)))
    hosts = [rank.host for rank in ranks]
    _refuse_difference([rank.facts for rank in ranks], hosts)
    _raise_alike(own.failure, [rank.failure for rank in ranks], hosts)
    _refuse_difference([rank.found for rank in ranks], hosts)
    if blind := [i for i, rank in enumerate(ranks) if not rank.sees]:
        raise UserError(
            f"job.dump_folder must be one folder for all ranks, but what rank 0 wrote to {ranks[0].folder} is not there for "
            f"{_named(blind, hosts)}, in {ranks[blind[0]].folder}; name a folder that all nodes share"
        )
    return _differences([rank.by_rank for rank in ranks], hosts)


def share_failure(error: Exception) -> None:
    """Tell the ranks that are in `agree`, or soon will be, why this one cannot join them; all leave alike.

    Initialises the process group for it, with default timeouts: this rank has no settings.
    """

    def fail() -> Facts:
        raise error

    with distributed(config.Comm()):
        agree(code(), fail)


@contextmanager
def _probe(folder: Path | None, own: _Rank) -> Iterator[None]:
    """Inside, rank 0 has written a file in `folder`, and `own.sees` says whether this rank has read it."""
    key, path = f"titan_dp/probe/{_calls()}", None
    store = _get_default_store()
    if dist.get_rank() == 0:
        name = f"{_PROBE}{secrets.token_hex(8)}"
        if folder is not None and own.failure is None:
            try:
                for left in folder.glob(f"{_PROBE}*"):  # by a start that was killed
                    left.unlink(missing_ok=True)
                path = folder / name
                path.write_text(name)
            except OSError as error:
                own.failure = error
        store.set(key, name if path is not None and own.failure is None else "")
    elif (name := store.get(key).decode()) and folder is not None:
        own.sees = wait_to_see(lambda: _text(folder / name) == name, folder, SECONDS_TO_SEE_PROBE)
    try:
        yield
    finally:
        if path is not None:
            path.unlink(missing_ok=True)


def _calls() -> int:
    """How often this process group has been here; the same on every rank, unlike a counter of the process."""
    return _get_default_store().add(f"titan_dp/calls/{dist.get_rank()}", 1)


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


def _refuse_difference(ranks: Sequence[Mapping[str, str]], hosts: Sequence[str]) -> None:
    """Raises UserError naming the first fact in which ranks differ, and how many more there are."""
    first, *others = _differences(ranks, hosts) or [""]
    if first:
        more = f" (and on {len(others)} more: {shorten(', '.join(other.partition(':')[0] for other in others))})"
        raise UserError(f"ranks disagree on {first}{more if others else ''}; {_REMEDY}")


def _differences(ranks: Sequence[Mapping[str, str]], hosts: Sequence[str]) -> list[str]:
    """'optimizer.lr: 0.001 on rank 0, 0.1 on ranks 1 to 3' for every fact that differs between ranks that know it."""
    found = []
    for name in dict.fromkeys(name for rank in ranks for name in rank):
        holders: dict[str, list[int]] = {}
        for i, rank in enumerate(ranks):
            if name in rank:
                holders.setdefault(rank[name], []).append(i)
        if len(holders) > 1:
            shown = [f"{_as_text(value)} on {_named(who, hosts)}" for value, who in holders.items()]
            few = shown[:4] + ([f"{len(shown) - 4} more values on others"] if shown[4:] else [])
            found.append(f"{name}: {', '.join(few)}")
    return found


def _as_json(facts: Facts) -> dict[str, str]:
    return {name: to_json(value, sort_keys=True, default=str) for name, value in facts.items()}


def _as_text(value: str) -> str:
    return "unset" if value == "null" else shorten(value)


def _named(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """'rank 3', 'ranks 0 to 7 and 12'; with the host if there are several and these ranks share one."""
    spans: list[str] = []
    for _, group in groupby(enumerate(ranks), lambda pair: pair[1] - pair[0]):
        members = [rank for _, rank in group]
        spans += [f"{members[0]} to {members[-1]}"] if len(members) > 2 else map(str, members)
    text = spans[0] if len(spans) == 1 else f"{', '.join(spans[:-1])} and {spans[-1]}"
    of = {hosts[rank] for rank in ranks}
    where = f" on {of.pop()}" if len(of) == 1 and len(set(hosts)) > 1 else ""
    return f"rank{'s' * (len(ranks) > 1)} {text}{where}"


# -- afterwards --------------------------------------------------------------------------------------------------------


def on_main(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Call `action` on rank 0; all ranks return its result, or raise if it failed."""
    if _is_alone():
        return action()
    result, failure = _attempt(action) if dist.get_rank() == 0 else (None, None)
    told: list[Any] = [result, _portable(failure)]
    dist.broadcast_object_list(told, src=0, group=group, device=_CPU)
    if told[1] is not None:
        raise failure or told[1]
    return told[0]


def together(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Call `action` on every rank and return this rank's result once all have succeeded.

    If one failed, every rank raises the same kind of error: a UserError if there is one, else the first failing rank's; other
    ranks raise RunError for an exception that is not ours.
    """
    if _is_alone():
        return action()
    result, failure = _attempt(action)
    every = gather((_portable(failure), socket.gethostname()), group)
    _raise_alike(failure, [failed for failed, _ in every], [host for _, host in every])
    return result  # type: ignore[return-value]  # it is there if nothing failed


def _attempt(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return action(), None
    except Exception as error:
        return None, error


def wait_to_see(check: Callable[[], bool], folder: Path, seconds: float | None = None) -> bool:
    """Whether `check`, which looks into `folder`, comes true within `seconds` (default: SECONDS_TO_SEE).

    Between looks the folder and those above it are listed, which makes a network file system ask its server again. A check
    that raises OSError has seen nothing; what the caller does next says why.
    """

    def sees() -> bool:
        try:
            return check()
        except OSError:
            return False

    deadline = time.monotonic() + (SECONDS_TO_SEE if seconds is None else seconds)
    pause = 0.01
    while not sees():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 1.0)
        for listed in (*reversed(folder.absolute().parents), folder):
            with suppress(OSError):
                os.scandir(listed).close()
    return True


def _raise_alike(own: Exception | None, every: Sequence[Exception | None], hosts: Sequence[str]) -> None:
    """Raise if a rank failed: the same kind of error on all ranks."""
    failed = [i for i, failure in enumerate(every) if failure is not None]
    if not failed:
        return
    first = next((i for i in failed if isinstance(every[i], UserError)), failed[0])  # it decides the exit code
    cause = every[first]
    if own is not None and (first == dist.get_rank() or (type(own) is type(cause) and str(own) == str(cause))):
        raise own
    where = _named([first], hosts)
    if isinstance(cause, UserError):
        raise UserError(f"{where}: {cause}")
    if isinstance(cause, OSError) and cause.errno is not None:
        raise OSError(cause.errno, f"{where}: {cause.strerror}", cause.filename)
    raise RunError(f"{where}: {cause}")


def _portable(error: Exception | None) -> Exception | None:
    """`error` in a form that can be sent, and by which other ranks leave with the same exit code."""
    if error is None:
        return None
    if isinstance(error, UserError):
        error = explained(error) or error
    if isinstance(error, UserError | RunError) and type(error).__module__.startswith("titan_dp."):
        return type(error)(str(error))  # callers distinguish our kinds, and each takes a message
    if isinstance(error, UserError):
        return UserError(str(error))
    if isinstance(error, OSError) and error.errno is not None:
        return OSError(error.errno, error.strerror, error.filename)
    return RunError(f"{type(error).__name__}: {error}")


def _is_alone() -> bool:
    return not dist.is_initialized() or dist.get_world_size() == 1


def gather(own: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """`own` of every rank, in their order; of any type that torch.distributed sends."""
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, own, group=group)
    return every


def _gather_bytes(own: bytes) -> list[bytes]:
    """The bytes of every rank, as many from each, in one collective."""
    tensor = torch.frombuffer(bytearray(own), dtype=torch.uint8)
    every = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(every, tensor)
    return [part.numpy().tobytes() for part in every]
