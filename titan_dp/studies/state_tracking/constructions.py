"""Language models of this project with weights that solve a group's word problem by construction, not by training.

A model reads [BOS, x_1, ..., x_L] and its largest logit at x_t is y_t = x_t y_(t-1). Tokens are numbered as in
`WordProblem`: elements from 0, BOS = order + 1, order + 2 rows in the vocabulary. The models are
`build_model`'s own, without short convolution. The theory has no norms, SiLU, SwiGLU or keys of bounded length; they stay as
they are here, and the weights make up for them:

* Embeddings are unit vectors, so each column of a projection belongs to one token. A norm of width D with f entries of
  size 1 divides by sqrt(f / D + eps), the same for all tokens, and the projection after it multiplies that back.
* A key along d is silu(W x) = c d, normalised. Entries below zero lie in SiLU's dip, which ends at -0.278 and so limits c.
  Length 1 is missed by 1e-6 / (2 c^2), which shortens the state by up to 4 % in 4,096 random tokens, but hardly turns
  it: all directions are shortened in turn.
* beta = 2 sigmoid(+-1000) is 2 or 0, exactly in either dtype. A step that a token does not need has beta = 0.
* BOS turns the zero state into H_0 = sum_j k_j v_j^T with beta = 1: one column per step, so of rank n_h at most.
* All heads have the same keys and values. Head r has the query e_r and reads row r of the state.
* eps is 1. The norm of the read-out, o / sqrt(mean o^2 + 1), is the identity for states of size 1e-3 and the sign for those
  of size 1e4.
* The state is rho(y_t) H_0, and the logit of g its inner product with rho(g) H_0. As rho is orthogonal, all these have the
  same length, so the inner product is largest at g = y_t, provided that rho(g) H_0 differs for all g.

Nothing here is trained or checked: `theory.py` runs the models.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_dp import config
from titan_dp.data.synthetic.groups import Group
from titan_dp.model.deltaproduct import DeltaProduct
from titan_dp.model.layers import RMSNorm
from titan_dp.model.transformer import SwiGLU, Transformer, build_model
from titan_dp.studies.state_tracking import representations

LOGIT = 1000.0  # of beta: sigmoid is 0 or 1 there
DIP = 0.25  # how far below zero SiLU is used; its minimum is -0.278
LONG = 1000.0  # length of a key before it is normalised, where no entry is below zero
LINEAR, SIGN = 1e-3, 1e4  # sizes of a state for which the norm of the read-out is the identity, and the sign


class Steps(NamedTuple):
    """What a mixer does at each of its input's S symbols, in float64."""

    keys: Tensor  # [S, n, d], of unit length; zero where beta is
    beta: Tensor  # [S, n], each 0, 1 or 2
    values: Tensor  # [S, n, d]
    queries: Tensor  # [S, heads, d], of unit length

    @staticmethod
    def idle(symbols: int, n: int, d: int) -> Steps:
        """No key, and head r of d reads row r of the state."""
        queries = torch.eye(d, dtype=torch.float64).repeat(symbols, 1, 1)
        zeros = queries.new_zeros(symbols, n, d)
        return Steps(zeros, zeros[..., 0].clone(), zeros.clone(), queries)

    def reflect(self, symbol: int, matrix: np.ndarray) -> None:
        """At `symbol`, multiply the state by the orthogonal `matrix` [d, d], of rank(matrix - I) <= n."""
        keys = torch.from_numpy(representations.reflections(matrix))
        self.keys[symbol, : len(keys)] = keys
        self.beta[symbol, : len(keys)] = 2

    def start(self, symbol: int, columns: np.ndarray, size: float) -> None:
        """At `symbol`, turn a zero state into size * columns [d, c], orthonormal, not negative, c <= n."""
        c = columns.shape[1]
        self.keys[symbol, :c] = torch.from_numpy(columns.T.copy())
        self.beta[symbol, :c] = 1
        self.values[symbol, :c, :c] = size * torch.eye(c, dtype=torch.float64)


def swaps(group: Group, backend: str = "auto") -> Transformer:
    """S_n in one layer with n_h = n - 1 (Siems et al. 2025, arXiv 2502.10297, Theorem 1 (i)).

    rho(x) is the permutation matrix. A permutation is a product of at most n - 1 swaps, and the swap of a and b is the
    reflection with key (e_a - e_b) / sqrt 2 and beta = 2. H_0 holds e_1, ..., e_(n-1), whose images tell that of e_n.
    """
    matrices = representations.permutation_matrices(group)
    return _one_layer(group, matrices, np.eye(group.points)[:, :-1], backend)


