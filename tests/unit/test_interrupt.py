"""Ctrl-C: what the first one does, and that a second one leaves at once, whatever the process waits for."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.distributed.elastic.multiprocessing.api import SignalException

from tests.processes import SERVER, TIMEOUT_SECONDS
from titan_dp.errors import SIGNALS
from titan_dp.faults.interrupt import Interrupt
from titan_dp.launch.torchrun import main

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
        assert interrupt.hand_in(interrupt.flags()) is None
        os.kill(os.getpid(), number)
        assert interrupt.hand_in(interrupt.flags()) is number


def test_a_ctrl_c_says_what_it_does_and_what_a_second_one_loses(capfd: pytest.CaptureFixture[str]) -> None:
    with Interrupt(CPU):
        os.kill(os.getpid(), signal.SIGINT)
    lines = capfd.readouterr().err.splitlines()
    assert lines == [
        "",
        "Ctrl-C: the run stops after this step and saves everything.",
        "A second Ctrl-C stops it at once; what it did since its last save is lost.",
    ]


def test_a_launcher_that_is_stopped_at_once_says_what_is_lost(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(args: Any) -> None:
        raise SignalException("", signal.SIGINT)

    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr("torch.distributed.run.run", run)
    assert main(["--standalone", "--nproc-per-node=2", "-m", "titan_dp.train"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("stopped at once by SIGINT: what the run did since its last save is lost; the same command goes on")


def test_an_interrupt_that_is_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as the shell starts what runs in the background
    with Interrupt(CPU) as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.hand_in(interrupt.flags()) is None


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
