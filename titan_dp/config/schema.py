"""Every setting of a run: one class per TOML section, one documented field per key.

This file is the schema and nothing else: `load.py` reads files and command lines into it. Section and key names are
torchtitan v0.2.2's, plus `[model]`, `[data]` and `[state_tracking]`. Components receive only their own section, never
`Config`. Types are strict: TOML has integers, floats, booleans and strings, and `"8"` is not 8. Rules that need only one
section live in that section, rules across sections in `Config`. docs/config.md is generated from the docstrings below.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from titan_dp.config.mixers import MIXERS
from titan_dp.files import stays_inside

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_count(value: object) -> object:
    """'19B' -> 19_000_000_000, '.5B' and 19e9 too; integers pass through; the rest, such as '.001' and '1.0005K', is left for
    the type check to refuse.
    """
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and (match := re.fullmatch(r"([0-9][0-9_]*(?:\.[0-9]*)?|\.[0-9]+)\s*([KMBT]?)", value.strip())):
        number = Decimal(match[1].replace("_", "")) * _UNITS[match[2]]
        return int(number) if number == int(number) else value
    return value


def from_home(path: str) -> str:
    """`path` with the home folder for its "~", which shells leave as it is in quotes, in `--key=~/x` and in files."""
    return os.path.expanduser(path) if path == "~" or path.startswith("~/") else path


def _within(name: str) -> str:
    if not stays_inside(name, nested=True):
        raise ValueError("leads out of its folder")
    return name


def _known_mixer(name: str) -> str:
    if name not in MIXERS:
        raise ValueError(f"is not one of {', '.join(MIXERS)}")
    return name


def refuse(problems: list[str]) -> None:
    """Raise all `problems` of a section at once, one per line."""
    if problems:
        raise ValueError("\n".join(problems))


Count = Annotated[int, BeforeValidator(parse_count), WithJsonSchema({"title": 'whole number such as 500_000 or "19B"'})]
Positive = Annotated[int, Field(gt=0)]
PositiveOrAll = Literal[-1] | Positive
Name = Annotated[str, Field(min_length=1)]
UserPath = Annotated[str, AfterValidator(from_home)]
_PathName = Annotated[UserPath, Field(min_length=1)]
Paths = _PathName | Annotated[list[_PathName], Field(min_length=1)]
# Of a folder inside another one: a name, or several between slashes.
FolderName = Annotated[
    str,
    AfterValidator(_within),
    WithJsonSchema({"title": 'name without "..", leading "/" or control characters'}),
]


MixerName = Annotated[str, AfterValidator(_known_mixer), WithJsonSchema({"enum": [*MIXERS]})]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        validate_default=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )

    @field_validator("*")
    @classmethod
    def fits_toml(cls, value: Any) -> Any:
        """A run writes its settings down, and TOML's integers have 64 bits. Raises ValueError for one with more."""
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(number, int) and not -(2**63) <= number < 2**63 for number in numbers):
            raise ValueError("does not fit into 64 bits")
        return value


class Job(Section):
    dump_folder: UserPath = "outputs"
    """Folder that holds the run folders."""
    run_name: Literal[""] | FolderName = ""
    """Name of the run folder inside `dump_folder`; empty: the config's file name without .toml."""
    description: str = ""
    """One line for people; printed at the start and kept with the run."""


