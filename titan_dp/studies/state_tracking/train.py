"""`titan-dp state-tracking train`: models and seeds as run folders of the one trainer, then a table of all of them.

    titan-dp state-tracking train --task S3 --num-householder 2
    titan-dp state-tracking train --task S3 --models deltaproduct_2[-1,1] deltaproduct_2[0,1] --seeds 3 --at-once 2

Flags are names for settings of `train.py` over a config (`train_configs/state_tracking/small.toml` unless --config names
another), and any `--section.key VALUE` comes on top. Each run is a process of train.py: checkpoints, resuming and launch
are the trainer's. A finished run is not run again; a folder trained with other settings is never touched.
"""

from __future__ import annotations

import argparse
import shlex
from dataclasses import dataclass
from pathlib import Path

from titan_dp.config.arguments import add_setting, count, positive, take_settings
from titan_dp.config.load import (
    Loaded,
    Problems,
    Setting,
    build_config,
    config_folder,
    keys_of,
    parse_command_line,
    read_files,
    resolve_config_path,
)
from titan_dp.errors import RunError, UserError
from titan_dp.model.size import model_size
from titan_dp.studies.state_tracking.models import KNOWN, MODEL_KEYS, folder_name, label, model_settings, with_parameters
from titan_dp.train.batch_plan import plan_batches
from titan_dp.train.run_folder import RunLock, holds_config, is_finished, is_locked, read_run, write_config

# flag: (key, what it is)
FLAGS = {
    "--task": ("state_tracking.task", "S3, A5, D4, Z60, S3xZ2, a multiplication table.csv, parity, modular-arithmetic, ..."),
    "--num-householder": ("model.num_householder", "n_h: Householder steps a token"),
    "--layers": ("model.num_hidden_layers", "blocks"),
    "--heads": ("model.num_heads", "heads"),
    "--head-dim": ("model.head_dim", "key dimension of a head"),
    "--hidden-size": ("model.hidden_size", "width of the residual stream"),
    "--mlp": ("model.intermediate_size", "width of the SwiGLU"),
    "--householder-cost": ("training.householder_cost", "adaptive models: price of a step, nats"),
    "--steps": ("training.steps", "optimizer steps"),
    "--batch-size": ("training.local_batch_size", "words a step"),
    "--learning-rate": ("optimizer.lr", "peak learning rate"),
    "--weight-decay": ("optimizer.weight_decay", "AdamW's"),
    "--warmup": ("lr_scheduler.warmup_steps", "steps of linear warmup"),
    "--min-length": ("state_tracking.min_length", "shortest words; default: all as long as --length"),
    "--curriculum": ("state_tracking.curriculum_steps", "steps over which words grow to --length"),
    "--tokens-per-element": ("state_tracking.tokens_per_element", "tokens of an element, fillers included"),
    "--max-moved": ("state_tracking.max_moved", "draw elements that move at most so many points; 2: swaps only"),
    "--test-length": ("state_tracking.test_length", "longest test words; default: 4 times --length"),
    "--test-samples": ("state_tracking.test_samples", "words of the test"),
    "--validate-every": ("validation.freq", "steps between validations"),
    "--solved-accuracy": ("state_tracking.solved_accuracy", "validation words all right from which a run counts as solved"),
}
SWITCHES = {
    "--gated": ("model.use_forget_gate", "forget gate"),
    "--adaptive": ("model.adaptive_householder", "a router chooses the steps of each token"),
    "--stop-when-solved": ("state_tracking.stop_when_solved", "end a run at the first validation that finds it solved"),
}


