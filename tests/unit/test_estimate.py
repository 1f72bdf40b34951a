"""What an estimate counts, against arithmetic by other means. Against real runs: tests/distributed/test_estimate.py."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from deltaproduct_kernels.triton_backend import cost
from deltaproduct_kernels.triton_backend.layout import Size
from torch._subclasses.fake_tensor import FakeTensorMode

from titan_dp import config
from titan_dp.cli import dispatch
from titan_dp.config.load import load_config
from titan_dp.errors import UserError
from titan_dp.estimate import ledger, trace
from titan_dp.estimate.collectives import Collective
from titan_dp.estimate.command import _print_memory, amount, dry_run, unit_of
from titan_dp.estimate.ledger import Ledger, Work
from titan_dp.estimate.result import ALLOWANCE, ALLOWANCE_SHARE, estimate
from titan_dp.estimate.speed import Assumptions, links, predict, seconds_of
from titan_dp.estimate.trace import fake_run
from titan_dp.hardware import GPUS, NETWORKS, find_gpu, gpu_of, peak
from titan_dp.model.transformer import build_model
from titan_dp.train.batch_plan import plan_batches
from titan_dp.train.facts import planned

H200, IB = GPUS["H200"], NETWORKS["ib-400"]
MODEL = config.Model(
    hidden_size=128, num_hidden_layers=3, num_heads=2, head_dim=32, vocab_size=512, num_householder=2, use_forget_gate=True
)


def run_of(model: config.Model = MODEL, **sections: object) -> config.Config:
    training = sections.pop("training", config.Training(steps=1, seq_len=128, local_batch_size=2))
    return config.Config(model=model, training=training, validation=config.Validation(enable=False), **sections)  # type: ignore[arg-type]


def memory_of(c: config.Config, ranks: int = 4, gpu: object = H200) -> dict[str, int]:
    return estimate(c, ranks, gpu, IB, search=False).memory  # type: ignore[arg-type]


# -- memory ------------------------------------------------------------------------------------------------------------


def test_the_ledger_counts_a_storage_from_its_operator_to_its_last_reference() -> None:
    with FakeTensorMode(), Ledger() as record, record.watching_resizes():
        a = torch.zeros(1000)
        b = a.view(10, 100) + 1  # a view is no storage
        del a
        c = b.sum(0)  # 400 bytes beside b's 4000
        b.untyped_storage().resize_(0)
        d = torch.zeros(1100)
    assert record.peak().bytes == 8000
    assert record.peak(since=3).bytes == 4800, "b is gone: c and d"
    del c, d


def test_shards_and_optimizer_state_are_those_of_rank_0() -> None:
    shapes = [p.shape for p in build_model(MODEL).parameters()]
    for ranks in (1, 6):
        shard = sum(math.ceil(s[0] / ranks) * math.prod(s[1:]) for s in shapes)
        memory = memory_of(run_of(), ranks)
        assert memory[ledger.PARAMETERS] == 4 * shard
        assert memory[ledger.OPTIMIZER] == 8 * shard + 4 * len(shapes), "two moments, and AdamW's step of each tensor"


def test_the_gpu_estimate_counts_what_the_kernels_save() -> None:
    """A layer more keeps one more set of what cost.py counts on its own, and the layer's output, which the norm reads."""
    one = run_of(MODEL.model_copy(update={"num_hidden_layers": 2}))
    more = memory_of(run_of())[ledger.RECURRENCE] - memory_of(one)[ledger.RECURRENCE]
    size = Size(B=2, T=128, n=2, H=2, dk=32, dv=32, bits=16, gated=True)
    assert more == cost.saved(size)


@pytest.mark.parametrize("causal", [True, False])
def test_softmax_attention_has_the_flops_of_its_products(causal: bool) -> None:
    B, H, T, d = 2, 3, 64, 32
    with FakeTensorMode(), Ledger() as record:
        q, k, v = (torch.zeros(B, H, T, d, requires_grad=True) for _ in range(3))
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal).sum().backward()
    pairs = T * T // 2 if causal else T * T
    assert sum(w.flops for w in record.work) == (2 + 5) * 2 * B * H * pairs * d, "two products forward, five backward"
    assert {w.kind for w in record.work if w.flops} == {"matmul"}


