"""The data loader of one process: tokens a second from memory-mapped shards, and the time to reach any step.

    python benchmarks/loader.py        prints the table and writes benchmarks/results/loader.{md,json}

Made-up shards of 200 M tokens in documents of about 600, read at sequence length 4096 in micro-batches of 8.
"""

from __future__ import annotations

import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
from common import Report, median_seconds

from titan_dp import config
from titan_dp.data.batch import Loader, Place
from titan_dp.data.loader import build_dataloader
from titan_dp.data.shards import ShardWriter
from titan_dp.data.tokenizer import Tokenizer

T, L, TOKENS, DOCUMENT = 4096, 8, 200_000_000, 600


def write_shards(folder: Path) -> None:
    tokenizer = Tokenizer("made up", "0", 32000, 1, 2, {}, lambda texts: [], lambda ids: "")
    writer = ShardWriter(folder, np.dtype(np.uint16), 50_000_000, [])
    rng = np.random.default_rng(0)
    text = rng.integers(0, 32000, 10_000_000, dtype=np.uint16)
    written = 0
    while written < TOKENS:
        start, length = int(rng.integers(0, len(text) - 2 * DOCUMENT)), int(rng.integers(1, 2 * DOCUMENT))
        writer.add(text[start : start + length], length)
        written += length
    writer.finish(tokenizer, {"split": "train", "validation_fraction": 0, "adds_bos": False, "adds_eos": False})


def open_loader(folder: Path, boundaries: str, workers: int = 0) -> Loader:
    data = config.Data(path=str(folder), document_boundaries=boundaries)  # type: ignore[arg-type]
    return build_dataloader(data, config.Dataloader(num_workers=workers), Place(T, L, L, rank=0, world_size=1), 32000)


def main() -> None:
    report = Report("loader", f"Loader, one process: memory-mapped uint16 shards, sequence length {T}, micro-batch {L}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shards(folder)
        for boundaries in ("carry", "reset"):
            loader = open_loader(folder, boundaries)
            batches, count = iter(loader), 300
            seconds = median_seconds(lambda b=batches, n=count: sum(1 for _ in islice(b, n)), repeats=5)  # type: ignore[misc]

            def seek(boundaries: str = boundaries) -> float:
                other = open_loader(folder, boundaries)
                start = time.perf_counter()
                other.load_state_dict({"samples": 1_000_000 * L})
                next(iter(other))
                return (time.perf_counter() - start) * 1e3

            seek()
            report.add(
                {
                    "document_boundaries": boundaries,
                    "M tokens/s": count * L * T / seconds / 1e6,
                    "ms a micro-batch": seconds / count * 1e3,
                    "ms to step 1,000,000": min(seek() for _ in range(5)),
                }
            )
    report.write()


if __name__ == "__main__":
    main()
