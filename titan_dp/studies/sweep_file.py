"""A sweep file and the runs it stands for.

A sweep file is a config (settings, `extends`) with a section [sweep]: axes, of which every combination is a cell, or a list
of cells, or both (every listed cell with every combination). Each cell becomes one complete, checked configuration; with a
matching rule its shape is solved so that all cells of one size are equally large. The invariant: a cell is its
configuration. No two may be equal, and nothing about a cell is known only here. Reading and expanding write nothing.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli
from pydantic import Field, WithJsonSchema

from titan_dp import config
from titan_dp.checkpoint.manifest import MANIFEST, step_folder
from titan_dp.config import Config, Positive, Section
from titan_dp.config.advice import HINTS, explain_unknown
from titan_dp.config.describe import all_keys, to_toml
from titan_dp.config.load import SHIPPED, Loaded, Setting, build_config, build_section, read_files, resolve_config_path
from titan_dp.errors import UserError, counted, did_you_mean
from titan_dp.files import shorten, shown
from titan_dp.model.size import model_size
from titan_dp.studies.shapes import KNOBS, SHAPE_KEYS, Proportions, Rule, Variant, choose_depth, match_shapes
from titan_dp.train.batch_plan import plan_batches
from titan_dp.train.lr_scheduler import decay_steps
from titan_dp.train.run_folder import identity

_SweepName = Annotated[
    str,
    Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$"),
    WithJsonSchema({"title": "name of letters, digits, ., _ and -"}),
]


class SweepSection(Section):
    """[sweep]: what is varied, and what is kept equal."""

    name: _SweepName | None = None
    """Folder of the sweep inside job.dump_folder; default: the file's name without .toml."""
    description: str = ""
    """One line for people."""
    match: Literal["heads", "head_dim", "intermediate_size", "hidden_size"] | None = None
    """The knob by which all cells of one size get equally large; default: shapes are taken as they are given."""
    match_quantity: Literal["parameters", "flops"] = "parameters"
    """What the cells of one size have in common: parameters, or model FLOPs per token."""
    multiple: Positive = 64
    """Grid of all matrix dimensions that are solved for."""
    tolerance: Annotated[float, Field(gt=0, le=5)] | None = None
    """Largest deviation of a solved size in percent; default: 0.1 if the grid allows it, else 0.25."""
    aspect_ratio: Positive | None = None
    """Width over depth of the solved shapes; default: every size has the base's number of layers."""
    tune: Annotated[str | list[str], WithJsonSchema({"title": "name of an axis, or list of them"})] = Field(default=[])
    """Axes of which the report takes the best value for each family, size and length, such as "lr"."""
    branch: bool = False
    """Train what cells that differ only in their length have in common once: shorter ones begin with their decay, from a
    checkpoint of the longest."""
    axes: Annotated[dict[str, list[Any]], WithJsonSchema({"title": "table of lists of values"})] = Field(default={})
    """Values by axis; every combination is a cell."""
    cells: Annotated[list[dict[str, Any]], WithJsonSchema({"title": "list of tables"})] = Field(default=[])
    """Listed cells: each a table of axis values, with a `name` if wanted, and with `axes` of its own; each is combined with
    every point of its axes and of those above."""


# What an axis sets if its name is not that of a key.
_SHORT = {"lr": ("optimizer.lr",), "seed": ("debug.seed", "data.seed"), "tokens": ("training.tokens",)}
SEED_KEYS = {*_SHORT["seed"]}
_SOLVED = ("size", "tokens_per_parameter", "flops")
_LENGTHS = ("tokens", "training.tokens", "training.steps", "tokens_per_parameter", "flops")

# How axes begin in the names of run folders; others begin with the last part of their key. Folders are found by these
# names: a change here would train finished cells again.
_PREFIX = {
    "num_householder": "nh",
    "num_heads": "h",
    "head_dim": "d",
    "hidden_size": "w",
    "intermediate_size": "mlp",
    "num_hidden_layers": "l",
    "size": "",
    "tokens": "t",
    "tokens_per_parameter": "tpp",
    "flops": "c",
    "seed": "s",
    "mixer": "",
}
_FLAGS = {"use_forget_gate": ("ungated", "gated"), "allow_neg_eigval": ("pos", "neg")}


_UNFIT = r"[^A-Za-z0-9._+-]"
_TAKEN = ("sweep.json", "slurm.json", "report", "forecast.json")
"""Names in a sweep's folder that are not runs'."""


