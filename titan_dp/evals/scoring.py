"""Losses of tokens in sequences of any length, a segment at a time with the state carried.

Every number equals the plain forward's within rounding, whatever the segment. Memory grows with the segment and not with
the sequence, except for ids, losses, and the keys and values that softmax layers without a window keep of all tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from titan_dp.model.transformer import Transformer


def token_losses(model: Transformer, tokens: Tensor, labels: Tensor, segment: int) -> tuple[Tensor, Tensor]:
    """Loss in nats [B, T] float32 of every label, and whether it was the likeliest id [B, T] bool.

    Args:
        tokens: [B, T] int64; each row is one sequence.
        labels: [B, T] int64: the id each position should predict; -100 for none, which gives loss 0 and False.
        segment: tokens of each sequence that go through the model at once.

    Raises RunError if a loss is not finite.
    """
    import torch

    losses, right = zip(*segment_losses(model, tokens, labels, segment), strict=True)
    return torch.cat(losses, 1), torch.cat(right, 1)


def row_losses(
    model: Transformer, rows: Iterable[tuple[Tensor, Tensor]], segment: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`token_losses` of rows of any lengths, each (tokens [T], labels [T]) int64 on the CPU, and the labels [B, longest].

    Rows are padded on the right, where a causal model does not see it, with labels of -100. By default `segment` is all.
    """
    from torch.nn.utils.rnn import pad_sequence

    from titan_dp.model.loss import IGNORE

    device, (tokens, labels) = model.output_weight.device, zip(*rows, strict=True)
    padded = pad_sequence(list(tokens), batch_first=True).to(device)
    wanted = pad_sequence(list(labels), batch_first=True, padding_value=IGNORE).to(device)
    return *token_losses(model, padded, wanted, segment or padded.shape[1]), wanted


def segment_losses(model: Transformer, tokens: Tensor, labels: Tensor, segment: int) -> Iterator[tuple[Tensor, Tensor]]:
    """`token_losses` of one segment after the other."""
    import torch

    from titan_dp.model.loss import check_finite, token_scores

    cache = None
    for piece, wanted in zip(tokens.split(segment, 1), labels.split(segment, 1), strict=True):
        with torch.inference_mode():
            hidden, cache = model.step_hidden(piece, cache)
            scores = token_scores(hidden, model.output_weight, wanted)
        check_finite(scores[0], "the model's losses")
        yield scores


def keeps_all_tokens(model: Transformer) -> bool:
    """Whether a layer's memory of the past grows with it: softmax attention without a window."""
    from titan_dp.model.attention import Attention

    return any(isinstance(block.attn, Attention) and block.attn.window is None for block in model.blocks)
