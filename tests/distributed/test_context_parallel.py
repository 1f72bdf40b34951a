"""Rows over several ranks: the single rank's loss and gradients, and an exchange that does not grow with the rows."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.distributed.harness import run_ranks
from tests.distributed.helpers import clean, pretended, sharded_model
from tests.distributed.test_trainer import losses_of
from titan_dp import config
from titan_dp.distributed import current_world
from titan_dp.estimate.ledger import Ledger
from titan_dp.model import context_parallel
from titan_dp.model.context_parallel import ContextParallel
from titan_dp.model.parallelize import apply_activation_checkpoint
from titan_dp.model.transformer import Transformer, build_model

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "head_dim": 8,
    "expand_v": 1.5,
    "intermediate_size": 32,
    "vocab_size": 48,
    "initializer_range": 0.1,
    "attention_num_heads": 4,
    "attention_num_kv_heads": 2,
}
GROUP_NORM = {"num_heads": 4, "num_key_heads": 2, "use_output_gate": True, "output_norm": "group", "gate_before_norm": True}
LINEAR = {"mixer": "gla", "num_householder": 1}
ROWS, T = 2, 48
# Of two rows of 48 tokens, in segments of 24, 12 or 6: boundaries at a segment's start, one before, one after, several in
# one, none in others, an empty document, and the padding at the end.
DOCUMENTS = [0, 11, 12, 13, 24, 30, 30, 31, 48, 48 + 5, 48 + 36, 96, 96, 96]
CASES: dict[str, dict[str, Any]] = {
    "DeltaNet": {"num_householder": 1},
    "Gated DeltaProduct_2, documents": {"num_householder": 2, "use_forget_gate": True, "documents": DOCUMENTS},
    "Gated DeltaProduct_3, documents": {"num_householder": 3, "use_forget_gate": True, "documents": DOCUMENTS},
    "no convolution": {"num_householder": 2, "use_short_conv": False, "use_output_gate": True, "allow_neg_eigval": False},
    "the definition": {"num_householder": 2, "use_forget_gate": True, "backend": "recurrent", "documents": DOCUMENTS},
    "a router": {"num_householder": 2, "adaptive_householder": True},
    "grouped heads, documents": {"num_heads": 4, "num_key_heads": 2, "use_forget_gate": True, "documents": DOCUMENTS},
    "norm over groups behind the gate, documents": {**GROUP_NORM, "use_forget_gate": True, "documents": DOCUMENTS},
    "linear attention": LINEAR,
    "gated linear attention, documents": {**LINEAR, "use_forget_gate": True, "documents": DOCUMENTS},
    "hybrid": {"num_householder": 1, "attention_layers": [1]},
    "hybrid, window of the segment before": {"num_householder": 1, "attention_layers": [0], "attention_window": 6},
    "hybrid, window of many segments": {"num_householder": 1, "attention_layers": [1], "attention_window": 30},
    "hybrid, window of one": {"num_householder": 1, "attention_layers": [1], "attention_window": 1},
    "hybrid, documents": {"num_householder": 2, "attention_layers": [1], "documents": DOCUMENTS},
    "hybrid in OLMo's blocks, documents": {"attention_layers": [1], "attention_block": "olmo", "documents": DOCUMENTS},
    "hybrid, window, documents": {"attention_layers": [0], "attention_window": 6, "documents": DOCUMENTS},
    "Transformer": {"mixer": "attention"},
    "strong gates": {"num_householder": 2, "use_forget_gate": True, "gate": 12.0},
    "weak gates": {"num_householder": 2, "use_forget_gate": True, "gate": -12.0},
    "steps near 0 and 2, documents": {"num_householder": 3, "beta": 300.0, "use_forget_gate": True, "documents": DOCUMENTS},
}

EIGHT = (*list(CASES)[:3], "gated linear attention, documents", "hybrid", "hybrid, window, documents")
"""Cases for other numbers of ranks: every n_h, gated and not, and every other kind of layer."""


def settings_of(case: dict[str, Any]) -> config.Model:
    return config.Model(**SMALL | {k: v for k, v in case.items() if k not in ("documents", "gate", "beta")})


def model_of(case: dict[str, Any], dtype: torch.dtype) -> Transformer:
    extremes = {key: case[key] for key in ("gate", "beta") if key in case}
    model = build_model(settings_of(case))
    model.init_weights(0)
    for name, parameter in model.named_parameters():
        if name.endswith("dt_bias"):
            parameter.data += extremes.get("gate", 0.0)
        if name.endswith("b_proj.weight"):
            parameter.data *= extremes.get("beta", 1.0)
        if name.endswith("r_proj.bias"):
            parameter.data.zero_()  # so that some steps are not taken
    return model.to(dtype)


def batch(seed: int, length: int = T) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 48, (ROWS, length + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = -100
    return tokens[:, :-1], labels


def segment(x: Tensor) -> Tensor:
    return x.chunk(dist.get_world_size(), 1)[dist.get_rank()]


def results(model: Transformer, tokens: Tensor, labels: Tensor, cu_seqlens: Tensor | None) -> dict[str, Tensor]:
    """The loss and every gradient; of a segment the share in them, which still is to be summed over ranks."""
    loss, steps = model(tokens, labels, cu_seqlens)
    (loss + 0.1 * (0.0 if steps is None else steps.sum())).backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


def distance(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest error relative to the largest entry; a gradient that is all but zero counts as 1e-3 of the largest."""
    floor = 1e-3 * max(float(x.abs().max()) for name, x in expected.items() if name != "loss")
    return max(float((got[name] - x).abs().max() / max(x.abs().max(), floor)) for name, x in expected.items())