class Model(Section):
    mixer: MixerName = "deltaproduct"
    """Token mixer: DeltaProduct (n_h = 1 is DeltaNet), gated linear attention (the same op without erasing), products of
    n_h RWKV-7 transitions (a plain loop, for state tracking), or softmax."""
    hidden_size: Positive = 1024
    """Width of the residual stream."""
    num_hidden_layers: Positive = 24
    """Number of blocks."""
    num_heads: Positive = 8
    """Heads of the mixer; `num_heads * head_dim` need not equal `hidden_size` for the recurrent mixers."""
    num_key_heads: Positive | None = None
    """Heads of q and k, each of which num_heads / num_key_heads heads of v, beta, gate and output share; default: num_heads."""
    head_dim: Positive = 128
    """Key and query dimension of a head (dk)."""
    expand_v: Annotated[float, Field(gt=0)] = 1.0
    """Value dimension of a head as a multiple of `head_dim`: dv = int(head_dim * expand_v)."""
    num_householder: Annotated[int, Field(ge=1, le=8)] = 2
    """n_h: Householder steps per token; for rwkv7, transitions per token."""
    adaptive_householder: bool = False
    """A learned router decides for each token which of the n_h steps are taken; training.householder_cost is their price."""
    use_forget_gate: bool = False
    """Scalar decay per head and token before the n_h steps (Gated DeltaProduct)."""
    allow_neg_eigval: bool = True
    """beta = 2 sigmoid instead of sigmoid: eigenvalues of each factor in [-1, 1] instead of [0, 1]; for rwkv7, c = 2, not 1."""
    beta_stretch: Annotated[float, Field(ge=0, le=1)] = 0.0
    """s: beta = clamp((1 + 2 s) sigmoid - s, 0, 1), times 2 with allow_neg_eigval. Above 0 a finite logit reaches both ends, so
    that a step can be an exact reflection, or none: of use where states must be kept over thousands of tokens."""
    use_output_gate: bool = False
    """Multiply the normalised output of the mixer by silu(g_proj(x))."""
    output_norm: Literal["head", "group"] = "head"
    """RMSNorm of the mixer's output: of each head, with one weight of dv numbers for all; or of the heads together that share a
    head of q and k, with a weight per channel."""
    gate_before_norm: bool = False
    """Apply the output gate before that norm: RMS(o * silu(g_proj(x))), not RMS(o) * silu(g_proj(x))."""
    use_short_conv: bool = True
    """Causal depthwise convolution after the q, k and v projections."""
    conv_size: Annotated[int, Field(ge=2, le=8)] = 4
    """Taps of the short convolution."""
    intermediate_size: Positive | None = None
    """Width of the SwiGLU; default: hidden_size * 8/3 rounded up to a multiple of 256."""
    vocab_size: Positive = 32000
    """Rows of the embedding; every token id must be smaller."""
    tie_word_embeddings: bool = True
    """Use the embedding matrix as the output matrix."""
    norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    """Epsilon of every RMSNorm."""
    initializer_range: Annotated[float, Field(gt=0)] = 0.006
    """Standard deviation of the normal initialisation of matrices, convolutions and embeddings."""
    attention_layers: list[Annotated[int, Field(ge=0)]] = []
    """Hybrid: indices of the blocks whose mixer is softmax attention."""
    attention_block: Literal["llama", "olmo"] = "llama"
    """Blocks of the softmax layers: llama has norms before attention and MLP, as all other blocks; olmo (OLMo 2, Olmo Hybrid)
    has them behind, and norms of all of q and of all of k, so that hybrids can be exported as olmo-hybrid."""
    attention_num_heads: Positive | None = None
    """Heads of the softmax layers; default: hidden_size / 64 (their head dimension is hidden_size / heads)."""
    attention_num_kv_heads: Positive | None = None
    """Key/value heads of the softmax layers (grouped-query attention); default: as many as heads."""
    attention_window: Positive | None = None
    """Sliding window of the softmax layers in tokens, the token itself included; default: all earlier tokens."""
    rope_theta: Annotated[float, Field(gt=0)] = 10000.0
    """Base of the rotary embedding of the softmax layers."""
    backend: Literal["auto", "recurrent", "torch", "triton", "fla"] = "auto"
    """Implementation of the recurrence and its front end; auto picks triton on a GPU that can run it, else torch; fla is
    flash-linear-attention's recurrence, which must be installed, behind auto's front end."""

    @property
    def head_v_dim(self) -> int:
        return int(self.head_dim * self.expand_v)

    @property
    def key_heads(self) -> int:
        """Heads of q and k in the recurrent layers."""
        shared = "num_key_heads" in MIXERS[self.mixer].uses.split()
        return self.num_key_heads if shared and self.num_key_heads else self.num_heads

    @property
    def mlp_size(self) -> int:
        return self.intermediate_size or 256 * math.ceil(int(self.hidden_size * 8 / 3) / 256)

    @property
    def softmax_heads(self) -> int:
        return self.attention_num_heads or max(1, self.hidden_size // 64)

    @property
    def heads(self) -> str:
        """For tables: '8 x 128', or '8/2 x 128' if 8 heads share 2 of q and k."""
        shared = "" if self.key_heads == self.num_heads else f"/{self.key_heads}"
        return f"{self.num_heads}{shared} x {self.head_dim}"

    @property
    def family(self) -> str:
        """What the literature calls the mixer: 'DeltaNet', 'Gated DeltaProduct_2', 'RWKV-7', 'linear attention', ..."""
        return MIXERS[self.mixer].family(self)

    def widths(self) -> dict[str, int]:
        """Of the inputs and outputs of the large projections, by the keys of [model] that they follow from."""
        sizes = {"hidden_size": self.hidden_size, "intermediate_size": self.mlp_size}
        mixers = self.mixers()
        if mixers.keys() - {"attention"}:
            sizes["head_dim times the heads of q and k"] = self.head_dim * self.key_heads
            sizes["head_dim times expand_v times num_heads"] = self.head_v_dim * self.num_heads
        if "attention" in mixers:
            d = self.hidden_size // self.softmax_heads
            sizes["attention_num_kv_heads times their width"] = d * (self.attention_num_kv_heads or self.softmax_heads)
        return sizes

    def mixer_of(self, layer: int) -> str:
        """The mixer of block `layer`, a name in `MIXERS`."""
        return "attention" if layer in self.attention_layers else self.mixer

    def mixers(self) -> dict[str, int]:
        """How many blocks each mixer has."""
        softmax = self.num_hidden_layers if self.mixer == "attention" else len(set(self.attention_layers))
        both = {self.mixer: self.num_hidden_layers - softmax, "attention": softmax}
        return {name: layers for name, layers in both.items() if layers}

    @model_validator(mode="after")
    def _shapes_fit(self) -> Model:
        problems = []
        if bad := [i for i in self.attention_layers if i >= self.num_hidden_layers]:
            problems.append(f"attention_layers names {bad}, but num_hidden_layers = {self.num_hidden_layers}")
        for name in dict.fromkeys(("attention", self.mixer) if self.attention_layers else (self.mixer,)):
            problems += MIXERS[name].problems(self)
        if self.adaptive_householder and "adaptive_householder" not in MIXERS[self.mixer].uses.split():
            problems.append(f"adaptive_householder = true needs mixer = 'deltaproduct', not {self.mixer!r}; set it to false")
        elif self.adaptive_householder and self.num_householder == 1:
            problems.append("adaptive_householder = true has no steps to choose from with num_householder = 1; set at least 2")
        if self.head_v_dim < 1:
            problems.append(f"head_dim = {self.head_dim} times expand_v = {self.expand_v} leaves no value dimension")
        refuse(problems)
        return self


class Data(Section):
    source: Literal["shards", "hf", "state_tracking"] = "shards"
    """Where training tokens come from: memory-mapped token shards, a Hugging Face dataset tokenised while training, or the
    problem of `[state_tracking]`, made while training."""
    path: Paths = "data/corpus/train"
    """source = shards: folder, or list of folders of a mixture, written by `titan-dp prepare`."""
    weights: list[Annotated[float, Field(gt=0)]] | None = None
    """Relative weight of each folder of `path`; default: in proportion to its tokens."""
    document_boundaries: Literal["carry", "reset"] = "carry"
    """carry: the recurrence runs on across documents, as in the paper; reset: no state or convolution crosses one."""
    seed: int = 42
    """Seed of the sample order, apart from `debug.seed` so that data order and initialisation vary independently."""
    verify: bool = True
    """Compare the contents of shards with their checksums while training: each file once per run, and again if it changed."""
    tokenizer: UserPath = ""
    """Name or path of the tokenizer. Shards carry their own, so only source = hf needs it; if given, it must agree."""
    hf_dataset: UserPath = ""
    """source = hf: name or folder of the dataset."""
    hf_name: str = ""
    """source = hf: configuration of the dataset."""
    hf_split: str = "train"
    """source = hf: split of the dataset."""
    hf_column: str = "text"
    """source = hf: column that holds the text."""
    hf_shuffle_buffer: Annotated[int, Field(ge=0)] = 10_000
    """source = hf: documents in the streaming shuffle buffer; 0 keeps the dataset's order."""
    hf_on_bad_document: Literal["skip", "stop"] = "skip"
    """source = hf: a document that cannot be used (no text, another type, too long) is left out and counted, or ends it."""

    @model_validator(mode="after")
    def _sources_fit(self) -> Data:
        problems = []
        if self.weights is not None and len(self.weights) != len(self.paths):
            problems.append(f"weights has {len(self.weights)} entries for the {len(self.paths)} folders of path")
        if self.source == "hf" and not self.hf_dataset:
            problems.append("source = 'hf' needs hf_dataset (a dataset's name or folder)")
        if self.source == "hf" and not self.tokenizer:
            problems.append("source = 'hf' needs tokenizer (bytes, a tiktoken encoding, a .tiktoken file, a Hugging Face one)")
        refuse(problems)
        return self

    @property
    def paths(self) -> list[str]:
        return [self.path] if isinstance(self.path, str) else self.path


class StateTracking(Section):
    task: str = ""
    """data.source = state_tracking: a group whose word problem is learnt (S3, A5, D4, Z60, S3xZ2, or a multiplication
    table.csv), or a formal language (parity, even-pairs, cycle-navigation, modular-arithmetic, ...). Words are as long as
    training.seq_len holds: 1 + symbols * tokens_per_element."""
    min_length: Positive | None = None
    """Shortest word; lengths are drawn from here to the longest. Default: a group's words are all of the longest length (their
    beginnings are words too), a language's strings have all lengths."""
    curriculum_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the longest word grows from min_length (or the shortest) to what training.seq_len holds."""
    curriculum_growth: Literal["linear", "geometric"] = "linear"
    """How it grows: by as many symbols in every step, or by the same factor, which spends as much time on each doubling."""
    max_moved: Positive | None = None
    """Groups: draw only elements that move at most this many points (2: swaps and the identity); default: all elements."""
    tokens_per_element: Annotated[int, Field(ge=1, le=8)] = 1
    """Groups: tokens per element; fillers follow each element, and the answer is asked at the last token."""
    validation_samples: Positive = 512
    """Words of the training lengths on which a run is validated, stopped and chosen."""
    solved_accuracy: Annotated[float, Field(gt=0, le=1)] = 0.99
    """A run is solved once this fraction of the validation words is right at every symbol."""
    stop_when_solved: bool = False
    """End the run at the first validation that finds it solved."""
    test_length: Positive | None = None
    """Longest words of the test at the end of the run; default: four times those trained on."""
    test_samples: Positive = 512
    """Words of the test."""

    @property
    def is_group(self) -> bool:
        """Whether `task` names a group or a table's file, not a language: names of languages are in lower case."""
        return self.task.endswith(".csv") or not self.task.islower()


class Dataloader(Section):
    num_workers: Annotated[int, Field(ge=0)] = 0
    """Worker processes per rank; memory-mapped shards need none, streaming is faster with one."""
    prefetch_factor: Positive = 2
    """What each worker prepares ahead: so many micro-batches of shards, or so many whole steps of a stream."""
    pin_memory: bool = False
    """On a GPU: move batches into page-locked memory in a thread of the loader, not of the training loop."""


class Training(Section):
    local_batch_size: PositiveOrAll = 8
    """Sequences per rank and micro-batch; -1: a rank's whole share of global_batch_size (no accumulation)."""
    global_batch_size: PositiveOrAll = -1
    """Sequences per optimizer step, over all ranks and accumulation; -1: local_batch_size times ranks (no accumulation)."""
    seq_len: Positive = 2048
    """Tokens per sequence."""
    steps: Positive | None = None
    """Optimizer steps of the run. Give either steps or tokens."""
    tokens: Annotated[Count, Field(gt=0)] | None = None
    """Tokens of the run, such as "19B"; rounded up to whole steps."""
    max_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this global norm."""
    mixed_precision_param: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of matrices and activations in compute; norms, A_log and dt_bias stay float32, as do the sharded originals."""
    mixed_precision_reduce: Literal["float32", "bfloat16"] = "float32"
    """Dtype in which gradients are summed over ranks."""
    max_nonfinite_steps: Positive = 10
    """Stop after this many consecutive steps with a non-finite gradient (each is skipped)."""
    householder_cost: Annotated[float, Field(gt=0)] | None = None
    """Price of a Householder step that model.adaptive_householder takes, in nats per step and token: the mean loss plus the
    price times the steps per token, summed over all layers, is minimised. Tokens after the last label of a row do not count."""
    gc_freq: Positive = 50
    """Steps between collections of Python's garbage, on all ranks at once."""
    dataloader: Dataloader = Dataloader()

    @model_validator(mode="after")
    def _a_batch_is_known(self) -> Training:
        text = "local_batch_size = -1 is a share of global_batch_size, which is -1 too; set one"
        refuse([text] if self.local_batch_size == self.global_batch_size == -1 else [])
        return self


class MupBase(Section):
    hidden_size: Positive | None = None
    """model.hidden_size of the shape at which the hyperparameters were found."""
    head_dim: Positive | None = None
    """Its model.head_dim."""
    num_heads: Positive | None = None
    """Its model.num_heads."""
    num_hidden_layers: Positive | None = None
    """Its model.num_hidden_layers."""
    num_householder: Annotated[int, Field(ge=1, le=8)] | None = None
    """Its model.num_householder."""
    intermediate_size: Positive | None = None
    """Its model.intermediate_size; default: in proportion to hidden_size."""

    def of(self, name: str) -> int:
        """A key that `optimizer.parametrization = "mup"` has made sure of."""
        value: int | None = getattr(self, name)
        assert value is not None, name
        return value


class Optimizer(Section):
    name: Literal["AdamW", "Muon"] = "AdamW"
    """AdamW (fused) for all, or Muon for q, k, v, o and the MLP, and AdamW for the rest (embeddings, beta, gates, norms)."""
    lr: Annotated[float, Field(gt=0)] = 3e-4
    """Peak learning rate (of AdamW)."""
    muon_lr: Annotated[float, Field(gt=0)] = 3e-4
    """Peak learning rate of Muon, whose updates are scaled to AdamW's RMS (adjust_lr_fn = match_rms_adamw)."""
    muon_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Momentum of Muon."""
    muon_split: Literal["heads", "steps", "whole"] = "heads"
    """What Muon orthogonalises of q, k and v: each head of each Householder step, each step, or the whole projection."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of AdamW's first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of AdamW's second moment."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's epsilon."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay of matrices; norms, biases, A_log and dt_bias have none."""
    decay_embeddings: bool = False
    """Apply weight decay to the embedding (and the output matrix tied to it) as well."""
    parametrization: Literal["standard", "mup"] = "standard"
    """mup: learning rates, epsilon and initializer_range are those of the shape `mup_base`, and are scaled to this model's."""
    mup_base: MupBase = MupBase()

    @model_validator(mode="after")
    def _base_is_whole(self) -> Optimizer:
        absent = [name for name in MupBase.model_fields if getattr(self.mup_base, name) is None and name != "intermediate_size"]
        if self.parametrization == "mup" and absent:
            keys = ", ".join(f"mup_base.{name}" for name in absent)
            refuse([f'parametrization = "mup" needs the base shape\'s {keys}: that of the model the settings were tuned on'])
        return self


class LRScheduler(Section):
    warmup_steps: Annotated[int, Field(ge=0)] = 512
    """Steps of linear warmup from 0."""
    decay_type: Literal["cosine", "linear", "sqrt"] = "cosine"
    """Shape of the decay to `min_lr_factor`."""
    decay_ratio: Annotated[float, Field(gt=0, le=1)] | None = None
    """Fraction of the run that decays, at its end (warmup-stable-decay); default: decay starts right after warmup."""
    min_lr_factor: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Last learning rate as a fraction of the peak."""
    total_steps: Positive | None = None
    """Step with which the schedule ends; default: the run's last."""
    start_step: Annotated[int, Field(ge=0)] = 0
    """Step with which the schedule begins, warmup first; lets an extended run decay again from where it ended."""


class Parallelism(Section):
    data_parallel_replicate_degree: Positive = 1
    """Replicas of the sharded model (HSDP when more than 1)."""
    data_parallel_shard_degree: PositiveOrAll = -1
    """Ranks that share one copy of the model (FSDP2); -1: all that replication and context leave."""
    context_parallel_degree: Positive = 1
    """Ranks that share the tokens of one sequence, neighbours; parameters are sharded over them as well."""
    fsdp_reshard_after_forward: Literal["default", "always", "never"] = "default"
    """Free a block's gathered parameters after its forward; default: of all blocks but the last, which backward needs first."""


class ActivationCheckpoint(Section):
    mode: Literal["none", "full", "selective"] = "none"
    """none; full: recompute every block; selective: as selective_ac_option says."""
    selective_ac_option: Literal["op"] | Positive = "op"
    """op: keep the outputs of the recurrence, attention and every second matmul; an integer n: recompute every n-th block."""


class Compile(Section):
    enable: bool = False
    """torch.compile each block with fullgraph=True."""


class Quantize(Section):
    linear: Literal["none", "float8"] = "none"
    """float8: the projections q, k, v, o and the MLP multiply in float8 through torchao (GPUs from 8.9 on). Weights are kept as
    they are; gates, beta, embeddings and the output matrix multiply as before."""
    recipe: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] = "tensorwise"
    """How float8 values are scaled, by torchao's name: one scale a tensor, one a row, or one a row with the gradients of
    weights in bfloat16."""
    emulate: bool = False
    """Compute float8's roundings in wider products, on any device: slow, for tests."""


