"""From the command line and TOML files to one checked `Config`, with the origin of every value.

    command line  >  file  >  the file it `extends`  >  defaults of config.py

Each source becomes a flat list of settings (dotted key, value, origin), and one function merges and checks them. The
invariant: nothing is dropped in silence. A key that does not exist, a value of the wrong type, a rule between values:
all problems of all sources are reported at once, each with its file and line, in one UserError.
What this leaves out: what needs data, devices or the number of ranks is checked where those are known.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import tomli
from pydantic import ValidationError

from titan_dp.config import Config, Section
from titan_dp.config.describe import Key, all_keys, help_text, sections, to_toml
from titan_dp.config.hints import explain_unknown
from titan_dp.config.warnings import ineffective_settings
from titan_dp.errors import UserError
from titan_dp.files import as_unicode, shorten, shown

# Two spellings of one quantity: setting one undoes the other of a source that ranks lower.
_ALTERNATIVES = {"training.steps": "training.tokens", "training.tokens": "training.steps"}

_DEEPEST = 8  # parts of a key; none that is known has half as many

PROJECT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Loaded:
    """A checked configuration and where each of its values came from.

    `provenance` maps every dotted key to "default", "FILE:LINE" or "command line". `config.job.run_name` is never empty
    when the configuration came from a file: it is the file's name unless set.
    """

    config: Config
    provenance: dict[str, str]
    print_config: bool = False
    dry_run: bool = False

    @property
    def run_name(self) -> str:
        return self.config.job.run_name

    def resolved_toml(self) -> str:
        """Every setting as TOML. `config_from_toml` of it gives an equal Config."""
        return self._toml(annotate=False)

    def annotated_toml(self) -> str:
        """`resolved_toml` with the origin of each value behind it, and unset keys as comments."""
        return self._toml(annotate=True)

    def _toml(self, annotate: bool) -> str:
        blocks = []
        for section, members in sections().items():
            lines = [(f"[{section}]", "")]
            for key in members:
                value = key.of(self.config)
                if value is not None:
                    lines.append((f"{key.name} = {to_toml(value)}", self.provenance[key.dotted]))
                elif annotate:
                    lines.append((f"# {key.name} =", "unset"))
            width = min(44, max(len(text) for text, _ in lines))
            blocks.append("\n".join(f"{text:<{width}}  # {note}" if annotate and note else text for text, note in lines))
        return "\n\n".join(blocks) + "\n"

    def warnings(self) -> list[str]:
        """A sentence for each setting somebody made that changes nothing."""
        return ineffective_settings(self.config, self.provenance)

    @cached_property
    def git_commit(self) -> str:
        """The commit of this project, with "+changes" when tracked files differ from it; "unknown" outside git."""

        def git(*arguments: str) -> str:
            return subprocess.run(
                ["git", "-C", str(PROJECT), *arguments], check=True, capture_output=True, text=True, timeout=20
            ).stdout.strip()

        if not (PROJECT / ".git").exists():  # installed, perhaps inside somebody else's repository
            return "unknown"
        try:
            return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
        except (OSError, subprocess.SubprocessError):
            return "unknown"


@dataclass(frozen=True)
class Setting:
    """One key set by one source."""

    key: str
    value: object
    origin: str

    @property
    def source(self) -> str:
        """The file, or "command line"."""
        return re.sub(r":\d+$", "", self.origin)


@dataclass
class Problems:
    """What is wrong so far, and the sections it leaves unknown: rules over those would only repeat it."""

    lines: list[str] = field(default_factory=list)
    unsound: set[str] = field(default_factory=set)

    def add(self, line: str, section: str | None = None) -> None:
        self.lines.append(line)
        self.unsound |= {section} if section else set()

    def add_unread(self, line: str) -> None:
        """A whole source cannot be read: whatever it would have set is unknown."""
        self.lines.append(line)
        self.unsound |= set(Config.model_fields)

    def raise_if_any(self) -> None:
        lines = list(dict.fromkeys(self.lines))
        if lines:
            raise UserError("\n  ".join([f"{len(lines)} problems in the configuration:", *lines] if lines[1:] else lines))


@dataclass
class CommandLine:
    """train.py's arguments, taken apart but not yet checked against the schema."""

    config: str | None = None
    print_config: bool = False
    dry_run: bool = False
    settings: list[Setting] = field(default_factory=list)


