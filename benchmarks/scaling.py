"""Matching and expanding: seconds of `titan-dp match` over targets from 1 M to 10 B, and of `titan-dp sweep` with 1,000 cells.

    python benchmarks/scaling.py    prints the table and writes benchmarks/results/scaling.{md,json}

"in process" is the work alone, the median of three; "command" the whole process with the interpreter's start, and for
sweeps the writing of 1,000 run folders; "again" the same command when the folders are there already. The goals are 1 s and 5 s.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

from common import Report, median_seconds

from titan_dp.cli import dispatch
from titan_dp.config.load import PROJECT, SHIPPED
from titan_dp.studies.sweep_file import load_sweep

STEPS = "1,2,3,4"
TARGETS = ("1M", "10M", "100M", "1B", "10B")  # below 3 M with a small vocabulary: the paper's embedding is larger
KNOBS = ("heads", "head_dim", "intermediate_size", "hidden_size")

RULE = 'match = "heads"\naspect_ratio = 64\n'
SWEEPS: dict[str, tuple[str, dict[str, list]]] = {
    "1,000 cells, nothing matched": (
        "",
        {"num_householder": [1, 2, 3, 4], "lr": [i * 1e-4 for i in range(1, 26)], "seed": list(range(10))},
    ),
    "1,000 cells, 10 sizes of 10 models": (
        RULE,
        {
            "size": [round(1e7 * 2**i) for i in range(10)],
            "num_householder": [1, 2, 3, 4, 5],
            "use_forget_gate": [False, True],
            "seed": list(range(10)),
        },
    ),
    "1,000 cells, 100 sizes of 10 models": (
        RULE,
        {
            "size": [round(1e7 * 1.07**i) for i in range(100)],
            "num_householder": [1, 2, 3, 4, 5],
            "use_forget_gate": [False, True],
        },
    ),
}


def command_seconds(*arguments: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "titan_dp.cli", *arguments], cwd=PROJECT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def measure_match(report: Report, target: str, by: str, gated: str) -> None:
    arguments = ["match", "--params", target, "--num-householder", STEPS, "--by", by, "--gated", gated]
    if target == "1M":  # on the default grid few of its shapes are within the tolerance
        arguments += ["--model.vocab_size", "512", "--multiple", "16"]

    def work() -> None:
        with redirect_stdout(io.StringIO()):
            dispatch(arguments)

    report.add(
        {
            "what": f"match {target} by {by}, {4 if gated == 'no' else 8} models",
            "in process s": median_seconds(work, repeats=3),
            "command s": command_seconds(*arguments),
            "again s": "",
            "goal s": 1,
        }
    )


def measure_sweep(report: Report, what: str, folder: Path) -> None:
    rule, axes = SWEEPS[what]
    file = folder / "sweep.toml"
    lines = "".join(f"{axis} = {str(values).lower()}\n" for axis, values in axes.items())
    file.write_text(
        f'extends = "{SHIPPED / "base" / "paper.toml"}"\n[sweep]\n{rule}[sweep.axes]\n{lines}'
        f'[job]\ndump_folder = "{folder / "outputs"}"\n[training]\ntokens = "10B"\n'
    )
    assert len(load_sweep(file).cells) == 1000
    report.add(
        {
            "what": f"sweep, {what}",
            "in process s": median_seconds(lambda: load_sweep(file), repeats=3, warmup=0),
            "command s": command_seconds("sweep", str(file)),
            "again s": command_seconds("sweep", str(file)),
            "goal s": 5,
        }
    )


def main() -> None:
    report = Report("scaling", f"titan-dp match for n_h = {STEPS} and titan-dp sweep of 1,000 cells, seconds")
    for target in TARGETS:
        measure_match(report, target, "heads", "no")
    for by in KNOBS:
        measure_match(report, "10B", by, "both")
    for what in SWEEPS:
        with tempfile.TemporaryDirectory() as folder:
            measure_sweep(report, what, Path(folder))
    report.write()


if __name__ == "__main__":
    main()
