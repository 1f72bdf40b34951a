"""Sweep files: what each axis does to a cell's configuration, what is kept equal, and what is refused.

The base is a small model given here in full. Sizes and FLOPs are counted as in test_match.py, on models that are built and
by closed forms; a cell's TOML is read by train.py's own loader. Writing run folders is test_sweep.py's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from tests.unit.test_match import PAPER_SHAPES, built_parameters, check_grid, closed_flops
from tests.unit.test_train_configs import PAPER
from titan_dp.config import Config
from titan_dp.config.advice import ineffective_settings
from titan_dp.config.describe import all_keys, to_toml
from titan_dp.config.load import config_folder, load_config
from titan_dp.errors import UserError
from titan_dp.studies.sweep_file import Sweep, load_sweep

BASE = """
[model]
hidden_size = 128
num_hidden_layers = 3
num_heads = 4
head_dim = 32
num_householder = 2
intermediate_size = 384
vocab_size = 320
[training]
seq_len = 64
local_batch_size = 2
global_batch_size = 8
tokens = "1M"
[lr_scheduler]
warmup_steps = 10
"""
TOKENS_PER_STEP = 512
Expand = Callable[..., Sweep]


@pytest.fixture
def expand(tmp_path: Path) -> Expand:
    """expand(rules, name=values, ...): the sweep of a file with `rules` in [sweep] and those axes, over BASE."""

    def run(rules: str = "", settings: str = "", **axes: list[Any]) -> Sweep:
        lines = "".join(f'"{axis}" = {to_toml(values)}\n' for axis, values in axes.items())
        (tmp_path / "base.toml").write_text(BASE)
        path = tmp_path / "study.toml"
        path.write_text(f'extends = "base.toml"\n[sweep]\n{rules}\n' + f"[sweep.axes]\n{lines}" * bool(axes) + settings)
        return load_sweep(path)

    return run


@pytest.fixture
def refusal(expand: Expand) -> Callable[..., str]:
    """What is said to a sweep that is refused: one line."""

    def run(*arguments: str, **axes: list[Any]) -> str:
        with pytest.raises(UserError) as caught:
            expand(*arguments, **axes)
        assert "\n" not in str(caught.value)
        assert "study.toml" in str(caught.value)
        return str(caught.value)

    return run


Refusal = Callable[..., str]


def models(sweep: Sweep) -> list[Any]:
    return [cell.config.model for cell in sweep.cells]


# -- axes --------------------------------------------------------------------------------------------------------------

AXES: dict[str, tuple[list[Any], Callable[[Config], Any]]] = {
    "num_householder": ([1, 3], lambda c: c.model.num_householder),
    "num_heads": ([2, 6], lambda c: c.model.num_heads),
    "head_dim": ([16, 64], lambda c: c.model.head_dim),
    "use_forget_gate": ([False, True], lambda c: c.model.use_forget_gate),
    "use_output_gate": ([False, True], lambda c: c.model.use_output_gate),
    "allow_neg_eigval": ([True, False], lambda c: c.model.allow_neg_eigval),
    "mixer": (["deltaproduct", "attention"], lambda c: c.model.mixer),
    "num_hidden_layers": ([2, 5], lambda c: c.model.num_hidden_layers),
    "lr": ([1e-3, 3e-4], lambda c: c.optimizer.lr),
    "optimizer.weight_decay": ([0.1, 0.2], lambda c: c.optimizer.weight_decay),
    "model.conv_size": ([2, 3], lambda c: c.model.conv_size),
    "training.steps": ([10, 20], lambda c: c.training.steps),
}


@pytest.mark.parametrize("axis", AXES)
def test_an_axis_sets_its_key_and_nothing_else(axis: str, expand: Expand) -> None:
    values, read = AXES[axis]
    cells = expand(**{axis: values}).cells
    assert [read(cell.config) for cell in cells] == values
    plain = expand(seed=[42]).cells[0].config  # the seeds a config has anyway
    for cell in cells:
        changed = {key for key, setting in all_keys().items() if setting.of(cell.config) != setting.of(plain)}
        assert len(changed - {"job.run_name", "training.tokens"}) <= 1


def test_a_seed_is_that_of_initialisation_and_of_the_data(expand: Expand) -> None:
    cells = expand(seed=[1, 2]).cells
    assert [(cell.config.debug.seed, cell.config.data.seed) for cell in cells] == [(1, 1), (2, 2)]


def test_tokens_are_the_length_in_whole_steps(expand: Expand) -> None:
    cells = expand(tokens=["200K", 1_000_000, "1.5M"]).cells
    wanted = [200_000, 1_000_000, 1_500_000]
    assert [cell.config.training.tokens for cell in cells] == wanted
    assert [cell.tokens for cell in cells] == [-(-tokens // TOKENS_PER_STEP) * TOKENS_PER_STEP for tokens in wanted]


def test_tokens_per_parameter_are_counted_on_the_cells_own_model(expand: Expand) -> None:
    for cell in expand(tokens_per_parameter=[20, 0.5], num_householder=[1, 3]).cells:
        wanted = cell.axes["tokens_per_parameter"] * built_parameters(cell.config.model)
        assert 0 <= cell.tokens - wanted < TOKENS_PER_STEP
        assert cell.config.training.steps is None


def test_an_axis_wins_over_the_base_and_undoes_its_other_spelling_of_a_length(expand: Expand) -> None:
    cells = expand(settings="[training]\nsteps = 7\n", tokens=["512K"]).cells
    assert (cells[0].config.training.steps, cells[0].tokens) == (None, 512_000)


def test_a_size_is_the_parameters_of_every_cell(expand: Expand) -> None:
    sweep = expand('match = "heads"\nmultiple = 4', size=["300K", "1.2M"], num_householder=[1, 2, 3])
    for cell in sweep.cells:
        wanted = {"300K": 300_000, "1.2M": 1_200_000}[cell.axes["size"]]
        assert cell.parameters == built_parameters(cell.config.model)
        assert abs(cell.parameters / wanted - 1) <= 0.0025


# -- grids and lists ---------------------------------------------------------------------------------------------------


def test_axes_alone_are_the_full_grid(expand: Expand) -> None:
    cells = expand(num_householder=[1, 2, 3], lr=[1e-3, 1e-4], seed=[1, 2]).cells
    points = [(cell.axes["num_householder"], cell.axes["lr"], cell.axes["seed"]) for cell in cells]
    assert points == list(itertools.product([1, 2, 3], [1e-3, 1e-4], [1, 2]))
    assert len({cell.name for cell in cells}) == len({cell.identity for cell in cells}) == 12


def test_listed_cells_are_taken_as_they_are(expand: Expand) -> None:
    cells = expand('cells = [{ num_householder = 1, num_heads = 6 }, { name = "wide", hidden_size = 192 }]').cells
    assert [(c.num_householder, c.num_heads, c.hidden_size) for c in (cell.config.model for cell in cells)] == [
        (1, 6, 128),
        (2, 4, 192),
    ]
    assert cells[1].name == "wide"


def test_listed_cells_are_combined_with_every_point_of_the_axes(expand: Expand) -> None:
    cells = expand("cells = [{ num_heads = 2 }, { num_heads = 8 }]", seed=[1, 2], lr=[1e-3]).cells
    assert [(c.config.model.num_heads, c.config.debug.seed) for c in cells] == [(2, 1), (2, 2), (8, 1), (8, 2)]


@given(
    steps=st.lists(st.integers(1, 8), min_size=1, max_size=3, unique=True),
    heads=st.lists(st.integers(1, 12), min_size=1, max_size=3, unique=True),
    gates=st.lists(st.booleans(), min_size=1, max_size=2, unique=True),
    rates=st.lists(st.floats(1e-6, 1, exclude_min=True), min_size=1, max_size=2, unique=True),
)
@examples(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    derandomize=True,
)
def test_every_cell_of_a_grid_is_the_configuration_of_its_point(
    steps: list[int], heads: list[int], gates: list[bool], rates: list[float], expand: Expand
) -> None:
    cells = expand(num_householder=steps, num_heads=heads, use_forget_gate=gates, lr=rates).cells
    found = [
        (c.model.num_householder, c.model.num_heads, c.model.use_forget_gate, c.optimizer.lr)
        for c in (cell.config for cell in cells)
    ]
    assert found == list(itertools.product(steps, heads, gates, rates))
    assert len({cell.name for cell in cells}) == len(cells)


# -- what a cell is ----------------------------------------------------------------------------------------------------


def test_a_cells_toml_is_loaded_by_train_py_to_exactly_its_configuration(expand: Expand, tmp_path: Path) -> None:
    sweep = expand('match = "heads"\nmultiple = 4', size=["300K"], num_householder=[1, 2], tokens_per_parameter=[3], lr=[1e-4])
    for cell in sweep.cells:
        (tmp_path / "config.toml").write_text(cell.toml())
        assert load_config(["--config", str(tmp_path / "config.toml")]).config == cell.config


def test_a_cell_runs_in_a_folder_of_its_own_inside_the_sweeps(expand: Expand) -> None:
    sweep = expand(settings='[job]\ndump_folder = "somewhere"\n', num_householder=[1, 2])
    assert sweep.folder == Path("somewhere/study")
    for cell in sweep.cells:
        assert cell.folder == Path(cell.config.job.dump_folder) / cell.config.job.run_name == sweep.folder / cell.name
    assert expand('name = "other"', seed=[1]).folder == Path("outputs/other")


def test_cost_is_model_flops_times_tokens(expand: Expand) -> None:
    for cell in expand(num_householder=[1, 3], use_forget_gate=[False, True]).cells:
        assert cell.flops_per_token == closed_flops(cell.config.model)
        assert cell.flops == cell.flops_per_token * cell.tokens


def test_expanding_again_gives_the_same_cells(expand: Expand) -> None:
    rules, axes = 'match = "heads"\nmultiple = 4', {"size": ["300K", "600K"], "num_householder": [1, 2], "flops": [1e11]}
    assert expand(rules, **axes).cells == expand(rules, **axes).cells


def test_expanding_writes_nothing(expand: Expand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    expand(num_householder=[1, 2])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.toml", "study.toml"]


# -- matching ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("knob", ["heads", "head_dim", "intermediate_size", "hidden_size"])
def test_matched_cells_have_equal_parameters_on_the_grid(knob: str, expand: Expand) -> None:
    sweep = expand(f'match = "{knob}"\nmultiple = 16', size=["1.2M"], num_householder=[1, 2, 3], use_forget_gate=[False, True])
    for model in models(sweep):
        assert abs(built_parameters(model) / 1_200_000 - 1) <= 0.0025
        assert model.num_hidden_layers == 3
        check_grid(model, 16)


def test_without_a_size_cells_are_as_large_as_the_base(expand: Expand) -> None:
    (base,) = models(expand(seed=[1]))
    for model in models(expand('match = "intermediate_size"\nmultiple = 4', num_householder=[1, 2, 3])):
        assert abs(built_parameters(model) / built_parameters(base) - 1) <= 0.0025


def test_cells_are_matched_by_flops(expand: Expand) -> None:
    sweep = expand('match = "heads"\nmatch_quantity = "flops"\nmultiple = 4', size=["6M"], num_householder=[1, 2, 3])
    assert all(abs(closed_flops(model) / 6e6 - 1) <= 0.0025 for model in models(sweep))


def test_the_tolerance_of_a_sweep_is_kept(expand: Expand) -> None:
    sweep = expand('match = "heads"\nmultiple = 4\ntolerance = 0.05', size=["700K"], num_householder=[1, 2])
    assert all(abs(built_parameters(model) / 700_000 - 1) <= 0.0005 for model in models(sweep))


def test_a_shape_axis_beside_the_knob_is_kept(expand: Expand) -> None:
    sweep = expand('match = "heads"\nmultiple = 4', head_dim=[16, 64], num_hidden_layers=[2, 4], num_householder=[1, 2])
    for cell in sweep.cells:
        assert (cell.config.model.head_dim, cell.config.model.num_hidden_layers) == (
            cell.axes["head_dim"],
            cell.axes["num_hidden_layers"],
        )


def test_learning_rate_and_seed_leave_a_matched_shape_alone(expand: Expand) -> None:
    sweep = expand('match = "heads"\nmultiple = 4', size=["700K"], num_householder=[1, 2], lr=[1e-3, 1e-4], seed=[1, 2])
    for n in (1, 2):
        assert len({m.model_dump_json() for m in models(sweep) if m.num_householder == n}) == 1


def test_depth_grows_with_the_size_at_an_aspect_ratio_and_is_the_same_for_all_steps(expand: Expand) -> None:
    rules = 'match = "heads"\nmultiple = 16\naspect_ratio = 32'
    sweep = expand(rules, size=["1M", "20M"], num_householder=[1, 2, 3])
    depths = [model.num_hidden_layers for model in models(sweep)]
    assert len(set(depths[:3])) == len(set(depths[3:])) == 1
    assert depths[0] < depths[3]
    assert all(16 < m.hidden_size / m.num_hidden_layers < 64 for m in models(sweep))


@pytest.mark.parametrize("first", [0, 1])
def test_a_cell_keeps_the_depth_it_is_given_whatever_its_neighbours_have(first: int, expand: Expand) -> None:
    cells = ["{ num_householder = 1 }", "{ num_householder = 2, num_hidden_layers = 6 }"]
    order = cells[first:] + cells[:first]
    sweep = expand(f'match = "heads"\nmultiple = 16\naspect_ratio = 32\ncells = [{", ".join(order)}]', size=["1M"])
    deep = next(model for model in models(sweep) if model.num_householder == 2)
    free = next(model for model in models(sweep) if model.num_householder == 1)
    assert (deep.num_hidden_layers, free.num_hidden_layers) == (6, 4)


@pytest.mark.parametrize("budgets", [[1e12, 3e12], ["2T"]])
def test_all_sizes_of_a_budget_cost_that_budget_to_within_a_step(budgets: list[Any], expand: Expand) -> None:
    sweep = expand('match = "heads"\nmultiple = 4', flops=budgets, size=["300K", "1M"], num_householder=[1, 2])
    assert len(sweep.cells) == 4 * len(budgets)
    for cell in sweep.cells:
        budget = 2e12 if cell.axes["flops"] == "2T" else cell.axes["flops"]
        assert abs(closed_flops(cell.config.model) * cell.tokens - budget) <= closed_flops(cell.config.model) * TOKENS_PER_STEP


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_two_cells_of_one_configuration_are_refused(refusal: Refusal) -> None:
    assert "(num_householder = 1) and (num_householder = 1) have the same configuration" in refusal(num_householder=[1, 1])
    assert "same configuration" in refusal(lr=[0.001, 1e-3])
    assert "same configuration" in refusal("cells = [{ num_heads = 4 }, { num_householder = 2 }]")  # both are the base
    assert "same configuration" in refusal(**{"job.description": ["a", "b"]})


def test_two_cells_of_one_name_are_refused(refusal: Refusal) -> None:
    assert "the same name" in refusal('cells = [{ name = "a", num_heads = 2 }, { name = "a", num_heads = 8 }]')
    assert "the same name" in refusal(**{"data.path": ["a/b", "a_b"]})


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("num_househodler", "num_householder"),
        ("n_h", "num_householder"),
        ("heads", "num_heads"),
        ("learning_rate", "lr"),
        ("tokens_per_param", "tokens_per_parameter"),
        ("sizes", "size"),
        ("gates", "use_forget_gate"),
        ("gated", "use_forget_gate"),
        ("optimizer.lrr", "optimizer.lr"),
    ],
)
def test_an_unknown_axis_is_refused_with_the_nearest(wrong: str, right: str, refusal: Refusal) -> None:
    message = refusal(**{wrong: [1, 2]})
    assert f"unknown axis {wrong}" in message
    assert right in message.partition(wrong)[2]
    assert len(message) < 300


def test_an_axis_without_values_is_refused(refusal: Refusal) -> None:
    assert "num_householder has no values" in refusal(num_householder=[])


@pytest.mark.parametrize("rules", ["", 'description = "none"', "cells = []"])
def test_a_sweep_without_axes_and_cells_is_refused(rules: str, refusal: Refusal) -> None:
    assert "neither axes nor cells" in refusal(rules)


def test_a_size_needs_a_rule(refusal: Refusal) -> None:
    assert "needs a rule" in refusal(size=["1M"])


KNOB_AXES = {
    "heads": "num_heads",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
    "hidden_size": "hidden_size",
}


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("knob", KNOB_AXES)
def test_an_axis_of_the_knob_contradicts_the_rule(knob: str, prefix: str, refusal: Refusal) -> None:
    message = refusal(f'match = "{knob}"', **{prefix + KNOB_AXES[knob]: [16, 32]})
    assert f'contradicts match = "{knob}"' in message


@pytest.mark.parametrize("pair", list(itertools.combinations(["tokens", "training.steps", "tokens_per_parameter", "flops"], 2)))
def test_two_axes_of_the_length_are_refused(pair: tuple[str, str], refusal: Refusal) -> None:
    assert "both set the length" in refusal(**{axis: [1000] for axis in pair})


@pytest.mark.parametrize(
    ("short", "key"), [("lr", "optimizer.lr"), ("seed", "data.seed"), ("num_heads", "model.num_heads"), ("seed", "debug.seed")]
)
def test_two_names_of_one_key_are_refused(short: str, key: str, refusal: Refusal) -> None:
    assert short in refusal(**{short: [1], key: [2]})


def test_an_axis_that_a_listed_cell_sets_is_refused(refusal: Refusal) -> None:
    assert "num_heads" in refusal("cells = [{ num_heads = 2 }]", num_heads=[4])


def test_a_batch_that_depends_on_the_processes_is_refused(refusal: Refusal) -> None:
    message = refusal("", "[training]\nglobal_batch_size = -1\n", seed=[1])
    assert "global_batch_size" in message


def test_a_batch_that_no_number_of_processes_can_make_is_refused(refusal: Refusal) -> None:
    assert "local_batch_size" in refusal(**{"training.global_batch_size": [3]})


@pytest.mark.parametrize(
    ("axis", "value"),
    [
        *(("num_householder", wrong) for wrong in (0, 9, 1.0, "1", True)),
        *(("size", wrong) for wrong in (0, -1, "1Q", float("nan"), float("inf"), True)),
        *(("flops", wrong) for wrong in (0, -1, "many", float("nan"), True)),
        *(("tokens_per_parameter", wrong) for wrong in (0, -1, "20", float("nan"), True)),
        *(("tokens", wrong) for wrong in (0, "1Q", float("inf"))),
        ("lr", 0.0),
        ("data.seed", 0.5),
    ],
)
def test_a_wrong_value_is_refused_by_its_axis(axis: str, value: object, refusal: Refusal) -> None:
    rules = 'match = "heads"\nmultiple = 4' if axis == "size" else ""
    assert axis in refusal(rules, **{axis: [value]})


def test_a_single_value_in_place_of_a_list_is_refused(refusal: Refusal) -> None:
    assert "list" in refusal("axes.num_householder = 2")


@pytest.mark.parametrize("rules", ["multiple = 32", "tolerance = 0.1", "aspect_ratio = 32", 'match_quantity = "flops"'])
def test_a_setting_of_the_rule_without_a_rule_is_refused(rules: str, refusal: Refusal) -> None:
    assert rules.partition(" ")[0] in refusal(rules, num_householder=[1, 2])


@pytest.mark.parametrize("rules", ['mach = "heads"', 'match = "head"', 'name = "../up"', "multiple = 0", "tolerance = 20.0"])
def test_a_wrong_key_of_the_sweep_is_refused(rules: str, refusal: Refusal) -> None:
    assert rules.partition(" ")[0] in refusal(rules, num_householder=[1, 2])


@pytest.mark.parametrize("name", ["", ".", "..", ".lock", "sweep.json", "x" * 300])
def test_a_cells_name_that_is_no_folder_of_its_own_is_refused(name: str, refusal: Refusal) -> None:
    assert "name" in refusal(f'cells = [{{ name = "{name}", num_heads = 2 }}]')


def test_a_listed_cell_that_is_empty_is_refused_or_named(expand: Expand) -> None:
    try:
        cells = expand("cells = [{}, { num_heads = 2 }]").cells
    except UserError:
        return
    assert all(cell.name for cell in cells)


def test_cells_may_be_an_array_of_tables(expand: Expand) -> None:
    cells = expand(settings="[[sweep.cells]]\nnum_heads = 2\n[[sweep.cells]]\nnum_heads = 8\n").cells
    assert [cell.config.model.num_heads for cell in cells] == [2, 8]


def test_an_unreachable_size_names_the_nearest_shape(refusal: Refusal) -> None:
    message = refusal('match = "heads"', size=["10K"])
    assert "10,000 parameters cannot be reached" in message
    assert "the nearest is hidden_size 64" in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BASE, "no [sweep] section"),
        ("[sweep\n", "not valid TOML"),
        ('extends = "nosuch.toml"\n[sweep.axes]\nseed = [1]\n', "nosuch.toml"),
        ("[sweep]\naxes = 3\n" + BASE, "axes"),
        ("[sweep.axes]\nseed = [1]\n" + BASE + "[model.x]\ny = 3\n", "model.x.y"),
        ("[sweep.axes]\nseed = [1]\n" + BASE.replace('tokens = "1M"', ""), "training"),
    ],
)
def test_a_file_that_is_no_sweep_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_sweep(tmp_path / "study.toml")
    assert said in str(caught.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no sweep file .*nosuch\.toml"):
        load_sweep(tmp_path / "nosuch.toml")


# -- the shipped files -------------------------------------------------------------------------------------------------

SHIPPED = sorted((config_folder() / "sweeps").glob("*.toml"))


def test_the_studies_of_the_issue_ship() -> None:
    assert {"paper", "figure10", "householder_head_dim", "isoflop", "cpu_study"} <= {path.stem for path in SHIPPED}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_sweep_sets_nothing_in_vain(path: Path) -> None:
    sweep = load_sweep(path)
    assert sweep.description
    for cell in sweep.cells:
        assert ineffective_settings(cell.config, dict.fromkeys(all_keys(), "sweep")) == []
        assert cell.config.lr_scheduler.warmup_steps < cell.tokens / (
            cell.config.training.global_batch_size * cell.config.training.seq_len
        )


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_cells_of_one_size_in_a_shipped_sweep_are_equally_large(path: Path) -> None:
    by_size: dict[str, list[int]] = {}
    for cell in load_sweep(path).cells:
        if "size" in cell.axes:
            by_size.setdefault(cell.axes["size"], []).append(cell.parameters)
    for counts in by_size.values():
        assert max(counts) / min(counts) < 1.005


def test_the_papers_sweep_is_the_papers_nine_configs() -> None:
    cells = load_sweep(config_folder() / "sweeps" / "paper.toml").cells
    assert sorted(cell.parameters for cell in cells) == sorted(PAPER.values())
    shapes = {(m.hidden_size, m.num_heads, m.num_householder, m.mlp_size) for m in (cell.config.model for cell in cells)}
    assert shapes == set(PAPER_SHAPES.values())
    for cell in cells:
        config = load_config(["--config", next(name for name, count in PAPER.items() if count == cell.parameters)]).config
        ours, theirs = (c.model_dump(exclude={"job"}) for c in (cell.config, config))
        ours["model"]["intermediate_size"] = theirs["model"]["intermediate_size"] = cell.config.model.mlp_size
        assert ours == theirs


def test_figure_10_compares_steps_with_head_dimensions_at_equal_parameters() -> None:
    cells = load_sweep(config_folder() / "sweeps" / "figure10.toml").cells
    assert {cell.config.model.num_householder for cell in cells} >= {1, 3}
    for one, other in zip(cells[::2], cells[1::2], strict=True):
        assert abs(one.parameters / other.parameters - 1) < 0.005
        assert one.config.model.num_householder != other.config.model.num_householder


def test_the_cpu_study_is_at_least_what_the_issue_asks_for() -> None:
    axes = [cell.axes for cell in load_sweep(config_folder() / "sweeps" / "cpu_study.toml").cells]
    assert {a["num_householder"] for a in axes} >= {1, 2, 3}
    assert len({a["size"] for a in axes}) >= 3
    assert len({a["seed"] for a in axes}) >= 2
