"""Generation: sampling, batches of prompts of any lengths, text as it comes, and the command from a shell."""

from __future__ import annotations

import io
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

from tests.pretrained import Make, random_model
from titan_dp import config
from titan_dp.cli import dispatch
from titan_dp.data.tokenizer import load_tokenizer
from titan_dp.errors import UserError
from titan_dp.inference.generate import sample_text
from titan_dp.inference.sampling import Sampling, TextStream, continue_text, encode_prompt, generate_ids
from titan_dp.model.transformer import Transformer
from titan_dp.output import harmless

VARIANTS: dict[str, dict] = {
    "DeltaProduct_2": {},
    "Gated DeltaNet": {"num_householder": 1, "use_forget_gate": True},
    "no convolution": {"use_short_conv": False, "use_forget_gate": True},
    "adaptive DeltaProduct_2": {"adaptive_householder": True},
    "RWKV-7 product_2": {"mixer": "rwkv7"},
    "grouped heads": {"num_heads": 4, "num_key_heads": 2, "use_forget_gate": True},
    "hybrid": {"attention_layers": [1], "use_forget_gate": True},
    "windowed, grouped softmax": {"mixer": "attention", "attention_window": 6, "attention_num_kv_heads": 1},
}
GREEDY = Sampling(temperature=0)


def ids_of(length: int, seed: int) -> list[int]:
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def continued(model: Transformer, prompts: list[list[int]], tokens: int, sampling: Sampling = GREEDY) -> list[list[int]]:
    """Continuations by rows, the row of seed i being the i-th."""
    steps = generate_ids(model, prompts, sampling=sampling, seeds=range(len(prompts)), vocab_size=258)
    return [list(row) for row in zip(*itertools.islice(steps, tokens), strict=True)]


# -- ids ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_greedy_ids_of_a_batch_are_those_the_parallel_forward_finds_likeliest(name: str) -> None:
    model, prompts = random_model(**VARIANTS[name])[1], [ids_of(length, length) for length in (3, 20, 1, 11)]
    for prompt, row in zip(prompts, continued(model, prompts, 20), strict=True):
        logits = model(torch.tensor([prompt + row]))[0, :, :258]
        assert row == logits.argmax(-1)[len(prompt) - 1 : -1].tolist()


def test_a_drawn_row_goes_on_the_same_whatever_else_is_in_the_batch() -> None:
    model, prompts, sampling = random_model()[1], [ids_of(length, length) for length in (3, 20)], Sampling(1.0, top_k=40)
    together = continued(model, prompts, 20, sampling)
    for seed, prompt in enumerate(prompts):
        alone = generate_ids(model, [prompt], sampling=sampling, seeds=[seed], vocab_size=258)
        assert together[seed] == [row[0] for row in itertools.islice(alone, 20)]


def test_a_prompt_longer_than_a_segment_is_read_in_pieces_to_the_same_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = random_model(use_forget_gate=True)[1], ids_of(50, 1)
    whole = continued(model, [prompt], 10)
    monkeypatch.setattr("titan_dp.inference.sampling._SEGMENT", 7)
    assert continued(model, [prompt], 10) == whole


def test_what_a_recurrent_model_remembers_does_not_grow() -> None:
    model = random_model(use_forget_gate=True)[1]

    def remembered(tokens: int) -> int:
        _, cache = model.step(torch.zeros(1, tokens, dtype=torch.int64))
        return sum(x.numel() for layer in cache for x in (layer.state, *layer.tails))

    assert remembered(3) == remembered(300)


def test_ids_that_no_token_has_are_never_chosen() -> None:
    model = random_model()[1]
    with torch.no_grad():
        model.embeddings.weight[258:] *= 100  # padding of the vocabulary, made likely
    rows = continued(model, [ids_of(4, 0)], 30, Sampling(temperature=2.0))
    assert max(rows[0]) < 258


# -- sampling -----------------------------------------------------------------------------------------------------------

PROBABILITIES = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])


