"""What a person sees of a run: one line per log step, and the same record in metrics.jsonl, TensorBoard and W&B.

`metrics.jsonl` is appended to and keyed by step. A resumed run first drops the records of steps it is about to repeat, so
each step is there once. Only rank 0 writes. Tokens per second and MFU are taken over the interval since the last line,
without pauses, which faults/step_times.py books; device tensors are read only here, once per line.
"""

from __future__ import annotations

import math
import resource
import secrets
import sys
import textwrap
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.text import Text

from titan_dp import config
from titan_dp.config.describe import all_keys
from titan_dp.config.load import Loaded
from titan_dp.errors import RunError, UserError, fitted, room
from titan_dp.faults.step_times import Interval
from titan_dp.files import make_folder, short, to_json, write_atomically
from titan_dp.hardware import peak
from titan_dp.train.facts import RunFacts
from titan_dp.train.run_folder import read_records
from titan_dp.train.step import StepResult
from titan_dp.train.validate import Evaluation, bits_per_byte

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def peak_flops(c: config.Metrics, device: torch.device, dtype: str) -> float | None:
    """FLOP/s one device can do at best in `dtype`, training.mixed_precision_param; None if it is not known, as for CPUs."""
    if c.peak_tflops is not None:
        return c.peak_tflops * 1e12
    if device.type != "cuda":
        return None
    return peak(torch.cuda.get_device_name(device), dtype)


