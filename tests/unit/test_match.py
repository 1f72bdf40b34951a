"""`titan-dp match`: the settings it prints are those of models of equal size, counted on the models themselves.

Everything goes through the command as a shell would call it, but in this process. Sizes are counted on models built on the
meta device or by the closed forms below, which are written down here a second time, never by the code that matched.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from tests.unit.test_train_configs import PAPER
from titan_dp import config
from titan_dp.cli import dispatch
from titan_dp.config.load import SHIPPED, load_config
from titan_dp.errors import run_main
from titan_dp.model.size import model_size
from titan_dp.model.transformer import build_model
from titan_dp.studies import shapes as matching
from titan_dp.studies.sweep_file import load_sweep

PAPER_RECIPE = str(SHIPPED / "base" / "paper.toml")
KNOBS = ["heads", "head_dim", "intermediate_size", "hidden_size"]
PAPER_SHAPES = {  # hidden_size, num_heads, num_householder, intermediate_size (the authors' config files)
    "213m_nh1": (768, 8, 1, 2048),
    "213m": (736, 6, 2, 2048),
    "213m_nh3": (768, 4, 3, 2048),
    "392m_nh1": (1024, 12, 1, 2816),
    "392m": (1024, 8, 2, 2816),
    "392m_nh3": (1024, 6, 3, 2816),
    "800m_nh1": (1536, 16, 1, 4096),
    "800m": (1468, 12, 2, 4096),
    "800m_nh3": (1536, 8, 3, 4096),
}


# -- independent counts ------------------------------------------------------------------------------------------------


def built_parameters(c: config.Model) -> int:
    """Parameters of the model itself, without its memory."""
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(c).parameters())


def matrices(c: config.Model) -> int:
    """Weights of all matrices, the tied embedding (as output matrix) included: q, k, v, beta, o, gate and SwiGLU."""
    D, H, n, inner = c.hidden_size, c.num_heads, c.num_householder, c.num_heads * c.head_dim
    mixer = D * (inner + n * inner + n * inner + n * H + inner) + (D * H if c.use_forget_gate else 0)
    return c.num_hidden_layers * (mixer + 3 * D * (c.intermediate_size or 0)) + c.vocab_size * D


def taps(c: config.Model) -> int:
    return c.num_hidden_layers * c.conv_size * c.num_heads * c.head_dim * (1 + 2 * c.num_householder)


def closed_parameters(c: config.Model) -> int:
    """Matrices, convolutions, norms (two a block, one in the mixer, one at the end), A_log and dt_bias."""
    small = c.num_hidden_layers * (2 * c.hidden_size + c.head_dim + (2 * c.num_heads if c.use_forget_gate else 0))
    return matrices(c) + taps(c) + small + c.hidden_size


def closed_flops(c: config.Model) -> int:
    """Forward and backward of a token: 6 a weight, and 3 (4 n_h + 2 + gate) dk dv a head of the recurrence."""
    recurrence = (4 * c.num_householder + 2 + int(c.use_forget_gate)) * c.num_heads * c.head_dim**2
    return 6 * (matrices(c) + taps(c)) + 3 * c.num_hidden_layers * recurrence


def test_the_closed_form_counts_what_is_built() -> None:
    for changes in ({}, {"num_householder": 3, "use_forget_gate": True}, {"num_householder": 1, "head_dim": 48}):
        c = config.Model(**{"hidden_size": 128, "num_hidden_layers": 3, "intermediate_size": 384, **changes})  # type: ignore[arg-type]
        assert closed_parameters(c) == built_parameters(c)


# -- the command -------------------------------------------------------------------------------------------------------


@dataclass
class Answer:
    code: int
    out: str
    err: str
    given: tuple[str, ...]
    """The settings of the question, which train.py is given as well."""

    @property
    def models(self) -> list[config.Model]:
        """What train.py makes of the settings the command tells people to add to its own."""
        lines = [shlex.split(line) for line in self.out.splitlines() if line.startswith("  --model.")]
        base = ["--config", PAPER_RECIPE, "--training.steps", "1", *self.given]
        return [load_config([*base, *line]).config.model for line in lines]

    @property
    def message(self) -> str:
        """The one sentence a mistake is answered with."""
        assert (self.code, self.out) == (2, "")
        last = self.err.strip().splitlines()[-1]
        assert last.startswith(("error: ", "titan-dp")), self.err
        assert "Traceback" not in self.err
        return last


Match = Callable[..., Answer]


@pytest.fixture
def match(capsys: pytest.CaptureFixture[str]) -> Match:
    def run(*arguments: str) -> Answer:
        capsys.readouterr()
        try:
            code = run_main(lambda: dispatch(["match", *arguments]))
        except SystemExit as error:  # argparse's own
            code = int(str(error.code))
        out, err = capsys.readouterr()
        given = [arguments[i : i + 2] for i, argument in enumerate(arguments) if argument.startswith("--model.")]
        return Answer(code, out, err, tuple(itertools.chain(*given)))

    return run


def deviations(models: list[config.Model], target: float) -> list[float]:
    return [abs(built_parameters(c) / target - 1) for c in models]


def check_grid(c: config.Model, multiple: int = 64) -> None:
    for dimension in (c.hidden_size, c.num_heads * c.head_dim, c.num_heads * c.head_v_dim, c.mlp_size):
        assert dimension > 0
        assert dimension % multiple == 0


# -- within tolerance, on the grid -------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [1_000_000, 1_800_000, 5_000_000])
def test_a_small_vocabulary_reaches_small_targets(target: int, match: Match) -> None:
    models = match("--params", str(target), "--model.vocab_size", "512").models
    assert {c.vocab_size for c in models} == {512}
    assert max(deviations(models, target)) <= 0.0025


@given(
    size=st.floats(6.5, 10).map(lambda x: round(10**x)),
    by=st.sampled_from(KNOBS),
    steps=st.lists(st.integers(1, 8), min_size=1, max_size=3, unique=True),
    gated=st.sampled_from(["no", "yes", "both"]),
)
@examples(
    max_examples=16,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    derandomize=True,
)
def test_whatever_is_asked_for_is_matched_or_refused(size: int, by: str, steps: list[int], gated: str, match: Match) -> None:
    answer = match("--params", str(size), "--num-householder", ",".join(map(str, steps)), "--by", by, "--gated", gated)
    if answer.code:
        assert "the nearest is hidden_size" in answer.message
        assume(False)
    gates = {"no": [False], "yes": [True], "both": [False, True]}[gated]
    assert [(c.num_householder, c.use_forget_gate) for c in answer.models] == [(n, gate) for n in steps for gate in gates]
    assert len({c.num_hidden_layers for c in answer.models}) == 1
    for c in answer.models:
        check_grid(c)
        assert abs(closed_parameters(c) / size - 1) <= 0.0025


def shapes_within(c: config.Model, target: int, tolerance: float) -> list[config.Model]:
    """By exhaustive search: every shape like `c` of width, heads and MLP near it (half to twice) within the tolerance."""
    found = []
    for width in range(64 * math.ceil(c.hidden_size / 128), 2 * c.hidden_size + 1, 64):
        for heads in range(max(1, c.num_heads // 2), 2 * c.num_heads + 1):
            for mlp in range(64 * math.ceil(c.mlp_size / 128), 2 * c.mlp_size + 1, 64):
                shape = {"hidden_size": width, "num_heads": heads, "intermediate_size": mlp}
                other = c.model_copy(update=shape)
                if abs(closed_parameters(other) / target - 1) <= tolerance:
                    found.append(other)
    return found


@pytest.mark.parametrize("target", [5_000_000, 13_000_000])
def test_the_deviation_is_within_a_tenth_of_a_percent_where_a_search_nearby_finds_such_a_shape(
    target: int, match: Match
) -> None:
    models = match("--params", str(target), "--num-householder", "1,2,3").models
    if len({(c.hidden_size, c.intermediate_size) for c in models}) == 1:
        return  # alike in all but the heads, which is worth up to 0.25 %
    for c in models:
        if abs(closed_parameters(c) / target - 1) > 0.001:
            assert shapes_within(c, target, 0.001) == []


@pytest.mark.parametrize(("multiple", "tolerance"), [(16, 0.25), (32, 0.25), (128, 0.25), (64, 0.02)])
def test_the_grid_and_the_tolerance_are_choices(multiple: int, tolerance: float, match: Match) -> None:
    models = match("--params", "392.2M", "--multiple", str(multiple), "--tolerance", str(tolerance)).models
    assert max(deviations(models, 392.2e6)) <= tolerance / 100
    for c in models:
        check_grid(c, multiple)


# -- what stays equal --------------------------------------------------------------------------------------------------


def shapes(models: list[config.Model]) -> list[tuple[int, int, int, int | None]]:
    return [(c.hidden_size, c.num_heads, c.head_dim, c.intermediate_size) for c in models]


def test_by_heads_the_papers_392m_models_come_out(match: Match) -> None:
    models = match("--params", "392.2M", "--model.num_hidden_layers", "24").models
    assert shapes(models) == [(1024, heads, 128, 2816) for heads in (12, 8, 6)]
    assert {c.num_hidden_layers for c in models} == {24}


# For the MLP: targets near which an exhaustive search finds sets within 0.25 % that differ in the MLP alone.
EQUAL = {
    "heads": (["46.4M", "213M", "1.4678B", "4.64B"], ["hidden_size", "intermediate_size", "head_dim"]),
    "intermediate_size": (["215.443469M", "316.227766M", "1467.799268M"], ["hidden_size", "num_heads", "head_dim"]),
    "head_dim": (["805M"], ["num_heads"]),
    "hidden_size": (["805M"], ["head_dim"]),
}


@pytest.mark.parametrize(("by", "target"), [(by, target) for by, (targets, _) in EQUAL.items() for target in targets])
def test_the_knob_falls_with_the_steps_and_what_can_be_equal_is(by: str, target: str, match: Match) -> None:
    models = match("--params", target, "--by", by).models
    for key in EQUAL[by][1]:
        assert len({getattr(c, key) for c in models}) == 1, key
    values = [getattr(c, matching.KNOBS[by]) for c in models]
    assert values == sorted(values, reverse=True)
    assert values[0] > values[-1]
    assert all(c.head_dim % 16 == 0 and c.head_dim <= 256 for c in models)


def test_depth_grows_with_the_size_and_is_kept_when_given(match: Match) -> None:
    depths = [match("--params", size).models[0].num_hidden_layers for size in ("30M", "400M", "7B")]
    assert depths[0] < depths[1] < depths[2]
    assert {c.num_hidden_layers for c in match("--params", "400M", "--model.num_hidden_layers", "12").models} == {12}


def test_a_neighbouring_depth_is_taken_where_the_best_one_reaches_no_shape(match: Match) -> None:
    question = ("--params", "2511886", "--num-householder", "1,2,3,4", "--model.vocab_size", "512")
    assert match(*question, "--model.num_hidden_layers", "3").code == 0
    assert max(deviations(match(*question).models, 2_511_886)) <= 0.0025


# -- gates, FLOPs, other mixers, configs -------------------------------------------------------------------------------


def test_gated_both_matches_each_model_with_and_without_a_gate(match: Match) -> None:
    answer = match("--params", "805M", "--num-householder", "1,2,3,4", "--gated", "both")
    pairs = [(c.num_householder, c.use_forget_gate) for c in answer.models]
    assert pairs == [(n, gate) for n in (1, 2, 3, 4) for gate in (False, True)]
    assert max(deviations(answer.models, 805e6)) <= 0.0025
    for family in ("DeltaNet", "Gated DeltaNet", "DeltaProduct_4", "Gated DeltaProduct_4"):
        assert re.search(rf"│ {family} +│", answer.out)


@pytest.mark.parametrize("by", KNOBS)
def test_models_are_matched_by_flops_as_well(by: str, match: Match) -> None:
    models = match("--flops", "2.4G", "--by", by, "--gated", "both").models
    assert len(models) == 6
    for c in models:
        check_grid(c)
        assert abs(closed_flops(c) / 2.4e9 - 1) <= 0.0025


def test_a_config_gives_depth_vocabulary_and_proportions(match: Match) -> None:
    answer = match("--params", "690K", "--config", "debug.toml", "--multiple", "4", "--model.head_dim", "16")
    answer.given += ("--model.vocab_size", "320")  # as in debug.toml
    assert {(c.num_hidden_layers, c.head_dim) for c in answer.models} == {(3, 16)}
    assert max(deviations(answer.models, 690_000)) <= 0.0025
    assert all(2 < c.mlp_size / c.hidden_size < 4.5 for c in answer.models)  # 3 in the config


MIXERS = [["--model.attention_layers", "[3,7]"], ["--model.mixer", "attention"]]


@pytest.mark.parametrize("mixer", MIXERS)
def test_widths_split_into_the_heads_of_softmax_layers(mixer: list[str], match: Match) -> None:
    question = ("--params", "405M", "--num-householder", "2", "--multiple", "16", "--model.attention_num_heads", "64")
    (model,) = match(*question, *mixer).models
    assert deviations([model], 405e6)[0] <= 0.0025
    assert model.hidden_size % 128 == 0  # 64 heads of an even dimension


def test_linear_attention_is_matched_at_its_one_step_a_token(match: Match) -> None:
    (row,) = rows(match("--params", "100M", "--model.mixer", "gla", "--num-householder", "1"))
    assert row[0] == "linear attention"
    assert abs(int(row[5].replace(",", "")) / 100e6 - 1) <= 0.0025


# -- the paper's models ------------------------------------------------------------------------------------------------


def rows(answer: Answer) -> list[list[str]]:
    """The cells of the printed table."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in answer.out.splitlines() if line.startswith("│")]


