"""Text to ids and back: one small interface over tiktoken encodings and Hugging Face tokenizers.

`load_tokenizer` takes the embedded "bytes", the name of a tiktoken encoding, a local `.tiktoken` rank file, or a folder or
Hub name of a Hugging Face tokenizer. Special tokens in the text are ordinary text; only `bos_id` and `eos_id` are used,
and only by those who add them. The hash names the vocabulary: token shards keep it, so that ids are never read with
another tokenizer. A tokenizer that `titan-dp export` converted keeps the hash of what it was (`ORIGIN` in its settings).
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from titan_dp.errors import UserError
from titan_dp.files import as_unicode, shorten

if TYPE_CHECKING:
    import tiktoken

# cl100k_base's rule for splitting text before merging, for rank files that come without one.
_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
ORIGIN = "titan_dp_origin"
"""Entry of an exported tokenizer_config.json: {"hash": ...} of the tokenizer it was converted from."""
_ALTERNATIVES = "use 'bytes' (built in), a local .tiktoken rank file or the folder of a Hugging Face tokenizer"


@dataclass(frozen=True)
class Tokenizer:
    """A vocabulary and its two directions."""

    name: str
    hash: str
    """sha256 of the vocabulary and the splitting rule."""
    vocab_size: int
    """One more than the largest id."""
    bos_id: int | None
    eos_id: int | None
    special_tokens: dict[str, int]
    """All tokens that no text encodes to, bos and eos among them."""
    encode_arrays: Callable[[list[str]], list[np.ndarray]]
    """Ids of each text as an array of an unsigned type, without bos or eos; a lone surrogate is read as U+FFFD.

    Several threads may call it at once, and it computes without the interpreter's lock.
    """
    decode: Callable[[list[int]], str]
    """Text of ids; bytes that are not UTF-8 become U+FFFD."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that `name` means (see the module's docstring).

    Raises UserError if there is none, or if it would have to be downloaded and cannot be.
    """
    encoding = tiktoken_encoding(name)
    return _from_hugging_face(name) if encoding is None else _from_tiktoken(encoding)


def tiktoken_encoding(name: str) -> tiktoken.Encoding | None:
    """The encoding of that name or rank file; None for any other name. Raises UserError as `load_tokenizer`."""
    import tiktoken

    if name == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
        special = {"<|bos|>": 256, "<|eos|>": 257}
        return tiktoken.Encoding("bytes", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens=special)
    if name.endswith(".tiktoken"):
        return _read_rank_file(Path(name))
    if name not in tiktoken.list_encoding_names():
        return None
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # requests' errors, or whatever a proxy makes of them
        raise UserError(f"tokenizer {name!r} has to be downloaded and cannot be ({_short(error)}); {_ALTERNATIVES}") from error


def _from_tiktoken(encoding: tiktoken.Encoding) -> Tokenizer:
    special = encoding._special_tokens

    def encode(text: str) -> np.ndarray:
        text = as_unicode(text)
        if encoding.name == "bytes":  # they are their own ids
            return np.frombuffer(text.encode(), dtype=np.uint8)
        return encoding.encode_to_numpy(text, disallowed_special=())

    vocabulary = sorted((rank, token.hex()) for token, rank in encoding._mergeable_ranks.items())
    digest = hashlib.sha256(json.dumps([encoding._pat_str, vocabulary, sorted(special.items())]).encode()).hexdigest()
    return Tokenizer(
        name=encoding.name,
        hash=digest,
        vocab_size=encoding.n_vocab,
        bos_id=special.get("<|bos|>"),
        eos_id=special.get("<|eos|>", special.get("<|endoftext|>")),
        special_tokens=dict(special),
        encode_arrays=lambda texts: [encode(text) for text in texts],
        decode=encoding.decode,
    )


def _read_rank_file(path: Path) -> tiktoken.Encoding:
    import tiktoken

    # Not tiktoken.load: that caches by path, so that a file changed since would be read as it was.
    try:
        pairs = (line.split() for line in path.read_bytes().splitlines() if line.strip())
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except FileNotFoundError:
        raise UserError(f"tokenizer {str(path)!r}: there is no such rank file") from None
    except ValueError as error:
        raise UserError(f"tokenizer {str(path)!r} is not a tiktoken rank file: {_short(error)}") from error
    if len(ranks) < 256:
        raise UserError(f"tokenizer {str(path)!r} is not a tiktoken rank file: it has {len(ranks)} tokens, not even all bytes")
    special = {"<|endoftext|>": max(ranks.values()) + 1}
    return tiktoken.Encoding(str(path), pat_str=_SPLIT, mergeable_ranks=ranks, special_tokens=special)


def hugging_face_folder(name: str) -> Path:
    """The folder with the tokenizer.json that `name`, a folder or a Hub name, means. Raises UserError as `load_tokenizer`."""
    folder = Path(name)
    try:
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(name, allow_patterns=["tokenizer.json", "tokenizer_config.json"], etag_timeout=10))
        if not (folder / "tokenizer.json").is_file():
            raise FileNotFoundError("it has no tokenizer.json, and code of a tokenizer's own is never run")
    except Exception as error:
        import tiktoken

        raise UserError(
            f"tokenizer {name!r} is no tiktoken encoding ({', '.join(tiktoken.list_encoding_names())}), no folder with a "
            f"tokenizer.json, and cannot be had from the Hugging Face Hub ({_short(error)}); {_ALTERNATIVES}"
        ) from error
    return folder


def read_settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json of a folder, {} if there is none: bos_token and eos_token are str or None, ORIGIN is
    {"name": str, "hash": str} or absent. Raises UserError for anything else.
    """
    path = folder / "tokenizer_config.json"
    if not path.exists():
        return {}
    try:
        settings = json.loads(path.read_text())
        for role in ("bos_token", "eos_token"):
            token = settings.get(role)
            settings[role] = token["content"] if isinstance(token, dict) else token
            if not isinstance(settings[role], str | None):
                raise ValueError(f"{role} = {token!r}")
        origin = settings.get(ORIGIN)
        if origin is not None and not (isinstance(origin["name"], str) and isinstance(origin["hash"], str)):
            raise ValueError(f"{ORIGIN} = {origin!r}")
        return settings
    except (ValueError, OSError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is not a tokenizer's settings ({shorten(str(error))}); take it from where the tokenizer comes from"
        ) from error


