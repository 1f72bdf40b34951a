"""A tokenizer that changes at its place is noticed wherever it is opened again, and one that is as it was never is."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.pretrained import bpe, evaluate, save_checkpoint, write_documents
from titan_dp import config
from titan_dp.checkpoint.manifest import read_manifest, write_manifest
from titan_dp.cli import dispatch
from titan_dp.data.batch import Place
from titan_dp.data.loader import build_dataloader, open_shards
from titan_dp.data.shards import TokenShards
from titan_dp.data.tokenizer import load_tokenizer
from titan_dp.errors import UserError
from titan_dp.inference.pretrained import load_pretrained
from titan_dp.inference.sampling import encode_prompt

CPU = torch.device("cpu")
OTHER_WORDS = "a whale and a whale and"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return bpe(tmp_path / "tokenizer")


@pytest.fixture
def checkpoint(tmp_path: Path, tokenizer: Path) -> Path:
    return save_checkpoint(tmp_path / "run", tokenizer=str(tokenizer))


def prepare(out: Path, tokenizer: Path, *options: str, texts: tuple[str, ...] = ("the fox", "", "the whale")) -> Path:
    """The folder of the training shards."""
    if not out.exists():
        write_documents(out.with_suffix(".jsonl"), list(texts))
    named = [str(out.with_suffix(".jsonl")), "--out", str(out), "--tokenizer", str(tokenizer), "--validation-fraction", "0"]
    assert dispatch(["prepare", *named, "--workers", "1", *options]) == 0
    return out / "train"


def generate(run: Path, tmp_path: Path) -> list[str]:
    return ["generate", str(run), "--prompt", "the", "--max-new-tokens", "2"]


def perplexity(run: Path, tmp_path: Path) -> list[str]:
    text = write_documents(tmp_path / "text.jsonl", ["the fox and the whale " * 9])
    return ["evaluate", "perplexity", str(run), "--text", str(text), "--out", str(tmp_path / "results")]


def export(run: Path, tmp_path: Path) -> list[str]:
    return ["export", str(run), str(tmp_path / "exported")]


READERS: list[Callable[[Path, Path], list[str]]] = [generate, perplexity, export]


@pytest.mark.parametrize("reader", READERS)
def test_a_tokenizer_retrained_in_place_is_refused_with_the_hash_that_was_expected(
    checkpoint: Path, tokenizer: Path, tmp_path: Path, reader: Callable[[Path, Path], list[str]]
) -> None:
    expected = load_tokenizer(str(tokenizer)).hash
    bpe(tokenizer, OTHER_WORDS)
    with pytest.raises(UserError) as refused:
        dispatch(reader(checkpoint, tmp_path))
    said = f"was trained with a tokenizer whose hash is {expected[:16]}..., and {str(tokenizer)!r} has "
    assert said in str(refused.value)
    assert str(refused.value).endswith("it was changed since; restore it, or name a copy of what it was with --tokenizer")
    assert not (tmp_path / "exported").exists()


def test_another_tokenizer_that_is_named_is_taken_and_said_to_be_another(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = bpe(tmp_path / "copy")
    load_pretrained(checkpoint, CPU, tokenizer=str(copy))
    assert capsys.readouterr().err == "", "the same under another name"
    load_pretrained(checkpoint, CPU, tokenizer=str(bpe(copy, OTHER_WORDS)))
    assert re.match("WARNING: .* was trained with a tokenizer whose hash is .* --tokenizer names it", capsys.readouterr().err)


def test_a_checkpoint_without_the_hash_is_loaded_and_it_is_said(
    checkpoint: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = read_manifest(checkpoint)
    del manifest["tokenizer_hash"]
    write_manifest(checkpoint, manifest, manifest.pop("files"))
    assert load_pretrained(checkpoint, CPU).tokenizer.hash == load_tokenizer(str(tokenizer)).hash
    assert "was saved without the hash of its tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a Hugging Face folder", "bytes"])
def test_an_export_carries_the_hash_and_a_tokenizer_changed_in_it_is_refused(
    checkpoint: Path, tokenizer: Path, tmp_path: Path, name: str
) -> None:
    source = save_checkpoint(tmp_path / "plain") if name == "bytes" else checkpoint
    assert dispatch(["export", str(source), str(tmp_path / "exported")]) == 0
    loaded = load_pretrained(tmp_path / "exported", CPU)
    assert loaded.tokenizer.hash == load_pretrained(source, CPU).tokenizer.hash
    assert loaded.source.training["tokenizer_hash"] == loaded.tokenizer.hash
    shutil.copyfile(bpe(tmp_path / "other", OTHER_WORDS) / "tokenizer.json", tmp_path / "exported" / "tokenizer.json")
    for command in (generate(tmp_path / "exported", tmp_path), ["import", str(tmp_path / "exported"), str(tmp_path / "back")]):
        with pytest.raises(UserError, match=f"whose hash is {loaded.tokenizer.hash[:16]}.* it was changed since"):
            dispatch(command)


def test_prepare_does_not_go_on_with_another_tokenizer(tokenizer: Path, tmp_path: Path) -> None:
    prepare(tmp_path / "out", tokenizer)
    before = load_tokenizer(str(tokenizer)).hash
    after = load_tokenizer(str(bpe(tokenizer, OTHER_WORDS))).hash
    with pytest.raises(UserError, match=f"whose hash is {before[:16]}.*now has {after[:16]}.*restore it, .*--overwrite"):
        prepare(tmp_path / "out", tokenizer)


def test_folders_prepared_before_and_after_are_no_mixture(tokenizer: Path, tmp_path: Path) -> None:
    first = prepare(tmp_path / "a", tokenizer)
    names = str(tokenizer), load_tokenizer(str(tokenizer)).hash[:16]
    assert len(open_shards([str(first)], "data.path", str(tokenizer), 320)) == 1
    bpe(tokenizer, OTHER_WORDS)
    second = prepare(tmp_path / "b", tokenizer)
    with pytest.raises(UserError, match=f"data.path mixes tokenizers: .*prepare both with one .*their hashes: .*{names[1]}"):
        open_shards([str(first), str(second)], "data.path", "", 320)
    with pytest.raises(UserError, match=f"data.tokenizer = {names[0]!r}, but data.path .*hash {names[1]}"):
        open_shards([str(first)], "data.path", str(tokenizer), 320)
    with pytest.raises(UserError, match=f"model's is .*their hashes: {names[1]}"):
        run = save_checkpoint(tmp_path / "run", tokenizer=str(tokenizer))
        dispatch(["evaluate", "perplexity", str(run), "--shards", str(first), "--out", str(tmp_path / "results")])


def test_shards_without_the_hash_are_read_and_it_is_said(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = prepare(tmp_path / "out", tokenizer)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["tokenizer"]["hash"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    bpe(tokenizer, OTHER_WORDS)
    data = config.Data(path=str(folder), tokenizer=str(tokenizer))
    loader = build_dataloader(data, config.Dataloader(num_workers=0), Place(2, 1, 1, 0, 1), 320)
    assert loader.tokenizer_hash == ""
    assert "was prepared without the hash of its tokenizer" in capsys.readouterr().err


# -- separators ------------------------------------------------------------------------------------------------------------


def tokens(folder: Path) -> list[int]:
    found = np.empty(len(shards := TokenShards(folder)), np.int64)
    shards.read(0, found)
    return found.tolist()


def test_one_token_for_both_ends_of_a_document_stands_once_between_two(tokenizer: Path, tmp_path: Path) -> None:
    read = load_tokenizer(str(bpe(tokenizer, bos_token="</s>")))
    fox, whale = read.encode("the fox"), read.encode("the whale")
    assert tokens(prepare(tmp_path / "out", tokenizer)) == [*fox, 1, *whale, 1]
    assert tokens(prepare(tmp_path / "first", tokenizer, "--no-eos")) == [1, *fox, 1, *whale]


def test_a_tokenizer_without_separators_is_said_loudly_unless_that_is_meant(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tokenizer / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    read = load_tokenizer(str(tokenizer))
    folder = prepare(tmp_path / "out", tokenizer)
    assert tokens(folder) == read.encode("the fox") + read.encode("the whale")
    said = capsys.readouterr().err
    assert "WARNING: documents are joined without a separator" in said
    assert "has no BOS and no EOS (its special tokens: <s>, </s>); if that is meant, say so with --no-bos --no-eos" in said
    prepare(tmp_path / "meant", tokenizer, "--no-bos", "--no-eos")
    assert "WARNING" not in capsys.readouterr().err


# -- whether documents begin with BOS ----------------------------------------------------------------------------------------

A_FOX = [256, *b"a fox"]  # as the bytes tokenizer has it, behind BOS


@pytest.mark.parametrize(("options", "adds"), [((), True), (("--no-bos",), False), (("--no-bos", "--no-eos"), False)])
def test_the_training_loader_knows_whether_documents_begin_with_bos(
    tokenizer: Path, tmp_path: Path, options: tuple[str, ...], adds: bool
) -> None:
    data = config.Data(path=str(prepare(tmp_path / "out", tokenizer, *options)))
    assert build_dataloader(data, config.Dataloader(num_workers=0), Place(2, 1, 1, 0, 1), 320).adds_bos is adds


def test_a_mixture_of_documents_with_and_without_bos_is_said(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [str(prepare(tmp_path / "a", tokenizer, "--no-bos")), str(prepare(tmp_path / "b", tokenizer))]
    loader = build_dataloader(config.Data(path=folders), config.Dataloader(num_workers=0), Place(2, 1, 1, 0, 1), 320)
    assert loader.adds_bos
    assert f"documents of {folders[1]!r} begin with BOS, those of {folders[0]!r} do not" in capsys.readouterr().err


@pytest.mark.parametrize(("adds", "ids"), [(None, A_FOX), (True, A_FOX), (False, A_FOX[1:])])
def test_a_prompt_begins_as_the_training_documents_did_from_a_checkpoint_an_export_and_an_import(
    tmp_path: Path, adds: bool | None, ids: list[int]
) -> None:
    places = [save_checkpoint(tmp_path / "run", adds_bos=adds), tmp_path / "exported", tmp_path / "imported"]
    assert dispatch(["export", *map(str, places[:2])]) == 0
    assert dispatch(["import", *map(str, places[1:])]) == 0
    for place in places:
        tokenizer = load_pretrained(place, CPU).tokenizer
        assert encode_prompt(tokenizer, "a fox") == ids
        assert encode_prompt(tokenizer, "a fox", bos=True) == A_FOX
        assert encode_prompt(tokenizer, "a fox", bos=False) == A_FOX[1:]
    settings = [json.loads((places[1] / name).read_text()) for name in ("config.json", "generation_config.json")]
    assert {each["bos_token_id"] for each in settings} == {None if adds is False else 256}
    said = "No training document began with `<|bos|>`; put none" if adds is False else "Every training document began with `<|b"
    assert said in (places[1] / "README.md").read_text()


@pytest.mark.parametrize("adds", [True, False])
def test_evaluated_texts_begin_as_the_training_documents_did(tmp_path: Path, adds: bool) -> None:
    text = write_documents(tmp_path / "text.jsonl", ["a fox"])
    run = save_checkpoint(tmp_path / "run", adds_bos=adds)
    found = {
        option: evaluate("perplexity", run, tmp_path / f"results{option}", "--text", text, *filter(None, [option]))
        for option in ("", "--bos", "--no-bos")
    }
    begins = {option: each["settings"]["texts"]["bos"] for option, each in found.items()}
    assert begins == {"": adds, "--bos": True, "--no-bos": False}


def test_an_exported_tokenizer_that_adds_bos_itself_does_not_if_documents_had_none(tokenizer: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, processors

    backend = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.save(str(tokenizer / "tokenizer.json"))
    for adds in (True, False):
        out = tmp_path / f"exported-{adds}"
        assert (
            dispatch(["export", str(save_checkpoint(tmp_path / str(adds), tokenizer=str(tokenizer), adds_bos=adds)), str(out)])
            == 0
        )
        theirs = Tokenizer.from_file(str(out / "tokenizer.json"))
        assert theirs.encode("the fox").ids == [0] * adds + load_tokenizer(str(tokenizer)).encode("the fox")
        assert load_pretrained(out, CPU).tokenizer.hash == load_tokenizer(str(tokenizer)).hash
