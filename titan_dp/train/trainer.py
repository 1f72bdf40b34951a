"""The life of a run: build, resume, train, validate, save, show.

One invariant carries the rest: everything that decides step s (samples, learning rate, initial weights) is a pure
function of the configuration, the data and s. What is not (weights, moments, random-number states) is in the checkpoint.
So stopping and resuming changes nothing, on the same ranks bit for bit; SIGTERM, SIGUSR1 and Ctrl-C stop a run at the end of a
step, saved. What a step computes and exchanges is step.py; the loop waits for the device at log steps, validations and saves
only.
"""

from __future__ import annotations

import gc
import math
import shlex
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from signal import Signals

import torch
import torch.distributed as dist
from rich.console import Console

from titan_dp import distributed
from titan_dp.checkpoint.changed_settings import changed_since, describe_changes, weights_changed
from titan_dp.checkpoint.saver import SAVE_TIMEOUT, Checkpointer
from titan_dp.checkpoint.weights import load_model_weights
from titan_dp.config.load import Loaded
from titan_dp.data.batch import Batch
from titan_dp.data.stream import files_of_dataset
from titan_dp.distributed import World
from titan_dp.errors import RunError, StoppedError, fitted
from titan_dp.faults.agreement import agree, code, settings_of, together
from titan_dp.faults.interrupt import Interrupt
from titan_dp.faults.profiling import Profiler
from titan_dp.faults.step_times import StepTimes
from titan_dp.faults.watchdog import Watchdog
from titan_dp.files import write_atomically
from titan_dp.model.check_kernels import check_run, uses_operator
from titan_dp.model.cpu import kernels_in_words, use_threads
from titan_dp.model.float8 import check_float8
from titan_dp.model.parallelize import sharded_model
from titan_dp.model.parametrization import scales
from titan_dp.model.size import model_size
from titan_dp.model.transformer import chosen_backend
from titan_dp.output import FIRST_SIGN, Progress, harmless, print_next, print_pairs, print_text, progress
from titan_dp.train.batch_plan import BatchPlan, plan_batches, plan_rest
from titan_dp.train.facts import RunFacts, planned
from titan_dp.train.lr_scheduler import build_lr_scheduler, rate_jump
from titan_dp.train.metrics import Metrics
from titan_dp.train.optim import NonFiniteGuard, build_optimizer
from titan_dp.train.run_folder import RunLock, check_config_is_ours, write_run
from titan_dp.train.step import PhaseName, StepResult, train_step
from titan_dp.train.tasks import Sample, build_task

PASS_PATIENCE = 4.0
"""A forward and backward pass on a CPU may take so many times its estimate before it counts as a hang."""
LOCK_PATIENCE = 10.0
"""Seconds for the ranks of a run whose launcher was killed: they save and end."""


