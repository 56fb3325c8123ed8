#!/usr/bin/env bash
# Checks that need a GPU: speed beside PyTorch's, references, bitwise repetition, resumption. About eight minutes.
#   bash launch/gpu_check.sh [--out=DIR] [--sections=bench,torch,...] [--models=deit_small,...] [--seconds=480]
#   bash launch/gpu_check.sh --dry          tries the same on the CPU with small sizes, in a few minutes
# Needs jax, flax, optax, orbax-checkpoint and scikit-learn, and for its comparison torch and timm; PYTHON chooses the
# interpreter, else it is .venv's, else python3. Writes gpu_results.json into DIR ($OUT, or the working folder).
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-}"
[ -n "$python" ] || { [ -x .venv/bin/python ] && python=.venv/bin/python || python=python3; }
exec "$python" tests/accelerator/gpu_check.py "$@"
