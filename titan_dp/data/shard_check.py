"""Are the tokens still those that were prepared? Contents are compared with the manifest while training goes on.

Opening shards checks their sizes; reading hundreds of gigabytes at every start would cost minutes. So one thread of one
process hashes every file once per run, notes in the run folder which ones it has found good, by size, time of their last
change and inode, and looks again only at files that have changed since. If nodes have copies of their own, that is one
process for each copy: what rank 0 reads says nothing of another node's disk.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from titan_dp.data.shards import AGAIN, MANIFEST, TokenShards
from titan_dp.errors import RunError, UserError
from titan_dp.files import file_sha256, make_folder, write_json

RECORD = "data_verified.json"


def copy_of(sources: list[TokenShards]) -> str:
    """The same on ranks that read the same files, different on ranks that read copies of them.

    Every client of a network file system sees the server's inodes and times; of local disks no two agree in all of them.
    """
    found = [(source.folder / MANIFEST).stat() for source in sources]
    return hashlib.sha256(repr([(s.st_ino, s.st_ctime_ns) for s in found]).encode()).hexdigest()[:16]


class ShardCheck:
    """Hashes in the background, from construction on.

    Args:
        sources: folders of shards.
        run_folder: holds the record of what was found good before; made if it is not there.
        record: its name there, one for each copy of the data.
    """

    def __init__(self, sources: list[TokenShards], run_folder: Path, record: str = RECORD) -> None:
        self.sources, self.record = sources, run_folder / record
        self.problem: UserError | RunError | None = None
        """What was found: a changed file, or one that cannot be read."""
        make_folder(run_folder)
        self._thread = threading.Thread(target=self._run, name="shard-check", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until every file is compared, or one was found changed."""
        self._thread.join()

    def _run(self) -> None:
        good = _read(self.record)
        for folder, name, expected in self._files():
            path = folder / name
            try:
                status = path.stat()
                state = [expected, status.st_size, status.st_mtime_ns, status.st_ino]
                if good.get(str(path.resolve())) == state:
                    continue
                if file_sha256(path) != expected:
                    self.problem = UserError(
                        f"{path} is not what was prepared (its sha256 differs from the manifest's): restore it, or "
                        f"{AGAIN}; steps that have read it since it changed are not to be trusted"
                    )
                    return
            except OSError as error:
                self.problem = RunError(f"{path} cannot be read any more ({error}); look at the file system")
                return
            good[str(path.resolve())] = state
            with suppress(OSError):  # it only saves work next time
                write_json(self.record, good)

    def _files(self) -> Iterator[tuple[Path, str, str]]:
        for source in self.sources:
            for shard in source.shards:
                yield source.folder, shard.file, shard.sha256
                yield source.folder, shard.starts_file, shard.starts_sha256


def _read(record: Path) -> dict[str, list]:
    """Files found good before; none if the record cannot be read."""
    with suppress(OSError, ValueError):
        if isinstance(found := json.loads(record.read_text()), dict):
            return found
    return {}
