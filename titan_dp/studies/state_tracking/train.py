"""`titan-dp state-tracking train`: a sweep over models and seeds on one problem, then a table of all runs.

    titan-dp state-tracking train --task S3 --num-householder 2
    titan-dp state-tracking train --task S3 --models deltaproduct_2[-1,1] deltaproduct_2[0,1] --seeds 3 --at-once 2

The cells are built here over a config (`train_configs/state_tracking/small.toml` unless --config names another) and any
`--section.key VALUE`; they are written and run as those of `titan-dp sweep`. A folder holds the runs of any number of such
commands: what is finished is not run again, and what was trained with other settings is never touched.
"""

from __future__ import annotations

import argparse
from contextlib import closing
from pathlib import Path

from titan_dp.config.arguments import add_setting, count, positive, take_settings
from titan_dp.config.describe import to_toml
from titan_dp.config.load import SHIPPED, Loaded, keys_of, load_config, resolve_config_path
from titan_dp.errors import RunError, UserError
from titan_dp.model.size import model_size
from titan_dp.output import add_format_option
from titan_dp.studies.state_tracking.models import KNOWN, MODEL_KEYS, folder_name, label, mlp_for, model_settings
from titan_dp.studies.sweep import cells_to_write, launch
from titan_dp.studies.sweep_file import Cell
from titan_dp.train.run_folder import RunLock, is_finished, read_run, write_config

# flag: (key, what it is, the value of a flag that takes none)
FLAGS = {
    "--task": (
        "state_tracking.task",
        "S3, A5, D4, Z60, S3xZ2, a multiplication table.csv, parity, ...",
        None,
    ),
    "--num-householder": ("model.num_householder", "n_h: Householder steps per token", None),
    "--gated": ("model.use_forget_gate", "forget gate", "true"),
    "--householder-cost": ("training.householder_cost", "adaptive models: price of a step, nats", None),
    "--steps": ("training.steps", "optimizer steps", None),
    "--min-length": ("state_tracking.min_length", "shortest words; default: all as long as --length", None),
    "--curriculum": ("state_tracking.curriculum_steps", "steps over which words grow to --length", None),
    "--tokens-per-element": ("state_tracking.tokens_per_element", "tokens per element, fillers included", None),
    "--max-moved": ("state_tracking.max_moved", "draw elements that move at most so many points; 2: swaps only", None),
    "--test-length": ("state_tracking.test_length", "longest test words; default: 4 times --length", None),
    "--solved-accuracy": ("state_tracking.solved_accuracy", "validation words all right from which a run is solved", None),
    "--stop-when-solved": ("state_tracking.stop_when_solved", "end a run at the first validation that finds it solved", "true"),
}
_REMEDY = "choose another --out, or move that folder away"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", default="small", help="TOML file, or a name in train_configs/state_tracking (default: small)"
    )
    take_settings(
        parser,
        "any other setting, as for train.py: --model.num_hidden_layers 3, --optimizer.lr 1e-3, --training.local_batch_size 64",
    )
    for flag, (key, what, value) in FLAGS.items():
        add_setting(parser, flag, *(("--group",) if flag == "--task" else ()), key=key, help=what, value=value)
    parser.add_argument("--range", choices=["[0,1]", "[-1,1]"], help="of the eigenvalues of each factor (default: [-1,1])")
    parser.add_argument("--length", type=positive, help="symbols of the longest training words (default: 32)")
    parser.add_argument("--models", nargs="+", metavar="MODEL", help=f"compare these at equal parameters: {KNOWN}")
    parser.add_argument("--parameters", type=count, help="of each of --models (default: of the largest with the MLP given)")
    parser.add_argument("--seeds", type=positive, default=1, help="runs of each model, with seeds 1, 2, ... (default: 1)")
    parser.add_argument("--out", type=Path, help="folder of the run folders (default: outputs/state_tracking/TASK)")
    parser.add_argument("--at-once", type=positive, default=1, metavar="K", help="runs at the same time (default: 1)")
    parser.add_argument("--launch", choices=["local", "print"], default="local", help="run here, or print the commands")
    add_format_option(parser)


def run(args: argparse.Namespace) -> int:
    from titan_dp.studies.state_tracking.report import check_possible, report

    cells, warnings = plan(args)
    folders, out = [cell.folder for cell in cells], cells[0].folder.parent
    check_possible(out, args.format)
    with closing(RunLock(out)):  # whoever writes run folders or starts runs is alone
        write_folders(cells)
        if args.launch == "local":
            for warning in warnings:
                print(f"warning: {warning}")
        try:
            launch(cells, args.launch, at_once=args.at_once, nproc=1, retries=0)
        except RunError:  # the others' results are worth no less
            if any(is_finished(folder) for folder in folders):
                report(folders, out, args.format)
            raise
        if args.launch == "local":
            report(folders, out, args.format)
    return 0


