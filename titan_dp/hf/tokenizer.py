"""The tokenizer of a folder: copied if it is Hugging Face's already, converted if it is a tiktoken encoding.

What is written encodes as the original does, and says which it was (`tokenizer.ORIGIN`): shards made with one are read
with the other. The conversion is that of transformers.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titan_dp.data.tokenizer import ORIGIN, Tokenizer, hugging_face_folder, load_tokenizer, read_settings, tiktoken_encoding
from titan_dp.errors import UserError

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

    Raises UserError where what was written does not encode alike.
    """
    name = original.name
    encoding = tiktoken_encoding(name)
    settings = folder / "tokenizer_config.json"
    if encoding is None:
        source = hugging_face_folder(name)
        for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            if (source / file).exists():
                shutil.copyfile(source / file, folder / file)
        declared = read_settings(folder) or {"tokenizer_class": "PreTrainedTokenizerFast"}
    else:
        _convert(encoding).save(str(folder / "tokenizer.json"))
        ids = {token_id: token for token, token_id in original.special_tokens.items()}
        declared = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        for role, token_id in (("bos_token", original.bos_id), ("eos_token", original.eos_id)):
            if token_id is not None:
                declared[role] = ids[token_id]
        if original.eos_id is not None:
            declared["pad_token"] = ids[original.eos_id]
    declared |= {ORIGIN: declared.get(ORIGIN, {"name": name, "hash": original.hash}), "model_max_length": seq_len}
    settings.write_text(json.dumps(declared, indent=1) + "\n")
    written = load_tokenizer(str(folder))
    if written.encode(_PROBE) != original.encode(_PROBE) or written.vocab_size != original.vocab_size:
        raise UserError(
            f"tokenizer {name!r} could not be converted: what was written encodes differently; "
            "name an equal Hugging Face tokenizer with --tokenizer"
        )
    return written


def _convert(encoding: tiktoken.Encoding) -> HFTokenizer:
    try:
        from transformers.convert_slow_tokenizer import TikTokenConverter
    except ImportError as error:
        raise UserError("converting a tiktoken tokenizer needs transformers: pip install 'titan_dp[hf]'") from error

    class Converter(TikTokenConverter):
        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: Any) -> Any:
            return tiktoken_url  # the ranks themselves: there may be no file of them

    special = sorted(encoding._special_tokens, key=encoding._special_tokens.__getitem__)  # ids are given in this order
    return Converter(encoding._mergeable_ranks, encoding._pat_str, extra_special_tokens=special).converted()
