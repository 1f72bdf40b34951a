"""What is fuzzed: every reader of files that may come from somewhere else. `harness.fuzz` says what must hold.

Each target changes a valid original, so that most of a case is right and every depth is reached. Where a reader accepts, its
check goes on to use the result as the program would.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from tests.fuzz.harness import NAMES, Check, Target, mutated_bytes, mutated_json, scalars, values
from tests.pretrained import save_checkpoint
from titan_dp.checkpoint.changed_settings import check_changes
from titan_dp.checkpoint.manifest import read_manifest, size_problems, verify, write_manifest
from titan_dp.checkpoint.weights import CheckpointTensors
from titan_dp.config.describe import all_keys, to_toml
from titan_dp.config.load import config_from_toml, load_config
from titan_dp.data.shards import ShardWriter, TokenShards
from titan_dp.data.tokenizer import load_tokenizer
from titan_dp.files import stays_inside
from titan_dp.inference.hf.export import export
from titan_dp.inference.hf.folder import FolderSource
from titan_dp.inference.pretrained import open_source
from titan_dp.studies.report.read import STATES, find_runs, read_runs
from titan_dp.studies.sweep_file import load_sweep
from titan_dp.train.run_folder import identity, last_record, last_step

os.environ["RUST_BACKTRACE"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"  # a tokenizer's name that is changed is not looked for in the Hub

Prepared = tuple[st.SearchStrategy[Any], Check]

# -- configurations -------------------------------------------------------------------------------------------------------

_SETTINGS = {
    "job.run_name": '"name"',
    "model.hidden_size": "128",
    "model.num_heads": "2",
    "model.head_dim": "16",
    "model.num_hidden_layers": "4",
    "model.attention_layers": "[0, 3]",
    "model.vocab_size": "320",
    "training.tokens": '"1M"',
    "training.seq_len": "64",
    "checkpoint.folder": '"checkpoint"',
    "lr_scheduler.warmup_steps": "10",
}


def _with_headers(settings: dict[str, str]) -> str:
    sections: dict[str, list[str]] = {}
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        sections.setdefault(section, []).append(f"{name} = {value}")
    return "\n".join("\n".join([f"[{section}]", *lines]) for section, lines in sections.items()) + "\n"


_CONFIG = _with_headers(_SETTINGS)


def _as_toml(value: Any) -> str:
    """A value as somebody may write it; not all of it is TOML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_as_toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_as_toml, value)) + "]"
    return to_toml(value) if isinstance(value, bool | int | str) else str(value)


_KEYS = st.sampled_from(sorted(all_keys())) | st.sampled_from(["extends", "model.mixer.x", "a.b.c"]) | st.text(max_size=9)
_LIKELY = st.sampled_from('1 2 4 8 0.5 -1 true false name [1,2] "19B" "auto" "a/b" "bfloat16"'.split())
_ODD = st.sampled_from(['"1e400"', '"' + "9" * 400 + 'T"', "2026-01-01", "0x" + "f" * 5000, "[" * 900 + "]" * 900, '"""x"""'])
_SETTING = st.tuples(st.sampled_from(sorted(_SETTINGS)) | _KEYS, _LIKELY | values.map(_as_toml) | _ODD)
_CHANGED = st.lists(_SETTING, max_size=2).map(lambda changes: _SETTINGS | dict(changes))


def _use_config(*arguments: str) -> None:
    loaded = load_config(list(arguments))
    config = loaded.config
    assert config.job.run_name == "" or stays_inside(config.job.run_name, nested=True)
    assert stays_inside(config.checkpoint.folder, nested=True)
    assert (config.training.steps is None) != (config.training.tokens is None)
    assert min(config.model.mlp_size, config.model.head_v_dim) > 0
    assert config_from_toml(loaded.resolved_toml()) == config


def _configs(folder: Path) -> Prepared:
    """A config file and the one that it may extend."""
    base, run = folder / "base.toml", folder / "run.toml"
    names = st.sampled_from(["base.toml", "run.toml", "./base.toml", "../gone.toml", "/dev/zero", "/dev", *NAMES])
    starts = names.map(lambda name: f"extends = {json.dumps(name)}\n".encode()) | st.just(b"")
    dotted = _CHANGED.map(lambda settings: "\n".join(" = ".join(pair) for pair in settings.items()))
    texts = (dotted | _CHANGED.map(_with_headers)).map(lambda text: text.encode("utf-8", "replace"))
    files = st.tuples(starts, texts | mutated_bytes(_CONFIG.encode()) | st.binary(max_size=40)).map(b"".join)

    def check(case: tuple[bytes, bytes]) -> None:
        run.write_bytes(case[0])
        base.write_bytes(case[1])
        _use_config("--config", str(run))

    return st.tuples(files, files), check


