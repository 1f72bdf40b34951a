"""Sweep files: what each axis does to a cell's configuration, what is kept equal, and what is refused.

The base is a small model given here in full. Sizes and FLOPs are counted by `model_size`, as in test_match.py; a cell's TOML is
read by train.py's own loader. Writing run folders is test_sweep.py's.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_match import PAPER_SHAPES, check
from tests.unit.test_train_configs import PAPER
from titan_dp.config.advice import ineffective_settings
from titan_dp.config.describe import all_keys, to_toml
from titan_dp.config.load import SHIPPED, load_config
from titan_dp.errors import UserError
from titan_dp.model.size import model_size
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


def models(sweep: Sweep) -> list[Any]:
    return [cell.config.model for cell in sweep.cells]


# -- axes --------------------------------------------------------------------------------------------------------------

# an axis, its values, and the key that it sets
AXES: dict[str, tuple[list[Any], str]] = {
    "num_householder": ([1, 3], "model.num_householder"),
    "use_forget_gate": ([False, True], "model.use_forget_gate"),
    "mixer": (["deltaproduct", "attention"], "model.mixer"),
    "lr": ([1e-3, 3e-4], "optimizer.lr"),
    "optimizer.weight_decay": ([0.1, 0.2], "optimizer.weight_decay"),
    "model.conv_size": ([2, 3], "model.conv_size"),
    "training.steps": ([10, 20], "training.steps"),
}


@pytest.mark.parametrize("axis", AXES)
def test_an_axis_sets_its_key_and_nothing_else(axis: str, expand: Expand) -> None:
    values, key = AXES[axis]
    cells = expand(**{axis: values}).cells
    assert [all_keys()[key].of(cell.config) for cell in cells] == values
    plain = expand(seed=[42]).cells[0].config  # the seeds a config has anyway
    for cell in cells:
        changed = {key for key, setting in all_keys().items() if setting.of(cell.config) != setting.of(plain)}
        assert changed <= {key, "job.run_name", "training.tokens"}


def test_a_seed_is_that_of_initialisation_and_of_the_data(expand: Expand) -> None:
    cells = expand(seed=[1, 2]).cells
    assert [(cell.config.debug.seed, cell.config.data.seed) for cell in cells] == [(1, 1), (2, 2)]


def test_tokens_are_the_length_in_whole_steps_whatever_length_the_base_has(expand: Expand) -> None:
    cells = expand(settings="[training]\nsteps = 7\n", tokens=["200K", 1_000_000]).cells
    assert [(cell.config.training.steps, cell.config.training.tokens) for cell in cells] == [(None, 200_000), (None, 1_000_000)]
    assert [cell.tokens for cell in cells] == [
        -(-tokens // TOKENS_PER_STEP) * TOKENS_PER_STEP for tokens in (200_000, 1_000_000)
    ]


def test_tokens_per_parameter_are_counted_on_the_cells_own_model(expand: Expand) -> None:
    for cell in expand(tokens_per_parameter=[20, 0.5], num_householder=[1, 3]).cells:
        wanted = cell.axes["tokens_per_parameter"] * model_size(cell.config.model, 64).parameters
        assert 0 <= cell.tokens - wanted < TOKENS_PER_STEP
        assert cell.config.training.steps is None


# -- grids and lists ---------------------------------------------------------------------------------------------------


def test_axes_alone_are_the_full_grid(expand: Expand) -> None:
    cells = expand(num_householder=[1, 2, 3], lr=[1e-3, 1e-4], seed=[1, 2]).cells
    points = [(cell.axes["num_householder"], cell.axes["lr"], cell.axes["seed"]) for cell in cells]
    assert points == list(itertools.product([1, 2, 3], [1e-3, 1e-4], [1, 2]))
    assert len({cell.name for cell in cells}) == len({cell.identity for cell in cells}) == 12
    assert [cell.name for cell in cells[:3]] == ["nh1-lr0.001-s1", "nh1-lr0.001-s2", "nh1-lr0.0001-s1"]


def test_listed_cells_are_combined_with_every_point_of_the_axes(expand: Expand) -> None:
    cells = expand('cells = [{ num_heads = 2 }, { name = "wide", hidden_size = 192 }]', seed=[1, 2], lr=[1e-3]).cells
    found = [(c.config.model.num_heads, c.config.model.hidden_size, c.config.debug.seed) for c in cells]
    assert found == [(2, 128, 1), (2, 128, 2), (4, 192, 1), (4, 192, 2)]
    assert [c.name for c in cells[::2]] == ["h2-s1-lr0.001", "wide-s1-lr0.001"]


def test_a_listed_cell_may_have_axes_of_its_own(expand: Expand) -> None:
    listed = 'cells = [{ name = "a", axes = { num_householder = [1, 2] } }, { num_heads = 2, axes = { head_dim = [16] } }]'
    cells = expand(listed, lr=[1e-3, 1e-4]).cells
    found = [(c.config.model.num_householder, c.config.model.num_heads, c.config.model.head_dim) for c in cells[::2]]
    base = expand(lr=[1e-3]).cells[0].config.model
    assert found == [(1, base.num_heads, base.head_dim), (2, base.num_heads, base.head_dim), (base.num_householder, 2, 16)]
    assert [c.name for c in cells[::2]] == ["a-nh1-lr0.001", "a-nh2-lr0.001", "h2-d16-lr0.001"]


def test_cells_may_be_an_array_of_tables(expand: Expand) -> None:
    arrays = "[[sweep.cells]]\nnum_heads = 2\n[[sweep.cells]]\nnum_heads = 8\n"
    assert [model.num_heads for model in models(expand(settings=arrays))] == [2, 8]
    inherited = Path(expand(settings=arrays).file).with_name("again.toml")  # from the file that it extends, too
    inherited.write_text('extends = "study.toml"\n[sweep.axes]\nnum_householder = [1]\n')
    assert [(model.num_heads, model.num_householder) for model in models(load_sweep(inherited))] == [(2, 1), (8, 1)]


# -- what a cell is ----------------------------------------------------------------------------------------------------


def test_a_cells_toml_is_loaded_by_train_py_to_exactly_its_configuration(expand: Expand, tmp_path: Path) -> None:
    rules, axes = 'match = "heads"\nmultiple = 4', {"size": ["300K"], "num_householder": [1, 2], "tokens_per_parameter": [3]}
    sweep = expand(rules, **axes, lr=[1e-4])
    for cell in sweep.cells:
        (tmp_path / "config.toml").write_text(cell.toml())
        assert load_config(["--config", str(tmp_path / "config.toml")]).config == cell.config
    assert expand(rules, **axes, lr=[1e-4]).cells == sweep.cells


def test_a_cell_runs_in_a_folder_of_its_own_inside_the_sweeps(expand: Expand) -> None:
    sweep = expand(settings='[job]\ndump_folder = "somewhere"\n', num_householder=[1, 2])
    assert sweep.folder == Path("somewhere/study")
    for cell in sweep.cells:
        assert cell.folder == Path(cell.config.job.dump_folder) / cell.config.job.run_name == sweep.folder / cell.name
    assert expand('name = "other"', seed=[1]).folder == Path("outputs/other")


# -- matching ----------------------------------------------------------------------------------------------------------

# rules of [sweep], axes, what is counted, its target, and the grid
MATCHES: list[tuple[str, dict[str, list[Any]], str, float, int]] = [
    ('match = "heads"\nmultiple = 16', {"size": ["1.2M"]}, "parameters", 1_200_000, 16),
    ('match = "hidden_size"\nmultiple = 16', {"size": ["1.2M"]}, "parameters", 1_200_000, 16),
    ('match = "heads"\nmatch_quantity = "flops"\nmultiple = 4', {"size": ["6M"]}, "flops_per_token", 6e6, 4),
    ('match = "intermediate_size"\nmultiple = 4', {}, "parameters", 789_984, 4),  # as large as the base
]


@pytest.mark.parametrize(("rules", "axes", "counted", "target", "multiple"), MATCHES)
def test_matched_cells_are_of_one_size_on_the_grid_whatever_their_learning_rate(
    rules: str, axes: dict[str, list[Any]], counted: str, target: float, multiple: int, expand: Expand
) -> None:
    found = models(expand(rules, **axes, num_householder=[1, 2], use_forget_gate=[False, True], lr=[1e-3, 1e-4]))
    assert found[::2] == found[1::2]
    assert {model.num_hidden_layers for model in found} == {3}
    check(found, target, counted, multiple)


def test_the_tolerance_of_a_sweep_is_kept(expand: Expand) -> None:
    check(models(expand(f"{MATCH}\ntolerance = 0.05", size=["700K"], num_householder=[1, 2])), 700_000, multiple=4, off=0.0005)


def test_a_shape_axis_beside_the_knob_is_kept(expand: Expand) -> None:
    for cell in expand(MATCH, head_dim=[16, 64], num_hidden_layers=[2, 4], num_householder=[1, 2]).cells:
        m = cell.config.model
        assert (m.head_dim, m.num_hidden_layers) == (cell.axes["head_dim"], cell.axes["num_hidden_layers"])


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
    assert {model.num_householder: model.num_hidden_layers for model in models(sweep)} == {1: 4, 2: 6}


def test_all_sizes_of_a_budget_cost_that_budget_to_within_a_step(expand: Expand) -> None:
    sweep = expand(MATCH, flops=[1e12, "2T"], size=["300K", "1M"], num_householder=[1, 2])
    assert len(sweep.cells) == 8
    for cell in sweep.cells:
        budget = 2e12 if cell.axes["flops"] == "2T" else 1e12
        per_token = model_size(cell.config.model, 64).flops_per_token
        assert abs(per_token * cell.tokens - budget) <= per_token * TOKENS_PER_STEP


# -- branches ----------------------------------------------------------------------------------------------------------

LENGTHS: dict[str, list[Any]] = {"training.steps": [40, 100, 20], "seed": [1, 2], "lr_scheduler.decay_ratio": [0.25]}


def test_cells_that_differ_only_in_their_length_branch_where_they_decay_from_the_longest(expand: Expand) -> None:
    found = {cell.name: cell for cell in expand("branch = true", **LENGTHS).cells}
    for seed in (1, 2):
        of = {steps: found[f"steps{steps}-s{seed}-decay_ratio0.25"] for steps in (20, 40, 100)}
        assert (of[100].trunk, of[100].config.checkpoint.keep_steps) == ("", [15, 30])
        for steps, at in ((20, 15), (40, 30)):
            assert (of[steps].trunk, of[steps].branch_step) == (of[100].name, at)
            saved = of[100].folder / f"checkpoint/step-{at:08}"
            assert of[steps].config.checkpoint.branch_from == str(saved)
            assert of[steps].own_tokens == (steps - at) * TOKENS_PER_STEP
            assert of[steps].flops == of[steps].flops_per_token * steps * TOKENS_PER_STEP, "the run's, whoever trained it"


def test_a_branch_is_the_cell_that_it_is_without_branches(expand: Expand) -> None:
    """So cells that are trained stay so if a sweep is given branches, or another longest run."""
    alone, branches = (expand(rule, **LENGTHS).cells for rule in ("", "branch = true"))
    assert [(cell.name, cell.identity) for cell in alone] == [(cell.name, cell.identity) for cell in branches]


def test_a_cell_that_is_added_to_a_sweep_of_branches_branches_from_the_longest_of_its_own_kind(expand: Expand) -> None:
    sweep = expand('branch = true\ntune = "lr"', lr=[1e-3, 2e-3], **LENGTHS)
    sweep.add([cell.beyond({"lr": 4e-3}) for cell in sweep.cells if cell.axes["lr"] == 2e-3 and cell.axes["seed"] == 1])
    added = {cell.steps: cell for cell in sweep.cells if cell.added}
    assert added[20].trunk == added[40].trunk == added[100].name
    assert added[100].config.checkpoint.keep_steps == [15, 30]
    assert added[100].name == "lr0.004-steps100-s1-decay_ratio0.25"


# -- refusals ----------------------------------------------------------------------------------------------------------

MATCH = 'match = "heads"\nmultiple = 4'
WRONG_VALUES: dict[str, list[object]] = {
    "num_householder": [0, 1.0, True],
    "size": [0, "1Q", float("nan"), True],
    "flops": [-1, float("inf")],
    "tokens_per_parameter": [0, "20", float("nan"), True],
    "tokens": ["1Q"],
    "data.seed": [0.5],
}
NEAREST = [("num_househodler", "num_householder"), ("tokens_per_param", "tokens_per_parameter"), ("sizes", "size")]
NEAREST += [("gated", "use_forget_gate"), ("optimizer.lrr", "optimizer.lr")]
RATIO = "lr_scheduler.decay_ratio"
DECAY: dict[str, list[Any]] = {RATIO: [0.25]}
LONG: dict[str, list[Any]] = {"training.steps": [50, 90]}
# rules of [sweep], axes, and what is said
REFUSALS: list[tuple[str, dict[str, list[Any]], str]] = [
    ("", {"num_householder": [1, 1]}, "cells (num_householder = 1) and (num_householder = 1) have the same configuration"),
    ("cells = [{ num_heads = 4 }, { num_householder = 2 }]", {}, "same configuration"),  # both are the base
    ("", {"job.description": ["a", "b"]}, "same configuration"),
    ('cells = [{ name = "a", num_heads = 2 }, { name = "a", num_heads = 8 }]', {}, "the same name"),
    ("", {"data.path": ["a/b", "a_b"]}, "the same name"),
    *(("", {wrong: [1, 2]}, f"unknown axis {wrong}; did you mean {right}?") for wrong, right in NEAREST),
    ("", {"learning_rate": [1, 2]}, "unknown axis learning_rate; set optimizer.lr"),
    ("", {"num_householder": []}, "num_householder has no values"),
    ("", {}, "no [sweep] section, or an empty one"),
    ("cells = []", {}, "neither axes nor cells"),
    ("", {"size": ["1M"]}, "needs a rule"),
    ('match = "heads"', {"num_heads": [16, 32]}, 'contradicts match = "heads"'),
    ('match = "hidden_size"', {"model.hidden_size": [16, 32]}, 'contradicts match = "hidden_size"'),
    ("", {"tokens": [1000], "training.steps": [1000]}, "both set the length"),
    ("", {"tokens_per_parameter": [1000], "flops": [1000]}, "both set the length"),
    ("", {"lr": [1], "optimizer.lr": [2]}, "the axes lr and optimizer.lr both set optimizer.lr; keep one"),
    ("", {"seed": [1], "data.seed": [2]}, "the axes seed and data.seed both set data.seed"),
    ("cells = [{ num_heads = 2 }]", {"num_heads": [4]}, "num_heads is both an axis and set by a listed cell"),
    ("cells = [{ axes = { num_heads = [2] } }]", {"num_heads": [4]}, "num_heads is both an axis and set by a listed cell"),
    ("cells = [{ num_heads = 2, axes = { num_heads = [2] } }]", {}, "num_heads is both an axis of a listed cell and set by it"),
    ("cells = [{ axes = { num_heads = [] } }]", {}, "the axis num_heads has no values"),
    ("cells = [{ axes = { num_heads = 2 } }]", {}, "axes of a listed cell = {'num_heads': 2}: expected a table of lists"),
    ("cells = [{ axes = [2] }]", {}, "axes of a listed cell = [2]: expected a table of lists"),
    ("", {"training.global_batch_size": [-1]}, "a sweep needs training.global_batch_size"),
    ("", {"training.global_batch_size": [3]}, "local_batch_size"),
    *((MATCH * (axis == "size"), {axis: [value]}, axis) for axis, values in WRONG_VALUES.items() for value in values),
    ("axes.num_householder = 2", {}, "study.toml:3: sweep.axes.num_householder = 2: expected a list of values"),
    ("multiple = 32", {"seed": [1]}, "sweep.multiple has no effect without sweep.match"),
    ('mach = "heads"', {"seed": [1]}, "study.toml:3: unknown key sweep.mach; did you mean sweep.match?"),
    ('match = "head"', {"seed": [1]}, 'study.toml:3: sweep.match = "head": expected "heads" or "head_dim" or'),
    ('name = "../up"', {"seed": [1]}, 'sweep.name = "../up": expected name of letters, digits'),
    ("multiple = 0", {"seed": [1]}, "sweep.multiple = 0: expected integer > 0"),
    ("tolerance = 20.0", {"seed": [1]}, "sweep.tolerance = 20.0: expected number > 0 and <= 5"),
    ("cells = [3]", {"seed": [1]}, "sweep.cells = [3]: expected list of tables"),
    ("cells = [{}, { num_heads = 2 }]", {}, "can be no run folder; give its cell a `name`"),
    *(
        (f'cells = [{{ name = "{name}", num_heads = 2 }}]', {}, "can be no run folder; give its cell a `name`")
        for name in ("", "..", "sweep.json", "x" * 300)
    ),
    ('match = "heads"', {"size": ["10K"]}, "10,000 parameters cannot be reached"),
    ("branch = true", {"tokens": ["1M", "2M"]}, "constant between warmup and decay; set lr_scheduler.decay_ratio"),
    ("branch = true", {"tokens": ["1M"], "seed": [1, 2], **DECAY}, "no cells differ only in their length"),
    ("branch = true", {"training.steps": [12, 90], **DECAY}, "(training.steps = 12, lr_scheduler.decay_ratio = 0.25) has 12 "),
    ("branch = true", {"training.steps": [12, 90], **DECAY}, "10 of warmup and 3 of decay: no branch of a longer run; lower"),
    ("branch = true", LONG | {RATIO: [1.0]}, "10 of warmup and 50 of decay: no branch"),
    ("branch = true", LONG | {RATIO: [1.5]}, "lr_scheduler.decay_ratio = 1.5: expected number > 0 and <= 1"),
    ("branch = true", LONG | {RATIO: [0.001]}, "and 0 of decay: no branch of a longer run; raise lr_scheduler.decay_ratio"),
    ("branch = true", LONG | {"lr_scheduler.total_steps": [90], **DECAY}, "total_steps = 90; remove it"),
    ("branch = true", LONG | {"lr_scheduler.start_step": [9], **DECAY}, "start_step = 9; remove it"),
    ("branch = true", LONG | {"checkpoint.enable": [False], **DECAY}, "set checkpoint.enable = true"),
]


@pytest.mark.parametrize(("rules", "axes", "said"), REFUSALS)
def test_a_sweep_that_cannot_be_is_refused_in_one_line(
    rules: str, axes: dict[str, list[Any]], said: str, expand: Expand
) -> None:
    with pytest.raises(UserError) as caught:
        expand(rules, **axes)
    message = str(caught.value)
    assert said in message
    assert "study.toml" in message
    assert "\n" not in message
    assert len(message) < 500


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BASE, "no [sweep] section"),
        ("[sweep\n", "not valid TOML"),
        ('extends = "nosuch.toml"\n[sweep.axes]\nseed = [1]\n', "nosuch.toml"),
        ("[sweep]\naxes = 3\n" + BASE, "study.toml:2: sweep.axes = 3: expected table of lists of values"),
        ("[[sweep]]\ncells.a = 1\n" + BASE, "study.toml: unknown axis cells"),
        ("[sweep]\nmach = 1\nmultiple = 0\n" + BASE, "2 problems in the configuration"),
        ("[sweep.axes]\nseed = [1]\n" + BASE + "[model.x]\ny = 3\n", "model.x.y"),
        ("[sweep.axes]\nseed = [1]\n" + BASE.replace('tokens = "1M"', ""), "training"),
        (None, "there is no sweep file "),
    ],
)
def test_a_file_that_is_no_sweep_is_refused(text: str | None, said: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "study.toml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_sweep(tmp_path / "study.toml")
    assert said in str(caught.value)
    assert all(line.count("study.toml") < 2 for line in str(caught.value).splitlines())


# -- the shipped files -------------------------------------------------------------------------------------------------

# Cells, the first and the last name, and a hash of all names and identities: finished runs of users are found by them.
SWEEPS = {
    "cpu_study": (81, "140K-t150K-nh1-lr0.006-s1", "660K-t600K-nh3-lr0.024-s1", "f3b7bf0b24e42aba"),
    "cpu_study_largest": (9, "1.35M-t600K-nh1-lr0.003-s1", "1.35M-t600K-nh3-lr0.012-s1", "a1fb61f49b1bd7a5"),
    "cpu_study_mup": (18, "140K-t600K-nh1-lr0.006-s1", "270K-t600K-nh3-lr0.024-s1", "41a0932c5b767106"),
    "cpu_study_seeds": (54, "140K-t150K-nh1-lr0.012-s2", "660K-t600K-nh3-lr0.012-s3", "0f09cb1429487cac"),
    "figure10": (6, "nh1-d128", "nh1-d256", "c16f1b9b6081c82e"),
    "formal_languages": (135, "deltanet-pos-taskparity-s1", "rwkv7_2-taskmodular-arithmetic-brackets-s3", "abda7db5ebb0d276"),
    "householder_head_dim": (9, "392.2M-nh1-d64", "392.2M-nh3-d256", "66521fc277918025"),
    "isoflop": (90, "c1e+19-60M-nh1-ungated", "c1e+20-800M-nh3-gated", "d5f8bd0878c83ffe"),
    "longer_words": (24, "S3-beta_stretch0-steps600-s1", "S4-beta_stretch0.5-steps1800-s3", "3fa701c5221c03ce"),
    "lr_transfer": (
        50,
        "w64-h2-mlp192-nh1-parametrizationstandard-lr0.004",
        "w256-h8-mlp768-nh2-parametrizationmup-lr0.064",
        "f5dfe22501e4849c",
    ),
    "muon": (6, "270K-t300K-nh1-lr0.012-s1-muon_lr0.006", "270K-t300K-nh3-lr0.012-s1-muon_lr0.024", "e64abee3517c974f"),
    "paper": (9, "213m_nh1", "800m_nh3", "d73700e2b21a1b11"),
    "word_problems": (98, "S3-nh1-s1", "S5-depth-nh1-l4-s3", "6d5a28958d30a218"),
}


def test_every_shipped_sweep_is_held() -> None:
    assert {path.stem for path in (SHIPPED / "sweeps").glob("*.toml")} == SWEEPS.keys()


@pytest.mark.parametrize("name", SWEEPS)
def test_a_shipped_sweep_keeps_its_cells_which_are_equally_large_and_set_nothing_in_vain(name: str) -> None:
    sweep = load_sweep(Path(name))
    assert sweep.description
    text = "\n".join(f"{cell.name} {cell.identity}" for cell in sweep.cells)
    held = (len(sweep.cells), sweep.cells[0].name, sweep.cells[-1].name, hashlib.sha256(text.encode()).hexdigest()[:16])
    assert held == SWEEPS[name]
    by_size: dict[str, list[int]] = {}
    for cell in sweep.cells:
        in_vain = ineffective_settings(cell.config, dict.fromkeys(all_keys(), "sweep"))
        base = "optimizer.mup_base" if "optimizer.parametrization" in cell.axes else " "  # the other half of the cells use it
        other = '(mixer "attention")' if "mixer" in cell.axes else " "  # the base's settings are for the other mixers
        assert [said for said in in_vain if not said.startswith(base) and not said.endswith(other)] == []
        training = cell.config.training
        assert cell.config.lr_scheduler.warmup_steps < cell.tokens / (training.global_batch_size * training.seq_len)
        by_size.setdefault(cell.axes.get("size", cell.name), []).append(cell.parameters)
    assert all(max(counts) / min(counts) < 1.005 for counts in by_size.values())


def test_the_papers_sweep_is_the_papers_nine_configs() -> None:
    cells = load_sweep(SHIPPED / "sweeps" / "paper.toml").cells
    assert sorted(cell.parameters for cell in cells) == sorted(PAPER.values())
    shapes = {(m.hidden_size, m.num_heads, m.num_householder, m.mlp_size) for m in (cell.config.model for cell in cells)}
    assert shapes == set(PAPER_SHAPES.values())
    for cell in cells:
        config = load_config(
            ["--config", next(f"paper/{name}" for name, count in PAPER.items() if count == cell.parameters)]
        ).config
        ours, theirs = (c.model_dump(exclude={"job"}) for c in (cell.config, config))
        ours["model"]["intermediate_size"] = theirs["model"]["intermediate_size"] = cell.config.model.mlp_size
        assert ours == theirs
