"""Fine-tune an exported model with transformers' Trainer: several documents in a row, blocks recomputed in the backward pass.

    titan-dp export outputs/debug my-model --format remote-code
    python examples/fine_tune.py my-model documents.jsonl tuned

documents.jsonl has a line {"text": ...} for each document. A batch is one row in which its documents follow each other;
position ids that begin again at 0 keep them apart, so nothing is padded. Needs transformers 5 and accelerate. `tuned` is a
folder like my-model: `titan-dp generate tuned` and `titan-dp import tuned ...` read it.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorWithFlattening, Trainer, TrainingArguments

from titan_dp.errors import UserError, run_main

MAX_TOKENS = 512  # of a document; the model itself has no largest length


def documents(path: Path, tokenizer: Any) -> list[dict[str, list[int]]]:
    """The token ids of each document, begun and ended as in the model's training."""
    if not path.is_file():
        raise UserError(f'{path} is no file; give one with a line {{"text": ...}} for each document')
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    last = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    found = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            ids = tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f'{path}:{number} is no document; write {{"text": ...}} in each line') from error
        found.append({"input_ids": [*first, *ids, *last][:MAX_TOKENS]})
    return found


def main() -> int:
    if len(sys.argv) not in (4, 5):
        raise UserError("usage: python examples/fine_tune.py MODEL DOCUMENTS.jsonl OUT [STEPS]")
    folder, texts, out = map(Path, sys.argv[1:4])
    if not (folder / "modeling_titan_dp.py").is_file():
        raise UserError(f"{folder} is no folder that `titan-dp export --format remote-code` wrote")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    arguments = TrainingArguments(
        output_dir=str(out / "checkpoints"),
        max_steps=int(sys.argv[4]) if sys.argv[4:] else 100,
        per_device_train_batch_size=8,  # documents in a row
        learning_rate=1e-3,  # a tenth of debug.toml's
        lr_scheduler_type="cosine",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=torch.cuda.is_available(),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
    )
    # Its labels leave out the first token of each document, which no token before it predicts.
    packing = DataCollatorWithFlattening()
    trainer = Trainer(model, arguments, train_dataset=documents(texts, tokenizer), data_collator=packing)
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last, over {len(losses)} steps")
    trainer.save_model(str(out))
    for name in ("tokenizer.json", "tokenizer_config.json"):  # as they were: their hash tells that they fit the weights
        shutil.copyfile(folder / name, out / name)
    print(f"saved in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))  # a wrong path is one sentence and exit code 2
