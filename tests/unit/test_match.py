"""`titan-dp match`: the settings it prints are those of models of equal size.

Everything goes through the command as a shell would call it, but in this process. What it prints is read by train.py's own
loader and counted by `model_size`, which test_model_size.py holds against built models. That shapes once found never change
is held by the identities in test_sweep_file.py.
"""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from tests.unit.test_train_configs import PAPER
from titan_dp import config
from titan_dp.cli import dispatch
from titan_dp.config.load import SHIPPED, load_config
from titan_dp.errors import run_main
from titan_dp.model.size import model_size
from titan_dp.studies import shapes as matching

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
        lines = [shlex.split(line) for line in self.out.splitlines() if line.startswith("    --model.")]
        base = ["--config", PAPER_RECIPE, "--training.steps", "1", *self.given]
        return [load_config([*base, *line]).config.model for line in lines]

    @property
    def rows(self) -> list[list[str]]:
        """The cells of the printed table."""
        table = self.out.partition("\n\n")[0].splitlines()[3:]
        return [re.split(r" {2,}", line.strip()) for line in table]

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


def check(
    models: list[config.Model], target: float, quantity: str = "parameters", multiple: int = 64, off: float = 0.0025
) -> None:
    """All of them are on the grid and of the target's size."""
    for c in models:
        assert abs(getattr(model_size(c, 4096), quantity) / target - 1) <= off
        for dimension in (c.hidden_size, c.num_heads * c.head_dim, c.num_heads * c.head_v_dim, c.mlp_size):
            assert dimension > 0
            assert dimension % multiple == 0


# -- of one size, on the grid ------------------------------------------------------------------------------------------


@given(
    size=st.floats(6.5, 10).map(lambda x: round(10**x)),
    by=st.sampled_from(KNOBS),
    steps=st.lists(st.integers(1, 8), min_size=1, max_size=3, unique=True),
    gated=st.sampled_from(["no", "yes", "both"]),
)
@examples(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], derandomize=True)
def test_whatever_is_asked_for_is_matched_or_refused(size: int, by: str, steps: list[int], gated: str, match: Match) -> None:
    answer = match("--params", str(size), "--num-householder", ",".join(map(str, steps)), "--by", by, "--gated", gated)
    if answer.code:
        assert "the nearest is hidden_size" in answer.message
        assume(False)
    gates = {"no": [False], "yes": [True], "both": [False, True]}[gated]
    assert [(c.num_householder, c.use_forget_gate) for c in answer.models] == [(n, gate) for n in steps for gate in gates]
    assert len({c.num_hidden_layers for c in answer.models}) == 1
    check(answer.models, size)


@pytest.mark.parametrize("by", ["heads", "hidden_size"])
def test_models_are_matched_by_flops_as_well(by: str, match: Match) -> None:
    models = match("--flops", "2.4G", "--by", by, "--gated", "both").models
    assert len(models) == 6
    check(models, 2.4e9, "flops_per_token")


@pytest.mark.parametrize(("multiple", "tolerance"), [(16, 0.25), (64, 0.02)])
def test_the_grid_and_the_tolerance_are_choices(multiple: int, tolerance: float, match: Match) -> None:
    models = match("--params", "392.2M", "--multiple", str(multiple), "--tolerance", str(tolerance)).models
    check(models, 392.2e6, multiple=multiple, off=tolerance / 100)


# What is equal: targets near which an exhaustive search finds sets within 0.25 % that differ in the knob alone.
EQUAL = {
    "heads": ("1.4678B", ["hidden_size", "intermediate_size", "head_dim"]),
    "intermediate_size": ("215.443469M", ["hidden_size", "num_heads", "head_dim"]),
    "head_dim": ("805M", ["num_heads"]),
    "hidden_size": ("805M", ["head_dim"]),
}


@pytest.mark.parametrize("by", EQUAL)
def test_the_knob_falls_with_the_steps_and_what_can_be_equal_is(by: str, match: Match) -> None:
    target, equal = EQUAL[by]
    models = match("--params", target, "--by", by).models
    for key in equal:
        assert len({getattr(c, key) for c in models}) == 1, key
    values = [getattr(c, matching.KNOBS[by]) for c in models]
    assert values == sorted(values, reverse=True)
    assert values[0] > values[-1]
    assert all(c.head_dim % 16 == 0 and c.head_dim <= 256 for c in models)


