"""Groups against the axioms, sympy's groups and plain composition of permutations."""

from __future__ import annotations

import math
import re
import secrets
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from sympy.combinatorics.named_groups import AlternatingGroup, CyclicGroup, DihedralGroup, SymmetricGroup
from sympy.combinatorics.perm_groups import PermutationGroup

from titan_dp.data.synthetic.groups import MAX_ORDER, Group, check_axioms, from_permutations, parse_group
from titan_dp.errors import UserError

ORDERS = {
    "Z1": 1,
    "Z2": 2,
    "Z60": 60,
    "D1": 2,
    "D2": 4,
    "D3": 6,
    "D7": 14,
    "S1": 1,
    "S2": 2,
    "S3": 6,
    "S4": 24,
    "S5": 120,
    "A1": 1,
    "A2": 1,
    "A3": 3,
    "A4": 12,
    "A5": 60,
    "A6": 360,
    "Z2xZ2": 4,
    "S3xZ2": 12,
    "Z2xD1xA3": 12,
    "A4xS3": 72,
}
every_group = pytest.mark.parametrize("name", ORDERS)
random = np.random.default_rng(secrets.randbits(64))


def composed(a: np.ndarray, b: np.ndarray) -> list[int]:
    """First b, then a, point by point."""
    return [int(a[b[i]]) for i in range(len(a))]


def order_of(table: np.ndarray, a: int) -> int:
    """How often a must be repeated to come back to 0."""
    count, power = 1, a
    while power != 0:
        power, count = int(table[a, power]), count + 1
    return count


def spectrum(orders: list[int]) -> list[int]:
    return sorted(orders)


def save(table: object, path: Path) -> str:
    np.savetxt(path, np.asarray(table), fmt="%d", delimiter=",")
    return str(path)


def refused(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse_group(name)
    assert "\n" not in str(caught.value)
    assert ";" in str(caught.value) or "is not a group" in str(caught.value)


# -- named groups ------------------------------------------------------------------------------------------------------


@every_group
def test_a_group_has_its_order_and_faithful_permutations(name: str) -> None:
    group = parse_group(name)
    assert (group.name, group.order, group.table.shape) == (name, ORDERS[name], (ORDERS[name], ORDERS[name]))
    assert group.permutations.shape == (group.order, group.points)
    assert (np.sort(group.permutations, 1) == np.arange(group.points)).all()
    assert len({tuple(row) for row in group.permutations.tolist()}) == group.order
    assert group.table.dtype == group.permutations.dtype == np.int64


@every_group
def test_the_axioms_hold(name: str) -> None:
    table = parse_group(name).table
    n = len(table)
    assert (table[0] == np.arange(n)).all()
    assert (table[:, 0] == np.arange(n)).all()
    for line in (*table, *table.T):  # every equation a x = b and x a = b has one solution
        assert sorted(line.tolist()) == list(range(n))
    triples = product(range(n), repeat=3) if n <= 14 else random.integers(n, size=(3000, 3)).tolist()
    for a, b, c in triples:
        assert table[table[a, b], c] == table[a, table[b, c]]


@every_group
def test_table_a_b_is_first_b_then_a(name: str) -> None:
    group = parse_group(name)
    for a, b in random.integers(group.order, size=(500, 2)).tolist():
        permutation = group.permutations[group.table[a, b]]
        assert permutation.tolist() == composed(group.permutations[a], group.permutations[b])


def test_the_order_of_a_product_matters_in_s3_and_not_in_z6() -> None:
    table = parse_group("S3").table
    assert (table != table.T).any()
    assert (parse_group("Z6").table == parse_group("Z6").table.T).all()


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("Z12", CyclicGroup(12)),
        ("D3", DihedralGroup(3)),
        ("D8", DihedralGroup(8)),
        ("S4", SymmetricGroup(4)),
        ("S5", SymmetricGroup(5)),
        ("A4", AlternatingGroup(4)),
        ("A5", AlternatingGroup(5)),
        ("A6", AlternatingGroup(6)),
    ],
)
def test_elements_have_the_orders_that_sympy_knows(name: str, known: PermutationGroup) -> None:
    table = parse_group(name).table
    assert spectrum([order_of(table, a) for a in range(len(table))]) == spectrum([g.order() for g in known.elements])


def test_permutations_of_s4_and_a5_are_sympys() -> None:
    for name, known in (("S4", SymmetricGroup(4)), ("A5", AlternatingGroup(5))):
        ours = {tuple(row) for row in parse_group(name).permutations.tolist()}
        assert ours == {tuple(g.array_form) for g in known.elements}


def test_the_small_dihedral_groups_are_z2_and_kleins() -> None:
    assert parse_group("D1").table.tolist() == parse_group("Z2").table.tolist()
    assert [order_of(parse_group("D2").table, a) for a in range(4)] == [1, 2, 2, 2]


def test_a_cyclic_groups_elements_are_its_residues() -> None:
    n = secrets.choice(range(3, 40))
    table = parse_group(f"Z{n}").table
    assert all(table[a, b] == (a + b) % n for a in range(n) for b in range(n))


