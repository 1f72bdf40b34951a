"""What to say about a key that does not exist, and about a setting that changes nothing.

A wrong key gets one clause: the key people mean by it, its section, or the nearest name. `HINTS` translates the words of
torchtitan (v0.2.2), flame, flash-linear-attention and the Hugging Face trainer; a test checks that every key it names exists.
Settings without effect are rules of data (when it is so, these keys, for this reason); only keys that somebody set to
something other than their default are looked at, so that no option is dead in silence.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import get_close_matches

from titan_dp.config.describe import all_keys, homes, sections
from titan_dp.config.mixers import MIXERS
from titan_dp.config.schema import Config, Model, MupBase, StateTracking

_BATCH = "set training.global_batch_size (sequences per optimizer step); accumulation follows from it and the ranks"
_SHAPE = "describe the architecture by keys such as model.hidden_size, model.num_hidden_layers and model.num_heads"
_FSDP_ONLY = "models here are sharded over data-parallel ranks only (parallelism.data_parallel_shard_degree)"
_HF_DATA = "prepare token shards once (`titan-dp prepare`) and set data.path, or stream with data.source and data.hf_dataset"
_FIXED_PATH = "the place inside the run folder is fixed; job.dump_folder and job.run_name choose the run folder"
_TOKENIZER = "the tokenizer travels with the token shards (or set data.tokenizer)"

# By dotted key if the bare name alone is ambiguous, else by bare name.
HINTS = {
    # torchtitan
    "job.config_file": "the file is named on the command line: --config NAME",
    "job.print_config": "use the flag --print-config",
    "job.save_config_file": "the resolved configuration is always saved in the run folder",
    "model.name": _SHAPE,
    "model.flavor": _SHAPE,
    "hf_assets_path": _TOKENIZER,
    "training.dataset": _HF_DATA,
    "training.dataset_path": _HF_DATA,
    "validation.dataset": "prepare held-out token shards and set validation.path",
    "validation.seq_len": "validation uses training.seq_len",
    "training.dtype": "originals are float32; set training.mixed_precision_param for compute",
    "training.compile": "set compile.enable",
    "training.seed": "set debug.seed (initialisation) and data.seed (order of the data)",
    "optimizer.implementation": "AdamW is always the fused one",
    "optimizer.fused": "AdamW is always the fused one",
    "optimizer.betas": "set optimizer.beta1 and optimizer.beta2",
    "float8": 'set quantize.linear = "float8" and quantize.recipe',
    "compile.components": "compile.enable compiles every block",
    "compile.backend": "compile.enable uses inductor",
    "tensor_parallel_degree": _FSDP_ONLY,
    "pipeline_parallel_degree": _FSDP_ONLY,
    "expert_parallel_degree": _FSDP_ONLY,
    "data_parallel_degree": "set parallelism.data_parallel_shard_degree (or -1) and parallelism.data_parallel_replicate_degree",
    "initial_load_model_only": "checkpoint.initial_load_path always loads the weights alone",
    "last_save_model_only": "the last checkpoint is as complete as the others",
    "save_tb_folder": _FIXED_PATH,
    "save_traces_folder": _FIXED_PATH,
    "save_memory_snapshot_folder": _FIXED_PATH,
    # flame
    "model.config": _SHAPE,
    "tokenizer_path": _TOKENIZER,
    "batch_size": "set training.local_batch_size (sequences per rank and micro-batch)",
    "gradient_accumulation_steps": _BATCH,
    "grad_accum_steps": _BATCH,
    "grad_acc_steps": _BATCH,
    "context_len": "set training.seq_len; data.document_boundaries says whether a document's end resets the model",
    "varlen": 'set data.document_boundaries = "reset"',
    "streaming": 'set data.source = "hf" to stream a Hugging Face dataset while training',
    "data_probs": "set data.weights",
    "skip_nan_inf": "non-finite steps are always skipped; training.max_nonfinite_steps in a row stop the run",
    "lr_min": "set lr_scheduler.min_lr_factor (a fraction of the peak)",
    "enable_checkpoint": "set checkpoint.enable",
    # flash-linear-attention, Hugging Face and everybody's shorthands
    "d_model": "set model.hidden_size",
    "dim": "set model.hidden_size",
    "n_embd": "set model.hidden_size",
    "n_layers": "set model.num_hidden_layers",
    "n_layer": "set model.num_hidden_layers",
    "num_attention_heads": "set model.num_heads (model.attention_num_heads for softmax layers)",
    "num_k_heads": "set model.num_key_heads",
    "num_v_heads": "set model.num_heads to the heads of v, and model.num_key_heads to those of q and k",
    "n_h": "set model.num_householder",
    "expand_k": "set model.head_dim; it does not depend on model.hidden_size",
    "use_gate": "set model.use_output_gate (gates the output) or model.use_forget_gate (decays the state)",
    "norm_before_gate": "set model.gate_before_norm, its opposite",
    "mamba_num_heads": "set model.num_heads",
    "mamba_num_groups": "set model.num_key_heads",
    "mamba_state_dim": "set model.head_dim",
    "mamba_head_dim": "set model.expand_v (this over model.head_dim)",
    "gdp_num_householder": "set model.num_householder",
    "gating": "set model.use_forget_gate (decays the state) or model.use_output_gate (gates the output)",
    "d_ff": "set model.intermediate_size",
    "hidden_ratio": "set model.intermediate_size",
    "init_std": "set model.initializer_range",
    "window_size": "set model.attention_window",
    "num_kv_heads": "set model.attention_num_kv_heads",
    "qk_norm": 'set model.attention_block = "olmo" (softmax layers); q and k of recurrent layers always have unit length',
    "learning_rate": "set optimizer.lr",
    "max_grad_norm": "set training.max_norm",
    "grad_clip": "set training.max_norm",
    "max_steps": "set training.steps",
    "max_tokens": "set training.tokens",
    "warmup": "set lr_scheduler.warmup_steps",
    "warmup_ratio": "set lr_scheduler.warmup_steps (a number of steps)",
    "sequence_length": "set training.seq_len",
    "max_position_embeddings": "set training.seq_len; the model itself has no largest length",
    "save_steps": "set checkpoint.interval",
    "logging_steps": "set metrics.log_freq",
    "output_dir": "set job.dump_folder and job.run_name",
}

# Sections of torchtitan and flame that have no counterpart here.
_NOT_OFFERED = {"mx", "fault_tolerance", "memory_estimation", "experimental"}


def _switched_off(dotted: str) -> str:
    """What switches off the setting that an unknown key, such as compile.no_enable or no-compile.enable, means; "" if none."""
    meant = ".".join(re.sub(r"^(no|disable)[-_]", "", part) for part in dotted.split("."))
    key = all_keys().get(meant)
    if meant == dotted or key is None or "true or false" not in key.expected:
        return ""
    return f"to switch it off, write {meant} = false in the file or --{meant}=false"


def explain_unknown(dotted: str) -> str:
    """One clause on the unknown key `dotted`: what to write instead, as far as that can be told."""
    section, _, name = dotted.rpartition(".")
    if dotted in sections():
        return f"it is a section; its keys are {_names(dotted)}"
    if dotted in HINTS:
        return HINTS[dotted]
    if section in HINTS:
        return HINTS[section]
    if section.split(".")[0] in _NOT_OFFERED:
        return f"[{section}] has no counterpart here; remove it"
    if off := _switched_off(dotted):
        return off
    if found := homes(name):
        return f"did you mean {' or '.join(found)}?"
    if name in HINTS:
        return HINTS[name]
    if section in sections():
        own = [key.name for key in sections()[section]]
        if near := get_close_matches(name, own, n=1) or [other for other in own if name in other]:
            return f"did you mean {section}.{near[0]}?"
        if near := get_close_matches(name, [key.name for key in all_keys().values()], n=1, cutoff=0.8):
            return explain_unknown(f".{near[0]}")
        return f"the keys of [{section}] are {_names(section)}"
    if near := get_close_matches(dotted, list(all_keys()), n=1, cutoff=0.8):
        return f"did you mean {near[0]}?"
    if near := get_close_matches(section or name, list(sections()), n=1):
        return f"did you mean the section [{near[0]}]?"
    return f"the sections are {', '.join(sections())}"


def _names(section: str) -> str:
    inner = [path.rpartition(".")[2] for path in sections() if path.startswith(section + ".")]
    return ", ".join([key.name for key in sections()[section]] + inner)


# -- settings without effect -------------------------------------------------------------------------------------------

Rule = tuple[bool, str, str, str]
"""Applies, section, keys, reason."""


def model_rules(model: Model) -> Iterator[Rule]:
    """Yield every way in which keys of [model] can be without effect."""
    families = " and ".join(f'"{name}"' for name in model.mixers())
    used = {key for name in model.mixers() for key in MIXERS[name].uses.split()}
    unused = {key for mixer in MIXERS.values() for key in mixer.uses.split()} - used
    yield bool(unused), "model", " ".join(sorted(unused)), f"no layer uses it (mixer {families})"
    yield model.mixer == "attention", "model", "attention_layers", 'mixer = "attention" makes every layer one'
    yield not model.use_short_conv, "model", "conv_size", "model.use_short_conv is false"
    yield not model.use_output_gate, "model", "gate_before_norm", "model.use_output_gate is false"


def rules(c: Config) -> Iterator[Rule]:
    """Yield every way in which keys can be without effect."""
    yield from model_rules(c.model)
    yield c.quantize.linear == "none", "quantize", "recipe emulate", 'quantize.linear = "none"'
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
    yield (
        made and not c.state_tracking.curriculum_steps,
        "state_tracking",
        "curriculum_growth",
        "state_tracking.curriculum_steps is 0",
    )
    of_groups = "max_moved tokens_per_element"
    yield made and not c.state_tracking.is_group, "state_tracking", of_groups, "the task is not a group"
    yield not made, "state_tracking", " ".join(StateTracking.model_fields), source
    yield len(c.data.paths) == 1, "data", "weights", "data.path is a single folder"
    yield c.training.dataloader.num_workers == 0, "training.dataloader", "prefetch_factor", "num_workers is 0"

    yield c.optimizer.name != "Muon", "optimizer", "muon_lr muon_momentum muon_split", f'optimizer.name = "{c.optimizer.name}"'
    yield c.optimizer.weight_decay == 0, "optimizer", "decay_embeddings", "optimizer.weight_decay is 0"
    base = " ".join(MupBase.model_fields)
    yield c.optimizer.parametrization != "mup", "optimizer.mup_base", base, 'optimizer.parametrization = "standard"'
    yield c.lr_scheduler.min_lr_factor == 1, "lr_scheduler", "decay_type decay_ratio", "min_lr_factor = 1 keeps the peak"

    mode = c.activation_checkpoint.mode
    yield mode != "selective", "activation_checkpoint", "selective_ac_option", f'activation_checkpoint.mode = "{mode}"'

    yield not c.checkpoint.enable, "checkpoint", "interval async_mode keep_latest_k keep_steps", "checkpoint.enable is false"
    yield not c.checkpoint.resume, "checkpoint", "load_step", "checkpoint.resume is false"
    nothing = not c.checkpoint.resume and not c.checkpoint.initial_load_path and not c.checkpoint.branch_from
    yield nothing, "checkpoint", "allow_changed", "checkpoint.resume is false, and nothing else is loaded"
    yield not c.validation.enable, "validation", "path freq steps local_batch_size", "validation.enable is false"
    wandb = "wandb_project wandb_entity wandb_group wandb_tags"
    yield not c.metrics.enable_wandb, "metrics", wandb, "metrics.enable_wandb is false"
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
            f"lr_scheduler.warmup_steps = {schedule.warmup_steps} is not over when the run ends after training.steps = {steps}"
        )
    return list(warnings.values())
