"""Saving and loading tensors: torch.distributed.checkpoint under the commit protocol of `checkpoint.py`.

An asynchronous save copies, writes and commits in a background thread, with collectives on a gloo group of its own; on a CPU
the next step's forward and backward pass run beside the copy, and only its update waits for it (`wait_until_copied`). The
next save, `wait` and `close` surface a failure on every rank. Only tensors are saved (what is not goes into the manifest as
JSON), so loading unpickles nothing but DCP's own index, through an allow-list. Nothing is loaded before its checksum has been
compared; a damaged checkpoint is set aside for the one before. Optimizer state is keyed by parameter names and reshards to
any world size; learning rates, betas and decay are the configuration's, not the checkpoint's. Random-number states are
restored on the same number of ranks, else derived from (seed, step, rank); so is a GPU's where CPUs saved.
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from titan_dp import config
from titan_dp.checkpoint.changed_settings import check_initial, check_resumable, keeps_moments
from titan_dp.checkpoint.dcp_files import Reader, Writer
from titan_dp.checkpoint.manifest import (
    MANIFEST,
    DamagedError,
    apply_retention,
    committed_steps,
    delete_checkpoint,
    loaded_step,
    read_manifest,
    resolve_checkpoint,
    say,
    set_aside,
    set_aside_folders,
    size_problem,
    size_problems,
    step_folder,
    unhealthy,
    verify,
    write_manifest,
)
from titan_dp.distributed import local_tensor
from titan_dp.errors import RunError, UserError
from titan_dp.faults.agreement import agree, gather, on_main, together, wait_to_see
from titan_dp.files import shorten

_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)
T = TypeVar("T")
SAVE_TIMEOUT = timedelta(hours=1)  # a slow file system is not a hang


class Checkpointer:
    """The checkpoints of one run. Every rank calls every method, in the same order.

    Args:
        c: the [checkpoint] section.
        run_folder: the run's; checkpoints go to `c.folder` inside it.
    """

    def __init__(self, c: config.Checkpoint, run_folder: Path) -> None:
        self.c, self.folder = c, run_folder / c.folder
        self.group = dist.new_group(backend="gloo", timeout=SAVE_TIMEOUT)
        self._stager = _Stager(cache_staged_state_dict=True)
        self._copied = threading.Event()
        self._copied.set()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizers: Iterable[Optimizer],
        *,
        meta: dict[str, Any],
        healthy: bool,
        blocking: bool,
    ) -> None:
        """Save after `step` steps; returns at once, unless `blocking` or async_mode is disabled.

        Call `wait_until_copied` before the parameters change. Waits for the save before it. Raises OSError where that or this
        one could not be written. The checkpoint is healthy where it is `healthy` as far as the caller knows (why not: in
        meta["unhealthy"]) and all weights and moments are finite, which is looked at here.
        """
        self.wait()
        folder = step_folder(self.folder, step)
        self._on_main(lambda: _make_empty(folder))
        state = {**_model_tensors(model), **_optimizer_tensors(model, optimizers)[0]}
        wrong = _not_finite_anywhere(state)
        tensors = {**state, **_rng_tensors()}
        meta = {
            "step": step,
            "healthy": healthy and not wrong,
            "finite": not wrong,
            "world_size": dist.get_world_size(),
            "torch": torch.__version__,
            "saved": _now(),
            **meta,
            "unhealthy": [*wrong, *meta.get("unhealthy", [])],
        }
        if blocking or self.c.async_mode == "disabled":
            self._write(tensors, folder, meta)
            if self._failure is not None:
                self.wait()
            return
        # Copies from a GPU are fast, and safe only on the stream that computes.
        on_gpu = torch.cuda.is_available()
        copy = self._stager.stage(tensors) if on_gpu else None
        self._copied.clear()

        def work() -> None:
            try:
                state = copy or self._stager.stage(tensors)
            except BaseException as error:
                self._failure = error
                return
            finally:
                self._copied.set()
            self._write(state, folder, meta)

        self._thread = _start_thread(work, f"checkpoint-{step}")

    def _write(self, tensors: dict[str, Tensor], folder: Path, meta: dict[str, Any]) -> None:
        """Write and commit; a failure is kept for `wait`."""
        try:
            writer = Writer(folder)
            dcp.save(tensors, storage_writer=writer, process_group=self.group)
            self._commit(folder, meta, writer.entries())
        except BaseException as error:
            self._failure = self._explain(error, folder)

    def wait_until_copied(self) -> None:
        """Return when the tensors of the last save may change."""
        self._copied.wait()

    def wait(self) -> None:
        """Return when no save is running. Raises OSError where the last one failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Let a running save end, without raising: for the way out, perhaps after another error."""
        if self._thread is not None:
            self._thread.join()

    def _commit(self, folder: Path, meta: dict[str, Any], own: list[dict[str, Any]]) -> None:
        """Write the manifest once every file of every rank is there. DCP has synchronised all ranks before this."""
        ranks = gather((socket.gethostname(), own), self.group)

        def commit() -> None:
            if unseen := _unseen(folder, ranks):
                raise RunError(
                    f"checkpoint {folder} is not committed: rank 0 on {socket.gethostname()} does not see {unseen}; is the "
                    "folder shared by all ranks? The same command goes on from the newest committed checkpoint"
                )
            write_manifest(folder, meta, [entry for _, entries in ranks for entry in entries])
            try:
                apply_retention(self.folder, self.c.keep_latest_k)
            except OSError as error:  # the new one is committed; an old one too many is no reason to stop
                print(f"WARNING: old checkpoints could not be deleted ({error})", file=sys.stderr, flush=True)

        self._on_main(commit)

    def _on_main(self, action: Callable[[], T]) -> T:
        return on_main(action, self.group)

    def _explain(self, error: BaseException, folder: Path) -> BaseException:
        """A failed save as one sentence, the half-written folder removed."""
        if (folder / MANIFEST).exists():  # committed: what failed came after
            return error
        if dist.get_rank() == 0:
            with suppress(OSError):
                delete_checkpoint(folder)
        if (cause := _os_error(error)) is None:
            return error
        steps = committed_steps(self.folder)
        newest = f"the newest committed checkpoint is step {steps[-1]}" if steps else "there is no earlier checkpoint"
        return OSError(cause.errno, f"checkpoint {folder} could not be written: {cause.strerror or cause}; {newest}")

    def load(self, model: nn.Module, optimizers: Iterable[Optimizer], current: dict[str, Any]) -> dict[str, Any] | None:
        """Restore everything from step `load_step` (-1: the newest healthy) and return its manifest; None if there is none.

        Args:
            model, optimizers: to write into.
            current: this run's entries of the manifest, to compare with the saved ones.

        Raises UserError where the checkpoint is cut off, damaged, not finite, of another architecture or other data, or where
        `resume` is off and there is one.
        """
        # Rank 0's list for all: a network file system may show a new folder to some ranks later.
        steps = self._on_main(lambda: committed_steps(self.folder))
        if not self.c.resume and steps:
            raise UserError(
                f"checkpoint.resume = false, but {self.folder} holds step {steps[-1]}; choose another job.run_name, or resume"
            )
        found = self._newest_healthy(steps) if self.c.load_step == -1 else self._good(self._step_to_load(steps))
        if found is None:
            return None
        folder, manifest = found
        if manifest.get("weights_only"):
            raise UserError(
                f"checkpoint {folder} holds weights alone, with no optimizer state to resume from; start a new run with "
                f"checkpoint.initial_load_path = {str(folder)!r} in another run folder"
            )
        optimizers = list(optimizers)
        model_tensors, rng = _model_tensors(model), {}
        saved = CheckpointTensors(folder, verified=True)
        difference = tensor_difference(saved.shapes, _without_prefix(model_tensors, "model."))
        check_resumable(manifest, current, self.c.allow_changed, difference)
        moments = keeps_moments(manifest, current)  # else another optimizer, which was allowed, begins with none
        optimizer_tensors, rest = _optimizer_tensors(model, optimizers) if moments else ({}, {})
        if manifest["world_size"] == dist.get_world_size():
            rng = {name: tensor for name, tensor in _rng_tensors().items() if name in saved.every_name}
        dcp.load({**model_tensors, **optimizer_tensors, **rng}, storage_reader=saved.reader, process_group=self.group)
        _refuse_not_finite({**model_tensors, **optimizer_tensors}, folder)
        set_model_state_dict(model, _without_prefix(model_tensors, "model."), options=_OPTIONS)
        if moments:
            state = {**rest, **_without_prefix(optimizer_tensors, "optimizer.")}
            set_optimizer_state_dict(model, optimizers, optim_state_dict=state, options=_OPTIONS)  # type: ignore[arg-type]
        _restore_rng(rng, current["seed"], manifest["step"])
        if aside := self._on_main(lambda: [path.name for path in set_aside_folders(self.folder)]):
            kept = f"{len(aside)} checkpoint(s) were set aside and are kept: {shorten(', '.join(aside))}"
            say(f"{kept}; `titan-dp checkpoint list {self.folder}` says how to delete them")
        return manifest

    def _step_to_load(self, steps: list[int]) -> int:
        """`load_step`, or the newest healthy one saved since by a run that began there; other newer ones are set aside.

        Left in place those would be the newest, by which retention and the next start go.
        """
        newer = [step for step in steps if step > self.c.load_step]
        paths = {step: step_folder(self.folder, step) for step in newer}

        def look() -> tuple[bool, list[int]]:
            own = [step for step, path in paths.items() if loaded_step(path) == self.c.load_step and not _health(path)[0]]
            return (step_folder(self.folder, self.c.load_step) / MANIFEST).exists(), own

        exists, own = self._on_main(look)
        if exists or own:
            for step in sorted(set(newer) - set(own)):
                aside = self._on_main(partial(set_aside, paths[step], "abandoned"))
                said = f"checkpoint {paths[step]} is set aside as {aside.name}: the run goes on from an earlier step"
                say(f"{said} (checkpoint.load_step = {self.c.load_step})")
        return max([self.c.load_step, *own])

    def _good(self, step: int) -> tuple[Path, dict[str, Any]]:
        """The checkpoint of that step and its manifest. Raises UserError where it is damaged."""
        folder = step_folder(self.folder, step)
        manifest = self._on_main(lambda: read_manifest(folder))
        if problems := _verify_together(folder, manifest, self.group):
            raise UserError(f"checkpoint {folder} is damaged: {problems[0]}; resume from another with checkpoint.load_step")
        if why := unhealthy(manifest):
            say(f"WARNING: checkpoint {folder} is not healthy ({why}); it is read because checkpoint.load_step names it")
        return folder, manifest

    def _newest_healthy(self, steps: list[int]) -> tuple[Path, dict[str, Any]] | None:
        """The newest healthy checkpoint that is as it was saved, and its manifest; newer ones are set aside, loudly.

        Left in place they would be the newest, by which retention and the next start go. Where none is healthy, the newest
        is taken whose weights and moments are finite: the step it was saved after was skipped, and changed nothing.
        """
        passed: list[tuple[Path, str, bool]] = []
        for step in reversed(steps):
            folder = step_folder(self.folder, step)
            why, finite = self._on_main(partial(_health, folder))
            if why:
                passed.append((folder, why, finite))
                continue
            try:
                manifest = self._on_main(partial(read_manifest, folder))
                problems = _verify_together(folder, manifest, self.group)
            except DamagedError as error:  # anything else in a manifest stops the run
                problems = [str(error)]
            if not problems:
                self._pass_over(passed, f"the run goes on from step {step}")
                return folder, manifest
            aside = self._on_main(partial(set_aside, folder))
            instead = f"it is set aside as {aside.name}, and the one before is taken"
            say(f"WARNING: checkpoint {folder} is damaged: {'; '.join(problems)}; {instead}")
        for i, (folder, why, finite) in enumerate(passed):
            if not finite:
                continue
            manifest = self._on_main(partial(read_manifest, folder))
            if not _verify_together(folder, manifest, self.group):
                self._pass_over(passed[:i], f"the run goes on from {folder.name}")
                taken = f"{folder.name}, whose weights are finite, is taken ({why})"
                say(f"WARNING: no checkpoint in {self.folder} is healthy; {taken}")
                return folder, manifest
        if passed:
            folder, why, _ = passed[0]
            raise UserError(
                f"no checkpoint in {self.folder} is healthy (the newest, {folder.name}: {why}); start again with another "
                "job.run_name and a lower optimizer.lr or other data"
            )
        if self._on_main(lambda: list(self.folder.glob("step-*.damaged"))):
            raise UserError(
                f"every checkpoint in {self.folder} is damaged and set aside (*.damaged); restore one, or start again with "
                "another job.run_name"
            )
        return None

    def _pass_over(self, passed: list[tuple[Path, str, bool]], instead: str) -> None:
        def aside_only_once(folder: Path) -> None:
            """A run that goes NaN at every start would fill the disk with the same step."""
            if (before := folder.with_name(f"{folder.name}.unhealthy")).exists():
                delete_checkpoint(before)
            set_aside(folder, "unhealthy")

        for folder, why, _ in passed:
            self._on_main(partial(aside_only_once, folder))
            aside = f"it is set aside as {folder.name}.unhealthy, and {instead}"
            say(f"WARNING: checkpoint {folder} is not healthy ({why}); {aside}")

    def newest(self) -> Path:
        return step_folder(self.folder, committed_steps(self.folder)[-1])


class CheckpointTensors:
    """The model's tensors of a committed checkpoint by name, read one at a time in this process, without a process group.

    Args:
        verified: its files have been compared with the manifest, which this rank may not even see yet.

    Raises UserError where the checkpoint is cut off or damaged.
    """

    def __init__(self, folder: Path, verified: bool = False) -> None:
        if not verified and (problems := size_problems(folder)):
            raise UserError(f"checkpoint {folder} is damaged: {problems[0]}; take another step of the run")
        self.reader = Reader(folder)
        entries: dict[str, Any] = self.reader.read_metadata().state_dict_metadata
        self.every_name = frozenset(entries)  # of what is not the model's as well
        entries = _without_prefix({name: e for name, e in entries.items() if name.startswith("model.")}, "model.")
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
                if (cause := _os_error(error)) is not None:
                    raise cause from error
                reason = str(next(iter(error.failures.values()))[0]).splitlines()[0]
                raise UserError(f"checkpoint {self.reader.path} is damaged ({reason}); take another step of the run") from error
        return _without_prefix(tensors, "model.")


def _unseen(folder: Path, ranks: list[tuple[str, list[dict[str, Any]]]]) -> str:
    """What of the files that `ranks`, (host, entries) each, have written does not appear here at its length; "" for nothing."""
    written = [(rank, host, entry) for rank, (host, entries) in enumerate(ranks) for entry in entries]

    def missing() -> list[tuple[int, str, dict[str, Any]]]:
        return [item for item in written if size_problem(folder, item[2])]

    wait_to_see(lambda: not missing(), folder)
    if not (left := missing()):
        return ""
    rank, host, entry = left[0]
    return (
        f"{len(left)} of {len(written)} files: {entry['name']}, {entry['bytes']:,} bytes by rank {rank} on {host} "
        f"({size_problem(folder, entry)})"
    )


def _verify_together(folder: Path, manifest: dict[str, Any], group: dist.ProcessGroup | None = None) -> list[str]:
    """`verify` with the reading shared by all ranks, if there are any; each gets all sentences.

    A file that one rank sees as it should be and another does not see yet is waited for. Raises RunError on all ranks where
    that does not help.
    """
    if not dist.is_initialized():
        return verify(folder)
    _wait_for_files(folder, manifest["files"], group)
    rank, size = dist.get_rank(), dist.get_world_size()
    own = together(lambda: verify(folder, rank, size, manifest["files"]), group)
    return list(dict.fromkeys(problem for part in gather(own, group) for problem in part))


def _wait_for_files(folder: Path, entries: list[dict[str, Any]], group: dist.ProcessGroup | None) -> None:
    """Return when every rank sees all files of a checkpoint that any rank sees: what no rank sees is missing, not late.

    Raises RunError on all ranks where that takes too long.
    """
    rank, size = dist.get_rank(), dist.get_world_size()

    def listed() -> set[str]:
        try:
            return set(os.listdir(folder))
        except OSError:
            return set()

    # A listing shows all names at once; sizes cost a call each, so every rank looks at a part of them.
    seen = listed()
    suspect = {e["name"] for e in entries if e["name"] not in seen} | {
        e["name"] for e in entries[rank::size] if size_problem(folder, e)
    }
    suspects = set[str]().union(*gather(suspect, group))
    if not suspects:
        return

    def wrong() -> set[str]:
        return {e["name"] for e in entries if e["name"] in suspects and size_problem(folder, e)}

    every = gather(wrong(), group)
    if not (late := set[str]().union(*every) - every[0].intersection(*every)):
        return

    def wait() -> None:
        if not wait_to_see(lambda: not wrong() & late, folder):
            raise RunError(
                f"this rank has waited for {min(wrong() & late)} of checkpoint {folder} and does not see it as other ranks do; "
                "is the folder shared by all ranks? The same command tries again"
            )

    together(wait, group)


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

    Raises UserError where there is no healthy checkpoint, or it is damaged, not finite, or of another architecture or
    vocabulary.
    """
    # Rank 0 says which one is the newest, for all.
    folder = path / on_main(lambda: os.path.relpath(resolve_checkpoint(path), path))
    manifest = together(lambda: _manifest_of_rank_0(folder))
    agree({"the checkpoint at checkpoint.initial_load_path": [manifest["step"], manifest["files"]]})
    if problems := _verify_together(folder, manifest):
        raise UserError(f"checkpoint {folder} is damaged: {problems[0]}; take another step of the run")
    tensors = _model_tensors(model)
    saved = CheckpointTensors(folder, verified=True)
    difference = tensor_difference(saved.shapes, _without_prefix(tensors, "model."))
    check_initial(manifest, current or manifest, list(allow_changed), f"checkpoint {folder}", difference)
    dcp.load(tensors, storage_reader=saved.reader)
    _refuse_not_finite(tensors, folder)
    set_model_state_dict(model, _without_prefix(tensors, "model."), options=_OPTIONS)
    return manifest


