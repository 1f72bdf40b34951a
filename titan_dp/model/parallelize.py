"""From settings to a sharded model: built on the meta device -> float8 -> checkpointing -> compile -> FSDP2, in this order.

The order matters. Checkpointing goes inside the compiled region, so that the compiler sees the recomputation; FSDP's
hooks stay outside it, so that every block is one full graph. Nothing here allocates.
"""

from __future__ import annotations

from typing import Any

import torch
from deltaproduct_kernels import CHUNK_OPS
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from titan_dp import config
from titan_dp.distributed import World, build_mesh, context_group
from titan_dp.model import context_parallel
from titan_dp.model.float8 import apply_float8
from titan_dp.model.transformer import Transformer, build_model

# Outputs that are expensive to recompute and small to keep. Every second matmul is kept: half of the FLOPs of a second
# forward for half of its memory (torchtitan's choice).
_MATMULS = frozenset({torch.ops.aten.mm.default, torch.ops.aten._scaled_mm.default})
_KEPT_OPS = frozenset(
    {
        *CHUNK_OPS,
        *context_parallel.KEPT_OPS,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    }
)


def sharded_model(c: config.Config, world: World) -> Transformer:
    """The model of `c` on the ranks of `world`, still on the meta device: call `to_empty` and `init_weights`.

    Needs a process group. Raises UserError if the degrees of parallelism do not fit the ranks.
    """
    mesh, context = build_mesh(c.parallelism, world), context_group(c.parallelism, world)
    with torch.device("meta"):
        model = build_model(c.model)
    if context is not None:
        model.set_context(context_parallel.ContextParallel(context))
    apply_float8(model, c.quantize)
    apply_activation_checkpoint(model, c.activation_checkpoint)
    if c.compile.enable:
        apply_compile(model)
    apply_fsdp(model, mesh, c.training, c.parallelism)
    return model


def apply_activation_checkpoint(model: Transformer, ac: config.ActivationCheckpoint) -> None:
    """Wrap blocks so that their activations are recomputed in the backward pass."""
    by_op = ac.mode == "selective" and ac.selective_ac_option == "op"
    options: dict[str, Any] = {"context_fn": _selective_context} if by_op else {}
    for i, block in enumerate(model.layers):
        if ac.mode == "full" or (ac.mode == "selective" and is_recomputed(i, ac)):
            # The model draws no random numbers in its forward, so there is no RNG state to preserve.
            model.layers[i] = checkpoint_wrapper(block, preserve_rng_state=False, **options)


def is_recomputed(layer: int, ac: config.ActivationCheckpoint) -> bool:
    """Whether block `layer` recomputes anything under selective checkpointing."""
    return ac.selective_ac_option == "op" or layer % ac.selective_ac_option == 0


def keep_policy() -> Any:
    """A fresh policy for one forward-backward pair: keep `_KEPT_OPS` and every second matmul, recompute the rest."""
    counts = {False: 0, True: 0}  # forward and recomputation see the same sequence of matmuls

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op in _MATMULS:
            counts[ctx.is_recompute] += 1
            kept = counts[ctx.is_recompute] % 2 == 1
        else:
            kept = op in _KEPT_OPS
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return policy


def _selective_context() -> Any:
    return create_selective_checkpoint_contexts(keep_policy())


def apply_compile(model: Transformer) -> None:
    """Compile every block into one graph. There is one per kind of block, training or validation, and number of rows.

    All blocks share one function, so those graphs share one cache of the compiler. Its usual limit is 8 graphs, which a hybrid
    exceeds hours after its start. Sizes are constants of a graph; only the number of documents is not (`Transformer.forward`).
    """
    torch._dynamo.config.recompile_limit = 64
    for block in model.layers:
        block.compile(fullgraph=True, dynamic=False)
    model.compiled = True


def apply_fsdp(model: Transformer, mesh: DeviceMesh, training: config.Training, parallelism: config.Parallelism) -> None:
    """Shard every block, then the root; norms, A_log and dt_bias form one float32 group for the whole model.

    FSDP2 has one compute dtype per group. A group of their own inside each block would put FSDP's hooks inside the compiled
    block (a graph break) and cost two small collectives per block. One group whose modules are never called has neither: it is
    gathered before the forward, once per step, and reduced when the backward ends.
    """
    reduce_dtype = getattr(torch, training.mixed_precision_reduce)
    policy = MixedPrecisionPolicy(param_dtype=getattr(torch, training.mixed_precision_param), reduce_dtype=reduce_dtype)
    keep_fp32 = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32, cast_forward_inputs=False)
    holders: Any = model.fp32_modules()  # fully_shard makes FSDPModules of them, in place
    fully_shard(holders, mesh=mesh, mp_policy=keep_fp32, reshard_after_forward=False)
    last = len(model.layers) - 1
    for i, block in enumerate(model.layers):
        reshard = {"always": True, "never": False, "default": i != last}[parallelism.fsdp_reshard_after_forward]
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=policy)

    def gather_fp32(module: Any, args: Any) -> None:
        # The holders are one FSDP group, so the first gathers all. Nobody calls them, so no hook of theirs reshards the
        # parameters: they stay gathered (reshard_after_forward = False) until FSDP's last hook of the backward pass. In
        # between this is a no-op: accumulation and validation gather once.
        holders[0].unshard()

    model.register_forward_pre_hook(gather_fp32)
