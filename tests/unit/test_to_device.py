"""Batches on their way to a GPU, as far as a CPU shows it."""

from __future__ import annotations

import pytest
import torch

from titan_dp.data.batch import to_device


def test_every_batch_goes_to_a_gpu_from_page_locked_memory_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """From other memory the copy waits for all that the GPU has still to do."""
    locked: list[int] = []
    copied: list[tuple[bool, bool]] = []

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        locked.append(id(pinned := tensor.clone()))
        kept.append(pinned)
        return pinned

    def to(tensor: torch.Tensor, device: torch.device, non_blocking: bool = False) -> torch.Tensor:
        copied.append((id(tensor) in locked, non_blocking))
        return tensor

    kept: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", to)
    batch = {"input_ids": torch.zeros(2, 3), "labels": torch.zeros(2, 3), "cu_seqlens": None}
    assert to_device(batch, torch.device("cuda", 0))["cu_seqlens"] is None
    assert copied == [(True, True)] * 2


def test_on_a_cpu_nothing_is_copied() -> None:
    batch = {"input_ids": torch.zeros(2, 3), "cu_seqlens": None}
    assert to_device(batch, torch.device("cpu"))["input_ids"] is batch["input_ids"]
