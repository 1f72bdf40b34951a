"""Continuing token ids with a model, in a batch: prompts of any lengths, then one token per step for every row.

Each row draws from a generator of its own, so a continuation depends on its prompt, its seed and the settings, and not on
what else is in the batch. Prompts are read in segments, and each step passes the layers' caches on (`Transformer.step`): with
recurrent mixers and windowed attention, time and memory per token do not grow with the length.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from titan_dp.data.tokenizer import Tokenizer
from titan_dp.errors import UserError
from titan_dp.model.loss import not_finite
from titan_dp.model.transformer import Transformer

_BLOCK = 64  # tokens that random numbers are drawn for at once
_SEGMENT = 2048  # tokens of a prompt per forward: a longer prompt takes no more memory for activations
_LOOKS_SPECIAL = re.compile(r"<\|[^<>|\s][^<>|]*\|>")
_UNFINISHED = "\ufffd"
_LONGEST_CHARACTER = 4
"""In UTF-8 bytes. A run of that many broken bytes cannot be the beginning of a character."""
_CONTEXT = 8
"""Ids that are decoded again with each new one."""


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from logits: temperature, then the k likeliest, then the nucleus of probability p."""

    temperature: float = 0.8
    """0 takes the likeliest."""
    top_k: int = 0
    """0 keeps all."""
    top_p: float = 1.0
    """The fewest tokens whose probabilities reach this sum are kept (Holtzman et al. 2020)."""

    def choose(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """One id per row of `logits` [B, V], [B] int64: where the row's number of `uniform` [B], from [0, 1), falls.

        -1 for a row whose logits are not finite. Nothing here waits for the device.
        """
        if self.temperature == 0:
            return logits.argmax(-1).where(logits.isfinite().all(-1), -1)
        # The largest logit becomes 0, so that any temperature above 0 works: quotients can only overflow to probability 0.
        logits = logits.float() - logits.amax(-1, keepdim=True).float()
        probabilities = torch.softmax(logits / max(self.temperature, 1e-30), -1)
        finite = probabilities.isfinite().all(-1)
        ids = None
        if self.top_k or self.top_p < 1:
            # Likeliest ids first; with top_k, sorting only the first k is enough.
            count = min(self.top_k or probabilities.shape[-1], probabilities.shape[-1])
            probabilities, ids = probabilities.topk(count, -1)
            before, total = probabilities.cumsum(-1) - probabilities, probabilities.sum(-1, keepdim=True)
            probabilities = torch.where(before < self.top_p * total, probabilities, 0)
        below = probabilities.cumsum(-1)
        total = below[:, -1:]
        # The first id below which there is more than this; below the total, so that it is an id that may be drawn.
        reached = torch.minimum(uniform[:, None] * total, total.nextafter(torch.zeros_like(total)))
        drawn = torch.searchsorted(below, reached, right=True).clamp_max(probabilities.shape[-1] - 1)
        return (drawn if ids is None else ids.gather(-1, drawn))[:, 0].where(finite, -1)


def encode_prompt(tokenizer: Tokenizer, text: str, *, bos: bool | None = None, raw: bool = False) -> list[int]:
    """Ids of a prompt: BOS first (once; None: if documents begin with it), and the names of special tokens become these tokens
    unless `raw`.

    Raises UserError if the prompt has no tokens, or holds what looks like a special token and is not one of this tokenizer's,
    and if there is no BOS although it is asked for.
    """
    special = {} if raw else tokenizer.special_tokens
    if not raw and (unknown := [token for token in _LOOKS_SPECIAL.findall(text) if token not in special]):
        raise UserError(
            f"the prompt holds {unknown[0]!r}, which is no special token of tokenizer {tokenizer.name!r} "
            f"({', '.join(special) or 'it has none'}); correct it, or take it as ordinary text with --raw-prompt"
        )
    longest_first = sorted(special, key=len, reverse=True)
    pieces = re.split(f"({'|'.join(map(re.escape, longest_first))})", text) if special else [text]
    ids = [i for piece in pieces for i in ([special[piece]] if piece in special else tokenizer.encode(piece))]
    before = tokenizer.beginning(bos)
    if ids[:1] != before:
        ids = before + ids
    if not ids:
        raise UserError(f"the prompt is empty and tokenizer {tokenizer.name!r} begins with no BOS; give a --prompt")
    return ids


def read_prompt(model: Transformer, prompt: list[int], device: torch.device) -> tuple[Tensor, list[Any]]:
    """Logits [1, V] of the token after `prompt`, and the cache; in segments, so memory does not grow with the prompt."""
    assert prompt, "a prompt has at least one token"
    tokens, cache = torch.tensor([prompt], device=device), None
    for segment in tokens.split(_SEGMENT, 1):
        logits, cache = model.step(segment, cache)
    assert cache is not None
    return logits, cache


def _uniform(seeds: Sequence[int], device: torch.device) -> Iterator[Tensor]:
    """Numbers from [0, 1) for one token of each row [B], without end. They are drawn in blocks: one copy for many tokens."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    while True:
        yield from torch.stack([torch.rand(_BLOCK, generator=generator) for generator in generators], 1).to(device)


@torch.inference_mode()
def generate_ids(
    model: Transformer, prompts: list[list[int]], *, sampling: Sampling, seeds: Sequence[int], vocab_size: int
) -> Iterator[list[int]]:
    """In each step the next id of every prompt, without end.

    Args:
        model: in evaluation mode.
        prompts: ids, at least one each.
        sampling: how to choose.
        seeds: one per prompt.
        vocab_size: number of ids that have a token; the model may have more, which are never chosen.
    """
    device = next(model.parameters()).device
    uniform = _uniform(seeds, device)
    parts = [read_prompt(model, prompt, device) for prompt in prompts]
    logits = torch.cat([logits for logits, _ in parts])
    cache = Transformer.join_caches([cache for _, cache in parts])
    del parts
    while True:
        chosen = sampling.choose(logits[:, :vocab_size], next(uniform))
        ids = chosen.tolist()
        if min(ids) < 0:
            raise not_finite("the model's logits")
        yield ids
        logits, cache = model.step(chosen[:, None], cache)


class TextStream:
    """Turns ids into text as they come. A piece is held back while later ids may change it or complete a stop string.

    All pieces together are the decoded continuation, cut before whichever stop string is complete first.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: list[int], stop: Sequence[str] = (), max_tokens: int | None = None
    ) -> None:
        self.tokenizer, self.prompt, self.stop, self.max_tokens = tokenizer, prompt, tuple(stop), max_tokens
        self._ids = prompt[-_CONTEXT:]  # what comes before decides about spaces in some tokenizers
        self._decoded = len(self.tokenizer.decode(self._ids))
        """Characters of the decoded ids that have been taken."""
        self._held = ""
        self.text = ""
        """All pieces so far."""
        self.tokens = 0
        """Ids taken, the end-of-text token included."""
        self.finished: str | None = None
        """Why the text has ended: 'eos', 'stop' or 'length', that is, after `max_tokens`; None while it goes on."""

    def push(self, token: int) -> str:
        """Take an id; returns the text that is now certain, often a word, sometimes nothing."""
        self.tokens += 1
        if token == self.tokenizer.eos_id:
            piece = self.close()
            self.finished = self.finished or "eos"
        else:
            self._ids.append(token)
            piece = self._through_stops(self._certain())
            if not self.finished and self.tokens == self.max_tokens:
                piece += self.close()
                self.finished = self.finished or "length"
        self.text += piece
        return piece

    def _certain(self) -> str:
        """What of the decoded ids has not been taken and will not change."""
        text = self.tokenizer.decode(self._ids)
        unsure = len(text) - len(text.rstrip(_UNFINISHED))  # the last of them may be the beginning of a character
        piece = self._take(text, len(text) - min(unsure, _LONGEST_CHARACTER - 1))
        if not unsure and len(self._ids) > 2 * _CONTEXT:
            self._ids = self._ids[-_CONTEXT:]
            self._decoded = len(self.tokenizer.decode(self._ids))
        return piece

    def close(self) -> str:
        """What was still held back, when generation ends for another reason."""
        text = self.tokenizer.decode(self._ids)
        rest = self._through_stops(self._take(text, len(text)))
        held, self._held = self._held, ""
        return rest + held

    def _take(self, text: str, end: int) -> str:
        """The characters up to `end` that have not been taken."""
        piece = text[self._decoded : max(end, self._decoded)]
        self._decoded = max(end, self._decoded)
        return piece

    def _through_stops(self, piece: str) -> str:
        text = self._held + piece
        found = [(start + len(s), start) for s in self.stop if (start := text.find(s)) >= 0]
        if found:
            self.finished, self._held = "stop", ""
            return text[: min(found)[1]]
        held = max((n for s in self.stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def stream_texts(
    model: Transformer, streams: Sequence[TextStream], sampling: Sampling, seeds: Sequence[int]
) -> Iterator[tuple[int, str]]:
    """Continue the prompts of all `streams` in one batch until each has finished; yields (row, its next piece of text)."""
    prompts, vocab_size = [stream.prompt for stream in streams], streams[0].tokenizer.vocab_size
    for tokens in generate_ids(model, prompts, sampling=sampling, seeds=seeds, vocab_size=vocab_size):
        for row, (stream, token) in enumerate(zip(streams, tokens, strict=True)):
            if not stream.finished:
                yield row, stream.push(token)
        if all(stream.finished for stream in streams):
            return


def continue_text(
    model: Transformer, tokenizer: Tokenizer, prompt: str, *, max_new_tokens: int, sampling: Sampling, seed: int
) -> str:
    """The continuation of one prompt, up to the end-of-text token. Raises UserError as `encode_prompt`."""
    stream = TextStream(tokenizer, encode_prompt(tokenizer, prompt), max_tokens=max_new_tokens)
    return "".join(piece for _, piece in stream_texts(model, [stream], sampling, [seed]))
