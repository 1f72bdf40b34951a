"""What the commands of `titan-dp` share: commands of several kinds, and numbers that argparse reads, bounds and refuses."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any, TypeVar

from titan_dp.config.schema import parse_count

T = TypeVar("T")


def add_kinds(parser: argparse.ArgumentParser, kinds: dict[str, tuple[str, str]]) -> None:
    """A subcommand a kind, {name: (module, what it does)}; the chosen module's `run` becomes `args.run_kind`."""
    subparsers = parser.add_subparsers(metavar="KIND", required=True)
    for name, (module_name, summary) in kinds.items():
        module = import_module(module_name)
        description = (module.__doc__ or summary).split("\n\n")[0]
        subparser = subparsers.add_parser(name, help=summary, description=description, allow_abbrev=False)
        module.add_arguments(subparser)
        subparser.set_defaults(run_kind=module.run)


def add_settings(parser: argparse.ArgumentParser, description: str, keys: Iterable[str]) -> None:
    """`--section.key VALUE` as for train.py, for each of `keys`: they become `args.settings`, see `Settings`."""
    group = parser.add_argument_group("--section.key VALUE", description)
    for key in keys:
        add_setting(group, f"--{key}", key=key, help=argparse.SUPPRESS)


def add_setting(group: argparse._ActionsContainer, *names: str, key: str, help: str, value: str | None = None) -> None:
    """Option `names`, which stands for `--key VALUE`, or with `value` for `--key value`."""
    group.set_defaults(settings=Settings())
    group.add_argument(*names, action=_Set, dest=key, const=value, nargs="?" if value is None else 0, metavar="X", help=help)


class Settings(dict[str, str | None]):
    """The settings of a command line by dotted key: values as text, or None for a flag alone, which train.py takes as true."""

    def argv(self) -> list[str]:
        """The same as arguments of train.py."""
        return [f"--{key}" if value is None else f"--{key}={value}" for key, value in self.items()]


class _Set(argparse.Action):
    def __call__(self, parser: object, namespace: argparse.Namespace, values: Any, option_string: object = None) -> None:
        namespace.settings = Settings(namespace.settings | {self.dest: self.const if self.nargs == 0 else values})


def count(text: str) -> int:
    """'805M', '5G', '5e9' -> an integer above 0."""
    value = str(parse_count(text.removesuffix("G") + "B" if text.endswith("G") else text))
    expected = "count from 1 to 1e14 such as 805M, 1.3B or 5e9"
    return _bounded(text, lambda: round(float(value)), lambda n: 0 < n <= 1e14, expected)


def natural(text: str) -> int:
    return _bounded(text, lambda: int(text), lambda n: n >= 0, "whole number, 0 or more")


def grid(text: str) -> int:
    return _bounded(text, lambda: int(text), lambda n: 1 <= n <= 4096, "whole number from 1 to 4096")


def positive(text: str) -> int:
    return _bounded(text, lambda: int(text), lambda n: n >= 1, "whole number above 0")


def fraction(text: str) -> float:
    return _bounded(text, lambda: float(text), lambda x: 0 < x <= 1, "number above 0 and at most 1")


def above_zero(text: str) -> float:
    return _bounded(text, lambda: float(text), lambda x: 0 < x < 1e9, "number above 0")


def percent(text: str) -> float:
    """'0.25' -> 0.0025."""
    return _bounded(
        text, lambda: float(text.removesuffix("%")) / 100, lambda x: 0 < x <= 0.05, "percentage up to 5 such as 0.25"
    )


def householder_list(text: str) -> list[int]:
    """'1,2,4' -> [1, 2, 4]."""

    def fits(values: list[int]) -> bool:
        return len(set(values)) == len(values) and all(1 <= n <= 8 for n in values)

    return _bounded(
        text, lambda: [int(part) for part in text.split(",")], fits, "list of different n_h from 1 to 8 such as 1,2,3"
    )


def _bounded(text: str, read: Callable[[], T], fits: Callable[[T], bool], expected: str) -> T:
    try:
        value = read()
    except (ValueError, OverflowError):
        value = None
    if value is None or not fits(value):
        raise argparse.ArgumentTypeError(f"{text!r} is no {expected}")
    return value
