"""DeltaProduct language models for transformers, in one file that needs torch and transformers only.

`titan-dp export --format remote-code` copies this file beside the weights; load it with

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

It covers DeltaNet, Gated DeltaNet, DeltaProduct and Gated DeltaProduct (Siems et al. 2025, arXiv 2502.10297), gated linear
attention, softmax attention, and hybrids of them. Plain torch, differentiable, on CPU and GPU: written to be correct and to be
read, not to train fast. Needs transformers 4.57 or later.

Padding changes no result, wherever it is in a row: the tokens of a row are moved to its left, and padded columns enter no
convolution and no state and are not attended to. The output at a padded column is that of the token before it. Documents packed
into a row do not see each other if `position_ids` restart at 0, or if `cu_seqlens`, `cu_seq_lens_q`, `seq_idx` or numbers
above 1 in `attention_mask` delimit them. An argument that would change the result and is not supported is refused, not ignored.

The cache is transformers' DynamicCache with our own layers (`Memory`); its size is constant, except for softmax layers without
a window.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel, StaticCache
from transformers.cache_utils import CacheLayerMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

CHUNK_ROWS = 64
L2_EPS = 1e-6
# What outputs call the memory: since transformers 5.24 "cache", which `forward` takes under both names.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
FLOAT32 = ("A_log", "dt_bias", "attn_norm", "mlp_norm", "o_norm", "q_norm", "k_norm", "norm")


DEFAULTS = {
    "mixer": "deltaproduct",
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_heads": 8,
    "num_key_heads": None,
    "head_dim": 128,
    "expand_v": 1.0,
    "num_householder": 2,
    "use_forget_gate": False,
    "allow_neg_eigval": True,
    "beta_stretch": 0.0,
    "use_output_gate": False,
    "output_norm": "head",
    "gate_before_norm": False,
    "attention_block": "llama",
    "use_short_conv": True,
    "conv_size": 4,
    "intermediate_size": 2816,
    "vocab_size": 32000,
    "norm_eps": 1e-6,
    "initializer_range": 0.006,
    "attn": None,
    "max_position_embeddings": 4096,
    "use_cache": True,
}


class TitanDPConfig(PretrainedConfig):
    """The exporter writes every key of DEFAULTS; `attn` lists softmax layers as in flash-linear-attention."""

    model_type = "titan_dp"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(self, **kwargs):
        for key, default in DEFAULTS.items():
            setattr(self, key, kwargs.pop(key, default))
        super().__init__(tie_word_embeddings=kwargs.pop("tie_word_embeddings", True), **kwargs)


class Memory(CacheLayerMixin):
    """What a layer remembers of earlier columns: `held`, its tensors [B, ...], and `real` [B, columns], True for tokens.

    With a `max_cache_len`, in columns, all tensors keep their shapes and addresses from the first call on, so that a compiled
    step fits every later one: `real` has so many columns, of which the last `columns` have been seen.
    """

    is_sliding = False
    is_croppable = False  # a state cannot be rolled back to fewer tokens
    supports_early_init = False

    def __init__(self, max_cache_len=None):
        super().__init__()
        self.max_cache_len, self.is_compileable = max_cache_len, max_cache_len is not None
        self.reset()

    def reset(self):
        self.held, self.real, self.columns, self.is_initialized = None, None, None, False

    def write(self, held, new):
        """`held` after the columns `new` [B, T], True for tokens."""
        if self.max_cache_len is None:
            self.held, self.real = held, new if self.real is None else torch.cat([self.real, new], 1)
        elif self.is_initialized:
            real = torch.cat([self.real, new], 1)[:, new.shape[1] :]
            for old, now in zip((*self.held, self.real), (*held, real), strict=True):
                if old is not None:
                    old.copy_(now)
            self.columns += new.shape[1]
        else:
            self.held = tuple(x if x is None else x.clone() for x in held)
            self.real = F.pad(new, (self.max_cache_len - new.shape[1], 0))
            self.columns = torch.tensor(new.shape[1], device=new.device)
            for x in (*self.held, self.real, self.columns):
                if x is not None and not torch.compiler.is_compiling():
                    torch._dynamo.mark_static_address(x)
        self.is_initialized = True

    def seen(self):
        """[B, columns], True for tokens."""
        return self.real if self.max_cache_len is None else self.real[:, self.max_cache_len - self.get_seq_length() :]

    def get_seq_length(self):
        if self.real is None:
            return 0
        return self.real.shape[1] if self.max_cache_len is None else int(self.columns)

    def get_mask_sizes(self, query):
        return self.get_seq_length() + (query if isinstance(query, int) else query.shape[0]), 0

    @property
    def max_batch_size(self):
        return 0 if self.real is None else len(self.real)

    def get_max_length(self):
        return -1 if self.max_cache_len is None else self.max_cache_len

    get_max_cache_shape = get_max_length

    def reorder_cache(self, beam_idx):
        self._each(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices):
        self._each(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats):
        self._each(lambda x: x.repeat_interleave(repeats, 0))

    def _each(self, change):
        if self.is_initialized:
            self.held, self.real = tuple(x if x is None else change(x) for x in self.held), change(self.real)

    def crop(self, *_):
        raise ValueError("the cache of a titan_dp model cannot be cropped: a state cannot be rolled back to fewer tokens")

    def offload(self):  # of constant size, so it may stay on the device
        pass

    prefetch = offload

    def lazy_initialization(self, *_):
        raise ValueError("this cache belongs to a titan_dp model and holds states, not keys and values of another model")

    update = lazy_initialization


def memories_of(cache, layers):
    """The list of the layers' memories, which `cache` holds: one of the library's that is new or was filled by this model."""
    if not isinstance(cache, DynamicCache | StaticCache):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__}; a titan_dp model keeps its states in a DynamicCache or StaticCache: "
            "pass DynamicCache(), or nothing"
        )
    if len(cache.layers) != layers or not all(isinstance(layer, Memory) for layer in cache.layers):
        if any(layer.is_initialized for layer in cache.layers):
            raise ValueError("past_key_values was filled by another model; pass a new DynamicCache()")
        capacity = cache.layers[0].max_cache_len if isinstance(cache, StaticCache) else None
        cache.layers = [Memory(capacity) for _ in range(layers)]
    return cache.layers


class Rows(NamedTuple):
    """The columns of a batch, rearranged: in each row first the tokens, then the padding."""

    real: torch.Tensor  # [B, T], True for tokens
    document: torch.Tensor  # [B, T], number of the document; the memory is of document 0, padding counts to the row's last
    position: torch.Tensor  # [B, T], number of tokens before this one in the row
    documents: int  # the largest number in `document`
    static: bool = False  # whether memories have to keep their shapes


def take(x, columns):
    """x [B, S, ...] at columns [B, T] of its rows."""
    return x.gather(1, columns.reshape(*columns.shape, *[1] * (x.dim() - 2)).expand(*columns.shape, *x.shape[2:]))


def with_before(number, real):
    """For each column: `number` [B, T] at the last token before it in its row, and whether there is one. real [B, T]."""
    column = torch.arange(real.shape[1], device=real.device).where(real, -1)
    before = F.pad(column.cummax(1).values[:, :-1], (1, 0), value=-1)
    return number.gather(1, before.clamp(min=0)), before >= 0


def document_starts(real, attention_mask, position_ids, cu_seqlens, seq_idx):
    """The tokens that begin another document than that of the token before them: [B, T] bool.

    real [B, T], True for tokens; attention_mask [B, T or more] with a number per document, or None; position_ids and
    seq_idx [B or 1, T] or None; cu_seqlens [N + 1], for a batch of one row, or None.
    """
    T = real.shape[1]
    starts, numbers = torch.zeros_like(real), []
    if attention_mask is not None:
        numbers.append((attention_mask, attention_mask != 0))
    if seq_idx is not None:
        numbers.append((seq_idx.to(real.device).expand_as(real), real))
    if cu_seqlens is not None:
        first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
        if (len(real), first, last) != (1, 0, T):
            raise ValueError(
                f"cu_seqlens {first} to {last} for {len(real)} rows of {T} tokens: they delimit the documents of one row, from "
                "0 to its length"
            )
        columns = torch.arange(T, device=real.device)
        numbers.append((torch.searchsorted(cu_seqlens.to(columns), columns, right=True)[None], real))
    for number, tokens in numbers:
        before, known = with_before(number, tokens)
        starts = starts | (known & (number != before))[:, -T:]
    if position_ids is not None:
        position = position_ids.to(real.device).expand_as(real)
        before, known = with_before(position, real)
        jumps = real & known & (position != 0) & (position != before + 1)
        if bool(jumps.any()):
            raise ValueError(
                f"position_ids jump to {int(position[jumps][0])}; a titan_dp model can only count on from the token before, or "
                "begin a document at 0"
            )
        starts = starts | (position == 0)
    return starts & real


def all_tokens(shape, memory, device):
    """`lay_out` of columns that are all tokens and go on where `memory` ends; no value of a tensor decides what is done."""
    real = torch.ones(shape, dtype=torch.bool, device=device)
    position = torch.arange(shape[1], device=device).expand(shape)
    if memory.is_initialized:
        position = position + memory.real.to(device).sum(1, keepdim=True)
    return Rows(real, torch.zeros_like(position), position, 0), real, None, None


def lay_out(shape, seen, attention_mask, position_ids, cu_seqlens, seq_idx):
    """How to arrange new columns of `shape` (B, T): (rows, real, order, back).

    real [B, T] is True for tokens, in the batch's order. Column order[b, i] of the batch becomes column i of `rows`, and the
    output for column i of the batch stands in column back[b, i] of `rows`; both are None if there is no padding.
    seen [B, columns before], True for tokens; attention_mask [B, T] or [B, columns before + T] or None.
    """
    new, order, back = shape[1], None, None
    real = torch.ones(shape, dtype=torch.bool, device=seen.device)
    if seen.shape[1] and (cu_seqlens is not None or seq_idx is not None):
        raise ValueError("cu_seqlens and seq_idx delimit the documents of a whole row, which cannot go on from past_key_values")
    if attention_mask is not None:
        if not isinstance(attention_mask, torch.Tensor):
            raise ValueError(
                f"attention_mask is a {type(attention_mask).__name__}; a titan_dp model takes a tensor [batch, tokens]"
            )
        attention_mask = checked_mask(attention_mask.to(seen.device), seen, new)
        real = attention_mask[:, -new:] != 0
    starts = document_starts(real, attention_mask, position_ids, cu_seqlens, seq_idx)
    ours = real
    if not bool(real.all()):
        order = torch.argsort(~real, dim=1, stable=True)
        back = (real.cumsum(1) - 1).clamp(min=0)
        starts, ours = take(starts, order), take(real, order)
    starts[:, :1] &= seen.any(1, keepdim=True)  # a row's very first document is number 0: the memory before it is empty
    document = starts.cumsum(1)
    position = seen.sum(1, keepdim=True) + torch.arange(new, device=seen.device)
    return Rows(ours, document, position, int(document.max())), real, order, back


def checked_mask(mask, seen, new):
    """`mask` of the `new` columns, or of those before as well, about which it must say what it said when they were read."""
    if mask.dim() != 2 or mask.shape[1] not in (new, seen.shape[1] + new) or bool((mask < 0).any()):
        raise ValueError(
            f"attention_mask has shape {list(mask.shape)}; a titan_dp model takes [batch, tokens] with 0 for padding and 1 for "
            f"tokens (or the number of their document), of the {new} new tokens or of all {seen.shape[1] + new}"
        )
    if mask.shape[1] > new and not torch.equal(mask[:, :-new] != 0, seen):
        raise ValueError(
            "attention_mask differs from what it was when the tokens before were read; a state cannot forget them: begin with "
            "a new cache"
        )
    return mask


def upcast(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, or over each of its `groups` parts, in float32, returned in x's dtype."""

    def __init__(self, size, eps, groups=1):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.groups = eps, groups

    def forward(self, x):
        parts = upcast(x).unflatten(-1, (self.groups, -1))
        return (F.rms_norm(parts, parts.shape[-1:], eps=self.eps).flatten(-2) * upcast(self.weight)).to(x.dtype)