def rotations(group: Group, backend: str = "auto") -> Transformer:
    """S4 and A5 in one layer with n_h = 2, as rotations of three dimensions (Siems et al. 2025, Theorem 4).

    A rotation is the product of two reflections whose keys are orthogonal to its axis, half its angle apart. So S4 needs two
    steps instead of three and A5 two instead of four. H_0 holds e_1 and e_2, whose images tell that of e_3.
    """
    return _one_layer(group, representations.rotations(group), np.eye(3)[:, :2], backend)


def parity(group: Group, backend: str = "auto") -> Transformer:
    """Z2 in one layer with n_h = 1: 1 x 1 matrices, and the transition 1 - beta = -1 at each element 1.

    What beta <= 1 cannot do (Grazzi et al. 2025, arXiv 2411.12537, Theorem 1).
    """
    return _one_layer(group, representations.signs(group), np.eye(1), backend)


def mirrors(group: Group, backend: str = "auto") -> Transformer:
    """Z_m and D_m, m >= 3, in two layers with n_h = 1 (Grazzi et al. 2025, Theorem 6; Siems et al. 2025, Theorem 6).

    rho(x) is a symmetry of the m-gon, a rotation or a reflection, but one step can only reflect. Let p_t be the parity of the
    number of rotations among x_1, ..., x_t, and M = diag(1, -1). Layer 2 keeps M^p_t rho(y_t) h_0 instead of rho(y_t) h_0. Its
    transition M^p_t rho(x_t) M^p_(t-1) has determinant -1 for rotations, at which p changes, and for reflections, at which
    it does not: always one reflection, which x_t and p_t determine. The queries are the rows of M^p_t, so that M cancels
    in the read-out. h_0 is a quarter of a corner's angle away from a mirror, so all its images differ.

    Layer 1 keeps (-1)^p_t in a state so large that the norm makes it exactly +-1. Its SwiGLU finds the pair (x_t, p_t): unit
    (x, p) is silu(1 if x_t = x, else 0) times (1 +- (-1)^p_t) / 2.
    """
    matrices, V = representations.polygon(group), group.order + 2
    is_rotation = np.linalg.det(matrices) > 0
    h_0 = np.array([[np.cos(np.pi / (2 * group.points))], [np.sin(np.pi / (2 * group.points))]])
    model = _zero_model(V, features=1 + 2 * V, layers=2, n=1, d=2, mlp=2 * V, backend=backend)
    first, second = model.blocks
    parity_at, pairs_at = V, V + 1 + torch.arange(2 * V)
    _write_mixer(first.attn, torch.arange(V), _unit(model, 1), _count_rotations(is_rotation))
    first.attn.o_proj.weight[parity_at, 0] = 2**-0.5  # the norm makes (a, 0), a large, (+-sqrt 2, 0)
    _write_pairs(first.mlp, V, parity_at, pairs_at, _unit(model, 2))
    _write_mixer(second.attn, pairs_at, _unit(model, 3), _follow_mirrored(matrices, is_rotation, h_0))
    _write_output(model, matrices @ h_0)
    return model


def _count_rotations(is_rotation: np.ndarray) -> Steps:
    """Layer 1 of `mirrors`: the state is (+-a, 0) and changes its sign at the elements that are rotations [order]."""
    order = len(is_rotation)
    steps = Steps.idle(order + 2, n=1, d=2)
    steps.start(order + 1, np.eye(2)[:, :1], SIGN)
    for x in np.flatnonzero(is_rotation).tolist():
        steps.reflect(x, np.diag([-1.0, 1.0]))
    return steps


def _write_pairs(mlp: SwiGLU, V: int, parity_at: int, pairs_at: Tensor, unit: float) -> None:
    """Let `mlp` write 1 to entry pairs_at[p V + x] of the residual stream, of the pair of token x < V and parity p."""
    tokens = torch.arange(V)
    for p in (0, 1):
        hidden = p * V + tokens
        mlp.gate_proj.weight[hidden, tokens] = 1 / unit
        mlp.up_proj.weight[hidden, :V] = 0.5 / unit  # some token is always there: the constant 1/2
        mlp.up_proj.weight[hidden, parity_at] = (0.5 - p) / unit
        mlp.down_proj.weight[pairs_at[hidden], hidden] = 1 / F.silu(torch.tensor(1.0, dtype=torch.float64))