def drawn(sampling: Sampling, count: int = 4000) -> torch.Tensor:
    """Relative frequencies of `count` draws from PROBABILITIES."""
    logits = PROBABILITIES.log().expand(count, -1)
    return torch.bincount(sampling.choose(logits, torch.rand(count)), minlength=5) / count


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(1.0), PROBABILITIES),
        (Sampling(0.5), PROBABILITIES**2 / (PROBABILITIES**2).sum()),
        (Sampling(1.0, top_k=2), torch.tensor([0, 4 / 7, 0, 3 / 7, 0])),
        (Sampling(1.0, top_p=0.4), torch.tensor([0, 1.0, 0, 0, 0])),
        (Sampling(1.0, top_p=0.41), torch.tensor([0, 4 / 7, 0, 3 / 7, 0])),
        (Sampling(1.0, top_p=0.85), torch.tensor([0, 4 / 8.5, 0, 3 / 8.5, 1.5 / 8.5])),
    ],
)
def test_ids_are_drawn_by_the_probability_that_the_settings_leave_them(sampling: Sampling, expected: torch.Tensor) -> None:
    found = drawn(sampling)
    torch.testing.assert_close(found, expected, atol=0.03, rtol=0)
    assert torch.equal(found > 0, expected > 0)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_the_ends_of_the_interval_draw_ids_that_may_be_drawn(uniform: float) -> None:
    """Sums of rounded probabilities may stay below 1, and ids of probability 0 may come first and last."""
    logits = torch.rand(200, 1000).log()
    logits[:, ::2] = logits[:, -300:] = -torch.inf
    chosen = Sampling(1.0).choose(logits, torch.full((200,), uniform))
    assert bool(logits.gather(1, chosen[:, None]).isfinite().all())


@pytest.mark.parametrize("sampling", [Sampling(0), Sampling(1.0), Sampling(1.0, top_k=3), Sampling(1.0, top_p=0.5)])
def test_a_row_of_logits_that_are_not_finite_has_no_id_and_the_others_do(sampling: Sampling) -> None:
    logits = torch.randn(3, 9)
    logits[1, 4] = torch.nan
    assert (sampling.choose(logits, torch.rand(3)) >= 0).tolist() == [True, False, True]


@pytest.mark.parametrize("temperature", [0.0, 1e-3, 1e-40, 5e-324])
def test_temperature_0_and_near_it_take_the_likeliest(temperature: float) -> None:
    assert drawn(Sampling(temperature), 3)[1] == 1


# -- text ---------------------------------------------------------------------------------------------------------------

BYTES = load_tokenizer("bytes")


def streamed(ids: list[int], *stop: str) -> tuple[list[str], TextStream]:
    """The pieces that are not empty."""
    stream, pieces = TextStream(BYTES, [256], stop), []
    for token in ids:
        if not stream.finished:
            pieces.append(stream.push(token))
    return [piece for piece in [*pieces, "" if stream.finished else stream.close()] if piece], stream


def test_characters_of_several_bytes_come_whole_and_bytes_that_are_no_text_in_the_end() -> None:
    assert streamed(BYTES.encode("né 北🎉."))[0] == ["n", "é", " ", "北", "🎉", "."]
    assert "".join(streamed([0xFF] * 3)[0]) == "\ufffd" * 3


@pytest.mark.parametrize(
    ("stop", "shown"), [(("fox",), "the brown "), (("fox jumps", "x j"), "the brown fo"), (("zebra", "o"), "the br")]
)
def test_text_ends_before_the_stop_string_that_is_complete_first(stop: tuple[str, ...], shown: str) -> None:
    pieces, stream = streamed(BYTES.encode("the brown fox jumps"), *stop)
    assert ("".join(pieces), stream.finished) == (shown, "stop")


def test_the_beginning_of_a_stop_string_that_does_not_come_is_shown_later() -> None:
    pieces, stream = streamed(BYTES.encode("foam"), "fox")
    assert (pieces, stream.finished) == (["foa", "m"], None)


def test_the_end_of_text_token_ends_it_and_is_not_shown() -> None:
    pieces, stream = streamed([*BYTES.encode("done"), 257])
    assert ("".join(pieces), stream.finished, stream.tokens) == ("done", "eos", 5)


# -- prompts ------------------------------------------------------------------------------------------------------------


def test_special_tokens_in_a_prompt_are_what_they_are_and_bos_comes_once() -> None:
    assert encode_prompt(BYTES, "a<|eos|>b") == [256, 97, 257, 98]
    assert encode_prompt(BYTES, "<|bos|>a") == [256, 97]
    assert encode_prompt(BYTES, "a", bos=False) == [97]
    assert encode_prompt(BYTES, "<|bos|>", raw=True) == [256, *b"<|bos|>"]


