"""flash-linear-attention's layers on `gated_delta_product`: users of fla keep their models and their trainer.

fla's layers call a function of their own module; `accelerate_fla` puts an adapter of the same signature into its place. What an
adapter computes is what fla 0.6 documents: k, v and beta hold the n steps of a token one after another, [B, T n, H, ...];
a gate acts before the first step of a token.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaproduct_kernels.interface import gated_delta_product
from deltaproduct_kernels.rows import L2_EPS  # fla's l2norm has the same
from deltaproduct_kernels.triton_backend.ops import why_not

INSTALL = "pip install 'flash-linear-attention>=0.6,<0.7'"
Function = Callable[..., Any]


class _UnsupportedError(Exception):
    """A call that fla must compute itself; says why."""


def accelerate_fla() -> ExitStack:
    """Put `gated_delta_product` under fla's layers GatedDeltaProduct, GatedDeltaNet and DeltaNet, those that exist included.

    Calls that it does not support go to fla's own function, with one warning for each reason: context parallelism of fla
    (`cp_context`), more than 8 steps a token, sizes and dtypes that no kernel of ours takes on a GPU, unknown arguments.
    What fla's layers do without gradients on up to 64 tokens (DeltaNet: always on up to 64) is another function, which stays.

    Returns:
        What undoes it: `with accelerate_fla(): ...`, or `.close()`. A second call changes nothing and undoes nothing.

    Raises:
        ImportError: where fla is missing, or its version has other layers or another signature; nothing is replaced then.
    """
    places = [_find(layer, ours) for layer, ours in _LAYERS.items()]
    undo = ExitStack()
    for module, ours in places:
        theirs = getattr(module, ours.__name__)
        if theirs not in _ADAPTERS:
            adapter = _adapter(ours, theirs)
            _ADAPTERS.add(adapter)
            setattr(module, ours.__name__, adapter)
            undo.callback(_put_back, module, adapter, theirs)
    return undo


def _find(layer: str, ours: Function) -> tuple[Any, Function]:
    """fla's module that calls a function of `ours`' name. Raises ImportError unless the signatures agree."""
    try:
        module = importlib.import_module(f"fla.layers.{layer}")
    except ModuleNotFoundError as error:
        raise ImportError(f"accelerate_fla needs flash-linear-attention 0.6 ({error}): {INSTALL}") from error
    theirs, wanted = getattr(module, ours.__name__, None), _parameters(ours)
    if theirs is None or _parameters(theirs) != wanted:
        found = "no such function" if theirs is None else ", ".join(_parameters(theirs))
        raise ImportError(
            f"accelerate_fla does not know this version of flash-linear-attention: fla.layers.{layer}.{ours.__name__} was "
            f"expected to take {', '.join(wanted)}; found: {found}. It knows 0.6: {INSTALL}"
        )
    return module, ours


def _parameters(function: Function) -> dict[str, Any]:
    """Names and defaults, in order."""
    return {name: p.default for name, p in inspect.signature(function).parameters.items()}


def _adapter(ours: Function, theirs: Function) -> Function:
    @wraps(ours)  # not theirs: its mark that keeps compilers out would come along
    def adapter(*args: Any, **how: Any) -> Any:
        try:
            return ours(*args, **how)
        except _UnsupportedError as unsupported:
            reason = f"{ours.__name__} runs fla's own kernels: {unsupported}"
        if reason not in _WARNED:
            _WARNED.add(reason)
            warnings.warn(reason, stacklevel=2)
        return theirs(*args, **how)

    return adapter


_ADAPTERS: set[Function] = set()
_WARNED: set[str] = set()


def _put_back(module: Any, adapter: Function, theirs: Function) -> None:
    if getattr(module, adapter.__name__) is adapter:  # not if somebody else has replaced it since
        setattr(module, adapter.__name__, theirs)


def chunk_gated_delta_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    num_householder: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    cp_context: Any = None,
) -> tuple[Tensor, Tensor | None]:
    """fla's: q [B, T, H, dk]; k, v and beta [B, T n, H, ...]; g [B, T, H] or None; states [N, H, dk, dv]."""
    _check(q, k, v, num_householder, cp_context)
    if use_qk_l2norm_in_kernel:
        q, k = _unit(q), _unit(k)
    k, v, beta = (x.unflatten(1, (-1, num_householder)) for x in (k, v, beta))
    return gated_delta_product(
        q,
        k,
        v,
        beta,
        g,
        scale=scale,
        initial_state=initial_state,
        output_final_state=bool(output_final_state),
        cu_seqlens=cu_seqlens,
    )


