"""lm-evaluation-harness with our models: every number against the definition in float64, every task from local files."""

from __future__ import annotations

import argparse
import io
import json
import logging
import math
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.pretrained import Make, bpe, evaluate, random_model, save_checkpoint
from titan_dp.errors import UserError

pytest.importorskip("lm_eval")

import lm_eval
from lm_eval.tasks import TaskManager

from titan_dp.data.tokenizer import load_tokenizer
from titan_dp.distributed import World
from titan_dp.evals.answers import Answers
from titan_dp.evals.lm_eval import PAPER, _quiet, _show, convention
from titan_dp.evals.lm_eval_model import TitanDPLM, adds_bos_itself
from titan_dp.evals.session import Session
from titan_dp.inference.pretrained import load_pretrained

ARCHITECTURE = {"num_householder": 2, "use_forget_gate": True, "allow_neg_eigval": True, "initializer_range": 0.1}
BOS, EOS = 256, 257  # of the bytes tokenizer
SEQ_LEN = 64
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint(checkpoint_of: Make) -> Path:
    return checkpoint_of(seq_len=SEQ_LEN, **ARCHITECTURE)


@pytest.fixture(scope="module")
def exact() -> Any:
    """Log-probabilities [T, V] of what follows each token of a list, by the checkpoint's model in float64."""
    _, model = random_model(**ARCHITECTURE)
    model = model.double()

    def log_probabilities(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([ids]))[0].double().log_softmax(-1)

    return log_probabilities


def make(checkpoint: Path, **settings: Any) -> TitanDPLM:
    session = Session(argparse.Namespace(), World(0, 1, CPU), Console(file=io.StringIO()))
    return TitanDPLM(load_pretrained(checkpoint, CPU), Answers(session, None), **settings)


def test_lone_surrogates_are_replaced_and_counted(checkpoint: Path) -> None:
    lm = make(checkpoint)
    assert lm.tok_encode("a \ud800") == lm.tok_encode("a \ufffd")
    assert lm.replaced.characters == 1
    assert lm.generation({"until": ["\ud800"], "max_gen_toks": 4})[0] == ["\ufffd"]


def requests(*arguments: Any) -> list[Any]:
    return [SimpleNamespace(args=each if isinstance(each, tuple) else (each,)) for each in arguments]


def ids(text: str) -> list[int]:
    return list(text.encode())


def score(exact: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """By the definition: the sum of log p(token | all before it), and whether each is the likeliest."""
    rows = exact([*context, *continuation][:-1])[-len(continuation) :]
    total = sum(row[token].item() for row, token in zip(rows, continuation, strict=True))
    return total, all(int(row.argmax()) == token for row, token in zip(rows, continuation, strict=True))


def rolling(exact: Any, text: str, window: int) -> float:
    """By the definition: `window` tokens are predicted at a time, from the `window` tokens before the last of them."""
    stream, total = [BOS, *ids(text)], 0.0
    for start in range(0, len(text), window):
        end = min(start + window, len(text))
        rows = exact(stream[max(0, end - window) : end])[start - end :]
        total += sum(row[token].item() for row, token in zip(rows, ids(text)[start:end], strict=True))
    return total


def greedy(exact: Any, prompt: list[int], count: int) -> str:
    """By the definition: the likeliest token that the tokenizer has, appended, again and again, up to EOS."""
    tokens = list(prompt)
    for _ in range(count):
        token = int(exact(tokens)[-1, : EOS + 1].argmax())
        if token == EOS:
            break
        tokens.append(token)
    return bytes(tokens[len(prompt) :]).decode(errors="replace")


# -- requests ------------------------------------------------------------------------------------------------------------

PAIRS = [("The whale", " dives"), ("It", " was the best of times"), ("", "Call me")]
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def test_loglikelihood_is_the_sum_of_log_probabilities_after_bos(checkpoint: Path, exact: Any) -> None:
    lm = make(checkpoint, batch_size=2)
    found = lm.loglikelihood(requests(*PAIRS))
    expected = [score(exact, [BOS, *ids(context)], ids(continuation)) for context, continuation in PAIRS]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-5)
    before, after = lm.loglikelihood(requests(("Ahab ", "says"), ("Ahab", " says")))
    assert before == after, "a space between them is scored with the continuation"
    assert lm.loglikelihood(requests(("The", ""))) == [(0.0, True)], "nothing is certain"
    context = [BOS, *ids("The whale")]
    best = int(exact(context)[-1].argmax())
    found = lm._loglikelihood_tokens([(None, context, [best]), (None, context, [best, best]), (None, context, [best + 1])])
    assert [match for _, match in found] == [True, score(exact, context, [best, best])[1], False], "greedy if all are likeliest"


