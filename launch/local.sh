#!/usr/bin/env bash
# One machine: every GPU there is (two CPU processes where there is none). launch/README.md has the rest.
# Usage: launch/local.sh CONFIG [--section.key VALUE ...]
#   NPROC=4       processes, where that is not the number of GPUs
#   VENV=DIR      the Python environment, where that is not .venv ($CONDA_PREFIX for conda)
set -euo pipefail
if [[ $# -eq 0 || $1 == -* ]]; then
    echo "usage: launch/local.sh CONFIG [--section.key VALUE ...]" >&2
    exit 2
fi
cd "$(dirname "$0")/.."
python=${VENV:-.venv}/bin/python
exec "$python" launch/torchrun.py --standalone --nproc-per-node="${NPROC:-$("$python" -m titan_dp.hardware)}" train.py --config "$@"
