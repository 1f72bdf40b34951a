"""The backbone: embedding, blocks of a token mixer and a SwiGLU, final norm, output matrix.

The mixer of each block is DeltaProduct, gated linear attention, a product of RWKV-7 transitions or softmax attention, as the
configuration says; hybrids list their attention layers. Tensor names are flash-linear-attention's
(`layers.N.attn.k_proj.weight`, ...), except A_log and dt_bias, which sit in `attn.forget_gate`, and what it does not have: a
router (`attn.r_proj`), RWKV-7. Nothing here knows of ranks or devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from deltaproduct_kernels import resolve_backend
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import _CHECKPOINT_PREFIX

from titan_dp import config
from titan_dp.config.mixers import MIXERS
from titan_dp.errors import UserError, counted
from titan_dp.model.attention import Attention
from titan_dp.model.context_parallel import ContextParallel
from titan_dp.model.deltaproduct import DeltaProduct
from titan_dp.model.layers import Float32, Initializer, Packing, RMSNorm, SwiGLU, TokenMixer, upcast
from titan_dp.model.loss import summed_cross_entropy
from titan_dp.model.rwkv7 import RWKV7

LAYERS: dict[str, Callable[[config.Model], TokenMixer]] = {
    "deltaproduct": DeltaProduct,
    "gla": DeltaProduct,
    "rwkv7": RWKV7,
    "attention": Attention,
}
"""By the name that model.mixer has; what a setting means for each is in config/mixers.py."""

_WHOLE = ("attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def build_model(c: config.Model) -> Transformer:
    """An uninitialised model; under `torch.device("meta")` it takes no memory."""
    return Transformer(c)


class Block(nn.Module):
    """x + attn(norm x), then x + mlp(norm x), for x [B, T, D]; with OLMo's attention x + norm(attn x), then x + norm(mlp x)."""

    def __init__(self, c: config.Model, mixer: str) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(c.hidden_size, c.norm_eps)
        self.attn = LAYERS[mixer](c)
        self.mlp_norm = RMSNorm(c.hidden_size, c.norm_eps)
        self.mlp = SwiGLU(c.hidden_size, c.mlp_size)
        self.norms_behind = mixer == "attention" and c.attention_block == "olmo"

    def forward(self, x: Tensor, packing: Packing | None = None) -> tuple[Tensor, Tensor | None]:
        """The block's output, and the Householder steps that its router took for each token [B, T]; None without one."""
        mixed, steps = self.attn.mix(self._before_mixer(x), packing)
        return self._behind_mixer(x, mixed), steps

    def step(self, x: Tensor, cache: Any) -> tuple[Tensor, Any]:
        mixed, cache = self.attn.step(self._before_mixer(x), cache)
        return self._behind_mixer(x, mixed), cache

    def _before_mixer(self, x: Tensor) -> Tensor:
        return x if self.norms_behind else self.attn_norm.apply_to(x)

    def _behind_mixer(self, x: Tensor, mixed: Tensor) -> Tensor:
        if self.norms_behind:
            x = x + self.attn_norm.apply_to(mixed)
            return x + self.mlp_norm.apply_to(self.mlp(x))
        x = x + mixed
        return x + self.mlp(self.mlp_norm.apply_to(x))

    def init_weights(self, init: Initializer) -> None:
        for module in (self.attn_norm, self.attn, self.mlp_norm, self.mlp):
            module.init_weights(init)


class Losses(NamedTuple):
    """What a batch with labels gives."""

    loss: Tensor
    """The SUM of token losses in nats, a float32 scalar."""
    householder_steps: Tensor | None
    """[B, T] float32: the steps that the routers took for each token, summed over layers. Whole numbers by value, with the
    routers' straight-through gradient. None without routers."""


