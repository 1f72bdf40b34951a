"""A remote-code folder is a Hugging Face model like any other: logits, loss, generation, padding, saving, and no code of ours.

Compared with the model the folder was made from; `AutoModelForCausalLM` must reach the same numbers with the folder alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.hf.exported import exported, greedy, tokens
from titan_dp.model.transformer import Transformer

VARIANTS: dict[str, dict[str, Any]] = {
    "DeltaProduct_2": {},
    "DeltaNet, more heads than fit the width": {"num_householder": 1, "num_heads": 3, "norm_eps": 1e-2},
    "Gated DeltaNet": {"num_householder": 1, "use_forget_gate": True},
    "Gated DeltaProduct_3, output gate, expand_v 2, untied": {
        "num_householder": 3,
        "use_forget_gate": True,
        "use_output_gate": True,
        "expand_v": 2.0,
        "tie_word_embeddings": False,
    },
    "DeltaProduct_3, beta in [0, 1], no convolution": {
        "num_householder": 3,
        "allow_neg_eigval": False,
        "use_short_conv": False,
    },
    "narrow values, short convolution": {"expand_v": 0.5, "conv_size": 2},
    "gated linear attention": {"mixer": "gla", "num_householder": 1, "use_forget_gate": True},
    "linear attention, output gate": {"mixer": "gla", "num_householder": 1, "use_output_gate": True},
    "Transformer": {"mixer": "attention"},
    "Transformer, windowed, grouped": {
        "mixer": "attention",
        "attention_num_heads": 4,
        "attention_num_kv_heads": 2,
        "attention_window": 9,
    },
    "hybrid": {"attention_layers": [1], "use_forget_gate": True, "rope_theta": 500.0},
    "hybrid, windowed, grouped": {"attention_layers": [0], "attention_num_kv_heads": 1, "attention_window": 9},
    "hybrid of gated linear attention": {
        "mixer": "gla",
        "num_householder": 1,
        "use_forget_gate": True,
        "attention_layers": [1],
    },
}
HARD = ["Gated DeltaProduct_3, output gate, expand_v 2, untied", "hybrid", "hybrid, windowed, grouped"]


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    return model


@pytest.fixture
def both(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Transformer, Any]:
    ours, folder = exported(tmp_path, VARIANTS[request.param], target="remote-code")
    return ours, load(folder)


every_variant = pytest.mark.parametrize("both", VARIANTS, indirect=True)
hard_variants = pytest.mark.parametrize("both", HARD, indirect=True)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Within 1e-4, where logits are of a size to tell models apart."""
    assert float(expected.detach().std()) > 0.1
    torch.testing.assert_close(actual.detach(), expected.detach(), rtol=1e-4, atol=1e-4)


# -- forward -----------------------------------------------------------------------------------------------------------


@every_variant
def test_logits_are_ours(both: tuple[Transformer, Any]) -> None:
    ours, theirs = both
    ids = tokens(2, 150)  # several chunks, the last cut off
    assert_same(theirs(ids).logits, ours(ids))


@hard_variants
def test_the_loss_is_our_mean_over_labels_that_are_not_ignored(both: tuple[Transformer, Any]) -> None:
    ours, theirs = both
    ids = tokens(2, 40)
    labels = ids.clone()
    labels[0, 5:9] = -100
    wanted = torch.cat([labels[:, 1:], torch.full((2, 1), -100)], 1)
    expected = ours(ids, wanted) / (wanted != -100).sum()
    assert float(theirs(ids, labels=labels).loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_the_loss_of_a_part_of_a_batch_is_divided_by_the_whole_batchs_labels(tmp_path: Path) -> None:
    """transformers' Trainer passes `num_items_in_batch` when it accumulates gradients, and divides no further."""
    _, folder = exported(tmp_path, {}, target="remote-code")
    theirs, ids = load(folder), tokens(2, 40)
    mean, share = theirs(ids, labels=ids).loss.detach(), theirs(ids, labels=ids, num_items_in_batch=4 * 78).loss.detach()
    torch.testing.assert_close(share, mean / 4)


@hard_variants
def test_gradients_are_ours(both: tuple[Transformer, Any]) -> None:
    ours, theirs = both
    ids = tokens(2, 40)
    ours.requires_grad_(True)
    (ours(ids, torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)) / 78).backward()
    theirs(ids, labels=ids).loss.backward()
    found = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        name = name if name.startswith("lm_head") else "model." + name.replace(".forget_gate", "")
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


@every_variant
def test_decoding_in_blocks_with_a_cache_equals_the_parallel_forward(both: tuple[Transformer, Any]) -> None:
    _, theirs = both
    ids, cache, position = tokens(2, 90), None, 0
    with torch.no_grad():
        expected = theirs(ids).logits
        for size in (70, 1, 1, 7, 1, 10):
            out = theirs(ids[:, position : position + size], past_key_values=cache, use_cache=True)
            torch.testing.assert_close(out.logits, expected[:, position : position + size], rtol=1e-4, atol=1e-4)
            cache, position = out.past_key_values, position + size
    assert position == 90


@hard_variants
def test_padded_positions_change_no_logits_of_tokens(both: tuple[Transformer, Any]) -> None:
    _, theirs = both
    ids = tokens(2, 40)
    for pad in (slice(0, 11), slice(33, 40)):
        mask = torch.ones_like(ids)
        mask[1, pad] = 0
        kept = mask[1].bool()
        padded = theirs(ids.where(mask.bool(), 3), attention_mask=mask).logits
        assert_same(padded[0], theirs(ids[:1]).logits[0])
        assert_same(padded[1, kept], theirs(ids[1:, kept]).logits[0])