def test_the_preset_is_the_papers_nine_models(match: Match) -> None:
    table = rows(match("--preset", "paper"))
    assert len(table) == 9
    for row, (name, (width, heads, n, mlp)) in zip(table, PAPER_SHAPES.items(), strict=True):
        model, layers, *shape, parameters, _, without_embedding = row[:8]
        assert (model, layers) == ("DeltaNet" if n == 1 else f"DeltaProduct_{n}", "24")
        assert shape == [str(width), f"{heads} x 128", str(mlp)]
        assert int(parameters.replace(",", "")) == PAPER[name]
        assert int(without_embedding.replace(",", "")) == PAPER[name] - 32000 * width


@pytest.mark.parametrize("name", ["213m", "800m"])
def test_solving_for_the_width_on_a_grid_of_4_finds_the_authors_widths(name: str, match: Match) -> None:
    width, heads, n, mlp = PAPER_SHAPES[name]
    pinned = ["--model.num_hidden_layers", "24", "--model.num_heads", str(heads), "--model.intermediate_size", str(mlp)]
    question = ["--num-householder", str(n), "--by", "hidden_size", "--multiple", "4", *pinned]
    (model,) = match("--params", str(PAPER[name]), *question).models
    assert shapes([model]) == [(width, heads, 128, mlp)]
    assert built_parameters(model) == PAPER[name]


