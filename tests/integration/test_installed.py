"""Both distributions as others install them: from a wheel, into a new environment, used in an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from tests.runs import SMALL
from titan_dp.config.describe import to_toml

SOURCE_IS_THERE = "from deltaproduct_kernels.native import HEADER, SOURCES; assert all(x.is_file() for x in (HEADER, *SOURCES))"


class Installed:
    """A new environment with a wheel in it, beside this one's other packages, and an empty folder to work in."""

    def __init__(self, project: Path, folder: Path) -> None:
        self.programs, self.folder = folder / "environment" / "bin", folder / "empty"
        self.folder.mkdir()
        # setuptools of this environment, since a test must not need a package index
        wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--wheel-dir", folder]
        # a copy: setuptools leaves its own files in the source
        source = folder / "source"
        files = subprocess.run(["git", "ls-files", "."], cwd=project, check=True, capture_output=True, text=True).stdout
        for name in files.splitlines():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            if (project / name).is_file():
                (source / name).write_bytes((project / name).read_bytes())
        subprocess.run([*wheel, source], check=True)
        venv.create(folder / "environment", with_pip=True)
        (wheel_file,) = folder.glob("*.whl")
        self.run("python", "-m", "pip", "install", "--quiet", "--no-deps", wheel_file)
        # What it depends on is borrowed. A path alone: this environment's own .pth file would lead to the checkout.
        site = next((folder / "environment").glob("lib/python*/site-packages"))
        (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def run(self, program: str, *arguments: str | Path) -> str:
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        done = subprocess.run(
            [self.programs / program, *arguments],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout


def test_an_installed_package_prepares_trains_sweeps_and_exports_in_an_empty_folder(root: Path, tmp_path: Path) -> None:
    titan = Installed(root, tmp_path)
    place = titan.run("python", "-c", "import titan_dp, deltaproduct_kernels as d; print(titan_dp.__file__, d.__file__)")
    assert place.count(str(tmp_path / "environment")) == 2, place
    titan.run("python", "-c", SOURCE_IS_THERE)
    (titan.folder / "texts").mkdir()
    for i in range(50):
        (titan.folder / "texts" / f"{i}.txt").write_text(f"Document {i} of fifty, each of which says its number: {i}.")
    titan.run("titan-dp", "prepare", "texts", "--out", "data", "--tokenizer", "bytes", "--validation-fraction", "0.2")
    settings = SMALL | {
        "data.path": "data/train",
        "validation.path": "data/validation",
        "training.steps": 2,
        "training.local_batch_size": 2,
    }
    lines = "".join(f"{key} = {to_toml(value)}\n" for key, value in settings.items())
    (titan.folder / "mine.toml").write_text('extends = "debug.toml"\n' + lines)
    titan.run("titan-dp", "train", "--config", "mine.toml")  # two processes: there is no GPU
    (titan.folder / "study.toml").write_text('extends = "mine.toml"\n[sweep.axes]\nnum_householder = [1, 2]\n')
    titan.run("titan-dp", "sweep", "study.toml", "--launch", "local", "--at-once", "2")
    runs = [titan.folder / "outputs" / name for name in ("mine", "study/nh1", "study/nh2")]
    assert [(run / "run.json").read_text().count('"finished"') for run in runs] == [1, 1, 1]
    titan.run("titan-dp", "export", "outputs/mine", "exported", "--format", "remote-code")
    assert (titan.folder / "exported" / "model.safetensors").exists()
    assert 'run_name = "800m"' in titan.run("titan-dp", "train", "--config", "800m.toml", "--print-config")
    assert "optimizer state" in titan.run("titan-dp", "estimate", "--config", "mine.toml", "--nproc", "1", "--gpu", "H100")
    assert "num_householder" in titan.run("titan-dp", "match", "--params", "805M", "--num-householder", "1,2")
    assert "deltaproduct" in titan.run("titan-dp", "state-tracking", "train", "--group", "S3", "--launch", "print")


def test_the_kernels_alone_run_the_layer_of_their_readme(root: Path, tmp_path: Path) -> None:
    example, _ = re.findall(r"```python\n(.*?)```", (root / "kernels" / "README.md").read_text(), re.DOTALL)
    kernels = Installed(root / "kernels", tmp_path)
    kernels.run("python", "-c", SOURCE_IS_THERE)
    check = "\nassert all(p.grad.isfinite().all() and p.grad.any() for p in layer.parameters())\nimport sys\n"
    kernels.run("python", "-c", example + check + "assert 'titan_dp' not in sys.modules and 'pydantic' not in sys.modules\n")
