"""An exported folder computes in flash-linear-attention what the model it was made from computes.

The folder is loaded by fla's own AutoModelForCausalLM, and fla launches its own kernels, in Triton's interpreter if there is no
GPU. Two things are replaced: the functions in front of fla's chunked kernels, which refuse float32, and flash-attention, which
installs only with a GPU.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.hf.exported import VARIANTS, assert_same, greedy, load, tokens
from tests.pretrained import Make, random_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:ShortConvolution is crucial"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2"),  # of what a mask then leaves out
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

ONE = {"num_hidden_layers": 1}  # unless it is a hybrid: the interpreter is slow
GATED, UNGATED = {**ONE, "num_householder": 1, "use_forget_gate": True}, {**ONE, "num_householder": 1}
OUTPUT_GATE = {"use_output_gate": True, "expand_v": 2.0, "allow_neg_eigval": False, "norm_eps": 1e-2}
HYBRID = {"num_hidden_layers": 2, "use_short_conv": False, "tie_word_embeddings": False}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    name: ("gated_deltaproduct", changes if "attention_layers" in changes else ONE | changes)
    for name, changes in VARIANTS.items()
    if changes.get("mixer") != "gla" and not {"num_key_heads", "attention_block", "beta_stretch"} & changes.keys()
}
MODELS |= {
    "gated_deltanet": ("gated_deltanet", GATED | OUTPUT_GATE),
    "gated_deltanet, grouped": ("gated_deltanet", {**GATED, **OUTPUT_GATE, "num_heads": 4, "num_key_heads": 2}),
    "gated_deltanet, hybrid": ("gated_deltanet", {**GATED, **HYBRID, "attention_layers": [1]}),
    "delta_net": ("delta_net", {**UNGATED, **OUTPUT_GATE, "num_heads": 3}),
    "delta_net, hybrid": ("delta_net", {**UNGATED, **HYBRID, "attention_layers": [0]}),
}
IN_CHUNKS = [
    "Gated DeltaProduct_3, output gate, expand_v 2, untied",
    "hybrid, windowed, grouped",
    "gated_deltanet",
    "gated_deltanet, grouped",
    "delta_net",
]


@pytest.fixture(scope="module", autouse=True)
def _functions(fla: pytest.MonkeyPatch) -> None:
    fla.setattr("fla.layers.gated_deltaproduct.chunk_gated_delta_product", chunk_gated_delta_product)
    fla.setattr("fla.layers.delta_net.chunk_delta_rule", chunk_delta_rule)
    fla.setattr("fla.layers.attn.flash_attn_func", flash_attn_func, raising=False)
    fla.setattr("fla.layers.attn.flash_attn_varlen_func", flash_attn_varlen_func, raising=False)


def chunk_gated_delta_product(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, num_householder: int, **how: Any
) -> Any:
    """What fla's function of that name does in other dtypes than float32."""
    from fla.ops.gated_delta_product.chunk import ChunkGatedDeltaProductFunction

    return ChunkGatedDeltaProductFunction.apply(q, k, v, g, beta, k.shape[-1] ** -0.5, num_householder, *_rest(how))


def chunk_delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, **how: Any) -> Any:
    from fla.ops.delta_rule.chunk import ChunkDeltaRuleFunction

    return ChunkDeltaRuleFunction.apply(q, k, v, beta, k.shape[-1] ** -0.5, *_rest(how))


def _rest(how: dict[str, Any]) -> list[Any]:
    """The last arguments that both take; fla's layers pass no others."""
    rest = [how.pop(key, None) for key in ("initial_state", "output_final_state", "use_qk_l2norm_in_kernel", "cu_seqlens")]
    assert not any(value is not None for value in how.values()), how
    return rest


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, window_size: tuple[int, int] = (-1, -1)) -> Tensor:
    """q [B, Tq, H, d], k and v [B, Tk, H / groups, d]; the last query is at the last key; `window_size[0]` keys before it."""
    assert causal
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2).float() for x in (k, v))
    key = torch.arange(k.shape[1], device=q.device)
    query = key[k.shape[1] - q.shape[1] :, None]
    visible = (key <= query) & ((query - key <= window_size[0]) | (window_size[0] < 0))
    scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).to(q.dtype)


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *longest: int, **how: Any
) -> Tensor:
    """The same for sequences one after another in q, k, v [tokens, H, d]."""
    how = {key: value for key, value in how.items() if not key.startswith("max_seqlen")}
    spans = zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True)
    return torch.cat([flash_attn_func(q[None, a:b], k[None, c:d], v[None, c:d], **how) for (a, b), (c, d) in spans], 1)[0]


def load_fla(folder: Path) -> Any:
    model = load(folder, attn_implementation="eager")
    assert type(model).__module__.startswith("fla.models.")
    return model.to(DEVICE)


@pytest.mark.parametrize(("length", "name"), [*((11, name) for name in MODELS), *((66, name) for name in IN_CHUNKS)])
@torch.no_grad()
def test_fla_computes_our_logits(length: int, name: str, export_of: Make) -> None:
    """In steps up to 64 tokens, in chunks beyond."""
    model_type, changes = MODELS[name]
    ids = tokens(1, length)
    actual = load_fla(export_of(changes, model_type=model_type))(ids.to(DEVICE)).logits
    assert_same(actual.float().cpu(), random_model(**changes)[1](ids))


@pytest.mark.parametrize("name", ["hybrid, windowed, grouped", "gated_deltanet", "delta_net"])
def test_fla_generates_our_continuation_token_by_token(name: str, export_of: Make) -> None:
    model_type, changes = MODELS[name]
    prompt = tokens(1, 6)
    written = load_fla(export_of(changes, model_type=model_type)).generate(
        prompt.to(DEVICE), attention_mask=torch.ones_like(prompt, device=DEVICE), max_new_tokens=3, do_sample=False
    )
    assert torch.equal(written[:, 6:].cpu(), greedy(random_model(**changes)[1], prompt, 3))


@pytest.mark.parametrize("model_type", ["gated_deltaproduct", "gated_deltanet"])
def test_no_token_is_cut_off_from_fine_tuning(model_type: str, export_of: Make) -> None:
    """fla makes pad_token_id the embedding's padding_idx, which gets no gradient: the end of the text must not be it."""
    theirs = load_fla(export_of(GATED, model_type=model_type))
    assert theirs.model.embeddings.padding_idx is None
    assert theirs.generation_config.pad_token_id is not None