def _command_lines(folder: Path) -> Prepared:
    (folder / "run.toml").write_text(_CONFIG)
    texts = _LIKELY | values.map(_as_toml) | st.sampled_from(NAMES) | st.just("1\n[job]\nrun_name = 2")
    keys = st.sampled_from(sorted(_SETTINGS)) | _KEYS
    one = st.one_of(
        st.tuples(keys, texts).map(lambda pair: [f"--{pair[0]}", pair[1]]),
        st.tuples(keys, texts).map(lambda pair: [f"--{pair[0]}={pair[1]}"]),
        st.text(max_size=20).map(lambda text: ["--config", text]),
        st.text(max_size=12).map(lambda text: [text]),
    )
    lines = st.lists(one, max_size=3).map(lambda parts: [text for part in parts for text in part])
    lines = lines.filter(lambda argv: not {"--help", "-h"} & set(argv))
    return lines, lambda argv: _use_config("--config", str(folder / "run.toml"), *argv)


# -- folders ---------------------------------------------------------------------------------------------------------------


def _folder_with(changed: dict[Path, st.SearchStrategy[bytes]], use: Callable[[Path], object]) -> Prepared:
    """Cases in which one of these files is changed and the others are as they were; `use` reads the changed one's folder."""
    originals = {path: path.read_bytes() for path in changed}

    def check(case: tuple[Path, bytes]) -> None:
        path, raw = case
        path.write_bytes(raw)
        try:
            use(path.parent)
        finally:
            path.write_bytes(originals[path])

    return st.one_of([st.tuples(st.just(path), cases) for path, cases in changed.items()]), check


def _json_at(path: Path, alternatives: Any = values) -> st.SearchStrategy[bytes]:
    return mutated_json(json.loads(path.read_text()), alternatives)


def _token_shards(folder: Path) -> Prepared:
    writer = ShardWriter(folder, np.dtype(np.uint16), 40, [])
    rng = np.random.default_rng(0)
    for size in (7, 20, 16, 9, 3, 30):
        writer.add(rng.integers(0, 256, size), int(size))
    facts = {"split": "train", "validation_fraction": 0.0, "adds_bos": True, "adds_eos": True}
    writer.finish(load_tokenizer("bytes"), facts)
    names = st.sampled_from(["shard-00001.npy", "shard-00001.starts.npy", "manifest.json", *NAMES])
    arrays = [folder / "shard-00000.npy", folder / "shard-00001.starts.npy"]
    changed = {path: mutated_bytes(path.read_bytes(), head=160) for path in arrays}
    return _folder_with({folder / "manifest.json": _json_at(folder / "manifest.json", values | names), **changed}, _use_shards)


