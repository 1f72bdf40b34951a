"""A run that is stopped, killed, cut off from its disk or its data, and started again each time, as a scheduler does.

One run folder on a small disk of its own (a tmpfs, where it may be mounted). Every start begins with what the one before left
and ends by a fault of its own; the last one runs to its end. Each kind is asserted by itself; the losses of all steps,
whichever start computed them, are those of a run that nothing disturbed.
"""

from __future__ import annotations

import ctypes.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from tests.faults.runs import INTERVAL, STEPS, Chain, Life
from titan_dp.checkpoint.manifest import all_steps, committed_steps, read_manifest, step_folder, verify

DAY = timedelta(days=1)
FAKETIME = next(iter(Path("/usr/lib").glob("*/faketime/libfaketime.so.1")), ctypes.util.find_library("faketime"))


class Story(Chain):
    """The chain, its lives by name, and what the tests need to know of the moments in between."""

    def __init__(self, shards: Path, folder: Path) -> None:
        self.shards = Path(shutil.copytree(shards, folder / "shards"))
        super().__init__(self.shards, folder, "requeued")
        mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(self.run.parent)], check=False)
        self.mounted = mount.returncode == 0
        self.lives: dict[str, Life] = {}
        self.damaged: dict[str, Path] = {}
        self.after_full_disk: list[int] = []

    def step(self, name: str, prefix: tuple[str, ...] | None = None, **fault: object) -> None:
        plan = [{"ranks": [0], "place": "step"} | fault]
        self.lives[name] = self.start(plan, prefix=prefix).finish()[-1] if fault else self.live_without_launcher()

    def damage_checkpoints(self) -> None:
        """The newest loses its end, the one before it has a bit flipped, the one before that loses a file."""
        newest, second, third, _ = [step_folder(self.checkpoints, step) for step in committed_steps(self.checkpoints)[::-1]]
        self.damaged = {"truncated": newest, "bit-flipped": second, "missing": third}
        os.truncate(newest / "__1_0.distcp", (newest / "__1_0.distcp").stat().st_size // 2)
        flip_a_bit(second / "__0_0.distcp")
        (third / ".metadata").unlink()

    def fill_disk(self) -> None:
        """All but 200 KB, which hold a few lines of metrics and no checkpoint."""
        disk = os.statvfs(self.run)
        (self.run.parent / "filler").write_bytes(bytes(disk.f_bavail * disk.f_frsize - 200_000))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def story(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    story = Story(shards, tmp_path_factory.mktemp("requeue"))
    try:
        tell(story)
        yield story
    finally:
        if story.mounted:
            subprocess.run(["umount", "-l", str(story.run.parent)], check=True)


def tell(story: Story) -> None:
    story.step("SIGTERM to a rank", step=7, ranks=[1], deed="SIGTERM")
    story.step("SIGKILL to the launcher", prefix=(), step=12, deed="SIGKILL", to="launcher")
    story.step("SIGUSR1 to a rank", step=17, deed="SIGUSR1")
    story.step("SIGTERM to the launcher", step=22, deed="SIGTERM", to="launcher")
    story.step("SIGINT to the launcher", step=25, deed="SIGINT", to="launcher")
    story.step("SIGUSR1 to the launcher", step=28, deed="SIGUSR1", to="launcher")
    story.damage_checkpoints()
    if story.mounted:
        story.fill_disk()
    story.step("damaged checkpoints, full disk", step=38, deed="SIGKILL")  # where the disk does not end it
    if story.mounted:
        story.after_full_disk = all_steps(story.checkpoints)
        (story.run.parent / "filler").unlink()
    shard = next((story.shards / "train").glob("shard-*[0-9].npy"))
    whole = shard.read_bytes()
    tokens = np.load(shard)
    np.save(shard, np.where(tokens < 256, tokens ^ 1, tokens))
    story.step("changed shard")
    os.truncate(shard, len(whole) // 2)
    story.step("truncated shard")
    shard.write_bytes(whole)
    story.lives["last"] = last_start(story)


def last_start(story: Story) -> Life:
    """To the end of the run, the time of day set three days on in step 42 and five back in step 52; saves at 40, 50, 60."""
    if FAKETIME is None:
        return story.live_without_launcher()
    clock, site = story.folder / "clock", story.folder / "site"
    clock.write_text("+0")
    site.mkdir()
    # libfaketime 0.9.10 refuses the call by which Python sleeps until a moment of the monotonic clock.
    (site / "sitecustomize.py").write_text("import threading, time\ntime.sleep = lambda s: threading.Event().wait(s)\n")
    names = {"LD_PRELOAD": FAKETIME, "FAKETIME_TIMESTAMP_FILE": clock, "FAKETIME_CACHE_DURATION": 1, "PYTHONPATH": site}
    prefix = ("env", *(f"{name}={value}" for name, value in names.items()), "FAKETIME_DONT_FAKE_MONOTONIC=1")
    seconds = [round((3 * DAY).total_seconds()), round((-2 * DAY).total_seconds())]
    fault = {"place": "step", "ranks": [0], "step": [42, 52], "deed": "clock", "seconds": seconds}
    return story.start([fault], "--checkpoint.interval", "10", prefix=prefix).finish()[-1]  # saves are slow under libfaketime


def successor(story: Story, name: str) -> Life:
    names = list(story.lives)
    return story.lives[names[names.index(name) + 1]]


@pytest.mark.parametrize(
    ("signal", "whom"),
    [*product(["SIGTERM", "SIGUSR1"], ["a rank", "the launcher"]), ("SIGINT", "the launcher")],  # SIGINT: Ctrl-C
)
def test_a_signal_saves_and_leaves_with_75_and_no_step_is_repeated(story: Story, signal: str, whom: str) -> None:
    name = f"{signal} to {whom}"
    life = story.lives[name]
    assert life.code == 75, life.text
    stopped = re.search(r"stopped by (SIGTERM|SIGUSR1|SIGINT) after step (\d+); saved; the same command resumes", life.text)
    assert stopped is not None, life.text
    step = int(stopped[2])
    assert life.last == step
    assert "Traceback" not in life.text
    if name != "SIGUSR1 to the launcher":  # after it checkpoints are damaged on purpose
        assert successor(story, name).resumed == step
    if whom == "a rank":
        assert step - life.said("fault")[0]["step"] <= 1


def test_ranks_whose_launcher_is_killed_save_and_end_and_the_next_start_waits_for_them(story: Story) -> None:
    life = story.lives["SIGKILL to the launcher"]
    assert life.code == -9
    assert "after step" in life.text, life.text
    assert successor(story, "SIGKILL to the launcher").resumed == life.last, "what the orphans trained is saved"
    for fact in life.said("life"):
        assert not Path(f"/proc/{fact['pid']}").exists(), "an orphan goes on"


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("truncated", r"__1_0\.distcp has \d+ bytes"),
        ("bit-flipped", r"__0_0\.distcp is not what was saved"),
        ("missing", r"\.metadata is missing"),
    ],
)
def test_a_damaged_checkpoint_is_said_loudly_and_set_aside_for_an_older_one(story: Story, kind: str, reason: str) -> None:
    life, folder = story.lives["damaged checkpoints, full disk"], story.damaged[kind]
    said = re.search(rf"checkpoint {re.escape(str(folder))} is damaged: .*{reason}.*", life.text)
    assert said is not None, life.text
    assert f"{folder.name}.damaged" in said[0]
    assert folder.with_name(f"{folder.name}.damaged").exists()


def test_after_damaged_checkpoints_the_newest_whole_one_is_taken(story: Story) -> None:
    life = story.lives["damaged checkpoints, full disk"]
    damaged = [int(folder.name[5:]) for folder in story.damaged.values()]
    assert 0 < life.resumed < min(damaged), life.text
    assert life.last > life.resumed


def test_a_full_disk_ends_the_run_with_one_message_and_freed_space_lets_it_go_on(story: Story) -> None:
    if not story.mounted:
        pytest.skip("needs the right to mount a small tmpfs")
    life = story.lives["damaged checkpoints, full disk"]
    assert life.code == 1
    assert "could not be written: No space left on device" in life.text
    assert f"the newest committed checkpoint is step {life.resumed}" in life.text
    assert "Traceback" not in life.text
    assert max(story.after_full_disk) == life.resumed, "the half-written folder is removed"
    assert life.last - life.resumed <= 2 * INTERVAL
    assert story.lives["last"].resumed == life.resumed


@pytest.mark.parametrize("kind", ["truncated", "changed"])
def test_a_damaged_shard_ends_the_run_as_the_users_mistake_and_restored_it_goes_on(story: Story, kind: str) -> None:
    life = story.lives[f"{kind} shard"]
    assert life.code == 2, life.text
    assert re.search(rf"error: .*{re.escape(str(story.shards))}/train/shard-00000.npy", life.text), life.text
    assert "Traceback" not in life.text
    if kind == "truncated":
        assert life.resumed == -1, "not one step on it"


def test_a_clock_that_jumps_disturbs_nothing(story: Story) -> None:
    if FAKETIME is None:
        pytest.skip("libfaketime is not installed: apt-get install faketime (needed by tests/faults)")
    now = datetime.now(UTC)
    saved = {
        step: datetime.fromisoformat(read_manifest(step_folder(story.checkpoints, step))["saved"]) for step in (40, 50, 60)
    }
    assert abs(saved[40] - now) < DAY
    assert saved[50] - now > 2 * DAY
    assert now - saved[60] > DAY
    assert all(0 <= record["step_seconds"] < 3600 for record in story.records()), "durations are of the monotonic clock"


def test_started_again_until_it_is_done_the_run_loses_nothing(story: Story, undisturbed: dict[int, float]) -> None:
    assert story.lives["last"].code == 0, story.lives["last"].text
    assert story.losses() == undisturbed
    assert len(story.records()) == STEPS
    assert all(verify(step_folder(story.checkpoints, step)) == [] for step in committed_steps(story.checkpoints))
    assert not list(story.run.rglob("*.tmp"))
