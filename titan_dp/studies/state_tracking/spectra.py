"""What the theory says of the spectrum of DeltaProduct's transitions, measured on random draws.

Each function draws transitions, measures the quantity that its fact bounds, and returns the worst value with what the theory
allows. A transition is A = (I - beta_n k_n k_n^T) ... (I - beta_1 k_1 k_1^T) with unit keys: the product of a token's
steps. All is float64 in numpy, on matrices written out; the recurrence itself is not used. Draws alone prove nothing: the
proofs are in the sources named.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

ROUNDING = 1e-12  # of a product of a few matrices of size 1
EIGENVALUE_ROUNDING = 1e-6  # a double eigenvalue moves by the square root of rounding
MOST_STEPS = 8
LARGEST_DIM = 8


@dataclass(frozen=True)
class Fact:
    """A fact and its measurement."""

    statement: str
    quantity: str
    """What `worst` is."""
    draws: int
    worst: float
    """Of all draws, the value nearest to breaking the fact; for "appears" and "reaches", the one that shows it best."""
    allowed: str
    """What the theory says of `worst`."""
    holds: bool


def transitions(beta: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """A [..., d, d] of beta [..., n] and unit keys [..., n, d]; step 0 acts first."""
    identity = np.eye(keys.shape[-1])
    product = np.broadcast_to(identity, (*keys.shape[:-2], *identity.shape))
    for j in range(keys.shape[-2]):
        k = keys[..., j, :, None]
        product = (identity - beta[..., j, None, None] * k * k.swapaxes(-1, -2)) @ product
    return product


def norm_is_at_most_one(rng: np.random.Generator, draws: int) -> Fact:
    """The operator norm of A is at most 1 for beta in [0, 2], as every factor's is: no state grows, whatever n_h.

    Siems et al. 2025 (arXiv 2502.10297), section 4.
    """
    found = (transitions(_beta(rng, size, n, 2), _keys(rng, size, n, d)) for size, n, d in _shapes(draws))
    worst = max(float(np.linalg.norm(A, ord=2, axis=(-2, -1)).max()) for A in found)
    statement = f"||A|| <= 1 for beta in [0, 2], n_h = 1 to {MOST_STEPS}"
    return Fact(statement, "largest norm - 1", draws, worst - 1, f"<= {ROUNDING:g}", worst - 1 <= ROUNDING)


def complex_by_theorem(beta: np.ndarray, cosine: np.ndarray) -> np.ndarray:
    """Whether A of two factors has complex eigenvalues, for beta [..., 2] and the cosine [...] of the keys' angle.

    Exactly if both beta are above 1 and cosine^2 is strictly between (sqrt(beta_1 - 1) -+ sqrt(beta_2 - 1))^2 /
    (beta_1 beta_2): on the plane of the keys A has trace 2 - beta_1 - beta_2 + beta_1 beta_2 cosine^2 and determinant
    (1 - beta_1) (1 - beta_2), and its eigenvalues are complex where trace^2 < 4 determinant (Siems et al. 2025, Proposition
    1). With beta = 2 twice, A is a rotation by twice the keys' angle.
    """
    low, high = _complex_range(beta)
    return (beta > 1).all(-1) & (low < cosine**2) & (cosine**2 < high)


def _complex_range(beta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Between which cosine^2; both nan unless both beta >= 1."""
    with np.errstate(invalid="ignore"):
        roots, product = np.sqrt(beta - 1), beta.prod(-1)
        return (roots[..., 0] - roots[..., 1]) ** 2 / product, roots.sum(-1) ** 2 / product


def complex_condition_is_exact(rng: np.random.Generator, draws: int) -> Fact:
    """`complex_by_theorem` against the eigenvalues of A: the number of draws where they disagree.

    Draws within 1e-9 of the condition's boundary, where rounding decides, are not counted (and hardly ever happen).
    """
    mistaken = counted = found = 0
    for size, _, d in _shapes(draws):
        beta, cosine = _beta(rng, size, 2, 2), rng.uniform(-1, 1, size)
        keys = _two_keys(rng, cosine, d)
        measured = _largest_imaginary_part(transitions(beta, keys)) > EIGENVALUE_ROUNDING
        clear = ~np.any([np.abs(cosine**2 - bound) < 1e-9 for bound in _complex_range(beta)], axis=0)
        mistaken += int((measured != complex_by_theorem(beta, cosine))[clear].sum())
        counted, found = counted + int(clear.sum()), found + int((measured & clear).sum())
    statement = f"exact condition for complex eigenvalues of two factors (met by {found:,} draws)"
    return Fact(statement, "draws it gets wrong", counted, mistaken, "0, and met by some", mistaken == 0 < found < counted)


def two_factors_are_real_up_to_one(rng: np.random.Generator, draws: int) -> Fact:
    """For beta in [0, 1] the spectrum of two factors is real, in [0, 1] (Grazzi et al. 2025, arXiv 2411.12537, Theorem 1).

    Both factors are positive semidefinite, so that their product has the spectrum of one such matrix. Hence such
    models cannot do parity, which needs an eigenvalue -1.
    """
    worst = 0.0
    for size, _, d in _shapes(draws):
        values = np.linalg.eigvals(transitions(_beta(rng, size, 2, 1), _keys(rng, size, 2, d)))
        outside = max(np.abs(values.imag).max(), -values.real.min(), values.real.max() - 1)
        worst = max(worst, float(outside))
    statement = "two factors, beta in [0, 1]: spectrum real, in [0, 1]"
    limit = EIGENVALUE_ROUNDING
    return Fact(statement, "largest distance from [0, 1]", draws, worst, f"<= {limit:g}", worst <= limit)


