"""A training run from Python: what `titan-dp train` does in one process, with the losses read back at the end.

    python examples/train_from_python.py DATA OUTPUTS

DATA is a folder that `titan-dp prepare --tokenizer bytes` wrote, such as data/corpus. OUTPUTS gets the run folder `tiny`. A
second call finds the run finished; with more steps it goes on from there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from titan_dp.config.load import load_config
from titan_dp.distributed import distributed
from titan_dp.errors import UserError, run_main
from titan_dp.train.trainer import Trainer


def settings(data: Path, outputs: Path) -> list[str]:
    """debug.toml, made smaller; the same words as on the command line, checked by the same rules."""
    changed = {
        "job.dump_folder": outputs,
        "job.run_name": "tiny",
        "data.path": data / "train",
        "validation.path": data / "validation",
        "model.num_hidden_layers": 1,
        "model.hidden_size": 64,
        "model.num_heads": 2,
        "model.intermediate_size": 128,
        "training.seq_len": 64,
        "training.global_batch_size": 8,
        "training.steps": 20,
        "lr_scheduler.warmup_steps": 4,
        "validation.steps": 2,
    }
    return ["--config", "debug.toml", *(f"--{key}={value}" for key, value in changed.items())]


def train(data: Path, outputs: Path) -> Path:
    """Train, and return the run folder."""
    loaded = load_config(settings(data, outputs))
    config = loaded.config  # every setting as an attribute
    print(f"{config.training.steps} steps of {config.training.global_batch_size * config.training.seq_len} tokens")
    with distributed(config.comm) as world:  # a process group, even of one process
        trainer = Trainer(loaded, world)
        print(f"{sum(p.numel() for p in trainer.model.parameters()):,} parameters")
        trainer.train()
    return trainer.run_folder


def main() -> int:
    if len(sys.argv) != 3:
        raise UserError("usage: python examples/train_from_python.py DATA OUTPUTS")
    folder = train(Path(sys.argv[1]), Path(sys.argv[2]))
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        if "loss" in record:
            print(f"step {record['step']}: loss {record['loss']:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))  # a wrong path is one sentence and exit code 2
