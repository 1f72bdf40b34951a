"""How much of each head's recurrent state is used, token by token: effective rank, norm, step sizes and decay.

The effective rank of a state S is exp(-sum p ln p) with p its singular values over their sum (Roy and Vetterli 2007): 1
for rank one, min(dk, dv) when all are equal. The text is the first documents joined, and no state is reset between them:
whether a head forgets at a document's start is what is looked at (Siems et al. 2025, arXiv 2502.10297, section on
effective rank).

The text goes through the model in segments with the cache carried. Within a segment the recurrence of every layer is
replayed as it is defined, in float32, from the state the model carried into it; what the model carries out of it must be
the replay's last state, and the largest difference is reported. Looked at are the states after a token's last Householder
step or, with --micro-steps, after each step: the paper's states *before* each step are these, one step later. Softmax
layers have no state and are skipped. Ranks run the whole model each and share the heads.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from titan_dp.errors import UserError
from titan_dp.evals.session import Report, Session, add_common_arguments, check_positive, session
from titan_dp.evals.texts import Texts, add_text_arguments, open_texts
from titan_dp.output import check_matplotlib

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from titan_dp.model.deltaproduct import DeltaProduct, RecurrenceInputs
    from titan_dp.model.transformer import Transformer

# Singular value decompositions a run takes without being asked, times dk dv min(dk, dv): ten minutes of one CPU core at
# dk = dv = 128, where one takes 0.7 ms.
_CHEAP = 2e12
Arrays = dict[str, "np.ndarray"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser)
    add_text_arguments(parser)
    parser.add_argument("--max-length", type=int, default=16384, help="tokens to read, or what there is (default: 16384)")
    parser.add_argument(
        "--every", type=int, help="look at every so many tokens, and at documents' first ones (default: 1, more if costly)"
    )
    parser.add_argument("--micro-steps", action="store_true", help="look after each Householder step, not only a token's last")
    parser.add_argument("--segment", type=int, default=256, help="tokens at once; memory grows with it (default: 256)")


def run(args: argparse.Namespace) -> int:
    with session(args) as s:
        evaluate(s)
    return 0


def evaluate(s: Session) -> Report:
    """Measure, write JSON, CSV and PNG files and print the table; every rank calls it.

    Raises UserError where the model has no recurrent layer or the text no token, RunError where a state is not finite.
    """
    from titan_dp.evals import effective_rank_output as output

    args = s.args
    check_positive(args, "max_length", "every", "segment")
    check_matplotlib()
    pretrained = s.load(args.checkpoint)
    layers = recurrent_layers(pretrained.model)
    if not layers:
        raise UserError(f"{args.checkpoint} has no DeltaProduct or GLA layer, whose state is measured; name a model with one")
    texts = open_texts(args, pretrained.tokenizer)
    ids, starts = read(texts, args.max_length)
    every = args.every or cheap_interval(len(ids), layers, args.micro_steps)
    settings = {
        "texts": texts.identity,
        "max_length": args.max_length,
        "every": every,
        "micro_steps": args.micro_steps,
        "segment": args.segment,
    }
    report = s.report("effective-rank", pretrained.source, settings, beside=output.BESIDE)
    if report.finished is None:
        positions = looked_at(len(ids), starts, every)
        arrays = measure(s, pretrained.model, ids, positions, report)
        facts = output.Facts(
            len(ids), starts, positions, every, pretrained.source.seq_len, list(layers), texts.bos_id is not None, report
        )
        if s.world.is_main:
            output.write_csv(facts, arrays)
            output.draw(facts, arrays)
        skipped = [i for i in range(len(pretrained.model.blocks)) if i not in layers]
        report.finish(output.summary(facts, arrays) | {"skipped_layers": skipped, "largest_possible": _widest(layers)})
    if s.world.is_main:
        output.show(report)
    return report


def recurrent_layers(model: Transformer) -> dict[int, DeltaProduct]:
    """The mixers that have a state, by the index of their block."""
    from titan_dp.model.deltaproduct import DeltaProduct

    return {i: block.attn for i, block in enumerate(model.blocks) if isinstance(block.attn, DeltaProduct)}


def _widest(layers: dict[int, DeltaProduct]) -> int:
    return max(min(mixer.dk, mixer.dv) for mixer in layers.values())


def read(texts: Texts, max_length: int) -> tuple[np.ndarray, list[int]]:
    """Ids [T] int64 of the first documents joined, T at most `max_length`, and where each of them starts."""
    import numpy as np

    pieces: list[np.ndarray] = []
    starts: list[int] = []
    length = 0
    for document in texts:
        if length == max_length:
            break
        if len(document.ids):
            starts.append(length)
            pieces.append(document.ids[: max_length - length])
            length += len(pieces[-1])
    if not pieces:
        raise UserError("there is nothing to look at: the text has no tokens; give more of it")
    return np.concatenate(pieces), starts


def cheap_interval(tokens: int, layers: dict[int, DeltaProduct], micro_steps: bool) -> int:
    """The smallest --every that takes minutes; 1 for small models and short texts."""
    each = sum(m.heads * m.dk * m.dv * min(m.dk, m.dv) * (m.n if micro_steps else 1) for m in layers.values())
    return max(1, -(-tokens * each // int(_CHEAP)))


def looked_at(tokens: int, starts: list[int], every: int) -> np.ndarray:
    """Positions [P] int64, rising: every so many tokens, and the first token of every document."""
    import numpy as np

    return np.union1d(np.arange(0, tokens, every), np.array(starts, dtype=np.int64))


def measure(s: Session, model: Transformer, ids: np.ndarray, positions: np.ndarray, report: Report) -> Arrays:
    """What the model's states are like at `positions` [P] of `ids` [T], for L recurrent layers of H heads and n steps.

    Returns float32 arrays on the CPU, the same on every rank: effective_rank and norm (Frobenius) [L, H, P, m] with m = n
    for --micro-steps and else 1; beta [L, H, P, n]; decay [L, H, P], 1 without a gate; difference and largest [L, H], over
    all segments the largest entry of |replayed - carried state| and of |carried state|.
    """
    import torch

    from titan_dp.distributed import all_reduce_sum

    args, layers = s.args, recurrent_layers(model)
    arrays = report.resume() or _empty(layers, len(positions), args.micro_steps)
    done = int(arrays.pop("done", 0))
    pieces = torch.from_numpy(ids).to(s.world.device)[None].split(args.segment, 1)
    cache: list[Any] = [None] * len(model.blocks)
    with torch.inference_mode(), s.progress() as progress:
        for i, piece in enumerate(progress.track(pieces, description="segments")):
            first = i * args.segment
            low, high = positions.searchsorted([first, first + args.segment])
            where = (positions[low:high] - first).tolist()
            x = model.embeddings(piece)
            for j, block in enumerate(model.blocks):
                before, seen = cache[j], i >= done and j in layers  # what was done before needs the cache only
                inputs = layers[j].recurrence_inputs(block.attn_norm.apply_to(x), before) if seen else None
                x, cache[j] = block.step(x, before)
                if inputs is not None:
                    row, after = list(layers).index(j), cache[j].state
                    heads = [h for h in range(layers[j].heads) if (row * layers[j].heads + h) % s.world.size == s.world.rank]
                    here = {name: a[row, :, low:high] if a.ndim > 2 else a[row] for name, a in arrays.items()}
                    states = before.state if before else torch.zeros_like(after), after
                    _look(inputs, states, layers[j].erase, heads, where, here, f"layer {j} at token {first}")
            if i >= done:
                report.keep(now=i + 1 == len(pieces), done=i + 1, **arrays)
    return {name: all_reduce_sum(torch.from_numpy(a)).numpy() for name, a in arrays.items()}


def _empty(layers: dict[int, DeltaProduct], positions: int, micro_steps: bool) -> Arrays:
    import numpy as np

    mixer = next(iter(layers.values()))  # the recurrent layers of a model are alike
    heads = len(layers), mixer.heads
    decay = *heads, positions
    looks, steps = (*decay, mixer.n if micro_steps else 1), (*decay, mixer.n)
    shapes = {"effective_rank": looks, "norm": looks, "beta": steps, "decay": decay, "difference": heads, "largest": heads}
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def _look(
    inputs: RecurrenceInputs,
    carried: tuple[Tensor, Tensor],
    erase: bool,
    heads: list[int],
    where: list[int],
    out: Arrays,
    name: str,
) -> None:
    """Fill `out` for `heads` at the tokens `where` of a segment, whose states before and after it are `carried`."""
    import torch

    from titan_dp.model.loss import check_finite
    from titan_dp.model.replay import replay

    if not heads:
        return
    q, k, v, beta, g = inputs
    mine = type(inputs)(
        q[..., heads, :], k[..., heads, :], v[..., heads, :], beta[..., heads], None if g is None else g[..., heads]
    )
    before, after = (state[:, heads] for state in carried)
    (states,), last = replay(mine, erase, where, before, every_step=out["norm"].shape[-1] > 1)
    for values in (states, last, after):
        check_finite(values, f"the states of {name} or soon after")
    out["effective_rank"][heads] = effective_rank(states).permute(2, 0, 1).cpu().numpy()
    out["norm"][heads] = torch.linalg.matrix_norm(states).permute(2, 0, 1).cpu().numpy()
    out["beta"][heads] = mine.beta[0, where].permute(2, 0, 1).cpu().numpy()
    out["decay"][heads] = 1 if mine.g is None else mine.g[0, where].exp().T.cpu().numpy()
    for key, value in (("difference", last - after), ("largest", after)):
        out[key][heads] = out[key][heads].clip(min=value[0].abs().amax((1, 2)).cpu().numpy())


def effective_rank(matrices: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values of `matrices` [..., a, b]; [...] float64 (Roy and Vetterli 2007).

    Singular values of at most the dtype's eps times the largest are rounding and count as 0. A zero matrix has rank 0.
    """
    import torch

    sigma = torch.linalg.svdvals(matrices)
    sigma = sigma.where(sigma > torch.finfo(sigma.dtype).eps * sigma[..., :1], 0).double()
    total = sigma.sum(-1, keepdim=True)
    p = sigma / total.where(total > 0, 1)
    return torch.special.entr(p).sum(-1).exp().where(total[..., 0] > 0, 0)