def plan(args: argparse.Namespace) -> tuple[list[Cell], list[str]]:
    """The runs asked for, models by seeds, and warnings. Raises UserError for whatever the trainer would refuse."""
    models = _models(args)
    out = args.out or Path("outputs/state_tracking") / Path(models[0].config.state_tracking.task).stem
    cells = [_cell(loaded, seed, out) for loaded in models for seed in range(1, args.seeds + 1)]
    if len({cell.name for cell in cells}) < len(cells):
        raise UserError("--models names a model twice; name each once, and use --seeds for several runs")
    first, *others = (loaded.warnings() for loaded in models)
    # what matters to one of the models is not without effect
    return cells, [warning for warning in first if all(warning in other for other in others)]


def _models(args: argparse.Namespace) -> list[Loaded]:
    """The configuration of each model asked for, without a seed."""
    from titan_dp.data.synthetic.loader import build_problem, problem_that_fits

    if args.range:
        args.settings.append(f"--model.allow_neg_eigval={to_toml(args.range == '[-1,1]')}")
    argv, given = ["--config", _config_path(args.config), *args.settings], keys_of(args.settings)
    loaded = load_config(argv)
    for key in ("debug.seed", "data.seed", "job.run_name", "job.dump_folder", "job.description"):
        if key in given:
            raise UserError(f"--{key}: a study numbers its seeds and names its runs itself; use --seeds and --out")
    if args.length is not None and "training.seq_len" in given:
        raise UserError("--length and --training.seq_len both set the length of a row; give one of them")
    if args.models and (chosen := [f"model.{key}" for key in MODEL_KEYS if f"model.{key}" in given]):
        flags = {key: flag for flag, (key, *_) in FLAGS.items()} | ({"model.allow_neg_eigval": "--range"} if args.range else {})
        name = flags.get(chosen[0], f"--{chosen[0]}")
        raise UserError(f"{name} and --models both choose a model; name all in --models, such as deltaproduct_2[0,1]")
    if args.parameters and not args.models:
        raise UserError("--parameters is what --models are matched to; without them, set --model.intermediate_size")
    if (source := loaded.config.data.source) != "state_tracking":
        raise UserError(f"data.source = {source!r} trains on text; state tracking needs 'state_tracking'")
    if not loaded.config.validation.enable:
        raise UserError("validation.enable = false leaves nothing to judge the runs by; set it to true")
    problem = build_problem(loaded.config.state_tracking)
    if args.length is not None:
        argv.append(f"--training.seq_len={1 + args.length * problem.tokens_per_element}")
    if "model.vocab_size" not in given:
        argv.append(f"--model.vocab_size={problem.vocab_size}")

    def model(**settings: object) -> Loaded:
        loaded = load_config([*argv, *(f"--model.{key}={to_toml(value)}" for key, value in settings.items())])
        c = loaded.config
        problem_that_fits(c.state_tracking, c.training.seq_len, c.model.vocab_size)
        return loaded

    if not args.models:
        return [model()]
    named = [model_settings(name) for name in args.models]
    configs = [model(**settings).config for settings in named]
    seq_len = configs[0].training.seq_len
    target = args.parameters or max(model_size(c.model, seq_len).parameters for c in configs)
    widths = [mlp_for(c.model, target, seq_len) for c in configs]
    return [model(**settings, intermediate_size=width) for settings, width in zip(named, widths, strict=True)]


def _config_path(name: str) -> str:
    folder = SHIPPED / "state_tracking"
    if (path := resolve_config_path(name, folder) or resolve_config_path(name)) is None:
        names = ", ".join(sorted(path.stem for path in folder.glob("*.toml")))
        raise UserError(f"--config {name!r}: there is no such file; {folder} holds {names}")
    return str(path.resolve())


def _cell(loaded: Loaded, seed: int, out: Path) -> Cell:
    """One seed of a model: `seed` is that of the first weights and of the words."""
    c, name = loaded.config, label(loaded.config.model)
    values = {
        "debug": c.debug.model_copy(update={"seed": seed}),
        "data": c.data.model_copy(update={"seed": seed}),
        "job": c.job.model_copy(update={"description": f"{name}, seed {seed}"}),
    }
    axes = {"model": name, "seed": seed}
    return Cell.of(out, f"{folder_name(c.model)}-seed{seed}", axes, c.model_copy(update=values))


def write_folders(cells: list[Cell]) -> None:
    """Write config.toml of every run. Raises UserError, before anything is written, if one was trained with other settings."""
    from titan_dp.data.synthetic.loader import build_problem, fingerprint

    new = cells_to_write(cells, _REMEDY)
    task = cells[0].config.state_tracking  # of all cells: they differ in models and seeds
    data = fingerprint(build_problem(task), task)
    for cell in cells:
        if (run := read_run(cell.folder)) is not None and run.get("fingerprint") != data:
            raise UserError(f"{cell.folder} was trained on another table of {task.task}; {_REMEDY}")
    for cell in new:
        write_config(cell.folder, cell.toml())