def load_config(argv: list[str]) -> Loaded:
    """Parse train.py's arguments (without the program's name) and the files they name.

    Prints the help and raises SystemExit for --help. Raises UserError with all problems at once.
    """
    if "--help" in argv or "-h" in argv:
        if os.environ.get("RANK", "0") == "0":
            print(help_text())
        raise SystemExit(0)
    problems = Problems()
    line = parse_command_line(argv, problems)
    settings: list[Setting] = []
    if line.config is None:
        problems.add_unread(f"command line: --config is missing; {_choices()}")
    elif path := resolve_config_path(line.config):
        from_files = [s for s in read_files(path, problems) if (s.key, s.value) != ("job.run_name", "")]
        settings = [Setting("job.run_name", path.stem, "the file's name"), *from_files]
    else:
        problems.add_unread(f"command line: there is no config {line.config!r}; {_choices()}")
    config, provenance = build_config([*settings, *line.settings], problems)
    return Loaded(config, provenance, line.print_config, line.dry_run)


def config_from_toml(text: str, name: str = "configuration", newer: bool = False) -> Config:
    """The Config of TOML text, such as a checkpoint's. Raises UserError; `name` stands for the file in messages.

    With `newer`, what this version does not know outside [model] is passed over: another version may have written it.
    """
    problems = Problems()
    settings = list(read_text(text, name, problems))
    if newer:
        settings = [s for s in settings if s.key.startswith("model.") or _is_known(s)]
    return build_config(settings, problems)[0]


def _is_known(setting: Setting) -> bool:
    """Whether this version has the key and the value; what allow_changed names is of the version that wrote it."""
    key = all_keys().get(setting.key)
    return key is not None and key.accepts(setting.value) and setting.key != "checkpoint.allow_changed"


# -- the command line --------------------------------------------------------------------------------------------------


def parse_command_line(argv: list[str], problems: Problems) -> CommandLine:
    """Take the arguments apart: `--key VALUE`, `--key=VALUE`, and `--flag` alone for true."""
    line = CommandLine()
    rest = [argument for argument in argv if argument.isascii() or as_unicode(argument) == argument]
    if len(rest) < len(argv):
        broken = next(argument for argument in argv if argument not in rest)
        problems.add_unread(f"command line: {shown(broken)} is not UTF-8; a setting is written down, so write it in UTF-8")
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            hint = (
                f"; write --config {shorten(argument)}" if argument.endswith(".toml") else "; a setting is --section.key VALUE"
            )
            problems.add(f"command line: unexpected {shown(argument)}{hint}")
            continue
        name, has_value, text = argument[2:].partition("=")
        if not has_value and rest and not rest[0].startswith("--") and name not in ("print-config", "dry-run"):
            has_value, text = "=", rest.pop(0)
        if name == "print-config":
            line.print_config = True
        elif name == "dry-run":
            line.dry_run = True
        elif name in ("config", "job.config_file"):
            if line.config is not None:
                problems.add(f"command line: --config is given twice ({line.config} and {text})")
            line.config = text
        else:
            key = all_keys().get(name)
            if not has_value and key is not None and not key.is_flag:
                problems.add(f"command line: --{name} needs a value; expected {key.expected}", name.partition(".")[0])
            else:
                line.settings.append(Setting(name, command_line_value(key, text) if has_value else True, "command line"))
    return line