def chunk_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """fla's: as above for one step and no gate. `chunk_size` says how, not what, and is not needed here."""
    _check(q, k, v, unknown=kwargs.keys() - {"chunk_size"})
    states = (scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens)
    return chunk_gated_delta_product(q, k, v, None, beta, 1, *states)


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    cp_context: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """fla's: v, g and beta may have a multiple of the heads of q and k; states are [N, H, dv, dk] if `state_v_first`.

    With `use_gate_in_kernel`, g is what `A_log` and `dt_bias` make a log decay of; with `use_beta_sigmoid_in_kernel`, beta is
    what a sigmoid is taken of, times 2 with `allow_neg_eigval`.
    """
    _check(q, k, v, 1, cp_context, kwargs.keys() - {"chunk_size", "use_gate_in_kernel", "A_log", "dt_bias"})
    if allow_neg_eigval and not use_beta_sigmoid_in_kernel:
        raise _UnsupportedError("allow_neg_eigval was given without use_beta_sigmoid_in_kernel")
    if kwargs.get("use_gate_in_kernel"):
        A_log, dt_bias = kwargs["A_log"], kwargs.get("dt_bias")
        g = g.float() if dt_bias is None else g.float() + dt_bias.float()
        g = -A_log.float().exp() * F.softplus(g)
    if use_beta_sigmoid_in_kernel:
        beta = beta.float().sigmoid() * (2 if allow_neg_eigval else 1)
    if use_qk_l2norm_in_kernel:
        q, k = _unit(q), _unit(k)
    if state_v_first and initial_state is not None:
        initial_state = initial_state.mT
    o, state = chunk_gated_delta_product(q, k, v, g, beta, 1, scale, initial_state, output_final_state, cu_seqlens=cu_seqlens)
    return o, state.mT.contiguous() if state_v_first and state is not None else state


_LAYERS: dict[str, Function] = {
    "gated_deltaproduct": chunk_gated_delta_product,
    "gated_deltanet": chunk_gated_delta_rule,
    "delta_net": chunk_delta_rule,
}
"""Modules of fla.layers, and what takes the place of their function of the same name."""


def _check(q: Tensor, k: Tensor, v: Tensor, n: int = 1, cp_context: Any = None, unknown: Iterable[str] = ()) -> None:
    """Raises _UnsupportedError for what the operator does not do, or has no kernel for on this device."""
    if names := ", ".join(sorted(unknown)):
        raise _UnsupportedError(f"{names} was given")
    if cp_context is not None:
        raise _UnsupportedError("cp_context was given")
    if n > 8:
        raise _UnsupportedError(f"num_householder = {n}; from 1 to 8 are supported")
    if q.device.type == "cpu":
        return
    if not q.dtype == k.dtype == v.dtype:
        raise _UnsupportedError(f"q, k and v have dtypes {q.dtype}, {k.dtype} and {v.dtype}; one is supported")
    if reason := why_not(q.device, q.dtype, q.shape[-1], v.shape[-1]):
        raise _UnsupportedError(reason)


def _unit(x: Tensor) -> Tensor:
    """x by its length, in x's dtype; on a GPU by fla's own kernel, or a compiler's."""
    if x.device.type != "cpu" and not torch.compiler.is_compiling():
        return importlib.import_module("fla.modules.norm.l2norm").l2norm(x, L2_EPS)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + L2_EPS)).to(x.dtype)
