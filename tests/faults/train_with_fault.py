"""train.py with one planned fault: real damage at a named moment of the program, which itself knows nothing of it.

    FAULTS='[{"place": "writing", "step": 15, "ranks": [1], "deed": "SIGKILL"}]' launch/torchrun.py ... train_with_fault.py ...

Each life of the process (the first start, then every restart by torchrun) takes the entry of its number. Functions are wrapped,
never replaced: up to the fault the run is the one that train.py gives. Says on stderr, a JSON line each, when a life begins,
when its first step is done and when a fault strikes (by the machine's monotonic clock, so that lines of two lives compare).

    place   in the step, after a forward pass        "step"
            in a save, the first tensor written      "writing"
            all is written, no manifest yet          "before manifest"
            the manifest under its temporary name    "before rename"
            a retired checkpoint has no manifest     "manifest removed"
            and not all of its files                 "half removed"
    step    the step that is trained, or saved; a list of them for what can be done again
    ranks   that do it
    deed    a signal's name (to itself; "to": "launcher" for the parent), "sleep", "not a number" (the loss becomes NaN),
            "wait" (until there is a "file") or "clock" (libfaketime adds the next of "seconds" to the time of day)
    after   wait until the checkpoint of this step is committed: what a resume finds must not depend on the disk's speed
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from torch.distributed.checkpoint import filesystem  # noqa: E402

from titan_dp.checkpoint import manifest as checkpoint  # noqa: E402
from titan_dp.checkpoint import saver as checkpointer  # noqa: E402
from titan_dp.model.transformer import Transformer  # noqa: E402
from titan_dp.train import trainer  # noqa: E402

LIFE, RANK = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")), int(os.environ.get("RANK", "0"))
PLAN: list[dict[str, Any]] = json.loads(os.environ.get("FAULTS", "[]"))
FAULT = dict(enumerate(PLAN)).get(LIFE, {})

training: int | None = None  # the step that is trained, None outside of one
saving = 0  # the step whose checkpoint is written
folder: Path | None = None  # of the checkpoints


def strikes(place: str, step: int | None) -> bool:
    """Whether the fault is due; if so, says so."""
    if FAULT.get("place") != place or RANK not in FAULT["ranks"] or step is None:
        return False
    steps = FAULT["step"] if isinstance(FAULT["step"], list) else [FAULT["step"]]
    if step not in steps:
        return False
    if "after" in FAULT and folder is not None:
        wait_for(checkpoint.step_folder(folder, FAULT["after"]) / checkpoint.MANIFEST)
    say("fault", step)
    return True


def strike(place: str, step: int | None) -> None:
    if not strikes(place, step):
        return
    if FAULT["deed"] == "clock":
        set_clock(FAULT["seconds"].pop(0))
        return
    if FAULT["deed"] == "wait":
        wait_for(Path(FAULT["file"]))
        return
    if FAULT["deed"] == "sleep":
        time.sleep(3600)
    os.kill(os.getppid() if FAULT.get("to") == "launcher" else os.getpid(), signal.Signals[FAULT["deed"]])


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)


def set_clock(seconds: int) -> None:
    """The time of day plus `seconds`; returns when this process sees it."""
    before = time.time()
    Path(os.environ["FAKETIME_TIMESTAMP_FILE"]).write_text(f"{seconds:+}")
    while abs(time.time() - before) < 3600:
        time.sleep(0.05)


def say(what: str, step: int | None) -> None:
    facts = {"what": what, "rank": RANK, "life": LIFE, "step": step, "pid": os.getpid(), "clock": time.monotonic()}
    os.write(2, (json.dumps(facts) + "\n").encode())  # one call: lines of several ranks do not mix


def around(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """`owner.name(...)` becomes `wrapper(original, ...)`."""
    original = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: wrapper(original, *args, **kwargs))


PACE = 0.05
"""Seconds that a step takes at least: a signal must find its way through the launcher before 60 steps are over."""


def train_step(original: Callable[..., Any], self: trainer.Trainer, *args: Any) -> Any:
    global training, folder
    training, folder = self.step + 1, self.checkpointer.folder
    time.sleep(PACE)
    result = original(self, *args)
    training = None
    if not hasattr(self, "said"):
        self.said = True  # type: ignore[attr-defined]
        say("first step", self.step + 1)
    return result


def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    result = original(*args, **kwargs)
    if FAULT.get("deed") == "not a number":
        return result._replace(loss=result.loss * float("nan")) if strikes("step", training) else result
    strike("step", training)
    return result


def save(original: Callable[..., Any], self: Any, step: int, *args: Any, **kwargs: Any) -> Any:
    self.wait()  # the save before this one still goes by its own number
    global saving
    saving = step
    return original(self, step, *args, **kwargs)


def write_item(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    result = original(*args, **kwargs)
    strike("writing", saving)
    return result


def write_manifest(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    strike("before manifest", saving)
    return original(*args, **kwargs)


def replace(original: Callable[..., Any], source: Any, target: Any, **kwargs: Any) -> Any:
    if Path(target).name == checkpoint.MANIFEST:
        strike("before rename", saving)
    return original(source, target, **kwargs)


def apply_retention(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    unlink = os.unlink
    removed = 0

    def counted(*args: Any, **kwargs: Any) -> None:
        nonlocal removed
        unlink(*args, **kwargs)
        removed += 1
        if removed == 1:
            strike("manifest removed", saving)
        if removed == 3:
            strike("half removed", saving)

    os.unlink = counted  # type: ignore[assignment]
    try:
        return original(*args, **kwargs)
    finally:
        os.unlink = unlink  # type: ignore[assignment]


around(trainer.Trainer, "_train_step", train_step)
around(Transformer, "forward", forward)
around(checkpointer.Checkpointer, "save", save)
around(filesystem, "_write_item", write_item)
around(checkpointer, "write_manifest", write_manifest)
around(checkpointer, "apply_retention", apply_retention)
around(os, "replace", replace)

if __name__ == "__main__":
    say("life", None)
    sys.argv[0] = str(ROOT / "train.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
