"""What is fuzzed: every reader of files that may come from somewhere else. `harness.fuzz` says what must hold.

Each target changes a valid original, so that most of a case is right and every depth is reached. Where a reader accepts, its
check goes on to use the result as the program would.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from hypothesis import strategies as st

from tests.fuzz.harness import NAMES, Check, Target, mutated_bytes, mutated_json, scalars, values
from titan_dp.config.describe import all_keys, to_toml
from titan_dp.config.load import config_from_toml, load_config
from titan_dp.data.shards import ShardWriter, TokenShards
from titan_dp.data.tokenizer import load_tokenizer
from titan_dp.files import stays_inside

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
    if isinstance(value, float):
        return {float("inf"): "inf", float("-inf"): "-inf"}.get(value, "nan" if value != value else repr(value))
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_as_toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_as_toml, value)) + "]"
    return to_toml(value) if isinstance(value, bool | int | str) else str(value)


_KEYS = (
    st.sampled_from(sorted(all_keys()))
    | st.sampled_from(["extends", "model", "model.mixer.x", "sweep.name", "a.b.c"])
    | st.text(max_size=9)
)
_LITERALS = st.one_of(
    values.map(_as_toml),
    st.sampled_from(
        ['"19B"', '"1e400"', '"' + "9" * 400 + 'T"', "2026-01-01", "0x" + "f" * 5000, "1e400", "[" * 900 + "]" * 900, '"""x"""']
    ),
    st.sampled_from(["1", "2", "8", "0.5", "true", "false", '"auto"', '"reset"', '"a/b"', "[1, 2]", '["model.backend"]']),
)
_OLD = st.sampled_from(sorted(_SETTINGS))
_LIKELY = st.integers(1, 9).map(str) | st.sampled_from(["0.5", "true", "false", '"19B"', '"a/b"', "-1", '"bfloat16"'])
_ONE = st.tuples(_OLD | st.sampled_from(sorted(all_keys())), _LIKELY) | st.tuples(_OLD | _KEYS, _LITERALS)
_CHANGED = st.lists(_ONE, max_size=2).map(lambda changes: _SETTINGS | dict(changes))
_DOTTED = _CHANGED.map(lambda settings: "\n".join(" = ".join(pair) for pair in settings.items()))


def _check_config(config: Any) -> None:
    assert config.job.run_name == "" or stays_inside(config.job.run_name, nested=True)
    assert stays_inside(config.checkpoint.folder, nested=True)
    assert (config.training.steps is None) != (config.training.tokens is None)
    assert config.model.mlp_size > 0
    assert config.model.head_v_dim > 0


def _configs(folder: Path) -> Prepared:
    """A config file and the one that it may extend."""
    base, run = folder / "base.toml", folder / "run.toml"
    names = st.sampled_from(["base.toml", "run.toml", "./base.toml", "../gone.toml", "/dev/zero", "/dev", *NAMES])
    starts = names.map(lambda name: f"extends = {json.dumps(name)}\n".encode()) | st.just(b"")
    texts = st.one_of(_DOTTED, _CHANGED.map(_with_headers), st.text(max_size=60)).map(
        lambda text: text.encode("utf-8", "replace")
    )
    files = st.tuples(starts, st.one_of(texts, mutated_bytes(_CONFIG.encode()), st.binary(max_size=40)))

    def check(case: tuple[tuple[bytes, bytes], tuple[bytes, bytes]]) -> None:
        for path, parts in zip((run, base), case, strict=True):
            path.write_bytes(b"".join(parts))
        loaded = load_config(["--config", str(run)])
        _check_config(loaded.config)
        assert config_from_toml(loaded.resolved_toml()) == loaded.config

    return st.tuples(files, files), check


def _command_lines(folder: Path) -> Prepared:
    (folder / "run.toml").write_text(_CONFIG)
    texts = st.one_of(_LITERALS, st.text(max_size=20), st.sampled_from(NAMES), st.just("1\n[job]\nrun_name = 2"))
    likely = st.sampled_from(["4", "8", "0.5", "true", "name", "-1"])
    one = st.one_of(
        st.tuples(_OLD | _KEYS, likely).map(lambda pair: [f"--{pair[0]}", pair[1]]),
        st.tuples(_KEYS, texts).map(lambda pair: [f"--{pair[0]}", pair[1]]),
        st.tuples(_KEYS, texts).map(lambda pair: [f"--{pair[0]}={pair[1]}"]),
        st.text(max_size=20).map(lambda text: ["--config", text]),
        st.text(max_size=12).map(lambda text: [text]),
    )
    lines = st.lists(one, max_size=3).map(lambda parts: [text for part in parts for text in part])
    lines = lines.filter(lambda argv: not {"--help", "-h"} & set(argv))

    def check(argv: list[str]) -> None:
        _check_config(load_config(["--config", str(folder / "run.toml"), *argv]).config)

    return lines, check


# -- token shards ---------------------------------------------------------------------------------------------------------


def _write_shards(folder: Path) -> None:
    writer = ShardWriter(folder, np.dtype(np.uint16), 40, [])
    rng = np.random.default_rng(0)
    for size in (7, 20, 16, 9, 3, 30):
        writer.add(rng.integers(0, 256, size), int(size))
    facts = {"split": "train", "validation_fraction": 0.0, "adds_bos": True, "adds_eos": True}
    writer.finish(load_tokenizer("bytes"), facts)


def _use_shards(folder: Path) -> None:
    shards = TokenShards(folder)
    out = np.empty(len(shards), np.int64)
    shards.read(0, out)
    for start, stop in ((0, len(shards)), (5, len(shards) - 1), (len(shards) // 2, len(shards))):
        if 0 <= start < stop:
            starts = shards.document_starts(start, stop)
            assert (starts >= 0).all()
            assert (starts < stop - start).all()
            assert (np.diff(starts) > 0).all()
    assert all(len(sentence) < 1500 for sentence in shards.verify())


def _token_manifests(folder: Path) -> Prepared:
    _write_shards(folder)
    path = folder / "manifest.json"
    original = json.loads(path.read_text())
    files = st.sampled_from(["shard-00001.npy", "shard-00001.starts.npy", "manifest.json", *NAMES])

    def check(raw: bytes) -> None:
        path.write_bytes(raw)
        _use_shards(folder)

    return mutated_json(original, values | files), check


def _shard_files(folder: Path) -> Prepared:
    _write_shards(folder)
    originals = {name: (folder / name).read_bytes() for name in ("shard-00000.npy", "shard-00001.starts.npy")}
    cases = st.sampled_from(sorted(originals)).flatmap(
        lambda name: st.tuples(st.just(name), mutated_bytes(originals[name], head=160))
    )

    def check(case: tuple[str, bytes]) -> None:
        name, raw = case
        (folder / name).write_bytes(raw)
        try:
            _use_shards(folder)
        finally:
            (folder / name).write_bytes(originals[name])

    return cases, check


# -- checkpoints ----------------------------------------------------------------------------------------------------------


def _checkpoint_manifests(folder: Path) -> Prepared:
    from tests.pretrained import save_checkpoint
    from titan_dp.checkpoint.changed_settings import check_resumable
    from titan_dp.checkpoint.manifest import read_manifest, size_problems, verify

    checkpoint = save_checkpoint(folder / "run")
    original = json.loads((checkpoint / "manifest.json").read_text())
    current = {key: original[key] for key in ("config", "fingerprint", "global_batch_size")}
    files = st.sampled_from([".metadata", "__0_0.distcp", "manifest.json", *NAMES])

    def signed(raw: bytes) -> bytes:
        """With the checksum that an attacker, who can compute it as well, would give it."""
        try:
            manifest = json.loads(raw)
            rest = {key: value for key, value in manifest.items() if key not in ("format_version", "checksum")}
            digest = xxhash.xxh3_128_hexdigest(json.dumps(rest, sort_keys=True).encode())
            return json.dumps(manifest | {"checksum": digest}).encode()
        except (ValueError, RecursionError, AttributeError, TypeError):
            return raw

    def check(raw: bytes) -> None:
        (checkpoint / "manifest.json").write_bytes(raw)
        manifest = read_manifest(checkpoint)
        assert manifest["step"] >= 0
        check_resumable(manifest, current, [])
        found = [*size_problems(checkpoint), *verify(checkpoint)]
        assert all(len(sentence) < 1500 for sentence in found)

    cases = mutated_json(original, values | files)
    return cases.map(signed) | cases, check


def _checkpoint_indexes(folder: Path) -> Prepared:
    from tests.pretrained import save_checkpoint
    from titan_dp.checkpoint.weights import CheckpointTensors

    checkpoint = save_checkpoint(folder / "run", num_hidden_layers=1)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"] = [entry for entry in manifest["files"] if entry["name"] != ".metadata"]
    del manifest["checksum"]
    (checkpoint / "manifest.json").write_text(json.dumps(manifest | {"format_version": 1}))  # which has no checksum of its own
    index = checkpoint / ".metadata"

    def check(raw: bytes) -> None:
        index.write_bytes(raw)
        tensors = CheckpointTensors(checkpoint)
        assert all(isinstance(name, str) for name in tensors.shapes)
        smallest = min(tensors.shapes, key=lambda name: tensors.shapes[name].numel(), default=None)
        if smallest is not None:
            assert tensors.read([smallest])[smallest].shape == tensors.shapes[smallest]

    return mutated_bytes(index.read_bytes()), check


# -- Hugging Face folders -------------------------------------------------------------------------------------------------


def _exported(folder: Path, target: str, **how: Any) -> Path:
    from tests.pretrained import save_checkpoint
    from titan_dp.inference.hf.export import export
    from titan_dp.inference.pretrained import open_source

    checkpoint = save_checkpoint(
        folder / "run", hidden_size=16, head_dim=8, num_hidden_layers=1, vocab_size=258, attention_layers=[]
    )
    export(open_source(checkpoint), folder / target, target=target, **how)
    return folder / target


def _use_folder(folder: Path) -> None:
    from titan_dp.inference.hf.folder import FolderSource

    source = FolderSource(folder)
    tensors = source.read(source.shapes)
    assert {name: tensor.shape for name, tensor in tensors.items()} == dict(source.shapes)
    assert source.problems() == []


_SOFTMAX = {"layers": [0], "num_heads": 2, "num_kv_heads": 1, "window_size": 8, "rope_theta": 1e4, "qkv_bias": False}


def _hf_configs(folder: Path) -> Prepared:
    folders = [_exported(folder, target) for target in ("fla", "remote-code")]
    originals = [json.loads((each / "config.json").read_text()) for each in folders]
    with_attention = [{**original, "attn": _SOFTMAX} for original in originals]
    pairs = zip([*folders, *folders], [*originals, *with_attention], strict=True)
    cases = st.one_of([st.tuples(st.just(each), mutated_json(original)) for each, original in pairs])

    def check(case: tuple[Path, bytes]) -> None:
        (case[0] / "config.json").write_bytes(case[1])
        _use_folder(case[0])

    return cases, check


def _hf_weights(folder: Path) -> Prepared:
    whole, sharded = _exported(folder, "fla"), _exported(folder / "second", "fla", max_shard_bytes=4000)
    raw = (whole / "model.safetensors").read_bytes()
    size = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:size])
    index, training = sharded / "model.safetensors.index.json", sharded / "training.json"

    def with_header(text: bytes) -> bytes:
        return len(text).to_bytes(8, "little") + text + raw[size:]

    cases = st.one_of(
        st.tuples(st.just(whole / "model.safetensors"), mutated_bytes(raw, head=size)),
        st.tuples(st.just(whole / "model.safetensors"), mutated_json(header).map(with_header)),
        st.tuples(st.just(index), mutated_json(json.loads(index.read_text()), values | st.sampled_from(NAMES))),
        st.tuples(st.just(training), mutated_json(json.loads(training.read_text()))),
    )

    def check(case: tuple[Path, bytes]) -> None:
        path, changed = case
        before = path.read_bytes()
        path.write_bytes(changed)
        try:
            _use_folder(path.parent)
        finally:
            path.write_bytes(before)

    return cases, check


def _tokenizers(folder: Path) -> Prepared:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel()
    made.train_from_iterator(
        ["a word and another word", "12 words"], trainers.BpeTrainer(vocab_size=60, special_tokens=["<s>"], show_progress=False)
    )
    made.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": {"content": "<s>"}, "titan_dp_origin": {"name": "gpt2", "hash": "0" * 64}}
    settings |= {"auto_map": {"AutoTokenizer": ["own.py", None]}, "tokenizer_class": "Own"}
    originals = {"tokenizer.json": json.loads((folder / "tokenizer.json").read_text()), "tokenizer_config.json": settings}
    cases = st.one_of([st.tuples(st.just(name), mutated_json(original)) for name, original in originals.items()])

    def check(case: tuple[str, bytes]) -> None:
        for name, original in originals.items():
            (folder / name).write_bytes(case[1] if name == case[0] else json.dumps(original).encode())
        tokenizer = load_tokenizer(str(folder))
        ids = tokenizer.encode("a word, 12 others <s> é")
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert isinstance(tokenizer.decode(ids), str)
        assert tokenizer.bos_id is None or 0 <= tokenizer.bos_id < tokenizer.vocab_size

    return cases, check


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
    from titan_dp.studies.sweep_file import load_sweep

    path = folder / "study.toml"
    batch = {"training.global_batch_size": "8", "training.local_batch_size": "2", "model.attention_layers": "[]"}
    plain = _with_headers(_SETTINGS | batch).encode()
    whole = plain + _SWEEP
    axes = st.tuples(_KEYS, st.lists(scalars, max_size=3).map(_as_toml)).map(
        lambda pair: f"\n[sweep.axes]\n{json.dumps(pair[0])} = {pair[1]}\n"
    )
    cases = mutated_bytes(whole) | axes.map(lambda text: plain + text.encode("utf-8", "replace"))

    def check(raw: bytes) -> None:
        path.write_bytes(raw)
        sweep = load_sweep(path)
        assert sweep.folder.parts[-1] == sweep.name
        for cell in sweep.cells:
            assert stays_inside(cell.name)
            assert cell.folder.parent == sweep.folder

    return cases, check


def _run_folders(folder: Path) -> Prepared:
    from titan_dp.studies.report.read import STATES, find_runs, read_runs
    from titan_dp.train.run_folder import last_record, last_step

    run = folder / "sweep" / "a"
    run.mkdir(parents=True)
    (run / "config.toml").write_text(_CONFIG)
    facts = {"state": "training", "step": 2, "steps": 9, "tokens_per_step": 64, "parameters": 10, "embedding_parameters": 5}
    facts |= {"flops_per_token": 60, "tokenizer": "bytes", "fingerprint": "0" * 64, "validation_fingerprint": "1" * 64}
    facts |= {"bytes_per_token": 1.0, "device": "cpu", "world_size": 1, "git_commit": "0" * 40}
    records = [
        {"step": step, "loss": 2.5, "tokens_per_second": 10.0, "step_seconds": 0.5, "skipped_steps": 0, "mfu": 0.1, "lr": 1e-3}
        for step in (1, 2)
    ]
    validation = {"step": 2, "validation_loss": 2.4, "validation_bits_per_byte": 1.0, "validation_tokens": 99}
    sweep = {"name": "sweep", "description": "", "cells": [{"name": "a", "identity": "0" * 64, "axes": {"seed": 1}}]}
    lines = [json.dumps(record).encode() for record in [*records, validation]]
    originals = {"a/run.json": json.dumps(facts).encode(), "a/metrics.jsonl": b"\n".join(lines) + b"\n"}
    cases = st.one_of(
        st.tuples(st.just("a/run.json"), mutated_json(facts)),
        st.tuples(st.just("a/metrics.jsonl"), mutated_bytes(originals["a/metrics.jsonl"])),
        st.tuples(
            st.just("a/metrics.jsonl"),
            st.lists(st.sampled_from([*records, validation]).flatmap(mutated_json), max_size=4).map(b"\n".join),
        ),
        st.tuples(st.just("sweep.json"), mutated_json(sweep, values | st.sampled_from(["a", *NAMES]))),
    )

    def check(case: tuple[str, bytes]) -> None:
        (folder / "sweep" / "sweep.json").unlink(missing_ok=True)
        for name, raw in (originals | dict([case])).items():
            (folder / "sweep" / name).write_bytes(raw)
        assert isinstance(last_step(run), int)
        assert isinstance(last_record(run), dict)
        runs = read_runs(find_runs([folder / "sweep"]))
        assert set(runs["state"]) <= set(STATES) - {"not started"}
        assert (runs[["tokens", "step"]] >= 0).all(axis=None)

    return cases, check


TARGETS = {
    target.name: target
    for target in (
        Target("config files", 32, _configs),
        Target("command lines", 12, _command_lines),
        Target("token manifests", 15, _token_manifests),
        Target("token shards", 12, _shard_files),
        Target("checkpoint manifests", 6, _checkpoint_manifests),
        Target("checkpoint indexes", 8, _checkpoint_indexes),
        Target("Hugging Face config.json", 5, _hf_configs),
        Target("Hugging Face weights", 4, _hf_weights),
        Target("tokenizers", 2, _tokenizers),
        Target("sweep files", 2, _sweep_files),
        Target("run folders", 2, _run_folders),
    )
}
