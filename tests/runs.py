"""Run folders and sweep folders without training: what train.py and `titan-dp sweep` leave behind, with losses made up."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from titan_dp.config.describe import to_toml
from titan_dp.config.load import config_from_toml
from titan_dp.model.size import embedding_parameters, model_size
from titan_dp.train.run_folder import identity

SMALL: dict[str, Any] = {
    "model.hidden_size": 64,
    "model.num_hidden_layers": 2,
    "model.num_heads": 2,
    "model.head_dim": 32,
    "model.intermediate_size": 192,
    "model.vocab_size": 320,
    "training.steps": 100,
    "training.seq_len": 32,
    "training.local_batch_size": 4,
    "training.global_batch_size": 4,
}
RECORDS = 20
"""Step records of a run."""


def config_text(settings: dict[str, Any]) -> str:
    """config.toml of SMALL with `settings`, dotted keys."""
    return "".join(f"{key} = {to_toml(value)}\n" for key, value in (SMALL | settings).items())


def step_record(step: int, loss: float, **values: float) -> dict[str, Any]:
    return {
        "step": step,
        "loss": loss,
        "lr": 3e-4,
        "grad_norm": 0.5,
        "tokens": step * 128,
        "tokens_per_second": 1000.0,
        "tflops_per_device": 0.1,
        "memory_gib": 1.0,
        "data_wait": 0.0,
        "step_seconds": 0.128,
        "skipped_steps": 0,
        **values,
    }


def write_run(
    folder: Path,
    settings: dict[str, Any] | None = None,
    loss: float = 3.0,
    *,
    facts: dict[str, Any] | None = None,
    until: int | None = None,
    records: Iterable[dict[str, Any]] | None = None,
) -> Path:
    """A finished run whose last validation loss is `loss`; returns `folder`.

    Args:
        settings: dotted keys over SMALL.
        facts: entries of run.json other than what follows from the configuration.
        until: the step an unfinished run has reached.
        records: of metrics.jsonl, instead of RECORDS falling training losses and one validation.
    """
    text = config_text(settings or {})
    c = config_from_toml(text)
    steps, tokens_per_step = c.training.steps or 0, 128
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(text)
    size = model_size(c.model, c.training.seq_len)
    run = {
        "state": "finished" if until is None else "training",
        "step": steps if until is None else 0,
        "steps": steps,
        "tokens_per_step": tokens_per_step,
        "parameters": size.parameters,
        "embedding_parameters": embedding_parameters(c.model),
        "flops_per_token": size.flops_per_token,
        "tokenizer": "bytes",
        "fingerprint": "d" * 64,
        "validation_fingerprint": "f" * 64,
        "bytes_per_token": 1.0,
        "device": "a test's CPU",
        "world_size": 1,
        "git_commit": "c" * 40,
        "torch": "2.13",
        **(facts or {}),
    }
    (folder / "run.json").write_text(json.dumps(run))
    if records is None:
        last = until or steps
        at = [last * (i + 1) // RECORDS for i in range(RECORDS)]
        records = [step_record(step, loss + 2 * (1 - step / steps)) for step in at]
        if until is None:
            bits = (
                {"validation_bits_per_byte": loss * 1.4426950408889634 / run["bytes_per_token"]}
                if run["bytes_per_token"]
                else {}
            )
            records.append({"step": steps, "validation_loss": loss, "validation_tokens": 5000, **bits})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def write_sweep(folder: Path, cells: dict[str, dict[str, Any]], **facts: Any) -> Path:
    """A sweep's folder whose `cells` (settings by name) have not started; returns `folder`."""
    entries = []
    for name, settings in cells.items():
        text = config_text(settings)
        (folder / name).mkdir(parents=True)
        (folder / name / "config.toml").write_text(text)
        entries.append({"name": name, "axes": {}, "identity": identity(config_from_toml(text))})
    sweep = {"name": folder.name, "description": "", "file": "sweep.toml", "cells": entries, **facts}
    (folder / "sweep.json").write_text(json.dumps(sweep))
    return folder


def write_study(
    folder: Path,
    loss: Callable[[int, int, int, int], float],
    *,
    n_h: Iterable[int] = (1, 2, 3),
    sizes: Iterable[tuple[int, int]] = ((64, 2), (96, 3), (128, 4)),
    steps: Iterable[int] = (100,),
    seeds: Iterable[int] = (1, 2),
    matched: bool = True,
) -> Path:
    """A finished run for each n_h, size (width, layers), number of steps and seed, its loss given by loss(n_h, N, D, seed).

    `matched` states the parameters and FLOPs of n_h = 1 for every n_h, as a matched study would come close to.
    """
    for width, layers in sizes:
        for n in n_h:
            shape = {"model.hidden_size": width, "model.num_hidden_layers": layers, "model.num_householder": n}
            one = config_from_toml(config_text(shape | ({"model.num_householder": 1} if matched else {})))
            size = model_size(one.model, 32)
            stated = {"parameters": size.parameters, "flops_per_token": size.flops_per_token}
            for count in steps:
                for seed in seeds:
                    settings = {**shape, "training.steps": count, "debug.seed": seed, "data.seed": seed}
                    value = loss(n, size.parameters, count * 128, seed)
                    write_run(folder / f"nh{n}-w{width}-s{count}-{seed}", settings, value, facts=stated)
    return folder
