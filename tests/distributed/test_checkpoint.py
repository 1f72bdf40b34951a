"""Tensors through a checkpoint: bit-equal on any number of ranks, whatever training does meanwhile, whatever fails."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.harness import run_ranks
from tests.distributed.helpers import TINY, backward, full_state, optimizer_of, sharded_model
from tests.processes import SERVER
from titan_dp import config
from titan_dp.checkpoint import saver as checkpointer_module
from titan_dp.checkpoint.manifest import committed_steps, read_manifest, step_folder, verify, write_manifest
from titan_dp.checkpoint.saver import Checkpointer
from titan_dp.checkpoint.weights import load_model_weights
from titan_dp.distributed import distributed, local_tensor
from titan_dp.errors import UserError
from titan_dp.faults import agreement
from titan_dp.model.transformer import build_model
from titan_dp.train.muon import Muon

META = {
    "config": "[model]\n",
    "fingerprint": "f",
    "global_batch_size": 2,
    "seed": 0,
    "tokens": 0,
    "tokenizer": "bytes",
    "loader": {"samples": 0},
}


def trained(replicate: int, name: str = "AdamW"):  # type: ignore[no-untyped-def]
    """A model and optimizers after two steps."""
    model = sharded_model(replicate)
    optimizers = optimizer_of(model, name=name)
    for seed in range(2):
        take_step(model, optimizers, seed)
    return model, optimizers


def take_step(model, optimizers, seed: int, before_update: Callable[[], object] = lambda: None) -> None:  # type: ignore[no-untyped-def]
    backward(model, seed)
    before_update()
    optimizers.step(torch.zeros(()))
    optimizers.zero_grad()


def full_moments(optimizers) -> list[torch.Tensor]:  # type: ignore[no-untyped-def]
    """Whole moments and step counts in parameter order."""
    tensors = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                for _, value in sorted(optimizer.state[parameter].items()):
                    tensors.append((value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone())
    return tensors


def save(folder: Path, replicate: int, mode: str, name: str):  # type: ignore[no-untyped-def]
    """Save, then go on training at once; returns what must have been saved and the loss of the step after."""
    model, optimizers = trained(replicate, name)
    checkpointer = Checkpointer(config.Checkpoint(async_mode=mode), folder)  # type: ignore[arg-type]
    expected = full_state(model), full_moments(optimizers)
    checkpointer.save(2, model, optimizers, meta=META, healthy=True, blocking=False)
    take_step(model, optimizers, 2, before_update=checkpointer.wait_until_copied)  # as the trainer does
    checkpointer.wait()
    return *expected, full_state(model)


def load(folder: Path, replicate: int, name: str):  # type: ignore[no-untyped-def]
    """Load into a model of other first values; returns state, moments and the state a step later."""
    model = sharded_model(replicate, seed=99)
    optimizers = optimizer_of(model, name=name, lr=3e-4)
    found = Checkpointer(config.Checkpoint(), folder).load(model, optimizers, META)
    assert found is not None
    assert found[1]["step"] == 2
    assert [g["peak_lr"] for o in optimizers for g in o.param_groups] == [3e-4] * sum(len(o.param_groups) for o in optimizers)
    loaded = full_state(model), full_moments(optimizers)
    take_step(model, optimizers, 2)
    return *loaded, full_state(model)


@pytest.mark.parametrize(
    ("mode", "name", "meshes"),
    [
        ("async", "AdamW", [(1, 1), (2, 1), (4, 1), (4, 2)]),
        ("disabled", "AdamW", [(2, 1), (4, 2)]),
        ("async", "Muon", [(1, 1)]),  # Muon and AdamW side by side
    ],
)
def test_what_is_loaded_on_any_mesh_is_bit_equal_to_what_was_saved_on_another(
    tmp_path: Path, mode: str, name: str, meshes: list[tuple[int, int]]
) -> None:
    state, moments, after = run_ranks(2, save, tmp_path, 1, mode, name)[0]
    assert verify(step_folder(tmp_path / "checkpoint", 2)) == []
    for world_size, replicate in meshes:
        got_state, got_moments, got_after = run_ranks(world_size, load, tmp_path, replicate, name)[0]
        assert all(torch.equal(got_state[key], state[key]) for key in state), world_size
        assert all(torch.equal(a, b) for a, b in zip(got_moments, moments, strict=True)), world_size
        for key in after if name == "AdamW" else ():  # Muon rounds its updates to bfloat16
            torch.testing.assert_close(got_after[key], after[key], rtol=1e-5, atol=1e-6)


def random_numbers_after(folder: Path, resume: bool) -> tuple[float, float]:
    model, optimizers = trained(1)
    checkpointer = Checkpointer(config.Checkpoint(async_mode="disabled"), folder)
    rank = torch.distributed.get_rank()
    random.seed(rank if not resume else 77)
    torch.manual_seed(rank if not resume else 77)
    if resume:
        checkpointer.load(model, optimizers, META)
    else:
        checkpointer.save(1, model, optimizers, meta=META, healthy=True, blocking=True)
    return random.random(), float(torch.rand(()))


def load_on_gpus_and_draw(folder: Path) -> tuple[tuple[float, float], list[int]]:
    """The same as far as a CPU can: the generator of a GPU is asked for, and its seeds are written down."""
    on_cpus, seeds = checkpointer_module.rng_tensors, []
    with pytest.MonkeyPatch.context() as patch:
        of_gpu = {f"rng.{torch.distributed.get_rank()}.cuda": torch.zeros(16, dtype=torch.uint8)}
        patch.setattr(checkpointer_module, "rng_tensors", lambda: on_cpus() | of_gpu)
        patch.setattr(torch.cuda, "manual_seed_all", seeds.append)
        model = sharded_model(seed=99)
        seeds.clear()
        assert Checkpointer(config.Checkpoint(), folder).load(model, optimizer_of(model), META) is not None
    return (random.random(), float(torch.rand(()))), seeds


def test_random_numbers_go_on_where_each_rank_left_off_and_elsewhere_are_derived_by_rank(tmp_path: Path) -> None:
    before = run_ranks(2, random_numbers_after, tmp_path, False)
    assert run_ranks(2, random_numbers_after, tmp_path, True) == before
    assert before[0] != before[1]
    on_gpus = run_ranks(2, load_on_gpus_and_draw, tmp_path)
    assert [numbers for numbers, _ in on_gpus] == before
    seeds = [seed for _, seeds in on_gpus for seed in seeds]
    assert len(set(seeds)) == len(seeds) == 2, "a GPU's generator, which CPUs have not saved, is seeded by rank"
    derived = run_ranks(3, random_numbers_after, tmp_path, True)
    assert len({*before, *derived}) == 5
    assert run_ranks(3, random_numbers_after, tmp_path, True) == derived


def refuse(folder: Path, settings: dict, message: str) -> None:
    model, optimizers = trained(1)
    with pytest.raises(UserError, match=message):
        Checkpointer(config.Checkpoint(**settings), folder).load(model, optimizers, META)


def test_what_cannot_be_resumed_says_so(tmp_path: Path) -> None:
    run_ranks(1, save, tmp_path, 1, "disabled", "AdamW")
    run_ranks(1, refuse, tmp_path, {"resume": False}, r"checkpoint.resume = false, but .* holds step 2")
    run_ranks(1, refuse, tmp_path, {"load_step": 7}, r"step-00000007 does not exist; committed steps there: 2")
    tensors = next(step_folder(tmp_path / "checkpoint", 2).glob("*.distcp"))
    tensors.write_bytes(tensors.read_bytes()[:-1])
    run_ranks(1, refuse, tmp_path, {"load_step": 2}, "is damaged: .*distcp has")
    step_folder(tmp_path / "checkpoint", 2).joinpath("manifest.json").unlink()
    run_ranks(1, refuse, tmp_path, {"load_step": 2}, r"was cut off while it was saved .* committed steps there: none")


def resume_from_damaged(folder: Path) -> int:
    model, optimizers = trained(1)
    found = Checkpointer(config.Checkpoint(), folder).load(model, optimizers, META)
    assert found is not None
    return found[1]["step"]


def flip_a_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def test_a_damaged_checkpoint_is_set_aside_for_the_newest_good_one(tmp_path: Path) -> None:
    run_ranks(2, save_steps, tmp_path, (1, 2, 3, 4))
    folder = tmp_path / "checkpoint"
    flip_a_bit(step_folder(folder, 4) / "__1_0.distcp")
    (step_folder(folder, 3) / "__0_0.distcp").unlink()
    flip_a_bit(step_folder(folder, 2) / "manifest.json")
    assert run_ranks(2, resume_from_damaged, tmp_path) == [1, 1]
    assert sorted(path.name for path in folder.iterdir()) == [
        "step-00000001",
        *(f"step-0000000{step}.damaged" for step in (2, 3, 4)),
    ]
    flip_a_bit(step_folder(folder, 1) / ".metadata")
    for _ in range(2):  # the next start as well
        run_ranks(1, refuse, tmp_path, {}, r"every checkpoint in .* is damaged and set aside")


def save_steps(folder: Path, steps: tuple[int, ...]) -> None:
    model, optimizers = trained(1)
    checkpointer = Checkpointer(config.Checkpoint(keep_latest_k=0), folder)
    for step in steps:
        checkpointer.save(step, model, optimizers, meta=META, healthy=True, blocking=False)
    checkpointer.wait()


def go_back(folder: Path, load_step: int, save: tuple[int, ...], healthy: bool = True) -> int:
    """Resume as `--checkpoint.load_step` does, then save; returns the step resumed from."""
    model, optimizers = trained(1)
    c = config.Checkpoint(load_step=load_step, keep_latest_k=2)
    checkpointer = Checkpointer(c, folder)
    found = checkpointer.load(model, optimizers, META)
    meta = META | {"config": f"[model]\n[checkpoint]\nload_step = {load_step}\n"}
    for step in save:
        checkpointer.save(step, model, optimizers, meta=meta, healthy=healthy, blocking=True)
    assert found is not None
    return found[1]["step"]


def test_going_back_to_a_step_leaves_the_abandoned_ones_aside_and_the_same_command_goes_on(tmp_path: Path) -> None:
    run_ranks(2, save_steps, tmp_path, (5, 10, 15, 20))
    assert run_ranks(2, go_back, tmp_path, 5, (8,)) == [5, 5]
    folder = tmp_path / "checkpoint"
    assert committed_steps(folder) == [5, 8]
    assert sorted(path.name for path in folder.glob("*.abandoned")) == [f"step-000000{s}.abandoned" for s in (10, 15, 20)]
    assert run_ranks(2, go_back, tmp_path, 5, (9,), False) == [8, 8]
    assert run_ranks(2, go_back, tmp_path, 5, (11, 14)) == [8, 8], "9 is not healthy"
    assert run_ranks(2, go_back, tmp_path, 5, ()) == [14, 14]
    assert run_ranks(2, go_back, tmp_path, -1, ()) == [14, 14]


def a_save_whose_retention_fails(folder: Path) -> None:
    from titan_dp.checkpoint import saver as module

    def fails(folder: Path, keep_latest_k: int, keep_steps: list[int]) -> None:
        raise OSError(116, "Stale file handle")

    module.apply_retention, original = fails, module.apply_retention
    try:
        save_steps(folder, (1, 2))
    finally:
        module.apply_retention = original


def test_old_checkpoints_that_cannot_be_deleted_do_not_cost_the_new_one(tmp_path: Path) -> None:
    run_ranks(2, a_save_whose_retention_fails, tmp_path)
    assert committed_steps(tmp_path / "checkpoint") == [1, 2]


def save_with_faults(folder: Path, faults: dict[int, str]) -> None:
    """Save each step with its fault: "weight" and "moment" are a number of the last rank alone, "loss" the caller knows of."""
    last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
    for step, fault in faults.items():
        model, optimizers = trained(1)
        parameter = model.blocks[1].mlp.down_proj.weight
        state = next(o for o in optimizers if parameter in o.state).state[parameter]
        if last and fault == "weight":
            local_tensor(parameter.data).view(-1)[5] = float("nan")
        if last and fault == "moment":
            local_tensor(state["exp_avg_sq"]).view(-1)[-1] = float("inf")
        meta = META | ({"unhealthy": ["the loss is nan"]} if fault == "loss" else {})
        checkpointer = Checkpointer(config.Checkpoint(keep_latest_k=0), folder)
        checkpointer.save(step, model, optimizers, meta=meta, healthy=fault != "loss", blocking=True)


def test_a_checkpoint_is_healthy_only_if_weights_moments_and_losses_are_finite_on_every_rank(tmp_path: Path) -> None:
    run_ranks(2, save_with_faults, tmp_path, {1: "", 2: "weight", 3: "moment", 4: "loss"})
    manifests = [read_manifest(step_folder(tmp_path / "checkpoint", step)) for step in (1, 2, 3, 4)]
    assert [(m["healthy"], m["finite"]) for m in manifests] == [(True, True), (False, False), (False, False), (False, True)]
    name = "layers.1.mlp.down_proj.weight"
    moments = f"the optimizer's moments are not finite: state.{name}.exp_avg_sq"
    assert [m["unhealthy"] for m in manifests] == [[], [f"the weights are not finite: {name}"], [moments], ["the loss is nan"]]


def test_a_run_resumes_from_its_newest_healthy_checkpoint_and_sets_newer_ones_aside(tmp_path: Path) -> None:
    run_ranks(2, save_with_faults, tmp_path, {1: "", 2: "", 3: "loss", 4: "weight"})
    assert run_ranks(2, resume_from_damaged, tmp_path) == [2, 2]
    folder = tmp_path / "checkpoint"
    assert committed_steps(folder) == [1, 2]
    assert sorted(path.name for path in folder.glob("*.*")) == ["step-00000003.unhealthy", "step-00000004.unhealthy"]


def test_where_none_is_healthy_or_one_is_named_finite_weights_are_taken_and_others_are_refused(tmp_path: Path) -> None:
    run_ranks(1, save_with_faults, tmp_path, {1: "weight"})
    run_ranks(1, refuse, tmp_path, {}, r"no checkpoint in .* is healthy .*step-00000001: the weights are not finite")
    assert committed_steps(tmp_path / "checkpoint") == [1], "nothing is set aside for a run that does not go on"
    run_ranks(1, save_with_faults, tmp_path, {2: "loss", 3: "weight"})
    assert run_ranks(1, go_back, tmp_path, 2, ()) == [2], "checkpoint.load_step names it"
    assert run_ranks(1, resume_from_damaged, tmp_path) == [2]


def start_from(folder: Path, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_model_weights(folder, sharded_model(seed=99))


def test_weights_that_are_not_finite_are_never_trained_on(tmp_path: Path) -> None:
    run_ranks(2, save_with_faults, tmp_path, {1: "weight"})
    message = "step-00000001 cannot be trained on: the weights are not finite: layers.1.mlp.down_proj.weight"
    run_ranks(2, refuse, tmp_path, {"load_step": 1}, message)
    named = step_folder(tmp_path / "checkpoint", 1)
    run_ranks(2, start_from, named, message)
    manifest = read_manifest(named)  # as versions wrote it that did not look
    write_manifest(named, manifest | {"healthy": True, "unhealthy": [], "finite": True}, manifest.pop("files"))
    run_ranks(2, refuse, tmp_path, {}, message)


def save_and_change(folder: Path) -> None:
    model, optimizers = trained(1)
    checkpointer = Checkpointer(config.Checkpoint(), folder)
    for step in (1, 2):  # the second copies into what the first has left
        before = [local_tensor(p).detach().clone() for p in model.parameters()]
        checkpointer.save(step, model, optimizers, meta=META, healthy=True, blocking=False)
        checkpointer.wait_until_copied()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1)
        checkpointer.wait()
        checkpointer.load(model, optimizers, META)
        assert all(torch.equal(local_tensor(p), old) for p, old in zip(model.parameters(), before, strict=True))


def test_parameters_may_change_as_soon_as_they_are_copied(tmp_path: Path) -> None:
    run_ranks(2, save_and_change, tmp_path)


OTHER_ARCHITECTURES = [
    ({"num_householder": 3}, r"layers.0.attn.k_proj.weight of shape \(96, 32\) has shape \(64, 32\) there"),
    ({"num_hidden_layers": 3}, r"layers.2.*is not in it"),
    ({"num_hidden_layers": 1}, r"layers.1.*is in it, and the model has no such tensor"),
]


def other_architectures(folder: Path) -> None:
    for changes, message in OTHER_ARCHITECTURES:
        model = build_model(TINY.model_copy(update=changes))
        with pytest.raises(UserError, match=rf"another architecture: {message}"):
            load_model_weights(folder, model)
        allowed = config.Checkpoint(allow_changed=[f"model.{key}" for key in changes])
        with pytest.raises(UserError, match=rf"another architecture: {message}"):
            Checkpointer(allowed, folder).load(model, optimizer_of(model), META)


def test_weights_of_another_architecture_are_refused_by_the_tensor_that_differs_whatever_is_allowed(weights: Path) -> None:
    run_ranks(1, other_architectures, weights)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with step 2 of TINY."""
    folder = tmp_path_factory.mktemp("weights")
    run_ranks(1, save, folder, 1, "disabled", "AdamW")
    return folder


