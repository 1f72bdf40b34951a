"""The record of a run: complete, once a step, and honest about speed."""

from __future__ import annotations

import json
import math
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from titan_dp import config
from titan_dp.distributed import World
from titan_dp.errors import UserError
from titan_dp.faults.step_times import Interval
from titan_dp.train.metrics import Metrics, drop_repeated_steps, peak_flops
from titan_dp.train.step import StepResult
from titan_dp.train.validate import Evaluation

CPU = torch.device("cpu")


def metrics(
    folder: Path, start_step: int = 0, rank: int = 0, run_name: str = "", settings: dict | None = None, **c: object
) -> Metrics:
    return Metrics(
        config.Metrics(**{"enable_tensorboard": False, **c}),  # type: ignore[arg-type]
        folder,
        world=World(rank, 2, CPU),
        total_steps=1000,
        start_step=start_step,
        start_tokens=512 * start_step,
        flops_per_token=10**6,
        dtype="bfloat16",
        bytes_per_token=4.0,
        run_name=run_name,
        settings=settings,
    )


def interval(seconds: float = 1.0, **values: Any) -> Interval:
    usual: dict[str, Any] = {"data_wait": 0.0, "data_wait_slowest": 0.0, "work_slowest": 1.0, "paused": {}, "remarks": []}
    return Interval(seconds, **usual | values)


def result(loss: float, grad_norm: float) -> StepResult:
    return StepResult(torch.tensor(loss), None, torch.tensor(grad_norm), torch.zeros(3))


