"""Groups as orthogonal matrices, and orthogonal matrices as products of reflections: the algebra of the constructions.

Every representation is a float64 array [order, d, d] with rho(a b) = rho(a) rho(b), where a b is "first b, then a" as in
`Group.table`. All are derived from the group's permutations, so that no numbering of the elements is assumed. Only the
representations that the constructions use are here.
"""

from __future__ import annotations

import numpy as np

from titan_dp.data.synthetic.groups import Group

_ZERO = 1e-9  # what is smaller is rounding: the entries are of order 1


def permutation_matrices(group: Group) -> np.ndarray:
    """[order, points, points]: element a takes the unit vector e_i to e_a(i)."""
    return np.eye(group.points)[group.permutations].swapaxes(1, 2)


def signs(group: Group) -> np.ndarray:
    """[order, 1, 1]: 1 for an even permutation and -1 for an odd one."""
    return np.linalg.det(permutation_matrices(group)).round()[:, None, None]


def rotations(group: Group) -> np.ndarray:
    """[order, 3, 3]: S4 as the rotations of a cube, A5 as those of a dodecahedron; determinant 1, faithful.

    Both groups act on the planes spanned by two unit vectors of the points (the exterior square of the permutation
    matrices), which holds the wanted representation once. The sum over a conjugacy class is a multiple of the identity on
    each irreducible part (Schur's lemma), and of all parts the wanted one has the largest for the class of an n-cycle: 2
    against -2 in S4, 6.5 against -2.5 and -3 in A5. So its space is that of the three largest eigenvalues.
    """
    matrices = permutation_matrices(group)
    i, j = np.triu_indices(group.points, 1)
    planes = matrices[:, i][:, :, i] * matrices[:, j][:, :, j] - matrices[:, i][:, :, j] * matrices[:, j][:, :, i]
    cycle = next(a for a in range(group.order) if _is_one_cycle(group.permutations[a]))
    space = np.linalg.eigh(planes[group.conjugates(cycle)].sum(0))[1][:, -3:]
    return space.T @ planes @ space


def _is_one_cycle(permutation: np.ndarray) -> bool:
    seen, point = 0, 0
    while seen == 0 or point != 0:
        seen, point = seen + 1, permutation[point]
    return seen == len(permutation)


def polygon(group: Group) -> np.ndarray:
    """[order, 2, 2]: Z_m and D_m (m >= 3) as symmetries of a regular m-gon, whose corners are the group's points."""
    angles = 2 * np.pi * np.arange(group.points) / group.points
    corners = np.stack([np.cos(angles), np.sin(angles)])
    return 2 / group.points * corners @ permutation_matrices(group) @ corners.T


def reflections(matrix: np.ndarray) -> np.ndarray:
    """Unit keys [r, d] with matrix = (I - 2 k_r k_r^T) ... (I - 2 k_1 k_1^T) and r = rank(matrix - I), the least possible.

    The proof of the Cartan-Dieudonne theorem as an algorithm. Let R move the unit vector e. The reflection F along
    R e - e takes R e back to e, and it fixes all that R fixes, which is orthogonal to R e - e. So F R fixes one dimension
    more than R. For a permutation matrix the keys are (e_a - e_b) / sqrt 2: the swaps, one fewer than points for each cycle.

    Args:
        matrix: [d, d] float64, orthogonal.
    """
    keys: list[np.ndarray] = []
    while np.abs(moves := matrix - np.eye(len(matrix))).max() > _ZERO:
        move = moves[:, np.linalg.norm(moves, axis=0).argmax()]
        key = np.where(np.abs(move) > _ZERO, move, 0) / np.linalg.norm(move)
        keys.append(key if key.max() >= -key.min() else -key)  # SiLU reaches far up, but only a little below 0
        matrix = matrix - 2 * np.outer(key, key @ matrix)
    return np.array(keys[::-1]).reshape(-1, len(matrix))