def another_optimizer(folder: Path) -> None:
    now = META | {"config": "[model]\n[optimizer]\nname = 'Muon'\n"}
    model = sharded_model(seed=99)
    optimizers = optimizer_of(model, name="Muon")
    with pytest.raises(UserError, match=r"another optimizer.name .*--checkpoint.allow_changed '\[\"optimizer.name\"\]'"):
        Checkpointer(config.Checkpoint(), folder).load(model, optimizers, now)
    found = Checkpointer(config.Checkpoint(allow_changed=["optimizer.name"]), folder).load(model, optimizers, now)
    assert found is not None
    expected = sharded_model(seed=98)
    load_model_weights(folder, expected)
    assert all(torch.equal(full_state(model)[name], tensor) for name, tensor in full_state(expected).items())
    fresh = optimizer_of(expected, name="Muon")
    for each, theirs in ((model, optimizers), (expected, fresh)):
        take_step(each, theirs, 2)
    assert all(torch.equal(full_state(model)[name], tensor) for name, tensor in full_state(expected).items())


def test_another_optimizer_takes_up_the_weights_with_moments_of_its_own_where_that_is_allowed(weights: Path) -> None:
    run_ranks(1, another_optimizer, weights)


def muon_of_an_older_version(folder: Path) -> None:
    """It took every matrix of the blocks, those of the gates too."""
    of_muon = {"config": "[model]\n[optimizer]\nname = 'Muon'\n"}
    older = sharded_model()
    named = dict(older.named_parameters())
    matrices = [p for name, p in named.items() if p.dim() == 2 and "embeddings" not in name]
    rest = [p for p in named.values() if all(p is not other for other in matrices)]
    moments: list[torch.optim.Optimizer] = [Muon(matrices), torch.optim.AdamW(rest, fused=True)]
    backward(older, 0)
    for optimizer in moments:
        optimizer.step()
    checkpointer = Checkpointer(config.Checkpoint(async_mode="disabled"), folder)
    checkpointer.save(1, older, moments, meta=META | of_muon, healthy=True, blocking=True)

    model = sharded_model(seed=99)
    optimizers = optimizer_of(model, name="Muon")
    lacks = r"step 1 lacks optimizer.state.layers.0.attn.a_proj.weight.exp_avg and \d+ more: optimizer.name = 'Muon' took other"
    with pytest.raises(UserError, match=lacks + r".*--checkpoint.allow_changed '\[\"optimizer.name\"\]'"):
        Checkpointer(config.Checkpoint(), folder).load(model, optimizers, META | of_muon)
    optimizers = optimizer_of(model, name="Muon")
    allowed = config.Checkpoint(allow_changed=["optimizer.name"])
    assert Checkpointer(allowed, folder).load(model, optimizers, META | of_muon) is not None
    assert all(torch.equal(full_state(model)[name], tensor) for name, tensor in full_state(older).items())
    fresh = optimizer_of(older, name="Muon")
    for each, theirs in ((model, optimizers), (older, fresh)):
        theirs.zero_grad()
        take_step(each, theirs, 2)
    assert all(torch.equal(full_state(model)[name], tensor) for name, tensor in full_state(older).items())


