"""Groups against the axioms, sympy's groups and plain composition of permutations."""

from __future__ import annotations

import math
import re
import secrets
from pathlib import Path

import numpy as np
import pytest
from sympy.combinatorics.named_groups import AlternatingGroup, DihedralGroup, SymmetricGroup
from sympy.combinatorics.perm_groups import PermutationGroup

from titan_dp.data.synthetic.groups import MAX_ORDER, Group, check_axioms, from_permutations, parse_group
from titan_dp.errors import UserError

random = np.random.default_rng(secrets.randbits(64))


def check(group: Group, name: str, order: int) -> None:
    """The axioms, and that the table composes faithful permutations: first b, then a."""
    table, permutations, elements = group.table, group.permutations, np.arange(order)
    assert (group.name, group.order, table.shape, permutations.shape) == (name, order, (order, order), (order, group.points))
    assert table.dtype == permutations.dtype == np.int64
    assert (np.sort(permutations, 1) == np.arange(group.points)).all()
    assert len({tuple(row) for row in permutations.tolist()}) == order
    assert (table[0] == elements).all()
    assert (table[:, 0] == elements).all()
    assert (np.sort(table, 1) == elements).all()  # every equation a x = b and x a = b has one solution
    assert (np.sort(table.T, 1) == elements).all()
    assert (table[table] == table[:, table]).all()
    assert (permutations[table] == permutations[:, permutations]).all()


def spectrum(table: np.ndarray) -> list[int]:
    """For every element, how often it must be repeated to come back to 0; sorted."""

    def order_of(a: int) -> int:
        count, power = 1, a
        while power != 0:
            power, count = int(table[a, power]), count + 1
        return count

    return sorted(map(order_of, range(len(table))))


# -- named groups ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "order"),
    [("Z1", 1), ("Z60", 60), ("D1", 2), ("D2", 4), ("D7", 14), ("S1", 1), ("S4", 24), ("A1", 1), ("A2", 1), ("A5", 60),
     ("Z2xZ2", 4), ("Z2xD1xA3", 12), ("A4xS3", 72)],
)  # fmt: skip
def test_the_axioms_hold_and_the_table_composes_faithful_permutations(name: str, order: int) -> None:
    check(parse_group(name), name, order)


@pytest.mark.parametrize(
    ("name", "known"),
    [("D8", DihedralGroup(8)), ("S5", SymmetricGroup(5)), ("A4", AlternatingGroup(4)), ("A6", AlternatingGroup(6))],
)
def test_elements_are_those_that_sympy_knows(name: str, known: PermutationGroup) -> None:
    group = parse_group(name)
    assert spectrum(group.table) == sorted(g.order() for g in known.elements)
    if name[0] in "SA":
        assert {tuple(row) for row in group.permutations.tolist()} == {tuple(g.array_form) for g in known.elements}


def test_elements_have_the_numbers_that_are_documented() -> None:
    n = secrets.choice(range(3, 40))
    residues = (np.arange(n)[:, None] + np.arange(n)) % n
    assert (parse_group(f"Z{n}").table == residues).all()
    dihedral = parse_group(f"D{n}").table
    assert (dihedral[:n, :n] == residues).all(), "rotations come first"
    assert (np.diag(dihedral)[n:] == 0).all(), "reflections undo themselves"
    assert spectrum(parse_group("D2").table) == [1, 2, 2, 2], "Klein's group"


