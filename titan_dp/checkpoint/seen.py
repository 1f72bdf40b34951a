"""Checkpoints as all ranks see them: on a network file system what one rank wrote appears to the others later, or never."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch.distributed as dist

from titan_dp.checkpoint.manifest import MANIFEST, read_manifest, size_problem, verify
from titan_dp.errors import RunError
from titan_dp.faults.agreement import gather, together, wait_to_see

Entries = list[dict[str, Any]]
"""Files as the manifest lists them."""


def unseen(folder: Path, ranks: list[tuple[str, Entries]]) -> str:
    """Which files that `ranks`, (host, entries) each, have written do not appear here at their length; "" if all do."""
    written = [(rank, host, entry) for rank, (host, entries) in enumerate(ranks) for entry in entries]

    def missing() -> list[tuple[int, str, dict[str, Any]]]:
        return [item for item in written if size_problem(folder, item[2])]

    wait_to_see(lambda: not missing(), folder)
    if not (left := missing()):
        return ""
    rank, host, entry = left[0]
    return (
        f"{len(left)} of {len(written)} files: {entry['name']}, {entry['bytes']:,} bytes by rank {rank} on {host} "
        f"({size_problem(folder, entry)})"
    )


def manifest_of_rank_0(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint that rank 0 has seen. Raises RunError if it does not appear here."""
    if not wait_to_see((folder / MANIFEST).exists, folder):
        raise RunError(f"checkpoint {folder}, which rank 0 sees, is not there; is the folder shared, or copied to every node?")
    return read_manifest(folder)


def verify_together(folder: Path, manifest: dict[str, Any], group: dist.ProcessGroup | None = None) -> list[str]:
    """`verify` with the reading shared by all ranks, if there are any; each gets all sentences.

    A file that one rank sees as it should be and another does not see yet is waited for. Raises RunError on all ranks if that
    does not help.
    """
    if not dist.is_initialized():
        return verify(folder)
    _wait_for_files(folder, manifest["files"], group)
    rank, size = dist.get_rank(), dist.get_world_size()
    own = together(lambda: verify(folder, rank, size, manifest["files"]), group)
    return list(dict.fromkeys(problem for part in gather(own, group) for problem in part))


def _wait_for_files(folder: Path, entries: Entries, group: dist.ProcessGroup | None) -> None:
    """Return when every rank sees all files of a checkpoint that any rank sees: what no rank sees is missing, not late.

    Raises RunError on all ranks if that takes too long.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    try:
        listed = set(os.listdir(folder))
    except OSError:
        listed = set()
    # A listing shows all names at once; sizes cost a call each, so every rank looks at a part of them.
    suspect = {e["name"] for e in entries if e["name"] not in listed}
    suspect |= {e["name"] for e in entries[rank::size] if size_problem(folder, e)}
    suspects = set[str]().union(*gather(suspect, group))
    if not suspects:
        return

    def wrong() -> set[str]:
        return {e["name"] for e in entries if e["name"] in suspects and size_problem(folder, e)}

    every = gather(wrong(), group)
    if not (late := set[str]().union(*every) - every[0].intersection(*every)):
        return

    def wait() -> None:
        if not wait_to_see(lambda: not wrong() & late, folder):
            raise RunError(
                f"this rank has waited for {min(wrong() & late)} of checkpoint {folder} and does not see it as other ranks do; "
                "is the folder shared by all ranks? The same command tries again"
            )

    together(wait, group)
