"""Settings somebody made that change nothing: named at the start of a run, so that no option is dead in silence.

Only keys set by a file or the command line to something other than their default are looked at. The rules are data:
(when it is so, these keys, for this reason).
"""

from __future__ import annotations

from collections.abc import Iterator

from titan_dp.config import Config, Model, StateTracking
from titan_dp.config.describe import all_keys

_MATRIX_STATE = "num_heads head_dim expand_v num_householder use_forget_gate allow_neg_eigval use_output_gate backend"
_CONVOLUTION = "use_short_conv conv_size"
_SOFTMAX = "attention_num_heads attention_num_kv_heads attention_window rope_theta"


Rule = tuple[bool, str, str, str]
"""Applies, section, keys, reason."""


def model_rules(model: Model) -> Iterator[Rule]:
    """Yield every way in which keys of [model] can be without effect."""
    mixers = {model.mixer_of(layer) for layer in range(model.num_hidden_layers)}
    yield mixers == {"attention"}, "model", f"{_MATRIX_STATE} {_CONVOLUTION}", "every layer is softmax attention"
    yield "attention" not in mixers, "model", _SOFTMAX, "no layer is softmax attention"
    yield model.mixer == "attention", "model", "attention_layers", 'mixer = "attention" makes every layer one'
    yield model.mixer == "rwkv7", "model", "use_forget_gate", 'mixer = "rwkv7" has decays of its own'
    yield not model.use_short_conv, "model", "conv_size", "model.use_short_conv is false"


def rules(c: Config) -> Iterator[Rule]:
    """Yield every way in which keys can be without effect."""
    yield from model_rules(c.model)
    yield not c.model.adaptive_householder, "training", "householder_cost", "model.adaptive_householder is false"

    hf = "hf_dataset hf_name hf_split hf_column hf_shuffle_buffer"
    source, made = f'data.source = "{c.data.source}"', c.data.source == "state_tracking"
    yield c.data.source != "hf", "data", hf, source
    yield c.data.source != "shards", "data", "path weights", source
    yield made, "data", "document_boundaries tokenizer", source
    yield made, "validation", "path steps", source
    yield made, "generate", "prompt max_new_tokens temperature", source
    yield made, "training.dataloader", "num_workers prefetch_factor pin_memory", source
    judged = "validation_samples solved_accuracy stop_when_solved"
    yield made and not c.validation.enable, "state_tracking", judged, "validation.enable is false"
    of_groups = "max_moved tokens_per_element"
    yield made and not c.state_tracking.is_group, "state_tracking", of_groups, "the task is no group"
    yield not made, "state_tracking", " ".join(StateTracking.model_fields), source
    yield len(c.data.paths) == 1, "data", "weights", "data.path is a single folder"
    yield c.training.dataloader.num_workers == 0, "training.dataloader", "prefetch_factor", "num_workers is 0"

    yield c.optimizer.name != "Muon", "optimizer", "muon_lr muon_momentum", f'optimizer.name = "{c.optimizer.name}"'
    yield c.optimizer.weight_decay == 0, "optimizer", "decay_embeddings", "optimizer.weight_decay is 0"
    yield c.lr_scheduler.min_lr_factor == 1, "lr_scheduler", "decay_type decay_ratio", "min_lr_factor = 1 keeps the peak"

    mode = c.activation_checkpoint.mode
    yield mode != "selective", "activation_checkpoint", "selective_ac_option", f'activation_checkpoint.mode = "{mode}"'

    yield not c.checkpoint.enable, "checkpoint", "interval async_mode keep_latest_k", "checkpoint.enable is false"
    yield not c.checkpoint.resume, "checkpoint", "load_step", "checkpoint.resume is false"
    nothing = not c.checkpoint.resume and not c.checkpoint.initial_load_path
    yield nothing, "checkpoint", "allow_changed", "checkpoint.resume is false and there is no initial_load_path"
    yield not c.validation.enable, "validation", "path freq steps local_batch_size", "validation.enable is false"
    yield not c.metrics.enable_wandb, "metrics", "wandb_project", "metrics.enable_wandb is false"
    traces = "profile_freq profiler_warmup profiler_active"
    yield not c.profiling.enable_profiling, "profiling", traces, "profiling.enable_profiling is false"
    sample = "prompt max_new_tokens temperature"
    yield not c.generate.enable, "generate", sample, "generate.enable is false"
    yield not c.checkpoint.enable, "generate", sample, "the sample is read from a checkpoint, and checkpoint.enable is false"


def ineffective_settings(config: Config, provenance: dict[str, str]) -> list[str]:
    """A sentence for each setting made that has no effect in `config`, with the origin of the setting."""
    warnings: dict[str, str] = {}
    for applies, section, names, reason in rules(config):
        for dotted in (f"{section}.{name}" for name in names.split()):
            key = all_keys()[dotted]
            if applies and provenance[dotted] != "default" and key.of(config) != key.default:
                warnings.setdefault(dotted, f"{dotted} ({provenance[dotted]}) has no effect: {reason}")
    steps, schedule = config.training.steps, config.lr_scheduler
    if steps is not None and schedule.warmup_steps >= steps:
        warnings["lr_scheduler.warmup_steps"] = (
            f"lr_scheduler.warmup_steps = {schedule.warmup_steps} ({provenance['lr_scheduler.warmup_steps']}) is not over "
            f"when the run ends after training.steps = {steps}"
        )
    return list(warnings.values())
