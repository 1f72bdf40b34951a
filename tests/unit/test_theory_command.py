"""`titan-dp state-tracking theory`: what it prints is what it measured, and its exit code says whether theory holds."""

from __future__ import annotations

import argparse

import pytest

from titan_dp.studies.state_tracking import constructions, theory


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    theory.add_arguments(parser)
    return theory.run(parser.parse_args(words))


def test_everything_is_as_the_theory_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--tokens", "100", "--seed", "3") == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*theory.CONSTRUCTIONS, "recurrent", "float32", "RWKV-7"))
    assert printed.splitlines()[-1].endswith("as the theory says")


def test_one_construction_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--construction", "Z7-mirrors", "--tokens", "5000") == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "-" in line]
    assert len(rows) == 2
    assert all("Z7-mirrors" in row and "5,000" in row for row in rows)


def test_wrong_weights_are_counted_and_fail_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constructions, "LOGIT", 0.1)  # every beta is about 1: projections instead of reflections
    assert run("--construction", "S3-swaps", "--tokens", "100") == 1
    printed = capsys.readouterr().out
    assert "yes" not in printed
    assert printed.splitlines()[-1] == "4 of 4 checks failed"


def test_an_unknown_construction_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run("--construction", "S9-swaps")
    assert caught.value.code == 2
    assert "'S9-swaps'" in (message := capsys.readouterr().err)
    assert "S3-swaps" in message
