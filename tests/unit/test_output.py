"""Tables on a terminal and in a pipe, where no number is ever cut; signs of life; CSV files."""

from __future__ import annotations

import argparse
import gzip
import importlib
import shlex
import sys
import time
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from titan_dp import output
from titan_dp.cli import dispatch
from titan_dp.errors import UserError, report
from titan_dp.files import short, si
from titan_dp.output import (
    FORMATS,
    add_format_option,
    harmless,
    number_table,
    print_command,
    print_next,
    print_table,
    print_text,
    print_written,
    progress,
    save_figure,
    subplots,
    write_csv,
)

NUMBERS = [f"804,741,{i:03}" for i in range(20)]
SENTENCE = "the first documents joined and cut"
Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


def wide_table() -> Table:
    """Twenty columns of eleven characters, and one of words."""
    return number_table("[0,1] and [bold]", [*(f"n{i}" for i in range(20)), "about"], [[*NUMBERS, SENTENCE]], left=["about"])


def terminal(monkeypatch: Patch, columns: int) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(columns))


def lines(capsys: Capture) -> list[str]:
    return [line.rstrip() for line in Text.from_ansi(capsys.readouterr().out).plain.splitlines()]


# -- tables ------------------------------------------------------------------------------------------------------------


def test_in_a_pipe_a_table_is_as_wide_as_it_needs_and_has_all_columns(capsys: Capture, monkeypatch: Patch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    print_table(wide_table(), details=["n3"])
    (row,) = [line for line in lines(capsys) if SENTENCE in line]
    assert all(number in row for number in NUMBERS)


def test_a_terminal_leaves_out_as_few_details_as_it_can_the_first_named_first_and_says_so(
    capsys: Capture, monkeypatch: Patch
) -> None:
    details = [f"n{i}" for i in range(19, 0, -1)]
    for columns, kept in ((80, 3), (100, 5), (400, 20)):
        terminal(monkeypatch, columns)
        print_table(wide_table(), details=details)
        shown = lines(capsys)
        assert max(map(len, shown)) <= columns
        (row,) = [line for line in shown if SENTENCE in line]
        assert [number in row for number in NUMBERS] == [i < kept for i in range(20)]
        said = " ".join(shown).partition("a wider terminal also shows: ")[2]
        assert said.strip().split(", ") == ([f"n{i}" for i in range(kept, 20)] if kept < 20 else [""])


def test_words_wrap_where_no_more_details_can_go(capsys: Capture, monkeypatch: Patch) -> None:
    terminal(monkeypatch, 40)
    print_table(number_table("", ["n", "about"], [["804,741,000", f"{SENTENCE} {SENTENCE}"]], left=["about"]))
    shown = lines(capsys)
    assert max(map(len, shown)) <= 40
    assert shown[2].split() == ["804,741,000", *SENTENCE.split()[:4]]
    assert " ".join(shown[2:]).split()[1:] == [*SENTENCE.split(), *SENTENCE.split()]


def test_a_row_that_is_too_wide_all_the_same_is_a_block_of_lines(capsys: Capture, monkeypatch: Patch) -> None:
    terminal(monkeypatch, 40)
    print_table(wide_table())
    shown = lines(capsys)
    assert max(map(len, shown)) <= 40
    assert shown[0] == "[0,1] and [bold]", "brackets are text"
    assert [line.split() for line in shown[1:21]] == [[f"n{i}", number] for i, number in enumerate(NUMBERS)]
    assert " ".join(" ".join(shown[21:]).split()) == f"about {SENTENCE}"


def test_numbers_are_aligned_to_the_right_and_names_to_the_left(capsys: Capture) -> None:
    print_table(number_table("", ("name", "n"), [("a", 1), ("longer", 1000)], left=("name",)))
    assert lines(capsys)[-3:] == ["a          1", "longer  1000", ""]


def test_a_count_has_three_digits_and_a_quantity_a_prefix() -> None:
    counts = {0: "0", 999.4: "999", 999.6: "1k", 804_698_112: "805M", 19_000_197_120: "19B", 2.54e20: "2.54e20", 1e-7: "1e-7"}
    assert {number: short(number) for number in counts} == counts
    assert [si(4.176e16, "FLOPs"), si(4.2e9, "FLOPs"), si(17, "B")] == ["41.8 PFLOPs", "4.2 GFLOPs", "17 B"]


# -- sentences and commands --------------------------------------------------------------------------------------------


def test_a_terminal_breaks_sentences_between_words_and_a_pipe_nowhere(capsys: Capture, monkeypatch: Patch) -> None:
    text = f"  - {SENTENCE} into words-with-hyphens that nobody breaks"
    print_text(text)
    assert lines(capsys) == [text]
    terminal(monkeypatch, 40)
    print_text(text)
    shown = lines(capsys)
    assert " ".join(line.strip() for line in shown) == text.strip()
    assert all(line.startswith("  ") and len(line) <= 40 for line in shown)


@pytest.mark.parametrize("columns", [40, None])
def test_an_error_is_one_line_in_a_pipe_and_fits_a_terminal(columns: int | None, capsys: Capture, monkeypatch: Patch) -> None:
    if columns:
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        monkeypatch.setenv("COLUMNS", str(columns))
    assert report(UserError(SENTENCE)) == 2
    with pytest.raises(SystemExit):
        dispatch(["generate", "--no-such-option"])  # argparse's
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("usage:", "  "))]
    assert " ".join(said) == (
        f"error: {SENTENCE} titan-dp generate: error: there is no option --no-such-option; "
        "`titan-dp generate --help` lists them"
    )
    assert (max(map(len, said)) <= columns) if columns else len(said) == 2


