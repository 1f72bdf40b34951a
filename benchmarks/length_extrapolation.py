"""What a token costs in a sequence of 32,768, segment by segment, against the plain forward at the training length.

    python benchmarks/length_extrapolation.py   prints the table and writes benchmarks/results/length_extrapolation.{md,json}

debug.toml's model with random weights and ids, trained at 256. Both sides give losses: `model(tokens, labels)` its sum, the
evaluation that of each token. A round runs as many tokens through the plain forward, half before and half after, as
through the sequences, so the noise of the machine is in both; the ratio is the median over rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from common import Report

from titan_dp.config_loader import load_config
from titan_dp.evals.length_extrapolation import default_segment
from titan_dp.evals.scoring import token_losses
from titan_dp.model import build_model

LENGTH, ROUNDS = 32768, 5


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    report = Report("length_extrapolation", f"Length extrapolation at {LENGTH:,} tokens: time a token")
    loaded = load_config(["--config", "debug.toml"]).config
    model = build_model(loaded.model)
    model.init_weights(0)
    model.eval().requires_grad_(False)
    T, V = loaded.training.seq_len, loaded.model.vocab_size
    for batch in (4, 8):
        segment = default_segment("cpu", batch)
        long, short = (torch.randint(0, V, (batch, length + 1)) for length in (LENGTH, T))

        def plain(short: torch.Tensor = short) -> None:
            with torch.inference_mode():
                for _ in range(LENGTH // T // 2):
                    model(short[:, :-1], short[:, 1:])

        def extrapolation(long: torch.Tensor = long, segment: int = segment) -> None:
            token_losses(model, long[:, :-1], long[:, 1:], segment)

        plain()
        rounds = [(seconds(plain), seconds(extrapolation), seconds(plain)) for _ in range(ROUNDS)]
        tokens = batch * LENGTH
        ratios = [during / (before + after) for before, during, after in rounds]
        report.add(
            {
                "sequences at once": batch,
                "segment": segment,
                f"plain forward at {T}, us a token": statistics.median(a + b for a, _, b in rounds) / tokens * 1e6,
                f"at {LENGTH}, us a token": statistics.median(during for _, during, _ in rounds) / tokens * 1e6,
                "ratio": statistics.median(ratios),
                "ratio, lowest and highest": f"{min(ratios):.3f} - {max(ratios):.3f}",
            }
        )
    report.write()


if __name__ == "__main__":
    main()
