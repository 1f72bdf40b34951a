"""Tokenizers that are tables of ranks, as tiktoken encodings: "bytes", tiktoken's own, and the files that people have.

    bytes                one token a byte; built in
    gpt2, cl100k_base    a name that tiktoken knows; it downloads the ranks
    x.tiktoken           a file of ranks, a token in base64 and its number a line; split as cl100k_base splits
    tokenizer.model      the same format with Llama 3's special tokens behind the ranks
    tekken.json          Mistral's, read by mistral-common; its special tokens come before the ranks

Raises UserError for what is no such file, and for what cannot be downloaded.
"""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import TYPE_CHECKING

from titan_dp.errors import UserError, in_words, passing_fault, require

if TYPE_CHECKING:
    import tiktoken

ALTERNATIVES = "use 'bytes' (built in), a local .tiktoken rank file or the folder of a Hugging Face tokenizer"

# cl100k_base's rule for splitting text before merging, for rank files that come without one. It is Llama 3's as well.
_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\s*")

# github.com/meta-llama/llama3, llama/tokenizer.py. Later versions give some of the reserved ones other names.
_LLAMA_3_RANKS = 128_000
_LLAMA_3_SPECIAL = [
    *("<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{i}|>" for i in range(4))),
    *("<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>"),
    *(f"<|reserved_special_token_{i}|>" for i in range(5, 251)),
]


def tiktoken_encoding(name: str) -> tiktoken.Encoding | None:
    """The encoding of that name or file; None for any other name."""
    import tiktoken

    if name == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
        special = {"<|bos|>": 256, "<|eos|>": 257}
        return tiktoken.Encoding("bytes", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens=special)
    path = Path(name)
    if path.suffix == ".tiktoken":
        ranks = _read_ranks(path)
        return _encoding(name, ranks, {"<|endoftext|>": max(ranks.values()) + 1})
    if path.suffix == ".model" and is_rank_file(path):
        return _llama_3(path)
    if path.suffix == ".json" and path.name != "tokenizer.json":
        return _tekken(path)
    if name not in tiktoken.list_encoding_names():
        return None
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # requests' errors, or whatever a proxy makes of them
        why = reason(error) if (fault := passing_fault(error)) is None else in_words(fault)
        raise UserError(f"tokenizer {name!r} has to be downloaded and cannot be ({why}); {ALTERNATIVES}") from error


def is_rank_file(path: Path) -> bool:
    """Whether the first line is one of ranks. Raises UserError if there is no file."""
    try:
        with path.open("rb") as file:
            return _RANK_LINE.fullmatch(file.readline(1000)) is not None
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"tokenizer {str(path)!r}: there is no such file") from None


def reason(error: BaseException) -> str:
    """The kind of `error` and its first line."""
    return f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"


def _encoding(name: str, ranks: dict[bytes, int], special: dict[str, int], split: str = _SPLIT) -> tiktoken.Encoding:
    import tiktoken

    try:
        return tiktoken.Encoding(name, pat_str=split, mergeable_ranks=ranks, special_tokens=special)
    except BaseException as error:  # it panics at some tables, which is a BaseException
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise UserError(f"tokenizer {name!r} is damaged ({reason(error)}); take it from where it comes from") from error


def _read_ranks(path: Path) -> dict[bytes, int]:
    # Not tiktoken.load: that caches by path, so that a file changed since would be read as it was.
    try:
        pairs = (line.split() for line in path.read_bytes().splitlines() if line.strip())
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except FileNotFoundError:
        raise UserError(f"tokenizer {str(path)!r}: there is no such rank file") from None
    except ValueError as error:
        raise UserError(f"tokenizer {str(path)!r} is not a tiktoken rank file: {reason(error)}") from error
    if len(ranks) < 256:
        raise UserError(f"tokenizer {str(path)!r} is not a tiktoken rank file: it has {len(ranks)} tokens, not even all bytes")
    return ranks


def _llama_3(path: Path) -> tiktoken.Encoding:
    ranks = _read_ranks(path)
    if len(ranks) > _LLAMA_3_RANKS:
        raise UserError(
            f"tokenizer {str(path)!r} has {len(ranks):,} ranks, more than Llama 3's {_LLAMA_3_RANKS:,}: its rule for splitting "
            "text is not known; name the folder of the model's Hugging Face release, which has a tokenizer.json"
        )
    first = max(ranks.values()) + 1
    return _encoding(str(path), ranks, {token: first + i for i, token in enumerate(_LLAMA_3_SPECIAL)})


def _tekken(path: Path) -> tiktoken.Encoding:
    if not path.is_file():
        raise UserError(f"tokenizer {str(path)!r}: there is no such file")
    require(f"tokenizer {str(path)!r}", "mistral_common")
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    try:
        read = Tekkenizer.from_file(path)
    except Exception as error:  # it asserts, and looks entries up
        raise UserError(
            f"tokenizer {str(path)!r} is neither a tokenizer.json nor a tekken.json ({reason(error)}); {ALTERNATIVES}"
        ) from error
    special = {token["token_str"]: token["rank"] for token in read._all_special_tokens}
    ranks = {token: rank + read.num_special_tokens for token, rank in read._model._mergeable_ranks.items()}
    return _encoding(str(path), ranks, special, read._model._pat_str)