def test_moments_of_a_muon_that_took_other_parameters_are_refused_or_begun_anew(tmp_path: Path) -> None:
    run_ranks(1, muon_of_an_older_version, tmp_path)


def save_on_a_full_disk(folder: Path, mode: str) -> None:
    """A good save, then one that does not fit, then one that does again."""
    model, optimizers = trained(1)
    checkpointer = Checkpointer(config.Checkpoint(async_mode=mode), folder)  # type: ignore[arg-type]

    def save(step: int) -> None:
        checkpointer.save(step, model, optimizers, meta=META, healthy=True, blocking=False)
        checkpointer.wait()

    save(1)
    filler = folder / "filler"
    if torch.distributed.get_rank() == 0:
        with pytest.raises(OSError, match="No space"), filler.open("wb") as file:
            while True:
                file.write(bytes(65536))
                file.flush()
    torch.distributed.barrier()
    with pytest.raises(
        OSError, match=r"step-00000002 could not be written: No space left.*newest committed checkpoint is step 1"
    ):
        save(2)
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        assert committed_steps(folder / "checkpoint") == [1]
        assert verify(step_folder(folder / "checkpoint", 1)) == []
        filler.unlink()
    torch.distributed.barrier()
    save(2)
    assert committed_steps(folder / "checkpoint") == [1, 2]