def errors(names: Sequence[str], dtype: torch.dtype, seed: int) -> dict[str, float]:
    """How far the ranks are from one rank in each case, on rank 0 alone."""
    found = {}
    for name in names:
        case, (tokens, labels) = CASES[name], batch(seed)
        cu_seqlens = torch.tensor(case["documents"], dtype=torch.int32) if "documents" in case else None
        model = model_of(case, dtype)
        model.set_context(ContextParallel(dist.group.WORLD))
        got = results(model, segment(tokens), segment(labels), cu_seqlens)
        for value in got.values():
            dist.reduce(value, 0)
        if dist.get_rank() == 0:
            one = results(model_of(case, dtype), tokens, labels, cu_seqlens)
            assert got.keys() == one.keys(), name
            found[name] = distance(got, one)
    return found


@pytest.mark.parametrize(("world_size", "names"), [(2, EIGHT), (3, EIGHT), (4, tuple(CASES)), (8, EIGHT)])
def test_loss_and_every_gradient_are_those_of_one_rank(world_size: int, names: tuple[str, ...]) -> None:
    seed = int(torch.randint(1 << 30, ()))
    found = run_ranks(world_size, errors, names, torch.float64, seed)[0]
    assert not {name: error for name, error in found.items() if not error < 1e-10}, seed


def test_in_float32_they_are_as_near_as_an_ill_conditioned_draw_lets_them_be() -> None:
    """Another order of addition changes float32's last digit, and a norm of a small output or a sum of terms that cancel makes
    up to 3e-5 of it. What is wrong in more than an order shows in float64."""
    seed = int(torch.randint(1 << 30, ()))
    found = run_ranks(2, errors, list(CASES), torch.float32, seed)[0]
    assert not {name: error for name, error in found.items() if not error < 1e-3}, seed


def exchanged(case: dict[str, Any], lengths: list[int], mode: str = "none") -> list[dict[str, int]]:
    """Bytes that this rank hands to the process group in a forward and backward of each length, by operator of torch's c10d."""
    model, counts = model_of(case, torch.float32), []
    model.set_context(ContextParallel(dist.group.WORLD))
    apply_activation_checkpoint(model, config.ActivationCheckpoint(mode=mode))  # type: ignore[arg-type]
    for length in lengths:
        tokens, labels = batch(0, length)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiler:
            results(model, segment(tokens), segment(labels), None)
        sent: dict[str, int] = {}
        for event in profiler.events():
            if event.name.startswith("c10d::"):
                given = event.input_shapes[1]  # the operators' arguments begin with output, input
                sent[event.name] = sent.get(event.name, 0) + 4 * prod(given)
        counts.append(sent)
    return counts


