"""What many tests share: a small corpus as token shards, and the smallest run that exercises the whole trainer."""

from __future__ import annotations

import os
import random
import signal
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from titan_dp import output

ROOT = Path(__file__).resolve().parent.parent

# Several processes on two cores: one thread each, or they fight. The variable is for processes to come, torch is here already.
torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))
# What a shell starts in the background ignores Ctrl-C, what nohup starts a hangup; so would every process started from here,
# and tests send both.
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)
# How long an example takes is the machine's affair.
hypothesis.settings.register_profile("tests", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("tests")


def sees_gpus(paths: list[str]) -> bool:
    """Whether tests under `paths` may use the machine's GPUs: those of kernels alone. Others start several ranks over gloo."""
    kernels = ROOT / "tests" / "kernels"
    return bool(paths) and all(Path(path.split("::")[0]).resolve().is_relative_to(kernels) for path in paths)


def pytest_configure(config: pytest.Config) -> None:
    if not sees_gpus(config.args):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for processes to come as well
    # Triton kernels run on the CPU where there is no GPU; this must be set before triton is imported.
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, help="of every random number drawn in a test; without it a new one each time")


@pytest.fixture(autouse=True)
def no_signs_of_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes 5 s says how far it is, and on a busy machine anything does; tests compare what else was said."""
    monkeypatch.setattr(output, "FIRST_SIGN", threading.TIMEOUT_MAX)


@pytest.hookimpl(tryfirst=True)
def pytest_xdist_setupnodes(config: pytest.Config) -> None:
    seed_of(config)


def seed_of(config: pytest.Config) -> int:
    """Of this run, the same in all workers."""
    if config.option.seed is None:
        config.option.seed = random.SystemRandom().randrange(2**31)
    seed: int = config.option.seed
    return seed


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if terminalreporter.stats.get("failed"):
        terminalreporter.write_line(f"random inputs: --seed {seed_of(config)} draws them again")


@pytest.fixture(autouse=True)
def random_numbers_of_this_test_alone(request: pytest.FixtureRequest) -> None:
    """Fresh in each run of the suite, and the same whatever ran before in this worker."""
    seed = zlib.crc32(f"{seed_of(request.config)} {request.node.nodeid}".encode())
    random.seed(seed)
    torch.manual_seed(seed)


# What takes longest begins first, so that the workers end together; the fault tests share runs, so one worker has them all.
FIRST = (
    "tests/faults",
    "tests/integration",
    "tests/distributed",
    "tests/kernels/test_compiled_kernels.py",
    "tests/slurm",
    "tests/unit/test_adaptive_householder.py",
    "tests/kernels",
    "tests/hf",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: next((i for i, name in enumerate(FIRST) if item.nodeid.startswith(name)), len(FIRST)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Deal out a file at a time, in the order above; marks do it no more: pytest 9 does not let pytest-xdist 3.8 read them."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "tests/faults" if nodeid.startswith("tests/faults/") else nodeid.partition("::")[0]

    return ByFile(config, log)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train/ and validation/ token shards of 300 made-up documents under the bytes tokenizer."""
    from titan_dp.cli import dispatch

    folder = tmp_path_factory.mktemp("shards")
    rng = random.Random(0)
    words = "the a red green old young fox dog house river sees finds takes likes and or".split()
    documents = folder / "documents"
    documents.mkdir()
    for i in range(300):
        text = " ".join(rng.choice(words) for _ in range(rng.randint(5, 60)))
        (documents / f"{i:03}.txt").write_text(f"Story {i}. {text}.")
    command = ["prepare", str(documents), "--out", str(folder / "tokens"), "--validation-fraction", "0.1", "--workers", "1"]
    assert dispatch(command) == 0
    return folder / "tokens"


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tests.pretrained.save_checkpoint`, once per session for each choice of arguments. Nobody writes into these folders."""
    from tests.pretrained import save_checkpoint

    made: dict[str, Path] = {}

    def checkpoint_of(run_name: str = "tiny", **changes: Any) -> Path:
        key = repr((run_name, sorted(changes.items())))
        if key not in made:
            made[key] = save_checkpoint(tmp_path_factory.mktemp("runs") / run_name, **changes)
        return made[key]

    return checkpoint_of


@pytest.fixture(scope="session")
def checkpoint(checkpoint_of: Callable[..., Path]) -> Path:
    """A gated model with n_h = 2 and random weights under the bytes tokenizer, called tiny-step-00000007; read only."""
    return checkpoint_of(seq_len=32, num_householder=2, use_forget_gate=True)


@pytest.fixture(scope="session")
def export_of(checkpoint_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder that `export(..., **how)` writes of `random_model(**changes)`, once per session. Nobody writes into it."""
    from titan_dp.inference.hf.export import export
    from titan_dp.inference.pretrained import open_source

    made: dict[str, Path] = {}

    def export_of(changes: dict[str, Any], **how: Any) -> Path:
        key = repr((sorted(changes.items()), sorted(how.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp("exported") / "model"
            export(open_source(checkpoint_of(**changes)), folder, **how)
            made[key] = folder
        return made[key]

    return export_of


@pytest.fixture
def tiny_config(shards: Path, tmp_path: Path) -> Path:
    return write_tiny_config(tmp_path / "tiny.toml", shards)


def write_tiny_config(path: Path, shards: Path) -> Path:
    """A config file for a run of seconds: two gated blocks, n_h = 2, float32, everything a user would have on."""
    path.write_text(
        f"""
[job]
dump_folder = "{path.parent / "outputs"}"
run_name = "tiny"
[model]
hidden_size = 32
num_hidden_layers = 2
num_heads = 2
head_dim = 16
num_householder = 2
use_forget_gate = true
intermediate_size = 64
vocab_size = 320
initializer_range = 0.02
[data]
path = "{shards / "train"}"
document_boundaries = "reset"
[validation]
path = "{shards / "validation"}"
freq = 10
steps = 2
[training]
steps = 20
seq_len = 32
local_batch_size = 2
global_batch_size = 8
mixed_precision_param = "float32"
[optimizer]
lr = 0.003
[lr_scheduler]
warmup_steps = 2
[checkpoint]
interval = 5
[metrics]
log_freq = 1
enable_tensorboard = false
[generate]
max_new_tokens = 8
"""
    )
    return path


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT
