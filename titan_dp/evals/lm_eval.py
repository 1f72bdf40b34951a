"""Tasks of EleutherAI's lm-evaluation-harness (`pip install lm_eval`), run through its own API.

Prompts, metrics and standard errors are the harness's; the result says which version of it and of each task. `--preset paper`
is the zero-shot table of Siems et al. 2025 (arXiv 2502.10297, section 5) with the three recall-intensive tasks added. How
texts become tokens is defined in `lm_eval_model`. Answers are kept, so a killed evaluation goes on where it was.

A metric keeps the harness's name, with its filter if a task has several ('exact_match,strict-match'), and a standard error if
the harness has one. Accuracies are fractions in the file and percent on the screen, as in the papers. The harness's own table
(lm_eval.utils.make_table) needs its raw results, which the file does not hold, and has no column for documents.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import hashlib
import itertools
import logging
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titan_dp.config.arguments import natural, positive
from titan_dp.errors import UserError, require
from titan_dp.evals.session import Result, Session, add_common_arguments, run_evaluation
from titan_dp.files import as_unicode, make_folder, to_json, write_atomically
from titan_dp.output import number_table, print_table, print_text, print_written

if TYPE_CHECKING:
    from titan_dp.evals.lm_eval_model import TitanDPLM

PAPER = {
    "wikitext": {"Wiki ppl": "word_perplexity"},
    "lambada_openai": {"LMB ppl": "perplexity", "LMB acc": "acc"},
    "piqa": {"PIQA acc": "acc"},
    "hellaswag": {"Hella acc_n": "acc_norm"},
    "winogrande": {"Wino acc": "acc"},
    "arc_easy": {"ARC-e acc": "acc"},
    "arc_challenge": {"ARC-c acc_n": "acc_norm"},
    "swde": {"SWDE cont": "contains"},
    "squad_completion": {"SQuAD cont": "contains"},
    "fda": {"FDA cont": "contains"},
}
"""Tasks of the paper's table, and of each the columns and their metrics."""
AVERAGE = "Avg"
_LAST_AVERAGED = "arc_challenge"
_SAMPLES = "-samples.jsonl"  # beside the result
_DEFINITIONS = {".yaml", ".yml", ".py", ".json", ".jsonl"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, "requests", batch_size=16)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--tasks", type=_names, metavar="A,B", help="tasks, groups or tags of the harness; * matches any")
    which.add_argument("--preset", choices=("paper",), help="paper: the zero-shot tasks of the DeltaProduct paper's table")
    parser.add_argument("--include-path", type=Path, metavar="DIR", help="folder with task definitions of your own (YAML)")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N documents of each task; for trying out")
    parser.add_argument("--num-fewshot", type=natural, metavar="K", help="examples before each question (default: the task's)")
    length = "tokens the model reads at most (default: the training sequence length)"
    parser.add_argument("--max-length", type=positive, metavar="N", help=length)
    bos = "BOS before every context (default: if documents began with it at the training)"
    parser.add_argument("--add-bos", action=argparse.BooleanOptionalAction, help=bos)
    stock = "BOS and EOS as the harness's own class for Hugging Face models has them: none of ours before a context"
    parser.add_argument("--stock-bos", action="store_true", help=stock)
    seed = "of few-shot examples, sampling and standard errors (default: 42)"
    parser.add_argument("--seed", type=natural, default=42, help=seed)
    samples = "write every document, request and answer beside the results"
    parser.add_argument("--log-samples", action="store_true", help=samples)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def run(args: argparse.Namespace) -> int:
    if args.stock_bos and args.add_bos is not None:
        raise UserError("--stock-bos and --add-bos (or --no-add-bos) both say where BOS goes; give one of them")
    require("titan-dp evaluate lm-eval", "lm_eval")
    os.environ.setdefault("TQDM_DISABLE", "1")  # read at its import: the session's own signs of life are enough
    return run_evaluation(evaluate, args)


