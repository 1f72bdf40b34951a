"""A remote-code folder is a Hugging Face model like any other, for all who call it, and needs no code of ours.

What it computes is compared with the model in memory that the folder was made from. What cannot be had is refused in one
sentence: an argument that would change the result is never ignored.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from deltaproduct_kernels import gated_delta_product
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer, CompileConfig, DynamicCache, StaticCache
from transformers.cache_utils import Cache, DynamicLayer

from tests.hf import exported
from tests.hf.exported import VARIANTS, assert_same, greedy, tokens
from tests.kernels.helpers import error
from tests.pretrained import Make, random_model
from titan_dp.inference.hf.modeling_titan_dp import DEFAULTS, delta_product
from titan_dp.model.transformer import Transformer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),  # its name in transformers 4
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd"),
]
HARD = ["hybrid, untied", "hybrid, windowed, grouped"]
LENGTHS = (70, 1, 2, 40)  # of documents: longer than a chunk, shorter than a convolution
ROW = tokens(2, 8)


def load(folder: Path, **how: Any) -> Any:
    return exported.load(folder, trust_remote_code=True, **how)


@pytest.fixture(scope="module")
def folder_of(export_of: Make) -> Callable[[str], Path]:
    return lambda name: export_of(VARIANTS[name], target="remote-code")


@pytest.fixture(scope="module")
def loaded(folder_of: Callable[[str], Path]) -> dict[str, Any]:
    """Every variant in transformers, to be used and not changed."""
    return {name: load(folder_of(name)) for name in VARIANTS}


@pytest.fixture(params=HARD)
def hard(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def ours(hard: str) -> Transformer:
    """The model in memory; in transformers it is `theirs`, or `fresh` if it is to be changed."""
    return random_model(**VARIANTS[hard])[1]


@pytest.fixture
def theirs(hard: str, loaded: dict[str, Any]) -> Any:
    return loaded[hard]


@pytest.fixture
def fresh(hard: str, folder_of: Callable[[str], Path]) -> Any:
    return load(folder_of(hard))


@pytest.fixture
def one(loaded: dict[str, Any]) -> Any:
    """One of them, for what does not depend on the layers."""
    return loaded[HARD[0]]


@pytest.fixture
def folder(folder_of: Callable[[str], Path]) -> Path:
    return folder_of(HARD[0])


@pytest.fixture(autouse=True)
def _no_gradients(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch.set_grad_enabled("gradients" in request.node.name or "trains" in request.node.name):
        yield


# -- every variant -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_ours_at_once_and_in_blocks_with_a_cache(name: str, loaded: dict[str, Any]) -> None:
    ids, cache, blocks = tokens(2, 150), None, []  # several chunks, the last cut off
    expected = random_model(**VARIANTS[name])[1](ids)
    assert_same(loaded[name](ids).logits, expected)
    for block in ids.split([70, 1, 1, 7, 1, 70], 1):
        out = loaded[name](block, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        blocks.append(out.logits)
    assert_same(torch.cat(blocks, 1), expected)


@pytest.mark.parametrize("name", HARD)
def test_bfloat16_stays_near_float32_and_keeps_its_float32_islands(
    name: str, loaded: dict[str, Any], folder_of: Callable[[str], Path]
) -> None:
    narrow, ids = load(folder_of(name), dtype=torch.bfloat16), tokens(2, 70)
    for parameter_name, parameter in narrow.named_parameters():
        island = parameter_name.endswith(("norm.weight", "A_log", "dt_bias"))
        assert parameter.dtype == (torch.float32 if island else torch.bfloat16), parameter_name
    expected, actual = loaded[name](ids, labels=ids).loss, narrow(ids, labels=ids).loss
    assert float(actual) == pytest.approx(float(expected), rel=0.05)


def test_the_loss_and_its_gradients_are_ours(ours: Transformer, fresh: Any) -> None:
    """The mean over labels that are not ignored; or over the whole batch's, if transformers' Trainer gives their number."""
    ids = tokens(2, 40)
    labels = ids.clone()
    labels[0, 5:9] = -100
    wanted = torch.cat([labels[:, 1:], torch.full((2, 1), -100)], 1)
    ours.requires_grad_(True)
    expected = ours(ids, wanted).loss / (wanted != -100).sum()
    expected.backward()
    loss = fresh(ids, labels=labels).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    found = {name: p.grad for name, p in fresh.named_parameters()}
    for name, parameter in ours.named_parameters():
        name = name if name.startswith("lm_head") else "model." + name.replace(".forget_gate", "")
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)
    part = fresh(ids, labels=labels, num_items_in_batch=4 * int((wanted != -100).sum())).loss
    torch.testing.assert_close(part, expected / 4)


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

folder, text, out = json.loads(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
assert not {"titan_dp", "deltaproduct_kernels", "fla"} & set(sys.modules)
torch.save((ids, model(ids).logits.detach(), written), out)
"""


