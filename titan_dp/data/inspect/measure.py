"""What can be counted in token shards, in little memory however many there are: lengths, ids, text, duplicates.

Lengths come from the offsets of the documents and are exact. Ids and duplicates are exact up to `ALL` tokens and text up to
`TEXT`, or always if everything is to be read. Beyond that:

- ids and text are those of the documents that begin in `WINDOWS` windows of `WINDOW` tokens. The windows are drawn at random
  without repetition from a grid, so each document has the same chance.
- duplicates are sought among all documents of some lengths, drawn at random until they hold `ALL / 4` tokens. Equal documents
  have equal lengths, so all copies are in such a sample or none. Among documents drawn one by one, copies would hardly ever
  meet, and there would seem to be none.
- if that, or everything, is more than `KEPT` documents, those are compared whose hash ends in so many zeros that they fit.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import xxhash

from titan_dp.data.inspect.text import Decoder
from titan_dp.data.shards import TokenShards
from titan_dp.output import Progress

ALL, TEXT = 2**28, 2**24
"""Tokens that are read whole: for ids and duplicates, and decoded."""
WINDOW, WINDOWS = 2**16, 2**8
KEPT = 2**23
"""Documents whose hashes are kept, 24 bytes each."""
LARGEST_VOCABULARY = 2**24
"""An order of magnitude above any tokenizer's; a manifest from elsewhere may say more, and each id takes memory."""
_PART = 2**20
"""Tokens of a document that are counted or decoded at once."""
_CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f]")
"""Control characters that no text needs: all but tab, line feed, form feed and carriage return."""
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Bin(NamedTuple):
    """Documents of `least` to `most` tokens."""

    least: int
    most: int
    documents: int
    tokens: int


class Lengths:
    """How many documents have each length: exact, in memory that grows with the root of the tokens, since they differ."""

    def __init__(self) -> None:
        self.values = np.empty(0, np.int64)
        """Lengths in tokens, rising."""
        self.counts = np.empty(0, np.int64)

    def add(self, lengths: np.ndarray, counts: np.ndarray | None = None) -> None:
        """Take documents of `lengths` [n] int64 tokens, or `counts` [n] of each."""
        counts = np.ones(len(lengths), np.int64) if counts is None else counts
        self.values, place = np.unique(np.concatenate([self.values, lengths]), return_inverse=True)
        merged = np.zeros(len(self.values), np.int64)
        np.add.at(merged, place, np.concatenate([self.counts, counts]))
        self.counts = merged

    @property
    def documents(self) -> int:
        return int(self.counts.sum())

    @property
    def tokens(self) -> int:
        return int(self.values @ self.counts)

    def quantile(self, share: float) -> int:
        """The least length that `share` of the documents do not exceed."""
        return int(self.values[np.searchsorted(np.cumsum(self.counts), max(1, math.ceil(share * self.documents - 1e-9)))])

    def above(self, most: int) -> tuple[int, int]:
        """Documents longer than `most` tokens, and their tokens."""
        longer = self.values > most
        return int(self.counts[longer].sum()), int(self.values[longer] @ self.counts[longer])

    def histogram(self) -> list[Bin]:
        """From each power of two to the next, from the shortest document to the longest."""
        least, most = int(self.values[0]), int(self.values[-1])
        edges = [2**k for k in range(least.bit_length() - 1, most.bit_length() + 1)]
        bins = []
        for low, high in pairwise(edges):
            here = slice(*np.searchsorted(self.values, [low, high]))
            bins.append(Bin(low, high - 1, int(self.counts[here].sum()), int(self.values[here] @ self.counts[here])))
        return bins


