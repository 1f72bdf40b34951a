"""`titan-dp export CHECKPOINT OUT`: a trained model as a Hugging Face folder.

    config.json, generation_config.json       every setting, none left to a default
    model.safetensors, or shards and their index
    tokenizer.json, tokenizer_config.json
    README.md, training.json                  the model card, and the checkpoint's manifest
    modeling_titan_dp.py                      with --format remote-code only

`fla` folders load in flash-linear-attention without code of ours; `remote-code` folders load with torch and transformers
alone and express every model. Weights go tensor by tensor from checkpoint to file, so memory holds a few of them at a time.
The folder is written under another name and renamed: it is there whole or not at all.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titan_dp.errors import UserError
from titan_dp.files import to_json, write_json

if TYPE_CHECKING:
    import torch

    from titan_dp.inference.pretrained import Source

FORMATS = ("fla", "remote-code")
DTYPES = ("float32", "bfloat16", "float16")
_READ_BYTES = 2**26
_CONVERTED_AT_ONCE = 2**22
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="run folder, checkpoint, or exported folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; must not exist")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="fla",
        help="fla: for flash-linear-attention (default); remote-code: any model, torch and transformers suffice",
    )
    parser.add_argument(
        "--model-type",
        choices=("gated_deltaproduct", "gated_deltanet", "delta_net"),
        help="of the fla format (default: gated_deltaproduct; the others are for num_householder = 1)",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the matrices (default: float32, as trained); norms stay float32"
    )
    parser.add_argument("--max-shard-size", type=_size, default=5 * 10**9, help="largest file of weights (default: 5GB)")
    parser.add_argument("--tokenizer", default="", help="use this one instead of the checkpoint's own")


def _size(text: str) -> int:
    match = re.fullmatch(r"([0-9]+)\s*([KMG]B)?", text.strip())
    if not match or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 2GB or 500MB")
    return int(match[1]) * _UNITS[match[2] or ""]


def run(args: argparse.Namespace) -> int:
    import torch
    from rich.console import Console
    from rich.filesize import decimal
    from rich.progress import Progress

    from titan_dp.inference.pretrained import open_source

    source = open_source(args.checkpoint)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("writing", total=len(source.shapes))
        export(
            source,
            args.out,
            target=args.format,
            model_type=args.model_type,
            dtype=getattr(torch, args.dtype),
            max_shard_bytes=args.max_shard_size,
            tokenizer=args.tokenizer,
            written=lambda: progress.advance(task),
        )
    files = sorted(args.out.iterdir())
    for file in files:
        print(f"{decimal(file.stat().st_size):>10}  {file}")
    return 0


def export(
    source: Source,
    out: Path,
    *,
    target: str = "fla",
    model_type: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
    tokenizer: str = "",
    written: Callable[[], object] = lambda: None,
) -> None:
    """Write the model of `source` as the folder `out`.

    Args:
        source: of the weights.
        out: must not exist, or be empty.
        target: "fla" or "remote-code".
        model_type: of the fla target; None for gated_deltaproduct.
        dtype: of the matrices, convolutions and embeddings; None for float32. Norms, A_log and dt_bias are float32.
        max_shard_bytes: a file of weights holds at most so much (or one tensor).
        tokenizer: instead of the source's.
        written: called after each tensor.

    Raises UserError where the source is damaged or a weight not finite, `out` is in use, the format cannot express the model,
    `dtype` cannot hold a weight, or the tokenizer does not fit; then nothing is left behind.
    """
    import torch

    from titan_dp.inference.hf import layout
    from titan_dp.inference.hf.folder import TRAINING

    assert target in FORMATS, target
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already; choose another folder")
    if model_type is not None and target != "fla":
        raise UserError(f"--model-type {model_type} belongs to --format fla; leave it out with --format {target}")
    kind = layout.REMOTE_CODE if target == "remote-code" else model_type or "gated_deltaproduct"
    settings = layout.to_hf(source.config, kind, source.seq_len)
    dtype = dtype or torch.float32
    if problems := source.problems():
        raise UserError(f"{source.path} is damaged: {problems[0]}; take another step of the run")
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        scratch.chmod(0o777 & ~_umask())
        _write_texts(source, scratch, out.name, settings, target, dtype, tokenizer)
        _write_weights(source, scratch, dtype, max_shard_bytes, written)
        write_json(scratch / TRAINING, source.training)
        if target == "remote-code":
            shutil.copyfile(Path(__file__).with_name("modeling_titan_dp.py"), scratch / "modeling_titan_dp.py")
        scratch.rename(out)  # in place of an empty folder, too
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _umask() -> int:
    """What the user's new files are not allowed; mkdtemp would keep the folder from everybody else."""
    umask = os.umask(0)
    os.umask(umask)
    return umask