def test_the_preset_takes_no_option_that_would_change_nothing(match: Match) -> None:
    for option in (["--by", "head_dim"], ["--multiple", "128"], ["--num-householder", "4"], ["--model.head_dim", "64"]):
        assert option[0] in match("--preset", "paper", *option).message


# -- what is printed ---------------------------------------------------------------------------------------------------


def test_the_table_says_parameters_flops_state_and_memory(match: Match) -> None:
    answer = match("--params", "392.2M", "--num-householder", "2", "--model.num_hidden_layers", "24")
    (c,), (row,) = answer.models, rows(answer)
    assert row[:5] == ["DeltaProduct_2", "24", "1024", "8 x 128", "2816"]
    assert row[5] == f"{built_parameters(c):,}" == "392,318,976"
    assert row[6] == "+0.03%"
    assert row[7] == f"{392_318_976 - 32000 * 1024:,}"
    recurrence = 3 * 24 * (4 * 2 + 2) * 8 * 128 * 128
    assert [float(cell) for cell in row[8:11]] == pytest.approx(
        [closed_flops(c) / 1e9, 6 * matrices(c) / 1e9, recurrence / 1e9], rel=2e-3
    )
    assert row[11] == f"{8 * 128 * 128:,}"
    assert row[12] == f"{392_318_976 * 16 / 2**30:.3g} GiB"