def test_a_dihedral_groups_first_half_are_rotations_and_reflections_undo_themselves() -> None:
    table = parse_group("D5").table
    assert all(table[a, b] == (a + b) % 5 for a in range(5) for b in range(5))
    assert all(order_of(table, a) == 2 for a in range(5, 10))


def test_a_product_multiplies_its_factors_apart() -> None:
    group, (a, b) = parse_group("S3xD4"), (parse_group("S3"), parse_group("D4"))
    assert group.points == a.points + b.points
    for x, y in random.integers(group.order, size=(300, 2)).tolist():
        left, right = a.table[x // 8, y // 8], b.table[x % 8, y % 8]
        assert group.table[x, y] == left * 8 + right


def test_factors_of_coprime_order_make_a_cyclic_group() -> None:
    table = parse_group("Z3xZ4").table
    assert spectrum([order_of(table, a) for a in range(12)]) == spectrum([12 // math.gcd(a, 12) for a in range(12)])


def test_moved_counts_the_points_an_element_moves() -> None:
    group = parse_group("S5")
    assert group.moved.tolist() == [sum(i != j for i, j in enumerate(row)) for row in group.permutations.tolist()]
    assert (group.moved == 2).sum() == math.comb(5, 2)
    assert (parse_group("A5").moved[1:] >= 3).all()


def test_permutations_that_are_not_closed_are_refused() -> None:
    with pytest.raises(UserError, match="'mine'.*closed"):
        from_permutations("mine", np.array([[0, 1, 2], [1, 2, 0]]))


# -- names that are no group -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["Q8", "S", "3", "S0", "Z0", "Z-1", "Z03", "s3", "S3 ", " S3", "S3.5", "S3x", "xS3", "S3xx", "S3xQ8", "S3*Z2", "S3XZ2", "",
     "S3\n", "Z٣"],
)  # fmt: skip
def test_a_name_that_is_no_group_is_answered_with_the_forms_there_are(name: str) -> None:
    with pytest.raises(UserError, match=r"Z60 .*D4 .*S5 .*A5 .*S3xZ2.*\.csv"):
        parse_group(name)


def test_the_wrong_factor_of_a_product_is_named() -> None:
    refused("S3xQ8xZ2", "'Q8' in group 'S3xQ8xZ2'")


@pytest.mark.parametrize("name", [f"Z{MAX_ORDER + 1}", "D4097", "S8", "A8", "S5xS5", "Z100xZ100", "S50", "Z9" + "9" * 30])
def test_a_group_of_more_elements_than_a_vocabulary_may_have_is_refused(name: str) -> None:
    refused(name, rf"{name}.*more elements than a vocabulary may have, 8,192; take a smaller one")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["S999999999", "x".join(["S7"] * 200)])
def test_enormous_groups_are_refused_at_once_and_quietly(name: str) -> None:
    refused(name, "more elements than a vocabulary may have, 8,192")  # counting them would take hours


# -- tables in files ---------------------------------------------------------------------------------------------------


def quaternions() -> np.ndarray:
    """Q8 from 2 x 2 complex matrices, a group that no name makes."""
    i, j = np.array([[1j, 0], [0, -1j]]), np.array([[0, 1], [-1, 0]])
    units = [s * m for m in (np.eye(2), i, j, i @ j) for s in (1, -1)]
    return np.array([[next(n for n, c in enumerate(units) if np.allclose(a @ b, c)) for b in units] for a in units])


def relabelled(table: np.ndarray) -> np.ndarray:
    """The same group with its elements but the identity in another order."""
    names = np.concatenate([[0], 1 + random.permutation(len(table) - 1)])
    other = np.empty_like(table)
    other[np.ix_(names, names)] = names[table]
    return other


def test_a_table_in_a_file_is_the_group_it_holds(tmp_path: Path) -> None:
    table = relabelled(quaternions())
    group = parse_group(save(table, tmp_path / "Q8.csv"))
    assert re.fullmatch("Q8-[0-9a-f]{8}", group.name)
    assert group.order == 8
    assert (group.table == table).all()
    assert spectrum([order_of(group.table, a) for a in range(8)]) == [1, 2, 4, 4, 4, 4, 4, 4]


def test_a_table_is_called_by_its_files_name_and_what_it_holds(tmp_path: Path) -> None:
    """A name stands for one group: runs of two tables that share a file name must not be compared."""
    for folder, text in (("a", "0,1,2,3\n1,2,3,0\n2,3,0,1\n3,0,1,2\n"), ("b", "0,1,2,3\n1,0,3,2\n2,3,0,1\n3,2,1,0\n")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "four.csv").write_text(text)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "four.csv").write_text("0, 1, 2, 3\n\n1, 2, 3, 0\n2, 3, 0, 1\n3, 0, 1, 2")
    cyclic, klein, spaced = (parse_group(str(tmp_path / folder / "four.csv")).name for folder in "abc")
    assert cyclic == spaced != klein


