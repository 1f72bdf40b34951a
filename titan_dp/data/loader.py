"""Batches for this rank: from shards (memory map) or a Hugging Face stream, training and validation.

Micro-batch m of step s on rank r of W holds samples s G + (m W + r) L + [0, L) of the run's order, for global batch G and
micro-batch L. So the samples of a step do not depend on ranks, workers or accumulation, and the state of a loader is
the number of samples consumed. Labels are the next tokens; the label at the end of a document, which would be the first
token of an unrelated one, is -100.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from titan_dp import config
from titan_dp.data.batch import IGNORE, Batch, Loader, Place, pack_boundaries, stateful_loader
from titan_dp.data.order import Order
from titan_dp.data.shards import TokenShards
from titan_dp.data.stream import StreamLoader
from titan_dp.errors import UserError

_AHEAD = 1024


def build_dataloader(
    data: config.Data,
    workers: config.Dataloader,
    *,
    seq_len: int,
    local_batch_size: int,
    global_batch_size: int,
    rank: int,
    world_size: int,
    vocab_size: int,
) -> Loader:
    """The training loader of this rank. Raises UserError where the data does not exist or does not fit the settings."""
    place = Place(seq_len, local_batch_size, global_batch_size, rank, world_size)
    if data.source == "hf":
        return StreamLoader(data, workers, place, vocab_size)
    return ShardLoader(data, workers, place, vocab_size)


class ShardLoader:
    """Batches from token shards; see the module's docstring."""

    def __init__(self, data: config.Data, workers: config.Dataloader, place: Place, vocab_size: int) -> None:
        self.place, self.workers, self.samples = place, workers, 0
        self.sources = open_shards(data.paths, "data.path", data.tokenizer, vocab_size)
        windows = [(len(source) - 1) // place.seq_len for source in self.sources]
        if 0 in windows:
            short = self.sources[windows.index(0)]
            raise UserError(
                f"data.path {str(short.folder)!r} has {len(short):,} tokens, fewer than one sample of training.seq_len + 1 = "
                f"{place.seq_len + 1}; lower training.seq_len or prepare more text"
            )
        weights = data.weights or [float(len(source)) for source in self.sources]
        fingerprints = [source.fingerprint for source in self.sources]
        self.order = Order(fingerprints, windows, weights, data.seed)
        self.fingerprint = " ".join(fingerprints)
        self.tokenizer_name: str = self.sources[0].manifest["tokenizer"]["name"]
        self.tokenizer_hash: str = self.sources[0].manifest["tokenizer"]["hash"]
        self.dataset = _Samples(self.sources, self.order, place, data.document_boundaries == "reset")

    def __iter__(self) -> Iterator[Batch]:
        sampler = _MicroBatches(self.place, self.samples)
        loader = stateful_loader(self.dataset, self.workers, sampler=sampler)
        for number, batch in enumerate(loader, 1):
            if number % self.place.accumulation == 0:
                self.samples += self.place.total
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"samples": self.samples}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.samples = state["samples"]

    def describe(self, run_tokens: int) -> str:
        tokens = sum(len(source) for source in self.sources)
        shards = sum(len(source.shards) for source in self.sources)
        mixture = ""
        if len(self.sources) > 1:
            shares = self.order.counts / self.order.counts.sum()
            mixture = "; mixture " + ", ".join(f"{s.folder} {p:.1%}" for s, p in zip(self.sources, shares, strict=True))
        return (
            f"{shards} shard(s), {tokens:,} tokens of {self.tokenizer_name}, {run_tokens / tokens:.2f} epochs planned, "
            f"fingerprint {self.fingerprint[:12]}{mixture}"
        )


class _MicroBatches(Sampler[int]):
    """First samples of this rank's micro-batches, without end."""

    def __init__(self, place: Place, samples: int) -> None:
        self.place, self.samples = place, samples

    def __iter__(self) -> Iterator[int]:
        step_start = self.samples
        while True:
            for micro in range(self.place.accumulation):
                yield self.place.first_sample(step_start, micro)
            step_start += self.place.total


class _Samples(Dataset[Batch]):
    """Micro-batches by the index of their first sample."""

    def __init__(self, sources: list[TokenShards], order: Order, place: Place, reset: bool) -> None:
        self.sources, self.order, self.place, self.reset = sources, order, place, reset
        self._located: tuple[int, np.ndarray, np.ndarray] = (0, np.empty(0, np.int64), np.empty(0, np.int64))

    def __getitem__(self, first: int) -> Batch:
        start, source, window = self._located
        end = first + self.place.local
        if not start <= first < end <= start + len(source):
            # The order of many samples costs as much as that of one: look it up for what will be asked for next as well.
            start = first
            source, window = self.order.locate(np.arange(first, first + max(_AHEAD, self.place.local), dtype=np.int64))
            self._located = start, source, window
        mine = slice(first - start, end - start)
        T = self.place.seq_len
        rows = [(self.sources[s], w * T) for s, w in zip(source[mine].tolist(), window[mine].tolist(), strict=True)]
        return read_batch(rows, T, self.reset)


