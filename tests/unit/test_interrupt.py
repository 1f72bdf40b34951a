"""Ctrl-C: what the first one does, and that a second one leaves at once, whatever the process waits for."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.processes import SERVER, TIMEOUT_SECONDS
from titan_dp.errors import SIGNALS
from titan_dp.faults.interrupt import Interrupt
from titan_dp.studies.launch_local import _Ended, _Launcher

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_a_wish_that_all_ranks_hear_of(number: signal.Signals) -> None:
    with Interrupt(CPU) as interrupt:
        assert interrupt.agreed(interrupt.flags()) is None
        os.kill(os.getpid(), number)
        assert interrupt.agreed(interrupt.flags()) is number


def test_an_interrupt_that_is_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as the shell starts what runs in the background
    with Interrupt(CPU) as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.agreed(interrupt.flags()) is None


def save_for_ever(ready: Any) -> None:
    with Interrupt(CPU):
        os.kill(os.getpid(), signal.SIGINT)
        ready.set()
        time.sleep(TIMEOUT_SECONDS)


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM], ids=["by the terminal", "by torchrun"])
def test_a_second_ctrl_c_ends_a_process_that_still_saves(second: signal.Signals) -> None:
    ready = SERVER.Event()
    process = SERVER.Process(target=save_for_ever, args=(ready,))
    process.start()
    assert ready.wait(TIMEOUT_SECONDS)
    assert process.pid is not None
    os.kill(process.pid, second)
    process.join(TIMEOUT_SECONDS)
    assert process.exitcode == -second


def test_a_second_ctrl_c_kills_the_cells_of_a_sweep() -> None:
    stubborn = ["sh", "-c", "trap '' TERM; echo ready; sleep 600"]
    process = subprocess.Popen(stubborn, start_new_session=True, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    ended = _Ended()
    ended.interrupts = 2
    _Launcher.stop(SimpleNamespace(attempts=[SimpleNamespace(process=process)]), ended)  # type: ignore[arg-type]
    assert process.returncode == -signal.SIGKILL
    process.stdout.close()