def _manifest_of_rank_0(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint that rank 0 has seen. Raises RunError where it does not appear here."""
    if not wait_to_see((folder / MANIFEST).exists, folder):
        raise RunError(f"checkpoint {folder}, which rank 0 sees, is not there; is the folder shared, or copied to every node?")
    return read_manifest(folder)


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

    Raises OSError where it cannot be written.
    """
    _make_empty(folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is")
        writer = Writer(folder)
        try:
            dcp.save({f"model.{name}": tensor for name, tensor in tensors.items()}, storage_writer=writer, no_dist=True)
        except BaseException as error:
            if (cause := _os_error(error)) is None:
                raise
            raise OSError(cause.errno, f"{folder} could not be written: {cause.strerror or cause}") from error
    write_manifest(folder, {"weights_only": True, "torch": torch.__version__, "saved": _now(), **meta}, writer.entries())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


# -- state as flat dictionaries of tensors -----------------------------------------------------------------------------


def _model_tensors(model: nn.Module) -> dict[str, Any]:
    return {f"model.{name}": tensor for name, tensor in get_model_state_dict(model, options=_OPTIONS).items()}


def _optimizer_tensors(model: nn.Module, optimizers: Iterable[Optimizer]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Moments and step counts by parameter name; and the hyper-parameters, which are not saved."""
    state: dict[str, Any] = get_optimizer_state_dict(model, list(optimizers), options=_OPTIONS)  # type: ignore[assignment]
    tensors = {f"optimizer.{name}": value for name, value in state.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in state.items() if not isinstance(value, Tensor)}


def _without_prefix(tensors: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _rng_tensors() -> dict[str, Tensor]:
    """Generator states of this rank; `random`'s as its 624 words and position."""
    rank = dist.get_rank()
    state = {f"rng.{rank}.torch": torch.get_rng_state(), f"rng.{rank}.python": torch.tensor(random.getstate()[1])}
    if torch.cuda.is_available():
        state[f"rng.{rank}.cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_rng(state: dict[str, Tensor], seed: int, step: int) -> None:
    """Every generator as in `state`; those that it lacks (other ranks, another kind of device) from (seed, step, rank)."""
    rank = dist.get_rank()
    derived = int.from_bytes(hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()[:6], "big")
    random.seed(derived)
    torch.manual_seed(derived)  # of every device
    if f"rng.{rank}.torch" in state:
        torch.set_rng_state(state[f"rng.{rank}.torch"])
        random.setstate((3, tuple(state[f"rng.{rank}.python"].tolist()), None))
    if f"rng.{rank}.cuda" in state:
        torch.cuda.set_rng_state(state[f"rng.{rank}.cuda"])


# -- health ------------------------------------------------------------------------------------------------------------


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of those of this process's `tensors` that hold a NaN or an infinity; waits for the device once."""
    names, flags = _finite_flags(tensors)
    return [name for name, finite in zip(names, flags.tolist(), strict=True) if not finite]


def _not_finite_anywhere(tensors: Mapping[str, Tensor]) -> list[str]:
    """A clause for weights and one for moments that are not finite on some rank, naming the first; one reduction for all."""
    names, flags = _finite_flags(tensors)
    if dist.is_initialized():
        dist.all_reduce(flags, dist.ReduceOp.MIN)
    wrong = [name for name, finite in zip(names, flags.tolist(), strict=True) if not finite]
    clauses = []
    for prefix, what in (("model.", "the weights"), ("optimizer.", "the optimizer's moments")):
        if found := [name.removeprefix(prefix) for name in wrong if name.startswith(prefix)]:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            clauses.append(f"{what} are not finite: {found[0]}{more}")
    return clauses


def _refuse_not_finite(tensors: Mapping[str, Tensor], checkpoint: Path) -> None:
    """Raise UserError where `tensors`, read from `checkpoint`, are not finite on some rank, whatever its manifest says."""
    if wrong := _not_finite_anywhere(tensors):
        raise UserError(f"checkpoint {checkpoint} cannot be trained on: {'; '.join(wrong)}; take another step of the run")


@torch.no_grad()
def _finite_flags(tensors: Mapping[str, Tensor]) -> tuple[list[str], Tensor]:
    """Names of the floating-point tensors, and 1 for each whose part on this rank is finite; int32 on their device.

    By the largest magnitude of each: it reads every number once and keeps none, and a NaN anywhere is one.
    """
    parts = {name: local_tensor(tensor) for name, tensor in tensors.items() if tensor.is_floating_point()}
    device = next((part.device for part in parts.values() if part.is_cuda), torch.device("cpu"))
    flags = torch.ones(len(parts), dtype=torch.int32, device=device)
    held = {i: part for i, part in enumerate(parts.values()) if part.numel()}
    if held:
        largest = torch._foreach_norm(list(held.values()), float("inf"))
        finite = torch.stack([norm.to(device, torch.float64) for norm in largest]).isfinite()
        flags[torch.tensor(list(held), device=device)] = finite.int()
    return list(parts), flags


def _health(folder: Path) -> tuple[str, bool]:
    """Why a checkpoint is not healthy, and whether its tensors are finite. A damaged one is for `verify` to find."""
    try:
        manifest = read_manifest(folder)
    except DamagedError:
        return "", True
    return unhealthy(manifest), manifest.get("finite", True)


# -- helpers ------------------------------------------------------------------------------------------------------------


def _start_thread(work: Callable[[], None], name: str) -> threading.Thread:
    """A thread on this thread's GPU: a new one begins on GPU 0, where each rank's saves would take half a GiB."""
    gpu = torch.cuda.current_device() if torch.cuda.is_available() else None

    def on_own_gpu() -> None:
        if gpu is not None:
            torch.cuda.set_device(gpu)
        work()

    thread = threading.Thread(target=on_own_gpu, name=name)
    thread.start()
    return thread


class _Stager(BlockingAsyncStager):
    """Copies the state to CPU memory it keeps from save to save: copying into pages that are mapped already is much faster.

    torch's own does that with pinned memory only, which needs a GPU.
    """

    def stage(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        if torch.cuda.is_available():
            return super().stage(state_dict)  # type: ignore[return-value]
        if self.state_dict_cache is None:
            self.state_dict_cache = {name: tensor.detach().clone() for name, tensor in state_dict.items()}
        else:
            for name, tensor in state_dict.items():
                local_tensor(self.state_dict_cache[name]).copy_(local_tensor(tensor).detach())
        return self.state_dict_cache


def _make_empty(folder: Path) -> None:
    """A folder for a new checkpoint; one of the same step that was cut off, or is saved again, goes."""
    if folder.exists():
        delete_checkpoint(folder)
    folder.mkdir(parents=True, exist_ok=True)  # it stays where it holds what no save wrote


def _os_error(error: BaseException | None) -> OSError | None:
    """The operating system's error inside DCP's, which wraps what each rank raised."""
    if isinstance(error, dcp.api.CheckpointException):
        found = (_os_error(failure[0]) for failure in error.failures.values())
        return next((e for e in found if e is not None), None)
    if isinstance(error, OSError):
        return error
    if error is not None and "No space left" in str(error):
        return OSError(errno.ENOSPC, "No space left on device")  # torch's writer reports it as a RuntimeError
    return None if error is None else _os_error(error.__cause__ or error.__context__)
