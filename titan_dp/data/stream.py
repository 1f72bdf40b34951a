"""Training straight from a Hugging Face dataset, tokenised on the way: `data.source = "hf"`.

Every rank walks the same stream of documents and keeps its own samples of it, so the order does not depend on ranks and the
state is a few integers equal on all of them: samples consumed, epoch, documents consumed, and the offset of the next
sample's first token in the document at hand. No iterator state of `datasets` is kept: resuming skips to the document. The
price is that each rank tokenises everything; for more than a few ranks, or more than one epoch, prepare shards.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset

from titan_dp import config
from titan_dp.data.batch import IGNORE, Batch, Place, pack_boundaries, stateful_loader
from titan_dp.data.sources import load_hugging_face, rows_of
from titan_dp.data.tokenizer import Tokenizer, load_tokenizer
from titan_dp.errors import UserError
from titan_dp.files import Replaced

State = dict[str, int]
_START: State = {"samples": 0, "epoch": 0, "documents": 0, "offset": 0}


def files_of_dataset(data: config.Data) -> str | None:
    """sha256 of what a dataset in a local folder is made of: names, sizes and beginnings. None for anything else.

    A stream has no checksums, and each rank keeps its own samples of what it reads: they must all read the same.
    """
    folder = Path(data.hf_dataset)
    if data.source != "hf" or not folder.is_dir():
        return None
    found = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            beginning = hashlib.sha256(file.read(2**16)).hexdigest()
        found.update(f"{path.relative_to(folder)!s} {path.stat().st_size} {beginning}\n".encode(errors="surrogateescape"))
    return found.hexdigest()


class StreamLoader:
    """Batches of this rank from the stream; the interface of `batches.Loader`."""

    def __init__(self, data: config.Data, workers: config.Dataloader, place: Place, vocab_size: int) -> None:
        if workers.num_workers > 1:
            raise UserError(
                f"training.dataloader.num_workers = {workers.num_workers}: a stream is read in order by one process; "
                "set it to 1 (in the background) or 0, or prepare shards"
            )
        tokenizer = load_tokenizer(data.tokenizer)
        if tokenizer.vocab_size > vocab_size:
            raise UserError(
                f"model.vocab_size = {vocab_size} is too small for data.tokenizer {data.tokenizer!r}, which has "
                f"{tokenizer.vocab_size} ids; set model.vocab_size to at least that"
            )
        self.workers, self.place, self.data = workers, place, data
        self.tokenizer_name, self.tokenizer_hash = data.tokenizer, tokenizer.hash
        identity = [data.hf_dataset, data.hf_name, data.hf_split, data.hf_column, data.hf_shuffle_buffer, tokenizer.hash]
        self.fingerprint = hashlib.sha256(repr(identity).encode()).hexdigest()
        self.state: State = dict(_START)
        load_hugging_face(data.hf_dataset, data.hf_name, data.hf_split, data.hf_column, streaming=True)  # fail now, not later

    def __iter__(self) -> Iterator[Batch]:
        stream = _Stream(self.data, self.place, self.state)
        for batch, state in stateful_loader(stream, self.workers):
            self.state = state
            yield batch

    def state_dict(self) -> State:
        return self.state

    def load_state_dict(self, state: State) -> None:
        self.state = _START | state  # of another source there are but samples: this stream begins

    def describe(self, run_tokens: int) -> str:
        return (
            f"streaming {self.data.hf_dataset} {self.data.hf_name} {self.data.hf_split}, tokenised by every rank with "
            f"{self.tokenizer_name}, shuffle buffer {self.data.hf_shuffle_buffer:,} documents"
        )


class _Stream(IterableDataset[tuple[Batch, State]]):
    """Pairs of a micro-batch and the state after its step."""

    def __init__(self, data: config.Data, place: Place, state: State) -> None:
        self.data, self.place, self.state = data, place, state
        self.replaced = Replaced("documents streamed so far")

    def __iter__(self) -> Iterator[tuple[Batch, State]]:
        place = self.place
        own = {place.first_sample(0, micro) + i for micro in range(place.accumulation) for i in range(place.local)}
        windows = self._windows(load_tokenizer(self.data.tokenizer), dict(self.state))
        while True:
            # A step's samples are read to the end before its first micro-batch goes out: the state is then the next step's.
            kept = [window for i, (window, _) in enumerate(islice(windows, place.total - 1)) if i in own]
            last, state = next(windows)
            if place.total - 1 in own:
                kept.append(last)
            for micro in range(place.accumulation):
                yield self._batch(kept[micro * place.local : (micro + 1) * place.local]), state

    def _batch(self, rows: list[tuple[np.ndarray, np.ndarray]]) -> Batch:
        import torch

        T = self.place.seq_len
        tokens = np.stack([row for row, _ in rows])
        labels = tokens[:, 1:].copy()
        for label, (_, starts) in zip(labels, rows, strict=True):
            label[starts[starts > 0] - 1] = IGNORE
        reset = self.data.document_boundaries == "reset"
        return {
            "input_ids": torch.from_numpy(np.ascontiguousarray(tokens[:, :-1])),
            "labels": torch.from_numpy(labels),
            "cu_seqlens": pack_boundaries([starts for _, starts in rows], T) if reset else None,
        }

    def _windows(self, tokenizer: Tokenizer, state: State) -> Iterator[tuple[tuple[np.ndarray, np.ndarray], State]]:
        """Windows of T + 1 tokens (the last is the next one's first) with the document starts in them, and the state after."""
        T = self.place.seq_len
        buffer: list[int] = []
        starts: list[int] = []  # positions in the buffer at which documents begin
        origin: list[tuple[int, int, int]] = []  # (position in the buffer, epoch, document), one a document in the buffer
        skip, samples = state["offset"], state["samples"]
        for epoch, document, ids in self._documents(tokenizer, state["epoch"], state["documents"]):
            if not skip:
                starts.append(len(buffer))
            origin.append((len(buffer) - skip, epoch, document))
            buffer += ids[skip:]
            skip = 0
            while len(buffer) > T:
                window = np.array(buffer[: T + 1], dtype=np.int64), np.array([s for s in starts if s <= T], dtype=np.int64)
                del buffer[:T]
                starts = [s - T for s in starts if s >= T]
                origin = [(p - T, e, d) for p, e, d in origin]
                while len(origin) > 1 and origin[1][0] <= 0:
                    origin.pop(0)
                samples += 1
                position, e, d = origin[0]
                yield window, {"samples": samples, "epoch": e, "documents": d, "offset": -position}

    def _documents(self, tokenizer: Tokenizer, epoch: int, skip: int) -> Iterator[tuple[int, int, list[int]]]:
        """(epoch, index, ids) of every document, epoch after epoch."""
        d = self.data
        before = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        after = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        while True:
            stream: Any = load_hugging_face(d.hf_dataset, d.hf_name, d.hf_split, d.hf_column, streaming=True)
            if d.hf_shuffle_buffer:
                rows = islice(_shuffle(stream, d.hf_shuffle_buffer, f"{d.seed} {epoch}"), skip, None)
            else:
                rows = iter(stream.skip(skip))
            empty = True
            for index, row in enumerate(rows_of(rows, d.hf_dataset), skip):
                empty = False
                said = self.replaced.texts
                text = self.replaced(row[d.hf_column], f"row {index} of {d.hf_dataset}")
                if self.place.rank == 0 and self.replaced.texts > said and _is_power_of_ten(self.replaced.texts):
                    self.replaced.say()
                if ids := before + tokenizer.encode(text) + after:
                    yield epoch, index, ids
            if empty and not skip:
                raise UserError(f"data.hf_dataset {d.hf_dataset!r} holds no documents in split {d.hf_split!r}")
            epoch, skip = epoch + 1, 0


def _is_power_of_ten(n: int) -> bool:
    return str(n).strip("0") == "1"


def _shuffle(rows: Iterator[Any], size: int, seed: str) -> Iterator[Any]:
    """Rows through a buffer that gives out a random one for each that comes in.

    Not `datasets`' own shuffle, whose order differs between the main process and a worker, so that a state saved by one
    could not be continued by the other.
    """
    rng = random.Random(seed)
    buffer: list[Any] = []
    for row in rows:
        if len(buffer) < size:
            buffer.append(row)
            continue
        i = rng.randrange(size)
        buffer[i], row = row, buffer[i]
        yield row
    rng.shuffle(buffer)
    yield from buffer