def three_factors_can_be_complex(rng: np.random.Generator, draws: int) -> Fact:
    """With three factors complex eigenvalues appear for beta in [0, 1] too: a product of three such matrices can turn."""
    found = (transitions(_beta(rng, size, 3, 1), _keys(rng, size, 3, d)) for size, _, d in _shapes(draws))
    worst = max(float(_largest_imaginary_part(A).max()) for A in found)
    statement = "three factors, beta in [0, 1]: complex eigenvalues appear"
    return Fact(statement, "largest imaginary part", draws, worst, "> 0.01", worst > 0.01)


def equal_keys_collapse(rng: np.random.Generator, draws: int) -> Fact:
    """Factors with one key are one factor with beta* = 1 - prod(1 - beta_j): more steps help by different keys only."""
    worst = 0.0
    for size, n, d in _shapes(draws):
        beta, key = _beta(rng, size, n, 2), _keys(rng, size, 1, d)
        one = transitions(1 - (1 - beta).prod(-1, keepdims=True), key)
        worst = max(worst, float(np.abs(transitions(beta, key.repeat(n, 1)) - one).max()))
    statement = f"equal keys are one factor with 1 - prod(1 - beta_j), n_h = 1 to {MOST_STEPS}"
    return Fact(statement, "largest difference of entries", draws, worst, f"<= {ROUNDING:g}", worst <= ROUNDING)


def rwkv7_transitions(w: np.ndarray, c: float, a: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """diag(w) - c k (a * k)^T, [..., d, d], of RWKV-7 (Peng et al. 2025, arXiv 2503.14456).

    Args:
        w: decays [..., d] in [0, 1].
        c: 1 as published, or 2.
        a: step sizes [..., d] in [0, 1], one per channel.
        keys: [..., d], of unit length.
    """
    return np.eye(keys.shape[-1]) * w[..., None] - c * keys[..., :, None] * (a * keys)[..., None, :]


def rwkv7_pairs_can_grow(rng: np.random.Generator, draws: int, c: float) -> Fact:
    """The product of two RWKV-7 transitions can have a spectral radius above 1 (Siems et al. 2025, appendix B.6).

    The vectors k and a * k differ, so a factor's norm can exceed 1, though for w = 1 its own spectral radius cannot: it is
    similar to I - c u u^T with |u| <= 1. w = 1 here, and a is near an end of [0, 1] more often than not.
    """
    worst = single = 0.0
    for size, _, d in _shapes(draws):
        a = rng.beta(0.2, 0.2, (2, size, d))
        first, second = rwkv7_transitions(np.ones((2, size, d)), c, a, _keys(rng, 2, size, d))
        worst, single = max(worst, _spectral_radius(second @ first)), max(single, _spectral_radius(first))
    statement = f"RWKV-7, c = {c:g}: pairs reach a spectral radius > 1 (one alone {single:.4f} at most)"
    holds = worst > 1 + 1e-3 and single <= 1 + EIGENVALUE_ROUNDING
    return Fact(statement, "largest spectral radius", draws, worst, "> 1.001", holds)


def measure_all(rng: np.random.Generator, draws: int) -> Iterator[Fact]:
    """Every fact, each with about `draws` fresh draws."""
    yield norm_is_at_most_one(rng, draws)
    yield complex_condition_is_exact(rng, draws)
    yield two_factors_are_real_up_to_one(rng, draws)
    yield three_factors_can_be_complex(rng, draws)
    yield equal_keys_collapse(rng, draws)
    yield rwkv7_pairs_can_grow(rng, draws, c=1)
    yield rwkv7_pairs_can_grow(rng, draws, c=2)


def _shapes(draws: int) -> list[tuple[int, int, int]]:
    """(draws, n, d) over n = 1 to MOST_STEPS and d = 2 to LARGEST_DIM; the draws add up."""
    shapes = [(n, d) for n in range(1, MOST_STEPS + 1) for d in range(2, LARGEST_DIM + 1)]
    sizes = np.diff(np.linspace(0, draws, len(shapes) + 1).astype(int))
    return [(int(size), n, d) for size, (n, d) in zip(sizes, shapes, strict=True) if size]


def _beta(rng: np.random.Generator, size: int, n: int, largest: float) -> np.ndarray:
    """[size, n] in [0, largest], an end of it or 1 every fourth time."""
    ends = rng.choice([0.0, 1.0, largest], (size, n))
    return np.where(rng.random((size, n)) < 0.25, ends, rng.uniform(0, largest, (size, n)))


def _keys(rng: np.random.Generator, size: int, n: int, d: int) -> np.ndarray:
    """[size, n, d], uniform on the sphere."""
    keys = rng.standard_normal((size, n, d))
    return keys / np.linalg.norm(keys, axis=-1, keepdims=True)


def _two_keys(rng: np.random.Generator, cosine: np.ndarray, d: int) -> np.ndarray:
    """[size, 2, d] of unit length at an angle of the given cosine [size]; random apart from that."""
    first, other = _keys(rng, len(cosine), 2, d).swapaxes(0, 1)
    across = other - (other * first).sum(-1, keepdims=True) * first
    across /= np.linalg.norm(across, axis=-1, keepdims=True)
    return np.stack([first, cosine[:, None] * first + np.sqrt(1 - cosine**2)[:, None] * across], 1)


def _largest_imaginary_part(matrices: np.ndarray) -> np.ndarray:
    return np.abs(np.linalg.eigvals(matrices).imag).max(-1)


def _spectral_radius(matrices: np.ndarray) -> float:
    """The largest of all."""
    return float(np.abs(np.linalg.eigvals(matrices)).max())
