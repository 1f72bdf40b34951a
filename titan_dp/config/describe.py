"""The schema as people see it: names, expected values and explanations, drawn from schema.py's types and docstrings.

Three texts come from here and so cannot disagree: the "expected ..." of an error message, `train.py --help`, and
docs/config.md (`python -m titan_dp.config.describe > docs/config.md`; a test fails when the committed page is stale).
Nothing here imports torch.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, cached_property
from typing import Annotated, Any

from pydantic import ConfigDict, TypeAdapter
from pydantic.fields import FieldInfo

from titan_dp.config.schema import Config, Section
from titan_dp.files import to_json


@dataclass(frozen=True)
class Key:
    """One setting: `training.seq_len` is the key `seq_len` of the section `training`."""

    section: str
    name: str
    expected: str
    doc: str
    default: Any
    field: FieldInfo

    @property
    def dotted(self) -> str:
        return f"{self.section}.{self.name}"

    @property
    def is_flag(self) -> bool:
        return self.field.annotation is bool

    def of(self, config: Config) -> Any:
        """The value of this key in `config`."""
        value: Any = config
        for part in self.dotted.split("."):
            value = getattr(value, part)
        return value

    @cached_property
    def _type(self) -> TypeAdapter[Any]:
        annotation: Any = Annotated[self.field.annotation, self.field]  # the field carries the bounds
        return TypeAdapter(annotation, config=ConfigDict(strict=True, allow_inf_nan=False))

    def accepts(self, value: object) -> bool:
        """Whether the field's type takes `value`, apart from the rules of its section."""
        try:
            Section.fits_toml(self._type.validate_python(value))
        except ValueError:
            return False
        return True


def homes(name: str) -> list[str]:
    """The dotted keys that end in `name`, four at most; if some are of outer sections, only those."""
    found = [key.dotted for key in all_keys().values() if key.name == name]
    return [home for home in found if home.count(".") == min(other.count(".") for other in found)][:4]


def option_meant(name: str, options: Iterable[str], settings: bool = True) -> str:
    """'; did you mean --training.steps?' for --steps or --step: the nearest option or last part of a key, if one is near."""
    own = {option.lstrip("-"): option for option in options}
    keys = {key.name: " or ".join(f"--{home}" for home in homes(key.name)) for key in all_keys().values() if settings}
    names = keys | own
    near = get_close_matches(name, list(names), n=1)
    return f"; did you mean {names[near[0]]}?" if near else ""


@cache
def all_keys() -> dict[str, Key]:
    """Every key by its dotted name, in schema order."""
    return {key.dotted: key for key in walk(Config, "")}


@cache
def sections() -> dict[str, list[Key]]:
    """The keys of every section, in schema order; 'training.dataloader' follows 'training'."""
    result: dict[str, list[Key]] = {}
    for key in all_keys().values():
        result.setdefault(key.section, []).append(key)
    return result


def walk(model: type[Section], section: str) -> Iterator[Key]:
    """The keys of `model`, which is called `section`, then those of its subsections."""
    properties = model.model_json_schema()["properties"]
    inner = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            inner.append((field.annotation, f"{section}.{name}".lstrip(".")))
        else:
            yield Key(section, name, describe(properties[name]), field.description or "", field.default, field)
    for child, path in inner:
        yield from walk(child, path)


