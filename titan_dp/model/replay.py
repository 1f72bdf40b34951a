"""The states of DeltaProduct's recurrence, computed again as the recurrence is defined: one Householder step at a time.

A kernel returns only the state after the last token. What looks into a model (`evaluate effective-rank`, `state-tracking
inspect`) needs the states in between, after tokens or after single steps, and compares the last one with the kernel's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from titan_dp.model.deltaproduct import RecurrenceInputs


def replay(
    inputs: RecurrenceInputs, erase: bool, where: Sequence[int], state: Tensor | None = None, every_step: bool = False
) -> tuple[Tensor, Tensor]:
    """The states after the tokens `where`, and the state after the last token.

    Args:
        inputs: of T tokens, as `DeltaProduct.recurrence_inputs` returns them; q is not used.
        erase: False drops S^T k, as in `gated_delta_product`.
        where: P rising positions below T.
        state: [B, H, dk, dv], before the first token; None for zero.
        every_step: the states after each of a token's n steps, instead of those after its last step.

    Returns:
        [B, P, n or 1, H, dk, dv] and [B, H, dk, dv], in float32, or in float64 for float64 inputs.
    """
    dtype = torch.promote_types(inputs.k.dtype, torch.float32)
    (B, T, n, H, dk), dv = inputs.k.shape, inputs.v.shape[-1]
    # Rows of the batch are further heads here: [T, n, B H, ...], because baddbmm has one batch dimension.
    k, v = (x.to(dtype).permute(1, 2, 0, 3, 4).flatten(2, 3) for x in (inputs.k, inputs.v))
    beta = inputs.beta.to(dtype).permute(1, 2, 0, 3).flatten(2)[..., None, None]
    decay = None if inputs.g is None else inputs.g.to(dtype).exp().transpose(0, 1).flatten(1)[..., None, None]
    S = k.new_zeros(B * H, dk, dv) if state is None else state.to(dtype).flatten(0, 1)
    states, row = S.new_empty(len(where), n if every_step else 1, *S.shape), {t: i for i, t in enumerate(where)}
    for t in range(T):
        if decay is not None:
            S = S * decay[t]
        for j in range(n):
            key, target = k[t, j, :, None], v[t, j, :, None]  # [B H, 1, dk], [B H, 1, dv]
            if erase:
                target = target - key @ S
            S = torch.baddbmm(S, key.mT, beta[t, j] * target)
            if t in row and (every_step or j == n - 1):
                states[row[t], j if every_step else 0] = S
    return states.unflatten(2, (B, H)).movedim(2, 0), S.unflatten(0, (B, H))
