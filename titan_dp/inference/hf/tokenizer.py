"""The tokenizer of a folder: copied if it is already Hugging Face's, converted if it is a tiktoken encoding.

What is written encodes as the original does and names the original (`tokenizer.ORIGIN`), so that shards made with one are
read with the other. If training documents had no BOS, transformers does not add one either.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from titan_dp.data.encodings import tiktoken_encoding
from titan_dp.data.tokenizer import ORIGIN, Tokenizer, hugging_face_folder, load_tokenizer, read_settings, tokenizer_file
from titan_dp.errors import UserError
from titan_dp.files import to_json

if TYPE_CHECKING:
    import tiktoken
    from tokenizers import Tokenizer as HFTokenizer

# Text in which a wrong conversion shows: merges, digits, runs of spaces and newlines, bytes outside ASCII.
_PROBE = "It's 12345 o'clock.\n\n\tTabs,   spaces  and\r\nlines; naïve façade — 北京 Ελλάδα 👩‍🚀🎉 \u00a0end  "


def save_tokenizer(original: Tokenizer, folder: Path, seq_len: int) -> Tokenizer:
    """Write tokenizer.json and tokenizer_config.json of a tokenizer into `folder`; returns what was written.

    Args:
        original: from `load_tokenizer`.
        folder: exists.
        seq_len: longest sequence the model was trained on, for `model_max_length`.

    Raises UserError if what was written encodes differently, or if the tokenizer is SentencePiece's.
    """
    name = original.name
    file = tokenizer_file(name)
    encoding = tiktoken_encoding(str(file))
    if encoding is None and file.suffix == ".model":
        raise UserError(
            f"tokenizer {name!r} is SentencePiece's and is not converted; name the folder of an equal Hugging Face tokenizer "
            "with --tokenizer (most models come with a tokenizer.json, too)"
        )
    settings = folder / "tokenizer_config.json"
    if encoding is None:
        source = hugging_face_folder(name)
        for part in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            if (source / part).exists():
                shutil.copyfile(source / part, folder / part)
        declared = read_settings(folder) or {"tokenizer_class": "PreTrainedTokenizerFast"}
    else:
        _convert(encoding).save(str(folder / "tokenizer.json"))
        names = {token_id: token for token, token_id in original.special_tokens.items()}
        declared = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        declared["model_input_names"] = ["input_ids", "attention_mask"]  # transformers 4 adds token types otherwise
        roles = {"bos_token": original.bos_id, "eos_token": original.eos_id, "pad_token": original.eos_id}
        declared |= {role: names[token_id] for role, token_id in roles.items() if token_id is not None}
    if not original.adds_bos:
        _add_nothing(folder / "tokenizer.json")
        declared["add_bos_token"] = False
    origin = declared.pop(ORIGIN, {"name": name}) | {"hash": original.hash}
    declared["model_max_length"] = seq_len
    settings.write_text(to_json(declared, indent=1) + "\n")
    origin["written"] = load_tokenizer(str(folder)).hash
    settings.write_text(to_json(declared | {ORIGIN: origin}, indent=1) + "\n")
    written = load_tokenizer(str(folder))
    probe = _PROBE + " ".join(original.special_tokens)  # which are text there
    if written.encode(probe) != original.encode(probe) or written.special_tokens != original.special_tokens:
        raise UserError(
            f"tokenizer {name!r} could not be converted: what was written encodes differently; "
            "name an equal Hugging Face tokenizer with --tokenizer"
        )
    return replace(written, adds_bos=original.adds_bos)


def _add_nothing(file: Path) -> None:
    """Take out what puts special tokens around a text: the templates of the post-processor."""
    from tokenizers import Tokenizer as HFTokenizer

    backend = HFTokenizer.from_file(str(file))
    if backend.encode("a").ids != backend.encode("a", add_special_tokens=False).ids:
        saved = json.loads(file.read_text())
        file.write_text(to_json(saved | {"post_processor": None}))


def _convert(encoding: tiktoken.Encoding) -> HFTokenizer:
    """The byte-level BPE of `tokenizers` that splits and merges as the encoding does.

    A token's rank is its id and also the place of its merge; a piece of text that is a token is taken whole.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    ranks = encoding._mergeable_ranks
    by_rank = sorted(ranks, key=ranks.__getitem__)
    splits = [
        sorted(((token[:i], token[i:]) for i in range(1, len(token))), key=lambda pair: [ranks.get(part, -1) for part in pair])
        for token in by_rank
    ]
    merges = [pair for pairs in splits for pair in pairs if pair[0] in ranks and pair[1] in ranks]
    special = sorted(encoding._special_tokens, key=encoding._special_tokens.__getitem__)
    vocabulary = {_spelt(token): ranks[token] for token in by_rank}
    # What is added gets the ids behind the vocabulary, in this order. Special tokens with other ids must be in it already.
    behind = max(ranks.values()) + 1
    vocabulary |= {token: id_ for i, token in enumerate(special) if (id_ := encoding._special_tokens[token]) != behind + i}
    model = models.BPE(vocabulary, [(_spelt(a), _spelt(b)) for a, b in merges], fuse_unk=False, ignore_merges=True)
    converted = Tokenizer(model)
    split = pre_tokenizers.Split(Regex(encoding._pat_str), behavior="isolated")
    converted.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    converted.decoder = decoders.ByteLevel()
    converted.post_processor = processors.ByteLevel(trim_offsets=False)
    converted.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return converted


def _spelt(token: bytes) -> str:
    """A token as byte-level BPE writes it: printable bytes as themselves, the other bytes as characters from 256 on."""
    return "".join(map(_CHARACTERS.__getitem__, token))


_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_CHARACTERS = {byte: chr(byte) for byte in _PRINTABLE} | {byte: chr(256 + i) for i, byte in enumerate(_OTHERS)}