def evaluate(s: Session) -> Result:
    """Run the tasks, write the JSON file and print the tables; every rank calls it.

    Raises UserError if a task is not known, cannot be loaded or cannot be run.
    """
    from titan_dp.evals.answers import Answers
    from titan_dp.evals.lm_eval_model import TitanDPLM
    from titan_dp.faults.agreement import together

    args = s.args
    with _quiet(s):
        names, manager = together(lambda: find_tasks(args.tasks or list(PAPER), args.include_path))
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
    result = Result(s, _kind(args, names), pretrained.source, _settings(args, names, lm), beside=samples)
    if not result.results:
        lm.answers = Answers(s, result)
        result.finish(_measure(s, lm, names, manager, result))
    if s.world.is_main:
        _show(result)
    return result


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
        "num_fewshot": 0 if args.preset and args.num_fewshot is None else args.num_fewshot,
        "batch_size": args.batch_size,
        "seed": args.seed,
        "log_samples": args.log_samples,
        **lm.conventions(),
    }


def _digest(folder: Path) -> str:
    """sha256 of the task definitions in a folder and of the data beside them."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in _DEFINITIONS):
        digest.update(f"{path.relative_to(folder)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _quiet(s: Session) -> Iterator[None]:
    """stdout is kept for the results, and of what the harness says to stderr one rank's is enough.

    That a task's metric has the harness's own aggregation, as most have, is not said.
    """
    logger = logging.getLogger("lm_eval.api.task")
    logger.addFilter(_is_news)
    try:
        with open(os.devnull, "w") as nowhere:
            said = sys.stderr if s.world.is_main else nowhere
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                yield
    finally:
        logger.removeFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return re.search(r"metric .* is defined, but (aggregation|higher_is_better) is not", record.getMessage()) is None


# -- tasks ---------------------------------------------------------------------------------------------------------------


def find_tasks(wanted: list[str], include_path: Path | None) -> tuple[list[str], Any]:
    """The tasks, groups and tags that match, and the harness's TaskManager that knows them.

    Raises UserError if a name matches nothing.
    """
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        if not include_path.is_dir():
            raise UserError(f"--include-path {include_path} is not a folder; give the one with your task definitions")
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

    Raises UserError if the data of one cannot be had.
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


def _check(task: Any, lm: TitanDPLM) -> None:
    """Raises UserError for a task that cannot be run; before the others have taken their hours."""
    if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
        what = "runs code that the model writes" if getattr(task, "UNSAFE_CODE", False) else "is not of text alone"
        raise UserError(f"task {task.task_name} {what}, which is not supported; leave it out")
    task.build_all_requests(limit=1)  # a task in Python decides only here how it generates
    for request in task.instances:
        if request.request_type == "generate_until":
            lm.generation(request.args[1])


# -- results -------------------------------------------------------------------------------------------------------------


def _measure(s: Session, lm: TitanDPLM, names: list[str], manager: Any, result: Result) -> dict[str, Any]:
    """The results on the main rank; nothing on the others."""
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
            num_fewshot=result.settings["num_fewshot"],
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
    results = collect(raw, lm.truncated)
    if args.preset:
        results["columns"] = columns(results["tasks"])
    if args.log_samples:
        results["samples"] = _write_samples(raw["samples"], result.beside(_SAMPLES))
    return results


def _write_samples(samples: dict[str, list[dict[str, Any]]], path: Path) -> str:
    from lm_eval.utils import handle_non_serializable

    lines = [
        to_json({"task": task, **sample}, default=handle_non_serializable, ensure_ascii=False)
        for task, of_task in samples.items()
        for sample in of_task
    ]
    make_folder(path.parent)
    write_atomically(path, lambda file: file.write(as_unicode("".join(f"{line}\n" for line in lines)).encode()))
    return path.name


def collect(raw: Mapping[str, Any], truncated: Mapping[str, int]) -> dict[str, Any]:
    """Results of `simple_evaluate` as JSON: by task and group its version, documents and metrics."""
    tasks = {}
    for name, found in raw["results"].items():
        counts = raw["n-samples"].get(name)  # a group has none
        tasks[name] = {
            "version": raw["versions"].get(name),
            "num_fewshot": raw["n-shot"].get(name),
            "documents": counts and counts["effective"],
            "documents_in_task": counts and counts["original"],
            "metrics": _metrics(found, raw["higher_is_better"].get(name, {})),
        }
    return {"tasks": tasks, "truncated_requests": dict(truncated)}


def _metrics(found: Mapping[str, Any], higher_is_better: Mapping[str, bool]) -> dict[str, dict[str, Any]]:
    metrics = {}
    for key, value in found.items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        metrics[metric if filter_name == "none" else key] = {
            "value": _number(value),
            "stderr": _number(found.get(f"{metric}_stderr,{filter_name}")),
            "higher_is_better": higher_is_better.get(metric),
        }
    return metrics


def _number(value: Any) -> float | None:
    """A float, also of numpy's; None for the harness's 'N/A', and for NaN, as the standard error of one document is."""
    try:
        return float(value) if math.isfinite(value) else None
    except (TypeError, ValueError):
        return None


def columns(tasks: Mapping[str, Any]) -> dict[str, float | None]:
    """The columns of the paper's table in their order, the mean of the accuracies after the last of them."""
    row: dict[str, float | None] = {}
    for task, metrics in PAPER.items():
        row |= {column: tasks[task]["metrics"][metric]["value"] for column, metric in metrics.items()}
        if task == _LAST_AVERAGED:
            accuracies: list[Any] = [value for column, value in row.items() if "acc" in column]
            row[AVERAGE] = sum(accuracies) / len(accuracies)
    return row


