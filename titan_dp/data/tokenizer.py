"""Text to ids and back: one small interface over tiktoken, SentencePiece and Hugging Face tokenizers.

`load_tokenizer` takes what `encodings.py` reads ("bytes", which is built in, the name of a tiktoken encoding, a
`.tiktoken` file, Llama 3's tokenizer.model, a tekken.json), a SentencePiece `.model`, a tokenizer.json, and a folder or Hub
name that holds one of these. Special tokens in the text are ordinary text; only `bos_id` and `eos_id` are used, and only by
those who add them.

The hash is the tokenizer's identity: of its vocabulary and its rules, so that ids are never read with another tokenizer,
whatever lies at the same path by then. Token shards, checkpoints and exports keep it. Settings for inference (truncation,
padding, dropout, templates) are switched off and are no part of it. A tokenizer that `titan-dp export` converted keeps the hash
of what it was (`ORIGIN` in its settings) for as long as it is what was written.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from titan_dp.data.encodings import ALTERNATIVES, reason, tiktoken_encoding
from titan_dp.errors import UserError, did_you_mean, passing_fault, require, say_once
from titan_dp.files import as_unicode, shorten

if TYPE_CHECKING:
    import tiktoken
    from tokenizers import Tokenizer as HFTokenizer

ORIGIN = "titan_dp_origin"
"""Entry of an exported tokenizer_config.json: {"name", "hash"} of the tokenizer it was converted from, and "written", the hash
of what was written."""
_BOS = ("<|bos|>", "<|begin_of_text|>", "<s>")
_EOS = ("<|eos|>", "<|endoftext|>", "<|end_of_text|>", "</s>")


@dataclass(frozen=True)
class Tokenizer:
    """A vocabulary and its two directions."""

    name: str
    hash: str
    """sha256 of the vocabulary and the rules."""
    vocab_size: int
    """One more than the largest id."""
    bos_id: int | None
    eos_id: int | None
    special_tokens: dict[str, int]
    """All tokens that no text encodes to, bos and eos among them."""
    encode_arrays: Callable[[list[str]], list[np.ndarray]]
    """Ids of each text as an array of an unsigned type, without bos or eos; a lone surrogate is read as U+FFFD.

    Several threads may call it at once, and it computes without the interpreter's lock. Raises UserError for a text that the
    library cannot encode.
    """
    decode: Callable[[list[int]], str]
    """Text of ids; bytes that are not UTF-8 become U+FFFD."""
    adds_bos: bool = True
    """Whether documents begin with BOS, if there is one and nobody says otherwise; for a model, whether its training's did."""
    earlier_hash: str = ""
    """What earlier versions of titan_dp took for the hash, if that was another."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def has_hash(self, expected: str) -> bool:
        """Whether this is the tokenizer of that hash; yes if `expected` is empty, because then nobody knows."""
        return expected in ("", self.hash, self.earlier_hash)

    def beginning(self, bos: bool | None = None) -> list[int]:
        """The ids before a text that goes on, such as a prompt: those before a document that no EOS ends (`separators`)."""
        return self.separators(bos, eos=False)[0]

    def separators(self, bos: bool | None = None, eos: bool | None = None) -> tuple[list[int], list[int]]:
        """The ids before and after every document: BOS and EOS if there are any, as far as they are wanted.

        If both are one token, it comes after the document, so that two never meet; before it if only BOS is wanted.

        Args:
            bos, eos: whether it is wanted; None: if there is one, and `adds_bos`.

        Raises UserError if a wanted one does not exist, or if both are wanted and are one token.
        """
        for role, wanted, token in (("bos", bos, self.bos_id), ("eos", eos, self.eos_id)):
            if wanted and token is None:
                raise UserError(f"--{role}: tokenizer {self.name!r} has no {role.upper()} token; leave the option out")
        bos = bos if bos is not None or self.adds_bos else False
        before = [] if bos is False or self.bos_id is None else [self.bos_id]
        after = [] if eos is False or self.eos_id is None else [self.eos_id]
        if before and before == after:
            if bos and eos:
                raise UserError(
                    f"--bos --eos: both are token {before[0]} of tokenizer {self.name!r}, and two would stand between "
                    "documents; leave one out"
                )
            before, after = (before, []) if bos else ([], after)
        return before, after

    def joined(self, remedy: str) -> str:
        """The sentence for documents without a separator between them, which ends in what to do."""
        lacking = [role for role, token in (("BOS", self.bos_id), ("EOS", self.eos_id)) if token is None]
        special = f" (its special tokens: {shorten(', '.join(self.special_tokens))})" if self.special_tokens else ""
        return (
            f"WARNING: documents are joined without a separator, because tokenizer {self.name!r} has no "
            f"{' and no '.join(lacking)}{special}; {remedy}, name a token as eos_token in its tokenizer_config.json"
        )


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that `name` means (see the module's docstring).

    Raises UserError if there is none, or if it would have to be downloaded and cannot be.
    """
    path = tokenizer_file(name)
    if (encoding := tiktoken_encoding(str(path))) is not None:
        return _from_tiktoken(encoding, name)
    return _from_sentencepiece(path, name) if path.suffix == ".model" else _from_hugging_face(path, name)


