"""Nothing runs what it reads: no source file has a call that could, and what an attacker may put into a folder does not run.

Every attack is a real one: a payload that makes a file when it runs, put where a reader would meet it, and looked for after.
"""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, BytesStorageMetadata, Metadata

from tests.pretrained import Make
from titan_dp.checkpoint import manifest as ckpt
from titan_dp.checkpoint.weights import CheckpointTensors
from titan_dp.config.load import config_from_toml, load_config
from titan_dp.data.shards import TokenShards
from titan_dp.data.sources import load_hugging_face
from titan_dp.data.tokenizer import load_tokenizer
from titan_dp.errors import UserError
from titan_dp.files import checksum, inside, stays_inside
from titan_dp.inference.pretrained import load_model, open_source

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [
    ROOT / "train.py",
    *(path for folder in ("titan_dp", "kernels", "benchmarks") for path in (ROOT / folder).rglob("*.py")),
]

# -- what no source file may call -------------------------------------------------------------------------------------------

# (file, what it does): the index of a checkpoint goes through an allow-list of classes.
ALLOWED = {("titan_dp/checkpoint/dcp_files.py", "imports pickle")}
_MODULES = set("pickle cPickle dill cloudpickle marshal shelve joblib yaml tarfile runpy code".split())
_BUILTINS = {"eval", "exec", "compile", "__import__"}
_CALLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "asyncio.create_subprocess_shell"}
_CALLS |= {"shutil.unpack_archive", "pd.read_pickle", "pandas.read_pickle", "np.fromregex", "ast.unparse"}
_NEEDED = [("torch.load", "weights_only", True), ("np.load", "allow_pickle", False), ("numpy.load", "allow_pickle", False)]
_NEEDED += [("Environment", "autoescape", True)]
_FROM_TRANSFORMERS = re.compile(r"^(Auto[A-Z]\w*|pipeline)$")


