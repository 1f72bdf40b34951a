"""`titan-dp prepare`: the same shards from every kind of file, by any number of workers, across a kill."""

from __future__ import annotations

import base64
import bz2
import csv
import errno
import gzip
import itertools
import json
import lzma
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models, normalizers, pre_tokenizers, trainers

import titan_dp.data.prepare
from tests.conftest import ROOT
from tests.processes import SERVER, TIMEOUT_SECONDS
from titan_dp import output
from titan_dp.cli import dispatch
from titan_dp.data import formats, shards, sources, tokenise
from titan_dp.data.shards import TokenShards
from titan_dp.data.sources import Account
from titan_dp.data.tokenizer import Tokenizer, load_tokenizer
from titan_dp.errors import UserError, run_main

TEXTS = [f"Document {i}. " + "word " * (i % 40) for i in range(400)]


def prepare(*arguments: str | Path) -> None:
    assert dispatch(["prepare", *map(str, arguments)]) == 0


def write_jsonl(path: Path, texts: list[str] = TEXTS) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "texts.jsonl")


def contents(out: Path) -> dict[str, bytes]:
    """Every file of both splits."""
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file() and p.parent != out}


def documents(folder: Path) -> list[bytes]:
    """The documents of a shard folder as bytes, BOS and EOS checked and removed."""
    shards = TokenShards(folder)
    tokens = np.empty(len(shards), np.int64)
    shards.read(0, tokens)
    starts = [*shards.document_starts(0, len(shards)), len(shards)]
    found = []
    for start, end in itertools.pairwise(starts):
        assert (tokens[start], tokens[end - 1]) == (256, 257)
        found.append(bytes(tokens[start + 1 : end - 1].tolist()))
    return found


def as_texts(folder: Path) -> None:
    folder.mkdir()
    for i, text in enumerate(TEXTS):
        (folder / f"{i:04}.txt").write_text(text)


def as_parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), path, row_group_size=64)


def as_dataset(folder: Path) -> None:
    folder.mkdir()
    write_jsonl(folder / "train.jsonl")


def as_arrow(path: Path) -> None:
    import pyarrow

    table = pyarrow.table({"text": TEXTS})
    new = pyarrow.ipc.new_stream if path.stem == "stream" else pyarrow.ipc.new_file
    with new(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=64)


