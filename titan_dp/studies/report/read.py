"""Run folders as a data frame: found, checked and read, one row per run.

A folder is a run that can be counted, or a run that has not started, or it is refused in one sentence: nothing that is cut
off or belongs to another sweep gets into a table. Each run is read and reduced by one process, so hundreds of metrics.jsonl
files need no more memory than one file per core.

The columns of a row are:
- "run", a short name that no other run has; "folder"; "state"; "model", the `config.Model`;
- every setting by its dotted key, with the real width of the MLP in "model.intermediate_size";
- what run.json says (`_Facts`, except its "state");
- the totals of metrics.jsonl (`_totals`), with losses in nats per token;
- "evaluations", what was measured of its checkpoints (train/evaluations.py);
- what follows from those: "family", "kind", "n_h", "shape", "without_embedding", "tokens", "flops".
An unknown value is None; NaN is a value that was not finite.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tomli
from pyarrow import ArrowException, types
from pyarrow.json import ReadOptions, read_json
from pydantic import Field

from titan_dp import config
from titan_dp.config import Config
from titan_dp.config.describe import all_keys
from titan_dp.config.load import config_from_toml
from titan_dp.errors import UserError
from titan_dp.files import JsonObject, Natural, inside, parse_json
from titan_dp.model.size import state_size
from titan_dp.train.evaluations import read_evaluations
from titan_dp.train.run_folder import identity, parse_records

CURVE_POINTS = 1000
FINAL_SHARE = 0.05
"""The final training loss is the mean over this last share of a run's step records."""
STATES = ("finished", "diverged", "unfinished", "not started")
NOISE_OF, _NOISE_NEEDS = 5, 4
"""The last validations of a run, of whose scatter around a line its noise is taken, and how many it takes."""
_STEP_KEYS = ["step", "loss", "tokens", "tokens_per_second", "step_seconds", "skipped_steps"]
_POOL_BYTES = 50_000_000  # reading less takes less time than starting processes
_RUN_FILES = ("config.toml", "run.json", "metrics.jsonl")


class _Facts(JsonObject):
    """run.json, as far as a report reads it."""

    state: str
    steps: Natural
    tokens_per_step: Natural
    planned_tokens: Natural | None = None
    """Of the whole run; None in runs from before this was written, whose steps all had one size."""
    branched_from: str | None = None
    """The checkpoint of another run with which it began."""
    branched_at: Natural = 0
    """Its step."""
    shared_tokens: Natural = 0
    """Those of that run up to there, which are this run's as well."""
    parameters: Natural
    embedding_parameters: Natural
    flops_per_token: Natural
    tokenizer: str
    tokenizer_hash: str = ""
    """Empty in runs from before this was written."""
    fingerprint: str
    validation_fingerprint: str | None
    validation_text_bytes: Natural | None = None
    bytes_per_token: float | None
    device: str
    world_size: Natural
    git_commit: str | None = None
    torch: str | None = None


class _Cell(JsonObject):
    name: str
    identity: str


class _Sweep(JsonObject):
    """sweep.json, as far as a report reads it."""

    name: str = ""
    description: str = ""
    tune: dict[str, str] = Field(default={})
    cells: list[_Cell]


# -- finding -----------------------------------------------------------------------------------------------------------


def find_runs(paths: list[Path]) -> dict[Path, str | None]:
    """The run folders that `paths` are or hold, each once, with the identity that its sweep promises (None outside a sweep).

    Raises UserError if a path holds none, or if a sweep's folder is not what its sweep.json says.
    """
    found: dict[Path, tuple[Path, str | None]] = {}
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path} is not a folder; name run folders, or folders that hold them")
        here = list(_runs_in(path)) or [run for child in _folders(path) for run in _runs_in(child)]
        if not here:
            raise UserError(f"{path} is not a run folder (it has no config.toml) and holds none; name one that train.py wrote")
        found.update((folder.resolve(), (folder, promised)) for folder, promised in here)
    return dict(found.values())


