"""What a run may change when it takes up a checkpoint: refused, allowed by key, or named; and the advice, which is run."""

from __future__ import annotations

import re
import shlex
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import tomli

from tests.pretrained import save_checkpoint
from titan_dp.checkpoint.changed_settings import (
    changed_since,
    check_changes,
    describe_changes,
)
from titan_dp.checkpoint.manifest import read_manifest, write_manifest
from titan_dp.cli import dispatch
from titan_dp.config import LRScheduler
from titan_dp.config.load import load_config
from titan_dp.errors import UserError
from titan_dp.inference.pretrained import open_source
from titan_dp.train.lr_scheduler import build_lr_scheduler, rate_jump

MODEL = {
    "hidden_size": "64",
    "num_hidden_layers": "2",
    "num_heads": "2",
    "head_dim": "16",
    "use_forget_gate": "true",
    "intermediate_size": "128",
    "vocab_size": "320",
}
ATTENTION = {"attention_layers": "[1]", "attention_num_heads": "2"}


def entries(sections: dict[str, dict[str, str]] | None = None, **changes: Any) -> dict[str, Any]:
    """What a run of MODEL with `sections` over it writes into its checkpoints, as far as it is compared."""
    whole = {"model": MODEL, "data": {}, "training": {"steps": "12"}, "optimizer": {}, **(sections or {})}
    lines = [f"[{name}]\n" + "".join(f"{k} = {v}\n" for k, v in keys.items()) for name, keys in whole.items()]
    return {
        "step": 12,
        "config": "\n".join(lines),
        "fingerprint": "a" * 64,
        "tokenizer": "bytes",
        "tokenizer_hash": "b" * 64,
        "global_batch_size": 4,
        **changes,
    }


def model(**changes: str) -> dict[str, dict[str, str]]:
    return {"model": MODEL | changes}


def check_both(was: dict, now: dict, allowed: list[str], tensors: str | None = None) -> None:
    """The resume of a run, which must end as a new run from its weights does."""
    try:
        check_changes(was, now, allowed, tensors)
    except UserError:
        with pytest.raises(UserError):
            check_changes(was, now, allowed, tensors, "X")
        raise
    check_changes(was, now, allowed, tensors, "X")


@pytest.mark.parametrize(
    ("key", "was", "now"),
    [
        ("norm_eps", model(norm_eps="1e-6"), model(norm_eps="1e-5")),
        ("rope_theta", model(**ATTENTION), model(**ATTENTION, rope_theta="5e5")),
        ("attention_num_heads", model(**ATTENTION), model(**ATTENTION | {"attention_num_heads": "4"})),
    ],
)
def test_a_setting_without_tensors_that_changes_the_function_is_refused_with_both_values(
    key: str, was: dict, now: dict
) -> None:
    with pytest.raises(UserError, match=rf"model\.{key} \(was [^,]+, now [^)]+\)"):
        check_both(entries(was), entries(now), [])
    check_both(entries(was), entries(now), [f"model.{key}", "model.attention_num_kv_heads"])


@pytest.mark.parametrize(
    ("was", "now"),
    [
        (model(rope_theta="1e4"), model(rope_theta="5e5")),
        (model(use_short_conv="false", conv_size="4"), model(use_short_conv="false", conv_size="3")),
        ({"model": {k: v for k, v in MODEL.items() if k != "intermediate_size"}}, model(intermediate_size="256")),
        (model(initializer_range="0.02"), model(initializer_range="0.006")),
        (model(backend="'torch'"), model(backend="'recurrent'")),
    ],
    ids=["no softmax layer", "no convolution", "the default spelled out", "initial values", "backend"],
)
def test_settings_that_compute_the_same_are_not_refused(was: dict, now: dict) -> None:
    check_both(entries(was), entries(now), [])


def test_a_checkpoint_without_a_hash_is_known_by_its_tokenizers_name() -> None:
    old = {key: value for key, value in entries().items() if key != "tokenizer_hash"}
    check_both(old, entries(), [])
    with pytest.raises(
        UserError, match=r"data\.tokenizer \(was 'bytes, saved without its hash', now 'other bbbbbbbbbbbb...'\)"
    ):
        check_both(old, entries(tokenizer="other"), [])


def advised(message: str) -> list[str]:
    """The flag that a message advises, as train.py reads it."""
    found = re.search(r"--checkpoint\.allow_changed '.*'$", message)
    assert found, message
    return load_config(["--config", "debug.toml", *shlex.split(found[0])]).config.checkpoint.allow_changed