@pytest.mark.parametrize("mode", ["async", "disabled"])
def test_a_full_disk_is_one_clear_message_on_every_rank_and_harms_nothing(tmp_path: Path, mode: str) -> None:
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path)], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"needs the right to mount a small tmpfs: {mount.stderr.strip()}")
    try:
        run_ranks(2, save_on_a_full_disk, tmp_path, mode)
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def save_forever(folder: Path) -> None:
    with distributed(config.Comm()):
        model, optimizers = trained(1)
        checkpointer = Checkpointer(config.Checkpoint(keep_latest_k=2), folder)
        for step in range(1, 100_000):
            checkpointer.save(step, model, optimizers, meta=META, healthy=True, blocking=False)


def test_a_kill_at_any_moment_leaves_only_whole_checkpoints(tmp_path: Path) -> None:
    """Saves as fast as it can, so that kills hit writing, committing and retention alike."""
    folder = tmp_path / "checkpoint"
    rng = random.Random(0)
    for _ in range(3):
        process = SERVER.Process(target=save_forever, args=(tmp_path,))
        process.start()
        before = set(committed_steps(folder))
        while len(set(committed_steps(folder)) - before) < 2:  # as many as retention keeps: it has been at work
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(0.1 * rng.random())
        process.kill()
        process.join()
        committed = committed_steps(folder)
        assert committed
        assert all(verify(step_folder(folder, step)) == [] for step in committed)