def _runs_in(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """`folder` itself if it is a run, its cells if it is a sweep."""
    if (folder / "sweep.json").exists():
        promised = _promised(folder)
        if stray := next((child for child in _folders(folder) if _is_run(child) and child.name not in promised), None):
            raise _foreign(stray, folder)
        for name, cell in promised.items():
            if not (folder / name).is_dir():
                raise UserError(
                    f"{folder / name} is gone, which {folder / 'sweep.json'} names; run titan-dp sweep again for it"
                )
            yield folder / name, cell
    elif _is_run(folder):
        name, sweep = folder.resolve().name, folder.resolve().parent
        promised = _promised(sweep) if (sweep / "sweep.json").exists() else {}
        if promised and name not in promised:
            raise _foreign(folder, sweep)
        yield folder, promised.get(name)


def _promised(sweep: Path) -> dict[str, str]:
    return {cell.name: cell.identity for cell in read_sweep(sweep).cells}


def _foreign(folder: Path, sweep: Path) -> UserError:
    return UserError(f"{folder} is a run that {sweep / 'sweep.json'} does not name, from another sweep; move it elsewhere")


def read_sweep(folder: Path) -> _Sweep:
    """sweep.json of `folder`. Raises UserError if it is cut off or something else."""
    path = folder / "sweep.json"
    sweep = parse_json(_Sweep, path.read_bytes(), path, "list of a sweep's cells", "write it anew with titan-dp sweep")
    for cell in sweep.cells:
        inside(folder, cell.name, path)
    return sweep


def tuned_axes(found: Iterable[Path]) -> dict[str, str]:
    """The axes that the sweeps of the runs `found` tune, with the setting of each."""
    axes: dict[str, str] = {}
    for folder in dict.fromkeys(run.resolve().parent for run in found):
        if (folder / "sweep.json").exists():
            axes |= {axis: key for axis, key in read_sweep(folder).tune.items() if key in all_keys()}
    return axes


def _folders(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if child.is_dir())


def _is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in _RUN_FILES)


# -- reading -----------------------------------------------------------------------------------------------------------


def read_runs(found: dict[Path, str | None]) -> pd.DataFrame:
    """One row per run, read in processes on all cores if there is much to read. Raises the first run's UserError."""
    files = [folder / "metrics.jsonl" for folder in found]
    if sum(file.stat().st_size for file in files if file.exists()) < _POOL_BYTES:
        rows = list(map(read_run, found, found.values()))
    else:
        with ProcessPoolExecutor() as pool:
            rows = list(pool.map(read_run, found, found.values(), chunksize=4))
    runs = pd.DataFrame(rows, dtype=object)  # numbers as Python's own: FLOPs may exceed 64 bits, and None stays None
    runs.insert(0, "run", _distinct_names(list(found)))
    runs["tokenizer"] = _distinct_tokenizers(runs)
    return runs


def _distinct_tokenizers(runs: pd.DataFrame) -> list[str | None]:
    """A name for each run's tokenizer: equal for equal hashes, whatever they were called, and with the hash if one name stands
    for several.
    """
    first: dict[str, str] = {}
    digests = list(runs["tokenizer_hash"])
    names = [
        first.setdefault(digest, name) if digest else name for name, digest in zip(runs["tokenizer"], digests, strict=True)
    ]
    several = {name for name, count in Counter(first.values()).items() if count > 1}
    return [
        f"{name} {digest[:12]}..." if digest and name in several else name for name, digest in zip(names, digests, strict=True)
    ]


def _distinct_names(folders: list[Path]) -> list[str]:
    """Each folder's own name, after the names of as many folders above it as it takes to tell it from the others."""
    whole = [folder.resolve().parts for folder in folders]
    names = [folder.name for folder in folders]
    for length in range(2, max(map(len, whole), default=0) + 1):
        taken = Counter(names)
        names = ["/".join(parts[-length:]) if taken[name] > 1 else name for name, parts in zip(names, whole, strict=True)]
    return names


def read_run(folder: Path, promised: str | None) -> dict[str, Any]:
    """The row of one run. Raises UserError if it is cut off, unreadable or not the run that its sweep promises."""
    c = read_config(folder)
    if promised is not None and identity(c) != promised:
        raise UserError(
            f"{folder} is a run of another sweep: its config.toml is not what sweep.json promises; move it elsewhere"
        )
    facts, path = _read_facts(folder / "run.json"), folder / "metrics.jsonl"
    data = path.read_bytes() if path.exists() else b""
    if facts is None and data:
        raise UserError(f"{folder} has metrics.jsonl but no run.json; resume the run with train.py, or leave the folder out")
    steps, validations, unreadable = _whole_columns(data) or _columns(data)
    if b"\n" in data and not len(steps) and not validations:  # without a newline it is the run's first record that is cut off
        raise UserError(f"{path} holds no record; train the run again, or leave {folder} out")
    totals = _totals(steps, validations, facts.branched_at if facts else 0)
    if facts is not None and facts.state == "finished":
        validated = not c.validation.enable or totals["validation_step"] == facts.steps
        if totals["step"] != facts.steps or not validated:
            raise UserError(
                f"{path} is cut off: it ends at step {totals['step']:,} of the {facts.steps:,} that run.json calls finished"
                f"{'' if validated else ', without the last validation'}; copy it again, or leave {folder} out"
            )
    known = dict.fromkeys(_Facts.model_fields) if facts is None else facts.model_dump(include=set(_Facts.model_fields))
    return {
        "folder": folder,
        "model": c.model,
        **{name: key.of(c) for name, key in all_keys().items()},
        "model.intermediate_size": c.model.mlp_size,
        **known,
        **totals,
        "unreadable_lines": unreadable,
        "evaluations": read_evaluations(folder),
        **_named(c.model),
        **_sizes(facts),
        "state": _state(facts, totals),
    }


