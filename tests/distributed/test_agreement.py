"""Ranks that agree before the first step, and leave alike where they do not."""

from __future__ import annotations

import argparse
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed.harness import run_ranks
from tests.pretrained import save_checkpoint
from tests.processes import run_script_in_ranks
from titan_dp.config.load import load_config
from titan_dp.errors import RunError, UserError
from titan_dp.faults import agreement
from titan_dp.faults.agreement import agree, code, on_main, settings_of, together

REMEDY = "every rank needs the same command, settings, code, libraries and data: make them equal and start all of them again"


class Collectives(TorchDispatchMode):
    """Names of the collectives of this thread, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.names.append(func._schema.name.removeprefix("c10d::"))
        return func(*args, **(kwargs or {}))


def outcome(*arguments: Any, **named: Any) -> tuple[str, str]:
    """The kind and text of what `agree` raises on this rank; its sentences otherwise."""
    try:
        return "agreed", "; ".join(agree(*arguments, **named))
    except Exception as error:
        return type(error).__name__, str(error)


def all_that_a_run_compares(folder: Path, config: Path) -> list[str]:
    equal, by_rank = settings_of(load_config(["--config", str(config)]).config)
    with Collectives() as collectives:
        assert agree(equal | code(), lambda: {"fingerprint": "f" * 64}, by_rank=by_rank, folder=folder) == []
    return collectives.names


def test_equal_ranks_with_a_shared_folder_need_one_collective_and_leave_nothing(tiny_config: Path) -> None:
    folder = tiny_config.parent / "run"
    folder.mkdir()
    assert run_ranks(4, all_that_a_run_compares, folder, tiny_config) == [["allgather_"]] * 4
    assert list(folder.iterdir()) == []


def facts_by_rank(values: list[dict[str, object]], found: bool) -> tuple[str, str]:
    own = values[dist.get_rank()]
    return outcome({}, lambda: own) if found else outcome(own)


@pytest.mark.parametrize("found", [False, True], ids=["known at once", "found while preparing"])
def test_the_first_difference_is_named_with_its_values_and_their_ranks(found: bool) -> None:
    same = {"optimizer.lr": 0.001, "debug.seed": None, "torch": "2.13.0"}
    values = [same, same | {"debug.seed": 7, "torch": "2.12.0"}, same, same]
    said = f"ranks disagree on debug.seed: unset on ranks 0, 2 and 3, 7 on rank 1 (and on 1 more: torch); {REMEDY}"
    assert run_ranks(4, facts_by_rank, values, found) == [("UserError", said)] * 4


def what_may_differ() -> tuple[str, str]:
    return outcome({"a": 1}, by_rank={"data.path": f"/scratch/{min(dist.get_rank(), 1)}/corpus", "validation.path": "v"})


def test_what_may_differ_by_rank_is_told() -> None:
    said = 'data.path: "/scratch/0/corpus" on rank 0, "/scratch/1/corpus" on ranks 1 and 2'
    assert run_ranks(3, what_may_differ) == [("agreed", said)] * 3


def failing_alone(kind: type[Exception], *arguments: object) -> tuple[str, str]:
    def prepare() -> dict[str, object]:
        if dist.get_rank() == 1:
            raise kind(*arguments)
        return {}

    return outcome({}, prepare)


@pytest.mark.parametrize(
    ("error", "others"),
    [
        ((UserError, "no shards"), "UserError"),
        ((RunError, "busy"), "RunError"),
        ((PermissionError, 13, "Permission denied"), "PermissionError"),
        ((KeyError, "ours"), "RunError"),
    ],
    ids=["the user's", "the run's", "the machine's", "ours"],
)
def test_what_one_rank_fails_at_is_what_all_leave_with(error: tuple, others: str) -> None:
    first, second, third = run_ranks(3, failing_alone, *error)
    assert first == third
    assert (first[0], second[0]) == (others, error[0].__name__)
    assert "rank 1: " in first[1]
    assert str(error[-1]) in first[1]


def own_folder(folder: Path) -> tuple[str, str]:
    agreement.SECONDS_TO_SEE_PROBE = 0.2
    own = folder / str(dist.get_rank())
    own.mkdir()
    return outcome({}, folder=own)


def test_a_run_folder_that_is_not_shared_is_refused_on_all_ranks_and_left_as_it_was(tmp_path: Path) -> None:
    said = (
        f"job.dump_folder must be one folder for all ranks, but what rank 0 wrote to {tmp_path}/0 is not there for ranks 1 "
        f"and 2, in {tmp_path}/1; name a folder that all nodes share"
    )
    assert run_ranks(3, own_folder, tmp_path) == [("UserError", said)] * 3
    assert list(tmp_path.glob("*/*")) == []


def late_folder(folder: Path) -> tuple[str, str]:
    if dist.get_rank() == 0:
        return outcome({}, folder=folder)
    view = folder.with_name("view")
    threading.Timer(0.3, view.symlink_to, [folder]).start()
    return outcome({}, folder=view)


def test_a_file_system_that_shows_the_folder_late_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert run_ranks(2, late_folder, tmp_path / "run") == [("agreed", "")] * 2


def main_and_together() -> tuple[object, ...]:
    rank = dist.get_rank()

    def fail() -> None:
        raise UserError(f"no, says rank {rank}")

    results: list[object] = [on_main(lambda: rank), together(lambda: rank)]
    for call in (lambda: on_main(fail), lambda: together(fail if rank == 1 else lambda: None)):
        with pytest.raises(UserError) as caught:
            call()
        results.append(str(caught.value))
    return tuple(results)


def test_rank_0_speaks_for_all_and_all_fail_together() -> None:
    said = "no, says rank 0"
    assert run_ranks(2, main_and_together) == [
        (0, 0, said, "rank 1: no, says rank 1"),
        (0, 1, said, "no, says rank 1"),
    ]


def test_versions_and_sources_are_compared() -> None:
    facts = code()
    assert {"python", "torch", "triton", "numpy"} <= facts.keys()
    for file in ("titan_dp/train/optim.py", "titan_dp/data/order.py", "deltaproduct_kernels/chunked.c"):
        assert f"the source file {file}" in facts


# -- whole runs --------------------------------------------------------------------------------------------------------

DIFFERENT = [
    ("optimizer.lr", "0.1"),
    ("model.norm_eps", "0.001"),
    ("data.document_boundaries", "carry"),
    ("training.global_batch_size", "5"),
    ("parallelism.data_parallel_replicate_degree", "2"),
    ("job.run_name", "other"),
    ("checkpoint.resume", "false"),
]


def start_with_another(config: Path, keys: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """For each key: how a start ends whose second rank has another value."""
    from titan_dp.distributed import current_world
    from titan_dp.train.trainer import Trainer

    ends = []
    for key, value in keys:
        other = [f"--{key}", value] if dist.get_rank() == 1 else []
        try:
            Trainer(load_config(["--config", str(config), *other]), current_world())
        except Exception as error:
            ends.append((type(error).__name__, str(error).partition(":")[0]))
    return ends


def test_a_setting_that_differs_is_refused_by_its_key_before_anything_is_built(tiny_config: Path) -> None:
    wanted = [("UserError", f"ranks disagree on {key}") for key, _ in DIFFERENT]
    assert run_ranks(2, start_with_another, tiny_config, DIFFERENT) == [wanted] * 2


def start_on_other_data(config: Path, name: str, paths: list[str]) -> tuple[str, str]:
    from titan_dp.distributed import current_world
    from titan_dp.train.trainer import Trainer

    path = paths[dist.get_rank()]
    settings = ["--config", str(config), "--job.run_name", name, "--data.path", path, "--validation.enable=false"]
    try:
        return "agreed", "; ".join(Trainer(load_config(settings), current_world()).differing)
    except Exception as error:
        return type(error).__name__, str(error)


def test_copies_of_the_data_may_lie_elsewhere_on_each_node_but_must_be_the_same(
    tiny_config: Path, shards: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    copy.symlink_to(shards / "train")
    same = run_ranks(2, start_on_other_data, tiny_config, "same", [str(shards / "train"), str(copy)])
    assert same == [("agreed", f'data.path: "{shards}/train" on rank 0, "{copy}" on rank 1')] * 2
    others = [str(shards / "train"), str(shards / "validation")]
    kind, said = run_ranks(2, start_on_other_data, tiny_config, "others", others)[1]
    assert kind == "UserError"
    assert said.startswith("ranks disagree on the fingerprint of the training data: ")
    none = run_ranks(2, start_on_other_data, tiny_config, "none", [str(shards / "train"), "nowhere"])
    assert [kind for kind, _ in none] == ["UserError"] * 2
    assert none[0][1].startswith("rank 1: there are no token shards in 'nowhere'")


def check_the_data(config: Path, paths: list[str]) -> tuple[str, str]:
    """What the check of the data's contents ends with, once it has read everything."""
    from titan_dp.distributed import current_world
    from titan_dp.train.trainer import Trainer

    path, name = paths[dist.get_rank()], Path(paths[1]).name
    settings = ["--config", str(config), "--job.run_name", name, "--data.path", path, "--validation.enable=false"]
    trainer = Trainer(load_config(settings), current_world())
    trainer.task.watch_data(trainer.run_folder)
    if trainer.task.shard_check is not None:  # type: ignore[attr-defined]
        trainer.task.shard_check.wait()  # type: ignore[attr-defined]
    try:
        trainer.task.check_data()
    except Exception as error:
        return type(error).__name__, str(error)
    return "good", str(trainer.task.shard_check is not None)  # type: ignore[attr-defined]