def curves(results: dict[str, Any]) -> dict[str, float]:
    """What `titan-dp evaluate watch` follows over tokens: the columns of a preset, or every task's metrics."""
    metrics = {f"{name}/{key}": m["value"] for name, task in results["tasks"].items() for key, m in task["metrics"].items()}
    return {name: value for name, value in (results.get("columns") or metrics).items() if value is not None}


# -- what is shown -------------------------------------------------------------------------------------------------------


def _show(result: Result) -> None:
    """The table of all metrics, a preset's own below it, and where the results are; on stdout."""
    results, settings = result.results, result.settings
    headers = ["task", "version", "shots", "documents", "metric", "value", "standard error"]
    rows = list(itertools.chain.from_iterable(_rows(name, task) for name, task in results["tasks"].items()))
    if not any(row[-1] for row in rows):
        headers, rows = headers[:-1], [row[:-1] for row in rows]
    title = f"lm-evaluation-harness {settings['lm_eval']}: {result.source.label}"
    details = ("version", "documents", "shots")
    print_table(number_table(title, headers, rows, left=("task", "metric")), details)
    if row := results.get("columns"):
        percent = {name: value if value is None or name.endswith("ppl") else 100 * value for name, value in row.items()}
        shown = [_shown(value, 2) for value in percent.values()]
        print_table(number_table("as in the paper; all except perplexities in %", list(row), [shown]))
    print_text(convention(settings))
    cut = [f"{count:,} {kind}" for kind, count in results["truncated_requests"].items() if count]
    if cut:
        print_text(f"requests that lost the beginning of their context to max_length: {', '.join(cut)}")
    print_written(result.path, *map(result.path.with_name, [results["samples"]] if "samples" in results else []))


def _rows(name: str, task: Mapping[str, Any]) -> Iterator[list[str]]:
    """A row per metric of a task, of which only the first says what the task is."""
    counted = "" if task["documents"] is None else f"{task['documents']:,} of {task['documents_in_task']:,}"
    head = [name, str(task["version"]), str(task["num_fewshot"]), counted]
    for metric, found in task["metrics"].items():
        yield [*head, metric, _shown(found["value"]), _shown(found["stderr"])]
        head = [""] * len(head)


def convention(settings: Mapping[str, Any]) -> str:
    """How BOS and EOS were used, in a sentence; scores move with it."""
    context = "BOS before every context" if settings["add_bos_token"] else "no BOS before a context"
    alone = "" if settings["prefix"] is None else f", a text without context follows {settings['prefix']}"
    stock = " as in the harness's own class for Hugging Face models"
    other = stock if settings["stock_bos"] else f"; --stock-bos takes BOS and EOS{stock}"
    return f"convention: {context}{alone}{other}"


def _shown(value: float | None, digits: int = 4) -> str:
    return "" if value is None else format(value, f".{digits}f" if abs(value) < 1e6 else f".{digits}e")