def read_config(folder: Path) -> Config:
    """config.toml of a run. Raises UserError if there is none, or it is no configuration."""
    path = folder / "config.toml"
    if not path.exists():
        raise UserError(f"{folder} is not a run folder: it has no config.toml; leave it out")
    try:
        text = path.read_text(encoding="utf-8")
        try:
            return Config.model_validate(tomli.loads(text))  # ten times as fast as what follows
        except ValueError:
            return config_from_toml(text, str(path))  # says what is wrong, or takes another spelling
    except ValueError as error:
        first, *more = str(error).split("\n  ")
        reason = f"{len(more)} problems, the first: {more[0]}" if more else first
        raise UserError(f"{path} is not a configuration of this program ({reason}); leave {folder} out") from error


def _read_facts(path: Path) -> _Facts | None:
    """run.json, or None if the run has never started."""
    if not path.exists():
        return None
    return parse_json(_Facts, path.read_bytes(), path, "record of a run", "resume the run with train.py, or leave it out")


def _columns(data: bytes) -> tuple[pd.DataFrame, list[dict[str, Any]], int]:
    """The step records of a metrics.jsonl as columns, its validations, and how many lines before the last are neither."""
    records, unreadable = parse_records(data)
    validations = [record for record in records if "validation_loss" in record]
    steps = [record for record in records if "validation_loss" not in record and record.keys() >= set(_STEP_KEYS)]
    frame = pd.DataFrame(steps, columns=[*_STEP_KEYS, "mfu"])
    return frame, validations, unreadable + len(records) - len(steps) - len(validations)


def _whole_columns(data: bytes) -> tuple[pd.DataFrame, list[dict[str, Any]], int] | None:
    """The same in a third of the time (23 ms for 10,000 lines); None if any line is not a whole record of finite numbers."""
    try:
        table = read_json(io.BytesIO(data), ReadOptions(use_threads=False, block_size=len(data) + 1))
        names = set(table.column_names)
    except (ArrowException, ValueError):  # ValueError: names that are not UTF-8
        return None
    numbers = all(types.is_int64(kind) or types.is_float64(kind) for kind in table.schema.types)
    if table.num_rows != data.count(b"\n") or not numbers or not names.issuperset(_STEP_KEYS):
        return None
    if not types.is_int64(table["step"].type):
        return None
    frame = table.to_pandas()
    validated = frame["validation_loss"].notna() if "validation_loss" in names else pd.Series(False, frame.index)
    steps = frame[~validated]
    if steps[_STEP_KEYS].isna().any(axis=None) or not frame["step"].between(0, 2**62 - 1).all():
        return None
    validations = [row.dropna().to_dict() | {"step": int(row["step"])} for _, row in frame[validated].iterrows()]
    return steps.reindex(columns=[*_STEP_KEYS, "mfu"]), validations, 0


