"""What a run learns and how it is judged: text, or a problem with right answers. The trainer asks no further.

`build_task` makes the one the configuration names. Every method is called by all ranks together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from titan_dp import config
from titan_dp.data.batch import Batch, Loader, Place
from titan_dp.data.loader import ShardLoader, ValidationLoader, build_dataloader, build_validation_loader
from titan_dp.data.shard_check import RECORD, ShardCheck, copy_of
from titan_dp.data.stream import StreamLoader
from titan_dp.data.synthetic.loader import SyntheticLoader, SyntheticSet, test_set, validation_set
from titan_dp.distributed import World, all_reduce_sum, data_world
from titan_dp.faults.agreement import gather, together
from titan_dp.model.transformer import Transformer
from titan_dp.train.batch_plan import BatchPlan
from titan_dp.train.length_test import run_length_test
from titan_dp.train.validate import Evaluation, evaluate_answers, evaluate_loss

Watched = Callable[[Iterable[Batch]], Iterable[Batch]]
Sample = Callable[[Path, torch.device], tuple[str, str]]
"""Title and text of what the model of a checkpoint writes; called on rank 0 only, and never fails."""


class Task:
    """What does not hold for every task is what one without it does."""

    loader: Loader
    held_out: ValidationLoader | SyntheticSet | None = None
    """What the run is validated on; None if validation is off."""
    may_end_early = False
    """Whether `is_reached` ends a run."""

    def evaluate(self, model: Transformer, watched: Watched) -> Evaluation:
        """Evaluate `model` on held-out data; `watched` may cut the batches short."""
        raise NotImplementedError

    def is_reached(self, result: Evaluation) -> bool:
        """Whether there is nothing left to learn, and the run may end before its last step."""
        return False

    def watch_data(self, run_folder: Path) -> None:
        """Begin to compare the data with what it is said to be, beside training."""

    def check_data(self) -> None:
        """Raises UserError on every rank if it was found to be something else, RunError if it cannot be read."""

    def finish(self, model: Transformer, run_folder: Path, checkpoint: Path | None) -> tuple[str, str] | None:
        """Title and text of what a trained model has to show, on rank 0; `checkpoint` is its last one, None without any."""
        raise NotImplementedError


def build_task(c: config.Config, batch: BatchPlan, world: World, sample: Sample | None = None) -> Task:
    """Raises UserError if the data does not exist or does not fit the settings."""
    return AnswerTask(c, batch, world) if c.data.source == "state_tracking" else TextTask(c, batch, world, sample)


class TextTask(Task):
    """Next tokens of text; at the end a sample, read back from the checkpoint just written."""

    loader: ShardLoader | StreamLoader
    held_out: ValidationLoader | None = None

    def __init__(self, c: config.Config, batch: BatchPlan, world: World, sample: Sample | None) -> None:
        self.world, self.sample = world, sample
        readers, parts = data_world(c.parallelism, world), c.parallelism.context_parallel_degree
        segment = world.rank % parts, parts  # neighbouring ranks share a row
        self.verify = c.data.verify
        self.shard_check: ShardCheck | None = None
        own = batch.local_batch_size
        place = Place(batch.seq_len, own, batch.global_batch_size, readers.rank, readers.size, *segment)
        self.loader = build_dataloader(c.data, c.training.dataloader, place, c.model.vocab_size)
        if c.validation.enable:
            own = c.validation.local_batch_size or own
            place = Place(batch.seq_len, own, own * readers.size, readers.rank, readers.size, *segment)
            most = None if c.validation.steps == -1 else c.validation.steps * batch.global_batch_size
            self.held_out = build_validation_loader(c.validation, c.data, place, c.model.vocab_size, self.loader.sources, most)

    def evaluate(self, model: Transformer, watched: Watched) -> Evaluation:
        assert self.held_out is not None
        return evaluate_loss(model, watched(self.held_out), self.world.device)

    def watch_data(self, run_folder: Path) -> None:
        shards = [*self.loader.sources, *(self.held_out.sources if self.held_out else [])]
        if self.verify and shards:
            copies = gather(together(lambda: copy_of(shards)))
            own, rank = copies[self.world.rank], self.world.rank
            if copies.index(own) == rank:  # the first of those that read this copy
                self.shard_check = ShardCheck(shards, run_folder, f"data_verified-{own}.json" if rank else RECORD)

    def check_data(self) -> None:
        if self.verify:
            problem = self.shard_check.problem if self.shard_check is not None else None

            def tell() -> None:
                if problem is not None:
                    raise problem

            # Only the first rank to read a copy of the data checks it. One integer, summed, tells all whether any found a
            # problem; only then do they pay for `together`, which raises that rank's error on all.
            if int(all_reduce_sum(torch.tensor(int(problem is not None), device=self.world.device))):
                together(tell)

    def finish(self, model: Transformer, run_folder: Path, checkpoint: Path | None) -> tuple[str, str] | None:
        if checkpoint is None or self.sample is None or not self.world.is_main:
            return None
        return self.sample(checkpoint, self.world.device)


class AnswerTask(Task):
    """A word problem or a formal language; at the end the test on longer words, which nothing was chosen by."""

    loader: SyntheticLoader
    held_out: SyntheticSet | None = None

    def __init__(self, c: config.Config, batch: BatchPlan, world: World) -> None:
        self.world, self.c, self.device = world, c.state_tracking, world.device
        vocab_size, own = c.model.vocab_size, batch.local_batch_size
        place = Place(batch.seq_len, own, batch.global_batch_size, world.rank, world.size)
        self.loader = SyntheticLoader(self.c, c.data.seed, place, vocab_size, world.device)
        own = c.validation.local_batch_size or own
        place = Place(batch.seq_len, own, own * world.size, world.rank, world.size)
        self.held_out = validation_set(self.c, place, vocab_size, world.device) if c.validation.enable else None
        self.may_end_early = self.c.stop_when_solved
        self.test = test_set(self.c, place, vocab_size, world.device)

    def evaluate(self, model: Transformer, watched: Watched) -> Evaluation:
        assert self.held_out is not None
        return evaluate_answers(model, watched(self.held_out), self.device)

    def is_reached(self, result: Evaluation) -> bool:
        assert result.sequence_accuracy is not None
        return self.may_end_early and result.sequence_accuracy >= self.c.solved_accuracy

    def finish(self, model: Transformer, run_folder: Path, checkpoint: Path | None) -> tuple[str, str] | None:
        result = run_length_test(model, self.test, self.loader.length, self.device)
        if not self.world.is_main:
            return None
        result.write(run_folder)
        return "test", result.describe()
