"""A report's tables: cells of text for the terminal and the page, raw values as CSV and JSON for everything else.

Configurations and runs are one row each in both. In CSV an unknown value is empty and a loss that is no number is `nan`.
"""

from __future__ import annotations

import csv
import io
import math
from typing import Any

from titan_dp.output import print_table
from titan_dp.studies.report.comparisons import Comparison
from titan_dp.studies.report.configurations import CONFIDENCE_TEXT, Configuration, validation_loss
from titan_dp.studies.report.families import FamilyFits
from titan_dp.studies.report.results import Results
from titan_dp.studies.report.runs import Run
from titan_dp.studies.report.text import count, duration, estimate, fit_note, loss, minimum, percent

Table = tuple[list[str], list[list[str]]]
"""Headers and rows."""


def configurations_table(results: Results) -> Table:
    """A row for each configuration."""
    headers = ["family", "n_h", "shape", "parameters", "tokens", "FLOPs", "training loss", "validation loss", "seeds", "front"]
    headers += ["tokens/s", "MFU", "time", *results.differing]
    return headers, [_configuration(results, c) for c in results.configurations]


def _configuration(results: Results, c: Configuration) -> list[str]:
    marks = [("C", c in results.front_by_flops), ("N", c in results.front_by_parameters)]
    speed = c.median(lambda run: run.totals.tokens_per_second)
    cells = [c.family, "-" if c.n_h is None else str(c.n_h), c.shape, count(c.parameters), count(c.tokens), count(c.flops)]
    cells += [loss(c.training_loss), _mean(c), str(len(c.used)), " ".join(mark for mark, on in marks if on)]
    cells += ["n/a" if speed is None else count(speed), percent(c.median(lambda run: run.totals.mfu)), duration(c.seconds)]
    return cells + [str(c.settings[key]) for key in results.differing]


def _mean(c: Configuration) -> str:
    return loss(c.mean) + (f" ± {c.spread:.4f}" if c.spread is not None else "")


def runs_table(results: Results) -> Table:
    """A row for each run, in whatever state."""
    headers = ["run", "state", "family", "shape", "parameters", "tokens", "seeds", "training loss", "validation loss"]
    headers += ["tokens/s", "MFU", "time", "skipped steps"]
    by_run = {id(run): c for c in results.configurations for run in c.runs}
    rows = []
    for run in results.runs:
        if run.facts is None:
            rows.append([run.name, run.state] + [""] * (len(headers) - 2))
            continue
        c, totals = by_run[id(run)], run.totals
        state = f"{run.state} at step {totals.step:,} of {run.started['steps']:,}" if run.state == "unfinished" else run.state
        speed = "n/a" if totals.tokens_per_second is None else count(totals.tokens_per_second)
        row = [run.name, state, c.family, c.shape, count(c.parameters), count(run.tokens), "{}, {}".format(*run.seeds)]
        row += [loss(totals.training_loss), loss(validation_loss(run, results.loss)), speed, percent(totals.mfu)]
        rows.append([*row, duration(totals.seconds), str(totals.skipped_steps)])
    return headers, rows


def comparison_table(comparison: Comparison) -> Table:
    """A row for each family (and shape) at one size and number of tokens."""
    headers = ["family", "validation loss", "seeds", "difference", f"{CONFIDENCE_TEXT} interval", "compared with"]
    headers += ["shape", "parameters", "FLOPs"]
    rows = []
    for row in comparison.rows:
        c, compared = row.configuration, ["", "", ""]
        if row.difference is not None and row.against is not None:
            between = "" if row.interval is None else "[{:+.4f}, {:+.4f}] ".format(*row.interval) + row.verdict
            same_family = sum(other.configuration.family == row.against.family for other in comparison.rows) > 1
            against = row.against.family + (f", {row.against.shape}" if same_family else "")
            compared = [f"{row.difference:+.4f}", between or "none: needs scatter of 2 seeds on both sides", against]
        size = [c.shape, count(c.parameters), count(c.flops)]
        rows.append([c.family, _mean(c), str(len(c.losses)), *compared, *size])
    return headers, rows


def comparison_title(comparison: Comparison) -> str:
    others = "".join(f", {key} {value}" for key, value in comparison.others.items())
    return f"{count(comparison.parameters)} parameters, {count(comparison.tokens)} tokens{others}"


def surface_table(results: Results) -> Table:
    """L(N, D) of each family."""
    return _laws(results, ["E", "A", "a", "B", "b"], lambda f: (f.surface, f.surface_lacks, len(f.fitted)))


def compute_table(results: Results) -> Table:
    """L(C) of each family."""
    return _laws(results, ["E", "A", "a"], lambda f: (f.compute, f.compute_lacks, len(f.compute_points)))


def _laws(results: Results, names: list[str], of: Any) -> Table:
    rows = []
    for fits in results.fits:
        law, lacks, configurations = of(fits)
        values = [estimate(law.estimates[name]) for name in names] if law else [""] * len(names)
        error = f"{law.error:.2g}" if law else ""
        rows.append([fits.family, str(configurations), *values, error, fit_note(fits, law, lacks)])
    return ["family", "configurations", *names, "error of log L", ""], rows


