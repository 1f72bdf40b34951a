"""What to say about a key that does not exist: the nearest one, its section, or what a neighbouring project calls it.

The table covers the vocabularies people arrive with: torchtitan (v0.2.2 and its forks), flame, flash-linear-attention's
model JSON, the Hugging Face trainer. A test checks that every key a hint names exists. Loading is config_loader.py's.
"""

from __future__ import annotations

from difflib import get_close_matches

from titan_dp.config.describe import all_keys, sections

_BATCH = "set training.global_batch_size (sequences an optimizer step); accumulation follows from it and the ranks"
_SHAPE = "describe the architecture by keys such as model.hidden_size, model.num_hidden_layers and model.num_heads"
_FSDP_ONLY = "models here are sharded over data-parallel ranks only (parallelism.data_parallel_shard_degree)"
_HF_DATA = "prepare token shards once (`titan-dp prepare`) and set data.path, or stream with data.source and data.hf_dataset"
_FIXED_PATH = "the place inside the run folder is fixed; job.dump_folder and job.run_name choose the run folder"

# By dotted key where the bare name alone would be ambiguous, else by bare name.
HINTS = {
    # torchtitan
    "job.config_file": "the file is named on the command line: --config NAME",
    "job.print_config": "use the flag --print-config",
    "job.save_config_file": "the resolved configuration is always saved in the run folder",
    "model.name": _SHAPE,
    "model.flavor": _SHAPE,
    "hf_assets_path": "the tokenizer travels with the token shards (or set data.tokenizer)",
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
    "tokenizer_path": "the tokenizer travels with the token shards (or set data.tokenizer)",
    "batch_size": "set training.local_batch_size (sequences a rank processes at once)",
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
    "num_layers": "set model.num_hidden_layers",
    "n_layer": "set model.num_hidden_layers",
    "n_heads": "set model.num_heads",
    "n_head": "set model.num_heads",
    "num_attention_heads": "set model.num_heads (model.attention_num_heads for softmax layers)",
    "num_v_heads": "values have as many heads as keys: model.num_heads",
    "n_h": "set model.num_householder",
    "n_householder": "set model.num_householder",
    "expand_k": "set model.head_dim; it does not depend on model.hidden_size",
    "use_gate": "set model.use_output_gate (gates the output) or model.use_forget_gate (decays the state)",
    "gating": "set model.use_forget_gate (decays the state) or model.use_output_gate (gates the output)",
    "use_decay_gate": "set model.use_forget_gate",
    "d_ff": "set model.intermediate_size",
    "hidden_ratio": "set model.intermediate_size",
    "tie_embeddings": "set model.tie_word_embeddings",
    "rms_norm_eps": "set model.norm_eps",
    "init_std": "set model.initializer_range",
    "window_size": "set model.attention_window",
    "num_kv_heads": "set model.attention_num_kv_heads",
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
_NOT_OFFERED = {"quantize", "float8", "mx", "fault_tolerance", "memory_estimation", "experimental"}


def explain_unknown(dotted: str) -> str:
    """One clause on the unknown key `dotted`: what to write instead, as far as that can be told."""
    section, _, name = dotted.rpartition(".")
    if dotted in sections():
        return f"it is a section; its keys are {_names(dotted)}"
    if dotted in HINTS:
        return HINTS[dotted]
    if section.split(".")[0] in _NOT_OFFERED:
        return f"[{section}] has no counterpart here; remove it"
    if homes := [key.dotted for key in all_keys().values() if key.name == name]:
        return f"did you mean {' or '.join(homes[:4])}?"
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
