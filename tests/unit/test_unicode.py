"""Lone surrogates, wherever text is read: each becomes U+FFFD, and the reader says how many there were."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

from titan_dp import config
from titan_dp.cli import dispatch
from titan_dp.config.load import load_config
from titan_dp.data import stream as hf_stream
from titan_dp.data.batch import Place
from titan_dp.data.shards import TokenShards
from titan_dp.errors import UserError
from titan_dp.files import Replaced
from titan_dp.inference.generate import add_arguments, read_prompts

LONE = "a \ud800 b"
WHOLE = "a \ufffd b"


@pytest.mark.parametrize(
    ("text", "whole", "count"),
    [
        ("plain é \U0001f600", "plain é \U0001f600", 0),
        (LONE, WHOLE, 1),
        ("\ud83d\ude00", "\U0001f600", 0),  # a pair is the character it means
        ("\ude00\ud83d", "\ufffd\ufffd", 2),
        ("\ufffd\udcff", "\ufffd\ufffd", 1),  # what was there before is not counted
    ],
)
def test_lone_surrogates_are_replaced_and_counted(text: str, whole: str, count: int) -> None:
    replaced = Replaced()
    assert (replaced(text), replaced.characters) == (whole, count)


def as_json_lines(folder: Path) -> Path:
    (folder / "x.jsonl").write_text(json.dumps({"text": LONE}) + "\n")
    return folder / "x.jsonl"


def as_text(folder: Path) -> Path:
    """A surrogate as some programs write one, as if it were a character."""
    (folder / "x.txt").write_bytes(LONE.encode("utf-8", "surrogatepass"))
    return folder / "x.txt"


def as_parquet(folder: Path) -> Path:
    import pyarrow
    import pyarrow.parquet

    raw = pyarrow.array([b"good", LONE.encode("utf-8", "surrogatepass")], pyarrow.binary())
    table = pyarrow.table({"text": pyarrow.Array.from_buffers(pyarrow.string(), 2, raw.buffers())})
    pyarrow.parquet.write_table(table, folder / "x.parquet")
    return folder / "x.parquet"


@pytest.mark.parametrize("write", [as_json_lines, as_text, as_parquet])
def test_prepare_replaces_them_from_every_kind_of_file_and_says_where(write, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    source = write(tmp_path)
    options = ["--out", str(tmp_path / "out"), "--workers", "1", "--validation-fraction", "0"]
    assert dispatch(["prepare", str(source), *options]) == 0
    shards = TokenShards(tmp_path / "out/train")
    tokens = np.empty(len(shards), np.int64)
    shards.read(0, tokens)
    assert WHOLE.encode() in bytes(tokens[tokens < 256].tolist())
    assert shards.manifest["text_bytes"] == len(WHOLE.encode()) + 4 * (write is as_parquet)
    said = capsys.readouterr().err
    assert "warning: 1 lone surrogate in 1 document, the first in " in said
    assert source.name in said


class _Rows(list):
    def skip(self, n: int) -> _Rows:
        return _Rows(self[n:])


def test_a_stream_replaces_them_and_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(hf_stream, "load_hugging_face", lambda *args, **kwargs: _Rows([{"text": LONE}]))
    data = config.Data(source="hf", hf_dataset="x", tokenizer="bytes", hf_shuffle_buffer=0)
    loader = hf_stream.StreamLoader(data, config.Dataloader(num_workers=0), Place(9, 1, 1, 0, 1), 320)
    (ids,) = next(iter(loader))[0]["input_ids"].tolist()
    assert ids == [256, *WHOLE.encode(), 257][:9]
    assert "1 lone surrogate in 1 document streamed so far, the first in row 0 of x" in capsys.readouterr().err


def test_an_evaluation_reads_them_as_replaced(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command = ["evaluate", "perplexity", str(checkpoint), "--text", str(as_json_lines(tmp_path)), "--out", str(tmp_path / "o")]
    assert dispatch(command) == 0
    assert capsys.readouterr().err.count("1 lone surrogate in 1 document, the first in ") == 1


def prompts(*argv: str) -> list[str]:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return read_prompts(parser.parse_args(["run", *argv]))


def test_prompts_are_replaced_from_the_command_line_and_from_files(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps({"prompt": LONE}))
    assert prompts("--prompt", "caf\udce9", "--prompt-file", str(tmp_path / "x.jsonl")) == ["caf\ufffd", WHOLE]
    assert prompts("--prompt-file", str(as_text(tmp_path))) == [WHOLE]
    assert "warning: 2 lone surrogates in 2 prompts" in capsys.readouterr().err


def test_a_stop_string_is_replaced_and_said(checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    assert dispatch(["generate", str(checkpoint), "--stop", "\udce9", "--max-new-tokens", "2"]) == 0
    assert "1 lone surrogate in 1 stop string" in capsys.readouterr().err


def test_a_setting_that_is_no_unicode_is_refused() -> None:
    with pytest.raises(UserError, match=r"command line: 'caf\\udce9' is not UTF-8"):
        load_config(["--config", "debug.toml", "--job.description", "caf\udce9"])


def test_a_dataset_whose_reader_refuses_surrogates_is_named_and_read_by_the_advice(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made/train.jsonl").write_text('{"text": "a \\ud800"}\n')
    command = ["prepare", "--tokenizer", "bytes", "--workers", "1", "--out"]
    source = ["--hf-dataset", str(tmp_path / "made"), "--streaming"]
    with pytest.raises(UserError, match="The surrogate pair in string is invalid"):
        dispatch([*command, str(tmp_path / "refused"), *source])
    assert dispatch([*command, str(tmp_path / "read"), str(tmp_path / "made")]) == 0  # the advice
