"""`--dry-run`: what a run would be, computed on the meta device in seconds, without data, GPUs or a process group.

Parameters, FLOPs and tokens are exact. Memory is counted: sharded parameters, gradients and optimizer state from
the tensors' sizes, activations by running one block on the meta device and adding up what autograd saves. It leaves
out the allocator's slack, communication buffers and the compiler's savings.
"""

from __future__ import annotations

from typing import Any

import torch
from deltaproduct_kernels import resolve_backend
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

from titan_dp import config
from titan_dp.config_loader import Loaded
from titan_dp.distributed import rank_from_env, shard_degree, world_size_from_env
from titan_dp.errors import UserError
from titan_dp.model import build_model
from titan_dp.model.parallelize import is_recomputed, keep_policy
from titan_dp.model.transformer import FLOAT32_MODULES, Transformer
from titan_dp.model_size import embedding_parameters, model_size
from titan_dp.schedule import BatchPlan, plan_batches

_GIB = 2**30


def chosen_backend(model: config.Model, device: torch.device) -> str:
    """The implementation of the recurrence on `device`. Raises UserError for one that is not available."""
    try:
        chosen = resolve_backend(model.backend, device, dk=model.head_dim, dv=model.head_v_dim)
    except ValueError as error:
        raise UserError(f"model.{error}") from error
    return f"torch loop ({chosen} front end)" if model.mixer == "rwkv7" else chosen


def print_plan(loaded: Loaded) -> None:
    """Print the summary on rank 0. Raises UserError for what would stop the run before its first step."""
    c = loaded.config
    world_size = world_size_from_env()
    batch = plan_batches(c.training, world_size)
    shards = shard_degree(c.parallelism, world_size)
    with torch.device("meta"):
        model = build_model(c.model)
    if rank_from_env() != 0:
        return
    console = Console(highlight=False)
    table = Table(title=f"{loaded.run_name}: dry run", show_header=False)
    for name, value in {**model_facts(c.model, batch.seq_len), **run_facts(c, batch, world_size)}.items():
        table.add_row(name, value)
    table.add_section()
    for name, value in memory_facts(model, c, batch, shards).items():
        table.add_row(name, value)
    console.print(table)
    for line in loaded.warnings():
        console.print(f"warning: {line}")


def model_facts(c: config.Model, seq_len: int) -> dict[str, str]:
    """Sizes and FLOPs, for the dry run and the trainer's banner."""
    size = model_size(c, seq_len)
    kinds = {"matmul": size.matmul, "conv": size.conv, "recurrence": size.recurrence, "attention": size.attention}
    parts = " + ".join(f"{flops / 1e9:.3g} {kind}" for kind, flops in kinds.items() if flops)
    taken = ", all Householder steps taken" if c.adaptive_householder else ""
    return {
        "parameters": f"{size.parameters:,} ({size.parameters - embedding_parameters(c):,} without the embedding)",
        "FLOPs a token": f"{size.flops_per_token / 1e9:.4g} G = {parts} (forward + backward, no recomputation{taken})",
    }


def run_facts(c: config.Config, batch: BatchPlan, world_size: int) -> dict[str, str]:
    return {
        "batch": (
            f"{batch.global_batch_size} sequences of {batch.seq_len} = {batch.tokens_per_step:,} tokens a step "
            f"({world_size} rank(s) x {batch.local_batch_size} x {batch.accumulation} accumulation)"
        ),
        "length": f"{batch.steps:,} steps = {batch.tokens / 1e9:.4g} B tokens",
        "precision": f"compute {c.training.mixed_precision_param}, reduction {c.training.mixed_precision_reduce}, "
        "norms, A_log, dt_bias and the sharded originals float32",
    }


def memory_facts(model: Transformer, c: config.Config, batch: BatchPlan, shards: int) -> dict[str, str]:
    """Bytes a rank, by part."""
    parameters = sum(p.numel() for p in model.parameters())
    compute_bytes = 2 if c.training.mixed_precision_param == "bfloat16" else 4
    block = max(sum(p.numel() for p in layer.parameters()) for layer in model.layers)
    adam = 4 if c.optimizer.name == "Muon" else 8  # Muon keeps one moment of the matrices, AdamW two of everything
    state = parameters * (4 + 4 + adam) / shards
    gathered = (2 * block + model.embeddings.weight.numel()) * compute_bytes
    activations = activation_bytes(model, c, batch)
    return {
        "parameters, gradients, optimizer": f"{state / _GIB:.2f} GiB a rank ({shards} shard(s), float32)",
        "gathered parameters": f"{gathered / _GIB:.2f} GiB a rank (two blocks and the embedding at once)",
        "activations": f"{activations / _GIB:.2f} GiB a rank (counted eagerly; checkpointing {c.activation_checkpoint.mode})",
        "sum": f"{(state + gathered + activations) / _GIB:.2f} GiB a rank",
        "recurrence": chosen_backend(c.model, torch.device("cuda" if torch.cuda.is_available() else "cpu")),
    }


def activation_bytes(model: Transformer, c: config.Config, batch: BatchPlan) -> int:
    """Bytes autograd holds at the end of one forward of `local_batch_size` sequences."""
    ac, dtype = c.activation_checkpoint, getattr(torch, c.training.mixed_precision_param)
    x = torch.empty(batch.local_batch_size, batch.seq_len, c.model.hidden_size, device="meta", dtype=dtype)
    kinds = {block.attn.describe(): block for block in model.blocks}
    saved = {kind: _saved_bytes(block, x) for kind, block in kinds.items()}  # once a kind: RWKV-7's loop takes seconds
    held = 0
    for i, block in enumerate(model.blocks):
        if ac.mode == "none" or (ac.mode == "selective" and not is_recomputed(i, ac)):
            held += saved[block.attn.describe()]
        else:
            held += x.nbytes + (_kept_bytes(block, x) if ac.mode == "selective" and ac.selective_ac_option == "op" else 0)
    if ac.mode != "none":
        held += saved[model.blocks[0].attn.describe()]  # the block under recomputation
    return held


def _cast(block: torch.nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The block's parameters as FSDP would hand them to it."""
    kept = {id(p) for module in block.modules() if isinstance(module, FLOAT32_MODULES) for p in module.parameters()}
    return {n: p if id(p) in kept else p.to(dtype) for n, p in block.named_parameters()}


def _saved_bytes(block: torch.nn.Module, x: torch.Tensor) -> int:
    parameters = _cast(block, x.dtype)
    own = {id(p) for p in parameters.values()}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in own and not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            saved[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = torch.func.functional_call(block, parameters, (x.requires_grad_(),))
    del output
    return sum(saved.values())


class _KeptOutputs(TorchDispatchMode):
    def __init__(self) -> None:
        self.bytes, self.policy = 0, keep_policy()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        ctx = type("Context", (), {"is_recompute": False})
        if self.policy(ctx, func) is CheckpointPolicy.MUST_SAVE:
            self.bytes += sum(t.nbytes for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, torch.Tensor))
        return out


def _kept_bytes(block: torch.nn.Module, x: torch.Tensor) -> int:
    with _KeptOutputs() as kept:
        torch.func.functional_call(block, _cast(block, x.dtype), (x.requires_grad_(),))
    return kept.bytes
