"""Finite groups as permutations and multiplication tables: Z_n, D_n, S_n, A_n, products of them, or any table in a file.

Element 0 is the identity. `table[a, b]` is a after b, the order in which a state is multiplied: y_t = x_t y_(t-1). Named
groups are made by composing permutations; a table from a file is believed only after the group axioms were checked.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, reduce
from pathlib import Path

import numpy as np

from titan_dp.errors import UserError

MAX_ORDER = 8192
"""Elements at most (S_7 has 5,040): every element is a token, and the table holds order^2 entries."""
_KINDS = "Z60 (cyclic), D4 (symmetries of a square), S5 (permutations), A5 (even ones), products as S3xZ2, or a table's .csv"


@dataclass(frozen=True, eq=False)
class Group:
    """A finite group; compare by `name`."""

    name: str
    table: np.ndarray
    """[order, order] int64: table[a, b] is the element "first b, then a"."""
    permutations: np.ndarray
    """[order, points] int64: element a takes point i to permutations[a, i]; faithful, and the identity is row 0."""

    @property
    def order(self) -> int:
        return len(self.table)

    @property
    def points(self) -> int:
        return self.permutations.shape[1]

    @property
    def moved(self) -> np.ndarray:
        """[order] points that each element moves: 0 for the identity, 2 for a swap."""
        return (self.permutations != np.arange(self.points)).sum(1)

    def conjugates(self, a: int) -> np.ndarray:
        """The elements g a g^-1 for all g, each once, in order."""
        inverse = (self.table == 0).argmax(1)
        return np.unique(self.table[self.table[:, a], inverse])

    @cached_property
    def smallest_normal_subgroup(self) -> int:
        """Elements of the smallest normal subgroup except the trivial one: 3 for S3, 4 for S4, 60 for A5 and S5."""
        smallest, left = self.order, set(range(1, self.order))
        while left:
            conjugates = self.conjugates(min(left))
            left -= set(conjugates.tolist())
            reached, new = np.zeros(self.order, dtype=bool), np.array([0])
            while len(new):
                reached[new] = True
                products = np.unique(self.table[new[:, None], conjugates])
                new = products[~reached[products]]
            smallest = min(smallest, int(reached.sum()))
        return smallest


@cache
def parse_group(name: str) -> Group:
    """The group called `name`: "Z60", "D4", "S5", "A5", a product such as "S3xZ2", or a file with a multiplication table.

    D_n has order 2n: the symmetries of a regular n-gon; D_1 and D_2 are Z2 and Z2xZ2.

    Raises UserError if there is no such group, it has more than MAX_ORDER elements, or a table is not one of a group.
    """
    if name.endswith(".csv"):
        return _from_file(Path(name))
    factors, order = [], 1
    for part in name.split("x"):
        match = re.fullmatch(r"([ZDSA])([1-9][0-9]*)", part)
        if match is None:
            what = f"{part!r} in group {name!r}" if part not in ("", name) else f"group {name!r}"
            raise UserError(f"{what} is not known; write {_KINDS}")
        factors.append((match[1], int(match[2])))
    for kind, n in factors:
        order *= _ORDERS[kind](n)
        if order > MAX_ORDER:
            raise UserError(f"group {name!r} has more elements than a vocabulary may have, {MAX_ORDER:,}; take a smaller one")
    return from_permutations(name, reduce(_side_by_side, (_PERMUTATIONS[kind](n) for kind, n in factors)))


def from_permutations(name: str, permutations: np.ndarray) -> Group:
    """The group of `permutations` [order, points], all of them different, closed under composition, the identity first.

    Elements are told apart by the images of a base, a few points that no two elements take to the same places. Raises
    UserError if a product's images belong to no element.
    """
    order, points = permutations.shape
    base = permutations[:, _base(permutations)]
    codes = _codes(base)
    sorted_order = np.argsort(codes, kind="stable")
    table = np.empty((order, order), dtype=np.int64)
    for a in range(order):
        composed = _codes(permutations[a][base])  # a after b for all b: point i goes to a[b[i]]
        place = np.searchsorted(codes[sorted_order], composed).clip(max=order - 1)
        table[a] = sorted_order[place]
        if (codes[table[a]] != composed).any():
            raise UserError(f"group {name!r}: a product of two of its permutations is not among them; give a closed set")
    assert (permutations[0] == np.arange(points)).all(), name
    return Group(name, table, permutations)


def check_axioms(table: np.ndarray, where: str) -> None:
    """Raises UserError naming the axiom and elements if `table` [n, n] of integers is not a group with identity 0."""
    n = len(table)
    if table.shape != (n, n) or n == 0:
        raise UserError(f"{where} has shape {table.shape}; a multiplication table is square, one row and column per element")
    if table.min() < 0 or table.max() >= n:
        outside = table[(table < 0) | (table >= n)][0]
        raise UserError(f"{where} is not a group: it holds {outside}, but its elements are 0 to {n - 1} (closure)")
    elements = np.arange(n)
    if (table[0] != elements).any() or (table[:, 0] != elements).any():
        raise UserError(f"{where} is not a group with identity 0: row 0 and column 0 must read 0, 1, ..., {n - 1}")
    if lonely := [a for a in range(n) if 0 not in table[a]]:
        raise UserError(f"{where} is not a group: element {lonely[0]} has no inverse (row {lonely[0]} has no 0)")
    for b in _generators(table):  # Light's test: middle factors that generate everything are enough
        wrong = table[table[:, b]] != table[:, table[b]]  # (a b) c against a (b c), for all a and c
        if wrong.any():
            a, c = np.argwhere(wrong)[0]
            raise UserError(f"{where} is not a group: ({a} {b}) {c} is not {a} ({b} {c}) (associativity)")


def _generators(table: np.ndarray) -> list[int]:
    """Elements whose products reach every element."""
    generators: list[int] = []
    reached = np.zeros(len(table), dtype=bool)
    reached[0] = True
    while not reached.all():
        generators.append(int(np.flatnonzero(~reached)[0]))
        reached[generators[-1]] = True
        before = 0
        while before != reached.sum():
            before = reached.sum()
            reached[table[np.flatnonzero(reached)][:, generators]] = True
    return generators


def _from_file(path: Path) -> Group:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of empty lines and files: the table is looked at below
            table = np.loadtxt(path, delimiter=",", dtype=np.int64, max_rows=MAX_ORDER + 1, comments=None, ndmin=2)
    except OSError as error:
        raise UserError(f"group {str(path)!r} cannot be read ({error}); give comma-separated element numbers") from error
    except ValueError as error:
        raise UserError(
            f"group {str(path)!r} is not a table of integers ({error}); write row a, column b: a after b"
        ) from error
    if len(table) > MAX_ORDER:
        raise UserError(f"group {str(path)!r} has over {MAX_ORDER:,} elements, the largest vocabulary; take a smaller one")
    check_axioms(table, f"group {str(path)!r}")
    name = f"{path.stem}-{hashlib.sha256(table.tobytes()).hexdigest()[:8]}"  # other tables of that name are other groups
    return Group(name, table, table)  # Cayley's theorem: a group permutes its own elements, b -> a b


def _cyclic(n: int) -> np.ndarray:
    return (np.arange(n)[:, None] + np.arange(n)) % n


def _dihedral(n: int) -> np.ndarray:
    """Rotations, then reflections, of n corners; fewer than 3 corners do not tell them apart, so those get more points."""
    if n < 3:
        return _cyclic(2) if n == 1 else _side_by_side(_cyclic(2), _cyclic(2))
    return np.concatenate([_cyclic(n), (np.arange(n)[:, None] - np.arange(n)) % n])


def _symmetric(n: int) -> np.ndarray:
    return np.array(list(itertools.permutations(range(n))), dtype=np.int64)


def _alternating(n: int) -> np.ndarray:
    everything = _symmetric(n)
    inversions = np.triu(everything[:, :, None] > everything[:, None, :]).sum((1, 2))
    return everything[inversions % 2 == 0]


_PERMUTATIONS = {"Z": _cyclic, "D": _dihedral, "S": _symmetric, "A": _alternating}
# A factorial stands in for all larger ones: 9! / 2 is above MAX_ORDER already.
_ORDERS: dict[str, Callable[[int], int]] = {
    "Z": lambda n: n,
    "D": lambda n: 2 * n,
    "S": lambda n: math.factorial(min(n, 9)),
    "A": lambda n: max(1, math.factorial(min(n, 9)) // 2),
}


def _side_by_side(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The direct product: every pair, acting on the points of both."""
    left, right = np.repeat(a, len(b), 0), np.tile(b, (len(a), 1))
    return np.concatenate([left, right + a.shape[1]], 1)


def _base(permutations: np.ndarray) -> list[int]:
    """Points whose images tell the elements apart."""
    base: list[int] = []
    for point in range(permutations.shape[1]):
        if len(np.unique(_codes(permutations[:, base]))) == len(permutations):
            break
        base.append(point)
    return base or [0]


def _codes(permutations: np.ndarray) -> np.ndarray:
    """One number per row: a random linear form modulo 2^64. `_base` sees to it that no two elements share theirs."""
    weights = np.random.default_rng(0).integers(2**63, size=permutations.shape[-1])
    return (permutations * weights).sum(-1)