@every_variant
def test_bfloat16_stays_near_float32_and_keeps_its_float32_islands(both: tuple[Transformer, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    _, theirs = both
    narrow = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", trust_remote_code=True, dtype=torch.bfloat16)
    for name, parameter in narrow.named_parameters():
        island = name.endswith(("norm.weight", "A_log", "dt_bias"))
        assert parameter.dtype == (torch.float32 if island else torch.bfloat16), name
    ids = tokens(2, 70)
    with torch.no_grad():
        expected, actual = theirs(ids, labels=ids).loss, narrow(ids, labels=ids).loss
    assert float(actual) == pytest.approx(float(expected), rel=0.05)


# -- generation --------------------------------------------------------------------------------------------------------


@every_variant
def test_generation_is_the_likeliest_token_of_our_parallel_forward(both: tuple[Transformer, Any]) -> None:
    ours, theirs = both
    prompt = tokens(2, 30)
    written = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False)
    expected = greedy(ours, prompt, 24)
    assert 257 not in expected, "the end of the text: take another seed"
    assert torch.equal(written[:, 30:], expected)


@hard_variants
def test_a_left_padded_prompt_is_continued_as_it_is_without_padding(both: tuple[Transformer, Any]) -> None:
    ours, theirs = both
    prompt, short = tokens(2, 30), 17
    mask = torch.ones_like(prompt)
    mask[1, : 30 - short] = 0
    written = theirs.generate(prompt.where(mask.bool(), 257), attention_mask=mask, max_new_tokens=20, do_sample=False)
    assert torch.equal(written[0, 30:], greedy(ours, prompt[:1], 20)[0])
    assert torch.equal(written[1, 30:], greedy(ours, prompt[1:, 30 - short :], 20)[0])


@hard_variants
def test_a_second_turn_goes_on_from_the_cache_of_the_first(both: tuple[Transformer, Any]) -> None:
    ours, theirs = both
    prompt, more = tokens(1, 20), tokens(1, 5) + 1
    how: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    first = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), return_dict_in_generate=True, **how)
    turn = torch.cat([first.sequences, more], 1)
    written = theirs.generate(turn, attention_mask=torch.ones_like(turn), past_key_values=first.past_key_values, **how)
    assert torch.equal(written[:, turn.shape[1] :], greedy(ours, turn, 6))


@hard_variants
def test_generation_without_a_cache_and_in_beams_works(both: tuple[Transformer, Any]) -> None:
    _, theirs = both
    prompt = tokens(2, 10)
    how: dict[str, Any] = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(theirs.generate(prompt, **how), theirs.generate(prompt, use_cache=False, **how))
    beams = theirs.generate(prompt, num_beams=3, **how)
    assert torch.equal(beams, theirs.generate(prompt, num_beams=3, use_cache=False, **how))


def test_sampling_ends_at_the_tokenizers_end_of_text(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    _, folder = exported(tmp_path, {}, target="remote-code")
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        model.model.norm.weight.zero_()  # every logit is 0; so eos is as likely as any
        inputs = tokenizer(["Call me Ishmael."], return_tensors="pt")
        torch.manual_seed(0)
        written = model.generate(**inputs, max_new_tokens=3000)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 257
    assert written[0, -1] == 257
    assert written.shape[1] < 3000


# -- the folder --------------------------------------------------------------------------------------------------------

ALONE = """
import importlib.abc, json, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("titan_dp", "deltaproduct_kernels", "fla", "tiktoken", "einops", "tests"):
            raise ImportError(name + " is out of reach")

sys.meta_path.insert(0, Refuse())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folders, text, out = json.loads(sys.argv[1])
results = []
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    with torch.no_grad():
        results.append((ids, model(ids).logits, written))
assert not {"titan_dp", "deltaproduct_kernels", "fla"} & set(sys.modules)
torch.save(results, out)
"""


def test_a_folder_needs_torch_and_transformers_alone(tmp_path: Path) -> None:
    models, folders, text = [], [], "It is a way I have of driving off the spleen."
    for i, name in enumerate(HARD):
        ours, folder = exported(tmp_path / str(i), VARIANTS[name], target="remote-code")
        models.append(ours)
        folders.append(str(folder))
    arguments = json.dumps([folders, text, str(tmp_path / "results.pt")])
    environment = {"PATH": "/usr/bin:/bin", "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", ALONE, arguments]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for ours, (ids, logits, written) in zip(models, torch.load(tmp_path / "results.pt"), strict=True):
        assert ids.tolist() == [list(text.encode())]
        assert_same(logits, ours(ids))
        assert torch.equal(written[:, ids.shape[1] :], greedy(ours, ids, 8))


@hard_variants
def test_a_model_saved_by_transformers_loads_again_bit_for_bit(both: tuple[Transformer, Any], tmp_path: Path) -> None:
    _, theirs = both
    theirs.save_pretrained(tmp_path / "saved")
    again, ids = load(tmp_path / "saved"), tokens(2, 40)
    assert torch.equal(again(ids).logits, theirs(ids).logits)


def test_transformers_reads_every_setting_from_config_json(tmp_path: Path) -> None:
    """A key that config.json lacks would be whatever default its reader has."""
    from transformers import AutoConfig

    _, folder = exported(tmp_path, VARIANTS["hybrid, windowed, grouped"], target="remote-code")
    written = json.loads((folder / "config.json").read_text())
    loaded = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    own = set(sys.modules[type(loaded).__module__].DEFAULTS) | {"tie_word_embeddings"}
    assert own <= set(written)
    assert {key: getattr(loaded, key) for key in own} == {key: written[key] for key in own}
