"""From the command line and TOML files to one checked `Config`, with the origin of every value.

    command line  >  file  >  the file it `extends`  >  defaults of schema.py

Each source becomes a flat list of settings (dotted key, value, origin). They are merged, later ones win, and validated
once, by the schema. Nothing is dropped in silence: keys that do not exist, values of the wrong type and broken rules are
reported at once, each with its file and line, in one UserError. A file that cannot be read is reported alone.
What needs data, devices or the number of ranks is checked where those are known.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import tomli
from pydantic import ValidationError

from titan_dp.config.advice import HINTS, explain_unknown, ineffective_settings
from titan_dp.config.describe import Key, all_keys, help_text, option_meant, sections, to_toml, walk
from titan_dp.config.schema import Config, Section
from titan_dp.errors import UserError, did_you_mean, is_main_rank
from titan_dp.files import as_unicode, shorten, shown

# Two spellings of one quantity: setting one undoes the other if that came from a lower source.
_ALTERNATIVES = {"training.steps": "training.tokens", "training.tokens": "training.steps"}

_OPTIONS = {name: f"--{name}" for name in ("config", "nproc", "print-config", "dry-run", "help")}
_DEEPEST = 8  # parts of a key; no known key has half as many
_MISSING = object()

AnySection = TypeVar("AnySection", bound=Section)

PROJECT = Path(__file__).resolve().parents[2]
SHIPPED = Path(__file__).resolve().parents[1] / "train_configs"
"""The configurations that come with the package."""


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
        """A sentence for each setting somebody made that changes nothing; those of shipped files are nobody's."""
        origins = set(self.provenance.values())
        shipped = {origin for origin in origins if Path(_file_of(origin)).resolve().is_relative_to(SHIPPED)}
        return ineffective_settings(self.config, {k: "default" if o in shipped else o for k, o in self.provenance.items()})

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
        return _file_of(self.origin)


def _file_of(origin: str) -> str:
    return re.sub(r":\d+$", "", origin)


def _refused(problems: Iterable[str]) -> UserError:
    """One error with all `problems`, one per line."""
    lines = list(dict.fromkeys(problems))
    return UserError("\n  ".join([f"{len(lines)} problems in the configuration:", *lines] if lines[1:] else lines))


@dataclass
class CommandLine:
    """train.py's arguments, taken apart but not yet checked against the schema."""

    config: str | None = None
    print_config: bool = False
    dry_run: bool = False
    settings: list[Setting] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """What is neither an option nor a setting."""


def load_config(argv: list[str]) -> Loaded:
    """Parse train.py's arguments (without the program's name) and the files they name.

    Prints the help and raises SystemExit for --help. Raises UserError with all problems at once.
    """
    if "--help" in argv or "-h" in argv:
        if is_main_rank():
            print(help_text())
        raise SystemExit(0)
    line = parse_command_line(argv)
    path = resolve_config_path(line.config) if line.config else None
    if path is None:  # what the file would set is unknown, so settings cannot be judged
        if line.config is None:
            raise _refused([*line.problems, f"command line: --config is missing; {_choices()}"])
        stem = Path(line.config).stem
        if "/" not in line.config and (SHIPPED / "sweeps" / f"{stem}.toml").is_file():
            raise UserError(f"{line.config} describes a sweep and not one run; `titan-dp sweep {stem}` lists its runs")
        near = did_you_mean(line.config, (path.name for path in SHIPPED.glob("*.toml"))) or f"; {_choices()}"
        raise _refused([*line.problems, f"command line: there is no config {line.config!r}{near}"])
    from_files = [s for s in read_files(path) if (s.key, s.value) != ("job.run_name", "")]
    if of_many := next((s for s in from_files if s.key.startswith("sweep.")), None):
        raise UserError(f"{of_many.source} describes a sweep and not one run; `titan-dp sweep {path}` lists its runs")
    settings = [Setting("job.run_name", path.stem, "the file's name"), *from_files, *line.settings]
    config, provenance = build_config(settings, line.problems)
    return Loaded(config, provenance, line.print_config, line.dry_run)


def config_from_toml(text: str, name: str = "configuration", newer: bool = False) -> Config:
    """The Config of TOML text, such as a checkpoint's. Raises UserError; `name` stands for the file in messages.

    With `newer`, what this version does not know outside [model] is passed over: another version may have written it.
    """
    settings = list(read_text(text, name))
    if newer:  # what allow_changed names is of the version that wrote it
        other = {key for key, _ in _wrong(settings, all_keys(), explain_unknown)} | {"checkpoint.allow_changed"}
        settings = [s for s in settings if s.key.startswith("model.") or s.key not in other]
    return build_config(settings)[0]


# -- the command line --------------------------------------------------------------------------------------------------


