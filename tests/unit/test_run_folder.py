"""run.json, the lock and the end of metrics.jsonl: what other processes can know about a run from its folder."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titan_dp.config import Config
from titan_dp.config.load import config_from_toml
from titan_dp.errors import RunError, UserError
from titan_dp.train.run_folder import (
    RunLock,
    identity,
    is_finished,
    is_locked,
    last_record,
    last_step,
    parse_records,
    parsed_record,
    read_records,
    read_run,
    write_run,
)

TEXT = "[training]\nsteps = 10\n"


# -- identity ----------------------------------------------------------------------------------------------------------


def config(more: str = "") -> Config:
    return config_from_toml(TEXT + more)


def test_an_identity_is_of_the_settings_wherever_a_run_is_and_however_they_are_written() -> None:
    named = config('[job]\nrun_name = "x"\ndump_folder = "elsewhere"\ndescription = "y"\n')
    spelled_out = config("[model]\nnum_heads = 8\n")
    # The same in every process and version: sweeps and resumes compare it.
    known = "793afd1340847db45c55278de8c21c86f1d5bd651de62ebb527c8fb1bbcf3a8c"
    assert identity(named) == identity(spelled_out) == identity(config()) == known
    assert identity(config("[optimizer]\nlr = 0.002\n")) == identity(config("[optimizer]\nlr = 2e-3\n")) != known


# -- run.json ----------------------------------------------------------------------------------------------------------


def test_a_run_is_finished_only_when_it_says_so(tmp_path: Path) -> None:
    assert read_run(tmp_path) is None
    assert not is_finished(tmp_path)
    write_run(tmp_path, {"state": "training", "steps": 10})
    assert not is_finished(tmp_path)
    write_run(tmp_path, {"state": "finished", "steps": 10})
    assert is_finished(tmp_path)
    assert read_run(tmp_path) == {"state": "finished", "steps": 10}
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    with pytest.raises(TypeError):
        write_run(tmp_path, {"state": object()})
    assert is_finished(tmp_path), "what cannot be replaced stays whole"
    for text in ("", '{"state": "fini', "[1]", "3", "\x00"):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(UserError, match=r"run\.json"):
            is_finished(tmp_path)


# -- the lock ----------------------------------------------------------------------------------------------------------


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock."""
    imports = "import sys; from pathlib import Path; from titan_dp.train.run_folder import RunLock"
    script = f"{imports}; l = RunLock(Path({str(folder)!r})); print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", script]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_folder_is_locked_while_a_process_holds_it_and_free_however_that_ends(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        assert is_locked(tmp_path)
        with pytest.raises(RunError, match="another process is at work"):
            RunLock(tmp_path)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not is_locked(tmp_path)
        RunLock(tmp_path).close()


def test_asking_for_the_lock_neither_takes_nor_makes_it(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    assert (read_run(folder), is_finished(folder), is_locked(folder), last_step(folder)) == (None, False, False, 0)
    assert list(tmp_path.iterdir()) == []
    lock = RunLock(folder)
    assert is_locked(folder)
    assert is_locked(folder)
    lock.close()
    assert not is_locked(folder)
    RunLock(folder).close()


def test_a_folder_with_nothing_but_the_lock_goes_with_it(tmp_path: Path) -> None:
    RunLock(tmp_path / "refused").close()
    assert not (tmp_path / "refused").exists()
    lock = RunLock(tmp_path / "begun")
    (tmp_path / "begun/config.toml").touch()
    lock.close()
    assert {path.name for path in (tmp_path / "begun").iterdir()} == {".lock", "config.toml"}


def test_who_waits_for_a_lock_that_is_removed_gets_the_one_that_counts(tmp_path: Path) -> None:
    first, folder = RunLock(tmp_path / "run"), tmp_path / "run"
    closing = threading.Timer(0.2, first.close)
    closing.start()
    second = RunLock(folder, patience=60)
    closing.join()
    assert is_locked(folder)
    with pytest.raises(RunError, match="another process is at work"):
        RunLock(folder, patience=0)
    second.close()


def test_the_lock_is_not_inherited_by_programs_the_run_starts(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    try:
        lock.close()
        assert not is_locked(tmp_path)
    finally:
        child.communicate()


def test_a_second_run_is_refused_before_anything_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from titan_dp.config.describe import all_keys
    from titan_dp.config.load import Loaded
    from titan_dp.distributed import World
    from titan_dp.train import trainer

    monkeypatch.setattr(trainer, "LOCK_PATIENCE", 0.1)
    settings = config(f'[job]\nrun_name = "run"\ndump_folder = "{tmp_path}"\n[data]\npath = "nowhere"\n')
    lock = RunLock(tmp_path / "run")
    with pytest.raises(RunError, match="another process is at work"):  # and not: there are no shards in 'nowhere'
        trainer.Trainer(Loaded(settings, dict.fromkeys(all_keys(), "test")), World(0, 1, torch.device("cpu")))
    lock.close()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_run_of_somebody_else_can_be_asked_about(tmp_path: Path) -> None:
    (tmp_path / "config.toml").touch()
    RunLock(tmp_path).close()
    (tmp_path / ".lock").chmod(0o444)
    assert not is_locked(tmp_path)


# -- metrics.jsonl -----------------------------------------------------------------------------------------------------


def write_lines(folder: Path, records: list[dict[str, Any]], tail: str = "") -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + tail)


def test_the_newest_values_stand_for_a_run(tmp_path: Path) -> None:
    assert (last_record(tmp_path), last_step(tmp_path)) == ({}, 0)
    write_lines(tmp_path, [{"step": 10, "loss": 3.0}, {"step": 10, "validation_loss": 2.9}, {"step": 20, "loss": 2.5}])
    assert last_record(tmp_path) == {"step": 20, "loss": 2.5, "validation_loss": 2.9}
    assert last_step(tmp_path) == 20


NOT_RECORDS = [
    "3", "{}", '{"step": "5"}', '{"step": 5.0}', '{"step": true}', '{"step": -1}', '{"step": 5, "loss": "low"}',
    '{"step": 5, "paused_validation": [1]}', '{"step": 1' + "0" * 30 + "}", "[" * 5_000,
]  # fmt: skip


@pytest.mark.parametrize("line", NOT_RECORDS, ids=lambda line: line[:40])
def test_a_line_that_is_json_but_no_record_is_left_out_by_every_reader(line: str, tmp_path: Path) -> None:
    write_lines(tmp_path, [{"step": 1, "loss": 3.0}], line + "\n")
    assert read_records(tmp_path) == [{"step": 1, "loss": 3.0}]
    assert last_record(tmp_path) == {"step": 1, "loss": 3.0}


@pytest.mark.parametrize("line", ['{"step": 1, "lo', '{"step": 2}, {"step": 3}', ""])
def test_lines_that_are_not_records_are_counted_except_the_last(line: str) -> None:
    record = {"step": 1, "loss": 3.0}
    whole = json.dumps(record)
    assert parse_records(f"{whole}\n{line}\n{whole}\n".encode()) == ([record, record], 1)
    assert parse_records(f"{whole}\n{line}".encode()) == ([record], 0)


def test_torn_lines_are_never_put_together_to_records() -> None:
    """Three lines that joined by commas are three records."""
    assert parse_records(b'{"step": 1},{"step": 2}\n{"step": 3, "a": 1\n"b": 2}\n') == ([], 2)


def test_null_and_nan_in_a_record_are_a_number_that_was_not_finite(tmp_path: Path) -> None:
    for value in ("null", "NaN"):
        record = parsed_record(f'{{"step": 1, "loss": {value}}}')
        assert record is not None
        assert math.isnan(record["loss"])
    write_lines(tmp_path, [])
    assert last_step(tmp_path) == 0, "an empty file has no values"


@given(st.data())
def test_a_kill_at_any_byte_leaves_the_last_whole_record(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("run")
    records = [{"step": step, "loss": 1 / step, "lr": 3e-4} for step in range(1, 300)]
    whole = "".join(json.dumps(record) + "\n" for record in records)
    size = data.draw(st.integers(1, len(whole)))
    (folder / "metrics.jsonl").write_text(whole[:size])
    complete = [json.loads(line) for line in (whole[:size] + "|").replace("}|", "}\n").splitlines() if line.endswith("}")]
    assert last_step(folder) == (complete[-1]["step"] if complete else 0)
