#!/usr/bin/env bash
# Run halvit_jax.main as N processes on this machine that work together, as they would on N hosts:
#   bash launch/local_cluster.sh 4 -- --config=configs/halvit_digits.py --workdir=runs/four
# Each line starts with the rank that printed it. Signals are passed on; when one process fails, the others have GRACE seconds
# (60) to notice and end, then they are killed. The exit code is that of the first process that failed.
set -uo pipefail
cd "$(dirname "$0")/.."
if [ $# -lt 2 ] || [ "$2" != "--" ] || ! [ "$1" -gt 0 ] 2>/dev/null; then
  echo "usage: bash launch/local_cluster.sh N -- FLAGS OF halvit_jax.main" >&2
  exit 2
fi
count=$1
shift 2
python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || python=python
port=${PORT:-$("$python" -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')}

pids=()
for rank in $(seq 0 $((count - 1))); do
  "$python" -m halvit_jax.main --coordinator="localhost:$port" --num_processes="$count" --process_id="$rank" "$@" \
    > >(sed -u "s/^/[$rank] /") 2> >(sed -u "s/^/[$rank] /" >&2) &
  pids+=($!)
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM
trap 'kill -INT "${pids[@]}" 2>/dev/null' INT

code=0
running=("${pids[@]}")
while [ ${#running[@]} -gt 0 ]; do
  left=()
  for pid in "${running[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then
      left+=("$pid")
    else
      wait "$pid"
      ended=$?
      if [ $ended -ne 0 ] && [ $code -eq 0 ]; then
        code=$ended
        deadline=$((SECONDS + ${GRACE:-60}))
      fi
    fi
  done
  running=("${left[@]}")
  [ ${#running[@]} -eq 0 ] || sleep 0.2
  [ $code -eq 0 ] || [ $SECONDS -lt $deadline ] || kill -KILL "${running[@]}" 2>/dev/null
done
exit $code
