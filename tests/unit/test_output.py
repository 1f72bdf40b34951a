"""Tables on a terminal and in a pipe, where no number is ever cut; CSV files."""

from __future__ import annotations

import gzip
import sys
import time
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from titan_dp.output import number_table, print_table, print_written, write_csv

NUMBERS = [f"804,741,{i:03}" for i in range(20)]
SENTENCE = "the first documents joined and cut"


def wide_table() -> Table:
    """Twenty columns of eleven characters, and one of words."""
    table = Table(*(f"n{i}" for i in range(20)), "about", title="[0,1] and [bold]")
    table.add_row(*NUMBERS, SENTENCE)
    return table


def terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(columns))


def test_in_a_pipe_a_table_is_as_wide_as_it_needs(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    print_table(wide_table())
    (row,) = [line for line in capsys.readouterr().out.splitlines() if SENTENCE in line]
    assert all(number in row for number in NUMBERS)


def test_on_a_terminal_that_is_too_narrow_numbers_stay_whole(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal(monkeypatch, 40)
    print_table(wide_table())
    text = capsys.readouterr().out
    assert all(number in text for number in NUMBERS)
    assert all(word in text for word in SENTENCE.split())
    assert "…" not in text


def test_on_a_terminal_words_wrap_before_lines_run_on(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal(monkeypatch, 40)
    table = Table("n", "about")
    table.add_row("804,741,000", f"{SENTENCE} {SENTENCE}")
    print_table(table)
    lines = Text.from_ansi(capsys.readouterr().out).plain.splitlines()
    assert max(map(len, lines)) <= 40
    assert "804,741,000" in "".join(lines)


def test_details_are_left_out_only_where_there_is_no_room(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    print_table(wide_table(), details=["n3"])
    assert NUMBERS[3] in capsys.readouterr().out
    terminal(monkeypatch, 40)
    print_table(wide_table(), details=["n3"])
    text = capsys.readouterr().out
    assert NUMBERS[3] not in text
    assert NUMBERS[4] in text


def test_brackets_in_a_table_are_text(capsys: pytest.CaptureFixture) -> None:
    print_table(wide_table())
    assert "[0,1] and [bold]" in capsys.readouterr().out


def test_numbers_are_aligned_to_the_right_and_names_to_the_left(capsys: pytest.CaptureFixture) -> None:
    print_table(number_table("", ("name", "n"), [("a", 1), ("longer", 1000)], left=("name",), box=None))
    assert capsys.readouterr().out.splitlines()[-2:] == [" a          1 ", " longer  1000 "]


@pytest.mark.parametrize("name", ["table.csv", "table.csv.gz"])
def test_a_csv_file_has_the_same_bytes_for_the_same_rows(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "new" / name
    write_csv(path, ["a", "b, c"], ([i, f"{i / 3:.3f}"] for i in range(2)))
    raw = path.read_bytes()
    assert (gzip.decompress(raw) if name.endswith("gz") else raw) == b'a,"b, c"\n0,0.000\n1,0.333\n'
    monkeypatch.setattr(time, "time", lambda: 1e9)
    write_csv(path, ["a", "b, c"], [[0, "0.000"], [1, "0.333"]])
    assert path.read_bytes() == raw
    print_written(path, path.with_name("other.png"))
    assert capsys.readouterr().out == f"written to {path.parent}: {name}, other.png\n"