def test_a_folder_needs_torch_and_transformers_alone(folder: Path, tmp_path: Path) -> None:
    text = "It is a way I have of driving off the spleen."
    arguments = json.dumps([str(folder), text, str(tmp_path / "results.pt")])
    environment = {"PATH": "/usr/bin:/bin", "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", ALONE, arguments]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    ids, logits, written = torch.load(tmp_path / "results.pt")
    ours = random_model(**VARIANTS[HARD[0]])[1]
    assert ids.tolist() == [list(text.encode())]
    assert_same(logits, ours(ids))
    assert torch.equal(written[:, ids.shape[1] :], greedy(ours, ids, 8))


def test_a_model_saved_by_transformers_loads_again_bit_for_bit(one: Any, tmp_path: Path) -> None:
    one.save_pretrained(tmp_path / "saved")
    assert torch.equal(load(tmp_path / "saved")(ROW).logits, one(ROW).logits)


def test_transformers_reads_every_setting_from_config_json(folder_of: Callable[[str], Path]) -> None:
    """A key that config.json lacks would be whatever default its reader has."""
    folder = folder_of("hybrid, windowed, grouped")
    written = json.loads((folder / "config.json").read_text())
    read = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    keys = [*DEFAULTS, "tie_word_embeddings"]
    assert {key: getattr(read, key) for key in keys} == {key: written[key] for key in keys}


def test_sampling_ends_at_the_tokenizers_end_of_text(folder: Path) -> None:
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model.model.norm.weight.zero_()  # every logit is 0; so eos is as likely as any
    torch.manual_seed(0)
    written = model.generate(**tokenizer(["Call me Ishmael."], return_tensors="pt"), max_new_tokens=3000)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 257
    assert written[0, -1] == 257
    assert written.shape[1] < 3000


def test_generation_in_beams_is_that_without_a_cache(ours: Transformer, theirs: Any) -> None:
    prompt = tokens(2, 10)
    how: dict[str, Any] = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 8, "do_sample": False, "num_beams": 3}
    assert torch.equal(theirs.generate(prompt, **how), theirs.generate(prompt, use_cache=False, **how))


# -- packed rows -------------------------------------------------------------------------------------------------------

BOUNDARIES = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
NUMBERS = torch.cat([torch.full((length,), i + 1) for i, length in enumerate(LENGTHS)])[None]
PACKED: dict[str, dict[str, Any]] = {
    "position_ids": {"position_ids": torch.cat([torch.arange(length) for length in LENGTHS])[None]},
    "cu_seqlens": {"cu_seqlens": BOUNDARIES},
    "cu_seq_lens_q": {"cu_seq_lens_q": BOUNDARIES, "cu_seq_lens_k": BOUNDARIES, "max_length_q": 70, "max_length_k": 70},
    "seq_idx": {"seq_idx": NUMBERS - 1},
    "numbers in attention_mask": {"attention_mask": NUMBERS},
}


def alone(ours: Transformer, row: Tensor) -> Tensor:
    """Logits [1, T, V] of the documents of a packed row, each by itself."""
    return torch.cat([ours(document) for document in row.split(LENGTHS, 1)], 1)


