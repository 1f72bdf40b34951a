"""How many threads a process computes in on a CPU: model/cpu.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from titan_dp.model import cpu


@pytest.fixture(autouse=True)
def sixteen_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    monkeypatch.setattr(cpu, "_OWN_THREADS", 16)
    monkeypatch.setattr(cpu.os, "sched_getaffinity", lambda process: set(range(16)))
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", "TITAN_DP_RUNS_AT_ONCE"):
        monkeypatch.delenv(name, raising=False)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("hidden_size", "environment", "threads"),
    [
        (2048, {}, 16),
        (256, {}, 1),
        (2048, {"LOCAL_WORLD_SIZE": "4"}, 4),
        (2048, {"LOCAL_WORLD_SIZE": "4", "TITAN_DP_RUNS_AT_ONCE": "2"}, 2),
        (2048, {"LOCAL_WORLD_SIZE": "32"}, 1),
    ],
)
def test_a_wide_model_takes_its_share_of_the_cores_and_a_narrow_one_takes_one(
    hidden_size: int, environment: dict[str, str], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in environment.items():
        monkeypatch.setenv(name, text)
    cpu.use_threads(hidden_size)
    assert torch.get_num_threads() == threads


def test_what_the_user_set_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(3)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    cpu.use_threads(64)
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize(
    ("backend", "device", "compiled", "said"),
    [
        ("torch", "cpu", True, ", kernels in C"),
        ("torch", "cpu", False, ", without its kernels in C, which need gcc or clang: several times slower"),
        ("recurrent", "cpu", True, ""),
        ("torch", "cuda", True, ""),
    ],
)
def test_the_head_of_a_run_on_a_cpu_says_whether_it_has_kernels_in_c(
    backend: str, device: str, compiled: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu.native, "available", lambda device, dtype: compiled)
    assert cpu.kernels_in_words(backend, torch.device(device)) == said
