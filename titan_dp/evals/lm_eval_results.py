"""What the harness returns in our form, and its tables.

A metric keeps the harness's name, with its filter where a task has several ('exact_match,strict-match'), and a standard
error where the harness has one. Accuracies are fractions in the file and percent on the screen, as in the papers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from titan_dp.output import print_table

if TYPE_CHECKING:
    from titan_dp.evals.session import Report

PAPER: dict[str, dict[str, str]] = {
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
_AVERAGED_TASKS = ("lambada_openai", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge")


def collect(raw: Mapping[str, Any], truncated: Mapping[str, int], preset: dict[str, dict[str, str]] | None) -> dict[str, Any]:
    """Results of `simple_evaluate` as JSON: by task and group its version, documents and metrics; a preset's columns."""
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
    results: dict[str, Any] = {"tasks": tasks, "truncated_requests": dict(truncated)}
    if preset is not None:
        results["columns"] = columns(tasks, preset)
    return results


def _metrics(found: Mapping[str, Any], higher_is_better: Mapping[str, bool]) -> dict[str, dict[str, Any]]:
    metrics = {}
    for key, value in found.items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        stderr = found.get(f"{metric}_stderr,{filter_name}")
        metrics[metric if filter_name == "none" else key] = {
            "value": _number(value),
            "stderr": _number(stderr),
            "higher_is_better": higher_is_better.get(metric),
        }
    return metrics


def _number(value: Any) -> float | None:
    """A float, also of numpy's; None for the harness's 'N/A', and for NaN, as the standard error of one document is."""
    try:
        return float(value) if math.isfinite(value) else None
    except (TypeError, ValueError):
        return None


def columns(tasks: Mapping[str, Any], preset: dict[str, dict[str, str]]) -> dict[str, float | None]:
    """The columns of a preset's table in their order, after the last averaged task the mean of the accuracies so far."""
    row: dict[str, float | None] = {}
    averaged: list[float] = []
    for task, metrics in preset.items():
        for column, metric in metrics.items():
            row[column] = tasks[task]["metrics"][metric]["value"]
            if task in _AVERAGED_TASKS and metric.startswith("acc"):
                averaged.append(row[column])  # type: ignore[arg-type]
        if task == _AVERAGED_TASKS[-1]:
            row[AVERAGE] = sum(averaged) / len(averaged)
    return row


def show(report: Report) -> None:
    """The table of all metrics, a preset's own below it, and where the results are; on stdout."""
    from rich.table import Table

    results = report.finished or {}
    table = Table(title=f"lm-evaluation-harness {report.head['settings']['lm_eval']}: {report.source.label}")
    for header in ("task", "version", "shots", "documents"):
        table.add_column(header, justify="left" if header == "task" else "right")
    table.add_column("metric")
    for header in ("value", "standard error"):
        table.add_column(header, justify="right")
    for name, task in results["tasks"].items():
        counted = "" if task["documents"] is None else f"{task['documents']:,} of {task['documents_in_task']:,}"
        cells = [name, str(task["version"]), str(task["num_fewshot"]), counted]
        for metric, found in task["metrics"].items():
            table.add_row(*cells, metric, _shown(found["value"]), _shown(found["stderr"]))
            cells = [""] * len(cells)
    print_table(table)
    if "columns" in results:
        print_table(_columns_table(results["columns"]))
    print(convention(report.head["settings"]))
    cut = {kind: count for kind, count in results["truncated_requests"].items() if count}
    if cut:
        told = ", ".join(f"{count:,} {kind}" for kind, count in cut.items())
        print(f"requests that lost the beginning of their context to max_length: {told}")
    print(f"written to {report.path}")
    if "samples" in results:
        print(f"samples in {report.folder / results['samples']}")


def convention(settings: Mapping[str, Any]) -> str:
    """How BOS and EOS were used, in a sentence; scores move with it."""
    context = "BOS before every context" if settings["add_bos_token"] else "no BOS before a context"
    alone = "" if settings["prefix"] is None else f", a text without context follows {settings['prefix']}"
    stock = " as in the harness's own class for Hugging Face models"
    other = stock if settings["stock_bos"] else f"; --stock-bos takes BOS and EOS{stock}"
    return f"convention: {context}{alone}{other}"


def _shown(value: float | None, digits: int = 4) -> str:
    return "" if value is None else format(value, f".{digits}f" if abs(value) < 1e6 else f".{digits}e")


def _columns_table(row: Mapping[str, float | None]) -> Any:
    from rich.table import Table

    table = Table(title="as in the paper; all but perplexities in %")
    for column in row:
        table.add_column(column, justify="right")
    percent = {name: value if value is None or name.endswith("ppl") else 100 * value for name, value in row.items()}
    table.add_row(*(_shown(value, 2) for value in percent.values()))
    return table