def parse_command_line(argv: list[str]) -> CommandLine:
    """Take the arguments apart: `--key VALUE`, `--key=VALUE`, and `--flag` alone for true.

    Raises UserError if one is not UTF-8.
    """
    line, rest = CommandLine(), list(argv)
    if broken := next((word for word in argv if as_unicode(word) != word), None):
        raise UserError(f"command line: {shown(broken)} is not UTF-8; a setting is written down, so write it in UTF-8")
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            ways = f"write --config {shorten(argument)}" if argument.endswith(".toml") else "a setting is --section.key VALUE"
            line.problems.append(f"command line: unexpected {shown(argument)}; {ways}")
            continue
        name, has_value, text = argument[2:].partition("=")
        if name in ("print-config", "dry-run"):
            setattr(line, name.replace("-", "_"), True)
            continue
        if not has_value and rest and not rest[0].startswith("--"):
            has_value, text = "=", rest.pop(0)
        lone = "." not in name and name not in (*_OPTIONS, *HINTS)
        if lone and (near := option_meant(name, _OPTIONS.values())):
            line.problems.append(f"command line: there is no option --{shorten(name)}{near}")
            continue
        if name in ("config", "job.config_file"):
            if line.config is not None:
                line.problems.append(f"command line: --config is given twice ({line.config} and {text})")
            line.config = text
        else:
            key = all_keys().get(name)
            absent = True if key is None or key.is_flag else _MISSING
            line.settings.append(Setting(name, command_line_value(key, text) if has_value else absent, "command line"))
    return line


def keys_of(argv: list[str]) -> list[str]:
    """The keys that arguments of train.py set, in their order; wrong arguments are for `load_config` to refuse."""
    return [setting.key for setting in parse_command_line(argv).settings]


def command_line_value(key: Key | None, text: str) -> object:
    """`text` as a TOML value if that fits the key, else as a plain string: a run_name may be 123."""
    try:
        parsed = tomli.loads(f"value = {text}")
    except (ValueError, RecursionError):  # not TOML, an integer too long to parse, or lists nested too deeply
        return text
    if parsed.keys() != {"value"}:  # a newline with more settings behind it
        return text
    value = parsed["value"]
    if key is None or key.accepts(value) or (isinstance(value, list) and "list of" in key.expected):
        return value  # a list for a key of lists is never meant as a name, even if it is a wrong list
    return text if key.accepts(text) else value


# -- files -------------------------------------------------------------------------------------------------------------


def resolve_config_path(name: str, shipped: Path = SHIPPED) -> Path | None:
    """The file of that path, else the one of that name in `shipped`. The .toml may be left out."""
    candidates = (folder / (name + suffix) for folder in (Path(), shipped) for suffix in ("", ".toml"))
    return next((path for path in candidates if name and _is_file(path)), None)


def _is_file(path: Path) -> bool:
    """False as well for names that no file can have, and for what must not be looked at."""
    try:
        return path.is_file()
    except OSError:
        return False


def _choices() -> str:
    endings: dict[str, list[str]] = {}
    names = sorted(path.stem for path in SHIPPED.glob("*.toml"))
    for name in names:
        size, mark, ending = name.partition("_")
        size, ending = (size, mark + ending) if size in names else (name, "")
        endings.setdefault(size, []).append(ending)
    alike: dict[str, list[str]] = {}
    for size, own in endings.items():
        alike.setdefault(f" (also {', '.join(filter(None, own))})" * bool(own[1:]), []).append(size)
    listed = [", ".join(sizes) + also for also, sizes in alike.items()]
    return f"the shipped ones are {', '.join(listed)}; paper/ has the paper's shapes"


def read_files(path: Path, seen: tuple[Path, ...] = ()) -> list[Setting]:
    """The settings of a file and of those it extends, the base's first. Raises UserError for a file that cannot be read."""
    name = _display(path)
    if path.resolve() in seen:
        raise UserError(f"{name}: `extends` goes round in a circle: {' -> '.join(_display(p) for p in (*seen, path))}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{name}: cannot be read as text: {error}") from error
    own, base = [], []
    for setting in read_text(text, name):
        if setting.key != "extends":
            own.append(setting)
            continue
        said = f"{setting.origin}: extends = {_show(setting.value)}"
        if not isinstance(setting.value, str):
            raise UserError(f"{said}: expected the name of one file")
        beside, shipped = path.parent / setting.value, SHIPPED / setting.value
        parent = beside if _is_file(beside) else shipped
        if not _is_file(parent):
            raise UserError(f"{said}: there is no {shorten(str(beside))}; {_choices()}")
        base = read_files(parent, (*seen, path.resolve()))
    return base + own