def test_a_prompt_that_would_be_read_as_something_else_is_refused() -> None:
    with pytest.raises(UserError, match=r"'<\|user\|>', which is no special token.*<\|bos\|>, <\|eos\|>.*--raw-prompt"):
        encode_prompt(BYTES, "<|user|>hello")
    with pytest.raises(UserError, match="the prompt is empty"):
        encode_prompt(BYTES, "", bos=False)


# -- the command --------------------------------------------------------------------------------------------------------


def test_one_prompt_is_continued_on_stdout_and_speed_goes_to_stderr(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("From a pipe"))
    words = ["generate", str(checkpoint), "--prompt-file", "-", "--max-new-tokens", "20", "--seed", "3"]
    assert dispatch(words) == 0
    out, err = capsys.readouterr()
    _, model = random_model(use_forget_gate=True, num_householder=2)
    expected = continue_text(model, BYTES, "From a pipe", max_new_tokens=20, sampling=Sampling(), seed=3)
    assert out == f"From a pipe{expected}\n"
    assert "tokens/s" in err


@pytest.mark.parametrize("samples", ["1", "2"])
def test_control_characters_are_escaped_on_a_terminal_and_stay_in_a_pipe(
    samples: str, checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["generate", str(checkpoint), "--prompt", "A\x1b[2J\n", "--max-new-tokens", "40", "--samples", samples]
    dispatch(words)
    piped = capsys.readouterr().out
    assert "A\x1b[2J\n" in piped
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    dispatch(words)
    shown = capsys.readouterr().out
    assert "A\\x1b[2J\n" in shown
    assert shown == harmless(piped)


def test_several_prompts_and_samples_are_one_json_object_a_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "A"}\n{"prompt": "Bc"}\n')
    words = ["generate", str(checkpoint), "--prompt-file", str(tmp_path / "prompts.jsonl"), "--samples", "2", "--json"]
    assert dispatch([*words, "--max-new-tokens", "6"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted((r["index"], r["prompt"]) for r in records) == [(0, "A"), (1, "A"), (2, "Bc"), (3, "Bc")]
    assert all(r["tokens"] <= 6 and r["finish"] in ("length", "eos") for r in records)


@pytest.mark.parametrize("wrong", ["--top-p 1.5", "--top-k 0", "--temperature nan", "--temperature -1", f"--seed {2**62}"])
def test_settings_that_make_no_sense_are_the_users_mistake(wrong: str) -> None:
    with pytest.raises(SystemExit) as left:
        dispatch(["generate", "nowhere", *wrong.split()])
    assert left.value.code == 2


def test_what_cannot_be_continued_is_the_users_mistake(checkpoint_of: Make, checkpoint: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "A"}\n{"text": "B"}\n')
    small = checkpoint_of(vocab_size=256)
    refused = {
        "holds no committed checkpoint": [tmp_path],
        "does not exist": [tmp_path / "nowhere"],
        "'bytes' has 258 ids.*vocab_size = 256": [small],
        "prompts.jsonl:2 is no JSON object with a text under 'prompt'": [checkpoint, "--prompt-file", prompts],
        "nowhere.txt' cannot be read": [checkpoint, "--prompt-file", tmp_path / "nowhere.txt"],
        "--stop '' would end": [checkpoint, "--stop", ""],
    }
    for match, arguments in refused.items():
        with pytest.raises(UserError, match=match):
            dispatch(["generate", *map(str, arguments)])


# -- at the end of a run ------------------------------------------------------------------------------------------------


def test_a_sample_is_the_continuation_or_says_why_there_is_none(checkpoint: Path, tmp_path: Path) -> None:
    c, cpu = config.Generate(prompt="Once", max_new_tokens=8), torch.device("cpu")
    _, model = random_model(use_forget_gate=True, num_householder=2)
    expected = continue_text(model, BYTES, "Once", max_new_tokens=8, sampling=Sampling(), seed=3)
    assert sample_text(checkpoint, cpu, c, 3) == ("sample", f"Once{expected}")
    title, why = sample_text(tmp_path, cpu, c, 3)
    assert title == "no sample"
    assert "holds no committed checkpoint" in why


def test_code_that_cannot_be_loaded_when_a_run_ends_is_no_reason_to_fail_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "titan_dp.inference.pretrained", None)
    title, why = sample_text(Path("unused"), torch.device("cpu"), config.Generate(), 3)
    assert title == "no sample"
    assert "titan_dp.inference.pretrained" in why
