#!/usr/bin/env bash
# A run under Slurm, on one node or several, queued again by itself until it is finished:
#   sbatch [--nodes=N] runs/slurm.sh CONFIG [section.key=value]...
# RESTARTS: how often ranks are started again after a crash, before the job fails.
#SBATCH --job-name=summerlm
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail
# its environment is the one that sbatch was called in: activate it before
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# torchrun's own variables: the launchers of all nodes meet at the first
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # srun no longer takes it from the job
export PET_NNODES=$SLURM_NNODES
export PET_RDZV_BACKEND=c10d
export PET_RDZV_ENDPOINT=$first:29400
export PET_RDZV_ID=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
srun summerlm train "$@" --nproc "$SLURM_GPUS_ON_NODE" --max-restarts "${RESTARTS:-3}"
code=$?
if [ "$code" = 75 ]; then  # saved on the signal before the time limit: on with it
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
