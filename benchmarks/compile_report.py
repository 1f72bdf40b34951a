"""Compile the kernels ahead of time for each architecture of the table and report what they need; no GPU is touched.

    python benchmarks/compile_report.py            every line of the table; writes results/compile.md and .json
    python benchmarks/compile_report.py --quick    the sizes that are trained most, printed and not written

Exits with 1 if a kernel asks for more shared or tensor memory than the chip has, (16-bit) has no matrix instructions, or
overwrites what an unfinished product still reads (triton_backend/races.py). Spilled registers are counted, and are no fault:
timed on a Hopper, blocks with some were the fastest. The report carries a hash of the kernels' sources and of Triton's
version, so a test can tell when it is old.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from deltaproduct_kernels.triton_backend.aot import Resources

RESULTS = Path(__file__).parent / "results"
KERNELS = Path(__file__).parent.parent / "kernels" / "deltaproduct_kernels" / "triton_backend"
SOURCES = (
    "tiles",
    "solve",
    "states",
    "scan",
    "adjoint",
    "gradients",
    "decode",
    "front_end",
    "launch",
    "layout",
    "configs",
    "races",
)
WIDTHS = (32, 64, 128, 256)


class Case(NamedTuple):
    arch: int
    dk: int
    dv: int
    n: int
    dtype: str
    gated: bool = True
    packed: bool = False
    part: bool = False
    grouped: bool = False

    @property
    def options(self) -> str:
        """As the report calls them."""
        named = {"ungated": not self.gated, "packed": self.packed, "cut": self.part, "grouped": self.grouped}
        return " ".join(name for name, is_so in named.items() if is_so) or "-"


def cases(quick: bool) -> list[Case]:
    """For sm_90 every size with n = 2, every option, and square heads of all n; for the other chips square heads of 1 and 2
    steps (sm_100: of all); for each grouped heads of 128 x 64 with n = 3, as the largest model trained with n > 1 has them,
    and what else it takes to reach every line of the table."""
    if quick:
        return [*(Case(arch, 128, 128, 2, "bfloat16") for arch in (80, 86, 90, 100)), Case(90, 64, 64, 2, "float32")]
    chosen: list[Case] = []
    reached: set[tuple[Any, ...]] = set()
    for case in possible():
        lines = set(lines_of(case))
        square = case.dk == case.dv
        if case.arch == 90:
            wanted = not case.part and (case.n == 2 or square or case[1:4] == (128, 64, 3))
        else:
            wanted = square and case.options == "-" and (case.n <= 2 or case.arch == 100)
        wanted = wanted or case.grouped
        if (wanted and case.dtype == "bfloat16") or lines - reached:
            chosen.append(case)
            reached |= lines
    return list(dict.fromkeys(chosen))


def possible() -> Iterator[Case]:
    """All sizes and options that are told apart."""
    from deltaproduct_kernels.triton_backend.configs import ARCHITECTURES

    for arch, n in itertools.product(sorted(ARCHITECTURES, key=lambda arch: arch != 90), (2, 1, 3, 4)):
        for dk, dv in itertools.product(WIDTHS, WIDTHS):
            yield Case(arch, dk, dv, n, "bfloat16")
            if dk < 256:
                yield Case(arch, dk, dv, n, "float32")
        for dk in (64, 128):
            for gated, packed, part in itertools.product((False, True), (False, True), (False, True)):
                yield Case(arch, dk, dk, n, "bfloat16", gated=gated, packed=packed, part=part)
        yield Case(arch, 128, 128, n, "float16")
        if n == 3:
            yield Case(arch, 128, 64, n, "bfloat16", grouped=True)


def lines_of(case: Case) -> list[tuple[Any, ...]]:
    """The table's lines that a case compiles: architecture, width, kernel, number."""
    from deltaproduct_kernels.triton_backend import configs

    arch, dk, dv, n, dtype, gated = case[:6]
    bits = 32 if dtype == "float32" else 16
    used = [
        "solve",
        "gradients",
        *(["states_cut", "adjoint_cut", "scan"] if case.part else ["states", "adjoint"]),
    ]
    used += ["decode"] if _decodes(case) else []
    sizes: dict[str, Any] = {"dk": dk, "dv": dv, "n": n, "bits": bits, "arch": arch, "gated": gated}
    return [(arch, bits, kernel, configs.line(kernel, **sizes)[0]) for kernel in used]


def _decodes(case: Case) -> bool:
    """Whether kernels that are the same for every n, the front end's too, are compiled for this case."""
    return (case.n == 2 or case.grouped) and not case.part