# -- what another rank wrote and this one does not see -----------------------------------------------------------------


def end_of(action) -> tuple[str, str]:  # type: ignore[no-untyped-def]
    try:
        return "done", str(action())
    except Exception as error:
        return type(error).__name__, str(error)


def save_where_rank_0_does_not_see(folder: Path, shown_after: float | None) -> tuple[str, str]:
    """Rank 1 writes elsewhere, as on a disk of its own; its files come to rank 0 after so many seconds, or never."""
    agreement.SECONDS_TO_SEE = 0.3 if shown_after is None else 30
    rank = torch.distributed.get_rank()
    model, optimizers = trained(1)
    own = folder / str(rank)
    checkpointer = Checkpointer(config.Checkpoint(async_mode="disabled"), own)

    def show() -> None:
        (step_folder(own / "checkpoint", 1) / "__1_0.distcp").rename(step_folder(folder / "0/checkpoint", 1) / "__1_0.distcp")

    if rank == 1 and shown_after is not None:

        def later(*args: object) -> Any:
            threading.Timer(shown_after, show).start()
            return gather(*args)

        gather, checkpointer_module.gather = checkpointer_module.gather, later  # type: ignore[assignment]
    return end_of(lambda: checkpointer.save(1, model, optimizers, meta=META, healthy=True, blocking=True))


