"""What each token mixer is, as far as settings tell: one record per mixer, without torch.

The schema checks [model] by these records; sizes, advice, the dry run, reports and the export ask them. A new mixer is a
record here with its line in `MIXERS`, and a layer in titan_dp/model/ with its line in `transformer.LAYERS`:
docs/contributing.md adds one from start to end.

FLOPs follow one convention: model FLOPs of forward and backward, three times the forward. Matrix products count 6 per weight,
convolutions 6 per weight, the recurrence what its definition needs whatever algorithm runs it, attention only visible pairs.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

Model = Any
"""The section [model]: schema.Model, whose file imports this one."""


@dataclass(frozen=True)
class Counts:
    """Parameters, and FLOPs per token (forward and backward), of a part of a model."""

    parameters: int = 0
    matmul: int = 0
    conv: int = 0
    recurrence: int = 0
    attention: int = 0

    @staticmethod
    def of_matrices(weights: int) -> Counts:
        return Counts(parameters=weights, matmul=6 * weights)

    def __add__(self, other: Counts) -> Counts:
        return Counts(*map(operator.add, vars(self).values(), vars(other).values()))

    def __mul__(self, layers: int) -> Counts:
        return Counts(*(layers * count for count in vars(self).values()))

    @property
    def flops_per_token(self) -> int:
        return self.matmul + self.conv + self.recurrence + self.attention


def recurrence_flops(tokens: int, heads: int, dk: int, dv: int, n: int, gated: bool, erase: bool = True) -> int:
    """Model FLOPs of the forward recurrence: what the definition needs, whatever algorithm computes it.

    For each token and head, each of the n steps reads S^T k (2 dk dv, absent without erasing) and writes a rank-one update
    (2 dk dv); the gate scales the state once (dk dv); the query reads once (2 dk dv). Training counts three times this.
    """
    return tokens * heads * dk * dv * ((4 if erase else 2) * n + 2 + int(gated))


class Mixer:
    """One kind of token mixer. Methods take the section [model] of which it is the mixer, or one of two in a hybrid."""

    uses: str = ""
    """Keys of [model] that it reads and that another mixer does not."""
    is_loop = False
    """Computed by a Python loop over tokens: too slow to compile and to trace, and not split over ranks."""
    in_fla = False
    """Whether flash-linear-attention has it: an export may then be of one of its types, not only of our own."""
    names: ClassVar[dict[str, dict[str, Any]]] = {}
    """What people call its models, and the keys of [model] that each name decides; with no num_householder among them, the name
    is followed by n_h."""
    ranges: ClassVar[dict[str, bool]] = {}
    """What may be said of its transitions' eigenvalues, the usual first, and the `allow_neg_eigval` that each means."""

    def family(self, c: Model) -> str:
        """What the literature calls it."""
        raise NotImplementedError

    def problems(self, c: Model) -> Iterator[str]:
        """What of [model] it cannot be built with."""
        yield from ()

    def counts(self, c: Model, seq_len: int) -> Counts:
        """Of one layer; `seq_len` matters to softmax attention alone."""
        raise NotImplementedError

    def state_size(self, c: Model) -> int:
        """Numbers in the recurrent state of one layer."""
        return 0

    def not_exported(self, c: Model) -> str:
        """The setting that exported models cannot express; empty if there is none."""
        return f"mixer = {c.mixer!r}"


class MatrixState(Mixer):
    """A state [dk, dv] per head: what `model.deltaproduct.MatrixStateMixer` has, whatever its transition is.

    A subclass adds the projections, other parameters and FLOPs of its transition.
    """

    uses = (
        "num_heads head_dim expand_v num_householder allow_neg_eigval use_output_gate output_norm gate_before_norm "
        "use_short_conv conv_size backend"
    )

    def transition(self, c: Model) -> tuple[int, int, int]:
        """Columns that it projects to, parameters that are in no matrix, and forward FLOPs per token of the recurrence."""
        raise NotImplementedError

    def counts(self, c: Model, seq_len: int) -> Counts:
        D, n, keys, values = c.hidden_size, c.num_householder, c.key_heads * c.head_dim, c.num_heads * c.head_v_dim
        columns, others, recurrence = self.transition(c)
        taps = c.conv_size * (keys + n * keys + n * values) if c.use_short_conv else 0
        projected = keys + n * keys + n * values + columns + values * (2 if c.use_output_gate else 1)
        norm = values if c.output_norm == "group" else c.head_v_dim
        return Counts.of_matrices(D * projected) + Counts(taps + norm + others, conv=6 * taps, recurrence=3 * recurrence)

    def state_size(self, c: Model) -> int:
        return c.num_heads * c.head_dim * c.head_v_dim