@dataclass
class Ids:
    """Which ids occur, of one tokenizer."""

    vocab_size: int
    bos: int | None
    eos: int | None
    counts: np.ndarray = field(init=False)
    """[vocab_size] int64."""
    outside: int = 0
    """Ids that the vocabulary has not."""
    first_outside: tuple[int, int, int] | None = None
    """The first one: folder, document, id."""
    documents: int = 0
    tokens: int = 0
    begin_with_bos: int = 0
    end_with_eos: int = 0

    def __post_init__(self) -> None:
        self.counts = np.zeros(self.vocab_size, np.int64)

    def add(self, folder: int, number: int, bounds: np.ndarray, ids: np.ndarray) -> None:
        """Take the documents that `TokenShards.documents` yields."""
        for start in range(0, len(ids), _PART):
            part = ids[start : start + _PART]
            inside = part < self.vocab_size
            if not inside.all():
                if self.first_outside is None:
                    place = start + int(np.argmin(inside))
                    document = number + int(np.searchsorted(bounds, bounds[0] + place, side="right")) - 1
                    self.first_outside = folder, document, int(ids[place])
                self.outside += int((~inside).sum())
                part = part[inside]
            self.counts += np.bincount(part, minlength=self.vocab_size)
        self.tokens += len(ids)
        self.documents += len(bounds) - 1
        first, last = ids[bounds[:-1] - bounds[0]], ids[bounds[1:] - bounds[0] - 1]
        self.begin_with_bos += 0 if self.bos is None else int((first == self.bos).sum())
        self.end_with_eos += 0 if self.eos is None else int((last == self.eos).sum())

    def elsewhere(self, token: int | None, at_its_place: int) -> int:
        """How often BOS or EOS occur within documents."""
        if token is None or token >= self.vocab_size:
            return 0
        # One token may be both.
        return int(self.counts[token]) - (self.begin_with_bos + self.end_with_eos if self.bos == self.eos else at_its_place)


class Text:
    """What documents are made of once they are text again."""

    def __init__(self) -> None:
        self.documents = self.tokens = self.characters = self.bytes = self.replaced = self.invalid = self.affected = 0
        self.controls: Counter[str] = Counter()
        self.first: tuple[int, int] | None = None
        """Folder and document of the first thing that is not text."""

    @property
    def control_bytes(self) -> int:
        return sum(len(character.encode()) * count for character, count in self.controls.items())

    @property
    def not_text(self) -> int:
        """Bytes that are control characters, U+FFFD or not UTF-8."""
        return self.control_bytes + 3 * self.replaced + self.invalid

    def add(self, decoder: Decoder, folder: int, number: int, ids: np.ndarray) -> None:
        """Take a document, without its BOS and EOS."""
        before = self.not_text
        for part in _parts(decoder, ids):
            if decoder.is_bytes:
                raw = part[part < 256].astype(np.uint8).tobytes()
                text = raw.decode(errors="ignore")
                self.bytes += len(raw)
                self.invalid += len(raw) - len(text.encode())
            else:
                text = decoder.decode(part)
                self.bytes += len(text.encode(errors="replace"))
            self.characters += len(text)
            self.replaced += text.count(_REPLACEMENT)
            self.controls.update(_CONTROL.findall(text))
        self.documents += 1
        self.tokens += len(ids)
        if self.not_text > before:
            self.affected += 1
            self.first = self.first or (folder, number)


def _parts(decoder: Decoder, ids: np.ndarray) -> Iterator[np.ndarray]:
    """`ids` in parts that fit in memory; none begins within a character, as far as one can see."""
    start = 0
    while len(ids) - start > _PART:
        stop = next(
            (at for at in range(start + _PART, start + _PART - 4096, -1) if decoder.begins(int(ids[at]))), start + _PART
        )
        yield ids[start:stop]
        start = stop
    yield ids[start:]


class Group(NamedTuple):
    """Equal documents."""

    copies: int
    tokens: int
    """Of each of them, without BOS and EOS."""
    folder: int
    document: int
    """Where the first one is."""


