"""Documents to ids in batches, by several threads, in bounded memory and in the order of the input.

Tokenizers compute without the interpreter's lock, so threads are as fast as processes, share one vocabulary and its cache, and
cannot outlive the command. A batch is some whole documents, or one piece of a document that is longer than a batch. Pieces end
where a word does, and each is encoded behind the last words of the one before it, so that their ids are those of the whole
text with every tokenizer that divides texts between words. Others may join tokens across a cut, and do not here.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import NamedTuple

import numpy as np

from titan_dp.data.sources import Account, Documents
from titan_dp.data.tokenizer import Tokenizer
from titan_dp.errors import UserError
from titan_dp.files import Replaced

_BATCH_DOCUMENTS = 1024  # at most, so that a batch of short ones is soon done
_CONTEXT = 64  # characters before a piece that it is encoded behind
_BETWEEN_WORDS = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])")
_BEFORE_SPACE = re.compile(r"(?<=\S)(?=\s)")


class Mark(NamedTuple):
    """What is known of the input behind a batch, if no document goes on there."""

    place: tuple[int, int]
    account: Account
    replaced: tuple[int, int, str]


@dataclass
class Batch:
    texts: list[str] = field(default_factory=list)
    where: list[str] = field(default_factory=list)
    """Of each text; for messages."""
    context: str | None = None
    """The text is one piece of a document; this is what comes before it in there. None: texts are whole documents."""
    last: bool = True
    """The piece is the last of its document."""
    dropped: bool = False
    """What was read of its document cannot be used."""
    sha256: bytes = b""
    """Of the whole document, with its last piece."""
    read_so_far: int = 0
    mark: Mark | None = None


class Run(NamedTuple):
    """Documents of one split, one after another."""

    ids: np.ndarray
    """[tokens], with BOS and EOS."""
    lengths: np.ndarray
    """[documents] int64, in tokens."""
    text_bytes: np.ndarray
    """[documents] int64."""


class Encoded(NamedTuple):
    batch: Batch
    runs: list[Run]
    """Of documents to train on and of those held out; of a piece, one without BOS and EOS."""
    refused: list[UserError]
    """Documents that the tokenizer cannot encode."""


@dataclass
class Encoder:
    """How documents become runs.

    Args:
        before, after: ids around every document.
        held_out: share of documents that are held out, by the hash of their texts.
        dtype: of ids.
        characters: of a batch, at most.
    """

    tokenizer: Tokenizer
    before: list[int]
    after: list[int]
    held_out: float
    dtype: np.dtype
    characters: int

    def run(self, documents: Documents, replaced: Replaced, workers: int) -> Iterator[Encoded]:
        """Everything, in order; at most two batches a thread are read ahead. With one worker there is no thread."""
        batches = self._batches(documents, replaced)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads of its own would wait for each other
        if workers <= 1:
            yield from map(self._encode, batches)
            return
        pool = ThreadPoolExecutor(workers)
        try:
            flying: deque[Future[Encoded]] = deque(pool.submit(self._encode, b) for b in islice(batches, 2 * workers))
            while flying:
                yield flying.popleft().result()
                flying.extend(pool.submit(self._encode, b) for b in islice(batches, 1))
        finally:  # after a Ctrl-C, too: nobody reads what is in flight any more
            pool.shutdown(wait=False, cancel_futures=True)

    @property
    def drops_empty(self) -> bool:
        """Whether nothing is kept of a document without ids: alone, one separator would follow another."""
        return not (self.before and self.after)

    def is_held_out(self, sha256: bytes) -> bool:
        return int.from_bytes(sha256[:8], "big") < int(self.held_out * 2**64)

    def _batches(self, documents: Documents, replaced: Replaced) -> Iterator[Batch]:
        def closed(batch: Batch, whole: bool = True) -> Batch:
            batch.read_so_far = documents.read_so_far()
            if whole:
                seen = replaced.characters, replaced.texts, replaced.first
                batch.mark = Mark(documents.place, replace(documents.account), seen)
            return batch

        batch, size = Batch(), 0
        for where, text in documents:
            if isinstance(text, str) and len(text) <= self.characters:
                text = replaced(text, where)
                documents.account.empty += not text
                batch.texts.append(text)
                batch.where.append(where)
                size += len(text)
                if len(batch.texts) == _BATCH_DOCUMENTS or size >= self.characters:
                    yield closed(batch)
                    batch, size = Batch(), 0
                continue
            if batch.texts:
                yield closed(batch, whole=False)  # its place is behind the document at hand
            batch, size = Batch(), 0
            digest, context = hashlib.sha256(), ""
            pieces = cut(text, self.characters)
            while True:
                try:
                    piece, last = next(pieces)
                except UserError as error:
                    documents.refuse(error)
                    yield closed(Batch(context="", dropped=True))
                    break
                piece = replaced(piece, where)
                digest.update(piece.encode())
                found = Batch([piece], [where], context, last, sha256=digest.digest() if last else b"")
                yield closed(found, whole=last)
                if last:
                    break
                context = _last_words(piece)
        yield closed(batch)  # empty, too: its mark is the end of the input

    def _encode(self, batch: Batch) -> Encoded:
        if batch.dropped:
            return Encoded(batch, [], [])
        if batch.context is not None:
            return self._encode_piece(batch, batch.context)
        refused: list[UserError] = []
        arrays = self._arrays(batch, refused)
        split: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
        sizes: tuple[list[int], list[int]] = ([], [])
        for text, ids in zip(batch.texts, arrays, strict=True):
            if ids is not None:
                raw = text.encode()
                side = self.held_out > 0 and self.is_held_out(hashlib.sha256(raw).digest())
                split[side].append(ids)
                sizes[side].append(len(raw))
        return Encoded(batch, [self._run(*side) for side in zip(split, sizes, strict=True)], refused)

    def _arrays(self, batch: Batch, refused: list[UserError]) -> list[np.ndarray | None]:
        try:
            return list(self.tokenizer.encode_arrays(batch.texts)) if batch.texts else []
        except UserError:  # which one?
            found: list[np.ndarray | None] = []
            for text, where in zip(batch.texts, batch.where, strict=True):
                try:
                    found += self.tokenizer.encode_arrays([text])
                except UserError as error:
                    refused.append(UserError(f"{where}: {error}"))
                    found.append(None)
            return found

    def _run(self, arrays: list[np.ndarray], sizes: list[int]) -> Run:
        before, after = np.array(self.before, dtype=self.dtype), np.array(self.after, dtype=self.dtype)
        lengths = np.array([len(ids) for ids in arrays], dtype=np.int64)
        lengths += (len(before) + len(after)) * (lengths > 0 if self.drops_empty else 1)
        parts = arrays
        if len(before) or len(after):
            parts = [part for ids in arrays if len(ids) or not self.drops_empty for part in (before, ids, after)]
        ids = np.concatenate(parts, dtype=self.dtype, casting="unsafe") if parts else np.empty(0, self.dtype)
        return Run(ids, lengths, np.array(sizes, dtype=np.int64))

    def _encode_piece(self, batch: Batch, context: str) -> Encoded:
        (text,) = batch.texts
        try:
            ids = self._behind(context, text)
        except UserError as error:
            return Encoded(batch, [], [UserError(f"{batch.where[0]}: {error}")])
        ids = ids.astype(self.dtype)
        return Encoded(batch, [Run(ids, np.array([len(ids)]), np.array([len(text.encode())]))], [])

    def _behind(self, context: str, text: str) -> np.ndarray:
        """The ids of `text` in a text that has `context` before it."""
        if context:
            known, both = self.tokenizer.encode_arrays([context, context + text])
            if np.array_equal(both[: len(known)], known):
                return both[len(known) :]
        return self.tokenizer.encode_arrays([text])[0]


def cut(text: str | Iterable[str], limit: int) -> Iterator[tuple[str, bool]]:
    """A text in pieces of at most `limit` characters, joined the same text: (piece, whether it is the last one)."""
    held = ""
    for part in [text] if isinstance(text, str) else text:
        for start in range(0, len(part), limit):
            held += part[start : start + limit]
            while len(held) > limit:
                end = _end_of_piece(held, limit)
                yield held[:end], False
                held = held[end:]
    yield held, True


def _end_of_piece(text: str, limit: int) -> int:
    """The best place to cut `text`, from limit / 2 to `limit`: between two words, before a space, or anywhere."""
    begin = max(limit // 2, limit - 4096)
    window = text[begin - 1 : limit + 2]
    for pattern in (_BETWEEN_WORDS, _BEFORE_SPACE):
        ends = [match.start() + begin - 1 for match in pattern.finditer(window)]
        if ends := [end for end in ends if begin <= end <= limit]:
            return ends[-1]
    return limit - ("\ud800" <= text[limit - 1] <= "\udbff")  # not between the halves of a character


def _last_words(piece: str) -> str:
    """The end of a piece, from between two words on if there is such a place near."""
    tail = piece[-_CONTEXT:]
    found = _BETWEEN_WORDS.search(tail)
    return tail[found.start() :] if found else tail