def test_checkpointing_trades_activations_for_flops() -> None:
    results = {
        mode: estimate(run_of(activation_checkpoint=config.ActivationCheckpoint(mode=mode)), 4, H200, IB, search=False)  # type: ignore[arg-type]
        for mode in ("none", "selective", "full")
    }
    none, selective, full = (results[mode] for mode in ("none", "selective", "full"))
    assert none.tensors > selective.tensors > full.tensors
    assert none.executed_flops < selective.executed_flops < full.executed_flops
    assert none.model_flops == full.model_flops


def test_two_micro_batches_stand_for_any_number(monkeypatch: pytest.MonkeyPatch) -> None:
    c = run_of(training=config.Training(steps=1, seq_len=64, local_batch_size=1, global_batch_size=16))
    short = estimate(c, 4, H200, IB, search=False)
    monkeypatch.setattr(trace, "_MICRO_BATCHES", 4)
    assert short.batch.accumulation == 4
    long = estimate(c, 4, H200, IB, search=False)
    assert (long.memory, long.communication, long.executed_flops) == (short.memory, short.communication, short.executed_flops)


def test_the_largest_batch_fits_and_the_next_one_does_not() -> None:
    available = 3 * 2**30
    found = estimate(run_of(), 4, H200, IB, available=available).largest_batch
    assert found is not None
    assert found > 2

    def needed(rows: int) -> float:
        c = run_of(training=config.Training(steps=1, seq_len=128, local_batch_size=rows))
        return estimate(c, 4, H200, IB, search=False).tensors * (1 + ALLOWANCE_SHARE) + ALLOWANCE

    assert needed(found) <= available < needed(found + 1)


