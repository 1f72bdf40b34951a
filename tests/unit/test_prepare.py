"""`titan-dp prepare`: the same shards from every kind of file, by any number of workers, across a kill."""

from __future__ import annotations

import base64
import gzip
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from tests.conftest import ROOT
from tests.processes import SERVER, TIMEOUT_SECONDS
from titan_dp.cli import dispatch
from titan_dp.data import shards
from titan_dp.data.shards import TokenShards
from titan_dp.errors import UserError

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


def compressed(compress: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(compress("".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()))


def as_dataset(folder: Path) -> None:
    folder.mkdir()
    write_jsonl(folder / "train.jsonl")


WRITERS: dict[str, Callable[[Path], object]] = {
    "folder": as_texts,
    "x.jsonl": write_jsonl,
    "x.jsonl.gz": compressed(gzip.compress),
    "x.jsonl.zst": compressed(zstandard.compress),
    "x.parquet": as_parquet,
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


def prepare_killed(*arguments: str | Path) -> None:
    """`prepare`, which gets a SIGKILL while it writes the sixth shard."""
    write = shards.write_atomically

    def write_or_die(path: Path, content: Callable[[Any], Any]) -> None:
        def half(file: Any) -> None:
            file.write(bytes(1000))
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

        write(path, half if path.name == "shard-00005.npy" else content)

    shards.write_atomically = write_or_die
    prepare(*arguments)


def test_a_run_killed_with_sigkill_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", [f"{i} " + "text " * 200 for i in range(2000)])
    arguments = ["--workers", "1", "--shard-tokens", "100K", "--validation-fraction", "0.3"]
    prepare(source, "--out", tmp_path / "whole", *arguments)
    process = SERVER.Process(target=prepare_killed, args=(source, "--out", tmp_path / "killed", *arguments))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "killed/train/shard-00004.npy").exists()
    assert not (tmp_path / "killed/train/shard-00005.npy").exists()
    prepare(source, "--out", tmp_path / "killed", *arguments)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_ctrl_c_is_one_sentence_and_the_same_command_goes_on(tmp_path: Path) -> None:
    arguments = [write_jsonl(tmp_path / "texts.jsonl", TEXTS * 200), "--shard-tokens", "50K", "--workers", "2"]
    command = [sys.executable, "-m", "titan_dp.cli", "prepare", *map(str, arguments), "--out", str(tmp_path / "cut")]
    # In a session of its own: a terminal tells every process of a command, the tokenising ones too.
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not list(tmp_path.glob("cut/train/shard-*.npy")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=TIMEOUT_SECONDS)[1] == "error: interrupted\n"
    assert process.returncode == 130
    prepare(*arguments, "--out", tmp_path / "cut")
    prepare("--out", tmp_path / "cut", "--verify")


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
    assert "WARNING: none of 1 documents was held out at --validation-fraction 0.01" in capsys.readouterr().out


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


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"text": "good"}\n{"text": \n', r"x.jsonl:2 is not JSON"),
        ("x.jsonl", b'{"body": "good"}\n', r"x.jsonl:1 has no text under 'text' \(it has body\)"),
        ("x.jsonl", b'{"text": "\xff"}\n', r"x.jsonl:1 is not UTF-8"),
        ("x.jsonl", b"", "the input holds no documents"),
        ("x.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 999, mtime=0)[:-9], "x.jsonl.gz cannot be decompressed"),
        ("x.txt", b"caf\xe9", r"x.txt is not UTF-8 \(byte 3\)"),
        ("x.parquet", b"no parquet", "x.parquet is not a parquet file"),
        ("x.pdf", b"%PDF", r"x.pdf' is not one of .txt"),
    ],
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
    ],
)
def test_arguments_that_do_not_fit_are_named(
    tmp_path: Path, jsonl: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.tiktoken").write_text("".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256)))
    with pytest.raises(UserError, match=message):
        prepare("--out", "out", "--workers", "1", *arguments)