def offences(tree: ast.AST) -> Iterator[str]:
    """What a file does that could run what it reads."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (f"imports {alias.name}" for alias in node.names if alias.name.split(".")[0] in _MODULES)
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").split(".")[0] in _MODULES:
                yield f"imports {node.module}"
            if (node.module or "").split(".")[0] == "transformers":
                yield from (f"imports transformers.{a.name}" for a in node.names if _FROM_TRANSFORMERS.match(a.name))
        elif isinstance(node, ast.Call):
            yield from _offences_of_call(node)


def _name(node: ast.expr) -> str:
    """`np.load` of that expression; of anything that is not a name or an attribute only what comes after it."""
    return f"{_name(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _offences_of_call(node: ast.Call) -> Iterator[str]:
    name = _name(node.func)
    given = {keyword.arg: getattr(keyword.value, "value", keyword.value) for keyword in node.keywords}
    if name in _BUILTINS | _CALLS or name.endswith((".extractall", ".extract")):
        yield f"calls {name}"
    for function, option, needed in _NEEDED:
        if name.endswith(function) and given.get(option) is not needed:
            yield f"calls {name} without {option}={needed}"
    yield from (
        f"calls {name} with {option}" for option in ("shell", "trust_remote_code") if given.get(option, False) is not False
    )


def test_no_source_file_can_run_what_it_reads() -> None:
    found = {
        (str(path.relative_to(ROOT)), offence)
        for path in SOURCES
        for offence in offences(ast.parse(path.read_text(), str(path)))
    }
    assert found == ALLOWED, "or an exception that is not needed any more"


FORBIDDEN = """import pickle
from yaml import load
eval('1')
os.system('true')
subprocess.run('true', shell=True)
torch.load(path)
torch.load(path, weights_only=False)
np.load(path, allow_pickle=True)
np.load(path)
load_dataset(name, trust_remote_code=True)
from transformers import AutoTokenizer
jinja2.Environment(loader=loader)
archive.extractall(folder)"""


@pytest.mark.parametrize("code", FORBIDDEN.splitlines())
def test_the_search_finds_what_it_looks_for(code: str) -> None:
    assert list(offences(ast.parse(code)))


def test_no_launch_script_lets_a_shell_read_a_value() -> None:
    """Behind eval, or inside the text of bash -c, a value would be run."""
    scripts = [path for path in (ROOT / "launch").iterdir() if path.suffix in (".sh", ".sbatch")]
    assert len(scripts) >= 3
    for path in scripts:
        text = re.sub(r"(?m)^\s*#.*$", "", path.read_text())
        assert not re.search(r"\beval\b", text), path
        assert not re.search(r'\b(ba)?sh\s+-c\s+"', text), (
            f"{path}: in double quotes the outer shell puts values into the inner one's text"
        )


HOSTILE = ["; touch canary", "$(touch canary)", "`touch canary`", "a && touch canary", "x\ntouch canary", "'; touch canary; '"]
HOSTILE += ["*", "-c"]


def test_a_value_reaches_training_through_a_launch_script_as_it_is(tmp_path: Path) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    show = "import json, sys; print(json.dumps(sys.argv[1:]))"
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exec {sys.executable} "$@"\nexec {sys.executable} -c \'{show}\' "$@"\n')
    python.chmod(0o755)
    (tmp_path / "config.toml").touch()
    (tmp_path / "cells.txt").write_text("config.toml\n")
    job = {"SLURM_JOB_ID": "1", "SLURM_ARRAY_JOB_ID": "1", "SLURM_ARRAY_TASK_ID": "0", "VENV": str(python.parents[1])}
    command = ["bash", str(ROOT / "launch" / "slurm_array.sbatch"), "cells.txt", *HOSTILE]
    done = subprocess.run(command, env=os.environ | job, cwd=tmp_path, capture_output=True, text=True)
    assert json.loads((tmp_path / "slurm.log").read_text())[-len(HOSTILE) :] == HOSTILE, done.stderr
    assert not list(tmp_path.rglob("canary"))


# -- attacks ----------------------------------------------------------------------------------------------------------------


class Payload:
    """Makes `canary` when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.canary}",)


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A file that exists after the test if an attack has succeeded."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "the payload has run"