@pytest.mark.parametrize("how", PACKED)
def test_documents_packed_into_a_row_see_nothing_of_each_other(how: str, ours: Transformer, theirs: Any) -> None:
    """The first token of a document is predicted from nothing: its label does not count in the loss, as in training."""
    row = tokens(1, sum(LENGTHS))
    out, expected = theirs(row, labels=row, **PACKED[how]), alone(ours, row)
    assert_same(out.logits, expected)
    scored = zip(expected.split(LENGTHS, 1), row.split(LENGTHS, 1), strict=True)
    losses = [torch.nn.functional.cross_entropy(x[0, :-1], document[0, 1:], reduction="sum") for x, document in scored]
    torch.testing.assert_close(out.loss, sum(losses) / (sum(LENGTHS) - len(LENGTHS)))


def test_packed_rows_of_a_batch_may_be_padded_anywhere(ours: Transformer, theirs: Any) -> None:
    mask = torch.zeros(2, sum(LENGTHS) + 12, dtype=torch.long)
    mask[0, :-12], mask[1, 5:-7] = NUMBERS, NUMBERS
    ids = tokens(*mask.shape)
    logits = theirs(ids, attention_mask=mask).logits
    for row in range(2):
        real = mask[row] > 0
        assert_same(logits[row, real], alone(ours, ids[row : row + 1, real])[0])


@pytest.mark.parametrize("how", ["position_ids", "numbers in attention_mask"])
def test_a_packed_row_read_in_parts_with_a_cache_is_the_row_read_at_once(how: str, ours: Transformer, theirs: Any) -> None:
    row, cache, logits, start = tokens(1, sum(LENGTHS)), DynamicCache(), [], 0
    for size in (30, 40, 1, 1, 11, 30):  # a part ends where a document does, and one begins inside the next
        end = start + size
        given = {key: value[:, start if key == "position_ids" else 0 : end] for key, value in PACKED[how].items()}
        logits.append(theirs(row[:, start:end], past_key_values=cache, **given).logits)
        start = end
    assert start == sum(LENGTHS)
    assert_same(torch.cat(logits, 1), alone(ours, row))


# -- padding -----------------------------------------------------------------------------------------------------------

PADDED = {"left": [(0, 0), (9, 0)], "right": [(0, 0), (0, 9)], "both": [(2, 3), (7, 5)]}