def _from_hugging_face(name: str) -> Tokenizer:
    from tokenizers import Tokenizer as HFTokenizer

    folder = hugging_face_folder(name)
    try:
        backend = HFTokenizer.from_file(str(folder / "tokenizer.json"))
        vocabulary = backend.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise ValueError("it has no tokens")
    except BaseException as error:  # tokenizers raises plain Exception, or panics, which is a BaseException
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise UserError(f"{folder / 'tokenizer.json'} is no tokenizer ({_short(error)}); {_ALTERNATIVES}") from error
    backend.encode_special_tokens = True  # in a text they are ordinary text
    # Saved with the tokenizer by who had inference in mind, they would cut every document, or fill it up.
    backend.no_truncation()
    backend.no_padding()
    declared = read_settings(folder)

    def id_of(role: str) -> int | None:
        token = declared.get(role)
        return None if token is None else vocabulary.get(token)

    def encode_arrays(texts: list[str]) -> list[np.ndarray]:
        texts = [as_unicode(text) for text in texts]
        found = backend.encode_batch_fast(texts, add_special_tokens=False)  # without offsets, which nobody reads
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in found]

    return Tokenizer(
        name=name,
        hash=declared.get(ORIGIN, {}).get("hash") or hashlib.sha256(backend.to_str().encode()).hexdigest(),
        vocab_size=max(vocabulary.values()) + 1,
        bos_id=id_of("bos_token"),
        eos_id=id_of("eos_token"),
        special_tokens={t.content: i for i, t in backend.get_added_tokens_decoder().items() if t.special},
        encode_arrays=encode_arrays,
        decode=lambda ids: backend.decode(ids, skip_special_tokens=False),
    )


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