class Checkpoint(Section):
    enable: bool = True
    """Save checkpoints. Without them a signal ends the run with exit code 1, and nothing is saved."""
    folder: FolderName = "checkpoint"
    """Folder inside the run folder."""
    interval: Positive = 500
    """Steps between checkpoints; the last step is always saved."""
    async_mode: Literal["async", "disabled"] = "async"
    """async: copy, then write in the background while training goes on; disabled: wait for the write."""
    keep_latest_k: Literal[0] | Annotated[int, Field(ge=2)] = 10
    """Committed checkpoints kept; 0 keeps all, 1 would leave none while the next is written. The newest healthy one stays."""
    load_step: Annotated[int, Field(ge=-1)] = -1
    """Step to resume from; -1: the newest healthy one."""
    resume: bool = True
    """Resume from the run folder when it holds a committed checkpoint; false refuses to start in a used folder."""
    initial_load_path: UserPath = ""
    """Checkpoint folder whose model weights a new run starts from (optimizer, step and data start afresh); its [model] and its
    tokenizer must be this run's."""
    branch_from: UserPath = ""
    """Checkpoint of another run that a new run goes on from as if it had trained those steps itself: weights, optimizer, step,
    place in the data."""
    keep_steps: list[Positive] = []
    """Steps after which a checkpoint is saved as well, and kept whatever keep_latest_k says: other runs branch from it."""
    allow_changed: list[str] = []
    """Keys allowed to differ from the checkpoint's (on resume, or of initial_load_path) although they change what its weights
    compute or which data the run sees. What changes the tensors themselves is refused all the same."""


