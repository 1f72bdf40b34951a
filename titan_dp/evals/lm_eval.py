"""Tasks of EleutherAI's lm-evaluation-harness (`pip install 'titan_dp[eval]'`), run through its own API.

Prompts, metrics and standard errors are the harness's; the result says which version of it and of each task. `--preset paper`
is the zero-shot table of Siems et al. 2025 (arXiv 2502.10297, section 5) with the three recall-intensive tasks added. How
texts become tokens is `lm_eval_model`'s; what has been answered is kept, so a killed evaluation goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import hashlib
import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titan_dp.errors import UserError
from titan_dp.evals.lm_eval_results import PAPER, collect, show
from titan_dp.evals.session import Report, Session, add_common_arguments, check_positive, session
from titan_dp.files import to_json

if TYPE_CHECKING:
    from titan_dp.evals.lm_eval_model import TitanDPLM

PRESETS = {"paper": PAPER}
_SAMPLES = "-samples.jsonl"  # beside the result
_DEFINITIONS = {".yaml", ".yml", ".py", ".json", ".jsonl"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--tasks", type=_names, metavar="A,B", help="tasks, groups or tags of the harness; * matches any")
    which.add_argument("--preset", choices=sorted(PRESETS), help="paper: the zero-shot tasks of the DeltaProduct paper's table")
    parser.add_argument("--include-path", type=Path, metavar="DIR", help="folder with task definitions of your own (YAML)")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N documents of each task only; for trying out")
    parser.add_argument("--num-fewshot", type=int, metavar="K", help="examples before each question (default: the task's)")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="requests at once (default: 16)")
    parser.add_argument(
        "--max-length", type=int, metavar="N", help="tokens the model reads at most (default: the training sequence length)"
    )
    parser.add_argument(
        "--add-bos",
        action=argparse.BooleanOptionalAction,
        help="BOS before every context (default: if the tokenizer has one)",
    )
    parser.add_argument(
        "--stock-bos",
        action="store_true",
        help="BOS and EOS as the harness's own class for Hugging Face models has them: none of ours before a context",
    )
    parser.add_argument("--seed", type=int, default=42, help="of few-shot examples, sampling and standard errors (default: 42)")
    parser.add_argument(
        "--log-samples", action="store_true", help="write every document, request and answer beside the results"
    )


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def run(args: argparse.Namespace) -> int:
    check_positive(args, "limit", "batch_size", "max_length")
    if args.num_fewshot is not None and args.num_fewshot < 0:
        raise UserError(f"--num-fewshot is {args.num_fewshot}; give 0 or more")
    if args.stock_bos and args.add_bos is not None:
        raise UserError("--stock-bos and --add-bos (or --no-add-bos) both say where BOS goes; give one of them")
    if find_spec("lm_eval") is None:
        raise UserError("lm-evaluation-harness is not installed: pip install 'titan_dp[eval]'")
    with session(args) as s:
        return evaluate(s)


def evaluate(s: Session) -> int:
    """Carry out the command of `s.args` in its processes; returns the exit code."""
    from titan_dp.evals.answers import Answers
    from titan_dp.evals.lm_eval_model import TitanDPLM
    from titan_dp.faults.agreement import together

    args = s.args
    with _quiet(s):
        names, manager = together(lambda: find_tasks(args.tasks or list(PRESETS[args.preset]), args.include_path))
    pretrained = s.load(args.checkpoint)
    lm = TitanDPLM(
        pretrained,
        Answers(s, None),
        batch_size=args.batch_size,
        max_length=args.max_length,
        add_bos_token=args.add_bos,
        stock_bos=args.stock_bos,
        seed=args.seed,
    )
    samples = (_SAMPLES,) if args.log_samples else ()
    report = s.report(_kind(args, names), pretrained.source, _settings(args, names, lm), beside=samples)
    if report.finished is None:
        lm.answers = Answers(s, report)
        report.finish(_measure(s, lm, names, manager, report))
    if s.world.is_main:
        show(report)
    return 0


def _kind(args: argparse.Namespace, names: list[str]) -> str:
    """A result's name: several evaluations of one model, each of other tasks, share a folder."""
    joined = args.preset or "+".join(names)
    if len(joined) > 80:
        joined = f"{names[0]}+{len(names) - 1}-more-{hashlib.sha256(joined.encode()).hexdigest()[:8]}"
    return f"lm-eval-{joined.replace('/', '-')}"


