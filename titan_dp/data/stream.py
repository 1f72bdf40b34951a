"""Training straight from a Hugging Face dataset, tokenised on the way: `data.source = "hf"`.

Every rank walks the same stream of documents and keeps its own samples, so the order does not depend on ranks. The state
is four integers, equal on all ranks: samples consumed, epoch, documents consumed, and the offset of the next sample's
first token in the document at hand. No iterator state of `datasets` is kept: resuming skips to the document. The price is
that each rank tokenises everything; for more than a few ranks, or more than one epoch, prepare shards.

A connection that fails is tried again from the row it failed at. A document that cannot be used is left out and counted, by
every rank alike.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from titan_dp import config
from titan_dp.data.batch import Batch, Place, make_batch
from titan_dp.data.formats import text_of
from titan_dp.data.shards import TokenShards
from titan_dp.data.sources import load_hugging_face, rows_of
from titan_dp.data.tokenizer import Tokenizer, load_tokenizer
from titan_dp.data.workers import read_in_workers
from titan_dp.errors import RunError, UserError, explained, passing_fault, say_once
from titan_dp.files import Replaced, shorten

State = dict[str, int]
_START: State = {"samples": 0, "epoch": 0, "documents": 0, "offset": 0}
_PAUSES = (1, 2, 4, 8, 16, 30)
"""Seconds before each further try when a connection fails again and again. Other ranks wait meanwhile, so that all of them must
stay below comm.train_timeout_seconds."""
_LONGEST = 2**28
"""Characters of the longest document: whole in memory, with its ids, it takes gigabytes."""
Row = tuple[list[int], list[int]]
"""T + 1 tokens, of which the last is the next row's first, and the positions at which documents begin."""


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
    """Batches of this rank from the stream; a `batch.Loader`."""

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
        self.sources: list[TokenShards] = []
        self.tokenizer_name, self.tokenizer_hash = data.tokenizer, tokenizer.hash
        identity = [data.hf_dataset, data.hf_name, data.hf_split, data.hf_column, data.hf_shuffle_buffer, tokenizer.hash]
        self.fingerprint = hashlib.sha256(repr(identity).encode()).hexdigest()
        self.state: State = dict(_START)
        self.replaced = Replaced("document", " streamed so far")
        self.left_out = 0
        """Documents that could not be used, since the start of this process."""
        before, after = tokenizer.separators()
        self.adds_bos = bool(before)
        if not before and not after:
            say_once(tokenizer.joined("if that is not meant"))
        self._open()  # fail now, not later

    def __iter__(self) -> Iterator[list[Batch]]:
        for step, state in read_in_workers(self._read, self.workers):
            self.state = state
            yield step

    def state_dict(self) -> State:
        return self.state

    def load_state_dict(self, state: State) -> None:
        self.state = _START | state  # after another source there are only samples: then this stream begins

    def epochs(self, run_tokens: int) -> float:
        return 0.0

    def describe(self, run_tokens: int) -> str:
        return (
            f"streaming {self.data.hf_dataset} {self.data.hf_name} {self.data.hf_split}, tokenised by every rank with "
            f"{self.tokenizer_name}, shuffle buffer {self.data.hf_shuffle_buffer:,} documents"
        )

    def _open(self) -> Any:
        d = self.data
        return load_hugging_face(d.hf_dataset, d.hf_name, d.hf_split, d.hf_column, streaming=True)

    def _wait(self, error: UserError | RunError, failed: int) -> None:
        """Wait before another try, after `failed` tries before this one. Raises what `error` means if no try would help."""
        fault = passing_fault(error)
        if fault is None or failed == len(_PAUSES):
            raise explained(error) or error
        reason = f"{type(fault).__name__}: {shorten(str(fault))}"
        say_once(f"warning: Hugging Face dataset {self.data.hf_dataset!r}: {reason}; trying again in {_PAUSES[failed]} s")
        time.sleep(_PAUSES[failed])

    def _read(self, worker: int, workers: int) -> Iterator[tuple[list[Batch], State]]:
        """This rank's micro-batches of every step, and the state after it."""
        place, L = self.place, self.place.local
        own = {place.first_sample(0, micro) + i for micro in range(place.accumulation) for i in range(L)}
        rows = self._rows(load_tokenizer(self.data.tokenizer), dict(self.state))
        while True:
            kept = []
            for number, (row, after) in enumerate(islice(rows, place.total)):  # noqa: B007  # the last `after` is the step's
                if number in own:
                    kept.append(row)
            yield [self._batch(kept[i : i + L]) for i in range(0, len(kept), L)], after

    def _batch(self, rows: list[Row]) -> Batch:
        tokens, starts = np.array([row for row, _ in rows], np.int64), [np.array(begins, np.int64) for _, begins in rows]
        return make_batch(tokens, starts, self.place, self.data.document_boundaries == "reset")

    def _rows(self, tokenizer: Tokenizer, state: State) -> Iterator[tuple[Row, State]]:
        """Packed documents from `state` on, and the state after each row."""
        T, samples, at = self.place.seq_len, state["samples"], state["offset"]
        row: list[int] = []
        starts: list[int] = []
        for epoch, document, ids in self._documents(tokenizer, state["epoch"], state["documents"]):
            while True:
                if at == 0:
                    starts.append(len(row))
                taken = ids[at : at + T + 1 - len(row)].tolist()
                row += taken
                if len(row) <= T:
                    break
                samples += 1
                at += len(taken) - 1  # of the row's last token, with which the next row begins
                yield (row, starts), {"samples": samples, "epoch": epoch, "documents": document, "offset": at}
                row, starts = [], []
            at = 0

    def _documents(self, tokenizer: Tokenizer, epoch: int, skip: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """(epoch, index, ids) of every document that can be used, epoch after epoch."""
        d = self.data
        before, after = (np.array(ids, np.int64) for ids in tokenizer.separators())
        while True:
            rows = self._all_rows(0 if d.hf_shuffle_buffer else skip)
            if d.hf_shuffle_buffer:
                rows = islice(_shuffle(rows, d.hf_shuffle_buffer, f"{d.seed} {epoch}"), skip, None)
            empty = True
            for index, row in enumerate(rows, skip):
                ids = self._encoded(tokenizer, row, f"row {index} of {d.hf_dataset}")
                if ids is None:
                    continue
                # Alone, one separator would follow another.
                if len(ids) or (len(before) and len(after)):
                    empty = False
                    yield epoch, index, np.concatenate([before, ids, after])
            if empty and not skip:
                raise UserError(f"data.hf_dataset {d.hf_dataset!r} holds no documents in split {d.hf_split!r}{self._all_bad()}")
            epoch, skip = epoch + 1, 0

    def _all_rows(self, done: int) -> Iterator[Any]:
        """The rows of the dataset in its order from `done` on, whatever the connection does meanwhile."""
        failed = 0
        while True:
            try:
                stream = self._open()
                for row in rows_of(stream.skip(done) if done else stream, self.data.hf_dataset):
                    done, failed = done + 1, 0
                    yield row
                return
            except (UserError, RunError) as error:
                self._wait(error, failed)
                failed += 1

    def _encoded(self, tokenizer: Tokenizer, row: Any, where: str) -> np.ndarray | None:
        """The ids of a row's text, None if it cannot be used. Raises UserError for it if the settings say so."""
        text = text_of(row, where, self.data.hf_column)
        if isinstance(text, str) and len(text) > _LONGEST:
            text = UserError(f"{where} has {len(text):,} characters, more than {_LONGEST:,}; divide it")
        if isinstance(text, str):
            said = self.replaced.texts
            text = self.replaced(text, where)
            if self.place.rank == 0 and self.replaced.texts > said and _is_power_of_ten(self.replaced.texts):
                self.replaced.say()
            try:
                return tokenizer.encode_arrays([text])[0]
            except UserError as error:
                text = UserError(f"{where}: {error}")
        if self.data.hf_on_bad_document == "stop":
            raise UserError(f"{text}; data.hf_on_bad_document = 'skip' leaves such documents out")
        self.left_out += 1
        if _is_power_of_ten(self.left_out):
            say_once(f"WARNING: documents left out so far, because they cannot be used: {self.left_out:,}, the last: {text}")
        return None

    def _all_bad(self) -> str:
        return f" that can be used ({self.left_out:,} were left out)" if self.left_out else ""


def _is_power_of_ten(n: int) -> bool:
    return str(n).strip("0") == "1"


def _shuffle(rows: Iterator[Any], size: int, seed: str) -> Iterator[Any]:
    """Rows through a buffer that gives out a random one for each that comes in.

    Not `datasets`' own shuffle, whose order differs between the main process and a worker: a state saved by one could not
    be continued by the other.
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