def test_what_a_recurrent_layer_exchanges_does_not_depend_on_the_length() -> None:
    H, dk, dv, D, halo, layers = 2, 8, 12, 32, 3, 2
    for mixer, square in (({"num_householder": 2, "use_forget_gate": True}, dk * dk), (LINEAR, 1)):
        for ranks, maps, states in ((2, 0, 1), (4, 1, 2)):  # that the first rank sends to later ones
            there = layers * 4 * ROWS * (maps * H * square + states * H * dk * dv + halo * D)
            counts = run_ranks(ranks, exchanged, mixer, [48, 192])
            # The last rank sends as much back, those between some of it both ways.
            assert counts[0] == counts[-1] == [{"c10d::alltoall_base_": there}] * 2, (mixer, ranks)
            assert all(short == long and short["c10d::alltoall_base_"] <= 2 * there for short, long in counts), (mixer, ranks)
    expected = run_ranks(2, exchanged, mixer, [48])
    assert run_ranks(2, exchanged, mixer, [48], "selective") == expected, "a kept exchange is not made again"


def random_maps(size: int, square: bool, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    """M [C, B, H, dk, dk] of norms below 1, or factors, and N [C, B, H, dk, dv] of `size` segments, B = 2, H = 3."""
    generator = torch.Generator().manual_seed(seed)
    M = torch.randn(size, 2, 3, *((8, 8) if square else (1, 1)), generator=generator, dtype=torch.float64)
    N = torch.randn(size, 2, 3, 8, 12, generator=generator, dtype=torch.float64)
    return (M / torch.linalg.matrix_norm(M, 2, keepdim=True).clamp(min=1.0)).to(dtype), N.to(dtype)


def scanned(square: bool, dtype: torch.dtype, seed: int) -> list[Tensor]:
    """What this rank's scan over earlier and over later ranks gives, twice."""
    maps = [x[dist.get_rank()] for x in random_maps(dist.get_world_size(), square, dtype, seed)]
    return [context_parallel._scan(context_parallel._Map(*maps), by, dist.group.WORLD.group_name) for by in (1, -1, 1, -1)]


def one_after_another(square: bool, dtype: torch.dtype, seed: int, size: int) -> list[list[Tensor]]:
    """The same on one rank that has all maps."""
    moves, writes = random_maps(size, square, torch.float64, seed)
    states = [[torch.zeros_like(writes[0]), torch.zeros_like(writes[0])] for _ in range(size)]
    for column, order in ((0, range(size)), (1, range(size - 1, -1, -1))):
        S = torch.zeros_like(writes[0])
        for rank in order:
            states[rank][column] = S
            S = (moves[rank] @ S if square else moves[rank] * S) + writes[rank]
    return states


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8])
def test_a_scan_over_ranks_is_one_map_after_another_and_the_same_to_the_bit_again(size: int) -> None:
    seed = int(torch.randint(1 << 30, ()))
    for square in (True, False):
        for dtype, near in ((torch.float64, 1e-14), (torch.float32, 1e-5)):
            found = run_ranks(size, scanned, square, dtype, seed)
            for (before, after, *again), expected in zip(found, one_after_another(square, dtype, seed, size), strict=True):
                assert all(map(torch.equal, (before, after), again))
                for got, wanted in zip((before, after), expected, strict=True):
                    assert got.dtype == dtype
                    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=near * 10)


@pytest.mark.parametrize("rank", [0, 31, 63])
@pytest.mark.parametrize("by", [1, -1])
def test_64_ranks_scan_in_6_rounds_and_hold_less_than_a_tenth_of_all_maps(rank: int, by: int) -> None:
    M, N = torch.empty(1, 12, 128, 128, device="meta"), torch.empty(1, 12, 128, 128, device="meta")
    own = M.nbytes + N.nbytes
    with pretended(rank, 64):
        with Ledger(ignored=[M, N]) as ledger:
            context_parallel._scan(context_parallel._Map(M, N), by, dist.group.WORLD.group_name)
        k, beta = torch.empty(1, 16, 2, 12, 128, device="meta"), torch.empty(1, 16, 2, 12, device="meta")
        where = (None, None, 1, 1, True, "torch", dist.group.WORLD.group_name)
        _, kept = context_parallel.state_before(k, k, beta, None, *where)
    assert ledger.peak().bytes + own <= 64 * own / 10
    assert kept.shape == M.shape, "for the backward pass: its own map"
    assert [(c.kind, c.size) for c in ledger.collectives] == [("shift", own)] * 5 + [("shift", N.nbytes)]