def test_depth_grows_with_the_size_and_is_kept_when_given(match: Match) -> None:
    depths = [match("--params", size).models[0].num_hidden_layers for size in ("30M", "7B")]
    assert depths[0] < depths[1]
    assert {c.num_hidden_layers for c in match("--params", "400M", "--model.num_hidden_layers", "12").models} == {12}


def test_a_neighbouring_depth_is_taken_where_the_best_one_reaches_no_shape_and_differences_are_told(match: Match) -> None:
    question = ("--params", "1908177", "--num-householder", "1,2,3,4", "--model.vocab_size", "512")
    answer = match(*question)
    check(answer.models, 1_908_177)
    depth = answer.models[0].num_hidden_layers
    assert any(match(*question, "--model.num_hidden_layers", str(depth + more)).code for more in (-2, -1, 1, 2))
    assert "they differ in more than heads: MLP 640 to 2048; another size" in answer.out


# -- other mixers, configs ---------------------------------------------------------------------------------------------


def test_a_config_gives_depth_vocabulary_and_proportions(match: Match) -> None:
    answer = match("--params", "690K", "--config", "debug.toml", "--multiple", "4", "--model.head_dim", "16")
    answer.given += ("--model.vocab_size", "320")  # as in debug.toml
    assert {(c.num_hidden_layers, c.head_dim) for c in answer.models} == {(3, 16)}
    check(answer.models, 690_000, multiple=4)
    assert all(2 < c.mlp_size / c.hidden_size < 4.5 for c in answer.models)  # 3 in the config


@pytest.mark.parametrize("mixer", [["--model.attention_layers", "[3,7]"], ["--model.mixer", "attention"]])
def test_widths_split_into_the_heads_of_softmax_layers(mixer: list[str], match: Match) -> None:
    question = ("--params", "405M", "--num-householder", "2", "--multiple", "16", "--model.attention_num_heads", "64")
    (model,) = match(*question, *mixer).models
    check([model], 405e6, multiple=16)
    assert model.hidden_size % 128 == 0  # 64 heads of an even dimension


def test_linear_attention_is_matched_at_its_one_step_a_token(match: Match) -> None:
    (row,) = match("--params", "100M", "--model.mixer", "gla", "--num-householder", "1").rows
    assert row[0] == "linear attention"
    assert abs(int(row[10].replace(",", "")) / 100e6 - 1) <= 0.0025


# -- the paper's models, and what is printed ---------------------------------------------------------------------------


def test_the_preset_is_the_papers_nine_models(match: Match) -> None:
    table = match("--preset", "paper").rows
    assert len(table) == 9
    for row, (name, (width, heads, n, mlp)) in zip(table, PAPER_SHAPES.items(), strict=True):
        (model, layers, *shape), (parameters, without_embedding) = row[:5], row[10:12]
        assert (model, layers) == ("DeltaNet" if n == 1 else f"DeltaProduct_{n}", "24")
        assert shape == [str(width), f"{heads} x 128", str(mlp)]
        assert int(parameters.replace(",", "")) == PAPER[name]
        assert int(without_embedding.replace(",", "")) == PAPER[name] - 32000 * width


def test_solving_for_the_width_on_a_grid_of_4_finds_the_authors_width(match: Match) -> None:
    width, heads, n, mlp = PAPER_SHAPES["800m"]
    pinned = ["--model.num_hidden_layers", "24", "--model.num_heads", str(heads), "--model.intermediate_size", str(mlp)]
    question = ["--num-householder", str(n), "--by", "hidden_size", "--multiple", "4", *pinned]
    (c,) = match("--params", str(PAPER["800m"]), *question).models
    assert (c.hidden_size, c.num_heads, c.head_dim, c.intermediate_size) == (width, heads, 128, mlp)