def test_the_permutations_of_a_table_compose_as_it_says(tmp_path: Path) -> None:
    group = parse_group(save(relabelled(parse_group("A4").table), tmp_path / "a.csv"))
    for a, b in product(range(12), repeat=2):
        assert group.permutations[group.table[a, b]].tolist() == composed(group.permutations[a], group.permutations[b])
    assert group.permutations[0].tolist() == list(range(12))


@pytest.mark.filterwarnings("error")
def test_spaces_and_empty_lines_in_a_table_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / "z2.csv").write_text("0, 1\n\n 1 ,0\n\n")
    assert parse_group(str(tmp_path / "z2.csv")).table.tolist() == [[0, 1], [1, 0]]


def test_the_trivial_group_is_a_table_too(tmp_path: Path) -> None:
    (tmp_path / "one.csv").write_text("0\n")
    assert parse_group(str(tmp_path / "one.csv")).order == 1


LOOP = [[0, 1, 2, 3, 4], [1, 0, 3, 4, 2], [2, 4, 0, 1, 3], [3, 2, 4, 0, 1], [4, 3, 1, 2, 0]]
"""A Latin square with an identity in which every element is its own inverse; 5 is odd, so no group."""


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([[0, 1, 2], [1, 2, 0]], r"has shape \(2, 3\); a multiplication table is square"),
        ([[0], [1]], r"has shape \(2, 1\)"),
        ([[0, 1], [1, 2]], r"it holds 2, but its elements are 0 to 1 \(closure\)"),
        ([[0, 1], [1, -1]], r"it holds -1, .*\(closure\)"),
        ([[1, 0], [0, 1]], "is not a group with identity 0: row 0 and column 0 must read 0, 1, ..., 1"),
        ([[0, 1, 2], [2, 0, 1], [1, 2, 0]], "is not a group with identity 0"),  # 0 is an identity on one side only
        ([[0, 1], [1, 1]], r"element 1 has no inverse \(row 1 has no 0\)"),
        (LOOP, r"\(associativity\)"),
    ],
)
def test_a_table_that_is_no_group_is_refused_with_the_axiom_it_breaks(table: list, message: str, tmp_path: Path) -> None:
    refused(save(table, tmp_path / "broken.csv"), rf"broken.csv.*{message}")


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


@pytest.mark.parametrize("table", [np.array(LOOP), *(almost_a_group() for _ in range(5))])
def test_the_elements_that_do_not_associate_are_named_rightly(table: np.ndarray) -> None:
    with pytest.raises(UserError) as caught:
        check_axioms(table, "the loop")
    words = str(caught.value).split(": ")[1]
    a, b, c = (int(digit) for digit in words[: words.index(" is")].replace("(", "").replace(")", "").split())
    assert table[table[a, b], c] != table[a, table[b, c]]


def test_one_wrong_entry_of_a_large_table_is_noticed(tmp_path: Path) -> None:
    table = parse_group("S4").table.copy()
    row, (left, right) = random.integers(1, 24), random.choice(np.arange(1, 24), 2, replace=False)
    table[row, left], table[row, right] = table[row, right], table[row, left]
    refused(save(table, tmp_path / "swapped.csv"), "is not a group")


@pytest.mark.parametrize("text", ["0,1\n1,x\n", "0.0,1.5\n1.5,0\n", "0,1\n1\n", "0;1\n1;0\n", "a,b\n", "0,1\n1,\n", "# a\n0\n"])
def test_a_file_that_is_no_table_of_integers_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "text.csv").write_text(text)
    refused(str(tmp_path / "text.csv"), "text.csv' is no table of integers")


@pytest.mark.filterwarnings("error")
def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.csv").write_text("")
    refused(str(tmp_path / "empty.csv"), "empty.csv'")


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    refused(str(tmp_path / "nowhere.csv"), "nowhere.csv' cannot be read")
    (tmp_path / "folder.csv").mkdir()
    refused(str(tmp_path / "folder.csv"), "folder.csv' cannot be read")


def test_a_binary_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "image.csv").write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe\x00")
    refused(str(tmp_path / "image.csv"), "image.csv' is no table of integers")


def test_a_table_larger_than_a_vocabulary_is_refused(tmp_path: Path) -> None:
    (tmp_path / "large.csv").write_text("0\n" * (MAX_ORDER + 5))
    refused(str(tmp_path / "large.csv"), "has over 8,192 elements, the largest vocabulary")


def test_numbers_too_large_for_an_integer_are_refused(tmp_path: Path) -> None:
    (tmp_path / "big.csv").write_text("0,1\n1,99999999999999999999999\n")
    refused(str(tmp_path / "big.csv"), "big.csv")


def test_groups_are_compared_by_name_not_by_their_arrays() -> None:
    one = parse_group("S3")
    again = from_permutations("S3", one.permutations)
    assert isinstance(one, Group)
    assert one.name == again.name
    assert (one.table == again.table).all()
    assert one != again