def test_data_on_the_disk_of_each_node_is_checked_there_and_shared_data_once(
    tiny_config: Path, shards: Path, tmp_path: Path
) -> None:
    shared, copy = str(shards / "train"), tmp_path / "copy"
    assert run_ranks(2, check_the_data, tiny_config, [shared, shared]) == [("good", "True"), ("good", "False")]
    shutil.copytree(shared, copy)
    shard = copy / "shard-00000.npy"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\0")
    first, second = run_ranks(2, check_the_data, tiny_config, [shared, str(copy)])
    assert first[0] == second[0] == "UserError"
    assert first[1] == f"rank 1: {second[1]}"
    assert second[1].startswith(f"{shard} is not what was prepared")


def evaluate(folder: Path, checkpoints: list[Path]) -> tuple[object, object]:
    """What this rank loads, and the results it finds in a folder of its own."""
    from rich.console import Console

    from titan_dp.distributed import current_world
    from titan_dp.evals.session import Result, Session

    rank = dist.get_rank()
    args = argparse.Namespace(out=folder / str(rank), overwrite=False, dtype="float32", backend="auto", tokenizer="")
    opened = Session(args, current_world(), Console(quiet=True))
    agreement.SECONDS_TO_SEE = 0.2
    try:
        source = opened.load(checkpoints[rank]).source
        result = Result(opened, "length", source, {})
        found = result.results or None
        if found is None:
            result.finish({"loss": 1.5})
        return source.path.name, found
    except Exception as error:
        return type(error).__name__, str(error)


