"""The scripts in examples/ run as their docstrings say."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from tests.pretrained import Make
from tests.processes import run_script
from titan_dp.inference.pretrained import load_pretrained


def run(root: Path, name: str, *arguments: str | Path) -> str:
    """What the example prints."""
    process: subprocess.CompletedProcess[str] = run_script(root / "examples" / name, *arguments)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def test_a_layer_of_ones_own_learns_and_hands_its_state_on(root: Path) -> None:
    said = run(root, "layer.py")
    losses = [float(line.split()[2]) for line in said.splitlines() if line.startswith("step")]
    assert len(losses) == 3
    assert losses[-1] < 0.1
    assert float(said.split()[-1]) < 1e-3


@pytest.fixture(scope="module")
def trained(root: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run folder that train_from_python.py makes, and what it prints."""
    outputs = tmp_path_factory.mktemp("examples")
    return outputs / "tiny", run(root, "train_from_python.py", shards, outputs)


def test_a_run_from_python_trains(trained: tuple[Path, str]) -> None:
    folder, said = trained
    losses = [float(line.split()[-1]) for line in said.splitlines() if line.startswith("step") and ": loss " in line]
    assert losses[-1] < losses[0]
    assert (folder / "checkpoint" / "step-00000020" / "manifest.json").exists()


def test_a_run_folder_is_loaded_and_goes_on(root: Path, trained: tuple[Path, str]) -> None:
    lines = run(root, "load_and_generate.py", trained[0], "Story 1").splitlines()
    assert "tokenizer bytes" in lines[0]
    assert any(line.startswith("sampled: ") for line in lines)
    assert any(line.startswith("likeliest: ") for line in lines)


def test_an_exported_model_is_fine_tuned_by_transformers_and_read_again(root: Path, export_of: Make, tmp_path: Path) -> None:
    """Packed, with gradient checkpointing."""
    folder, texts, tuned = (
        export_of({"use_forget_gate": True}, target="remote-code"),
        tmp_path / "texts.jsonl",
        tmp_path / "tuned",
    )
    texts.write_text("".join(f'{{"text": "{"the old dog " * (1 + i % 5)}"}}\n' for i in range(24)))
    said = run(root, "fine_tune.py", folder, texts, tuned, "6")
    words = said.split("loss ")[-1].split()
    assert float(words[3]) < float(words[0]) - 0.3, said
    before, after = (load_pretrained(path, torch.device("cpu")) for path in (folder, tuned))
    assert after.tokenizer.name == str(tuned)
    changed = [not torch.equal(x, y) for x, y in zip(before.model.parameters(), after.model.parameters(), strict=True)]
    assert all(changed)


WRONG = {
    "load_and_generate.py": ["nowhere", "The"],
    "train_from_python.py": ["nowhere", "out"],
    "fine_tune.py": ["nowhere", "texts.jsonl", "out"],
}


@pytest.mark.parametrize(("name", "arguments"), WRONG.items())
def test_a_wrong_path_is_one_sentence(root: Path, tmp_path: Path, name: str, arguments: list[str]) -> None:
    process = run_script(root / "examples" / name, *arguments, cwd=tmp_path)
    assert process.returncode == 2, process.stderr
    assert process.stderr.splitlines()[-1].startswith("error: ")  # before it, transformers may have imported what warns
    assert "nowhere" in process.stderr
    assert "Traceback" not in process.stderr
