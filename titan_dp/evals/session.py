"""What every evaluation shares: its processes, its models, and results that can be interrupted.

An evaluation runs in one process or under torchrun; every rank holds the whole model and does its share of the units of work
(rank, rank + ranks, ...), and sums meet at the end. A result is one JSON file with the checkpoint's identity and
every setting; it is there whole or not at all. What a rank has done so far lies beside it and is taken up by the same
command; a result that is there already is not computed again, and one made with other settings is not overwritten.
"""

from __future__ import annotations

import argparse
import glob
import hashlib
import json
import math
import os
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titan_dp.errors import RunError, UserError
from titan_dp.files import to_json, write_json

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console
    from rich.progress import Progress

    from titan_dp.distributed import World
    from titan_dp.inference.pretrained import Pretrained, Source

_SAVE_SECONDS = 30
_RANKS_MAY_DIFFER_SECONDS = 24 * 3600


def add_common_arguments(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """The checkpoint or, with `several`, the checkpoints; where results go; how the model is run."""
    what = "run folder, checkpoint, or exported folder"
    if several:
        parser.add_argument("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT", help=f"{what}; several are compared")
    else:
        parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help=what)
    parser.add_argument("--out", type=Path, default=Path("evaluations"), help="folder of the results (default: evaluations)")
    parser.add_argument("--overwrite", action="store_true", help="compute again what is in OUT already")
    parser.add_argument("--tokenizer", default="", help="use this one instead of the checkpoint's own")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of matrices (default: float32)")
    parser.add_argument(
        "--backend", choices=("auto", "recurrent", "torch", "triton"), default="auto", help="of the recurrence (default: auto)"
    )


def check_positive(args: argparse.Namespace, *options: str) -> None:
    """Raises UserError where one of `options` is given and below 1."""
    for option in options:
        value = getattr(args, option)
        if value is not None and value < 1:
            raise UserError(f"--{option.replace('_', '-')} is {value}; give at least 1")


@dataclass(frozen=True)
class Session:
    """The processes of one evaluation and the command it carries out."""

    args: argparse.Namespace
    world: World
    console: Console
    """Prints on the main rank only."""

    def load(self, path: Path) -> Pretrained:
        """The model at `path`, on all ranks or on none; of a run's checkpoints the one that rank 0 takes."""
        import torch

        from titan_dp.faults.agreement import on_main, together, wait_to_see
        from titan_dp.inference.pretrained import load_pretrained, open_source

        args = self.args
        dtype = getattr(torch, args.dtype)
        taken = path / on_main(lambda: os.path.relpath(open_source(path).path, path))

        def load() -> Pretrained:
            if not wait_to_see(taken.exists, taken):
                raise RunError(f"{taken}, which rank 0 sees, is not there; is the folder shared, or copied to every node?")
            return load_pretrained(taken, self.world.device, dtype=dtype, tokenizer=args.tokenizer, backend=args.backend)

        return together(load)

    def check_labels(self) -> None:
        """Raises UserError where one of the checkpoints is none, or two would have the same result file."""
        from titan_dp.faults.agreement import on_main
        from titan_dp.inference.pretrained import open_source

        def check() -> None:
            seen: dict[str, Path] = {}
            for path in self.args.checkpoints:
                label = open_source(path).label
                if label in seen:
                    raise UserError(
                        f"{path} and {seen[label]} are both called {label!r}; evaluate one of them into another --out"
                    )
                seen[label] = path

        on_main(check)

    def share(self, units: int, start: int = 0) -> range:
        """This rank's units of work, of which it has done the first `start`."""
        return range(self.world.rank + start * self.world.size, units, self.world.size)

    def progress(self) -> Progress:
        """A progress bar on the main rank; a context manager."""
        from rich import progress

        columns = (progress.MofNCompleteColumn(), progress.TimeElapsedColumn(), progress.TimeRemainingColumn())
        bar = (progress.TextColumn("{task.description}"), progress.BarColumn())
        return progress.Progress(*bar, *columns, console=self.console, transient=True, disable=not self.world.is_main)

    def report(self, kind: str, source: Source, settings: dict[str, Any], beside: tuple[str, ...] = ()) -> Report:
        """The result file of `kind` for `source`, and the endings of what is written `beside` it; see `Report`."""
        return Report(self, kind, source, {**settings, "dtype": self.args.dtype, "backend": self.args.backend}, beside)

    def check_comparison(self, kind: str, names: tuple[str, ...]) -> None:
        """Raises UserError where a file of `names`, which compare results, is in --out without a result of `kind`: not ours."""
        from titan_dp.faults.agreement import on_main

        def check() -> None:
            folder: Path = self.args.out
            for path in folder.glob(f"{kind}-*.json"):
                with suppress(OSError, ValueError, AttributeError, RecursionError):
                    if json.loads(path.read_bytes()).get("evaluation") == kind:
                        return
            _refuse_others([folder / name for name in names])

        on_main(check)