def command_line_value(key: Key | None, text: str) -> object:
    """`text` read as a TOML value where that fits the key, else as a plain string: a run_name may be 123."""
    try:
        parsed = tomli.loads(f"value = {text}")
    except (ValueError, RecursionError):  # no TOML, or an integer of thousands of digits, or lists as deep
        return text
    if parsed.keys() != {"value"}:  # a newline, and more settings behind it
        return text
    value = parsed["value"]
    if key is None or key.accepts(value) or (isinstance(value, list) and "list of" in key.expected):
        return value  # a list for a key of lists is never meant as a name, even where it is the wrong one
    return text if key.accepts(text) else value


# -- files -------------------------------------------------------------------------------------------------------------


def config_folder() -> Path:
    """train_configs/ beside the package, or in the current directory for an installed package."""
    beside = PROJECT / "train_configs"
    return beside if beside.is_dir() else Path("train_configs")


def resolve_config_path(name: str) -> Path | None:
    """A bare name means train_configs/ first; anything with a slash is a path. The .toml may be left out."""
    folders = [Path()] if "/" in name else [config_folder(), Path()]
    candidates = (folder / (name + suffix) for folder in folders for suffix in ("", ".toml"))
    return next((path for path in candidates if name and _is_file(path)), None)


def _is_file(path: Path) -> bool:
    """False as well for names that no file can have, and for what must not be looked at."""
    try:
        return path.is_file()
    except OSError:
        return False


def _choices() -> str:
    names = sorted(path.name for path in config_folder().glob("*.toml"))
    return f"{config_folder()} holds {', '.join(names)}" if names else f"{config_folder()} holds none"


def read_files(path: Path, problems: Problems, seen: tuple[Path, ...] = ()) -> list[Setting]:
    """The settings of a file and of those it extends, the base's first."""
    name = _display(path)
    if path.resolve() in seen:
        problems.add_unread(f"{name}: `extends` goes round in a circle: {' -> '.join(_display(p) for p in (*seen, path))}")
        return []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        problems.add_unread(f"{name}: cannot be read as text: {error}")
        return []
    own, base = [], []
    for setting in read_text(text, name, problems):
        if setting.key != "extends":
            own.append(setting)
        elif not isinstance(setting.value, str):
            problems.add_unread(f"{setting.origin}: extends = {_show(setting.value)}: expected the name of one file")
        elif not _is_file(parent := path.parent / setting.value):
            problems.add_unread(f"{setting.origin}: extends = {_show(setting.value)}: there is no {shorten(str(parent))}")
        else:
            base = read_files(parent, problems, (*seen, path.resolve()))
    return base + own


def read_text(text: str, name: str, problems: Problems) -> Iterator[Setting]:
    """The settings of TOML text in its order, each with its line; a syntax error becomes a problem."""
    try:
        tomli.loads(text)
    except RecursionError:
        problems.add_unread(f"{name}: not valid TOML for this program: values are nested too deeply")
        return
    except ValueError as error:  # TOMLDecodeError, or Python's on an integer of thousands of digits
        message, at = shorten(str(error)), re.search(r" \(at line (\d+), column (\d+)\)", str(error))
        where = f"{name}:{at[1]}" if at else f"{name}:{text.count(chr(10)) + 1}"
        problems.add_unread(f"{where}: not valid TOML: {message.replace(at[0], f' (column {at[2]})') if at else message}")
        return
    # tomli keeps no line numbers. Valid TOML falls into statements (a header, or a key with its value) that parse on
    # their own; a statement ends with the first line at which what was gathered parses.
    header: list[str] = []
    start, chunk = 1, ""
    for number, line in enumerate(text.split("\n"), 1):
        chunk += line + "\n"
        try:
            parsed = tomli.loads(chunk)
        except tomli.TOMLDecodeError:
            continue
        if chunk.lstrip().startswith("["):
            header = _path_of(parsed)
        else:
            yield from _flatten(parsed, header, f"{name}:{start}")
        start, chunk = number + 1, ""


def _path_of(parsed: Any) -> list[str]:
    """The names of a lone header: [a.b] -> ['a', 'b']; an array of tables, [[a.b]], gives the same."""
    path = []
    while parsed:
        (part, parsed), *_ = parsed.items()
        path.append(part)
        parsed = parsed[0] if isinstance(parsed, list) else parsed
    return path


