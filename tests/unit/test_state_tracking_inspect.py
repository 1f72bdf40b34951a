"""`titan-dp state-tracking inspect`: numbers of a model written by hand, whose heads are known, and of random weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from titan_dp import config
from titan_dp.checkpoint.manifest import step_folder
from titan_dp.checkpoint.weights import save_model_weights
from titan_dp.cli import dispatch
from titan_dp.config.describe import all_keys
from titan_dp.config.load import Loaded
from titan_dp.data.synthetic.counter_rng import Random
from titan_dp.data.synthetic.groups import parse_group
from titan_dp.data.synthetic.words import WordProblem
from titan_dp.errors import UserError
from titan_dp.model.transformer import Transformer, build_model
from titan_dp.studies.state_tracking import constructions
from titan_dp.studies.state_tracking.inspection import (
    Head,
    Trace,
    _element,
    count_places,
    describe,
    representation_error,
    trace,
    words_right,
)
from titan_dp.studies.state_tracking.representations import permutation_matrices, polygon, rotations

VOCABULARY = {"S3": 8, "D4": 10, "Z5": 7}
SMALL: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_heads": 3,
    "head_dim": 4,
    "num_householder": 2,
    "use_short_conv": False,
    "intermediate_size": 16,
    "initializer_range": 0.5,
    "tie_word_embeddings": False,
}


def random_model(task: str = "S3", **changes: Any) -> tuple[config.Model, Transformer]:
    c = config.Model(**{**SMALL, "vocab_size": VOCABULARY[task], **changes})
    model = build_model(c)
    model.init_weights(int(torch.randint(2**31, ())))
    return c, model.requires_grad_(False).eval()


def traces_of(model: Transformer, task: str = "S3", words: int = 6, length: int = 20, **keys: Any) -> dict[int, Trace]:
    return trace(model, WordProblem(parse_group(task), **keys), words, length)


def heads_of(model: Transformer, task: str, words: int = 6, length: int = 40) -> list[Head]:
    found = traces_of(model, task, words, length)
    group = parse_group(task)
    return [describe(layer, head, t, group) for layer, t in found.items() for head in range(t.beta.shape[-1])]


# -- a model that is known ---------------------------------------------------------------------------------------------


def test_the_states_of_the_swaps_tell_the_element_alone_and_every_step_is_a_reflection_or_none() -> None:
    heads = heads_of(constructions.swaps(parse_group("S3")), "S3")
    assert len(heads) == 3
    for head in heads:
        assert head.state_within < 1e-3
        assert head.steps_near_2 + head.steps_near_0 == 1
        assert 0 < head.steps_near_0 < 1
        # the keys are e_a - e_b, in the plane of vectors whose entries sum to 0
        assert head.key_variance[1] == pytest.approx(1, abs=1e-4)
        assert head.key_variance[0] < 0.99


def test_rotations_of_the_cube_have_keys_in_three_dimensions() -> None:
    heads = heads_of(constructions.rotations(parse_group("S4")), "S4", words=12)
    for head in heads:
        assert head.state_dimensions == 3
        assert head.representation_error == pytest.approx(0, abs=1e-2)
        assert head.state_within < 1e-3
        assert head.key_variance[2] == pytest.approx(1, abs=1e-4)
        assert head.key_variance[1] < 0.99


def test_steps_near_a_reflection_are_made_exact_and_the_model_is_left_as_it_was() -> None:
    """Reflections that are a little short shrink the state until long words go wrong; exact ones never do."""
    problem, model = WordProblem(parse_group("S3")), constructions.swaps(parse_group("S3")).float()
    short = {name: p.clone() for name, p in model.state_dict().items()}
    b_proj = model.blocks[0].attn.b_proj
    with torch.no_grad():  # the smallest logits are 2.3 in place of 40 or more: beta 1.82
        logits = b_proj(model.blocks[0].attn_norm.apply_to(model.embeddings(torch.arange(8))))
        b_proj.weight.mul_(2.3 / logits.abs()[logits.abs() > 1].min())
    before = b_proj.weight.clone()
    found = words_right(model, problem, 64)
    assert found["exact steps"] == [1.0] * 4
    assert found["as trained"] == pytest.approx(found["in float64"], abs=0.1)
    assert found["as trained"][3] < 0.5
    assert torch.equal(b_proj.weight, before)
    assert not b_proj._forward_hooks
    assert {name: p.dtype for name, p in model.state_dict().items()} == {name: p.dtype for name, p in short.items()}


REPRESENTATIONS = [("S4", rotations, 3), ("A5", rotations, 3), ("S5", permutation_matrices, 4), ("D5", polygon, 2)]


@pytest.mark.parametrize(("name", "represent", "dimensions"), REPRESENTATIONS)
def test_an_orbit_is_known_in_any_basis_and_random_clusters_are_not_taken_for_one(
    name: str, represent: Any, dimensions: int
) -> None:
    group, rng = parse_group(name), np.random.default_rng(int(torch.randint(2**31, ())))
    matrices = represent(group)
    orbit = matrices @ rng.normal(size=(matrices.shape[1], 1))  # [order, d, 1]
    basis = np.linalg.qr(rng.normal(size=(12, matrices.shape[1])))[0] * np.linspace(1, 1.5, matrices.shape[1])
    assert representation_error(orbit[..., 0] @ basis.T + 3.0, group) == (dimensions, pytest.approx(0, abs=1e-6))
    _, unrelated = representation_error(rng.normal(size=(group.order, 3)), group)
    assert unrelated > 0.5


@pytest.mark.parametrize(("name", "turns", "places"), [("S4", 4, 6), ("S4", 3, 8), ("S4", 2, 12), ("A5", 5, 12), ("A5", 2, 30)])
def test_places_of_states_are_the_corners_and_the_edges_that_some_elements_keep(name: str, turns: int, places: int) -> None:
    """On the axis of a quarter turn lie a cube's 6 faces, of a fifth an icosahedron's 12 corners, of a half its 30 edges."""
    group, rng = parse_group(name), np.random.default_rng(int(torch.randint(2**31, ())))
    matrices = rotations(group)
    angle = 1 + 2 * np.cos(2 * np.pi / turns)
    kept = [m for m in matrices if abs(np.trace(m) - angle) < 1e-9]
    points = {count_places(np.stack([r @ _axis(m) for r in matrices]) + rng.normal(size=(group.order, 3)) * 0.02) for m in kept}
    assert places in points  # half turns of a cube lie on two kinds of axes
    assert count_places(matrices @ np.array([0.1, 0.5, 0.9])) == group.order


def _axis(rotation: np.ndarray) -> np.ndarray:
    return np.linalg.svd(rotation - np.eye(3))[2][-1]


# -- random weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"use_forget_gate": True, "num_householder": 3, "allow_neg_eigval": False}])
def test_states_are_those_that_decoding_has_in_every_layer(changes: dict[str, Any]) -> None:
    _, model = random_model(**changes)
    problem = WordProblem(parse_group("S3"))
    found = trace(model, problem, 3, 12)
    assert list(found) == [0, 1]
    tokens, products = problem.rows(Random("inspect"), torch.arange(3), 12, 12)
    for length in (1, 12):
        _, caches = model.step_hidden(tokens[:, : 1 + length])
        for layer, t in found.items():
            assert torch.equal(t.products, products[:, 1:])
            assert (t.beta.shape, t.k.shape) == ((3, 12, model.blocks[0].attn.n, 3), (*t.beta.shape, 4))
            torch.testing.assert_close(t.states[:, length - 1], caches[layer].state, atol=1e-4, rtol=1e-4)


def test_describe_counts_as_numpy_does() -> None:
    """Step sizes, second moments of the keys weighted by beta, and variance within and in all."""
    _, model = random_model("D4", head_dim=6, initializer_range=1.0)
    t = traces_of(model, "D4", words=7, length=30)[1]
    for h in range(3):
        head = describe(1, h, t, parse_group("D4"))
        beta, k = t.beta[..., h].double().numpy(), t.k[..., h, :].double().numpy()
        assert (head.layer, head.head) == (1, h)
        assert head.steps_near_2 == pytest.approx((beta > 1.9).mean())
        assert head.steps_near_0 == pytest.approx((beta < 0.1).mean())
        moment = np.einsum("btj,btjd,btje->de", beta, k, k)
        share = np.sort(np.linalg.eigvalsh(moment))[::-1].cumsum() / np.trace(moment)
        assert head.key_variance == pytest.approx(share.tolist(), abs=1e-4)

        states, products = t.states[:, :, h].double().numpy().reshape(210, -1), t.products.numpy().flatten()
        within = total = 0.0
        for state, product in zip(states, products, strict=True):
            within += ((state - states[products == product].mean(0)) ** 2).sum()
            total += ((state - states.mean(0)) ** 2).sum()
        assert head.state_within == pytest.approx(within / total)


def test_fillers_are_read_but_not_shown() -> None:
    _, model = random_model()
    found, plain = (traces_of(model, words=3, length=5, tokens_per_element=n)[0] for n in (3, 1))
    assert found.states.shape[:2] == (3, 5)
    assert torch.equal(found.products, plain.products)
    assert not torch.allclose(found.states, plain.states)


def test_hybrids_show_their_matrix_states_only() -> None:
    _, model = random_model(attention_layers=[0], attention_num_heads=2)
    assert list(traces_of(model)) == [1]
    _, model = random_model(mixer="attention", attention_num_heads=2)
    assert traces_of(model) == {}


# -- the command -------------------------------------------------------------------------------------------------------


def save(run_folder: Path, c: config.Model, model: Transformer, **task: Any) -> Path:
    """The run folder of a word problem with a checkpoint of `model`."""
    settings = config.Config(
        job=config.Job(run_name=run_folder.name),
        model=c,
        data=config.Data(source="state_tracking"),
        state_tracking=config.StateTracking(**task),
        training=config.Training(steps=7, seq_len=17),
    )
    meta = {
        "step": 7,
        "healthy": True,
        "world_size": 1,
        "config": Loaded(settings, dict.fromkeys(all_keys(), "test")).resolved_toml(),
        "git_commit": "0" * 40,
        "fingerprint": "0" * 64,
        "tokenizer": "none",
        "global_batch_size": 8,
        "seed": 0,
        "loader": {"samples": 56},
        "samples": 56,
        "tokens": 56 * 17,
    }
    save_model_weights(step_folder(run_folder / "checkpoint", 7), dict(model.state_dict()), meta)
    return run_folder


def inspect(*words: str) -> int:
    return dispatch(["state-tracking", "inspect", *words])


def test_a_run_is_printed_written_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    c, model = random_model("D4", num_heads=1)
    run = save(tmp_path / "run", c, model, task="D4")
    assert inspect(str(run), "--length", "25", "--words", "3") == 0
    assert "D4: what each head does" in " ".join(capsys.readouterr().out.split())
    for layer in (0, 1):
        assert (run / f"inspect/layer-{layer}.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((run / "inspect/inspect.json").read_text())
    assert written["task"] == "D4"
    assert [(head["layer"], head["head"]) for head in written["heads"]] == [(0, 0), (1, 0)]
    expected = heads_of(model, "D4", words=3, length=25)
    for head, wanted in zip(written["heads"], expected, strict=True):
        assert head["state_within"] == pytest.approx(wanted.state_within, rel=1e-3)
        assert len(head["key_variance"]) == 4


@pytest.mark.parametrize(
    ("group", "number", "text"), [("S3", 0, "e"), ("S3", 1, "(1 2)"), ("S4", 23, "(0 3)(1 2)"), ("Z12", 7, "7")]
)
def test_elements_are_called_by_their_cycles_if_these_are_short(group: str, number: int, text: str) -> None:
    assert _element(parse_group(group), number) == text


@pytest.mark.filterwarnings("error")
def test_a_single_state_has_no_variance_to_divide() -> None:
    (head, *_) = heads_of(random_model()[1], "S3", words=1, length=1)
    assert head.state_within == 1.0


def test_a_model_of_dead_steps_is_described_too() -> None:
    """Where a router or training switched every step off, there are no keys to weigh."""
    t = traces_of(random_model()[1])[0]
    head = describe(0, 0, replace(t, beta=torch.zeros_like(t.beta)), parse_group("S3"))
    assert head.steps_near_0 == 1
    assert all(not np.isnan(share) for share in head.key_variance)


def test_what_cannot_be_inspected_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    c, model = random_model()
    save(tmp_path / "language", c, model, task="parity")
    c, model = random_model(mixer="attention", attention_num_heads=2)
    save(tmp_path / "attention", c, model, task="S3")
    refusals = {
        tmp_path / "nowhere": "does not exist",
        checkpoint: "was not trained on a group's word problem",
        tmp_path / "language": "was not trained on a group's",
        tmp_path / "attention": "has no DeltaProduct layer",
    }
    for path, said in refusals.items():
        with pytest.raises(UserError, match=f"{path.name} {said}") as caught:
            inspect(str(path))
        assert "\n" not in str(caught.value)


def test_text_is_not_generated_by_a_model_of_word_problems(tmp_path: Path) -> None:
    c, model = random_model()
    run = save(tmp_path / "run", c, model, task="S3")
    for command in (["generate", str(run), "--prompt", "x"], ["export", str(run), str(tmp_path / "hf")]):
        with pytest.raises(UserError, match="S3") as caught:
            dispatch(command)
        assert "no tokenizer" in str(caught.value)