@dataclass(frozen=True)
class Cell:
    """One run to be; what `launch_local` starts."""

    folder: Path
    loaded: Loaded

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def steps(self) -> int:
        return plan_batches(self.loaded.config.training, 1).steps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", default="small", help="TOML file, or a name in train_configs/state_tracking (default: small)"
    )
    take_settings(parser, "any other setting, as for train.py (--model.use_short_conv)")
    for flag, (key, what) in FLAGS.items():
        add_setting(parser, flag, *(("--group",) if flag == "--task" else ()), key=key, help=what)
    for flag, (key, what) in SWITCHES.items():
        add_setting(parser, flag, key=key, help=what, value="true")
    parser.add_argument("--range", choices=["[0,1]", "[-1,1]"], help="of the eigenvalues of each factor (default: [-1,1])")
    parser.add_argument("--length", type=positive, help="symbols of the longest training words (default: 128)")
    parser.add_argument("--models", nargs="+", metavar="MODEL", help=f"compare these at equal parameters: {KNOWN}")
    parser.add_argument("--parameters", type=count, help="of each of --models (default: of the largest with the MLP given)")
    parser.add_argument("--seeds", type=positive, default=1, help="runs of each model, with seeds 1, 2, ... (default: 1)")
    parser.add_argument("--out", type=Path, help="folder of the run folders (default: outputs/state_tracking/TASK)")
    parser.add_argument("--at-once", type=positive, default=1, metavar="K", help="runs at the same time (default: 1)")
    parser.add_argument("--launch", choices=["local", "print"], default="local", help="run here, or print the commands")


def run(args: argparse.Namespace) -> int:
    from titan_dp.studies.launch_local import command, launch_local
    from titan_dp.studies.state_tracking.report import check_out, check_packages, report

    check_packages()
    cells = plan(args)
    folders, out = [cell.folder for cell in cells], cells[0].folder.parent
    check_out(out)
    lock = RunLock(out)  # whoever writes run folders or starts runs is alone
    try:
        write_folders(cells)
        if args.launch == "print":
            for cell in cells:
                if not is_finished(cell.folder) and not is_locked(cell.folder):
                    print(shlex.join(command(cell, 1, python="python", project=Path())))
            return 0
        for warning in cells[0].loaded.warnings():  # what matters to one of the models is not without effect
            if all(warning in cell.loaded.warnings() for cell in cells):
                print(f"warning: {warning}")
        try:
            launch_local(cells, at_once=args.at_once, nproc=1, retries=0)
        except RunError:  # the others' results are no less worth
            if any(is_finished(folder) for folder in folders):
                report(folders, out)
            raise
        report(folders, out)
    finally:
        lock.close()
    return 0


def plan(args: argparse.Namespace) -> list[Cell]:
    """The runs asked for, models by seeds. Raises UserError for whatever the trainer would refuse."""
    given = keys_of(args.settings)
    chosen = [f"--{key}" for key in MODEL_KEYS if key in given] + (["--range"] if args.range else [])
    if args.models and chosen:
        flag = next((name for name, (key, _) in {**FLAGS, **SWITCHES}.items() if f"--{key}" == chosen[0]), chosen[0])
        raise UserError(f"{flag} and --models both choose a model; name all in --models, such as deltaproduct_2[0,1]")
    for key in ("debug.seed", "data.seed", "job.run_name", "job.dump_folder", "job.description"):
        if key in given:
            raise UserError(f"--{key}: a study numbers its seeds and names its runs itself; use --seeds and --out")
    if args.length is not None and "training.seq_len" in given:
        raise UserError("--length and --training.seq_len both set the length of a row; give one of them")
    base = _settings(args)
    models = [_checked(base, model_settings(name)) for name in args.models] if args.models else [_checked(base, {})]
    configs = [loaded.config for loaded in models]
    if args.models:
        T = configs[0].training.seq_len
        target = args.parameters or max(model_size(c.model, T).parameters for c in configs)
        widths = [with_parameters(c.model, target, T).mlp_size for c in configs]
        models = [
            _checked(base, {**model_settings(name), "intermediate_size": width})
            for name, width in zip(args.models, widths, strict=True)
        ]
    elif args.parameters:
        raise UserError("--parameters is what --models are matched to; without them, set --mlp")
    task = models[0].config.state_tracking.task
    out = args.out or Path("outputs/state_tracking") / Path(task).stem
    cells = [_cell(loaded, seed, out) for loaded in models for seed in range(1, args.seeds + 1)]
    if len({cell.name for cell in cells}) < len(cells):
        raise UserError("--models names a model twice; name each once, and use --seeds for several runs")
    return cells


