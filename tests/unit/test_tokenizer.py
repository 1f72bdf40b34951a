"""Tokenizers from every source, and what is said where one cannot be had."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from tests.pretrained import bpe
from titan_dp.data import encodings
from titan_dp.data.tokenizer import load_tokenizer
from titan_dp.errors import UserError, explained


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


def test_several_threads_encode_at_once(tmp_path: Path) -> None:
    (tmp_path / "x.tiktoken").write_text("".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256)))
    tokenizer = load_tokenizer(str(tmp_path / "x.tiktoken"))
    texts = [f"text {i} <|endoftext|>" for i in range(50)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(tokenizer.encode, texts))
    assert [bytes(ids).decode() for ids in found] == texts


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


WORDS = "the fox and the whale, it's 12345 of naïve 北京 🙂\n  end".split(" ")
SENTENCES = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))] * 5


def sentencepiece_model(path: Path, kind: str = "bpe", **options: Any) -> Path:
    import sentencepiece

    model = io.BytesIO()
    given = {"sentence_iterator": iter(SENTENCES), "model_writer": model, "vocab_size": 330, "minloglevel": 2, "num_threads": 1}
    sentencepiece.SentencePieceTrainer.train(
        **given | {"byte_fallback": True, "model_type": kind, "hard_vocab_limit": False} | options
    )
    path.write_bytes(model.getvalue())
    return path


def llama_3_model(path: Path, more: int = 0) -> Path:
    tokens = [*(bytes([i]) for i in range(256)), b"th", b"the", *(b"the%d" % i for i in range(more))]
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    return path


def tekken(path: Path, **changes: Any) -> Path:
    tokens = [*(bytes([i]) for i in range(256)), b"th", b"the", b" f", b"never used"]
    entry = {"pattern": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s+", "num_vocab_tokens": len(tokens)}
    entry |= {"default_vocab_size": 30 + 259, "default_num_special_tokens": 30, "version": "v3"} | changes
    vocab = [{"rank": i, "token_bytes": base64.b64encode(t).decode(), "token_str": None} for i, t in enumerate(tokens)]
    path.write_text(json.dumps({"config": entry, "vocab": vocab}))
    return path


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_sentencepiece_model_gives_the_ids_of_its_library(tmp_path: Path, kind: str) -> None:
    import sentencepiece

    path = sentencepiece_model(tmp_path / "tokenizer.model", kind)
    ours, theirs = load_tokenizer(str(path)), sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert ours.encode_batch(SENTENCES) == [theirs.encode(text) for text in SENTENCES]
    assert [ours.decode(ours.encode(text)) for text in WORDS] == [theirs.decode(theirs.encode(text)) for text in WORDS]
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (1, 2, theirs.get_piece_size())
    assert ours.special_tokens == {"<s>": 1, "</s>": 2}
    assert not {1, 2} & set(ours.encode("a <s> and </s>")), "in a text they are text"
    assert ours.encode("fox \ud800") == ours.encode("fox \ufffd")
    assert load_tokenizer(str(tmp_path)).hash == ours.hash, "a folder that holds it"


def test_a_sentencepiece_model_without_bos_has_none(tmp_path: Path) -> None:
    read = load_tokenizer(str(sentencepiece_model(tmp_path / "x.model", bos_id=-1)))
    assert (read.bos_id, read.eos_id, read.special_tokens) == (None, 2, {"</s>": 2})


def test_the_training_settings_of_a_sentencepiece_model_are_no_part_of_its_identity(tmp_path: Path) -> None:
    def changed(name: str, change: Callable[[Any], None]) -> str:
        from sentencepiece.sentencepiece_model_pb2 import ModelProto

        model = ModelProto.FromString((tmp_path / "x.model").read_bytes())
        change(model)
        (tmp_path / name).write_bytes(model.SerializeToString())
        return load_tokenizer(str(tmp_path / name)).hash

    original = load_tokenizer(str(sentencepiece_model(tmp_path / "x.model"))).hash
    assert changed("a.model", lambda model: model.trainer_spec.input.append("/home/me/corpus.txt")) == original
    assert changed("b.model", lambda model: setattr(model.normalizer_spec, "add_dummy_prefix", False)) != original
    assert changed("c.model", lambda model: setattr(model.pieces[300], "piece", "other")) != original


def test_llama_3s_file_has_its_special_tokens_behind_the_ranks(tmp_path: Path) -> None:
    read = load_tokenizer(str(llama_3_model(tmp_path / "tokenizer.model")))
    assert read.encode("the 1234") == [257, *b" ", *b"1234"]
    assert (read.bos_id, read.eos_id, read.vocab_size) == (258, 259, 258 + 256)
    # In Meta's file of 128,000 ranks <|start_header_id|> is 128006, <|eot_id|> 128009 and the last one 128255.
    of = {read.special_tokens[token] - 258 for token in ("<|start_header_id|>", "<|eot_id|>", "<|reserved_special_token_250|>")}
    assert of == {6, 9, 255}
    assert read.decode(read.encode("<|begin_of_text|>x")) == "<|begin_of_text|>x"
    assert read.bos_id not in read.encode("<|begin_of_text|>x")


def test_more_ranks_than_llama_3_has_are_another_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encodings, "_LLAMA_3_RANKS", 300)
    with pytest.raises(UserError, match="tokenizer.model' has 308 ranks, more than Llama 3's 300.* which has a tokenizer.json"):
        load_tokenizer(str(llama_3_model(tmp_path / "tokenizer.model", 50)))


def test_a_tekken_file_gives_the_ids_of_its_library(tmp_path: Path) -> None:
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    path = tekken(tmp_path / "tekken.json")
    ours, theirs = load_tokenizer(str(path)), Tekkenizer.from_file(path)
    for text in SENTENCES:
        assert ours.encode(text) == theirs.encode(text, bos=False, eos=False)
        assert ours.decode(ours.encode(text)) == text
    assert ours.encode("the") == [30 + 257]
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (theirs.bos_id, theirs.eos_id, theirs.n_words) == (1, 2, 289)
    assert ours.special_tokens.keys() >= {"<unk>", "<s>", "</s>", "[INST]", "<SPECIAL_29>"}
    assert load_tokenizer(str(tmp_path)).hash == ours.hash, "a folder that holds it"


def test_a_tokenizers_json_is_named_by_its_folder_or_itself(hugging_face_folder: Path) -> None:
    one, other = load_tokenizer(str(hugging_face_folder)), load_tokenizer(str(hugging_face_folder / "tokenizer.json"))
    assert (one.hash, one.bos_id, one.encode("fox")) == (other.hash, other.bos_id, other.encode("fox"))


@pytest.mark.parametrize(("name", "package"), [("tokenizer.model", "sentencepiece"), ("tekken.json", "mistral_common")])
def test_a_package_that_is_missing_is_named(tmp_path: Path, name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (sentencepiece_model if name == "tokenizer.model" else tekken)(tmp_path / name)
    monkeypatch.setattr("titan_dp.errors.find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"{name}' needs {package}: pip install {package}"):
        load_tokenizer(str(tmp_path / name))


@pytest.mark.parametrize("name", ["x.model", "x.json", "x.tiktoken"])
def test_a_file_of_something_else_is_one_sentence(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(UserError, match="there is no such"):
        load_tokenizer(str(path))
    path.write_text('{"a": 1}')
    with pytest.raises(UserError, match=f"{name}' is n"):
        load_tokenizer(str(path))


@pytest.mark.parametrize(
    ("damaged", "reason"),
    [(b"AA== 0\nAA== 1\n", "not even all bytes"), (b"dGhl 1\n", "damaged"), (b"dGhlbQ== 99999999999\n", "damaged")],
)
def test_a_damaged_table_of_ranks_is_one_sentence(tmp_path: Path, damaged: bytes, reason: str) -> None:
    path = llama_3_model(tmp_path / "tokenizer.model")
    path.write_bytes(damaged if reason.startswith("not") else path.read_bytes() + damaged)
    with pytest.raises(UserError, match=f"tokenizer.model' is .*{reason}"):
        load_tokenizer(str(path))


def test_a_piece_that_is_no_text_is_one_sentence(tmp_path: Path) -> None:
    path = sentencepiece_model(tmp_path / "x.model")
    path.write_bytes(path.read_bytes().replace("naïve".encode()[2:4], b"\xff\xff").replace("北".encode(), b"\xff\xff\xff"))
    with pytest.raises(UserError, match="x.model' is neither a SentencePiece model nor a file of ranks"):
        load_tokenizer(str(path))


# -- identity --------------------------------------------------------------------------------------------------------------


def rules(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "tokenizer.json"
    change(saved := json.loads(path.read_text()))
    path.write_text(json.dumps(saved))


def truncate(saved: dict[str, Any]) -> None:
    saved["truncation"] = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
    saved["padding"] = {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    saved["padding"] |= {"pad_type_id": 0, "pad_token": "<s>"}


SAME: dict[str, Callable[[Path], object]] = {
    "its path": lambda folder: folder.rename(folder.with_name("moved")),
    "truncation and padding": lambda folder: rules(folder, truncate),
    "dropout": lambda folder: rules(folder, lambda saved: saved["model"].update(dropout=0.5)),
    "a template": lambda folder: bpe(folder, chat_template="{{ messages }}", model_max_length=16),
    "spaces in the file": lambda folder: rules(folder, lambda saved: saved),
}
OTHER: dict[str, Callable[[Path], object]] = {
    "merges": lambda folder: bpe(folder, "a whale and a whale and"),
    "the normalizer": lambda folder: rules(folder, lambda saved: saved.update(normalizer={"type": "NFC"})),
    "the pre-tokenizer": lambda folder: rules(folder, lambda saved: saved["pre_tokenizer"].update(add_prefix_space=True)),
    "a special token": lambda folder: rules(folder, lambda saved: saved["added_tokens"][0].update(special=False)),
    "what eos is": lambda folder: bpe(folder, eos_token="<s>"),
}


@pytest.mark.parametrize("change", SAME.values(), ids=SAME)
def test_what_does_not_change_what_a_tokenizer_does_leaves_its_hash(tmp_path: Path, change: Callable[[Path], object]) -> None:
    before = load_tokenizer(str(bpe(tmp_path / "t")))
    change(tmp_path / "t")
    (folder,) = tmp_path.iterdir()
    after = load_tokenizer(str(folder))
    assert after.hash == before.hash
    assert after.encode("the fox the whale " * 9) == before.encode("the fox the whale " * 9)


@pytest.mark.parametrize("change", OTHER.values(), ids=OTHER)
def test_what_changes_what_a_tokenizer_does_changes_its_hash(tmp_path: Path, change: Callable[[Path], object]) -> None:
    before = load_tokenizer(str(bpe(tmp_path / "t")))
    change(tmp_path / "t")
    after = load_tokenizer(str(tmp_path / "t"))
    assert after.vocab_size == before.vocab_size
    assert after.hash != before.hash
    assert not after.has_hash(before.hash)
    assert after.has_hash(""), "nobody knows"


def test_the_hash_of_earlier_versions_is_known_again(tmp_path: Path) -> None:
    import hashlib

    from tokenizers import Tokenizer

    saved = Tokenizer.from_file(str(bpe(tmp_path / "t") / "tokenizer.json")).to_str()
    assert load_tokenizer(str(tmp_path / "t")).has_hash(hashlib.sha256(saved.encode()).hexdigest())


def test_what_is_switched_off_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rules(bpe(tmp_path / "t"), truncate)
    for _ in range(2):
        load_tokenizer(str(tmp_path / "t"))
    assert capsys.readouterr().err.count("is saved with truncation to 16 tokens and padding; that is switched off") == 1


def test_a_declared_token_that_does_not_exist_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert load_tokenizer(str(bpe(tmp_path / "t", eos_token="<|im_end|>"))).eos_id is None
    assert "declares eos_token = '<|im_end|>', which is not in its vocabulary" in capsys.readouterr().err


def test_an_older_map_of_special_tokens_is_read(tmp_path: Path) -> None:
    (bpe(tmp_path / "t") / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    (tmp_path / "t" / "special_tokens_map.json").write_text('{"eos_token": {"content": "</s>"}}')
    read = load_tokenizer(str(tmp_path / "t"))
    assert (read.bos_id, read.eos_id) == (None, 1)


def test_two_separators_never_meet(tmp_path: Path) -> None:
    both, equal = load_tokenizer("bytes"), load_tokenizer(str(bpe(tmp_path / "t", bos_token="</s>")))
    assert both.separators() == ([256], [257])
    assert both.separators(eos=False) == ([256], [])
    assert equal.bos_id == equal.eos_id == 1
    assert equal.separators() == ([], [1])
    assert equal.separators(bos=True) == equal.separators(eos=False) == ([1], [])
    assert equal.separators(bos=False) == equal.separators(eos=True) == ([], [1])
    assert equal.separators(bos=False, eos=False) == ([], [])
    with pytest.raises(UserError, match="both are token 1 .* leave one out"):
        equal.separators(bos=True, eos=True)


def test_a_text_at_which_the_library_panics_is_one_sentence(rank_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        pass

    def panic(*args: Any, **options: Any) -> None:
        raise PanicException("StackOverflow")

    read = load_tokenizer(str(rank_file))
    monkeypatch.setattr(tiktoken.Encoding, "encode_to_numpy", panic)
    with pytest.raises(
        UserError, match="cannot encode a text of 1,000 characters .*StackOverflow.*; leave it out, or divide it"
    ):
        read.encode(" " * 1000)


def test_a_lone_surrogate_is_read_as_the_replacement_character(rank_file: Path, hugging_face_folder: Path) -> None:
    for name in ("bytes", str(rank_file), str(hugging_face_folder)):
        tokenizer = load_tokenizer(name)
        assert tokenizer.encode("fox \ud800") == tokenizer.encode("fox \ufffd")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.tiktoken", "there is no such rank file"),
        ("no such tokenizer", "is no file, folder or tiktoken encoding here, and the Hugging Face Hub "),
        ("gpt2", r"'gpt2' has to be downloaded and cannot be .*no route.* use 'bytes' .* \.tiktoken"),
    ],
)
def test_a_tokenizer_that_cannot_be_had_is_named(name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(name: str) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    with pytest.raises(UserError, match=message):
        load_tokenizer(name)


def test_a_download_without_a_network_names_the_host_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As requests says it, 300 characters long, and the message of a cause that may pass says it again."""
    said = "HTTPSConnectionPool(host='blob.example', port=443): Max retries exceeded with url: /gpt2 (Caused by NameReso"

    def fail(name: str) -> None:
        raise ConnectionError(said)

    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    with pytest.raises(UserError) as refused:
        load_tokenizer("gpt2")
    assert str(explained(refused.value)).startswith(
        "tokenizer 'gpt2' has to be downloaded and cannot be (blob.example cannot be reached); use 'bytes' (built in), "
    )
    assert str(explained(refused.value)).count("blob.example") == 1