@dataclass(frozen=True)
class Cell:
    """One run of a sweep: `config` is complete, with job.dump_folder and job.run_name."""

    name: str
    axes: dict[str, Any]
    config: Config
    identity: str
    parameters: int
    flops_per_token: int
    tokens: int
    steps: int
    added: bool = False
    """Not named by the file, but added beyond the edge of a tuned axis."""
    trunk: str = ""
    """The cell from whose checkpoint this one branches; empty if it begins with step 0."""
    branch_step: int = 0
    """The step of that checkpoint."""

    @staticmethod
    def of(folder: Path, name: str, axes: dict[str, Any], c: Config) -> Cell:
        """The cell `name` of the sweep in `folder`. Raises UserError if no batch plan exists for `c`."""
        job = c.job.model_copy(update={"dump_folder": str(folder), "run_name": name})
        c = Config.model_validate(c.model_copy(update={"job": job}).model_dump())
        size, plan = model_size(c.model, c.training.seq_len), plan_batches(c.training, 1)
        return Cell(name, axes, c, identity(c), size.parameters, size.flops_per_token, plan.tokens, plan.steps)

    def beyond(self, values: dict[str, Any]) -> Cell:
        """This cell with other `values` of axes that set one key each, as one that is added to its sweep.

        Raises UserError if the configuration does not take a value.
        """
        name, data = self.name, self.config.model_dump()
        for axis, value in values.items():
            own, new = (re.sub(_UNFIT, "_", _label(axis, each)) for each in (self.axes[axis], value))
            name, found = re.subn(rf"(^|-){re.escape(own)}(?=-|$)", lambda m, new=new: m[1] + new, name, count=1)  # type: ignore[misc]
            name = name if found else f"{name}-{new}"  # a listed cell with a name of its own
            (key,) = _keys_of(axis)
            *sections, last = key.split(".")
            reduce(getitem, sections, data)[last] = value
        try:
            c = Config.model_validate(data)
        except ValueError as error:
            added = ", ".join(f"{axis} = {value:g}" for axis, value in values.items())
            raise UserError(
                f"{added} would be the next value for {self.name}, and the configuration does not take it"
            ) from error
        return replace(Cell.of(self.folder.parent, name, self.axes | values, c), added=True)

    @property
    def flops(self) -> int:
        """Of the whole run."""
        return self.flops_per_token * self.tokens

    @property
    def own_tokens(self) -> int:
        """Without those that its trunk trains for it."""
        return self.tokens // self.steps * (self.steps - self.branch_step)

    @property
    def own_flops(self) -> int:
        return self.flops_per_token * self.own_tokens

    @property
    def awaits_trunk(self) -> bool:
        """Whether the checkpoint it begins from is not there yet."""
        return bool(self.trunk) and not (Path(self.config.checkpoint.branch_from) / MANIFEST).exists()

    @property
    def folder(self) -> Path:
        return Path(self.config.job.dump_folder) / self.name

    def toml(self) -> str:
        """config.toml of the run."""
        return Loaded(self.config, dict.fromkeys(all_keys(), "sweep")).resolved_toml()

    def __str__(self) -> str:
        return "(" + shorten(", ".join(f"{axis} = {value}" for axis, value in self.axes.items())) + ")"


@dataclass(frozen=True)
class Sweep:
    name: str
    description: str
    file: Path
    folder: Path
    cells: list[Cell]
    tune: dict[str, str]
    """The key of each tuned axis."""
    branch: bool

    def add(self, cells: list[Cell]) -> None:
        """Raises UserError if a cell cannot be a branch in a sweep of branches."""
        self.cells.extend(cells)
        if self.branch:
            self.cells[:] = _branched(self.cells)


@dataclass(frozen=True)
class _Point:
    """A cell before its shape and length are solved."""

    name: str
    axes: dict[str, Any]
    settings: list[Setting]

    @property
    def keys(self) -> set[str]:
        return {setting.key for setting in self.settings}


