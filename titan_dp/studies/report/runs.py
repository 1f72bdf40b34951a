"""Run folders as a report sees them: found, checked, and read.

A folder is either a run that can be counted, or one that never started, or refused in one sentence: nothing that is cut
off or belongs to another sweep slips into a table. A run is read in the process that reduces it, so that hundreds of
metrics.jsonl files need the memory of one a core. What those come to is metrics.py's, grouping
configurations.py's.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tomli

from titan_dp.config import Config
from titan_dp.config.load import config_from_toml
from titan_dp.errors import UserError
from titan_dp.files import JsonObject, Natural, inside, parse_json
from titan_dp.studies.report.metrics import Totals, reduce_metrics
from titan_dp.train.run_folder import identity, read_run

_POOL_BYTES = 50_000_000  # below that, reading takes less time than starting processes
_RUN_FILES = ("config.toml", "run.json", "metrics.jsonl")


class _Facts(JsonObject):
    """run.json, as far as a report reads it."""

    state: str
    steps: Natural
    tokens_per_step: Natural
    planned_tokens: Natural | None = None
    """Of the whole run; runs of before this was written had steps of one size."""
    parameters: Natural
    embedding_parameters: Natural
    flops_per_token: Natural
    tokenizer: str
    fingerprint: str
    validation_fingerprint: str | None
    bytes_per_token: float | None
    device: str
    world_size: Natural


_FACTS = tuple(name for name, field in _Facts.model_fields.items() if field.is_required())


class _Cell(JsonObject):
    name: str
    identity: str


class _Sweep(JsonObject):
    """sweep.json, as far as a report reads it."""

    name: str = ""
    description: str = ""
    cells: list[_Cell]


@dataclass(frozen=True)
class Found:
    """A run folder, and the configuration its sweep promises for it (None outside a sweep)."""

    folder: Path
    identity: str | None = None


@dataclass(frozen=True, eq=False)
class Run:
    folder: Path
    config: Config
    facts: dict[str, Any] | None
    """run.json; None where the run has never started."""
    totals: Totals
    name: str
    """Of the folder, and of as many of those above it as it takes to tell it from the other runs."""

    @property
    def state(self) -> str:
        """'not started', 'unfinished', 'diverged' (finished, its loss not a number) or 'finished'."""
        if self.facts is None:
            return "not started"
        if self.facts["state"] != "finished":
            return "unfinished"
        loss = self.totals.training_loss if self.totals.validation_loss is None else self.totals.validation_loss
        return "finished" if loss is not None and math.isfinite(loss) else "diverged"

    @property
    def started(self) -> dict[str, Any]:
        """run.json of a run that has one."""
        assert self.facts is not None
        return self.facts

    @property
    def tokens(self) -> int:
        """Of the whole run, done or not."""
        planned = self.started.get("planned_tokens")
        return self.started["steps"] * self.started["tokens_per_step"] if planned is None else planned

    @property
    def flops(self) -> int:
        """Model FLOPs of the whole run."""
        return self.started["flops_per_token"] * self.tokens

    @property
    def seeds(self) -> tuple[int, int]:
        return self.config.debug.seed, self.config.data.seed


# -- finding -----------------------------------------------------------------------------------------------------------


def find_runs(paths: list[Path]) -> list[Found]:
    """The run folders that `paths` are or hold, each once, in order.

    Raises UserError for a path that holds none, and for a sweep's folder that is not what its sweep.json says.
    """
    found: dict[Path, Found] = {}
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path} is no folder; name run folders, or folders that hold them")
        here = list(_runs_in(path)) or [run for child in _folders(path) for run in _runs_in(child)]
        if not here:
            raise UserError(f"{path} is no run folder (it has no config.toml) and holds none; name one that train.py wrote")
        found.update((run.folder.resolve(), run) for run in here)
    return list(found.values())


def _runs_in(folder: Path) -> Iterator[Found]:
    """`folder` itself where it is a run, its cells where it is a sweep."""
    if (folder / "sweep.json").exists():
        yield from _cells(folder)
    elif _is_run(folder):
        sweep = folder.resolve().parent
        promised = _promised(sweep) if (sweep / "sweep.json").exists() else None
        if promised is not None and folder.resolve().name not in promised:
            raise _foreign(folder, sweep)
        yield Found(folder, promised[folder.resolve().name] if promised else None)


def _cells(sweep: Path) -> Iterator[Found]:
    promised = _promised(sweep)
    for child in _folders(sweep):
        if _is_run(child) and child.name not in promised:
            raise _foreign(child, sweep)
    for name, cell in promised.items():
        if not (sweep / name).is_dir():
            raise UserError(f"{sweep / name} is gone, which {sweep / 'sweep.json'} names; run titan-dp sweep again for it")
        yield Found(sweep / name, cell)


def _promised(sweep: Path) -> dict[str, str]:
    return {cell["name"]: cell["identity"] for cell in read_sweep(sweep)["cells"]}


def _foreign(folder: Path, sweep: Path) -> UserError:
    return UserError(f"{folder} is a run that {sweep / 'sweep.json'} does not name: another sweep's; move it elsewhere")


def read_sweep(folder: Path) -> dict[str, Any]:
    """sweep.json of `folder`. Raises UserError where it is cut off or something else."""
    path = folder / "sweep.json"
    sweep = parse_json(_Sweep, path.read_bytes(), path, "list of a sweep's cells", "write it anew with titan-dp sweep")
    for cell in sweep.cells:
        inside(folder, cell.name, path)
    return sweep.model_dump()


def _folders(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if child.is_dir())


def _is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in _RUN_FILES)


# -- reading -----------------------------------------------------------------------------------------------------------


def read_runs(found: list[Found]) -> list[Run]:
    """Read every run, in processes on all cores where there is much to read. Raises the first run's UserError."""
    paths = (run.folder / "metrics.jsonl" for run in found)
    if sum(path.stat().st_size for path in paths if path.exists()) < _POOL_BYTES:
        runs = [read(run) for run in found]
    else:
        with ProcessPoolExecutor() as pool:
            runs = list(pool.map(read, found, chunksize=4))
    return [replace(run, name=name) for run, name in zip(runs, _distinct_names([run.folder for run in runs]), strict=True)]


