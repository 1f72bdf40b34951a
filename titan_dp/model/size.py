"""How large a model is, from its configuration alone: parameters, model FLOPs a token, recurrent state.

Plain arithmetic, without torch and exact: tests hold the counts against real models' tensors and torch's own FLOP
counter. The trainer's MFU, the dry run, matching and sweeps all count with this file. It leaves out what depends on how
a model is run: activations, recomputation, padding.

FLOP convention: model FLOPs of forward and backward, three times the forward. Matmuls count 6 a weight, the output
matrix included (tied or not) and the embedding lookup not; convolutions 6 a weight; the recurrence what its definition
needs, whatever algorithm runs it; attention only visible pairs. Recomputation and the extra work of chunked
algorithms are executed FLOPs, not model FLOPs: MFU uses the latter.
"""

from __future__ import annotations

from dataclasses import dataclass

from titan_dp import config


@dataclass(frozen=True)
class Counts:
    """Parameters and FLOPs a token (forward and backward) of a part of the model."""

    parameters: int = 0
    matmul: int = 0
    conv: int = 0
    recurrence: int = 0
    attention: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.parameters + other.parameters,
            self.matmul + other.matmul,
            self.conv + other.conv,
            self.recurrence + other.recurrence,
            self.attention + other.attention,
        )

    def times(self, layers: int) -> Counts:
        return Counts(
            self.parameters * layers,
            self.matmul * layers,
            self.conv * layers,
            self.recurrence * layers,
            self.attention * layers,
        )

    @property
    def flops_per_token(self) -> int:
        return self.matmul + self.conv + self.recurrence + self.attention


def model_size(c: config.Model, seq_len: int) -> Counts:
    """The whole model; `seq_len` matters to softmax attention alone."""
    softmax = c.num_hidden_layers if c.mixer == "attention" else len(set(c.attention_layers))
    D = c.hidden_size
    total = Counts(parameters=embedding_parameters(c) + D)  # embedding and final norm
    output = Counts(0 if c.tie_word_embeddings else embedding_parameters(c), matmul=6 * embedding_parameters(c))
    around = Counts(parameters=2 * D) + _matrices(3 * D * c.mlp_size)  # a block's two norms and its SwiGLU
    total += output + around.times(c.num_hidden_layers)
    if softmax:
        total += _softmax(c, seq_len).times(softmax)
    if softmax < c.num_hidden_layers:
        total += _recurrent(c).times(c.num_hidden_layers - softmax)
    return total


def embedding_parameters(c: config.Model) -> int:
    return c.vocab_size * c.hidden_size


def state_size(c: config.Model) -> int:
    """Numbers in the recurrent state of one layer, H dk dv; 0 for a model of softmax attention alone."""
    return 0 if c.mixer == "attention" else c.num_heads * c.head_dim * c.head_v_dim


def recurrence_flops(tokens: int, heads: int, dk: int, dv: int, n: int, gated: bool, erase: bool = True) -> int:
    """Model FLOPs of the forward recurrence: what the definition needs, whatever algorithm computes it.

    A token and head: each of the n steps reads S^T k (2 dk dv, absent without erasing) and writes a rank-one update
    (2 dk dv); the gate scales the state once (dk dv); the query reads once (2 dk dv). Training counts three times this.
    """
    return tokens * heads * dk * dv * ((4 if erase else 2) * n + 2 + int(gated))


def _matrices(weights: int) -> Counts:
    return Counts(parameters=weights, matmul=6 * weights)


def _recurrent(c: config.Model) -> Counts:
    """DeltaProduct, gated linear attention or RWKV-7, one layer; an adaptive model with all steps taken."""
    D, H, n = c.hidden_size, c.num_heads, c.num_householder
    keys, values = H * c.head_dim, H * c.head_v_dim
    rwkv7 = c.mixer == "rwkv7"
    gated = c.use_forget_gate and not rwkv7
    of_the_transition = 2 * n * keys if rwkv7 else n * H + (H if gated else 0) + (n if c.adaptive_householder else 0)
    counts = _matrices(D * (keys + n * keys + n * values + of_the_transition + values * (2 if c.use_output_gate else 1)))
    if c.use_short_conv:
        taps = c.conv_size * (keys + n * keys + n * values)
        counts += Counts(parameters=taps, conv=6 * taps)
    small = c.head_v_dim + (2 * H if gated else 0)  # o_norm; A_log and dt_bias
    small += (2 * n * keys if rwkv7 else 0) + (n if c.adaptive_householder else 0)  # w0 and k_a; the router's bias
    recurrence = recurrence_flops(1, H, c.head_dim, c.head_v_dim, n, gated, erase=c.mixer != "gla")
    if rwkv7:  # erases along another vector than it writes along: a second rank-one update a step; and decays in every step
        recurrence += 3 * n * keys * c.head_v_dim
    return counts + Counts(parameters=small, recurrence=3 * recurrence)


def _softmax(c: config.Model, seq_len: int) -> Counts:
    """Softmax attention, one layer; scores and their use count only visible tokens (causal, windowed), mean over the row."""
    D, heads = c.hidden_size, c.softmax_heads
    d = D // heads
    window = min(c.attention_window or seq_len, seq_len)
    visible = (window * (window + 1) // 2 + (seq_len - window) * window) / seq_len
    matrices = _matrices(2 * D * D + 2 * D * (c.attention_num_kv_heads or heads) * d)
    return matrices + Counts(attention=round(3 * 4 * heads * d * visible))
