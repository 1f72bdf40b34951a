"""`titan-dp state-tracking theory`: what it prints is what it measured, and its exit code says whether theory holds."""

from __future__ import annotations

import argparse
import secrets

import pytest

from titan_dp.studies.state_tracking import constructions, theory


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    theory.add_arguments(parser)
    return theory.run(parser.parse_args(words))


def test_everything_is_as_the_theory_says(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(theory, "DRAWS", 20_000)
    assert run("--tokens", "50", "--seed", str(secrets.randbelow(2**31))) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*theory.CONSTRUCTIONS, "recurrent", "float32", "RWKV-7"))
    assert f"all {2 * (len(theory.CONSTRUCTIONS) + 1) + 7} checks are as the theory says" in printed


def test_wrong_weights_are_counted_and_fail_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constructions, "LOGIT", 0.1)  # every beta is about 1: projections instead of reflections
    assert run("--construction", "S3-swaps", "--tokens", "100") == 1
    printed = capsys.readouterr().out
    assert "yes" not in printed
    assert printed.splitlines()[-1] == "4 of 4 checks failed"
