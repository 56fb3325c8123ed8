#!/usr/bin/env bash
# Train on the nodes of a SLURM cluster, one process a node, and resume after a time limit or a lost node. Submit it from
# the root of the repository, which all nodes must see, as they must --workdir:
#   sbatch --nodes=2 --gpus-per-node=8 --cpus-per-task=64 --time=4:00:00 launch/slurm.sh \
#     --config=configs/halvit_small.py --workdir=runs/halvit_small
# 90 s before the time limit, and when it is pre-empted, the run saves a checkpoint and ends with 75; the job then
# queues itself again, as it does with 70 (peers lost), at most RESTARTS (100) times. scancel ends it for good.
# Options of #SBATCH lines can be given to sbatch, which go before them. PYTHON_VERSION=3.12 chooses the interpreter.
#SBATCH --job-name=halvit_jax
#SBATCH --ntasks-per-node=1
#SBATCH --signal=TERM@90
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
if [ -z "${SLURM_JOB_ID:-}" ] || [ ! -f launch/environment.sh ] || [ $# -eq 0 ]; then
  echo "usage, in the root of the repository: sbatch --nodes=N launch/slurm.sh FLAGS OF halvit_jax.main" >&2
  exit 2
fi
source launch/environment.sh
environment -e ".[cuda]"

# Under SLURM, JAX gives a process only the GPU of its number on the node; here one process has them all.
if [ -n "${SLURM_GPUS_ON_NODE:-}" ]; then
  JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))
  export JAX_LOCAL_DEVICE_IDS
fi
# srun does not inherit the number of cores.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"

code=0
srun --kill-on-bad-exit=0 "$PYTHON" -m halvit_jax.main --cluster "$@" || code=$? # the highest code of all tasks
if [[ $code -eq 75 || $code -eq 70 ]] && [ "${SLURM_RESTART_COUNT:-0}" -lt "${RESTARTS:-100}" ]; then
  echo "ended with exit code $code; queueing again"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