def padded(ids: Tensor, padding: list[tuple[int, int]]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """ids [B, T] with some columns of each row masked: (ids, attention_mask, the tokens of each row)."""
    mask = torch.ones_like(ids)
    for row, (left, right) in enumerate(padding):
        mask[row, :left], mask[row, ids.shape[1] - right :] = 0, 0
    return ids.where(mask > 0, 257), mask, [ids[row, mask[row] > 0][None] for row in range(len(ids))]


@pytest.mark.parametrize(("side", "counted"), [("left", ""), ("right", "tokens"), ("both", "columns")])
def test_a_cache_goes_on_after_padding_as_without_it(side: str, counted: str, ours: Transformer, theirs: Any) -> None:
    """Positions may be left out, or count the padding, or not."""
    ids, mask, rows = padded(tokens(2, 24), PADDED[side])
    cache, more, end = DynamicCache(), tokens(2, 30)[:, 15:], 24
    mask = torch.cat([mask, torch.ones_like(more)], 1)
    positions = mask.cumsum(1) - 1 if counted == "tokens" else torch.arange(39).expand(2, 39)
    theirs(ids, attention_mask=mask[:, :24], position_ids=positions[:, :24] if counted else None, past_key_values=cache)
    for part in more.split([1, 14], 1):  # the second is longer than a window
        here, end = slice(end, end + part.shape[1]), end + part.shape[1]
        rows = [torch.cat([row, part[i : i + 1]], 1) for i, row in enumerate(rows)]
        given = {"position_ids": positions[:, here]} if counted else {}
        logits = theirs(part, attention_mask=mask[:, :end], past_key_values=cache, **given).logits
        for i, row in enumerate(rows):
            assert_same(logits[i], ours(row)[0, -part.shape[1] :])


def test_a_padded_prompt_is_continued_as_without_padding(ours: Transformer, theirs: Any) -> None:
    ids, mask, rows = padded(tokens(2, 24), PADDED["both"])
    written = theirs.generate(ids, attention_mask=mask, max_new_tokens=14, do_sample=False)
    for i, row in enumerate(rows):
        assert torch.equal(written[i, 24:], greedy(ours, row, 14)[0])


# -- what is refused ---------------------------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"attention_mask": torch.ones(2, 1, 8, 8)}, "attention_mask has shape .2, 1, 8, 8."),
    ({"attention_mask": torch.zeros(2, 8) - 1e9}, "attention_mask has shape"),
    ({"attention_mask": torch.ones(2, 7)}, "attention_mask has shape .2, 7."),
    ({"attention_mask": {"full_attention": None}}, "attention_mask is a dict"),
    ({"position_ids": torch.tensor([[0, 1, 2, 3, 9, 10, 11, 12]])}, "position_ids jump to 9"),
    ({"cu_seqlens": torch.tensor([0, 8, 16])}, "cu_seqlens 0 to 16 for 2 rows of 8"),
    ({"cu_seqlens": torch.tensor([0, 8]), "cu_seq_lens_k": torch.tensor([0, 4, 8])}, "cu_seq_lens_q and cu_seq_lens_k differ"),
    ({"cu_seqlens": torch.tensor([0, 8, 5, 8])}, "cu_seqlens has to be .* ascending"),
    ({"cu_seq_lens_q": [0, 8]}, "cu_seqlens has to be a tensor"),
    ({"output_attentions": True}, "output_attentions: a titan_dp model has no attention matrices"),
    ({"is_causal": False}, "is_causal = False"),
    ({"token_type_ids": torch.ones(2, 8, dtype=torch.long)}, "token_type_ids"),
    ({"cache_position": torch.arange(3, 11)}, "cache_position begins at 3, but the cache holds 0"),
    ({"head_mask": torch.ones(2, 2)}, "does not know the argument head_mask"),
    ({"inputs_embeds": torch.zeros(2, 8, 32)}, "either input_ids or inputs_embeds"),
    ({"past_key_values": ((torch.zeros(2, 2, 3, 16),) * 2,) * 2}, "is a tuple.*pass DynamicCache()"),
]


