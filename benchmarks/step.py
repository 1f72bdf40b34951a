"""A whole training step on this device: a Gated DeltaNet here, transformers' OlmoHybrid, and a Transformer of equal size.

    OMP_NUM_THREADS=1 python benchmarks/step.py      prints the table and writes benchmarks/results/step.{md,json}

OlmoHybrid has the same layers as ours (n_h = 1, forget gate, output gate, negative eigenvalues; the last layer is softmax
attention, without which its configuration is refused) on the fallback in torch that it takes without a GPU. The Transformer is
transformers' Llama with an MLP that makes the parameters equal. All take forward, loss, backward, clipping and AdamW for the
same tokens in float32. The last row is one square product again and again until the FLOPs of our matrix products are done: no
model of this size can be faster in float32. The four take turns in one process, and a ratio is the median over the turns.
"""

from __future__ import annotations

import contextlib
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import Report

from titan_dp.cli import dispatch
from titan_dp.config.load import load_config
from titan_dp.data.batch import Batch
from titan_dp.distributed import current_world, distributed
from titan_dp.train.trainer import Trainer

HEADS = 4
SIZES = {  # width, layers, head dimension, MLP, vocabulary, sequences, length
    "1 M": (128, 4, 32, 384, 320, 4, 256),
    "6 M": (256, 4, 64, 768, 4096, 2, 512),
    "22 M": (512, 4, 128, 1408, 8192, 1, 1024),
}
TURNS, LR, MAX_NORM = 15, 1e-3, 1.0


def main() -> None:
    sys.modules["fla"] = None  # type: ignore[assignment]  # or transformers takes its kernels, which need a GPU
    from transformers import LlamaConfig, LlamaForCausalLM, OlmoHybridConfig, OlmoHybridForCausalLM

    report = Report("step", "A training step: Gated DeltaNet here, OlmoHybrid and Llama of transformers", live=True)
    report.command = "OMP_NUM_THREADS=1 python benchmarks/step.py"
    for size, (width, layers, head, mlp, vocabulary, B, T) in SIZES.items():
        tokens = torch.randint(vocabulary, (B, T + 1))
        common: dict[str, Any] = {
            "vocab_size": vocabulary,
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": HEADS,
            "pad_token_id": None,
            "bos_token_id": None,
            "eos_token_id": None,
        }
        linear: dict[str, Any] = {f"linear_num_{name}_heads": HEADS for name in ("key", "value")}
        linear |= {f"linear_{name}_head_dim": head for name in ("key", "value")}
        kinds = ["linear_attention"] * (layers - 1) + ["full_attention"]
        peer = OlmoHybridForCausalLM(OlmoHybridConfig(intermediate_size=mlp, layer_types=kinds, **linear, **common))
        with tempfile.TemporaryDirectory() as folder, ours(Path(folder), size, tokens) as (trainer, step):
            wanted = parameters(trainer.model)
            steps = {"Gated DeltaNet": (wanted, step), "OlmoHybrid": (parameters(peer), step_of(peer, tokens))}
            llama = LlamaForCausalLM(LlamaConfig(intermediate_size=llama_mlp(wanted, width, layers, vocabulary), **common))
            steps["Llama"] = (parameters(llama), step_of(llama, tokens))
            steps["matrix products alone"] = (0, products(trainer.facts.size.matmul * B * T))
            seconds = timed({name: each for name, (_, each) in steps.items()})
        for name, (count, _) in steps.items():
            ratio = statistics.median(other / own for own, other in zip(seconds["Gated DeltaNet"], seconds[name], strict=True))
            report.add(
                {
                    "size": size,
                    "model": name,
                    "parameters": f"{count:,}" if count else "",
                    "tokens": B * T,
                    "ms per step": statistics.median(seconds[name]) * 1e3,
                    "times ours": ratio,
                }
            )
    report.write()


def timed(steps: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds of each step in each turn."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(TURNS + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - start)
    return seconds


@contextlib.contextmanager
def ours(folder: Path, size: str, tokens: torch.Tensor) -> Any:
    """The trainer's model and its step on `tokens`, in one process."""
    width, layers, head, mlp, vocabulary, B, T = SIZES[size]
    (folder / "text.txt").write_text("It was a dark and stormy night. " * 1000)
    settings = {
        "job.dump_folder": folder,
        "data.path": folder / "tokens/train",
        "training.steps": 1000,
        "training.seq_len": T,
        "training.global_batch_size": B,
        "training.local_batch_size": B,
        "model.hidden_size": width,
        "model.num_hidden_layers": layers,
        "model.num_heads": HEADS,
        "model.head_dim": head,
        "model.intermediate_size": mlp,
        "model.vocab_size": vocabulary,
        "model.num_householder": 1,
        "model.use_output_gate": "true",
        "model.tie_word_embeddings": "false",
        "model.attention_layers": f"[{layers - 1}]",
        "optimizer.lr": LR,
        "training.max_norm": MAX_NORM,
        **{f"{section}.enable": "false" for section in ("validation", "checkpoint", "generate")},
    }
    with contextlib.redirect_stdout(io.StringIO()):
        dispatch(["prepare", str(folder / "text.txt"), "--out", str(folder / "tokens"), "--validation-fraction", "0"])
    loaded = load_config(
        ["--config", "debug.toml", *(word for key, value in settings.items() for word in (f"--{key}", str(value)))]
    )
    with distributed(loaded.config.comm):
        trainer = Trainer(loaded, current_world())
        batch: Batch = {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:], "cu_seqlens": None}
        yield trainer, lambda: trainer._train_step([batch])


def products(flops: float) -> Callable[[], object]:
    """Square products of `flops` in all, of a size that stays in the cache."""
    a, out = torch.randn(512, 512), torch.empty(512, 512)

    def step() -> None:
        for _ in range(round(flops / (2 * 512**3))):
            torch.mm(a, a, out=out)

    return step


def step_of(model: torch.nn.Module, tokens: torch.Tensor) -> Callable[[], object]:
    """The same step of a model of transformers."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), fused=True)

    def step() -> None:
        logits = model(tokens[:, :-1]).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()

    return step


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def llama_mlp(wanted: int, width: int, layers: int, vocabulary: int) -> int:
    """The width of the MLP, to 4, that gives a Llama `wanted` parameters."""
    rest = wanted - 2 * vocabulary * width - layers * (4 * width * width + 2 * width) - width
    return round(rest / (3 * width * layers) / 4) * 4


if __name__ == "__main__":
    main()
