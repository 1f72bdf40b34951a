"""Cases of a benchmark, run side by side in processes of their own; each row is kept the moment it is there.

A GPU machine may be rented by the minute, and a CUDA error ends everything in its process. So a worker takes a list of case
numbers and prints a row for each; when it dies or falls silent, the case it was at gets a fault and a new worker goes on with
the rest. One lane is a measurement, many are a check.
"""

from __future__ import annotations

import json
import math
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

MARK = "ROW "


def run_cases(
    command: Sequence[str],
    numbers: Sequence[int],
    add: Callable[[int, dict[str, Any]], None],
    *,
    lanes: int,
    patience: float,
    seconds: float = math.inf,
) -> None:
    """Start `command` + case numbers in `lanes` processes at a time until every number has had its row.

    Args:
        command: of a worker, which calls `work`.
        numbers: of the cases.
        add: gets each case's number and row, one at a time; a case without a row gets {"fault": why}.
        lanes: processes side by side.
        patience: seconds in which a worker must print its next row.
        seconds: after which everything ends; what has no row by then gets none.
    """
    lock, end = threading.Lock(), time.monotonic() + seconds

    def keep(number: int, row: dict[str, Any]) -> None:
        with lock:
            add(number, row)

    def lane(left: list[int]) -> None:
        while left and time.monotonic() < end:
            before = len(left)
            worker = subprocess.Popen([*command, *map(str, left)], stdout=subprocess.PIPE, text=True)
            assert worker.stdout is not None
            waited = _Alarm(lambda: min(patience, end - time.monotonic()), worker.kill)
            for line in worker.stdout:
                if line.startswith(MARK):
                    number, row = json.loads(line.removeprefix(MARK))
                    left.remove(number)
                    keep(number, row)
                    waited.restart()
                else:
                    print(line, end="", flush=True)
            silent = waited.stop()
            code = worker.wait()
            if time.monotonic() >= end:
                return
            if left and (code or silent):
                why = f"no result in {patience:.0f} s" if silent else f"the process ended with {code}"
                keep(left.pop(0), {"fault": why})
            assert len(left) < before, f"a worker left out the cases {left}"

    with ThreadPoolExecutor(lanes) as pool:
        for done in [pool.submit(lane, list(numbers[i::lanes])) for i in range(lanes)]:
            done.result()


def work(run: Callable[[int], dict[str, Any]], numbers: Sequence[int], poisoned: Callable[[], bool] = lambda: False) -> None:
    """A worker's whole life: a row for each number. An exception is a row with a fault; `poisoned` says to end after it."""
    for number in numbers:
        try:
            row = run(number)
        except Exception as e:
            row = {"fault": f"{type(e).__name__}: {(str(e).strip() or '-').splitlines()[0][:160]}"}
        print(MARK + json.dumps([number, row]), flush=True)
        if row.get("fault") and poisoned():
            return  # a CUDA error stays: the other cases get a process without it


class _Alarm:
    """Calls `ring` once when it was not restarted for as many seconds as `wait()` says at the last restart."""

    def __init__(self, wait: Callable[[], float], ring: Callable[[], None]) -> None:
        self._wait, self._ring, self._rang = wait, ring, False
        self._start()

    def _start(self) -> None:
        self._timer = threading.Timer(min(max(self._wait(), 0), threading.TIMEOUT_MAX), self._fire)
        self._timer.daemon = True
        self._timer.start()

    def _fire(self) -> None:
        self._rang = True
        self._ring()

    def restart(self) -> None:
        self._timer.cancel()
        self._start()

    def stop(self) -> bool:
        """Whether it rang."""
        self._timer.cancel()
        return self._rang
