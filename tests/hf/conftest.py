"""What tests of Hugging Face folders share: fla on a CPU, and a cache for their code that is not the one at home."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _modules_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr("sys.path", list(sys.path))  # transformers adds the cache to it
        yield


class _Counter(int):
    def to(self, dtype: object) -> _Counter:
        return self


@pytest.fixture(scope="module")
def fla() -> Iterator[pytest.MonkeyPatch]:
    """fla registers its models with transformers, and launches its kernels on what there is.

    The interpreter cannot time configurations, so the first is taken; and its loop counters must have `.to`, as compiled.
    """
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        importlib.import_module("fla")
        if not torch.cuda.is_available():
            run: Callable[..., Any] = lambda self, *args, **how: self.fn.run(*args, **how, **self.configs[0].all_kwargs())  # noqa: E731
            patch.setattr("triton.runtime.autotuner.Autotuner.run", run)
            for module in ("fla.ops.gated_delta_product.chunk_deltaproduct_h", "fla.ops.common.chunk_delta_h"):
                patch.setattr(f"{module}.range", lambda *bounds: map(_Counter, range(*bounds)), raising=False)
        yield patch
