"""SIGTERM, SIGUSR1 and Ctrl-C as a request: at the end of a step all ranks agree to stop, save, and leave.

A signal may reach one rank or all, at any moment, so it only sets a flag. The flags are summed together with the count of
valid tokens that every step reduces anyway, so they need no collective of their own. Every rank reads the same sum, so all
stop after the same step. On a GPU the sum is read one step later, when it has long arrived: nothing waits for the device.
After a Ctrl-C the next one ends the process at once, and so does the SIGTERM by which torchrun passes on a second Ctrl-C. If
the launcher dies, the kernel sends its ranks SIGTERM: no orphan trains on.
"""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor

from titan_dp.errors import SIGNALS, is_main_rank

_CTRL_C = (
    b"\nCtrl-C: the run stops after this step and saves everything.\n"
    b"A second Ctrl-C stops it at once; what it did since its last save is lost.\n"
)


class Interrupt:
    """Takes `SIGNALS` while the context is entered; the main thread enters it.

    Args:
        device: of the tensors that are reduced.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._received = [0] * len(SIGNALS)
        self._read: tuple[Tensor, Any] | None = None  # the last step's sums and the event of their arrival
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupt:
        # A SIGINT that is ignored stays so: the shell means it for what runs in the background.
        taken = [n for n in SIGNALS if n != signal.SIGINT or signal.getsignal(n) is not signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._receive) for number in taken}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._received[SIGNALS.index(signal.SIGINT)]:  # else a second Ctrl-C still leaves at once
            for number, handler in self._previous.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received[SIGNALS.index(signal.Signals(number))] = 1
        if number == signal.SIGINT:
            for at_once in (signal.SIGINT, signal.SIGTERM):  # C's default action: it needs no Python, whatever is waited for
                signal.signal(at_once, signal.SIG_DFL)
            if is_main_rank():
                os.write(2, _CTRL_C)  # print is not for signal handlers

    def flags(self) -> Tensor:
        """This rank's part of the sum, [3] int64 on the device: which of `SIGNALS` have come."""
        if not any(self._received):
            return torch.zeros(len(SIGNALS), dtype=torch.int64, device=self.device)
        return torch.tensor(self._received, device=self.device)

    def hand_in(self, sums: Tensor) -> signal.Signals | None:
        """Hand in a step's sums; returns the signal to stop for, the same on every rank, or None to go on.

        Args:
            sums: [3] int64, `flags` of this step summed over all ranks. On a GPU they are kept, and the last step's are read.
        """
        if sums.is_cuda:
            arriving = torch.empty_like(sums, device="cpu", pin_memory=True).copy_(sums, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            last, self._read = self._read, (arriving, event)
            if last is None:
                return None
            last[1].synchronize()
            sums = last[0]
        return next((number for number, count in zip(SIGNALS, sums.tolist(), strict=True) if count), None)
