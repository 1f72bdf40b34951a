"""Muon alone on a rank is torch's, bit for bit; its shards on several ranks are tests/distributed/test_optim.py's."""

from __future__ import annotations

import pytest
import torch

from titan_dp.train.muon import Muon


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (16, 16)])
def test_without_other_ranks_it_is_torchs(shape: tuple[int, int]) -> None:
    def trained(kind: type[torch.optim.Muon]) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        parameter = torch.nn.Parameter(torch.randn(shape, generator=generator))
        optimizer = kind([parameter], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        for _ in range(3):
            parameter.grad = torch.randn(shape, generator=generator)
            optimizer.step()
        return [parameter.detach(), optimizer.state[parameter]["momentum_buffer"]]

    for own, theirs in zip(trained(Muon), trained(torch.optim.Muon), strict=True):
        assert torch.equal(own, theirs)
