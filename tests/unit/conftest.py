"""What the configuration's tests share: a folder of config files to write and load."""

from __future__ import annotations

from pathlib import Path

import pytest

from titan_dp.config.load import Loaded, load_config
from titan_dp.errors import UserError

MINIMAL = "[training]\nsteps = 10\n"


class Folder:
    """A folder of config files to write and load by name."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, text: str, name: str = "run.toml") -> str:
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        (self.path / name).write_text(text)
        return str(self.path / name)

    def load(self, text: str, *arguments: str) -> Loaded:
        return load_config(["--config", self.write(text), *arguments])

    def problems(self, text: str, *arguments: str) -> list[str]:
        """The lines of the error, without the folder's name."""
        with pytest.raises(UserError) as caught:
            self.load(text, *arguments)
        lines = str(caught.value).replace(f"{self.path}/", "").split("\n  ")
        return lines[1:] if len(lines) > 1 else lines


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)
