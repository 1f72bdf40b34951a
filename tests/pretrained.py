"""Trained models without training: a committed checkpoint of random weights, and text to try it on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from titan_dp import config
from titan_dp.checkpoint.manifest import step_folder
from titan_dp.checkpoint.weights import save_model_weights
from titan_dp.cli import dispatch
from titan_dp.config.describe import all_keys
from titan_dp.config.load import Loaded
from titan_dp.data.tokenizer import load_tokenizer
from titan_dp.model.transformer import Transformer, build_model

Make = Callable[..., Path]
"""The fixtures `checkpoint_of` and `export_of`."""
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "vocab_size": 320,
    "initializer_range": 0.2,
    "attention_num_heads": 2,
}


def random_model(seed: int = 0, **changes: object) -> tuple[config.Model, Transformer]:
    """A small model in float32 whose outputs are not nearly uniform; `changes` are keys of [model]."""
    c = config.Model(**(SMALL | changes))
    model = build_model(c)
    model.init_weights(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
    return c, model.eval()


def write_documents(path: Path, texts: list[str]) -> Path:
    """A .jsonl file of documents under the key 'text'."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def bpe(folder: Path, words: str = "the fox the whale the fox", **settings: Any) -> Path:
    """A Hugging Face tokenizer of 262 ids learnt from `words`; `settings` go into tokenizer_config.json. Returns its folder."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = [AddedToken("<s>", special=True), AddedToken("</s>", special=True)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=262, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([words], trainer)
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"} | settings))
    return folder


def save_checkpoint(
    run_folder: Path,
    *,
    seed: int = 0,
    step: int = 7,
    seq_len: int = 64,
    tokenizer: str = "bytes",
    adds_bos: bool | None = None,
    **changes: object,
) -> Path:
    """The checkpoint of `random_model(seed, **changes)` as step `step` of a run; returns its folder."""
    c, model = random_model(seed, **changes)
    settings = config.Config(
        job=config.Job(run_name=run_folder.name), model=c, training=config.Training(steps=step, seq_len=seq_len)
    )
    loaded = Loaded(settings, dict.fromkeys(all_keys(), "test"))
    folder = step_folder(run_folder / "checkpoint", step)
    meta = {
        "step": step,
        "healthy": True,
        "world_size": 1,
        "config": loaded.resolved_toml(),
        "git_commit": "0" * 40,
        "fingerprint": "0" * 64,
        "tokenizer": tokenizer,
        "tokenizer_hash": load_tokenizer(tokenizer).hash,
        "adds_bos": adds_bos,
        "global_batch_size": 8,
        "seed": seed,
        "loader": {"samples": 8 * step},
        "samples": 8 * step,
        "tokens": 8 * step * seq_len,
    }
    save_model_weights(folder, dict(model.state_dict()), meta)
    return folder


def evaluate(kind: str, checkpoint: Path, out: Path, *options: object) -> dict[str, Any]:
    """What `titan-dp evaluate KIND CHECKPOINT --out OUT ...` writes into its JSON file."""
    assert dispatch(["evaluate", kind, str(checkpoint), "--out", str(out), *map(str, options)]) == 0
    (path,) = out.glob("*.json")
    return json.loads(path.read_text())
