"""A run that hangs: every rank writes where it stands and its last collectives, then ends, so that a launcher starts again.

Every forward pass is a sign of life, in training and in validation. A rank that shows none for `limit` seconds writes

    <run folder>/hang/from-step-00000040/rank-3.txt     the Python stack of every thread
                                         rank-3.json    torch's flight recorder: the last collectives, which never ended

waits a moment until the others have written theirs, because all of them wait for the one that hangs, and leaves with exit
code 1. A Python thread does this. If the hanging code holds Python's lock, so that the thread cannot run, faulthandler's C
thread writes the stacks to stderr and ends the process after an hour. A rank that is stopped altogether writes nothing: it is
the one without a file. If all are stopped and go on, as when a scheduler suspends a job, nothing happens.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import torch._C._distributed_c10d as c10d

_TICK = 1.0  # seconds between two looks at the clock
_SUSPENDED = 5.0  # seconds between two looks: the whole process was stopped, which is not a hang
_LAST_RESORT = 3600.0
_MOMENT = 20.0  # enough for every rank that still runs to notice and write, even on a busy machine


class Watchdog:
    """Watches this process while the context is entered.

    Args:
        folder: gets the files; made when needed, and old ones there removed.
        rank: of this process.
        ranks: how many there are.
        limit: seconds without a sign of life; may be changed at any time and holds from the next sign on.
        key: of the configuration, for the message.
    """

    def __init__(self, folder: Path, rank: int, ranks: int, limit: float, key: str) -> None:
        self.folder, self.rank, self.ranks, self.limit, self.key = folder, rank, ranks, limit, key
        self._allowed, self._deadline = limit, float("inf")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        # Rank 0 removes those of all ranks: an earlier start from this step may have had more of them.
        for path in self._paths() if self.rank else [*self.folder.glob("rank-*.txt"), *self.folder.glob("rank-*.json")]:
            path.unlink(missing_ok=True)
        self.beat()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()

    def beat(self, limit: float | None = None) -> None:
        """A sign of life; the next one must come within `limit` seconds (default: the usual limit)."""
        self._allowed = self.limit if limit is None else limit
        self._deadline = time.monotonic() + self._allowed

    @contextmanager
    def patience(self, limit: float) -> Iterator[None]:
        """Around work that may take up to `limit` seconds without a forward pass."""
        self.beat(limit)
        yield
        self.beat()

    def _watch(self) -> None:
        try:
            last = time.monotonic()
            while not self._ended.wait(_TICK):
                now = time.monotonic()
                if now - last > _SUSPENDED:
                    self._deadline += now - last
                elif now > self._deadline:
                    self._dump()
                    self._wait_for_others()
                    os._exit(1)
                last = now
                faulthandler.dump_traceback_later(_LAST_RESORT, exit=True)  # unless this thread runs again
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _paths(self, rank: int | None = None) -> tuple[Path, Path]:
        """The files of `rank` (default: this one)."""
        rank = self.rank if rank is None else rank
        return self.folder / f"rank-{rank}.txt", self.folder / f"rank-{rank}.json"

    def _wait_for_others(self) -> None:
        """Wait a moment until every rank has written its files: our end breaks the collective that the others wait in."""
        deadline = time.monotonic() + _MOMENT
        while time.monotonic() < deadline and not all(self._paths(rank)[1].exists() for rank in range(self.ranks)):
            time.sleep(0.1)

    def _dump(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            stacks, collectives = self._paths()
            with stacks.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            collectives.write_bytes(_flight_record())
            where = f"stacks and last collectives are in {self.folder}"
        except OSError as error:
            faulthandler.dump_traceback(all_threads=True)
            where = f"stacks are above, as {self.folder} could not be written ({error})"
        print(
            f"error (rank {self.rank}): no forward pass began for {self._allowed:g} s; {where}; a rank without a file there, "
            f"or with another stack than the others, hangs; if none does, this machine is slow: raise {self.key}. "
            "The same command resumes",
            file=sys.stderr,
            flush=True,
        )


def _flight_record() -> bytes:
    """The flight recorder's entries as JSON, of NCCL if there is any, else of gloo."""
    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):
        if hasattr(c10d, name):
            return getattr(c10d, name)()
    return b"{}"  # gloo's has come after torch 2.11