def log(m: Metrics, step: int, loss: float = 2.0, skipped: int = 0, during: Interval | None = None) -> None:
    during = during or interval()
    m.log_step(step, during, result(loss, 0.5), tokens=512 * step, lr=3e-4, skipped=skipped)


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_log_line_shows_all_a_person_asks_for(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    m = metrics(tmp_path)
    log(m, 10)
    m.close()
    line = capsys.readouterr().out
    assert line.startswith("step    10/1,000 (  1%) | loss 2.0000 | lr 3.00e-04 | norm 0.500 | ")
    assert all(part in line for part in ("tok/s", "FLOP/s", "GiB", "data 0.0%", "ETA 0:"))


def test_speed_is_tokens_over_the_seconds_of_training(tmp_path: Path) -> None:
    m = metrics(tmp_path, peak_tflops=1e-3)
    log(m, 10, during=interval(4.0, data_wait=1.0, data_wait_slowest=2.0))
    (record,) = records(tmp_path)
    assert record["tokens_per_second"] == 10 * 512 / 4
    assert record["tflops_per_device"] == pytest.approx(1280 * 1e6 / 2 / 1e12)
    assert record["mfu"] == pytest.approx(0.64)
    assert (record["data_wait"], record["data_wait_slowest"]) == (0.25, 0.5)


def test_pauses_and_slow_ranks_are_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    log(metrics(tmp_path), 10, during=interval(paused={"checkpoint": 2.5}, remarks=["rank 3 on a7 computes at 50 %"]))
    out = capsys.readouterr().out.splitlines()
    assert out[0].endswith("| checkpoint 2.5 s")
    assert out[1] == "step    10 | rank 3 on a7 computes at 50 %"
    assert records(tmp_path)[0]["paused_checkpoint"] == 2.5


def test_more_than_a_hundred_percent_mfu_is_called_wrong(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    log(metrics(tmp_path, peak_tflops=1e-9), 10)
    assert "metrics.peak_tflops is wrong" in capsys.readouterr().out


def test_the_peak_of_a_cpu_is_not_guessed() -> None:
    assert peak_flops(config.Metrics(), CPU, "bfloat16") is None
    assert peak_flops(config.Metrics(peak_tflops=2.0), CPU, "bfloat16") == 2e12


@pytest.mark.parametrize(("dtype", "teraflops"), [("bfloat16", 989.4), ("float32", 66.9)])
def test_the_peak_of_a_gpu_is_that_of_the_training_dtype(dtype: str, teraflops: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert peak_flops(config.Metrics(), torch.device("cuda"), dtype) == pytest.approx(teraflops * 1e12)


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    first = metrics(tmp_path)
    for step in (10, 20, 30):
        log(first, step, loss=1.0)
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')  # cut off by a kill
    second = metrics(tmp_path, start_step=20)
    log(second, 30, loss=5.0)
    second.close()
    assert [(r["step"], r["loss"]) for r in records(tmp_path)] == [(10, 1.0), (20, 1.0), (30, 5.0)]


def test_what_is_not_finite_is_recorded_as_null_which_every_json_parser_reads(tmp_path: Path) -> None:
    m = metrics(tmp_path)
    m.log_step(1, interval(), result(math.nan, math.inf), tokens=512, lr=3e-4, skipped=1)
    m.log_validation(1, Evaluation(math.nan, 1000))
    m.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert not re.search("NaN|Infinity", text)
    step, validation = map(json.loads, text.splitlines())
    assert (step["loss"], step["grad_norm"], validation["validation_loss"]) == (None, None, None)


def test_a_resume_drops_lines_that_are_no_records_and_writes_old_nans_as_null(tmp_path: Path) -> None:
    lines = [
        '{"step": 1, "loss": NaN}',
        "[1]",
        '{"step": "2"}',
        "7",
        '{"loss": 1.0}',
        '{"step": 2, "loss": 1.5}',
        '{"step": 3}',
        '{"st',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    drop_repeated_steps(tmp_path / "metrics.jsonl", 2)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null}\n{"step": 2, "loss": 1.5}\n'


def test_validation_is_recorded_in_nats_and_bits_a_byte(tmp_path: Path) -> None:
    m = metrics(tmp_path)
    m.log_validation(10, Evaluation(loss=2.772588722239781, tokens=100))  # 4 ln 2
    (record,) = records(tmp_path)
    assert record["validation_bits_per_byte"] == pytest.approx(1.0)
    assert m.validation_loss == record["validation_loss"]


def test_skipped_steps_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    log(metrics(tmp_path), 10, skipped=3)
    assert capsys.readouterr().out.strip().endswith("3 skipped")


def test_only_rank_0_writes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    m = metrics(tmp_path / "run", rank=1)
    log(m, 10)
    m.close()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "a: #1"  # a legal run name
    m = metrics(folder, enable_tensorboard=True)
    log(m, 10)
    m.close()
    events = EventAccumulator(str(folder / "tb")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(10, 2.0)]


class FakeWandb(types.ModuleType):
    """The package as far as it is used: refuses what W&B refuses (0.31), and remembers what it was told."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.errors = types.SimpleNamespace(Error=Exception, UsageError=type("UsageError", (Exception,), {}))
        self.runs: list[dict[str, Any]] = []

    def init(self, **told: Any) -> Any:
        if set(told["id"]) & set(":;,#?/'") or not told["id"].strip():
            raise self.errors.UsageError("Run ID cannot contain the characters: :;,#?/'")
        if set(told["project"]) & set("/\\#?%:"):
            raise self.errors.UsageError("Invalid project name")
        assert len(told["name"]) <= 128
        self.runs.append(told)
        return types.SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)


@pytest.fixture
def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_each_run_folder_is_a_run_of_its_own_at_wandb_which_a_resume_continues(tmp_path: Path, fake_wandb: FakeWandb) -> None:
    for folder in ("paperA/213m", "paperB/213m", "paperA/213m"):
        metrics(tmp_path / folder, enable_wandb=True).close()
    first, second, resumed = (run["id"] for run in fake_wandb.runs)
    assert first == resumed != second
    (tmp_path / "paperA/213m").rename(tmp_path / "moved")
    metrics(tmp_path / "moved", enable_wandb=True).close()
    assert fake_wandb.runs[-1]["id"] == first
    assert all(run["resume"] == "allow" for run in fake_wandb.runs)


@pytest.mark.parametrize("name", ["a:b", "lr#3", "paper/213m", "what? 'quoted', 50 %; -", "x" * 200])
def test_wandb_takes_any_run_name(tmp_path: Path, fake_wandb: FakeWandb, name: str) -> None:
    metrics(tmp_path / name, enable_wandb=True, run_name=name).close()
    assert fake_wandb.runs[0]["name"] == name[-128:]


def test_wandb_gets_the_resolved_configuration(tmp_path: Path, fake_wandb: FakeWandb) -> None:
    resolved = config.Config.model_validate({"training": {"steps": 3}}).model_dump(mode="json")
    metrics(tmp_path, enable_wandb=True, settings=resolved).close()
    assert fake_wandb.runs[0]["config"]["training"]["steps"] == 3
    assert fake_wandb.runs[0]["config"]["optimizer"]["lr"] == 3e-4
    assert fake_wandb.runs[0]["allow_val_change"], "a resume may have other settings"


def test_a_project_that_wandb_refuses_is_the_users_mistake(tmp_path: Path, fake_wandb: FakeWandb) -> None:
    with pytest.raises(UserError, match="Invalid project name; see metrics.wandb_project"):
        metrics(tmp_path, enable_wandb=True, wandb_project="a/b")


def test_a_missing_wandb_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(UserError, match="metrics.enable_wandb = true needs the package wandb"):
        metrics(tmp_path, enable_wandb=True)


def test_dropping_from_a_file_that_is_not_there_does_nothing(tmp_path: Path) -> None:
    drop_repeated_steps(tmp_path / "metrics.jsonl", 5)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_log_that_cannot_be_ended_is_said_and_fails_no_run(
    tmp_path: Path, fake_wandb: FakeWandb, capsys: pytest.CaptureFixture
) -> None:
    def finish() -> None:
        raise ConnectionError("the server is gone")

    m = metrics(tmp_path, enable_wandb=True)
    m._wandb.finish = finish
    m.close()
    assert capsys.readouterr().err == "WARNING: the log of W&B may lack its end (the server is gone)\n"