def tokenizer_file(name: str) -> Path:
    """The file that `name` means, if it is a folder with one; else `name`."""
    import tiktoken

    path = Path(name)
    if name != "bytes" and name not in tiktoken.list_encoding_names() and path.is_dir():
        return next(
            (path / file for file in ("tokenizer.json", "tekken.json", "tokenizer.model") if (path / file).is_file()), path
        )
    return path


# -- tables of ranks -------------------------------------------------------------------------------------------------------


def _from_tiktoken(encoding: tiktoken.Encoding, name: str) -> Tokenizer:
    special = encoding._special_tokens
    vocabulary = sorted((rank, token.hex()) for token, rank in encoding._mergeable_ranks.items())
    own = threading.local()  # two threads that share an encoding wait for each other
    own.encoding = encoding

    def encode_arrays(texts: list[str]) -> list[np.ndarray]:
        texts = [as_unicode(text) for text in texts]
        if name == "bytes":  # they are their own ids
            return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]
        if not hasattr(own, "encoding"):
            own.encoding = _copy(encoding)
        with _panics(name, texts):
            return [own.encoding.encode_to_numpy(text, disallowed_special=()) for text in texts]

    return Tokenizer(
        name=name,
        hash=_digest([encoding._pat_str, vocabulary, sorted(special.items())]),
        vocab_size=encoding.n_vocab,
        bos_id=next((special[token] for token in _BOS if token in special), None),
        eos_id=next((special[token] for token in _EOS if token in special), None),
        special_tokens=dict(special),
        encode_arrays=encode_arrays,
        decode=encoding.decode,
    )


def _copy(encoding: tiktoken.Encoding) -> tiktoken.Encoding:
    import tiktoken

    return tiktoken.Encoding(
        encoding.name,
        pat_str=encoding._pat_str,
        mergeable_ranks=encoding._mergeable_ranks,
        special_tokens=encoding._special_tokens,
    )


# -- SentencePiece ---------------------------------------------------------------------------------------------------------