# -- refusals ----------------------------------------------------------------------------------------------------------


def nearest(message: str) -> str:
    """The size of the nearest shape a refusal names."""
    found = re.search(r"the nearest is hidden_size \d+, \d+ heads of \d+, intermediate_size \d+: ([\d,]+)", message)
    assert found, message
    return found[1].replace(",", "")


UNREACHABLE = {
    "below the embedding": ["--params", "1M"],
    "too few FLOPs": ["--flops", "1M"],
    "all but the heads given": (
        "--params 805M --model.hidden_size 1536 --model.intermediate_size 4096 --model.num_hidden_layers 24".split()
    ),
    "finer than the grid": ["--params", "30M", "--tolerance", "0.00001"],
}
CASES = [(case, steps) for case in UNREACHABLE for steps in ("2", "1,2,3") if (case, steps) != ("finer than the grid", "1,2,3")]


@pytest.mark.parametrize(("case", "steps"), CASES)
def test_a_target_that_cannot_be_reached_names_a_size_that_can(case: str, steps: str, match: Match) -> None:
    quantity, target, *rest = UNREACHABLE[case]
    size = nearest(match(quantity, target, "--num-householder", steps, *rest).message)
    answer = match(quantity, size, "--num-householder", steps, *rest)
    assert answer.code == 0, f"{target} was refused with {size}, which is refused as well: {answer.err}"


