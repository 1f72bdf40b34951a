"""What every evaluation shares: its processes, its models, sums over ranks, and results that can be interrupted.

An evaluation runs in one process or under torchrun. Every rank holds the whole model and measures every ranks-th batch (batch
rank, rank + ranks, ...); the sums meet at the end. Batches are made before they are dealt to the ranks, so each of them, and
with it every rounding, is the same for any number of ranks. A result is one JSON file with the checkpoint's identity and every
setting; it exists whole or not at all. What a rank has computed so far lies beside it, and the same command goes on from
there. A finished result is only shown again, and one made with other settings is not overwritten.
"""

from __future__ import annotations

import argparse
import glob
import hashlib
import itertools
import json
import math
import os
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from titan_dp.config.arguments import positive
from titan_dp.errors import RunError, UserError
from titan_dp.files import make_folder, to_json, write_atomically, write_json
from titan_dp.output import check_matplotlib, progress

if TYPE_CHECKING:
    from rich.console import Console

    from titan_dp.distributed import World
    from titan_dp.inference.pretrained import Pretrained
    from titan_dp.inference.sources import Source

B = TypeVar("B")
U = TypeVar("U")
Arrays = dict[str, np.ndarray]

_SAVE_SECONDS = 30
_RANKS_MAY_DIFFER_SECONDS = 24 * 3600


def add_common_arguments(parser: argparse.ArgumentParser, batch_of: str, batch_size: int = 8, several: bool = False) -> None:
    """The checkpoint or, with `several`, the checkpoints; where results go; how the model is run.

    `batch_of` says what --batch-size counts; empty leaves that option out.
    """
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
    if batch_of:
        text = f"{batch_of} that go through the model together (default: {batch_size})"
        parser.add_argument("--batch-size", type=positive, default=batch_size, metavar="N", help=text)


def run_evaluation(evaluate: Callable[[Session], object], args: argparse.Namespace) -> int:
    """Call `evaluate` in every process of the command, once the ranks agree on its options; returns the exit code."""
    from rich.console import Console

    from titan_dp import config
    from titan_dp.distributed import distributed
    from titan_dp.faults.agreement import agree, code

    with distributed(config.Comm(init_timeout_seconds=_RANKS_MAY_DIFFER_SECONDS)) as world:
        # Each node may have files in other places; that their contents are equal is checked by `Result`.
        given = {f"--{name.replace('_', '-')}": value for name, value in vars(args).items() if not callable(value)}
        agree({name: value for name, value in given.items() if not _is_path(value)} | code())
        evaluate(Session(args, world, Console(stderr=True, highlight=False, soft_wrap=True, quiet=not world.is_main)))
    return 0


def _is_path(value: object) -> bool:
    return isinstance(value, Path) or (isinstance(value, list) and any(isinstance(entry, Path) for entry in value))


@dataclass(frozen=True)
class Session:
    """The processes of one evaluation and the command it carries out."""

    args: argparse.Namespace
    world: World
    console: Console
    """Prints on the main rank only."""

    def load(self, path: Path) -> Pretrained:
        """The model at `path`, on all ranks or on none. If it is a run, every rank takes the checkpoint that rank 0 chooses."""
        import torch

        from titan_dp.faults.agreement import on_main, together, wait_to_see
        from titan_dp.inference.pretrained import load_pretrained, open_source

        args = self.args
        taken = path / on_main(lambda: os.path.relpath(open_source(path).path, path))

        def load() -> Pretrained:
            if not wait_to_see(taken.exists, taken):
                raise RunError(f"{taken}, which rank 0 sees, is not there; is the folder shared, or copied to every node?")
            options = {"dtype": getattr(torch, args.dtype), "tokenizer": args.tokenizer, "backend": args.backend}
            return load_pretrained(taken, self.world.device, **options)

        return together(load)

    def check_comparison(self, kind: str, *files: str) -> None:
        """To be called before several checkpoints are compared in `files` of --out, one of them a figure.

        Raises UserError if matplotlib is missing, a path is not a checkpoint, two checkpoints would have the same result
        file, or one of `files` is there although --out has no result of `kind`: then no evaluation wrote it.
        """
        from titan_dp.faults.agreement import on_main
        from titan_dp.inference.pretrained import open_source

        def check() -> None:
            seen: dict[str, Path] = {}
            for path in self.args.checkpoints:
                label = open_source(path).label
                if (first := seen.setdefault(label, path)) is not path:
                    raise UserError(f"{path} and {first} are both called {label!r}; evaluate one of them into another --out")
            for path in self.args.out.glob(f"{kind}-*.json"):
                with suppress(OSError, ValueError, AttributeError, RecursionError):
                    if json.loads(path.read_bytes()).get("evaluation") == kind:
                        return
            _refuse_others([self.args.out / name for name in files])

        check_matplotlib()
        on_main(check)


