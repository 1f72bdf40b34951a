"""The commands of the pages can be followed literally: their programs, options, settings and files exist. So do links."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest

from titan_dp import cli
from titan_dp.config.load import load_config
from titan_dp.train.command import take_nproc

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "launch/README.md",
    *sorted(str(path.relative_to(ROOT)) for folder in ("docs", "docs/guides") for path in (ROOT / folder).glob("*.md")),
]
ACTIVATE = "source .venv/bin/activate"
_PROGRAMS = ("titan-dp", "python", "torchrun", "sbatch", "make", "source", "kubectl")
_STAND_INS = {"CHECKPOINT": "outputs/debug", "CHECKPOINT...": "outputs/debug"}
_CORRECT = 0


def commands(text: str) -> Iterator[list[str]]:
    """The words of every command in an indented block: prompts and comments gone, lines that go on joined."""
    block = "\n".join(line[4:] for line in text.splitlines() if line.startswith("    "))
    for line in re.sub(r"\\\n\s*", " ", block).splitlines():
        words = line.strip().removeprefix("$ ")
        if words.partition(" ")[0] in _PROGRAMS:
            yield [_STAND_INS.get(word, word) for word in shlex.split(words, comments=True)]


def files_shown(page: str) -> Iterator[tuple[str, str]]:
    """Name and content of every file that a page shows whole: a TOML block whose first line is a comment with the name."""
    for block in re.findall(r"```toml\n(.*?)```", (ROOT / page).read_text(), re.DOTALL):
        if name := re.match(r"# (\S+\.toml)\n", block):
            yield name[1], block


def found(page: str) -> list[list[str]]:
    return list(commands((ROOT / page).read_text()))


ALL = [pytest.param(page, command, id=f"{page}: {' '.join(command)[:90]}") for page in PAGES for command in found(page)]


def accepts(argv: list[str]) -> bool:
    """Whether `titan-dp argv` is understood; nothing is run."""
    if argv[0] == "train":
        return bool(load_config(take_nproc(argv[1:])[1]).config)
    where = cli.COMMANDS[argv[0]][0]
    module = import_module(where[argv[1]][0] if isinstance(where, dict) else where)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "run", lambda args: _CORRECT)
        return cli.dispatch(argv) == _CORRECT


def settings_of(argv: list[str]) -> list[str] | None:
    """The arguments of train.py, or of a launch script that hands them on; None where neither is started."""
    for i, word in enumerate(argv):
        if word in ("train.py", "titan_dp.train"):
            return argv[i + 1 :]
        if word.startswith("launch/slurm."):
            return ["--config", *argv[i + 1 :]]
    return None


def torchrun_options(argv: list[str]) -> set[str]:
    """The options before the script that torchrun, or what takes its place, starts."""
    script = next(i for i, word in enumerate(argv) if word in ("train.py", "titan_dp.train"))
    return {word.partition("=")[0] for word in argv[:script] if word.startswith("--")}


@pytest.mark.parametrize(("page", "command"), ALL)
def test_a_documented_command_is_understood_and_its_files_are_here(
    page: str, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where a reader has saved what the page shows
    for name, content in files_shown(page):
        Path(name).write_text(content)
    for word in command:
        if re.match(r"(train_configs|launch|benchmarks|corpus|docs|tests|titan_dp|kernels)/|train\.py$", word):
            assert list(ROOT.glob(word)), word
    program, *rest = command
    if program == "titan-dp":
        assert accepts(rest)
    elif program == "make":
        assert all(re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE) for target in rest)
    elif program == "python" and rest[0] == "-m":
        assert find_spec(rest[1]) is not None
    if (settings := settings_of(rest)) is not None:
        assert load_config(settings).config
    if program == "torchrun" or rest[1:2] == ["titan_dp.launch.torchrun"]:
        from torch.distributed.run import get_args_parser

        assert torchrun_options(rest) <= {name for action in get_args_parser()._actions for name in action.option_strings}


@pytest.mark.parametrize("page", PAGES)
def test_a_page_enters_the_environment_before_the_first_command_that_needs_it(page: str) -> None:
    programs = [" ".join(command) for command in found(page) if command[0] not in ("make", "sbatch", "kubectl")]
    assert not programs or programs[0] == ACTIVATE


def made_by(command: list[str]) -> set[str]:
    """The folders of runs, data and models that a command of a page makes."""
    options = dict(pairwise(command))
    match command:
        case ["make", "train"]:
            return {"outputs/debug", "data/corpus"}
        case ["make", "study"]:
            return {"outputs/cpu_study", "outputs/cpu_study_seeds", "outputs/cpu_study_largest"}
        case ["titan-dp", "prepare", *_]:
            return {options["--out"]}
        case ["titan-dp", "export" | "import", _, out, *_]:
            return {out}
        case ["titan-dp", "train", *_]:
            return {"outputs/" + options.get("--job.run_name", Path(options["--config"]).stem)}
        case ["titan-dp", "sweep", file, *_]:
            return {f"outputs/{Path(file).stem}"}
        case ["titan-dp", "state-tracking", "train", *_]:
            return {f"outputs/state_tracking/{options.get('--group', options.get('--task'))}"}
    return set()


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_reads_was_made_by_a_command_before_it_or_by_those_of_readme(page: str) -> None:
    made = made_by(["make", "train"]).union(*map(made_by, found("README.md") if page != "README.md" else []))
    for command in found(page):
        own = made_by(command)
        for word in re.findall(r"(?:outputs|data)/[\w./-]+|my-model[\w-]*", " ".join(command)):
            assert any(word == path or word.startswith(path + "/") for path in made | own), " ".join(command)
        made |= own


def test_the_environment_is_the_one_that_make_makes() -> None:
    assert "VENV := .venv" in (ROOT / "Makefile").read_text()
    assert [ACTIVATE.split()] == [command for command in found("README.md") if command[0] == "source"]


def test_no_file_that_a_guide_says_to_save_gives_its_run_the_name_of_another_guides_run() -> None:
    """A file's runs bear its name, and a run folder takes one model only."""
    text = "".join((ROOT / page).read_text() for page in PAGES)
    named = set(re.findall(r"--job\.run_name (\S+)", text))
    saved = set(re.findall(r"^```toml\n# (\w+)\.toml$", text, re.MULTILINE))
    assert {"48m", "study", "tuned"} <= saved
    assert {"mine", "finetuned"} <= named
    assert saved & named == set()


LINKED = [*PAGES, "CHANGELOG.md", "docs/cpu_study/README.md"]


@pytest.mark.parametrize("page", LINKED)
def test_the_links_of_a_page_lead_to_files(page: str) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", text):
        assert ((ROOT / page).resolve().parent / link).exists(), link


def test_the_index_of_docs_names_every_page() -> None:
    index = (ROOT / "docs/README.md").read_text()
    pages = [path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md") if path != ROOT / "docs/README.md"]
    assert [str(page) for page in pages if f"({page})" not in index] == []
