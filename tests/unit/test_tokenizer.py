"""Tokenizers from every source, and what is said where one cannot be had."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from titan_dp.data.tokenizer import load_tokenizer
from titan_dp.errors import UserError


@given(st.text())
def test_bytes_round_trips_any_text_with_special_tokens_as_ordinary_text(text: str) -> None:
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (256, 257, 258)
    for one in (text, f"{text}<|eos|>"):
        assert tokenizer.encode(one) == list(one.encode())
        assert tokenizer.decode(tokenizer.encode(one)) == one


@pytest.fixture
def rank_file(tmp_path: Path) -> Path:
    """A rank file of all bytes and two merges."""
    tokens = [bytes([i]) for i in range(256)] + [b"th", b"the"]
    path = tmp_path / "tiny.tiktoken"
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))
    return path


@pytest.fixture
def hugging_face_folder(tmp_path: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "the": 2, "fox": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": {"content": "<s>"}, "eos_token": null}')
    return tmp_path


def test_a_local_rank_file_is_a_tokenizer_and_the_hash_names_its_vocabulary(rank_file: Path) -> None:
    tokenizer = load_tokenizer(str(rank_file))
    assert (tokenizer.encode("the"), tokenizer.decode([257])) == ([257], "the")
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (258, 259)
    assert load_tokenizer(str(rank_file)).hash == tokenizer.hash
    the, tha = (base64.b64encode(token).decode() for token in (b"the", b"tha"))
    rank_file.write_text(rank_file.read_text().replace(the, tha))
    assert load_tokenizer(str(rank_file)).hash != tokenizer.hash


def test_a_hugging_face_folder_is_a_tokenizer_with_the_special_tokens_it_declares(hugging_face_folder: Path) -> None:
    tokenizer = load_tokenizer(str(hugging_face_folder))
    assert tokenizer.encode_batch(["the fox", "fox"]) == [[2, 3], [3]]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, None, 4)


def test_a_lone_surrogate_is_read_as_the_replacement_character(rank_file: Path, hugging_face_folder: Path) -> None:
    for name in ("bytes", str(rank_file), str(hugging_face_folder)):
        tokenizer = load_tokenizer(name)
        assert tokenizer.encode("fox \ud800") == tokenizer.encode("fox \ufffd")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.tiktoken", "there is no such rank file"),
        ("no such tokenizer", "is no tiktoken encoding .* no folder with a tokenizer.json"),
        ("gpt2", r"'gpt2' has to be downloaded and cannot be .*no route.* use 'bytes' .* \.tiktoken"),
    ],
)
def test_a_tokenizer_that_cannot_be_had_is_named(name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(name: str) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    with pytest.raises(UserError, match=message):
        load_tokenizer(name)