def test_an_evaluation_is_of_the_checkpoint_that_rank_0_takes_and_done_when_rank_0_finds_it_done(tmp_path: Path) -> None:
    short, long, other = (tmp_path / name / "run" for name in ("short", "long", "other"))
    save_checkpoint(short)
    shutil.copytree(short, long)
    save_checkpoint(long, step=9)
    save_checkpoint(other, seed=1)
    assert run_ranks(2, evaluate, tmp_path, [short, long]) == [("step-00000007", None)] * 2
    assert not (tmp_path / "1").exists()
    assert run_ranks(2, evaluate, tmp_path, [short, long]) == [("step-00000007", {"loss": 1.5})] * 2, "not on one rank alone"
    assert [end[0] for end in run_ranks(2, evaluate, tmp_path, [long, short])] == ["RunError"] * 2
    ends = run_ranks(2, evaluate, tmp_path, [short, other])
    assert ends[0] == ends[1]
    assert str(ends[0][1]).startswith("ranks disagree on checkpoint of what is evaluated")


def train_where_rank_0_fails(config: Path, when: str) -> tuple[str, str]:
    """Three steps; rank 0 alone opens the log, and writes run.json, and fails at one of them."""
    from titan_dp.distributed import current_world
    from titan_dp.train import trainer

    def full(folder: Path, facts: dict[str, Any]) -> None:
        if facts["state"] == "finished":
            raise OSError(28, "No space left on device")
        write_run(folder, facts)

    settings = ["--job.run_name", when, "--training.steps", "3", "--validation.enable=false", "--generate.enable=false"]
    settings += ["--metrics.enable_wandb"] if when == "opening the log" else []
    write_run, trainer.write_run = trainer.write_run, full
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "wandb", None)  # not installed
            trainer.Trainer(load_config(["--config", str(config), *settings]), current_world()).train()
    except Exception as error:
        return type(error).__name__, str(error)
    finally:
        trainer.write_run = write_run
    return "finished", ""


@pytest.mark.parametrize(("when", "kind"), [("opening the log", "UserError"), ("writing the end", "OSError")])
def test_what_rank_0_alone_writes_fails_on_all_ranks(tiny_config: Path, when: str, kind: str) -> None:
    ends = run_ranks(2, train_where_rank_0_fails, tiny_config, when)
    assert [end[0] for end in ends] == [kind] * 2, ends


@pytest.mark.parametrize("key", ["optimizer.lr", "optimizer.rate"], ids=["another value", "no such key"])
def test_two_nodes_with_other_commands_both_leave_with_2(tiny_config: Path, tmp_path: Path, root: Path, key: str) -> None:
    command = (root / "train.py", "--config", tiny_config)
    log, nodes = tmp_path / "log", {"GROUP_WORLD_SIZE": "2"}
    assert run_script_in_ranks(2, *command, log=log, env=nodes, last=[f"--{key}", "0.1"]) == [2, 2], log.read_text()
    said = [line for line in log.read_text().splitlines() if "error" in line]
    assert len(said) == 2
    assert all(key in line for line in said), said
    assert "Traceback" not in log.read_text()