class DeltaProduct(MatrixState):
    """n_h Householder steps per token; n_h = 1 is DeltaNet, gated or not. With a router, all steps count as taken."""

    uses = f"{MatrixState.uses} num_key_heads use_forget_gate adaptive_householder beta_stretch"
    in_fla = True
    names: ClassVar = {
        "deltanet": {"num_householder": 1},
        "gated-deltanet": {"num_householder": 1, "use_forget_gate": True},
        "deltaproduct": {},
        "gated-deltaproduct": {"use_forget_gate": True},
        "adaptive-deltaproduct": {"adaptive_householder": True},
    }
    ranges: ClassVar = {"[-1, 1]": True, "[0, 1]": False}
    erase = True

    def family(self, c: Model) -> str:
        name = "DeltaNet" if c.num_householder == 1 else f"DeltaProduct_{c.num_householder}"
        return ("adaptive " if c.adaptive_householder else "") + ("Gated " if c.use_forget_gate else "") + name

    def problems(self, c: Model) -> Iterator[str]:
        if c.num_heads % c.key_heads:
            yield f"num_heads = {c.num_heads} is not a multiple of num_key_heads = {c.key_heads}"

    def transition(self, c: Model) -> tuple[int, int, int]:
        n, H = c.num_householder, c.num_heads
        gate, router = H * c.use_forget_gate, n * c.adaptive_householder
        flops = recurrence_flops(1, H, c.head_dim, c.head_v_dim, n, c.use_forget_gate, self.erase)
        # Matrices of beta, the gate and the router; A_log and dt_bias, and the router's bias.
        return n * H + gate + router, 2 * gate + router, flops

    def not_exported(self, c: Model) -> str:
        return "adaptive_householder = true" if c.adaptive_householder else ""


class LinearAttention(DeltaProduct):
    """The same operator with the erase term off."""

    uses = f"{MatrixState.uses} num_key_heads use_forget_gate beta_stretch"
    in_fla = False
    names: ClassVar = {"gla": {"num_householder": 1, "use_forget_gate": True}}
    ranges: ClassVar = {}
    erase = False

    def family(self, c: Model) -> str:
        return ("gated " if c.use_forget_gate else "") + "linear attention"

    def problems(self, c: Model) -> Iterator[str]:
        yield from super().problems(c)
        if c.num_householder != 1:
            yield f"mixer = {c.mixer!r} takes one step per token, so num_householder = {c.num_householder} must be 1"


class RWKV7(MatrixState):
    """Products of n_h RWKV-7 transitions per token; they have decays of their own."""

    is_loop = True
    names: ClassVar = {"rwkv7": {}}
    ranges: ClassVar = {"(c = 1)": False, "(c = 2)": True}  # how much a transition erases

    def family(self, c: Model) -> str:
        return "RWKV-7" + (f" product_{c.num_householder}" if c.num_householder > 1 else "")

    def transition(self, c: Model) -> tuple[int, int, int]:
        n, keys = c.num_householder, c.num_heads * c.head_dim
        flops = recurrence_flops(1, c.num_heads, c.head_dim, c.head_v_dim, n, gated=False)
        # It erases along another vector than it writes along, a second rank-one update per step, and decays in every step.
        flops += 3 * n * keys * c.head_v_dim
        return 2 * n * keys, 2 * n * keys, flops  # matrices of a and w; w0 and k_a


class Softmax(Mixer):
    """Causal attention, windowed or not; also the attention layers of hybrids."""

    uses = "attention_block attention_num_heads attention_num_kv_heads attention_window rope_theta"
    in_fla = True
    names: ClassVar = {"attention": {"num_householder": 1}}

    def family(self, c: Model) -> str:
        return "softmax attention" + (" (olmo)" if c.attention_block == "olmo" else "")

    def problems(self, c: Model) -> Iterator[str]:
        heads, kv = c.softmax_heads, c.attention_num_kv_heads or c.softmax_heads
        if c.hidden_size % heads or c.hidden_size // heads % 2:
            yield (
                f"hidden_size = {c.hidden_size} does not split into attention_num_heads = {heads} heads of an "
                "even dimension (rotary embedding turns pairs)"
            )
        if heads % kv:
            yield f"attention_num_heads = {heads} is not a multiple of attention_num_kv_heads = {kv}"

    def counts(self, c: Model, seq_len: int) -> Counts:
        D, heads = c.hidden_size, c.softmax_heads
        d = D // heads
        window = min(c.attention_window or seq_len, seq_len)
        visible = (window * (window + 1) // 2 + (seq_len - window) * window) / seq_len  # tokens, mean over the row
        keys = (c.attention_num_kv_heads or heads) * d
        norms = D + keys if c.attention_block == "olmo" else 0  # of q and k
        attention = round(3 * 4 * heads * d * visible)  # scores, and their use
        return Counts.of_matrices(2 * D * D + 2 * D * keys) + Counts(norms, attention=attention)

    def not_exported(self, c: Model) -> str:
        return ""


MIXERS: dict[str, Mixer] = {
    "deltaproduct": DeltaProduct(),
    "gla": LinearAttention(),
    "rwkv7": RWKV7(),
    "attention": Softmax(),
}
"""By the name that model.mixer has."""
