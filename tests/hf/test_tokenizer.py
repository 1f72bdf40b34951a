"""An exported tokenizer encodes every text as the original does, in transformers, in tokenizers and in titan_dp, and keeps its
hash, so that token shards made with one are read with the other.
"""

from __future__ import annotations

import base64
import json
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from tests.pretrained import save_checkpoint
from tests.unit.test_tokenizer import llama_3_model, tekken
from titan_dp.data.tokenizer import ORIGIN, Tokenizer, load_tokenizer
from titan_dp.inference.hf.export import export
from titan_dp.inference.pretrained import open_source

TEXTS = [
    "",
    "It's what they'll say: we've, I'd, you're, don't, IT'S, WE'LL",
    "1 12 123 1234 12345678 3.14159 1,000,000",
    "  a  b   c    d     e      f  ",
    "       ",
    "one\ntwo\n\nthree\r\nfour\n\n\n  five\t\tsix \n ",
    "\t\u00a0\u2003\u3000x\u200bx\u2028x\x0bx\x0cx",
    "naïve façade Zürich Ångström œuvre Łódź, e\u0301 vs \u00e9, n\u0303 vs \u00f1, \ufb01 vs fi",
    "Ελλάδα Москва مرحبا שלום 北京欢迎你 日本語のテキスト 한국어",
    "👩‍🚀🎉🇩🇪👍🏽 text 🙂🙂 \U0001d573\U0001d58a 𠜎𠜱",
    "\x00\x01\x7f\ufeff\ufffd",
    "def f(x):\n    return {k: v**2 for k, v in x.items()}  # ok\n",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaabababababab",
]
CHARACTERS = "abz AZ019  \n\t\r'.,!<|>_éßłΩж北👍\u0301\u00a0\u200d\U0001d573"


def rank_file(path: Path) -> Path:
    """A byte-pair vocabulary of 160 merges learnt from TEXTS; single bytes have ranks in no order, as in GPT-2's file."""
    order = list(range(256))
    random.Random(0).shuffle(order)
    ranks = {bytes([byte]): rank for rank, byte in enumerate(order)}
    text = " the whale and the sea    \n\n" * 3 + " ".join(TEXTS)
    pieces = [[bytes([byte]) for byte in word.encode()] for word in text.replace(" ", "\0 ").split("\0")]
    for _ in range(160):
        pairs = Counter(pair for piece in pieces for pair in pairwise(piece))
        a, b = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks[a + b] = len(ranks)
        for piece in pieces:
            for i in range(len(piece) - 2, -1, -1):
                if piece[i : i + 2] == [a, b]:
                    piece[i : i + 2] = [a + b]
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    return path


@pytest.fixture(scope="module", params=["bytes", "small.tiktoken", "tokenizer.model", "tekken.json"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Path]:
    """A tokenizer, and the folder of a model exported with it."""
    folder = tmp_path_factory.mktemp(request.param)
    write = {"small.tiktoken": rank_file, "tokenizer.model": llama_3_model, "tekken.json": tekken}.get(request.param)
    name = "bytes" if write is None else str(write(folder / request.param))
    original = load_tokenizer(name)
    export(open_source(save_checkpoint(folder / "run", tokenizer=name, vocab_size=640)), folder / "exported")
    return original, folder / "exported"


def test_every_reader_of_the_folder_encodes_as_the_original(pair: tuple[Tokenizer, Path]) -> None:
    original, folder = pair
    theirs, backend = AutoTokenizer.from_pretrained(folder), Backend.from_file(str(folder / "tokenizer.json"))
    ours = load_tokenizer(str(folder))
    for text in [*TEXTS, *("".join(random.choices(CHARACTERS, k=random.randint(1, 40))) for _ in range(300))]:
        expected = original.encode(text)
        assert ours.encode(text) == backend.encode(text).ids == theirs(text)["input_ids"] == expected, text
        assert ours.decode(expected) == theirs.decode(expected) == original.decode(expected) == text, text


def test_special_tokens_in_a_text_are_text_as_for_the_original(pair: tuple[Tokenizer, Path]) -> None:
    """Transformers takes them for tokens unless asked not to; titan_dp, which promises one hash, must not."""
    original, folder = pair
    text = "<|bos|> and <|eos|> and <|endoftext|>, <|bos|><|eos|>"
    assert AutoTokenizer.from_pretrained(folder)(text, split_special_tokens=True)["input_ids"] == original.encode(text)
    assert load_tokenizer(str(folder)).encode(text) == original.encode(text)


def test_the_tokenizer_keeps_its_hash_and_its_special_tokens_however_often_it_is_exported(
    pair: tuple[Tokenizer, Path], tmp_path: Path
) -> None:
    original, folder = pair
    export(open_source(folder), tmp_path / "again")
    for place in (folder, tmp_path / "again"):
        again = load_tokenizer(str(place))
        assert again.hash == original.hash
        assert (again.vocab_size, again.bos_id, again.eos_id) == (original.vocab_size, original.bos_id, original.eos_id)
        assert again.special_tokens == original.special_tokens
        assert json.loads((place / "tokenizer_config.json").read_text())[ORIGIN]["hash"] == original.hash


def test_transformers_knows_the_ids_of_beginning_end_and_padding(pair: tuple[Tokenizer, Path]) -> None:
    original, folder = pair
    theirs = AutoTokenizer.from_pretrained(folder)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (original.bos_id, original.eos_id)
    assert theirs.pad_token_id is not None
    assert len(theirs) == original.vocab_size
    batch = theirs(["a", "whale"], padding=True)
    assert [sum(mask) for mask in batch["attention_mask"]] == [len(original.encode(text)) for text in ("a", "whale")]