@pytest.mark.parametrize(
    ("local", "gib", "said"),
    [
        (6, 1024, "local batch 6: the largest that global_batch_size 24 on 4 ranks allows; memory has room for more"),
        (1, 1024, "local batch 1: the largest that global_batch_size 24 on 4 ranks allows is 6; memory has room for more"),
        (1, 2.012, "local batch 1: the largest that fits is 1"),
    ],
)
def test_a_global_batch_that_is_given_stays_and_is_named_if_it_and_not_memory_limits_the_local_batch(
    local: int, gib: float, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    training = config.Training(steps=1, seq_len=128, local_batch_size=local, global_batch_size=24)
    _print_memory(estimate(run_of(training=training), 4, H200, IB, available=int(gib * 2**30)))
    assert capsys.readouterr().out.rstrip().endswith(said)


# -- communication and speed -------------------------------------------------------------------------------------------


def test_what_is_sent_is_named_for_its_purpose_and_counted_in_a_ring() -> None:
    sent = estimate(run_of(), 4, H200, IB, search=False).communication
    padded = sum(math.ceil(p.shape[0] / 4) * 4 * p[0].numel() for p in build_model(MODEL).parameters())
    assert sent["reduce-scatter of gradients"]["sent"] == 4 * padded * 3 / 4
    assert sent.keys() == {"all-gather of parameters", "reduce-scatter of gradients", "counts, norm and loss"}


def test_a_step_begins_with_one_all_reduce_of_counts_and_ends_with_those_of_norm_and_loss() -> None:
    """The collectives are those that `train_step` lists; tests/distributed/test_estimate.py finds them in a real step."""
    router = MODEL.model_copy(update={"adaptive_householder": True})
    training = config.Training(steps=1, seq_len=64, local_batch_size=1, householder_cost=0.1)
    for model, counts, last in ((MODEL, 4, ["norm", "loss"]), (router, 5, ["norm", "steps", "loss"])):
        with fake_run(run_of(model, training=training), 4, H200) as run:
            found = [(c.kind, c.size) for c in run.step(1, 1).collectives]
        assert found[0] == ("all-reduce", 8 * counts), "three signals, valid labels, tokens that cost something"
        assert found[-len(last) :] == [("all-reduce", 4)] * len(last)
        assert {kind for kind, _ in found[1 : -len(last)]} == {"all-gather", "reduce-scatter"}


def test_what_context_parallelism_exchanges_does_not_grow_with_the_rows() -> None:
    context = 4
    c = run_of(parallelism=config.Parallelism(context_parallel_degree=context))
    longer = run_of(training=config.Training(steps=1, seq_len=512, local_batch_size=2), parallelism=c.parallelism)
    sent = estimate(c, 8, H200, IB, search=False).communication["context parallelism"]
    assert estimate(longer, 8, H200, IB, search=False).communication["context parallelism"] == sent
    state, halo = (
        2 * 2 * 32 * 32 * 4,
        2 * 3 * MODEL.hidden_size * 2,
    )  # 2 rows: float32 states; 3 tokens in bfloat16
    each_way = (2 * state) + state + halo  # a map, in the last of two rounds N alone, tokens before the segment
    assert sent["sent"] == MODEL.num_hidden_layers * 2 * each_way
    assert sent["calls"] == MODEL.num_hidden_layers * 2 * (2 + 1)


def test_ranks_of_a_shift_wait_for_one_message_between_nodes_if_they_are_of_several() -> None:
    shift = Collective("shift", 50_000_000, tuple(range(16)), "forward", 0)
    assert links(shift, 8) == (0, shift.size)
    assert links(shift, 16) == (shift.size, 0)
    whole = Assumptions(link=1.0)
    assert seconds_of(shift, H200, IB, whole) == pytest.approx(1e-3 + IB.latency)


def test_bytes_between_nodes_are_a_nodes_share_of_the_ring() -> None:
    whole = Collective("all-gather", 1600, tuple(range(16)), "forward", 0)
    assert links(whole, 8) == (1500 * 7 / 8, 1500 / 8)
    assert links(whole, 16) == (1500, 0)
    replicas = Collective("all-reduce", 1600, (0, 8, 16, 24), "backward", 0)
    assert links(replicas, 8) == (0, 2 * 1200)


def test_a_step_takes_its_compute_and_what_communication_sticks_out() -> None:
    a = Assumptions(matmul=0.5, bandwidth=1.0, link=1.0)
    work = [Work("forward", "matmul", int(H200.tflops * 1e12), 0, 0), Work("forward", "other", 0, int(4.8e12), 0)]
    slow = Collective("all-gather", int(50e9 * 40), tuple(range(16)), "forward", 0)
    speed = predict(work, [slow], 1, H200, IB, False, a)
    assert speed.compute == pytest.approx(2 + 1)
    assert speed.communication == pytest.approx(seconds_of(slow, H200, IB, a)) == pytest.approx(40 * 15 / 16 / 8, rel=1e-3)
    assert speed.exposed == pytest.approx(speed.communication)
    assert predict(work, [slow, slow], 1, H200, IB, False, a).exposed == pytest.approx(2 * speed.communication - 3)
    kernel = [Work("forward", "recurrence", 0, int(4.8e12), 0)]
    assert predict(kernel, [], 1, H200, IB, True, replace(a, recurrence=0.25)).compute == pytest.approx(4)


NAMES = """
NVIDIA H200 = H200; NVIDIA H200 NVL = H200 NVL; NVIDIA GH200 480GB = GH200; NVIDIA GH200 120GB = GH200; NVIDIA B200 = B200;
NVIDIA GH200 144G HBM3e = GH200 144GB; NVIDIA H100 80GB HBM3 = H100; NVIDIA H100 PCIe = H100 PCIe; NVIDIA GB200 = GB200;
NVIDIA H100 NVL = H100 NVL; NVIDIA A100-SXM4-80GB = A100; NVIDIA A100-SXM4-40GB = A100 40GB; NVIDIA L40S = L40S;
A100-PCIE-40GB = A100 PCIe 40GB; NVIDIA A100 80GB PCIe = A100 PCIe; NVIDIA L40 = L40; NVIDIA L4 = L4; NVIDIA A10 = A10;
NVIDIA A10G = A10G; NVIDIA GeForce RTX 4090 = RTX 4090
"""
"""What drivers call devices, and which of the table each is."""
OTHERS = """
NVIDIA H20; NVIDIA H800; NVIDIA A100X; NVIDIA L40G; NVIDIA B300 SXM6 AC; NVIDIA GB300; GeForce 256; AMD Instinct MI300X;
NVIDIA GeForce RTX 4090 Laptop GPU; NVIDIA GeForce RTX 4090 D; NVIDIA GeForce RTX 3090 Ti; NVIDIA A100-SXM-64GB;
NVIDIA H100 80GB HBM3 MIG 1g.10gb; NVIDIA A100-40C
"""


def test_a_device_is_the_gpu_that_every_word_of_its_name_fits_or_none() -> None:
    known = dict(pair.strip().split(" = ") for pair in NAMES.split(";"))
    assert {device: gpu.name if (gpu := gpu_of(device)) else None for device in known} == known
    for device in OTHERS.split(";"):
        assert gpu_of(device.strip()) is None, device
        assert peak(device.strip(), "bfloat16") is None, device
    assert find_gpu("rtx-4090").name == "RTX 4090", "in any case"
    assert [peak("NVIDIA H100 80GB HBM3", dtype) for dtype in ("bfloat16", "float32")] == pytest.approx([989.4e12, 66.9e12])


def test_the_plan_of_a_run_is_in_numbers_that_are_known() -> None:
    c = load_config(["--config", "800m.toml"]).config
    text = " ".join(planned(c, plan_batches(c.training, 2), 2).values())
    assert all(part in text for part in ("804,965,952", "104,905 steps", "55B tokens"))
    assert "Householder" not in text
    router = ["--model.adaptive_householder", "--training.householder_cost=1"]
    c = load_config(["--config", "800m.toml", *router]).config
    assert "all Householder steps taken" in planned(c, plan_batches(c.training, 2), 2)["FLOPs per token"]


# -- the command -------------------------------------------------------------------------------------------------------


def test_1024_ranks_of_the_800m_model_are_estimated_here(capsys: pytest.CaptureFixture[str]) -> None:
    """With fewer layers than it has, for time; benchmarks/estimate.py takes all."""
    fewer = ["--model.num_hidden_layers=2", "--training.local_batch_size=1", "--gpu-memory=12"]
    assert dispatch(["estimate", "--config", "800m.toml", "--nproc", "1024", *fewer, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["ranks"] == 1024
    assert 0 < result["memory"][ledger.PARAMETERS] < 2**20
    assert 0 < result["mfu"] < 1
    assert result["largest_batch"] > 1
    assert "training would refuse this" in result["notes"][0], "128 sequences for 1,024 ranks"
    assert any("60% of H200's 989.4 TFLOP/s" in line for line in result["assumptions"])


def test_mistakes_are_one_sentence_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: str) -> str:
        with pytest.raises(UserError) as error:
            dispatch(["estimate", "--config", "debug.toml", "--nproc", "4", *arguments])
        return str(error.value)

    assert "RTX 4090" in refused("--gpu", "H900")
    assert "ib-400" in refused("--network", "string")
    fla = ("--model.backend", "fla", "--training.mixed_precision_param", "bfloat16")
    assert "model.backend = 'fla' is not estimated" in refused("--gpu", "H200", *fla)
    assert "number of ranks, which is 4" in refused("--parallelism.data_parallel_replicate_degree", "3")
    monkeypatch.setitem(GPUS, "T4", replace(GPUS["A10"], name="T4", arch=75))
    assert "it is of compute capability 7.5; the kernels need 8.0" in refused("--gpu", "T4", "--model.backend", "triton")


def test_a_gpu_without_a_data_sheet_has_memory_but_no_speed() -> None:
    unknown = replace(H200, name="X900", **dict.fromkeys(("tflops", "float32_tflops", "bandwidth", "link"), math.nan))
    known, found = (estimate(run_of(), 4, gpu, IB, search=False) for gpu in (H200, unknown))
    assert (found.memory, found.speed, found.assumptions) == (known.memory, None, [])
    assert found.notes[-1] == "no speed is predicted: X900 is not in the table of data sheets"


def test_the_dry_run_is_the_estimate_for_what_is_here(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_config(["--config", "debug.toml", "--optimizer.muon_lr=1"])
    dry_run(loaded)
    shown = capsys.readouterr().out
    counted = estimate(loaded.config, 1, None, IB, search=False)
    size, unit = unit_of([counted.tensors])
    assert re.search(rf"memory per rank +{unit} +at the peak, {counted.peak_phase}", shown)
    assert re.search(rf"tensors +{amount(counted.tensors, size)}", shown)
    assert "torch backend" in shown
    assert not any(word in shown for word in ("predicted", "allowance")), "a CPU has no data sheet"
    assert "warning: optimizer.muon_lr (command line) has no effect" in shown
    dry_run(load_config(["--config", "debug.toml", "--model.mixer=rwkv7"]))
    assert "not counted for rwkv7; titan-dp estimate does, in minutes" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    dry_run(loaded)
    assert capsys.readouterr().out == "", "other ranks say nothing"
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="is not a multiple of"):
        dry_run(loaded)
