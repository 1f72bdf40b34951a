"""What it costs that all ranks agree before the first step: eight gloo ranks on this machine.

    python benchmarks/agreement.py    prints the table and writes benchmarks/results/agreement.{md,json}

Each round is what a run does once: every rank gathers its settings, reads and hashes the sources, looks up the versions, and
agrees, with the probe in a folder for temporary files. A round takes as long as its slowest rank. The sources are in the
system's cache, as they are after an import. On two cores eight ranks wait for each other, which they do not where each has its
own: the processor's time says what a rank takes by itself, whatever else the machine does.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from common import Report

from titan_dp import config
from titan_dp.faults.agreement import agree, code, gather, settings_of

RANKS, ROUNDS = 8, 20


def work(rank: int, rendezvous: str, folder: str, results: str) -> None:
    """One rank; the first keeps for each round the largest seconds on the clock, and of a processor, of any rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=RANKS)
    c = config.Config.model_construct()
    rows = []
    for _ in range(ROUNDS):
        dist.barrier()
        start, cpu = time.perf_counter(), time.process_time()
        equal, by_rank = settings_of(c)
        agree(equal | code(), by_rank=by_rank, folder=Path(folder))
        rows.append((time.perf_counter() - start, time.process_time() - cpu))
    every = gather(rows)
    if rank == 0:
        torch.save([[max(ranks[i][part] for ranks in every) for i in range(ROUNDS)] for part in (0, 1)], results)
    dist.destroy_process_group()


def main() -> None:
    report = Report("agreement", "Ranks that agree before the first step: the slowest of eight ranks")
    with tempfile.TemporaryDirectory() as folder:
        shared = Path(folder) / "run"
        shared.mkdir()
        results = f"{folder}/results"
        torch.multiprocessing.spawn(work, (f"{folder}/rendezvous", str(shared), results), nprocs=RANKS)
        wall, cpu = torch.load(results, weights_only=True)
    for name, rounds in (("on the clock", wall), ("of a processor, per rank", cpu)):
        report.add({"time": name, "median ms": 1e3 * statistics.median(rounds), "fastest ms": 1e3 * min(rounds)})
    report.write()


if __name__ == "__main__":
    main()