def read_text(text: str, name: str) -> Iterator[Setting]:
    """The settings of TOML text in its order, each with its line. Raises UserError with the line of a syntax error."""
    try:
        tomli.loads(text)
    except RecursionError as error:
        raise UserError(f"{name}: not valid TOML for this program: values are nested too deeply") from error
    except ValueError as error:  # TOMLDecodeError, or Python's on an integer of thousands of digits
        message, at = shorten(str(error)), re.search(r" \(at line (\d+), column (\d+)\)", str(error))
        where = f"{name}:{at[1]}" if at else f"{name}:{text.count(chr(10)) + 1}"
        message = message.replace(at[0], f" (column {at[2]})") if at else message
        raise UserError(f"{where}: not valid TOML: {message}") from error
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
    """`path` relative to the current directory if it lies below that, else as given."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


# -- merging and checking ----------------------------------------------------------------------------------------------


def build_config(settings: list[Setting], problems: Iterable[str] = ()) -> tuple[Config, dict[str, str]]:
    """Merge settings (later ones win) over the defaults and validate them; returns (config, provenance).

    Raises UserError with `problems` and everything that is wrong here, one per line.
    """
    merged: dict[str, Setting] = {}
    for setting in settings:
        other = merged.get(_ALTERNATIVES.get(setting.key, ""))
        if other is not None and other.source != setting.source:
            del merged[other.key]
        merged[setting.key] = setting
    known = {key: setting for key, setting in merged.items() if key in all_keys()}
    values = _nested(known)
    wrong = _wrong(settings, all_keys(), explain_unknown)
    lines = [*problems, *(line for _, line in wrong)]
    unsound = {key.partition(".")[0] for key, _ in wrong}  # rules over a section with a mistake would only repeat it
    try:
        config, errors = Config.model_validate(values), []
    except ValidationError as error:
        config, errors = None, error.errors()
    allowed = known.get("checkpoint.allow_changed")
    if allowed is not None and "checkpoint" not in unsound:
        for name in (name for name in allowed.value if name not in all_keys()):  # type: ignore[attr-defined]  # a list
            lines.append(f"{allowed.origin}: {allowed.key}: unknown key {shorten(name)}; {explain_unknown(name)}")
    lines += _broken_rules(errors, known, unsound)
    lines += _broken_rules_across(values, unsound | {str(error["loc"][0]) for error in errors if error["loc"]})
    if config is None or lines:
        raise _refused(lines)
    return config, {key: known[key].origin if key in known else "default" for key in all_keys()}


def build_section(kind: type[AnySection], name: str, settings: list[Setting]) -> AnySection:
    """A section that Config does not have, such as [sweep] of a sweep file. Raises UserError with all that is wrong in it."""
    keys = {key.dotted: key for key in walk(kind, name)}

    def hint(unknown: str) -> str:
        near = get_close_matches(unknown, list(keys), n=1)
        return f"did you mean {near[0]}?" if near else f"the keys are {', '.join(keys)}"

    if wrong := _wrong(settings, keys, hint):
        raise _refused(line for _, line in wrong)
    return kind.model_validate(_nested({setting.key: setting for setting in settings}).get(name, {}))


def _wrong(settings: list[Setting], keys: dict[str, Key], hint: Callable[[str], str]) -> list[tuple[str, str]]:
    """Each key that does not exist or has a wrong value, in their order, also where a later source overrides it; and a line."""
    found = []
    for setting in settings:
        if (key := keys.get(setting.key)) is None:
            found.append((setting.key, f"{setting.origin}: unknown key {shorten(setting.key)}; {hint(setting.key)}"))
        elif not key.accepts(setting.value):
            absent = setting.value is _MISSING
            given = f"--{setting.key} needs a value;" if absent else f"{setting.key} = {_show(setting.value)}:"
            found.append((setting.key, f"{setting.origin}: {given} expected {key.expected}"))
    return found


def _nested(settings: dict[str, Setting]) -> dict[str, Any]:
    """The settings as pydantic wants them, sections as dictionaries."""
    values: dict[str, Any] = {}
    for key, setting in settings.items():
        *path, name = key.split(".")
        target = values
        for part in path:
            target = target.setdefault(part, {})
        target[name] = setting.value
    return values


def _broken_rules(errors: list[Any], known: dict[str, Setting], unsound: set[str]) -> Iterator[str]:
    """What sections' own rules say, with the origins of the keys they mention: '... (hidden_size from 800m.toml:7)'."""
    for error in errors:
        if not error["loc"] or error["loc"][0] in unsound:
            continue
        section = ".".join(map(str, error["loc"]))
        for text in error["msg"].removeprefix("Value error, ").split("\n"):
            own = [setting for key, setting in known.items() if key.rpartition(".")[0] == section]
            names = [(setting.key.rpartition(".")[2], setting.origin) for setting in own]
            origins = [f"{name} from {origin}" for name, origin in names if re.search(rf"\b{name}\b", text)]
            yield f"[{section}] {text}" + (f" ({', '.join(origins)})" if origins else "")


def _broken_rules_across(values: dict[str, Any], unsound: set[str]) -> Iterator[str]:
    """What the rules between sections say, except between `unsound` ones, where it would only repeat what was said.

    The schema asks these rules itself, but only once every section is sound, and all mistakes are to be told at once.
    """
    kinds: dict[str, Any] = {name: field.annotation for name, field in Config.model_fields.items() if name not in unsound}
    sound = {name: kind.model_validate(values.get(name, {})) for name, kind in kinds.items()}
    for broken, involved, text in Config.model_construct(**sound).rules():
        if broken and not unsound & set(involved.split()):
            yield text


def _show(value: object) -> str:
    """A refused value as the user wrote it, as far as it can be told."""
    try:
        return shorten(to_toml(value) if isinstance(value, bool | str | int | float) else str(value))
    except ValueError:  # Python writes no integer of more than 4,300 digits, and TOML may have it in hexadecimal
        return "an integer of thousands of digits"
