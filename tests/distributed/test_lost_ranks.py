"""One rank fails alone while the other waits for it in a collective: its reason and its exit code are what is left."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from tests.conftest import ROOT

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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_the_reason_and_the_exit_code_of_a_rank_that_fails_alone_survive_its_process_group() -> None:
    env = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK], cwd=ROOT, env=env | {"RANK": rank}, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    waiting, failing = [(rank.communicate(timeout=100)[1], rank.returncode) for rank in ranks]
    assert failing == ("error (rank 1): data.path = 'x': shard 7 is missing; restore it\n", 2)
    assert waiting[0].startswith("error: the connection to another rank is lost; that one says why, or was killed (")
    assert waiting[1] == 1