def load_sweep(path: Path) -> Sweep:
    """Read and expand a sweep file, by its path or by the name of a shipped one.

    Raises UserError: a file that cannot be read, an unknown axis or a wrong value, axes that contradict the matching
    rule or each other, a size that cannot be reached, two cells with one configuration.
    """
    shipped = SHIPPED / "sweeps"
    if (found := resolve_config_path(str(path), shipped)) is None:
        if resolve_config_path(str(path)) is not None:
            raise UserError(f"{path} describes one run and no sweep; `titan-dp train --config {path}` starts it")
        names = sorted(file.stem for file in shipped.glob("*.toml"))
        near = did_you_mean(path.stem, names) or f"; those that ship are {', '.join(names)}"
        raise UserError(f"there is no sweep file {path}{near}")
    path = found
    section, base = _read(path)
    try:
        _check_axes(section)
        points = list(_points(section, f"{path} [sweep]"))
        configs = _solve(section, base, points)
        name = section.name or path.stem
        folder = Path(configs[0].job.dump_folder) / name
        cells = [Cell.of(folder, _checked_name(p.name), p.axes, c) for p, c in zip(points, configs, strict=True)]
        _refuse_twins(cells)
        tune = _tuned(section, cells)
        cells = _branched(cells) if section.branch else cells
    except UserError as error:
        raise UserError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from error
    return Sweep(name, section.description, path, folder, cells, tune, section.branch)


# -- reading -----------------------------------------------------------------------------------------------------------


def _read(path: Path) -> tuple[SweepSection, list[Setting]]:
    """The [sweep] section, and the settings of the base configuration with their origins."""
    base, own, axes = [], [], {}
    for setting in read_files(path):
        section, _, name = setting.key.partition(".")
        if section != "sweep":
            base.append(setting)
        elif name.startswith("axes."):  # any name may be an axis, so [sweep.axes] is one value: a table
            if not isinstance(setting.value, list):
                raise UserError(f"{setting.origin}: {shorten(setting.key)} = {shown(setting.value)}: expected a list of values")
            axes[name.removeprefix("axes.")] = setting.value
            own.append(Setting("sweep.axes", axes, setting.origin))
        elif name.startswith("cells."):  # [[sweep.cells]]: read_files knows no arrays of tables
            if not own or (own[-1].key, own[-1].source) != ("sweep.cells", setting.source):  # the array's first setting
                found = tomli.loads(Path(setting.source).read_text(encoding="utf-8-sig"))["sweep"]
                own.append(Setting("sweep.cells", found["cells"] if isinstance(found, dict) else found, setting.origin))
        else:
            own.append(setting)
    if not own:
        raise UserError(f"{path} has no [sweep] section, or an empty one; as it is, it is a config for train.py")
    return build_section(SweepSection, "sweep", own), base


def _keys_of(axis: str) -> tuple[str, ...]:
    """The configuration keys an axis sets; none for axes that are solved."""
    if axis in _SOLVED:
        return ()
    return _SHORT.get(axis, (axis,) if "." in axis else (f"model.{axis}",))


def _own_axes(cell: dict[str, Any]) -> dict[str, list[Any]]:
    """The axes that a listed cell varies."""
    own: dict[str, list[Any]] = cell.get("axes", {})
    return own


def _listed(cell: dict[str, Any]) -> list[str]:
    """The axes that a listed cell sets or varies."""
    return [axis for axis in (*cell, *_own_axes(cell)) if axis not in ("name", "axes")]


def _check_axes(section: SweepSection) -> None:
    """Raise UserError for unknown axes and for axes that contradict each other or the matching rule."""
    for cell in section.cells:
        own = _own_axes(cell)
        if not isinstance(own, dict) or not all(isinstance(values, list) for values in own.values()):
            raise UserError(f"axes of a listed cell = {shown(own)}: expected a table of lists of values")
        if twice := sorted(own.keys() & cell.keys()):
            raise UserError(f"{twice[0]} is both an axis of a listed cell and set by it; keep one")
    listed = [axis for cell in section.cells for axis in _listed(cell)]
    axes = dict.fromkeys([*section.axes, *listed])
    if not axes:
        raise UserError("[sweep] has neither axes nor cells; give [sweep.axes] with num_householder = [1, 2], say")
    owners: dict[str, str] = {}
    for axis in axes:
        for key in _keys_of(axis):
            if key not in all_keys():
                raise UserError(f"unknown axis {shorten(axis)}; {_explain_axis(axis, key)}")
            if (other := owners.setdefault(key, axis)) != axis:
                raise UserError(f"the axes {other} and {axis} both set {key}; keep one")
    for axis, values in [*section.axes.items(), *(pair for cell in section.cells for pair in _own_axes(cell).items())]:
        if not values:
            raise UserError(f"the axis {axis} has no values; give some, or remove it")
    for axis in section.axes:
        if axis in listed:
            raise UserError(f"{axis} is both an axis and set by a listed cell; keep one")
    if len(lengths := [axis for axis in axes if axis in _LENGTHS]) > 1:
        raise UserError(f"the axes {' and '.join(lengths)} both set the length of a run; keep one")
    if section.match is None:
        idle = section.model_fields_set & {"match_quantity", "multiple", "tolerance", "aspect_ratio"}
        if idle:
            raise UserError(f"sweep.{min(idle)} has no effect without sweep.match; set match, or remove it")
        if "size" in axes:
            raise UserError(f'the axis size needs a rule that finds shapes; set match = "heads" (or {_others("heads")})')
    elif f"model.{KNOBS[section.match]}" in owners:
        raise UserError(
            f'the axis {KNOBS[section.match]} contradicts match = "{section.match}", which solves for it; '
            f"match by another of {_others(section.match)}, or drop the axis"
        )


