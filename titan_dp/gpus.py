"""Which GPUs of this machine a program may use, without torch: one way of counting for every launcher.

    python -m titan_dp.gpus     how many processes to start here: one a GPU, two where there is none

nvidia-smi prints a line for each GPU, and below it one for each MIG instance it is cut into. CUDA_VISIBLE_DEVICES, where it is
set, names what may be used, instances too, and ends at the first name that is none.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess

WITHOUT_GPUS = 2
"""Processes where there are only CPUs."""


def visible_gpus() -> list[str]:
    """Names for CUDA_VISIBLE_DEVICES, one a GPU; none on a machine without."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return list(itertools.takewhile(lambda gpu: gpu and gpu[0] != "-", map(str.strip, named.split(","))))
    if not shutil.which("nvidia-smi"):
        return []
    listing = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False).stdout
    return [str(i) for i in range(sum(line.startswith("GPU") for line in listing.splitlines()))]


if __name__ == "__main__":
    print(len(visible_gpus()) or WITHOUT_GPUS)
