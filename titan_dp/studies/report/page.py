"""A report as one HTML page that holds its own figures and needs no network.

Names and descriptions of runs are text from elsewhere: the template escapes everything it is given.
"""

from __future__ import annotations

import base64
from datetime import date
from pathlib import Path
from typing import Any

from titan_dp.studies.report import tables
from titan_dp.studies.report.configurations import CONFIDENCE_TEXT
from titan_dp.studies.report.results import Results
from titan_dp.studies.report.text import summary


def page(results: Results, figures: dict[Path, str]) -> bytes:
    """The page; `figures` are captions of PNG files that are there."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("titan_dp.studies.report")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.get_template("report.html").render(**_content(results), figures=_embedded(figures)).encode()


def _content(results: Results) -> dict[str, Any]:
    return {
        "title": results.title,
        "description": results.description,
        "summary": summary(results),
        "warnings": results.warnings,
        "comparisons": [(tables.comparison_title(c), tables.comparison_table(c)) for c in results.comparisons],
        "confidence": CONFIDENCE_TEXT,
        "configurations": tables.configurations_table(results),
        "unit": results.unit,
        "isoflop": tables.isoflop_table(results),
        "surface": tables.surface_table(results),
        "compute": tables.compute_table(results),
        "runs": tables.runs_table(results),
        "tokenizers": ", ".join(results.tokenizers),
        "made": f"titan-dp report, {date.today().isoformat()}; {_provenance(results)}.",
    }


def _provenance(results: Results) -> str:
    """Tokenizer, validation text, commits and machines of the runs."""
    started = [run.started for run in results.runs if run.facts is not None]
    texts = sorted({facts["validation_fingerprint"][:12] for facts in started if facts["validation_fingerprint"]})
    commits = sorted({str(facts.get("git_commit", "unknown"))[:12] for facts in started})
    machines = sorted({f"{facts['world_size']} x {facts['device']}" for facts in started})
    parts = {"tokenizer": results.tokenizers, "validation text": texts, "commit": commits, "trained on": machines}
    return "; ".join(f"{name} {', '.join(values) or 'none'}" for name, values in parts.items())


def _embedded(figures: dict[Path, str]) -> dict[str, dict[str, str]]:
    return {
        path.name: {"data": base64.b64encode(path.read_bytes()).decode("ascii"), "caption": caption}
        for path, caption in figures.items()
    }
