"""The record of a run: complete, once per step, and honest about speed."""

from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.text import Text

from tests.runs import write_sweep
from titan_dp import config
from titan_dp.config.describe import all_keys
from titan_dp.config.load import Loaded
from titan_dp.config.mixers import Counts
from titan_dp.distributed import World
from titan_dp.errors import UserError
from titan_dp.faults.step_times import Interval
from titan_dp.train.batch_plan import plan_batches
from titan_dp.train.facts import RunFacts
from titan_dp.train.metrics import Metrics, drop_repeated_steps, peak_flops
from titan_dp.train.step import StepResult
from titan_dp.train.validate import Evaluation

CPU = torch.device("cpu")


def metrics(folder: Path, start_step: int = 0, rank: int = 0, run_name: str = "", **c: object) -> Metrics:
    """Of a run of two ranks, 1,000 steps of 512 tokens, and text of 4 bytes per token."""
    settings = config.Config(
        job=config.Job(run_name=folder.name),
        training=config.Training(steps=1000, seq_len=512),
        metrics=config.Metrics(**{"enable_tensorboard": False, **c}),  # type: ignore[arg-type]
    )
    held_out: Any = types.SimpleNamespace(bytes_per_token=4.0)
    batch = plan_batches(settings.training.model_copy(update={"local_batch_size": 1}), 1)
    loaded = Loaded(settings, dict.fromkeys(all_keys(), "test"))
    if run_name:  # which pydantic would refuse as a folder
        loaded.config.job.__dict__["run_name"] = run_name
    of_run = RunFacts(loaded, World(rank, 2, CPU), Counts(matmul=10**6), batch, held_out, held_out)
    return Metrics(folder, of_run, start_step, 512 * start_step)


def facts(tokens_per_step: int, epochs: float = 0.0, device: str = "cpu") -> RunFacts:
    """Of 10 steps in two ranks, with 10 GFLOPs per token."""
    settings = config.Config(training=config.Training(steps=10, seq_len=tokens_per_step, local_batch_size=1))
    loader: Any = types.SimpleNamespace(epochs=lambda tokens: epochs)
    batch = plan_batches(settings.training, 1)
    loaded = Loaded(settings, dict.fromkeys(all_keys(), "test"))
    return RunFacts(loaded, World(0, 2, torch.device(device)), Counts(matmul=10**10), batch, loader, None)


def interval(seconds: float = 1.0, **values: Any) -> Interval:
    usual: dict[str, Any] = {"data_wait": 0.0, "data_wait_slowest": 0.0, "work_slowest": 1.0, "paused": {}, "remarks": []}
    return Interval(seconds, **usual | values)


def log(m: Metrics, step: int, loss: float = 2.0, norm: float = 0.5, skipped: int = 0, during: Interval | None = None) -> None:
    result = StepResult(torch.tensor(loss), None, torch.tensor(norm), torch.zeros(3))
    m.log_step(step, during or interval(), result, tokens=512 * step, lr=3e-4, skipped=skipped)


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# -- a line and its record ---------------------------------------------------------------------------------------------


def test_a_log_line_shows_all_a_person_asks_for(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    m = metrics(tmp_path)
    log(m, 10)
    log(m, 20, skipped=3, during=interval(paused={"checkpoint": 2.5}, remarks=["rank 3 on a7 computes at 50 %"]))
    log(m, 30)
    first, second, remark, third = capsys.readouterr().out.splitlines()
    assert first.startswith("step    10/1,000 | loss 2.0000 | lr 3.0e-04 | norm 0.50 | ")
    assert all(part in first for part in ("tok/s", "GiB", "ETA 0:"))
    assert "FLOP/s" in third
    assert second.endswith("| 3 skipped | checkpoint 2.5 s")
    assert remark == "step    20 | rank 3 on a7 computes at 50 %"
    assert records(tmp_path)[1]["paused_checkpoint"] == 2.5


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        (None, "step 6,200/7,630 | loss 10.3418 | lr 3.0e-04 | 17.1k tok/s | ETA 15 d 9 h | checkpoint 12.5 s"),
        (80, "step 6,200/7,630 | loss 10.3418 | 17.1k tok/s | ETA 15 d 9 h | checkpoint 12.5 s"),
        (60, "step 6,200/7,630 | loss 10.3418 | 17.1k tok/s | ETA 15 d 9 h"),
    ],
)
def test_a_line_fits_100_columns_and_the_terminal_by_leaving_out_whole_parts(
    columns: int | None, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: columns is not None)
    monkeypatch.setenv("COLUMNS", str(columns))
    m = metrics(tmp_path)
    m.total_steps = 7630
    m._last_step, m._last_tokens = 6199, 512 * 6200 - 512 * 31000
    log(m, 6200, loss=10.3418, norm=14.81, during=interval(929.0, paused={"checkpoint": 12.5}))
    assert Text.from_ansi(capsys.readouterr().out).plain.splitlines() == [line]


