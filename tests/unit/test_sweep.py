"""`titan-dp sweep FILE` without a launcher: run folders, the table, what is refused, and the commands of --launch print.

The command runs in this process, in a folder of its own. Runs are made up by the files that training leaves behind; what
starts and ends real ones is tested in tests/integration/test_sweep_local.py.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.unit.test_sweep_file import BASE
from titan_dp.cli import dispatch
from titan_dp.config.load import load_config
from titan_dp.errors import run_main
from titan_dp.files import short
from titan_dp.train.run_folder import RunLock

AXES = "[sweep.axes]\nnum_householder = [1, 2]\nseed = [1, 2]\n"
CELLS = ["nh1-s1", "nh1-s2", "nh2-s1", "nh2-s2"]
STUDY = Path("outputs/study")


@dataclass
class Answer:
    code: int
    out: str
    err: str


Run = Callable[..., Answer]


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """sweep(text, *options): `titan-dp sweep study.toml` in tmp_path, with `text` over BASE."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.toml").write_text(BASE)

    def run(text: str = AXES, *options: str, file: str = "study.toml") -> Answer:
        Path(file).write_text('extends = "base.toml"\n' + text)
        capsys.readouterr()
        try:
            code = run_main(lambda: dispatch(["sweep", file, *options]))
        except SystemExit as error:  # argparse's own
            code = int(str(error.code))
        return Answer(code, *capsys.readouterr())

    return run


def contents() -> dict[str, str]:
    """Every file of the sweep's folder but the locks."""
    files = [path for path in Path("outputs").rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path): path.read_text() for path in files}