@pytest.mark.parametrize(("arguments", "match"), REFUSED, ids=[match for _, match in REFUSED])
def test_an_argument_that_would_have_to_be_ignored_is_refused(arguments: dict[str, Any], match: str, one: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^[^\n]*{match}[^\n]*$"):
        one(ROW, **arguments)


def test_arguments_that_change_nothing_are_taken(one: Any) -> None:
    nothing = {"token_type_ids": torch.zeros_like(ROW), "output_attentions": False, "head_mask": None, "is_causal": True}
    positions = {"position_ids": torch.arange(8)[None], "cache_position": torch.arange(8), "attention_mask": torch.ones(2, 8)}
    assert torch.equal(one(ROW, **nothing, **positions).logits, one(ROW).logits)


def test_a_past_that_a_mask_would_hide_afterwards_is_refused(one: Any) -> None:
    cache, mask = DynamicCache(), torch.ones(2, 9)
    one(ROW, past_key_values=cache)
    mask[1, 3] = 0
    with pytest.raises(ValueError, match="attention_mask differs from what it was"):
        one(ROW[:, :1], attention_mask=mask, past_key_values=cache)


# -- caches ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("made_from", ["nothing", "the configuration"])
def test_generation_fills_a_callers_cache_and_goes_on_from_it(made_from: str, ours: Transformer, theirs: Any) -> None:
    prompt, cache = tokens(2, 20), DynamicCache(config=theirs.config) if "config" in made_from else DynamicCache()
    written = theirs.generate(prompt, past_key_values=cache, max_new_tokens=6, do_sample=False)
    assert torch.equal(written[:, 20:], greedy(ours, prompt, 6))
    assert cache.get_seq_length() == 25
    longer = theirs.generate(written, past_key_values=cache, max_new_tokens=6, do_sample=False)
    assert torch.equal(longer[:, 26:], greedy(ours, written, 6))


def test_the_cache_goes_by_its_newer_name_too(ours: Transformer, theirs: Any) -> None:
    ids, cache = tokens(2, 24), DynamicCache()
    theirs(ids[:, :20], cache=cache)
    assert_same(theirs(ids[:, 20:], cache=cache).logits, ours(ids)[:, 20:])


@pytest.mark.parametrize("kind", ["static", "offloaded"])
def test_generation_with_any_kind_of_cache_of_the_library_writes_the_same(kind: str, ours: Transformer, theirs: Any) -> None:
    prompt = tokens(2, 20)
    written = theirs.generate(prompt, cache_implementation=kind, max_new_tokens=6, do_sample=False)
    assert torch.equal(written[:, 20:], greedy(ours, prompt, 6))


STATIC = ["Gated DeltaProduct_3, output gate, expand_v 2, untied", *HARD]


@pytest.mark.parametrize("name", STATIC)
def test_a_step_on_a_static_cache_is_one_graph_for_prompts_of_any_length(name: str, loaded: dict[str, Any]) -> None:
    model, ours = loaded[name], random_model(**VARIANTS[name])[1]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    how = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    how._compile_all_devices = True  # not on GPUs alone
    for prompt in (tokens(2, 20), tokens(2, 9)):
        compiled = {"cache_implementation": "static", "compile_config": how}
        written = model.generate(prompt, max_new_tokens=5, do_sample=False, **compiled)
        assert torch.equal(written[:, prompt.shape[1] :], greedy(ours, prompt, 5))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("name", STATIC)
def test_a_forward_without_padding_is_one_graph(name: str, loaded: dict[str, Any]) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(loaded[name], fullgraph=True, backend="aot_eager")
    assert_same(compiled(ROW, use_cache=False).logits, random_model(**VARIANTS[name])[1](ROW))


@pytest.mark.parametrize("name", STATIC)
@torch.no_grad()
def test_a_static_cache_keeps_its_tensors_and_goes_on_after_padding(name: str, loaded: dict[str, Any]) -> None:
    """A row of 20 and one of 13 tokens with padding on the left; then one by one, then several at once."""
    model, ours, ids = loaded[name], random_model(**VARIANTS[name])[1], tokens(2, 30)
    cache, mask = StaticCache(config=model.config, max_cache_len=40), torch.ones(2, 20, dtype=torch.long)
    mask[1, :7] = 0
    model(ids[:, :20], attention_mask=mask, past_key_values=cache)
    addresses = [x.data_ptr() for layer in cache.layers for x in (*layer.held, layer.real) if x is not None]
    parts = [model(ids[:, i:j], past_key_values=cache).logits for i, j in ((20, 21), (21, 22), (22, 30))]
    assert addresses == [x.data_ptr() for layer in cache.layers for x in (*layer.held, layer.real) if x is not None]
    assert cache.get_seq_length() == 30
    assert_same(torch.cat(parts, 1)[:1], ours(ids[:1])[:, 20:])
    assert_same(torch.cat(parts, 1)[1:], ours(ids[1:, 7:])[:, 13:])


def test_a_cache_copied_and_repeated_goes_on_in_every_row(ours: Transformer, theirs: Any) -> None:
    prompt, ends, cache = tokens(2, 20), tokens(6, 4), DynamicCache()
    theirs(prompt, past_key_values=cache)
    branch = copy.deepcopy(cache)
    branch.batch_repeat_interleave(3)
    logits = theirs(ends, past_key_values=branch).logits
    assert_same(logits, ours(torch.cat([prompt.repeat_interleave(3, 0), ends], 1))[:, 20:])
    cache.batch_select_indices(torch.tensor([1]))
    assert_same(theirs(ends[:1], past_key_values=cache).logits, ours(torch.cat([prompt[1:], ends[:1]], 1))[:, 20:])
    branch.reset()
    assert_same(theirs(prompt, past_key_values=branch).logits, ours(prompt))


def test_a_cache_only_read_stays_as_it_was(one: Any) -> None:
    cache = DynamicCache()
    one(ROW, past_key_values=cache)
    once = one(ROW, past_key_values=cache, use_cache=False)
    assert once.past_key_values is None
    assert cache.get_seq_length() == 8
    assert torch.equal(one(ROW, past_key_values=cache, use_cache=False).logits, once.logits)


def test_a_cache_that_the_model_cannot_use_is_refused(one: Any) -> None:
    foreign = DynamicCache()
    foreign.update(torch.zeros(2, 2, 3, 16), torch.zeros(2, 2, 3, 16), 0)
    with pytest.raises(ValueError, match="filled by another model"):
        one(ROW, past_key_values=foreign)
    with pytest.raises(ValueError, match="past_key_values is a Cache; .* pass DynamicCache"):
        one(ROW, past_key_values=Cache(layers=[DynamicLayer()]))
    small = StaticCache(config=one.config, max_cache_len=12)
    one(ROW, past_key_values=small)
    with pytest.raises(ValueError, match="has room for 12 tokens and holds 8; 8 more need a larger one"):
        one(ROW, past_key_values=small)
    cache = DynamicCache()
    one(ROW, past_key_values=cache)
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(3)
    with pytest.raises(ValueError, match="cannot go on from past_key_values"):
        one(ROW, past_key_values=cache, seq_idx=torch.zeros_like(ROW))
    with pytest.raises(ValueError, match="past_key_values holds 2 rows, and the batch has 1"):
        one(ROW[:1], past_key_values=cache)


def test_drafted_tokens_are_refused(one: Any) -> None:
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        one.generate(ROW[:1], prompt_lookup_num_tokens=3, max_new_tokens=4)


# -- outputs -----------------------------------------------------------------------------------------------------------


def test_hidden_states_are_the_inputs_of_the_layers_and_the_last_is_after_the_norm(ours: Transformer, theirs: Any) -> None:
    ids, mask, _ = padded(tokens(2, 24), PADDED["left"])
    seen: list[Tensor] = []
    for block in ours.layers:
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    ours(ids[:1])
    out = theirs(ids, attention_mask=mask, output_hidden_states=True)
    assert len(out.hidden_states) == len(seen) + 1
    for theirs_of, ours_of in zip(out.hidden_states, seen, strict=False):
        torch.testing.assert_close(theirs_of[:1], ours_of, rtol=1e-4, atol=1e-4)
    assert_same(theirs.lm_head(out.hidden_states[-1])[:1], ours(ids[:1]))
    assert torch.equal(theirs.model(ids, attention_mask=mask).last_hidden_state, out.hidden_states[-1])


def test_hidden_states_that_nobody_asked_for_are_not_kept(folder: Path) -> None:
    theirs = load(folder)
    outputs: list[weakref.ref[Tensor]] = []
    theirs.model.layers[0].register_forward_hook(lambda module, inputs, output: outputs.append(weakref.ref(output[0])))
    alive: list[Tensor | None] = []
    theirs.model.norm.register_forward_pre_hook(lambda module, inputs: alive.append(outputs[0]()))
    assert theirs(ROW).hidden_states is None
    assert alive == [None]


def test_the_configuration_may_ask_for_hidden_states_and_tuples(folder: Path) -> None:
    model = load(folder, output_hidden_states=True)
    logits, cache, states = model(ROW, return_dict=False)
    assert (logits.shape, cache.get_seq_length(), len(states)) == ((2, 8, 320), 8, 3)
    headless = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(headless(ROW).last_hidden_state, states[-1])


# -- training ----------------------------------------------------------------------------------------------------------


def gradients(model: Any, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_trains_with_the_same_gradients(reentrant: bool, fresh: Any) -> None:
    ids = tokens(2, 70)
    expected = gradients(fresh.train(), ids)
    fresh.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls: list[object] = []
    fresh.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(gradients(fresh, ids), expected)
    assert len(calls) == 2  # computed again in the backward pass
    with pytest.raises(ValueError, match="gradient checkpointing cannot go on from past_key_values"):
        cache = fresh.eval()(ids).past_key_values
        fresh.train()(ids, past_key_values=cache)


@pytest.mark.parametrize("name", ["sdpa", "eager", "flash_attention_2", "no_such_thing"])
def test_attention_has_two_names_and_no_other_is_taken(name: str, folder: Path) -> None:
    if name in ("sdpa", "eager"):
        model = load(folder, attn_implementation=name)
        assert model.config._attn_implementation == name
        assert_same(model(ROW).logits, random_model(**VARIANTS[HARD[0]])[1](ROW))
    else:
        with pytest.raises((ValueError, ImportError), match="(?i)support"):
            load(folder, attn_implementation=name)


# -- accelerate and peft -----------------------------------------------------------------------------------------------


def test_weights_on_disk_give_our_logits_every_time(folder: Path, tmp_path: Path) -> None:
    ours, ids = random_model(**VARIANTS[HARD[0]])[1], tokens(2, 30)
    places = {"model.embeddings": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu"}
    model = load(folder, device_map=places, offload_folder=str(tmp_path))
    for _ in range(2):
        assert_same(model(ids).logits, ours(ids))
    written = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(written[:, 30:], greedy(ours, ids, 4))


def test_an_adapter_on_every_linear_layer_trains_and_is_merged(ours: Transformer, fresh: Any) -> None:
    from peft import LoraConfig, get_peft_model

    ids = tokens(2, 40)
    linear = {name for name, module in fresh.named_modules() if type(module) is torch.nn.Linear}
    adapted = get_peft_model(fresh, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    reached = {name.removesuffix(".lora_A") for name, _ in fresh.named_modules() if name.endswith(".lora_A")}
    assert reached == linear - {"lm_head"}
    assert_same(adapted(input_ids=ids).logits, ours(ids))  # a new adapter adds nothing

    adapted.gradient_checkpointing_enable({"use_reentrant": True})
    adapted.enable_input_require_grads()
    found = gradients(adapted.train(), ids)
    assert len(found) == len([name for name, _ in adapted.named_parameters() if "lora" in name])
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
        together = adapted.eval()(input_ids=ids).logits
        assert not torch.allclose(together, ours(ids), atol=0.1)
        assert_same(adapted.merge_and_unload()(ids).logits, together)


def test_an_adapter_on_a_convolution_is_not_passed_by(folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    theirs = load(folder)
    before = theirs(ROW).logits
    adapted = get_peft_model(theirs, LoraConfig(r=32, target_modules=["q_conv1d"], init_lora_weights=False))
    assert not torch.allclose(adapted(input_ids=ROW).logits, before)


# -- strong decay ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strong", [-1e4, -torch.inf])
def test_a_decay_that_forgets_everything_leaves_the_rest_exact(strong: float) -> None:
    """Against the recurrence in float64; a difference of running sums would be off by 4e-3, or NaN."""
    torch.seed()
    B, T, n, H, d = 2, 70, 3, 2, 8
    q, k, v = (torch.randn(B, T, *rest) for rest in ((H, d), (n, H, d), (n, H, d)))
    k, beta = torch.nn.functional.normalize(k, dim=-1), torch.rand(B, T, n, H)
    g = -torch.rand(B, T, H)
    g[:, ::2] = strong
    wide = [x.double() for x in (q, k, v, beta, g)]
    expected, state = gated_delta_product(*wide, scale=d**-0.5, output_final_state=True, backend="recurrent")
    o, last = delta_product(q, k, v, beta, g, torch.zeros(B, T, dtype=torch.long), None, True)
    assert max(error(o, expected), error(last, state)) < 1e-5