@pytest.mark.parametrize(
    ("now", "refusal"),
    [
        (entries({"optimizer": {"name": "'Muon'"}}), "another optimizer.name"),
        (entries({"data": {"seed": "7"}}), r"another data.seed \(was 42, now 7\)"),
        (entries({"training": {"steps": "12", "seq_len": "32"}}), "another training.seq_len"),
        (
            entries(model(allow_neg_eigval="false"), global_batch_size=8),
            r"another model.allow_neg_eigval .*, training.global_batch_size \(was 4, now 8\)",
        ),
        (
            entries(fingerprint=f"{'a' * 64} {'c' * 64}"),
            r"another data.path \(was tokens aaaaaaaaaaaa..., now tokens aaaaaaaaaaaa..., cccccccccccc...\)",
        ),
        (entries(tokenizer_hash="c" * 64), r"data.tokenizer \(was 'bytes bbbbbbbbbbbb...', now 'bytes cccccccccccc...'\)"),
    ],
    ids=["optimizer", "order", "length", "two", "data", "tokenizer"],
)
def test_a_change_is_refused_by_name_and_the_flag_that_the_refusal_advises_lets_the_run_go_on(now: dict, refusal: str) -> None:
    with pytest.raises(UserError, match=refusal) as refused:
        check_changes(entries(), now, ["data.weights"])
    allowed = advised(str(refused.value))
    assert "data.weights" in allowed, "what was allowed before must stay so"
    check_changes(entries(), now, allowed)


def test_a_refusal_begins_with_the_run_folder_and_shows_three_differences() -> None:
    now = entries(model(hidden_size="32", num_hidden_layers="3", head_dim="8", intermediate_size="64"))
    with pytest.raises(UserError) as refused:
        check_changes(entries(), now, [], "X of shape (1,) is not in it", run_folder="outputs/mine")
    assert re.match(
        r"outputs/mine holds another run \(step 12\); choose another job\.run_name\. It was started with another "
        r"model\.head_dim \(was 16, now 8\), model\.hidden_size \(was 64, now 32\), "
        r"model\.intermediate_size \(was 128, now 64\) and 1 more, so that the tensors differ: ",
        str(refused.value),
    )


def test_a_new_run_from_weights_may_have_other_data_and_another_optimizer() -> None:
    now = entries({"optimizer": {"name": "'Muon'"}, "data": {"seed": "7"}}, fingerprint="c" * 64, global_batch_size=8)
    check_changes(entries(), now, [], weights_of="X")


@pytest.mark.parametrize("allowed", [[], ["model.num_householder"]])
def test_what_changes_tensors_is_refused_whatever_is_allowed_and_no_flag_is_advised(allowed: list[str]) -> None:
    now = entries(model(num_householder="3"))
    difference = "layers.0.attn.k_proj.weight of shape (96, 64) has shape (64, 64) there"
    with pytest.raises(UserError) as refusal:
        check_both(entries(), now, allowed, difference)
    assert f"model.num_householder (was 2, now 3), so that the tensors differ: {difference}" in str(refusal.value)
    assert "--checkpoint.allow_changed" not in str(refusal.value)


def test_an_unknown_key_is_not_allowed_to_change_and_the_nearest_is_named() -> None:
    with pytest.raises(UserError, match=r"^command line: .*unknown key trainig\.seq_len; did you mean training\.seq_len"):
        load_config(["--config", "debug.toml", "--checkpoint.allow_changed", '["trainig.seq_len"]'])


# -- what is named ------------------------------------------------------------------------------------------------------


def test_every_setting_that_changes_how_a_run_goes_on_is_named_with_both_values() -> None:
    was = {"optimizer": {"lr": "1e-3", "weight_decay": "0.01"}, "lr_scheduler": {"decay_type": "'cosine'"}}
    now = {"optimizer": {"lr": "5e-4", "weight_decay": "0.1"}, "lr_scheduler": {"decay_type": "'linear'"}}
    now |= {"training": {"steps": "24", "max_norm": "0.5", "mixed_precision_param": "'float32'"}, "debug": {"seed": "1"}}
    now |= {"model": MODEL | {"backend": "'recurrent'"}, "compile": {"enable": "true"}}
    said = describe_changes(changed_since(entries(was), entries(now, global_batch_size=8)))
    assert said == (
        "compile.enable (was False, now True), debug.seed (was 42, now 1), "
        "lr_scheduler.decay_type (was 'cosine', now 'linear'), model.backend (was 'auto', now 'recurrent'), "
        "optimizer.lr (was 0.001, now 0.0005), "
        "optimizer.weight_decay (was 0.01, now 0.1), training.global_batch_size (was 4, now 8), "
        "training.max_norm (was 1.0, now 0.5), training.mixed_precision_param (was 'bfloat16', now 'float32'), "
        "training.steps (was 12, now 24)"
    )


def test_settings_that_do_not_change_the_course_of_a_run_are_not_named() -> None:
    now = {
        "metrics": {"log_freq": "1"},
        "checkpoint": {"interval": "7"},
        "job": {"run_name": "'x'"},
        "data": {"verify": "false"},
        "debug": {"check_kernels": "false"},
    }
    assert changed_since(entries(), entries(now)) == {}


COSINE = {"lr_scheduler": {"warmup_steps": "2"}, "optimizer": {"lr": "1e-3"}}


def finished(step: int = 12, **sections: dict[str, str]) -> dict[str, Any]:
    """A run of 12 steps after `step` of them."""
    return entries({**COSINE, **sections}, steps=12, step=step)


