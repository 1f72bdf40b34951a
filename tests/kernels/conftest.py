"""Kernels are tested on poisoned memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN, so that an output nobody wrote cannot pass for zeros."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def _once(x: dict[str, torch.Tensor]) -> None:
    x["g"].data[:, 10] = -torch.inf


def _at_every_second_token(x: dict[str, torch.Tensor]) -> None:
    x["g"].data[:, ::2] = -1e4


def _everywhere(x: dict[str, torch.Tensor]) -> None:
    x["g"].data[:] = -torch.inf


@pytest.fixture(
    params=[_once, _at_every_second_token, _everywhere], ids=["-inf once", "-1e4 at every second", "-inf everywhere"]
)
def forgetful(request: pytest.FixtureRequest) -> Callable[[dict[str, torch.Tensor]], None]:
    """Decays that are legal (g <= 0) and zero in any float: documents that begin anew, say."""
    return request.param


@pytest.fixture(params=["C", "torch"])
def either_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The chunked recurrence by its kernel in C, and by torch operations as on a machine without a compiler."""
    from deltaproduct_kernels import (
        native,
    )  # at the top it would import Triton before tests/conftest.py has set its interpreter

    if request.param == "torch":
        monkeypatch.setattr(native, "available", lambda device, dtype: False)
    elif not native.available(torch.device("cpu"), torch.float32):
        pytest.skip("there is no C compiler here")
    return request.param
