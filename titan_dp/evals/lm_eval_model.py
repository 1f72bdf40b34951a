"""Our models as a model class of EleutherAI's lm-evaluation-harness, named titan_dp there.

`titan-dp evaluate lm-eval` uses it. The harness finds no model classes outside its own package. To use its own command line,
with all its options, run this module: `python -m titan_dp.evals.lm_eval_model --model titan_dp --model_args checkpoint=PATH
--tasks ...` (one process; also dtype, backend, tokenizer, max_length, add_bos_token and stock_bos).

Conventions. BOS comes before every context if documents began with it at the training, unless add_bos_token is false. A text
scored without any context follows BOS, or else EOS; if add_bos_token is false, EOS, or else BOS. With stock_bos both are as in
the harness's own class for Hugging Face models (lm_eval 0.4.13, `--model hf` at its defaults): a context is encoded as the
tokenizer's files say, which for an exported folder is mostly without BOS, and a text without context follows BOS, or else EOS.

The model reads at most max_length tokens: a longer context loses its beginning, as with the harness's own models, and
`truncated` counts that; what is scored is never cut. A long document is scored in the harness's rolling windows, each
beginning with an empty state. With several processes, each has all requests and `Answers` deals them out, so the harness
itself sees one process.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import lm_eval.models  # noqa: F401  # fills the registry, which the harness leaves alone once anything is in it
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from rich.console import Console

from titan_dp.data.encodings import tiktoken_encoding
from titan_dp.data.tokenizer import Tokenizer, hugging_face_folder, tokenizer_file
from titan_dp.distributed import World, world_size_from_env
from titan_dp.errors import UserError, run_main
from titan_dp.evals.answers import Answers
from titan_dp.evals.scoring import row_losses
from titan_dp.evals.session import Session
from titan_dp.files import Replaced, as_unicode
from titan_dp.inference.pretrained import Pretrained, load_pretrained
from titan_dp.inference.sampling import Sampling, TextStream, stream_texts
from titan_dp.model.loss import IGNORE

BATCH_SIZE = 16
_MAX_NEW_TOKENS = 256  # the harness's own default
_GENERATION_KEYS = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}


class Scored(NamedTuple):
    """A sequence whose last tokens are to be scored."""

    inputs: list[int]
    targets: list[int]
    """What the last len(targets) inputs should predict."""


class Continued(NamedTuple):
    """A prompt to be continued."""

    prompt: list[int]
    until: list[str]
    max_new_tokens: int
    sampling: Sampling
    seed: int


@register_model("titan_dp")
class TitanDPLM(TemplateLM):
    """A trained model that answers the harness's requests.

    Args:
        pretrained: the model and its tokenizer.
        answers: computes each distinct request once and keeps it.
        batch_size: requests at once.
        max_length: tokens the model reads at most; None for its training sequence length.
        add_bos_token: BOS before every context; None for yes if documents began with it at the training.
        stock_bos: BOS and EOS as the harness's own class for Hugging Face models has them; then add_bos_token is None.
        seed: of the sampling, if a task samples.

    Raises UserError if BOS is asked for and the tokenizer has none.
    """

    def __init__(
        self,
        pretrained: Pretrained,
        answers: Answers,
        *,
        batch_size: int = BATCH_SIZE,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        stock_bos: bool = False,
        seed: int = 42,
    ) -> None:
        super().__init__()
        self.model, self.text, self.answers = pretrained.model, pretrained.tokenizer, answers
        self.source, self.batch_size, self.seed = pretrained.source, batch_size, seed
        self.max_length = max_length or pretrained.source.seq_len
        self.stock_bos = stock_bos
        if stock_bos:
            add_bos_token = adds_bos_itself(self.text)
        self.add_bos = bool(self.text.beginning()) if add_bos_token is None else add_bos_token
        if self.add_bos and self.text.bos_id is None:
            raise UserError(f"tokenizer {self.text.name!r} has no BOS to add; leave it out with --no-add-bos")
        self.truncated: Counter[str] = Counter()
        """Requests that lost the beginning of their context, by kind."""
        self.replaced = Replaced("text", " of the tasks")

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> TitanDPLM:
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> TitanDPLM:
        """What `--model_args` names, in one process. Raises UserError for what cannot be used."""
        if world_size_from_env() > 1:
            raise UserError(
                "the harness's own command runs titan_dp in one process; use torchrun with `titan-dp evaluate lm-eval`"
            )
        given = arg_dict | {key: value for key, value in (additional_config or {}).items() if value is not None}
        given.pop("max_batch_size", None)  # the harness's, for batch_size=auto
        if "checkpoint" not in given:
            raise UserError("--model titan_dp needs --model_args checkpoint=PATH")
        checkpoint, batch_size = Path(given.pop("checkpoint")), str(given.pop("batch_size", BATCH_SIZE))
        if not batch_size.isdecimal() or batch_size == "0":
            raise UserError(f"--batch_size {batch_size} cannot be used with titan_dp; give a number")
        named = given.pop("device", None) or "cuda"  # the harness says cuda:0 if nobody has named a device
        device = torch.device(named if torch.cuda.is_available() else "cpu")
        loading: dict[str, Any] = {key: given.pop(key) for key in ("tokenizer", "backend") if key in given}
        loading["dtype"] = getattr(torch, given.pop("dtype", "float32"), None)
        if loading["dtype"] not in (torch.float32, torch.bfloat16):
            raise UserError("--model_args dtype is neither float32 nor bfloat16; give one of them")
        if unknown := given.keys() - {"max_length", "add_bos_token", "stock_bos", "seed"}:
            raise UserError(f"--model_args {', '.join(sorted(unknown))}: titan_dp has no such argument; see its module")
        session = Session(argparse.Namespace(), World(0, 1, device), Console(stderr=True))
        return cls(load_pretrained(checkpoint, device, **loading), Answers(session, None), batch_size=int(batch_size), **given)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness's own command writes of the model into its results."""
        return {"checkpoint": self.source.identity, "dtype": str(self.model.output_weight.dtype), **self.conventions()}

    def conventions(self) -> dict[str, Any]:
        """How requests become tokens; JSON."""
        names = {"tokenizer": self.text.name, "tokenizer_hash": self.text.hash}
        special = {token_id: token for token, token_id in self.text.special_tokens.items()}
        prefix = next((special.get(token, str(token)) for token in self._prefixes), None)
        chosen = {"add_bos_token": self.add_bos, "stock_bos": self.stock_bos, "prefix": prefix}
        return {**chosen, "max_length": self.max_length, **names}

    @property
    def eot_token_id(self) -> int:
        return self.prefix_token_id if self.text.eos_id is None else self.text.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What comes before a text that has no context: BOS, or EOS if BOS is not used."""
        if self._prefixes:
            return self._prefixes[0]
        raise UserError(
            f"tokenizer {self.text.name!r} has neither BOS nor EOS to put before a text without context; "
            "leave out tasks with such texts (wikitext is one)"
        )

    @property
    def _prefixes(self) -> list[int]:
        """Those of BOS and EOS that the tokenizer has; the first one comes before a text without context."""
        first_bos = self.add_bos or self.stock_bos
        ids = (self.text.bos_id, self.text.eos_id) if first_bos else (self.text.eos_id, self.text.bos_id)
        return [token for token in ids if token is not None]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        ids = self.text.encode(self.replaced(string))
        wanted = self.add_bos if add_special_tokens is None else add_special_tokens
        return [self.text.bos_id, *ids] if wanted and self.text.bos_id is not None else ids

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)  # tokenises, then calls the next method

    def _loglikelihood_tokens(self, requests: list[tuple[Any, list[int], list[int]]], **_: Any) -> list[tuple[float, bool]]:
        rows = [self._cut(context, continuation, "loglikelihood") for _, context, continuation in requests]
        return self._score(rows, "loglikelihood")

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        documents = []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(ids, self.prefix_token_id, max_seq_len=self.max_length, context_len=1)
            pairs = map(make_disjoint_window, windows)
            documents.append([self._cut(known, scored, "loglikelihood_rolling") for known, scored in pairs])
        scores = iter(self._score([row for rows in documents for row in rows], "loglikelihood_rolling"))
        return [sum(next(scores)[0] for _ in rows) for rows in documents]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        keys: list[str] = []
        prompts: dict[Sampling, dict[str, Continued]] = {}
        seen: Counter[str] = Counter()
        for request in requests:
            context, given = request.args
            until, room, max_new_tokens, sampling = self.generation(given)
            ids = self.tok_encode(context) or [self.prefix_token_id]
            self.truncated["generate_until"] += len(ids) > room
            question = [ids[-room:], until, max_new_tokens, vars(sampling)]
            key = _key("generate_until", *question)
            if sampling.temperature:  # asked twice, sampled twice
                seen[key] += 1
                key = _key("generate_until", *question, self.seed, seen[key])
            keys.append(key)
            row = Continued(ids[-room:], until, max_new_tokens, sampling, seed=int(key[:15], 16))
            prompts.setdefault(sampling, {})[key] = row
        answers: dict[str, str] = {}
        for rows in prompts.values():
            answers |= self.answers.of("generate_until", rows, self._continue, lambda row: len(row.prompt), self.batch_size)
        return [answers[key] for key in keys]

    def generation(self, given: dict[str, Any]) -> tuple[list[str], int, int, Sampling]:
        """A task's generation_kwargs as (stop strings, tokens of context at most, tokens to generate, sampling).

        Raises UserError for what is not supported, and if the generation leaves no room for a context.
        """
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(given, _MAX_NEW_TOKENS))
        if unknown := kwargs.keys() - _GENERATION_KEYS:
            raise UserError(
                f"generation_kwargs {', '.join(sorted(unknown))} of a task cannot be used with titan_dp, "
                f"which has {', '.join(sorted(_GENERATION_KEYS))}; leave out that task"
            )
        max_new_tokens = kwargs["max_gen_toks"]
        if max_new_tokens >= self.max_length:
            raise UserError(
                f"a task generates up to {max_new_tokens} tokens, which leaves none of --max-length {self.max_length} for its "
                f"context; give a --max-length well above {max_new_tokens}, or leave out that task"
            )
        temperature = float(kwargs.get("temperature", 1.0)) if kwargs["do_sample"] else 0.0
        sampling = Sampling(temperature, int(kwargs.get("top_k") or 0), float(kwargs.get("top_p") or 1.0))
        return [as_unicode(s) for s in kwargs["until"] if s], self.max_length - max_new_tokens, max_new_tokens, sampling

    def _cut(self, context: list[int], continuation: list[int], kind: str) -> Scored:
        """The last `max_length` inputs; more if the continuation is longer, which is never cut."""
        inputs = [*(context or [self.prefix_token_id]), *continuation][:-1]
        most = max(self.max_length, len(continuation))
        self.truncated[kind] += len(inputs) > most
        return Scored(inputs[-most:], continuation)

    def _score(self, rows: list[Scored], name: str) -> list[tuple[float, bool]]:
        """Log-likelihood in nats of the targets of each row, and whether each of them is the likeliest token."""
        keys = [_key("score", *row) for row in rows]
        questions = {key: row for key, row in zip(keys, rows, strict=True) if row.targets}
        answers = self.answers.of(name, questions, self._losses, lambda row: len(row.inputs), self.batch_size)
        nothing = (0.0, True)  # of an empty text
        return [tuple(answers[key]) if row.targets else nothing for key, row in zip(keys, rows, strict=True)]

    def _losses(self, rows: list[Scored]) -> list[list[Any]]:
        labels = ([IGNORE] * (len(inputs) - len(targets)) + targets for inputs, targets in rows)
        pairs = [(torch.tensor(row.inputs), torch.tensor(wanted)) for row, wanted in zip(rows, labels, strict=True)]
        losses, likeliest, wanted = row_losses(self.model, pairs)
        sums, greedy = losses.double().sum(1), (likeliest | (wanted == IGNORE)).all(1)
        return [[-loss, match] for loss, match in zip(sums.tolist(), greedy.tolist(), strict=True)]

    def _continue(self, rows: list[Continued]) -> list[str]:
        """The continuations of prompts that share their sampling, each up to its stop string or EOS, without them."""
        streams = [TextStream(self.text, row.prompt, row.until, row.max_new_tokens) for row in rows]
        for stream in streams:
            if not stream.max_tokens:  # a task may ask for nothing
                stream.finished = "length"
        for _ in stream_texts(self.model, streams, rows[0].sampling, [row.seed for row in rows]):
            pass  # pieces are for people who watch
        return [stream.text for stream in streams]


def adds_bos_itself(tokenizer: Tokenizer) -> bool:
    """Whether transformers begins the ids of a text with BOS, which tokenizer.json decides.

    A tokenizer that an export has converted from a table of ranks never does, and none of a model whose documents had no BOS.
    """
    from tokenizers import Tokenizer as HFTokenizer

    file = tokenizer_file(tokenizer.name)
    if not tokenizer.adds_bos or file.suffix == ".model" or tiktoken_encoding(str(file)) is not None:
        return False
    backend = HFTokenizer.from_file(str(hugging_face_folder(tokenizer.name) / "tokenizer.json"))
    return tokenizer.bos_id is not None and backend.encode("a").ids[:1] == [tokenizer.bos_id]


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    sys.exit(run_main(lambda: cli_evaluate() or 0))