CONTRADICTIONS = {
    "the knob is given": (["--params", "805M", "--by", "heads", "--model.num_heads", "12"], "num_heads = 12"),
    "the width is given": (["--params", "805M", "--by", "hidden_size", "--model.hidden_size", "1536"], "hidden_size = 1536"),
    "n_h as a setting": (["--params", "805M", "--model.num_householder", "3"], "use --num-householder"),
    "the gate as a setting": (["--params", "805M", "--model.use_forget_gate", "true"], "--gated"),
    "linear attention of several steps": (["--params", "100M", "--model.mixer", "gla"], "gla"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictions_are_refused_in_one_sentence(case: str, match: Match) -> None:
    arguments, said = CONTRADICTIONS[case]
    assert said in match(*arguments).message


def test_a_config_of_linear_attention_is_not_matched_over_several_steps(match: Match, tmp_path: Path) -> None:
    (tmp_path / "gla.toml").write_text('[model]\nmixer = "gla"\nnum_householder = 1\n[training]\nsteps = 1\n')
    assert "gla" in match("--params", "100M", "--config", str(tmp_path / "gla.toml")).message


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--params", "3M", "--flops", "5G"],
        ["--params", "805M", "--preset", "paper"],
        ["--preset", "mine"],
        *(["--params", wrong] for wrong in ("0", "-5M", "805Q", "nan", "inf", "1e400", "many", "")),
        *(["--params", "30M", "--num-householder", wrong] for wrong in ("", "0", "9", "1,1", "1,,2", "a", "1.5", "1;2")),
        *(["--params", "30M", "--multiple", wrong] for wrong in ("0", "-64", "1.5", "x")),
        *(["--params", "30M", "--tolerance", wrong] for wrong in ("0", "-1", "100", "nan", "x")),
        ["--params", "30M", "--by", "width"],
        ["--params", "30M", "--gated", "maybe"],
        ["--params", "30M", "--config", "nosuch.toml"],
        ["--params", "30M", "--model.head_dimm", "64"],
        ["--params", "30M", "--model.KEY", "64"],
        ["--params", "30M", "--model.head_dim", "sixty"],
        ["--params", "30M", "--model.head_dim"],
        ["--params", "30M", "--model.expand_v", "0.3"],
        ["--params", "30M", "--training.seq_len", "128"],
    ],
    ids=" ".join,
)
def test_wrong_arguments_are_the_users_mistake(arguments: list[str], match: Match) -> None:
    assert match(*arguments).message


# -- time --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", KNOBS)
def test_the_largest_target_is_found_among_a_few_thousand_shapes(
    by: str, match: Match, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shape takes 0.1 ms."""
    counted = 0

    def count(*arguments: Any) -> Any:
        nonlocal counted
        counted += 1
        return model_size(*arguments)

    monkeypatch.setattr(matching, "model_size", count)
    assert match("--params", "10B", "--num-householder", "1,2,3,4", "--by", by).code == 0
    assert 0 < counted < 10_000


@pytest.mark.parametrize("arguments", ["--params 1e18", "--params 30M --multiple 1e15"])
def test_absurd_numbers_are_answered_too(arguments: str, match: Match) -> None:
    assert match(*arguments.split()).message


# -- what must not change ----------------------------------------------------------------------------------------------

SHAPES = {  # sha256 of all cells' shapes, its first 16 digits
    "cpu_study": "69db5e8464099b19",
    "figure10": "e7e835fa51a1dc94",
    "householder_head_dim": "9374f14fad10a999",
    "isoflop": "ff6782c35729fb71",
    "paper": "e6c9bd3100f21029",
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_shipped_sweeps_keep_their_shapes(name: str) -> None:
    """A cell is its configuration: with other shapes nobody's folders of a started sweep would be its runs any more."""
    keys = ("num_hidden_layers", "hidden_size", "num_heads", "head_dim", "intermediate_size")
    keys += ("num_householder", "use_forget_gate")
    cells = load_sweep(Path(f"{name}.toml")).cells
    found = [[cell.name, *(getattr(cell.config.model, key) for key in keys)] for cell in cells]
    assert hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16] == SHAPES[name]