def _flatten(parsed: dict[str, Any], path: list[str], origin: str) -> Iterator[Setting]:
    for name, value in parsed.items():
        if isinstance(value, dict) and len(path) < _DEEPEST:
            yield from _flatten(value, [*path, name], origin)
        else:
            yield Setting(".".join([*path, name]), value, origin)


def _display(path: Path) -> str:
    """`path` from the current directory where it lies below that, else as given."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


# -- merging and checking ----------------------------------------------------------------------------------------------


def build_config(settings: list[Setting], problems: Problems) -> tuple[Config, dict[str, str]]:
    """Merge settings (later ones win) over the defaults and check everything; returns (config, provenance).

    Raises UserError with `problems` and all that is found here, a line each.
    """
    merged: dict[str, Setting] = {}
    for setting in settings:
        key, section = all_keys().get(setting.key), setting.key.partition(".")[0]
        if key is None:
            problems.add(f"{setting.origin}: unknown key {shorten(setting.key)}; {explain_unknown(setting.key)}", section)
        elif not key.accepts(setting.value):
            problems.add(f"{setting.origin}: {setting.key} = {_show(setting.value)}: expected {key.expected}", section)
        else:
            merged[setting.key] = setting
            other = merged.get(_ALTERNATIVES.get(setting.key, ""))
            if other is not None and other.source != setting.source:
                del merged[other.key]
    checked: dict[str, Section] = {}
    for name, info in Config.model_fields.items():
        try:
            assert isinstance(info.annotation, type)
            unknown = name in problems.unsound
            checked[name] = info.default if unknown else info.annotation.model_validate(_nested(name, merged))
        except ValidationError as error:
            checked[name] = info.default
            for text in _messages(error):
                problems.add(f"[{name}] {text}{_origins(text, name, merged)}", name)
    config = Config.model_construct(None, **checked)  # its rules are asked one by one instead
    if "checkpoint" not in problems.unsound:
        for name in config.checkpoint.allow_changed:
            if name not in all_keys():
                where = merged["checkpoint.allow_changed"].origin
                problems.add(f"{where}: checkpoint.allow_changed: unknown key {shorten(name)}; {explain_unknown(name)}")
    for involved, text in config.problems_across_sections():
        if not involved & problems.unsound:
            problems.add(text)
    problems.raise_if_any()
    return Config.model_validate(checked), {key: merged[key].origin if key in merged else "default" for key in all_keys()}


def _nested(section: str, merged: dict[str, Setting]) -> dict[str, Any]:
    """The settings of one section as pydantic wants them, subsections as dictionaries."""
    values: dict[str, Any] = {}
    for key, setting in merged.items():
        first, *inner, name = key.split(".")
        if first == section:
            target = values
            for part in inner:
                target = target.setdefault(part, {})
            target[name] = setting.value
    return values


def _messages(error: ValidationError) -> Iterator[str]:
    """What a section's own rules say; types have been checked before."""
    for item in error.errors():
        yield from item["msg"].removeprefix("Value error, ").split("\n")


def _origins(text: str, section: str, merged: dict[str, Setting]) -> str:
    """Where the keys that `text` mentions were set: ' (hidden_size from 800m.toml:7)'."""
    found = [
        f"{name} from {setting.origin}"
        for setting in merged.values()
        if setting.key.startswith(section + ".") and re.search(rf"\b{(name := setting.key.rpartition('.')[2])}\b", text)
    ]
    return f" ({', '.join(found)})" if found else ""


def _show(value: object) -> str:
    """A refused value as the user wrote it, as far as it can be told."""
    try:
        return shorten(to_toml(value) if isinstance(value, bool | str | int | float) else str(value))
    except ValueError:  # Python writes no integer of more than 4,300 digits, and TOML may have it in hexadecimal
        return "an integer of thousands of digits"
