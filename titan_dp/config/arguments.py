"""What the commands of `titan-dp` share: numbers that argparse reads and bounds, and `--section.key VALUE` handed through.

A command that takes the settings of train.py calls `take_settings`; what argparse does not know arrives as `args.settings`,
arguments for `load_config`, which refuses what is wrong there in its own words.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter

from titan_dp.config.describe import describe, option_meant
from titan_dp.config.schema import from_home, parse_count
from titan_dp.errors import did_you_mean, fitted
from titan_dp.files import shown

T = TypeVar("T")


def take_settings(parser: argparse.ArgumentParser, about: str) -> None:
    """`--section.key VALUE` as for train.py, which `about` explains: `args.settings` gets them."""
    parser.add_argument_group("--section.key VALUE", about)
    parser.set_defaults(settings=[])


def take_commands(parser: argparse.ArgumentParser) -> None:
    """Commands behind `--`, each after a `--` of its own: `args.commands` gets the words of each."""
    parser.set_defaults(commands=[])


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """`parser.parse_args`, except that a command which takes settings gets as such what the parser does not know, and one which
    takes commands what is behind `--`.
    """
    own, settings = _settings_apart(argv)
    commands: list[list[str]] = []
    if _check_options(parser, own).get_default("commands") is not None:
        own, *commands = [list(words) for is_dash, words in groupby(own, "--".__eq__) if not is_dash]
    args, unknown = parser.parse_known_args(own)
    takes_settings = hasattr(args, "settings")
    if unknown or (settings and not takes_settings):
        parser.error(f"unrecognized arguments: {' '.join(unknown + settings * (not takes_settings))}")
    if takes_settings:
        args.settings = [*args.settings, *settings]
    if commands:
        args.commands = commands
    for name, value in vars(args).items():
        setattr(args, name, _from_home(value))
    return args


class Parser(argparse.ArgumentParser):
    """argparse's, with the nearest command for one that does not exist."""

    def error(self, message: str) -> NoReturn:
        if found := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)$", message):
            message += did_you_mean(found[1], re.findall(r"[\w-]+", found[2]))
        self.print_usage(sys.stderr)
        self.exit(2, fitted(f"{self.prog}: error: {message}\n", sys.stderr))


def _check_options(parser: argparse.ArgumentParser, words: list[str]) -> argparse.ArgumentParser:
    """Refuse an option that the command in `words` does not have, before argparse speaks of others that are missing.

    Returns the parser of that command.
    """
    rest = words[: words.index("--")] if "--" in words else words
    for word in rest:
        kinds = next((action for action in parser._actions if isinstance(action, argparse._SubParsersAction)), None)
        if kinds is not None and word in kinds.choices:
            parser = kinds.choices[word]
    known = parser._option_string_actions
    for word in rest:
        name = word.partition("=")[0]
        abbreviated = parser.allow_abbrev and any(option.startswith(name) for option in known)
        # What has a space is a value, as --sbatch "--mem=8G --time=1:00" has; argparse sees it so.
        if name.startswith("--") and " " not in word and name not in known and not abbreviated:
            hint = (
                option_meant(name[2:], known, parser.get_default("settings") is not None)
                or f"; `{parser.prog} --help` lists them"
            )
            parser.error(f"there is no option {name}{hint}")
    return parser


def _from_home(value: Any) -> Any:
    """Paths with the home folder for the "~" that a shell leaves as it is in quotes and in `--out=~/x`."""
    if isinstance(value, list):
        return [_from_home(each) for each in value]
    return Path(from_home(str(value))) if isinstance(value, Path) else value


def _settings_apart(argv: list[str]) -> tuple[list[str], list[str]]:
    """The words that are for argparse, and `--section.key` each with the value behind it, which argparse would take for a
    positional argument.
    """
    own: list[str] = []
    settings: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if not (word.startswith("--") and "." in word.partition("=")[0]):
            own.append(word)
            continue
        settings.append(word)
        if "=" not in word and words and not words[0].startswith("--"):
            settings.append(words.pop(0))
    return own, settings


def add_setting(parser: argparse.ArgumentParser, *names: str, key: str, help: str, value: str | None = None) -> None:
    """An option that stands for `--key VALUE`, or, with `value`, a flag that stands for `--key value`."""
    parser.add_argument(*names, action=_Set, dest=key, const=value, nargs=0 if value else None, metavar="X", help=help)


class _Set(argparse.Action):
    def __call__(self, parser: object, namespace: argparse.Namespace, values: Any, option_string: object = None) -> None:
        namespace.settings = [*namespace.settings, f"--{self.dest}={self.const or values}"]


def number(kind: Any) -> Callable[[str], Any]:
    """A reader for argparse, of a type such as `Positive` or `Annotated[float, Field(gt=0)]`; refusals describe the type."""
    adapter: TypeAdapter[Any] = TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False))
    return reader(adapter.validate_strings, describe(adapter.json_schema()))


def reader(read: Callable[[str], T], expected: str) -> Callable[[str], T]:
    """`read` for argparse: what it raises ValueError for is refused with what is `expected`."""

    def checked(text: str) -> T:
        try:
            return read(text)
        except (ValueError, OverflowError):  # pydantic's ValidationError is a ValueError
            raise argparse.ArgumentTypeError(f"{shown(text)}: expected {expected}") from None

    return checked


# No count of anything here needs more than 62 bits, and torch's integers have no more than 64.
positive = number(Annotated[int, Field(gt=0, lt=2**62)])
natural = number(Annotated[int, Field(ge=0, lt=2**62)])
fraction = number(Annotated[float, Field(gt=0, le=1)])
grid = number(Annotated[int, Field(ge=1, le=4096)])
above_zero = number(Annotated[float, Field(gt=0, lt=1e9)])
from_zero = number(Annotated[float, Field(ge=0, lt=1e9)])


def _count(text: str) -> int:
    value = parse_count(text.removesuffix("G") + "B" if text.endswith("G") else text)
    number = value if isinstance(value, int) else round(float(text))
    if not 0 < number <= 1e14:
        raise ValueError
    return number


def _percent(text: str) -> float:
    value = float(text.removesuffix("%")) / 100
    if not 0 < value <= 0.05:
        raise ValueError
    return value


def _householder_list(text: str) -> list[int]:
    values = [int(part) for part in text.split(",")]
    if len(set(values)) < len(values) or not all(1 <= n <= 8 for n in values):
        raise ValueError
    return values


count = reader(_count, "count from 1 to 1e14 such as 805M, 5G or 5e9")
percent = reader(_percent, "percentage up to 5 such as 0.25")
"""'0.25' as 0.0025."""
householder_list = reader(_householder_list, "list of different n_h from 1 to 8 such as 1,2,3")
