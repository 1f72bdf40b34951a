"""Training and validation batches of one rank from token shards, by memory map; `build_dataloader` chooses the source.

Which samples a rank reads is `batch.Place`'s arithmetic, and which tokens a sample has is `order.Order`'s. So the state of
a loader is the number of samples consumed, and any step is reached at once. Labels are the next tokens; the label at the
end of a document, which would be the first token of an unrelated one, is -100.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import count, islice
from pathlib import Path

import numpy as np

from titan_dp import config
from titan_dp.data.batch import IGNORE, Batch, Place, make_batch
from titan_dp.data.order import Order
from titan_dp.data.shards import TokenShards, require_shards
from titan_dp.data.stream import StreamLoader
from titan_dp.data.tokenizer import load_tokenizer, tokenizer_file
from titan_dp.data.workers import read_in_workers
from titan_dp.errors import UserError, counted, say_once

_AHEAD = 1024


def build_dataloader(
    data: config.Data, workers: config.Dataloader, place: Place, vocab_size: int
) -> ShardLoader | StreamLoader:
    """The training loader of this rank. Raises UserError if the data does not exist or does not fit the settings."""
    return (StreamLoader if data.source == "hf" else ShardLoader)(data, workers, place, vocab_size)


class ShardLoader:
    """Training batches from a mixture of folders of shards; a `batch.Loader`."""

    def __init__(self, data: config.Data, workers: config.Dataloader, place: Place, vocab_size: int) -> None:
        self.place, self.workers, self.samples = place, workers, 0
        self.reset = data.document_boundaries == "reset"
        self.sources = open_shards(data.paths, "data.path", data.tokenizer, vocab_size)
        windows = [(len(source) - 1) // place.seq_len for source in self.sources]
        if min(windows) < 1:
            short = self.sources[windows.index(min(windows))]
            raise UserError(
                f"data.path {str(short.folder)!r} has {len(short):,} tokens, fewer than one sample of training.seq_len + 1 = "
                f"{place.seq_len + 1}; lower training.seq_len or prepare more text"
            )
        weights = data.weights or [float(len(source)) for source in self.sources]
        fingerprints = [source.fingerprint for source in self.sources]
        self.order = Order(fingerprints, windows, weights, data.seed)
        self.fingerprint = " ".join(fingerprints)
        self.tokenizer_name, self.tokenizer_hash = self.sources[0].tokenizer.name, self.sources[0].tokenizer.hash
        self.adds_bos = _adds_bos(self.sources)

    def __iter__(self) -> Iterator[list[Batch]]:
        micro_batches = read_in_workers(partial(self._read, self.samples), self.workers)
        while True:
            step = list(islice(micro_batches, self.place.accumulation))
            self.samples += self.place.total
            yield step

    def state_dict(self) -> dict[str, int]:
        return {"samples": self.samples}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.samples = state["samples"]

    def epochs(self, run_tokens: int) -> float:
        return run_tokens / sum(len(source) for source in self.sources)

    def describe(self, run_tokens: int) -> str:
        tokens = sum(len(source) for source in self.sources)
        shards = sum(len(source.shards) for source in self.sources)
        mixture = ""
        if len(self.sources) > 1:
            shares = self.order.counts / self.order.counts.sum()
            mixture = "; mixture " + ", ".join(f"{s.folder} {p:.1%}" for s, p in zip(self.sources, shares, strict=True))
        return (
            f"{counted(shards, 'shard')}, {tokens:,} tokens of {self.tokenizer_name}, "
            f"{self.epochs(run_tokens):.2f} epochs planned, fingerprint {self.fingerprint[:12]}{mixture}"
        )

    def _read(self, begin: int, worker: int, workers: int) -> Iterator[Batch]:
        """Every `workers`-th of this rank's micro-batches from sample `begin` on, the first being number `worker`."""
        place, T, L = self.place, self.place.seq_len, self.place.local
        start, source, window = 0, np.empty(0, np.int64), np.empty(0, np.int64)
        for number in count(worker, workers):
            step, micro = divmod(number, place.accumulation)
            first = place.first_sample(begin + step * place.total, micro)
            if not start <= first < first + L <= start + len(source):
                # The order of many samples costs as much as that of one: look it up for what will be asked for next as well.
                start = first
                source, window = self.order.locate(np.arange(first, first + max(_AHEAD, L), dtype=np.int64))
            mine = slice(first - start, first - start + L)
            rows = [(self.sources[s], w * T) for s, w in zip(source[mine].tolist(), window[mine].tolist(), strict=True)]
            yield read_rows(rows, place, self.reset)


def _adds_bos(sources: list[TokenShards]) -> bool:
    """Whether documents begin with BOS; those of any source, which is said if others do not."""
    found = {source.manifest["adds_bos"]: source for source in reversed(sources)}
    if len(found) > 1:
        say_once(
            f"WARNING: documents of {str(found[True].folder)!r} begin with BOS, those of {str(found[False].folder)!r} do not; "
            "prompts will. If that is not meant, prepare one of them again"
        )
    return True in found


