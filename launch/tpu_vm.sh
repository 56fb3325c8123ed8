#!/usr/bin/env bash
# Train on a TPU VM or on all workers of a pod, and resume after a stop. From a machine with gcloud:
#   launch/tpu_vm.sh NAME ZONE -- --config=configs/halvit_tiny.py --workdir=/mnt/shared/halvit_tiny
# Copies the files of this checkout to ~/halvit_jax on every worker, makes .venv there with requirements.txt and
# jax[tpu] (once), and starts halvit_jax.main --cluster on all of them. --workdir must be a folder that all workers see
# (Filestore) or one in a bucket, gs://BUCKET/FOLDER; data.data_dir one that each worker has or sees, or in a bucket.
# Started again while the exit code is 75 (stopped by a signal), at most RESTARTS (20) times. Ctrl-C or SIGTERM here
# stops all workers, which save a checkpoint; then it ends with 75. PYTHON_VERSION (3.11) is the workers' interpreter;
# where their image lacks it, it is installed with apt.
set -euo pipefail
if [ $# -lt 4 ] || [ "$3" != "--" ]; then
  echo "usage: launch/tpu_vm.sh NAME ZONE -- FLAGS OF halvit_jax.main" >&2
  exit 2
fi
cd "$(dirname "$0")/.."
name=$1 zone=$2 version=${PYTHON_VERSION:-3.11}
shift 3

on_workers() { # COMMAND [WRAPPER]: run it on all of them; the exit code is that of the first worker that failed
  ${2:-} gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"
}

archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
git ls-files -z --cached --others --exclude-standard | tar --null --files-from=- -czf "$archive"
gcloud compute tpus tpu-vm scp "$archive" "$name:halvit_jax.tar.gz" --zone="$zone" --worker=all
on_workers "mkdir -p halvit_jax && tar -xzf halvit_jax.tar.gz -C halvit_jax && cd halvit_jax &&
  { python$version -c 'import ensurepip' 2>/dev/null || { sudo apt-get update && sudo apt-get install -y python$version-venv; } } &&
  source launch/environment.sh && PYTHON_VERSION=$version environment -r requirements.txt 'jax[tpu]' google-cloud-storage"

stopped="" passed=""
stop() { # the [h] keeps pkill from finding itself
  stopped=1 passed=1
  on_workers "pkill -TERM -f '[h]alvit_jax[.]main' || true" &
}
trap stop INT TERM
for ((restart = 0; ; restart++)); do
  # In a session of its own, so that Ctrl-C does not cut the connections before the workers have saved.
  on_workers "cd halvit_jax && exec .venv/bin/python -m halvit_jax.main --cluster$(printf ' %q' "$@")" setsid &
  child=$!
  while code=0 passed="" && { wait "$child" || code=$?; } && [ -n "$passed" ]; do :; done # a signal ends `wait` early
  [ "$code" -eq 75 ] && [ -z "$stopped" ] && [ "$restart" -lt "${RESTARTS:-20}" ] || exit "$code"
  echo "stopped on the workers; starting again" >&2
  sleep "${PAUSE:-10}" && [ -z "$stopped" ] || exit "$code"
done