def test_a_softmax_layer_exchanges_the_window_or_everything() -> None:
    (short, long), _ = run_ranks(2, exchanged, {"mixer": "attention", "attention_window": 6}, [48, 192])
    assert short == long
    (short, long), _ = run_ranks(2, exchanged, {"mixer": "attention"}, [48, 192])
    assert sum(long.values()) == 4 * sum(short.values())


DOCUMENTS_AND_SOFTMAX = {**CASES["Gated DeltaProduct_2, documents"], "attention_layers": [1]}


def sharded(replicate: int, modes: list[str], seed: int) -> list[dict[str, Tensor]]:
    """Gradients of a model that is sharded, replicated and checkpointed, two ranks a row."""
    world, gradients = current_world(), []
    for mode in modes:
        recomputed = config.ActivationCheckpoint(mode=mode)  # type: ignore[arg-type]
        model = sharded_model(replicate, ac=recomputed, c=settings_of(DOCUMENTS_AND_SOFTMAX), context=2)
        tokens, labels = batch(seed + world.rank // 2)
        mine = slice(world.rank % 2 * T // 2, (world.rank % 2 + 1) * T // 2)
        loss = model(tokens[:, mine], labels[:, mine], torch.tensor(DOCUMENTS, dtype=torch.int32)).loss
        (loss * world.size).backward()
        gradients.append({clean(name): p.grad.full_tensor() for name, p in model.named_parameters()})  # type: ignore[union-attr]
    return gradients


def test_it_composes_with_fsdp_hsdp_and_activation_checkpointing() -> None:
    for world_size, replicate, modes in ((4, 1, ["none", "full"]), (8, 2, ["selective"])):
        one = model_of(DOCUMENTS_AND_SOFTMAX, torch.float32)
        for i in range(world_size // 2):
            expected = results(one, *batch(5 + i), torch.tensor(DOCUMENTS, dtype=torch.int32))
        del expected["loss"]
        for mode, gradients in zip(modes, run_ranks(world_size, sharded, replicate, modes, 5)[0], strict=True):
            assert distance(gradients, expected) < 2e-5, (world_size, mode)


def compiled(case: dict[str, Any]) -> tuple[float, int, int]:
    """How far compiled and checkpointed blocks are from plain ones; graphs and graph breaks of a model of one kind of block."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    found = []
    for compile in (False, True):
        model = model_of(case, torch.float32)
        model.set_context(ContextParallel(dist.group.WORLD))
        if compile:
            apply_activation_checkpoint(model, config.ActivationCheckpoint(mode="selective"))
            for block in model.layers:
                block.compile(fullgraph=True, backend="aot_eager")
        tokens, labels = batch(9)
        documents = torch.tensor(case["documents"], dtype=torch.int32) if "documents" in case else None
        got = results(model, segment(tokens), segment(labels), documents)
        found.append({clean(name): value for name, value in got.items()})
    breaks = sum(counters["graph_break"].values())
    return distance(found[1], found[0]), counters["stats"]["unique_graphs"], breaks


def test_a_compiled_block_stays_one_graph() -> None:
    for case in (CASES["Gated DeltaProduct_2, documents"], CASES["Transformer"]):
        for error, graphs, breaks in run_ranks(2, compiled, case):
            assert (graphs, breaks) == (1, 0)
            assert error < 1e-5


DEGREE = "--parallelism.context_parallel_degree"


def test_a_run_has_the_losses_of_one_without_and_resumes_with_another_degree(tiny_config: Path) -> None:
    hybrid = ["--model.attention_layers", "[1]", "--validation.freq", "3", "--generate.enable", "false"]
    steps = [*hybrid, "--lr_scheduler.total_steps", "6"]
    expected = losses_of(tiny_config, 1, "one", *hybrid, "--training.steps", "6")
    for first, second in ((2, 1), (1, 2)):
        name = f"from {first} to {second}"
        losses_of(tiny_config, 4, name, *steps, "--training.steps", "3", DEGREE, str(first))
        losses = losses_of(tiny_config, 4, name, *steps, "--training.steps", "6", DEGREE, str(second))
        assert losses == pytest.approx(expected, abs=1e-5), name