def test_a_command_of_several_lines_can_be_typed_as_it_is_shown(capsys: Capture, monkeypatch: Patch) -> None:
    command = "titan-dp train --config 800m.toml --data.path mydata/train --validation.path 'my data/validation' --debug.seed 2"
    print_next("train on it", command)
    assert lines(capsys) == ["train on it:", f"  {command}"]
    terminal(monkeypatch, 60)
    print_command(command)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 60
    assert shlex.split(shown.replace("\\\n", "")) == shlex.split(command)
    assert all("--" in line for line in shown.splitlines()), "an option stays beside its value"


# -- signs of life -----------------------------------------------------------------------------------------------------


@pytest.fixture
def soon(monkeypatch: Patch) -> None:
    """What takes seconds takes hundredths."""
    for name in ("FIRST_SIGN", "NEXT_SIGN", "_BAR_AFTER"):
        monkeypatch.setattr(output, name, 0.02)


@pytest.mark.usefixtures("soon")
def test_a_log_has_a_line_now_and_then_on_stderr(capsys: Capture) -> None:
    with progress("documents", 200) as state:
        for _ in state.each(range(50)):
            pass
        time.sleep(0.2)
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) > 2
    assert err.splitlines()[-1].startswith("documents 50 of 200: 0 s so far")
    assert err.splitlines()[-1].endswith(" left")


@pytest.mark.usefixtures("soon")
def test_a_terminal_has_a_bar_that_goes_away(capsys: Capture, monkeypatch: Patch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress("counting [a step]"):
        time.sleep(0.3)
    out, err = capsys.readouterr()
    assert out == ""
    assert "counting [a step]" in err
    assert "so far" not in err


def test_what_is_done_soon_leaves_no_sign(capsys: Capture) -> None:
    with progress("documents", 3) as state:
        assert list(state.each("abc")) == ["a", "b", "c"]
    assert (state.done, *capsys.readouterr()) == (3, "", "")


@pytest.mark.usefixtures("soon")
def test_other_ranks_show_nothing(capsys: Capture, monkeypatch: Patch) -> None:
    monkeypatch.setenv("RANK", "1")
    with progress("documents"):
        time.sleep(0.1)
    assert capsys.readouterr().err == ""


# -- files -------------------------------------------------------------------------------------------------------------


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


# -- figures -----------------------------------------------------------------------------------------------------------

BEGINNINGS = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}


@pytest.mark.parametrize("ending", FORMATS)
def test_a_figure_has_the_format_of_its_ending_and_the_same_bytes_at_any_time(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = []
    for time_of_day in ("0", "86400"):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", time_of_day)  # what matplotlib takes for now
        figure, axes = subplots()
        axes.plot([1, 2], [3, 4], label="Größe")
        axes.legend()
        save_figure(figure, tmp_path / "new" / f"figure.{ending}")
        contents.append((tmp_path / "new" / f"figure.{ending}").read_bytes())
    assert contents[0] == contents[1]
    assert contents[0].startswith(BEGINNINGS[ending])
    if ending == "svg":
        assert "Größe</text>" in contents[0].decode(), "text is text"
    if ending == "pdf":
        assert b"/Subtype /CIDFontType2" in contents[0] or b"/Type42" in contents[0] or b"/TrueType" in contents[0]
        assert b"/Type3" not in contents[0], "type 42 can be edited and searched"


def test_the_format_of_figures_is_one_option_of_every_command_that_draws() -> None:
    parser = argparse.ArgumentParser()
    add_format_option(parser)
    assert [parser.parse_args(words).format for words in ([], ["--format", "pdf"])] == ["png", "pdf"]
    with pytest.raises(SystemExit):
        parser.parse_args(["--format", "gif"])
    for command in DRAW:
        module = importlib.import_module(f"titan_dp.{command}")
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        (option,) = [action for action in parser._actions if "--format" in action.option_strings]
        assert option.choices == FORMATS


DRAW = (
    "data.inspect.command",
    "evals.effective_rank",
    "evals.length_extrapolation",
    "evals.recall",
    "studies.coordinate_check",
    "studies.report.command",
    "studies.state_tracking.inspection",
    "studies.state_tracking.report",
    "studies.state_tracking.train",
)


def test_whoever_saves_a_figure_is_among_those_commands(root: Path) -> None:
    package = root / "titan_dp"
    drawing = (path for path in package.rglob("*.py") if path.name != "output.py" and "save_figure(" in path.read_text())
    assert {".".join(path.relative_to(package).with_suffix("").parts) for path in drawing} <= set(DRAW)


def test_the_time_that_is_left_counts_only_what_this_run_did(monkeypatch: Patch) -> None:
    now = iter([100.0, 110.0, 110.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    state = output.Progress("bytes read", 1000, done=600)
    state.note = lambda seconds: f"{500 / seconds:g} tokens/s"
    state.advance(100)
    assert state.line() == "bytes read 700 of 1,000: 10 s so far, about 30 s left, 50 tokens/s"


# -- texts from elsewhere ------------------------------------------------------------------------------------------------


def test_what_a_terminal_obeys_or_does_not_show_is_escaped_and_layout_kept_or_put_on_one_line() -> None:
    text = "a\nb\tc\x1b[2J\u202e\x9b é\u3000\u200d"
    assert harmless(text) == "a\nb\tc\\x1b[2J\\u202e\\x9b é\u3000\u200d"
    assert harmless(text, one_line=True) == r"a↵b\tc\x1b[2J\u202e\x9b é\u3000\u200d"
