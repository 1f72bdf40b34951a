"""`titan-dp export CHECKPOINT OUT`: a trained model as a Hugging Face folder.

    config.json, generation_config.json       every setting, none left to a default
    model.safetensors, or shards and their index
    tokenizer.json, tokenizer_config.json
    README.md, training.json                  the model card, and the checkpoint's manifest
    modeling_titan_dp.py                      with --format remote-code only

`fla` folders load in flash-linear-attention without code of ours; `remote-code` folders load with torch and transformers
alone and express every model; `olmo-hybrid` and `qwen3_5_text` folders are models of transformers' own, which vLLM serves, and
have n_h = 1.
Weights go tensor by tensor from checkpoint to file, so memory holds a few of them at a time. The folder is written under
another name and renamed: it is there whole or not at all.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from titan_dp.errors import UserError
from titan_dp.files import make_folder, write_json
from titan_dp.output import print_next, print_text, progress

if TYPE_CHECKING:
    import torch

    from titan_dp.data.tokenizer import Tokenizer
    from titan_dp.inference.sources import Source

FORMATS = ("fla", "remote-code", "olmo-hybrid", "qwen3_5_text")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="run folder, checkpoint, or exported folder")
    add("out", type=Path, metavar="OUT", help="folder to write; must not exist")
    add(
        "--format",
        choices=FORMATS,
        default="fla",
        help="fla: for flash-linear-attention (default); remote-code: any model, torch and transformers suffice; olmo-hybrid "
        "and qwen3_5_text: n_h = 1 with an output gate, for transformers and vLLM",
    )
    add(
        "--model-type",
        choices=("gated_deltaproduct", "gated_deltanet", "delta_net"),
        help="of the fla format (default: gated_deltaproduct; the others are for num_householder = 1)",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the matrices (default: float32, as trained); norms stay float32",
    )
    add("--max-shard-size", type=_size, default=5 * 10**9, help="largest file of weights (default: 5GB)")
    add("--tokenizer", default="", help="use this one instead of the checkpoint's own")


def _size(text: str) -> int:
    match = re.fullmatch(r"([0-9]+)\s*([KMG]B)?", text.strip())
    if not match or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 2GB or 500MB")
    return int(match[1]) * _UNITS[match[2] or ""]


def run(args: argparse.Namespace) -> int:
    import torch
    from rich.filesize import decimal

    from titan_dp.inference.pretrained import open_source

    source = open_source(args.checkpoint)
    export(
        source,
        args.out,
        target=args.format,
        model_type=args.model_type,
        dtype=getattr(torch, args.dtype),
        max_shard_bytes=args.max_shard_size,
        tokenizer=args.tokenizer,
    )
    for file in sorted(args.out.iterdir()):
        print(f"{decimal(file.stat().st_size):>10}  {file}")
    remote = ", trust_remote_code=True" if args.format == "remote-code" else ""
    load = f"AutoModelForCausalLM.from_pretrained({str(args.out)!r}{remote})"
    needs = "transformers and flash-linear-attention (import fla)" if args.format == "fla" else "transformers"
    print_text(f"load it with {needs}:", f"  {load}")
    print_next("or write with it", f"titan-dp generate {shlex.quote(str(args.out))} --prompt ...")
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
) -> None:
    """Write the model of `source` as the folder `out`.

    Args:
        source: of the weights.
        out: must not exist, or be empty.
        target: one of FORMATS.
        model_type: of the fla target; None for gated_deltaproduct.
        dtype: of the matrices, convolutions and embeddings; None for float32. Norms, A_log and dt_bias are float32.
        max_shard_bytes: a file of weights holds at most so much (or one tensor).
        tokenizer: instead of the source's.

    Raises UserError if the source is damaged or a weight not finite, `out` is in use, the format cannot express the model,
    `dtype` cannot hold a weight, or the tokenizer does not fit; then nothing is left behind.
    """
    import torch

    from titan_dp.inference.hf import layout
    from titan_dp.inference.hf.card import model_card
    from titan_dp.inference.hf.converted import Converted
    from titan_dp.inference.hf.folder import TRAINING, write_weights

    assert target in FORMATS, target
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already; choose another folder")
    if model_type is not None and target != "fla":
        raise UserError(f"--model-type {model_type} belongs to --format fla; leave it out with --format {target}")
    architecture = next((each for each in layout.ARCHITECTURES.values() if each.target == target), None)
    kind = architecture.model_type if architecture else model_type or "gated_deltaproduct"
    kind = layout.REMOTE_CODE if target == "remote-code" else kind
    settings = layout.to_hf(source.config, kind, source.seq_len)
    dtype = dtype or torch.float32
    named = str(dtype).removeprefix("torch.")
    with progress("checksums compared"):
        problems = source.problems()
    if problems:
        raise UserError(f"{source.path} is damaged: {problems[0]}; take another step of the run")
    out = out.resolve()
    make_folder(out.parent)
    scratch = out.with_name(f".{out.name}.{uuid4().hex[:8]}")
    scratch.mkdir()
    try:
        saved = _write_texts(source, scratch, tokenizer, settings, named)
        (scratch / "README.md").write_text(model_card(out.name, source, target, named, saved))
        converted = Converted(source, architecture) if architecture else None
        with progress("tensors written", len((converted or source).shapes)) as state:
            if converted:
                write_weights(converted, scratch, dtype, max_shard_bytes, state.advance, hf_name=str, wide=converted.wide)
            else:
                write_weights(source, scratch, dtype, max_shard_bytes, state.advance)
        known = {"tokenizer_hash": saved.hash} | ({"tokenizer": tokenizer} if tokenizer else {})
        write_json(scratch / TRAINING, source.training | known)
        if target == "remote-code":
            shutil.copyfile(Path(__file__).with_name("modeling_titan_dp.py"), scratch / "modeling_titan_dp.py")
        scratch.rename(out)  # in place of an empty folder, too
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _write_texts(source: Source, folder: Path, tokenizer: str, settings: dict[str, object], dtype: str) -> Tokenizer:
    """Tokenizer, config.json and generation_config.json; returns the tokenizer as written."""
    from titan_dp.inference.hf.tokenizer import save_tokenizer
    from titan_dp.inference.sources import open_tokenizer

    saved = save_tokenizer(open_tokenizer(source, tokenizer), folder, source.seq_len)
    # With a bos_token_id, transformers begins with it where it is given nothing.
    ids = {"bos_token_id": saved.bos_id if saved.adds_bos else None, "eos_token_id": saved.eos_id}
    # No pad_token_id for the model: fla makes it the embedding's padding_idx, whose row fine-tuning then never changes.
    write_json(folder / "config.json", {**settings, **ids, "pad_token_id": None, "dtype": dtype})
    generation = {**ids, "pad_token_id": saved.eos_id, "do_sample": True, "temperature": 0.8}
    write_json(folder / "generation_config.json", generation)
    return saved