def describe(schema: dict[str, Any]) -> str:
    """The JSON schema of a value in words: 'integer > 0', '"auto" or "torch"', 'list of numbers > 0'."""
    if "anyOf" in schema:
        return " or ".join(describe(option) for option in schema["anyOf"] if option.get("type") != "null")
    if "enum" in schema or "const" in schema:
        return " or ".join(to_json(value) for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        kind, _, bounds = describe(schema["items"]).removeprefix("non-empty ").partition(" ")
        return f"{'non-empty ' if schema.get('minItems') else ''}list of {kind}s {bounds}".strip()
    if schema.get("type") == "boolean":
        return "true or false"
    kind = schema.get("type") or schema["title"]  # a type with a spelling of its own, such as Count, has only a title
    kind = f"non-empty {kind}" if schema.get("minLength") else kind
    signs = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    limits = {sign: schema[name] for name, sign in signs.items() if abs(schema.get(name, 2**62)) < 2**62}  # more: no limit
    return kind + " and".join(f" {sign} {limit:g}" for sign, limit in limits.items())


def to_toml(value: object) -> str:
    """`value` as TOML: strings escaped, floats in the shortest form that reads back the same."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):  # JSON's escapes are TOML's, except that TOML wants DEL escaped as well
        return to_json(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return "[" + ", ".join(to_toml(item) for item in value) + "]"
    assert isinstance(value, int | float), value
    return repr(value)


def default_text(key: Key) -> str:
    return "unset" if key.default is None else to_toml(key.default)


USAGE = """\
usage: titan-dp train --config NAME [--nproc N] [--section.key VALUE ...]
                      [--print-config | --dry-run]
       torchrun --nproc_per_node=N train.py --config NAME [...]

  --config NAME         a file, or else a shipped configuration of that name
  --nproc N             processes (default: one per GPU, two on CPUs)
  --section.key VALUE   override one setting (a flag needs no VALUE);
                        --section.key=VALUE works too
  --print-config        print every setting and where it comes from, and exit
  --dry-run             print parameters, FLOPs and memory of the run, and exit
  --help                print this and exit

The command line wins over the file, the file over the one it extends, that over
the defaults below.
"""


_WHOLE: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}


def help_text() -> str:
    """What `titan-dp train --help` and `train.py --help` print."""
    width = min(110, shutil.get_terminal_size((100, 24)).columns)
    parts = [USAGE]
    for section, members in sections().items():
        parts.append(f"[{section}]")
        for key in members:
            head = f"--{key.dotted}  ({key.expected}; default: {default_text(key)})"
            parts.append(textwrap.fill(head, width, initial_indent="  ", subsequent_indent=" " * 10, **_WHOLE))
            parts.append(textwrap.fill(key.doc, width, initial_indent=" " * 6, subsequent_indent=" " * 6))
        parts.append("")
    return "\n".join(parts)


PAGE = """\
# Configuration

<!-- Generated by `python -m titan_dp.config.describe > docs/config.md`; edit the docstrings in titan_dp/config/schema.py. -->

A run is described by one TOML file; any setting can be overridden on the command line:

    source .venv/bin/activate    # once per shell: the environment that `make install` made
    titan-dp train --config 800m.toml --optimizer.lr 1e-3 --compile.enable=false

* `--config NAME` takes the file of that path, or else the configuration of that name that ships (in `train_configs/`: `800m`,
  `paper/800m`). `.toml` may be left out. `titan-dp sweep NAME` finds its files by the same rule, in `train_configs/sweeps/`.
  `--job.config_file`, torchtitan's spelling, means the same.
* `extends = "base.toml"` at the top of a file inherits from another, found relative to the file itself, else among the
  shipped ones: `extends = "800m.toml"` works in any folder.
* Values on the command line are TOML: `3e-4`, `true`, `[3, 7]`. What does not parse as TOML is a string, so quotes are
  rarely needed. A flag without a value (`--debug.deterministic`) is `true`.
* The command line wins over the file, the file over the one it extends, and that over the defaults. `training.steps` and
  `training.tokens` are two spellings of one length: either undoes the other of a lower source.
* `--print-config` shows every setting and where it comes from; its output is itself a config file. `--dry-run` shows
  what the run would be (parameters, FLOPs, tokens, memory) and needs no GPU and no data.
* Mistakes are reported all at once, each with file and line, and with exit code 2. Settings that have no effect are
  named in the first lines of the run.
* A run writes its resolved configuration into the run folder and into every checkpoint.

Section and key names are torchtitan v0.2.2's wherever it has the setting. A key "unset" by default is left out of a file
to keep it so: TOML has no null.
"""


def page() -> str:
    """The text of docs/config.md."""
    parts = [PAGE]
    for section, members in sections().items():
        parts += [f"## [{section}]", "", "| key | default | expected | meaning |", "|---|---|---|---|"]
        for key in members:
            cells = (f"`{key.name}`", f"`{default_text(key)}`", key.expected, " ".join(key.doc.split()))
            parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append("")
    return "\n".join(parts)


if __name__ == "__main__":
    print(page(), end="")