def test_a_product_multiplies_its_factors_apart() -> None:
    group, (a, b) = parse_group("S3xD4"), (parse_group("S3"), parse_group("D4"))
    x, y = random.integers(group.order, size=(2, 300))
    assert (group.table[x, y] == a.table[x // 8, y // 8] * 8 + b.table[x % 8, y % 8]).all()


def test_moved_counts_the_points_an_element_moves() -> None:
    group = parse_group("S5")
    assert group.moved.tolist() == [sum(i != j for i, j in enumerate(row)) for row in group.permutations.tolist()]
    assert (group.moved == 2).sum() == math.comb(5, 2)


def test_permutations_that_are_not_closed_are_refused() -> None:
    with pytest.raises(UserError, match="'mine'.*closed"):
        from_permutations("mine", np.array([[0, 1, 2], [1, 2, 0]]))


FORMS = r"Z60 .*D4 .*S5 .*A5 .*S3xZ2.*\.csv"
TOO_LARGE = "more elements than a vocabulary may have, 8,192; take a smaller one"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        *((name, FORMS) for name in ("Q8", "S0", "Z03", "s3", "S3 ", "S3x", "S3XZ2", "", "S3\n", "Z٣")),
        ("S9x", f"^group 'S9x' is not known; .*{FORMS}"),
        ("S3xQ8xZ2", f"'Q8' in group 'S3xQ8xZ2' .*{FORMS}"),
        *((name, TOO_LARGE) for name in (f"Z{MAX_ORDER + 1}", "D4097", "S8", "A8", "S5xS5")),
        *((name, TOO_LARGE) for name in ("S999999999", "x".join(["S7"] * 200))),  # counting their elements would take hours
    ],
)
def test_a_name_that_is_no_group_is_refused(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_group(name)


# -- tables in files ---------------------------------------------------------------------------------------------------


def save(table: object, path: Path) -> str:
    np.savetxt(path, np.asarray(table), fmt="%d", delimiter=",")
    return str(path)


def quaternions() -> np.ndarray:
    """Q8 from 2 x 2 complex matrices, a group that no name makes; all elements except the identity in a random order."""
    i, j = np.array([[1j, 0], [0, -1j]]), np.array([[0, 1], [-1, 0]])
    one, *others = [s * m for m in (np.eye(2), i, j, i @ j) for s in (1, -1)]
    units = [one, *(others[n] for n in random.permutation(7))]
    return np.array([[next(n for n, c in enumerate(units) if np.allclose(a @ b, c)) for b in units] for a in units])


def test_a_table_in_a_file_is_the_group_it_holds(tmp_path: Path) -> None:
    table = quaternions()
    group = parse_group(save(table, tmp_path / "Q8.csv"))
    assert re.fullmatch("Q8-[0-9a-f]{8}", group.name)
    assert (group.table == table).all()
    check(group, group.name, 8)
    assert parse_group(save([[0]], tmp_path / "one.csv")).order == 1


@pytest.mark.filterwarnings("error")
def test_a_table_is_called_by_its_files_name_and_what_it_holds(tmp_path: Path) -> None:
    """A name stands for one group: runs of two tables that share a file name must not be compared."""
    texts = {
        "cyclic": "0,1,2,3\n1,2,3,0\n2,3,0,1\n3,0,1,2\n",
        "klein": "0,1,2,3\n1,0,3,2\n2,3,0,1\n3,2,1,0\n",
        "spaced": "0, 1, 2, 3\n\n 1 ,2, 3, 0\n2, 3, 0, 1\n3, 0, 1, 2\n\n",  # spaces and empty lines do not matter
    }
    for folder, text in texts.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "four.csv").write_text(text)
    cyclic, klein, spaced = (parse_group(str(tmp_path / folder / "four.csv")) for folder in texts)
    assert cyclic.name == spaced.name != klein.name
    assert (cyclic.table == spaced.table).all()


LOOP = [[0, 1, 2, 3, 4], [1, 0, 3, 4, 2], [2, 4, 0, 1, 3], [3, 2, 4, 0, 1], [4, 3, 1, 2, 0]]
"""A Latin square with an identity in which every element is its own inverse; 5 is odd, so no group."""


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([[0, 1, 2], [1, 2, 0]], r"has shape \(2, 3\); a multiplication table is square"),
        ([[0, 1], [1, 2]], r"it holds 2, but its elements are 0 to 1 \(closure\)"),
        ([[0, 1], [1, -1]], r"it holds -1, .*\(closure\)"),
        ([[1, 0], [0, 1]], "is not a group with identity 0: row 0 and column 0 must read 0, 1, ..., 1"),
        ([[0, 1, 2], [2, 0, 1], [1, 2, 0]], "is not a group with identity 0"),  # 0 is an identity on one side only
        ([[0, 1], [1, 1]], r"element 1 has no inverse \(row 1 has no 0\)"),
        (LOOP, r"\(associativity\)"),
    ],
)
def test_a_table_that_is_no_group_is_refused_with_the_axiom_it_breaks(table: list, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"broken.csv.*{message}"):
        parse_group(save(table, tmp_path / "broken.csv"))


def almost_a_group() -> np.ndarray:
    """Z2xZ2xZ2 with two values swapped in the corners of a rectangle: still a Latin square, with identity and inverses.

    Two groups' tables of order 8 differ in more than these 4 entries.
    """
    table = np.arange(8)[:, None] ^ np.arange(8)
    while True:
        a, b, c = (int(x) for x in random.integers(1, 8, size=3))
        if a != c and (d := a ^ b ^ c) != 0:
            table[np.ix_([a, c], [b, d])] = table[np.ix_([a, c], [d, b])]
            return table


TWICE = [[2 * LOOP[a // 2][b // 2] + (a ^ b) % 2 for b in range(10)] for a in range(10)]
"""Z2 x LOOP, whose first generator associates with everything."""


@pytest.mark.parametrize("table", [np.array(LOOP), np.array(TWICE), *(almost_a_group() for _ in range(3))])
def test_the_elements_that_do_not_associate_are_named_rightly(table: np.ndarray) -> None:
    with pytest.raises(UserError) as caught:
        check_axioms(table, "the loop")
    words = str(caught.value).split(": ")[1]
    a, b, c = (int(digit) for digit in words[: words.index(" is")].replace("(", "").replace(")", "").split())
    assert table[table[a, b], c] != table[a, table[b, c]]


NO_TABLE = "x.csv' is not a table of integers"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        *((text, NO_TABLE) for text in (b"0.0,1.5\n1.5,0\n", b"0,1\n1\n", b"a,b\n", b"# a\n0\n", b"\x89PNG\xff\xfe\x00")),
        (b"0,1\n1,99999999999999999999999\n", "x.csv"),
        (b"", "x.csv'"),
        (b"0\n" * (MAX_ORDER + 5), "has over 8,192 elements, the largest vocabulary"),
        (None, "x.csv' cannot be read"),
    ],
)
def test_a_file_that_holds_no_table_is_refused(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is None:
        (tmp_path / "x.csv").mkdir()
    else:
        (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        parse_group(str(tmp_path / "x.csv"))
    assert "\n" not in str(caught.value)
