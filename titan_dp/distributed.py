"""Processes, devices and the mesh: one start for a laptop core, a torchrun of eight GPUs and many nodes.

Every run has a process group, even a single process, so that there is one path through FSDP, checkpoints and reductions.
The device is CUDA if there is any, else the CPU with gloo; nothing else in the project asks which.
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from titan_dp import config
from titan_dp.errors import LAUNCHER_PID, StoppedError, UserError, counted, leave

FLIGHT_RECORDER_ENTRIES = "2000"
"""Collectives torch remembers (TORCH_FR_BUFFER_SIZE, unless that is set)."""
_PR_SET_PDEATHSIG = 1  # prctl(2)


@dataclass(frozen=True)
class World:
    """This process among the others."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def world_size_from_env() -> int:
    """Ranks torchrun started; 1 without torchrun. Needs no process group."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank_from_env() -> int:
    return int(os.environ.get("RANK", "0"))


@contextmanager
def distributed(comm: config.Comm) -> Iterator[World]:
    """Initialise the process group, and tear it down when all ranks leave together.

    A rank that fails ends here, reported: tearing down may wait for ranks that wait for this one (NCCL does), and whatever
    kills it then takes its reason and its exit code away.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_launcher()
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", FLIGHT_RECORDER_ENTRIES)
    use_cuda = torch.cuda.is_available()
    if use_cuda:
        torch.cuda.set_device(_own_gpu())
    # CUDA gets a gloo group beside nccl: asynchronous checkpoints are written from CPU copies.
    backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
    timeout = timedelta(seconds=comm.init_timeout_seconds)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    try:
        yield current_world()
    except BaseException as error:
        if dist.get_world_size() > 1 and not isinstance(error, StoppedError | SystemExit):
            leave(error)
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def end_with_launcher() -> None:
    """Have the kernel send this process SIGTERM when its parent, the launcher, dies; at once if it has died already."""
    launcher = int(os.environ.get(LAUNCHER_PID, os.getppid()))
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != launcher:  # it died while this process started, and nobody will tell
        os.kill(os.getpid(), signal.SIGTERM)


def _own_gpu() -> int:
    """The GPU of this process. Raises UserError if there are more processes than GPUs."""
    own, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if own >= there:
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        raise UserError(
            f"this machine has {there} GPU{'s' if there > 1 else ''}"
            + ("" if named is None else f" to use (CUDA_VISIBLE_DEVICES={named})")
            + f", and {os.environ.get('LOCAL_WORLD_SIZE', own + 1)} processes were started on it; start one per GPU "
            f"(--nproc_per_node={there}), or train on CPUs (CUDA_VISIBLE_DEVICES= before the command)"
        )
    return own


def current_world() -> World:
    """This process in the group that is initialised."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return World(dist.get_rank(), dist.get_world_size(), device)


def set_timeout(seconds: int) -> None:
    """From now on collectives slower than this fail: generous while things compile, strict once the run is under way."""
    if dist.get_backend() != "gloo":
        from torch.distributed.distributed_c10d import _set_pg_timeout

        torch.cuda.synchronize()
        dist.barrier(device_ids=[torch.cuda.current_device()])
        _set_pg_timeout(timedelta(seconds=seconds))


def shard_degree(parallelism: config.Parallelism, world_size: int) -> int:
    """Ranks that share one copy of the model, those that share a row included.

    Raises UserError if replicas times shards times context is not the number of ranks.
    """
    replicate, shard = parallelism.data_parallel_replicate_degree, parallelism.data_parallel_shard_degree
    context = parallelism.context_parallel_degree
    resolved = world_size // (replicate * context) if shard == -1 else shard
    if resolved < 1 or replicate * resolved * context != world_size:
        remedy = "set data_parallel_shard_degree = -1 to use what is there"
        if context > 1 and shard == -1:
            remedy = f"start a multiple of {replicate * context} ranks"
        raise UserError(
            f"parallelism.data_parallel_replicate_degree = {replicate} times data_parallel_shard_degree = {shard} "
            + (f"times context_parallel_degree = {context} " if context > 1 else "")
            + f"must be the number of ranks, which is {world_size}; {remedy}"
        )
    return resolved * context


def data_world(parallelism: config.Parallelism, world: World) -> World:
    """`world` as the data loader sees it: ranks that share rows are one. Raises UserError as `shard_degree` does."""
    shard_degree(parallelism, world.size)
    context = parallelism.context_parallel_degree
    return World(world.rank // context, world.size // context, world.device)


def context_group(parallelism: config.Parallelism, world: World) -> dist.ProcessGroup | None:
    """The ranks that share rows with this one: neighbours, where the network is fastest. None if rows are not shared."""
    context = parallelism.context_parallel_degree
    if context == 1:
        return None
    shape = (data_world(parallelism, world).size, context)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("data", "context")).get_group("context")


def build_mesh(parallelism: config.Parallelism, world: World) -> DeviceMesh:
    """[shard] for FSDP2, [replicate, shard] for HSDP. Parameters are sharded over the ranks that share rows as well."""
    shard, replicate = shard_degree(parallelism, world.size), parallelism.data_parallel_replicate_degree
    if replicate == 1:
        return init_device_mesh(world.device.type, (shard,), mesh_dim_names=("shard",))
    return init_device_mesh(world.device.type, (replicate, shard), mesh_dim_names=("replicate", "shard"))


def all_reduce_sum(value: torch.Tensor) -> torch.Tensor:
    """`value` summed over all ranks, in place; returns it."""
    dist.all_reduce(value)
    return value


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a DTensor; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def set_seeds(debug: config.Debug) -> None:
    """Seed every generator; in deterministic mode refuse non-deterministic algorithms."""
    random.seed(debug.seed)
    torch.manual_seed(debug.seed)
    if debug.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def device_name(world: World) -> str:
    is_cuda = world.device.type == "cuda"
    return torch.cuda.get_device_name(world.device) if is_cuda else f"CPU, {counted(torch.get_num_threads(), 'thread')}"


def describe(world: World, parallelism: config.Parallelism) -> str:
    """One line for the banner."""
    context = parallelism.context_parallel_degree
    triton = f", triton {'yes' if find_spec('triton') else 'no'}" if world.device.type == "cuda" else ""  # of use there only
    degrees = (
        f"replicate {parallelism.data_parallel_replicate_degree} x shard {shard_degree(parallelism, world.size) // context}"
    )
    if context > 1:
        degrees += f" x context {context}"
    return f"{counted(world.size, 'rank')} on {device_name(world)}; {degrees}; torch {torch.__version__}{triton}"