def _use_shards(folder: Path) -> None:
    shards = TokenShards(folder)
    out = np.empty(len(shards), np.int64)
    shards.read(0, out)
    for start, stop in ((0, len(shards)), (5, len(shards) - 1), (len(shards) // 2, len(shards))):
        if 0 <= start < stop:
            starts = shards.document_starts(start, stop)
            assert ((starts >= 0) & (starts < stop - start)).all()
            assert (np.diff(starts) > 0).all()
    assert all(len(sentence) < 1500 for sentence in shards.verify())


def _checkpoint_manifests(folder: Path) -> Prepared:
    checkpoint = save_checkpoint(folder / "run")
    path = checkpoint / "manifest.json"
    original = json.loads(path.read_text())
    current = {key: original[key] for key in ("config", "fingerprint", "global_batch_size")}

    def signed(raw: bytes) -> bytes:
        """With the checksum that an attacker, who can compute it as well, would give it."""
        try:
            manifest = json.loads(raw)
            rest = {key: value for key, value in manifest.items() if key not in ("format_version", "checksum")}
            digest = xxhash.xxh3_128_hexdigest(json.dumps(rest, sort_keys=True).encode())
            return json.dumps(manifest | {"checksum": digest}).encode()
        except (ValueError, RecursionError, AttributeError, TypeError):
            return raw

    def use(checkpoint: Path) -> None:
        manifest = read_manifest(checkpoint)
        assert manifest["step"] >= 0
        check_changes(manifest, current, [])
        assert all(len(sentence) < 1500 for sentence in [*size_problems(checkpoint), *verify(checkpoint)])

    cases = _json_at(path, values | st.sampled_from([".metadata", "__0_0.distcp", "manifest.json", *NAMES]))
    return _folder_with({path: cases.map(signed) | cases}, use)


def _checkpoint_indexes(folder: Path) -> Prepared:
    checkpoint = save_checkpoint(folder / "run", num_hidden_layers=1)
    manifest = read_manifest(checkpoint)
    write_manifest(checkpoint, manifest, [entry for entry in manifest.pop("files") if entry["name"] != ".metadata"])

    def use(checkpoint: Path) -> None:
        tensors = CheckpointTensors(checkpoint)
        assert all(isinstance(name, str) for name in tensors.shapes)
        smallest = min(tensors.shapes, key=lambda name: tensors.shapes[name].numel(), default=None)
        if smallest is not None:
            assert tensors.read([smallest])[smallest].shape == tensors.shapes[smallest]

    index = checkpoint / ".metadata"
    return _folder_with({index: mutated_bytes(index.read_bytes())}, use)


_SOFTMAX = {"layers": [0], "num_heads": 2, "num_kv_heads": 1, "window_size": 8, "rope_theta": 1e4, "qkv_bias": False}


def _hugging_face_folders(folder: Path) -> Prepared:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "head_dim": 8,
        "num_hidden_layers": 1,
        "vocab_size": 258,
        "attention_layers": [],
    }
    source = open_source(save_checkpoint(folder / "run", **sizes))
    fla, ours, sharded = (folder / name for name in ("fla", "remote-code", "sharded"))
    export(source, fla)
    export(source, ours, target="remote-code")
    export(source, sharded, max_shard_bytes=4000)
    raw = (fla / "model.safetensors").read_bytes()
    size = 8 + int.from_bytes(raw[:8], "little")
    headers = mutated_json(json.loads(raw[8:size])).map(lambda text: len(text).to_bytes(8, "little") + text + raw[size:])
    one_step: dict[str, Any] = {"num_householder": 1, "use_output_gate": True, "norm_eps": 1e-5, "allow_neg_eigval": False}
    own = [folder / name for name in ("olmo-hybrid", "qwen3_5_text")]
    for each in own:
        export(open_source(save_checkpoint(folder / f"{each.name}-run", **sizes, **one_step)), each, target=each.name)
    configs = [each / "config.json" for each in (fla, ours, *own)]
    index, training = sharded / "model.safetensors.index.json", sharded / "training.json"
    changed = {path: _json_at(path) | mutated_json({**json.loads(path.read_text()), "attn": _SOFTMAX}) for path in configs}
    changed |= {fla / "model.safetensors": mutated_bytes(raw, head=size) | headers, training: _json_at(training)}
    return _folder_with({**changed, index: _json_at(index, values | st.sampled_from(NAMES))}, _use_folder)


def _use_folder(folder: Path) -> None:
    source = FolderSource(folder)
    tensors = source.read(source.shapes)
    assert {name: tensor.shape for name, tensor in tensors.items()} == dict(source.shapes)
    assert source.problems() == []


def _tokenizers(folder: Path) -> Prepared:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<s>"], show_progress=False)
    made.train_from_iterator(["a word and another word", "12 words"], trainer)
    settings = {"bos_token": "<s>", "eos_token": {"content": "<s>"}, "titan_dp_origin": {"name": "gpt2", "hash": "0" * 64}}
    settings |= {"auto_map": {"AutoTokenizer": ["own.py", None]}, "tokenizer_class": "Own"}
    files = folder / "tokenizer.json", folder / "tokenizer_config.json"
    made.save(str(files[0]))
    files[1].write_text(json.dumps(settings))

    def use(folder: Path) -> None:
        tokenizer = load_tokenizer(str(folder))
        ids = tokenizer.encode("a word, 12 others <s> é")
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert isinstance(tokenizer.decode(ids), str)
        assert tokenizer.bos_id is None or 0 <= tokenizer.bos_id < tokenizer.vocab_size

    return _folder_with({path: _json_at(path) for path in files}, use)


# -- sweeps and runs ------------------------------------------------------------------------------------------------------

_SWEEP = b"""
[sweep]
name = "study"
match = "intermediate_size"
multiple = 4
[sweep.axes]
num_householder = [1, 2]
seed = [1, 2]
[[sweep.cells]]
name = "a"
use_forget_gate = true
"""


def _sweep_files(folder: Path) -> Prepared:
    path = folder / "study.toml"
    batch = {"training.global_batch_size": "8", "training.local_batch_size": "2", "model.attention_layers": "[]"}
    plain = _with_headers(_SETTINGS | batch).encode()
    path.write_bytes(plain + _SWEEP)
    axes = st.tuples(_KEYS, st.lists(scalars, max_size=3).map(_as_toml)).map(
        lambda pair: f"\n[sweep.axes]\n{json.dumps(pair[0])} = {pair[1]}\n"
    )

    def use(folder: Path) -> None:
        sweep = load_sweep(path)
        assert sweep.folder.parts[-1] == sweep.name
        for cell in sweep.cells:
            assert stays_inside(cell.name)
            assert cell.folder.parent == sweep.folder

    texts = axes.map(lambda text: plain + text.encode("utf-8", "replace"))
    return _folder_with({path: mutated_bytes(path.read_bytes()) | texts}, use)


def _run_folders(folder: Path) -> Prepared:
    run = folder / "sweep" / "a"
    run.mkdir(parents=True)
    (run / "config.toml").write_text(_CONFIG)
    facts = {"state": "training", "step": 2, "steps": 9, "tokens_per_step": 64, "parameters": 10, "embedding_parameters": 5}
    facts |= {"flops_per_token": 60, "tokenizer": "bytes", "fingerprint": "0" * 64, "validation_fingerprint": "1" * 64}
    facts |= {"bytes_per_token": 1.0, "device": "cpu", "world_size": 1, "git_commit": "0" * 40}
    record = {
        "step": 1,
        "loss": 2.5,
        "tokens_per_second": 10.0,
        "step_seconds": 0.5,
        "skipped_steps": 0,
        "mfu": 0.1,
        "lr": 1e-3,
    }
    validation = {"step": 2, "validation_loss": 2.4, "validation_bits_per_byte": 1.0, "validation_tokens": 99}
    cell = {"name": "a", "identity": identity(config_from_toml(_CONFIG)), "axes": {"seed": 1}}
    sweep = {"name": "sweep", "description": "", "cells": [cell]}
    records = [record, record | {"step": 2}, validation]
    metrics, facts_at, sweep_at = run / "metrics.jsonl", run / "run.json", run.parent / "sweep.json"
    metrics.write_text("".join(json.dumps(each) + "\n" for each in records))
    facts_at.write_text(json.dumps(facts))
    sweep_at.write_text(json.dumps(sweep))

    def use(_: Path) -> None:
        assert isinstance(last_step(run), int)
        assert isinstance(last_record(run), dict)
        runs = read_runs(find_runs([run.parent]))
        assert set(runs["state"]) <= set(STATES) - {"not started"}
        assert (runs[["tokens", "step"]] >= 0).all(axis=None)

    lines = st.lists(st.sampled_from(records).flatmap(mutated_json), max_size=4).map(b"\n".join)
    changed = {metrics: mutated_bytes(metrics.read_bytes()) | lines, facts_at: _json_at(facts_at)}
    return _folder_with({**changed, sweep_at: _json_at(sweep_at, values | st.sampled_from(["a", *NAMES]))}, use)


TARGETS = {
    target.name: target
    for target in (
        Target("config files", 32, _configs),
        Target("command lines", 12, _command_lines),
        Target("token shards", 27, _token_shards),
        Target("checkpoint manifests", 6, _checkpoint_manifests),
        Target("checkpoint indexes", 8, _checkpoint_indexes),
        Target("Hugging Face folders", 9, _hugging_face_folders),
        Target("tokenizers", 2, _tokenizers),
        Target("sweep files", 2, _sweep_files),
        Target("run folders", 2, _run_folders),
    )
}
