"""The state of a run as flat dictionaries of tensors, and whether they are finite.

Optimizer state is keyed by parameter names and reshards to any world size; learning rates, betas and decay are the
configuration's and are not saved. Random-number states are restored on the same number of ranks, else derived from (seed,
step, rank); so is a GPU's if CPUs saved.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.optim import Optimizer

from titan_dp.distributed import local_tensor
from titan_dp.errors import UserError

OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)


def model_tensors(model: nn.Module) -> dict[str, Any]:
    return {f"model.{name}": tensor for name, tensor in get_model_state_dict(model, options=OPTIONS).items()}


def optimizer_tensors(model: nn.Module, optimizers: Iterable[Optimizer]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Moments and step counts by parameter name; and the hyper-parameters, which are not saved."""
    state: dict[str, Any] = get_optimizer_state_dict(model, list(optimizers), options=OPTIONS)  # type: ignore[assignment]
    tensors = {f"optimizer.{name}": value for name, value in state.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in state.items() if not isinstance(value, Tensor)}


def without_prefix(tensors: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def rng_tensors() -> dict[str, Tensor]:
    """Generator states of this rank; `random`'s as its 624 words and position."""
    rank = dist.get_rank()
    state = {f"rng.{rank}.torch": torch.get_rng_state(), f"rng.{rank}.python": torch.tensor(random.getstate()[1])}
    if torch.cuda.is_available():
        state[f"rng.{rank}.cuda"] = torch.cuda.get_rng_state()
    return state


def restore_rng(state: dict[str, Tensor], seed: int, step: int) -> None:
    """Every generator as in `state`; those that it lacks (other ranks, another kind of device) from (seed, step, rank)."""
    rank = dist.get_rank()
    derived = int.from_bytes(hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()[:6], "big")
    random.seed(derived)
    torch.manual_seed(derived)  # of every device
    if f"rng.{rank}.torch" in state:
        torch.set_rng_state(state[f"rng.{rank}.torch"])
        random.setstate((3, tuple(state[f"rng.{rank}.python"].tolist()), None))
    if f"rng.{rank}.cuda" in state:
        torch.cuda.set_rng_state(state[f"rng.{rank}.cuda"])


# -- finite or not -------------------------------------------------------------------------------------------------------


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of those of this process's `tensors` that hold a NaN or an infinity; waits for the device once."""
    names, flags = _finite_flags(tensors)
    return [name for name, finite in zip(names, flags.tolist(), strict=True) if not finite]


def not_finite_anywhere(tensors: Mapping[str, Tensor]) -> list[str]:
    """A clause for weights and one for moments that are not finite on some rank, naming the first; one reduction for all."""
    names, flags = _finite_flags(tensors)
    if dist.is_initialized():
        dist.all_reduce(flags, dist.ReduceOp.MIN)
    wrong = [name for name, finite in zip(names, flags.tolist(), strict=True) if not finite]
    clauses = []
    for prefix, what in (("model.", "the weights"), ("optimizer.", "the optimizer's moments")):
        if found := [name.removeprefix(prefix) for name in wrong if name.startswith(prefix)]:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            clauses.append(f"{what} are not finite: {found[0]}{more}")
    return clauses


def refuse_not_finite(tensors: Mapping[str, Tensor], checkpoint: Path) -> None:
    """Raise UserError if `tensors`, read from `checkpoint`, are not finite on some rank, whatever its manifest says."""
    if wrong := not_finite_anywhere(tensors):
        raise UserError(f"checkpoint {checkpoint} cannot be trained on: {'; '.join(wrong)}; take another step of the run")


@torch.no_grad()
def _finite_flags(tensors: Mapping[str, Tensor]) -> tuple[list[str], Tensor]:
    """Names of the floating-point tensors, and 1 for each whose part on this rank is finite; int32 on their device."""
    parts = {name: local_tensor(tensor) for name, tensor in tensors.items() if tensor.is_floating_point()}
    device = next((part.device for part in parts.values() if part.is_cuda), torch.device("cpu"))
    flags = torch.ones(len(parts), dtype=torch.int32, device=device)
    held = {i: part for i, part in enumerate(parts.values()) if part.numel()}
    if held:
        # The largest magnitude reads every number once and keeps none, and one NaN makes it NaN.
        largest = torch._foreach_norm(list(held.values()), float("inf"))
        finite = torch.stack([norm.to(device, torch.float64) for norm in largest]).isfinite()
        flags[torch.tensor(list(held), device=device)] = finite.int()
    return list(parts), flags
