"""What GPUs and networks can do, from their makers' data sheets: peaks for MFU and for planning. Nothing here is measured.

Needs no torch. A peak is what the maker states for dense matrices. No program reaches it; how much of it one reaches is an
assumption of whoever uses these numbers. Latencies, which no data sheet has, are assumptions too.

Also, for every launcher, which GPUs of this machine may be used:

    python -m titan_dp.hardware     how many processes to start here: one per GPU, two without GPUs

nvidia-smi prints a line for each GPU, and below it one for each MIG instance it is cut into. CUDA_VISIBLE_DEVICES, if it is
set, names what may be used, instances too, and ends at the first name that is not one.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
from dataclasses import dataclass

from titan_dp.errors import UserError


@dataclass(frozen=True)
class GPU:
    """One GPU; sources are beside the table."""

    name: str
    tflops: float
    """Dense bfloat16 peak in TFLOP/s, without sparsity."""
    float32_tflops: float
    """Peak in float32 proper, which is what torch computes matrix products of float32 in unless it is told to use TF32."""
    bandwidth: float
    """Of its memory, in bytes/s."""
    memory: float
    """Of its memory, in bytes: the data sheet's GB taken as 1e9, which is less than a driver reports."""
    link: float
    """To the GPUs of its node, in bytes/s and direction: NVLink, else PCIe."""
    arch: int
    """Compute capability times ten: 90 for 9.0."""
    processors: int
    """Streaming multiprocessors."""


@dataclass(frozen=True)
class Network:
    """Between nodes, as one GPU sees it."""

    name: str
    bandwidth: float
    """Bytes/s per GPU and direction."""
    latency: float
    """Seconds from node to node (an assumption)."""


# NVIDIA's data sheets (H200, H100, GH200, DGX B200, GB200 NVL72, A100, L40S, L40, L4, A10, A10G, and the Ada and Ampere
# architecture papers of the RTX cards): dense bfloat16 and float32 TFLOP/s, memory TB/s and GB, NVLink or PCIe GB/s in one
# direction (data sheets add up both), compute capability, multiprocessors.
_SHEETS = (
    ("H200", 989.4, 66.9, 4.8, 141, 450, 90, 132),
    ("H200 NVL", 835.5, 60.0, 4.8, 141, 450, 90, 132),
    ("H100 PCIe", 756.0, 51.2, 2.0, 80, 64, 90, 114),
    ("H100 NVL", 835.0, 60.0, 3.9, 94, 300, 90, 132),
    ("H100", 989.4, 66.9, 3.35, 80, 450, 90, 132),
    ("GH200", 989.4, 66.9, 4.0, 96, 450, 90, 132),
    ("GH200 144GB", 989.4, 66.9, 4.9, 144, 450, 90, 132),
    ("GB200", 2500.0, 80.0, 8.0, 186, 900, 100, 148),
    ("B200", 2250.0, 75.0, 8.0, 180, 900, 100, 148),
    ("A100", 312.0, 19.5, 2.039, 80, 300, 80, 108),
    ("A100 40GB", 312.0, 19.5, 1.555, 40, 300, 80, 108),
    ("A100 PCIe", 312.0, 19.5, 1.935, 80, 32, 80, 108),
    ("A100 PCIe 40GB", 312.0, 19.5, 1.555, 40, 32, 80, 108),
    ("L40S", 362.0, 91.6, 0.864, 48, 32, 89, 142),
    ("L40", 181.0, 90.5, 0.864, 48, 32, 89, 142),
    ("L4", 121.0, 30.3, 0.3, 24, 32, 89, 58),
    ("A10", 125.0, 31.2, 0.6, 24, 32, 86, 72),
    ("A10G", 70.0, 35.0, 0.6, 24, 32, 86, 80),
    ("RTX 4090", 165.2, 82.6, 1.008, 24, 32, 89, 128),
    ("RTX 3090", 71.0, 35.6, 0.936, 24, 32, 86, 82),
)
GPUS: dict[str, GPU] = {
    name: GPU(name, bf16, fp32, tb_s * 1e12, gb * 1e9, link * 1e9, arch, processors)
    for name, bf16, fp32, tb_s, gb, link, arch, processors in _SHEETS
}

# Line rates of one port per GPU: InfiniBand HDR, NDR and XDR (InfiniBand Trade Association's roadmap), and Ethernet.
NETWORKS: dict[str, Network] = {
    network.name: network
    for network in (
        Network("ib-200", 25e9, 5e-6),
        Network("ib-400", 50e9, 5e-6),
        Network("ib-800", 100e9, 5e-6),
        Network("ethernet-100", 12.5e9, 20e-6),
        Network("ethernet-400", 50e9, 20e-6),
    )
}


# Words of a device's name that say nothing about which of the table it is: maker, socket, and kind of memory.
_SAYS_NOTHING = re.compile(r"NVIDIA|GEFORCE|TESLA|SXM\d?|HBM\d?E?")
_GRACE_GB = ("120GB", "480GB")  # of the CPU's memory, by which drivers call a GH200


def gpu_of(device_name: str) -> GPU | None:
    """The GPU of the table that a driver's name for a device means; None if it is not in the table.

    Every word must fit: "H200" is not in "GH200", and a laptop's, a slice (MIG) or a sibling of a card (4090 D) is another GPU.
    """
    words = [re.sub(r"^(\d+)G$", r"\1GB", word) for word in re.split(r"[\s\-_]+", device_name.upper()) if word]
    fitting = []
    for gpu in GPUS.values():
        own = gpu.name.upper().split()
        own_sizes = (f"{gpu.memory / 1e9:.0f}GB", *(_GRACE_GB if own[0] == "GH200" else ()))
        rest = [word for word in words if word not in own and word not in own_sizes]
        if all(word in words for word in own) and all(_SAYS_NOTHING.fullmatch(word) for word in rest):
            fitting.append((len(own), gpu))
    return max(fitting, key=lambda pair: pair[0])[1] if fitting else None


def peak(device_name: str, dtype: str) -> float | None:
    """Dense peak in FLOP/s of a device by the name its driver gives it, for matrix products of "bfloat16" or "float32"; None
    for a device that is not in the table.
    """
    gpu = gpu_of(device_name)
    if gpu is None:
        return None
    return 1e12 * {"bfloat16": gpu.tflops, "float32": gpu.float32_tflops}[dtype]


def find_gpu(name: str) -> GPU:
    """Raises UserError with the known names."""
    known = {key.lower().replace(" ", "-"): gpu for key, gpu in GPUS.items()}
    gpu = known.get(name.lower().replace(" ", "-"))
    if gpu is None:
        raise UserError(f"--gpu {name} is not known; choose cpu or one of {', '.join(GPUS)} (case does not matter)")
    return gpu


def find_network(name: str) -> Network:
    """Raises UserError with the known names."""
    if name not in NETWORKS:
        raise UserError(f"--network {name} is not known; choose one of {', '.join(NETWORKS)}")
    return NETWORKS[name]


WITHOUT_GPUS = 2
"""Processes on a machine with CPUs only."""


def visible_gpus() -> list[str]:
    """Names for CUDA_VISIBLE_DEVICES, one per GPU; empty on a machine without GPUs."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return list(itertools.takewhile(lambda gpu: gpu and gpu[0] != "-", map(str.strip, named.split(","))))
    if not shutil.which("nvidia-smi"):
        return []
    listing = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False).stdout
    return [str(i) for i in range(sum(line.startswith("GPU") for line in listing.splitlines()))]


def processes() -> int:
    """How many train on this machine unless somebody asks for another number: one per GPU."""
    return len(visible_gpus()) or WITHOUT_GPUS