def delta_product(q, k, v, beta, g, document, state, erase):
    """For each head, in order of tokens t and steps j = 1..n, with scale dk^-0.5:

        S <- exp(g_t) S;   S <- S + k_tj (beta_tj (v_tj - S^T k_tj))^T;   o_t = scale S^T q_t

    Computed per chunk of tokens: the updates u of its rows solve (I + tril(beta D o K K^T, -1)) u = beta (V - d K S), where D
    is the decay from one row to a later one and d that from the chunk's beginning; both are 0 across documents.

    q [B, T, H, dk], k [B, T, n, H, dk], v [B, T, n, H, dv], beta [B, T, n, H], g [B, T, H] or None, state [B, H, dk, dv] or
    None, all float32 or float64; document [B, T]. Returns o [B, T, H, dv] and the state after the last document. Without
    `erase`, the term S^T k_tj is left out.
    """
    B, T, n, H, dk = k.shape
    state = q.new_zeros(B, H, dk, v.shape[-1]) if state is None else state
    g = q.new_zeros(B, T, H) if g is None else g
    outputs, current = [], document.new_zeros(B, 1)
    for start in range(0, T, max(1, CHUNK_ROWS // n)):
        token = slice(start, min(T, start + max(1, CHUNK_ROWS // n)))
        Q = q[:, token].transpose(1, 2) * dk**-0.5  # [B, H, C, dk]
        K, V = (x[:, token].flatten(1, 2).transpose(1, 2) for x in (k, v))  # [B, H, C n, d]
        b = beta[:, token].flatten(1, 2).transpose(1, 2)[..., None]
        G, doc = g[:, token].transpose(1, 2), document[:, token]  # [B, H, C], [B, C]
        same = (doc[:, :, None] == doc[:, None, :]).tril()[:, None]
        # Sums over the tokens between, not differences of running sums: beside one strong decay these lose all digits.
        decay = G[..., None].expand(*G.shape, G.shape[-1]).tril(-1).cumsum(-2).exp() * same  # [B, H, C, C]
        decay = decay.repeat_interleave(n, -1)  # from a row to a token
        first = G.cumsum(-1).exp() * (doc == current)[:, None]  # from the chunk's beginning to a token
        if erase:
            between = (decay.repeat_interleave(n, -2) * (K @ K.mT)).tril(-1)
            rhs = b * (V - first.repeat_interleave(n, -1)[..., None] * (K @ state))
            u = torch.linalg.solve_triangular(b * between, rhs, upper=False, unitriangular=True)
        else:
            u = b * V
        outputs.append(first[..., None] * (Q @ state) + (decay * (Q @ K.mT)) @ u)
        state = first[..., -1:, None] * state + (decay[..., -1, :, None] * K).mT @ u
        current = doc[:, -1:]
    return torch.cat(outputs, 2).transpose(1, 2), state


class ShortConvolution(nn.Conv1d):
    """Computes in the dtype of its input [B, channels, L]; does not pad, so the output is taps - 1 shorter."""

    def forward(self, x):
        return F.conv1d(x, self.weight.to(x.dtype), groups=self.groups)


def convolve(convolution, gap, x, rows, tail):
    """The causal convolution of gap + 1 taps of x [B, T, channels], within documents; and the last `gap` inputs
    [B, gap, channels], which the next call takes as `tail` (None at first)."""
    # All documents of a row on one line, with gap zeros before each, so that no tap reaches into the one before.
    at = torch.arange(x.shape[1], device=x.device) + gap * rows.document
    line = x.new_zeros(len(x), gap, x.shape[-1]) if tail is None else tail
    line = F.pad(line, (0, 0, 0, x.shape[1] + gap * rows.documents))
    line = line.scatter(1, (at + gap)[..., None].expand_as(x), x)
    y = take(convolution(line.mT).mT, at)
    count = rows.real.sum(1, keepdim=True)
    last = at.gather(1, (count - 1).clamp(min=0)).where(count > 0, -1)
    return y, take(line, last + 1 + torch.arange(gap, device=x.device))


class DeltaProduct(nn.Module):
    """Token mixer; keys and values of the n steps are laid out (n, heads, dim)."""

    def __init__(self, c):
        super().__init__()
        self.heads, self.n, self.dk, self.dv = c.num_heads, c.num_householder, c.head_dim, int(c.head_dim * c.expand_v)
        self.erase, self.max_beta = c.mixer != "gla", 2.0 if c.allow_neg_eigval else 1.0
        self.beta_stretch = c.beta_stretch
        self.key_heads = c.num_key_heads or c.num_heads
        keys, values, D = self.key_heads * self.dk, self.heads * self.dv, c.hidden_size
        self.q_proj = nn.Linear(D, keys, bias=False)
        self.k_proj = nn.Linear(D, self.n * keys, bias=False)
        self.v_proj = nn.Linear(D, self.n * values, bias=False)
        self.b_proj = nn.Linear(D, self.n * self.heads, bias=False)
        self.gap = c.conv_size - 1 if c.use_short_conv else 0
        if self.gap:
            for name, size in (("q_conv1d", keys), ("k_conv1d", self.n * keys), ("v_conv1d", self.n * values)):
                self.add_module(name, ShortConvolution(size, size, c.conv_size, groups=size, bias=False))
        self.gated = c.use_forget_gate
        if self.gated:
            self.a_proj = nn.Linear(D, self.heads, bias=False)
            self.A_log = nn.Parameter(torch.zeros(self.heads))
            self.dt_bias = nn.Parameter(torch.zeros(self.heads))
        self.g_proj = nn.Linear(D, values, bias=False) if c.use_output_gate else None
        self.norm_by_head, self.gate_before_norm = c.output_norm == "head", c.gate_before_norm
        self.o_norm = RMSNorm(self.dv, c.norm_eps) if self.norm_by_head else RMSNorm(values, c.norm_eps, self.key_heads)
        self.o_proj = nn.Linear(values, D, bias=False)

    def forward(self, x, rows, memory):
        """x [B, T, D]; memory of the tokens before, or None. Padding leaves no trace: its inputs, betas and gates are 0."""
        B, T, _ = x.shape
        real = rows.real[..., None]
        state, *tails = memory or (None, None, None, None)
        share = (1 + 2 * self.beta_stretch) * upcast(self.b_proj(x)).sigmoid() - self.beta_stretch
        beta = self.max_beta * share.clamp(0, 1) * real
        g = None
        if self.gated:
            g = -upcast(self.A_log).exp() * F.softplus(upcast(self.a_proj(x)) + self.dt_bias) * real
        activated = [upcast(projection(x)) * real for projection in (self.q_proj, self.k_proj, self.v_proj)]
        if self.gap:
            both = [
                convolve(convolution, self.gap, y, rows, tail)
                for convolution, y, tail in zip((self.q_conv1d, self.k_conv1d, self.v_conv1d), activated, tails, strict=True)
            ]
            activated, tails = zip(*both, strict=True)
        q, k, v = (upcast(F.silu(y).to(x.dtype)) for y in activated)
        q, k = q.view(B, T, self.key_heads, self.dk), k.view(B, T, self.n, self.key_heads, self.dk)
        q, k = (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + L2_EPS) for y in (q, k))
        if self.key_heads != self.heads:
            q, k = (y.repeat_interleave(self.heads // self.key_heads, -2) for y in (q, k))
        v, beta = v.view(B, T, self.n, self.heads, self.dv), beta.view(B, T, self.n, self.heads)
        o, state = delta_product(q, k, v, beta, g, rows.document, state, self.erase)
        o = o.to(x.dtype)
        gate = None if self.g_proj is None else self.g_proj(x)
        if gate is not None and self.gate_before_norm:
            o = upcast(o) * F.silu(upcast(gate)).view_as(o)
        o = self.o_norm(o if self.norm_by_head else o.flatten(2)).flatten(2).to(x.dtype)
        if gate is not None and not self.gate_before_norm:
            o = o * F.silu(gate)
        return self.o_proj(o), (state, *tails)


class Attention(nn.Module):
    """Causal softmax attention with rotary positions, grouped keys and values, an optional sliding window, and norms of q and k
    in OLMo's blocks."""

    def __init__(self, c, settings):
        super().__init__()
        self.heads, self.kv_heads = settings["num_heads"], settings["num_kv_heads"]
        self.d, self.window, self.theta = c.hidden_size // self.heads, settings["window_size"], settings["rope_theta"]
        self.q_proj = nn.Linear(c.hidden_size, c.hidden_size, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, self.kv_heads * self.d, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, self.kv_heads * self.d, bias=False)
        olmo = c.attention_block == "olmo"
        self.q_norm = RMSNorm(c.hidden_size, c.norm_eps) if olmo else nn.Identity()
        self.k_norm = RMSNorm(self.kv_heads * self.d, c.norm_eps) if olmo else nn.Identity()
        self.o_proj = nn.Linear(c.hidden_size, c.hidden_size, bias=False)

    def forward(self, x, rows, memory):
        """x [B, T, D]; memory of the S columns before, or None: keys and values [B, S, heads, d], positions and real [B, S]."""
        T = x.shape[1]
        q, k, v = self.q_norm(self.q_proj(x)), self.k_norm(self.k_proj(x)), self.v_proj(x)
        q, k, v = (y.unflatten(-1, (-1, self.d)) for y in (q, k, v))
        q, k = self._rotate(q, rows.position), self._rotate(k, rows.position)
        held = (k, v, rows.position, rows.real, rows.document)
        if memory is not None:
            memory = (*memory, torch.zeros_like(memory[2]))  # the memory is of document 0
            held = tuple(torch.cat(pair, 1) for pair in zip(memory, held, strict=True))
        k, v, position, real, document = held
        distance = rows.position[:, :, None] - position[:, None, :]
        visible = real[:, None, :] & (distance >= 0) & (rows.document[:, :, None] == document[:, None, :])
        if self.window is not None:
            visible = visible & (distance < self.window)
        S = k.shape[1] - T
        itself = torch.ones(T, S + T, dtype=torch.bool, device=x.device).tril(S).triu(S)  # so that padding attends to something
        o = F.scaled_dot_product_attention(
            *(y.transpose(1, 2) for y in (q, k, v)),
            attn_mask=(visible | itself)[:, None],
            enable_gqa=self.kv_heads != self.heads,
        )
        real = real & (document == document[:, -1:])
        kept = (k, v, position, real)
        if rows.static or self.window is not None:
            size = S if rows.static else self.window - 1
            newest = torch.argsort(real, dim=1, stable=True)[:, max(0, S + T - size) :]
            kept = tuple(take(y, newest) for y in kept)
        return self.o_proj(o.transpose(1, 2).flatten(2)), kept

    def blank(self, x, capacity):
        """The memory of `capacity` columns before x [B, T, D], none of them a token; what a window cannot see is left out."""
        size = (len(x), capacity if self.window is None else min(capacity, self.window - 1))
        k, v = (x.new_zeros(*size, self.kv_heads, self.d) for _ in range(2))
        return k, v, x.new_zeros(size, dtype=torch.long), x.new_zeros(size, dtype=torch.bool)

    def _rotate(self, x, position):
        """x [B, T, heads, d] turned by its position [B, T]."""
        wide = upcast(x)
        frequency = self.theta ** (-torch.arange(0, self.d, 2, device=x.device, dtype=wide.dtype) / self.d)
        angle = (position[..., None] * frequency)[:, :, None]
        cos, sin = (y.repeat(1, 1, 1, 2) for y in (angle.cos(), angle.sin()))
        first, second = wide.chunk(2, -1)
        return (wide * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)


class SwiGLU(nn.Module):
    def __init__(self, size, hidden):
        super().__init__()
        self.gate_proj = nn.Linear(size, hidden, bias=False)
        self.up_proj = nn.Linear(size, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        softmax = c.attn is not None and layer in c.attn["layers"]
        self.attn_norm = RMSNorm(c.hidden_size, c.norm_eps)
        self.attn = Attention(c, c.attn) if softmax else DeltaProduct(c)
        self.mlp_norm = RMSNorm(c.hidden_size, c.norm_eps)
        self.mlp = SwiGLU(c.hidden_size, c.intermediate_size)
        self.norms_behind = softmax and c.attention_block == "olmo"

    def forward(self, x, rows, memory, capacity=None):
        """`capacity`: of the columns of a memory that keeps its shapes."""
        if memory is None and capacity is not None and isinstance(self.attn, Attention):
            memory = self.attn.blank(x, capacity)
        if self.norms_behind:
            mixed, memory = self.attn(x, rows, memory)
            x = x + self.attn_norm(mixed)
            return x + self.mlp_norm(self.mlp(x)), memory
        mixed, memory = self.attn(self.attn_norm(x), rows, memory)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), memory


def refuse_others(arguments, memory, new):
    """Raises if one of `arguments`, a dict it may change, would have to be ignored. memory: before the `new` columns."""
    if arguments.pop("output_attentions", None):
        raise ValueError("output_attentions: a titan_dp model has no attention matrices to return; leave it out")
    if arguments.pop("is_causal", None) is False:
        raise ValueError("is_causal = False: a titan_dp model reads from left to right; leave it out")
    types, place = arguments.pop("token_type_ids", None), arguments.pop("cache_position", None)
    if types is not None and bool((types != 0).any()):
        raise ValueError("token_type_ids: a titan_dp model has no token types; leave them out")
    if place is not None and (int(place[0]), len(place)) != (memory.get_seq_length(), new):
        raise ValueError(
            f"cache_position begins at {int(place[0])}, but the cache holds {memory.get_seq_length()} tokens, from which alone "
            "it goes on"
        )
    for name, value in arguments.items():
        if name not in ("max_length_q", "max_length_k") and value is not None and value is not False:
            raise TypeError(f"a titan_dp model does not know the argument {name}; leave it out")


def boundaries(cu_seqlens, cu_seq_lens_q, cu_seq_lens_k):
    """The boundaries of documents, for which transformers has three names: whichever is given, or None."""
    given = [x for x in (cu_seqlens, cu_seq_lens_q, cu_seq_lens_k) if x is not None]
    if any(not isinstance(x, torch.Tensor) or x.dim() != 1 or bool((x.diff() < 0).any()) for x in given):
        raise ValueError(
            "cu_seqlens has to be a tensor [documents + 1] of where documents begin, ascending, and the row's length"
        )
    if any(not torch.equal(x.to(given[0]), given[0]) for x in given[1:]):
        raise ValueError("cu_seqlens, cu_seq_lens_q and cu_seq_lens_k differ; give one of them")
    return given[0] if given else None


class TitanDPPreTrainedModel(PreTrainedModel):
    config_class = TitanDPConfig
    base_model_prefix = "model"
    _input_embed_layer = "embeddings"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _can_compile_fullgraph = True
    _is_stateful = True  # generation that rolls back drafted tokens cannot work on states

    def post_init(self):
        """FLOAT32 stays float32 whatever the model's dtype is; transformers 4 refuses names of parts that a model lacks."""
        parts = {part for name, _ in self.named_parameters() for part in name.split(".")}
        self._keep_in_fp32_modules_strict = [name for name in FLOAT32 if name in parts]
        super().post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return True  # transformers 4 thinks otherwise of stateful models

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv1d):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, DeltaProduct) and module.gated:
            nn.init.uniform_(module.A_log, 1e-4, 16).log_()
            dt = torch.empty_like(module.dt_bias).uniform_(-6.9078, -2.3026).exp_()  # log-uniform in [0.001, 0.1]
            module.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))


class TitanDPModel(TitanDPPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        cache=None,
        inputs_embeds=None,
        use_cache=None,
        output_hidden_states=None,
        cu_seqlens=None,
        cu_seq_lens_q=None,
        cu_seq_lens_k=None,
        seq_idx=None,
        token_type_ids=None,
        **kwargs,
    ):
        """`hidden_states`, if asked for: the embeddings and every layer's output, the last one after the final norm."""
        past_key_values = past_key_values if cache is None else cache
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        cu_seqlens = boundaries(cu_seqlens, cu_seq_lens_q, cu_seq_lens_k)
        checkpointing = self.gradient_checkpointing and self.training
        if use_cache is None:
            use_cache = past_key_values is not None or (self.config.use_cache and not self.training)
        use_cache = use_cache and not checkpointing  # the backward pass would write the memory again
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache()
        count = len(self.layers)
        memories = [Memory() for _ in range(count)] if past_key_values is None else memories_of(past_key_values, count)

        x = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        first, new = memories[0], x.shape[1]
        if first.is_initialized and len(first.real) != len(x):
            raise ValueError(f"past_key_values holds {len(first.real)} rows, and the batch has {len(x)}")
        if first.is_initialized and checkpointing:
            raise ValueError("gradient checkpointing cannot go on from past_key_values; switch one of them off")
        if (
            first.max_cache_len is not None
            and not torch.compiler.is_compiling()
            and first.get_seq_length() + new > first.max_cache_len
        ):
            raise ValueError(
                f"past_key_values has room for {first.max_cache_len} tokens and holds {first.get_seq_length()}; {new} more "
                "need a larger one"
            )
        refuse_others({**kwargs, "token_type_ids": token_type_ids}, first, new)
        if all(given is None for given in (attention_mask, position_ids, cu_seqlens, seq_idx)):
            rows, real, order, back = all_tokens(x.shape[:2], first, x.device)
        else:
            seen = first.seen().to(x.device) if first.is_initialized else x.new_zeros(len(x), 0, dtype=torch.bool)
            rows, real, order, back = lay_out(x.shape[:2], seen, attention_mask, position_ids, cu_seqlens, seq_idx)
        rows = rows._replace(static=first.max_cache_len is not None)

        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        hidden_states = (x,) if wanted else None
        x = x if order is None else take(x, order)
        for i, (layer, memory) in enumerate(zip(self.layers, memories, strict=True)):
            if checkpointing:
                x, held = self._gradient_checkpointing_func(layer.__call__, x, rows, None)
            else:
                x, held = layer(x, rows, memory.held, memory.max_cache_len)
            if use_cache:
                memory.write(held, real)
            if i == count - 1:
                x = self.norm(x)
            if wanted:
                hidden_states += (x if back is None else take(x, back),)
        return BaseModelOutputWithPast(
            last_hidden_state=x if back is None else take(x, back),
            hidden_states=hidden_states,
            **{CACHE: past_key_values if use_cache else None},
        )


class TitanDPForCausalLM(TitanDPPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}

    @staticmethod
    def create_masks_for_generate(attention_mask=None, **_):
        return attention_mask  # not one of the library's with four dimensions

    def prepare_inputs_for_generation(self, *arguments, **kwargs):  # by that name `generate` knows to look at `forward`
        """Steps of a token on a cache of constant shapes have constant inputs, which a compiled step needs."""
        inputs = super().prepare_inputs_for_generation(*arguments, **kwargs)
        cache, ids, mask = (inputs.get(name) for name in ("past_key_values", "input_ids", "attention_mask"))
        one = isinstance(cache, StaticCache) and ids is not None and ids.shape[1] == 1 and cache.get_seq_length()
        if one and (mask is None or bool((mask[:, -1] != 0).all())):
            for name in ("attention_mask", "position_ids", "cache_position"):  # all that they say is that the row goes on
                inputs.pop(name, None)
        return inputs

    def __init__(self, config):
        super().__init__(config)
        self.model = TitanDPModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        cache=None,
        inputs_embeds=None,
        labels=None,
        shift_labels=None,
        use_cache=None,
        output_hidden_states=None,
        logits_to_keep=0,
        num_items_in_batch=None,
        cu_seqlens=None,
        cu_seq_lens_q=None,
        cu_seq_lens_k=None,
        seq_idx=None,
        token_type_ids=None,
        **kwargs,
    ):
        """Logits, and a loss if there are labels (which are shifted here) or shift_labels (which are the next tokens already).

        The loss is the mean over labels that are not -100, or their sum over `num_items_in_batch`, which transformers' Trainer
        gives when it accumulates gradients. Nothing predicts the first token of a packed document, so its label does not count.
        """
        out = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            cu_seqlens=cu_seqlens,
            cu_seq_lens_q=cu_seq_lens_q,
            cu_seq_lens_k=cu_seq_lens_k,
            seq_idx=seq_idx,
            token_type_ids=token_type_ids,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = upcast(self.lm_head(out.last_hidden_state[:, kept]))
        if labels is not None and shift_labels is None:
            mask = None if attention_mask is None else attention_mask[:, -labels.shape[1] :].to(labels.device)
            real = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask != 0
            cu_seqlens = boundaries(cu_seqlens, cu_seq_lens_q, cu_seq_lens_k)
            starts = document_starts(real, mask, position_ids, cu_seqlens, seq_idx)
            labels = labels.masked_fill(starts, -100)
            shift_labels = F.pad(labels[:, 1:], (0, 1), value=-100)
        loss = None
        if shift_labels is not None:
            predictions, wanted = logits.flatten(0, 1), shift_labels.flatten().to(logits.device)
            reduction = "mean" if num_items_in_batch is None else "sum"
            loss = F.cross_entropy(predictions, wanted, ignore_index=-100, reduction=reduction)
            loss = loss if num_items_in_batch is None else loss / num_items_in_batch
        held = {CACHE: getattr(out, CACHE)}
        return CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=out.hidden_states, **held)
