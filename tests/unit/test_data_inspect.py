"""`titan-dp data inspect`: what it says of shards whose documents are known, what it samples, and that it only reads."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.text import Text as Screen

from titan_dp import cli
from titan_dp.data.inspect import measure
from titan_dp.data.inspect.measure import Duplicates, Lengths, draw_lengths, draw_windows
from titan_dp.data.inspect.text import Decoder
from titan_dp.data.shards import MANIFEST, ShardWriter, TokenShards
from titan_dp.data.tokenizer import load_tokenizer
from titan_dp.errors import UserError, run_main

BOS, EOS = 256, 257
CONFIG = """
[model]
vocab_size = 320
[data]
document_boundaries = "{boundaries}"
[training]
seq_len = 8
local_batch_size = 2
global_batch_size = {size}
steps = 10
"""


def of(text: str | bytes) -> list[int]:
    """A document as prepare writes it with the bytes tokenizer."""
    return [BOS, *(text.encode() if isinstance(text, str) else text), EOS]


def write(folder: Path, documents: Sequence[Sequence[int]], shard_tokens: int = 10**6, **facts: Any) -> Path:
    """A folder of shards that holds `documents`, given as ids."""
    writer = ShardWriter(folder, np.dtype(np.uint16), shard_tokens, [])
    for ids in documents:
        writer.add(np.array(ids, dtype=np.uint16), len([i for i in ids if i < BOS]))
    around = {"split": "train", "validation_fraction": 0.0, "adds_bos": True, "adds_eos": True}
    writer.finish(load_tokenizer("bytes"), around | facts)
    return folder


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """What the command prints as JSON for its arguments."""

    def run(*arguments: object) -> Any:
        assert cli.dispatch(["data", "inspect", *map(str, arguments), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Path]:
    def write_config(boundaries: str = "reset", size: int = 4) -> Path:
        path = tmp_path / "run.toml"
        path.write_text(CONFIG.format(boundaries=boundaries, size=size))
        return path

    return write_config


def test_counts_lengths_and_quantiles_are_those_of_the_documents(tmp_path: Path, say: Callable[..., Any]) -> None:
    # Lengths with BOS and EOS: 3, 4, 4, 7, 34.
    write(tmp_path / "x", [of(text) for text in ("a", "bb", "cc", "ddddd", "e" * 32)], shard_tokens=9)
    found = say(tmp_path)
    (folder,) = found["folders"]
    assert [folder[key] for key in ("shards", "documents", "tokens", "text_bytes")] == [2, 5, 52, 42]
    assert folder["lengths"]["quantiles"] == {
        "0": 3,
        "0.05": 3,
        "0.25": 4,
        "0.5": 4,
        "0.75": 7,
        "0.95": 34,
        "0.99": 34,
        "1": 34,
    }
    assert [list(bin.values()) for bin in found["lengths"]["histogram"]] == [
        [2, 3, 1, 3],
        [4, 7, 3, 15],
        [8, 15, 0, 0],
        [16, 31, 0, 0],
        [32, 63, 1, 34],
    ]
    assert found["findings"] == []


def test_lengths_that_come_in_parts_are_counted_as_if_they_came_at_once(tmp_path: Path) -> None:
    lengths = np.random.default_rng(0).geometric(0.01, 5000)
    one, many = Lengths(), Lengths()
    one.add(lengths)
    for part in np.array_split(lengths, 7):
        many.add(part)
    assert (many.documents, many.tokens) == (5000, lengths.sum())
    for share in (0.0, 0.25, 0.5, 0.999, 1.0):
        exact = np.quantile(lengths, share, method="inverted_cdf")
        assert one.quantile(share) == many.quantile(share) == exact
    assert many.above(100) == ((lengths > 100).sum(), lengths[lengths > 100].sum())


def test_an_empty_document_is_counted_and_is_no_duplicate_of_another(tmp_path: Path, say: Callable[..., Any]) -> None:
    write(tmp_path / "x", [of(""), of("text"), of("")])
    found = say(tmp_path / "x")
    assert found["folders"][0]["lengths"]["empty"] == 2
    assert (found["duplicates"]["documents"], found["duplicates"]["repeats"]) == (1, 0)


def test_duplicates_are_found_across_shards_and_folders_with_the_first_and_how_many(
    tmp_path: Path, say: Callable[..., Any]
) -> None:
    write(tmp_path / "a" / "train", [of("first"), of("twice"), of("thrice!"), of("twice"), of("thrice!")], shard_tokens=10)
    # Without EOS the same text has other tokens around it, and is the same document.
    bare = [[BOS, *b"thrice!"], [BOS, *b"alone"]]
    write(tmp_path / "b" / "validation", bare, adds_eos=False, split="validation")
    found = say(tmp_path)["duplicates"]
    assert [found[key] for key in ("documents", "repeats", "tokens", "repeated_tokens")] == [7, 3, 41, 19]
    groups = [(g["copies"], g["tokens"], Path(g["folder"]).parent.name, g["document"]) for g in found["groups"]]
    assert groups == [(3, 7, "a", 2), (2, 5, "a", 1)]
    assert list(found["also_in_another_folder"].values()) == [2, 1]
    said = "\n".join(say(tmp_path)["findings"])
    assert "42.86% of the documents compared repeat an earlier one, with 46.34% of the tokens" in said
    assert f"1 held-out document of {tmp_path / 'b' / 'validation'}: also in another of these folders" in said


def test_of_too_many_documents_all_copies_are_kept_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "KEPT", 500)
    texts = np.random.default_rng(1).integers(0, 256, (2000, 8)).astype(np.uint16)
    found = Duplicates(widen=False)
    for start in range(0, 4000, 100):  # each document twice, far apart
        found.add(0, 0, range(start, start + 100), (texts[i % 2000] for i in range(start, start + 100)))
    found.finish()
    assert found.every > 1
    assert 0 < found.documents <= 500
    assert found.repeats * 2 == found.documents


def test_bytes_that_are_not_text_are_counted_by_kind(tmp_path: Path, say: Callable[..., Any]) -> None:
    documents = [of("fine\n\ttext, é"), of("nul \0 and \x1b[31m and \x85"), of("what \ufffd was"), of(b"cut \xe2\x82 here")]
    write(tmp_path / "x", documents)
    text = say(tmp_path / "x")["text"]
    assert text["bytes"] == sum(len(ids) - 2 for ids in documents)
    # U+0085 is two bytes, U+FFFD three, and the euro sign lacks its last byte.
    assert [text[key] for key in ("control_bytes", "replacement_characters", "invalid_utf8_bytes")] == [4, 1, 2]
    assert (text["not_text_bytes"], text["documents_affected"], text["first"]["document"]) == (9, 3, 1)
    assert {each["character"]: each["count"] for each in text["controls"]} == {"U+0000": 1, "U+001B": 1, "U+0085": 1}


def test_a_document_that_is_decoded_in_parts_is_cut_between_characters(
    tmp_path: Path, say: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "_PART", 10)
    write(tmp_path / "x", [of("xé€ " * 40)])
    text = say(tmp_path / "x")["text"]
    assert (text["characters"], text["bytes"], text["not_text_bytes"]) == (160, 280, 0)


def test_ids_that_never_occur_and_ids_outside_the_vocabulary_are_named(tmp_path: Path, say: Callable[..., Any]) -> None:
    write(tmp_path / "x", [of(bytes(range(2, 256))), [*of("a")[:2], 300, EOS], of(b"aa")])
    found = say(tmp_path / "x")
    (ids,) = found["ids"]
    assert (ids["never_used"], [each["id"] for each in ids["never_used_first"]]) == (2, [0, 1])
    assert ids["commonest"][0] == {"id": ord("a"), "text": "'a'", "share": 4 / 264}
    assert (ids["outside"], ids["first_outside"]["document"], ids["first_outside"]["id"]) == (1, 1, 300)
    assert any("1 ids are outside the 258 of bytes, the first is 300 in document 1" in each for each in found["findings"])


def test_bos_and_eos_that_lack_or_are_doubled_are_found(tmp_path: Path, say: Callable[..., Any]) -> None:
    write(tmp_path / "x", [[BOS, *of("twice")], of("right"), [*b"neither"]])
    found = say(tmp_path / "x")
    assert found["ids"][0]["bos"] == {"id": BOS, "documents": 2, "elsewhere": 1}
    assert found["ids"][0]["eos"] == {"id": EOS, "documents": 2, "elsewhere": 0}
    said = "\n".join(found["findings"])
    assert "1 of 3 documents lack the BOS that the manifest says they have" in said
    assert "BOS occurs 1 times within documents" in said


def test_boundaries_show_the_end_the_special_tokens_and_the_start(tmp_path: Path, say: Callable[..., Any]) -> None:
    write(tmp_path / "x", [of("the end"), of("The start")])
    found = say(tmp_path / "x")
    (boundary,) = found["boundaries"]
    assert boundary["position"] == len(of("the end"))
    assert boundary["end"] == [["<|bos|>", True], ["the end", False], ["<|eos|>", True]]
    assert boundary["start"] == [["<|bos|>", True], ["The start", False], ["<|eos|>", True]]
    assert [each["document"] for each in found["documents"]] == [0, 1]


def test_a_boundary_between_shards_is_one_too(tmp_path: Path, say: Callable[..., Any]) -> None:
    write(tmp_path / "x", [of("one"), of("two"), of("three")], shard_tokens=1)
    assert [each["position"] for each in say(tmp_path / "x")["boundaries"]] == [5, 10]


def test_what_is_drawn_depends_on_the_seed_alone(tmp_path: Path, say: Callable[..., Any]) -> None:
    write(tmp_path / "x", [of(f"document {i}") for i in range(1000)])
    first, again, other = (say(tmp_path / "x", "--seed", seed) for seed in (1, 1, 2))
    assert first == again
    assert [each["document"] for each in first["documents"]] != [each["document"] for each in other["documents"]]
    assert len(say(tmp_path / "x", "--documents", 7)["documents"]) == 7


def test_a_tokenizer_that_does_not_give_back_what_it_was_given_is_found(
    tmp_path: Path, say: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    (tmp_path / "text.txt").write_text("the ﬁrst")  # with a ligature of three bytes
    for name, lossy in (("whole", False), ("lossy", True)):
        if lossy:
            backend.normalizer = normalizers.NFKC()
        (tmp_path / name).mkdir()
        backend.save(str(tmp_path / name / "tokenizer.json"))
        out = tmp_path / f"shards-{name}"
        options = ["--tokenizer", str(tmp_path / name), "--validation-fraction", "0", "--workers", "1", "--out", str(out)]
        assert cli.dispatch(["prepare", str(tmp_path / "text.txt"), *options]) == 0
    capsys.readouterr()
    assert say(tmp_path / "shards-whole")["findings"] == []
    (finding,) = say(tmp_path / "shards-lossy")["findings"]
    assert finding.startswith("the tokens are 9 bytes of text again, the documents had 10: the tokenizer does not give back")


# -- more than is read whole ---------------------------------------------------------------------------------------------


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ALL": 2**13, "TEXT": 2**12, "WINDOW": 2**6, "WINDOWS": 16}.items():
        monkeypatch.setattr(measure, name, value)


@pytest.mark.usefixtures("small_limits")
def test_large_data_is_sampled_as_it_says_and_read_whole_with_full(tmp_path: Path, say: Callable[..., Any]) -> None:
    texts = [f"text {i} " + "x" * (i % 97) for i in range(800)]
    write(tmp_path / "x", [of(text) for text in [*texts, *texts]])  # each twice, far apart
    sample, full = say(tmp_path / "x"), say(tmp_path / "x", "--full")
    assert not any(sample["read"][key] for key in ("ids", "text", "duplicates"))
    assert all(full["read"][key] for key in ("ids", "text", "duplicates"))
    assert sample["lengths"] == full["lengths"], "lengths are exact"
    assert full["duplicates"]["repeats"] == 800
    assert 0 < sample["duplicates"]["documents"] < 1600
    assert sample["duplicates"]["tokens"] <= measure.ALL // 4
    assert sample["duplicates"]["repeats"] * 2 == sample["duplicates"]["documents"], "copies are in the sample together"
    assert 0 < sample["text"]["documents"] < full["text"]["documents"] == 1600


@pytest.mark.usefixtures("small_limits")
def test_windows_are_drawn_without_repetition_and_lie_in_their_folders(tmp_path: Path) -> None:
    sizes = (50, 3)
    sources = [TokenShards(write(tmp_path / str(n), [of("x" * 62)] * n)) for n in sizes]
    windows = draw_windows(sources, 5)
    assert len(set(windows)) == len(windows) == 16
    assert windows == draw_windows(sources, 5) != draw_windows(sources, 6)
    assert all(0 <= start < stop <= len(sources[folder]) and stop - start <= 64 for folder, start, stop in windows)


@pytest.mark.usefixtures("small_limits")
def test_a_length_that_holds_too_much_is_passed_over_and_that_is_said() -> None:
    lengths = Lengths()
    lengths.add(np.array([0, 5, 10]), np.array([9, 100, 10**6]))
    drawn, passed_over = draw_lengths(lengths, 0)
    assert (drawn.tolist(), passed_over) == ([5], True)


# -- a batch -------------------------------------------------------------------------------------------------------------


def test_a_batch_is_the_loaders_with_boundaries_labels_and_resets_at_their_places(
    tmp_path: Path, say: Callable[..., Any], config: Callable[..., Path]
) -> None:
    write(tmp_path / "x", [of("abc")] * 200)  # 5 tokens each, 8 in a row
    batch = say(tmp_path / "x", "--config", config())["batch"]
    assert batch["shapes"]["input_ids"] == batch["shapes"]["labels"] == [[2, 8], "int64"]
    assert batch["shapes"]["cu_seqlens"][1] == "int32"
    shown = batch["shown"]
    row = (of("abc") * 200)[shown["first_token"] :][:9]
    begins = [p for p in range(8) if row[p] == BOS]
    assert shown["documents_begin"] == len(begins) > 0
    assert shown["documents"] == [shown["first_token"] // 5, (shown["first_token"] + 7) // 5]
    assert [each["position"] for each in shown["positions"]] == list(range(8)), "of a row of 8 all of them"
    for each in shown["positions"]:
        p = each["position"]
        assert each["input"] == row[p]
        assert each["label"] == (-100 if row[p + 1] == BOS else row[p + 1])
        assert each["document_begins"] == (row[p] == BOS)
        assert each["reset"] == (p == 0 or row[p] == BOS)
    assert batch["labels"] + batch["masked_labels"] == 16


def test_a_state_that_is_carried_on_has_no_resets(tmp_path: Path, say: Callable[..., Any], config: Callable[..., Path]) -> None:
    write(tmp_path / "x", [of("abc")] * 200)
    batch = say(tmp_path / "x", "--config", config("carry"))["batch"]
    assert (batch["shapes"]["cu_seqlens"], batch["resets"]) == (None, None)
    assert not any(each["reset"] for each in batch["shown"]["positions"])
    assert any(each["document_begins"] for each in batch["shown"]["positions"])


def test_a_step_begins_with_its_own_sample(tmp_path: Path, say: Callable[..., Any], config: Callable[..., Path]) -> None:
    write(tmp_path / "x", [of("abc")] * 200)
    arguments = tmp_path / "x", "--config", config(), "--step"
    assert [row["sample"] for row in say(*arguments, 4)["batch"]["rows"]] == [12, 13]
    config(size=-1)
    assert [row["sample"] for row in say(*arguments, 1)["batch"]["rows"]] == [0, 1]
    with pytest.raises(UserError, match=r"--step 4: with training\.global_batch_size = -1 it depends on the number of ranks"):
        say(*arguments, 4)


def test_a_mixture_is_what_the_config_names_and_settings_may_stand_before_the_folder(
    tmp_path: Path, say: Callable[..., Any], config: Callable[..., Path]
) -> None:
    one, two = (write(tmp_path / name, [of(name)] * 50) for name in ("one", "two"))
    mixture = ["--config", config(), "--data.path", json.dumps([str(one), str(two)]), "--validation.enable=false"]
    assert [each["folder"] for each in say(*mixture)["folders"]] == [str(one), str(two)]
    assert say("--config", config(), "--training.seq_len", 16, one)["batch"]["shapes"]["labels"] == [[2, 16], "int64"]
    with pytest.raises(UserError, match="FOLDER and --data.path both name the data"):
        say(one, *mixture)


def test_the_validation_folder_beside_training_is_not_trained_on_and_a_refusal_is_told(
    tmp_path: Path, say: Callable[..., Any], config: Callable[..., Path]
) -> None:
    write(tmp_path / "x" / "train", [of("abc")] * 200)
    write(tmp_path / "x" / "validation", [of("abd")] * 200, split="validation", validation_fraction=0.1)
    found = say(tmp_path / "x", "--config", config())
    assert {row["folder"] for row in found["batch"]["rows"]} == {str(tmp_path / "x" / "train")}
    assert any("a run would be refused: validation.path" in each for each in found["findings"])


# -- mistakes, and what a user sees --------------------------------------------------------------------------------------


def refused(*arguments: object) -> int:
    return run_main(lambda: cli.dispatch(["data", "inspect", *map(str, arguments)]))


def test_mistakes_are_one_sentence_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "x", [of("abc")] * 200)
    for arguments, sentence in (
        ([], "name a FOLDER of token shards"),
        ([write(tmp_path / "empty", [])], "empty holds no documents; prepare the data again"),
        ([tmp_path / "empty", "--config", "debug.toml"], "has 0 tokens, fewer than one sample of training.seq_len + 1"),
        ([tmp_path / "nowhere"], "there are no token shards in"),
        ([folder / "shard-00000.npy"], f"there are some in '{folder}'"),
        ([folder, "--training.seq_len", 8], "--training.seq_len is a setting of a run: add --config NAME"),
        ([folder, "--figure", folder / "figures"], "lies in the shards of"),
        (["--config", "debug.toml", "--data.source", "state_tracking", "--state_tracking.task", "S3"], "makes its tokens"),
    ):
        assert refused(*arguments) == 2, arguments
        error = capsys.readouterr().err
        assert sentence in error
        assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("harm", ["cut off", "offsets", "manifest", "bits", "vocabulary"])
def test_damaged_shards_are_refused_with_their_name(tmp_path: Path, harm: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "x", [of("abc")] * 200)
    names = {"offsets": "shard-00000.starts.npy", "manifest": MANIFEST, "vocabulary": MANIFEST}
    path = folder / names.get(harm, "shard-00000.npy")
    raw = path.read_bytes()
    if harm == "cut off":
        path.write_bytes(raw[:-100])
    elif harm == "offsets":
        path.write_bytes(raw[:-16] + raw[-8:] + raw[-16:-8])
    elif harm == "bits":
        path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    elif harm == "vocabulary":
        path.write_bytes(raw.replace(b'"vocab_size": 258', b'"vocab_size": 4000000000'))
    else:
        path.write_text("{}")
    assert refused(folder, *(["--full"] if harm == "bits" else [])) == 2
    assert str(path) in capsys.readouterr().err


def test_an_unfinished_folder_beside_finished_ones_is_named(tmp_path: Path, say: Callable[..., Any]) -> None:
    write(tmp_path / "done", [of("abc")])
    (write(tmp_path / "cut", [of("abc")]) / MANIFEST).unlink()
    found = say(tmp_path)
    assert [Path(each["folder"]).name for each in found["folders"]] == ["done"]
    assert found["notes"] == [
        f"not read: {tmp_path / 'cut'} has shards but no manifest.json: `titan-dp prepare` was cut off or is at work there"
    ]


def test_without_its_tokenizer_ids_are_shown_and_that_is_said(tmp_path: Path, say: Callable[..., Any]) -> None:
    folder = write(tmp_path / "x", [of("abc")])
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["tokenizer"]["name"] = str(tmp_path / "gone.tiktoken")
    (folder / MANIFEST).write_text(json.dumps(manifest))
    found = say(folder)
    assert found["text"] is None
    assert found["documents"][0]["pieces"] == [["BOS", True], ["97 98 99", False], ["EOS", True]]
    assert "there is no such rank file: ids are shown, and text is not checked" in found["notes"][0]
    assert say(folder, "--tokenizer", "bytes")["text"]["characters"] == 3


def test_another_tokenizer_of_the_same_name_is_not_used(tmp_path: Path) -> None:
    folder = write(tmp_path / "x", [of("abc")])
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["tokenizer"]["hash"] = "0" * 64
    (folder / MANIFEST).write_text(json.dumps(manifest))
    decoder = Decoder(TokenShards(folder))
    assert decoder.tokenizer is None
    assert "is not the one that" in decoder.problem


def test_nothing_that_a_terminal_obeys_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "x", [of("clear \x1b[2J \x07 [bold]it[/bold]")] * 3)
    assert cli.dispatch(["data", "inspect", str(tmp_path / "x")]) == 0
    shown = capsys.readouterr().out
    assert r"clear \x1b[2J \x07 [bold]it[/bold]" in shown
    assert not {"\x1b", "\x07"} & set(shown)


def test_the_folder_is_only_read_and_a_figure_lies_where_it_was_asked_for(tmp_path: Path) -> None:
    folder = write(tmp_path / "x" / "train", [of("abc"), of("a" * 100)])
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*")}
    assert cli.dispatch(["data", "inspect", str(folder), "--full", "--figure", str(tmp_path / "out"), "--format", "svg"]) == 0
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*")} == before
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["document_lengths.svg"]
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["train"]


def test_the_screen_fits_80_columns_and_ends_with_what_to_do_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], config: Callable[..., Path]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    config()
    wide = "没有空格的文字" * 40  # two columns a character, and nowhere to break
    write(tmp_path / "x" / "train", [of(text) for text in ("word " * 90, wide, "unbroken" * 200, "\0" * 50, "a\nb" * 9) * 40])
    write(tmp_path / "x" / "validation", [of("held out " * 5)], split="validation")
    assert cli.dispatch(["data", "inspect", "x", "--config", "./run.toml", "--documents", "20"]) == 0
    shown = Screen.from_ansi(capsys.readouterr().out)
    assert max(line.cell_len for line in shown.split()) <= 80
    for part in ("lengths of documents", "97.46% of the tokens", "no label", "document begins, state reset", "\\x00\\x00"):
        assert part in shown.plain, shown.plain
    assert "titan-dp prepare --out x --verify" in shown.plain
    assert "--data.path x/train" in shown.plain
