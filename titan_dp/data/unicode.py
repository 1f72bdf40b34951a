"""One policy for text that is no Unicode: lone surrogates, which JSON ("\\ud800"), command lines and sloppy UTF-8 can hold.

No UTF-8 file can hold one, and tokenizers differ in what they make of it. So wherever text is read each is replaced by U+FFFD,
counted, and said. Two that make a pair become the character they mean. Bytes of a file that are no UTF-8 at all are another
mistake, a file of another encoding, and refused where files are read.
"""

from __future__ import annotations

import os
import re
import sys


def as_unicode(text: str) -> str:
    """`text` with every lone surrogate replaced."""
    return Replaced()(text)


class Replaced:
    """Replaces, and counts what it has replaced.

    Args:
        what: is counted, in the plural: "documents", "prompts".
    """

    def __init__(self, what: str = "texts") -> None:
        self.what = what
        self.characters = self.texts = 0
        self.first = ""
        """Where the first of them was."""

    def __call__(self, text: str, where: str = "") -> str:
        """`text` without lone surrogates; `where` it was found is for the message."""
        if text.isascii():  # known without looking
            return text
        try:
            text.encode()
            return text
        except UnicodeEncodeError:
            paired = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
            whole, count = re.subn("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", paired)
        if count:
            self.characters += count
            self.texts += 1
            self.first = self.first or where
        return whole

    def say(self) -> None:
        """One sentence on stderr, from the main rank, if anything was replaced."""
        if self.characters and os.environ.get("RANK", "0") == "0":
            first = f", the first in {self.first}" if self.first else ""
            print(
                f"warning: {self.characters:,} lone surrogate(s) in {self.texts:,} {self.what}{first}: no Unicode, replaced by "
                "U+FFFD",
                file=sys.stderr,
                flush=True,
            )