class Validation(Section):
    enable: bool = True
    """Measure the loss on held-out tokens."""
    path: Paths = "data/corpus/validation"
    """Folder or folders of held-out token shards."""
    freq: Positive = 500
    """Steps between validations; one is always run at the end."""
    steps: PositiveOrAll = -1
    """Batches of training.global_batch_size sequences in each validation, the same on any number of ranks; -1: every held-out
    token once."""
    local_batch_size: Positive | None = None
    """Sequences per rank and batch; default: training.local_batch_size."""

    @property
    def paths(self) -> list[str]:
        return [self.path] if isinstance(self.path, str) else self.path


class Metrics(Section):
    log_freq: Positive = 10
    """Steps between log lines."""
    enable_tensorboard: bool = True
    """Write TensorBoard event files to `tb/` in the run folder."""
    enable_wandb: bool = False
    """Log to Weights & Biases as well (needs the wandb package); the run's id there is kept in the run folder, as wandb_id."""
    wandb_project: str = "titan_dp"
    """Project of the W&B run."""
    wandb_entity: str = ""
    """User or team that the project belongs to; default: W&B's own default."""
    wandb_group: str = ""
    """Group of the W&B run; default: the sweep that the run is a cell of."""
    wandb_tags: list[str] = []
    """Tags of the W&B run."""
    peak_tflops: Annotated[float, Field(gt=0)] | None = None
    """Dense peak of one device in TFLOP/s at the training dtype, for MFU; default: by the name of a known GPU."""


