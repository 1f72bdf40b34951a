"""DeltaProduct language models for transformers, in one file that needs torch and transformers only.

`titan-dp export --format remote-code` copies this file beside the weights; load it with

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

It covers DeltaNet, Gated DeltaNet, DeltaProduct and Gated DeltaProduct (Siems et al. 2025, arXiv 2502.10297), gated linear
attention, softmax attention, and hybrids of them. Plain torch, differentiable, on CPU and GPU: made to be right and to be
read, not to train fast. Padding on the left or right changes nothing, since padded tokens neither enter a convolution nor a
state nor are attended to. A cache has constant size but for softmax layers without a window.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

CHUNK_ROWS = 64
L2_EPS = 1e-6


class TitanDPConfig(PretrainedConfig):
    """Every key is written by the exporter; `attn` lists softmax layers as in flash-linear-attention."""

    model_type = "titan_dp"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        mixer="deltaproduct",
        hidden_size=1024,
        num_hidden_layers=24,
        num_heads=8,
        head_dim=128,
        expand_v=1.0,
        num_householder=2,
        use_forget_gate=False,
        allow_neg_eigval=True,
        use_output_gate=False,
        use_short_conv=True,
        conv_size=4,
        intermediate_size=2816,
        vocab_size=32000,
        norm_eps=1e-6,
        initializer_range=0.006,
        attn=None,
        max_position_embeddings=4096,
        use_cache=True,
        tie_word_embeddings=True,
        **kwargs,
    ):
        self.mixer = mixer
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.expand_v = expand_v
        self.num_householder = num_householder
        self.use_forget_gate = use_forget_gate
        self.allow_neg_eigval = allow_neg_eigval
        self.use_output_gate = use_output_gate
        self.use_short_conv = use_short_conv
        self.conv_size = conv_size
        self.intermediate_size = intermediate_size
        self.vocab_size = vocab_size
        self.norm_eps = norm_eps
        self.initializer_range = initializer_range
        self.attn = attn
        self.max_position_embeddings = max_position_embeddings
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


class TitanDPCache:
    """What each layer remembers: (state, convolution tails), or (keys, values, which of them are tokens)."""

    is_compileable = False

    def __init__(self, layers):
        self.layers = [None] * layers
        self.seen = 0

    def get_seq_length(self, layer_idx=0):
        return self.seen

    def reorder_cache(self, beam_idx):
        self.layers = [tuple(x if x is None else x.index_select(0, beam_idx) for x in layer) for layer in self.layers]


def upcast(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in float32, returned in x's dtype."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(upcast(x), self.weight.shape, upcast(self.weight), self.eps).to(x.dtype)


def delta_product(q, k, v, beta, g, state, erase):
    """For each head, in order of tokens t and steps j = 1..n, with scale dk^-0.5:

        S <- exp(g_t) S;   S <- S + k_tj (beta_tj (v_tj - S^T k_tj))^T;   o_t = scale S^T q_t

    A chunk of tokens at a time: the updates u of its rows solve (I + tril(beta Gamma o K K^T, -1)) u = beta (V - e^G K S).

    q [B, T, H, dk], k [B, T, n, H, dk], v [B, T, n, H, dv], beta [B, T, n, H], g [B, T, H] or None, state [B, H, dk, dv] or
    None; all float32 or float64. Returns o [B, T, H, dv] and the last state. Without `erase`, S^T k_tj is left out.
    """
    B, T, n, H, dk = k.shape
    state = q.new_zeros(B, H, dk, v.shape[-1]) if state is None else state
    g = q.new_zeros(B, T, H) if g is None else g
    outputs = []
    for start in range(0, T, max(1, CHUNK_ROWS // n)):
        token = slice(start, min(T, start + max(1, CHUNK_ROWS // n)))
        Q = q[:, token].transpose(1, 2) * dk**-0.5  # [B, H, C, dk]
        K, V = (x[:, token].flatten(1, 2).transpose(1, 2) for x in (k, v))  # [B, H, C n, d]
        b = beta[:, token].flatten(1, 2).transpose(1, 2)[..., None]
        G = g[:, token].transpose(1, 2).cumsum(-1)  # [B, H, C]
        rows = G.repeat_interleave(n, -1)
        index = torch.arange(rows.shape[-1], device=q.device)
        if erase:
            later = index[:, None] > index
            decay = (rows[..., :, None] - rows[..., None, :]).masked_fill(~later, -torch.inf).exp()
            rhs = b * (V - rows.exp()[..., None] * (K @ state))
            u = torch.linalg.solve_triangular(b * decay * (K @ K.mT), rhs, upper=False, unitriangular=True)
        else:
            u = b * V
        seen = index[::n, None] // n >= index // n
        decay = (G[..., :, None] - rows[..., None, :]).masked_fill(~seen, -torch.inf).exp()
        outputs.append(G.exp()[..., None] * (Q @ state) + (decay * (Q @ K.mT)) @ u)
        state = G[..., -1:, None].exp() * state + ((G[..., -1:] - rows).exp()[..., None] * K).mT @ u
    return torch.cat(outputs, 2).transpose(1, 2), state


class DeltaProduct(nn.Module):
    """Token mixer; keys and values of the n steps are laid out (n, heads, dim)."""

    def __init__(self, c):
        super().__init__()
        self.heads, self.n, self.dk, self.dv = c.num_heads, c.num_householder, c.head_dim, int(c.head_dim * c.expand_v)
        self.erase, self.max_beta = c.mixer != "gla", 2.0 if c.allow_neg_eigval else 1.0
        keys, values, D = self.heads * self.dk, self.heads * self.dv, c.hidden_size
        self.q_proj = nn.Linear(D, keys, bias=False)
        self.k_proj = nn.Linear(D, self.n * keys, bias=False)
        self.v_proj = nn.Linear(D, self.n * values, bias=False)
        self.b_proj = nn.Linear(D, self.n * self.heads, bias=False)
        self.taps = c.conv_size if c.use_short_conv else 1
        if c.use_short_conv:
            for name, size in (("q_conv1d", keys), ("k_conv1d", self.n * keys), ("v_conv1d", self.n * values)):
                self.add_module(name, nn.Conv1d(size, size, self.taps, groups=size, bias=False))
        self.gated = c.use_forget_gate
        if self.gated:
            self.a_proj = nn.Linear(D, self.heads, bias=False)
            self.A_log = nn.Parameter(torch.zeros(self.heads))
            self.dt_bias = nn.Parameter(torch.zeros(self.heads))
        self.g_proj = nn.Linear(D, values, bias=False) if c.use_output_gate else None
        self.o_norm = RMSNorm(self.dv, c.norm_eps)
        self.o_proj = nn.Linear(values, D, bias=False)

    def forward(self, x, mask, memory):
        """x [B, T, D], mask [B, T, 1] (True where there is a token) or None, memory of the tokens before or None."""
        B, T, _ = x.shape
        state, *tails = memory or (None, None, None, None)
        projected = [p(x) for p in (self.q_proj, self.k_proj, self.v_proj)]
        beta = self.max_beta * upcast(self.b_proj(x)).sigmoid()
        g = None
        if self.gated:
            g = -upcast(self.A_log).exp() * F.softplus(upcast(self.a_proj(x)) + self.dt_bias)
        if mask is not None:
            projected, beta = [p * mask for p in projected], beta * mask
            g = None if g is None else g * mask
        activated = []
        for i, name in enumerate(("q_conv1d", "k_conv1d", "v_conv1d")):
            y = upcast(projected[i])
            if self.taps > 1:
                tail = y.new_zeros(B, self.taps - 1, y.shape[-1]) if tails[i] is None else tails[i]
                y = torch.cat([tail, y], 1)
                tails[i] = y[:, T:]
                weight = upcast(getattr(self, name).weight)
                y = F.conv1d(y.mT, weight, groups=len(weight)).mT
            activated.append(F.silu(y).to(x.dtype))
        q, k, v = activated
        q, k = (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + L2_EPS) for y in self._split(q, k, self.dk))
        v = upcast(v).view(B, T, self.n, self.heads, self.dv)
        o, state = delta_product(q, k, v, beta.view(B, T, self.n, self.heads), g, state, self.erase)
        o = self.o_norm(o.to(x.dtype)).flatten(2)
        if self.g_proj is not None:
            o = o * F.silu(self.g_proj(x))
        return self.o_proj(o), (state, *tails)

    def _split(self, q, k, d):
        B, T, _ = q.shape
        return upcast(q).view(B, T, self.heads, d), upcast(k).view(B, T, self.n, self.heads, d)


class Attention(nn.Module):
    """Causal softmax attention with rotary positions, grouped keys and values, and an optional sliding window."""

    def __init__(self, c, settings):
        super().__init__()
        self.heads, self.kv_heads = settings["num_heads"], settings["num_kv_heads"]
        self.d, self.window, self.theta = c.hidden_size // self.heads, settings["window_size"], settings["rope_theta"]
        self.q_proj = nn.Linear(c.hidden_size, c.hidden_size, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, self.kv_heads * self.d, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, self.kv_heads * self.d, bias=False)
        self.o_proj = nn.Linear(c.hidden_size, c.hidden_size, bias=False)

    def forward(self, x, mask, memory, seen):
        B, T, _ = x.shape
        q, k, v = (p(x).unflatten(-1, (-1, self.d)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        position = torch.arange(seen, seen + T, device=x.device)
        q, k = self._rotate(q, position), self._rotate(k, position)
        real = torch.ones(B, T, dtype=torch.bool, device=x.device) if mask is None else mask[..., 0]
        if memory is not None:
            k, v, real = torch.cat([memory[0], k], 2), torch.cat([memory[1], v], 2), torch.cat([memory[2], real], 1)
        keys = torch.arange(seen + T - k.shape[2], seen + T, device=x.device)
        visible = keys <= position[:, None]
        if self.window is not None:
            visible = visible & (position[:, None] - keys < self.window)
        itself = keys == position[:, None]  # so that a padded query attends to something
        visible = (visible & real[:, None, None, :]) | itself
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=self.kv_heads != self.heads)
        drop = 0 if self.window is None else max(0, k.shape[2] - (self.window - 1))
        return self.o_proj(o.transpose(1, 2).flatten(2)), (k[:, :, drop:], v[:, :, drop:], real[:, drop:])

    def _rotate(self, x, position):
        wide = upcast(x)
        frequency = self.theta ** (-torch.arange(0, self.d, 2, device=x.device, dtype=wide.dtype) / self.d)
        angle = position[:, None] * frequency
        cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
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
        self.softmax = c.attn is not None and layer in c.attn["layers"]
        self.attn_norm = RMSNorm(c.hidden_size, c.norm_eps)
        self.attn = Attention(c, c.attn) if self.softmax else DeltaProduct(c)
        self.mlp_norm = RMSNorm(c.hidden_size, c.norm_eps)
        self.mlp = SwiGLU(c.hidden_size, c.intermediate_size)

    def forward(self, x, mask, memory, seen):
        normed = self.attn_norm(x)
        mixed, memory = self.attn(normed, mask, memory, seen) if self.softmax else self.attn(normed, mask, memory)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), memory


class TitanDPPreTrainedModel(PreTrainedModel):
    config_class = TitanDPConfig
    base_model_prefix = "model"
    _no_split_modules = ["Block"]
    _is_stateful = True  # generation that rolls back drafted tokens cannot work on states
    _keep_in_fp32_modules_strict = ["A_log", "dt_bias", "attn_norm", "mlp_norm", "o_norm", "norm"]

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
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings

    def set_input_embeddings(self, value):
        self.embeddings = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        output_hidden_states=False,
        **kwargs,
    ):
        x = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        cache = TitanDPCache(len(self.layers)) if past_key_values is None else past_key_values
        mask = None
        if attention_mask is not None:
            mask = attention_mask[:, -x.shape[1] :, None].to(torch.bool)
            mask = None if bool(mask.all()) else mask
        hidden_states = [x]
        for i, layer in enumerate(self.layers):
            x, memory = layer(x, mask, cache.layers[i], cache.seen)
            if use_cache:
                cache.layers[i] = memory
            hidden_states.append(x)
        cache.seen += x.shape[1]
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(x),
            past_key_values=cache if use_cache else None,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
        )


class TitanDPForCausalLM(TitanDPPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.model = TitanDPModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embeddings

    def set_input_embeddings(self, value):
        self.model.embeddings = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_hidden_states=False,
        logits_to_keep=0,
        num_items_in_batch=None,
        **kwargs,
    ):
        """With labels, which are shifted here, also their loss: the mean over those that are not -100, or the sum over

        `num_items_in_batch`, which transformers' Trainer gives when it accumulates gradients.
        """
        out = self.model(
            input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = upcast(self.lm_head(out.last_hidden_state[:, kept]))
        loss = None
        if labels is not None:
            predictions, wanted = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            reduction = "mean" if num_items_in_batch is None else "sum"
            loss = F.cross_entropy(predictions, wanted, ignore_index=-100, reduction=reduction)
            loss = loss if num_items_in_batch is None else loss / num_items_in_batch
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=out.past_key_values, hidden_states=out.hidden_states
        )
