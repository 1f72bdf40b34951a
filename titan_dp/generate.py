"""Continue a prompt with a trained model: `titan-dp generate outputs/debug/checkpoint/step-00000300 --prompt "The "`.

The model is rebuilt from what the checkpoint itself holds (configuration, tokenizer, weights) in this one process, so
the sample printed at the end of training is also a proof that the checkpoint can be read back. Memory is constant in
the length for recurrent mixers: a step carries each layer's state and convolution tail (`Transformer.step`).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from titan_dp.data.tokenizer import Tokenizer
    from titan_dp.model.transformer import Transformer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, a checkpoint folder or a run folder (newest is taken)")
    parser.add_argument("--prompt", default="The ", help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="tokens to generate at most")
    parser.add_argument("--temperature", type=float, default=0.8, help="softmax temperature; 0 takes the likeliest token")
    parser.add_argument("--seed", type=int, default=42, help="seed of the sampling")


def run(args: argparse.Namespace) -> int:
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load_model(args.checkpoint, device)
    print(args.prompt, end="", flush=True)
    for piece in generate(
        model,
        tokenizer,
        args.prompt,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        seed=args.seed,
    ):
        print(piece, end="", flush=True)
    print()
    return 0


def load_model(path: Path, device: torch.device) -> tuple[Transformer, Tokenizer]:
    """The model of a committed checkpoint, in float32 and evaluation mode, and its tokenizer.

    Raises UserError where `path` holds no committed checkpoint or the tokenizer cannot be had.
    """
    import torch

    from titan_dp.checkpoint import read_manifest, resolve_checkpoint
    from titan_dp.checkpointer import load_model_weights
    from titan_dp.config_loader import config_from_toml
    from titan_dp.data.tokenizer import load_tokenizer
    from titan_dp.model import build_model

    folder = resolve_checkpoint(path)
    manifest = read_manifest(folder)
    with torch.device("meta"):
        model = build_model(config_from_toml(manifest["config"]).model)
    model.to_empty(device=device)
    load_model_weights(folder, model, no_dist=True)
    model.eval()
    return model, load_tokenizer(manifest["tokenizer"])


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> Iterator[str]:
    """Yield the continuation piece by piece, ending at the tokenizer's end-of-text token.

    A piece is held back while its bytes do not yet end a character, so pieces concatenate to valid text.
    """
    import torch

    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    tokens = torch.tensor([start + tokenizer.encode(prompt)], device=device)
    cache, pending = None, []
    with torch.inference_mode():
        for _ in range(max_new_tokens):
            logits, cache = model.step(tokens, cache)
            token = sample(logits[0, : tokenizer.vocab_size], temperature, generator)
            if token == tokenizer.eos_id:
                break
            pending.append(token)
            if not (piece := tokenizer.decode(pending)).endswith("\ufffd") or len(pending) > 8:
                yield piece
                pending = []
            tokens = torch.tensor([[token]], device=device)
    if pending:
        yield tokenizer.decode(pending)


def sample(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> int:
    """One token id from logits [vocab]; temperature 0 takes the likeliest."""
    import torch

    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial(torch.softmax(logits.float() / temperature, -1), 1, generator=generator))