def _write_texts(
    source: Source, folder: Path, name: str, settings: dict[str, Any], target: str, dtype: torch.dtype, tokenizer: str
) -> None:
    """Tokenizer, config.json, generation_config.json and the model card."""
    from titan_dp.data.tokenizer import load_tokenizer
    from titan_dp.inference.hf.card import last_validation, model_card
    from titan_dp.inference.hf.tokenizer import save_tokenizer
    from titan_dp.inference.pretrained import check_vocabulary
    from titan_dp.train.run_folder import run_of

    original = load_tokenizer(tokenizer or source.tokenizer)
    check_vocabulary(original, source)
    saved = save_tokenizer(original, folder, source.seq_len)
    ids = {"bos_token_id": saved.bos_id, "eos_token_id": saved.eos_id}
    named = str(dtype).removeprefix("torch.")
    # No pad_token_id for the model: fla makes it the embedding's padding_idx, whose row fine-tuning then never changes.
    write_json(folder / "config.json", {**settings, **ids, "pad_token_id": None, "dtype": named})
    generation = {**ids, "pad_token_id": saved.eos_id, "do_sample": True, "temperature": 0.8}
    write_json(folder / "generation_config.json", generation)
    bos = next((token for token, token_id in saved.special_tokens.items() if token_id == saved.bos_id), None)
    run_folder, step = run_of(source.path), source.training.get("step", 0)
    card = model_card(
        name,
        source.config,
        target=target,
        training=source.training,
        dtype=named,
        bos=bos,
        measured=last_validation(run_folder, step) if run_folder else {},
    )
    (folder / "README.md").write_text(card)


def _write_weights(
    source: Source,
    folder: Path,
    dtype: torch.dtype,
    max_shard_bytes: int,
    written: Callable[[], object],
) -> None:
    from titan_dp.inference.hf import layout
    from titan_dp.inference.hf.folder import WEIGHTS

    shards = _plan_shards(source, dtype, max_shard_bytes)
    index: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = WEIGHTS if len(shards) == 1 else f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        _write_safetensors(folder / file, source, names, dtype, written)
        index |= {layout.hf_name(name): file for name in names}
    if len(shards) > 1:
        total = sum(_stored_bytes(source, name, dtype) for name in source.shapes)
        write_json(folder / f"{WEIGHTS}.index.json", {"metadata": {"total_size": total}, "weight_map": index})
    assert set(index) == {layout.hf_name(name) for name in source.shapes}


def _write_safetensors(path: Path, source: Source, names: list[str], dtype: torch.dtype, written: Callable[[], object]) -> None:
    """A file of safetensors, written as it is read: the package's own writer wants all tensors in memory.

    The format: the header's length in 8 bytes, little-endian; the header, JSON, padded to 8 bytes; the tensors' bytes.
    """
    import torch

    from titan_dp.inference.hf import layout
    from titan_dp.inference.pretrained import batches, check_weights, narrowed

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + _stored_bytes(source, name, dtype)
        kind = layout.SAFETENSORS_DTYPES[str(_stored_dtype(name, dtype)).removeprefix("torch.")]
        header[layout.hf_name(name)] = {"dtype": kind, "shape": list(source.shapes[name]), "data_offsets": [start, end]}
    text = to_json(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for batch in batches(source, names, _READ_BYTES):
            tensors = source.read(batch)
            check_weights(tensors, source.path)
            for name in batch:
                for part in tensors.pop(name).contiguous().view(-1).split(_CONVERTED_AT_ONCE):
                    stored = narrowed(part, _stored_dtype(name, dtype), name, source.path)
                    file.write(stored.view(torch.uint8).numpy().data)
                written()


def _plan_shards(source: Source, dtype: torch.dtype, most: int) -> list[list[str]]:
    """Tensor names file by file, in the model's order, at most `most` bytes (or one tensor) each."""
    shards: list[list[str]] = [[]]
    size = 0
    for name in source.shapes:
        each = _stored_bytes(source, name, dtype)
        if shards[-1] and size + each > most:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += each
    return shards


def _stored_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    import torch

    from titan_dp.inference.hf import layout

    return torch.float32 if layout.stays_float32(name) else dtype


def _stored_bytes(source: Source, name: str, dtype: torch.dtype) -> int:
    return source.shapes[name].numel() * _stored_dtype(name, dtype).itemsize
