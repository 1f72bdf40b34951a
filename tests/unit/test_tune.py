"""Tuned axes: the best value of each arm in the report, edges of grids, and the cells that --extend-edges adds."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.runs import write_run, write_sweep
from tests.unit.test_sweep import Answer, Run, check_refused, sweep  # noqa: F401  # a fixture
from titan_dp.cli import dispatch
from titan_dp.errors import run_main
from titan_dp.studies import sweep as sweep_module
from titan_dp.studies.report.read import find_runs, read_runs, tuned_axes
from titan_dp.studies.report.results import Results, results_of
from titan_dp.studies.report.tune import refusal

LRS = [0.001, 0.002, 0.004, 0.008]
BEST = {1: 0.003, 2: 0.0025}
CURVATURE = 0.08


def bowl(n_h: int, lr: float, seed: int = 1) -> float:
    """Lowest at BEST of `n_h`, at 3 - 0.1 n_h; seeds shift it by 0.001."""
    return 3 - 0.1 * n_h + CURVATURE * math.log(lr / BEST[n_h]) ** 2 + 0.001 * seed


def study(
    folder: Path,
    loss: Callable[..., float] = bowl,
    lrs: Iterable[float] = LRS,
    n_h: Iterable[int] = (1, 2),
    seeds: Iterable[int] = (1, 2, 3),
    **unfinished: int,
) -> Path:
    """A sweep that tunes lr, all of its cells finished except those that `unfinished` names with the step they got to."""
    cells = {}
    for n, lr, seed in itertools.product(n_h, lrs, seeds):
        both = {"debug.seed": seed, "data.seed": seed}
        cells[f"nh{n}_lr{round(lr * 1e5)}_s{seed}"] = {"model.num_householder": n, "optimizer.lr": lr, **both}
    write_sweep(folder, cells, tune={"lr": "optimizer.lr"})
    for name, settings in cells.items():
        value = loss(settings["model.num_householder"], settings["optimizer.lr"], settings["debug.seed"])
        facts = {"parameters": 100_000, "flops_per_token": 600_000}
        write_run(folder / name, settings, value, facts=facts, until=unfinished.get(name))
    return folder


def results(folder: Path) -> Results:
    found = find_runs([folder])
    return results_of(read_runs(found), "nats", "study", tuned=tuned_axes(found))


# -- the best value ----------------------------------------------------------------------------------------------------


def test_the_best_value_is_the_parabolas_through_the_lowest_mean_and_its_neighbours(tmp_path: Path) -> None:
    found = results(study(tmp_path / "s")).tunings
    assert [tuning.value for tuning in found] == pytest.approx([0.003, 0.0025])
    assert all(tuning.settled for tuning in found)


def test_how_flat_it_is_is_the_loss_at_one_and_a_half_times_the_value(tmp_path: Path) -> None:
    for tuning in results(study(tmp_path / "s")).tunings:
        assert tuning.rise == pytest.approx(CURVATURE * math.log(1.5) ** 2)
        assert tuning.parabola
        ends = tuning.parabola.predict(tuning.value * 1.5), tuning.parabola.predict(tuning.value / 1.5)
        assert [end - tuning.parabola.loss for end in ends] == pytest.approx([tuning.rise] * 2)


def test_the_best_value_has_an_interval_that_holds_it_if_seeds_scatter(tmp_path: Path) -> None:
    jitter = [0.0, 0.004, -0.003, 0.002, -0.004]
    shaken = lambda n, lr, seed: bowl(n, lr) + jitter[(seed + round(lr * 1000)) % 5]  # noqa: E731
    for tuning in results(study(tmp_path / "s", shaken)).tunings:
        assert tuning.parabola
        assert tuning.parabola.interval
        low, high = tuning.parabola.interval
        assert low < BEST[tuning.points["n_h"].iloc[0]] < high
        assert low < tuning.value < high


def test_families_are_compared_at_their_own_best_with_the_seeds_of_real_runs(tmp_path: Path) -> None:
    (rows,) = results(study(tmp_path / "s")).comparisons
    assert rows["mean"].tolist() == pytest.approx([2.902, 2.802])  # of the parabolas, which no run has
    assert rows["optimizer.lr"].tolist() == [0.003, 0.0025]
    assert rows["difference"].iloc[1] == pytest.approx(-0.1)
    assert rows["losses"].iloc[0] == pytest.approx([2.901, 2.902, 2.903])
    assert rows["verdict"].iloc[1] == "lower"


@pytest.mark.parametrize("worse", [0.0, 0.5])
def test_seeds_that_only_the_best_value_has_do_not_move_it(tmp_path: Path, worse: float) -> None:
    """Seed 9 shifts the loss by 0.009 or much more, and 0.002 alone has it."""
    folder = study(tmp_path / "s", n_h=(2,))
    more = {"model.num_householder": 2, "optimizer.lr": 0.002, "debug.seed": 9, "data.seed": 9}
    listed = json.loads((folder / "sweep.json").read_text())
    extra = write_sweep(tmp_path / "extra", {"nine": more})
    listed["cells"] += json.loads((extra / "sweep.json").read_text())["cells"]
    (folder / "sweep.json").write_text(json.dumps(listed))
    write_run(folder / "nine", more, bowl(2, 0.002, 9) + worse, facts={"parameters": 100_000, "flops_per_token": 600_000})
    found = results(folder)
    assert found.tunings[0].value == pytest.approx(0.0025)
    assert found.best["losses"].iloc[0] == pytest.approx([2.801, 2.802, 2.803, 2.809 + worse])


def test_laws_are_fitted_to_the_best_values_alone(tmp_path: Path) -> None:
    for fit in results(study(tmp_path / "s")).surfaces:
        assert (len(fit.points), fit.left_out) == (1, 0)


def test_two_axes_have_a_parabola_each_through_the_lowest_loss(tmp_path: Path) -> None:
    cells = {}
    for lr, decay in itertools.product([0.001, 0.002, 0.004], [0.05, 0.1, 0.2]):
        cells[f"{lr}_{decay}"] = {"optimizer.lr": lr, "optimizer.weight_decay": decay}
    folder = write_sweep(tmp_path / "s", cells, tune={"lr": "optimizer.lr", "decay": "optimizer.weight_decay"})
    for name, settings in cells.items():
        lr, decay = settings.values()
        write_run(folder / name, settings, 2 + 0.1 * math.log(lr / 0.0022) ** 2 + 0.05 * math.log(decay / 0.09) ** 2)
    found = results(folder)
    assert {tuning.axis: tuning.value for tuning in found.tunings} == pytest.approx({"lr": 0.0022, "decay": 0.09})
    assert found.best["mean"].tolist() == pytest.approx([2.0])


# -- edges and gaps ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lrs", "end", "add"), [([0.004, 0.008, 0.016], "smallest", 0.002), ([0.0005, 0.001], "largest", 0.002)]
)
def test_an_optimum_at_the_edge_is_none_and_the_value_to_add_goes_on_with_the_grid(
    tmp_path: Path, lrs: list[float], end: str, add: float
) -> None:
    found = results(study(tmp_path / "s", lrs=lrs))
    assert [tuning.add for tuning in found.tunings] == pytest.approx([add, add])
    assert (found.comparisons, len(found.best)) == ([], 0)
    assert f"the {end} value tried; add 0.002 (and 1 more, in the table)" in refusal(found.tunings)


def test_the_report_shows_an_edge_and_leaves_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = study(tmp_path / "s", lrs=[0.004, 0.008])
    assert run_main(lambda: dispatch(["report", str(folder)])) == 2
    out, err = capsys.readouterr()
    assert err.startswith(
        "error: no optimum, but an edge: DeltaNet [-1, 1] at 100k parameters and 12.8k tokens has its lowest "
    )
    assert err.count("\n") == 1
    assert "at the edge: add 0.002" in out
    tuning = json.loads((folder / "report/report.json").read_text())["tuning"]
    assert [(each["best"], each["add"]) for each in tuning] == [(None, 0.002)] * 2


def test_an_edge_with_runs_to_come_is_not_decided(tmp_path: Path) -> None:
    names = {f"nh1_lr800_s{seed}": 50 for seed in (1, 2, 3)}
    one, two = results(study(tmp_path / "s", lambda n, lr, seed: 3 - lr - 0.1 * n, **names)).tunings
    assert one.add is None
    assert "3 are not finished" in one.lacks
    assert two.add == pytest.approx(0.016)


def test_beyond_the_best_value_a_diverged_run_is_no_edge_and_gives_no_parabola(tmp_path: Path) -> None:
    wild = lambda n, lr, seed: math.nan if lr > 0.003 and seed == 2 else 3 - lr  # noqa: E731
    for tuning in results(study(tmp_path / "s", wild)).tunings:
        assert (tuning.value, tuning.settled, tuning.note) == (0.002, True, "no parabola: 0.004 diverged")
        assert tuning.points["optimizer.lr"].tolist() == [0.001, 0.002]


def test_equal_losses_have_no_parabola(tmp_path: Path) -> None:
    for tuning in results(study(tmp_path / "s", lambda n, lr, seed: 3.0 + (lr == LRS[0]), lrs=[*LRS, 0.0005])).tunings:
        assert tuning.settled
        assert tuning.value >= 0.002


def test_the_page_has_the_table_and_the_figure_of_best_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = study(tmp_path / "s")
    assert dispatch(["report", str(folder)]) == 0
    assert (folder / "report" / "tuning.png").stat().st_size > 0
    page = (folder / "report" / "report.html").read_text()
    assert '<h2 id="tuning">Best values</h2>' in page
    assert f"+{CURVATURE * math.log(1.5) ** 2:.4f}" in page
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "0.001, 0.002, 0.004, 0.008" in line and "_2" in line]
    assert "0.0025" in line


# -- sweep files -------------------------------------------------------------------------------------------------------

GRID = '[sweep]\ntune = "lr"\n[sweep.axes]\nnum_householder = [1, 2]\nlr = [1e-3, 2e-3]\nseed = [1, 2]\n'
STUDY = Path("outputs/study")

# sweep files, and what is said
REFUSALS = [
    (GRID.replace("[1e-3, 2e-3]", "[1e-3]"), "the tuned axis lr has one value (0.001) for (num_householder = 1,"),
    (GRID.replace('"lr"', '"weight_decay"'), "sweep.tune names 'weight_decay', which is no axis of every cell"),
    (GRID.replace('"lr"', '["lr", "seed"]'), 'sweep.tune = "seed": seeds, sizes and lengths are compared'),
    (GRID.replace('"lr"', '"num_householder"'), 'sweep.tune = "num_householder": it changes the model'),
    (
        '[sweep]\ntune = "optimizer.weight_decay"\n[sweep.axes]\n"optimizer.weight_decay" = [0, 1]\n',
        "decay holds 0; its logarithm",
    ),
    (GRID.replace('"lr"', "3"), "study.toml:3: sweep.tune = 3: expected name of an axis, or list of them"),
    ('[sweep]\ntune = "use_forget_gate"\n[sweep.axes]\nuse_forget_gate = [true, false]\n', "use_forget_gate holds True"),
]


@pytest.mark.parametrize(("text", "said"), REFUSALS)
def test_what_cannot_be_tuned_is_refused(sweep: Run, text: str, said: str) -> None:  # noqa: F811
    check_refused(sweep(text), said)


def test_an_axis_is_tuned_for_each_of_several_sizes_and_lengths(sweep: Run) -> None:  # noqa: F811
    sizes = (
        GRID.replace("[sweep]", '[sweep]\nmatch = "heads"\nmultiple = 4') + 'size = ["100K", "200K"]\ntokens = ["8K", "16K"]\n'
    )
    assert sweep(sizes).code == 0
    assert len(names()) == 2 * 2 * 2 * 2 * 2


def of_axes(axes: dict[str, Any]) -> float:
    return bowl(axes["num_householder"], axes["lr"], axes["seed"])


def finish(loss: Callable[[dict[str, Any]], float] = of_axes, only: str = "") -> None:
    """Leave behind finished runs of all cells whose name begins with `only`."""
    for cell in json.loads((STUDY / "sweep.json").read_text())["cells"]:
        if not cell["name"].startswith(only):
            continue
        axes, folder = cell["axes"], STUDY / cell["name"]
        config = (folder / "config.toml").read_text()
        records = [{"step": 1954, "validation_loss": loss(axes)}]
        step = {
            "step": 1954,
            "loss": 3.0,
            "tokens": 1_000_448,
            "tokens_per_second": 1.0,
            "step_seconds": 0.1,
            "skipped_steps": 0,
        }
        write_run(folder, facts={"steps": 1954, "tokens_per_step": 512, "parameters": 1000}, records=[step, *records])
        (folder / "config.toml").write_text(config)


def names() -> list[str]:
    return [cell["name"] for cell in json.loads((STUDY / "sweep.json").read_text())["cells"]]


def added(answer: Answer) -> list[str]:
    assert answer.code == 0, answer.err
    found = [line.removeprefix("added: ") for line in answer.out.splitlines() if line.startswith("added: ")]
    return found[0].split(", ") if found else []


def test_extending_adds_the_next_value_with_all_seeds_until_the_optimum_is_inside(sweep: Run) -> None:  # noqa: F811
    sweep(GRID)
    finish()
    assert added(sweep(GRID, "--extend-edges")) == [f"nh{n}-lr0.004-s{seed}" for n in (1, 2) for seed in (1, 2)]
    assert "lr = 0.004" in (STUDY / "nh2-lr0.004-s2" / "config.toml").read_text()
    finish()
    assert added(sweep(GRID, "--extend-edges")) == ["nh1-lr0.008-s1", "nh1-lr0.008-s2"]  # its best value is above 0.0028
    finish()
    assert "no best value is at an edge" in sweep(GRID, "--extend-edges").out
    assert len(names()) == 14
    assert dispatch(["report", str(STUDY)]) == 0


def test_only_the_arm_at_its_edge_gets_a_value(sweep: Run) -> None:  # noqa: F811
    grid = GRID.replace("2e-3]", "2e-3, 4e-3]")
    sweep(grid)
    finish(lambda axes: bowl(2, axes["lr"]) if axes["num_householder"] == 2 else 3 + axes["lr"])
    assert added(sweep(grid, "--extend-edges")) == ["nh1-lr0.0005-s1", "nh1-lr0.0005-s2"]


def test_added_cells_stay_and_are_the_files_once_it_names_them(sweep: Run) -> None:  # noqa: F811
    sweep(GRID)
    finish()
    sweep(GRID, "--extend-edges")
    finish()
    before = set(names())
    assert sweep(GRID).code == 0
    assert set(names()) == before
    assert sweep(GRID.replace("2e-3]", "2e-3, 4e-3]")).code == 0
    assert set(names()) == before
    assert not any(cell["added"] for cell in json.loads((STUDY / "sweep.json").read_text())["cells"])


def test_nothing_is_added_before_the_runs_are_finished(sweep: Run) -> None:  # noqa: F811
    sweep(GRID)
    assert "no run has finished" in sweep(GRID, "--extend-edges").out
    finish(only="nh1-lr0.001")
    answer = sweep(GRID, "--extend-edges")
    assert "2 are not finished" in answer.out
    assert added(answer) == []


def test_extending_needs_a_tuned_axis_and_a_value_that_a_configuration_takes(sweep: Run) -> None:  # noqa: F811
    check_refused(sweep(GRID.replace('tune = "lr"', ""), "--extend-edges"), "--extend-edges extends tuned axes, and study.toml")
    grid = '[sweep]\ntune = "optimizer.beta1"\n[sweep.axes]\n"optimizer.beta1" = [0.5, 0.8]\n'
    assert sweep(grid).code == 0
    finish(lambda axes: 3 - axes["optimizer.beta1"])
    check_refused(sweep(grid, "--extend-edges"), "optimizer.beta1 = 1.28 would be the next value for beta10.8")


def test_a_local_launch_trains_and_extends_until_no_optimum_is_at_an_edge(
    sweep: Run,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained: list[int] = []

    def launch(cells: list[Any], how: str, **options: Any) -> None:
        trained.append(len(cells))
        finish()

    monkeypatch.setattr(sweep_module, "launch", launch)
    assert sweep(GRID, "--launch", "local", "--extend-edges").code == 0
    assert trained == [8, 12, 14]  # 0.004 for both, then 0.008 for n_h = 1
    assert sweep(GRID, "--launch", "local").code == 0
    assert trained == [8, 12, 14, 14]


def test_a_loss_that_falls_for_ever_is_not_extended_for_ever(sweep: Run, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    grid = '[sweep]\ntune = "lr"\n[sweep.axes]\nlr = [1e-3, 2e-3]\n'
    monkeypatch.setattr(sweep_module, "launch", lambda cells, how, **options: finish(lambda axes: 3 - axes["lr"]))
    assert sweep(grid, "--launch", "local", "--extend-edges").code == 0
    assert names()[-1] == "lr0.128"  # 2 values and 6 more
    assert len(names()) == 8