def test_the_payload_would_work(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        len(pickle.loads(pickle.dumps(Payload(tmp_path / "canary"))))
    assert (tmp_path / "canary").exists()


def replace(checkpoint: Path, name: str, raw: bytes) -> None:
    """A file of a checkpoint by another, and the manifest so that nothing is amiss: an attacker can do that as well."""
    (checkpoint / name).write_bytes(raw)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    meta = {key: value for key, value in manifest.items() if key not in ("files", "format_version", "checksum")}
    paths = [path for path in sorted(checkpoint.iterdir()) if path.name != "manifest.json"]
    files = [{"name": path.name, "bytes": path.stat().st_size, "xxh3_128": checksum(path)} for path in paths]
    ckpt.write_manifest(checkpoint, meta, files)


def as_pickle(canary: Path, _: bytes) -> bytes:
    return pickle.dumps(Payload(canary))


def as_torch_file(canary: Path, original: bytes) -> bytes:
    """What DCP expects in a .distcp file, files of torch.save one after another, but each a payload."""
    buffer = io.BytesIO()
    torch.save({"weight": Payload(canary)}, buffer)
    return (buffer.getvalue() * (len(original) // len(buffer.getvalue()) + 1))[: len(original)]


@pytest.fixture
def checkpoint(checkpoint_of: Make, tmp_path: Path) -> Path:
    """A copy to tamper with."""
    return Path(shutil.copytree(checkpoint_of(), tmp_path / "run/checkpoint/step-00000007"))


@pytest.mark.parametrize("pattern", [".metadata", "*.distcp"])
@pytest.mark.parametrize("attack", [as_pickle, as_torch_file])
def test_no_file_of_a_checkpoint_runs(
    checkpoint: Path, canary: Path, pattern: str, attack: Callable[[Path, bytes], bytes]
) -> None:
    file = next(checkpoint.glob(pattern))
    replace(checkpoint, file.name, attack(canary, file.read_bytes()))
    assert ckpt.verify(checkpoint) == [], "the checksums must not be what saves us"
    with pytest.raises(UserError, match=r"damaged|do not trust"):
        load_model(open_source(checkpoint), torch.device("cpu"))


def a_pickle_for_a_tensor(index: Any) -> None:
    """DCP reads what an index calls bytes with weights_only=False: such an index must not get that far."""
    index.state_dict_metadata["model.norm.weight"] = BytesStorageMetadata()


def a_file_elsewhere(index: Any) -> None:
    for info in index.storage_data.values():
        info.relative_path = "../../secret"


def more_than_there_is(index: Any) -> None:
    next(iter(index.state_dict_metadata.values())).size = torch.Size([2**40, 2**10])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (a_pickle_for_a_tensor, "norm.weight, which is no tensor.*do not trust it"),
        (a_file_elsewhere, "names '../../secret', which is not a file of its folder"),
        (more_than_there_is, "is damaged"),
    ],
)
def test_an_index_leads_to_tensors_that_are_there(change: Callable[[Any], None], match: str, checkpoint: Path) -> None:
    index = pickle.loads((checkpoint / ".metadata").read_bytes())
    change(index)
    replace(checkpoint, ".metadata", pickle.dumps(index))
    with pytest.raises(UserError, match=match):
        CheckpointTensors(checkpoint)


def test_an_index_of_every_python_3_11_is_read(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """3.11.0 to 3.11.3, of which Debian 12 has one, pickle a member of an Enum as a call of getattr."""
    index = pickle.loads((checkpoint / ".metadata").read_bytes())
    monkeypatch.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", lambda member, _: (getattr, (type(member), member.name)))
    replace(checkpoint, ".metadata", pickle.dumps(index))
    monkeypatch.undo()
    assert b"getattr" in (checkpoint / ".metadata").read_bytes()
    assert CheckpointTensors(checkpoint).shapes


class Attribute:
    """Pickled, it asks for an attribute of something else than that Enum."""

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (Metadata, "__init__")


def test_an_index_looks_up_no_other_attribute(checkpoint: Path) -> None:
    replace(checkpoint, ".metadata", pickle.dumps(Attribute()))
    with pytest.raises(UserError, match=r"asks for builtins\.getattr, which none of ours needs; do not trust"):
        CheckpointTensors(checkpoint)


def test_a_shard_of_python_objects_is_not_read(shards: Path, tmp_path: Path, canary: Path) -> None:
    folder = Path(shutil.copytree(shards / "train", tmp_path / "train"))
    file, array = folder / "shard-00000.npy", io.BytesIO()
    objects = np.empty(TokenShards(folder).shards[0].tokens, dtype=object)
    objects[0] = Payload(canary)
    np.save(array, objects, allow_pickle=True)
    archive = b"PK\x03\x04" + bytes(200)  # which np.load would open
    for raw in (array.getvalue(), pickle.dumps(Payload(canary)), archive):
        file.write_bytes(raw)
        with pytest.raises(UserError, match=r"shard-00000.npy is cut off or no .npy file"):
            TokenShards(folder)
    file.unlink()
    os.mkfifo(file)  # which nobody waits for
    with pytest.raises(UserError, match=r"shard-00000.npy is missing"):
        TokenShards(folder)


def test_a_tokenizer_that_is_code_is_not_run(tmp_path: Path, canary: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "tokenization_own.py").write_text(f"open({str(canary)!r}, 'w')\nclass Own: pass\n")
    settings = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}}
    (tmp_path / "own" / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"no tokenizer.json, and code of a tokenizer's own is never run.*use 'bytes'"):
        load_tokenizer(str(tmp_path / "own"))
    for raw in (pickle.dumps(Payload(canary)), b"{}"):
        (tmp_path / "own" / "tokenizer.json").write_bytes(raw)
        with pytest.raises(UserError, match=r"tokenizer.json is no tokenizer"):
            load_tokenizer(str(tmp_path / "own"))