def _totals(steps: pd.DataFrame, validations: list[dict[str, Any]], first_step: int = 0) -> dict[str, Any]:
    """What metrics.jsonl amounts to; None if nothing of the kind was recorded.

    "seconds" are those of training after `first_step`, without validations and checkpoints. "tokens_per_second" and "mfu" are
    medians over at most CURVE_POINTS evenly spaced records. "validation_noise" is the standard deviation of the last validation
    losses around their straight line. The curve has means over blocks of records, at most CURVE_POINTS of them; its
    loss is NaN if none in a block is finite.
    """
    step, loss, seconds, tokens = (steps[key].to_numpy(float) for key in ("step", "loss", "step_seconds", "tokens"))
    block = math.ceil(len(steps) / CURVE_POINTS) or 1
    medians = steps[::block][["tokens_per_second", "mfu"]].astype(float).median()
    last, validation = steps.iloc[-1] if len(steps) else None, validations[-1] if validations else {}
    return {
        "step": 0 if last is None else int(last["step"]),
        "training_loss": float(_block_means(loss[-math.ceil(FINAL_SHARE * len(loss)) :], len(loss))[0]) if len(loss) else None,
        "validation_step": validation.get("step"),
        **{key: validation.get(key) for key in ("validation_loss", "validation_bits_per_byte")},
        "validation_noise": _noise([record["validation_loss"] for record in validations[-NOISE_OF:]]),
        "validation_tokens": _whole(validation.get("validation_tokens")),
        **{key: None if math.isnan(value) else value for key, value in medians.items()},
        "seconds": float(np.diff(step, prepend=first_step) @ seconds),
        "skipped_steps": 0 if last is None else _whole(last["skipped_steps"]),
        "curve_tokens": _block_means(tokens, block),
        "curve_loss": _block_means(loss, block),
    }


def _noise(losses: list[float]) -> float | None:
    """Standard deviation of evenly spaced losses around their straight line; None for too few, or if one is not a number."""
    values = np.array(losses, float)
    if len(values) < _NOISE_NEEDS or not np.isfinite(values).all():
        return None
    at = np.arange(len(values))
    residuals = values - np.polyval(np.polyfit(at, values, 1), at)
    return float(np.sqrt(residuals @ residuals / (len(values) - 2)))


def _whole(value: float | None) -> float | None:
    """A count, which a frame may hold as 5.0, as 5."""
    return int(value) if value is not None and math.isfinite(value) else value


def _block_means(values: np.ndarray, size: int) -> np.ndarray:
    """Means of the finite ones of each `size` values."""
    starts = np.arange(0, len(values), size)
    finite = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        sums, counts = (np.add.reduceat(each, starts) for each in (np.where(finite, values, 0.0), finite.astype(float)))
        return sums / counts


def _state(facts: _Facts | None, totals: dict[str, Any]) -> str:
    """One of STATES; a run has diverged if it is finished and its loss is not a number."""
    if facts is None:
        return "not started"
    if facts.state != "finished":
        return "unfinished"
    loss = totals["training_loss"] if totals["validation_loss"] is None else totals["validation_loss"]
    return "finished" if loss is not None and math.isfinite(loss) else "diverged"


def _sizes(facts: _Facts | None) -> dict[str, int | None]:
    """Of the whole run, done or not; FLOPs are the model's."""
    if facts is None:
        return dict.fromkeys(("without_embedding", "tokens", "flops"))
    tokens = facts.steps * facts.tokens_per_step if facts.planned_tokens is None else facts.planned_tokens
    without = facts.parameters - facts.embedding_parameters
    return {"without_embedding": without, "tokens": tokens, "flops": facts.flops_per_token * tokens}


def _named(model: config.Model) -> dict[str, Any]:
    """What a model is called, and the order in which models are shown, asked of its configuration for any mixer.

    "family" is what is fitted and coloured as one: mixer, n_h, gate, range of eigenvalues and heads per key. "kind" is the
    family without n_h, in the order in which families are shown. "n_h" is None if the mixer takes no such steps.
    """
    other = model.model_copy(update={"num_householder": model.num_householder % 8 + 1})
    n_h = model.num_householder if other.family != model.family else None
    softmax = state_size(model) == 0
    eigenvalues = "" if n_h is None else " [-1, 1]" if model.allow_neg_eigval else " [0, 1]"
    hybrid = 0 if softmax else len(set(model.attention_layers))
    heads = f"{model.softmax_heads} heads" if softmax else model.heads
    shared = model.num_heads // model.key_heads
    keys = f" ({shared} heads per key)" if shared > 1 else ""
    softmax_block = "olmo softmax" if model.attention_block == "olmo" else "softmax"
    choices = (model.use_forget_gate, model.adaptive_householder, not model.allow_neg_eigval)
    return {
        "family": model.family + eigenvalues + keys + (f" + {hybrid} {softmax_block}" if hybrid else ""),
        "kind": (n_h is None, softmax, model.mixer, len(model.attention_layers), *choices),
        "n_h": n_h,
        "shape": f"{model.num_hidden_layers} x {model.hidden_size}, {heads}, {model.mlp_size}",
    }