def _distinct_names(folders: list[Path]) -> list[str]:
    """A name for each folder, which none of the others has: a run's own is unique only where the run lies."""
    whole = [folder.resolve().parts for folder in folders]
    names = [folder.name for folder in folders]
    for length in range(2, max(map(len, whole), default=0) + 1):
        taken = Counter(names)
        names = ["/".join(parts[-length:]) if taken[name] > 1 else name for name, parts in zip(names, whole, strict=True)]
    return names


def read(found: Found) -> Run:
    """Read one run folder. Raises UserError where it is cut off, unreadable or not the run its sweep promises."""
    folder = found.folder
    config = _read_config(folder / "config.toml")
    if found.identity is not None and identity(config) != found.identity:
        raise UserError(
            f"{folder} is a run of another sweep: its config.toml is not what sweep.json promises; move it elsewhere"
        )
    facts, path = _read_facts(folder), folder / "metrics.jsonl"
    data = path.read_bytes() if path.exists() else b""
    if facts is None and not data:
        return Run(folder, config, None, Totals(), folder.name)
    if facts is None:
        raise UserError(f"{folder} has metrics.jsonl but no run.json; resume the run with train.py, or leave the folder out")
    totals = reduce_metrics(data)
    if totals is None and b"\n" in data:  # else it is the run's first record that is cut off
        raise UserError(f"{path} holds no record; train the run again, or leave {folder} out")
    totals = totals or Totals()
    if facts["state"] == "finished":
        validated = not config.validation.enable or totals.validation_step == facts["steps"]
        if totals.step != facts["steps"] or not validated:
            raise UserError(
                f"{path} is cut off: it ends at step {totals.step:,} of the {facts['steps']:,} that run.json calls finished"
                f"{'' if validated else ', without the last validation'}; copy it again, or leave {folder} out"
            )
    return Run(folder, config, facts, totals, folder.name)


def _read_config(path: Path) -> Config:
    if not path.exists():
        raise UserError(f"{path.parent} is no run folder: it has no config.toml; leave it out")
    try:
        text = path.read_text(encoding="utf-8")
        try:
            return Config.model_validate(tomli.loads(text))  # ten times as fast as what follows
        except ValueError:
            return config_from_toml(text, str(path))  # says what is wrong, or takes another spelling
    except ValueError as error:
        first, *more = str(error).split("\n  ")
        reason = f"{len(more)} problems, the first: {more[0]}" if more else first
        raise UserError(f"{path} is no configuration of this program ({reason}); leave {path.parent} out") from error


def _read_facts(folder: Path) -> dict[str, Any] | None:
    facts = read_run(folder)
    missing = [] if facts is None else [key for key in _FACTS if not isinstance(facts, dict) or key not in facts]
    remedy = "resume the run with train.py, or leave it out"
    if missing:
        raise UserError(f"{folder / 'run.json'} lacks {', '.join(missing)}; {remedy}")
    if facts is not None:
        parse_json(_Facts, (folder / "run.json").read_bytes(), folder / "run.json", "record of a run", remedy)
    return facts
