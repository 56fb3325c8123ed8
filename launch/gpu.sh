#!/usr/bin/env bash
# Train on all GPUs of this machine, and restart after a stop. Makes .venv with JAX for CUDA if it is missing:
#   bash launch/gpu.sh --config=configs/halvit_tiny.py --workdir=runs/halvit_tiny
# The same command is started again when it was stopped by a signal that was not meant for this script (75) or was stuck
# (70), at most RESTARTS (20) times. Ctrl-C or SIGTERM saves a checkpoint and ends it with 75; twice: at once.
# CUDA_VISIBLE_DEVICES=0,1 chooses GPUs; PYTHON_VERSION=3.12 the interpreter of a new .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# -eq 0 ]; then
  echo "usage: bash launch/gpu.sh FLAGS OF halvit_jax.main, e.g. --config=configs/halvit_tiny.py --workdir=runs/a" >&2
  exit 2
fi
command -v nvidia-smi >/dev/null || {
  echo "error: no nvidia-smi here; install the NVIDIA driver, or run python -m halvit_jax.main for the CPU" >&2
  exit 2
}
source launch/environment.sh
environment -e ".[cuda]"

# JAX takes three quarters of a GPU at its start, which fails where another process holds memory of it. Only there it
# is told to take what it needs when it needs it; elsewhere its own way is the faster one.
if [ -z "${XLA_PYTHON_CLIENT_PREALLOCATE:-}" ] && [ -n "$(nvidia-smi --query-compute-apps=pid --format=csv,noheader)" ]; then
  echo "other processes use GPUs of this machine: XLA_PYTHON_CLIENT_PREALLOCATE=false"
  export XLA_PYTHON_CLIENT_PREALLOCATE=false
fi

stopped="" passed=""
stop() {
  stopped=1 passed=1
  kill -TERM "$child" 2>/dev/null || true
}
trap stop INT TERM
for ((restart = 0; ; restart++)); do
  setsid "$PYTHON" -m halvit_jax.main "$@" & # a group of its own, so that Ctrl-C reaches it once, as a SIGTERM
  child=$!
  while code=0 passed="" && { wait "$child" || code=$?; } && [ -n "$passed" ]; do :; done # a signal ends `wait` early
  [[ $code -eq 75 || $code -eq 70 ]] && [ -z "$stopped" ] && [ "$restart" -lt "${RESTARTS:-20}" ] || exit "$code"
  echo "ended with exit code $code; starting again ($((restart + 1)) of ${RESTARTS:-20})" >&2
  sleep "${PAUSE:-10}" && [ -z "$stopped" ] || exit "$code"
done