def _tuned(section: SweepSection, cells: list[Cell]) -> dict[str, str]:
    """The key of every tuned axis. Raises UserError if there is nothing to tune, or if it would change what is compared."""
    tune = [section.tune] if isinstance(section.tune, str) else section.tune
    found = {}
    for axis in tune:
        keys = _keys_of(axis)
        if any(axis not in cell.axes for cell in cells):
            raise UserError(
                f"sweep.tune names {shown(axis)}, which is no axis of every cell; give {shorten(axis)} = [...] in [sweep.axes]"
            )
        if len(keys) != 1 or keys[0] in SEED_KEYS or keys[0].startswith("training."):
            raise UserError(f'sweep.tune = "{axis}": seeds, sizes and lengths are compared, not tuned; tune lr, say')
        found[axis] = keys[0]
    arms: dict[str, list[Cell]] = {}
    for cell in cells:
        fixed = {a: v for a, v in cell.axes.items() if a not in found and not SEED_KEYS.issuperset(_keys_of(a) or [a])}
        arms.setdefault(repr(fixed), []).append(cell)
    for axis, arm in itertools.product(found, arms.values()):
        values = [cell.axes[axis] for cell in arm]
        if wrong := [v for v in values if isinstance(v, bool) or not isinstance(v, int | float) or not 0 < v < float("inf")]:
            raise UserError(f"the tuned axis {axis} holds {shown(wrong[0])}; its logarithm is fitted, so give numbers above 0")
        if len(set(values)) < 2:
            raise UserError(f"the tuned axis {axis} has one value ({values[0]:g}) for {arm[0]}; give three or more")
        if len({(cell.config.model.family, cell.parameters, cell.tokens) for cell in arm}) > 1:
            raise UserError(f'sweep.tune = "{axis}": it changes the model or its length, which are compared; tune lr, say')
    return found


def _explain_axis(axis: str, key: str) -> str:
    """What to write instead of an axis that does not exist."""
    models = [name.removeprefix("model.") for name in all_keys() if name.startswith("model.")]
    if axis in ("gate", "gates", "gated", "gating"):
        return "did you mean use_forget_gate?"
    if near := get_close_matches(axis, [*_SOLVED, *_SHORT, *models], n=1):
        return f"did you mean {near[0]}?"
    if axis in HINTS or "." in axis:
        return explain_unknown(key if "." in axis else axis)
    return f"axes are {', '.join([*_SOLVED, *_SHORT])}, the keys of [model], and any other key with its section"


def _others(knob: str) -> str:
    return ", ".join(f'"{other}"' for other in KNOBS if other != knob)


def _points(section: SweepSection, origin: str) -> Iterator[_Point]:
    """Every listed cell (or one without a name) with every combination of its axes and the sweep's, in the file's order."""
    for listed in section.cells or [{}]:
        own = {axis: value for axis, value in listed.items() if axis not in ("name", "axes")}
        first = [str(listed["name"])] if "name" in listed else [_label(axis, value) for axis, value in own.items()]
        axes = {**_own_axes(listed), **section.axes}
        for values in itertools.product(*axes.values()):
            point = dict(zip(axes, values, strict=True))
            name = "-".join([*first, *(_label(axis, value) for axis, value in point.items())])
            settings = [Setting(key, value, origin) for axis, value in (own | point).items() for key in _keys_of(axis)]
            yield _Point(name, own | point, settings)