def read_batch(rows: list[tuple[TokenShards, int]], T: int, reset: bool) -> Batch:
    """A micro-batch whose row i holds tokens [start, start + T) of its source, and the token after for the last label.

    A row that reaches past the end of its source is filled up with ignored labels.
    """
    tokens = np.zeros((len(rows), T + 1), dtype=np.int64)
    starts = []
    for row, (source, start) in zip(tokens, rows, strict=True):
        length = max(0, min(T + 1, len(source) - start))
        if length:
            source.read(start, row[:length])
        starts.append(source.document_starts(start, start + length) if length else np.empty(0, np.int64))
    labels = tokens[:, 1:].copy()
    for row, (source, start), begins in zip(labels, rows, starts, strict=True):
        row[begins[begins > 0] - 1] = IGNORE
        row[max(0, len(source) - start - 1) :] = IGNORE
    return {
        "input_ids": torch.from_numpy(np.ascontiguousarray(tokens[:, :-1])),
        "labels": torch.from_numpy(labels),
        "cu_seqlens": pack_boundaries(starts, T) if reset else None,
    }


class ValidationLoader:
    """Every held-out token once, in order, split over ranks; all ranks have the same number of batches."""

    def __init__(self, sources: list[TokenShards], place: Place, reset: bool) -> None:
        self.sources, self.place, self.reset = sources, place, reset
        T = place.seq_len
        self.rows = [(source, start) for source in sources for start in range(0, len(source) - 1, T)]
        self.padding = (sources[0], len(sources[0]))
        self.fingerprint = " ".join(source.fingerprint for source in sources)
        counts = ("text_bytes", "tokens", "documents")
        self.text_bytes, tokens, documents = (sum(s.manifest[key] for s in sources) for key in counts)
        predicted = tokens - documents  # the first token of a document is not
        self.bytes_per_token: float | None = self.text_bytes / predicted if predicted else None
        """Of the text, for each predicted token."""

    def __len__(self) -> int:
        return -(-len(self.rows) // (self.place.local * self.place.world_size))

    def __iter__(self) -> Iterator[Batch]:
        L = self.place.local
        for number in range(len(self)):
            first = (number * self.place.world_size + self.place.rank) * L
            rows = self.rows[first : first + L]
            yield read_batch(rows + [self.padding] * (L - len(rows)), self.place.seq_len, self.reset)


def build_validation_loader(
    validation: config.Validation,
    data: config.Data,
    *,
    seq_len: int,
    local_batch_size: int,
    rank: int,
    world_size: int,
    vocab_size: int,
) -> ValidationLoader:
    """The held-out loader. Raises UserError where its tokens may also be trained on."""
    sources = open_shards(validation.paths, "validation.path", data.tokenizer, vocab_size)
    if data.source == "shards":
        for trained in open_shards(data.paths, "data.path", data.tokenizer, vocab_size):
            for held_out in sources:
                _refuse_overlap(trained, held_out)
    place = Place(seq_len, local_batch_size, local_batch_size * world_size, rank, world_size)
    return ValidationLoader(sources, place, data.document_boundaries == "reset")


def _refuse_overlap(trained: TokenShards, held_out: TokenShards) -> None:
    if trained.manifest["tokenizer"]["hash"] != held_out.manifest["tokenizer"]["hash"]:
        raise UserError(
            f"validation.path {str(held_out.folder)!r} was made with tokenizer {held_out.manifest['tokenizer']['name']!r}, "
            f"data.path {str(trained.folder)!r} with {trained.manifest['tokenizer']['name']!r}; prepare both with one"
        )
    same = trained.fingerprint == held_out.fingerprint
    split, fraction = trained.manifest.get("split"), trained.manifest.get("validation_fraction", 0)
    # Documents are held out by hash below a threshold: one lower threshold for training lets them in.
    leaks = held_out.manifest.get("split") == "validation" and (
        split != "train" or fraction < held_out.manifest.get("validation_fraction", 0)
    )
    if same or leaks:
        raise UserError(
            f"validation.path {str(held_out.folder)!r} may hold documents of data.path {str(trained.folder)!r}; "
            "use the train and validation folders of one `titan-dp prepare`"
        )


def open_shards(paths: list[str], key: str, tokenizer: str, vocab_size: int) -> list[TokenShards]:
    """Open folders of shards and check that they and the model share one vocabulary."""
    opened = [TokenShards(Path(path)) for path in paths]
    first = opened[0].manifest["tokenizer"]
    for shards in opened:
        made_with = shards.manifest["tokenizer"]
        if made_with["hash"] != first["hash"]:
            raise UserError(
                f"{key} mixes tokenizers: {str(shards.folder)!r} was made with {made_with['name']!r}, "
                f"{str(opened[0].folder)!r} with {first['name']!r}; prepare both with one"
            )
        if shards.vocab_size > vocab_size:
            raise UserError(
                f"model.vocab_size = {vocab_size} is too small for {key} {str(shards.folder)!r}, whose tokenizer "
                f"{made_with['name']!r} has {shards.vocab_size} ids; set model.vocab_size to at least that"
            )
    if tokenizer and tokenizer != first["name"]:
        from titan_dp.data.tokenizer import load_tokenizer

        if load_tokenizer(tokenizer).hash != first["hash"]:
            raise UserError(
                f"data.tokenizer = {tokenizer!r}, but {key} {str(opened[0].folder)!r} was made with {first['name']!r}; "
                "drop data.tokenizer or prepare the data again"
            )
    return opened
