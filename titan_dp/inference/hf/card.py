"""The model card: what the model is, how it was trained, how it is loaded. README.md of an exported folder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import tomli

from titan_dp import config
from titan_dp.errors import UserError
from titan_dp.files import to_json
from titan_dp.model.transformer import build_model
from titan_dp.train.run_folder import parsed_record

_USE = {
    "fla": """```python
import fla  # pip install flash-linear-attention; needs a GPU
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", dtype="bfloat16").cuda()
tokenizer = AutoTokenizer.from_pretrained("{name}")
```
""",
    "remote-code": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
```
""",
}


def model_card(
    name: str, c: config.Model, *, target: str, training: dict[str, Any], dtype: str, bos: str | None, measured: dict[str, Any]
) -> str:
    """Markdown with the front matter the Hub reads.

    Args:
        name: of the folder.
        c: the model's settings.
        target: "fla" or "remote-code".
        training: a checkpoint's manifest, or empty.
        dtype: of the matrices as stored.
        bos: the token every training document began with, or None.
        measured: the last validation record of the run, or empty.
    """
    import torch

    with torch.device("meta"):
        model = build_model(c)
    library = "flash-linear-attention" if target == "fla" else "transformers"
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    lines += ["tags:", "- deltaproduct", "- linear-rnn", f"- {library}", "---", "", f"# {name}", ""]
    lines += [
        f"{model.describe()}.",
        "",
        f"{model.num_params():,} parameters, stored in {dtype}. Trained and exported with titan_dp.",
        "",
    ]
    lines += [_USE[target].format(name=name)]
    if bos:
        lines += [f"Every training document began with `{bos}`; put it before a prompt.", ""]
    try:
        rows = {**_training_rows(training), **_measured_rows(measured)}
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise UserError(
            f"the training summary of {name} is damaged ({error}); move training.json out of the folder, or take it from its "
            "source"
        ) from error
    if rows:
        lines += ["## Training", "", "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items()), ""]
    lines += ["## Architecture", "", "| | |", "|---|---|"]
    unused = {
        key for key in config.Model.model_fields if key.startswith(("attention", "rope")) and "softmax" not in model.describe()
    }
    settings = c.model_dump(exclude={"backend", *unused}, exclude_none=True)
    lines += [f"| {key} | {to_json(value)} |" for key, value in settings.items()]
    return "\n".join(lines) + "\n"


def _training_rows(training: dict[str, Any]) -> dict[str, str]:
    if not training:
        return {}
    sections = tomli.loads(training["config"]) if "config" in training else {}
    optimizer, run, schedule = (sections.get(key, {}) for key in ("optimizer", "training", "lr_scheduler"))
    rows = {
        "steps": f"{training.get('step', 0):,}",
        "tokens": f"{training.get('tokens', 0):,}",
        "sequence length": f"{run.get('seq_len', 0):,}",
        "sequences a step": f"{training.get('global_batch_size', 0):,}",
        "optimizer": f"{optimizer.get('name')}, lr {optimizer.get('lr')}, weight decay {optimizer.get('weight_decay')}",
        "schedule": f"{schedule.get('decay_type')} after {schedule.get('warmup_steps')} steps of warmup",
        "data fingerprint": f"`{str(training.get('fingerprint', ''))[:16]}`",
        "tokenizer": f"{training.get('tokenizer')}",
        "code": f"titan_dp at commit `{str(training.get('git_commit', ''))[:12]}`, torch {training.get('torch')}",
    }
    return rows if sections else {key: rows[key] for key in ("steps", "tokens", "tokenizer")}


def _measured_rows(measured: dict[str, Any]) -> dict[str, str]:
    if not measured:
        return {}
    loss = measured["validation_loss"]
    if loss is None or not math.isfinite(loss):
        return {"validation loss": "not finite"}
    bits = f" ({measured['validation_bits_per_byte']:.4f} bits a byte)" if measured.get("validation_bits_per_byte") else ""
    return {"validation loss": f"{loss:.4f} nats a token{bits} over {measured['validation_tokens']:,} tokens"}


def last_validation(run_folder: Path, step: int) -> dict[str, Any]:
    """The validation record of a run at `step`, from its metrics.jsonl; empty where there is none."""
    path = run_folder / "metrics.jsonl"
    if not path.exists():
        return {}
    for line in reversed(path.read_text(errors="replace").splitlines()):
        if '"validation_loss"' in line and (record := parsed_record(line)) is not None and record.get("step") == step:
            return record
    return {}
