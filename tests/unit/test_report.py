"""`titan-dp report`: the files it writes, the page, and where it refuses to write."""

from __future__ import annotations

import csv
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.runs import write_run, write_study, write_sweep
from titan_dp.cli import dispatch
from titan_dp.errors import UserError
from titan_dp.studies.report import command as report


def small_study(folder: Path) -> Path:
    losses = lambda n_h, N, D, seed: 3 - 0.1 * n_h + 1000 / N + 0.003 * seed  # noqa: E731
    return write_study(folder, losses, n_h=(1, 2), sizes=((64, 2), (128, 4)))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a small study with one run each that is unfinished, diverged and hostile in name."""
    folder = small_study(tmp_path_factory.mktemp("report") / "study")
    write_run(folder / "early", {"debug.seed": 8}, until=60)
    write_run(folder / "broken", {"debug.seed": 9}, math.nan)
    write_run(folder / "<script>alert(1)<\N{FRACTION SLASH}script>&", {"debug.seed": 10})
    out = folder.parent / "out"
    assert dispatch(["report", str(folder), "--out", str(out)]) == 0
    return out


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open()))


def test_every_run_and_every_configuration_is_a_row_of_its_csv(written: Path) -> None:
    runs, configurations = rows(written / "runs.csv"), rows(written / "configurations.csv")
    assert len(runs) == 8 + 3
    assert sorted(row["state"] for row in runs) == ["diverged"] + ["finished"] * 9 + ["unfinished"]
    first = next(row for row in configurations if (row["n_h"], row["hidden_size"]) == ("1", "64"))
    assert int(first["parameters"]) - int(first["parameters_without_embedding"]) == 320 * 64
    assert float(first["validation_loss_standard_deviation"]) == pytest.approx(0.003 / math.sqrt(2))
    assert first["seeds"] == "2"
    assert first["mfu"] == ""


def test_the_page_needs_nothing_but_itself(written: Path) -> None:
    page = (written / "report.html").read_text()
    assert not re.search(r"https?://", page)
    assert not re.search(r"\b(src|href)\s*=\s*[\"'](?!data:image/png;base64,)", page)
    assert page.count("data:image/png;base64,") == len(list(written.glob("*.png")))


def test_the_page_shows_a_hostile_name_as_text(written: Path) -> None:
    tags: list[str] = []
    text: list[str] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: tags.append(tag)  # type: ignore[method-assign]
    parser.handle_data = text.append  # type: ignore[method-assign,assignment]
    parser.feed((written / "report.html").read_text())
    assert "script" not in tags
    assert any("<script>alert(1)" in part for part in text)


def test_too_few_points_say_so_and_draw_no_curve(written: Path) -> None:
    page = (written / "report.html").read_text()
    assert "Not fitted: the fit needs 3 sizes (there are 2)" in page
    assert "No parabola: that needs three sizes" in page
    assert not (written / "isoflop.png").exists()
    fits = json.loads((written / "report.json").read_text())["fits"]
    assert all("not_fitted" in laws["L(N, D)"] for laws in fits.values())


def test_figures_are_drawn_only_where_there_is_something_to_see(written: Path) -> None:
    drawn = {path.name for path in written.glob("*.png")}
    assert drawn == {"differences.png", "loss_by_parameters.png", "loss_by_flops.png", "loss_curves.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written.glob("*.png"))
    assert "Not drawn against tokens" in (written / "report.html").read_text()


def test_a_report_is_written_over_and_forgets_its_old_figures(tmp_path: Path) -> None:
    runs, out = small_study(tmp_path / "study"), tmp_path / "out"
    dispatch(["report", str(runs), "--out", str(out)])
    (out / "notes.txt").write_text("mine")
    dispatch(["report", str(next(runs.iterdir())), "--out", str(out)])
    assert not (out / "differences.png").exists()
    assert len(rows(out / "runs.csv")) == 1
    assert (out / "notes.txt").read_text() == "mine"


def test_a_folder_that_is_no_report_is_not_written_to(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    before = sorted(run.iterdir())
    with pytest.raises(UserError, match="holds files and is no report"):
        dispatch(["report", str(run), "--out", str(run)])
    assert sorted(run.iterdir()) == before
    with pytest.raises(UserError, match="is a file"):
        dispatch(["report", str(run), "--out", str(run / "config.toml")])


def test_a_file_of_somebody_elses_in_a_report_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["report", str(write_run(tmp_path / "run")), "--out", str(out)]
    assert dispatch(command) == 0
    (out / "isoflop.png").write_text("mine")
    with pytest.raises(UserError, match="isoflop.png is no file of the report there; move it away"):
        dispatch(command)
    (out / "isoflop.png").rename(out / "mine.png")
    assert dispatch(command) == 0
    assert (out / "mine.png").read_text() == "mine"


def test_a_sweeps_report_lies_in_its_folder_and_bears_its_name(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sweep = write_sweep(tmp_path / "widths", {"a": {}, "b": {"debug.seed": 7}}, description="wide & narrow")
    write_run(sweep / "a")
    for _ in range(2):  # the second time there is a report in the sweep's folder
        dispatch(["report", str(sweep)])
    page = (sweep / "report" / "report.html").read_text()
    assert "<h1>widths</h1>" in page
    assert "wide &amp; narrow" in page
    shown = capsys.readouterr().out
    assert "2 runs (1 finished, 1 not started)" in shown
    assert f"written to {sweep / 'report' / 'report.html'}" in shown


def test_other_reports_lie_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    dispatch(["report", str(run)])
    assert (tmp_path / "report" / "report.html").exists()


def test_nothing_is_written_when_losses_cannot_be_compared(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "a")
    write_run(tmp_path / "runs" / "b", facts={"tokenizer": "gpt2"})
    with pytest.raises(UserError, match="not comparable"):
        dispatch(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_training_curves_of_several_tokenizers_are_left_out(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "a")
    facts = {"tokenizer": "gpt2", "validation_fingerprint": "0" * 64, "bytes_per_token": 4.0}
    write_run(tmp_path / "runs" / "b", facts=facts)
    dispatch(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--loss", "bits-per-byte"])
    assert not (tmp_path / "out" / "loss_curves.png").exists()
    assert "the runs have different tokenizers (bytes, gpt2)" in (tmp_path / "out" / "report.html").read_text()


def test_runs_that_are_all_unfinished_are_still_listed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", until=60)
    dispatch(["report", str(run), "--out", str(tmp_path / "out")])
    assert "unfinished at step 60 of 100" in (tmp_path / "out" / "report.html").read_text()


def test_missing_packages_are_named_with_the_way_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "find_spec", lambda name: None if name == "jinja2" else True)
    with pytest.raises(UserError, match=re.escape("needs jinja2: pip install 'titan_dp[scaling]'")):
        dispatch(["report", str(tmp_path)])