def test_a_dataset_that_is_a_script_is_not_run(tmp_path: Path, canary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_TRUST_REMOTE_CODE", "1")  # what older versions asked for
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "own.py").write_text(f"open({str(canary)!r}, 'w')\n")
    for streaming in (False, True):
        with pytest.raises(UserError, match=r"own.* cannot be loaded: .*code of a dataset is never run: .*save it as .jsonl"):
            load_hugging_face(str(folder), "", "train", "text", streaming)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "adapter.pt", "modeling_titan_dp.py"])
def test_no_file_of_a_hugging_face_folder_runs(tmp_path: Path, canary: Path, name: str, export_of: Make) -> None:
    folder = Path(shutil.copytree(export_of({}, target="remote-code"), tmp_path / "exported"))
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    code = f"open({str(canary)!r}, 'w')".encode()
    (folder / name).write_bytes(code if name.endswith(".py") else pickle.dumps(Payload(canary)))
    if name in ("pytorch_model.bin", "model.safetensors"):
        with pytest.raises(UserError, match=re.escape(name)):
            open_source(folder)
    else:
        load_model(open_source(folder), torch.device("cpu"))  # such files are not looked at


def test_an_index_of_weights_names_files_of_its_folder_and_kind(tmp_path: Path, canary: Path, export_of: Make) -> None:
    folder = Path(shutil.copytree(export_of({}, max_shard_bytes=10_000), tmp_path / "exported"))
    index = folder / "model.safetensors.index.json"
    (folder / "evil.pt").write_bytes(pickle.dumps(Payload(canary)))
    original = json.loads(index.read_text())
    refused = {"../evil.bin": "not a file of its folder", "/etc/passwd": "not a file", "evil.pt": "neither", "": "not a file"}
    for name, match in refused.items():
        weight_map = dict.fromkeys(original["weight_map"], name)
        index.write_text(json.dumps({**original, "weight_map": weight_map}))
        with pytest.raises(UserError, match=match):
            open_source(folder)


# -- names ------------------------------------------------------------------------------------------------------------------

LEADING_OUT = ["", ".", "..", "../x", "/x", "x/../../y", "x/", "x//y", "a\0b", "a\nb", "n" * 256, "é" * 200, "\ud800"]


@pytest.mark.parametrize("name", [*LEADING_OUT, None, ["x"]])
def test_a_name_that_leads_out_of_its_folder_is_none(tmp_path: Path, name: object) -> None:
    assert not stays_inside(name)
    assert not stays_inside(name, nested=True)
    with pytest.raises(UserError, match=r"^index names .*, which is not a file of its folder"):
        inside(tmp_path, name, "index")


@pytest.mark.parametrize("name", ["x.npy", ".metadata", "...", "-rf", "a b", "日本", "~", "n" * 255])
def test_any_other_name_is_one_whatever_it_looks_like(tmp_path: Path, name: str) -> None:
    assert inside(tmp_path, name, "index").resolve().parent == tmp_path.resolve()
    assert stays_inside(f"group/{name}", nested=True)
    assert not stays_inside(f"group/{name}")


@pytest.mark.parametrize("key", ["job.run_name", "checkpoint.folder"])
def test_a_run_stays_in_its_dump_folder(key: str, tmp_path: Path) -> None:
    config, (section, _, last) = "[training]\nsteps = 1\n", key.partition(".")
    with pytest.raises(UserError, match=rf'{key} = .*: expected .*name without "\.\."'):
        config_from_toml(f'{config}[{section}]\n{last} = "a/../../b"\n')
    assert "group/run" in str(config_from_toml(f'{config}[{section}]\n{last} = "group/run"\n'))
    path = tmp_path / "...toml"  # of which `..` is the stem
    path.write_text(config)
    with pytest.raises(UserError, match=r'the file\'s name: job.run_name = "\.\."'):
        load_config(["--config", str(path)])
