"""One rank fails alone while the other waits for it in a collective: its reason and its exit code are what is left."""

from __future__ import annotations

from pathlib import Path

from tests.processes import run_script_in_ranks

RANK = """
import sys, time
import torch
import torch.distributed as dist
from titan_dp import config
from titan_dp.distributed import distributed
from titan_dp.errors import UserError, run_main

def never_ends():  # as NCCL's, whose communicators wait for the other rank
    time.sleep(600)

dist.destroy_process_group = never_ends

def main():
    with distributed(config.Comm()) as world:
        dist.barrier()
        if world.rank == 1:
            raise UserError("data.path = 'x': shard 7 is missing; restore it")
        dist.all_reduce(torch.ones(1))
    return 0

sys.exit(run_main(main))
"""


def test_the_reason_and_the_exit_code_of_a_rank_that_fails_alone_survive_its_process_group(tmp_path: Path) -> None:
    script, log = tmp_path / "rank.py", tmp_path / "log"
    script.write_text(RANK)
    assert run_script_in_ranks(2, script, log=log) == [1, 2], log.read_text()
    said = log.read_text()
    assert "error (rank 1): data.path = 'x': shard 7 is missing; restore it\n" in said
    assert "error: the connection to another rank is lost; that one says why, or was killed (" in said
    assert "Traceback" not in said