def compile_case(case: Case) -> list[dict[str, Any]]:
    """Every kernel that a training step and a step of decoding launch for one size."""
    import torch
    from deltaproduct_kernels.triton_backend import front_end, launch
    from deltaproduct_kernels.triton_backend.aot import Compiler
    from deltaproduct_kernels.triton_backend.layout import EVERY, ROWS

    def empty(*shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype or getattr(torch, case.dtype), device="meta")

    arch, dk, dv, n = case[:4]
    B, T, H, W = 1 if case.packed else 8, 4096, 16, 4
    single, bits = torch.float32, 32 if case.dtype == "float32" else 16
    G = H // 4 if case.grouped else H
    q, k, v, beta = empty(B, T, G, dk), empty(B, T, n, G, dk), empty(B, T, n, H, dv), empty(B, T, n, H, dtype=single)
    g = empty(B, T, H, dtype=single) if case.gated else None
    cu_seqlens = empty(9, dtype=torch.int32) if case.packed else None
    state = empty(8 if case.packed else B, H, dk, dv, dtype=single) if case.part else None
    part = 16 * EVERY * (ROWS[bits] // n) if case.part else None
    run = Compiler.of(arch)
    o, final, saved = launch.forward(q, k, v, beta, g, state, cu_seqlens, 1.0, True, True, bits, part=part, run=run)
    dfinal = final if case.part else None
    launch.backward(o, dfinal, q, k, v, beta, g, saved, cu_seqlens, 1.0, True, bits, part=part, run=run)
    first = len(run.compiled)
    if _decodes(case):
        launch.decode(q, k, v, beta, g, state, 1.0, True, bits, run=run)
        projections = [x.flatten(2) for x in (q, k, v, empty(B, T, n, H))] + [empty(B, T, H) if case.gated else None]
        weights = [empty(x.shape[-1], 1, W) for x in projections[:3] if x is not None]
        gate = [empty(H, dtype=single) if case.gated else None] * 2
        position = empty(T, dtype=torch.int32) if case.packed else None
        for taps in (weights, [None] * 3):  # with and without a convolution
            arguments: Any = (*projections, *taps, *gate, position, H, G, 2.0, 0.0)
            grads = front_end.forward(*arguments, run=run)
            front_end.backward(grads, *arguments, run=run)
    rows, seen = [], dict[str, int]()
    for i, r in enumerate(run.compiled):
        name = r.kernel.removesuffix("_kernel")
        seen[name] = seen.get(name, 0) + 1
        needs_matrix = i < first and bits == 16 and name != "scan"
        rows.append(
            {
                "arch": arch,
                "dtype": case.dtype,
                "dk": dk,
                "dv": dv,
                "n": n,
                "options": case.options,
                "kernel": f"{name} {seen[name]}" if seen[name] > 1 else name,
                "blocks": f"{r.config.block_k or '-'} x {r.config.block_v or '-'}",
                "warps": r.config.warps,
                "stages": r.config.stages,
                "registers": r.registers,
                "spills": r.spills,
                "shared": r.shared,
                "tensor": r.tensor_memory,
                "matrix": " ".join(f"{k} {v}" for k, v in r.matrix.items()) or "-",
                "fault": fault(r, needs_matrix),
            }
        )
    return rows


def fault(r: Resources, needs_matrix: bool = False) -> str:
    """What is wrong with a compiled kernel; '' if nothing is."""
    from deltaproduct_kernels.triton_backend import configs

    wrong = {
        "shared memory": r.shared > configs.SHARED_MEMORY[r.arch],
        "tensor memory": r.tensor_memory > configs.TENSOR_MEMORY,
        "no matrix instructions": needs_matrix and not r.matrix,
        f"race on {', '.join(race.tile for race in r.races)}": bool(r.races),
    }
    return ", ".join(name for name, found in wrong.items() if found)


def fingerprint() -> str:
    """Of everything the machine code depends on."""
    text = "".join((KERNELS / f"{name}.py").read_text() for name in SOURCES) + version("triton")
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write(rows: list[dict[str, Any]]) -> None:
    facts = {"triton": version("triton"), "fingerprint": fingerprint(), "kernels": len(rows)}
    (RESULTS / "compile.json").write_text(
        json.dumps(facts)[:-1] + ', "rows": [\n' + ",\n".join(json.dumps(row) for row in rows) + "\n]}\n"
    )
    keys = [key for key in rows[0] if key not in ("fault", "tensor")]
    plain = [row for row in rows if row["options"] == "-" and row["dtype"] == "bfloat16"]
    shown = [row for row in plain if row["dk"] == row["dv"] and row["dk"] in (64, 128)]
    lines = ["# What the kernels need of a chip", ""]
    faults = sum(bool(row["fault"]) for row in rows)
    lines += [f"`python benchmarks/compile_report.py`, triton {facts['triton']}: {len(rows)} kernels compiled ahead of time,"]
    lines += [f"{faults} with a fault. Shown: gated, bfloat16, square heads of 64 and 128; all are in compile.json."]
    lines += ["Spills: loads and stores of local memory in the machine code. Shared: bytes a program.", ""]
    lines += ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    lines += ["| " + " | ".join(str(row[key]) for key in keys) + " |" for row in shown]
    (RESULTS / "compile.md").write_text("\n".join(lines) + "\n")
    print(f"written to {RESULTS / 'compile'}.md and .json")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few sizes; write nothing")
    arguments = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    todo, rows = list(cases(arguments.quick)), []
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        for case, result in zip(todo, pool.map(compile_case, todo), strict=True):
            rows += result
            for row in result:
                if arguments.quick or row["fault"]:
                    print("  ".join(str(value) for value in row.values()), flush=True)
            if not arguments.quick:
                print(*case, flush=True)
    faults = sum(bool(row["fault"]) for row in rows)
    print(f"{len(rows)} kernels, {faults} with a fault")
    if not arguments.quick:
        write(rows)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
