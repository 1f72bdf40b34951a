#!/usr/bin/env bash
# One machine: every GPU there is (two CPU processes where there is none).
# Usage: launch/local.sh 800m.toml [--section.key VALUE ...]
set -euo pipefail
cd "$(dirname "$0")/.."
config=${1:?usage: launch/local.sh CONFIG [--section.key VALUE ...]}
shift
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
exec .venv/bin/torchrun --standalone --nproc_per_node="$((gpus > 0 ? gpus : 2))" train.py --config "$config" "$@"
