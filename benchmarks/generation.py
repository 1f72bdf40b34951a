"""Generation on a CPU: time per token near position 100 and near position 4,000, in one run.

    python benchmarks/generation.py    prints the table and writes benchmarks/results/generation.{md,json}

Every step is timed; a row gives the medians of 100 steps around each position over several runs. Recurrent models
carry a state of constant size, so the ratio should be 1; the Transformer of the same width is there for comparison.
"""

from __future__ import annotations

import statistics
import time

import torch
from common import Report

from titan_dp.config import Model
from titan_dp.config.load import load_config
from titan_dp.inference.sampling import Sampling, generate_ids
from titan_dp.model.transformer import build_model

REPEATS, AROUND = 3, 100
POSITIONS = (100, 4000)


def settings() -> dict[str, Model]:
    debug = load_config(["--config", "debug.toml"]).config.model
    wider = {"hidden_size": 512, "num_heads": 4, "head_dim": 128, "intermediate_size": 1536, "num_hidden_layers": 6}
    return {
        "debug.toml": debug,
        "debug.toml, ungated": debug.model_copy(update={"use_forget_gate": False}),
        "debug.toml, last layer softmax, window 256": debug.model_copy(
            update={"attention_layers": [2], "attention_window": 256}
        ),
        "width 512, 6 layers": debug.model_copy(update=wider),
        "Transformer, width 128": debug.model_copy(update={"mixer": "attention"}),
    }


def step_seconds(c: Model, batch: int) -> list[float]:
    """Seconds of each step of one continuation up to the last position."""
    model = build_model(c).eval()
    model.init_weights(0)
    steps = generate_ids(model, [[1]] * batch, sampling=Sampling(0), seeds=range(batch), vocab_size=c.vocab_size)
    times = []
    for _ in range(POSITIONS[1] + AROUND):
        start = time.perf_counter()
        next(steps)
        times.append(time.perf_counter() - start)
    return times


def main() -> None:
    report = Report("generation", "Generation on a CPU: time per token by position")
    for name, c in settings().items():
        for batch in (1, 8) if name == "debug.toml" else (1,):
            runs = [step_seconds(c, batch) for _ in range(REPEATS)]
            near = [
                statistics.median(t for times in runs for t in times[position - AROUND // 2 : position + AROUND // 2])
                for position in POSITIONS
            ]
            report.add(
                {
                    "model": name,
                    "batch": batch,
                    **{f"ms per step at {at:,}": 1e3 * seconds for at, seconds in zip(POSITIONS, near, strict=True)},
                    "ratio": near[1] / near[0],
                    "tokens/s": batch / near[1],
                }
            )
    report.write()


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