class Metrics:
    """The log of one run.

    Args:
        run_folder: gets metrics.jsonl, tb/ and the identity of the W&B run.
        start_step, start_tokens: done before the run was resumed.
    """

    def __init__(self, run_folder: Path, facts: RunFacts, start_step: int, start_tokens: int) -> None:
        settings, world = facts.loaded.config, facts.world
        c = settings.metrics
        self.world, self.start_step, self.total_steps = world, start_step, facts.batch.steps
        self.flops_per_token = facts.size.flops_per_token
        self.bytes_per_token = facts.held_out.bytes_per_token if facts.held_out else None
        self.peak = peak_flops(c, world.device, settings.training.mixed_precision_param)
        self.validation_loss: float | None = None
        self._console = Console(highlight=False, quiet=not world.is_main, soft_wrap=True)
        self._last_step, self._last_tokens, self._step_seconds, self._memory = start_step, start_tokens, 0.0, 0.0
        self._file = self._tensorboard = self._wandb = None
        if world.is_main:
            make_folder(run_folder)
            path = run_folder / "metrics.jsonl"
            drop_repeated_steps(path, start_step)
            self._file = path.open("a")
            if c.enable_tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self._tensorboard = SummaryWriter(str(run_folder / "tb"), purge_step=start_step + 1)
                describe_run(self._tensorboard, facts.loaded, start_step)
            if c.enable_wandb:
                self._wandb = _start_wandb(c, run_folder, facts.loaded)
        if self.peak is None and world.device.type == "cuda":
            name = torch.cuda.get_device_name(world.device)
            self._console.print(f'MFU n/a (unknown peak for "{name}"): set metrics.peak_tflops')

    # -- records -----------------------------------------------------------------------------------------------------

    def log_step(
        self,
        step: int,
        interval: Interval,
        result: StepResult,
        *,
        tokens: int,
        lr: float,
        skipped: int,
    ) -> None:
        """Record step `step` (steps done), which ends `interval`; reads the device tensors of `result`.

        `tokens` are those of all samples consumed up to here, over all ranks.
        """
        loss_value, norm_value = torch.stack([result.loss.detach(), result.grad_norm.detach()]).tolist()
        steps = step - self._last_step
        step_seconds = interval.seconds / steps
        tokens_per_second = (tokens - self._last_tokens) / interval.seconds
        flops = tokens_per_second * self.flops_per_token / self.world.size
        record: dict[str, Any] = {
            "step": step,
            "loss": loss_value,
            "lr": lr,
            "grad_norm": norm_value,
            "tokens": tokens,
            "tokens_per_second": tokens_per_second,
            "tflops_per_device": flops / 1e12,
            "memory_gib": memory_gib(self.world.device),
            "data_wait": interval.data_wait / interval.seconds,
            "data_wait_slowest": interval.data_wait_slowest / interval.seconds,
            "work_slowest": interval.work_slowest,
            "step_seconds": step_seconds,
            "skipped_steps": skipped,
            **{f"paused_{what}": seconds for what, seconds in interval.paused.items()},
        }
        if result.householder_steps is not None:
            record["householder_steps"] = result.householder_steps.item()
        speed = f"{flops / 1e9:.3g} GFLOP/s"
        if self.peak is not None:
            record["mfu"] = flops / self.peak
            speed = f"MFU {record['mfu']:.1%}"
        # The first line's speed is warmup and compilation: no estimate from it alone once there is a better one.
        self._step_seconds = (
            step_seconds
            if self._step_seconds == 0 or self._last_step <= self.start_step + 1
            else (0.8 * self._step_seconds + 0.2 * step_seconds)
        )
        left = timedelta(seconds=round(self._step_seconds * (self.total_steps - step)))
        eta = f"{left.days} d {left.seconds // 3600} h" if left.days else str(left)
        width = len(f"{self.total_steps:,}")
        grown, self._memory = record["memory_gib"] > 1.01 * self._memory, max(self._memory, record["memory_gib"])
        paused = {what: seconds for what, seconds in interval.paused.items() if seconds >= 0.05}
        parts = {
            "step": f"step {step:>{width},}/{self.total_steps:,}",
            "loss": f"loss [bold]{loss_value:.4f}[/bold]",
            "lr": f"lr {lr:.1e}",
            "norm": f"norm {norm_value:.2f}",
            "tokens": f"{short(tokens_per_second)} tok/s",
            "speed": speed,
            "eta": f"ETA {eta}",
            "memory": f"{record['memory_gib']:.2f} GiB" if grown else "",
            "data": f"waiting for data {record['data_wait']:.1%}" if record["data_wait"] >= 0.01 else "",
            "householder": f"{record['householder_steps']:.2f} steps per token" if "householder_steps" in record else "",
            "skipped": f"{skipped} skipped" if skipped else "",
            "paused": " | ".join(f"{what} {seconds:.1f} s" for what, seconds in paused.items()),
        }
        self._console.print(line_of(parts, ["speed", "memory", "norm", "lr", "paused", "data", "householder"]))
        remarks = list(interval.remarks)
        if record.get("mfu", 0) > 1:
            remarks.append("MFU above 100 %: metrics.peak_tflops is wrong")
        for remark in remarks:
            self._console.print(fitted(f"step {step:>{width},} | {remark}"), style="yellow", markup=False)
        self._write(step, record)
        self._last_step, self._last_tokens = step, tokens

    def log_validation(self, step: int, result: Evaluation) -> None:
        """Record a validation after `step` steps."""
        loss = self.validation_loss = result.loss
        record = {"step": step, "validation_loss": loss, "validation_tokens": result.tokens}
        parts = {
            "step": f"step {step:,}",
            "loss": f"validation loss [bold]{loss:.4f}[/bold] nats per token",
            "tokens": f"{result.tokens:,} tokens",
        }
        if result.token_accuracy is not None and result.sequence_accuracy is not None:
            record["validation_token_accuracy"] = result.token_accuracy
            record["validation_sequence_accuracy"] = result.sequence_accuracy
            parts["right"] = (
                f"right: {result.token_accuracy:.2%} of tokens, [bold]{result.sequence_accuracy:.2%}[/bold] of sequences"
            )
        if self.bytes_per_token:
            record["validation_bits_per_byte"] = bits_per_byte(loss, self.bytes_per_token)
            parts["bits"] = f"{record['validation_bits_per_byte']:.4f} bits per byte"
        self._console.print(line_of(parts, ["tokens"]))
        self._write(step, record)

    def _write(self, step: int, record: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(to_json(record) + "\n")
            self._file.flush()
        tagged = {tag_of(key): value for key, value in record.items() if key != "step"}
        if self._tensorboard is not None:
            for tag, value in tagged.items():
                self._tensorboard.add_scalar(tag, value, step)
        if self._wandb is not None:
            self._wandb.log(tagged, step=step)

    def close(self) -> None:
        """End the log. What cannot be ended, such as W&B's upload, is said: it neither fails a run nor hides why one failed."""
        ends = {
            "metrics.jsonl": (self._file, "close"),
            "TensorBoard": (self._tensorboard, "close"),
            "W&B": (self._wandb, "finish"),
        }
        for name, (sink, end) in ends.items():
            try:
                if sink is not None:
                    getattr(sink, end)()
            except Exception as error:
                print(f"WARNING: the log of {name} may lack its end ({error})", file=sys.stderr, flush=True)


def line_of(parts: dict[str, str], dispensable: Sequence[str]) -> str:
    """`parts` that are not empty in one line of rich's markup. It fits 100 columns, and a terminal that is narrower, by leaving
    out what is `dispensable`, the first of it first; metrics.jsonl has it all.
    """
    kept = {name: part for name, part in parts.items() if part}
    for name in dispensable:
        if Text.from_markup(" | ".join(kept.values())).cell_len <= min(room(), _WIDEST):
            break
        kept.pop(name, None)
    return " | ".join(kept.values())


_WIDEST = 100
"""Columns of a line in a log."""
_TRAIN = {"loss", "grad_norm", "tokens", "skipped_steps", "householder_steps"}


def tag_of(key: str) -> str:
    """The name of a record's entry in TensorBoard and W&B, which show what has the part before "/" in common together."""
    if key.startswith("validation_"):
        return key.replace("_", "/", 1)
    return f"{'train' if key in _TRAIN else 'optimizer' if key == 'lr' else 'speed'}/{key}"


def describe_run(tensorboard: SummaryWriter, loaded: Loaded, step: int) -> None:
    """The configuration for TensorBoard: as text, and as the hyperparameters of its table of runs."""
    from torch.utils.tensorboard.summary import hparams

    c = loaded.config
    if c.job.description:
        tensorboard.add_text("description", c.job.description, step)
    tensorboard.add_text("configuration", textwrap.indent(loaded.resolved_toml(), "    "), step)
    values = {key.dotted: key.of(c) for key in all_keys().values()}
    shown = {key: v if isinstance(v, bool | int | float | str) else str(v) for key, v in values.items() if v is not None}
    for summary in hparams(shown, {"validation/loss": math.nan}):
        tensorboard._get_file_writer().add_summary(summary)


def memory_gib(device: torch.device) -> float:
    """Peak memory so far in GiB: reserved by the allocator on CUDA, resident set of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


def drop_repeated_steps(path: Path, step: int) -> None:
    """Keep only records of steps up to `step`; lines that are not records, such as one cut off by a kill, go as well."""
    if path.exists():
        kept = "".join(to_json(record) + "\n" for record in read_records(path.parent) if record["step"] <= step)
        write_atomically(path, lambda file: file.write(kept.encode()))


def _start_wandb(c: config.Metrics, run_folder: Path, loaded: Loaded) -> Any:
    """The W&B run of this run folder. Raises UserError if W&B refuses it, RunError if it does not answer."""
    try:
        import wandb
    except ImportError as error:
        raise UserError("metrics.enable_wandb = true needs the package wandb: pip install wandb, or set it to false") from error
    try:
        return wandb.init(
            project=c.wandb_project,
            id=wandb_id(run_folder),
            resume="allow",
            name=loaded.run_name[-128:],  # its longest
            entity=c.wandb_entity or None,
            group=c.wandb_group or (run_folder.parent.name if (run_folder.parent / "sweep.json").exists() else None),
            tags=c.wandb_tags,
            dir=str(run_folder),
            config=loaded.config.model_dump(mode="json"),
            allow_val_change=True,  # a resume may train with other settings, and says so itself
        )
    except wandb.errors.UsageError as error:
        raise UserError(
            f"metrics.enable_wandb: W&B refuses this run: {error}; see metrics.wandb_project, wandb_entity and `wandb login`"
        ) from error
    except wandb.errors.Error as error:
        raise RunError(
            f"W&B cannot be reached: {error}; with the environment variable WANDB_MODE=offline the run is kept on disk"
        ) from error


def wandb_id(run_folder: Path) -> str:
    """The id of this run at W&B: made once and kept in the run folder, so that a resume goes on with it wherever the folder is.

    Not made of the run's name, which is unique only inside its own folder, and may hold what ids may not.
    """
    path = run_folder / "wandb_id"
    if path.exists() and (known := path.read_text().strip()):
        return known
    made = secrets.token_hex(8)
    write_atomically(path, lambda file: file.write(f"{made}\n".encode()))
    return made