def train(cell: str, state: str = "training", step: int | None = None) -> None:
    """Leave behind what a run does that got to its first step, and to `step`."""
    facts = {"state": state, "step": 0, "parameters": 1}
    (STUDY / cell / "run.json").write_text(json.dumps(facts))
    if step is not None:
        records = [{"step": i, "loss": 3.0, "step_seconds": 0.1} for i in range(10, step + 1, 10)]
        (STUDY / cell / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def rows(answer: Answer) -> dict[str, list[str]]:
    """The table's rows by cell."""
    assert answer.code == 0, answer.err
    table = answer.out.partition("\n\n")[0].splitlines()[3:]
    lines = [re.split(r" {2,}", line.strip()) for line in table if not line.startswith("─")]
    return {line[0]: line[1:] for line in lines}


# -- run folders -------------------------------------------------------------------------------------------------------


def test_each_cell_gets_a_run_folder_that_holds_its_config_and_expanding_again_changes_nothing(sweep: Run) -> None:
    assert sweep().code == 0
    before = contents()
    configs = [f"{STUDY}/{cell}/config.toml" for cell in CELLS]
    assert sorted(before) == sorted([*configs, f"{STUDY}/sweep.json"])
    times = [Path(name).stat().st_mtime_ns for name in configs]
    assert sweep().code == 0
    assert contents() == before
    assert [Path(name).stat().st_mtime_ns for name in configs] == times


def test_sweep_json_lists_the_cells_and_their_cost(sweep: Run) -> None:
    sweep('[sweep]\ndescription = "which?"\n' + AXES)
    facts = json.loads((STUDY / "sweep.json").read_text())
    assert (facts["name"], facts["description"], facts["file"]) == ("study", "which?", "study.toml")
    assert [cell["name"] for cell in facts["cells"]] == CELLS
    assert [cell["axes"] for cell in facts["cells"]] == [{"num_householder": n, "seed": s} for n in (1, 2) for s in (1, 2)]
    assert len({cell["identity"] for cell in facts["cells"]}) == 4
    for cell in facts["cells"]:
        assert cell["tokens"] == 1_000_448  # 1M in whole steps of 512
        assert cell["flops"] == cell["flops_per_token"] * cell["tokens"]


def test_more_values_of_an_axis_add_cells_to_those_that_were_trained(sweep: Run) -> None:
    sweep()
    train("nh1-s1", "finished")
    before = contents()
    assert sweep(AXES.replace("seed = [1, 2]", "seed = [1, 2, 3]")).code == 0
    listing = f"{STUDY}/sweep.json"
    assert {name: text for name, text in contents().items() if name in before} | {listing: ""} == before | {listing: ""}
    assert len(json.loads((STUDY / "sweep.json").read_text())["cells"]) == 6


def test_what_is_cut_off_or_was_changed_in_the_file_before_any_training_is_written_anew(sweep: Run) -> None:
    sweep(AXES + "[model]\nnum_heads = 8\n")
    assert sweep().code == 0
    whole = contents()
    for cell in CELLS:
        assert load_config(["--config", str(STUDY / cell / "config.toml")]).config.model.num_heads == 4
    (STUDY / "nh1-s1" / "config.toml").write_text(whole[f"{STUDY}/nh1-s1/config.toml"][:100])  # cut off by a kill
    assert sweep().code == 0
    assert contents() == whole


def test_a_sweep_that_was_moved_trains_where_it_is_now(sweep: Run) -> None:
    sweep()
    STUDY.rename("outputs/other")
    assert sweep('[sweep]\nname = "other"\n' + AXES).code == 0
    for cell in CELLS:
        job = load_config(["--config", f"outputs/other/{cell}/config.toml"]).config.job
        assert job.dump_folder == "outputs/other"


# -- folders that are not the sweep's to change ------------------------------------------------------------------------


def check_refused(answer: Answer, *said: str) -> None:
    """Exit code 2, one line, nothing on stdout."""
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("error: ")
    assert answer.err.count("\n") == 1
    for part in said:
        assert part in answer.err


CELL = STUDY / "nh1-s1"


def edit(path: Path) -> None:
    path.write_text(path.read_text().replace("warmup_steps = ", "warmup_steps = 1"))


OTHER = AXES + "[model]\nnum_heads = 8\n"
# what has happened to a cell, the sweep that is given next, and what is said
IN_THE_WAY: dict[str, tuple[Callable[[], object], str, tuple[str, ...]]] = {
    "training": (lambda: train("nh1-s1", step=20), OTHER, ("model.num_heads was 4, is now 8", "give this sweep another")),
    "its config is cut off": (
        lambda: (train("nh1-s1"), (CELL / "config.toml").write_text("[model]\nhidden_")),
        AXES,
        ("its config.toml cannot be read",),
    ),
    "run.json is cut off": (lambda: (CELL / "run.json").write_text('{"state": "trai'), AXES, ("/run.json",)),
    "somebody has changed its config": (
        lambda: edit(CELL / "config.toml"),
        AXES,
        ("config.toml is not what this sweep wrote, and would be overwritten; give this sweep",),
    ),
    "it is not named any more": (
        lambda: train("nh1-s1", "finished"),
        '[sweep]\nname = "study"\n[sweep.axes]\nlr = [1e-3]\n',
        ("was trained and study.toml does not name it", "put the cell back"),
    ),
}


@pytest.mark.parametrize("case", IN_THE_WAY)
def test_a_folder_that_was_trained_otherwise_is_refused_and_nothing_is_written(case: str, sweep: Run) -> None:
    happens, text, said = IN_THE_WAY[case]
    sweep()
    happens()
    before = contents()
    check_refused(sweep(text), f"{STUDY}/nh1-s1", *said)
    assert contents() == before


def test_a_cell_that_is_training_is_not_rewritten_though_it_has_not_reached_its_first_step(sweep: Run) -> None:
    sweep()
    before = contents()
    with closing(RunLock(CELL)):
        check_refused(sweep(OTHER), f"{STUDY}/nh1-s1")
    assert contents() == before


def test_cells_that_are_gone_before_any_training_leave_no_folder_unless_somebody_has_touched_it(sweep: Run) -> None:
    sweep()
    (STUDY / "nh1-s1/notes.md").write_text("mine")
    edit(STUDY / "nh1-s2/config.toml")
    for name in (".lock", ".slot", ".config.toml.tmp"):  # of launches that were killed
        (STUDY / "nh2-s1" / name).touch()
    before = contents()
    assert sweep("[sweep.axes]\nnum_householder = [2]\nseed = [2]\n").code == 0
    assert sorted(path.name for path in STUDY.iterdir() if path.is_dir()) == ["nh1-s1", "nh1-s2", "nh2-s2"]
    kept = {name: text for name, text in before.items() if "/nh1-" in name}
    assert kept.items() <= contents().items()


def test_while_a_launch_is_at_work_the_table_is_shown_and_nothing_is_written_or_launched(sweep: Run) -> None:
    sweep()
    before = contents()
    with closing(RunLock(STUDY)):
        assert sweep("[sweep.axes]\nseed = [7]\n").code == 0
        second = sweep(AXES, "--launch", "local")
    assert second.code == 1
    assert f"another process is at work on this sweep ({STUDY}); titan-dp sweep study.toml shows how far it is" in second.err
    assert contents() == before


def test_a_refused_sweep_writes_nothing(sweep: Run, tmp_path: Path) -> None:
    check_refused(sweep("[sweep.axes]\nnum_householder = [1, 1]\n"), "same configuration")
    check_refused(sweep("[sweep.axes]\nnum_househodler = [1]\n"), "did you mean num_householder?")
    check_refused(sweep(AXES + '[job]\ndump_folder = "base.toml"\n'), "base.toml/study cannot be a folder")
    assert not (tmp_path / "outputs").exists()


WRONG_OPTIONS = [
    "--mfu 1.5",
    "--peak-tflops 0",
    "--at-once 0",
    "--nproc 0",
    "--retries -1",
    "--launch kubernetes",
    "--sbatch '",
]


@pytest.mark.parametrize("words", WRONG_OPTIONS)
def test_wrong_options_are_the_users_mistake(words: str, sweep: Run, tmp_path: Path) -> None:
    answer = sweep(AXES, *words.split())
    assert (answer.code, answer.out) == (2, "")
    assert words.split()[-1] in answer.err
    assert not (tmp_path / "outputs").exists()


# -- the table ---------------------------------------------------------------------------------------------------------


def test_the_table_says_what_each_cell_is_and_costs(sweep: Run) -> None:
    table = rows(sweep(AXES, "--mfu", "0.5", "--peak-tflops", "2e-3"))  # 1 GFLOP/s
    assert list(table) == [*CELLS, "all"]
    cells = {cell["name"]: cell for cell in json.loads((STUDY / "sweep.json").read_text())["cells"]}
    for name in CELLS:
        state, model, shape, parameters, tokens, flops, hours = table[name]
        assert state == "new"
        assert model == ("DeltaNet" if name.startswith("nh1") else "DeltaProduct_2")
        assert shape == "3 x 128, 4 x 32, 384"
        assert (parameters, tokens) == (short(cells[name]["parameters"]), "1M")
        assert flops == short(cells[name]["flops"])
        assert float(hours.replace(",", "")) == pytest.approx(cells[name]["flops"] / 1e9 / 3600, rel=5e-3)
    total = sum(cell["flops"] for cell in cells.values())
    assert table["all"][-2] == short(total)
    assert float(table["all"][-1].replace(",", "")) == pytest.approx(total / 1e9 / 3600, rel=5e-3)


def test_the_table_says_how_far_each_cell_is(sweep: Run) -> None:
    sweep()
    train("nh1-s1", "finished", step=1954)
    train("nh1-s2", "training", step=1230)
    train("nh2-s1", "training", step=40)
    with (STUDY / "nh1-s2/metrics.jsonl").open("a") as file:
        file.write('{"step": 1240, "lo')  # cut off by a kill
    with closing(RunLock(STUDY / "nh2-s1")):
        answer = sweep(AXES, "--mfu", "1", "--peak-tflops", "1e-3")
    states = {cell: row[0] for cell, row in rows(answer).items()}
    assert [states[cell] for cell in CELLS] == ["finished", "step 1,230", "running", "new"]
    assert states["all"] == "1 finished"
    left = re.search(r"; ([\d.,]+) are left", answer.out)
    assert left
    cells = json.loads((STUDY / "sweep.json").read_text())["cells"]
    wanted = sum(cell["flops"] for cell in cells[1:]) / 1e9 / 3600
    assert float(left[1].replace(",", "")) == pytest.approx(wanted, rel=5e-3)


# -- --launch print ----------------------------------------------------------------------------------------------------


def commands(answer: Answer) -> list[list[str]]:
    assert (answer.code, answer.err) == (0, "")
    return [shlex.split(line) for line in answer.out.splitlines()]


def test_print_prints_one_command_per_unfinished_cell_and_nothing_else(sweep: Run) -> None:
    printed = commands(sweep(AXES, "--launch", "print"))
    assert printed == [["titan-dp", "train", "--nproc", "1", "--config", f"{STUDY}/{cell}/config.toml"] for cell in CELLS]
    assert all(Path(command[-1]).is_file() for command in printed)
    train("nh1-s1", "finished")
    train("nh2-s1", "training", step=10)
    names = [Path(command[-1]).parent.name for command in commands(sweep(AXES, "--launch", "print"))]
    assert names == ["nh1-s2", "nh2-s1", "nh2-s2"]


def test_printed_commands_start_several_processes_by_torchrun_and_survive_the_shell(sweep: Run) -> None:
    answer = sweep(AXES + '[job]\ndump_folder = "my outputs"\n', "--launch", "print", "--nproc", "4")
    torchrun = ["titan-dp", "train", "--nproc", "4", "--config"]
    assert commands(answer) == [[*torchrun, f"my outputs/study/{cell}/config.toml"] for cell in CELLS]


def test_chosen_cells_alone_are_launched(sweep: Run) -> None:
    answer = sweep(AXES, "--launch", "print", "--cells", "nh1-*", "nh2-s2")
    assert [Path(command[-1]).parent.name for command in commands(answer)] == ["nh1-s1", "nh1-s2", "nh2-s2"]
    assert list(rows(sweep(AXES, "--cells", "nh1-*"))) == [*CELLS, "all"]  # the table has them all


def test_a_chosen_branch_comes_with_its_trunk(sweep: Run) -> None:
    printed = commands(sweep(BRANCHES, "--launch", "print", "--cells", "steps50"))
    assert [Path(command[-1]).parent.name for command in printed] == ["steps100", "steps50"]


def test_a_choice_of_no_cell_is_refused_before_anything_is_written(sweep: Run, tmp_path: Path) -> None:
    answer = sweep(AXES, "--cells", "nh1-*", "nh3-s1")
    assert (answer.code, answer.out) == (2, "")
    assert "--cells 'nh3-s1': study.toml has no such cell; did you mean nh" in answer.err
    assert not (tmp_path / "outputs").exists()


def test_a_sweep_of_word_problems_is_reported_by_their_own_report(sweep: Run) -> None:
    words = 'data.source = "state_tracking"\nstate_tracking.task = "S3"\nmodel.vocab_size = 8\n'
    assert "titan-dp state-tracking report outputs/study" in " ".join(sweep(words + AXES).out.split())


# -- branches ----------------------------------------------------------------------------------------------------------

LENGTHS = '{}[sweep.axes]\n"training.steps" = [50, 100]\n[lr_scheduler]\ndecay_ratio = 0.2\n'
BRANCHES = LENGTHS.format("[sweep]\nbranch = true\n")


def test_the_table_counts_what_branches_share_once_and_says_what_that_saves(sweep: Run) -> None:
    answer = sweep(BRANCHES)
    assert answer.code == 0, answer.err
    cells = json.loads((STUDY / "sweep.json").read_text())["cells"]
    short_one, long_one = cells
    assert (short_one["tokens"], short_one["own_tokens"]) == (50 * 512, 10 * 512)
    assert long_one["own_tokens"] == long_one["tokens"] == 100 * 512
    per_token = long_one["flops_per_token"]
    found = rows(answer)
    assert [found[cell][-1] for cell in ("steps50", "steps100", "all")] == [short(n * 512 * per_token) for n in (10, 100, 110)]
    assert f"{short(110 * 512 * per_token)} FLOPs instead of {short(150 * 512 * per_token)}: 27% saved" in answer.out
    assert "branches: 1 cell from 1 trunk" in answer.out


def test_commands_of_trunks_are_printed_before_those_of_their_branches(sweep: Run) -> None:
    printed = [command[-1] for command in commands(sweep(BRANCHES, "--launch", "print"))]
    assert printed == [str(STUDY / cell / "config.toml") for cell in ("steps100", "steps50")]


def test_a_sweep_is_given_branches_after_it_was_written_and_what_is_trained_stays(sweep: Run) -> None:
    sweep(LENGTHS.format(""))
    train("steps100", "finished")
    answer = sweep(BRANCHES)
    assert answer.code == 0, answer.err
    branch = load_config(["--config", str(STUDY / "steps50/config.toml")]).config.checkpoint
    assert branch.branch_from == str(STUDY / "steps100/checkpoint/step-00000040")
    assert rows(answer)["steps100"][0] == "finished"
    assert load_config(["--config", str(STUDY / "steps100/config.toml")]).config.checkpoint.keep_steps == [40]