def _label(axis: str, value: object) -> str:
    """What an axis adds to the name of a run folder: 'nh2', 'lr0.001', 'gated'."""
    last = axis.rpartition(".")[2]
    if last in _FLAGS and isinstance(value, bool):
        return _FLAGS[last][value]
    text = to_toml(value) if isinstance(value, bool | int | float) else str(value)
    return _PREFIX.get(last, last) + text


def _checked_name(name: str) -> str:
    """`name` as the name of a folder. Raises UserError if it is empty, hidden, too long, or taken."""
    clean = re.sub(_UNFIT, "_", name)
    if not re.match(r"[A-Za-z0-9]", clean) or len(clean) > 150 or clean in _TAKEN:
        raise UserError(
            f"a cell would be named {name[:60]!r}, which can be no run folder; give its cell a `name` of 1 to 150 "
            "letters, digits, ., _ and -, beginning with a letter or digit"
        )
    return clean


# -- solving -----------------------------------------------------------------------------------------------------------


def _solve(section: SweepSection, base: list[Setting], points: list[_Point]) -> list[Config]:
    """The checked configuration of every point, except for its folder."""
    any_length = [Setting("training.tokens", 1, "sweep")]  # to check the rest with, if the real one follows from the size
    solved = {"tokens_per_parameter", "flops"}
    configs = [
        build_config([*base, *point.settings, *(any_length if point.axes.keys() & solved else [])])[0] for point in points
    ]
    if section.match is not None:
        like = build_config([*base, Setting("training.steps", 1, "sweep")])[0]
        models = _match(section, like, configs, points)
        configs = [c.model_copy(update={"model": model}) for c, model in zip(configs, models, strict=True)]
    return [_with_length(c, point.axes) for c, point in zip(configs, points, strict=True)]


def _match(section: SweepSection, like: Config, configs: list[Config], points: list[_Point]) -> list[config.Model]:
    """The model of every cell: those of one target size are solved together, so that they differ as little as possible."""
    assert section.match is not None
    tolerance = None if section.tolerance is None else section.tolerance / 100
    rule = Rule(section.match, section.match_quantity, section.multiple, tolerance)
    proportions = Proportions.of(like.model)
    groups: dict[tuple[int, int], dict[str, Variant]] = {}  # by target and sequence length, each model once
    where = []
    for c, point in zip(configs, points, strict=True):
        pinned = frozenset(key for key in SHAPE_KEYS if f"model.{key}" in point.keys)
        group, model = (_target(point.axes, like, rule), c.training.seq_len), c.model.model_dump_json()
        groups.setdefault(group, {})[model] = Variant(c.model, pinned)
        where.append((group, model))
    solved: dict[tuple[tuple[int, int], str], config.Model] = {}
    for (target, seq_len), variants in groups.items():
        models = list(variants.values())
        if section.aspect_ratio and (free := [v for v in models if "num_hidden_layers" not in v.pinned]):
            depth = choose_depth(free[0], target, proportions, rule, seq_len, section.aspect_ratio).model.num_hidden_layers
            changes = {"num_hidden_layers": depth}
            models = [Variant(v.model.model_copy(update=changes), v.pinned) if v in free else v for v in models]
        shaped = match_shapes(models, target, proportions, rule, seq_len)
        solved.update(zip((((target, seq_len), model) for model in variants), shaped, strict=True))
    return [solved[key] for key in where]


def _target(axes: dict[str, Any], like: Config, rule: Rule) -> int:
    """The size of a cell: that of the axis `size`, or that of the base configuration."""
    if "size" in axes:
        return _count(axes["size"], "size")
    size = model_size(like.model, like.training.seq_len)
    return size.parameters if rule.quantity == "parameters" else size.flops_per_token


def _count(value: object, axis: str) -> int:
    number = config.parse_count(value)
    if not isinstance(number, int | float) or isinstance(number, bool) or not 0 < number < 1e40:
        raise UserError(f'the axis {axis} holds {shown(value)}, which is no count above 0 such as "805M" or 1e18')
    return round(number)