def _settings(args: argparse.Namespace, names: list[str], lm: TitanDPLM) -> dict[str, Any]:
    import lm_eval

    return {
        "lm_eval": lm_eval.__version__,
        "tasks": names,
        "include_path": args.include_path and str(args.include_path),
        "include_sha256": args.include_path and _digest(args.include_path),
        "limit": args.limit,
        "num_fewshot": _fewshot(args),
        "batch_size": args.batch_size,
        "seed": args.seed,
        "log_samples": args.log_samples,
        **lm.conventions(),
    }


def _fewshot(args: argparse.Namespace) -> int | None:
    return 0 if args.preset and args.num_fewshot is None else args.num_fewshot


def _digest(folder: Path) -> str:
    """sha256 of the task definitions in a folder and of the data beside them."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in _DEFINITIONS):
        digest.update(f"{path.relative_to(folder)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _quiet(s: Session) -> Iterator[None]:
    """stdout is for the results, and one rank is enough to be heard."""
    with contextlib.ExitStack() as stack:
        if s.world.is_main:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        else:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield


def find_tasks(wanted: list[str], include_path: Path | None) -> tuple[list[str], Any]:
    """The tasks, groups and tags that match, and the harness's TaskManager that knows them.

    Raises UserError where a name matches nothing.
    """
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        if not include_path.is_dir():
            raise UserError(f"--include-path {include_path} is no folder; give the one with your task definitions")
        own = TaskManager(include_path=str(include_path), include_defaults=False)
        if set(wanted) <= set(own.all_subtasks):  # the harness's own 14,000 take seconds to list
            return wanted, own
    manager = TaskManager(include_path=include_path and str(include_path))
    found: dict[str, None] = {}
    for name in wanted:
        matching = manager.match_tasks([name])
        if not matching:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else "`lm_eval ls tasks` lists them"
            raise UserError(f"--tasks {name}: lm-evaluation-harness has no such task, group or tag; {hint}")
        found |= dict.fromkeys(matching)
    return list(found), manager


def load_tasks(names: list[str], manager: Any) -> list[Any]:
    """The harness's tasks and groups with their data.

    Raises UserError where the data of one cannot be had.
    """
    loaded: list[Any] = []
    for name in names:
        try:
            found = manager.load([name])
        except Exception as error:  # whatever datasets, the Hub's client, a task's own code or YAML raise
            reason = (str(error).splitlines() or [""])[0][:200]
            raise UserError(
                f"task {name} cannot be loaded ({type(error).__name__}: {reason}); if its data has to be downloaded, do so "
                "where there is a network and copy the folder HF_HOME here, or leave the task out with --tasks"
            ) from error
        loaded += [found["groups"][name]] if name in found.get("groups", {}) else found["tasks"].values()
    return loaded


def _measure(s: Session, lm: TitanDPLM, names: list[str], manager: Any, report: Report) -> dict[str, Any]:
    from lm_eval import simple_evaluate

    from titan_dp.faults.agreement import together

    args = s.args
    with _quiet(s):
        loaded = together(lambda: load_tasks(names, manager))
        for task in manager.load(loaded)["tasks"].values():
            _check(task, lm)
        raw = simple_evaluate(
            lm,
            tasks=loaded,
            task_manager=manager,
            num_fewshot=_fewshot(args),
            limit=args.limit,
            log_samples=args.log_samples and s.world.is_main,
            bootstrap_iters=100_000 if s.world.is_main else 0,
            random_seed=args.seed,
            numpy_random_seed=args.seed,
            torch_random_seed=args.seed,
            fewshot_random_seed=args.seed,
        )
    if not s.world.is_main:
        return {}
    lm.replaced.say()
    assert raw is not None
    results = collect(raw, lm.truncated, PRESETS.get(args.preset))
    if args.log_samples:
        results["samples"] = _write_samples(raw["samples"], report)
    return results


def _check(task: Any, lm: TitanDPLM) -> None:
    """Raises UserError for a task that cannot be run; before the others have taken their hours."""
    if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
        what = "runs code that the model writes" if getattr(task, "UNSAFE_CODE", False) else "is not of text alone"
        raise UserError(f"task {task.task_name} {what}, which is not supported; leave it out")
    task.build_all_requests(limit=1)  # a task in Python decides only here how it generates
    for request in task.instances:
        if request.request_type == "generate_until":
            lm.generation(request.args[1])


def _write_samples(samples: dict[str, list[dict[str, Any]]], report: Report) -> str:
    from lm_eval.utils import handle_non_serializable

    from titan_dp.files import as_unicode, write_atomically

    path = report.path.with_name(report.path.stem + _SAMPLES)
    lines = [
        to_json({"task": task, **sample}, default=handle_non_serializable, ensure_ascii=False)
        for task, of_task in samples.items()
        for sample in of_task
    ]
    report.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(as_unicode("".join(f"{line}\n" for line in lines)).encode()))
    return path.name