def test_without_bos_a_text_without_context_follows_eos(checkpoint: Path, exact: Any) -> None:
    found = make(checkpoint, add_bos_token=False).loglikelihood(requests(("The", " sea"), ("", "sea")))
    expected = [score(exact, ids("The"), ids(" sea"))[0], score(exact, [EOS], ids("sea"))[0]]
    assert [value for value, _ in found] == pytest.approx(expected, rel=1e-5)


def test_stock_bos_scores_as_the_harness_scores_the_exported_model(checkpoint: Path, tmp_path: Path) -> None:
    """Its own class for Hugging Face models, at its defaults, on what `titan-dp export` writes."""
    pytest.importorskip("transformers")
    from lm_eval.models.huggingface import HFLM

    from titan_dp.inference.hf.export import export
    from titan_dp.inference.pretrained import open_source

    export(open_source(checkpoint), tmp_path / "exported", target="remote-code")
    stock = HFLM(pretrained=str(tmp_path / "exported"), trust_remote_code=True, device="cpu", batch_size=1, dtype="float32")
    ours = make(checkpoint, stock_bos=True)
    pairs, documents = requests(*PAIRS, ("x" * 100, "y" * 30)), requests("Call me Ishmael. " * 8, "sea")
    expected = [value for value, _ in stock.loglikelihood(pairs, disable_tqdm=True)]
    assert [value for value, _ in ours.loglikelihood(pairs)] == pytest.approx(expected, rel=1e-4)
    rolling = stock.loglikelihood_rolling(documents, disable_tqdm=True)
    assert ours.loglikelihood_rolling(documents) == pytest.approx(rolling, rel=1e-4)
    assert [value for value, _ in make(checkpoint).loglikelihood(pairs)] != pytest.approx(expected, rel=1e-4)


CONVENTIONS = [
    ({}, "BOS before every context, a text without context follows <|bos|>; --stock-bos takes"),
    ({"add_bos_token": False}, "no BOS before a context, a text without context follows <|eos|>; --stock-bos"),
    ({"stock_bos": True}, "no BOS before a context, a text without context follows <|bos|> as in the harness's"),
]


@pytest.mark.parametrize(("chosen", "said"), CONVENTIONS)
def test_the_convention_of_bos_and_eos_is_said(checkpoint: Path, chosen: dict[str, bool], said: str) -> None:
    assert convention(make(checkpoint, **chosen).conventions()).startswith(f"convention: {said}")


