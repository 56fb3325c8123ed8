#!/usr/bin/env bash
# Make .venv if it is missing and train HaLViT on the embedded digits. Run again, it resumes, or evaluates a finished run.
# Further arguments go to halvit_jax.main:  bash launch/quickstart.sh --workdir=runs/another --config.seed=1
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
environment -r requirements.txt
exec "$PYTHON" -m halvit_jax.main --config=configs/halvit_digits.py --workdir=runs/halvit_digits "$@"
