"""Linear layers in float8, emulated: which are converted, what a run of them comes to, what is saved, and what is refused."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

from tests.distributed.harness import run_ranks
from tests.distributed.helpers import clean
from tests.distributed.test_compile import quick
from tests.distributed.test_trainer import losses_of, saved_tensors
from titan_dp import config
from titan_dp.config.load import load_config
from titan_dp.distributed import current_world
from titan_dp.errors import UserError
from titan_dp.inference.hf.export import export
from titan_dp.inference.hf.folder import FolderSource
from titan_dp.inference.pretrained import load_pretrained
from titan_dp.model import float8, parallelize
from titan_dp.model.float8 import apply_float8, check_float8
from titan_dp.model.transformer import Transformer, build_model

RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
EVERY_KIND = config.Model(
    hidden_size=32, num_hidden_layers=2, num_heads=2, head_dim=16, num_householder=2, use_forget_gate=True,
    use_output_gate=True, adaptive_householder=True, attention_layers=[1], attention_num_heads=2, intermediate_size=64,
    vocab_size=64, initializer_range=0.1, tie_word_embeddings=False,
)  # fmt: skip
EMULATED = config.Quantize(linear="float8", emulate=True)
FLOAT8 = ("--quantize.linear", "float8", "--quantize.emulate", "--training.mixed_precision_param", "bfloat16")


def test_the_large_projections_are_converted_and_gates_beta_router_and_output_matrix_are_not() -> None:
    plain, model = build_model(EVERY_KIND), build_model(EVERY_KIND)
    apply_float8(model, EMULATED)
    linears = {name: type(module).__name__ for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    mixer = {f"layers.{i}.attn.{name}_proj" for i in range(2) for name in "qkvo"}
    mlp = {f"layers.{i}.mlp.{name}_proj" for i in range(2) for name in ("gate", "up", "down")}
    assert {name for name, kind in linears.items() if kind == "Float8Linear"} == mixer | mlp
    left = {name for name, kind in linears.items() if kind != "Float8Linear"}
    assert left == {"lm_head", *(f"layers.0.attn.{name}_proj" for name in "abgr")}
    assert list(model.state_dict()) == list(plain.state_dict()), "the same weights by the same names"


def test_a_plain_model_stays_plain() -> None:
    model = build_model(EVERY_KIND)
    apply_float8(model, config.Quantize())
    assert not any(type(module).__name__ == "Float8Linear" for module in model.modules())


def gradients(quantize: config.Quantize, compile: bool = False, mode: str = "none") -> dict[str, torch.Tensor]:
    """The loss and full gradients of one batch on all ranks, computed in bfloat16."""
    torch._dynamo.reset()
    sections = {"model": EVERY_KIND, "quantize": quantize, "compile": config.Compile(enable=compile)}
    own = config.Config.model_construct(
        **sections,  # type: ignore[arg-type]
        training=config.Training(),
        parallelism=config.Parallelism(),
        activation_checkpoint=config.ActivationCheckpoint(mode=mode),  # type: ignore[arg-type]
    )
    with quick:
        model: Transformer = parallelize.sharded_model(own, current_world())
    model.to_empty(device="cpu")
    model.init_weights(0)
    tokens = torch.randint(0, 64, (2, 32), generator=torch.Generator().manual_seed(0))
    loss = model(tokens, tokens).loss
    loss.backward()
    found = {clean(name): p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}  # type: ignore[union-attr]
    return found | {"loss": loss.detach()}


def relative(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], name: str) -> float:
    return float((a[name] - b[name]).norm() / b[name].norm())


WEIGHT = "layers.0.attn.q_proj.weight"


def test_on_two_ranks_loss_and_gradients_are_near_those_in_bfloat16() -> None:
    plain = run_ranks(2, gradients, config.Quantize())[0]
    for recipe in RECIPES:
        eight = run_ranks(2, gradients, EMULATED.model_copy(update={"recipe": recipe}))[0]
        assert 1e-5 < relative(eight, plain, "loss") < 0.01, recipe
        assert 1e-3 < relative(eight, plain, WEIGHT) < 0.5, recipe


def test_it_composes_with_compiled_blocks_and_activation_checkpointing() -> None:
    eight, compiled = (run_ranks(2, gradients, EMULATED, compile, "selective")[0] for compile in (False, True))
    plain = run_ranks(2, gradients, EMULATED)[0]
    for found in (eight, compiled):
        assert relative(found, plain, "loss") < 1e-3
        assert relative(found, plain, WEIGHT) < 0.1


def test_a_run_is_near_one_in_bfloat16_resumes_to_the_bit_and_saves_and_exports_plain_weights(
    tiny_config: Path, tmp_path: Path
) -> None:
    steps = ("--training.steps", "8", "--lr_scheduler.total_steps", "8")
    bf16 = losses_of(tiny_config, 2, "bf16", *steps, "--training.mixed_precision_param", "bfloat16")
    whole = losses_of(tiny_config, 2, "whole", *FLOAT8, *steps)
    assert whole != bf16
    assert whole[8] == pytest.approx(bf16[8], rel=0.02)
    losses_of(tiny_config, 2, "halves", *FLOAT8, *steps, "--training.steps", "4")
    assert losses_of(tiny_config, 2, "halves", *FLOAT8, *steps) == whole
    assert saved_tensors(tiny_config, "halves") == saved_tensors(tiny_config, "whole")
    loaded = load_pretrained(tiny_config.parent / "outputs" / "whole", torch.device("cpu"))
    assert all(type(p) is nn.Parameter for p in loaded.model.parameters())
    assert not any(type(module).__name__ == "Float8Linear" for module in loaded.model.modules())
    export(loaded.source, tmp_path / "exported", target="remote-code")
    exported = FolderSource(tmp_path / "exported")
    assert set(exported.dtypes.values()) == {torch.float32}
    weights = exported.read(exported.shapes)
    assert all(torch.equal(weights[name], parameter) for name, parameter in loaded.model.named_parameters())


def test_what_a_device_cannot_do_is_refused_with_the_way_out() -> None:
    wanted = config.Quantize(linear="float8")
    with pytest.raises(UserError, match="needs a GPU, and this run is on a CPU; set quantize.linear = 'none'"):
        check_float8(wanted, torch.device("cpu"))
    with (
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(8, 0)),
        mock.patch.object(torch.cuda, "get_device_name", return_value="A100"),
        pytest.raises(UserError, match="needs compute capability 8.9, and A100 has 8.0; set"),
    ):
        check_float8(wanted, torch.device("cuda"))
    with mock.patch.object(torch.cuda, "get_device_capability", return_value=(8, 9)):
        check_float8(wanted, torch.device("cuda"))
    check_float8(EMULATED, torch.device("cpu"))
    with mock.patch.object(float8, "find_spec", return_value=None), pytest.raises(UserError, match="pip install 'torchao>="):
        check_float8(EMULATED, torch.device("cpu"))
    check_float8(config.Quantize(), torch.device("cpu"))


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["--model.hidden_size=40"], "needs widths that are multiples of 16, and model.hidden_size = 40"),
        (["--model.intermediate_size=72"], "and model.intermediate_size = 72"),
        (["--model.head_dim=12"], "and model.head_dim times the heads of q and k = 24"),
        (["--training.mixed_precision_param=float32"], "set it to 'bfloat16'"),
        (["--training.seq_len=40"], "40 a row of a rank, which is no multiple of 16; set quantize.recipe"),
        (["--parallelism.context_parallel_degree=2"], "19 a row of a rank"),
    ],
)
def test_sizes_that_float8_products_do_not_take_are_refused(settings: list[str], problem: str, tiny_config: Path) -> None:
    with pytest.raises(UserError, match=problem), contextlib.redirect_stderr(io.StringIO()):
        load_config(["--config", str(tiny_config), *FLOAT8, *settings])
    load_config(["--config", str(tiny_config), *settings])


def test_gradients_of_weights_in_bfloat16_take_any_number_of_tokens(tiny_config: Path) -> None:
    load_config(["--config", str(tiny_config), *FLOAT8, "--quantize.recipe=rowwise_with_gw_hp", "--training.seq_len=40"])