def as_table(path: Path) -> None:
    with path.open("w", newline="") as file:
        rows = csv.writer(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        rows.writerows([["id", "text"], *enumerate(TEXTS)])


def as_linked_folders(folder: Path) -> None:
    """Two levels, one of them a link, and a link that leads back."""
    elsewhere = folder.with_name("elsewhere")
    (elsewhere / "deeper").mkdir(parents=True)
    write_jsonl(elsewhere / "deeper" / "x.ndjson")
    folder.mkdir()
    (folder / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)


def packed(write: Callable[[Path], object], compress: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    """What `write` writes into a file of the name without its last ending, compressed."""

    def write_packed(path: Path) -> None:
        plain = path.with_suffix("")
        write(plain)
        path.write_bytes(compress(plain.read_bytes()))
        plain.unlink()

    return write_packed


def in_frames(raw: bytes) -> bytes:
    """zstd as a writer leaves it that flushes now and then: several frames."""
    return b"".join(zstandard.compress(raw[i : i + 5000]) for i in range(0, len(raw), 5000))


def values(separator: str, around: str = "") -> Callable[[Path], object]:
    records = [json.dumps({"id": [i], "text": text}, indent=1) for i, text in enumerate(TEXTS)]
    return lambda path: path.write_text(around[:1] + separator.join(records) + around[1:])


WRITERS: dict[str, Callable[[Path], object]] = {
    "folder": as_texts,
    "linked folders": as_linked_folders,
    "x.jsonl": write_jsonl,
    "x.JSONL": lambda path: path.write_bytes(b"\xef\xbb\xbf" + write_jsonl(path).read_bytes()),
    "x.jsonl.gz": packed(write_jsonl, gzip.compress),
    "x.jsonl.zst": packed(write_jsonl, in_frames),
    "x.Ndjson.BZ2": packed(write_jsonl, bz2.compress),
    "x.ndjson.xz": packed(write_jsonl, lambda raw: lzma.compress(raw[:999]) + bytes(4) + lzma.compress(raw[999:])),
    "array.json": values(",\n", "[]"),
    "values.json.gz": packed(values("\n"), gzip.compress),
    "x.csv": as_table,
    "x.tsv.zst": packed(as_table, zstandard.compress),
    "x.parquet": as_parquet,
    "x.parquet.gz": packed(as_parquet, gzip.compress),
    "stream.arrow": as_arrow,
    "file.arrow": as_arrow,
    "a dataset": as_dataset,
    "a streamed dataset": as_dataset,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_input_gives_the_same_documents(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    WRITERS[name](tmp_path / name)
    source = ["--hf-dataset"] * name.endswith("dataset") + ["--streaming"] * ("streamed" in name)
    prepare(*source[::-1], tmp_path / name, "--out", tmp_path / "out", "--workers", "1", "--validation-fraction", "0")
    assert documents(tmp_path / "out/train") == [text.encode() for text in TEXTS]


def test_the_number_of_workers_does_not_change_a_byte(tmp_path: Path, jsonl: Path) -> None:
    for workers in ("1", "2"):
        prepare(jsonl, "--out", tmp_path / workers, "--workers", workers, "--shard-tokens", "10K")
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert len(TokenShards(tmp_path / "1/train").shards) > 3


def test_held_out_documents_are_not_trained_on_and_duplicates_stay_together(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x.jsonl", TEXTS * 2)
    prepare(tmp_path / "x.jsonl", "--out", tmp_path / "out", "--workers", "1", "--validation-fraction", "0.2")
    train, held_out = (documents(tmp_path / "out" / split) for split in ("train", "validation"))
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(text.encode() for text in TEXTS * 2)
    assert 0.1 < len(held_out) / 800 < 0.3


def prepare_killed(owner: Any, name: str, call: int, *arguments: str | Path) -> None:
    """`prepare`, which gets a SIGKILL when the method `name` of `owner` is called for the `call`-th time, half way through."""
    method, calls = getattr(owner, name), itertools.count(1)

    def die(self: Any, *rest: Any) -> Any:
        if next(calls) == call:
            if isinstance(self, shards._Appended) and rest:
                method(self, rest[0][: len(rest[0]) // 2])
                self._file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return method(self, *rest)

    setattr(owner, name, die)
    prepare(*arguments)


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (shards._Appended, "append", 60),
        (shards._Appended, "close", 9),
        (shards.ShardWriter, "sync", 8),
        (titan_dp.data.prepare._Progress, "save", 6),
        (shards.ShardWriter, "publish", 10),
        (shards.ShardWriter, "finish", 2),
    ],
    ids=lambda value: str(value),
)
def test_a_run_killed_with_sigkill_goes_on_to_the_same_bytes(tmp_path: Path, owner: Any, name: str, call: int) -> None:
    for part in range(4):
        texts = [f"{part} {i} \ud800" * (i % 7 > 0) + "text " * 20 for i in range(500)]
        write_jsonl(tmp_path / f"{part}.jsonl", texts)
    (tmp_path / "long.txt").write_text("a long text of many words " * 2000)
    arguments = [*sorted(tmp_path.glob("*.*")), "--workers", "2", "--shard-tokens", "10K", "--validation-fraction", "0.3"]
    arguments += ["--batch-characters", "3K", "--out"]
    prepare(*arguments, tmp_path / "whole")
    process = SERVER.Process(target=prepare_killed, args=(owner, name, call, *arguments, tmp_path / "killed"))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    prepare(*arguments, tmp_path / "killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert not list(tmp_path.glob("killed/*/.*"))


def test_a_resume_tokenises_only_what_is_missing_and_opens_no_file_that_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in range(4):
        write_jsonl(tmp_path / f"{part}.jsonl", [f"{part} {i} " + "text " * 20 for i in range(100)])
    arguments = [*sorted(tmp_path.glob("*.*")), "--workers", "1", "--batch-characters", "2K", "--shard-tokens", "6K", "--out"]
    prepare(*arguments, tmp_path / "whole")

    tokenised: list[str] = []

    def counting(name: str) -> Tokenizer:
        real = load_tokenizer(name)

        def encode_arrays(texts: list[str]) -> list[np.ndarray]:
            if len(tokenised) > 330 and not (tmp_path / "cut_off").exists():
                (tmp_path / "cut_off").touch()
                raise KeyboardInterrupt
            tokenised.extend(texts)
            return real.encode_arrays(texts)

        return replace(real, encode_arrays=encode_arrays)

    monkeypatch.setattr("titan_dp.data.prepare.load_tokenizer", counting)
    with pytest.raises(KeyboardInterrupt):
        prepare(*arguments, tmp_path / "cut")
    saved = json.loads((tmp_path / "cut" / "progress.json").read_text())
    kept = saved["account"]["documents"]
    assert kept > 250
    assert saved["place"][0] >= 2
    assert saved["shards"]["validation"] == []  # although the held-out documents are in no shard yet
    opened: list[str] = []
    read = formats.READERS[".jsonl"]
    monkeypatch.setitem(formats.READERS, ".jsonl", lambda path, how: opened.append(path.name) or read(path, how))
    tokenised.clear()
    prepare(*arguments, tmp_path / "cut")
    assert len(tokenised) == 400 - kept
    assert opened == [f"{part}.jsonl" for part in range(saved["place"][0], 4)]
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.parametrize("source", ["files", "dataset", "stream"])
def test_an_input_is_read_on_from_any_place(tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "a.jsonl", TEXTS[:100])
    write_jsonl(tmp_path / "in" / "b.jsonl", TEXTS[100:])

    def opened(place: tuple[int, int]) -> sources.Documents:
        if source == "files":
            files = sources.find_files([str(tmp_path / "in")])
            return sources.FileDocuments(files, formats.Reading(), Account(), place=place)
        dataset = sources.load_hugging_face(str(tmp_path / "in"), "", "train", "text", source == "stream")
        return sources.DatasetDocuments(dataset, "in", "text", Account(), place=place)

    whole = opened((0, 0))
    found, place = [], (0, 0)
    for number, (_, text) in enumerate(whole):
        found.append(text)
        place = whole.place if number == 149 else place
    assert found == TEXTS
    rest = opened(place)
    assert [text for _, text in rest] == TEXTS[150:]
    assert rest.place == whole.place


def test_what_an_earlier_version_has_begun_is_not_gone_on_with(tmp_path: Path, jsonl: Path) -> None:
    prepare(jsonl, "--out", tmp_path / "out")
    path = tmp_path / "out" / "progress.json"
    record = json.loads(path.read_text())
    old = {"plan": record["plan"], "finished": False, "done": {"train": 9, "validation": 0}, "shards": record["shards"]}
    path.write_text(json.dumps(old))
    with pytest.raises(UserError, match="was begun by an earlier version, .*; --overwrite prepares everything anew"):
        prepare(jsonl, "--out", tmp_path / "out")
    prepare(jsonl, "--out", tmp_path / "out", "--overwrite")


def test_files_that_were_not_yet_begun_may_change_before_the_same_command_goes_on(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "b.jsonl").write_text("{")
    arguments = [tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--out", tmp_path / "out", "--workers", "1"]
    arguments += ["--shard-tokens", "1K", "--batch-characters", "2K", "--validation-fraction", "0"]
    with pytest.raises(UserError, match="b.jsonl:1 is not JSON"):
        prepare(*arguments)
    (tmp_path / "b.jsonl").write_bytes(LINES)
    with pytest.raises(UserError, match="was prepared with other arguments"):
        prepare(*arguments, "--no-eos")
    (tmp_path / "out" / "train" / ".shard-00099.npy.tmp").touch()  # of more tokens than there are now
    prepare(*arguments)
    assert len(documents(tmp_path / "out/train")) == 4000
    assert not list(tmp_path.glob("out/train/.*"))


SLOW = """
import itertools, time
from titan_dp.cli import main
from titan_dp.data.tokenise import Encoder
encode, calls = Encoder._encode, itertools.count()
Encoder._encode = lambda self, batch: (time.sleep(0.2 * (next(calls) > 20)), encode(self, batch))[1]
raise SystemExit(main())
"""


def begin_slowly(tmp_path: Path) -> tuple[subprocess.Popen[str], list[str | Path]]:
    """A prepare that has some shards on the disk and a minute to go, and its arguments."""
    source = write_jsonl(tmp_path / "texts.jsonl", TEXTS * 200)
    arguments: list[str | Path] = [source, "--shard-tokens", "50K", "--batch-characters", "20K", "--workers", "2"]
    arguments += ["--out", tmp_path / "cut"]
    # In a session of its own: a terminal tells every process of a command.
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, "prepare", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not list(tmp_path.glob("cut/train/shard-*.npy")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    return process, arguments


def test_ctrl_c_is_one_sentence_and_the_same_command_goes_on(tmp_path: Path) -> None:
    process, arguments = begin_slowly(tmp_path)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=TIMEOUT_SECONDS)[1].splitlines()
    assert [line for line in said if not line.startswith("bytes read")] == ["interrupted"]
    assert process.returncode == 130
    prepare(*arguments)
    prepare("--out", tmp_path / "cut", "--verify")


def test_a_separator_ends_documents_wherever_it_falls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("titan_dp.data.formats._PIECE", 7)  # separators lie across what is read at a time
    (tmp_path / "x.txt").write_text("\n--\n".join(TEXTS[:30]) + "\n--\n")
    arguments = ["--workers", "1", "--validation-fraction", "0"]
    prepare(tmp_path / "x.txt", "--out", tmp_path / "out", "--separator", r"\n--\n", *arguments)
    assert documents(tmp_path / "out/train") == [text.encode() for text in TEXTS[:30]]


TOKENIZERS = {
    "bytes": lambda folder: "bytes",
    "ranks": lambda folder: write_ranks(folder / "x.tiktoken"),
    "byte-level": lambda folder: write_bpe(folder, pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "with a prefix": lambda folder: write_bpe(folder, pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "metaspace": lambda folder: write_bpe(folder, pre_tokenizers.Metaspace()),
    "undivided": lambda folder: write_bpe(
        folder, None, normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    ),
}
SENTENCES = "".join(f"The quick  brown fox, number {i}, jumps over Ünïcödé 中文字 dogs.\n\n" for i in range(60))


def write_ranks(path: Path) -> str:
    tokens = [bytes([i]) for i in range(256)] + [b" t", b"he", b" the", b"ow", b"ox", b"\n\n", b".\n\n", b"  "]
    path.write_text("".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens)))
    return str(path)


def write_bpe(folder: Path, divide: Any, normalize: Any = None) -> str:
    backend = HFTokenizer(models.BPE(byte_fallback=True))
    backend.pre_tokenizer, backend.normalizer = divide or pre_tokenizers.Metaspace(), normalize
    backend.train_from_iterator([SENTENCES], trainers.BpeTrainer(vocab_size=300, show_progress=False))
    backend.pre_tokenizer = divide  # type: ignore[assignment]
    backend.save(str(folder / "tokenizer.json"))
    return str(folder)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_long_document_in_pieces_has_the_ids_of_the_whole(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer").mkdir()
    tokenizer = TOKENIZERS[kind](tmp_path / "tokenizer")
    (tmp_path / "x.txt").write_text(SENTENCES)
    arguments = [tmp_path / "x.txt", "--tokenizer", tokenizer, "--validation-fraction", "0", "--out"]
    prepare(*arguments, tmp_path / "whole")
    monkeypatch.setattr(formats, "_LONG", 1000)
    monkeypatch.setattr(formats, "_PIECE", 333)  # cuts characters of several bytes
    longest: list[int] = []

    def measured(name: str) -> Tokenizer:
        real = load_tokenizer(name)
        return replace(real, encode_arrays=lambda texts: longest.append(max(map(len, texts))) or real.encode_arrays(texts))

    monkeypatch.setattr("titan_dp.data.prepare.load_tokenizer", measured)
    prepare(*arguments, tmp_path / "pieces", "--batch-characters", "500")
    assert contents(tmp_path / "pieces") == contents(tmp_path / "whole")
    assert max(longest) <= 500 + 64
    assert len(longest) >= len(SENTENCES) // 500


def test_a_text_file_is_never_held_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "_LONG", 1000)
    monkeypatch.setattr(formats, "_PIECE", 100)
    (tmp_path / "x.txt").write_text("\ufeff" + "ä" * 3000 + "--" + "short" + "--" + "b" * 2000)
    found = []
    for where, text in formats.read_documents(tmp_path / "x.txt", formats.Reading(separator="--")):
        assert not isinstance(text, UserError)
        parts = [text] if isinstance(text, str) else list(text)
        assert max(map(len, parts)) <= 100 or isinstance(text, str)
        found.append((where[:6], "".join(parts), isinstance(text, str)))
    assert found == [("text 1", "ä" * 3000, False), ("text 2", "short", True), ("text 3", "b" * 2000, False)]


def test_a_long_document_that_is_bad_at_its_end_is_left_out_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "_LONG", 1000)
    monkeypatch.setattr(formats, "_PIECE", 100)
    (tmp_path / "x.txt").write_bytes(b"good==" + b"a b " * 1000 + b"\xff==" + b"c d " * 500)
    arguments = [tmp_path / "x.txt", "--separator", "==", "--batch-characters", "200", "--validation-fraction", "0"]
    with pytest.raises(UserError, match=r"text 2 of .*x.txt is not UTF-8 \(byte 4000\)"):
        prepare(*arguments, "--out", tmp_path / "stopped")
    prepare(*arguments, "--out", tmp_path / "out", "--on-bad-document", "skip")
    assert documents(tmp_path / "out/train") == [b"good", b"c d " * 500]
    assert TokenShards(tmp_path / "out/train").manifest["account"]["documents_refused"] == 1


def test_a_log_has_lines_with_the_rate_and_the_time_that_is_left(
    tmp_path: Path, jsonl: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(output, "FIRST_SIGN", 0.01)
    monkeypatch.setattr(output, "NEXT_SIGN", 0.01)
    encode = tokenise.Encoder._encode
    monkeypatch.setattr(tokenise.Encoder, "_encode", lambda self, batch: (time.sleep(0.02), encode(self, batch))[1])
    packed(write_jsonl, gzip.compress)(tmp_path / "x.jsonl.gz")
    prepare(tmp_path / "x.jsonl.gz", "--out", tmp_path / "out", "--batch-characters", "2K", "--workers", "1")
    size = (tmp_path / "x.jsonl.gz").stat().st_size
    lines = [line for line in capsys.readouterr().err.splitlines() if " left" in line]
    assert re.fullmatch(rf"bytes read [\d,]+ of {size:,}: \S+ s so far, about \S+ \w+ left, \S+ tokens/s", lines[-1])


def test_a_document_that_the_tokenizer_refuses_is_named_or_counted(
    tmp_path: Path, jsonl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def choosy(name: str) -> Tokenizer:
        real = load_tokenizer(name)

        def encode_arrays(texts: list[str]) -> list[np.ndarray]:
            if any("Document 7." in text for text in texts):
                raise UserError("it cannot be encoded")
            return real.encode_arrays(texts)

        return replace(real, encode_arrays=encode_arrays)

    monkeypatch.setattr("titan_dp.data.prepare.load_tokenizer", choosy)
    with pytest.raises(UserError, match="texts.jsonl:8: it cannot be encoded"):
        prepare(jsonl, "--out", tmp_path / "stopped")
    prepare(jsonl, "--out", tmp_path / "out", "--on-bad-document", "skip", "--validation-fraction", "0")
    assert documents(tmp_path / "out/train") == [text.encode() for i, text in enumerate(TEXTS) if i != 7]
    assert TokenShards(tmp_path / "out/train").manifest["account"]["documents_refused"] == 1


def test_a_full_disk_is_one_sentence_and_the_same_command_goes_on(
    tmp_path: Path, jsonl: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    arguments = [jsonl, "--shard-tokens", "5K", "--batch-characters", "2K", "--out"]
    prepare(*arguments, tmp_path / "whole")
    append, calls = shards._Appended.append, itertools.count()
    full_disk = Path("/dev/full").open("r+b", buffering=0)  # noqa: SIM115

    def full(self: Any, numbers: np.ndarray) -> None:
        if next(calls) > 30:
            self._file = full_disk
        append(self, numbers)

    monkeypatch.setattr(shards._Appended, "append", full)
    capsys.readouterr()
    assert run_main(lambda: dispatch(["prepare", *map(str, arguments), str(tmp_path / "out")])) == 1
    assert capsys.readouterr().err.startswith("error: No space left on device: '")
    monkeypatch.undo()
    prepare(*arguments, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("kill", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_of_a_killed_command_lives_on(tmp_path: Path, kill: signal.Signals) -> None:
    process, arguments = begin_slowly(tmp_path)
    assert Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text() == ""  # workers are threads
    process.send_signal(kill)
    process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == -kill
    prepare(*arguments)
    prepare("--out", tmp_path / "cut", "--verify")


def test_bad_documents_are_counted_if_that_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    bad = [b'{"text": 3}', b"{", b'{"text": "\xff"}', b'{"txt": "a"}']
    (tmp_path / "x.jsonl").write_bytes(b"\n".join([*bad, b'{"text": "good"}', b'{"text": ""}', b'{"text": "\\ud800"}']))
    prepare(tmp_path / "x.jsonl", "--out", tmp_path / "out", "--on-bad-document", "skip", "--validation-fraction", "0")
    assert documents(tmp_path / "out/train") == [b"good", b"", "\ufffd".encode()]
    said = capsys.readouterr().out
    assert "1 empty document" in said
    assert "WARNING: 4 documents refused, the first: " in said
    assert "x.jsonl:1 holds int under 'text', not text" in said
    counts = {"files": 1, "files_skipped": {}, "documents_empty": 1, "documents_refused": 4, "characters_replaced": 1}
    assert TokenShards(tmp_path / "out/train").manifest["account"] == counts


@pytest.mark.parametrize(
    ("name", "content", "kept"),
    [
        ("x.csv", b'id,text\n1,good\n2,caf\xe9\n3,"\xed\xa0\x80"\n', ["good", "\ufffd"]),
        ("x.json", b'[{"text": "good"}, {"text": "caf\xe9"}, {"text": "\\udc80 \xed\xa0\x80"}]', ["good", "\ufffd \ufffd"]),
        ("x.json", b'{"text": "\xff"} {"text": "good", "more": "\xff"} {"text": "good"}', ["good"]),
    ],
)
def test_one_document_that_is_not_utf_8_does_not_end_its_file(
    tmp_path: Path, name: str, content: bytes, kept: list[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    arguments = [tmp_path / name, "--workers", "1", "--validation-fraction", "0", "--out"]
    with pytest.raises(UserError, match=r"x.csv is not UTF-8|x.json is not UTF-8"):
        prepare(*arguments, tmp_path / "stopped")
    prepare(*arguments, tmp_path / "out", "--on-bad-document", "skip")
    assert documents(tmp_path / "out/train") == [text.encode() for text in kept]
    assert TokenShards(tmp_path / "out/train").manifest["account"]["documents_refused"] >= 1


@pytest.mark.parametrize("compress", [None, zstandard.compress])
def test_an_arrow_stream_that_is_cut_between_two_batches_ends_early(tmp_path: Path, compress: Any) -> None:
    path = tmp_path / "stream.arrow"
    as_arrow(path)
    cut = path.read_bytes()[:-8]  # the mark of its end
    if compress:
        path = tmp_path / "stream.arrow.zst"
        (tmp_path / "stream.arrow").unlink()
    path.write_bytes(compress(cut) if compress else cut)
    with pytest.raises(UserError, match="ends early .its stream of batches has no end.; get the whole file"):
        prepare(path, "--out", tmp_path / "out", "--workers", "1")


def test_what_may_not_be_read_is_named_before_anything_is_done(
    tmp_path: Path, jsonl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # permissions do not hold for root
    with pytest.raises(UserError, match="texts.jsonl may not be read; change its permissions"):
        prepare(jsonl, "--out", tmp_path / "out")
    monkeypatch.undo()
    (tmp_path / "in" / "locked").mkdir(parents=True)
    scan = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("locked"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"folder .*locked cannot be read \(Permission denied\)"):
        prepare(tmp_path / "in", "--out", tmp_path / "out")


def test_what_a_folder_holds_besides_is_named_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write_jsonl(folder / "x.jsonl")
    for name in ("a.pdf", "b.PDF", ".hidden.txt", "LICENSE"):
        (folder / name).write_text("no document")
    prepare(folder, "--out", tmp_path / "out", "--workers", "1")
    assert "read 1 file; not read: 2 .pdf, 1 hidden, 1 no ending" in capsys.readouterr().out


def test_a_file_that_lies_there_twice_is_refused(tmp_path: Path) -> None:
    packed(write_jsonl, gzip.compress)(tmp_path / "in.jsonl.gz")
    write_jsonl(tmp_path / "in.jsonl")
    with pytest.raises(UserError, match=r"in.jsonl and .*in.jsonl.gz are one file twice, or look like it"):
        prepare(tmp_path, "--out", tmp_path / "out")
    (tmp_path / "link").symlink_to(tmp_path)
    for inputs in ([tmp_path / "in.jsonl"] * 2, [tmp_path / "in.jsonl", tmp_path / "link" / "in.jsonl"]):
        with pytest.raises(UserError, match="are one file twice"):
            prepare(*inputs, "--out", tmp_path / "out")


def test_a_hard_link_is_the_same_file(tmp_path: Path, jsonl: Path) -> None:
    os.link(jsonl, tmp_path / "linked.jsonl")
    with pytest.raises(UserError, match="linked.jsonl and .*texts.jsonl are one file twice"):
        prepare(tmp_path, "--out", tmp_path / "out")


CHANGES: dict[str, Callable[[Path], object]] = {
    "grows": lambda path: path.open("a").write('{"text": "new"}\n'),
    "is written anew": lambda path: (path.write_bytes(path.read_bytes().swapcase()), os.utime(path, (1, 1))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_while_it_is_read_is_no_data(
    tmp_path: Path, jsonl: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = tokenise.Encoder._encode

    def change_and_encode(self: tokenise.Encoder, batch: tokenise.Batch) -> tokenise.Encoded:
        CHANGES[change](jsonl)
        return encode(self, batch)

    arguments = [jsonl, "--out", tmp_path / "out", "--workers", "1"]
    with monkeypatch.context() as patch, pytest.raises(UserError, match="texts.jsonl has changed while it was read"):
        patch.setattr(tokenise.Encoder, "_encode", change_and_encode)
        prepare(*arguments)
    assert not list((tmp_path / "out").rglob("manifest.json"))
    write_jsonl(jsonl)
    prepare(*arguments, "--overwrite")
    assert len(documents(tmp_path / "out" / "train")) + len(documents(tmp_path / "out" / "validation")) == len(TEXTS)


WIDE = ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]


@pytest.mark.parametrize("encoding", WIDE)
def test_text_in_utf_16_is_not_taken_for_text_with_a_nul_behind_every_letter(tmp_path: Path, encoding: str) -> None:
    contents = {
        "x.txt": "the fox",
        "x.jsonl": '{"text": "the fox"}\n',
        "x.json": '[{"text": "the fox"}]',
        "x.csv": "text\nfox\n",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content.encode(encoding))
        with pytest.raises(UserError, match=f"{name} is UTF-16 or UTF-32, not UTF-8; convert it with iconv"):
            prepare(tmp_path / name, "--out", tmp_path / f"out-{name}", "--workers", "1")


def test_one_utf_16_file_among_others_is_counted_if_that_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_bytes("the fox".encode("utf-16-le"))
    (tmp_path / "b.txt").write_text("the whale")
    prepare(tmp_path, "--out", tmp_path / "out", "--on-bad-document", "skip", "--validation-fraction", "0")
    assert documents(tmp_path / "out" / "train") == [b"the whale"]
    assert "1 document refused, the first: " in capsys.readouterr().out


def test_a_separator_that_divides_nothing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.txt").write_bytes(b"one\r\n\r\ntwo")
    for written, said in ((r"\n\n", True), (r"\r\n\r\n", False)):
        prepare(tmp_path / "x.txt", "--out", tmp_path / str(said), "--separator", written, "--validation-fraction", "0")
        assert (f"WARNING: --separator {written!r} divides no file" in capsys.readouterr().out) is said


def test_what_was_cut_off_is_prepared_by_the_same_command_once_it_is_whole(tmp_path: Path) -> None:
    whole = gzip.compress(LINES, mtime=0)
    (tmp_path / "x.jsonl.gz").write_bytes(whole[:-9])
    arguments = [tmp_path / "x.jsonl.gz", "--out", tmp_path / "out", "--workers", "1"]
    with pytest.raises(UserError, match="ends early .*; get the whole file and give the same command"):
        prepare(*arguments)
    (tmp_path / "x.jsonl.gz").write_bytes(whole)
    prepare(*arguments)


def test_what_prepare_writes_is_not_read_again(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_jsonl(tmp_path / "x.jsonl")
    (tmp_path / "state.json").write_text("{}")
    for name in ("one", "two"):
        prepare(tmp_path, "--out", tmp_path / name, "--workers", "1", "--validation-fraction", "0")
        assert len(documents(tmp_path / name / "train")) == len(TEXTS)
    assert "records of datasets" in capsys.readouterr().out


def test_an_input_without_a_character_is_no_data(tmp_path: Path) -> None:
    (tmp_path / "x.txt").touch()
    with pytest.raises(UserError, match="the input holds no text"):
        prepare(tmp_path / "x.txt", "--out", tmp_path / "out", "--no-bos", "--no-eos", "--workers", "1")


def test_the_benchmark_compares_the_same_tokens(tmp_path: Path) -> None:
    environment = os.environ | {"BENCHMARK_RESULTS": str(tmp_path), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    arguments = ["--megabytes", "0.3", "--pairs", "1", "--tokenizers", "bpe"]
    subprocess.run([sys.executable, ROOT / "benchmarks/prepare.py", *arguments], env=environment, cwd=ROOT, check=True)
    ours, theirs = json.loads((tmp_path / "prepare.json").read_text())["rows"]
    assert (ours["side"], theirs["side"]) == ("prepare", "datasets.map")
    assert ours["M tokens"] == theirs["M tokens"] > 0.03
    assert ours["peak MB"] > 10
    assert re.fullmatch(r"[\d.]+ \([\d.]+ to [\d.]+\)", ours["times as fast"])


def test_inputs_may_be_named_in_a_list(tmp_path: Path, jsonl: Path) -> None:
    (tmp_path / "list").write_text(f"{jsonl}\n\n")
    prepare("--files-from", tmp_path / "list", "--out", tmp_path / "out", "--workers", "1", "--validation-fraction", "0")
    assert len(documents(tmp_path / "out/train")) == len(TEXTS)


def test_an_input_that_changed_at_the_same_size_is_seen(tmp_path: Path, jsonl: Path) -> None:
    arguments = [jsonl, "--out", tmp_path / "out", "--workers", "1"]
    prepare(*arguments)
    jsonl.write_text(jsonl.read_text().replace("Document 1.", "Document x."))
    with pytest.raises(UserError, match=r"texts.jsonl has changed since it was prepared into .*out; --overwrite prepares"):
        prepare(*arguments)
    prepare(*arguments, "--overwrite")
    assert any(text.startswith(b"Document x.") for text in documents(tmp_path / "out/train"))


def test_what_a_tokenizer_file_says_about_inference_does_not_cut_documents(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    backend = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "[PAD]": 2}, merges=[]))
    backend.enable_truncation(4)
    backend.enable_padding(pad_id=2, pad_token="[PAD]", length=8)
    (tmp_path / "tokenizer").mkdir()
    backend.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path / "tokenizer")).encode_batch(["ababab", "b"]) == [[0, 1, 0, 1, 0, 1], [1]]


def test_a_column_that_is_not_there_leaves_nothing_in_the_way_of_the_right_one(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"body": "some text"}\n' * 3)
    arguments = [tmp_path / "x.jsonl", "--out", tmp_path / "out", "--workers", "1", "--validation-fraction", "0"]
    with pytest.raises(UserError, match="has no text under 'text'"):
        prepare(*arguments)
    prepare(*arguments, "--column", "body")
    assert len(documents(tmp_path / "out" / "train")) == 3


def test_documents_too_few_to_hold_any_out_are_said_to_be_so(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "x.txt").write_text("a text")
    prepare(tmp_path / "x.txt", "--out", tmp_path / "out", "--workers", "1")
    assert "WARNING: none of 1 document was held out at --validation-fraction 0.01" in capsys.readouterr().out


def test_out_is_a_folder_and_its_sign_of_the_home_folder_is_read(
    tmp_path: Path, jsonl: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    prepare("~/texts.jsonl", "--out", "~/out")
    prepare("--out=~/out", "--verify")
    assert not (tmp_path / "~").exists()
    capsys.readouterr()
    for out in (jsonl, jsonl / "deeper"):
        assert run_main(lambda out=out: dispatch(["prepare", str(jsonl), "--out", str(out)])) == 2  # type: ignore[misc]
        assert "lies" in capsys.readouterr().err


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    for name, content in (
        ("a.jsonl", b'{"text": "a"}'),
        ("b.txt", b"b"),
        ("c.csv", b"text\nc\n"),
        ("d.json", b'[{"text": "d"}]'),
    ):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content)
    prepare(*sorted(tmp_path.glob("*.*")), "--out", tmp_path / "out", "--validation-fraction", "0")
    assert documents(tmp_path / "out/train") == [b"a", b"b", b"c", b"d"]


def test_a_finished_folder_is_verified_and_left_alone_until_overwrite(
    tmp_path: Path, jsonl: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = [jsonl, "--out", tmp_path / "out", "--workers", "1"]
    prepare(*arguments)
    before = contents(tmp_path / "out")
    prepare(*arguments)
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"was prepared with other arguments \(validation_fraction\)"):
        prepare(*arguments, "--validation-fraction", "0.5")
    assert contents(tmp_path / "out") == before
    prepare("--out", tmp_path / "out", "--verify")
    shard = tmp_path / "out/train/shard-00000.npy"
    raw = bytearray(shard.read_bytes())
    raw[-3] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(UserError, match=r"train/shard-00000.npy has sha256"):
        prepare("--out", tmp_path / "out", "--verify")
    prepare(*arguments, "--validation-fraction", "0.5", "--overwrite")
    prepare("--out", tmp_path / "out", "--verify")


def test_verify_compares_the_account_with_the_input_while_that_is_there(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    lines = [{"text": text} for text in ("a", "", "\ud800", "b" * 3000)] + [{"txt": "refused"}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out"
    options = ["--on-bad-document", "skip", "--no-bos", "--no-eos", "--batch-characters", "1K"]
    prepare(tmp_path / "x.jsonl", "--out", out, *options, "--validation-fraction", "0.5")
    prepare("--out", out, "--verify")
    assert "account: good, the input has 1 file, 4 documents, 3,004 bytes of text" in capsys.readouterr().out
    record = json.loads((out / "progress.json").read_text())
    for key, other, said in (
        ("documents", 5, "the input has 1 file, 4 documents and 1 replaced character, its account 1, 6 and 1"),
        ("text_bytes", 9, "1 empty document and 3,004 bytes of text, its account 1 and 9"),
        ("without_tokens", 2, "the shards hold 3 documents, the account has 2 with tokens"),
    ):
        changed = record | {"account": record["account"] | {key: other}}
        (out / "progress.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match=said):
            prepare("--out", out, "--verify")
    (out / "progress.json").write_text(json.dumps(record))
    os.utime(tmp_path / "x.jsonl", (1, 1))
    with pytest.raises(UserError, match="x.jsonl has changed since it was prepared"):
        prepare("--out", out, "--verify")
    (tmp_path / "x.jsonl").unlink()
    prepare("--out", out, "--verify")
    assert "account: not checked, because" in capsys.readouterr().out


LINES = "".join(json.dumps({"text": f"{i} of many"}) + "\n" for i in range(2000)).encode()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"text": "good"}\n{"text": \n', r"x.jsonl:2 is not JSON"),
        ("x.jsonl", b'{"body": "good"}\n', r"x.jsonl:1 has no text under 'text' \(it has body\)"),
        ("x.jsonl", b'{"text": "\xff"}\n', r"x.jsonl:1 is not UTF-8"),
        ("x.jsonl", b"", "the input holds no documents"),
        ("x.jsonl", b'{"text": null}\n', r"x.jsonl:1 holds NoneType under 'text', not text"),
        ("x.jsonl", b'{"text": ' + b"9" * 5000 + b"}", "x.jsonl:1 is not JSON: Exceeds the limit"),
        ("x.jsonl", b"[" * 100_000, "x.jsonl:1 is not JSON: maximum recursion depth"),
        ("x.json", b'[{"text": "a"}, {"text"]', "item 2 of .*x.json is not JSON"),
        ("x.csv", b"id,body\n1,a\n", "x.csv has no column 'text'; it has id, body"),
        ("x.csv", b"id,text\n1\n", "row 1 of .*x.csv is shorter than the first row"),
        ("x.json", b'[{"text": "a"}, ', "x.json ends early"),
        ("x.json", b'[{"text": "a"} {"text": "b"}]', "x.json is not JSON: '{' after item 1"),
        ("x.json", b'[{"text": "a"}], 3', "x.json is not JSON: ',' after item 1"),
        (
            "x.csv",
            b"id,text\n1,Hello, world\n",
            "row 1 of .*x.csv is longer than the first row; a field with a ',' in it must be",
        ),
        ("x.tsv", b'id\ttext\n1\t"Hello\n2\tb\n', "x.tsv is not a table after line 1: unexpected end of data"),
        ("x.csv", b"text,text\na,b\n", "x.csv has two columns 'text'"),
        ("x.jsonl.gz", b"", "x.jsonl.gz ends early"),
        ("x.jsonl.zst", b"", "x.jsonl.zst ends early"),
        ("x.jsonl.xz", lzma.compress(LINES) + b"garbage", "x.jsonl.xz cannot be decompressed"),
        ("x.jsonl.bz2", bz2.compress(LINES) + bz2.compress(LINES)[:50] + b"garbage" * 9, "x.jsonl.bz2 cannot be decompressed"),
        ("x.arrow", b"no arrow", "x.arrow is not an arrow file"),
        ("x.jsonl.gz", gzip.compress(LINES, mtime=0)[:-9], "x.jsonl.gz ends early"),
        ("x.jsonl.bz2", bz2.compress(LINES)[:-9], "x.jsonl.bz2 ends early"),
        ("x.jsonl.xz", lzma.compress(LINES)[:-9], "x.jsonl.xz ends early"),
        ("x.jsonl.zst", in_frames(LINES)[:-9], "x.jsonl.zst ends early"),
        ("x.jsonl.gz", LINES, "x.jsonl.gz cannot be decompressed"),
        ("x.jsonl.bz2", LINES, "x.jsonl.bz2 cannot be decompressed"),
        ("x.jsonl.xz", LINES, "x.jsonl.xz cannot be decompressed"),
        ("x.jsonl.zst", LINES, "x.jsonl.zst cannot be decompressed"),
        ("x.txt", b"caf\xe9", r"x.txt is not UTF-8 \(byte 3\)"),
        ("x.parquet", b"no parquet", "x.parquet is not a parquet file"),
        ("x.pdf", b"%PDF", r"x.pdf' is not one of .txt"),
    ],
    ids=itertools.count(),
)
def test_input_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        prepare(tmp_path / name, "--out", tmp_path / "out", "--workers", "1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.txt"], "input 'nowhere.txt' does not exist"),
        ([], "give one of them"),
        (["--hf-dataset", "/no/such/dataset"], "Hugging Face dataset '/no/such/dataset' .* cannot be loaded"),
        (["texts.jsonl", "--out", "."], "is not empty and holds no earlier prepare"),
        (["texts.jsonl", "--tokenizer", "x.tiktoken", "--bos"], "--bos: tokenizer .* has no BOS token"),
        ([""], "the name of an input is empty"),
        (["texts.jsonl", "--separator", "x"], "--separator divides .txt, .md, .text files, and the input has none"),
    ],
)
def test_arguments_that_do_not_fit_are_named(
    tmp_path: Path, jsonl: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.tiktoken").write_text("".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256)))
    with pytest.raises(UserError, match=message):
        prepare("--out", "out", "--workers", "1", *arguments)
