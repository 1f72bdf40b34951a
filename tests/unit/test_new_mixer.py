"""A toy mixer, added as docs/contributing.md says: a record, a layer, and for each a line in its table; nothing else."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from tests.distributed.harness import run_ranks
from tests.unit.test_model import CU_SEQLENS, make, settings, tokens_of
from titan_dp import config
from titan_dp.config.load import load_config
from titan_dp.config.mixers import MIXERS, Counts, Mixer
from titan_dp.distributed import current_world
from titan_dp.errors import UserError
from titan_dp.inference.hf.layout import REMOTE_CODE, to_hf
from titan_dp.model.layers import Packing, TokenMixer
from titan_dp.model.size import model_size, state_size
from titan_dp.model.transformer import LAYERS
from titan_dp.train.trainer import Trainer

# -- step 1: the record, in titan_dp/config/mixers.py ------------------------------------------------------------------


PAGE = (Path(__file__).parents[2] / "docs/contributing.md").read_text()
DEFINED: dict = {"Model": config.Model, "Counts": Counts, "Mixer": Mixer}
exec(textwrap.dedent(re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]), DEFINED)  # type: ignore[index]
RECORD = DEFINED["MovingAverageRecord"]()


# -- step 2: the layer, a file in titan_dp/model/ ----------------------------------------------------------------------


class Average(NamedTuple):
    """What a step of decoding needs of the past."""

    y: Tensor  # [B, D]

    @staticmethod
    def join(caches: list[Average]) -> Average:
        return Average(torch.cat([cache.y for cache in caches]))


class MovingAverage(TokenMixer):
    keep = 0.9

    def __init__(self, c: config.Model) -> None:
        super().__init__()
        self.v_proj = nn.Linear(c.hidden_size, c.hidden_size, bias=False)
        self.o_proj = nn.Linear(c.hidden_size, c.hidden_size, bias=False)

    def mix(self, x: Tensor, packing: Packing | None = None) -> tuple[Tensor, None]:
        index = torch.arange(x.shape[1], device=x.device)
        back = index[:, None] - index
        weights = torch.where(back >= 0, (1 - self.keep) * self.keep**back, 0.0)
        if packing is not None:
            weights = weights * (packing.document[:, None] == packing.document)
        return self.o_proj(weights.to(x.dtype) @ self.v_proj(x)), None

    def step(self, x: Tensor, cache: Average | None) -> tuple[Tensor, Average]:
        y, rows = torch.zeros_like(x[:, 0]) if cache is None else cache.y, []
        for v in self.v_proj(x).unbind(1):
            y = self.keep * y + (1 - self.keep) * v
            rows.append(y)
        return self.o_proj(torch.stack(rows, 1)), Average(y)

    def describe(self) -> str:
        return f"moving average, {self.keep:g} kept"


# -- step 3: a line in each table --------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def tables() -> Iterator[None]:
    with mock.patch.dict(MIXERS, average=RECORD), mock.patch.dict(LAYERS, average=MovingAverage):
        yield


HYBRID = {"mixer": "average", "attention_layers": [1], "num_hidden_layers": 3}


def test_sizes_are_those_of_the_model_that_is_built() -> None:
    c = settings(**HYBRID)
    assert model_size(c, 40).parameters == make(**HYBRID).num_params()
    assert model_size(c, 40).recurrence == 9 * 24 * 2
    assert state_size(c) == 24
    assert c.family == "moving average"


def test_it_packs_documents_and_decodes_as_every_mixer_must() -> None:
    model, tokens = make(**HYBRID), tokens_of(2, 40)
    packed = model(tokens, None, CU_SEQLENS).flatten(0, 1)
    for start, end in itertools.pairwise(CU_SEQLENS[:6].tolist()):
        torch.testing.assert_close(model(tokens.flatten()[None, start:end])[0], packed[start:end], rtol=1e-5, atol=1e-5)
    logits, cache = model.step(tokens[:, :30])
    for t in range(30, 40):
        logits, cache = model.step(tokens[:, t : t + 1], cache)
    torch.testing.assert_close(logits, model(tokens)[:, -1], rtol=1e-5, atol=1e-5)


def train(path: Path) -> str:
    """What a run of the toy says."""
    tables = mock.patch.dict(MIXERS, average=RECORD), mock.patch.dict(LAYERS, average=MovingAverage)
    with tables[0], tables[1], contextlib.redirect_stdout(io.StringIO()) as said:
        Trainer(load_config(["--config", str(path), "--model.mixer=average", "--training.steps=3"]), current_world()).train()
    return said.getvalue()


def test_it_trains_and_says_which_settings_mean_nothing_to_it(tiny_config: Path) -> None:
    (said,) = run_ranks(1, train, tiny_config)
    assert "2 blocks, width 32: moving average, 0.9 kept" in said
    assert "model.num_heads (tiny.toml:" in said.replace(str(tiny_config.parent) + "/", "")
    assert 'has no effect: no layer uses it (mixer "average")' in said
    records = (tiny_config.parent / "outputs/tiny/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in records if '"loss"' in line] == [1, 2, 3]


def test_an_export_that_does_not_know_it_refuses_it() -> None:
    with pytest.raises(UserError, match="mixer = 'average' cannot be exported"):
        to_hf(settings(mixer="average"), REMOTE_CODE, 32)
