"""The check of the kernels on the spot: what is right passes, and a fault put in on purpose is refused by its name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from deltaproduct_kernels import check as checks
from deltaproduct_kernels.check import Case, Checked, check, short_row
from deltaproduct_kernels.triton_backend import launch

from titan_dp.cli import main
from titan_dp.config.load import load_config
from titan_dp.errors import UserError
from titan_dp.model.check_kernels import check_run

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = Case(16, 16, 2, "float32", T=9, B=1, H=1)
FORWARD, BACKWARD = ("o", "state"), ("dq", "dk", "dv", "dbeta", "dg", "dh0")
Spoil = Callable[[str, float], None]


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Spoil:
    """Multiplies one output or gradient of the kernels by a factor."""

    def spoil(name: str, factor: float) -> None:
        part, names = ("forward", FORWARD) if name in FORWARD else ("backward", BACKWARD)
        true = getattr(launch, part)

        def wrong(*arguments: Any, **options: Any) -> tuple:
            made = list(true(*arguments, **options))
            made[names.index(name)] *= factor
            return tuple(made)

        monkeypatch.setattr(launch, part, wrong)

    return spoil


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_kernels_are_right(dtype: str) -> None:
    checked = check(Case(16, 32, 2, dtype, T=9, B=1), DEVICE)
    assert checked.faults == []
    assert set(checked.errors) == {*FORWARD, *BACKWARD}


@pytest.mark.parametrize("name", [*FORWARD, *BACKWARD])
def test_a_small_wrong_factor_is_found_and_named(name: str, spoil: Spoil) -> None:
    """Wrong by one part in a thousand, in float32."""
    spoil(name, 1.001)
    assert check(SMALL, DEVICE).faults == [f"{name} is off by 0.001 (allowed 1e-05)"]


def test_16_bits_are_allowed_their_rounding_and_no_more(spoil: Spoil) -> None:
    spoil("dv", 1.03)
    [fault] = check(Case(16, 16, 2, "bfloat16", T=9, B=1, H=1), DEVICE).faults
    assert fault.startswith("dv is off by 0.03")


def test_a_number_that_is_none_is_wrong(spoil: Spoil) -> None:
    spoil("dk", float("nan"))
    assert check(SMALL, DEVICE).faults[0] == "dk is off by nan (allowed 1e-05)"


def test_other_bits_at_a_second_run_are_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    true, factors = launch.forward, iter((1.0, 1 + 2e-7))

    def unsteady(*arguments: Any, **options: Any) -> tuple:
        o, *rest = true(*arguments, **options)
        return o * next(factors), *rest

    monkeypatch.setattr(launch, "forward", unsteady)
    assert check(SMALL, DEVICE).faults == ["o has other bits when run again"]


def test_the_other_side_is_the_recurrence_in_float64_of_the_first_and_last_head(monkeypatch: pytest.MonkeyPatch) -> None:
    true, seen = checks.recurrent_forward, []

    def recurrence(*arguments: Any) -> tuple:
        seen.extend((x.dtype, x.device.type, x.shape[axis]) for x, axis in zip(arguments[:3], (2, 3, 3), strict=True))
        o, state = true(*arguments)
        return 2 * o, state

    monkeypatch.setattr(checks, "recurrent_forward", recurrence)
    faults = check(Case(16, 16, 1, "float32", T=3, B=1, H=3), DEVICE).faults
    assert seen == 3 * [(torch.float64, "cpu", 2)]
    assert faults[0].startswith("o is off by 0.5 ")


def test_random_numbers_go_on_as_if_nothing_had_been_checked() -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    check(SMALL, DEVICE)
    assert torch.equal(torch.rand(1), expected)


# -- what a run checks -------------------------------------------------------------------------------------------------

WHOLE = Case(128, 128, 2, "bfloat16", B=12, T=4096, H=8, state=False)


def test_a_short_row_has_several_chunks_and_a_tail_and_the_kernels_of_the_run() -> None:
    row = short_row(WHOLE, packed=False, device=torch.device("cpu"))
    assert row == Case(128, 128, 2, "bfloat16", B=1, T=5 * 32 + 17, H=8, state=False)


def test_a_packed_row_has_an_empty_document_and_ragged_ones() -> None:
    row = short_row(WHOLE, packed=True, device=torch.device("cpu"))
    assert row.offsets == (0, 0, 9, 177)


def test_a_row_is_cut_where_those_of_the_run_are() -> None:
    few = Case(128, 128, 2, "bfloat16", B=1, T=32768, H=2)
    assert short_row(few, packed=False, device=torch.device("cpu")).spans == 2


def compared(monkeypatch: pytest.MonkeyPatch, *settings: str, rows: int = 4) -> tuple[Case, str]:
    """What a run compares, and says of it; nothing is computed."""
    asked: list[Case] = []
    monkeypatch.setattr(checks, "check", lambda case, device: asked.append(case) or Checked({"o": 3e-3, "dq": 4e-3}, []))
    said = check_run(small_run(*settings), rows, torch.device("cpu"))
    return asked[0], said


def test_a_run_compares_its_own_sizes_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = "--model.head_dim 64 --model.expand_v 2 --model.num_householder 3 --model.num_heads 4"
    case, said = compared(monkeypatch, *settings.split(), "--model.use_forget_gate", "--data.document_boundaries", "carry")
    assert (case.dk, case.dv, case.n, case.H, case.dtype) == (64, 128, 3, 4, "float32")
    assert (case.gate, case.beta, case.erase, case.offsets, case.state) == (0.05, (0.0, 2.0), True, None, False)
    assert said.startswith("right against float64 (dk 64, dv 128, n_h 3, float32, gate): largest relative error 0.004 in dq; ")


@pytest.mark.parametrize(
    ("settings", "changed"),
    [
        ("--model.use_forget_gate=false", {"gate": None}),
        ("--model.allow_neg_eigval=false", {"beta": (0.0, 1.0)}),
        ("--model.mixer gla", {"erase": False}),
        ("--data.document_boundaries reset", {"offsets": (0, 0, 5, 89)}),
        ("--training.mixed_precision_param bfloat16", {"dtype": "bfloat16"}),
        ("--parallelism.context_parallel_degree 2", {"state": True}),
    ],
)
def test_what_is_computed_otherwise_is_compared_otherwise(
    settings: str, changed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    case, _ = compared(monkeypatch, "--data.document_boundaries", "carry", *settings.split())
    assert {name: getattr(case, name) for name in changed} == changed


@pytest.mark.parametrize(("rows", "spans"), [(1, 2), (512, None)])
def test_rows_are_cut_if_those_of_the_micro_batch_are(rows: int, spans: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    case, _ = compared(monkeypatch, "--data.document_boundaries", "carry", "--training.seq_len", "4096", rows=rows)
    assert case.spans == spans


def test_a_run_with_wrong_kernels_is_refused_by_name_and_told_what_to_do(spoil: Spoil) -> None:
    spoil("dbeta", 1.01)
    with pytest.raises(UserError) as refusal:
        check_run(small_run("--data.document_boundaries", "carry"), 4, DEVICE)
    said = str(refusal.value)
    assert "(dk 16, dv 16, n_h 1, float32, gate, against" in said
    assert "dbeta is off by 0.01 (allowed 1e-05); train with --model.backend torch" in said
    assert "--debug.check_kernels false" in said


def test_a_dtype_that_no_kernel_takes_is_not_checked() -> None:
    """model.backend = "auto" takes another way then."""
    assert check_run(small_run("--model.head_dim", "256"), 4, DEVICE) == ""


def small_run(*settings: str) -> Any:
    small = "--model.head_dim 16 --model.num_householder 1 --model.num_heads 1 --training.mixed_precision_param float32"
    return load_config(["--config", "debug.toml", *small.split(), *settings]).config


# -- the command -------------------------------------------------------------------------------------------------------


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["titan-dp", "check-kernels", *arguments])
    monkeypatch.setattr(checks, "sizes", lambda: [SMALL, Case(16, 16, 1, "bfloat16", T=9, B=1, H=1)])
    return main()


def test_the_command_shows_a_size_a_line_in_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[:4] for line in shown[1:3]] == [["float32", "16", "16", "2"], ["bfloat16", "16", "16", "1"]]
    assert [line.split()[-1] for line in shown[1:3]] == ["right", "right"]
    assert shown[3].startswith("2 sizes, 0 wrong: ")
    assert max(map(len, shown)) <= 80


def test_the_command_leaves_with_1_if_a_size_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], spoil: Spoil
) -> None:
    spoil("dq", 1.001)
    assert command(monkeypatch, "--n", "2") == 1
    shown = capsys.readouterr().out
    assert "    dq is off by 0.001 (allowed 1e-05)\n1 size, 1 wrong: " in shown


def test_the_command_without_a_gpu_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    assert command(monkeypatch) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "needs a CUDA device, not 'cpu'" in said.err
    assert said.err.count("\n") == 1


def test_a_size_that_is_not_in_the_table_is_the_users_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "--dk", "48") == 2
    assert "--dk" in capsys.readouterr().err