def _with_length(c: Config, axes: dict[str, Any]) -> Config:
    """Solve the length of a run that is given by its size or its FLOPs."""
    if c.training.global_batch_size == -1:
        raise UserError("a sweep needs training.global_batch_size: with -1 the batch depends on how many processes run a cell")
    plan_batches(c.training.model_copy(update={"steps": 1, "tokens": None}), 1)  # refuses batches no process can make up
    size = model_size(c.model, c.training.seq_len)
    if "tokens_per_parameter" in axes:
        ratio = axes["tokens_per_parameter"]
        if not isinstance(ratio, int | float) or isinstance(ratio, bool) or not 0 < ratio < 1e9:
            raise UserError(f"the axis tokens_per_parameter holds {shown(ratio)}, which is no number above 0 such as 20")
        tokens = round(ratio * size.parameters)
    elif "flops" in axes:
        tokens = max(1, round(_count(axes["flops"], "flops") / size.flops_per_token))
    else:
        return c
    return c.model_copy(update={"training": c.training.model_copy(update={"tokens": tokens, "steps": None})})


# -- branches ----------------------------------------------------------------------------------------------------------


def _branched(cells: list[Cell]) -> list[Cell]:
    """The cells, of which those that differ only in their length share a trunk: the longest of them.

    It keeps checkpoints where the others begin their decay, and they go on from there. Raises UserError if none share one, or
    if their schedules do not.
    """
    alike: dict[str, list[Cell]] = {}
    for cell in cells:
        training = cell.config.training.model_copy(update={"steps": 1, "tokens": None})
        alike.setdefault(identity(cell.config.model_copy(update={"training": training})), []).append(cell)
    found: dict[str, Cell] = {}
    for group in alike.values():
        steps = {} if len(group) == 1 else {cell.name: _branch_step(cell) for cell in group}
        trunk = max(group, key=lambda cell: cell.steps)
        at = Path(trunk.config.job.dump_folder) / trunk.name / trunk.config.checkpoint.folder
        for cell in group:
            if cell is trunk:
                kept = sorted({step for name, step in steps.items() if name != trunk.name})
                found[cell.name] = _kept(cell, kept)
            else:
                step = steps[cell.name]
                found[cell.name] = _kept(cell, [], str(step_folder(at, step)), trunk.name, step)
    if not any(cell.trunk for cell in found.values()):
        raise UserError("sweep.branch = true, but no cells differ only in their length; give tokens = [...] in [sweep.axes]")
    return [found[cell.name] for cell in cells]


def _kept(cell: Cell, keep_steps: list[int], branch_from: str = "", trunk: str = "", branch_step: int = 0) -> Cell:
    keys = {"keep_steps": keep_steps, "branch_from": branch_from}
    c = cell.config.model_copy(update={"checkpoint": cell.config.checkpoint.model_copy(update=keys)})
    return replace(cell, config=c, trunk=trunk, branch_step=branch_step)


def _branch_step(cell: Cell) -> int:
    """The step before the first of its decay. Raises UserError if the cell's schedule has none after its warmup."""
    c, schedule = cell.config, cell.config.lr_scheduler
    if not c.checkpoint.enable:
        raise UserError("sweep.branch = true needs checkpoints; set checkpoint.enable = true")
    if schedule.decay_ratio is None:
        raise UserError(
            "sweep.branch = true needs a learning rate that is constant between warmup and decay; set lr_scheduler.decay_ratio "
            "to the fraction of a run that decays, 0.2 say"
        )
    for key, value in (("total_steps", schedule.total_steps), ("start_step", schedule.start_step)):
        if value:
            raise UserError(
                f"sweep.branch = true, and lr_scheduler.{key} = {value}; remove it: lengths have schedules of their own"
            )
    decay, warmup = decay_steps(schedule.decay_ratio, cell.steps), schedule.warmup_steps
    if not decay or warmup + decay > cell.steps:
        ways = "lower lr_scheduler.warmup_steps or lr_scheduler.decay_ratio" if decay else "raise lr_scheduler.decay_ratio"
        raise UserError(
            f"{cell} has {counted(cell.steps, 'step')}, {warmup} of warmup and {decay} of decay: no branch of a longer run; "
            f"{ways}, or train longer"
        )
    return cell.steps - decay


def _refuse_twins(cells: list[Cell]) -> None:
    seen: dict[str, Cell] = {}
    for cell in cells:
        for key in (cell.identity, f"name {cell.name}"):
            if key in seen:
                same = "the same configuration" if key == cell.identity else "the same name"
                raise UserError(f"the cells {seen[key]} and {cell} have {same}; remove one, or let an axis tell them apart")
            seen[key] = cell
