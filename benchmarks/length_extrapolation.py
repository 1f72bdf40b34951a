"""What a token costs in a sequence of 32,768, segment by segment, against the plain forward at the training length.

    python benchmarks/length_extrapolation.py   prints the table and writes benchmarks/results/length_extrapolation.{md,json}

debug.toml's model with random weights and ids, training length 256. Both sides give losses: `model(tokens, labels)` their sum,
the evaluation that of each token. A segment and a plain forward take turns through whole sequences, so the noise of the
machine is in both; times are medians over segments and over forwards.
"""

from __future__ import annotations

import statistics
import time

import torch
from common import Report

from titan_dp.config.load import load_config
from titan_dp.evals.length_extrapolation import default_segment
from titan_dp.evals.scoring import segment_losses
from titan_dp.model.transformer import Transformer, build_model

LENGTH, REPEATS = 32768, 3


def microseconds(model: Transformer, batch: int, trained: int, segment: int, vocab: int) -> tuple[float, float]:
    """Median time a token of the plain forward and of the evaluation's segments."""
    short, long = (torch.randint(0, vocab, (batch, length + 1)) for length in (trained, LENGTH))
    plain, extrapolation = list[float](), list[float]()
    for _ in range(REPEATS):
        segments = segment_losses(model, long[:, :-1], long[:, 1:], segment)
        start = time.perf_counter()
        for _scores in segments:
            between = time.perf_counter()
            with torch.inference_mode():
                model(short[:, :-1], short[:, 1:])
            end = time.perf_counter()
            extrapolation.append((between - start) / (batch * segment))
            plain.append((end - between) / (batch * trained))
            start = time.perf_counter()
    return statistics.median(plain) * 1e6, statistics.median(extrapolation) * 1e6


def main() -> None:
    report = Report("length_extrapolation", f"Length extrapolation at {LENGTH:,} tokens: time a token")
    c = load_config(["--config", "debug.toml"]).config
    model = build_model(c.model)
    model.init_weights(0)
    model.eval().requires_grad_(False)
    T = c.training.seq_len
    for batch in (4, 8):
        segment = default_segment("cpu", batch)
        plain, extrapolation = microseconds(model, batch, T, segment, c.model.vocab_size)
        report.add(
            {
                "sequences at once": batch,
                "segment": segment,
                f"plain forward at {T}, us a token": plain,
                f"at {LENGTH}, us a token": extrapolation,
                "ratio": extrapolation / plain,
            }
        )
    report.write()


if __name__ == "__main__":
    main()