def test_a_commit_waits_for_files_of_other_ranks_and_without_them_there_is_none(tmp_path: Path) -> None:
    assert run_ranks(2, save_where_rank_0_does_not_see, tmp_path / "late", 0.3) == [("done", "None")] * 2
    assert committed_steps(tmp_path / "late/0/checkpoint") == [1]
    ends = run_ranks(2, save_where_rank_0_does_not_see, tmp_path / "never", None)
    assert ends[0] == ends[1]
    kind, said = ends[0]
    assert kind == "RunError"
    assert re.search(
        r"step-00000001 is not committed: rank 0 on \S+ does not see 1 of 3 files: __1_0.distcp, [\d,]+ bytes", said
    )
    assert committed_steps(tmp_path / "never/0/checkpoint") == []


def load_where_rank_1_looks_elsewhere(folder: Path, shown_after: float | None, settings: dict) -> tuple[str, str]:
    """Rank 1 sees the run folder under another name, which appears after so many seconds, or never."""
    agreement.SECONDS_TO_SEE = 0.3 if shown_after is None else 30
    model, optimizers = trained(1)
    if torch.distributed.get_rank() == 1:
        view = folder.with_name(f"view-{shown_after}-{len(settings)}")
        if shown_after is not None:
            threading.Timer(shown_after, view.symlink_to, [folder]).start()
        folder = view
    checkpointer = Checkpointer(config.Checkpoint(**settings), folder)
    return end_of(lambda: checkpointer.load(model, optimizers, META)[1]["step"])  # type: ignore[index]