def _from_sentencepiece(path: Path, name: str) -> Tokenizer:
    require(f"tokenizer {name!r}", "sentencepiece")
    import sentencepiece
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

    try:
        content = path.read_bytes()
        backend = sentencepiece.SentencePieceProcessor(model_proto=content)
        read = ModelProto.FromString(content)
        if not all(isinstance(piece.piece, str) for piece in read.pieces):
            raise ValueError("a piece is not UTF-8")
    except (RuntimeError, ValueError, IsADirectoryError) as error:  # protobuf's own derive from ValueError
        raise UserError(
            f"tokenizer {name!r} is neither a SentencePiece model nor a file of ranks ({reason(error)}); {ALTERNATIVES}"
        ) from error
    trained, size = read.trainer_spec, backend.get_piece_size()
    bos, eos = (None if token < 0 else token for token in (backend.bos_id(), backend.eos_id()))
    # Of the training settings only what encoding goes by; the others tell of its texts and threads.
    rules = [trained.model_type, trained.treat_whitespace_as_suffix, trained.byte_fallback, trained.unk_surface]
    for spec in (read.normalizer_spec, read.denormalizer_spec):
        rules += [
            spec.precompiled_charsmap.hex(),
            spec.add_dummy_prefix,
            spec.remove_extra_whitespaces,
            spec.escape_whitespaces,
        ]
    pieces = [(piece.piece, piece.score, piece.type) for piece in read.pieces]

    def encode_arrays(texts: list[str]) -> list[np.ndarray]:
        found = backend.encode([as_unicode(text) for text in texts], out_type=int, num_threads=1)
        return [np.array(ids, dtype=np.uint32) for ids in found]

    return Tokenizer(
        name=name,
        hash=_digest([rules, pieces, bos, eos]),
        vocab_size=size,
        bos_id=bos,
        eos_id=eos,
        special_tokens={backend.id_to_piece(i): i for i in range(size) if backend.is_control(i)},
        encode_arrays=encode_arrays,
        decode=backend.decode,
    )


# -- Hugging Face ----------------------------------------------------------------------------------------------------------


def hugging_face_folder(name: str) -> Path:
    """The folder with the tokenizer.json that `name` means: such a file, a folder or a Hub name.

    Raises UserError as `load_tokenizer`.
    """
    path = tokenizer_file(name)
    if path.is_file() and path.name == "tokenizer.json":
        return path.parent
    if path.is_dir():
        raise UserError(
            f"tokenizer {name!r}: the folder has no tokenizer.json, and code of a tokenizer's own is never run; load it with "
            f"transformers' AutoTokenizer and name what its save_pretrained writes, or {ALTERNATIVES}"
        )
    if path.is_absolute() or name.startswith((".", "~")) or path.suffix == ".json":
        raise UserError(f"tokenizer {name!r}: there is no such file or folder; {ALTERNATIVES}")
    import tiktoken

    try:
        from huggingface_hub import snapshot_download

        files = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
        folder = Path(snapshot_download(name, allow_patterns=files, etag_timeout=10))
        if not (folder / "tokenizer.json").is_file():
            raise FileNotFoundError(
                "it has no tokenizer.json, and code of a tokenizer's own is never run; if it has a tekken.json or a "
                "tokenizer.model, download that and name the file"
            )
    except Exception as error:
        raise UserError(
            f"tokenizer {name!r} is no file, folder or tiktoken encoding here, and the Hugging Face Hub "
            f"{_hub_said(error)}{did_you_mean(name, ['bytes', *tiktoken.list_encoding_names()])}; {ALTERNATIVES}"
        ) from error
    return folder


def _hub_said(error: Exception) -> str:
    """Why the Hub gave no tokenizer, in a few words."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    if isinstance(error, FileNotFoundError) and str(error).startswith("it has no"):
        return f"has it without one ({error})"
    if constants.HF_HUB_OFFLINE:
        return "is not asked (HF_HUB_OFFLINE)"
    if passing_fault(error) is not None:
        return "cannot be reached"
    if isinstance(error, GatedRepoError):
        return "gives it to those only who accepted its terms and logged in (hf auth login)"
    if isinstance(error, RepositoryNotFoundError | HFValidationError):
        return "has no such name"
    return f"does not give it ({reason(error)})"


def read_settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json of a folder, {} if there is none: bos_token and eos_token are str or None, ORIGIN is
    {"name": str, "hash": str} and more, or absent. Raises UserError for anything else.

    What it does not say of these tokens, an older special_tokens_map.json may.
    """
    path = folder / "special_tokens_map.json"
    try:
        older = json.loads(path.read_text()) if path.exists() else {}
        path = folder / "tokenizer_config.json"
        settings = json.loads(path.read_text()) if path.exists() else {}
        for role in ("bos_token", "eos_token"):
            token = settings.get(role, older.get(role))
            settings[role] = token["content"] if isinstance(token, dict) else token
            if not isinstance(settings[role], str | None):
                raise ValueError(f"{role} = {token!r}")
        origin = settings.get(ORIGIN)
        if origin is not None and not all(isinstance(origin[key], str) for key in {"name", "hash", *origin}):
            raise ValueError(f"{ORIGIN} = {origin!r}")
        return settings
    except (ValueError, OSError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is not a tokenizer's settings ({shorten(str(error))}); take it from where the tokenizer comes from"
        ) from error


