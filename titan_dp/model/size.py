"""How large a model is, from its configuration alone: parameters, model FLOPs per token, recurrent state.

Plain arithmetic, without torch and exact: tests hold the counts against real models' tensors and torch's own FLOP counter.
The trainer's MFU, the dry run, matching and sweeps all count with this file; a mixer's own part is its record's
(config/mixers.py, which states the convention). The output matrix counts, tied or not, the embedding lookup does not.
Left out is what depends on how a model is run: activations, and the extra FLOPs of recomputation and of chunked algorithms,
which are executed but not the model's. MFU uses the latter.
"""

from __future__ import annotations

from titan_dp import config
from titan_dp.config.mixers import MIXERS, Counts


def model_size(c: config.Model, seq_len: int) -> Counts:
    """The whole model; `seq_len` matters to softmax attention alone."""
    D, embedding = c.hidden_size, embedding_parameters(c)
    total = Counts(parameters=embedding + D)  # and the final norm
    total += Counts(0 if c.tie_word_embeddings else embedding, matmul=6 * embedding)
    total += (Counts(2 * D) + Counts.of_matrices(3 * D * c.mlp_size)) * c.num_hidden_layers  # two norms and a SwiGLU per block
    for mixer, layers in c.mixers().items():
        total += MIXERS[mixer].counts(c, seq_len) * layers
    return total


def embedding_parameters(c: config.Model) -> int:
    return c.vocab_size * c.hidden_size


def state_size(c: config.Model) -> int:
    """Numbers in the recurrent state of one layer, H dk dv; 0 for a model of softmax attention alone."""
    return MIXERS[c.mixer].state_size(c)