def _follow_mirrored(matrices: np.ndarray, is_rotation: np.ndarray, h_0: np.ndarray) -> Steps:
    """Layer 2 of `mirrors`, whose symbol p V + x is token x with parity p after it: the state is M^p rho(y) h_0."""
    order, powers = len(matrices), (np.eye(2), np.diag([1.0, -1.0]))
    V = order + 2
    steps = Steps.idle(2 * V, n=1, d=2)
    steps.start(order + 1, h_0, LINEAR)
    for p, x in np.ndindex(2, order):
        before = 1 - p if is_rotation[x] else p
        steps.reflect(p * V + x, powers[p] @ matrices[x] @ powers[before])
        steps.queries[p * V + x] = torch.from_numpy(powers[p])
    return steps


def _one_layer(group: Group, matrices: np.ndarray, columns: np.ndarray, backend: str) -> Transformer:
    """The state rho(y_t) H_0, for rho = `matrices` [order, d, d] and H_0 = `columns` [d, n_h]."""
    V, (d, n) = group.order + 2, columns.shape
    model = _zero_model(V, features=0, layers=1, n=n, d=d, mlp=1, backend=backend)
    steps = Steps.idle(V, n, d)
    steps.start(group.order + 1, columns, LINEAR)
    for x in range(group.order):
        steps.reflect(x, matrices[x])
    _write_mixer(model.blocks[0].attn, torch.arange(V), _unit(model, 1), steps)
    _write_output(model, matrices @ columns)
    return model


def _zero_model(vocabulary: int, features: int, layers: int, n: int, d: int, mlp: int, backend: str) -> Transformer:
    """In float64, all zero but norms (1) and embeddings. The residual stream: tokens, features, the state read (d x d)."""
    c = config.Model(
        hidden_size=vocabulary + features + d * d,
        num_hidden_layers=layers,
        num_heads=d,
        head_dim=d,
        num_householder=n,
        allow_neg_eigval=True,
        use_short_conv=False,
        intermediate_size=mlp,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
        norm_eps=1.0,
        backend=backend,  # type: ignore[arg-type]
    )
    model = build_model(c).double().requires_grad_(False)
    for parameter in model.parameters():
        parameter.zero_()
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.weight.fill_(1)
    model.embeddings.weight[:, :vocabulary] = torch.eye(vocabulary)
    return model


def _unit(model: Transformer, active: int) -> float:
    """What a norm makes of an entry 1 where `active` entries of the residual stream are +-1 and the others (nearly) 0."""
    return (active / model.embeddings.embedding_dim + model.norm.eps) ** -0.5


def _write_mixer(mixer: nn.Module, inputs: Tensor, unit: float, steps: Steps) -> None:
    """Let `mixer` do `steps` where entry inputs[s] of its normalised input is `unit`, which means symbol s [S]."""
    assert isinstance(mixer, DeltaProduct)
    heads = mixer.heads

    def write(projection: nn.Linear, columns: Tensor) -> None:
        projection.weight[:, inputs] = columns.flatten(1).T / unit

    def for_each_head(x: Tensor) -> Tensor:  # [S, n, ...] -> [S, n, heads, ...], the layout of the projections
        return x.unsqueeze(2).expand(-1, -1, heads, *x.shape[2:])

    write(mixer.q_proj, before_silu(_stretch(steps.queries)))
    write(mixer.k_proj, for_each_head(before_silu(_stretch(steps.keys))))
    write(mixer.v_proj, for_each_head(before_silu(steps.values)))
    write(mixer.b_proj, for_each_head(LOGIT * (steps.beta - 1)))


def _write_output(model: Transformer, states: np.ndarray) -> None:
    """Copy the last mixer's read-out into the residual stream; the logit of g is its inner product with states[g] [d, c]."""
    assert model.lm_head is not None
    order, d, c = states.shape
    state = slice(-d * d, None)
    model.blocks[-1].attn.o_proj.weight[state] = torch.eye(d * d)
    model.lm_head.weight[:order, state] = F.pad(torch.from_numpy(states), (0, d - c)).flatten(1)


def _stretch(directions: Tensor) -> Tensor:
    """Vectors along `directions` [..., d], of unit length or zero, whose entries SiLU can take: as long as its dip allows."""
    deepest = (-directions).amax(-1, keepdim=True)
    return directions * (DIP / deepest.clamp(min=DIP / LONG))


def before_silu(y: Tensor) -> Tensor:
    """x >= -1.278 with silu(x) = y, for y > -0.278; exactly 0 at 0.

    The fixed point of x = y (1 + exp(-x)), a contraction on this branch.
    """
    x = y
    for _ in range(200):
        x = y * (1 + torch.exp(-x))
    return x