class Profiling(Section):
    enable_profiling: bool = False
    """Write Chrome traces of a few steps to `profile/` in the run folder."""
    profile_freq: Positive = 100
    """Steps between traces."""
    profiler_warmup: Positive = 3
    """Steps the profiler warms up before each trace."""
    profiler_active: Positive = 1
    """Steps each trace covers."""
    enable_memory_snapshot: bool = False
    """Write CUDA memory snapshots with each trace, and when memory runs out."""

    @model_validator(mode="after")
    def _cycle_fits(self) -> Profiling:
        cycle = self.profiler_warmup + self.profiler_active
        if self.profile_freq < cycle:
            raise ValueError(f"profile_freq = {self.profile_freq} is shorter than profiler_warmup + profiler_active = {cycle}")
        return self


class Comm(Section):
    init_timeout_seconds: Positive = 300
    """Timeout of collectives until the first step is done."""
    train_timeout_seconds: Positive = 100
    """Timeout of collectives after it."""


class Generate(Section):
    enable: bool = True
    """Generate a sample when training ends."""
    prompt: str = "The "
    """Text to continue."""
    max_new_tokens: Positive = 200
    """Tokens to generate."""
    temperature: Annotated[float, Field(ge=0)] = 0.8
    """Softmax temperature; 0 is greedy."""