def test_the_table_says_parameters_flops_state_and_memory(match: Match) -> None:
    answer = match("--params", "392.2M", "--num-householder", "2", "--model.num_hidden_layers", "24")
    (c,), (row,) = answer.models, answer.rows
    size, parameters = model_size(c, 4096), 392_318_976
    shape = ["DeltaProduct_2", "24", "1024", "8 x 128", "2816"]
    assert row[:7] == [*shape, "392M", "+0.03%"]
    flops = [size.flops_per_token / 1e9, size.matmul / 1e9, 3 * 24 * (4 * 2 + 2) * 8 * 128 * 128 / 1e9]
    assert [float(row[i]) for i in (7, 12, 13)] == pytest.approx(flops, rel=2e-3)
    memory = f"{parameters * 16 / 2**30:.3g}"
    assert row[8:12] == ["131k", memory, f"{parameters:,}", f"{parameters - 32000 * 1024:,}"]


# -- refusals ----------------------------------------------------------------------------------------------------------

UNREACHABLE = {
    "below the embedding": "--params 1M --num-householder 2",
    "too few FLOPs": "--flops 1M --num-householder 1,2,3",
    "all but the heads given": (
        "--params 805M --model.hidden_size 1536 --model.intermediate_size 4096 --model.num_hidden_layers 24"
    ),
    "finer than the grid": "--params 30M --tolerance 0.00001 --num-householder 2",
}


@pytest.mark.parametrize("case", UNREACHABLE)
def test_a_target_that_cannot_be_reached_names_a_size_that_can(case: str, match: Match) -> None:
    quantity, target, *rest = UNREACHABLE[case].split()
    message = match(quantity, target, *rest).message
    found = re.search(r"the nearest is hidden_size \d+, \d+ heads of \d+, intermediate_size \d+: ([\d,]+)", message)
    assert found, message
    answer = match(quantity, found[1].replace(",", ""), *rest)
    assert answer.code == 0, f"{target} was refused with {found[1]}, which is refused as well: {answer.err}"


# What the number types of these options take is held by test_arguments.py.
MISTAKES = {
    "--params 805M --by heads --model.num_heads 12": "num_heads = 12",
    "--params 805M --model.num_householder 3": "use --num-householder",
    "--params 805M --model.use_forget_gate true": "--gated",
    "--params 100M --model.mixer gla": "gla",
    "--preset paper --by head_dim": "--by has no effect",
    "--preset paper --multiple 128": "--multiple has no effect",
    "--preset paper --num-householder 4": "--num-householder has no effect",
    "--preset paper --model.head_dim 64": "--model.head_dim has no effect",
    "": "required",
    "--params 3M --flops 5G": "--flops",
    "--params 0": "--params",
    "--params 1e14": "--params 100T: models of at most 10T are sought",
    "--params 30M --num-householder 1,1": "--num-householder",
    "--params 30M --multiple 1.5": "--multiple",
    "--params 30M --tolerance nan": "--tolerance",
    "--params 30M --by width": "--by",
    "--params 30M --gated maybe": "--gated",
    "--params 30M --config nosuch.toml": "nosuch.toml",
    "--params 30M --model.head_dimm 64": "did you mean model.head_dim",
    "--params 30M --training.seq_len 128": "--training.seq_len does not change",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_answered_in_one_sentence(words: str, match: Match) -> None:
    assert MISTAKES[words] in match(*words.split()).message


def test_a_config_of_linear_attention_is_not_matched_over_several_steps(match: Match, tmp_path: Path) -> None:
    (tmp_path / "gla.toml").write_text('[model]\nmixer = "gla"\nnum_householder = 1\n[training]\nsteps = 1\n')
    assert "gla" in match("--params", "100M", "--config", str(tmp_path / "gla.toml")).message


def test_the_largest_target_is_found_among_a_few_thousand_shapes(match: Match, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shape takes 0.1 ms."""
    counted = 0

    def count(*arguments: Any) -> Any:
        nonlocal counted
        counted += 1
        return model_size(*arguments)

    monkeypatch.setattr(matching, "model_size", count)
    assert match("--params", "10B", "--num-householder", "1,2,3,4", "--by", "intermediate_size").code == 0
    assert 0 < counted < 10_000