def test_a_run_whose_steps_take_minutes_on_a_cpu_says_so_before_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    slow = facts(8000)  # 80 TFLOPs at 2 ranks x 4 threads x 10 GFLOP/s
    assert slow.step_seconds == pytest.approx(1000.0)
    (said,) = slow.warnings()
    assert said.startswith(
        "a step will take about 16.7 min on this CPU, the rest of the run 2.78 h (an estimate: 80 TFLOPs per"
    )
    assert "2 ranks of 4 threads at 10 GFLOP/s each" in said
    assert "training.global_batch_size, training.seq_len, training.steps" in said
    assert facts(800).warnings() == []
    assert facts(8000, device="cuda").warnings() == []


def test_a_run_that_reads_its_data_again_and_again_says_so() -> None:
    assert facts(8, epochs=9.0).warnings() == []
    (said,) = facts(8, epochs=2557.3).warnings()
    assert said == (
        "the run reads its data 2,557 times, and text that is repeated so often teaches little; prepare more text, or lower "
        "training.steps"
    )


def test_speed_is_tokens_over_the_seconds_of_training(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    log(metrics(tmp_path, peak_tflops=1e-3), 10, during=interval(4.0, data_wait=1.0, data_wait_slowest=2.0))
    (record,) = records(tmp_path)
    assert record["tokens_per_second"] == 10 * 512 / 4
    assert record["tflops_per_device"] == pytest.approx(1280 * 1e6 / 2 / 1e12)
    assert record["mfu"] == pytest.approx(0.64)
    assert (record["data_wait"], record["data_wait_slowest"]) == (0.25, 0.5)
    log(metrics(tmp_path / "a peak that is too low", peak_tflops=1e-9), 10)
    assert "metrics.peak_tflops is wrong" in capsys.readouterr().out


@pytest.mark.parametrize(("dtype", "teraflops"), [("bfloat16", 989.4), ("float32", 66.9)])
def test_the_peak_is_the_gpus_in_the_training_dtype_and_a_cpus_is_not_guessed(
    dtype: str, teraflops: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert peak_flops(config.Metrics(), torch.device("cuda"), dtype) == pytest.approx(teraflops * 1e12)
    assert peak_flops(config.Metrics(), CPU, dtype) is None
    assert peak_flops(config.Metrics(peak_tflops=2.0), CPU, dtype) == 2e12


def test_what_is_not_finite_is_recorded_as_null_which_every_json_parser_reads(tmp_path: Path) -> None:
    m = metrics(tmp_path)
    log(m, 1, math.nan, math.inf)
    m.log_validation(1, Evaluation(math.nan, 1000))
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    step, validation = records(tmp_path)
    assert (step["loss"], step["grad_norm"], validation["validation_loss"]) == (None, None, None)


def test_validation_is_recorded_in_nats_and_bits_per_byte(tmp_path: Path) -> None:
    m = metrics(tmp_path)
    m.log_validation(10, Evaluation(loss=4 * math.log(2), tokens=100))
    (record,) = records(tmp_path)
    assert record["validation_bits_per_byte"] == pytest.approx(1.0)
    assert m.validation_loss == record["validation_loss"]


def test_only_rank_0_writes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    m = metrics(tmp_path / "run", rank=1)
    log(m, 10)
    m.close()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


# -- a run that is resumed ---------------------------------------------------------------------------------------------


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    first = metrics(tmp_path)
    for step in (10, 20, 30):
        log(first, step, loss=1.0)
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')  # cut off by a kill
    log(metrics(tmp_path, start_step=20), 30, loss=5.0)
    assert [(r["step"], r["loss"]) for r in records(tmp_path)] == [(10, 1.0), (20, 1.0), (30, 5.0)]


def test_a_resume_drops_lines_that_are_not_records_and_writes_old_nans_as_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    drop_repeated_steps(path, 2)
    assert not path.exists()
    lines = [
        '{"step": 1, "loss": NaN}',
        "[1]",
        '{"step": "2"}',
        "7",
        '{"loss": 1.0}',
        '{"step": 2, "loss": 1.5}',
        '{"step": 3}',
    ]
    path.write_text("\n".join([*lines, '{"st']))
    drop_repeated_steps(path, 2)
    assert path.read_text() == '{"step": 1, "loss": null}\n{"step": 2, "loss": 1.5}\n'


# -- services ----------------------------------------------------------------------------------------------------------


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "a: #1"  # a legal run name
    m = metrics(folder, enable_tensorboard=True)
    log(m, 10)
    m.close()
    events = EventAccumulator(str(folder / "tb")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(10, 2.0)]
    assert {"optimizer/lr", "speed/tokens_per_second", "train/grad_norm"} <= set(events.Tags()["scalars"])
    (text,) = events.Tensors("configuration/text_summary")
    assert b"lr = 0.0003" in text.tensor_proto.string_val[0]
    assert "_hparams_/session_start_info" in events.summary_metadata


class FakeWandb(types.ModuleType):
    """The package as far as it is used: refuses what W&B refuses (0.31), and remembers what it was told."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.errors = types.SimpleNamespace(Error=Exception, UsageError=type("UsageError", (Exception,), {}))
        self.runs: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []

    def init(self, **told: Any) -> Any:
        if set(told["id"]) & set(":;,#?/'") or not told["id"].strip():
            raise self.errors.UsageError("Run ID cannot contain the characters: :;,#?/'")
        if set(told["project"]) & set("/\\#?%:"):
            raise self.errors.UsageError("Invalid project name")
        assert len(told["name"]) <= 128
        self.runs.append(told)
        return types.SimpleNamespace(log=lambda record, step: self.logged.append((step, record)), finish=lambda: None)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb())
    return fake


def test_each_run_folder_is_a_run_of_its_own_at_wandb_which_a_resume_continues(tmp_path: Path, wandb: FakeWandb) -> None:
    for folder in ("paperA/213m", "paperB/213m", "paperA/213m"):
        metrics(tmp_path / folder, enable_wandb=True).close()
    (tmp_path / "paperA/213m").rename(tmp_path / "moved")
    metrics(tmp_path / "moved", enable_wandb=True).close()
    first, second, resumed, moved = (run["id"] for run in wandb.runs)
    assert first == resumed == moved != second
    for run in wandb.runs:
        assert (run["resume"], run["allow_val_change"]) == ("allow", True), "a resume may have other settings"
        assert (run["config"]["training"]["steps"], run["config"]["optimizer"]["lr"]) == (1000, 3e-4)


def test_wandb_gets_any_run_name(tmp_path: Path, wandb: FakeWandb) -> None:
    for name in ("a:b, lr#3 / what? 'quoted', 50 %; -", "x" * 200):
        metrics(tmp_path / name, enable_wandb=True, run_name=name).close()
        assert wandb.runs[-1]["name"] == name[-128:]


def test_wandb_groups_the_cells_of_a_sweep_and_takes_tags(tmp_path: Path, wandb: FakeWandb) -> None:
    write_sweep(tmp_path / "study", {"nh1": {}})
    m = metrics(tmp_path / "study/nh1", enable_wandb=True, wandb_entity="lab", wandb_tags=["week 3"])
    log(m, 10)
    m.close()
    metrics(tmp_path / "alone", enable_wandb=True, wandb_group="mine").close()
    cell, alone = wandb.runs
    assert [cell[key] for key in ("group", "entity", "tags")] == ["study", "lab", ["week 3"]]
    assert [alone[key] for key in ("group", "entity", "tags")] == ["mine", None, []]
    assert [(step, record["train/loss"]) for step, record in wandb.logged] == [(10, 2.0)]


def test_a_step_line_of_the_largest_runs_fits_100_columns(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    m = metrics(tmp_path, start_step=100_000, peak_tflops=1.0)
    m.total_steps = 104_905
    log(m, 100_001, norm=100.0)
    log(m, 100_002, norm=100.0, during=interval(30.0))
    _, line = capsys.readouterr().out.splitlines()
    assert len(line) <= 100, line


def test_wandb_that_refuses_or_is_missing_is_the_users_mistake(
    tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="Invalid project name; see metrics.wandb_project"):
        metrics(tmp_path, enable_wandb=True, wandb_project="a/b")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="metrics.enable_wandb = true needs the package wandb"):
        metrics(tmp_path, enable_wandb=True)


def test_a_log_that_cannot_be_ended_is_said_and_fails_no_run(
    tmp_path: Path, wandb: FakeWandb, capsys: pytest.CaptureFixture
) -> None:
    def finish() -> None:
        raise ConnectionError("the server is gone")

    m = metrics(tmp_path, enable_wandb=True)
    m._wandb.finish = finish
    m.close()
    assert capsys.readouterr().err == "WARNING: the log of W&B may lack its end (the server is gone)\n"
