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