def _settings(args: argparse.Namespace) -> list[Setting]:
    """Of the config file, then of the command line, and a vocabulary that holds the task's symbols."""
    from titan_dp.data.synthetic.loader import build_problem

    problems = Problems()
    folder = config_folder() / "state_tracking"
    bare = "/" not in args.config
    path = resolve_config_path(str(folder / args.config)) if bare else None
    path = path or resolve_config_path(args.config)
    if path is None:
        names = ", ".join(sorted(path.stem for path in folder.glob("*.toml")))
        raise UserError(f"--config {args.config!r}: there is no such file; {folder} holds {names}")
    settings = read_files(path, problems)
    settings += parse_command_line(args.settings, problems).settings
    if args.range is not None:
        settings.append(Setting("model.allow_neg_eigval", args.range == "[-1,1]", "command line"))
    config = build_config(list(settings), problems)[0]
    if config.data.source != "state_tracking":
        raise UserError(f"data.source = {config.data.source!r} trains on text; state tracking needs 'state_tracking'")
    if not config.validation.enable:
        raise UserError("validation.enable = false leaves nothing to judge the runs by; set it to true")
    problem = build_problem(config.state_tracking)
    if args.length is not None:
        settings.append(Setting("training.seq_len", 1 + args.length * problem.tokens_per_element, "command line"))
    if "model.vocab_size" not in keys_of(args.settings):
        settings.append(Setting("model.vocab_size", problem.vocab_size, "the task"))
    return settings


def _checked(base: list[Setting], model: dict[str, object]) -> Loaded:
    """The whole configuration of one model. Raises UserError where the task does not fit it."""
    from titan_dp.data.synthetic.loader import problem_that_fits

    settings = [*base, *(Setting(f"model.{key}", value, "--models") for key, value in model.items())]
    config, provenance = build_config(settings, Problems())
    problem_that_fits(config.state_tracking, config.training.seq_len, config.model.vocab_size)
    return Loaded(config, provenance)


def _cell(loaded: Loaded, seed: int, out: Path) -> Cell:
    """`loaded` with a seed for the first weights and for the words, and a folder of its own."""
    name = f"{folder_name(loaded.config.model)}-seed{seed}"
    values = {
        "debug": loaded.config.debug.model_copy(update={"seed": seed}),
        "data": loaded.config.data.model_copy(update={"seed": seed}),
        "job": loaded.config.job.model_copy(
            update={"run_name": name, "dump_folder": str(out), "description": f"{label(loaded.config.model)}, seed {seed}"}
        ),
    }
    keys = ("debug.seed", "data.seed", "job.run_name", "job.dump_folder", "job.description")
    provenance = {**loaded.provenance, **dict.fromkeys(keys, "titan-dp state-tracking")}
    return Cell(out / name, Loaded(loaded.config.model_copy(update=values), provenance))


def write_folders(cells: list[Cell]) -> None:
    """config.toml of every run. Raises UserError, before anything is written, where a folder has other settings' results."""
    from titan_dp.data.synthetic.loader import build_problem, fingerprint

    remedy, new = "choose another --out, or move that folder away", []
    task = cells[0].loaded.config.state_tracking  # of all cells: models and seeds are what differs
    data = fingerprint(build_problem(task), task)
    for cell in cells:
        text = cell.loaded.resolved_toml()
        if not holds_config(cell.folder, cell.loaded.config, text, remedy):
            new.append((cell.folder, text))
        if (run := read_run(cell.folder)) is not None and run.get("fingerprint") != data:
            raise UserError(f"{cell.folder} was trained on another table of {task.task}; {remedy}")
    for folder, text in new:
        write_config(folder, text)
