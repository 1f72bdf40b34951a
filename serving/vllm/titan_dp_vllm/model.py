"""titan_dp's model as vLLM runs one: rows of tokens of many requests in, states in vLLM's cache.

The blocks are `titan_dp.model.transformer`'s, decoding with `Block.step`, and so compute what `titan-dp generate` does. A
layer's state and the tails of its convolutions lie in one page of vLLM's cache, as those of its Mamba layers do. Requests that
decode are one batch; prompts, whole or in chunks, are taken one after the other. Softmax layers are refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import HasInnerState, IsAttentionFree
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from titan_dp import config
from titan_dp.inference.hf import layout
from titan_dp.model.deltaproduct import DeltaProduct, MixerCache
from titan_dp.model.layers import upcast
from titan_dp.model.transformer import Block, build_model


def settings_of(vllm_config: VllmConfig) -> config.Model:
    """[model] of the folder. Raises ValueError for what the plugin does not serve."""
    c = layout.from_hf(vllm_config.model_config.hf_config.to_dict(), str(vllm_config.model_config.model))[0]
    if "attention" in c.mixers():
        raise ValueError("titan_dp_vllm serves models without softmax layers; use transformers, or --format olmo-hybrid")
    if vllm_config.cache_config.enable_prefix_caching:
        raise ValueError("titan_dp_vllm keeps a state for each request, not for each prefix; set --no-enable-prefix-caching")
    if vllm_config.parallel_config.world_size != 1:
        raise ValueError("titan_dp_vllm keeps a model whole on one device; set --tensor-parallel-size 1")
    return c


def state_shapes(c: config.Model) -> tuple[tuple[int, ...], ...]:
    """Of a layer's state and the tails of its q, k and v convolutions, for one request."""
    keys, values, n = c.key_heads * c.head_dim, c.num_heads * c.head_v_dim, c.num_householder
    tails = [(c.conv_size - 1, size) for size in (keys, n * keys, n * values)] if c.use_short_conv else []
    return ((c.num_heads, c.head_dim, c.head_v_dim), *tails)


class Layer(nn.Module, MambaBase):
    """A block and its page of the cache."""

    def __init__(self, block: Block, c: config.Model, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.block, self.prefix, self.shapes = [block], prefix, state_shapes(c)  # in a list: its weights are the model's
        self.dtypes = (torch.float32, *[vllm_config.model_config.dtype] * (len(self.shapes) - 1))
        vllm_config.compilation_config.static_forward_context[prefix] = self
        self.kv_cache: tuple[Tensor, ...] = ()

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.LINEAR

    def get_state_shape(self) -> Iterable[tuple[int, ...]]:
        return self.shapes

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return self.dtypes

    def forward(self, x: Tensor, requests: list[tuple[slice, Tensor, bool]]) -> Tensor:
        """x [N, D], tokens of all requests; of a group of requests: its tokens, its pages [B], and whether it has a past."""
        out = torch.zeros_like(x)
        for tokens, pages, has_past in requests:
            past = [states.index_select(0, pages) for states in self.kv_cache] if has_past else None
            cache = MixerCache(past[0], tuple(past[1:])) if past else None
            y, cache = self.block[0].step(x[tokens].view(len(pages), -1, x.shape[-1]), cache)
            for states, new in zip(self.kv_cache, (cache.state, *cache.tails), strict=True):
                states.index_copy_(0, pages, new.to(states.dtype))
            out[tokens] = y.flatten(0, 1)
        return out


def groups(metadata: Any) -> Iterator[tuple[slice, Tensor, bool]]:
    """What `Layer.forward` takes: all requests that decode, which come first, then prompts one by one."""
    pages, count = metadata.state_indices_tensor.long(), metadata.num_decodes
    if count:
        yield slice(0, count), pages[:count], True
    starts, lengths = metadata.query_start_loc.tolist(), metadata.seq_lens.tolist()
    for i in range(count, count + metadata.num_prefills):
        tokens = slice(starts[i], starts[i + 1])
        yield tokens, pages[i : i + 1], lengths[i] > tokens.stop - tokens.start


class TitanDPForCausalLM(nn.Module, HasInnerState, IsAttentionFree):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        c = settings_of(vllm_config)
        self.model = build_model(c)
        for module in self.model.fp32_modules():
            module.float()
        blocks = self.model.blocks
        assert all(isinstance(block.attn, DeltaProduct) for block in blocks)
        self.memories = [Layer(b, c, vllm_config, f"{prefix}layers.{i}") for i, b in enumerate(blocks)]

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        return state_shapes(settings_of(vllm_config))

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        tails = len(state_shapes(settings_of(vllm_config))) - 1
        return (torch.float32, *[vllm_config.model_config.dtype] * tails)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embeddings(input_ids)

    def forward(
        self, input_ids: Tensor, positions: Tensor, intermediate_tensors: Any = None, inputs_embeds: Tensor | None = None
    ) -> Tensor:
        x = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        metadata = get_forward_context().attn_metadata
        if metadata is not None:
            requests = list(groups(metadata[self.memories[0].prefix]))
            for layer in self.memories:
                x = layer(x, requests)
        return self.model.norm.apply_to(x)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        return upcast(F.linear(hidden_states, self.model.output_weight))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        parameters, loaded = dict(self.model.named_parameters()), set()
        for name, tensor in weights:
            (ours,) = layout.our_names([name])
            default_weight_loader(parameters[ours], tensor)
            loaded.add(f"model.{ours}")
        return loaded