class Debug(Section):
    seed: int = 42
    """Seed of initialisation and of every random number but the data order."""
    deterministic: bool = False
    """Deterministic algorithms only (slower on GPUs; on CPU runs are bit-equal anyway)."""
    check_kernels: bool = True
    """Before the first step, compare the Triton kernels that the run uses with the recurrence in float64, and refuse to train
    where they are wrong."""


Rule = tuple[bool, str, str]
"""Whether it is broken, the sections it is about, what to say."""


class Config(Section):
    job: Job = Job()
    model: Model = Model()
    data: Data = Data()
    state_tracking: StateTracking = StateTracking()
    training: Training = Training()
    optimizer: Optimizer = Optimizer()
    lr_scheduler: LRScheduler = LRScheduler()
    parallelism: Parallelism = Parallelism()
    activation_checkpoint: ActivationCheckpoint = ActivationCheckpoint()
    compile: Compile = Compile()
    quantize: Quantize = Quantize()
    checkpoint: Checkpoint = Checkpoint()
    validation: Validation = Validation()
    metrics: Metrics = Metrics()
    profiling: Profiling = Profiling()
    comm: Comm = Comm()
    generate: Generate = Generate()
    debug: Debug = Debug()

    def rules(self) -> Iterator[Rule]:
        """Yield every rule between sections, or about a whole run."""
        m, t, data, degree = self.model, self.training, self.data, self.parallelism.context_parallel_degree
        given = "neither is given" if t.steps is None else f"steps = {t.steps} and tokens = {t.tokens}"
        text = f"training: give exactly one of steps and tokens ({given})"
        yield (t.steps is None) == (t.tokens is None), "training", text
        text = (
            "model.adaptive_householder = true without training.householder_cost: a router without a cost never learns to "
            "switch a step off; set the cost, such as --training.householder_cost 0.001 (nats per step and token)"
        )
        yield m.adaptive_householder and t.householder_cost is None, "model training", text
        is_loop = MIXERS[m.mixer].is_loop
        text = f"model.backend = 'fla' with model.mixer = {m.mixer!r}, which it does not compute; set backend = 'auto'"
        yield m.backend == "fla" and m.mixer in ("gla", "rwkv7"), "model", text
        text = "model.backend = 'fla' with training.mixed_precision_param = 'float32', which it does not take; set 'bfloat16'"
        yield m.backend == "fla" and t.mixed_precision_param == "float32", "model training", text
        text = f"optimizer.parametrization = 'mup' with model.mixer = {m.mixer!r}, which has no rules; set it to 'standard'"
        yield self.optimizer.parametrization == "mup" and m.mixer == "rwkv7", "optimizer model", text
        text = (
            "optimizer.parametrization = 'mup' with model.attention_block = 'olmo', whose norms undo the factors of first "
            "values; set it to 'standard'"
        )
        olmo = m.attention_block == "olmo" and "attention" in m.mixers()
        yield self.optimizer.parametrization == "mup" and olmo, "optimizer model", text
        text = (
            f"compile.enable = true with model.mixer = {m.mixer!r}: the compiler would unroll its loop over tokens, which "
            "takes hours; set compile.enable = false"
        )
        yield self.compile.enable and is_loop, "model compile", text
        both = sorted(set(data.paths) & set(self.validation.paths))
        text = f"data.path and validation.path both name {', '.join(map(repr, both))}: validation must see other text"
        yield self.validation.enable and data.source == "shards" and bool(both), "data validation", text
        made = data.source == "state_tracking"
        text = "data.source = 'state_tracking' needs state_tracking.task (a group such as S3, or a formal language)"
        yield made and not self.state_tracking.task, "data state_tracking", text

        # Products in float8 take sizes that are multiples of 16.
        quantized, key = self.quantize.linear == "float8", "quantize.linear = 'float8'"
        text = f"{key} with training.mixed_precision_param = {t.mixed_precision_param!r}; set it to 'bfloat16'"
        yield quantized and t.mixed_precision_param != "bfloat16", "quantize training", text
        for name, width in m.widths().items():
            text = f"{key} needs widths that are multiples of 16, and model.{name} = {width}; change it, or set linear = 'none'"
            yield quantized and width % 16 != 0, "quantize model", text
        convolves = m.use_short_conv and "use_short_conv" in MIXERS[m.mixer].uses.split()
        tokens = t.seq_len // degree + (m.conv_size - 1 if convolves and degree > 1 else 0)
        text = (
            f"{key} with recipe = {self.quantize.recipe!r} sums gradients of weights over tokens, {tokens} a row of a rank, "
            "which is no multiple of 16; set quantize.recipe = 'rowwise_with_gw_hp'"
        )
        yield quantized and self.quantize.recipe != "rowwise_with_gw_hp" and tokens % 16 != 0, "quantize training model", text

        # What cannot be split over ranks along the sequence.
        split, key, halo = degree > 1, f"parallelism.context_parallel_degree = {degree}", m.conv_size - 1
        text = f"{key} does not divide training.seq_len = {t.seq_len}; choose a multiple of {degree} for seq_len"
        yield split and t.seq_len % degree != 0, "parallelism training", text
        text = (
            f"{key} leaves {t.seq_len // degree} of training.seq_len = {t.seq_len} tokens per rank, fewer than the {halo} that "
            f"model.conv_size = {m.conv_size} looks back; lower the degree"
        )
        yield split and convolves and t.seq_len // degree < halo, "parallelism training model", text
        text = f"{key} with model.mixer = {m.mixer!r}: its loop over tokens is not split; set context_parallel_degree = 1"
        yield split and is_loop, "parallelism model", text
        text = f"{key} with data.source = 'state_tracking': its words are judged as whole rows; set context_parallel_degree = 1"
        yield split and made, "parallelism data", text

    @model_validator(mode="after")
    def _sections_agree(self) -> Config:
        refuse([text for broken, _, text in self.rules() if broken])
        return self
