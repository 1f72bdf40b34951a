"""`titan-dp check-kernels`: do the Triton kernels compute the right numbers on this GPU?

Outputs and every gradient of all head sizes, 1 to 4 Householder steps, bfloat16 and float32, against the recurrence in float64.
A run checks its own sizes before its first step (debug.check_kernels); this is for a new card, driver or Triton. It compiles
as it goes: a size takes seconds, all of them minutes. Exit code 1 if a size is wrong.
"""

from __future__ import annotations

import argparse
import textwrap
import time
from typing import TYPE_CHECKING, Any

from titan_dp import config
from titan_dp.config.arguments import positive
from titan_dp.config.mixers import MIXERS, DeltaProduct
from titan_dp.errors import UserError, counted

if TYPE_CHECKING:
    import torch
_ROW = "{:8}  {:>3}  {:>3}  {:>3}  {:>20}  {:>7}  {}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for flag, what in (("--dk", "keys of this size"), ("--dv", "values of this size"), ("--n", "this n_h")):
        parser.add_argument(flag, type=positive, metavar="N", help=f"only {what}")


def run(args: argparse.Namespace) -> int:
    import torch
    from deltaproduct_kernels.triton_backend.ops import why_not

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if reason := why_not(device):
        raise UserError(
            f"titan-dp check-kernels cannot run the Triton kernels here: {reason} (TRITON_INTERPRET=1 interprets them on a CPU)"
        )
    from deltaproduct_kernels.check import check, sizes

    cases = [c for c in sizes() if all(getattr(args, a) in (None, getattr(c, a)) for a in ("dk", "dv", "n"))]
    if not cases:
        raise UserError("no size of the kernels' table is that of --dk, --dv and --n; leave one of them out")
    print(_ROW.format("dtype", "dk", "dv", "n_h", "largest error", "seconds", ""), flush=True)
    wrong = 0
    for case in cases:
        began = time.monotonic()
        checked = check(case, device)
        took, verdict = f"{time.monotonic() - began:.1f}", "WRONG" if checked.faults else "right"
        print(_ROW.format(case.dtype, case.dk, case.dv, case.n, checked.largest, took, verdict), flush=True)
        for fault in checked.faults:
            print(textwrap.indent(textwrap.fill(fault, 76), "    "), flush=True)
        wrong += bool(checked.faults)
    print(f"{counted(len(cases), 'size')}, {wrong} wrong: {_where(device)}")
    return 1 if wrong else 0


def _where(device: torch.device) -> str:
    """The card and the compiler, for a report."""
    import torch
    import triton

    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "Triton's interpreter"
    return f"{card}, triton {triton.__version__}, torch {torch.__version__}"


def uses_operator(c: config.Config) -> bool:
    """Whether layers of the model run `gated_delta_product`, not a loop of their own or softmax attention."""
    return isinstance(MIXERS[c.model.mixer], DeltaProduct)


def check_run(c: config.Config, local_batch_size: int, device: torch.device) -> str:
    """Check what a run launches, on a short row; returns a line for the head of the run, empty if its dtype goes another way.

    `local_batch_size`, of a rank's micro-batch, decides whether rows are cut among programs. Raises UserError if it is wrong:
    the next try would be wrong as well.
    """
    import torch
    from deltaproduct_kernels.check import Case, check, short_row
    from deltaproduct_kernels.triton_backend.ops import why_not

    began, m, t = time.monotonic(), c.model, c.training
    if why_not(device, getattr(torch, t.mixed_precision_param), m.head_dim, m.head_v_dim):
        return ""
    packed = c.data.source != "state_tracking" and c.data.document_boundaries == "reset"
    segments = c.parallelism.context_parallel_degree
    options: dict[str, Any] = {"gate": 0.05 if m.use_forget_gate else None, "beta": (0.0, 2.0 if m.allow_neg_eigval else 1.0)}
    options |= {"B": local_batch_size, "T": t.seq_len // segments, "H": m.num_heads}
    options |= {"erase": m.mixer != "gla", "groups": m.key_heads if m.key_heads != m.num_heads else None}
    whole = Case(m.head_dim, m.head_v_dim, m.num_householder, t.mixed_precision_param, **options, state=segments > 1)
    case = short_row(whole, packed, device)
    checked = check(case, device)
    said = {"grouped": case.groups is not None, "gate": case.gate is not None, "packed": packed, "cut": case.spans is not None}
    words = [word for word, is_so in said.items() if is_so]
    sizes = ", ".join([f"dk {case.dk}, dv {case.dv}, n_h {case.n}, {case.dtype}", *words])
    if checked.faults:
        raise UserError(
            f"the Triton kernels compute wrong numbers on {_where(device)} ({sizes}, against the recurrence in float64): "
            f"{'; '.join(checked.faults)}; train with --model.backend torch or another Triton or ptxas (docs/kernels.md), "
            "and report what titan-dp check-kernels prints (--debug.check_kernels false trains unchecked)"
        )
    return f"right against float64 ({sizes}): largest relative error {checked.largest}; {time.monotonic() - began:.1f} s"