def isoflop_table(results: Results) -> Table:
    """The minimum of each isoFLOP parabola."""
    rows = []
    for profile in results.isoflops:
        lowest = loss(profile.parabola.loss) if profile.parabola.inside else ""
        sizes = ", ".join(count(c.parameters) for c in profile.configurations)
        rows.append([count(profile.budget), profile.family, sizes, minimum(profile), lowest])
    return ["FLOPs", "family", "sizes", "parameters at the minimum", "loss there"], rows


def show(title: str, table: Table) -> None:
    from rich import box
    from rich.table import Table as RichTable

    headers, rows = table
    shown = RichTable(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for i, header in enumerate(headers):
        text = i == 0 or header in ("shape", "compared with", "run", "state", "", "front")
        shown.add_column(header, justify="left" if text else "right")
    for row in rows:
        shown.add_row(*row)
    print_table(shown)


# -- CSV and JSON ------------------------------------------------------------------------------------------------------


def runs_csv(results: Results) -> bytes:
    """A row for each run with everything a report knows of it, SI units."""
    return _csv([_run_values(run) | _settings(results, run) for run in results.runs])


def _run_values(run: Run) -> dict[str, Any]:
    totals, facts = run.totals, run.facts or {}
    sizes = dict.fromkeys(("parameters", "parameters_without_embedding", "tokens", "flops"))
    if run.facts is not None:
        c = Configuration({}, "nats", [run])
        sizes = dict(zip(sizes, (c.parameters, c.without_embedding, c.tokens, c.flops), strict=True))
    return {
        "run": run.name,
        "folder": run.folder,
        "state": run.state,
        "step": totals.step,
        "steps": facts.get("steps"),
        **_model_values(Configuration({}, "nats", [run])),
        **sizes,
        "vocab_size": run.config.model.vocab_size,
        "seed": run.config.debug.seed,
        "data_seed": run.config.data.seed,
        "training_loss_nats_per_token": totals.training_loss,
        "validation_loss_nats_per_token": totals.validation_loss,
        "validation_bits_per_byte": totals.validation_bits_per_byte,
        "tokens_per_second": totals.tokens_per_second,
        "mfu": totals.mfu,
        "training_seconds": totals.seconds,
        "skipped_steps": totals.skipped_steps,
        **{key: facts.get(key) for key in ("tokenizer", "fingerprint", "validation_fingerprint", "device", "world_size")},
        "git_commit": facts.get("git_commit"),
    }


def _settings(results: Results, run: Run) -> dict[str, Any]:
    c = next((c for c in results.configurations if run in c.runs), None)
    return {key: c.settings[key] if c else None for key in results.differing if "." in key}


def _model_values(c: Configuration) -> dict[str, Any]:
    model = c.first.config.model
    return {
        "family": c.family,
        "n_h": c.n_h,
        "layers": model.num_hidden_layers,
        "hidden_size": model.hidden_size,
        "num_heads": model.num_heads,
        "head_dim": model.head_dim,
        "intermediate_size": model.mlp_size,
    }


def configurations_csv(results: Results) -> bytes:
    """A row for each configuration: means, spreads over seeds, medians of speeds."""
    return _csv([_configuration_values(results, c) for c in results.configurations])


def _configuration_values(results: Results, c: Configuration) -> dict[str, Any]:
    return {
        **_model_values(c),
        "parameters": c.parameters,
        "parameters_without_embedding": c.without_embedding,
        "tokens": c.tokens,
        "flops": c.flops,
        "training_loss_nats_per_token": c.training_loss,
        "loss_unit": results.unit,
        "validation_loss_mean": c.mean if c.losses else None,
        "validation_loss_standard_deviation": c.spread,
        "seeds": len(c.losses),
        "not_counted": len(c.runs) - len(c.used),
        "tokens_per_second": c.median(lambda run: run.totals.tokens_per_second),
        "mfu": c.median(lambda run: run.totals.mfu),
        "training_seconds": c.seconds,
        "on_front_by_flops": c in results.front_by_flops,
        "on_front_by_parameters": c in results.front_by_parameters,
        **{key: c.settings[key] for key in results.differing},
        "runs": " ".join(run.name for run in c.runs),
    }


def _csv(rows: list[dict[str, Any]]) -> bytes:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def as_json(results: Results) -> dict[str, Any]:
    """Fits, profiles and comparisons as numbers; what is not finite is null."""

    def law(fits: FamilyFits, name: str) -> dict[str, Any]:
        found, lacks = getattr(fits, name), getattr(fits, f"{name}_lacks")
        if found is None:
            return {"not_fitted": lacks}
        values = {key: [_finite(v) for v in (e.value, e.low, e.high)] for key, e in found.estimates.items()}
        return {"estimates": values, "undetermined": found.undetermined, "runs": found.points, "rms_error_of_log": found.error}

    return {
        "loss": results.unit,
        "fits": {f.family: {"L(N, D)": law(f, "surface"), "L(C)": law(f, "compute")} for f in results.fits},
        "isoflop": [
            {
                "flops": p.budget,
                "family": p.family,
                "minimum": p.parabola.minimum if p.parabola.inside else None,
                "interval": p.parabola.interval and [_finite(end) for end in p.parabola.interval],
            }
            for p in results.isoflops
        ],
        "comparisons": [
            {
                "parameters": row.configuration.parameters,
                "tokens": row.configuration.tokens,
                "family": row.configuration.family,
                "against": row.against.family,
                "difference": row.difference,
                "interval": row.interval,
            }
            for comparison in results.comparisons
            for row in comparison.rows
            if row.against is not None
        ],
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