def extended(*flags: str, steps: int = 24, **sections: dict[str, str]) -> dict[str, Any]:
    """The run that resumes it with `steps` steps and `flags` (of lr_scheduler and optimizer)."""
    whole = {**COSINE, "training": {"steps": str(steps)}, **sections}
    for name, value in zip(flags[::2], flags[1::2], strict=True):
        section, _, key = name.removeprefix("--").partition(".")
        whole[section] = {**whole.get(section, {}), key: value}
    return entries(whole, steps=steps)


def rates(run: dict[str, Any], steps: range) -> list[float]:
    c = tomli.loads(run["config"])
    factor = build_lr_scheduler(LRScheduler.model_validate(c["lr_scheduler"]), run["steps"])
    return [c["optimizer"]["lr"] * factor(step) for step in steps]


def test_a_finished_cosine_run_that_is_continued_says_from_where_to_where_the_rate_jumps() -> None:
    said = rate_jump(finished(), extended())
    assert said is not None
    assert said.startswith("the learning rate jumps with step 13: lr from 0.0001 to 0.00055; ")


def test_what_the_warning_advises_makes_the_rate_go_on_where_it_ended() -> None:
    ways = re.findall(r"((?:--\S+ [\d.e-]+ ?)+)", rate_jump(finished(), extended()) or "")
    assert len(ways) == 2
    held, again = (extended(*way.split()) for way in ways)
    assert rate_jump(finished(), held) is None
    assert rates(held, range(12, 24)) == pytest.approx([1e-4] * 12)
    assert rate_jump(finished(), again) is None
    decayed = rates(again, range(12, 24))
    assert 0.9e-4 < decayed[0] < 1e-4
    assert decayed == sorted(decayed, reverse=True)
    assert decayed[-1] == pytest.approx(1e-5)


def test_both_rates_of_muon_are_told() -> None:
    muon = {"name": "'Muon'", "lr": "1e-3", "muon_lr": "2e-2"}
    said = rate_jump(finished(optimizer=muon), extended(optimizer=muon))
    assert said is not None
    assert "lr from 0.0001 to 0.00055 and muon_lr from 0.002 to 0.011" in said
    assert "--optimizer.lr 0.0001 --optimizer.muon_lr 0.002" in said


@pytest.mark.parametrize(
    ("saved", "now"),
    [
        (finished(6), extended(steps=12)),
        (finished(), extended(steps=12)),
        (finished(6, lr_scheduler={"decay_ratio": "0.25"}), extended(lr_scheduler={"decay_ratio": "0.25"})),
        (finished(lr_scheduler={"min_lr_factor": "1.0"}), extended(lr_scheduler={"min_lr_factor": "1.0"})),
    ],
    ids=["the same run", "nothing left", "stable phase of warmup-stable-decay", "constant"],
)
def test_a_rate_that_goes_on_is_not_warned_of(saved: dict, now: dict) -> None:
    assert rate_jump(saved, now) is None


# -- a manifest of a newer version --------------------------------------------------------------------------------------


def with_key(run: Path, line: str) -> Path:
    """The checkpoint of a run, its configuration with one more line, or another one, under the section it begins with."""
    checkpoint = save_checkpoint(run)
    manifest = read_manifest(checkpoint)
    section, setting = line.split(" ", 1)
    text = re.sub(r"\nmixer = .*", "", manifest["config"]) if "mixer" in setting else manifest["config"]
    text = text if section in text else f"{text}\n{section}\n"
    manifest["config"] = text.replace(f"{section}\n", f"{section}\n{setting}\n")
    write_manifest(checkpoint, manifest, manifest["files"])
    return checkpoint


@pytest.mark.parametrize(
    ("line", "refusal"),
    [
        ("[metrics] sparkle = 3", None),
        ("[future] sparkle = 3", None),
        ("[model] sparkle = 3", r"model\.sparkle = 3, which this version of titan_dp does not know: a newer one"),
        ('[model] mixer = "sparkle"', r"model\.mixer = 'sparkle', and this version .* knows .*a newer one saved it"),
    ],
)
def test_what_only_a_newer_version_knows_stops_every_reader_by_name_if_it_is_the_models(
    tmp_path: Path, line: str, refusal: str | None
) -> None:
    checkpoint = with_key(tmp_path / "run", line)

    def resume() -> None:
        manifest = read_manifest(checkpoint)
        now = manifest | {"config": manifest["config"].replace("sparkle = 3\n", "").replace("[future]\n", "")}
        check_changes(manifest, now, [])

    for reader in (
        lambda: open_source(checkpoint),
        resume,
        lambda: dispatch(["checkpoint", "list", str(checkpoint.parent)]),
        lambda: dispatch(["checkpoint", "verify", str(checkpoint)]),
    ):
        with pytest.raises(UserError, match=refusal) if refusal else nullcontext():
            reader()


def test_a_resume_names_a_key_that_only_a_newer_version_knows() -> None:
    saved = entries({"optimizer": {"sparkle": "3"}})
    assert describe_changes(changed_since(saved, entries())) == "optimizer.sparkle (was 3, now unknown to this version)"
