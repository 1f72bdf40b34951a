"""What differs between a checkpoint and the run that goes on from it: refused by key, allowed by key, or named. Without torch.

There are three kinds of difference, for a resume and for a new run that starts from another's weights (`initial_load_path`):
tensors that do not match are always refused; settings that change what the same tensors or the data mean are refused unless
`checkpoint.allow_changed` names them; every other setting that decides how training goes on is named with both values. A
refusal advises the flag that works, if there is one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from titan_dp import config
from titan_dp.checkpoint.manifest import DamagedError, saved_sections, saved_value
from titan_dp.config.advice import model_rules
from titan_dp.config.describe import all_keys
from titan_dp.errors import UserError
from titan_dp.files import shorten, shown, to_json

Changes = dict[str, tuple[object, object]]
"""Value in the checkpoint and in this run, by key."""

# Keys a resumed run may not change, besides everything in [model] except backend.
_FIXED = ("data.source", "data.weights", "data.document_boundaries", "data.seed", "training.seq_len", "optimizer.name")
_STREAM = ("data.hf_dataset", "data.hf_name", "data.hf_split", "data.hf_column", "data.hf_shuffle_buffer")

# Keys that cannot change the course of a run. All others are named, a key that is added later too, until it stands here.
_NO_MATTER = ("job.", "checkpoint.", "validation.", "metrics.", "profiling.", "comm.", "generate.", "training.dataloader.")
_NO_MATTER_EITHER = {"training.gc_freq", "training.max_nonfinite_steps", "data.verify", "data.path", "data.tokenizer"}
_NO_MATTER_EITHER |= {"training.global_batch_size", "state_tracking.test_length", "state_tracking.test_samples"}
_NO_MATTER_EITHER |= {"debug.check_kernels"}


_NAMED = 3
"""Differences that a refusal shows with both values; of more it gives the number."""


def check_changes(
    saved: dict[str, Any],
    current: dict[str, Any],
    allow_changed: list[str],
    tensors: str | None = None,
    weights_of: str | None = None,
    run_folder: Path | str = "the run folder",
) -> None:
    """Compare a manifest with what the run that goes on from it would save.

    Args:
        saved, current: with `config` (TOML), `fingerprint`, `tokenizer`, `tokenizer_hash`, `global_batch_size`.
        allow_changed: keys that may differ.
        tensors: how the tensors themselves differ, which no key allows.
        weights_of: the checkpoint whose weights alone a new run starts from, for the message; None for a resume.
        run_folder: that a resume reads, for the message.

    Raises UserError naming the first architecture or data keys that differ and are not allowed, with both values.
    """
    if weights_of is None:
        step = saved["step"]
        opening = f"{run_folder} holds another run (step {step}); choose another job.run_name. It was started with another"
        changed, ways = _changed(saved, current), "restore it"
    else:
        opening = f"{weights_of} was made with another"
        changed, ways = weights_changed(saved, current), "use the [model] section and the tokenizer it was made with"
    changed = {key: pair for key, pair in changed.items() if tensors or key not in allow_changed}
    if not changed and tensors is None:
        return
    pairs = [f"{shorten(key)} (was {_show(old)}, now {_show(new)})" for key, (old, new) in sorted(changed.items())]
    more = f" and {len(pairs) - _NAMED} more" if pairs[_NAMED:] else ""
    listed = ", ".join(pairs[:_NAMED]) + more
    if tensors is not None:
        what = f"{listed}, so that the tensors differ" if listed else "architecture"
        raise UserError(f"{opening} {what}: {tensors}; {ways} (no checkpoint.allow_changed mends that)")
    flag = to_json(sorted({*allow_changed, *changed}))
    raise UserError(f"{opening} {listed}; {ways}, or allow it with --checkpoint.allow_changed '{flag}'")


def weights_changed(saved: dict[str, Any], current: dict[str, Any]) -> Changes:
    """What makes the same weights compute something else, or the same tokens mean something else."""
    return {**_architecture(saved, current), **_vocabulary(saved, current)}


def changed_since(saved: dict[str, Any], current: dict[str, Any]) -> Changes:
    """Every setting that decides how a run goes on and is not what it was when `saved` was written, allowed ones included."""
    before, now = saved_sections(saved["config"]), saved_sections(current["config"])
    keys = [k for k in _names(before) | _names(now) if not k.startswith(_NO_MATTER) and k not in _NO_MATTER_EITHER]
    pairs = {key: (saved_value(before, key), saved_value(now, key)) for key in keys}
    named = {k: (old, new) for k, (old, new) in pairs.items() if old != new and (k == "model.backend" or k[:6] != "model.")}
    return {**_changed(saved, current), **named}


def describe_changes(changes: Changes) -> str:
    """'optimizer.lr (was 0.001, now 0.002), ...'; says so if this version does not know a key."""
    return ", ".join(
        f"{shorten(key)} (was {_show(old)}, now {'unknown to this version' if key not in all_keys() else _show(new)})"
        for key, (old, new) in sorted(changes.items())
    )


def keeps_moments(saved: dict[str, Any], current: dict[str, Any]) -> bool:
    """Whether this run has the optimizer whose state is in the checkpoint."""
    name = "optimizer.name"
    return saved_value(saved_sections(saved["config"]), name) == saved_value(saved_sections(current["config"]), name)


def check_moments(saved: dict[str, Any], current: dict[str, Any], absent: list[str], allow_changed: list[str]) -> None:
    """Raise UserError if `absent` tensors of the optimizer are not in the checkpoint, unless another optimizer is allowed.

    Muon of earlier versions took projections that are AdamW's now.
    """
    key = "optimizer.name"
    if absent and key not in allow_changed:
        name = saved_value(saved_sections(current["config"]), key)
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        flag = to_json(sorted({*allow_changed, key}))
        raise UserError(
            f"the checkpoint of step {saved['step']} lacks {absent[0]}{more}: {key} = {shown(name)} took other parameters in "
            f"the version that saved it; begin without moments with --checkpoint.allow_changed '{flag}'"
        )


# -- what is compared ---------------------------------------------------------------------------------------------------


def _changed(saved: dict[str, Any], current: dict[str, Any]) -> Changes:
    """What a resume refuses unless it is allowed."""
    before, now = saved_sections(saved["config"]), saved_sections(current["config"])
    source = saved_value(now, "data.source")
    keys = (*_FIXED, *_STREAM) if source == "hf" else _FIXED
    values: Changes = {key: (saved_value(before, key), saved_value(now, key)) for key in keys}
    values["training.global_batch_size"] = saved["global_batch_size"], current["global_batch_size"]
    changed = {key: pair for key, pair in values.items() if pair[0] != pair[1]}
    changed |= weights_changed(saved, current)
    # A stream's fingerprint is of settings that are compared one by one already.
    data = {"state_tracking": "state_tracking.task", "hf": "data.hf_dataset"}.get(str(source), "data.path")
    said = source == "hf" and any(key.startswith("data.") for key in changed)
    if saved["fingerprint"] != current["fingerprint"] and data not in changed and not said:
        changed[data] = saved["fingerprint"], current["fingerprint"]
    return changed


def _architecture(saved: dict[str, Any], current: dict[str, Any]) -> Changes:
    """What differs in [model] and changes the tensors or what is computed from them."""
    before, now = (_function(saved_sections(of["config"])["model"]) for of in (saved, current))
    return {f"model.{key}": (before[key], now[key]) for key in before if key in now and before[key] != now[key]}


def _function(section: dict[str, Any]) -> dict[str, Any]:
    """[model] with defaults that depend on other keys spelled out, without keys that have no effect in it.

    Nor do the backend, which computes the same, and the initialisation of weights that are loaded anyway.
    """
    try:
        c = config.Model.model_validate(section)
    except (ValidationError, ArithmeticError) as error:
        raise DamagedError(
            "the checkpoint's [model] section is not valid; take another step with checkpoint.load_step"
        ) from error
    kv_heads = c.attention_num_kv_heads or c.softmax_heads
    values = c.model_dump(exclude={"backend", "initializer_range"}) | {
        "intermediate_size": c.mlp_size,
        "num_key_heads": c.key_heads,
        "attention_num_heads": c.softmax_heads,
        "attention_num_kv_heads": kv_heads,
    }
    inert = {key for applies, _, keys, _ in model_rules(c) if applies for key in keys.split()}
    return {key: value for key, value in values.items() if key not in inert}


def _vocabulary(saved: dict[str, Any], current: dict[str, Any]) -> Changes:
    """Whether tokens mean the same: by the tokenizer's hash, not by its name, which may be a path."""
    was, now = saved.get("tokenizer_hash", ""), current.get("tokenizer_hash", "")
    if now in ("", was) or (not was and saved.get("tokenizer") == current.get("tokenizer")):
        return {}  # saved before hashes were kept: the name has to do
    sources = {saved_value(saved_sections(of["config"]), "data.source") for of in (saved, current)}
    key = "state_tracking.task" if sources == {"state_tracking"} else "data.tokenizer"
    return {key: (_identity(saved["tokenizer"], was), _identity(current["tokenizer"], now))}


def _identity(name: object, digest: str) -> str:
    return f"{name} {digest[:12]}..." if digest else f"{name}, saved without its hash"


def _names(sections: dict[str, Any], prefix: str = "") -> set[str]:
    """Dotted keys that TOML sections set, and all that this version knows."""
    found = set() if prefix else set(all_keys())
    for name, value in sections.items():
        found |= _names(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name}
    return found


def _show(value: object) -> str:
    """Fingerprints of data by their first digits, anything else as it is."""
    parts = value.split() if isinstance(value, str) else []
    if parts and all(len(part) == 64 and part.isalnum() for part in parts):
        return f"tokens {', '.join(f'{part[:12]}...' for part in parts)}"
    return "unset" if value is None else shown(value)