class Trainer:
    """One run in one process of `world`.

    Args:
        sample: makes the text shown at the end of a run over text from its last checkpoint; None shows none.
    """

    def __init__(self, loaded: Loaded, world: World, sample: Sample | None = None) -> None:
        c = self.config = loaded.config
        self.loaded, self.world, self.sample = loaded, world, sample
        self.run_folder = Path(c.job.dump_folder) / loaded.run_name
        self.console = Console(highlight=False, markup=False, soft_wrap=True, quiet=not world.is_main)
        self.lock: RunLock | None = None
        equal, by_rank = settings_of(c)
        try:
            self.differing = agree(equal | code(), self._prepare, by_rank=by_rank, folder=self.run_folder)
            self.kernels = self._check_kernels()
        except BaseException:
            if self.lock is not None:
                self.lock.close()
            raise
        use_threads(c.model.hidden_size)
        distributed.set_seeds(c.debug)
        self.model = sharded_model(c, world)
        self.householder_cost = c.training.householder_cost if c.model.adaptive_householder else None
        self.model.to_empty(device=world.device)
        factors = scales(c)
        self.model.init_weights(c.debug.seed, {name: scale.init for name, scale in factors.items()})
        self.model.train()
        self.optimizers = build_optimizer(self.model, c.optimizer, factors)
        self.guard = NonFiniteGuard(world.device)
        self.times = StepTimes(world.device, c.compile.enable)
        self.interrupt = Interrupt(world.device)
        self.stop_for: Signals | None = None
        self.slow, self.passes = True, Progress("", None)  # whether the last step took long, or there was none; and this one's

        self.samples_before = 0  # consumed before the run was resumed
        self.step, self.reached = 0, False  # reached: solved early; the run stops before its last step
        self.validation_due = False  # a signal broke the validation of the saved step off
        self.checkpointer = Checkpointer(c.checkpoint, self.run_folder)
        self._resume()
        self.lr_factor = build_lr_scheduler(c.lr_scheduler, self.batch.steps)
        hang_folder = self.run_folder / "hang" / f"from-step-{self.step:08}"
        limit = self._patience(c.comm.init_timeout_seconds)
        self.watchdog = Watchdog(hang_folder, world.rank, world.size, limit, "comm.init_timeout_seconds")
        self.model.register_forward_pre_hook(lambda module, args: self.watchdog.beat())

    # -- before the first step ---------------------------------------------------------------------------------------

    def _prepare(self) -> dict[str, object]:
        """What a rank does by itself, and may be the only one to fail at; returns what must be equal on all."""
        c, world = self.config, self.world
        if world.is_main:
            check_config_is_ours(self.run_folder, "choose another job.run_name, or rename that file")
            # First of all, so that a second run in the folder is refused before minutes of building.
            self.lock = RunLock(self.run_folder, patience=LOCK_PATIENCE)
        self.backend = chosen_backend(c.model, world.device)
        check_float8(c.quantize, world.device)
        batch = plan_batches(c.training, distributed.data_world(c.parallelism, world).size)
        self.task = build_task(c, batch, world, self.sample)
        self.loader, held_out = self.task.loader, self.task.held_out
        self.facts = RunFacts(self.loaded, world, model_size(c.model, c.training.seq_len), batch, self.loader, held_out)
        return {
            "the device": world.device.type,
            "the backend of the recurrence": self.backend,
            "the fingerprint of the training data": self.loader.fingerprint,
            "the hash of the tokenizer": self.loader.tokenizer_hash,
            "the files of data.hf_dataset": files_of_dataset(c.data),
            "the fingerprint of the validation data": held_out.fingerprint if held_out else None,
        }

    def _check_kernels(self) -> str:
        """What the head of the run says of its kernels. Raises UserError on all ranks if they are wrong on one.

        Before the model is built: what is wrong is then known in seconds, and kernels are compiled while nothing else waits.
        """
        c = self.config
        if self.backend != "triton" or not uses_operator(c):
            return ""
        if not c.debug.check_kernels:
            return "not checked (debug.check_kernels = false)"
        return together(lambda: check_run(c, self.batch.local_batch_size, self.world.device))

    def _resume(self) -> None:
        """Take up the run folder's newest healthy checkpoint (or the one of checkpoint.load_step), or another run's checkpoint,
        or another run's weights, or start afresh.
        """
        c = self.config.checkpoint
        found = self.checkpointer.load(self.model, self.optimizers, current=self.facts.manifest())
        if found is not None:
            checkpoint, manifest = found
            is_own = checkpoint.parent == self.checkpointer.folder
            begun = {"branched_from": str(checkpoint), "branched_at": manifest["step"], "shared_tokens": manifest["tokens"]}
            self.facts.branch = {key: manifest[key] for key in begun if key in manifest} if is_own else begun
            self.step, self.reached = manifest["step"], self.task.may_end_early and manifest.get("reached", False)
            self.validation_due = self.task.held_out is not None and manifest.get("validation_due", False)
            position = manifest["loader"]
            if manifest["fingerprint"] != self.loader.fingerprint:  # a place in other data says nothing about these
                position = {key: position[key] for key in ("samples", "step") if key in position}
            self.loader.load_state_dict(position)
            self.samples_before = position["samples"]
            last_step_tokens = manifest.get("tokens_per_step", self.batch.tokens_per_step)
            self.facts.batch = plan_rest(self.batch, self.config.training, self.step, manifest["tokens"], last_step_tokens)
            unused = f"; checkpoint.initial_load_path = {c.initial_load_path!r} is for a new job.run_name and not used"
            self.console.print(
                f"{'resumed' if is_own else 'branches'} at step {self.step} from "
                f"{self.checkpointer.folder if is_own else checkpoint}{unused if c.initial_load_path else ''}"
                f"{'; the task is solved, and the run ends here' if self.reached else ''}"
            )
            now = self.facts.manifest()
            if changes := changed_since(manifest, now):
                self.console.print(f"changed since step {self.step}: {describe_changes(changes)}", style="yellow")
            if is_own and (jump := rate_jump(manifest, now)):  # a branch may decay from its first step
                self.console.print(f"WARNING: {jump}", style="bold yellow")
        elif c.initial_load_path:
            manifest = load_model_weights(Path(c.initial_load_path), self.model, self.facts.manifest(), c.allow_changed)
            self.console.print(f"weights loaded from {c.initial_load_path}; optimizer, step and data start afresh")
            if changes := weights_changed(manifest, self.facts.manifest()):
                self.console.print(f"changed since it was saved, as allowed: {describe_changes(changes)}", style="bold yellow")

    @property
    def batch(self) -> BatchPlan:
        return self.facts.batch

    @property
    def tokens(self) -> int:
        """Tokens of all samples consumed so far, over all ranks and earlier lives of the run; ask between steps only."""
        samples = self.loader.state_dict()["samples"] - self.samples_before
        return self.batch.tokens_before + samples * self.batch.seq_len

    def _announce(self) -> None:
        """The first lines of a run: what runs where, with what, on which data. No silent fallback stays silent."""
        c = self.config
        lines = {
            "device": distributed.describe(self.world, c.parallelism),
            "model": self.model.describe(),
            "recurrence": f"{self.backend} backend{kernels_in_words(self.backend, self.world.device)}",
            **({"kernels": self.kernels} if self.kernels else {}),
            **planned(c, self.batch, self.world.size),
            "data": self.loader.describe(self.batch.tokens),
            "optimizer": self.optimizers.describe(),
            "compile": f"{'every block, fullgraph' if c.compile.enable else 'off'}; activation checkpointing "
            f"{c.activation_checkpoint.mode}",
            "run folder": str(self.run_folder),
        }
        if self.differing:
            lines["by rank"] = f"may differ, and does: {'; '.join(self.differing)}"
        if self.world.is_main:
            print_pairs(f"{self.loaded.run_name} {c.job.description}".rstrip(), lines)
        for warning in self.loaded.warnings() + ([] if self._is_done() else self.facts.warnings()):
            self.console.print(fitted(f"warning: {warning}"), style="yellow")

    def _open_run_folder(self) -> Metrics:
        """What rank 0 writes before the first step: the settings, what the run is, the log."""
        if self.world.is_main:
            text = self.loaded.annotated_toml().encode()
            write_atomically(self.run_folder / "config.toml", lambda file: file.write(text))
        self._write_run("training")
        return Metrics(self.run_folder, self.facts, self.step, self.tokens)

    # -- the loop ----------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Run to the last step, then validate, save, and show a sample."""
        c = self.config
        self._announce()
        if self._is_done():
            self.console.print(
                f"nothing to do: all steps ({self.step:,}) are done; to start anew, choose another job.run_name; to train it "
                f"further: {self._further()}"
            )
        metrics = together(self._open_run_folder)

        steps = iter(self.loader)
        self.task.watch_data(self.run_folder)
        gc.disable()  # collections at different moments on different ranks make all of them wait
        try:
            with Profiler(c.profiling, self.run_folder, self.world.rank, self.step) as profiler, self.watchdog, self.interrupt:
                if self.validation_due:
                    self._validate(metrics)
                self.times.begin()
                self.watchdog.beat(SAVE_TIMEOUT.total_seconds())  # a stream may skip for long to where it was
                while not self._is_done() and self.stop_for is None:
                    with self.times.data_wait():
                        micro_batches = next(steps)
                    result = self._train_step(micro_batches)
                    self.step += 1
                    self.times.end_step(self.step)
                    first, last = self.step == metrics.start_step + 1, self._is_done()
                    if self.step % c.metrics.log_freq == 0 or first or last:
                        self.task.check_data()
                        self.guard.check(c.training.max_nonfinite_steps)
                        interval, lr = self.times.end_interval(), c.optimizer.lr * self.lr_factor(self.step - 1)
                        metrics.log_step(self.step, interval, result, tokens=self.tokens, lr=lr, skipped=self.guard.total)
                    if self.task.held_out is not None and (self.step % c.validation.freq == 0 or last):
                        self._validate(metrics)
                        last = self._is_done()
                    last = last or self.stop_for is not None
                    due = self.step % c.checkpoint.interval == 0 or self.step in c.checkpoint.keep_steps
                    if c.checkpoint.enable and (due or last):
                        with self.times.paused("checkpoint"), self.watchdog.patience(SAVE_TIMEOUT.total_seconds()):
                            self._save(last, result.loss, metrics.validation_loss)
                    if self.step % c.training.gc_freq == 0:
                        gc.collect(1)
                    if first:
                        distributed.set_timeout(c.comm.train_timeout_seconds)
                        self.watchdog.limit = self._patience(c.comm.train_timeout_seconds)
                        self.watchdog.key = "comm.train_timeout_seconds"
                    profiler.step()
            self.checkpointer.wait()
            if self.stop_for is not None:
                raise self._farewell(self.stop_for)
            distributed.set_timeout(c.comm.init_timeout_seconds)  # the other ranks wait while rank 0 writes a sample
            # Rank 0 alone looks: another may not see the last commit yet.
            newest = self.checkpointer.newest() if c.checkpoint.enable and self.world.is_main else None
            shown = self.task.finish(self.model, self.run_folder, newest)
            together(lambda: self._write_run("finished"))
            self._show_result(metrics, newest, shown)
        finally:
            gc.enable()
            self.checkpointer.close()
            try:
                metrics.close()
            finally:
                if self.lock is not None:
                    self.lock.close()

    def _farewell(self, signal: Signals) -> StoppedError | RunError:
        stopped = f"stopped by {signal.name} after step {self.step:,}"
        if self.config.checkpoint.enable:
            return StoppedError(f"{stopped}; saved; the same command resumes")
        return RunError(f"{stopped}; nothing is saved (checkpoint.enable = false)")

    def _patience(self, limit: float) -> float:
        """Seconds that a forward and backward pass may take: `limit`, or more on a CPU that needs more."""
        return max(limit, PASS_PATIENCE * self.facts.step_seconds / self.batch.accumulation)

    def _is_done(self) -> bool:
        return self.reached or self.step >= self.batch.steps

    def _train_step(self, micro_batches: list[Batch]) -> StepResult:
        began, many = time.monotonic(), len(micro_batches)
        shown = f"step {self.step + 1:,}" + (", micro-batch" if many > 1 else "")
        with progress(shown, many if many > 1 else None) if self.slow else nullcontext(self.passes) as self.passes:
            result = train_step(
                self.model,
                self.optimizers,
                self.guard,
                micro_batches,
                world=self.world,
                max_norm=self.config.training.max_norm,
                lr_factor=self.lr_factor(self.step),
                householder_cost=self.householder_cost,
                flags=self.interrupt.flags(),
                phase=self._phase,
            )
        self.slow = time.monotonic() - began > FIRST_SIGN
        self.stop_for = self.interrupt.hand_in(result.signals)
        return result

    def _phase(self, name: PhaseName, micro: int) -> AbstractContextManager[None]:
        """Times what a rank does without others; weights stay as they are until the last checkpoint has copied them."""
        if name == "forward":
            self.passes.done = micro
        if name == "update":
            self.checkpointer.wait_until_copied()
        return self.times.work if name in ("loss", "update") else nullcontext()

    def _validate(self, metrics: Metrics) -> None:
        """Validate. If a signal arrives first, leave it to the resumed run."""
        limit = self.watchdog.limit
        self.watchdog.limit = self._patience(self.config.comm.init_timeout_seconds)  # the first one compiles
        with self.times.paused("validation"):
            result = self.task.evaluate(self.model, self._until_stopped)
        self.watchdog.limit = limit
        self.validation_due = self.stop_for is not None
        if not self.validation_due:
            metrics.log_validation(self.step, result)
            self.reached = self.task.is_reached(result)

    def _until_stopped(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """`batches`, up to the first at which any rank has been asked to stop, on all ranks the same."""
        with progress("validation", len(self.task.held_out or ())) as state:
            for batch in state.each(batches):
                self.stop_for = self.stop_for or self.interrupt.hand_in(distributed.all_reduce_sum(self.interrupt.flags()))
                if self.stop_for is not None:
                    return
                yield batch

    def _save(self, last: bool, loss: torch.Tensor, validation_loss: float | None) -> None:
        losses = {f"the training loss of step {self.step}": float(loss), "the last validation loss": validation_loss}
        wrong = [f"{name} is {value}" for name, value in losses.items() if value is not None and not math.isfinite(value)]
        if not self.guard.healthy():
            wrong.append("its last step was skipped for a gradient that was not finite")
        position = self.loader.state_dict()
        meta = {
            **self.facts.manifest(),
            "loader": position,
            "samples": position["samples"],
            "tokens": self.tokens,
            "reached": self.reached,
            "validation_due": self.validation_due,
            "unhealthy": wrong,
        }
        self.checkpointer.save(self.step, self.model, self.optimizers, meta=meta, healthy=not wrong, blocking=last)

    def _write_run(self, state: str) -> None:
        if self.world.is_main:
            now = {"state": state, "step": self.step, "tokens": self.tokens}
            write_run(self.run_folder, now | self.facts.run_json())

    def _say_next(self) -> None:
        """What can be done with a finished run."""
        c, run = self.config, shlex.quote(str(self.run_folder))
        if not c.checkpoint.enable:
            return
        if c.data.source == "state_tracking":
            print_next("compare it with other models", f"titan-dp state-tracking report {run} ...")
        else:
            held_out = f"--shards {shlex.quote(c.validation.paths[0])} --concatenate" if c.validation.enable else "--text ..."
            measure = f"titan-dp evaluate perplexity {run} {held_out}"
            print_next("let it write, and measure it", f"titan-dp generate {run}", measure)
        print_text(f"to train it further: {self._further()}")

    def _further(self) -> str:
        """How to go on with a finished run; a wheel has no guide, so the settings are named."""
        end = self.config.lr_scheduler.total_steps or self.batch.steps
        return (
            f"docs/guides/more-tokens.md; the simplest way is more training.steps with --lr_scheduler.total_steps {end} (more "
            "steps alone make the learning rate jump)"
        )

    def _show_result(self, metrics: Metrics, newest: Path | None, shown: tuple[str, str] | None) -> None:
        """What the model can do now, and where everything is."""
        say, c = self.console.print, self.config
        if shown is not None:
            say(f"\n{shown[0]}", style="bold")
            say(harmless(shown[1]))
        if self.world.is_main:
            say()
            if metrics.validation_loss is not None:
                say(f"final validation loss  {metrics.validation_loss:.4f} nats per token")
            if c.checkpoint.enable:
                say(f"checkpoint             {newest}")
            if c.metrics.enable_tensorboard:
                logs = self.run_folder / "tb"
                say(f"TensorBoard            tensorboard --logdir {shlex.quote(str(logs))}")
            say(f"metrics                {self.run_folder / 'metrics.jsonl'}")
            self._say_next()
        dist.barrier()