class Duplicates:
    """Documents that are equal by xxh3_64 of their ids, BOS and EOS left out; empty documents do not count."""

    def __init__(self, widen: bool) -> None:
        self.widen = widen
        """Whether folders have ids of different widths."""
        self.every = 1
        """Only hashes that this power of two divides are kept."""
        self._rows: list[np.ndarray] = []
        self._kept = 0
        self.documents = self.repeats = self.tokens = self.repeated_tokens = 0
        """Compared; of these, equal to an earlier one; and their tokens."""
        self.groups: list[Group] = []
        """Those of most copies."""
        self.elsewhere: dict[int, int] = {}
        """Documents of each folder that are in another folder too."""

    def add(self, folder: int, seed: int, numbers: Iterable[int], documents: Iterable[np.ndarray]) -> None:
        """Take documents, as ids without BOS and EOS, and their numbers in the folder; `seed` stands for the tokenizer."""
        rows = []
        for number, ids in zip(numbers, documents, strict=True):
            if len(ids):
                found = xxhash.xxh3_64_intdigest((ids.astype(np.uint32) if self.widen else ids).data, seed)
                if found % self.every == 0:
                    rows.append((found, number, len(ids)))
        if not rows:
            return
        added = np.empty(
            len(rows), dtype=[("hash", np.uint64), ("number", np.int64), ("tokens", np.int64), ("folder", np.int32)]
        )
        added["folder"] = folder
        for name, values in zip(("hash", "number", "tokens"), zip(*rows, strict=True), strict=True):
            added[name] = np.array(values, dtype=added.dtype[name])  # without a dtype, hashes from 2^63 on would be rounded
        self._rows.append(added)
        self._kept += len(added)
        while self._kept > KEPT:
            self.every *= 2
            self._rows = [np.concatenate([rows[rows["hash"] % np.uint64(self.every) == 0] for rows in self._rows])]
            self._kept = len(self._rows[0])

    def finish(self, most: int = 5) -> None:
        """Compare, and keep the `most` groups of most copies."""
        if not self._rows:
            return
        rows = np.concatenate(self._rows)
        self._rows = []
        rows = rows[np.argsort(rows["hash"], kind="stable")]  # within a group they stay in order
        begins = np.flatnonzero(np.append(True, rows["hash"][1:] != rows["hash"][:-1]))
        copies = np.diff(np.append(begins, len(rows)))
        tokens = rows["tokens"][begins]
        self.documents, self.repeats = len(rows), len(rows) - len(begins)
        self.tokens, self.repeated_tokens = int(rows["tokens"].sum()), int((tokens * (copies - 1)).sum())
        firsts = rows[begins]
        order = np.lexsort([firsts["number"], firsts["folder"], -tokens, -copies])
        self.groups = [
            Group(int(copies[i]), int(tokens[i]), int(firsts["folder"][i]), int(firsts["number"][i]))
            for i in order[:most]
            if copies[i] > 1
        ]
        lowest, highest = np.minimum.reduceat(rows["folder"], begins), np.maximum.reduceat(rows["folder"], begins)
        shared = np.repeat(lowest != highest, copies)
        self.elsewhere = {int(f): int(n) for f, n in zip(*np.unique(rows["folder"][shared], return_counts=True), strict=True)}


def body(source: TokenShards, ids: np.ndarray) -> np.ndarray:
    """A document without the BOS and EOS that prepare put around it."""
    made = source.manifest
    if made["adds_bos"] and len(ids) and ids[0] == source.tokenizer.bos_id:
        ids = ids[1:]
    if made["adds_eos"] and len(ids) and ids[-1] == source.tokenizer.eos_id:
        ids = ids[:-1]
    return ids


def count_lengths(sources: Sequence[TokenShards], state: Progress) -> list[Lengths]:
    """Of each folder, exactly."""
    found = [Lengths() for _ in sources]
    for source, lengths in zip(sources, found, strict=True):
        for _, bounds, _ in source.documents():
            lengths.add(np.diff(bounds))
            state.advance(len(bounds) - 1)
    return found


Window = tuple[int, int, int]
"""Folder, and the positions between which documents begin."""


def whole(sources: Sequence[TokenShards]) -> list[Window]:
    return [(folder, 0, len(source)) for folder, source in enumerate(sources)]


def draw_windows(sources: Sequence[TokenShards], seed: int) -> list[Window]:
    """Up to `WINDOWS` of them, in order."""
    ends = np.cumsum([-(-len(source) // WINDOW) for source in sources])
    total = int(ends[-1])
    rng = np.random.default_rng([seed, 1])
    drawn: set[int] = set()
    while len(drawn) < min(WINDOWS, total):
        drawn.add(int(rng.integers(total)))
    windows = []
    for index in sorted(drawn):
        folder = int(np.searchsorted(ends, index, side="right"))
        start = (index - (int(ends[folder - 1]) if folder else 0)) * WINDOW
        windows.append((folder, start, min(start + WINDOW, len(sources[folder]))))
    return windows


def draw_lengths(lengths: Lengths, seed: int) -> tuple[np.ndarray, bool]:
    """Lengths whose documents hold up to `ALL / 4` tokens in all, and whether one was passed over that holds more alone."""
    room, drawn, too_many = ALL // 4, [], False
    for i in np.random.default_rng([seed, 2]).permutation(len(lengths.values)).tolist():
        tokens = int(lengths.values[i] * lengths.counts[i])
        too_many |= tokens > ALL // 4
        if 0 < tokens <= room:
            drawn.append(int(lengths.values[i]))
            room -= tokens
        elif room < ALL // 64:
            break
    return np.array(sorted(drawn), np.int64), too_many