class Transformer(nn.Module):
    """A causal language model over token ids [B, T].

    Attributes:
        context: this rank's place among those that share rows, if it holds segments of rows only; see `set_context`.
        compiled: whether the blocks are.
    """

    context: ContextParallel | None = None
    compiled = False

    def __init__(self, c: config.Model) -> None:
        super().__init__()
        self.std = c.initializer_range
        self.embeddings = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c, c.mixer_of(i)) for i in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.norm_eps)
        self.lm_head = None if c.tie_word_embeddings else nn.Linear(c.hidden_size, c.vocab_size, bias=False)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        clock: AbstractContextManager[None] | None = None,
    ) -> Any:
        """`Losses` if there are labels, else logits [B, T, V] in float32.

        Args:
            tokens: [B, T] int64.
            labels: [B, T] int64: the id each position should predict, -100 for none.
            cu_seqlens: [N + 1] int32 document boundaries as offsets into the B*T tokens, from 0 to B*T; neither recurrence,
                convolution nor attention crosses one. Repeated offsets are empty documents. None: each row is one document.
                With a context, tokens and labels are this rank's segments and cu_seqlens are those of the whole rows.
            clock: entered around the loss, the only part that no other rank takes part in.
        """
        x = self.embeddings(tokens)
        packing = None
        if cu_seqlens is not None:
            if self.context is None:
                packing = Packing.build(cu_seqlens, tokens.numel())
            else:
                packing = self.context.packing(cu_seqlens, *tokens.shape)
            if self.compiled:  # the number of documents changes from batch to batch, nothing else does
                torch._dynamo.mark_dynamic(packing.cu_seqlens, 0)
            x = x.view(1, tokens.numel(), -1)
        taken: Tensor | None = None
        for block in self.blocks:
            x, steps = block(x, packing)
            if steps is not None:
                steps = steps.view(tokens.shape)
                taken = steps if taken is None else taken + steps
        x = self.norm.apply_to(x)
        if labels is not None:
            with clock or nullcontext():
                compiled = self.compiled and x.is_cuda
                loss = summed_cross_entropy(x.flatten(0, 1), self.output_weight, labels.flatten(), compiled)
            return Losses(loss, taken)
        return upcast(F.linear(x, self.output_weight)).view(*tokens.shape, -1)

    def step(self, tokens: Tensor, cache: list[Any] | None = None) -> tuple[Tensor, list[Any]]:
        """Logits [B, V] in float32 of the token after `tokens` [B, T], which follow those in `cache`; and the new cache."""
        hidden, cache = self.step_hidden(tokens, cache)
        return upcast(F.linear(hidden[:, -1], self.output_weight)), cache

    def step_hidden(self, tokens: Tensor, cache: list[Any] | None = None) -> tuple[Tensor, list[Any]]:
        """What the output matrix multiplies, [B, T, D], for `tokens` [B, T] after those in `cache`; and the new cache."""
        x, caches = self.embeddings(tokens), []
        for i, block in enumerate(self.blocks):
            x, block_cache = block.step(x, cache[i] if cache else None)
            caches.append(block_cache)
        return self.norm.apply_to(x), caches

    @staticmethod
    def join_caches(caches: list[list[Any]]) -> list[Any]:
        """One cache of all rows from those of `step`, whose rows may have seen different numbers of tokens."""
        return [type(layer[0]).join(list(layer)) for layer in zip(*caches, strict=True)]

    @property
    def blocks(self) -> list[Block]:
        return list(self.layers)  # type: ignore[arg-type]

    @property
    def output_weight(self) -> Tensor:
        return self.embeddings.weight if self.lm_head is None else self.lm_head.weight

    def set_context(self, context: ContextParallel) -> None:
        """From now on `forward` takes this rank's segments of rows, and the mixers exchange the rest; `step` is not for it."""
        self.context = context
        for block in self.blocks:
            block.attn.context = context

    def fp32_modules(self) -> list[nn.Module]:
        """Holders of the parameters that compute in float32: norms, A_log and dt_bias, RWKV-7's biases."""
        return [module for module in self.modules() if isinstance(module, Float32)]

    def named_weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters by name, without what activation checkpointing adds to their names."""
        return ((name.replace(_CHECKPOINT_PREFIX, ""), parameter) for name, parameter in self.named_parameters())

    def muon_rows(self, split: Literal["heads", "steps", "whole"]) -> dict[str, int]:
        """The weights that Muon takes, by name, and how many rows of each are a matrix of its own (`optimizer.muon_split`).

        Of a mixer those of q, k and v, split into heads and Householder steps, and `o_proj` as it is; the MLP as it is.
        Embeddings, and projections to beta, decays, gates and routers, are not among them.
        """
        found: dict[str, int] = {}
        for i, block in enumerate(self.blocks):
            stacks = {f"attn.{name}": counts for name, counts in block.attn.stacks().items()}
            for name, (steps, heads) in {**stacks, **dict.fromkeys(_WHOLE, (1, 1))}.items():
                projection, matrices = block.get_submodule(name), {"heads": steps * heads, "steps": steps, "whole": 1}[split]
                assert isinstance(projection, nn.Linear)
                found[f"layers.{i}.{name}.weight"] = projection.out_features // matrices
        return found

    def init_weights(self, seed: int, factors: Mapping[str, float] | None = None) -> None:
        """Write every parameter, the same on any number of ranks; `factors`, by name, multiply first values."""
        by_id = {id(p): factors[name] for name, p in self.named_weights()} if factors else None
        init = Initializer(seed, self.embeddings.weight.device, self.std, by_id)
        init.normal_(self.embeddings.weight)
        for block in self.blocks:
            block.init_weights(init)
        self.norm.init_weights(init)
        if self.lm_head is not None:
            init.normal_(self.lm_head.weight)
        init.check(self)

    def num_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def describe(self) -> str:
        """'24 blocks, width 1024: DeltaProduct_2, 8 heads, ...'; hybrids list each kind once."""
        kinds: dict[str, int] = {}
        for block in self.blocks:
            kinds[block.attn.describe()] = kinds.get(block.attn.describe(), 0) + 1
        mixers = "; ".join(f"{count} x {kind}" if len(kinds) > 1 else kind for kind, count in kinds.items())
        return f"{counted(len(self.layers), 'block')}, width {self.embeddings.embedding_dim}: {mixers}"


def chosen_backend(model: config.Model, device: torch.device) -> str:
    """The implementation of the recurrence on `device`, in words. Raises UserError for one that is not available."""
    try:
        chosen = resolve_backend(model.backend, device, dk=model.head_dim, dv=model.head_v_dim)
    except ValueError as error:
        raise UserError(f"model.{error}") from error
    if chosen == "fla":
        return f"fla {version('fla-core')}"
    return f"torch loop ({chosen} front end)" if MIXERS[model.mixer].is_loop else chosen