def _from_hugging_face(path: Path, name: str) -> Tokenizer:
    from tokenizers import Tokenizer as HFTokenizer

    folder = hugging_face_folder(str(path))
    try:
        backend = HFTokenizer.from_file(str(folder / "tokenizer.json"))
        vocabulary = backend.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise ValueError("it has no tokens")
    except BaseException as error:  # tokenizers raises plain Exception, or panics, which is a BaseException
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise UserError(f"{folder / 'tokenizer.json'} is no tokenizer ({reason(error)}); {ALTERNATIVES}") from error
    backend.encode_special_tokens = True  # in a text they are ordinary text
    if switched_off := _without_inference(backend):
        _say(f"note: tokenizer {name!r} is saved with {' and '.join(switched_off)}; that is switched off: documents stay whole")
    declared = read_settings(folder)

    def id_of(role: str) -> int | None:
        if (token := declared.get(role)) is not None and token not in vocabulary:
            _say(f"WARNING: tokenizer {name!r} declares {role} = {token!r}, which is not in its vocabulary: it has none")
        return None if token is None else vocabulary.get(token)

    def encode_arrays(texts: list[str]) -> list[np.ndarray]:
        texts = [as_unicode(text) for text in texts]
        with _panics(name, texts):
            found = backend.encode_batch_fast(texts, add_special_tokens=False)  # without offsets, which nobody reads
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in found]

    bos, eos, saved = id_of("bos_token"), id_of("eos_token"), backend.to_str()
    rules = {key: value for key, value in json.loads(saved).items() if key not in _NO_RULES}
    own, earlier = _digest([rules, bos, eos]), hashlib.sha256(saved.encode()).hexdigest()
    origin = declared.get(ORIGIN, {})
    if "hash" in origin and origin.get("written", own) == own:
        own, earlier = origin["hash"], ""
    return Tokenizer(
        name=name,
        hash=own,
        vocab_size=max(vocabulary.values()) + 1,
        bos_id=bos,
        eos_id=eos,
        special_tokens={t.content: i for i, t in backend.get_added_tokens_decoder().items() if t.special},
        encode_arrays=encode_arrays,
        decode=lambda ids: backend.decode(ids, skip_special_tokens=False),
        earlier_hash=earlier,
    )


# Of a tokenizer.json, what does not decide how a document is encoded or decoded. The post-processor adds special tokens, which
# we do ourselves.
_NO_RULES = {"version", "truncation", "padding", "post_processor"}


def _without_inference(backend: HFTokenizer) -> list[str]:
    """Switch off what somebody saved with the tokenizer for other uses; returns what that was.

    Truncation and padding would cut every document, or fill it up; dropout would encode it by chance.
    """
    found = []
    if backend.truncation is not None:
        found.append(f"truncation to {backend.truncation['max_length']} tokens")
        backend.no_truncation()
    if backend.padding is not None:
        found.append("padding")
        backend.no_padding()
    if getattr(backend.model, "dropout", None):
        found.append(f"dropout of {backend.model.dropout:g}")
        backend.model.dropout = None
    return found


# -- of all ----------------------------------------------------------------------------------------------------------------


def _digest(rules: list[Any]) -> str:
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()


@contextmanager
def _panics(name: str, texts: list[str]) -> Iterator[None]:
    """What a library written in Rust raises where it panics, which no other process could be told, as a UserError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        length = max(map(len, texts))
        raise UserError(
            f"tokenizer {name!r} cannot encode a text of {length:,} characters ({reason(error)}); leave it out, or divide it"
        ) from None


_said: set[str] = set()


def _say(sentence: str) -> None:
    """Once, however often the tokenizer is loaded, and not by workers."""
    if sentence not in _said and parent_process() is None:
        _said.add(sentence)
        say_once(sentence)
