"""`titan-dp import FOLDER OUT`: the weights of a Hugging Face folder as a checkpoint a run can start from.

Reads flash-linear-attention's gated_deltaproduct, gated_deltanet and delta_net, the layout in which the paper's authors
released theirs (one projection per Householder step), our own, and transformers' own as far as the export writes them. The
checkpoint holds weights alone; a run loads them with `checkpoint.initial_load_path = "OUT"` and the [model] section printed
here.
"""

from __future__ import annotations

import argparse
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titan_dp.errors import UserError

if TYPE_CHECKING:
    from titan_dp.data.tokenizer import Tokenizer
    from titan_dp.inference.hf.folder import FolderSource


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="Hugging Face folder of a DeltaProduct or DeltaNet model")
    parser.add_argument("out", type=Path, metavar="OUT", help="run folder to write; must not exist")
    parser.add_argument("--tokenizer", default="", help="name of the tokenizer, if the folder has none")


def run(args: argparse.Namespace) -> int:
    from titan_dp.config.describe import to_toml
    from titan_dp.inference.hf.folder import FolderSource
    from titan_dp.output import print_text

    source = FolderSource(args.folder)
    checkpoint = import_folder(source, args.out, tokenizer=args.tokenizer)
    for assumed in source.assumed:
        print(f"config.json is silent about {assumed}, flash-linear-attention's default; check that the model was trained so")
    print_text(f"{checkpoint}: {sum(shape.numel() for shape in source.shapes.values()):,} parameters; train on from it with")
    print()
    print(f"[checkpoint]\ninitial_load_path = {str(checkpoint)!r}\n\n[model]")
    for key, value in source.config.model_dump(exclude={"backend"}, exclude_none=True).items():
        print(f"{key} = {to_toml(value)}")
    return 0


def import_folder(source: FolderSource, out: Path, *, tokenizer: str = "") -> Path:
    """Write `out`/checkpoint/step-00000000 from a Hugging Face folder; returns that checkpoint.

    Args:
        source: of the weights.
        out: run folder; must not exist.
        tokenizer: for `load_tokenizer`; default: what the folder's was made from, or the folder's own.

    Raises UserError if the tokenizer is missing, not what was exported or too large for the model, a weight is not finite or
    too large for float32, or `out` is in use; then nothing is left behind.
    """
    import torch

    from titan_dp.checkpoint.folder import delete_checkpoint
    from titan_dp.checkpoint.manifest import step_folder
    from titan_dp.checkpoint.weights import save_model_weights
    from titan_dp.inference.sources import narrowed, open_tokenizer

    if out.exists():
        raise UserError(f"{out} exists already; choose another run folder")
    opened = open_tokenizer(source, tokenizer)
    name = tokenizer or _tokenizer_name(source, opened)
    checkpoint = step_folder(out / "checkpoint", 0)
    tensors: dict[str, torch.Tensor] = {}
    for batch in source.batches(source.shapes, 2**28):
        tensors |= batch
        for tensor_name, tensor in batch.items():
            narrowed(tensor, torch.float32, tensor_name, source.path)  # as a run will hold it
    try:
        save_model_weights(checkpoint, tensors, _manifest(source, name, opened.hash))
    except BaseException:
        with suppress(OSError):  # what somebody else has meanwhile put there stays
            delete_checkpoint(checkpoint)
            checkpoint.parent.rmdir()
            out.rmdir()
        raise
    return checkpoint


def _tokenizer_name(source: FolderSource, own: Tokenizer) -> str:
    """The tokenizer an export was made with, if it is still to be had; else the folder's `own`."""
    from titan_dp.data.tokenizer import load_tokenizer

    if origin := source.tokenizer_origin:
        with suppress(UserError):  # it cannot be had here, and the exported one does as well
            if load_tokenizer(origin["name"]).has_hash(own.hash):
                return origin["name"]
    return str(Path(source.tokenizer).resolve())


def _manifest(source: FolderSource, tokenizer: str, tokenizer_hash: str) -> dict[str, Any]:
    """What the checkpoint's manifest holds beside its list of files."""
    from titan_dp import config
    from titan_dp.config.describe import all_keys
    from titan_dp.config.load import Loaded

    settings = config.Config(
        job=config.Job(run_name=source.label),
        model=source.config,
        training=config.Training(steps=1, seq_len=source.seq_len),
    )
    return {
        "step": 0,
        "healthy": True,
        "world_size": 1,
        "config": Loaded(settings, dict.fromkeys(all_keys(), "import")).resolved_toml(),
        "git_commit": source.training.get("git_commit", ""),
        "fingerprint": "",
        "tokenizer": tokenizer,
        "tokenizer_hash": tokenizer_hash,
        "adds_bos": source.training.get("adds_bos"),
        "global_batch_size": 1,
        "seed": 0,
        "loader": {"samples": 0},
        "samples": 0,
        "tokens": source.training.get("tokens", 0),
        "imported_from": source.identity,
    }