class Result:
    """The result file `<out>/<kind>-<label>.json`: finished by an earlier command, begun, or not begun yet.

    Args:
        session: the processes, which all make this object.
        kind: the evaluation's name.
        source: of the model.
        settings: JSON, everything that the numbers depend on, except what `add_common_arguments` adds.
        beside: endings of other files that the evaluation writes for this result.

    Raises UserError if that file was made with other settings or from another checkpoint, if --out is a file, or if a file of
    that name, or with one of the endings `beside`, was not written by an evaluation.
    """

    def __init__(
        self, session: Session, kind: str, source: Source, settings: dict[str, Any], beside: tuple[str, ...] = ()
    ) -> None:
        from titan_dp.faults.agreement import agree, on_main

        self._session, self.source = session, source
        self.settings: dict[str, Any] = {**settings, "dtype": session.args.dtype, "backend": session.args.backend}
        whose = {"evaluation": kind, "label": source.label, "checkpoint": source.identity}
        self._head: dict[str, Any] = {**whose, "settings": self.settings}
        same = _without_paths(self._head)
        agree({f"{name} of what is evaluated": entry for name, entry in same.items()})
        self.path: Path = session.args.out / f"{kind}-{source.label}.json"
        self.results: dict[str, Any] = on_main(lambda: self._read(beside))  # one rank looks: another may not see the file yet
        """What goes into the file under "results". Empty until this evaluation, with these settings, is done."""
        key = hashlib.sha256(to_json(same, sort_keys=True).encode()).hexdigest()[:16]
        rank = f"rank{session.world.rank}of{session.world.size}"
        self._partial = self.path.with_name(f".{self.path.stem}.{key}.{rank}.npz")
        self._saved = time.monotonic()

    def beside(self, ending: str) -> Path:
        """The path of another file of this result."""
        return self.path.with_name(self.path.stem + ending)

    def _read(self, beside: tuple[str, ...]) -> dict[str, Any]:
        folder = self.path.parent
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--out {folder} is a file; name a folder")
        if not self.path.exists():
            if not any(folder.glob(f".{glob.escape(self.path.stem)}.*.npz")):  # not begun either
                _refuse_others([self.beside(ending) for ending in beside])
            return {}
        try:
            found = json.loads(self.path.read_text())
            wanted = _without_paths(json.loads(to_json(self._head)))
            same = all(_without_paths(found[key]) == value for key, value in wanted.items())
            results: dict[str, Any] = found["results"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:  # --overwrite leaves a file of others alone, too
            raise UserError(f"{self.path} is no result of an evaluation ({error}); choose another --out") from error
        if self._session.args.overwrite:
            return {}
        if not same:
            mine, its = wanted["settings"], found["settings"] if isinstance(found["settings"], dict) else {}
            other = [name for name in mine if mine[name] != _without_paths(its.get(name))] or ["weights"]
            raise UserError(
                f"{self.path} holds results of other {', '.join(other)}; give --out another folder to keep both, or --overwrite"
            )
        return results

    def resume(self) -> Arrays:
        """What this rank had computed when it last saved; empty at the beginning."""
        try:
            with np.load(self._partial, allow_pickle=False) as arrays:
                return dict(arrays)
        except (OSError, ValueError, zipfile.BadZipFile):  # not there, or damaged: begin again
            return {}

    def keep(self, arrays: Mapping[str, np.ndarray | int], now: bool = False) -> None:
        """Save what this rank has computed so far, every half minute or `now`."""
        if now or time.monotonic() - self._saved > _SAVE_SECONDS:
            make_folder(self._partial.parent)
            write_atomically(self._partial, lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]
            self._saved = time.monotonic()

    def sums(
        self,
        batches: Iterable[B],
        measure: Callable[[B], Arrays],
        zeros: Arrays,
        *,
        name: str = "batches",
        total: int | None,
        position: Callable[[], int] | None = None,
    ) -> Arrays:
        """The sums of what is measured on all batches, by all ranks; a rank goes on after the last batch whose sums it kept.

        Args:
            batches: the same on every rank, which measures its share.
            measure: the addends of a batch.
            zeros: the sums before the first batch, float64 or int64, by name.
            name: what is counted for people who wait, up to `total`.
            position: how far it is; None takes it that all ranks have done as many batches as this one.
        """
        import torch

        from titan_dp.distributed import all_reduce_sum

        world, sums = self._session.world, {"batches_done": np.array(0), **zeros}
        if (kept := self.resume()).keys() == sums.keys():
            sums = kept
        done = int(sums.pop("batches_done"))
        with progress(name, total) as state:
            for batch in itertools.islice(batches, world.rank + done * world.size, None, world.size):
                addend = measure(batch)
                sums = {key: value + addend[key] for key, value in sums.items()}
                done += 1
                self.keep({"batches_done": done, **sums})
                state.done = position() if position else done * world.size
        return {key: all_reduce_sum(torch.tensor(x, device=world.device)).cpu().numpy() for key, x in sums.items()}

    def finish(self, results: dict[str, Any]) -> None:
        """Write the file (on the main rank) and forget what was kept. Every rank calls it, with the results of all.

        Raises RunError if a number among them is not finite.
        """
        import torch

        from titan_dp.faults.agreement import on_main

        self.results = results
        world = self._session.world

        def write() -> None:
            if wrong := _not_finite(results):
                raise RunError(
                    f"{wrong} of {self.source.label} is not finite: the losses are too large; take another checkpoint"
                )
            make_folder(self.path.parent)
            made_on = {"torch": torch.__version__, "ranks": world.size, "device": world.device.type}
            write_json(self.path, {**self._head, "made_on": made_on, "results": results})

        on_main(write)
        self._partial.unlink(missing_ok=True)


def batched(units: Iterable[U], size: int) -> Iterator[list[U]]:
    """`units` in lists of `size`, the last of which may be shorter."""
    rest = iter(units)
    while batch := list(itertools.islice(rest, size)):
        yield batch


def _refuse_others(paths: list[Path]) -> None:
    """Raises UserError if one of `paths` exists; no earlier evaluation can have written it."""
    for path in paths:
        if path.exists():
            raise UserError(
                f"{path} was not written by an evaluation, which would overwrite it; move it away, or choose another --out"
            )


_PATHS = frozenset({"path", "shards", "file", "include_path"})


def _not_finite(value: Any, name: str = "") -> str:
    """The name of the first number in JSON values that is a NaN or an infinity; empty if all are finite."""
    if isinstance(value, float):
        return "" if math.isfinite(value) else name
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return next((found for key, entry in entries if (found := _not_finite(entry, f"{name}.{key}".lstrip(".")))), "")


def _without_paths(value: Any) -> Any:
    """`value` without the paths in it, which have hashes beside them: a run that has moved is the same run."""
    if isinstance(value, dict):
        return {key: _without_paths(entry) for key, entry in value.items() if key not in _PATHS}
    return [_without_paths(entry) for entry in value] if isinstance(value, list | tuple) else value
