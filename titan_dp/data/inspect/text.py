"""Ids as people can read them: special tokens visible, nothing that a terminal obeys, and ids where there is no tokenizer."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np

from titan_dp.data.shards import TokenShards
from titan_dp.data.tokenizer import Tokenizer, load_tokenizer
from titan_dp.errors import UserError
from titan_dp.files import shorten


class Piece(NamedTuple):
    """Text that is shown, or a special token."""

    text: str
    special: bool = False


class Decoder:
    """The tokenizer that shards were made with.

    Args:
        source: shards.
        name: where the tokenizer is now, if not under the name that the shards know.
    """

    def __init__(self, source: TokenShards, name: str = "") -> None:
        made = source.tokenizer
        self.name, self.hash, self.vocab_size = made.name, made.hash, made.vocab_size
        self.tokenizer: Tokenizer | None = None
        self.problem = ""
        """Why there is none."""
        try:
            found = load_tokenizer(name or made.name)
            if found.has_hash(made.hash):
                self.tokenizer = found
            else:
                self.problem = f"the tokenizer {name or made.name!r} of today is not the one that {source.folder} was made with"
        except UserError as error:
            self.problem = shorten(str(error), 400)
        marks = {} if self.tokenizer is None else self.tokenizer.special_tokens
        own = {made.bos_id: "BOS", made.eos_id: "EOS"}
        self.specials = {i: t for i, t in own.items() if i is not None} | {i: t for t, i in marks.items()}
        self.is_bytes = self.tokenizer is not None and made.name == "bytes"
        """Whether an id below 256 is that byte."""
        self.begins = cache(lambda token: self.tokenizer is None or not self.decode(np.array([token])).startswith("\ufffd"))
        """Whether a character may begin with this token."""

    def decode(self, ids: np.ndarray) -> str:
        """Text of ids, bytes that are not UTF-8 as U+FFFD; ids without a token, or all without a tokenizer, as '[id]'."""
        if self.tokenizer is None:
            return " ".join(map(str, ids.tolist()))
        known = ids.tolist()
        try:
            if len(ids) == 0 or int(ids.max()) < self.vocab_size:
                return self.tokenizer.decode(known)
        except BaseException as error:  # tokenizers panics, which is a BaseException
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
        return f"[{known[0]}]" if len(known) == 1 else "".join(self.decode(np.array([token])) for token in known)

    def pieces(self, ids: np.ndarray) -> list[Piece]:
        """Text and special tokens in turn."""
        found: list[Piece] = []
        start = 0
        for place in np.flatnonzero(np.isin(ids, list(self.specials))).tolist():
            if place > start:
                found.append(Piece(self.decode(ids[start:place])))
            found.append(Piece(self.specials[int(ids[place])], special=True))
            start = place + 1
        return found + [Piece(self.decode(ids[start:]))] * (start < len(ids))

    def token(self, token: int) -> str:
        """One token, in quotes if it is text; '' without a tokenizer."""
        if token in self.specials:
            return self.specials[token]
        return "" if self.tokenizer is None else f"'{self.decode(np.array([token]))}'"
