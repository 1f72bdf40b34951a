"""Two ranks find what one finds, in every evaluation."""

from __future__ import annotations

import argparse
import io
import json
import os
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.distributed.harness import run_ranks
from tests.pretrained import Make, evaluate, write_documents
from titan_dp.cli import EVALUATIONS
from titan_dp.distributed import current_world
from titan_dp.evals.session import Session

KINDS = {
    "perplexity": ["--context", 16, "--stride", 9],
    "length-extrapolation": ["--max-length", 90, "--smooth", 9, "--segment", 32],
    "effective-rank": ["--segment", 64],
    "recall": ["--pairs", 3, 6, "--sequences", 7],
    "lm-eval": ["--tasks", "devils_dictionary", "--limit", 9, "--batch-size", 2, "--log-samples"],
}


def on_this_rank(kind: str, words: list[str]) -> None:
    os.environ["DISABLE_MULTIPROC"] = "1"  # lm-evaluation-harness's own switch: a process of the pool may have no children
    module, world, parser = import_module(EVALUATIONS[kind][0]), current_world(), argparse.ArgumentParser()
    module.add_arguments(parser)
    module.evaluate(Session(parser.parse_args(words), world, Console(file=io.StringIO(), quiet=not world.is_main)))


def numbers(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of JSON, by where they are."""
    if not isinstance(value, dict | list):
        yield name, value
    for key, entry in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from numbers(entry, f"{name}.{key}")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lm-eval" or find_spec("lm_eval")])
def test_two_ranks_find_what_one_finds(kind: str, checkpoint_of: Make, root: Path, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(num_heads=3, num_hidden_layers=3, attention_layers=[1], use_forget_gate=True)
    text = write_documents(tmp_path / "text.jsonl", ["The fox sees the dog. " * n for n in (3, 1, 9, 4, 5)])
    source = {"recall": [], "lm-eval": ["--include-path", root / "docs/lm_eval_tasks"]}.get(kind, ["--text", text])
    one = evaluate(kind, checkpoint, tmp_path / "one", *source, *KINDS[kind])
    words = [checkpoint, "--out", tmp_path / "two", *source, *KINDS[kind]]
    run_ranks(2, on_this_rank, kind, list(map(str, words)))
    (path,) = (tmp_path / "two").glob("*.json")
    two = json.loads(path.read_text())
    assert (one["made_on"]["ranks"], two["made_on"]["ranks"]) == (1, 2)
    found, expected = (dict(numbers(each["results"])) for each in (two, one))
    assert found.keys() == expected.keys()
    for name, value in expected.items():  # batches are the same for any number of ranks; only the order of sums is not
        assert found[name] == (pytest.approx(value, rel=1e-12) if isinstance(value, float) else value), name
    names = [sorted(path.name for path in (tmp_path / folder).iterdir()) for folder in ("one", "two")]
    assert names[0] == names[1]
    for csv in (tmp_path / "one").glob("*.csv*"):
        assert (tmp_path / "two" / csv.name).read_bytes() == csv.read_bytes()
