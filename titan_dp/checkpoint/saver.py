"""Saving and resuming a run: torch.distributed.checkpoint under the commit protocol of `manifest.py`.

An asynchronous save copies, writes and commits in a background thread, with collectives on a gloo group of its own; on a CPU
the next step's forward and backward pass run beside the copy, and only its update waits for it (`wait_until_copied`). The
next save, `wait` and `close` surface a failure on every rank. Only tensors are saved (everything else goes into the manifest
as JSON), so loading unpickles nothing except DCP's own index, through an allow-list. Nothing is loaded before its checksum has
been compared; a damaged checkpoint is set aside for the one before.
"""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict
from torch.optim import Optimizer

from titan_dp import config
from titan_dp.checkpoint.changed_settings import check_changes, check_moments, keeps_moments
from titan_dp.checkpoint.dcp_files import Writer, os_error
from titan_dp.checkpoint.folder import apply_retention, delete_checkpoint, make_empty, set_aside_folders
from titan_dp.checkpoint.manifest import MANIFEST, committed_steps, now, step_folder, write_manifest
from titan_dp.checkpoint.resume import Found, checkpoint_to_resume
from titan_dp.checkpoint.seen import unseen
from titan_dp.checkpoint.state import (
    OPTIONS,
    model_tensors,
    not_finite_anywhere,
    optimizer_tensors,
    refuse_not_finite,
    restore_rng,
    rng_tensors,
    without_prefix,
)
from titan_dp.checkpoint.weights import CheckpointTensors, tensor_difference
from titan_dp.distributed import local_tensor
from titan_dp.errors import RunError, UserError, counted, say_once
from titan_dp.faults.agreement import gather, on_main
from titan_dp.files import shorten

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

        Call `wait_until_copied` before the parameters change. Waits for the save before it. The checkpoint is healthy if it is
        `healthy` as far as the caller knows (why not: in meta["unhealthy"]) and all weights and moments are finite, which is
        looked at here. Raises OSError if this save or the one before could not be written.
        """
        self.wait()
        folder = step_folder(self.folder, step)
        on_main(lambda: make_empty(folder), self.group)
        state = {**model_tensors(model), **optimizer_tensors(model, optimizers)[0]}
        wrong = not_finite_anywhere(state)
        tensors = {**state, **rng_tensors()}
        meta = {
            "step": step,
            "healthy": healthy and not wrong,
            "finite": not wrong,
            "world_size": dist.get_world_size(),
            "torch": torch.__version__,
            "saved": now(),
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
        """Return when no save is running. Raises OSError if the last one failed."""
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
            if missing := unseen(folder, ranks):
                raise RunError(
                    f"checkpoint {folder} is not committed: rank 0 on {socket.gethostname()} does not see {missing}; is the "
                    "folder shared by all ranks? The same command goes on from the newest committed checkpoint"
                )
            write_manifest(folder, meta, [entry for _, entries in ranks for entry in entries])
            try:
                apply_retention(self.folder, self.c.keep_latest_k, self.c.keep_steps)
            except OSError as error:  # the new one is committed; an old one too many is no reason to stop
                print(f"WARNING: old checkpoints could not be deleted ({error})", file=sys.stderr, flush=True)

        on_main(commit, self.group)

    def _explain(self, error: BaseException, folder: Path) -> BaseException:
        """A failed save as one sentence, the half-written folder removed."""
        if (folder / MANIFEST).exists():  # committed: what failed came after
            return error
        if dist.get_rank() == 0:
            with suppress(OSError):
                delete_checkpoint(folder)
        if (cause := os_error(error)) is None:
            return error
        steps = committed_steps(self.folder)
        newest = f"the newest committed checkpoint is step {steps[-1]}" if steps else "there is no earlier checkpoint"
        return OSError(cause.errno, f"checkpoint {folder} could not be written: {cause.strerror or cause}; {newest}")

    def load(self, model: nn.Module, optimizers: Iterable[Optimizer], current: dict[str, Any]) -> Found | None:
        """Restore everything from step `load_step` (-1: the newest healthy), or for a new run from the checkpoint at
        `branch_from`; returns it with its manifest, None if there is none.

        Args:
            model, optimizers: to write into.
            current: this run's entries of the manifest, to compare with the saved ones.

        Raises UserError if the checkpoint is cut off, damaged, not finite, of another architecture or other data, or if
        `resume` is off and there is one.
        """
        found = checkpoint_to_resume(self.c, self.folder, self.group)
        if found is None:
            return None
        folder, manifest = found
        if manifest["weights_only"]:
            raise UserError(
                f"checkpoint {folder} holds weights alone, with no optimizer state to resume from; start a new run with "
                f"checkpoint.initial_load_path = {str(folder)!r} in another run folder"
            )
        optimizers = list(optimizers)
        weights, rng = model_tensors(model), {}
        saved = CheckpointTensors(folder, verified=True)
        difference = tensor_difference(saved.shapes, without_prefix(weights, "model."))
        check_changes(manifest, current, self.c.allow_changed, difference, run_folder=folder.parent.parent)
        # Another optimizer, which was allowed, begins without moments.
        keeps = keeps_moments(manifest, current)
        moments, rest = optimizer_tensors(model, optimizers) if keeps else ({}, {})
        if absent := sorted(moments.keys() - saved.every_name):
            check_moments(manifest, current, absent, self.c.allow_changed)
            keeps, moments = False, {}
            for optimizer in optimizers:
                optimizer.state.clear()  # to ask for its names took a step
        if manifest["world_size"] == dist.get_world_size():
            rng = {name: tensor for name, tensor in rng_tensors().items() if name in saved.every_name}
        dcp.load({**weights, **moments, **rng}, storage_reader=saved.reader, process_group=self.group)
        refuse_not_finite({**weights, **moments}, folder)
        set_model_state_dict(model, without_prefix(weights, "model."), options=OPTIONS)
        if keeps:
            state: Any = {**rest, **without_prefix(moments, "optimizer.")}
            set_optimizer_state_dict(model, optimizers, optim_state_dict=state, options=OPTIONS)
        restore_rng(rng, current["seed"], manifest["step"])
        if aside := on_main(lambda: [path.name for path in set_aside_folders(self.folder)], self.group):
            kept = f"{counted(len(aside), 'checkpoint')} set aside and kept: {shorten(', '.join(aside))}"
            say_once(f"{kept}; `titan-dp checkpoint list {self.folder}` says how to delete them")
        return found

    def newest(self) -> Path:
        return step_folder(self.folder, committed_steps(self.folder)[-1])


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