def test_a_tokenizer_that_adds_bos_itself_does_so_for_the_stock_class(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "[UNK]": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert not adds_bos_itself(load_tokenizer(str(tmp_path)))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert adds_bos_itself(load_tokenizer(str(tmp_path)))


def test_a_long_context_loses_its_beginning_and_is_counted(checkpoint: Path, exact: Any) -> None:
    lm = make(checkpoint, max_length=10)
    found = lm.loglikelihood(requests((LETTERS, "123"), ("a", "b")))
    inputs = ids(LETTERS + "123")[:-1][-10:]  # what a window of ten may hold
    assert found[0][0] == pytest.approx(score(exact, inputs[:-2], ids("123"))[0], rel=1e-5)
    assert lm.truncated["loglikelihood"] == 1
    whole = make(checkpoint, max_length=5).loglikelihood(requests(("ab", "0123456789")))
    assert whole[0][0] == pytest.approx(score(exact, ids("b"), ids("0123456789"))[0], rel=1e-5), "what is scored is never cut"


def test_rolling_predicts_each_token_once_with_the_most_context_a_window_gives(checkpoint: Path, exact: Any) -> None:
    text = "".join(random.choices("abc de", k=150))
    found = make(checkpoint, max_length=40).loglikelihood_rolling(requests(text, "", "ab"))
    assert found == pytest.approx([rolling(exact, text, 40), 0.0, score(exact, [BOS], ids("ab"))[0]], rel=1e-5)


def test_generation_is_the_argmax_token_by_token_and_leaves_room_for_itself(checkpoint: Path, exact: Any) -> None:
    lm, asked = make(checkpoint, max_length=40), [("The whale", 12), ("A", 3), ("Once upon a time", 0), (LETTERS * 2, 8)]
    found = lm.generate_until(requests(*((p, {"until": [], "max_gen_toks": n, "do_sample": False}) for p, n in asked)))
    assert found == [greedy(exact, [BOS, *ids(prompt)][-(40 - count) :], count) for prompt, count in asked]
    assert lm.truncated["generate_until"] == 1


def test_sampling_depends_on_the_seed_and_not_on_the_batch(checkpoint: Path) -> None:
    wanted = {"until": [], "max_gen_toks": 16, "do_sample": True, "temperature": 1.0}
    asked = requests(("The", wanted), ("The", wanted), ("A whale", wanted))
    first = make(checkpoint).generate_until(asked)
    assert first == make(checkpoint, batch_size=1).generate_until(asked)
    assert first[0] != first[1], "asked twice, sampled twice"
    assert first != make(checkpoint, seed=1).generate_until(asked)


def test_a_tokenizer_retrained_in_place_is_refused(tmp_path: Path) -> None:
    run = save_checkpoint(tmp_path / "run", tokenizer=str(bpe(tmp_path / "tokenizer")))
    bpe(tmp_path / "tokenizer", "a whale and a whale and")
    with pytest.raises(UserError, match="was trained with a tokenizer whose hash is .* it was changed since"):
        TitanDPLM.create_from_arg_string(f"checkpoint={run}")


def test_what_cannot_be_done_is_refused(checkpoint: Path) -> None:
    named = {"checkpoint": str(checkpoint)}
    arguments = {"checkpoint=PATH": {}, "auto": named | {"batch_size": "auto"}, "max_len": named | {"max_len": 8}}
    for says, given in {**arguments, "dtype": named | {"dtype": "f"}}.items():
        with pytest.raises(UserError, match=says):
            TitanDPLM.create_from_arg_obj(given)
    for says, wanted in {"--max-length 64": {"max_gen_toks": 64}, "num_beams": {"num_beams": 4, "max_gen_toks": 4}}.items():
        with pytest.raises(UserError, match=says):
            make(checkpoint).generate_until(requests(("The", wanted)))


# -- the whole command, on local tasks -----------------------------------------------------------------------------------

QUESTIONS = [("Two and two make", "four", "five"), ("The sea is", "dry today", "wet"), ("Ships", "fly", "sail")]
GOLD = [0, 1, 1]
SENTENCES = [("The quick brown", "fox"), ("Call me", "Ishmael"), ("To be or not to", "be")]
DOCUMENTS = ["It was the best of times, it was the worst of times, it was the age of wisdom", "Loomings"]
ROWS: dict[str, list[dict[str, Any]]] = {
    "choices": [{"q": q, "o": options, "gold": gold} for (q, *options), gold in zip(QUESTIONS, GOLD, strict=True)],
    "sentences": [{"c": c, "w": w} for c, w in SENTENCES],
    "documents": [{"t": t} for t in DOCUMENTS],
}
OURS = {"our_choice": "choice", "our_last_word": "word", "our_documents": "document", "our_completion": "contains"}


AGGREGATION = {"word_perplexity": "weighted_perplexity", "bits_per_byte": "bits_per_byte", "perplexity": "perplexity"}
SENTENCE = {"doc_to_text": "{{c}}", "doc_to_target": "{{w}}", "process_results": "!function own.contains"}
CHOICE = {"doc_to_text": "{{q}}", "doc_to_choice": "{{o}}", "doc_to_target": "gold"}
KINDS: dict[str, tuple[str, str, dict[str, Any], list[str]]] = {  # kind: data, output type, its definition, metrics
    "choice": ("choices", "multiple_choice", CHOICE, ["acc", "acc_norm"]),
    "word": ("sentences", "loglikelihood", {"doc_to_text": "{{c}}", "doc_to_target": " {{w}}"}, ["perplexity", "acc"]),
    "document": (
        "documents",
        "loglikelihood_rolling",
        {"doc_to_text": "", "doc_to_target": "{{t}}"},
        ["word_perplexity", "bits_per_byte"],
    ),
    "contains": (
        "sentences",
        "generate_until",
        {**SENTENCE, "generation_kwargs": {"until": ["e"], "max_gen_toks": 6, "do_sample": False}},
        ["contains"],
    ),
}


def write_tasks(folder: Path, names: dict[str, str], **more: object) -> Path:
    """A folder with a task of each name and kind over the documents above; `more` is added to each definition."""
    folder.mkdir(parents=True, exist_ok=True)
    for data, each in ROWS.items():
        (folder / f"{data}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
    (folder / "own.py").write_text("def contains(doc, results):\n    return {'contains': int(doc['w'] in results[0])}\n")
    for name, kind in names.items():
        data, output_type, definition, metrics = KINDS[kind]
        files = {"data_files": {"test": f"{folder / data}.jsonl"}, "cache_dir": str(folder.parent / "cache")}
        head = {"task": name, "output_type": output_type, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
        found = [{"metric": m, "aggregation": AGGREGATION.get(m, "mean"), "higher_is_better": m[:3] == "acc"} for m in metrics]
        text = json.dumps({**head, "metadata": {"version": 3.0}, "metric_list": found, **definition, **more})  # which is YAML
        (folder / f"{name}.yaml").write_text(text.replace('"!function own.contains"', "!function own.contains"))
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"), OURS)


def measured(checkpoint: Path, tasks: Path, out: Path, *more: str) -> dict[str, Any]:
    """What the command writes."""
    return evaluate("lm-eval", checkpoint, out, "--batch-size", 2, "--include-path", tasks, *more)


def test_tasks_give_what_their_metrics_are_defined_as(checkpoint: Path, tasks: Path, exact: Any, tmp_path: Path) -> None:
    result = measured(checkpoint, tasks, tmp_path, "--tasks", ",".join(OURS), "--log-samples")
    found = {
        name: {m: each["value"] for m, each in task["metrics"].items()} for name, task in result["results"]["tasks"].items()
    }
    right, right_by_length = [], []
    for (question, *options), gold in zip(QUESTIONS, GOLD, strict=True):
        scores = [score(exact, [BOS, *ids(question)], ids(f" {option}"))[0] for option in options]
        by_length = [s / len(option) for s, option in zip(scores, options, strict=True)]
        right.append(scores[gold] == max(scores))
        right_by_length.append(by_length[gold] == max(by_length))
    assert found["our_choice"] == pytest.approx({"acc": sum(right) / 3, "acc_norm": sum(right_by_length) / 3})
    words = [score(exact, [BOS, *ids(c)], ids(f" {w}")) for c, w in SENTENCES]
    expected = {"perplexity": math.exp(-sum(s for s, _ in words) / 3), "acc": sum(match for _, match in words) / 3}
    assert found["our_last_word"] == pytest.approx(expected, rel=1e-4)
    nats = -sum(rolling(exact, text, SEQ_LEN) for text in DOCUMENTS)
    count, size = sum(len(text.split()) for text in DOCUMENTS), sum(len(text) for text in DOCUMENTS)
    expected = {"word_perplexity": math.exp(nats / count), "bits_per_byte": nats / size / math.log(2)}
    assert found["our_documents"] == pytest.approx(expected, rel=1e-4)
    samples = [json.loads(line) for line in (tmp_path / result["results"]["samples"]).read_text().splitlines()]
    texts = [sample["resps"][0][0] for sample in samples if sample["task"] == "our_completion"]
    assert texts == [greedy(exact, [BOS, *ids(c)], 6).split("e")[0] for c, _ in SENTENCES]

    settings, task = result["settings"], result["results"]["tasks"]["our_choice"]
    assert (settings["add_bos_token"], settings["max_length"], settings["seed"]) == (True, SEQ_LEN, 42)
    assert (settings["lm_eval"], result["checkpoint"]["step"]) == (lm_eval.__version__, 7)
    assert (task["version"], task["num_fewshot"], task["documents"], task["documents_in_task"]) == (3.0, 0, 3, 3)
    assert task["metrics"]["acc"]["stderr"] is not None
    assert result["results"]["truncated_requests"] == {"loglikelihood": 0, "loglikelihood_rolling": 0, "generate_until": 0}

    harness = lm_eval.simple_evaluate(  # by its own command, which makes the model from its name
        "titan_dp",
        model_args=f"checkpoint={checkpoint},max_length={SEQ_LEN}",
        batch_size="2",
        device="cpu",
        tasks=["our_documents"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
    )["results"]["our_documents"]
    assert {name: harness[f"{name},none"] for name in expected} == pytest.approx(found["our_documents"])


def test_the_preset_prints_the_columns_of_the_paper(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    choices = dict.fromkeys(("piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge"), "choice")
    recall = dict.fromkeys(("swde", "squad_completion", "fda"), "contains")
    own = write_tasks(tmp_path / "tasks", {"wikitext": "document", "lambada_openai": "word", **choices, **recall})
    result = measured(checkpoint, own, tmp_path / "out", "--preset", "paper", "--limit", "2")["results"]
    row = result["columns"]
    assert list(row) == (
        "Wiki ppl,LMB ppl,LMB acc,PIQA acc,Hella acc_n,Wino acc,ARC-e acc,ARC-c acc_n,Avg,SWDE cont,SQuAD cont,FDA cont"
    ).split(",")
    choice = result["tasks"]["hellaswag"]["metrics"]
    accuracy, normalised = choice["acc"]["value"], choice["acc_norm"]["value"]
    assert row["Avg"] == pytest.approx((row["LMB acc"] + 3 * accuracy + 2 * normalised) / 6)
    assert f"{100 * row['Avg']:.2f}" in capsys.readouterr().out


@pytest.fixture(scope="module")
def harness_tasks() -> TaskManager:
    """The harness's own tasks in the folders that the preset needs: listing all 14,000 takes seconds."""
    folders = "wikitext lambada piqa hellaswag winogrande arc swde squad_completion fda".split()
    own = Path(lm_eval.__file__).parent / "tasks"
    return TaskManager(include_path=[str(own / folder) for folder in folders], include_defaults=False)


def test_an_unknown_task_is_refused_with_the_nearest_names(
    harness_tasks: TaskManager, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert set(PAPER) <= set(harness_tasks.all_subtasks)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **_: harness_tasks)
    with pytest.raises(UserError, match="--tasks helaswag.*hellaswag"):
        evaluate("lm-eval", checkpoint, tmp_path, "--tasks", "helaswag")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"dataset_path": "nobody/has_this"}, "task odd cannot be loaded.*HF_HOME"),
        ({"unsafe_code": True}, "task odd runs code"),
    ],
)
def test_a_task_that_cannot_be_run_is_refused_before_anything_is_written(
    how: dict[str, Any], says: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    own = write_tasks(tmp_path / "tasks", {"odd": "word"}, **how)
    with pytest.raises(UserError, match=says):
        measured(checkpoint, own, tmp_path / "out", "--tasks", "odd")
    assert not (tmp_path / "out").exists()


def test_without_the_harness_one_sentence_says_how_to_get_it(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match="titan-dp evaluate lm-eval needs lm_eval: pip install lm_eval"):
        evaluate("lm-eval", checkpoint, tmp_path, "--preset", "paper")


@pytest.mark.parametrize(("stderr", "shown"), [(None, False), (0.01, True)])
def test_a_column_of_standard_errors_is_shown_if_there_is_one(
    stderr: float | None, shown: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = {"acc": {"value": 0.5, "stderr": stderr, "higher_is_better": True}}
    task = {"version": 1, "num_fewshot": 0, "documents": 4, "documents_in_task": 4, "metrics": metrics}
    settings = {"lm_eval": "0", "add_bos_token": True, "prefix": None, "stock_bos": False}
    found = {"tasks": {"arc": task}, "truncated_requests": {}}
    _show(SimpleNamespace(results=found, settings=settings, source=SimpleNamespace(label="x"), path=tmp_path / "x.json"))  # type: ignore[arg-type]
    said = capsys.readouterr().out
    assert "0.5000" in said
    assert ("standard error" in said, "0.0100" in said) == (shown, shown)


def test_of_the_harness_only_news_is_passed_on(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("lm_eval.api.task")
    with _quiet(SimpleNamespace(world=SimpleNamespace(is_main=True))):  # type: ignore[arg-type]
        logger.warning("[Task: x] metric acc is defined, but higher_is_better is not. using default")
        logger.warning("[Task: x] has_training_docs and has_validation_docs are False")
    assert [record.getMessage()[10:16] for record in caplog.records] == ["has_tr"]
