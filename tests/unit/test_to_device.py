"""Batches on their way to a GPU, as far as a CPU shows it."""

from __future__ import annotations

import pytest
import torch

from titan_dp.data.batch import to_device


def test_a_batch_goes_to_a_gpu_from_page_locked_memory_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """From other memory the copy waits for all that the GPU has still to do."""
    pinned, plain, copied = torch.zeros(2, 3), torch.ones(2, 3), []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *where, **how: copied.append((tensor is pinned, how)))
    assert to_device({"input_ids": plain, "cu_seqlens": None}, torch.device("cuda", 0))["cu_seqlens"] is None
    assert copied == [(True, {"non_blocking": True})]


def test_on_a_cpu_nothing_is_copied() -> None:
    batch = {"input_ids": torch.zeros(2, 3), "cu_seqlens": None}
    assert to_device(batch, torch.device("cpu"))["input_ids"] is batch["input_ids"]
