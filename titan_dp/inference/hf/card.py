"""The model card: what the model is, how it was trained, how it is loaded. README.md of an exported folder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import tomli
import torch

from titan_dp import config
from titan_dp.data.tokenizer import Tokenizer
from titan_dp.errors import UserError
from titan_dp.files import to_json
from titan_dp.inference.hf.architectures import has_idle_layer
from titan_dp.inference.sources import Source
from titan_dp.model.transformer import build_model
from titan_dp.train.run_folder import read_records, run_of

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
_USE["olmo-hybrid"] = _USE["qwen3_5_text"] = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer  # or: vllm serve {name}

model = AutoModelForCausalLM.from_pretrained("{name}", dtype="bfloat16")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```
"""


def model_card(name: str, source: Source, target: str, dtype: str, tokenizer: Tokenizer) -> str:
    """Markdown with the front matter the Hub reads.

    Args:
        name: of the folder.
        source: of the weights; if it is a run's checkpoint, the card says how the run validated at its step.
        target: --format of the export.
        dtype: of the matrices as stored.
        tokenizer: as written into the folder.

    Raises UserError if the source's training summary is damaged.
    """
    with torch.device("meta"):
        model = build_model(source.config)
    library = "flash-linear-attention" if target == "fla" else "transformers"
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    lines += ["tags:", "- deltaproduct", "- linear-rnn", f"- {library}", "---", "", f"# {name}", "", f"{model.describe()}.", ""]
    lines += [f"{model.num_params():,} parameters, stored in {dtype}. Trained and exported with titan_dp.", ""]
    lines += [_USE[target].format(name=name)]
    if target in ("olmo-hybrid", "qwen3_5_text") and has_idle_layer(source.config):
        lines += ["The last layer, of softmax attention, does nothing: this type of model wants one.", ""]
    # AutoTokenizer does not add it.
    if bos := next((token for token, i in tokenizer.special_tokens.items() if i == tokenizer.bos_id), None):
        with_it, without = "Every training document began with `{}`; put it", "No training document began with `{}`; put none"
        lines += [f"{(with_it if tokenizer.adds_bos else without).format(bos)} before a prompt.", ""]
    try:
        measured = _validation(run_of(source.path), source.training.get("step", 0))
        rows = _training_rows(source.training) | _measured_rows(measured)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise UserError(
            f"the training summary of {name} is damaged ({error}); move training.json out of the folder, or take it from its "
            "source"
        ) from error
    if rows:
        lines += ["## Training", "", "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items()), ""]
    lines += ["## Architecture", "", "| | |", "|---|---|"]
    softmax_only = {key for key in config.Model.model_fields if key.startswith(("attention", "rope"))}
    unused = set() if "softmax" in model.describe() else softmax_only
    settings = source.config.model_dump(exclude={"backend", *unused}, exclude_none=True)
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
        "sequences per step": f"{training.get('global_batch_size', 0):,}",
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
    bits = f" ({measured['validation_bits_per_byte']:.4f} bits per byte)" if measured.get("validation_bits_per_byte") else ""
    return {"validation loss": f"{loss:.4f} nats per token{bits} over {measured['validation_tokens']:,} tokens"}


def _validation(run_folder: Path | None, step: int) -> dict[str, Any]:
    """The validation record of a run at `step`; empty if there is none."""
    if run_folder is None or not (run_folder / "metrics.jsonl").exists():
        return {}
    found = [record for record in read_records(run_folder) if record["step"] == step and "validation_loss" in record]
    return found[-1] if found else {}