@pytest.mark.parametrize("settings", [{}, {"load_step": 2}], ids=["the newest", "load_step"])
def test_a_rank_that_does_not_see_the_checkpoint_yet_waits_or_all_leave_alike(tmp_path: Path, settings: dict) -> None:
    run_ranks(2, save_steps, tmp_path / "run", (1, 2))
    assert run_ranks(2, load_where_rank_1_looks_elsewhere, tmp_path / "run", 0.3, settings) == [("done", "2")] * 2
    first, second = run_ranks(2, load_where_rank_1_looks_elsewhere, tmp_path / "run", None, settings)
    assert (first[0], second[0]) == ("RunError", "RunError")
    assert first[1].startswith("rank 1: this rank has waited for .metadata of checkpoint ")
    assert committed_steps(tmp_path / "run/checkpoint") == [1, 2], "what one rank does not see is not damaged"


def initial_weights_of(folders: list[Path]) -> tuple[str, str]:
    agreement.SECONDS_TO_SEE = 0.3
    model = sharded_model(seed=99)
    return end_of(lambda: load_model_weights(folders[torch.distributed.get_rank()], model)["step"])


def test_initial_weights_are_those_that_rank_0_takes_or_all_leave_alike(tmp_path: Path) -> None:
    run_ranks(2, save_steps, tmp_path / "run", (1, 2))
    whole, copy = tmp_path / "run/checkpoint", tmp_path / "copy"
    shutil.copytree(whole, copy)
    assert run_ranks(2, initial_weights_of, [whole, copy]) == [("done", "2")] * 2
    shutil.rmtree(step_folder(copy, 2))
    ends = run_ranks(2, initial_weights_of, [whole, copy])
    assert [kind for kind, _ in ends] == ["RunError"] * 2
    assert "which rank 0 sees, is not there" in ends[0][1]
    assert run_ranks(2, initial_weights_of, [copy, whole]) == [("done", "1")] * 2
    shutil.copytree(step_folder(whole, 1), step_folder(copy, 2))
    ends = run_ranks(2, initial_weights_of, [whole, copy])
    assert ends[0] == ends[1]
    assert ends[0][0] == "UserError"
    assert ends[0][1].startswith("ranks disagree on the checkpoint at checkpoint.initial_load_path")


def test_a_save_in_the_background_stays_on_its_ranks_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[tuple[int, str]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 5)
    monkeypatch.setattr(torch.cuda, "set_device", lambda gpu: chosen.append((gpu, threading.current_thread().name)))
    done: list[list[tuple[int, str]]] = []
    checkpointer_module._start_thread(lambda: done.append(list(chosen)), "save").join()
    assert done == [[(5, "save")]]