def read_rows(rows: list[tuple[TokenShards, int]], place: Place, reset: bool) -> Batch:
    """A micro-batch whose row i holds tokens [start, start + T) of its source, and the token after them as the last label.

    A row that reaches past the end of its source is filled up with ignored labels.
    """
    tokens, starts = np.empty((len(rows), place.seq_len + 1), dtype=np.int64), []
    for row, (source, start) in zip(tokens, rows, strict=True):
        length = min(len(row), len(source) - start)
        source.read(start, row[:length])
        row[length:] = IGNORE
        starts.append(source.document_starts(start, start + length))
    return make_batch(tokens, starts, place, reset)


class ValidationLoader:
    """Every held-out token once, in order, split over ranks; all ranks have the same number of batches.

    With `most`, only the first so many sequences: the same ones for any number of ranks.
    """

    def __init__(self, sources: list[TokenShards], place: Place, reset: bool, most: int | None = None) -> None:
        self.sources, self.place, self.reset = sources, place, reset
        self.rows = [(source, start) for source in sources for start in range(0, len(source) - 1, place.seq_len)][:most]
        self.fingerprint = " ".join(source.fingerprint for source in sources)
        self.text_bytes, tokens, documents = (
            sum(source.manifest[key] for source in sources) for key in ("text_bytes", "tokens", "documents")
        )
        predicted = tokens - documents  # the first token of a document is not
        self.bytes_per_token: float | None = self.text_bytes / predicted if predicted else None
        """Bytes of text per predicted token."""

    def __len__(self) -> int:
        return -(-len(self.rows) // self.place.total)

    def __iter__(self) -> Iterator[Batch]:
        padding = (self.sources[0], len(self.sources[0]))  # a row past the end: no labels
        for number in range(len(self)):
            first = self.place.first_sample(number * self.place.total, 0)
            rows = self.rows[first : first + self.place.local]
            yield read_rows(rows + [padding] * (self.place.local - len(rows)), self.place, self.reset)


def build_validation_loader(
    validation: config.Validation,
    data: config.Data,
    place: Place,
    vocab_size: int,
    trained: list[TokenShards],
    most: int | None = None,
) -> ValidationLoader:
    """The held-out loader, of at most `most` sequences.

    Raises UserError if it may hold what is in `trained`, the folders that training reads.
    """
    sources = open_shards(validation.paths, "validation.path", data.tokenizer, vocab_size)
    for training in trained:
        for held_out in sources:
            _refuse_overlap(training, held_out)
    loader = ValidationLoader(sources, place, data.document_boundaries == "reset", most)
    if not loader.rows:
        raise UserError(
            f"validation.path {str(sources[0].folder)!r} holds no token to predict; name other shards, or set "
            "validation.enable to false"
        )
    return loader


def _refuse_overlap(trained: TokenShards, held_out: TokenShards) -> None:
    validation_path, data_path = f"validation.path {str(held_out.folder)!r}", f"data.path {str(trained.folder)!r}"
    _refuse_two_tokenizers(trained, data_path, held_out, f"{validation_path} was made with tokenizer")
    same = trained.fingerprint == held_out.fingerprint
    # Documents are held out by hash below a threshold: a lower threshold for training lets some of them in.
    leaks = held_out.split == "validation" and (
        trained.split != "train" or trained.validation_fraction < held_out.validation_fraction
    )
    if same or leaks:
        raise UserError(
            f"{validation_path} may hold documents of {data_path}; use the train and validation folders of one "
            "`titan-dp prepare`"
        )


def _refuse_two_tokenizers(first: TokenShards, its_name: str, other: TokenShards, others_name: str) -> None:
    a, b = first.tokenizer, other.tokenizer
    if a.hash and b.hash and a.hash != b.hash:
        raise UserError(
            f"{others_name} {b.name!r}, {its_name} with {a.name!r}; prepare both with one (their hashes: {b.hash[:16]}..., "
            f"{a.hash[:16]}...)"
        )


def open_shards(paths: list[str], key: str, tokenizer: str, vocab_size: int) -> list[TokenShards]:
    """The folders that setting `key` names. Raises UserError if they, `data.tokenizer` and the model do not share one
    vocabulary.
    """
    for path in paths:
        require_shards(Path(path), tokenizer)
    opened = [TokenShards(Path(path)) for path in paths]
    first = opened[0].tokenizer
    for shards in opened:
        if shards.tokenizer.is_known(shards.folder):
            mixed = f"{key} mixes tokenizers: {str(shards.folder)!r} was made with"
            _refuse_two_tokenizers(opened[0], repr(str(opened[0].folder)), shards, mixed)
        if shards.vocab_size > vocab_size:
            raise UserError(
                f"model.vocab_size = {vocab_size} is too small for {key} {str(shards.folder)!r}, whose tokenizer "
                f"{shards.tokenizer.name!r} has {shards.vocab_size} ids; set model.vocab_size to at least that"
            )
    # Of the same name only what lies here can have changed; anything else would be asked for in vain where there is no network.
    asked = tokenizer and (tokenizer != first.name or tokenizer_file(tokenizer).exists())
    if asked and not (named := load_tokenizer(tokenizer)).has_hash(first.hash):
        raise UserError(
            f"data.tokenizer = {tokenizer!r}, but {key} {str(opened[0].folder)!r} was made with {first.name!r} (hash "
            f"{first.hash[:16]}..., data.tokenizer has {named.hash[:16]}...); drop data.tokenizer or prepare the data again"
        )
    return opened