@contextmanager
def session(args: argparse.Namespace) -> Iterator[Session]:
    from rich.console import Console

    from titan_dp import config
    from titan_dp.distributed import distributed
    from titan_dp.faults.agreement import agree, code

    with distributed(config.Comm(init_timeout_seconds=_RANKS_MAY_DIFFER_SECONDS)) as world:
        # Where things lie is each node's affair; that they are the same, `Report` sees to.
        given = {f"--{name.replace('_', '-')}": value for name, value in vars(args).items() if not callable(value)}
        agree({name: value for name, value in given.items() if not _is_path(value)} | code())
        yield Session(args, world, Console(stderr=True, highlight=False, soft_wrap=True, quiet=not world.is_main))


def _is_path(value: object) -> bool:
    return isinstance(value, Path) or (isinstance(value, list) and any(isinstance(entry, Path) for entry in value))


class Report:
    """`<out>/<kind>-<label>.json` to be: finished already, begun, or to begin with.

    Raises UserError where that file was made with other settings or from another checkpoint, or --out is a file, or where
    files that are not ours have the name with one of the endings `beside`.
    """

    def __init__(
        self, session: Session, kind: str, source: Source, settings: dict[str, Any], beside: tuple[str, ...] = ()
    ) -> None:
        from titan_dp.faults.agreement import agree, on_main

        self._session, self.source = session, source
        self.head: dict[str, Any] = {
            "evaluation": kind,
            "label": source.label,
            "checkpoint": source.identity,
            "settings": settings,
        }
        agree({f"{name} of what is evaluated": entry for name, entry in _without_paths(self.head).items()})
        self.folder: Path = session.args.out
        self.path = self.folder / f"{kind}-{source.label}.json"
        self._beside = [self.path.with_name(self.path.stem + ending) for ending in beside]
        self.finished: dict[str, Any] | None = on_main(self._read)  # one rank looks: another may not see the file yet
        """The results of this very evaluation, where it has been done before."""
        key = hashlib.sha256(to_json(_without_paths(self.head), sort_keys=True).encode()).hexdigest()[:16]
        rank = f"rank{session.world.rank}of{session.world.size}"
        self._partial = self.folder / f".{self.path.stem}.{key}.{rank}.npz"
        self._saved = time.monotonic()

    def _read(self) -> dict[str, Any] | None:
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"--out {self.folder} is a file; name a folder")
        if not self.path.exists():
            if not any(self.folder.glob(f".{glob.escape(self.path.stem)}.*.npz")):  # nor begun
                _refuse_others(self._beside)
            return None
        try:
            found = json.loads(self.path.read_text())
            wanted = _without_paths(json.loads(to_json(self.head)))
            same = all(_without_paths(found[key]) == value for key, value in wanted.items())
            results: dict[str, Any] = found["results"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:  # nothing of ours: --overwrite leaves it alone, too
            raise UserError(f"{self.path} is no result of an evaluation ({error}); choose another --out") from error
        if self._session.args.overwrite:
            return None
        if not same:
            raise UserError(f"{self.path} holds results of other settings or weights; choose another --out, or --overwrite")
        return results

    def resume(self) -> dict[str, np.ndarray]:
        """What this rank had computed when it last saved; empty at the beginning."""
        import numpy as np

        try:
            with np.load(self._partial, allow_pickle=False) as arrays:
                return dict(arrays)
        except (OSError, ValueError, zipfile.BadZipFile):  # not there, or damaged: begin again
            return {}

    def keep(self, now: bool = False, **arrays: np.ndarray | float) -> None:
        """Save what this rank has computed so far, every half minute or `now`."""
        import numpy as np

        from titan_dp.files import write_atomically

        if now or time.monotonic() - self._saved > _SAVE_SECONDS:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._partial, lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]
            self._saved = time.monotonic()

    def finish(self, results: dict[str, Any]) -> None:
        """Write the file (on the main rank) and forget what was kept. Every rank calls it, with the results of all.

        Raises RunError where a number among them is not finite.
        """
        import torch

        from titan_dp.faults.agreement import on_main

        self.finished = results
        world = self._session.world

        def write() -> None:
            if wrong := _not_finite(results):
                raise RunError(
                    f"{wrong} of {self.source.label} is not finite: the losses are too large; take another checkpoint"
                )
            self.folder.mkdir(parents=True, exist_ok=True)
            made_on = {"torch": torch.__version__, "ranks": world.size, "device": world.device.type}
            write_json(self.path, {**self.head, "made_on": made_on, "results": results})

        on_main(write)
        self._partial.unlink(missing_ok=True)


def _refuse_others(paths: list[Path]) -> None:
    """Raises UserError where there is one of `paths`, which no earlier evaluation can have written."""
    for path in paths:
        if path.exists():
            raise UserError(
                f"{path} was not written by an evaluation, which would overwrite it; move it away, or choose another --out"
            )


_PATHS = frozenset({"path", "shards", "file", "include_path"})


def _not_finite(value: Any, name: str = "") -> str:
    """The name of the first number in JSON values that is a NaN or an infinity; empty where there is none."""
    if isinstance(value, float):
        return "" if math.isfinite(value) else name
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return next((found for key, entry in entries if (found := _not_finite(entry, f"{name}.{key}".lstrip(".")))), "")


def _without_paths(value: Any) -> Any:
    """`value` but for where things lie, which hashes beside it identify: a moved run is the same run."""
    if isinstance(value, dict):
        return {key: _without_paths(entry) for key, entry in value.items() if key not in _PATHS}
    return [_without_paths(entry) for entry in value] if isinstance(value, list | tuple) else value
